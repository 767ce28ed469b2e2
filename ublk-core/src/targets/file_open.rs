//! How a [`File`] target is opened: checked now, so that it does not fail one request at a time later.

use std::fs;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::file::File;
use super::file_align;
use crate::error::{Error, ErrorKind, Result};
use crate::worker::ring::RingFile;

/// When what clients have written is made durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SyncPolicy {
    /// The disk has a volatile cache: data is durable after the client's flush (`fdatasync`) or FUA write
    /// (`RWF_DSYNC`), as on most real disks.
    #[default]
    OnFlush,
    /// Every write is durable before it is answered (`O_DSYNC`); the disk advertises no volatile cache, and no
    /// flushes come. For clients that do not flush.
    EveryWrite,
}

/// Options for opening a [`File`] target. The default is buffered, read-write, 512-byte logical blocks where
/// the file allows them.
///
/// ```no_run
/// use ublk_core::targets::File;
///
/// # fn main() -> ublk_core::Result<()> {
/// let file = File::options().direct(true).open("/srv/disk.img")?;
/// let disk = file.builder().queues(4).start()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct FileOptions {
    read_only: bool,
    direct: bool,
    create: Option<u64>,
    sync: SyncPolicy,
    logical_block_size: Option<u32>,
}

impl FileOptions {
    /// Opens for reading alone: the disk is read-only.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Goes past the page cache (`O_DIRECT`): no data is cached twice, and no write is answered from memory. The
    /// disk's logical block size is then at least the alignment that the file needs.
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
        self
    }

    /// Makes a sparse file of `size` bytes if there is none. One that is there keeps its size.
    pub fn create(mut self, size: u64) -> Self {
        self.create = Some(size);
        self
    }

    /// When data is made durable.
    pub fn sync(mut self, sync: SyncPolicy) -> Self {
        self.sync = sync;
        self
    }

    /// Bytes of the disk's logical blocks: a power of two, and no less than what the file needs. Default: the
    /// least that it can be. Say it here and not to the builder, which knows nothing of the file.
    pub fn logical_block_size(mut self, bytes: u32) -> Self {
        self.logical_block_size = Some(bytes);
        self
    }

    /// Opens `path`, a regular file or a block device. A block device is opened exclusively: it must not be
    /// mounted or otherwise claimed, and cannot be meanwhile.
    ///
    /// # Errors
    ///
    /// What `open(2)` says, with the path, the errno and what to do; [`ErrorKind::Unsupported`] if the file
    /// system has no direct I/O; [`ErrorKind::InvalidParameter`] if the size or the block size does not fit.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<File> {
        let mut made = Vec::new();
        self.open_noting(path.as_ref(), &mut made)
    }

    /// As [`open`](Self::open); a file that was created is added to `made`, also if it turns out not to fit.
    pub(super) fn open_noting(&self, path: &Path, made: &mut Vec<PathBuf>) -> Result<File> {
        let failed = |e: io::Error| failure(path, e);
        let (file, is_block) = self.open_node(path, made).map_err(failed)?;
        let size = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
        let needed = self.alignment(&file, is_block, path)?;
        let block = self.logical_block_size.unwrap_or(needed);
        let invalid =
            |why: String| Err(Error::new(ErrorKind::InvalidParameter, attempt(path)).because(why));
        if block < needed || !block.is_power_of_two() {
            return invalid(format!(
                "logical blocks of {block} bytes do not fit its I/O, which is in multiples of {needed} bytes"
            ));
        }
        if size == 0 || size % u64::from(block) != 0 {
            let remedy = format!("resize it: truncate -s %{block} {}", path.display());
            let error = Error::new(ErrorKind::InvalidParameter, attempt(path)).because(format!(
                "its size, {size} bytes, is not a positive multiple of the logical block size, {block}"
            ));
            return Err(error.remedy_is(remedy));
        }
        Ok(File::new(RingFile::new(file), size, block, self.clone()))
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn sync_policy(&self) -> SyncPolicy {
        self.sync
    }

    fn open_node(&self, path: &Path, made: &mut Vec<PathBuf>) -> io::Result<(fs::File, bool)> {
        let mut flags = 0;
        if self.direct {
            flags |= libc::O_DIRECT;
        }
        if self.sync == SyncPolicy::EveryWrite {
            flags |= libc::O_DSYNC;
        }
        let mut options = fs::OpenOptions::new();
        options.read(true).write(!self.read_only);
        let is_block = match fs::metadata(path) {
            Ok(there) if there.file_type().is_block_device() => true,
            Ok(there) if there.is_file() => false,
            Ok(_) => return Err(io::Error::from_raw_os_error(libc::ENOTBLK)),
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.create.is_some() => false,
            Err(e) => return Err(e),
        };
        if is_block {
            flags |= libc::O_EXCL;
        }
        options.custom_flags(flags);
        match options.open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            done => return done.map(|file| (file, is_block)),
        }
        let Some(size) = self.create else {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        };
        let new = options.write(true).create_new(true).open(path)?;
        // Durable, as the disk's size will be taken for granted.
        let sized = new.set_len(size).and_then(|()| new.sync_all());
        if let Err(e) = sized {
            // It is ours and useless; that the disk is full is what matters.
            let _ = fs::remove_file(path);
            return Err(e);
        }
        made.push(path.to_owned());
        Ok((new, false))
    }

    /// The smallest logical block that the file's I/O can do.
    fn alignment(&self, file: &fs::File, is_block: bool, path: &Path) -> Result<u32> {
        if !self.direct && !is_block {
            return Ok(512);
        }
        match file_align::direct_io(file).map_err(|e| failure(path, e))? {
            Some(0) if self.direct => {
                Err(failure(path, io::Error::from_raw_os_error(libc::EINVAL)))
            }
            Some(alignment) => Ok(alignment.max(512)),
            // File systems that do not say are content with a page, as far as they are known.
            None if self.direct => Ok(4096),
            None => Ok(512),
        }
    }
}

fn attempt(path: &Path) -> String {
    format!("serve {}", path.display())
}

/// What a failed call on the file means for who asked for it.
fn failure(path: &Path, e: io::Error) -> Error {
    let (kind, cause, remedy) = match e.raw_os_error() {
        Some(libc::ENOENT) => {
            (ErrorKind::Io, "it does not exist", "name another, or have it created with a size")
        }
        Some(libc::EACCES | libc::EPERM) => (
            ErrorKind::PermissionDenied,
            "this process may not open it",
            "run as its owner or open it read-only",
        ),
        Some(libc::EROFS) => {
            (ErrorKind::PermissionDenied, "its file system is read-only", "open it read-only")
        }
        Some(libc::EBUSY) => (
            ErrorKind::Busy,
            "the block device is mounted or claimed",
            "unmount it first (lsblk shows what is on it)",
        ),
        Some(libc::EINVAL) => (
            ErrorKind::Unsupported,
            "its file system has no direct I/O for it",
            "open it without `direct`",
        ),
        Some(libc::ENOTBLK) => (
            ErrorKind::InvalidParameter,
            "it is neither a regular file nor a block device",
            "name one that is",
        ),
        Some(libc::ENOSPC) => {
            (ErrorKind::Io, "there is no space for it", "free some or use another file system")
        }
        _ => return Error::new(ErrorKind::Io, attempt(path)).with_source(e),
    };
    Error::new(kind, attempt(path)).because(cause).remedy_is(remedy).with_source(e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Errno;

    /// A file name of this test alone, removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("ublk-file-target-{}-{name}", std::process::id());
            Scratch(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn creating_makes_a_sparse_file_once() {
        let path = Scratch::new("create");
        let file = FileOptions::default().create(1 << 30).open(&path.0).unwrap();
        assert_eq!(file.size(), 1 << 30);
        assert!(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path.0).unwrap()) < 64);
        // One that is there keeps its size.
        assert_eq!(FileOptions::default().create(512).open(&path.0).unwrap().size(), 1 << 30);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn what_cannot_be_served_says_so_and_what_to_do() {
        let path = Scratch::new("wrong");
        let options = FileOptions::default();
        let e = options.open(&path.0).unwrap_err();
        assert_eq!((e.kind(), e.errno()), (ErrorKind::Io, Some(Errno::ENOENT)));
        assert!(e.to_string().contains(path.0.to_str().unwrap()), "{e}");
        fs::write(&path.0, [0; 1000]).unwrap();
        let e = options.open(&path.0).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidParameter);
        assert!(e.to_string().contains("1000 bytes") && e.to_string().contains("truncate"), "{e}");
        for wrong in [256, 1000] {
            let e = options.clone().logical_block_size(wrong).open(&path.0).unwrap_err();
            assert!(e.to_string().contains(&wrong.to_string()), "{e}");
        }
        for (place, errno) in [("/dev/null", libc::ENOTBLK), ("/", libc::ENOTBLK)] {
            let e = options.open(place).unwrap_err();
            assert_eq!(e.errno().map(Errno::raw), Some(errno), "{e}");
        }
        let e = FileOptions::default().direct(true).read_only(true).open("/proc/version");
        assert_eq!(e.unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
