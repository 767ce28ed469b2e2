//! Threads that call a Python backend, so that a slow call does not stall its queue.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use ublk_core::{Request, declare_io_flusher};

use crate::buffer::Spares;
use crate::calls::{Calls, Sink, answer};

#[derive(Default)]
struct State {
    waiting: VecDeque<Request>,
    idle: usize,
    running: usize,
    closed: bool,
}

/// The threads of one device.
#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    changed: Condvar,
    ended: Condvar,
}

impl Pool {
    /// Starts `count` threads.
    pub(crate) fn launch(
        self: &Arc<Self>,
        count: usize,
        calls: &Arc<Py<Calls>>,
        sink: &Arc<Sink>,
    ) -> std::io::Result<()> {
        for index in 0..count {
            let (pool, calls, sink) = (Arc::clone(self), Arc::clone(calls), Arc::clone(sink));
            self.lock().running += 1;
            let spawned = std::thread::Builder::new()
                .name(format!("ublk-py-{index}"))
                .spawn(move || pool.work(&calls, &sink));
            if let Err(error) = spawned {
                self.lock().running -= 1;
                self.close();
                return Err(error);
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, request: Request) {
        let mut state = self.lock();
        if !state.closed {
            state.waiting.push_back(request);
        }
    }

    /// As many threads as there are requests for.
    pub(crate) fn wake(&self) {
        let wanted = {
            let state = self.lock();
            state.idle.min(state.waiting.len())
        };
        // Not under the lock, which is what they would wait for next.
        for _ in 0..wanted {
            self.changed.notify_one();
        }
    }

    /// The threads end; requests that wait are dropped.
    pub(crate) fn close(&self) {
        let left = {
            let mut state = self.lock();
            state.closed = true;
            std::mem::take(&mut state.waiting)
        };
        self.changed.notify_all();
        drop(left);
    }

    /// Waits for the threads to end. The number of those that do not.
    pub(crate) fn wait(&self, within: Duration) -> usize {
        let end = Instant::now() + within;
        let mut state = self.lock();
        while state.running > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.running
    }

    fn next(&self) -> Option<Request> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(request) = state.waiting.pop_front() {
                return Some(request);
            }
            state.idle += 1;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    fn work(&self, calls: &Arc<Py<Calls>>, sink: &Sink) {
        block_signals();
        // Where that is not permitted, the device's own warnings say so.
        let _ = declare_io_flusher();
        Python::attach(|py| {
            let mut spares = Spares::default();
            while let Some(request) = py.detach(|| self.next()) {
                sink.serving(|| answer(py, calls.get(), sink, &mut spares, request));
            }
        });
        self.lock().running -= 1;
        self.ended.notify_all();
    }
}

/// Signals are for the program's own threads.
pub(crate) fn block_signals() {
    // SAFETY: the set is initialised by sigfillset before it is used; only the calling thread's mask changes.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
    }
}
