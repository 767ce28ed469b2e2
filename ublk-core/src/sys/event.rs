//! An eventfd: what wakes a thread that waits in its ring.

use std::os::fd::{AsRawFd, RawFd};

use super::fork::OwnFd;
use crate::error::{Errno, Error, ErrorKind, Result};

/// A kernel event counter. Writing wakes whoever reads.
pub(crate) struct Event(OwnFd);

impl Event {
    pub(crate) fn new() -> Result<Self> {
        let fd = OwnFd::open(|| {
            // SAFETY: eventfd takes two integers and touches no memory of ours.
            unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) }
        });
        fd.map(Event).map_err(|errno| {
            Error::new(ErrorKind::TooMany, "make an eventfd to wake a thread by").with_errno(errno)
        })
    }

    /// Adds one to the counter. Cannot fail in a way that matters: a full counter (2^64 - 2) has its
    /// reader woken already.
    pub(crate) fn signal(&self) {
        let one = 1u64;
        loop {
            // SAFETY: the pointer is to 8 readable bytes that live across the call.
            let n = unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
            if n == 8 || Errno::last() != Errno::EINTR {
                return;
            }
        }
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
