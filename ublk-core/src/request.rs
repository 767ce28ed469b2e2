//! A request of the disk's client: owned by whoever answers it, answered exactly once.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Errno;
use crate::uapi;
use crate::worker::path::DataPath;
use crate::worker::shared::Part;
use crate::worker::slot::{Outcome, Slot};
use crate::zones::ZoneAction;

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
    /// Write the request's data at the write pointer of the zone that starts at the offset, and say where that was:
    /// [`Request::complete_append`].
    ZoneAppend,
    /// Describe [zones](Request::zones): [`Request::complete_report`].
    ReportZones,
    /// Open the zone that starts at the offset.
    ZoneOpen,
    /// Close the zone that starts at the offset.
    ZoneClose,
    /// Make the zone that starts at the offset full.
    ZoneFinish,
    /// Make the zone that starts at the offset empty.
    ZoneReset,
    /// Make every sequential zone empty. Has no range.
    ZoneResetAll,
}

impl Op {
    pub(crate) fn from_uapi(op: u32) -> Option<Self> {
        Some(match op {
            uapi::UBLK_IO_OP_READ => Op::Read,
            uapi::UBLK_IO_OP_WRITE => Op::Write,
            uapi::UBLK_IO_OP_FLUSH => Op::Flush,
            uapi::UBLK_IO_OP_DISCARD => Op::Discard,
            uapi::UBLK_IO_OP_WRITE_ZEROES => Op::WriteZeroes,
            uapi::UBLK_IO_OP_ZONE_APPEND => Op::ZoneAppend,
            uapi::UBLK_IO_OP_REPORT_ZONES => Op::ReportZones,
            uapi::UBLK_IO_OP_ZONE_OPEN => Op::ZoneOpen,
            uapi::UBLK_IO_OP_ZONE_CLOSE => Op::ZoneClose,
            uapi::UBLK_IO_OP_ZONE_FINISH => Op::ZoneFinish,
            uapi::UBLK_IO_OP_ZONE_RESET => Op::ZoneReset,
            uapi::UBLK_IO_OP_ZONE_RESET_ALL => Op::ZoneResetAll,
            _ => return None,
        })
    }

    /// Whether the request's buffer carries data.
    pub(crate) fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write | Op::ZoneAppend)
    }

    /// Whether the client gave data along.
    pub(crate) fn brings_data(self) -> bool {
        matches!(self, Op::Write | Op::ZoneAppend)
    }

    /// Whether success alone is no answer.
    fn wants_more(self) -> bool {
        matches!(self, Op::ZoneAppend | Op::ReportZones)
    }

    /// What is to be done with a zone, of the operations that say just that.
    pub fn zone_action(self) -> Option<ZoneAction> {
        Some(match self {
            Op::ZoneOpen => ZoneAction::Open,
            Op::ZoneClose => ZoneAction::Close,
            Op::ZoneFinish => ZoneAction::Finish,
            Op::ZoneReset => ZoneAction::Reset,
            Op::ZoneResetAll => ZoneAction::ResetAll,
            _ => return None,
        })
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

    /// The same, and FUA: for calls of a [`Backend`](crate::Backend) by another one.
    #[must_use]
    pub fn with_fua(self) -> Self {
        RequestFlags(self.0 | uapi::UBLK_IO_F_FUA)
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

    /// There is [metadata](Request::metadata_len) beside the data.
    pub fn integrity(self) -> bool {
        self.0 & uapi::UBLK_IO_F_INTEGRITY != 0
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
            (self.integrity(), "INTEGRITY"),
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
    /// How many are to be reported.
    zones: u32,
    /// What the client has of a read's data, or will by what is in the buffer.
    filled: RefCell<Filled>,
    /// The buffer takes part: it has the data of a write, or what will be a read's. Always, if the driver copies.
    buffered: Cell<bool>,
    /// Where the data is, if that is memory which the client shares with this process.
    shared: Option<Part>,
    /// Why the data of the request could not be moved: it fails, whatever its holder says.
    broken: Cell<Option<Errno>>,
    /// What the operation wants besides success was said.
    told: bool,
    /// The metadata of a read was put.
    marked: bool,
    /// Somebody keeps the memory.
    keeps_buffer: bool,
}

/// What is written to where a read's holder left a gap, if its data does not go by the buffer.
static ZEROES: [u8; 16 << 10] = [0; 16 << 10];

impl Request {
    /// For the worker, which has just issued `slot`: nobody else has a request of it.
    pub(crate) fn new(
        slot: Arc<Slot>,
        op: Op,
        desc: &uapi::ublksrv_io_desc,
        shared: Option<Part>,
    ) -> Self {
        // Of a report it is a number of zones.
        let len = if op == Op::ReportZones { 0 } else { u64::from(desc.nr_sectors) << 9 };
        let request = Request {
            op,
            flags: RequestFlags::from_uapi(desc.op_flags),
            offset: desc.start_sector << 9,
            len,
            filled: RefCell::new(Filled::default()),
            buffered: Cell::new(slot.reach().is_none() && shared.is_none()),
            shared,
            broken: Cell::new(None),
            told: false,
            marked: false,
            keeps_buffer: false,
            zones: if op == Op::ReportZones { desc.nr_sectors } else { 0 },
            slot: Some(slot),
        };
        // The worker refuses such a request before it gets here; all accesses below rest on this.
        assert!(!op.has_data() || len <= u64::from(request.slot().buffer().len()));
        if op.brings_data() && request.buffered.get() {
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

    /// The length of the range, in bytes. 0 for a flush and a report of zones.
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

    /// How the request's data moves: the [`DataPath`] of its device.
    pub fn data_path(&self) -> DataPath {
        self.slot().reach().map_or(DataPath::Copy, |reach| reach.portal().path())
    }

    /// The data to store, of a write or an append; empty otherwise.
    ///
    /// With a data path on which the driver does not copy, the first call fetches the data (`pread(2)` on the
    /// device's file). Should that fail, which means that the device is ending, there are zeroes and the request
    /// fails, however it is completed.
    ///
    /// # Panics
    ///
    /// On such a path, if a ring operation that was started on this request is still in flight at the first call.
    pub fn data(&self) -> &[u8] {
        let len = if self.op.brings_data() { self.len as usize } else { 0 };
        if len > 0 && !self.buffered.get() {
            self.assert_quiet();
            self.fetch(len);
        }
        // SAFETY: the buffer has at least `len` bytes (checked in `new`), initialised (anonymous memory),
        // and stays mapped while the slot lives, which `self` holds. Between the request's issue and its
        // end the buffer is this request's: the kernel and `fetch` write it only before the first slice is
        // made, and nothing of ours writes the memory of a write request afterwards (ring operations on it
        // only read once it is buffered).
        unsafe { std::slice::from_raw_parts(self.slot().buffer().start().as_ptr(), len) }
    }

    /// Brings a write's data into the buffer.
    fn fetch(&self, len: usize) {
        let slot = self.slot();
        slot.soil(len as u32);
        let to = slot.buffer().start().as_ptr();
        let fetched = match &self.shared {
            // SAFETY: `len` is within the buffer; it was not buffered before, so there is no slice of it, and no
            // ring operation is in flight (callers have checked). It is not shared memory.
            Some(part) => slot.moving(|| unsafe { part.pull(to, len) }),
            // SAFETY: as above.
            None => unsafe { slot.pull(len) },
        };
        if let Err(errno) = fetched {
            self.broken.set(Some(errno));
            // SAFETY: as above. What an earlier request left is nobody's business.
            unsafe { to.write_bytes(0, len) };
        }
        self.buffered.set(true);
    }

    /// Where to put the data, of a read; empty otherwise. What was not yet written for this request is
    /// zeroed first, so that no earlier request's data shows.
    ///
    /// With a data path on which the driver does not copy, this is memory of its own: what [`put`](Self::put) or a
    /// ring operation has given to the client before does not show in it, and all of it goes to the client when the
    /// request is completed.
    ///
    /// # Panics
    ///
    /// If a ring operation that was started on this request is still in flight, which takes a future of
    /// [`Ring`](crate::Ring) that was leaked or dropped unfinished.
    pub fn data_mut(&mut self) -> &mut [u8] {
        let len = self.data_len(Op::Read);
        if len > 0 {
            self.assert_quiet();
            if !self.buffered.replace(true) {
                *self.filled.get_mut() = Filled::default();
            }
            self.zero_gaps();
            self.slot().soil(len as u32);
        }
        // SAFETY: as in `data`; unique, because `self` is borrowed mutably, is the only request of the
        // slot, and no ring operation is in flight on the memory.
        unsafe { std::slice::from_raw_parts_mut(self.slot().buffer().start().as_ptr(), len) }
    }

    /// Copies `data` to byte `at` of a read's buffer: as `data_mut()[at..][..data.len()].copy_from_slice(data)`,
    /// without zeroing the buffer first. With a data path on which the driver does not copy it goes straight to the
    /// client, unless [`data_mut`](Self::data_mut) was called before.
    ///
    /// # Panics
    ///
    /// If the range does not fit, or for a ring operation in flight as in [`data_mut`](Self::data_mut).
    pub fn put(&mut self, at: usize, data: &[u8]) {
        let range = self.fill_range(at, data.len());
        if !self.buffered.get() {
            self.push(at, data);
            self.filled.get_mut().add(range);
            return;
        }
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
        if self.buffered.get() {
            // SAFETY: the range is inside the buffer and ours alone, as in `put`.
            unsafe { self.zero(range.clone()) };
        } else {
            self.push_zeroes(range.clone());
        }
        self.filled.get_mut().add(range);
    }

    fn push(&self, at: usize, data: &[u8]) {
        // SAFETY: a live slice; nobody has one of shared memory.
        unsafe { self.push_from(at, data.as_ptr(), data.len()) };
    }

    /// Gives `len` bytes at an address to the client, where the driver does not.
    ///
    /// # Safety
    ///
    /// `from` is valid for reads of `len` bytes, and outside of shared memory.
    unsafe fn push_from(&self, at: usize, from: *const u8, len: usize) {
        let pushed = match &self.shared {
            // SAFETY: the caller's promise.
            Some(part) => self.slot().moving(|| unsafe { part.push(at as u64, from, len) }),
            // SAFETY: the caller's promise.
            None => unsafe { self.slot().push_from(at as u64, from, len) },
        };
        if let Err(errno) = pushed {
            self.broken.set(Some(errno));
        }
    }

    fn push_zeroes(&self, range: Range<u32>) {
        for at in range.clone().step_by(ZEROES.len()) {
            self.push(at as usize, &ZEROES[..((range.end - at) as usize).min(ZEROES.len())]);
        }
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
        let filled = self.filled.get_mut();
        // Without islands, as usual, there is one gap, and no list of them to be made.
        let only = filled.islands.is_empty().then(|| filled.upto.min(len)..len);
        let gaps = if only.is_some() { Vec::new() } else { filled.gaps(len) };
        for gap in only.into_iter().chain(gaps) {
            if self.buffered.get() {
                // SAFETY: within the buffer; ours alone, as in `data_mut` (callers checked for operations).
                unsafe { self.zero(gap) };
            } else {
                self.push_zeroes(gap);
            }
        }
        *self.filled.get_mut() = Filled { upto: len, islands: Vec::new() };
    }

    /// A ring operation filled a part of the buffer.
    pub(crate) fn filled_by_ring(&self, range: Range<u32>) {
        self.filled.borrow_mut().add(range);
    }

    /// Where the data is, if that is memory which the client shares with this process.
    pub(crate) fn shared(&self) -> Option<&Part> {
        self.shared.as_ref()
    }

    /// Whether the data is in memory that the client shares with this process
    /// ([`Device::share`](crate::Device::share)), so that the driver did not copy it.
    pub fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// Whether the client has to be given what is in the buffer, and has nothing of it yet.
    fn is_staged(&self) -> bool {
        self.buffered.get() && (self.slot().reach().is_some() || self.shared.is_some())
    }

    /// For ring operations: whether the buffer takes part.
    pub(crate) fn is_buffered(&self) -> bool {
        self.buffered.get()
    }

    /// For ring operations: whether one failed because the ring had not taken the request's pages.
    pub(crate) fn lost_its_pages(&self, error: &std::io::Error) -> bool {
        error.raw_os_error() == Some(libc::EFAULT)
            && self.slot().reach().is_some_and(|reach| !reach.is_registered())
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
        self.end(result.map_err(Into::into))
    }

    /// Keeps the request's memory beyond its end, for a holder that goes on seeing it (an exported view, say). However
    /// the request ends, its tag gets other memory then, and this one stays valid, and nobody else's, until what this
    /// returns is dropped.
    pub fn keep_buffer(&mut self) -> KeptBuffer {
        self.keeps_buffer = true;
        let len = if self.op.has_data() { self.len as usize } else { 0 };
        KeptBuffer { slot: Arc::clone(self.slot()), len }
    }

    /// Whether its client was answered, and it is nobody's any more.
    pub(crate) fn is_revoked(&self) -> bool {
        self.slot().is_revoked()
    }

    fn end(mut self, result: Result<(), Errno>) -> Result<(), Gone> {
        let mut result = result;
        if self.op == Op::Read && result.is_ok() {
            if self.slot().operations() == 0 {
                self.deliver();
            } else if !self.is_filled() || self.is_staged() {
                // Completed while the kernel may still be writing to the buffer.
                result = Err(Errno::EIO);
            }
        }
        if result.is_ok() && self.op.wants_more() && !self.told {
            tracing::error!(
                device = self.device(),
                op = ?self.op,
                "a zone operation was completed without its answer (complete_append, complete_report): the client \
                 gets EIO"
            );
            result = Err(Errno::EIO);
        }
        if let (Ok(()), Some(errno)) = (&result, self.broken.get()) {
            let place = self.slot().place();
            tracing::warn!(
                device = place.device,
                queue = place.queue,
                tag = place.tag,
                %errno,
                "the data of a request could not be moved: the client gets EIO"
            );
            result = Err(Errno::EIO);
        }
        let by_the_driver = self.slot().reach().is_none() && self.shared.is_none();
        if self.keeps_buffer && self.op == Op::Read && result.is_ok() && by_the_driver {
            result = self.slot().move_out(self.len as u32);
        }
        let outcome = Outcome {
            result: match result {
                Ok(()) if self.op.has_data() => Ok(self.len as u32),
                // Drivers before 6.16 ask again for what this is short of their buffer, which is not larger.
                Ok(()) if self.op == Op::ReportZones => Ok(self.slot().buffer().len()),
                Ok(()) => Ok(0),
                Err(Errno::EOPNOTSUPP) if self.op == Op::Flush => Err(Errno::EIO),
                Err(errno) => Err(errno),
            },
            dropped: false,
            keeps_buffer: self.keeps_buffer,
        };
        let Some(slot) = self.slot.take() else { unreachable!("ended once: `end` consumes it") };
        hand_back(slot, outcome)
    }

    /// A read ends well: the client gets what is in the buffer, and zeroes where nothing was put.
    fn deliver(&mut self) {
        if !self.is_filled() {
            self.zero_gaps();
        }
        let metadata = if self.marked { 0 } else { self.metadata_len() };
        if metadata > 0
            && let Err(errno) = self.slot().push_metadata(&vec![0xff; metadata])
        {
            self.broken.set(Some(errno));
        }
        if self.is_staged() {
            // No slice: somebody who keeps the buffer may be writing to it.
            let from = self.slot().buffer().start().as_ptr();
            // SAFETY: within the buffer, which is initialised.
            unsafe { self.push_from(0, from, self.len as usize) };
        }
    }

    fn is_filled(&mut self) -> bool {
        u64::from(self.filled.get_mut().upto) >= self.len
    }
}

fn hand_back(slot: Arc<Slot>, outcome: Outcome) -> Result<(), Gone> {
    let place = slot.place();
    let gone = Gone { device: place.device, queue: place.queue, tag: place.tag };
    // A second count, because the mailbox must outlive the push, and only the slot keeps it.
    if slot.finish(outcome) && slot.mailbox().finished(Arc::clone(&slot)) {
        Ok(())
    } else {
        Err(gone)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let keeps_buffer = self.keeps_buffer;
            let outcome = Outcome { result: Err(Errno::EIO), dropped: true, keeps_buffer };
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

/// A request's memory, kept by [`Request::keep_buffer`]. Once the request has ended it is this
/// holder's alone.
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

#[path = "request_metadata.rs"]
mod metadata;
#[path = "request_ring.rs"]
mod ring;
#[path = "request_zones.rs"]
mod zones;

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
