//! How requests come in and results go out in batches: one command for many tags.
//!
//! All tags are offered once, at the start. One multishot fetch delivers arrays of tags whose requests have come;
//! results are collected over a turn and committed by one command a queue, which offers their tags again.

use io_uring::squeue::Entry;

use super::core::Token;
use super::path::DataPath;
use super::slot::Slot;
use crate::error::Errno;
use crate::uring::batch::{BatchCommands, FETCH_BYTES, Layout};
use crate::uring::buffer_ring::BufferRing;
use crate::uring::sqe::Target;
use crate::uring::worker_ring::WorkerRing;

/// Arrays of tags that can be on their way to us. Should they not suffice, the fetch ends and is made again.
const MOST_ARRAYS: u16 = 64;

/// What a completion of the fetch brought.
#[derive(Default)]
pub(crate) struct Fetched {
    /// The fetch has to be made again.
    pub(crate) again: Option<Entry>,
    /// It ended for good, for a reason that is nobody's stop.
    pub(crate) failure: Option<Errno>,
}

/// What a completion of a commit brought.
#[derive(Default)]
pub(crate) struct Committed {
    /// A tag that the kernel did not take, and why.
    pub(crate) rejected: Option<(u16, Errno)>,
    /// The elements behind that one.
    pub(crate) again: Option<Entry>,
}

/// The batch commands of one queue.
pub(crate) struct Batch {
    key: u32,
    commands: BatchCommands,
    arrays: BufferRing,
    /// Kept until the kernel has read it.
    offer: Vec<u8>,
    /// Results that are to be committed.
    pending: Vec<u8>,
    /// Commits in flight, by their number, and how much of each is done.
    flying: Vec<Option<(Vec<u8>, usize)>>,
    spare: Vec<Vec<u8>>,
    /// Tags that are with the server, or whose commit the kernel has not taken.
    out: u32,
    fetching: bool,
    home: bool,
}

impl Batch {
    pub(crate) fn new(
        ring: &WorkerRing,
        key: u32,
        queue: u16,
        depth: u16,
        target: Target,
        lanes: u16,
        path: DataPath,
    ) -> Result<Self, Errno> {
        let layout = match path {
            DataPath::AutoBufReg => Layout::AutoRegister,
            path if path.is_copied_by_driver() => Layout::Address,
            _ => Layout::Plain,
        };
        // The driver serves one fetch until it runs out of buffers, and then the one that has waited longest: so
        // workers that share a queue take one share of its tags each in turn.
        let (arrays, bytes) = match lanes {
            1 => (depth.next_power_of_two().min(MOST_ARRAYS), FETCH_BYTES),
            n => (1, FETCH_BYTES.min(usize::from(depth.div_ceil(n)) * size_of::<u16>())),
        };
        let group = u16::try_from(key).map_err(|_| Errno::ENOSPC)?;
        Ok(Batch {
            key,
            commands: BatchCommands::new(target, queue, layout),
            arrays: BufferRing::new(ring, group, arrays, bytes)?,
            offer: Vec::new(),
            pending: Vec::new(),
            flying: Vec::new(),
            spare: Vec::new(),
            out: 0,
            fetching: true,
            home: false,
        })
    }

    /// Offers every tag.
    pub(crate) fn offer<'a>(&mut self, slots: impl Iterator<Item = &'a Slot>) -> Entry {
        let layout = self.commands.layout();
        for slot in slots {
            layout.put(&mut self.offer, slot.place().tag, 0, Self::buffer(layout, slot));
        }
        let token = Token::Offer { key: self.key }.encode();
        self.commands.prepare(&self.offer).user_data(token)
    }

    /// Has the kernel deliver requests, once the tags are offered.
    pub(crate) fn fetch(&self) -> Entry {
        let token = Token::Fetch { key: self.key }.encode();
        self.commands.fetch(self.arrays.group()).user_data(token)
    }

    fn buffer(layout: Layout, slot: &Slot) -> u64 {
        match (layout, slot.reach()) {
            (Layout::AutoRegister, Some(reach)) => reach.index().into(),
            (Layout::Address, _) => slot.buffer().start().as_ptr() as u64,
            _ => 0,
        }
    }

    /// The kernel has read the offer.
    pub(crate) fn offered(&mut self) {
        self.offer = Vec::new();
    }

    /// The fetch has completed once more: `array` is the buffer that it has used. Appends the tags that it brought.
    pub(crate) fn fetched(
        &mut self,
        result: i32,
        array: Option<u16>,
        more: bool,
        tags: &mut Vec<u16>,
    ) -> Fetched {
        let mut bytes = [0u8; FETCH_BYTES];
        let len = usize::try_from(result).unwrap_or(0).min(FETCH_BYTES);
        if let Some(array) = array {
            self.arrays.take(array, &mut bytes[..len]);
        }
        let words = bytes[..len].chunks_exact(size_of::<u16>());
        self.out += words.len() as u32;
        tags.extend(words.map(|word| u16::from_ne_bytes([word[0], word[1]])));
        let mut fetched = Fetched::default();
        if !more {
            match Errno::from_result(result) {
                None | Some(Errno::ENOBUFS) => fetched.again = Some(self.fetch()),
                errno => {
                    self.fetching = false;
                    // The device stops, or the ring is being torn down around the command.
                    let ends = [Errno::ENODEV, Errno::ECANCELED, Errno::EINTR];
                    fetched.failure = errno.filter(|errno| !ends.contains(errno));
                }
            }
        }
        fetched
    }

    /// Puts a result to those of this turn.
    pub(crate) fn commit(&mut self, slot: &Slot, result: i32) {
        let layout = self.commands.layout();
        layout.put(&mut self.pending, slot.place().tag, result, Self::buffer(layout, slot));
    }

    /// Commits this turn's results.
    pub(crate) fn flush(&mut self) -> Option<Entry> {
        if self.pending.is_empty() {
            return None;
        }
        let empty = self.spare.pop().unwrap_or_default();
        let elements = std::mem::replace(&mut self.pending, empty);
        let index = self.flying.iter().position(Option::is_none).unwrap_or_else(|| {
            self.flying.push(None);
            self.flying.len() - 1
        });
        self.flying[index] = Some((elements, 0));
        self.send(index)
    }

    fn send(&self, index: usize) -> Option<Entry> {
        let (elements, done) = self.flying[index].as_ref()?;
        // Tags are fewer than 65,536, and so are the commits in flight.
        let token = Token::Commit { key: self.key, index: index as u16 }.encode();
        Some(self.commands.commit(&elements[*done..]).user_data(token))
    }

    /// A commit has completed: the kernel took as many bytes, or did not take the first element.
    pub(crate) fn committed(&mut self, index: u16, result: i32) -> Committed {
        let mut committed = Committed::default();
        let index = usize::from(index);
        let size = self.commands.layout().bytes();
        let Some(Some((elements, done))) = self.flying.get_mut(index) else { return committed };
        match Errno::from_result(result) {
            None => {
                let taken = (result.unsigned_abs() as usize).min(elements.len() - *done);
                *done += taken;
                self.out -= (taken / size) as u32;
            }
            Some(errno) => {
                let tag = self.commands.layout().tag(&elements[*done..]);
                committed.rejected = Some((tag, errno));
                *done += size;
            }
        }
        if *done < elements.len() {
            committed.again = self.send(index);
        } else if let Some((mut elements, _)) = self.flying[index].take() {
            elements.clear();
            self.spare.push(elements);
        }
        committed
    }

    /// Whether the last tag has come home by now. True once.
    pub(crate) fn has_come_home(&mut self) -> bool {
        let home = !self.fetching && self.out == 0 && self.pending.is_empty();
        home && !std::mem::replace(&mut self.home, true)
    }

    /// Takes back what the ring has of it.
    pub(crate) fn free(self, ring: &WorkerRing) {
        self.arrays.free(ring);
    }
}
