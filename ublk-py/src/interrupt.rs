//! Calls that wait, made on the thread that runs Python's signal handlers: Ctrl-C is not to wait for them.

use std::io::{PipeReader, Write, pipe};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use ublk_core::control::CancelToken;

use crate::device::{Why, finish_before_exit};
use crate::pool::block_signals;

/// How long something that was given up may take to come to its end.
const PATIENCE: Duration = Duration::from_secs(10);
/// A signal interrupts the wait. One that arrives in the moment before it, or at another thread, is seen after this.
const STEP: Duration = Duration::from_millis(200);

/// Gives a call up that another thread makes.
#[pyclass(frozen, module = "ublk._native")]
#[derive(Default)]
pub(crate) struct Token(pub(crate) CancelToken);

#[pymethods]
impl Token {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn cancel(&self, py: Python<'_>) {
        py.detach(|| self.0.cancel());
    }
}

enum Slot<T> {
    Working,
    Done(T),
    /// Nobody waits for it any more.
    Abandoned,
}

/// Makes a call that waits. On the main thread signals are handled meanwhile: when a handler raises, the token is
/// cancelled, and what comes of the call is waited for, a while and until a handler raises again; then it is dropped.
pub(crate) fn interruptible<T: Send + 'static>(
    py: Python<'_>,
    token: &CancelToken,
    call: impl FnOnce() -> T + Send + 'static,
) -> PyResult<T> {
    // SAFETY: both take no arguments and cannot fail.
    let is_main = unsafe { libc::gettid() == libc::getpid() };
    if !is_main {
        return Ok(py.detach(call));
    }
    let slot = Arc::new(Mutex::new(Slot::Working));
    let (reader, mut writer) = pipe()?;
    let theirs = Arc::clone(&slot);
    let thread = std::thread::Builder::new().name("ublk-py-call".into()).spawn(move || {
        block_signals();
        let result = call();
        let mut slot = theirs.lock().unwrap_or_else(PoisonError::into_inner);
        match *slot {
            Slot::Abandoned => {
                drop(slot);
                drop(result);
            }
            _ => *slot = Slot::Done(result),
        }
        // A byte and not the end of the pipe, which a forked child may have open, too.
        let _ = writer.write_all(b".");
    })?;
    let raised = match ended(py, &reader, None) {
        Ok(_) => None,
        Err(raised) => {
            py.detach(|| token.cancel());
            // What is raised a second time is more of the same.
            let _ = ended(py, &reader, Some(Instant::now() + PATIENCE));
            Some(raised)
        }
    };
    let abandoned = Slot::Abandoned;
    let end =
        std::mem::replace(&mut *slot.lock().unwrap_or_else(PoisonError::into_inner), abandoned);
    if matches!(end, Slot::Working) && !thread.is_finished() {
        finish_before_exit(Why::Abandoned, thread);
    } else {
        // It has nothing left to do.
        let _ = py.detach(|| thread.join());
    }
    match (raised, end) {
        (Some(raised), end) => {
            py.detach(|| drop(end));
            Err(raised)
        }
        (None, Slot::Done(result)) => Ok(result),
        (None, _) => Err(PyRuntimeError::new_err("a call into the library panicked")),
    }
}

/// Waits for the call's end; false at the deadline. Raises what a signal's handler does.
fn ended(py: Python<'_>, reader: &PipeReader, deadline: Option<Instant>) -> PyResult<bool> {
    loop {
        py.check_signals()?;
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let step = left.map_or(STEP, |left| left.min(STEP));
        let mut poll = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // At most 200.
        let milliseconds = step.as_millis() as i32;
        // SAFETY: the pointer is to one pollfd that lives across the call.
        if py.detach(|| unsafe { libc::poll(&raw mut poll, 1, milliseconds) }) > 0 {
            return Ok(true);
        }
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(false);
        }
    }
}
