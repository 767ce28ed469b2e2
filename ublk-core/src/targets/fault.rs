//! A disk that misbehaves on purpose: another backend, and rules that come before it.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::fault_handle::{Faults, State};
use super::fault_rules::{End, Verdict};
use super::{File, Mem, Null, OnWorker, Stripe};
use crate::backend::{AsyncBackend, Backend, Capabilities, Unanswered};
use crate::device::Builder;
use crate::request::{Op, Request, RequestFlags};
use crate::worker::ring::Ring;
use crate::zones::{Zone, ZoneAction};

/// Another backend with faults: requests fail, are late, hang or get lost, or the server dies, as
/// [rules](super::Rule) say that are changed while the disk is in use. For tests of what uses the disk.
///
/// It is a [`Backend`] around a `Backend`, and an [`AsyncBackend`] around an `AsyncBackend`, with the same
/// capabilities, so that it goes with every data path that the other goes with. What no rule applies to, it passes on.
///
/// Delayed and held requests wait as follows. Around an [`AsyncBackend`] they take no thread: any number of them can
/// wait, and others pass them. [`OnWorker`] makes one of [`Mem`], [`Null`] and others that do not block. Around a
/// [`Backend`], waiting **blocks the thread that makes the call**: the queue's worker, and so the whole
/// queue, or with [`Builder::threads`] one thread of the pool.
///
/// ```no_run
/// use std::time::Duration;
/// use ublk_core::targets::{Action, Fault, Mem, OnWorker, Rule};
/// use ublk_core::{Errno, Op};
///
/// # fn main() -> ublk_core::Result<()> {
/// let fault = Fault::new(OnWorker(Mem::new(1 << 30)));
/// let faults = fault.faults();
/// let disk = fault.builder().start()?;
/// // ... the program under test is started on disk.path() ...
/// faults.seed(42);
/// faults.add(Rule::new(Action::Error(Errno::EIO)).ops([Op::Write]).probability(0.01))?;
/// let flush = faults.add(Rule::new(Action::Hold).ops([Op::Flush]).limit(1))?;
/// assert!(faults.wait_held(1, Duration::from_secs(10)), "it never flushes");
/// // ... what does it do while it waits for its flush? ...
/// faults.release();
/// faults.clear();
/// println!("{:?}", faults.injected());
/// disk.stop(Duration::from_secs(10))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Fault<B> {
    backend: B,
    state: Arc<State>,
}

impl<B> Fault<B> {
    /// `backend`, which behaves until there are rules. Clones have the same rules.
    pub fn new(backend: B) -> Self {
        Fault { backend, state: Arc::default() }
    }

    /// A handle of the rules.
    pub fn faults(&self) -> Faults {
        Faults::new(&self.state)
    }

    /// The same rules, and the same handles, before another backend: for the same disk by another way.
    pub fn beside<C>(&self, backend: C) -> Fault<C> {
        Fault { backend, state: Arc::clone(&self.state) }
    }

    /// The backend without faults.
    pub fn inner(&self) -> &B {
        &self.backend
    }

    /// What blocks the thread.
    fn before_call(&self, op: Op, offset: u64, len: u64) -> io::Result<()> {
        let Some(Verdict { delay, end, .. }) = self.state.decide(op, offset, len) else {
            return Ok(());
        };
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        match end {
            Some(End::Hold) => self.state.gate.block(),
            other => finish(other, op, offset)?,
        }
        Ok(())
    }

    /// What does not.
    async fn before(&self, op: Op, offset: u64, len: u64, ring: &Ring) -> io::Result<()> {
        let Some(Verdict { delay, end, .. }) = self.state.decide(op, offset, len) else {
            return Ok(());
        };
        if !delay.is_zero() {
            ring.sleep(delay).await;
        }
        match end {
            Some(End::Hold) => self.state.gate.wait().await,
            other => finish(other, op, offset)?,
        }
        Ok(())
    }

    async fn before_request(&self, request: &Request, ring: &Ring) -> io::Result<()> {
        self.before(request.op(), request.offset(), request.len(), ring).await
    }
}

fn finish(end: Option<End>, op: Op, offset: u64) -> io::Result<()> {
    match end {
        None | Some(End::Hold) => Ok(()),
        Some(End::Error(errno)) => Err(errno.into()),
        Some(End::Drop) => Err(Unanswered.into()),
        Some(End::Panic) => panic!("a fault by rule: {op:?} at byte {offset}"),
        Some(End::Abort) => std::process::abort(),
    }
}

impl Fault<OnWorker<Mem>> {
    /// A device of the contents, of their size.
    pub fn builder(self) -> Builder {
        Builder::new_async(self.backend.0.size(), self)
    }
}

impl Fault<OnWorker<Null>> {
    /// A disk of `size` bytes.
    pub fn builder(self, size: u64) -> Builder {
        Builder::new_async(size, self)
    }
}

impl Fault<File> {
    /// As [`File::builder`].
    pub fn builder(self) -> Builder {
        let file = self.backend.clone();
        file.describe(Builder::new_async(file.size(), self))
    }
}

impl Fault<Stripe> {
    /// As [`Stripe::builder`].
    pub fn builder(self) -> Builder {
        let stripe = self.backend.clone();
        stripe.describe(Builder::new_async(stripe.size(), self))
    }
}

fn op_of(action: ZoneAction) -> Op {
    match action {
        ZoneAction::Open => Op::ZoneOpen,
        ZoneAction::Close => Op::ZoneClose,
        ZoneAction::Finish => Op::ZoneFinish,
        ZoneAction::Reset => Op::ZoneReset,
        ZoneAction::ResetAll => Op::ZoneResetAll,
    }
}

/// Bytes of a zone are not known here: an operation on one touches its first.
fn len_of(action: ZoneAction) -> u64 {
    u64::from(action != ZoneAction::ResetAll)
}

impl<B: Backend> Backend for Fault<B> {
    fn capabilities(&self) -> Capabilities {
        self.backend.capabilities()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.before_call(Op::Read, offset, buf.len() as u64)?;
        self.backend.read(buf, offset)
    }

    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> io::Result<usize> {
        self.before_call(Op::Write, offset, data.len() as u64)?;
        self.backend.write(data, offset, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.before_call(Op::Flush, 0, 0)?;
        self.backend.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.before_call(Op::Discard, offset, len)?;
        self.backend.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> io::Result<()> {
        self.before_call(Op::WriteZeroes, offset, len)?;
        self.backend.write_zeroes(offset, len, flags)
    }

    fn report_zones(&self, offset: u64, count: u32) -> io::Result<Vec<Zone>> {
        self.before_call(Op::ReportZones, offset, 1)?;
        self.backend.report_zones(offset, count)
    }

    fn append(&self, data: &[u8], zone: u64, flags: RequestFlags) -> io::Result<u64> {
        self.before_call(Op::ZoneAppend, zone, data.len() as u64)?;
        self.backend.append(data, zone, flags)
    }

    fn zone_action(&self, action: ZoneAction, zone: u64) -> io::Result<()> {
        self.before_call(op_of(action), zone, len_of(action))?;
        self.backend.zone_action(action, zone)
    }
}

impl<B: AsyncBackend> AsyncBackend for Fault<B> {
    fn capabilities(&self) -> Capabilities {
        self.backend.capabilities()
    }

    async fn read(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.before_request(request, ring).await?;
        self.backend.read(request, ring).await
    }

    async fn write(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.before_request(request, ring).await?;
        self.backend.write(request, ring).await
    }

    async fn flush(&self, ring: &Ring) -> io::Result<()> {
        self.before(Op::Flush, 0, 0, ring).await?;
        self.backend.flush(ring).await
    }

    async fn discard(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.before_request(request, ring).await?;
        self.backend.discard(request, ring).await
    }

    async fn write_zeroes(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.before_request(request, ring).await?;
        self.backend.write_zeroes(request, ring).await
    }

    async fn report_zones(&self, offset: u64, count: u32, ring: &Ring) -> io::Result<Vec<Zone>> {
        self.before(Op::ReportZones, offset, 1, ring).await?;
        self.backend.report_zones(offset, count, ring).await
    }

    async fn append(&self, request: &mut Request, ring: &Ring) -> io::Result<u64> {
        self.before_request(request, ring).await?;
        self.backend.append(request, ring).await
    }

    async fn zone_action(&self, action: ZoneAction, zone: u64, ring: &Ring) -> io::Result<()> {
        self.before(op_of(action), zone, len_of(action), ring).await?;
        self.backend.zone_action(action, zone, ring).await
    }
}

impl<B: fmt::Debug> fmt::Debug for Fault<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fault").field("backend", &self.backend).finish_non_exhaustive()
    }
}
