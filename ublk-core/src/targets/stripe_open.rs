//! How a [`Stripe`] target is opened: everything that could not be served is said now.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::file::File;
use super::file_open::{FileOptions, SyncPolicy};
use super::stripe::Stripe;
use super::stripe_layout::Layout;
use crate::error::{Error, ErrorKind, Result};

/// Options for opening a [`Stripe`] target. The default is buffered, read-write, with chunks of 512 KiB and 512-byte
/// logical blocks where the members allow them.
///
/// ```no_run
/// use ublk_core::targets::Stripe;
///
/// # fn main() -> ublk_core::Result<()> {
/// let stripe = Stripe::options().chunk(192 << 10).direct(true).create(10 << 30);
/// let disk = stripe.open(["/a/part", "/b/part", "/c/part"])?.builder().start()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct StripeOptions {
    file: FileOptions,
    chunk: u64,
    create: Option<u64>,
    logical_block_size: Option<u32>,
}

impl Default for StripeOptions {
    fn default() -> Self {
        let file = FileOptions::default();
        StripeOptions { file, chunk: 512 << 10, create: None, logical_block_size: None }
    }
}

impl StripeOptions {
    /// Bytes that go to a member before it is the next one's turn: a multiple of the logical block size, not
    /// necessarily a power of two. Default 512 KiB. It has to be the same each time the disk is served.
    pub fn chunk(mut self, bytes: u64) -> Self {
        self.chunk = bytes;
        self
    }

    /// Opens for reading alone: the disk is read-only.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.file = self.file.read_only(read_only);
        self
    }

    /// Goes past the page cache, as [`FileOptions::direct`].
    pub fn direct(mut self, direct: bool) -> Self {
        self.file = self.file.direct(direct);
        self
    }

    /// Makes members that do not exist as sparse files, large enough for a disk of `size` bytes, rounded up to whole
    /// stripes. Those that exist keep their size.
    pub fn create(mut self, size: u64) -> Self {
        self.create = Some(size);
        self
    }

    /// When data is made durable.
    pub fn sync(mut self, sync: SyncPolicy) -> Self {
        self.file = self.file.sync(sync);
        self
    }

    /// Bytes of the disk's logical blocks: a power of two, and no less than what each member needs. Default: the
    /// least that it can be.
    pub fn logical_block_size(mut self, bytes: u32) -> Self {
        self.logical_block_size = Some(bytes);
        self
    }

    /// Opens the members, regular files or block devices, each once, in their order. Block devices are opened
    /// exclusively. If it fails, files that it has made are removed.
    ///
    /// # Errors
    ///
    /// As [`FileOptions::open`], for each member; [`ErrorKind::InvalidParameter`] if there is none, one is there
    /// twice or is smaller than a chunk, or the chunk is not a multiple of the logical block size.
    pub fn open<P: AsRef<Path>>(&self, members: impl IntoIterator<Item = P>) -> Result<Stripe> {
        let paths: Vec<_> = members.into_iter().map(|p| p.as_ref().to_owned()).collect();
        let mut made = Vec::new();
        let opened = self.open_all(&paths, &mut made);
        if opened.is_err() {
            for path in made {
                // Ours and empty; what failed is what matters.
                let _ = fs::remove_file(path);
            }
        }
        opened
    }

    fn open_all(&self, paths: &[PathBuf], made: &mut Vec<PathBuf>) -> Result<Stripe> {
        let invalid = |why: String| {
            let attempt = format!("serve a stripe of {} members", paths.len());
            Err(Error::new(ErrorKind::InvalidParameter, attempt).because(why))
        };
        if paths.is_empty() {
            return invalid("it has none".to_owned());
        }
        if self.chunk == 0 {
            return invalid("chunks of 0 bytes hold nothing".to_owned());
        }
        let odd = |block: u32| {
            let chunk = self.chunk;
            invalid(format!(
                "chunks of {chunk} bytes are no multiple of the logical block size, {block}"
            ))
        };
        // Before files are made whose sizes would be as odd.
        if !self.chunk.is_multiple_of(512) {
            return odd(512);
        }
        let layout = Layout::new(self.chunk, paths.len());
        let mut options = self.file.clone();
        if let Some(size) = self.create {
            match layout.member_size(size) {
                Some(bytes) if i64::try_from(bytes).is_ok() => options = options.create(bytes),
                _ => return invalid(format!("{size} bytes are more than files can hold")),
            }
        }
        let mut files: Vec<File> = Vec::new();
        let mut identities: Vec<[u64; 3]> = Vec::new();
        for path in paths {
            let file = options.open_noting(path, made)?;
            let identity = identity(&file).map_err(|e| {
                Error::new(ErrorKind::Io, format!("look at {}", path.display())).with_source(e)
            })?;
            if let Some(there) = identities.iter().position(|other| *other == identity) {
                let (one, other) = (paths[there].display(), path.display());
                return invalid(format!("{one} and {other} are the same file"));
            }
            identities.push(identity);
            files.push(file);
        }
        let needed = files.iter().map(File::logical_block_size).max().unwrap_or(512);
        let block = self.logical_block_size.unwrap_or(needed);
        if block < needed || !block.is_power_of_two() {
            return invalid(format!(
                "logical blocks of {block} bytes do not fit the members' I/O, which is in multiples of {needed} bytes"
            ));
        }
        if !self.chunk.is_multiple_of(block.into()) {
            return odd(block);
        }
        let small = files.iter().position(|file| file.size() < self.chunk);
        if let Some(at) = small {
            return invalid(format!(
                "{} has {} bytes, less than a chunk of {}",
                paths[at].display(),
                files[at].size(),
                self.chunk
            ));
        }
        let least = files.iter().map(File::size).min().unwrap_or(0);
        let Some(size) = layout.size(least) else {
            return invalid("they are larger together than a disk can be".to_owned());
        };
        let fingerprint = fingerprint(self.chunk, &identities);
        Ok(Stripe::new(files, self.chunk, size, block, fingerprint))
    }
}

/// What tells a file or block device from every other on this machine, by whatever path.
fn identity(file: &File) -> io::Result<[u64; 3]> {
    let there = fs::File::from(file.node().as_fd().try_clone_to_owned()?).metadata()?;
    Ok(match there.file_type().is_block_device() {
        true => [1, there.rdev(), 0],
        false => [0, there.dev(), there.ino()],
    })
}

/// FNV-1a: it must be the same in the next server, whatever built that.
fn fingerprint(chunk: u64, identities: &[[u64; 3]]) -> u64 {
    let numbers = std::iter::once(&chunk).chain(identities.iter().flatten());
    let bytes = numbers.flat_map(|number| number.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of this test alone, removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let name = format!("ublk-stripe-target-{}-{name}", std::process::id());
            let folder = std::env::temp_dir().join(name);
            fs::create_dir(&folder).unwrap();
            Folder(folder)
        }

        fn paths<const N: usize>(&self, names: [&str; N]) -> [PathBuf; N] {
            names.map(|name| self.0.join(name))
        }

        fn count(&self) -> usize {
            fs::read_dir(&self.0).unwrap().count()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn members_are_made_large_enough_and_the_smallest_decides() {
        let folder = Folder::new("sizes");
        let members = folder.paths(["a", "b", "c"]);
        let options = Stripe::options().chunk(1536);
        let stripe = options.clone().create(10_000).open(&members).unwrap();
        assert_eq!((stripe.size(), stripe.members(), stripe.chunk()), (13_824, 3, 1536));
        assert_eq!(stripe.logical_block_size(), 512);
        assert_eq!(fs::metadata(&members[0]).unwrap().len(), 4608);
        // Rounded down to whole stripes of the smallest.
        fs::File::options().write(true).open(&members[1]).unwrap().set_len(4096).unwrap();
        assert_eq!(options.open(&members).unwrap().size(), 2 * 3 * 1536);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn the_fingerprint_is_of_the_members_in_their_order_and_the_chunk() {
        let folder = Folder::new("fingerprint");
        let members = folder.paths(["a", "b"]);
        let options = Stripe::options().create(4 << 20);
        let print = |options: &StripeOptions, members: [&PathBuf; 2]| {
            options.open(members).unwrap().fingerprint
        };
        let [a, b] = &members;
        let first = print(&options, [a, b]);
        assert_eq!(print(&options, [a, b]), first);
        assert_ne!(print(&options, [b, a]), first);
        assert_ne!(print(&options.clone().chunk(4096), [a, b]), first);
        assert_ne!(first, 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn what_cannot_be_served_says_so_and_leaves_no_files() {
        let folder = Folder::new("wrong");
        let [a, b] = folder.paths(["a", "b"]);
        let refused = |options: &StripeOptions, members: &[&PathBuf], word: &str| {
            let e = options.open(members).unwrap_err();
            assert!(e.to_string().contains(word), "{e}");
            assert_eq!(folder.count(), 0, "{e}");
            e.kind()
        };
        let new = Stripe::options().create(4 << 20);
        let invalid = ErrorKind::InvalidParameter;
        assert_eq!(refused(&new, &[], "none"), invalid);
        assert_eq!(refused(&new, &[&a, &b, &a], "the same file"), invalid);
        assert_eq!(refused(&new.clone().chunk(0), &[&a, &b], "0 bytes"), invalid);
        assert_eq!(refused(&new.clone().chunk(1000), &[&a, &b], "no multiple"), invalid);
        assert_eq!(refused(&new.clone().logical_block_size(256), &[&a, &b], "256"), invalid);
        assert_eq!(refused(&new.clone().create(u64::MAX), &[&a, &b], "can hold"), invalid);
        assert_eq!(refused(&Stripe::options(), &[&a, &b], "does not exist"), ErrorKind::Io);
        fs::write(&a, [0; 4096]).unwrap();
        let e = Stripe::open([&a]).unwrap_err();
        assert!(e.to_string().contains("4096 bytes, less than a chunk of 524288"), "{e}");
        // A link is the same file too, and what was there stays.
        fs::hard_link(&a, &b).unwrap();
        let e = Stripe::options().chunk(4096).open([&a, &b]).unwrap_err();
        assert!(e.to_string().contains("the same file"), "{e}");
        assert_eq!(folder.count(), 2);
    }
}
