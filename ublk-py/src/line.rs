//! The way from workers to an asyncio loop.
//!
//! Workers put requests down and ring; the loop watches the bell, as it watches sockets, and fetches all that is there.
//! No worker needs the interpreter for that: it would wait for the loop's thread, which has it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};
use ublk_core::Request as Inner;

use crate::calls::Sink;
use crate::log;
use crate::request::Request;

/// An eventfd: readable from when it is rung until it is heard.
struct Bell(File);

impl Bell {
    fn new() -> std::io::Result<Self> {
        // SAFETY: takes two integers and touches no memory of ours.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, and nobody else has its number.
        Ok(Bell(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    fn ring(&self) {
        // Fails if it was rung 2^64 times and not heard: somebody will hear it.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    fn hear(&self) {
        // Fails if nobody rang.
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

/// Requests on their way to an asyncio loop.
pub(crate) struct Line {
    /// `None` from when nobody comes for them any more.
    waiting: Mutex<Option<Vec<Inner>>>,
    bell: Bell,
    /// It was rung, and the loop has not come yet.
    told: AtomicBool,
    complained: AtomicBool,
}

impl Line {
    fn new() -> std::io::Result<Self> {
        Ok(Line {
            waiting: Mutex::new(Some(Vec::new())),
            bell: Bell::new()?,
            told: AtomicBool::new(false),
            complained: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Inner>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a request down; [`wake`](Self::wake) has to follow.
    pub(crate) fn push(&self, request: Inner) {
        if let Some(waiting) = &mut *self.lock() {
            waiting.push(request);
            return;
        }
        drop(request);
        if !self.complained.swap(true, Ordering::Relaxed) {
            log::complaint(
                "the event loop takes no requests any more, it was closed: the clients get EIO"
                    .into(),
            );
        }
    }

    /// Requests have been put down.
    pub(crate) fn wake(&self) {
        if !self.told.swap(true, Ordering::SeqCst) {
            self.bell.ring();
        }
    }

    fn take(&self) -> Vec<Inner> {
        self.bell.hear();
        // Before the requests, so that what comes from here on rings anew.
        self.told.store(false, Ordering::SeqCst);
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Nobody comes any more: what waits is dropped, which answers it with EIO. False if that was so before.
    fn close(&self) -> bool {
        let left = self.lock().take();
        left.is_some()
    }
}

/// The loop's end of the line.
#[pyclass(frozen, module = "ublk._native")]
pub(crate) struct Inbox {
    pub(crate) line: Arc<Line>,
    pub(crate) sink: Arc<Sink>,
}

#[pymethods]
impl Inbox {
    /// Until its [`reader`](Self::reader) is called requests wait.
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Inbox { line: Arc::new(Line::new()?), sink: Arc::default() })
    }

    /// Readable when requests have come.
    fn fileno(&self) -> RawFd {
        self.line.bell.0.as_raw_fd()
    }

    /// What the loop is to call then: calls `serve` with the requests that have come. The loop has the only reference: when
    /// it is closed nobody will come any more, and the requests fail.
    fn reader(&self, serve: Py<PyAny>) -> Reader {
        Reader { line: Arc::clone(&self.line), sink: Arc::clone(&self.sink), serve }
    }

    /// From now on nobody comes. False if that was so before.
    fn close(&self) -> bool {
        self.line.close()
    }
}

/// What a loop calls when requests have come.
#[pyclass(frozen, module = "ublk._native")]
pub(crate) struct Reader {
    line: Arc<Line>,
    sink: Arc<Sink>,
    serve: Py<PyAny>,
}

#[pymethods]
impl Reader {
    fn __call__(&self, py: Python<'_>) -> PyResult<()> {
        let taken = self.line.take();
        if taken.is_empty() {
            return Ok(());
        }
        let requests =
            taken.into_iter().map(|inner| Request::new(py, inner, Arc::clone(&self.sink)));
        let requests: Vec<Request> = requests.collect::<PyResult<_>>()?;
        self.serve.call1(py, (requests,)).map(drop)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.serve)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.line.close();
    }
}
