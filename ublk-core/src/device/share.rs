//! Memory that a disk's clients share with its server, so that their data need not be copied.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use super::life::{Life, Phase, State, from_now};
use super::running::Device;
use crate::control::{Features, Wait};
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::sys::memory::page_size;
use crate::sys::shared_memory::{self, MOST, SharedMap};
use crate::uapi::{self, ublk_shmem_buf_reg};
use crate::worker::path::DataPath;
use crate::worker::shared::Turn;

/// Memory in a file that a disk's clients and its server both map.
///
/// A client that does direct I/O from and to such memory, once it is [shared](Device::share), has its data used where it
/// is: ring operations of the backend ([`Ring::read_to_request`](crate::Ring::read_to_request)) work on it, and
/// [`Request::put`](crate::Request::put) writes to it. Since the client may write to it at any time, it is never seen
/// as a slice: [`Request::data`](crate::Request::data) is a copy. All other I/O goes on as before.
///
/// ```no_run
/// use std::os::fd::AsRawFd;
/// use ublk_core::{Builder, SharedBuffer, control::Features, targets::Mem};
///
/// # fn main() -> ublk_core::Result<()> {
/// let disk = Mem::new(1 << 30).builder().require(Features::SHMEM_ZC).start()?;
/// let buffer = SharedBuffer::new(4 << 20)?;
/// let number = disk.share(&buffer)?;
/// println!("clients map /proc/{}/fd/{}", std::process::id(), buffer.as_file().as_raw_fd());
/// disk.unshare(number)?;
/// # Ok(())
/// # }
/// ```
pub struct SharedBuffer {
    file: OwnedFd,
    map: Arc<SharedMap>,
    read_only: bool,
}

impl SharedBuffer {
    /// A new memory file (`memfd_create(2)`) of `bytes` bytes, a multiple of the page size up to 4 GiB, sealed at that
    /// size.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] for another size, and what keeps the file from being made.
    pub fn new(bytes: u64) -> Result<Self> {
        Self::create(bytes, false)
    }

    /// As [`new`](Self::new), of the system's huge pages, which have to be reserved (`vm.nr_hugepages`); `bytes` is a
    /// multiple of their size. For clients that are trusted: one that punches a hole in the file while no huge page is
    /// free ends the process by the next access (`SIGBUS`).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); `ENOMEM` if too few are reserved.
    pub fn huge(bytes: u64) -> Result<Self> {
        Self::create(bytes, true)
    }

    fn create(bytes: u64, huge_pages: bool) -> Result<Self> {
        let len = check(bytes)?;
        let file = shared_memory::sealed_file(len, huge_pages).map_err(|errno| {
            let error = Error::new(ErrorKind::Io, "make shared memory").with_errno(errno);
            match huge_pages {
                true => error.remedy_is("reserve huge pages (sysctl vm.nr_hugepages)"),
                false => error,
            }
        })?;
        // SAFETY: the file is sealed at this size.
        unsafe { Self::map(file, len, false) }
    }

    /// From a memory file of somebody else's, which must be sealed against shrinking (`F_SEAL_SHRINK`): otherwise its
    /// owner could take memory away that is in use. `read_only` is for files that may not be written to; such memory
    /// serves writes of the client alone.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] without that seal or for a size that is no multiple of the page size up to 4 GiB,
    /// and what keeps the file from being mapped.
    pub fn from_memfd(file: OwnedFd, read_only: bool) -> Result<Self> {
        if !shared_memory::cannot_shrink(file.as_fd()) {
            return Err(refused("the file is not sealed against shrinking")
                .remedy_is("seal it (fcntl F_ADD_SEALS, F_SEAL_SHRINK), which takes a memfd"));
        }
        // SAFETY: sealed against shrinking.
        unsafe { Self::from_file(file, read_only) }
    }

    /// From any file, in hugetlbfs for instance.
    ///
    /// # Safety
    ///
    /// Nobody shrinks the file while the buffer or a device that shares it lives: an access to what is not there ends
    /// the process.
    ///
    /// # Errors
    ///
    /// As [`from_memfd`](Self::from_memfd), but for the seal.
    pub unsafe fn from_file(file: OwnedFd, read_only: bool) -> Result<Self> {
        let bytes = shared_memory::size_of_file(file.as_fd())
            .map_err(|errno| Error::new(ErrorKind::Io, ATTEMPT).with_errno(errno))?;
        let len = check(bytes)?;
        // SAFETY: the caller's promise.
        unsafe { Self::map(file, len, read_only) }
    }

    /// # Safety
    ///
    /// The file has `len` bytes for as long as the mapping lives.
    unsafe fn map(file: OwnedFd, len: usize, read_only: bool) -> Result<Self> {
        // SAFETY: the caller's promise.
        let map = unsafe { SharedMap::new(file.as_fd(), len, !read_only) };
        let map =
            map.map_err(|errno| Error::new(ErrorKind::Io, "map shared memory").with_errno(errno))?;
        Ok(SharedBuffer { file, map: Arc::new(map), read_only })
    }

    /// The file, to be handed to clients.
    pub fn as_file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its size in bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }
}

impl std::fmt::Debug for SharedBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedBuffer")
            .field("len", &self.len())
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

const ATTEMPT: &str = "share memory with the disk's clients";

fn refused(cause: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidParameter, ATTEMPT).because(cause.into())
}

fn check(bytes: u64) -> Result<usize> {
    let page = page_size() as u64;
    let fits = bytes > 0 && bytes <= MOST && bytes.is_multiple_of(page);
    usize::try_from(bytes).ok().filter(|_| fits).ok_or_else(|| {
        refused(format!("{bytes} bytes: it must be a multiple of {page} from {page} to {MOST}"))
    })
}

impl Device {
    /// Has the driver look for requests whose data lies in this memory. Returns the buffer's number with this device.
    ///
    /// The memory stays locked until [`unshare`](Self::unshare) or the device's end. The disk stands still for a moment,
    /// until the requests that are out are answered.
    ///
    /// # The next server
    ///
    /// Sharing ends with [`hand_over`](crate::Running::hand_over) and [`halt`](crate::Running::halt): whoever serves the
    /// disk next shares its memory anew. Clients may go on with their direct I/O meanwhile; its data is copied.
    ///
    /// The driver knows the memory of a server that was killed for as long as the device lives. The server that
    /// [recovers](crate::Builder::recover) the disk does not: to it requests in that memory are like any other, with the
    /// data copied by the server or in registered pages. It ends that by [`unshare`](Self::unshare) with the number that the
    /// former server was told, and only then can share the same memory (`EEXIST` before). So keep the numbers where the
    /// next server finds them, beside the file. A disk whose data the driver copies
    /// ([`DataPath::Copy`](crate::DataPath::Copy)) would have no other way to it: with both `SHMEM_ZC` and `USER_RECOVERY`
    /// a builder refuses that path, and `Auto` is another.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless the device was granted [`SHMEM_ZC`](Features::SHMEM_ZC) (since Linux 7.1),
    /// [`ErrorKind::WrongState`] if it is ending, [`ErrorKind::WouldDeadlock`] on one of its own threads; `EEXIST` if a
    /// part of the memory is shared already; [`ErrorKind::TimedOut`] if the backend does not answer its requests within
    /// [`ControlOptions::patience`](crate::control::ControlOptions::patience), or the driver not what it was asked before
    /// about the device's memory: this memory is not shared, then or later. [`ErrorKind::Forked`] for a buffer that was made
    /// before a fork, by the parent process: its file is inherited, its mapping is not.
    pub fn share(&self, buffer: &SharedBuffer) -> Result<u16> {
        self.life().share(buffer)
    }

    /// Ends the sharing of the buffer with this number, which may be one that a [former server](Self::share) was told,
    /// once the requests that are out are answered.
    ///
    /// # Errors
    ///
    /// As [`share`](Self::share); `ENOENT` if there is no such buffer. If [`ErrorKind::TimedOut`] does not say that the driver
    /// was not asked, it goes on: the memory is shared until the requests that it waits for are answered.
    pub fn unshare(&self, number: u16) -> Result<()> {
        self.life().unshare(number)
    }
}

/// Nobody has begun to let go of the device: neither this process nor, by a QUIESCE, another.
fn is_served(state: &State) -> bool {
    state.phase == Phase::Live && state.ended() == 0
}

impl Life {
    /// Neither works on a thread that serves the device: the driver waits for its requests.
    fn may_share(&self) -> Result<()> {
        self.check_process(ATTEMPT)?;
        self.check_thread(ATTEMPT)?;
        let fail = |kind| Error::new(kind, ATTEMPT).on_device(self.info.id);
        let wanted = Features::SHMEM_ZC;
        if !self.info.features.contains(wanted) {
            let since = wanted.since().unwrap_or_default();
            return Err(fail(ErrorKind::Unsupported)
                .because(format!("it was added without {wanted} (since Linux {since})"))
                .remedy_is("require the feature when the device is built"));
        }
        if !is_served(&self.lock()) {
            return Err(fail(ErrorKind::WrongState).because("it is ending, or has ended"));
        }
        self.failure().map_or(Ok(()), Err)
    }

    /// The turn to ask the driver. It has the disk stand still until every request is answered, on a thread of ours that
    /// cannot be called back, and with the device's lock held: so it is not asked while the backend keeps one, nor when
    /// somebody has begun to let go of the device, who would take from the backend what it is to answer.
    fn turn(&self) -> Result<Turn> {
        self.may_share()?;
        let deadline = from_now(self.control.patience());
        let late =
            |cause| Error::new(ErrorKind::TimedOut, ATTEMPT).on_device(self.info.id).because(cause);
        let turn = self.shared.begin(deadline).ok_or_else(|| {
            late("the driver was not asked: it has not come back yet from what it was asked before about the device's memory")
        })?;
        let answered = self.wait_answered_while(&Wait::until(deadline), is_served);
        // Who lets go of the device changes the phase first and then waits for turns.
        self.may_share()?;
        match answered {
            true => Ok(turn),
            false => Err(late(
                "the backend has not answered the requests that it had; the driver was not asked",
            )),
        }
    }

    fn share(&self, buffer: &SharedBuffer) -> Result<u16> {
        self.may_share()?;
        let (id, len) = (self.info.id, buffer.len());
        let Some(start) = buffer.map.range(0, buffer.map.len()) else {
            return Err(Error::new(ErrorKind::Forked, ATTEMPT)
                .on_device(id)
                .because("the buffer was made by the process that this one was forked from, and is not mapped here")
                .remedy_is("make it anew of its file (SharedBuffer::from_memfd)"));
        };
        let flags = if buffer.read_only { uapi::UBLK_SHMEM_BUF_READ_ONLY } else { 0 };
        let addr = start.as_ptr() as u64;
        let memory = ublk_shmem_buf_reg { addr, len, flags, reserved: 0 };
        let registration = self.turn()?.register(&buffer.map);
        // SAFETY: the registration keeps the mapping while the driver may look at it, and the registry from then on;
        // whoever looks at requests' data in it makes raw copies.
        let number = unsafe { self.control.reg_buf_for(id, &memory, registration) };
        let number = number.map_err(|e| match e.errno() {
            Some(Errno::EEXIST) => e.because("a part of the memory is shared already").remedy_is(
                "unshare it first; what a former server of the disk has shared, under the number that it was told",
            ),
            _ => e,
        })?;
        u16::try_from(number).map_err(|_| {
            Error::new(ErrorKind::Io, ATTEMPT).on_device(id).with_errno(Errno::EOVERFLOW)
        })
    }

    fn unshare(&self, number: u16) -> Result<()> {
        let turn = self.turn()?;
        // Of its own: what the requests have taken is not the driver's.
        self.unregister(turn, number, &Wait::for_(self.control.patience()))
    }

    /// Also of a number that a former server was told.
    fn unregister(&self, turn: Turn, number: u16, wait: &Wait) -> Result<()> {
        let unregistered = move || turn.unregistered(number);
        self.control.unreg_buf_for(self.info.id, number.into(), wait, unregistered)
    }

    /// Has the driver forget all memory, which outlives a server otherwise: it would be another's business, who does not
    /// know it. For one who has ended the phase in which memory is shared, and has seen that requests are answered.
    pub(super) fn unshare_all(&self, deadline: Instant) -> Result<()> {
        let turn = || {
            self.shared.begin(deadline).ok_or_else(|| {
                Error::new(ErrorKind::TimedOut, "end the sharing of memory")
                    .on_device(self.info.id)
                    .because("the driver waits for requests")
            })
        };
        // Before the first, a registration may still come to be.
        drop(turn()?);
        for number in self.shared.numbers() {
            match self.unregister(turn()?, number, &Wait::until(deadline)) {
                // Of a device that is named by its path a node that is not there has the same number.
                Err(e) if e.kind() == ErrorKind::Io && e.errno() == Some(Errno::ENOENT) => {}
                Err(e) if e.kind() == ErrorKind::NoSuchDevice => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Says what a recovered disk cannot do any more, if it is one that this library would not have made.
    pub(super) fn warn_of_memory_that_nobody_knows(&self) {
        let features = self.info.features;
        if features.contains(Features::SHMEM_ZC) && DataPath::of(features).is_copied_by_driver() {
            self.warn(
                "direct I/O from memory that a former server has shared fails, until it is unshared: the driver does \
                 not copy its data, and this server does not know it"
                    .into(),
            );
        }
    }
}
