//! How requests come in and results go out in batches: one command for many tags.
//!
//! All tags are offered once, at the start. One multishot fetch delivers arrays of tags whose requests have come;
//! results are collected over a turn and committed by one command a queue, which offers their tags again.

use io_uring::squeue::Entry;

use super::core::Token;
use super::path::DataPath;
use super::queue::Start;
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
        target: Target,
        start: &Start,
    ) -> Result<Self, Errno> {
        let (depth, lanes) = (start.depth, start.lane.count);
        let layout = match start.path {
            DataPath::AutoBufReg => Layout::AutoRegister,
            _ if start.zoned => Layout::Zoned,
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
        let arrays = BufferRing::new(ring, group, arrays, bytes)?;
        Ok(Self::with(key, BatchCommands::new(target, start.queue, layout), arrays))
    }

    fn with(key: u32, commands: BatchCommands, arrays: BufferRing) -> Self {
        Batch {
            key,
            commands,
            arrays,
            offer: Vec::new(),
            pending: Vec::new(),
            flying: Vec::new(),
            spare: Vec::new(),
            out: 0,
            fetching: true,
            home: false,
        }
    }

    /// Offers every tag.
    pub(crate) fn offer<'a>(&mut self, slots: impl Iterator<Item = &'a Slot>) -> Entry {
        let layout = self.commands.layout();
        for slot in slots {
            layout.put(&mut self.offer, slot.place().tag, 0, Self::buffer(layout, slot), 0);
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
        let (tag, buffer) = (slot.place().tag, Self::buffer(layout, slot));
        layout.put(&mut self.pending, tag, result, buffer, slot.append_sector());
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

#[cfg(test)]
mod tests {
    use io_uring::types;

    use super::*;
    use crate::sys::memory::{Backing, Region};
    use crate::worker::mailbox::Mailbox;
    use crate::worker::slot::{Buffer, Place};

    fn batch() -> Batch {
        let target = Target::Fd(types::Fd(0));
        Batch::with(
            5,
            BatchCommands::new(target, 0, Layout::Address),
            BufferRing::detached(4, FETCH_BYTES),
        )
    }

    fn slot(tag: u16) -> std::sync::Arc<Slot> {
        let region = std::sync::Arc::new(Region::new(4096, Backing::default()).unwrap());
        let place = Place { device: 0, queue: 0, tag, key: 5 };
        Slot::new(place, Buffer::new(region, 0, 4096), None, Mailbox::detached())
    }

    /// The tags come in the array `array`.
    fn fetch(batch: &mut Batch, array: u16, tags: &[u16], more: bool) -> (Fetched, Vec<u16>) {
        let bytes: Vec<u8> = tags.iter().flat_map(|tag| tag.to_ne_bytes()).collect();
        batch.arrays.fill(array, &bytes);
        let mut seen = Vec::new();
        let fetched = batch.fetched(bytes.len() as i32, Some(array), more, &mut seen);
        (fetched, seen)
    }

    const ELEMENT: i32 = 16;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no madvise")]
    fn a_partly_taken_commit_goes_on_behind_the_element_that_was_refused() {
        let mut batch = batch();
        let (fetched, tags) = fetch(&mut batch, 2, &[7, 1, 300, 4], true);
        assert!(fetched.again.is_none() && fetched.failure.is_none());
        assert_eq!(tags, [7, 1, 300, 4]);
        assert!(batch.flush().is_none(), "nothing has ended");
        for tag in tags {
            batch.commit(&slot(tag), 512);
        }
        assert!(batch.flush().is_some());
        assert!(batch.flush().is_none(), "once");
        let one = batch.committed(0, ELEMENT);
        assert!(one.rejected.is_none() && one.again.is_some());
        let refused = batch.committed(0, -libc::EBUSY);
        assert_eq!(refused.rejected, Some((1, Errno::EBUSY)));
        assert!(refused.again.is_some());
        // What the refused tag is tried again with goes in a command of its own.
        batch.commit(&slot(1), -libc::EIO);
        assert!(batch.flush().is_some());
        let rest = batch.committed(0, 2 * ELEMENT);
        assert!(rest.rejected.is_none() && rest.again.is_none());
        assert_eq!(batch.out, 1);
        assert!(batch.committed(1, ELEMENT).again.is_none());
        assert_eq!(batch.out, 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no madvise")]
    fn a_fetch_that_runs_out_of_buffers_is_made_again() {
        let mut batch = batch();
        let mut none = Vec::new();
        let fetched = batch.fetched(-libc::ENOBUFS, None, false, &mut none);
        assert!(fetched.again.is_some() && fetched.failure.is_none());
        // So is one that ends with a last array, and a buffer that was taken for nothing comes back.
        assert!(fetch(&mut batch, 0, &[9], false).0.again.is_some());
        assert!(batch.fetched(0, Some(1), true, &mut none).again.is_none());
        let failed = batch.fetched(-libc::EINVAL, None, false, &mut none);
        assert_eq!(failed.failure, Some(Errno::EINVAL));
        assert!(failed.again.is_none() && none.is_empty());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no madvise")]
    fn a_queue_is_home_when_the_fetch_has_ended_and_the_kernel_has_every_result() {
        let mut batch = batch();
        fetch(&mut batch, 0, &[3], true);
        assert!(!batch.has_come_home());
        let stopped = batch.fetched(-libc::ENODEV, None, false, &mut Vec::new());
        assert!(stopped.failure.is_none() && stopped.again.is_none());
        assert!(!batch.has_come_home(), "a request is out");
        batch.commit(&slot(3), 0);
        assert!(!batch.has_come_home());
        batch.flush();
        assert!(!batch.has_come_home(), "the commit is on its way");
        batch.committed(0, ELEMENT);
        assert!(batch.has_come_home());
        assert!(!batch.has_come_home(), "once");
    }
}
