//! The way to requests' data where the driver does not bring it: by `pread` and `pwrite` on `/dev/ublkcN`, or by
//! operations of the worker's ring on pages that are registered with it.
//!
//! Invariant: a portal's addresses are used during a call and not kept. That the call is made for a request that
//! still is the tag's, the slot sees to ([`Slot::pull`](super::slot::Slot::pull)).

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use super::path::DataPath;
use super::slot::Place;
use crate::control::Integrity;
use crate::error::Errno;
use crate::sys::fork::OwnFd;
use crate::uapi;
use crate::uring::sqe::Target;

/// Where the data of a request begins in `/dev/ublkcN`.
pub(crate) fn position(place: Place) -> u64 {
    uapi::UBLKSRV_IO_BUF_OFFSET
        + (u64::from(place.queue) << uapi::UBLK_QID_OFF)
        + (u64::from(place.tag) << uapi::UBLK_TAG_OFF)
}

/// The way to requests' data through the device's file.
///
/// It does not keep the file open: a request that somebody holds for ever must not keep the device from ending.
pub(crate) struct Portal {
    file: Weak<OwnFd>,
    path: DataPath,
    /// What is kept beside the data, if anything.
    integrity: Option<Integrity>,
}

/// Added to the byte of a request: its integrity metadata is meant.
pub(crate) const METADATA: u64 = uapi::UBLKSRV_IO_INTEGRITY_FLAG;

impl Portal {
    pub(crate) fn new(
        file: &Arc<OwnFd>,
        path: DataPath,
        integrity: Option<Integrity>,
    ) -> Arc<Self> {
        Arc::new(Portal { file: Arc::downgrade(file), path, integrity })
    }

    pub(crate) fn integrity(&self) -> Option<Integrity> {
        self.integrity
    }

    pub(crate) fn path(&self) -> DataPath {
        self.path
    }

    /// The device's file, for a command on a ring of somebody else's; `None` once the device has ended.
    pub(crate) fn target(&self) -> Option<Target> {
        let file = self.file.upgrade()?;
        Some(Target::Fd(io_uring::types::Fd(file.as_raw_fd())))
    }

    /// Copies `len` bytes of a write's data, from byte `at`, to an address.
    ///
    /// # Safety
    ///
    /// `to` is valid for writes of `len` bytes, and nobody else reads or writes them meanwhile.
    pub(crate) unsafe fn pull(
        &self,
        place: Place,
        at: u64,
        to: *mut u8,
        len: usize,
    ) -> Result<(), Errno> {
        // SAFETY: the rest of the caller's range.
        self.move_all(place, at, len, |fd, done, position| unsafe {
            libc::pread64(fd, to.add(done).cast(), len - done, position)
        })
    }

    /// Copies `len` bytes at an address to a read, from its byte `at` on.
    ///
    /// # Safety
    ///
    /// `from` is valid for reads of `len` bytes.
    pub(crate) unsafe fn push(
        &self,
        place: Place,
        at: u64,
        from: *const u8,
        len: usize,
    ) -> Result<(), Errno> {
        // SAFETY: the rest of the caller's range.
        self.move_all(place, at, len, |fd, done, position| unsafe {
            libc::pwrite64(fd, from.add(done).cast(), len - done, position)
        })
    }

    fn move_all(
        &self,
        place: Place,
        at: u64,
        len: usize,
        mut step: impl FnMut(libc::c_int, usize, i64) -> isize,
    ) -> Result<(), Errno> {
        let file = self.file.upgrade().ok_or(Errno::ENODEV)?;
        let start = position(place) + at;
        let mut done = 0;
        while done < len {
            match step(file.as_raw_fd(), done, (start + done as u64).cast_signed()) {
                n @ 1.. => done += n.unsigned_abs(),
                0 => return Err(Errno::EIO),
                _ => match Errno::last() {
                    Errno::EINTR => {}
                    errno => return Err(errno),
                },
            }
        }
        Ok(())
    }
}

/// How a slot's request gets to its data where the driver does not bring it.
pub(crate) struct Reach {
    portal: Arc<Portal>,
    /// The pages' place in the ring's table of buffers, where the path registers them.
    index: u16,
    pages: AtomicU8,
}

const ABSENT: u8 = 0;
const REGISTERED: u8 = 1;
/// The ring would not take them: not to be tried again for this request.
const REFUSED: u8 = 2;

impl Reach {
    pub(crate) fn new(portal: Arc<Portal>, index: u16) -> Self {
        Reach { portal, index, pages: AtomicU8::new(ABSENT) }
    }

    pub(crate) fn portal(&self) -> &Portal {
        &self.portal
    }

    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    // The worker's thread alone changes and reads the rest: the atomic only makes the slot shareable.

    /// The request's pages are in the table.
    pub(crate) fn set_registered(&self) {
        self.pages.store(REGISTERED, Ordering::Relaxed);
    }

    /// The request's pages could not be put into the table.
    pub(crate) fn set_refused(&self) {
        self.pages.store(REFUSED, Ordering::Relaxed);
    }

    pub(crate) fn is_registered(&self) -> bool {
        self.pages.load(Ordering::Relaxed) == REGISTERED
    }

    /// Whether it makes sense to register the pages now.
    pub(crate) fn may_register(&self) -> bool {
        self.portal.path == DataPath::ZeroCopy && self.pages.load(Ordering::Relaxed) == ABSENT
    }

    /// The request ends. Whether its pages have to be taken out of the table first.
    pub(crate) fn forget(&self) -> bool {
        self.pages.swap(ABSENT, Ordering::Relaxed) == REGISTERED
            && self.portal.path == DataPath::ZeroCopy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_the_kernels() {
        let place = Place { device: 9, queue: 3, tag: 5, key: 0 };
        assert_eq!(position(place), 0x8000_0000 + (3 << 41) + (5 << 25));
    }
}
