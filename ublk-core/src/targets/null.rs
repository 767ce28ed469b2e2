//! A disk that keeps nothing: for measuring what everything else costs.

use std::io;

use crate::backend::{Backend, Capabilities, QueueContext, QueueHandler};
use crate::device::Builder;
use crate::error::Errno;
use crate::request::{Op, Request, RequestFlags};

/// Answers every request at once. Writes are forgotten, reads give zeroes.
///
/// ```no_run
/// use ublk_core::targets::Null;
///
/// let disk = Null::new().builder(1 << 30).queues(2).start()?;
/// # Ok::<(), ublk_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Null;

impl Null {
    /// One like any other.
    pub const fn new() -> Self {
        Null
    }

    /// A disk of `size` bytes of it, on the shortest way that there is.
    pub fn builder(self, size: u64) -> Builder {
        Builder::with_handlers(size, able(), |_queue| Null)
    }
}

fn able() -> Capabilities {
    Capabilities::WRITE
        | Capabilities::FLUSH
        | Capabilities::FUA
        | Capabilities::DISCARD
        | Capabilities::WRITE_ZEROES
}

impl QueueHandler for Null {
    fn handle(&mut self, mut request: Request, _context: &mut QueueContext<'_>) {
        if request.op() == Op::Read {
            request.put_zeroes(0, request.len() as usize);
        }
        // Gone: a stop was faster.
        let _ = request.complete(Ok::<(), Errno>(()));
    }
}

/// For measuring what the way through [`Backend`] costs, with or without a pool of threads.
impl Backend for Null {
    fn capabilities(&self) -> Capabilities {
        able()
    }
    fn read(&self, buf: &mut [u8], _: u64) -> io::Result<usize> {
        // It arrives zeroed.
        Ok(buf.len())
    }
    fn write(&self, data: &[u8], _: u64, _: RequestFlags) -> io::Result<usize> {
        Ok(data.len())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: RequestFlags) -> io::Result<()> {
        Ok(())
    }
}
