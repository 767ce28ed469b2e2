//! A disk in memory that takes as much of it as was written.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::mem_chunks::Chunks;
use crate::backend::{Backend, Capabilities, QueueContext, QueueHandler};
use crate::control::Integrity;
use crate::device::Builder;
use crate::error::Errno;
use crate::request::{Op, Request, RequestFlags};

/// A sparse disk in memory.
///
/// Memory is taken in chunks of 64 KiB, when something other than zeroes is first written to them; a discard
/// or a write of zeroes gives the chunks that it covers back to the system and clears the rest. Any number of
/// queues and threads may work on it at once. It has no volatile cache: the disk advertises none.
///
/// Clones share the contents, so that they can outlive a device and be served again:
///
/// ```no_run
/// use std::time::Duration;
/// use ublk_core::targets::Mem;
///
/// # fn main() -> ublk_core::Result<()> {
/// let mem = Mem::new(1 << 30);
/// let disk = mem.builder().queues(2).start()?;
/// // ... somebody writes to disk.path() ...
/// disk.stop(Duration::from_secs(10))?;
/// println!("{} bytes are in use", mem.used());
/// let again = mem.builder().read_only(true).start()?;
/// # Ok(())
/// # }
/// ```
///
/// In a forked child the contents read as zeroes.
///
/// It is a [`Backend`] as well, for those that wrap it or want a pool of [threads](Builder::threads);
/// [`builder`](Self::builder) takes the shorter way.
#[derive(Clone)]
pub struct Mem {
    chunks: Arc<Chunks>,
    metadata: Option<Metadata>,
    size: u64,
}

/// What is kept beside the data.
#[derive(Clone)]
struct Metadata {
    integrity: Integrity,
    /// Inverted: what was never written has ones in all bits, which stands for data that is not protected.
    chunks: Arc<Chunks>,
}

fn invert(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
}

impl Mem {
    /// A disk of `size` bytes of zeroes, which takes no memory yet.
    pub fn new(size: u64) -> Self {
        Mem { chunks: Arc::new(Chunks::new()), metadata: None, size }
    }

    /// As [`new`](Self::new), with metadata beside the data, all ones at first. It is served by its own
    /// [`builder`](Self::builder) only.
    pub fn with_metadata(size: u64, integrity: Integrity) -> Self {
        let metadata = Metadata { integrity, chunks: Arc::new(Chunks::new()) };
        Mem { metadata: Some(metadata), ..Self::new(size) }
    }

    /// A device of these contents, of their size.
    pub fn builder(&self) -> Builder {
        let mem = self.clone();
        let builder =
            Builder::with_handlers(self.size, self.capabilities(), move |_queue| mem.clone());
        match &self.metadata {
            Some(metadata) => builder.integrity(metadata.integrity),
            None => builder,
        }
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory that the contents take at the moment.
    ///
    /// ```
    /// use ublk_core::targets::Mem;
    ///
    /// let mem = Mem::new(1 << 40);
    /// mem.write_at(b"here", 1 << 39)?;
    /// assert_eq!(mem.used(), 64 << 10);
    /// mem.zero(0, 1 << 40)?;
    /// assert_eq!(mem.used(), 0);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn used(&self) -> u64 {
        self.chunks.used()
    }

    /// Reads the bytes at `offset` into the whole of `buf`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not within the size.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.chunks.read(offset, buf.len(), |at, piece| match piece {
            Ok(data) => buf[at..][..data.len()].copy_from_slice(data),
            Err(hole) => buf[at..][..hole].fill(0),
        });
        Ok(())
    }

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not within the size, `ENOMEM` if there is no memory.
    pub fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        Ok(self.chunks.write(data, offset)?)
    }

    /// Makes `len` bytes at `offset` read as zeroes and gives their memory back.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not within the size.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        self.chunks.zero(offset, len);
        if let Some(Metadata { integrity, chunks }) = &self.metadata {
            chunks.zero(integrity.metadata_bytes(offset), integrity.metadata_bytes(len));
        }
        Ok(())
    }

    fn place_of_metadata(&self, len: usize, offset: u64) -> io::Result<(&Chunks, u64)> {
        let metadata = self.metadata.as_ref().ok_or(Errno::EINVAL)?;
        let start = metadata.integrity.metadata_bytes(offset);
        match start.checked_add(len as u64) {
            Some(end) if end <= metadata.integrity.metadata_bytes(self.size) => {
                Ok((&metadata.chunks, start))
            }
            _ => Err(Errno::EINVAL.into()),
        }
    }

    /// Reads the metadata of the data at `offset`, as much as fits `buf`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there is no metadata, or not so much of it.
    pub fn read_metadata_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (chunks, start) = self.place_of_metadata(buf.len(), offset)?;
        chunks.read(start, buf.len(), |at, piece| match piece {
            Ok(data) => buf[at..][..data.len()].copy_from_slice(data),
            Err(hole) => buf[at..][..hole].fill(0),
        });
        invert(buf);
        Ok(())
    }

    /// Writes metadata of the data at `offset`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there is no metadata, or not so much of it; `ENOMEM` if there is no memory.
    pub fn write_metadata_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let (chunks, start) = self.place_of_metadata(data.len(), offset)?;
        let mut inverted = data.to_vec();
        invert(&mut inverted);
        Ok(chunks.write(&inverted, start)?)
    }

    /// Takes a write's metadata along. One that brings none leaves data behind that is not protected.
    fn keep_metadata(&self, request: &Request) -> io::Result<()> {
        let Some(Metadata { integrity, chunks }) = &self.metadata else { return Ok(()) };
        if request.metadata_len() == 0 {
            let at = integrity.metadata_bytes(request.offset());
            chunks.zero(at, integrity.metadata_bytes(request.len()));
            return Ok(());
        }
        let mut metadata = vec![0; request.metadata_len()];
        request.metadata(&mut metadata)?;
        self.write_metadata_at(&metadata, request.offset())
    }

    /// The driver checks ranges against the device's size, which a builder may have been told another of.
    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    fn answer(&self, request: &mut Request) -> io::Result<()> {
        let (offset, len) = (request.offset(), request.len());
        match request.op() {
            Op::Read => {
                self.check(offset, len)?;
                // Straight into the request's buffer, which is not zeroed first that way.
                self.chunks.read(offset, len as usize, |at, piece| match piece {
                    Ok(data) => request.put(at, data),
                    Err(hole) => request.put_zeroes(at, hole),
                });
                if self.metadata.is_some() && request.metadata_len() > 0 {
                    let mut metadata = vec![0; request.metadata_len()];
                    self.read_metadata_at(&mut metadata, offset)?;
                    request.put_metadata(&metadata)?;
                }
                Ok(())
            }
            Op::Write => {
                self.write_at(request.data(), offset)?;
                self.keep_metadata(request)
            }
            Op::Discard | Op::WriteZeroes => self.zero(offset, len),
            // Not advertised; and there is nothing volatile.
            Op::Flush => Ok(()),
            _ => Err(Errno::EOPNOTSUPP.into()),
        }
    }
}

impl QueueHandler for Mem {
    fn handle(&mut self, mut request: Request, _context: &mut QueueContext<'_>) {
        let result = self.answer(&mut request);
        // Gone: a stop was faster.
        let _ = request.complete(result);
    }
}

impl Backend for Mem {
    fn capabilities(&self) -> Capabilities {
        let caps = Capabilities::WRITE | Capabilities::DISCARD | Capabilities::WRITE_ZEROES;
        match self.metadata {
            Some(_) => caps | Capabilities::INTEGRITY,
            None => caps,
        }
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(buf, offset)?;
        Ok(buf.len())
    }
    fn write(&self, data: &[u8], offset: u64, _: RequestFlags) -> io::Result<usize> {
        self.write_at(data, offset)?;
        Ok(data.len())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: RequestFlags) -> io::Result<()> {
        self.zero(offset, len)
    }
}

impl fmt::Debug for Mem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mem").field("size", &self.size).field("used", &self.used()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn clones_share_and_ranges_are_checked() {
        let mem = Mem::new(1 << 20);
        mem.clone().write_at(b"shared", 1000).unwrap();
        let mut buf = [1; 8];
        mem.read_at(&mut buf, 999).unwrap();
        assert_eq!(&buf, b"\0shared\0");
        for (offset, len) in [(1 << 20, 1), (u64::MAX, 2), (0, (1 << 20) + 1)] {
            let e = mem.zero(offset, len).unwrap_err();
            assert_eq!(e.raw_os_error(), Some(libc::EINVAL));
        }
        mem.zero(0, 1 << 20).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn metadata_is_all_ones_until_it_is_written_and_after_zeroing() {
        use crate::control::Checksum;
        let mem = Mem::with_metadata(1 << 20, Integrity::protection(Checksum::T10Dif, 512));
        let read = |offset| {
            let mut buf = [0; 8];
            mem.read_metadata_at(&mut buf, offset).unwrap();
            buf
        };
        assert_eq!(read(512), [0xff; 8]);
        mem.write_metadata_at(b"protects", 512).unwrap();
        assert_eq!((read(0), &read(512), read(1024)), ([0xff; 8], b"protects", [0xff; 8]));
        mem.zero(0, 4096).unwrap();
        assert_eq!(read(512), [0xff; 8]);
        let e = mem.write_metadata_at(&[0; 9], (1 << 20) - 512).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EINVAL));
        assert!(Mem::new(512).read_metadata_at(&mut [0; 8], 0).is_err());
    }

    #[test]
    fn metadata_is_for_those_who_see_the_request() {
        use crate::control::Checksum;
        let integrity = Integrity::protection(Checksum::Ip, 512);
        let mem = Mem::with_metadata(1 << 20, integrity);
        let plain = Mem::new(1 << 20);
        for (builder, words) in [
            (Builder::new(1 << 20, mem.clone()), "Builder::integrity"),
            (Builder::new(1 << 20, mem.clone()).integrity(integrity), "which see the request"),
            (plain.builder().integrity(integrity), "the capability INTEGRITY"),
            (mem.builder().data_path(crate::DataPath::Copy), "use user-copy"),
            (
                mem.builder()
                    .logical_block_size(512)
                    .integrity(Integrity { interval: 4096, ..integrity }),
                "(512)",
            ),
        ] {
            let e = builder.start().unwrap_err();
            assert!(e.to_string().contains(words), "{e}");
        }
    }
}
