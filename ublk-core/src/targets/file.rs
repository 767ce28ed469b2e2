//! A disk that is a file, or another block device, by operations on the workers' rings.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::file_open::{FileOptions, SyncPolicy};
use crate::backend::{AsyncBackend, Capabilities};
use crate::device::Builder;
use crate::error::{Errno, Result};
use crate::request::{Request, RequestFlags};
use crate::worker::ring::{Ring, RingFile};

/// A regular file or a block device as a disk.
///
/// Reads and writes go between the file and the requests' buffers by the worker's own ring, many at a time on
/// one thread. Offsets on the disk are offsets in the file.
///
/// * A flush is `fdatasync(2)`, a FUA write one with `RWF_DSYNC`; see [`SyncPolicy`]. A sync that fails is reported
///   to the client that asked for it, once, as Linux does: the kernel may then have dropped what it could not
///   write.
/// * A discard punches a hole (`EOPNOTSUPP` where the file system cannot). A write of zeroes punches a hole as
///   well, or, where the client wants the space to stay allocated or there are no holes, zeroes the range in
///   place; where the file system can do neither, zeroes are written.
/// * A file that somebody shrinks meanwhile fails reads beyond its new end with `EIO`, because what was there is
///   lost; writes make it grow again.
///
/// ```no_run
/// use std::time::Duration;
/// use ublk_core::targets::File;
///
/// # fn main() -> ublk_core::Result<()> {
/// let disk = File::open("/srv/disk.img")?.builder().start()?;
/// println!("{}", disk.path().display());
/// disk.stop(Duration::from_secs(10))?;
/// # Ok(())
/// # }
/// ```
///
/// Never serve a file that lives on the very disk that it is.
#[derive(Clone)]
pub struct File {
    file: RingFile,
    size: u64,
    block: u32,
    options: FileOptions,
    abilities: Arc<Abilities>,
}

/// What the file system turned out not to be able to do, so that it is not asked each time.
#[derive(Default)]
struct Abilities {
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
}

/// What zeroes are written from where there is no better way. Aligned for direct I/O.
#[repr(align(4096))]
struct Zeroes([u8; 64 << 10]);
static ZEROES: Zeroes = Zeroes([0; 64 << 10]);

impl File {
    /// Opens `path` for reading and writing through the page cache.
    ///
    /// # Errors
    ///
    /// As [`FileOptions::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::options().open(path)
    }

    /// Other ways to open it.
    pub fn options() -> FileOptions {
        FileOptions::default()
    }

    pub(super) fn new(file: RingFile, size: u64, block: u32, options: FileOptions) -> Self {
        File { file, size, block, options, abilities: Arc::default() }
    }

    /// A device of the file: its size, and the logical block size that it was opened with.
    pub fn builder(self) -> Builder {
        let served = self.clone();
        self.describe(Builder::new_async(self.size, served))
    }

    /// The size in bytes, as it was when the file was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn node(&self) -> &RingFile {
        &self.file
    }

    /// Bytes of the disk's logical blocks.
    pub fn logical_block_size(&self) -> u32 {
        self.block
    }

    /// The size and the blocks, on a builder of whoever serves the file.
    pub(super) fn describe(&self, builder: Builder) -> Builder {
        builder.logical_block_size(self.block).physical_block_size(self.block.max(4096))
    }

    /// Moves the file's bytes from `at` on to `range` of a read's data.
    pub(super) async fn read_part(
        &self,
        ring: &Ring,
        request: &Request,
        range: Range<usize>,
        at: u64,
    ) -> io::Result<()> {
        let Range { start, end } = range;
        let mut done = start;
        while done < end {
            let from = at + (done - start) as u64;
            done += progress(ring.read_to_request(&self.file, from, request, done..end).await?)?;
        }
        Ok(())
    }

    /// Moves `range` of a write's data to the file's bytes from `at` on; durably, if the request says so.
    pub(super) async fn write_part(
        &self,
        ring: &Ring,
        request: &Request,
        range: Range<usize>,
        at: u64,
    ) -> io::Result<()> {
        let Range { start, end } = range;
        let durable = request.flags().fua();
        let mut done = start;
        while done < end {
            let to = at + (done - start) as u64;
            let written = ring.write_from_request(&self.file, to, request, done..end, durable);
            done += progress(written.await?)?;
        }
        Ok(())
    }

    /// Makes all completed writes durable.
    pub(super) async fn sync(&self, ring: &Ring) -> io::Result<()> {
        ring.fsync(&self.file, true).await
    }

    /// Makes a hole.
    pub(super) async fn punch(&self, ring: &Ring, offset: u64, len: u64) -> io::Result<()> {
        const MODE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.allocate(ring, &self.abilities.no_punch, MODE, offset, len).await
    }

    /// Makes a range read as zeroes, as durably and as allocated as the flags of the request want it.
    pub(super) async fn zero_part(
        &self,
        ring: &Ring,
        flags: RequestFlags,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        self.zero(ring, flags, offset, len).await?;
        // O_DSYNC covers writes, not fallocate: without a cache to flush, zeroes count as durable now.
        if flags.fua() || !self.syncs_on_flush() {
            self.sync(ring).await?;
        }
        Ok(())
    }

    /// `fallocate(2)`; `EOPNOTSUPP` if the file system cannot do that, and is remembered not to.
    async fn allocate(
        &self,
        ring: &Ring,
        unable: &AtomicBool,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        if !unable.load(Ordering::Relaxed) {
            match ring.fallocate(&self.file, mode, offset, len).await {
                Err(e) if lacks(&e) => unable.store(true, Ordering::Relaxed),
                done => return done,
            }
        }
        Err(Errno::EOPNOTSUPP.into())
    }

    async fn zero(
        &self,
        ring: &Ring,
        flags: RequestFlags,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        const MODE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        if !flags.no_unmap() {
            match self.punch(ring, offset, len).await {
                Err(e) if lacks(&e) => {}
                done => return done,
            }
        }
        match self.allocate(ring, &self.abilities.no_zero_range, MODE, offset, len).await {
            Err(e) if lacks(&e) => {}
            done => return done,
        }
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZEROES.0.len() as u64) as usize;
            let (written, _) = ring.write(&self.file, &ZEROES.0[..n], offset + done).await;
            done += progress(written?)? as u64;
        }
        Ok(())
    }

    fn syncs_on_flush(&self) -> bool {
        self.options.sync_policy() == SyncPolicy::OnFlush
    }
}

/// Whether a call failed because there is no such operation here.
fn lacks(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

/// A transfer of nothing is the end of the file or worse: asking again would not end.
fn progress(n: usize) -> io::Result<usize> {
    if n == 0 { Err(Errno::EIO.into()) } else { Ok(n) }
}

impl AsyncBackend for File {
    fn capabilities(&self) -> Capabilities {
        if self.options.is_read_only() {
            return Capabilities::FIXED_BUFFERS;
        }
        let able = Capabilities::WRITE
            | Capabilities::DISCARD
            | Capabilities::WRITE_ZEROES
            | Capabilities::FIXED_BUFFERS;
        if self.syncs_on_flush() { able | Capabilities::FLUSH | Capabilities::FUA } else { able }
    }

    async fn read(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.read_part(ring, request, 0..request.len() as usize, request.offset()).await
    }

    async fn write(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.write_part(ring, request, 0..request.len() as usize, request.offset()).await
    }

    async fn flush(&self, ring: &Ring) -> io::Result<()> {
        self.sync(ring).await
    }

    async fn discard(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.punch(ring, request.offset(), request.len()).await
    }

    async fn write_zeroes(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.zero_part(ring, request.flags(), request.offset(), request.len()).await
    }
}

/// The file itself, for instance to read it beside the disk.
impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File")
            .field("file", &self.file)
            .field("size", &self.size)
            .field("logical_block_size", &self.block)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
