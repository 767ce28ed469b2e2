//! The only place that builds submission queue entries and reads completions: rings around the `io-uring`
//! crate, and a typed constructor for every ublk command.

pub(crate) mod batch;
pub(crate) mod buffer_ring;
pub(crate) mod control_ring;
pub(crate) mod sqe;
pub(crate) mod worker_ring;

use crate::error::{Errno, Error, ErrorKind};

/// What a failed `io_uring_setup` means.
pub(crate) fn setup_error(errno: Errno) -> Error {
    let error = |kind| Error::new(kind, "set up an io_uring").with_errno(errno);
    match errno {
        Errno::ENOSYS => error(ErrorKind::IoUringDisabled)
            .because("the kernel has no io_uring, or a seccomp filter hides it")
            .remedy_is("run outside of the container or allow io_uring_setup in its seccomp profile"),
        Errno::EPERM | Errno::EACCES => error(ErrorKind::IoUringDisabled)
            .because("io_uring is switched off for this process")
            .remedy_is(
                "sysctl kernel.io_uring_disabled=0 (or join kernel.io_uring_group), or allow io_uring_setup \
                 in the seccomp profile",
            ),
        Errno::ENOMEM => error(ErrorKind::TooMany)
            .because("no memory for the ring, or the limit of locked memory is reached")
            .remedy_is("raise the limit of locked memory (ulimit -l)"),
        Errno::EMFILE | Errno::ENFILE => error(ErrorKind::TooMany),
        _ => error(ErrorKind::Io),
    }
}
