//! A worker's ring: 64-byte entries, a sparse table of registered files, and the setup flags that this
//! kernel has.
//!
//! The ring is made, entered and read by one thread; it may be *dropped* by another, which is how a device
//! is taken from a worker that is stuck in its user's code. That is why the ring's own descriptor is not
//! registered with the thread (`IORING_REGISTER_RING_FDS`): the registration could not be undone from
//! outside, and would keep the ring, and with it the device, open.

use std::os::fd::{AsRawFd, RawFd};

use io_uring::{EnterFlags, IoUring, cqueue, squeue};

use crate::control::Features;
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::sys::fork::Listed;

/// How large a ring is asked for. The kernel rounds up to powers of two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Entries of the submission queue: what one `io_uring_enter` can hand over. At most 32,768.
    pub(crate) submissions: u32,
    /// Entries of the completion queue: commands that may be in flight. At most 65,536.
    pub(crate) completions: u32,
    /// Places in the table of registered files.
    pub(crate) files: u32,
    /// Whether queues of several devices will be on it.
    pub(crate) shared: bool,
    /// Whether completions may wait for the next enter (DEFER_TASKRUN); see [`defers`].
    pub(crate) deferred: bool,
}

/// Whether a driver with these features may serve rings whose completions wait for the next enter.
///
/// The driver hands a request to its server by task work. When a ring is closed under a thread that lives on
/// (because it is stuck in a backend), what such a ring has deferred runs on that thread later. Drivers before
/// PER_IO_DAEMON abort a dead server's requests before that and never again (`ublk_abort_queue`), so that the
/// request, and whoever then removes the disk, would wait for ever. Without deferral the work runs at once,
/// however stuck the thread is.
pub(crate) fn defers(features: Option<Features>) -> bool {
    features.is_some_and(|f| f.contains(Features::PER_IO_DAEMON))
}

pub(crate) struct WorkerRing {
    ring: Listed<IoUring>,
    /// Completions are delivered only inside an enter that asks for them.
    deferred: bool,
}

/// Why an entry was not taken: the submission queue is full until the next enter.
#[derive(Debug)]
pub(crate) struct Full;

#[derive(Clone, Copy)]
struct Setup {
    no_sqarray: bool,
    deferred: bool,
    single_issuer: bool,
    coop: bool,
}

/// Best first. NO_SQARRAY came with 6.6, DEFER_TASKRUN with 6.1, SINGLE_ISSUER with 6.0, COOP_TASKRUN with
/// 5.19; an unknown flag is EINVAL.
const SETUPS: [Setup; 5] = [
    Setup { no_sqarray: true, deferred: true, single_issuer: true, coop: true },
    Setup { no_sqarray: false, deferred: true, single_issuer: true, coop: true },
    // Cooperative task work waits for the thread's next system call, as deferred work for its next enter.
    Setup { no_sqarray: true, deferred: false, single_issuer: true, coop: false },
    Setup { no_sqarray: false, deferred: false, single_issuer: true, coop: false },
    Setup { no_sqarray: false, deferred: false, single_issuer: false, coop: false },
];

impl WorkerRing {
    /// Makes a ring for the calling thread.
    pub(crate) fn new(size: Size) -> Result<Self> {
        let mut last = Errno::EINVAL;
        for setup in SETUPS.into_iter().filter(|s| size.deferred || !s.deferred) {
            match Self::try_setup(size, setup) {
                Ok(ring) => {
                    let this = WorkerRing { ring, deferred: setup.deferred };
                    this.ring.submitter().register_files_sparse(size.files).map_err(|e| {
                        Error::new(ErrorKind::TooMany, "register a table of files with io_uring")
                            .with_source(e)
                            .remedy_is("raise the limit of open files (ulimit -n)")
                    })?;
                    return Ok(this);
                }
                Err(errno) if errno == Errno::EINVAL => last = errno,
                Err(errno) => return Err(super::setup_error(errno)),
            }
        }
        Err(super::setup_error(last))
    }

    fn try_setup(size: Size, setup: Setup) -> std::result::Result<Listed<IoUring>, Errno> {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_submit_all().setup_cqsize(size.completions);
        if setup.no_sqarray {
            builder.setup_no_sqarray();
        }
        if setup.deferred {
            builder.setup_defer_taskrun();
        }
        if setup.single_issuer {
            builder.setup_single_issuer();
        }
        if setup.coop {
            builder.setup_coop_taskrun();
        }
        Listed::make(|| builder.build(size.submissions)).map_err(Errno::from)
    }

    /// Puts an entry into the submission queue; the next [`enter`](Self::enter) hands it to the kernel.
    ///
    /// # Safety
    ///
    /// Every address in the entry must stay valid until its completion, for what the operation does with it.
    pub(crate) unsafe fn push(&mut self, entry: &squeue::Entry) -> std::result::Result<(), Full> {
        // SAFETY: the caller's promise.
        unsafe { self.ring.submission().push(entry) }.map_err(|_| Full)
    }

    /// Hands the queued entries to the kernel, and waits until at least `want` completions are there.
    ///
    /// An interruption ends the wait early. The entries that the kernel did not take stay queued.
    pub(crate) fn enter(&mut self, want: u32) -> Result<()> {
        let queued = self.ring.submission().len() as u32;
        // Deferred completions are delivered by GETEVENTS only, and so is an overflow of the completion
        // queue.
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: no argument structure is passed; the entries' validity is `push`'s contract.
        let entered =
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued, want, flags, None) };
        match entered.map_err(Errno::from) {
            Ok(_) => Ok(()),
            // EBUSY: completions wait for room, which the caller is about to make. EAGAIN: no memory for a
            // request at the moment; the entries stay and the next turn tries again.
            Err(Errno::EINTR | Errno::EBUSY | Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(Error::new(ErrorKind::WorkerDied, "wait in the worker's ring")
                .with_errno(errno)
                .because("io_uring_enter failed")),
        }
    }

    /// Whether an enter that does not wait could bring completions that [`reap`](Self::reap) does not see.
    pub(crate) fn delivers_only_in_enter(&self) -> bool {
        self.deferred
    }

    /// Calls `f(user_data, result, flags)` for each completion that has arrived, and says how many those were.
    pub(crate) fn reap(&mut self, mut f: impl FnMut(u64, i32, u32)) -> u32 {
        let mut count = 0;
        for completion in self.ring.completion() {
            let completion: cqueue::Entry = completion;
            f(completion.user_data(), completion.result(), completion.flags());
            count += 1;
        }
        count
    }

    /// Whether the kernel lets go of a file as soon as it is out of the table and its commands have ended.
    ///
    /// Before Linux 6.13 it did so in the order of the table's changes (`io_rsrc_node_ref_zero`): a command of
    /// another file that was submitted earlier, such as the fetch of an idle tag, kept it. The nearest feature
    /// that tells is of 6.15.
    pub(crate) fn forgets_files_at_once(&self) -> bool {
        self.ring.params().is_feature_no_iowait()
    }

    /// Puts a descriptor into the table of registered files.
    pub(crate) fn register_file(&mut self, index: u32, fd: RawFd) -> Result<(), Errno> {
        match self.ring.submitter().register_files_update(index, &[fd]) {
            Ok(1) => Ok(()),
            Ok(_) => Err(Errno::EBADF),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes a descriptor out of the table.
    pub(crate) fn unregister_file(&mut self, index: u32) {
        // Fails only for an index outside of the table, which `register_file` would have refused.
        let _ = self.ring.submitter().register_files_update(index, &[-1]);
    }

    /// Gives the ring buffers to choose from.
    ///
    /// # Safety
    ///
    /// `entries` is the page-aligned address of `count` entries and stays valid, with the buffers that they will
    /// name, until the group is unregistered.
    pub(crate) unsafe fn register_buffer_ring(
        &self,
        entries: u64,
        count: u16,
        group: u16,
    ) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        unsafe { self.ring.submitter().register_buf_ring_with_flags(entries, count, group, 0) }
            .map_err(Errno::from)
    }

    /// Takes a group of buffers back. False if the kernel keeps it.
    pub(crate) fn unregister_buffer_ring(&self, group: u16) -> bool {
        self.ring.submitter().unregister_buf_ring(group).is_ok()
    }

    /// Makes a table of `count` empty places for buffers, once.
    pub(crate) fn make_buffer_table(&self, count: u32) -> Result<(), Errno> {
        self.ring.submitter().register_buffers_sparse(count).map_err(Errno::from)
    }

    /// Room in the submission queue.
    pub(crate) fn room(&mut self) -> usize {
        let queue = self.ring.submission();
        queue.capacity() - queue.len()
    }

    /// Entries in the submission queue that the kernel has not taken.
    pub(crate) fn queued(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Whether the kernel has taken every entry and every completion has been seen: nothing moves any data
    /// until the next enter, if completions are delivered only there.
    pub(crate) fn is_quiet(&mut self) -> bool {
        let submission = self.ring.submission();
        let handed_over = submission.is_empty() && !submission.cq_overflow();
        drop(submission);
        handed_over && self.ring.completion().is_empty()
    }

    /// Commands that may be in flight without overflowing the completion queue.
    pub(crate) fn completions(&self) -> u32 {
        self.ring.params().cq_entries()
    }
}

impl AsRawFd for WorkerRing {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}
