//! A disk that keeps nothing: for measuring what everything else costs.

use crate::backend::{Capabilities, QueueContext, QueueHandler};
use crate::device::Builder;
use crate::error::Errno;
use crate::request::{Op, Request};

/// Answers every request at once. Writes are forgotten, reads give zeroes.
///
/// ```no_run
/// use ublk_core::targets::Null;
///
/// let disk = Null.builder(1 << 30).queues(2).start()?;
/// # Ok::<(), ublk_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Null;

impl Null {
    /// A disk of `size` bytes of it.
    pub fn builder(self, size: u64) -> Builder {
        let able = Capabilities::WRITE
            | Capabilities::FLUSH
            | Capabilities::FUA
            | Capabilities::DISCARD
            | Capabilities::WRITE_ZEROES;
        Builder::with_handlers(size, able, |_queue| Null)
    }
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
