//! Threads that keep out of the program's way: signals blocked, pinned where asked, and marked as what
//! memory reclaim may depend on.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Errno, Error, ErrorKind, Result};

/// Starts a named thread (at most 15 bytes are visible to the kernel) with every signal blocked.
///
/// The signals are blocked before the thread exists, so that none can be delivered to it in between.
pub(crate) fn spawn<T: Send + 'static>(
    name: String,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let _blocked = SignalsBlocked::new();
    Builder::new().name(name).spawn(body).map_err(|e| {
        Error::new(ErrorKind::TooMany, "start a thread")
            .with_source(e)
            .remedy_is("raise the limit of threads (ulimit -u, cgroup pids.max)")
    })
}

/// Starts a thread with a table of files of its own, which is empty: no child that is forked meanwhile has part in what
/// the body opens. The body brings no descriptor along, and says nothing: it has no standard error either.
pub(crate) fn spawn_apart(name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let apart = || {
        let (first, last) = (0, libc::c_uint::MAX);
        // SAFETY: integers. The process's table stays as it is: the thread leaves it and takes nothing along, and none
        // of its code has used a descriptor so far.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_UNSHARE) == 0 }
    };
    spawn(name, move || {
        if apart() {
            body();
        }
    })
    .map(drop)
}

struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    fn new() -> Self {
        let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both pointers are to writable sets; sigfillset initialises the first before it is
        // read, and pthread_sigmask initialises the second: it can only fail for a bad first argument.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            SignalsBlocked(before.assume_init())
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set is the initialised one that pthread_sigmask gave us.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// Declares the calling thread part of the I/O path, so that its allocations never wait for writeback
/// to a disk that it serves (`PR_SET_IO_FLUSHER`, needs `CAP_SYS_RESOURCE`).
pub(crate) fn set_io_flusher() -> Result<(), Errno> {
    // SAFETY: prctl with integers.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

/// Declares the calling thread part of the I/O path of a disk: its memory allocations then never wait for
/// writeback to that disk (`PR_SET_IO_FLUSHER`, since Linux 5.6). Workers and the threads of
/// [`Builder::threads`](crate::Builder::threads) do this themselves; it is for a backend's own threads.
///
/// # Errors
///
/// [`ErrorKind::PermissionDenied`] without `CAP_SYS_RESOURCE`.
pub fn declare_io_flusher() -> Result<()> {
    set_io_flusher().map_err(|errno| {
        let kind = match errno {
            Errno::EPERM => ErrorKind::PermissionDenied,
            Errno::EINVAL => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Error::new(kind, "declare the thread an I/O flusher")
            .with_errno(errno)
            .remedy_is("run with CAP_SYS_RESOURCE")
    })
}

/// From `linux/prctl.h`, since Linux 5.6; not in the libc crate for glibc.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells when a thread has ended, its last business with io_uring included.
pub(crate) struct ExitWatch(OwnedFd);

/// From `linux/pidfd.h`, since Linux 6.9: of a thread, not of its process.
const PIDFD_THREAD: libc::c_uint = libc::O_EXCL as libc::c_uint;

impl ExitWatch {
    /// On the calling thread. `None` where the kernel has no such thing.
    pub(crate) fn on_this_thread() -> Option<Self> {
        // SAFETY: calls with integers; the answer is a new descriptor (close-on-exec by itself) or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::gettid(), PIDFD_THREAD) };
        let fd = libc::c_int::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: new, and nobody else's.
        Some(ExitWatch(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Waits for the thread's end, a bounded time. False if it has not come.
    pub(crate) fn wait(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            let mut poll =
                libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd, which is ours.
            let n = unsafe { libc::poll(&raw mut poll, 1, left.try_into().unwrap_or(i32::MAX)) };
            match n {
                1.. => return true,
                0 => return false,
                _ if Errno::last() != Errno::EINTR => return false,
                _ => {}
            }
        }
    }
}

/// The largest CPU number that is handled, plus one; the kernel's own limit is `NR_CPUS` = 8192.
const MAX_CPUS: usize = 8192;

/// The CPUs that the calling thread may run on.
pub(crate) fn allowed_cpus() -> Vec<u32> {
    let mut mask = [0u64; MAX_CPUS / 64];
    // SAFETY: the pointer is to `size_of_val(&mask)` writable bytes.
    let ok = unsafe {
        libc::sched_getaffinity(0, size_of_val(&mask), mask.as_mut_ptr().cast::<libc::cpu_set_t>())
    } == 0;
    if !ok {
        return Vec::new();
    }
    let bits = mask.iter().enumerate().flat_map(|(word, bits)| {
        (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * 64 + bit)
    });
    bits.filter_map(|cpu| u32::try_from(cpu).ok()).collect()
}

/// Pins the calling thread to the given CPUs.
pub(crate) fn pin(cpus: &[u32]) -> Result<(), Errno> {
    let mut mask = [0u64; MAX_CPUS / 64];
    for &cpu in cpus {
        if let Some(word) = mask.get_mut(cpu as usize / 64) {
            *word |= 1 << (cpu % 64);
        }
    }
    // SAFETY: the pointer is to `size_of_val(&mask)` readable bytes.
    match unsafe {
        libc::sched_setaffinity(0, size_of_val(&mask), mask.as_ptr().cast::<libc::cpu_set_t>())
    } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no close_range")]
    fn a_thread_apart_has_no_files_of_the_process_and_gives_it_none() {
        let ours = std::fs::File::open("/dev/null").unwrap();
        let number = ours.as_raw_fd();
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        spawn_apart("apart".into(), move || {
            let theirs = std::fs::File::open("/dev/zero").unwrap();
            // SAFETY: F_GETFD takes no pointer.
            let is_there = unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 };
            tell.send((theirs.as_raw_fd(), is_there)).unwrap();
            let _ = ended.recv();
        })
        .unwrap();
        assert_eq!(told.recv().unwrap(), (0, false), "the first of an empty table");
        let zero = std::path::Path::new("/proc/self/fd/0");
        assert_ne!(std::fs::read_link(zero).ok(), Some("/dev/zero".into()));
        drop(end);
        ours.metadata().unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no signal masks")]
    fn a_thread_starts_with_every_signal_blocked_and_the_caller_keeps_its_mask() {
        let mask = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = status.lines().find(|l| l.starts_with("SigBlk:")).unwrap();
            u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
        };
        let before = mask();
        let there = spawn("ublk-test".into(), mask).unwrap().join().unwrap();
        // SIGKILL (9) and SIGSTOP (19) cannot be blocked; 32 and 33 belong to the C library.
        for signal in [1, 2, 3, 10, 12, 13, 14, 15, 17] {
            assert_ne!(there >> (signal - 1) & 1, 0, "signal {signal} is not blocked");
        }
        assert_eq!(mask(), before);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no CPU masks")]
    fn a_thread_can_be_pinned_to_a_cpu_that_it_may_use() {
        spawn("ublk-test".into(), || {
            let cpus = allowed_cpus();
            assert!(!cpus.is_empty());
            pin(&cpus[..1]).unwrap();
            assert_eq!(allowed_cpus(), cpus[..1]);
        })
        .unwrap()
        .join()
        .unwrap();
    }
}
