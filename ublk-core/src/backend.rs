//! What users implement: a disk, in one of three ways.
//!
//! * [`Backend`]: blocking calls with slices and byte offsets. Enough for most.
//! * [`AsyncBackend`]: `async fn`s that run on the worker's own ring, many at a time on one thread.
//! * [`QueueHandler`]: the requests themselves, to be completed from wherever and whenever.
//!
//! What a backend is able to do it declares as [`Capabilities`]; they decide what the disk advertises, so a
//! call that was not declared does not come.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::request::{Request, RequestFlags};
use crate::worker::executor::Task;
use crate::worker::ring::Ring;
use crate::zones::{Zone, ZoneAction};

/// What a backend can do besides reading.
///
/// ```
/// use ublk_core::Capabilities;
///
/// let caps = Capabilities::WRITE | Capabilities::FLUSH;
/// assert!(caps.contains(Capabilities::WRITE));
/// assert!(!caps.contains(Capabilities::DISCARD));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Capabilities(u32);

impl Capabilities {
    /// Reads only: the disk is read-only.
    pub const NONE: Capabilities = Capabilities(0);
    /// Writes.
    pub const WRITE: Capabilities = Capabilities(1);
    /// Has a volatile cache, and a flush that makes it durable. Without this the disk advertises a
    /// write-through cache: every write counts as durable when it is completed.
    pub const FLUSH: Capabilities = Capabilities(1 << 1);
    /// Honours FUA writes itself. Without this (and with `FLUSH`) the block layer makes them of a write and
    /// a flush. Needs `FLUSH`.
    pub const FUA: Capabilities = Capabilities(1 << 2);
    /// Discards.
    pub const DISCARD: Capabilities = Capabilities(1 << 3);
    /// Writes zeroes without being sent them.
    pub const WRITE_ZEROES: Capabilities = Capabilities(1 << 4);

    /// Moves the data of reads and writes by operations of the worker's ring on the request, and does not look at
    /// it ([`Ring::read_to_request`], [`Ring::write_from_request`]): such data need not be copied. Says nothing about
    /// the disk; see [`DataPath`](crate::DataPath).
    pub const FIXED_BUFFERS: Capabilities = Capabilities(1 << 5);

    /// Has zones: a disk of [`Builder::zoned`](crate::Builder::zoned).
    pub const ZONED: Capabilities = Capabilities(1 << 6);

    /// Keeps integrity metadata beside the data: a disk of [`Builder::integrity`](crate::Builder::integrity). For an
    /// [`AsyncBackend`] or [`QueueHandler`], which see the [`Request`].
    pub const INTEGRITY: Capabilities = Capabilities(1 << 7);

    const NAMES: [(Capabilities, &'static str); 8] = [
        (Capabilities::WRITE, "WRITE"),
        (Capabilities::FLUSH, "FLUSH"),
        (Capabilities::FUA, "FUA"),
        (Capabilities::DISCARD, "DISCARD"),
        (Capabilities::WRITE_ZEROES, "WRITE_ZEROES"),
        (Capabilities::FIXED_BUFFERS, "FIXED_BUFFERS"),
        (Capabilities::ZONED, "ZONED"),
        (Capabilities::INTEGRITY, "INTEGRITY"),
    ];

    /// Whether all of `other` are among these.
    pub const fn contains(self, other: Capabilities) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those of these that are not in `other`.
    #[must_use]
    pub const fn without(self, other: Capabilities) -> Self {
        Capabilities(self.0 & !other.0)
    }
}

impl std::ops::BitOr for Capabilities {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Capabilities(self.0 | other.0)
    }
}

impl std::fmt::Debug for Capabilities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> =
            Self::NAMES.iter().filter(|(c, _)| self.contains(*c)).map(|(_, n)| *n).collect();
        write!(f, "Capabilities({})", names.join(" | "))
    }
}

/// The error of a call whose request is to be dropped without an answer, as a [`QueueHandler`] drops its own.
#[derive(Debug, thiserror::Error)]
#[error("the request is dropped without an answer")]
pub(crate) struct Unanswered;

impl From<Unanswered> for io::Error {
    fn from(unanswered: Unanswered) -> Self {
        io::Error::other(unanswered)
    }
}

/// A disk served by blocking calls.
///
/// Offsets and lengths are bytes, multiples of the logical block size, within the device. An error's
/// number (`io::Error::from_raw_os_error`, or the one that its kind stands for) reaches the client as far
/// as the block layer carries it, and as `EIO` otherwise.
///
/// The calls come from worker threads, one at a time per queue, from several queues at once; with
/// [`Builder::threads`](crate::Builder::threads) from a pool, any number at once. A call that blocks
/// stalls its queue, or one thread of the pool. A panic is contained: the client gets `EIO`, and the next
/// request comes as if nothing had happened.
///
/// Never do I/O on the disk itself from here: it would wait for its own answer.
pub trait Backend: Send + Sync + 'static {
    /// What the backend can do besides reading. Asked once, before the device is made.
    fn capabilities(&self) -> Capabilities {
        Capabilities::NONE
    }

    /// Reads from byte `offset` into `buf`, which arrives zeroed, and returns how many bytes that were.
    /// After a short read the rest is asked for again; 0 means `EIO`.
    ///
    /// # Errors
    ///
    /// Whatever the client should see.
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes `data` at byte `offset` and returns how many bytes were written. After a short write the rest
    /// is given again; 0 means `EIO`. With [`RequestFlags::fua`] the data is durable before this returns.
    ///
    /// # Errors
    ///
    /// Whatever the client should see; `EROFS` if not implemented.
    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> io::Result<usize> {
        let _ = (data, offset, flags);
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }

    /// Makes every write that returned before durable.
    ///
    /// # Errors
    ///
    /// Whatever the client's `fsync` should report; never success for what is not durable.
    fn flush(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    /// Forgets a range. What it reads as afterwards is the backend's choice.
    ///
    /// # Errors
    ///
    /// Whatever the client should see; `EOPNOTSUPP` if not implemented.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Makes a range read as zeroes. With [`RequestFlags::no_unmap`] its space stays allocated.
    ///
    /// # Errors
    ///
    /// Whatever the client should see; `EOPNOTSUPP` if not implemented.
    fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> io::Result<()> {
        let _ = (offset, len, flags);
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Describes zones of a zoned disk: `count` of them, beginning with the one that holds byte `offset`. Also called
    /// while the disk starts. After a shorter answer the rest is asked for again; an empty one means `EIO`.
    ///
    /// # Errors
    ///
    /// Whatever the client should see.
    fn report_zones(&self, offset: u64, count: u32) -> io::Result<Vec<Zone>> {
        let _ = (offset, count);
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Writes all of `data` at the write pointer of the zone that starts at byte `zone`, and returns the byte of the
    /// disk where that was.
    ///
    /// # Errors
    ///
    /// Whatever the client should see.
    fn append(&self, data: &[u8], zone: u64, flags: RequestFlags) -> io::Result<u64> {
        let _ = (data, zone, flags);
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Opens, closes, finishes or resets the zone that starts at byte `zone`, or resets all.
    ///
    /// # Errors
    ///
    /// Whatever the client should see: `ETOOMANYREFS` for one open zone too many, `EOVERFLOW` for one active zone too
    /// many, `EIO` for what the zone's state does not allow.
    fn zone_action(&self, action: ZoneAction, zone: u64) -> io::Result<()> {
        let _ = (action, zone);
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
}

impl<B: Backend + ?Sized> Backend for Arc<B> {
    fn report_zones(&self, offset: u64, count: u32) -> io::Result<Vec<Zone>> {
        (**self).report_zones(offset, count)
    }
    fn append(&self, data: &[u8], zone: u64, flags: RequestFlags) -> io::Result<u64> {
        (**self).append(data, zone, flags)
    }
    fn zone_action(&self, action: ZoneAction, zone: u64) -> io::Result<()> {
        (**self).zone_action(action, zone)
    }
    fn capabilities(&self) -> Capabilities {
        (**self).capabilities()
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        (**self).read(buf, offset)
    }
    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> io::Result<usize> {
        (**self).write(data, offset, flags)
    }
    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> io::Result<()> {
        (**self).write_zeroes(offset, len, flags)
    }
}

/// A disk served by futures on the worker's own ring.
///
/// Each request is a future, polled on its queue's worker, where it may await operations of the [`Ring`]:
/// many are in progress at a time on one thread. The futures need not be `Send`. They answer by their
/// output: the request is completed with it, all of it on success; a future that is dropped or panics means
/// `EIO`. See [`Backend`] for units and errors.
///
/// A future must not block its thread. For another runtime, implement [`QueueHandler`] and complete the
/// requests from there.
pub trait AsyncBackend: Send + Sync + 'static {
    /// What the backend can do besides reading. Asked once, before the device is made.
    fn capabilities(&self) -> Capabilities {
        Capabilities::NONE
    }

    /// Fills the whole request: with [`Ring::read_to_request`], [`Request::put`] or
    /// [`Request::data_mut`]. What is left out reads as zeroes.
    fn read(&self, request: &mut Request, ring: &Ring) -> impl Future<Output = io::Result<()>>;

    /// Stores the whole request: [`Ring::write_from_request`], [`Request::data`]. With
    /// [`RequestFlags::fua`] the data is durable when the future ends.
    fn write(&self, request: &mut Request, ring: &Ring) -> impl Future<Output = io::Result<()>> {
        let _ = (request, ring);
        std::future::ready(Err(io::Error::from_raw_os_error(libc::EROFS)))
    }

    /// Makes every write that was completed before durable.
    fn flush(&self, ring: &Ring) -> impl Future<Output = io::Result<()>> {
        let _ = ring;
        std::future::ready(Err(io::Error::from_raw_os_error(libc::EIO)))
    }

    /// Forgets the request's range.
    fn discard(&self, request: &mut Request, ring: &Ring) -> impl Future<Output = io::Result<()>> {
        let _ = (request, ring);
        std::future::ready(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)))
    }

    /// Makes the request's range read as zeroes.
    fn write_zeroes(
        &self,
        request: &mut Request,
        ring: &Ring,
    ) -> impl Future<Output = io::Result<()>> {
        let _ = (request, ring);
        std::future::ready(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)))
    }

    /// Describes zones: see [`Backend::report_zones`].
    fn report_zones(
        &self,
        offset: u64,
        count: u32,
        ring: &Ring,
    ) -> impl Future<Output = io::Result<Vec<Zone>>> {
        let _ = (offset, count, ring);
        std::future::ready(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)))
    }

    /// Stores the whole request at the write pointer of the zone that starts at its offset, and says at which byte of
    /// the disk that was. Otherwise as [`write`](Self::write).
    fn append(&self, request: &mut Request, ring: &Ring) -> impl Future<Output = io::Result<u64>> {
        let _ = (request, ring);
        std::future::ready(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)))
    }

    /// Opens, closes, finishes or resets zones: see [`Backend::zone_action`].
    fn zone_action(
        &self,
        action: ZoneAction,
        zone: u64,
        ring: &Ring,
    ) -> impl Future<Output = io::Result<()>> {
        let _ = (action, zone, ring);
        std::future::ready(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)))
    }
}

/// Takes one queue's requests as they are.
///
/// A handler is made on its queue's worker and stays there. It may complete a request at once, keep it, or
/// send it away; [`Request::complete`] works from any thread.
pub trait QueueHandler: 'static {
    /// A request has arrived.
    fn handle(&mut self, request: Request, context: &mut QueueContext<'_>);

    /// The requests that arrived together have all been handled; called after the last of them. For handlers that pass
    /// on what they collected meanwhile. Default: nothing.
    fn turn_ended(&mut self, context: &mut QueueContext<'_>) {
        let _ = context;
    }
}

impl<F: FnMut(Request, &mut QueueContext<'_>) + 'static> QueueHandler for F {
    fn handle(&mut self, request: Request, context: &mut QueueContext<'_>) {
        self(request, context);
    }
}

/// What a handler finds on its worker.
pub struct QueueContext<'a> {
    ring: &'a Ring,
    spawned: &'a mut Vec<Task>,
    remaining: usize,
}

impl std::fmt::Debug for QueueContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("QueueContext")
    }
}

impl<'a> QueueContext<'a> {
    pub(crate) fn new(ring: &'a Ring, spawned: &'a mut Vec<Task>, remaining: usize) -> Self {
        QueueContext { ring, spawned, remaining }
    }

    /// How many requests that arrived together with this one are still to be handled, of all queues of the worker.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// Gives the results of requests that were completed so far to the kernel at once.
    ///
    /// Otherwise that happens when all requests that arrived together have been handled, with one system call for all
    /// of them. For handlers of which one may take long, lest the others' clients wait for it.
    pub fn commit(&mut self) {
        self.ring.commit();
    }

    /// The time on the worker's clock, since some moment before the worker began; it never goes back.
    ///
    /// For handlers that look at the clock for every request. Where the system's monotonic clock is a system call, this
    /// one is reckoned from the processor's counter, in nanoseconds, and now and then compared with the system's: commonly
    /// it is right to some microseconds, and while a virtual machine moves or is suspended it may be wrong by 100 ms.
    pub fn clock(&self) -> Duration {
        Duration::from_nanos(self.ring.now().raw())
    }

    /// The worker's ring.
    pub fn ring(&self) -> &'a Ring {
        self.ring
    }

    /// Runs a future on the worker, beside the block commands. It is polled first when the handler has
    /// returned, and dropped when the queue ends.
    pub fn spawn(&mut self, future: impl Future<Output = ()> + 'static) {
        self.spawned.push(Box::pin(future));
    }
}
