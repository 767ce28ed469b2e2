//! The worker's ring in the hands of a queue's handler: files, sockets and timers beside the block
//! commands, awaited on the worker's own thread.

use std::any::Any;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use io_uring::{opcode, squeue, types};

use super::cell::Shared;
use super::core::Token;
use super::operations::{Hold, Keep};
use super::portal;
use crate::error::Errno;
use crate::request::{Op, Request};
use crate::sys::clock::Stamp;
use crate::uring::sqe::Target;

/// A buffer that can be lent to the kernel: owned, and at an address that does not change when the owner
/// is moved.
///
/// # Safety
///
/// `start` must return the same address, valid for reads of `len` bytes, until the value is dropped or
/// mutated by its owner, also when the value is moved.
pub unsafe trait IoBuf: Send + 'static {
    /// The address of the first byte.
    fn start(&self) -> *const u8;
    /// The number of initialised bytes.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A buffer that the kernel may write to.
///
/// # Safety
///
/// As [`IoBuf`], and the bytes must be writable.
pub unsafe trait IoBufMut: IoBuf {
    /// The address of the first byte.
    fn start_mut(&mut self) -> *mut u8;
}

// SAFETY: a vector's bytes are on the heap, at one address until the vector is mutated or dropped.
unsafe impl IoBuf for Vec<u8> {
    fn start(&self) -> *const u8 {
        self.as_ptr()
    }
    fn len(&self) -> usize {
        Vec::len(self)
    }
}
// SAFETY: as above, and a vector owns its bytes.
unsafe impl IoBufMut for Vec<u8> {
    fn start_mut(&mut self) -> *mut u8 {
        self.as_mut_ptr()
    }
}
// SAFETY: static memory never moves.
unsafe impl IoBuf for &'static [u8] {
    fn start(&self) -> *const u8 {
        self.as_ptr()
    }
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }
}

/// A file or socket for operations on a [`Ring`]. Clones share the descriptor, which stays open until the
/// last operation on it has completed.
#[derive(Clone, Debug)]
pub struct RingFile(Arc<OwnedFd>);

impl RingFile {
    /// From a file, a socket or a descriptor.
    pub fn new(file: impl Into<OwnedFd>) -> Self {
        RingFile(Arc::new(file.into()))
    }
}

impl AsFd for RingFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The ring of the worker that calls a [`QueueHandler`](crate::QueueHandler) or polls an
/// [`AsyncBackend`](crate::AsyncBackend)'s futures. It stays on that thread.
///
/// An operation starts when its future is first polled. A future that is dropped before its end has its
/// operation cancelled; what it worked on stays with the kernel until it is done. Once the ring was taken from
/// its worker (a forced stop found it stuck), new operations fail with `ECANCELED`, and those in flight
/// never end: the worker drops its tasks as soon as it gets to it.
#[derive(Clone)]
pub struct Ring {
    shared: Arc<Shared>,
    /// Neither sent nor shared: the kernel accepts entries from the worker's thread only.
    local: PhantomData<Rc<()>>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

impl Ring {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Ring { shared, local: PhantomData }
    }

    /// Commits what has ended so far. A failure is left to the worker's next turn, which meets it again.
    pub(crate) fn commit(&self) {
        if let Some(mut core) = self.shared.lock() {
            core.commit_finished();
        }
    }

    /// The worker's clock.
    pub(crate) fn now(&self) -> Stamp {
        match self.shared.lock() {
            Some(mut core) => core.now(),
            None => Stamp::now(),
        }
    }

    /// Starts an operation when first polled.
    ///
    /// # Safety
    ///
    /// The addresses in `entry` must lie in what `keep` keeps.
    unsafe fn submit(&self, entry: squeue::Entry, keep: Keep) -> Operation {
        Operation { ring: self.clone(), state: State::New(Box::new(entry), keep) }
    }

    /// Reads from `file` at byte `offset` (for a socket or pipe, `u64::MAX`) into the whole of `buf`.
    /// Returns the number of bytes read, which may be less, and the buffer.
    pub async fn read<B: IoBufMut>(
        &self,
        file: &RingFile,
        buf: B,
        offset: u64,
    ) -> (io::Result<usize>, B) {
        let mut buf = Box::new(buf);
        let len = u32::try_from(buf.len()).unwrap_or(MAX_TRANSFER);
        let entry = opcode::Read::new(fd(file), buf.start_mut(), len.min(MAX_TRANSFER))
            .offset(offset)
            .build();
        self.with_buffer(file, entry, buf).await
    }

    /// Writes `buf` to `file` at byte `offset` (for a socket or pipe, `u64::MAX`). Returns the number of
    /// bytes written, which may be less than all, and the buffer.
    pub async fn write<B: IoBuf>(
        &self,
        file: &RingFile,
        buf: B,
        offset: u64,
    ) -> (io::Result<usize>, B) {
        let buf = Box::new(buf);
        let len = u32::try_from(buf.len()).unwrap_or(MAX_TRANSFER);
        let entry =
            opcode::Write::new(fd(file), buf.start(), len.min(MAX_TRANSFER)).offset(offset).build();
        self.with_buffer(file, entry, buf).await
    }

    /// Receives from a socket into the whole of `buf` (`recv(2)`, without flags).
    pub async fn recv<B: IoBufMut>(&self, socket: &RingFile, buf: B) -> (io::Result<usize>, B) {
        let mut buf = Box::new(buf);
        let len = u32::try_from(buf.len()).unwrap_or(MAX_TRANSFER);
        let entry = opcode::Recv::new(fd(socket), buf.start_mut(), len.min(MAX_TRANSFER)).build();
        self.with_buffer(socket, entry, buf).await
    }

    /// Sends `buf` by a socket (`send(2)`, with `MSG_NOSIGNAL`).
    pub async fn send<B: IoBuf>(&self, socket: &RingFile, buf: B) -> (io::Result<usize>, B) {
        let buf = Box::new(buf);
        let len = u32::try_from(buf.len()).unwrap_or(MAX_TRANSFER);
        let entry = opcode::Send::new(fd(socket), buf.start(), len.min(MAX_TRANSFER))
            .flags(libc::MSG_NOSIGNAL)
            .build();
        self.with_buffer(socket, entry, buf).await
    }

    async fn with_buffer<B: IoBuf>(
        &self,
        file: &RingFile,
        entry: squeue::Entry,
        buf: Box<B>,
    ) -> (io::Result<usize>, B) {
        let keep = Keep { hold: Hold::Memory(buf), file: Some(Arc::clone(&file.0)) };
        // SAFETY: the entry's one address is of the buffer's memory, which by `IoBuf`'s contract is where it
        // was when the entry was made, and which `keep` keeps.
        let (result, keep) = unsafe { self.submit(entry, keep) }.await;
        let Hold::Memory(memory) = keep.hold else { unreachable!("as given") };
        let Ok(buf) = (memory as Box<dyn Any>).downcast::<B>() else { unreachable!("as given") };
        (result.map(|n| n as usize), *buf)
    }

    /// Makes what was written to `file` durable (`fsync(2)`; `fdatasync(2)` if `data_only`).
    pub async fn fsync(&self, file: &RingFile, data_only: bool) -> io::Result<()> {
        let flags =
            if data_only { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
        self.plain(file, opcode::Fsync::new(fd(file)).flags(flags).build()).await
    }

    /// Changes the allocation of a range of `file` (`fallocate(2)`; `mode` is its `FALLOC_FL_*` flags).
    pub async fn fallocate(
        &self,
        file: &RingFile,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        self.plain(file, opcode::Fallocate::new(fd(file), len).offset(offset).mode(mode).build())
            .await
    }

    async fn plain(&self, file: &RingFile, entry: squeue::Entry) -> io::Result<()> {
        let keep = Keep { hold: Hold::Nothing, file: Some(Arc::clone(&file.0)) };
        // SAFETY: the entry has no address.
        unsafe { self.submit(entry, keep) }.await.0.map(drop)
    }

    /// Waits for a time.
    pub async fn sleep(&self, time: Duration) {
        let spec = Box::new(types::Timespec::from(time));
        let entry = opcode::Timeout::new(&raw const *spec).build();
        // The box's contents keep their address when it becomes a box of another type.
        let keep = Keep { hold: Hold::Memory(spec), file: None };
        // SAFETY: the address is of the boxed time, which `keep` keeps.
        // The result of a timer that ran out is ETIME, and nothing else can be done about any other.
        let _ = unsafe { self.submit(entry, keep) }.await;
    }

    /// Reads from `file` at byte `offset` into `range` of a read request's data. Returns the number of bytes read,
    /// which may be less; 0 at the end of the file.
    ///
    /// With a data path that registers the client's pages with the ring, the data goes straight there; otherwise
    /// it goes by the request's buffer. The request is committed only when the operation has ended, whatever
    /// becomes of the future.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the request is no read or the range does not fit, `EXDEV` if it came to another worker than this
    /// ring's, `ECANCELED` if it was revoked, and what the file's read reports.
    pub async fn read_to_request(
        &self,
        file: &RingFile,
        offset: u64,
        request: &Request,
        range: Range<usize>,
    ) -> io::Result<usize> {
        self.check_worker_of(request)?;
        let (start, len) = part(request, Op::Read, &range)?;
        if request.shared().is_none()
            && !request.is_buffered()
            && let Some(index) = self.pages_of(request)
        {
            let at = std::ptr::without_provenance_mut(range.start);
            let entry = opcode::ReadFixed::new(fd(file), at, len, index).offset(offset).build();
            match self.with_request(Some(file), entry, request).await {
                Err(e) if request.lost_its_pages(&e) => {}
                read => {
                    let n = read? as usize;
                    request.filled_by_ring(range.start as u32..(range.start + n) as u32);
                    return Ok(n);
                }
            }
        }
        request.slot_for_ring().soil(range.end as u32);
        let entry = opcode::Read::new(fd(file), start, len).offset(offset).build();
        let n = self.with_request(Some(file), entry, request).await? as usize;
        if !request.is_buffered() && request.shared().is_none() {
            self.through_portal(request, range.start..range.start + n).await?;
        }
        request.filled_by_ring(range.start as u32..(range.start + n) as u32);
        Ok(n)
    }

    /// Writes `range` of a write's or append's data to `file` at byte `offset`. Returns the number of bytes
    /// written, which may be less. `durable` makes the file's data durable with it (`RWF_DSYNC`).
    ///
    /// With a data path that registers the client's pages with the ring, the data comes straight from there;
    /// otherwise it comes by the request's buffer. The request is committed only when the operation has ended,
    /// whatever becomes of the future.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the request is no write or append or the range does not fit, `EXDEV` if it came to another worker
    /// than this ring's, `ECANCELED` if it was revoked, and what the file's write reports.
    pub async fn write_from_request(
        &self,
        file: &RingFile,
        offset: u64,
        request: &Request,
        range: Range<usize>,
        durable: bool,
    ) -> io::Result<usize> {
        self.check_worker_of(request)?;
        let op = if request.op() == Op::ZoneAppend { Op::ZoneAppend } else { Op::Write };
        let (start, len) = part(request, op, &range)?;
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        if request.shared().is_none()
            && !request.is_buffered()
            && let Some(index) = self.pages_of(request)
        {
            let at = std::ptr::without_provenance(range.start);
            let entry = opcode::WriteFixed::new(fd(file), at, len, index)
                .offset(offset)
                .rw_flags(flags)
                .build();
            match self.with_request(Some(file), entry, request).await {
                Err(e) if request.lost_its_pages(&e) => {}
                written => return written.map(|n| n as usize),
            }
        }
        if !request.is_buffered() && request.shared().is_none() {
            request.slot_for_ring().soil(range.end as u32);
            self.through_portal(request, range).await?;
        }
        let entry = opcode::Write::new(fd(file), start, len).offset(offset).rw_flags(flags).build();
        self.with_request(Some(file), entry, request).await.map(|n| n as usize)
    }

    /// A request's pages, its queue and its end are its own worker's business: in another ring's tables these places
    /// are some other request's.
    fn check_worker_of(&self, request: &Request) -> io::Result<()> {
        let errno = match self.shared.lock() {
            Some(core) if core.issued(request.slot_for_ring()) => return Ok(()),
            Some(_) => libc::EXDEV,
            None => libc::ECANCELED,
        };
        Err(io::Error::from_raw_os_error(errno))
    }

    /// The place of a request's pages in the ring's table of buffers, if they can be used there.
    fn pages_of(&self, request: &Request) -> Option<u16> {
        let slot = request.slot_for_ring();
        if !slot.reach()?.portal().path().registers() || !slot.is_owned() {
            return None;
        }
        self.shared.lock()?.pages_of(slot)
    }

    /// Moves a part of a request's data between its buffer and the client, by the device's file.
    async fn through_portal(&self, request: &Request, range: Range<usize>) -> io::Result<()> {
        let slot = request.slot_for_ring();
        let target = self.shared.lock().and_then(|mut core| core.target_of(slot));
        let target = target.ok_or_else(|| io::Error::from_raw_os_error(libc::ECANCELED))?;
        let mut at = range.start;
        while at < range.end {
            let rest = at..range.end;
            let (start, len) = part(request, request.op(), &rest)?;
            let position = portal::position(slot.place()) + at as u64;
            let entry = match (request.op(), target) {
                (Op::Read, Target::Fd(fd)) => {
                    opcode::Write::new(fd, start, len).offset(position).build()
                }
                (Op::Read, Target::Fixed(file)) => {
                    opcode::Write::new(file, start, len).offset(position).build()
                }
                (_, Target::Fd(fd)) => opcode::Read::new(fd, start, len).offset(position).build(),
                (_, Target::Fixed(file)) => {
                    opcode::Read::new(file, start, len).offset(position).build()
                }
            };
            match self.with_request(None, entry, request).await? {
                0 => return Err(io::Error::from_raw_os_error(libc::EIO)),
                n => at += n as usize,
            }
        }
        Ok(())
    }

    async fn with_request(
        &self,
        file: Option<&RingFile>,
        entry: squeue::Entry,
        request: &Request,
    ) -> io::Result<u32> {
        let slot = Arc::clone(request.slot_for_ring());
        let shared = request.shared().map(|part| Arc::clone(part.map()));
        let file = file.map(|file| Arc::clone(&file.0));
        let keep = Keep { hold: Hold::Request(slot, shared), file };
        // SAFETY: an address is within the slot's buffer or the shared memory (`part`), which `keep` keeps; while the operation
        // is counted on the slot, the request refuses access by reference (to what is written) and the worker
        // does not give the memory to the kernel's driver. Of an operation on registered pages it is an offset
        // in these, which the kernel checks.
        unsafe { self.submit(entry, keep) }.await.0
    }
}

/// Above this the kernel truncates a transfer (`MAX_RW_COUNT`).
const MAX_TRANSFER: u32 = 0x7fff_f000;

fn fd(file: &RingFile) -> types::Fd {
    types::Fd(file.0.as_raw_fd())
}

/// The address and length of a part of a request's buffer.
fn part(request: &Request, op: Op, range: &Range<usize>) -> io::Result<(*mut u8, u32)> {
    let fits = range.start < range.end && range.end as u64 <= request.len();
    if request.op() != op || !fits {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    if let Some(shared) = request.shared().filter(|_| !request.is_buffered()) {
        let start = shared.address(range.start, range.len());
        return Ok((start.ok_or(Errno::EFAULT)?, range.len() as u32));
    }
    let buffer = request.slot_for_ring().buffer();
    // SAFETY: the range is inside of the request's length, which is inside of the buffer.
    let start = unsafe { buffer.start().as_ptr().add(range.start) };
    Ok((start, range.len() as u32))
}

enum State {
    /// Boxed: it is large, and gone after the first poll.
    New(Box<squeue::Entry>, Keep),
    InFlight(u32),
    Ended,
}

/// An operation, as a future.
struct Operation {
    ring: Ring,
    state: State,
}

impl Future for Operation {
    type Output = (io::Result<u32>, Keep);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        match std::mem::replace(&mut this.state, State::Ended) {
            State::New(entry, keep) => {
                let Some(mut core) = this.ring.shared.lock() else {
                    return Poll::Ready((Err(io::Error::from_raw_os_error(libc::ECANCELED)), keep));
                };
                // The tag may be another request's, and its pages too.
                if matches!(&keep.hold, Hold::Request(slot, _) if !slot.is_owned()) {
                    return Poll::Ready((Err(io::Error::from_raw_os_error(libc::ECANCELED)), keep));
                }
                if !core.room_or_park(context.waker()) {
                    this.state = State::New(entry, keep);
                    return Poll::Pending;
                }
                let index = core.operations().insert(keep, context.waker().clone());
                // SAFETY: by the contract of `submit` the addresses lie in `keep`, which the table now
                // keeps until the completion.
                unsafe { core.push(entry.user_data(Token::Operation(index).encode())) };
                this.state = State::InFlight(index);
                Poll::Pending
            }
            State::InFlight(index) => {
                let Some(mut core) = this.ring.shared.lock() else {
                    // What it works on was left to the kernel with the core, so there is nothing to
                    // return. The worker is about to drop its tasks.
                    this.state = State::InFlight(index);
                    return Poll::Pending;
                };
                match core.operations().poll(index, context.waker()) {
                    Poll::Pending => {
                        this.state = State::InFlight(index);
                        Poll::Pending
                    }
                    Poll::Ready((result, keep)) => {
                        let result = u32::try_from(result)
                            .map_err(|_| io::Error::from_raw_os_error(-result));
                        Poll::Ready((result, keep))
                    }
                }
            }
            State::Ended => panic!("a future was polled after its end"),
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let State::InFlight(index) = self.state else { return };
        let garbage = {
            let Some(mut core) = self.ring.shared.lock() else { return };
            let (in_flight, garbage) = core.operations().abandon(index);
            if in_flight {
                core.cancel_operation(index);
            }
            garbage
        };
        // Outside of the lock: it may be the user's.
        drop(garbage);
    }
}
