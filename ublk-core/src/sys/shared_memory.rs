//! Memory that other processes see, and write, at any time.
//!
//! Invariants: there is never a reference into it, only raw copies from and to it, whose bytes mean nothing until they
//! are in memory of our own; and the file behind it cannot shrink (its seals say so, or whoever made the mapping from
//! another file does), so that no access meets a page that is not there.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use super::fork;
use crate::error::Errno;

/// The most bytes of one shared buffer (`UBLK_SHMEM_BUF_SIZE_MAX`).
pub(crate) const MOST: u64 = 1 << 32;

pub(crate) struct SharedMap {
    start: NonNull<u8>,
    len: usize,
    writable: bool,
    generation: u32,
}

// SAFETY: an address range without thread affinity, accessed by raw copies alone.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

/// A new memory file that cannot change its size; of huge pages, if asked for.
pub(crate) fn sealed_file(len: usize, huge_pages: bool) -> Result<OwnedFd, Errno> {
    let huge = if huge_pages { libc::MFD_HUGETLB } else { 0 };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
    // SAFETY: the name is a C string; the answer is a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"ublk-shared".as_ptr(), flags) };
    if fd < 0 {
        return Err(Errno::last());
    }
    // SAFETY: new, and nobody else's.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    let size = libc::off_t::try_from(len).map_err(|_| Errno::EINVAL)?;
    // SAFETY: calls on our own descriptor with integers.
    let done = unsafe {
        libc::ftruncate(fd, size) == 0
            && libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW) == 0
    };
    if done { Ok(file) } else { Err(Errno::last()) }
}

/// Whether a file is sealed against shrinking.
pub(crate) fn cannot_shrink(file: BorrowedFd<'_>) -> bool {
    // SAFETY: a call on an open descriptor with an integer.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// A file's size in bytes.
pub(crate) fn size_of_file(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    // SAFETY: plain data, for which zeroes are a value.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `status` is writable and of the right type.
    match unsafe { libc::fstat(file.as_raw_fd(), &raw mut status) } {
        0 => Ok(status.st_size.unsigned_abs()),
        _ => Err(Errno::last()),
    }
}

impl SharedMap {
    /// Maps the first `len` bytes of a file.
    ///
    /// # Safety
    ///
    /// The file has that many bytes for as long as the mapping lives.
    pub(crate) unsafe fn new(
        file: BorrowedFd<'_>,
        len: usize,
        writable: bool,
    ) -> Result<Self, Errno> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let fd = file.as_raw_fd();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        // SAFETY: our own mapping; a child that forks off must not keep the pages.
        unsafe { libc::madvise(start, len, libc::MADV_DONTFORK) };
        let start = NonNull::new(start.cast()).ok_or(Errno::ENOMEM)?;
        Ok(SharedMap { start, len, writable, generation: fork::generation() })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of a range, if it is within. A forked child has none: there the memory is not mapped.
    pub(crate) fn range(&self, at: u64, len: usize) -> Option<NonNull<u8>> {
        let at = usize::try_from(at).ok()?;
        let fits = at.checked_add(len).is_some_and(|end| end <= self.len) && self.is_ours();
        // SAFETY: inside of the mapping, just checked.
        fits.then(|| unsafe { self.start.add(at) })
    }

    fn is_ours(&self) -> bool {
        self.generation == fork::generation()
    }

    /// Copies `len` bytes from there to an address.
    ///
    /// # Safety
    ///
    /// `to` is valid for writes of `len` bytes, outside of shared memory, and nobody else accesses them meanwhile.
    pub(crate) unsafe fn copy_from(&self, at: u64, to: *mut u8, len: usize) -> Result<(), Errno> {
        let from = self.range(at, len).ok_or(Errno::EFAULT)?;
        // SAFETY: both ranges are valid, and apart from each other. What another process writes meanwhile makes the
        // copied bytes be any bytes, which is what they are taken for.
        unsafe { from.as_ptr().copy_to_nonoverlapping(to, len) };
        Ok(())
    }

    /// Copies `len` bytes from an address there.
    ///
    /// # Safety
    ///
    /// `from` is valid for reads of `len` bytes, and outside of shared memory.
    pub(crate) unsafe fn copy_to(&self, at: u64, from: *const u8, len: usize) -> Result<(), Errno> {
        if !self.writable {
            return Err(Errno::EACCES);
        }
        let to = self.range(at, len).ok_or(Errno::EFAULT)?;
        // SAFETY: both ranges are valid, and apart from each other.
        unsafe { to.as_ptr().copy_from_nonoverlapping(from, len) };
        Ok(())
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // In a forked child the range is not mapped, or is something else by now.
        if self.is_ours() {
            // SAFETY: our own mapping, unmapped once; whoever uses an address in it holds an Arc of it.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn copies_go_through_and_stay_inside() {
        let file = sealed_file(8192, false).unwrap();
        assert!(cannot_shrink(file.as_fd()));
        assert_eq!(size_of_file(file.as_fd()).unwrap(), 8192);
        // SAFETY: sealed at that size.
        let (one, two) = unsafe {
            let map = |writable| SharedMap::new(file.as_fd(), 8192, writable).unwrap();
            (map(true), map(false))
        };
        // SAFETY: a live slice.
        let put = |map: &SharedMap, at, data: &[u8]| unsafe {
            map.copy_to(at, data.as_ptr(), data.len())
        };
        put(&one, 4000, b"shared").unwrap();
        let mut seen = [0; 6];
        // SAFETY: an array of ours.
        unsafe { two.copy_from(4000, seen.as_mut_ptr(), 6).unwrap() };
        assert_eq!(&seen, b"shared");
        assert_eq!(put(&two, 0, b"read-only"), Err(Errno::EACCES));
        assert_eq!(put(&one, 8190, b"over"), Err(Errno::EFAULT));
        assert_eq!(put(&one, u64::MAX, b"over"), Err(Errno::EFAULT));
        assert!(two.range(8192, 0).is_some() && two.range(8192, 1).is_none());
    }
}
