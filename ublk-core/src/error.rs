//! The one error type of the crate: what was tried, on which device, queue and tag, what the kernel
//! answered, the likely cause and what to do about it.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::num::NonZeroI32;

use crate::control::Holder;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A Linux error number, never zero.
///
/// This is what a backend answers a request with and what the client of the disk sees, as far as the
/// block layer carries it (`blk_errors[]` in the kernel's `block/blk-core.c`; every other number
/// arrives as `EIO`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(NonZeroI32);

macro_rules! errnos {
    ($($name:ident)*) => {
        impl Errno {
            $(
                #[doc = concat!("`", stringify!($name), "`")]
                pub const $name: Errno = Errno::from_const(libc::$name);
            )*

            /// The symbolic name, where this crate knows it.
            pub fn name(self) -> Option<&'static str> {
                match self {
                    $(Errno::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM ENOENT EINTR EIO ENXIO E2BIG EBADF EAGAIN ENOMEM EACCES EFAULT EBUSY EEXIST EXDEV ENODEV
    EINVAL ENFILE EMFILE ENOTTY ENOSPC ESPIPE EROFS EPIPE ERANGE EDEADLK ENOSYS ENOLINK ETIME
    EOVERFLOW ENODATA EILSEQ EOPNOTSUPP ENOBUFS ETIMEDOUT ECANCELED EREMOTEIO EBADE ETOOMANYREFS
    ESTALE
}

impl Errno {
    const fn from_const(raw: i32) -> Self {
        match NonZeroI32::new(raw) {
            Some(n) if raw > 0 && raw < 4096 => Errno(n),
            _ => panic!("an errno is between 1 and 4095"),
        }
    }

    /// From a positive errno (1 to 4095), as in `errno.h`; `None` for everything else.
    pub const fn new(raw: i32) -> Option<Self> {
        match NonZeroI32::new(raw) {
            Some(n) if raw > 0 && raw < 4096 => Some(Errno(n)),
            _ => None,
        }
    }

    /// From what a kernel call returned: `None` where it is not a negated errno.
    pub const fn from_result(res: i32) -> Option<Self> {
        match res.checked_neg() {
            Some(n) => Self::new(n),
            None => None,
        }
    }

    /// The errno of the last failed libc call on this thread; `EIO` if there is none.
    pub fn last() -> Self {
        io::Error::last_os_error().into()
    }

    /// The positive number.
    pub const fn raw(self) -> i32 {
        self.0.get()
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            // io::Error's own text ends in "(os error N)", which the name already says.
            Some(name) => {
                let text = io::Error::from_raw_os_error(self.raw()).to_string();
                let text = text.split(" (os error").next().unwrap_or_default();
                write!(f, "{name} ({text})")
            }
            None => write!(f, "errno {}", self.raw()),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Errno({})", self.raw()),
        }
    }
}

/// An I/O error's errno: the number it carries, else the one that its kind stands for, else `EIO`.
impl From<io::Error> for Errno {
    fn from(e: io::Error) -> Self {
        Errno::from(&e)
    }
}

impl From<&io::Error> for Errno {
    fn from(e: &io::Error) -> Self {
        use io::ErrorKind as K;
        if let Some(errno) = e.raw_os_error().and_then(Errno::new) {
            return errno;
        }
        if let Some(ours) = e.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            return ours.errno().unwrap_or(Errno::EIO);
        }
        match e.kind() {
            K::NotFound => Errno::ENOENT,
            K::PermissionDenied => Errno::EACCES,
            K::AlreadyExists => Errno::EEXIST,
            K::WouldBlock => Errno::EAGAIN,
            K::InvalidInput | K::InvalidData => Errno::EINVAL,
            K::TimedOut => Errno::ETIMEDOUT,
            K::StorageFull => Errno::ENOSPC,
            K::ReadOnlyFilesystem => Errno::EROFS,
            K::Unsupported => Errno::EOPNOTSUPP,
            K::OutOfMemory => Errno::ENOMEM,
            K::Interrupted => Errno::EINTR,
            K::ResourceBusy => Errno::EBUSY,
            K::BrokenPipe => Errno::EPIPE,
            _ => Errno::EIO,
        }
    }
}

impl From<Errno> for io::Error {
    fn from(e: Errno) -> Self {
        io::Error::from_raw_os_error(e.raw())
    }
}

/// What kind of failure an [`Error`] is: what a program decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The kernel has no ublk driver loaded (`modprobe ublk_drv`), or none at all.
    DriverMissing,
    /// io_uring is switched off (`kernel.io_uring_disabled`, seccomp) or not in this kernel.
    IoUringDisabled,
    /// The caller lacks a privilege or a permission on a node.
    PermissionDenied,
    /// No device has this id.
    NoSuchDevice,
    /// The device id is taken.
    IdTaken,
    /// The kernel's or the process's limit of devices, files or buffers is reached.
    TooMany,
    /// Something still uses the device.
    Busy,
    /// A parameter broke a rule that the message names.
    InvalidParameter,
    /// The kernel, or what the kernel granted, lacks a feature.
    Unsupported,
    /// The wait ended before the kernel answered.
    TimedOut,
    /// The caller cancelled the wait.
    Cancelled,
    /// The request was revoked, or its device is gone.
    Gone,
    /// The device is in another state than the call needs.
    WrongState,
    /// A worker thread ended unexpectedly; its device was taken down.
    WorkerDied,
    /// The handle belongs to another process: it was made before a `fork`.
    Forked,
    /// The call would wait for the very thread that makes it.
    WouldDeadlock,
    /// Any other failure of the kernel or of a file.
    Io,
}

/// What went wrong. Small (one pointer); the [`Display`](fmt::Display) text says all of it on one line.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    attempt: Cow<'static, str>,
    device: Option<u32>,
    queue: Option<u16>,
    tag: Option<u16>,
    errno: Option<Errno>,
    cause: Option<Cow<'static, str>>,
    remedy: Option<Cow<'static, str>>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    holders: Vec<Holder>,
}

impl Error {
    /// A failure of `attempt`, worded as what was tried ("start the device").
    pub fn new(kind: ErrorKind, attempt: impl Into<Cow<'static, str>>) -> Self {
        Error(Box::new(Inner {
            kind,
            attempt: attempt.into(),
            device: None,
            queue: None,
            tag: None,
            errno: None,
            cause: None,
            remedy: None,
            source: None,
            holders: Vec::new(),
        }))
    }

    /// The device that it happened on.
    #[must_use]
    pub fn on_device(mut self, id: u32) -> Self {
        self.0.device = Some(id);
        self
    }

    /// The queue that it happened on.
    #[must_use]
    pub fn on_queue(mut self, queue: u16) -> Self {
        self.0.queue = Some(queue);
        self
    }

    /// The tag that it happened on.
    #[must_use]
    pub fn on_tag(mut self, tag: u16) -> Self {
        self.0.tag = Some(tag);
        self
    }

    /// What the kernel answered.
    #[must_use]
    pub fn with_errno(mut self, errno: Errno) -> Self {
        self.0.errno = Some(errno);
        self
    }

    /// Why, in words ("the id is in use").
    #[must_use]
    pub fn because(mut self, cause: impl Into<Cow<'static, str>>) -> Self {
        self.0.cause = Some(cause.into());
        self
    }

    /// What to do about it, in words ("modprobe ublk_drv").
    #[must_use]
    pub fn remedy_is(mut self, remedy: impl Into<Cow<'static, str>>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// The error underneath. An errno that it carries becomes this error's, unless it has one.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let source = source.into();
        if self.0.errno.is_none() {
            self.0.errno = source
                .downcast_ref::<io::Error>()
                .and_then(|e| e.raw_os_error())
                .and_then(Errno::new);
        }
        self.0.source = Some(source);
        self
    }

    /// Who holds the device.
    #[must_use]
    pub fn with_holders(mut self, holders: Vec<Holder>) -> Self {
        self.0.holders = holders;
        self
    }

    /// Who holds the device, where [`ErrorKind::Busy`] is about that.
    pub fn holders(&self) -> &[Holder] {
        &self.0.holders
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was tried.
    pub fn attempt(&self) -> &str {
        &self.0.attempt
    }

    /// The device's id, where one was involved.
    pub fn device(&self) -> Option<u32> {
        self.0.device
    }

    /// The queue's number, where one was involved.
    pub fn queue(&self) -> Option<u16> {
        self.0.queue
    }

    /// The tag, where one was involved.
    pub fn tag(&self) -> Option<u16> {
        self.0.tag
    }

    /// What the kernel answered, where it was asked.
    pub fn errno(&self) -> Option<Errno> {
        self.0.errno
    }

    /// Why it failed, as far as that is known.
    pub fn cause(&self) -> Option<&str> {
        self.0.cause.as_deref()
    }

    /// What the caller can do about it.
    pub fn remedy(&self) -> Option<&str> {
        self.0.remedy.as_deref().or(match self.0.errno {
            Some(Errno::EMFILE) => Some("raise the limit of open files (ulimit -n)"),
            Some(Errno::ENFILE) => {
                Some("raise the system's limit of open files (sysctl fs.file-max)")
            }
            _ => None,
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &*self.0;
        write!(f, "cannot {}", e.attempt)?;
        let place = [
            e.device.map(|d| format!("device {d}")),
            e.queue.map(|q| format!("queue {q}")),
            e.tag.map(|t| format!("tag {t}")),
        ];
        let place: Vec<_> = place.into_iter().flatten().collect();
        if !place.is_empty() {
            write!(f, " ({})", place.join(", "))?;
        }
        if let Some(cause) = &e.cause {
            write!(f, ": {cause}")?;
        }
        if let Some(errno) = e.errno {
            write!(f, ": {errno}")?;
        }
        if let Some(remedy) = self.remedy() {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        if let Some(source) = &self.0.source {
            write!(f, " (source: {source:?})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|s| s as _)
    }
}

impl From<Error> for io::Error {
    fn from(e: Error) -> Self {
        let kind = match (e.kind(), e.errno()) {
            (ErrorKind::TimedOut, _) => io::ErrorKind::TimedOut,
            (ErrorKind::PermissionDenied, _) => io::ErrorKind::PermissionDenied,
            (ErrorKind::Busy, _) => io::ErrorKind::ResourceBusy,
            (ErrorKind::NoSuchDevice | ErrorKind::DriverMissing, _) => io::ErrorKind::NotFound,
            (ErrorKind::IdTaken, _) => io::ErrorKind::AlreadyExists,
            (ErrorKind::InvalidParameter, _) => io::ErrorKind::InvalidInput,
            (ErrorKind::Unsupported, _) => io::ErrorKind::Unsupported,
            (_, Some(errno)) => io::Error::from(errno).kind(),
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_says_what_where_why_and_what_to_do() {
        let e = Error::new(ErrorKind::IdTaken, "add the device")
            .on_device(7)
            .with_errno(Errno::EEXIST)
            .because("the id is in use")
            .remedy_is("delete it or let the kernel choose an id");
        assert_eq!(
            e.to_string(),
            "cannot add the device (device 7): the id is in use: EEXIST (File exists); \
             delete it or let the kernel choose an id"
        );
        assert_eq!(e.errno().map(Errno::raw), Some(libc::EEXIST));
        assert_eq!(io::Error::from(e).kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_limit_of_open_files_has_its_remedy_wherever_it_is_met() {
        let open = || Error::new(ErrorKind::TooMany, "open it");
        let e = open().with_source(io::Error::from_raw_os_error(libc::EMFILE));
        assert_eq!(
            e.to_string(),
            "cannot open it: EMFILE (Too many open files); raise the limit of open files (ulimit -n)"
        );
        assert!(open().with_errno(Errno::ENFILE).remedy().unwrap().contains("fs.file-max"));
        assert_eq!(e.remedy_is("another").remedy(), Some("another"));
        assert_eq!(open().remedy(), None);
        assert_eq!(open().remedy_is("without errno").remedy(), Some("without errno"));
    }

    #[test]
    fn errnos_are_between_1_and_4095() {
        assert_eq!(Errno::new(0), None);
        assert_eq!(Errno::new(-5), None);
        assert_eq!(Errno::new(4096), None);
        assert_eq!(Errno::from_result(-5), Some(Errno::EIO));
        assert_eq!(Errno::from_result(5), None);
        assert_eq!(Errno::from_result(i32::MIN), None);
    }

    #[test]
    fn an_io_error_keeps_its_errno() {
        assert_eq!(Errno::from(io::Error::from_raw_os_error(libc::ENOSPC)), Errno::ENOSPC);
        assert_eq!(Errno::from(io::Error::from(io::ErrorKind::TimedOut)), Errno::ETIMEDOUT);
        assert_eq!(Errno::from(io::Error::other("x")), Errno::EIO);
        let ours = Error::new(ErrorKind::Io, "x").with_errno(Errno::ENOSPC);
        assert_eq!(Errno::from(io::Error::from(ours)), Errno::ENOSPC);
    }

    #[test]
    fn an_error_is_one_pointer() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }
}
