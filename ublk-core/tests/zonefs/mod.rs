//! A zonefs: a file for each zone, whose appends are the disk's.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::disk::{Aligned, Client};

/// The super block: `struct zonefs_super`, all defaults.
fn super_block() -> [u8; 4096] {
    let mut block = [0; 4096];
    block[..4].copy_from_slice(&0x5a4f_4653u32.to_le_bytes());
    let mut crc = !0u32;
    for byte in block {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
    }
    block[4..8].copy_from_slice(&crc.to_le_bytes());
    block
}

/// Mounted as long as it lives.
pub(crate) struct Mount(PathBuf);

impl Mount {
    /// Makes and mounts one. `None` if the kernel does not know zonefs.
    pub(crate) fn new(disk: &Path) -> Option<Self> {
        let _ = Command::new("modprobe").arg("zonefs").status();
        if !fs::read_to_string("/proc/filesystems").unwrap().contains("zonefs") {
            return None;
        }
        Client::open(disk).write(0, &super_block()).unwrap();
        let at = PathBuf::from(format!("/tmp/zonefs-{}", std::process::id()));
        fs::create_dir_all(&at).unwrap();
        let mount = Mount(at);
        let text = |path: &Path| CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: strings that end.
        let done = unsafe {
            libc::mount(
                text(disk).as_ptr(),
                text(&mount.0).as_ptr(),
                c"zonefs".as_ptr(),
                0,
                std::ptr::null(),
            )
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        Some(mount)
    }

    /// The file of a sequential zone.
    pub(crate) fn zone(&self, index: usize) -> ZoneFile {
        let path = self.0.join(format!("seq/{index}"));
        let mut options = OpenOptions::new();
        options.read(true).append(true).custom_flags(libc::O_DIRECT);
        ZoneFile(options.open(path).unwrap())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let at = CString::new(self.0.to_str().unwrap()).unwrap();
        // SAFETY: a string that ends.
        let done = unsafe { libc::umount(at.as_ptr()) };
        if !std::thread::panicking() {
            assert_eq!(done, 0, "{}", io::Error::last_os_error());
        }
    }
}

pub(crate) struct ZoneFile(File);

impl ZoneFile {
    pub(crate) fn append(&self, data: &[u8]) -> io::Result<()> {
        let mut buf = Aligned::new(data.len());
        buf.copy_from_slice(data);
        (&self.0).write_all(&buf)
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut buf = Aligned::new(self.0.metadata().unwrap().len() as usize);
        self.0.read_exact_at(&mut buf, 0).unwrap();
        buf.to_vec()
    }
}
