//! Waiting for a node to appear, to change its owner or to be closed by somebody.

use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use crate::sys::fork::OwnFd;

/// The kernel announces a close before the driver has seen it (`__fput`), and there may be no
/// inotify: so no wait is longer than this.
const STEP: Duration = Duration::from_millis(20);

/// Whether this process may open a node for reading, as far as its permissions go; with the identity that opens it.
pub(crate) fn may_read(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: `path` is a NUL-terminated string that lives across the call.
    unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::R_OK, libc::AT_EACCESS) == 0 }
}

/// Events of the entries of one directory.
pub(crate) struct Watch(Option<OwnFd>);

impl Watch {
    /// Begins to watch; without inotify the watch merely waits in steps.
    pub(crate) fn on(dir: &Path) -> Self {
        Watch(Self::try_on(dir))
    }

    fn try_on(dir: &Path) -> Option<OwnFd> {
        let dir = CString::new(dir.as_os_str().as_bytes()).ok()?;
        let fd = OwnFd::open(|| {
            // SAFETY: inotify_init1 takes an integer.
            unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) }
        })
        .ok()?;
        let events =
            libc::IN_CREATE | libc::IN_ATTRIB | libc::IN_CLOSE_WRITE | libc::IN_CLOSE_NOWRITE;
        // SAFETY: `dir` is a NUL-terminated string that lives across the call.
        let watch = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), dir.as_ptr(), events) };
        (watch >= 0).then_some(fd)
    }

    /// Waits for an event, no longer than `left` and a short step.
    pub(crate) fn wait(&self, left: Option<Duration>) {
        let step = left.map_or(STEP, |left| left.min(STEP));
        let Some(fd) = &self.0 else {
            std::thread::sleep(step);
            return;
        };
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the pointer is to one pollfd that lives across the call.
        let ready = unsafe { libc::poll(&mut poll, 1, step.as_millis() as i32 + 1) };
        if ready > 0 {
            let mut events = [0u8; 4096];
            // SAFETY: the pointer is to 4096 writable bytes. The events are discarded, so their
            // alignment does not matter.
            unsafe { libc::read(fd.as_raw_fd(), events.as_mut_ptr().cast(), events.len()) };
        }
    }
}
