//! A sparse array of bytes that many threads read and write: chunks that exist only where something other
//! than zeroes was written.
//!
//! The table of chunks is split into shards by the chunk's number, so that neighbours, which different queues
//! are likely to work on at a time, are behind different locks. A lock is held for the copy of one chunk's part
//! at most: what a transfer finds is never torn within a chunk.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::mem_slab::{CHUNK, SLAB, Slab};
use crate::error::Errno;

const SHARDS: usize = 64;

/// As long as a chunk, to compare with.
static ZEROES: [u8; CHUNK] = [0; CHUNK];

pub(super) struct Chunks {
    shards: Box<[RwLock<Shard>]>,
    count: AtomicU64,
}

/// Some of the chunks, and the memory of theirs.
#[derive(Default)]
struct Shard {
    /// Which place in the slabs a chunk has.
    places: HashMap<u64, usize>,
    slabs: Vec<Slab>,
    /// Places without a chunk, all zeroes.
    free: Vec<usize>,
}

impl Shard {
    fn get(&self, chunk: u64) -> Option<&[u8]> {
        let place = *self.places.get(&chunk)?;
        Some(self.slabs[place / SLAB].chunk(place % SLAB))
    }

    fn get_mut(&mut self, chunk: u64) -> Option<&mut [u8]> {
        let place = *self.places.get(&chunk)?;
        Some(self.slabs[place / SLAB].chunk_mut(place % SLAB))
    }

    /// A place for a chunk that has none.
    fn insert(&mut self, chunk: u64) -> Result<&mut [u8], Errno> {
        if self.free.is_empty() {
            let first = self.slabs.len() * SLAB;
            self.slabs.push(Slab::new()?);
            self.free.extend((first..first + SLAB).rev());
        }
        let Some(place) = self.free.pop() else { unreachable!("there is one now") };
        self.places.insert(chunk, place);
        Ok(self.slabs[place / SLAB].chunk_mut(place % SLAB))
    }

    fn remove(&mut self, chunk: u64) -> bool {
        let Some(place) = self.places.remove(&chunk) else { return false };
        self.slabs[place / SLAB].clear(place % SLAB);
        self.free.push(place);
        true
    }
}

/// The part of a range that lies in one chunk.
struct Part {
    chunk: u64,
    /// Within the chunk.
    inside: Range<usize>,
    /// Bytes of the range before this part.
    at: u64,
}

fn parts(offset: u64, len: u64) -> impl Iterator<Item = Part> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let position = offset + at;
        let start = (position % CHUNK as u64) as usize;
        let n = ((CHUNK - start) as u64).min(len - at);
        let part = Part { chunk: position / CHUNK as u64, inside: start..start + n as usize, at };
        at += n;
        Some(part)
    })
}

impl Chunks {
    pub(super) fn new() -> Self {
        Chunks {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            count: AtomicU64::new(0),
        }
    }

    /// Bytes of the chunks that exist.
    pub(super) fn used(&self) -> u64 {
        self.count.load(Ordering::Relaxed) * CHUNK as u64
    }

    // Nothing that can panic leaves a shard in two minds: poison means nothing.
    fn shared(&self, chunk: u64) -> RwLockReadGuard<'_, Shard> {
        self.shards[chunk as usize % SHARDS].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self, chunk: u64) -> RwLockWriteGuard<'_, Shard> {
        self.shards[chunk as usize % SHARDS].write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `sink` with the bytes of a range, piece by piece: where in the range they belong, and `Ok(data)`
    /// or `Err(length)` of a hole.
    pub(super) fn read(
        &self,
        offset: u64,
        len: usize,
        mut sink: impl FnMut(usize, Result<&[u8], usize>),
    ) {
        for part in parts(offset, len as u64) {
            let at = part.at as usize;
            match self.shared(part.chunk).get(part.chunk) {
                Some(chunk) => sink(at, Ok(&chunk[part.inside])),
                None => sink(at, Err(part.inside.len())),
            }
        }
    }

    /// Fails if there is no memory; what lies before has been written then.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<(), Errno> {
        for part in parts(offset, data.len() as u64) {
            let piece = &data[part.at as usize..][..part.inside.len()];
            let mut shard = self.exclusive(part.chunk);
            if let Some(chunk) = shard.get_mut(part.chunk) {
                chunk[part.inside].copy_from_slice(piece);
            } else if piece != &ZEROES[..piece.len()] {
                shard.insert(part.chunk)?[part.inside].copy_from_slice(piece);
                self.count.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Makes a range read as zeroes; whole chunks cease to exist.
    pub(super) fn zero(&self, offset: u64, len: u64) {
        for part in parts(offset, len) {
            let mut shard = self.exclusive(part.chunk);
            if part.inside.len() == CHUNK {
                if shard.remove(part.chunk) {
                    self.count.fetch_sub(1, Ordering::Relaxed);
                }
            } else if let Some(chunk) = shard.get_mut(part.chunk) {
                chunk[part.inside].fill(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(chunks: &Chunks, offset: u64, len: usize) -> Vec<u8> {
        // Not zeroes, so that what the chunks do not fill is seen.
        let mut buf = vec![0xee; len];
        chunks.read(offset, len, |at, piece| match piece {
            Ok(data) => buf[at..][..data.len()].copy_from_slice(data),
            Err(hole) => buf[at..][..hole].fill(0),
        });
        buf
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn zeroes_take_no_memory_and_holes_stay_holes() {
        let chunks = Chunks::new();
        chunks.write(&[0; 3 * CHUNK], 17).unwrap();
        assert_eq!(read(&chunks, 0, 2 * CHUNK), vec![0; 2 * CHUNK]);
        assert_eq!(chunks.used(), 0);
        chunks.write(&[1], u64::MAX / 2).unwrap();
        assert_eq!(chunks.used(), CHUNK as u64);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn whole_chunks_are_given_back_and_parts_are_zeroed() {
        let chunks = Chunks::new();
        chunks.write(&[7; 3 * CHUNK], 0).unwrap();
        chunks.zero(CHUNK as u64 / 2, 2 * CHUNK as u64);
        assert_eq!(chunks.used(), 2 * CHUNK as u64);
        let bytes = read(&chunks, 0, 3 * CHUNK);
        assert!(bytes[..CHUNK / 2].iter().all(|b| *b == 7));
        assert!(bytes[CHUNK / 2..][..2 * CHUNK].iter().all(|b| *b == 0));
        assert!(bytes[CHUNK / 2 + 2 * CHUNK..].iter().all(|b| *b == 7));
        chunks.zero(0, 3 * CHUNK as u64);
        assert_eq!(chunks.used(), 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn threads_on_the_same_chunks_lose_nothing() {
        let chunks = Chunks::new();
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let chunks = &chunks;
                scope.spawn(move || {
                    // Interleaved within each chunk, so that all four allocate the same ones.
                    for block in (usize::from(thread)..2 * CHUNK / 512).step_by(4) {
                        chunks.write(&[thread + 1; 512], block as u64 * 512).unwrap();
                    }
                });
            }
        });
        assert_eq!(chunks.used(), 2 * CHUNK as u64);
        for (i, block) in read(&chunks, 0, 2 * CHUNK).chunks(512).enumerate() {
            assert!(block.iter().all(|b| usize::from(*b) == i % 4 + 1), "block {i}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]
        #[test]
        fn it_is_an_array(
            steps in prop::collection::vec((0..4 * CHUNK, 1..2 * CHUNK, 0u8..4), 1..12)
        ) {
            let chunks = Chunks::new();
            let mut model = vec![0u8; 6 * CHUNK];
            for (offset, len, value) in steps {
                // 0 writes zeroes, 3 makes a hole.
                model[offset..][..len].fill(value % 3);
                match value {
                    3 => chunks.zero(offset as u64, len as u64),
                    value => chunks.write(&vec![value; len], offset as u64).unwrap(),
                }
                prop_assert_eq!(&read(&chunks, offset as u64 / 2, len), &model[offset / 2..][..len]);
            }
            prop_assert!(read(&chunks, 0, model.len()) == model);
        }
    }
}
