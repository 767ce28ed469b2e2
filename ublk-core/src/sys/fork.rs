//! A forked child holds nothing of ours.
//!
//! A file descriptor that a child inherits keeps its file open, and an open `/dev/ublkcN` (or a ring that
//! has commands on it) keeps the device from being deleted or recovered. `O_CLOEXEC` helps only at
//! `exec`, so every descriptor of this crate is listed in one table, and a `pthread_atfork` handler
//! closes them in the child. The table is the crate's only global state.
//!
//! Invariants:
//! * a descriptor is opened and listed inside one *window*, and a fork waits until no window is open:
//!   no child can inherit a descriptor that is not listed;
//! * the handlers use atomics and `close` only, which are safe between `fork` and `exec` in a
//!   multi-threaded program;
//! * the child's *generation* differs from that of everything made before the fork, so that its
//!   destructors, and whatever still would use them, leave alone the numbers that the handler closed (they may belong
//!   to somebody else).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, Ordering};

use crate::error::Errno;

const CHUNK: usize = 256;
const FREE: i32 = -1;

struct Chunk {
    fds: [AtomicI32; CHUNK],
    next: AtomicPtr<Chunk>,
}

impl Chunk {
    const fn new() -> Self {
        Chunk {
            fds: [const { AtomicI32::new(FREE) }; CHUNK],
            next: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    fn next(&self) -> Option<&'static Chunk> {
        let next = self.next.load(Ordering::Acquire);
        // SAFETY: a non-null link is only ever set (below, once) to a leaked Box, so it is valid and
        // shared for the rest of the program.
        unsafe { next.as_ref() }
    }
}

static TABLE: Chunk = Chunk::new();
static GENERATION: AtomicU32 = AtomicU32::new(0);
static FORKING: AtomicBool = AtomicBool::new(false);
static WINDOWS: AtomicU32 = AtomicU32::new(0);

/// The number of forks between the first process that used this crate and this one.
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

extern "C" fn before_fork() {
    while FORKING.swap(true, Ordering::SeqCst) {
        std::thread::yield_now();
    }
    while WINDOWS.load(Ordering::SeqCst) != 0 {
        std::thread::yield_now();
    }
}

extern "C" fn after_fork_in_parent() {
    FORKING.store(false, Ordering::SeqCst);
}

extern "C" fn after_fork_in_child() {
    let mut chunk = Some(&TABLE);
    while let Some(c) = chunk {
        for slot in &c.fds {
            let fd = slot.swap(FREE, Ordering::Relaxed);
            if fd != FREE {
                // SAFETY: close touches no memory. The number is one that an `OwnFd` of the parent
                // owned at the fork; in this process nothing else refers to it, and the `OwnFd`'s
                // destructor will see another generation and leave it alone.
                unsafe { libc::close(fd) };
            }
        }
        chunk = c.next();
    }
    GENERATION.fetch_add(1, Ordering::Relaxed);
    FORKING.store(false, Ordering::SeqCst);
}

/// An interval in which a descriptor may exist without being listed; forks wait for its end.
struct Window(());

impl Window {
    fn open() -> Self {
        static HANDLERS: Once = Once::new();
        HANDLERS.call_once(|| {
            // SAFETY: the three functions have the type that pthread_atfork wants, live for the whole
            // program, and do only what is allowed in a child of a multi-threaded program.
            unsafe {
                libc::pthread_atfork(
                    Some(before_fork),
                    Some(after_fork_in_parent),
                    Some(after_fork_in_child),
                )
            };
        });
        loop {
            WINDOWS.fetch_add(1, Ordering::SeqCst);
            if !FORKING.load(Ordering::SeqCst) {
                return Window(());
            }
            WINDOWS.fetch_sub(1, Ordering::SeqCst);
            std::thread::yield_now();
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        WINDOWS.fetch_sub(1, Ordering::SeqCst);
    }
}

fn list(fd: RawFd) {
    let mut chunk = &TABLE;
    loop {
        for slot in &chunk.fds {
            if slot.load(Ordering::Relaxed) == FREE
                && slot.compare_exchange(FREE, fd, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                return;
            }
        }
        chunk = match chunk.next() {
            Some(next) => next,
            None => {
                let fresh = Box::into_raw(Box::new(Chunk::new()));
                match chunk.next.compare_exchange(
                    std::ptr::null_mut(),
                    fresh,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    // SAFETY: `fresh` was leaked on purpose just now and is never freed.
                    Ok(_) => unsafe { &*fresh },
                    Err(theirs) => {
                        // SAFETY: the link was not taken, so `fresh` is still ours alone; `theirs` is
                        // a leaked Box by another thread.
                        unsafe {
                            drop(Box::from_raw(fresh));
                            &*theirs
                        }
                    }
                }
            }
        };
    }
}

fn unlist(fd: RawFd) {
    let mut chunk = Some(&TABLE);
    while let Some(c) = chunk {
        for slot in &c.fds {
            if slot.load(Ordering::Relaxed) == fd
                && slot.compare_exchange(fd, FREE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                return;
            }
        }
        chunk = c.next();
    }
}

/// A value that holds a descriptor (a ring, say), listed so that a forked child closes it. In the child
/// the value is never dropped: what it would free is not there.
pub(crate) struct Listed<T: AsRawFd> {
    value: std::mem::ManuallyDrop<T>,
    generation: u32,
}

impl<T: AsRawFd> Listed<T> {
    /// Makes the value and lists its descriptor in one window.
    pub(crate) fn make<E>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        let _window = Window::open();
        let value = make()?;
        list(value.as_raw_fd());
        Ok(Listed { value: std::mem::ManuallyDrop::new(value), generation: generation() })
    }

    /// Whether this process is the one that made it.
    pub(crate) fn is_ours(&self) -> bool {
        self.generation == generation()
    }
}

impl<T: AsRawFd> std::ops::Deref for Listed<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: AsRawFd> std::ops::DerefMut for Listed<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: AsRawFd> Drop for Listed<T> {
    fn drop(&mut self) {
        if !self.is_ours() {
            return;
        }
        // A window, so that no fork sees the number listed after it was closed and taken again.
        let _window = Window::open();
        unlist(self.value.as_raw_fd());
        // SAFETY: dropped once, here, and not used after.
        unsafe { std::mem::ManuallyDrop::drop(&mut self.value) };
    }
}

/// An owned file descriptor that a forked child does not keep.
pub(crate) struct OwnFd(Listed<std::os::fd::OwnedFd>);

impl OwnFd {
    /// From a system call that returns a new descriptor or a negative number and sets errno.
    pub(crate) fn open(call: impl FnOnce() -> RawFd) -> Result<Self, Errno> {
        use std::os::fd::{FromRawFd, OwnedFd};
        Listed::make(|| {
            let fd = call();
            if fd < 0 {
                return Err(Errno::last());
            }
            // SAFETY: the call just returned it as a new descriptor, which nobody else owns.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        })
        .map(OwnFd)
    }

    /// Opens a file. The options should ask for `O_CLOEXEC`; std's do.
    pub(crate) fn open_file(
        options: &std::fs::OpenOptions,
        path: &std::path::Path,
    ) -> io::Result<Self> {
        Listed::make(|| options.open(path).map(std::os::fd::OwnedFd::from)).map(OwnFd)
    }
}

impl AsRawFd for OwnFd {
    /// The descriptor; -1 in a forked child, where the number may be somebody else's by now.
    fn as_raw_fd(&self) -> RawFd {
        if self.0.is_ours() { self.0.as_raw_fd() } else { -1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_open(fd: RawFd) -> bool {
        // SAFETY: F_GETFD takes no pointer.
        unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no fork")]
    fn a_forked_child_has_none_of_our_descriptors_and_the_parent_keeps_them() {
        // More than one chunk, so that the walk over the chunks is exercised.
        let fds: Vec<_> = (0..CHUNK + 10)
            // SAFETY: eventfd takes two integers.
            .map(|_| OwnFd::open(|| unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) }).unwrap())
            .collect();
        let raw: Vec<_> = fds.iter().map(|f| f.as_raw_fd()).collect();
        let ours = generation();
        // SAFETY: the child makes only calls that are safe after fork (fcntl, atomics, _exit).
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let open = raw.iter().filter(|fd| is_open(**fd)).count();
            let named = fds.iter().filter(|fd| fd.as_raw_fd() != -1).count();
            let code = i32::from(open != 0 || named != 0 || generation() == ours);
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: `status` is writable for the call.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert_eq!(status, 0);
        assert!(raw.iter().all(|fd| is_open(*fd)));
        assert_eq!(generation(), ours);
    }
}
