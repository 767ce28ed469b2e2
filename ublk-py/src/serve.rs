//! The ways from a worker to a Python backend.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::intern;
use pyo3::prelude::*;
use ublk_core::{QueueContext, QueueHandler, Request as Inner};

use crate::buffer::Spares;
use crate::calls::{Calls, Sink, answer};
use crate::errors::StateError;
use crate::log;
use crate::pace::Pace;
use crate::pool::Pool;
use crate::request::Request;

/// Who answers a device's requests, and how.
#[derive(Clone)]
pub(crate) enum Way {
    /// The worker calls the backend's methods.
    Inline,
    /// A pool of threads does.
    Threads(Arc<Pool>),
    /// The worker hands over the requests.
    Raw,
    /// An asyncio loop gets them.
    Loop(Arc<Line>),
}

/// A device's Python backend.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) calls: Arc<Py<Calls>>,
    pub(crate) sink: Arc<Sink>,
    pub(crate) way: Way,
}

impl Server {
    /// The handler of one queue.
    pub(crate) fn handler(&self) -> Handler {
        Handler { server: self.clone(), spares: Spares::default(), pace: Pace::default() }
    }
}

/// One queue's.
pub(crate) struct Handler {
    server: Server,
    spares: Spares,
    pace: Pace,
}

impl QueueHandler for Handler {
    fn handle(&mut self, request: Inner, context: &mut QueueContext<'_>) {
        let Server { calls, sink, way } = &self.server;
        let calling = matches!(way, Way::Inline | Way::Raw);
        if calling {
            self.pace.begin(context.remaining(), || context.clock());
        }
        match way {
            Way::Inline => Python::attach(|py| {
                sink.serving(|| answer(py, calls.get(), sink, &mut self.spares, request));
            }),
            Way::Threads(pool) => pool.push(request),
            Way::Loop(line) => line.push(request),
            Way::Raw => Python::attach(|py| {
                let made = Request::new(py, request, Arc::clone(sink));
                match made.and_then(|request| Bound::new(py, request)) {
                    Ok(request) => {
                        let handed =
                            sink.serving(|| calls.get().hand(py, request.clone().into_any()));
                        if let Err(error) = handed {
                            request.get().handler_raised(py, &error);
                        }
                    }
                    Err(error) => {
                        let what = "a request could not be handed over: the client gets EIO";
                        log::exception(py, what.into(), &error);
                    }
                }
            }),
        }
        if calling && self.pace.must_commit(context.remaining(), || context.clock()) {
            context.commit();
        }
    }

    fn turn_ended(&mut self, _context: &mut QueueContext<'_>) {
        match &self.server.way {
            Way::Threads(pool) => pool.wake(),
            Way::Loop(line) => line.wake(),
            Way::Inline | Way::Raw => self.pace.end(),
        }
    }
}

/// Requests on their way to an asyncio loop: one call of the loop for all that came in a turn.
pub(crate) struct Line {
    waiting: Mutex<Vec<Inner>>,
    /// The loop was told, and has not come yet.
    told: AtomicBool,
    tell: Mutex<Tell>,
    complained: AtomicBool,
}

/// Who is to be told. Locked by threads only that are attached to the interpreter.
enum Tell {
    /// Nobody yet: requests wait.
    Later,
    /// `loop.call_soon_threadsafe`, and what it is to call.
    By(Py<PyAny>, Py<PyAny>),
    /// Nobody any more.
    Over,
}

impl Line {
    fn push(&self, request: Inner) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(request);
    }

    fn wake(&self) {
        if self.told.swap(true, Ordering::SeqCst) {
            return;
        }
        Python::attach(|py| {
            let tell = match &*self.tell.lock().unwrap_or_else(PoisonError::into_inner) {
                Tell::Later => return,
                Tell::By(tell, what) => Some((tell.clone_ref(py), what.clone_ref(py))),
                Tell::Over => None,
            };
            let told = match tell {
                Some((tell, what)) => tell.bind(py).call1((what,)).map(drop),
                None => Err(StateError::new_err("the device has ended")),
            };
            if let Err(error) = told {
                // The loop is closed: nobody will ever come.
                self.told.store(false, Ordering::SeqCst);
                let left = std::mem::take(
                    &mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner),
                );
                drop(left);
                if !self.complained.swap(true, Ordering::SeqCst) {
                    let what = "the event loop takes no requests any more: the clients get EIO";
                    log::exception(py, what.into(), &error);
                }
            }
        });
    }

    fn take(&self) -> Vec<Inner> {
        // First, so that what comes from here on tells anew.
        self.told.store(false, Ordering::SeqCst);
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The loop's end of the line.
#[pyclass(frozen, module = "ublk._native")]
pub(crate) struct Inbox {
    pub(crate) line: Arc<Line>,
    pub(crate) sink: Arc<Sink>,
}

impl Inbox {
    fn tell(&self) -> MutexGuard<'_, Tell> {
        self.line.tell.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Inbox {
    /// Until [`connect`](Self::connect) requests wait.
    #[new]
    fn new() -> Self {
        let line = Line {
            waiting: Mutex::default(),
            told: AtomicBool::new(false),
            tell: Mutex::new(Tell::Later),
            complained: AtomicBool::new(false),
        };
        Inbox { line: Arc::new(line), sink: Arc::default() }
    }

    /// From now on `event_loop` calls `callback` when requests have come.
    fn connect(
        &self,
        py: Python<'_>,
        event_loop: &Bound<'_, PyAny>,
        callback: Py<PyAny>,
    ) -> PyResult<()> {
        let tell = event_loop.getattr(intern!(py, "call_soon_threadsafe"))?.unbind();
        *self.tell() = Tell::By(tell, callback);
        self.line.told.store(false, Ordering::SeqCst);
        self.line.wake();
        Ok(())
    }

    /// From now on nobody is called: the loop, and what serves there, are not kept any longer.
    fn disconnect(&self) {
        let before = std::mem::replace(&mut *self.tell(), Tell::Over);
        drop(before);
    }

    /// The requests that have come.
    fn take(&self, py: Python<'_>) -> PyResult<Vec<Request>> {
        let taken = self.line.take();
        taken.into_iter().map(|inner| Request::new(py, inner, Arc::clone(&self.sink))).collect()
    }
}
