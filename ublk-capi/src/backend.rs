//! The table of callbacks: what the program implements.

use std::ffi::{c_int, c_void};

use ublk_core::{Capabilities, Errno, Op, Request, Result, Zone, ZoneAction, ZoneKind, ZoneState};

use crate::boundary::{Inside, invalid};
use crate::device::ublk_rs_device;

/// Fill the buffer from the range.
pub const UBLK_RS_OP_READ: u32 = 0;
/// Store the data to the range.
pub const UBLK_RS_OP_WRITE: u32 = 1;
/// Make every write that was completed before durable. Has no range.
pub const UBLK_RS_OP_FLUSH: u32 = 2;
/// The range's contents are not needed any more.
pub const UBLK_RS_OP_DISCARD: u32 = 3;
/// Make the range read as zeroes.
pub const UBLK_RS_OP_WRITE_ZEROES: u32 = 5;
/// Open the zone that starts at the offset.
pub const UBLK_RS_OP_ZONE_OPEN: u32 = 10;
/// Close the zone that starts at the offset.
pub const UBLK_RS_OP_ZONE_CLOSE: u32 = 11;
/// Make the zone that starts at the offset full.
pub const UBLK_RS_OP_ZONE_FINISH: u32 = 12;
/// Write the data at the write pointer of the zone that starts at the offset: ublk_rs_request_complete_append().
pub const UBLK_RS_OP_ZONE_APPEND: u32 = 13;
/// Make every sequential zone empty. Has no range.
pub const UBLK_RS_OP_ZONE_RESET_ALL: u32 = 14;
/// Make the zone that starts at the offset empty.
pub const UBLK_RS_OP_ZONE_RESET: u32 = 15;
/// Describe zones: ublk_rs_request_complete_report().
pub const UBLK_RS_OP_REPORT_ZONES: u32 = 18;

/// Of a write: it is durable before it is completed.
pub const UBLK_RS_FLAG_FUA: u32 = 1 << 13;
/// Of a write of zeroes: the range stays allocated.
pub const UBLK_RS_FLAG_NO_UNMAP: u32 = 1 << 15;
/// A file system's metadata.
pub const UBLK_RS_FLAG_META: u32 = 1 << 11;
/// Swap traffic: the system waits for memory.
pub const UBLK_RS_FLAG_SWAP: u32 = 1 << 16;
/// There is integrity metadata beside the data: ublk_rs_request_metadata().
pub const UBLK_RS_FLAG_INTEGRITY: u32 = 1 << 18;

/// A zone that takes writes anywhere.
pub const UBLK_RS_ZONE_CONVENTIONAL: u32 = 1;
/// A zone that takes writes at its write pointer only.
pub const UBLK_RS_ZONE_SEQUENTIAL: u32 = 2;
/// The condition of a conventional zone.
pub const UBLK_RS_ZONE_NO_WRITE_POINTER: u32 = 0;
/// Nothing was written.
pub const UBLK_RS_ZONE_EMPTY: u32 = 1;
/// Opened by a write.
pub const UBLK_RS_ZONE_IMPLICITLY_OPEN: u32 = 2;
/// Opened by UBLK_RS_OP_ZONE_OPEN.
pub const UBLK_RS_ZONE_EXPLICITLY_OPEN: u32 = 3;
/// Written in part, and not open.
pub const UBLK_RS_ZONE_CLOSED: u32 = 4;
/// Cannot be written any more.
pub const UBLK_RS_ZONE_READ_ONLY: u32 = 13;
/// No room is left, or it was finished.
pub const UBLK_RS_ZONE_FULL: u32 = 14;
/// Cannot be used any more.
pub const UBLK_RS_ZONE_OFFLINE: u32 = 15;

/// A zone, as a report tells of it. All in bytes, multiples of the logical block size.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ublk_rs_zone {
    /// Where it starts on the disk.
    pub start: u64,
    /// From one zone's start to the next one's: the same for all zones of a disk.
    pub length: u64,
    /// What can be written of it, from its start on; not more than length.
    pub capacity: u64,
    /// Where on the disk the next write goes: start, of an empty zone.
    pub write_pointer: u64,
    /// UBLK_RS_ZONE_CONVENTIONAL or UBLK_RS_ZONE_SEQUENTIAL.
    pub kind: u32,
    /// UBLK_RS_ZONE_NO_WRITE_POINTER to UBLK_RS_ZONE_OFFLINE.
    pub state: u32,
    /// To be 0.
    pub reserved: [u64; 2],
}

impl ublk_rs_zone {
    pub(crate) fn to_core(self) -> Option<Zone> {
        Some(Zone {
            start: self.start,
            len: self.length,
            capacity: self.capacity,
            write_pointer: self.write_pointer,
            kind: match self.kind {
                UBLK_RS_ZONE_CONVENTIONAL => ZoneKind::Conventional,
                UBLK_RS_ZONE_SEQUENTIAL => ZoneKind::Sequential,
                _ => return None,
            },
            state: match self.state {
                UBLK_RS_ZONE_NO_WRITE_POINTER => ZoneState::NoWritePointer,
                UBLK_RS_ZONE_EMPTY => ZoneState::Empty,
                UBLK_RS_ZONE_IMPLICITLY_OPEN => ZoneState::ImplicitlyOpen,
                UBLK_RS_ZONE_EXPLICITLY_OPEN => ZoneState::ExplicitlyOpen,
                UBLK_RS_ZONE_CLOSED => ZoneState::Closed,
                UBLK_RS_ZONE_READ_ONLY => ZoneState::ReadOnly,
                UBLK_RS_ZONE_FULL => ZoneState::Full,
                UBLK_RS_ZONE_OFFLINE => ZoneState::Offline,
                _ => return None,
            },
        })
    }
}

/// The number of an operation.
pub(crate) fn op_number(op: Op) -> u32 {
    match op {
        Op::Read => UBLK_RS_OP_READ,
        Op::Write => UBLK_RS_OP_WRITE,
        Op::Flush => UBLK_RS_OP_FLUSH,
        Op::Discard => UBLK_RS_OP_DISCARD,
        Op::WriteZeroes => UBLK_RS_OP_WRITE_ZEROES,
        Op::ZoneAppend => UBLK_RS_OP_ZONE_APPEND,
        Op::ReportZones => UBLK_RS_OP_REPORT_ZONES,
        Op::ZoneOpen => UBLK_RS_OP_ZONE_OPEN,
        Op::ZoneClose => UBLK_RS_OP_ZONE_CLOSE,
        Op::ZoneFinish => UBLK_RS_OP_ZONE_FINISH,
        Op::ZoneReset => UBLK_RS_OP_ZONE_RESET,
        Op::ZoneResetAll => UBLK_RS_OP_ZONE_RESET_ALL,
        _ => u32::MAX,
    }
}

fn action_number(action: ZoneAction) -> u32 {
    match action {
        ZoneAction::Open => UBLK_RS_OP_ZONE_OPEN,
        ZoneAction::Close => UBLK_RS_OP_ZONE_CLOSE,
        ZoneAction::Finish => UBLK_RS_OP_ZONE_FINISH,
        ZoneAction::Reset => UBLK_RS_OP_ZONE_RESET,
        ZoneAction::ResetAll => UBLK_RS_OP_ZONE_RESET_ALL,
        _ => u32::MAX,
    }
}

/// What a request asks for, as `submit` is told.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ublk_rs_io {
    /// sizeof (struct ublk_rs_io) of the library: what follows reserved in later versions is there if it is larger.
    pub size: usize,
    /// Where the range starts on the disk, in bytes.
    pub offset: u64,
    /// The length of the range, in bytes; 0 for a flush and a report of zones. The data of it is had by
    /// ublk_rs_request_buffer() or ublk_rs_request_put(): a program that needs none does not pay for it.
    pub length: u64,
    /// UBLK_RS_OP_*.
    pub op: u32,
    /// UBLK_RS_FLAG_*, and what else the kernel says.
    pub flags: u32,
    /// The queue that it came by.
    pub queue: u16,
    /// Its tag: unique among the queue's requests that are out.
    pub tag: u16,
    /// How many zones are to be reported at most.
    pub zones: u32,
    /// Bytes of integrity metadata that come with the data.
    pub metadata_length: u64,
    /// 0.
    pub reserved: [u64; 2],
}

/// What a disk does: the program's functions, of which each gets `user` back.
///
/// Set `size` to sizeof (struct ublk_rs_backend), what is not implemented to NULL. Which are there decides what the disk
/// advertises: no write, a read-only disk; no flush, no volatile cache; and so on. Later versions add members at the end.
///
/// Results are 0 or -errno. The number is what an O_DIRECT client of the disk sees as far as the block layer carries it,
/// and EIO otherwise; anything that is neither 0 nor a negated errno is EIO and logged. Of a flush, -EOPNOTSUPP becomes
/// EIO, because the block layer would take it for success.
///
/// The functions are called on threads of the library: one at a time for each queue, concurrently for different queues;
/// with the option "threads" any number at a time; with the option "dispatch" by ublk_rs_device_dispatch(). While one
/// runs, its queue (or its thread) serves nobody else. Never do I/O on the disk itself from one: it would wait for its
/// own answer. They must not throw, longjmp, or end the thread.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ublk_rs_backend {
    /// sizeof (struct ublk_rs_backend).
    pub size: usize,
    /// Fills buf, which arrives zeroed, from byte offset of the disk. Needed, unless there is submit.
    pub read: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            buf: *mut c_void,
            length: usize,
            offset: u64,
        ) -> c_int,
    >,
    /// Stores data at byte offset. With UBLK_RS_FLAG_FUA it is durable before this returns.
    pub write: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            data: *const c_void,
            length: usize,
            offset: u64,
            flags: u32,
        ) -> c_int,
    >,
    /// Makes every write that has returned before durable.
    pub flush: Option<unsafe extern "C" fn(user: *mut c_void) -> c_int>,
    /// Forgets a range. What it reads as afterwards is the program's choice.
    pub discard: Option<unsafe extern "C" fn(user: *mut c_void, offset: u64, length: u64) -> c_int>,
    /// Makes a range read as zeroes. With UBLK_RS_FLAG_NO_UNMAP its space stays allocated.
    pub write_zeroes: Option<
        unsafe extern "C" fn(user: *mut c_void, offset: u64, length: u64, flags: u32) -> c_int,
    >,
    /// Takes a request to be completed later, from any thread, by ublk_rs_request_complete() or one of its kind; or does
    /// that at once. io is valid during the call only. Excludes all
    /// functions above, the zone functions, and the option "threads". What the disk can do is then said by options:
    /// "writable", "flush", "discard", "write_zeroes". 0: the request is the program's. -errno: it is not, and the
    /// library answers it with that.
    pub submit: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            device: *mut ublk_rs_device,
            request: u64,
            io: *const ublk_rs_io,
        ) -> c_int,
    >,
    /// Describes up to capacity zones, beginning with the one that holds byte offset, and stores how many those are to
    /// count. Of a zoned disk. After a shorter answer the rest is asked for again; an empty one means EIO.
    pub report_zones: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            offset: u64,
            zones: *mut ublk_rs_zone,
            capacity: u32,
            count: *mut u32,
        ) -> c_int,
    >,
    /// Stores data at the write pointer of the zone that starts at byte zone, and the byte of the disk where that was to
    /// offset. Of a zoned disk.
    pub zone_append: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            data: *const c_void,
            length: usize,
            zone: u64,
            flags: u32,
            offset: *mut u64,
        ) -> c_int,
    >,
    /// Opens, closes, finishes or resets (UBLK_RS_OP_ZONE_*) the zone that starts at byte zone. Of a zoned disk.
    pub zone_action: Option<unsafe extern "C" fn(user: *mut c_void, op: u32, zone: u64) -> c_int>,
    /// Ends the program's part: called once, when no other function is running or will be called any more. That is
    /// during ublk_rs_device_free(), on its thread, or, if a function was stuck by then, later on the thread that was in
    /// it.
    pub destroy: Option<unsafe extern "C" fn(user: *mut c_void)>,
}

/// The least that a table can be: up to and with `read`.
const LEAST: usize = std::mem::offset_of!(ublk_rs_backend, write);

/// A program's callbacks with what they are given. Its `destroy` is called when this is dropped.
pub(crate) struct Callbacks {
    table: ublk_rs_backend,
    user: *mut c_void,
}

// SAFETY: the pointer is not used here but handed to the program's functions, which by the table's contract may be called
// on any thread and on several at a time.
unsafe impl Send for Callbacks {}
// SAFETY: as above.
unsafe impl Sync for Callbacks {}

impl Drop for Callbacks {
    fn drop(&mut self) {
        if let Some(destroy) = self.table.destroy {
            let _inside = Inside::of_callback();
            // SAFETY: the table's contract: it may be called with `user`, once, at the end.
            unsafe { destroy(self.user) };
        }
    }
}

/// What a callback's number means.
pub(crate) fn outcome(code: c_int) -> Result<(), Errno> {
    match code {
        0 => Ok(()),
        _ => Err(Errno::from_result(code).unwrap_or_else(|| {
            tracing::warn!(
                code,
                "a callback returned what is neither 0 nor -errno: the client gets EIO"
            );
            Errno::EIO
        })),
    }
}

impl Callbacks {
    /// Copies a program's table.
    ///
    /// # Safety
    ///
    /// `table` is NULL or valid for reads of as many bytes as its `size` says, and its functions may be called with
    /// `user` as it describes, until `destroy` has been.
    pub(crate) unsafe fn new(
        table: *const ublk_rs_backend,
        user: *mut c_void,
        attempt: &'static str,
    ) -> Result<Self> {
        if table.is_null() {
            return Err(invalid(attempt, "backend is NULL"));
        }
        // SAFETY: not NULL; a size is the least that a table has.
        let size = unsafe { table.cast::<usize>().read() };
        // Half a pointer would be one to nowhere.
        if !(LEAST..=1 << 16).contains(&size) || !size.is_multiple_of(size_of::<usize>()) {
            return Err(invalid(
                attempt,
                format!("backend->size is {size}: set it to sizeof (struct ublk_rs_backend)"),
            ));
        }
        let mut known = ublk_rs_backend::NONE;
        let len = size.min(size_of::<ublk_rs_backend>());
        // SAFETY: within what the program has by its own word, and within `known`; any bytes of functions that the
        // program has set are such functions.
        unsafe {
            (&raw mut known).cast::<u8>().copy_from_nonoverlapping(table.cast(), len);
        }
        // SAFETY: the rest of the same.
        let rest = unsafe { std::slice::from_raw_parts(table.cast::<u8>().add(len), size - len) };
        if rest.iter().any(|byte| *byte != 0) {
            return Err(invalid(
                attempt,
                "the table has functions that this version of the library does not know",
            ));
        }
        known.check(attempt)?;
        Ok(Callbacks { table: known, user })
    }

    pub(crate) fn submits(&self) -> bool {
        self.table.submit.is_some()
    }

    pub(crate) fn has_zones(&self) -> bool {
        self.table.zone_action.is_some()
    }

    /// What the table's functions amount to.
    pub(crate) fn capabilities(&self) -> Capabilities {
        let t = &self.table;
        let all = [
            (t.write.is_some(), Capabilities::WRITE),
            (t.flush.is_some(), Capabilities::FLUSH),
            (t.discard.is_some(), Capabilities::DISCARD),
            (t.write_zeroes.is_some(), Capabilities::WRITE_ZEROES),
            (t.zone_action.is_some(), Capabilities::ZONED),
        ];
        let there = all.into_iter().filter(|(there, _)| *there);
        there.fold(Capabilities::NONE, |caps, (_, one)| caps | one)
    }

    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), Errno> {
        let read = self.table.read.ok_or(Errno::EIO)?;
        let _inside = Inside::of_callback();
        // SAFETY: the table's contract; the buffer is writable for the call.
        outcome(unsafe { read(self.user, buf.as_mut_ptr().cast(), buf.len(), offset) })
    }

    pub(crate) fn write(&self, data: &[u8], offset: u64, flags: u32) -> Result<(), Errno> {
        let write = self.table.write.ok_or(Errno::EROFS)?;
        let _inside = Inside::of_callback();
        // SAFETY: the table's contract; the data is readable for the call.
        outcome(unsafe { write(self.user, data.as_ptr().cast(), data.len(), offset, flags) })
    }

    pub(crate) fn flush(&self) -> Result<(), Errno> {
        let flush = self.table.flush.ok_or(Errno::EIO)?;
        let _inside = Inside::of_callback();
        // SAFETY: the table's contract.
        outcome(unsafe { flush(self.user) })
    }

    pub(crate) fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let discard = self.table.discard.ok_or(Errno::EOPNOTSUPP)?;
        let _inside = Inside::of_callback();
        // SAFETY: the table's contract.
        outcome(unsafe { discard(self.user, offset, length) })
    }

    pub(crate) fn write_zeroes(&self, offset: u64, length: u64, flags: u32) -> Result<(), Errno> {
        let write_zeroes = self.table.write_zeroes.ok_or(Errno::EOPNOTSUPP)?;
        let _inside = Inside::of_callback();
        // SAFETY: the table's contract.
        outcome(unsafe { write_zeroes(self.user, offset, length, flags) })
    }

    pub(crate) fn report_zones(&self, offset: u64, capacity: u32) -> Result<Vec<Zone>, Errno> {
        /// The most that one request is told of at a time; the kernel asks for the rest.
        const MOST: u32 = 4096;
        let report = self.table.report_zones.ok_or(Errno::EOPNOTSUPP)?;
        let capacity = capacity.min(MOST);
        let mut zones = vec![ublk_rs_zone::default(); capacity as usize];
        let mut count = 0;
        let _inside = Inside::of_callback();
        // SAFETY: the table's contract; there are `capacity` zones.
        outcome(unsafe { report(self.user, offset, zones.as_mut_ptr(), capacity, &mut count) })?;
        zones.truncate(count as usize);
        zones.into_iter().map(|zone| zone.to_core().ok_or(Errno::EIO)).collect()
    }

    pub(crate) fn zone_append(&self, data: &[u8], zone: u64, flags: u32) -> Result<u64, Errno> {
        let append = self.table.zone_append.ok_or(Errno::EOPNOTSUPP)?;
        let mut offset = u64::MAX;
        let _inside = Inside::of_callback();
        // SAFETY: the table's contract; the data is readable and the offset writable for the call.
        outcome(unsafe {
            append(self.user, data.as_ptr().cast(), data.len(), zone, flags, &mut offset)
        })?;
        Ok(offset)
    }

    pub(crate) fn zone_action(&self, action: ZoneAction, zone: u64) -> Result<(), Errno> {
        let act = self.table.zone_action.ok_or(Errno::EOPNOTSUPP)?;
        let _inside = Inside::of_callback();
        // SAFETY: the table's contract.
        outcome(unsafe { act(self.user, action_number(action), zone) })
    }

    /// Gives a request to the program. The answer is what it returned. The caller's thread is known to be inside of a
    /// callback.
    #[inline]
    pub(crate) fn submit(
        &self,
        device: *mut ublk_rs_device,
        request: u64,
        io: &ublk_rs_io,
    ) -> Result<(), Errno> {
        let submit = self.table.submit.ok_or(Errno::EIO)?;
        // SAFETY: the table's contract; `io` is readable for the call.
        outcome(unsafe { submit(self.user, device, request, io) })
    }
}

impl ublk_rs_backend {
    const NONE: Self = ublk_rs_backend {
        size: 0,
        read: None,
        write: None,
        flush: None,
        discard: None,
        write_zeroes: None,
        submit: None,
        report_zones: None,
        zone_append: None,
        zone_action: None,
        destroy: None,
    };

    fn check(&self, attempt: &'static str) -> Result<()> {
        let zones =
            [self.report_zones.is_some(), self.zone_append.is_some(), self.zone_action.is_some()];
        let others = self.read.is_some()
            || self.write.is_some()
            || self.flush.is_some()
            || self.discard.is_some()
            || self.write_zeroes.is_some();
        if self.submit.is_some() && (others || zones.contains(&true)) {
            return Err(invalid(attempt, "submit excludes the functions for single operations"));
        }
        if self.submit.is_none() && self.read.is_none() {
            return Err(invalid(attempt, "there is neither read nor submit"));
        }
        if zones.contains(&true) && zones.contains(&false) {
            return Err(invalid(
                attempt,
                "report_zones, zone_append and zone_action are for a zoned disk, which needs all three",
            ));
        }
        Ok(())
    }
}

/// What `submit` is told of a request.
#[inline]
pub(crate) fn describe(request: &Request) -> ublk_rs_io {
    let flags = request.flags();
    ublk_rs_io {
        size: size_of::<ublk_rs_io>(),
        offset: request.offset(),
        length: request.len(),
        op: op_number(request.op()),
        flags: flags.raw(),
        queue: request.queue(),
        tag: request.tag(),
        zones: request.zones(),
        metadata_length: match flags.integrity() {
            true => request.metadata_len() as u64,
            false => 0,
        },
        reserved: [0; 2],
    }
}
