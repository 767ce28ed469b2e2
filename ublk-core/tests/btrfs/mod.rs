//! A btrfs on a zoned disk: it writes its files' data by appends, and remembers where the disk says that they went.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

/// Mounted as long as it lives.
pub(crate) struct Mount(PathBuf);

fn text(path: &Path) -> CString {
    CString::new(path.to_str().unwrap()).unwrap()
}

/// Whether the kernel knows it.
pub(crate) fn is_known() -> bool {
    let _ = Command::new("modprobe").arg("btrfs").output();
    fs::read_to_string("/proc/filesystems").unwrap().contains("btrfs")
}

pub(crate) fn make(disk: &Path) {
    let options = ["-q", "-K", "-O", "zoned", "-d", "single", "-m", "single"];
    let made = Command::new("mkfs.btrfs").args(options).arg(disk).output().unwrap();
    assert!(made.status.success(), "{made:?}");
}

impl Mount {
    pub(crate) fn new(disk: &Path) -> Self {
        let at = PathBuf::from(format!("/tmp/btrfs-{}", std::process::id()));
        fs::create_dir_all(&at).unwrap();
        let kind = c"btrfs".as_ptr();
        // SAFETY: strings that end.
        let done = unsafe {
            libc::mount(text(disk).as_ptr(), text(&at).as_ptr(), kind, 0, std::ptr::null())
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        Mount(at)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // SAFETY: a string that ends.
        let done = unsafe { libc::umount(text(&self.0).as_ptr()) };
        if !std::thread::panicking() {
            assert_eq!(done, 0, "{}", io::Error::last_os_error());
        }
    }
}
