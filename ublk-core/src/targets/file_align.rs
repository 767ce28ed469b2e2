//! What alignment a file's direct I/O needs: one call that the standard library lacks.
//!
//! Invariant: `statx` writes one `struct statx`, which is plain data, to a
//! place that is ours.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// Bytes that offsets and lengths of direct I/O on an open file must be multiples of (`STATX_DIOALIGN`, since
/// Linux 6.1). `None` where the file system does not say; `Some(0)` where it has no direct I/O for this file.
/// Of a block device it is the logical block size.
pub(super) fn direct_io(file: &File) -> io::Result<Option<u32>> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a C string, and `status` is writable and of the size that the kernel writes.
    let done = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            status.as_mut_ptr(),
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed plain data, over which the kernel has written.
    let status = unsafe { status.assume_init() };
    let said = status.stx_mask & libc::STATX_DIOALIGN != 0;
    // The alignment of memory is of no concern: requests' buffers are aligned to pages.
    Ok(said.then_some(status.stx_dio_offset_align))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn every_file_has_an_answer() {
        let file = File::open("/proc/self/exe").unwrap();
        if let Some(alignment) = direct_io(&file).unwrap() {
            assert!(alignment == 0 || alignment.is_power_of_two());
        }
    }
}
