//! Mappings: the tags' data buffers and the kernel's request descriptors.
//!
//! Invariants: a mapping is unmapped once, by its owner's destructor, and whoever holds an address into
//! a [`Region`] holds an `Arc` of it. A descriptor mapping is read only and the kernel writes to it at
//! any time, so it is read with volatile loads, never through a reference.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use super::fork;
use crate::error::Errno;
use crate::uapi;

/// The size of a page.
pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf takes an integer.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// How a region's memory is provided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backing {
    /// Fault every page in at once.
    pub(crate) populate: bool,
    /// Ask for transparent huge pages, which are avoided otherwise: a 4 KiB request would keep 2 MiB.
    pub(crate) huge_pages: bool,
}

/// Anonymous memory, zeroed, mapped privately, that a forked child sees as zeroes.
pub(crate) struct Region {
    start: NonNull<u8>,
    len: usize,
    backing: Backing,
}

// SAFETY: a region is an address range; it has no thread affinity. Who may read or write which part of it
// is decided by the owners of the parts (`Buffer`).
unsafe impl Send for Region {}
// SAFETY: as above; the methods that take `&self` touch the bytes only as their own contracts allow.
unsafe impl Sync for Region {}

impl Region {
    pub(crate) fn new(len: usize, backing: Backing) -> Result<Self, Errno> {
        let len = len.max(1).next_multiple_of(page_size());
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        if backing.populate {
            flags |= libc::MAP_POPULATE;
        }
        // SAFETY: a new anonymous mapping at an address that the kernel chooses; no memory of ours is
        // touched.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let Some(start) = NonNull::new(start.cast::<u8>()) else { return Err(Errno::ENOMEM) };
        let region = Region { start, len, backing };
        region.advise(libc::MADV_WIPEONFORK);
        region.advise(if backing.huge_pages { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE });
        Ok(region)
    }

    /// Advice that keeps the contents (in this process). Failure only loses an optimisation.
    fn advise(&self, advice: libc::c_int) {
        // SAFETY: the range is our own mapping, and none of the advices used here (WIPEONFORK, HUGEPAGE,
        // NOHUGEPAGE) changes what this process reads from it.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) };
    }

    /// The address of byte `at`, which must be inside.
    pub(crate) fn at(&self, at: usize) -> NonNull<u8> {
        assert!(at < self.len, "offset {at} in a region of {} bytes", self.len);
        // SAFETY: the offset is inside of the mapping, just checked.
        unsafe { self.start.add(at) }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn backing(&self) -> Backing {
        self.backing
    }

    /// Gives the memory of a range back to the system: it reads as zeroes afterwards, if that succeeds. Memory that
    /// is locked (`mlockall`) stays as it is.
    ///
    /// # Safety
    ///
    /// Nobody may hold a reference into the range or be reading or writing it, the kernel included.
    pub(crate) unsafe fn discard(&self, at: usize, len: usize) -> Result<(), Errno> {
        let start = self.at(at);
        assert!(len <= self.len - at);
        // SAFETY: inside of our mapping; that nobody looks is the caller's promise.
        match unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(Errno::last()),
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: our own mapping, unmapped once; every holder of an address into it held an Arc. After a
        // fork it is the child's own copy.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// One queue's request descriptors, which the kernel writes and we only read.
pub(crate) struct Descriptors {
    start: NonNull<u8>,
    len: usize,
    stride: usize,
    count: u16,
    generation: u32,
}

// SAFETY: read-only memory of the kernel's, read with volatile loads from whichever thread serves the
// queue.
unsafe impl Send for Descriptors {}

impl Descriptors {
    /// Maps the descriptors of `queue` from the device's `ublkcN`.
    ///
    /// Queue q's descriptors begin at q × round_up(4096 × stride, page), whatever the depth
    /// (`ublk_max_cmd_buf_size` in the driver); the depth governs only the length.
    pub(crate) fn map(
        device: BorrowedFd<'_>,
        queue: u16,
        depth: u16,
        stride: usize,
    ) -> Result<Self, Errno> {
        assert!(stride >= size_of::<uapi::ublksrv_io_desc>() && stride.is_multiple_of(8));
        let page = page_size();
        let per_queue = (uapi::UBLK_MAX_QUEUE_DEPTH as usize * stride).next_multiple_of(page);
        let len = (usize::from(depth) * stride).next_multiple_of(page);
        let offset = usize::from(queue) * per_queue + uapi::UBLKSRV_CMD_BUF_OFFSET as usize;
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: a new mapping at an address that the kernel chooses; no memory of ours is touched.
        // POPULATE: the driver maps the pages at once anyway.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                device.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let Some(start) = NonNull::new(start.cast::<u8>()) else { return Err(Errno::ENOMEM) };
        let generation = fork::generation();
        let mapping = Descriptors { start, len, stride, count: depth, generation };
        // A child's copy of the mapping would keep the device open.
        // SAFETY: our own mapping; the advice changes nothing in this process.
        if unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_DONTFORK) } != 0 {
            return Err(Errno::last());
        }
        Ok(mapping)
    }

    /// A copy of the descriptor of `tag`; `None` if there is no such tag.
    pub(crate) fn read(&self, tag: u16) -> Option<uapi::ublksrv_io_desc> {
        if tag >= self.count {
            return None;
        }
        // SAFETY: tag < count, so the descriptor lies within the mapping, which is page aligned with a
        // stride that is a multiple of 8; volatile, because the kernel writes here; every bit pattern
        // is a valid descriptor.
        Some(unsafe {
            self.start
                .add(usize::from(tag) * self.stride)
                .cast::<uapi::ublksrv_io_desc>()
                .as_ptr()
                .read_volatile()
        })
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        if self.generation == fork::generation() {
            // SAFETY: our own mapping, unmapped once; nobody keeps an address into it. In a forked
            // child it does not exist, hence the check.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        }
    }
}
