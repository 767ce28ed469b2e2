//! The test backend: a memory disk that counts, behind each of the library's three traits. As a handler it misbehaves
//! with the requests themselves, as its rules say; to the others the library's `Fault` does that, except for short
//! transfers.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use ublk_core::targets::Mem;
use ublk_core::{
    AsyncBackend, Backend, Capabilities, Errno, Op, QueueContext, QueueHandler, Request,
    RequestFlags, Ring,
};

use crate::counts::Counts;
use crate::rules::{Action, Rules};

#[derive(Clone)]
pub(crate) struct Faulty(Arc<Inner>);

struct Inner {
    mem: Mem,
    capabilities: Capabilities,
    rules: Rules,
    counts: Counts,
    random: AtomicU64,
    gate: Mutex<Gate>,
    opened: Condvar,
}

/// Where requests and threads wait for `release`.
#[derive(Default)]
struct Gate {
    /// How often it was opened.
    generation: u64,
    threads: usize,
    requests: Vec<Request>,
}

impl Faulty {
    pub(crate) fn new(mem: Mem, capabilities: Capabilities) -> Self {
        Faulty(Arc::new(Inner {
            mem,
            capabilities,
            rules: Rules::default(),
            counts: Counts::default(),
            random: AtomicU64::new(0x9e37_79b9_7f4a_7c15),
            gate: Mutex::default(),
            opened: Condvar::new(),
        }))
    }

    pub(crate) fn rules(&self) -> &Rules {
        &self.0.rules
    }

    pub(crate) fn report(&self) -> Value {
        let mut report = self.0.counts.report();
        let gate = self.gate();
        report["held"] = json!(gate.requests.len());
        report["waiting"] = json!(gate.threads);
        report
    }

    /// Lets all go that waits; held requests are answered from here. How many were, and how many were too late.
    pub(crate) fn release(&self) -> (usize, usize) {
        let requests = {
            let mut gate = self.gate();
            gate.generation += 1;
            std::mem::take(&mut gate.requests)
        };
        self.0.opened.notify_all();
        let answers = requests.into_iter().map(|request| self.answer(request));
        answers.fold((0, 0), |(ok, late), in_time| match in_time {
            true => (ok + 1, late),
            false => (ok, late + 1),
        })
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.0.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn block_thread(&self) {
        let mut gate = self.gate();
        let from = gate.generation;
        gate.threads += 1;
        while gate.generation == from {
            gate = self.0.opened.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.threads -= 1;
    }

    /// 1 to `len`.
    fn some_of(&self, len: usize) -> usize {
        let mut x = self.0.random.load(Ordering::Relaxed);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.random.store(x, Ordering::Relaxed);
        1 + x as usize % len
    }

    fn note(&self, op: Op, offset: u64, len: u64, flags: RequestFlags) -> Option<Action> {
        self.0.counts.note(op, offset, len, flags);
        self.0.rules.decide(op, offset, len)
    }

    /// How much of `len` is to be transferred by a call.
    fn part(&self, op: Op, offset: u64, len: usize, flags: RequestFlags) -> usize {
        match self.note(op, offset, len as u64, flags) {
            Some(Action::Short) => self.some_of(len),
            _ => len,
        }
    }

    /// Does what a request asks for.
    fn execute(&self, request: &mut Request) -> io::Result<()> {
        let (offset, len) = (request.offset(), request.len());
        match request.op() {
            Op::Read => self.0.mem.read_at(request.data_mut(), offset),
            Op::Write => self.0.mem.write_at(request.data(), offset),
            Op::Flush => Ok(()),
            _ => self.0.mem.zero(offset, len),
        }
    }

    /// False if somebody else has answered it.
    fn answer(&self, mut request: Request) -> bool {
        let result = self.execute(&mut request);
        request.complete(result).is_ok()
    }

    fn run(&self, request: &mut Request) -> io::Result<()> {
        self.note(request.op(), request.offset(), request.len(), request.flags());
        self.execute(request)
    }
}

impl Backend for Faulty {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = self.part(Op::Read, offset, buf.len(), RequestFlags::default());
        self.0.mem.read_at(&mut buf[..n], offset)?;
        Ok(n)
    }
    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> io::Result<usize> {
        let n = self.part(Op::Write, offset, data.len(), flags);
        self.0.mem.write_at(&data[..n], offset)?;
        Ok(n)
    }
    fn flush(&self) -> io::Result<()> {
        self.note(Op::Flush, 0, 0, RequestFlags::default());
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.note(Op::Discard, offset, len, RequestFlags::default());
        self.0.mem.zero(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> io::Result<()> {
        self.note(Op::WriteZeroes, offset, len, flags);
        self.0.mem.zero(offset, len)
    }
}

impl AsyncBackend for Faulty {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities
    }
    async fn read(&self, request: &mut Request, _: &Ring) -> io::Result<()> {
        self.run(request)
    }
    async fn write(&self, request: &mut Request, _: &Ring) -> io::Result<()> {
        self.run(request)
    }
    async fn flush(&self, _: &Ring) -> io::Result<()> {
        self.note(Op::Flush, 0, 0, RequestFlags::default());
        Ok(())
    }
    async fn discard(&self, request: &mut Request, _: &Ring) -> io::Result<()> {
        self.run(request)
    }
    async fn write_zeroes(&self, request: &mut Request, _: &Ring) -> io::Result<()> {
        self.run(request)
    }
}

impl QueueHandler for Faulty {
    fn handle(&mut self, request: Request, _: &mut QueueContext<'_>) {
        let (op, offset) = (request.op(), request.offset());
        match self.note(op, offset, request.len(), request.flags()) {
            None => {}
            Some(Action::Drop) => return drop(request),
            Some(Action::Leak) => return std::mem::forget(request),
            Some(Action::Hold) => return self.gate().requests.push(request),
            Some(Action::Stuck) => self.block_thread(),
            Some(Action::Delay(time)) => {
                let this = self.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(time);
                    this.answer(request)
                });
                return;
            }
            Some(Action::Panic) => panic!("planted: {op:?} at {offset}"),
            Some(Action::Error(errno)) => {
                // Gone is seen in the statistics.
                let _ = request.complete(Err(errno));
                return;
            }
            Some(Action::Short) => {
                let _ = request.complete(Err(Errno::ENOSYS));
                return;
            }
        }
        self.answer(request);
    }
}
