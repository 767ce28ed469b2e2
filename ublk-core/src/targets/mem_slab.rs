//! Memory in chunks that can be given back one by one, which no allocator promises.
//!
//! Invariant: a slab is the only owner of its mapping, and its bytes are reached by borrowing the slab: shared
//! for shared slices, mutably for everything else. So the borrow checker sees them as it sees a `Vec`'s.

use crate::error::Errno;
use crate::sys::memory::{Backing, Region};

/// Bytes of a chunk: few enough to be cheap for scattered small writes, enough for a table that is small
/// beside what it points to. A multiple of every page size.
pub(super) const CHUNK: usize = 64 << 10;

/// Chunks of a slab.
pub(super) const SLAB: usize = 64;

/// A mapping of [`SLAB`] chunks, which take memory from their first write until they are cleared.
pub(super) struct Slab(Region);

impl Slab {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Slab(Region::new(SLAB * CHUNK, Backing::default())?))
    }

    pub(super) fn chunk(&self, index: usize) -> &[u8] {
        assert!(index < SLAB);
        let start = self.0.at(index * CHUNK);
        // SAFETY: CHUNK bytes from there are in the mapping, which lives as long as `self`; anonymous memory is
        // initialised; it changes only by `&mut self`.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), CHUNK) }
    }

    pub(super) fn chunk_mut(&mut self, index: usize) -> &mut [u8] {
        assert!(index < SLAB);
        let start = self.0.at(index * CHUNK);
        // SAFETY: as in `chunk`; unique, because `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), CHUNK) }
    }

    /// Makes a chunk read as zeroes and gives its memory back to the system, unless the process has it locked.
    pub(super) fn clear(&mut self, index: usize) {
        assert!(index < SLAB);
        // SAFETY: in the mapping; nobody has a reference to it, because `self` is borrowed mutably.
        if unsafe { self.0.discard(index * CHUNK, CHUNK) }.is_err() {
            self.chunk_mut(index).fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri locks no memory")]
    fn what_is_cleared_reads_as_zeroes_also_where_memory_is_locked() {
        let mut slab = Slab::new().unwrap();
        for locked in [false, true] {
            slab.chunk_mut(1).fill(0xaa);
            if locked {
                let chunk = slab.chunk(1);
                // SAFETY: memory of ours; locking changes nothing in it.
                assert_eq!(unsafe { libc::mlock(chunk.as_ptr().cast(), 4096) }, 0);
            }
            slab.clear(1);
            assert!(slab.chunk(1).iter().all(|&byte| byte == 0), "locked: {locked}");
        }
    }
}
