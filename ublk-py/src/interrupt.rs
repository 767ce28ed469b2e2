//! Calls that wait, made on the thread that runs Python's signal handlers: Ctrl-C is not to wait for them.

use std::io::{PipeReader, Write, pipe};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};
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

    fn cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

/// What leaves `with` for a `Device`. A method in Python would not do: signals are handled before its first instruction,
/// and what a handler raises there leaves the device as it is.
#[pyclass(frozen, subclass, module = "ublk._native")]
pub(crate) struct Leaving;

#[pymethods]
impl Leaving {
    #[new]
    #[pyo3(signature = (*_args, **_options))]
    fn new(_args: &Bound<'_, PyTuple>, _options: Option<&Bound<'_, PyDict>>) -> Self {
        Leaving
    }

    /// Calls `_leave` where no handler runs; one that raises meanwhile cancels its token.
    fn __exit__(
        slf: &Bound<'_, Self>,
        _kind: &Bound<'_, PyAny>,
        error: Py<PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let py = slf.py();
        let token = CancelToken::new();
        let theirs = Py::new(py, Token(token.clone()))?;
        let here = match RUNNING_LOOP.get(py) {
            Some(running_loop) => running_loop.call0(py)?,
            None => py.None(),
        };
        let device = slf.clone().unbind();
        interruptible(py, &token, move || {
            Python::attach(|py| device.call_method1(py, "_leave", (error, theirs, here)).map(drop))
        })?
    }
}

/// `asyncio._get_running_loop`: importing it at each use would run Python code.
static RUNNING_LOOP: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// Once, when the module is imported.
pub(crate) fn prepare(py: Python<'_>) -> PyResult<()> {
    let running_loop = py.import("asyncio")?.getattr("_get_running_loop")?.unbind();
    RUNNING_LOOP.get_or_init(py, || running_loop);
    Ok(())
}

/// Makes a call that takes moments where no signal's handler runs: it is made whole, and what a handler raises comes after
/// it, or before.
#[pyfunction]
#[pyo3(signature = (call, *args))]
pub(crate) fn shielded(py: Python<'_>, call: Py<PyAny>, args: Py<PyTuple>) -> PyResult<Py<PyAny>> {
    if !is_main() {
        return call.call1(py, args);
    }
    let (theirs, with) = (call.clone_ref(py), args.clone_ref(py));
    // As this thread is, by name and by mask of signals, both of which threads that it starts inherit.
    let spawned =
        std::thread::Builder::new().spawn(move || Python::attach(|py| theirs.call1(py, with)));
    match spawned {
        Ok(thread) => py
            .detach(|| thread.join())
            .unwrap_or_else(|_| Err(PyRuntimeError::new_err("a shielded call panicked"))),
        // Without a thread for it, here.
        Err(_) => call.call1(py, args),
    }
}

/// Makes a call that cleans up, where no signal's handler runs. It comes to its end also if one raises here, which then
/// does not wait for that.
#[pyfunction]
pub(crate) fn apart(py: Python<'_>, call: Py<PyAny>) -> PyResult<()> {
    interruptible_within(py, &CancelToken::new(), Duration::ZERO, move || {
        Python::attach(|py| call.call0(py).map(drop))
    })?
}

/// Whether Python's handlers of signals run on this thread.
fn is_main() -> bool {
    // SAFETY: both take no arguments and cannot fail.
    unsafe { libc::gettid() == libc::getpid() }
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
    interruptible_within(py, token, PATIENCE, call)
}

/// The same for a call that nothing takes back: a handler that raises has it left to its end, which the program waits for
/// when it ends itself.
pub(crate) fn left_alone<T: Send + 'static>(
    py: Python<'_>,
    call: impl FnOnce() -> T + Send + 'static,
) -> PyResult<T> {
    interruptible_within(py, &CancelToken::new(), Duration::ZERO, call)
}

fn interruptible_within<T: Send + 'static>(
    py: Python<'_>,
    token: &CancelToken,
    patience: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> PyResult<T> {
    if !is_main() {
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
            let _ = ended(py, &reader, Some(Instant::now() + patience));
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
