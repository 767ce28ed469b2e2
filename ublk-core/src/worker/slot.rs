//! A slot: what a tag's current request and the worker share.
//!
//! The phase of a slot says who may touch its buffer:
//!
//! | phase    | buffer belongs to                | leaves it                                     |
//! |----------|----------------------------------|-----------------------------------------------|
//! | `Kernel` | the kernel and the worker        | `issue`, by the worker, when a request arrives |
//! | `Owned`  | the one [`Request`] that was issued | `finish`, by the request; `revoke`, by the worker |
//! | `Done`   | the worker                       | `recycle`, by the worker, when it commits     |
//! | `Revoked`| the request, until it is dropped | never                                         |
//!
//! `finish` and `revoke` are compare-and-swaps on one word that also carries the result, so exactly one
//! of them wins. While the request moves data through the device's file it is `Owned` with a mark, and is
//! not revoked: the tag would be another request's by the time the data got there. A revoked slot is never used again: the worker gives the tag a new one with new memory,
//! the old lives as long as somebody holds it, and a late `finish` is told so.
//!
//! [`Request`]: crate::Request

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::handoff::{Link, Linked};
use super::mailbox::Mailbox;
use super::portal::{METADATA, Portal, Reach};
use crate::error::Errno;
use crate::sys::memory::Region;

/// A tag's data memory: a part of a region that is kept alive by it.
pub(crate) struct Buffer {
    region: Arc<Region>,
    at: usize,
    len: u32,
}

impl Buffer {
    pub(crate) fn new(region: Arc<Region>, at: usize, len: u32) -> Self {
        assert!(at + len as usize <= region.len());
        Buffer { region, at, len }
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.region.at(self.at)
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    pub(crate) fn offset(&self) -> usize {
        self.at
    }
}

/// Where a slot belongs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) device: u32,
    pub(crate) queue: u16,
    pub(crate) tag: u16,
    /// The worker's own number for the queue.
    pub(crate) key: u32,
}

/// How a request ended, as the worker finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// What is committed, where it is not an error: bytes of a read or write, 0 of the rest.
    pub(crate) result: Result<u32, Errno>,
    /// The request was dropped and not completed.
    pub(crate) dropped: bool,
    /// Somebody still sees the buffer: the tag needs another.
    pub(crate) keeps_buffer: bool,
}

const PHASE: u64 = 0b11;
const KERNEL: u64 = 0;
const OWNED: u64 = 1;
const DONE: u64 = 2;
const REVOKED: u64 = 3;
const DROPPED: u64 = 1 << 2;
const KEEPS_BUFFER: u64 = 1 << 3;
/// With `OWNED`: data is on its way through the device's file.
const MOVING: u64 = 1 << 4;

/// How long a revocation waits for data on its way, which is a copy of 32 MiB at most.
const MOVE_LIMIT: Duration = Duration::from_secs(1);

fn encode(outcome: Outcome) -> u64 {
    let result: i32 = match outcome.result {
        Ok(bytes) => i32::try_from(bytes).unwrap_or(i32::MAX),
        Err(errno) => -errno.raw(),
    };
    let mut word = DONE | u64::from(result.cast_unsigned()) << 32;
    if outcome.dropped {
        word |= DROPPED;
    }
    if outcome.keeps_buffer {
        word |= KEEPS_BUFFER;
    }
    word
}

/// See the module's text.
pub(crate) struct Slot {
    /// Phase, flags and result in one word.
    state: AtomicU64,
    link: Link<Slot>,
    place: Place,
    buffer: Buffer,
    mailbox: Arc<Mailbox>,
    /// How the request gets to its data, unless the driver copies it to and from the buffer.
    reach: Option<Reach>,
    shared: AtomicBool,
    /// Ring operations in flight on the buffer or the request's pages. The worker commits only at zero.
    operations: AtomicU32,
    /// The buffer is zero from this byte on: what has to be zeroed for a read ends there.
    dirty: AtomicU32,
    /// Where the zone append that has the slot went, in sectors; 0 for all other requests.
    append_sector: AtomicU64,
    /// The data of a read whose buffer somebody keeps: what the commit is to name.
    moved: Mutex<Option<Region>>,
}

impl Linked for Slot {
    fn link(&self) -> &Link<Self> {
        &self.link
    }
}

impl Slot {
    pub(crate) fn new(
        place: Place,
        buffer: Buffer,
        reach: Option<Reach>,
        mailbox: Arc<Mailbox>,
    ) -> Arc<Self> {
        Arc::new(Slot {
            state: AtomicU64::new(KERNEL),
            link: Link::new(),
            place,
            buffer,
            mailbox,
            reach,
            shared: AtomicBool::new(false),
            operations: AtomicU32::new(0),
            dirty: AtomicU32::new(0),
            append_sector: AtomicU64::new(0),
            moved: Mutex::new(None),
        })
    }

    pub(crate) fn place(&self) -> Place {
        self.place
    }

    pub(crate) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    pub(crate) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// The worker hands the slot to a new request. False if the slot is not the kernel's, which would be a
    /// second request on the same tag.
    #[must_use]
    pub(crate) fn issue(&self) -> bool {
        // The slot is the worker's alone before: the request that comes finds it cleared.
        if self.is_with_kernel() && self.append_sector() != 0 {
            self.set_append_sector(0);
        }
        self.state.compare_exchange(KERNEL, OWNED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Where the append that has the slot went: said before it ends.
    pub(crate) fn set_append_sector(&self, sector: u64) {
        self.append_sector.store(sector, Ordering::Relaxed);
    }

    /// What the worker commits for an append.
    pub(crate) fn append_sector(&self) -> u64 {
        self.append_sector.load(Ordering::Relaxed)
    }

    /// Copies the first `len` bytes of the buffer to memory of their own: the buffer's keeper may write to it as soon as
    /// the request has ended. By the request, before it ends.
    ///
    /// # Errors
    ///
    /// What the system says where it has no memory.
    pub(crate) fn move_out(&self, len: u32) -> Result<(), Errno> {
        let region = Region::new(self.buffer.len() as usize, self.buffer.region().backing())?;
        let len = len.min(self.buffer.len()) as usize;
        // SAFETY: both have at least `len` bytes. Until it ends, the buffer is the request's; somebody who writes to it
        // through a view that is exported already has a raw address, too, and gets a mixture.
        unsafe { region.at(0).copy_from_nonoverlapping(self.buffer.start(), len) };
        *self.moved() = Some(region);
        Ok(())
    }

    /// What was moved out.
    pub(crate) fn take_moved(&self) -> Option<Region> {
        self.moved().take()
    }

    fn moved(&self) -> MutexGuard<'_, Option<Region>> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request ends. False if it was revoked before.
    #[must_use]
    pub(crate) fn finish(&self, outcome: Outcome) -> bool {
        // Release: what the request wrote to the buffer is visible to the worker that sees `Done`.
        self.state
            .compare_exchange(OWNED, encode(outcome), Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// The worker takes the tag away from its request. False if the request ended before, or there is none.
    #[must_use]
    pub(crate) fn revoke(&self) -> bool {
        let mut since = None;
        loop {
            match self.state.compare_exchange(OWNED, REVOKED, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(word) if word != OWNED | MOVING => return false,
                Err(_) if since.get_or_insert_with(Instant::now).elapsed() > MOVE_LIMIT => {
                    return false;
                }
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    /// Whether the request that the slot was issued to still has it.
    pub(crate) fn is_owned(&self) -> bool {
        self.state.load(Ordering::Acquire) & PHASE == OWNED
    }

    /// Whether the request that the slot was issued to lost it.
    pub(crate) fn is_revoked(&self) -> bool {
        self.state.load(Ordering::Acquire) & PHASE == REVOKED
    }

    /// The way to the data, unless the driver copies it to and from the buffer.
    pub(crate) fn reach(&self) -> Option<&Reach> {
        self.reach.as_ref()
    }

    /// Moves data of the request that has the slot, which is not revoked meanwhile.
    pub(crate) fn moving(&self, step: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let moving = OWNED | MOVING;
        self.state
            .compare_exchange(OWNED, moving, Ordering::AcqRel, Ordering::Relaxed)
            .map_err(|_| Errno::ECANCELED)?;
        let result = step();
        // Nothing else changes the word from there.
        self.state.store(OWNED, Ordering::Release);
        result
    }

    /// Copies the data of the write that has the slot to the buffer.
    ///
    /// # Safety
    ///
    /// The caller is the request, `len` is within the buffer, and nobody has a reference into it or works on it.
    pub(crate) unsafe fn pull(&self, len: usize) -> Result<(), Errno> {
        let to = self.buffer.start().as_ptr();
        let portal = self.portal()?;
        // SAFETY: within the buffer, which is the request's alone.
        self.moving(|| unsafe { portal.pull(self.place, 0, to, len) })
    }

    /// Copies data to the read that has the slot, from its byte `at` on.
    pub(crate) fn push(&self, at: u64, data: &[u8]) -> Result<(), Errno> {
        // SAFETY: a live slice.
        unsafe { self.push_from(at, data.as_ptr(), data.len()) }
    }

    /// The same from an address.
    ///
    /// # Safety
    ///
    /// `from` is valid for reads of `len` bytes.
    pub(crate) unsafe fn push_from(
        &self,
        at: u64,
        from: *const u8,
        len: usize,
    ) -> Result<(), Errno> {
        let portal = self.portal()?;
        // SAFETY: the caller's promise.
        self.moving(|| unsafe { portal.push(self.place, at, from, len) })
    }

    fn portal(&self) -> Result<&Portal, Errno> {
        Ok(self.reach().ok_or(Errno::EINVAL)?.portal())
    }

    /// The data of the request that has the slot is in memory that its client sees, too. The worker's thread only.
    pub(crate) fn set_shared(&self, shared: bool) {
        self.shared.store(shared, Ordering::Relaxed);
    }

    /// Whether ring operations are at work on memory that the request's client sees.
    pub(crate) fn works_on_shared_memory(&self) -> bool {
        self.shared.load(Ordering::Relaxed) && self.operations() > 0
    }

    /// Copies the metadata of the write that has the slot.
    pub(crate) fn pull_metadata(&self, buf: &mut [u8]) -> Result<(), Errno> {
        let (to, len) = (buf.as_mut_ptr(), buf.len());
        let portal = self.portal()?;
        // SAFETY: a live slice, borrowed mutably.
        self.moving(|| unsafe { portal.pull(self.place, METADATA, to, len) })
    }

    /// Copies metadata to the read that has the slot.
    pub(crate) fn push_metadata(&self, data: &[u8]) -> Result<(), Errno> {
        self.push(METADATA, data)
    }

    /// How the request ended; `None` unless it did.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        let word = self.state.load(Ordering::Acquire);
        if word & PHASE != DONE {
            return None;
        }
        let result = (word >> 32) as u32;
        let result = result.cast_signed();
        Some(Outcome {
            result: match Errno::from_result(result) {
                Some(errno) => Err(errno),
                None => Ok(result.cast_unsigned()),
            },
            dropped: word & DROPPED != 0,
            keeps_buffer: word & KEEPS_BUFFER != 0,
        })
    }

    /// The worker gives the tag back to the kernel.
    pub(crate) fn recycle(&self) {
        debug_assert_eq!(self.state.load(Ordering::Relaxed) & PHASE, DONE);
        self.state.store(KERNEL, Ordering::Release);
    }

    /// Whether the kernel and the worker alone may touch the buffer.
    pub(crate) fn is_with_kernel(&self) -> bool {
        self.state.load(Ordering::Acquire) & PHASE == KERNEL
    }

    /// Something other than zeroes may be written to the buffer's first `end` bytes.
    pub(crate) fn soil(&self, end: u32) {
        // No read-modify-write: whoever owns the buffer at the time is the only one who calls this.
        if end > self.dirty.load(Ordering::Relaxed) {
            self.dirty.store(end, Ordering::Relaxed);
        }
    }

    /// The part of a range that may not be zero.
    pub(crate) fn soiled(&self, range: Range<u32>) -> Range<u32> {
        range.start..range.end.min(self.dirty.load(Ordering::Relaxed)).max(range.start)
    }

    /// The buffer was zeroed from byte `start` to the end of what was soiled, or beyond.
    pub(crate) fn cleaned_from(&self, start: u32) {
        self.dirty.store(start, Ordering::Relaxed);
    }

    /// A ring operation on the buffer begins. The worker's thread only.
    pub(crate) fn begin_operation(&self) {
        self.operations.fetch_add(1, Ordering::AcqRel);
    }

    /// A ring operation on the buffer ended. Returns how many go on.
    pub(crate) fn end_operation(&self) -> u32 {
        self.operations.fetch_sub(1, Ordering::AcqRel) - 1
    }

    /// Ring operations in flight on the buffer.
    pub(crate) fn operations(&self) -> u32 {
        self.operations.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::Backing;

    fn slot() -> Arc<Slot> {
        let region = Arc::new(Region::new(4096, Backing::default()).unwrap());
        let place = Place { device: 0, queue: 0, tag: 0, key: 0 };
        Slot::new(place, Buffer::new(region, 0, 4096), None, Mailbox::detached())
    }

    fn outcome(result: Result<u32, Errno>) -> Outcome {
        Outcome { result, dropped: false, keeps_buffer: false }
    }

    #[test]
    fn a_request_ends_once_and_the_result_arrives_as_given() {
        let slot = slot();
        for result in [Ok(0), Ok(512), Ok(32 << 20), Err(Errno::EIO), Err(Errno::ENOSPC)] {
            assert!(!slot.finish(outcome(result)), "with the kernel");
            assert!(slot.issue());
            assert!(!slot.issue(), "two requests on a tag");
            assert_eq!(slot.outcome(), None);
            assert!(slot.finish(outcome(result)));
            assert!(!slot.finish(outcome(Ok(1))), "a second end");
            assert!(!slot.revoke(), "too late to revoke");
            assert_eq!(slot.outcome(), Some(outcome(result)));
            slot.recycle();
        }
    }

    #[test]
    fn a_revoked_slot_is_never_used_again() {
        let slot = slot();
        assert!(!slot.revoke(), "nothing to revoke");
        assert!(slot.issue());
        assert!(slot.revoke());
        assert!(!slot.finish(outcome(Ok(0))));
        assert!(!slot.issue());
        assert_eq!(slot.outcome(), None);
    }

    #[test]
    fn of_a_finish_and_a_revoke_exactly_one_wins() {
        let rounds = if cfg!(miri) { 20 } else { 500 };
        for _ in 0..rounds {
            let slot = slot();
            assert!(slot.issue());
            let (finished, revoked) = std::thread::scope(|s| {
                let f = s.spawn(|| slot.finish(outcome(Ok(0))));
                let r = s.spawn(|| slot.revoke());
                (f.join().unwrap(), r.join().unwrap())
            });
            assert!(finished ^ revoked);
        }
    }
}
