//! A request of the disk's client: owned by whoever answers it, answered exactly once.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Errno;
use crate::uapi;
use crate::worker::slot::{Outcome, Slot};

/// What the client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Op {
    /// Fill the request's buffer from the range.
    Read,
    /// Store the request's data to the range.
    Write,
    /// Make every write that was completed before durable. Has no range.
    Flush,
    /// The range's contents are not needed any more; what it reads as afterwards is not specified.
    Discard,
    /// Make the range read as zeroes.
    WriteZeroes,
}

impl Op {
    pub(crate) fn from_uapi(op: u32) -> Option<Self> {
        Some(match op {
            uapi::UBLK_IO_OP_READ => Op::Read,
            uapi::UBLK_IO_OP_WRITE => Op::Write,
            uapi::UBLK_IO_OP_FLUSH => Op::Flush,
            uapi::UBLK_IO_OP_DISCARD => Op::Discard,
            uapi::UBLK_IO_OP_WRITE_ZEROES => Op::WriteZeroes,
            _ => return None,
        })
    }

    /// Whether the request's buffer carries data.
    fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write)
    }
}

/// What a request asks for besides its operation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RequestFlags(u32);

impl RequestFlags {
    pub(crate) fn from_uapi(op_flags: u32) -> Self {
        RequestFlags(op_flags & !0xff)
    }

    /// Force unit access: the write is durable before it is completed.
    pub fn fua(self) -> bool {
        self.0 & uapi::UBLK_IO_F_FUA != 0
    }

    /// A write of zeroes that must not deallocate the range.
    pub fn no_unmap(self) -> bool {
        self.0 & uapi::UBLK_IO_F_NOUNMAP != 0
    }

    /// A file system's metadata.
    pub fn meta(self) -> bool {
        self.0 & uapi::UBLK_IO_F_META != 0
    }

    /// Swap traffic: the system waits for memory.
    pub fn swap(self) -> bool {
        self.0 & uapi::UBLK_IO_F_SWAP != 0
    }

    /// The word as the kernel gave it (`UBLK_IO_F_*`).
    pub fn raw(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for RequestFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (self.fua(), "FUA"),
            (self.no_unmap(), "NOUNMAP"),
            (self.meta(), "META"),
            (self.swap(), "SWAP"),
        ];
        let names: Vec<_> =
            names.into_iter().filter_map(|(set, name)| set.then_some(name)).collect();
        write!(f, "RequestFlags({})", names.join("|"))
    }
}

/// The request had been revoked when it was completed, or its worker is gone: the client has another
/// answer already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the request is gone (device {device}, queue {queue}, tag {tag}): it was revoked, or its device has ended"
)]
pub struct Gone {
    /// The device's id.
    pub device: u32,
    /// The queue's number.
    pub queue: u16,
    /// The tag.
    pub tag: u16,
}

/// Which bytes of a read's buffer were written for this request.
#[derive(Default)]
struct Filled {
    /// All before this are.
    upto: u32,
    /// Ranges behind a gap, sorted.
    islands: Vec<Range<u32>>,
}

impl Filled {
    fn add(&mut self, range: Range<u32>) {
        if range.start <= self.upto {
            self.upto = self.upto.max(range.end);
        } else {
            let at = self.islands.partition_point(|r| r.start < range.start);
            self.islands.insert(at, range);
        }
        while let Some(first) = self.islands.first() {
            if first.start > self.upto {
                break;
            }
            self.upto = self.upto.max(first.end);
            self.islands.remove(0);
        }
    }

    /// What was not written of the first `len` bytes.
    fn gaps(&self, len: u32) -> Vec<Range<u32>> {
        let mut gaps = Vec::new();
        let mut at = self.upto;
        for island in &self.islands {
            if island.start > at {
                gaps.push(at..island.start.min(len));
            }
            at = at.max(island.end);
        }
        if at < len {
            gaps.push(at..len);
        }
        gaps
    }
}

/// One request, in the hands of who answers it.
///
/// It may be sent to another thread, kept, and completed from anywhere, once: [`complete`](Self::complete)
/// consumes it. A request that is dropped is completed with `EIO`, counted
/// ([`QueueStats::dropped`](crate::QueueStats::dropped)) and logged. One that is leaked, or kept past
/// the end of its device, is *revoked* by then: the client gets `EIO`, the memory stays valid for its
/// holder, and a late `complete` returns [`Gone`].
///
/// Offsets and lengths are bytes, multiples of the device's logical block size, within its capacity.
pub struct Request {
    /// `None` only after the end.
    slot: Option<Arc<Slot>>,
    op: Op,
    flags: RequestFlags,
    offset: u64,
    len: u64,
    filled: RefCell<Filled>,
}

impl Request {
    /// For the worker, which has just issued `slot`: nobody else has a request of it.
    pub(crate) fn new(slot: Arc<Slot>, op: Op, desc: &uapi::ublksrv_io_desc) -> Self {
        let len = u64::from(desc.nr_sectors) << 9;
        let request = Request {
            op,
            flags: RequestFlags::from_uapi(desc.op_flags),
            offset: desc.start_sector << 9,
            len,
            filled: RefCell::new(Filled::default()),
            slot: Some(slot),
        };
        // The worker refuses such a request before it gets here; all accesses below rest on this.
        assert!(!op.has_data() || len <= u64::from(request.slot().buffer().len()));
        if op == Op::Write {
            // The kernel has copied the data there.
            request.slot().soil(len as u32);
        }
        request
    }

    fn slot(&self) -> &Arc<Slot> {
        match &self.slot {
            Some(slot) => slot,
            None => unreachable!("taken only by what consumes the request"),
        }
    }

    /// What the client wants.
    pub fn op(&self) -> Op {
        self.op
    }

    /// What it asks for besides.
    pub fn flags(&self) -> RequestFlags {
        self.flags
    }

    /// Where the range starts, in bytes. 0 for a flush.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The length of the range, in bytes. 0 for a flush.
    #[allow(clippy::len_without_is_empty)] // a length of a range on the disk; only a flush has none
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The device's id.
    pub fn device(&self) -> u32 {
        self.slot().place().device
    }

    /// The queue that it came by.
    pub fn queue(&self) -> u16 {
        self.slot().place().queue
    }

    /// Its tag: unique among the queue's requests that are out, below the queue depth.
    pub fn tag(&self) -> u16 {
        self.slot().place().tag
    }

    fn data_len(&self, op: Op) -> usize {
        if self.op == op { self.len as usize } else { 0 }
    }

    /// The data to store, of a write; empty otherwise.
    pub fn data(&self) -> &[u8] {
        let len = self.data_len(Op::Write);
        // SAFETY: the buffer has at least `len` bytes (checked in `new`), initialised (anonymous memory),
        // and stays mapped while the slot lives, which `self` holds. Between the request's issue and its
        // end the buffer is this request's: the kernel writes it only before, and nothing of ours writes
        // the memory of a write request (ring operations on it only read).
        unsafe { std::slice::from_raw_parts(self.slot().buffer().start().as_ptr(), len) }
    }

    /// Where to put the data, of a read; empty otherwise. What was not yet written for this request is
    /// zeroed first, so that no earlier request's data shows.
    ///
    /// # Panics
    ///
    /// If a ring operation that was started on this request is still in flight, which takes a future of
    /// [`Ring`](crate::Ring) that was leaked or dropped unfinished.
    pub fn data_mut(&mut self) -> &mut [u8] {
        let len = self.data_len(Op::Read);
        if len > 0 {
            self.assert_quiet();
            self.zero_gaps();
            self.slot().soil(len as u32);
        }
        // SAFETY: as in `data`; unique, because `self` is borrowed mutably, is the only request of the
        // slot, and no ring operation is in flight on the memory.
        unsafe { std::slice::from_raw_parts_mut(self.slot().buffer().start().as_ptr(), len) }
    }

    /// Copies `data` to byte `at` of a read's buffer: as `data_mut()[at..][..data.len()].copy_from_slice(data)`,
    /// without zeroing the buffer first.
    ///
    /// # Panics
    ///
    /// If the range does not fit, or for a ring operation in flight as in [`data_mut`](Self::data_mut).
    pub fn put(&mut self, at: usize, data: &[u8]) {
        let range = self.fill_range(at, data.len());
        self.slot().soil(range.end);
        // SAFETY: the range is inside the buffer (checked), which is ours alone as in `data_mut`; `data`
        // is a live reference, so it cannot overlap memory that only `&mut self` may reach.
        unsafe {
            self.start_at(at).copy_from_nonoverlapping(data.as_ptr(), data.len());
        }
        self.filled.get_mut().add(range);
    }

    /// Zeroes `len` bytes at byte `at` of a read's buffer.
    ///
    /// # Panics
    ///
    /// As [`put`](Self::put).
    pub fn put_zeroes(&mut self, at: usize, len: usize) {
        let range = self.fill_range(at, len);
        // SAFETY: the range is inside the buffer and ours alone, as in `put`.
        unsafe { self.zero(range.clone()) };
        self.filled.get_mut().add(range);
    }

    fn fill_range(&self, at: usize, len: usize) -> Range<u32> {
        let end = at.checked_add(len).filter(|end| *end <= self.data_len(Op::Read));
        let Some(end) = end else {
            panic!("{len} bytes at {at} of a buffer of {} bytes", self.data_len(Op::Read))
        };
        self.assert_quiet();
        // Within the buffer, whose length is a u32.
        at as u32..end as u32
    }

    /// The address of byte `at`, which is within the buffer or one past its end.
    fn start_at(&self, at: usize) -> *mut u8 {
        // SAFETY: callers have checked `at` against the buffer's length.
        unsafe { self.slot().buffer().start().as_ptr().add(at) }
    }

    fn assert_quiet(&self) {
        assert!(
            self.slot().operations() == 0,
            "a ring operation is in flight on this request's memory"
        );
    }

    /// Zeroes a range, as far as it is not known to be zero.
    ///
    /// # Safety
    ///
    /// The range lies in the buffer, and nobody else reads or writes it.
    unsafe fn zero(&self, range: Range<u32>) {
        let slot = self.slot();
        let soiled = slot.soiled(range.clone());
        // SAFETY: a part of the range that the caller vouches for.
        unsafe { self.start_at(soiled.start as usize).write_bytes(0, soiled.len()) };
        if slot.soiled(range.end..u32::MAX).is_empty() {
            slot.cleaned_from(range.start.min(soiled.end));
        }
    }

    fn zero_gaps(&mut self) {
        let len = self.data_len(Op::Read) as u32;
        for gap in self.filled.get_mut().gaps(len) {
            // SAFETY: within the buffer; ours alone, as in `data_mut` (callers checked for operations).
            unsafe { self.zero(gap) };
        }
        *self.filled.get_mut() = Filled { upto: len, islands: Vec::new() };
    }

    /// A ring operation filled a part of the buffer.
    pub(crate) fn filled_by_ring(&self, range: Range<u32>) {
        self.filled.borrow_mut().add(range);
    }

    /// For ring operations: the slot, whose buffer they work on.
    pub(crate) fn slot_for_ring(&self) -> &Arc<Slot> {
        self.slot()
    }

    /// Answers the request: success means all of it.
    ///
    /// An error's number is what an `O_DIRECT` client sees, as far as the block layer carries it, and
    /// `EIO` otherwise. A flush that fails with `EOPNOTSUPP` is reported as `EIO`, because the block layer
    /// would take it for success. What a successful read did not fill is zeroed.
    ///
    /// # Errors
    ///
    /// [`Gone`]: the client has been answered by somebody else.
    pub fn complete<E: Into<Errno>>(self, result: Result<(), E>) -> Result<(), Gone> {
        self.end(result.map_err(Into::into), false, false).map(drop)
    }

    /// As [`complete`](Self::complete), for a holder that keeps seeing the buffer (an exported view, say):
    /// the tag gets other memory, and this one stays valid, and nobody else's, until it is dropped.
    ///
    /// # Errors
    ///
    /// [`Gone`], as `complete`.
    pub fn complete_keeping_buffer<E: Into<Errno>>(
        self,
        result: Result<(), E>,
    ) -> Result<KeptBuffer, Gone> {
        let len = if self.op.has_data() { self.len as usize } else { 0 };
        self.end(result.map_err(Into::into), false, true).map(|slot| KeptBuffer { slot, len })
    }

    fn end(
        mut self,
        result: Result<(), Errno>,
        dropped: bool,
        keeps_buffer: bool,
    ) -> Result<Arc<Slot>, Gone> {
        let mut result = result;
        if self.op == Op::Read && result.is_ok() && !self.is_filled() {
            if self.slot().operations() == 0 {
                self.zero_gaps();
            } else {
                // Completed while the kernel may still be writing to the buffer.
                result = Err(Errno::EIO);
            }
        }
        let outcome = Outcome {
            result: match result {
                Ok(()) if self.op.has_data() => Ok(self.len as u32),
                Ok(()) => Ok(0),
                Err(Errno::EOPNOTSUPP) if self.op == Op::Flush => Err(Errno::EIO),
                Err(errno) => Err(errno),
            },
            dropped,
            keeps_buffer,
        };
        let Some(slot) = self.slot.take() else { unreachable!("ended once: `end` consumes it") };
        hand_back(slot, outcome)
    }

    fn is_filled(&mut self) -> bool {
        u64::from(self.filled.get_mut().upto) >= self.len
    }
}

fn hand_back(slot: Arc<Slot>, outcome: Outcome) -> Result<Arc<Slot>, Gone> {
    let place = slot.place();
    let gone = Gone { device: place.device, queue: place.queue, tag: place.tag };
    // A second count, because the mailbox must outlive the push, and only the slot keeps it.
    if slot.finish(outcome) && slot.mailbox().finished(Arc::clone(&slot)) {
        Ok(slot)
    } else {
        Err(gone)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let outcome = Outcome { result: Err(Errno::EIO), dropped: true, keeps_buffer: false };
            // Gone means that the client was answered already: nothing to add.
            let _ = hand_back(slot, outcome);
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("op", &self.op)
            .field("offset", &self.offset)
            .field("len", &self.len)
            .field("flags", &self.flags)
            .field("place", &self.slot.as_ref().map(|s| s.place()))
            .finish()
    }
}

/// A completed request's memory, kept by [`Request::complete_keeping_buffer`]. It is this holder's alone.
pub struct KeptBuffer {
    slot: Arc<Slot>,
    len: usize,
}

impl KeptBuffer {
    /// The address of the first byte, valid while `self` lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.slot.buffer().start().as_ptr()
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the request had no data.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl fmt::Debug for KeptBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeptBuffer").field("len", &self.len).finish()
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
