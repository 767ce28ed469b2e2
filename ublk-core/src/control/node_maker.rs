//! A device's node for an open, in a directory that only this user can enter.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A node that is removed, with its directory, when this is dropped.
pub(crate) struct PrivateNode {
    dir: PathBuf,
    node: PathBuf,
}

impl PrivateNode {
    /// Of a character device.
    pub(crate) fn new(number: libc::dev_t) -> io::Result<Self> {
        Self::make(libc::S_IFCHR, number)
    }

    pub(crate) fn of_block_device(number: libc::dev_t) -> io::Result<Self> {
        Self::make(libc::S_IFBLK, number)
    }

    /// Makes the node. File systems for temporary files are often mounted `nodev`, so that a node
    /// there does not open; `/dev` and `/run` are tried as well.
    fn make(kind: libc::mode_t, number: libc::dev_t) -> io::Result<Self> {
        let mut last = io::Error::from_raw_os_error(libc::ENOENT);
        for parent in [Path::new("/dev"), Path::new("/run"), &std::env::temp_dir()] {
            match Self::make_in(parent, kind, number) {
                Ok(node) => return Ok(node),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    fn make_in(parent: &Path, kind: libc::mode_t, number: libc::dev_t) -> io::Result<Self> {
        let template = parent.join(".ublk-XXXXXX");
        let mut template = CString::new(template.as_os_str().as_bytes())?.into_bytes_with_nul();
        // SAFETY: `template` is a NUL-terminated string of ours that ends in six X, which mkdtemp
        // overwrites in place.
        if unsafe { libc::mkdtemp(template.as_mut_ptr().cast()) }.is_null() {
            return Err(io::Error::last_os_error());
        }
        template.pop();
        let dir = PathBuf::from(std::ffi::OsStr::from_bytes(&template));
        // From here on the destructor cleans up.
        let this = PrivateNode { node: dir.join("node"), dir };
        let path = CString::new(this.node.as_os_str().as_bytes())?;
        // SAFETY: `path` is a NUL-terminated string that lives across the call.
        if unsafe { libc::mknod(path.as_ptr(), kind | 0o600, number) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if is_nodev(&path)? {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        Ok(this)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.node
    }
}

/// Whether devices do not open in the file system of `path`.
fn is_nodev(path: &CString) -> io::Result<bool> {
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is NUL-terminated and `stat` is writable; it is read only after success filled
    // it in.
    let flags = unsafe {
        if libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        stat.assume_init().f_flag
    };
    Ok(flags & libc::ST_NODEV != 0)
}

impl Drop for PrivateNode {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.node);
        let _ = std::fs::remove_dir(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no mknod")]
    fn a_node_opens_and_leaves_nothing_behind() {
        // /dev/zero is 1:5 everywhere. Without CAP_MKNOD there is nothing to test but the error.
        match PrivateNode::new(libc::makedev(1, 5)) {
            Ok(node) => {
                let (path, dir) = (node.node.clone(), node.dir.clone());
                std::fs::File::open(node.path()).unwrap();
                drop(node);
                assert!(!path.exists() && !dir.exists());
            }
            Err(e) => {
                assert!(matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::EROFS)))
            }
        }
    }
}
