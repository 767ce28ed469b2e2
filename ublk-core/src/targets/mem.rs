//! A disk in memory that takes as much of it as was written.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::mem_chunks::Chunks;
use crate::backend::{Backend, Capabilities, QueueContext, QueueHandler};
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
    size: u64,
}

impl Mem {
    /// A disk of `size` bytes of zeroes, which takes no memory yet.
    pub fn new(size: u64) -> Self {
        Mem { chunks: Arc::new(Chunks::new()), size }
    }

    /// A device of these contents, of their size.
    pub fn builder(&self) -> Builder {
        let mem = self.clone();
        Builder::with_handlers(self.size, self.capabilities(), move |_queue| mem.clone())
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
        Ok(())
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
                Ok(())
            }
            Op::Write => self.write_at(request.data(), offset),
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
        Capabilities::WRITE | Capabilities::DISCARD | Capabilities::WRITE_ZEROES
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
}
