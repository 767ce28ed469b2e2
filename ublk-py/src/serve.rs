//! The ways from a worker to a Python backend.

use std::sync::Arc;

use pyo3::prelude::*;
use ublk_core::{QueueContext, QueueHandler, Request as Inner};

use crate::buffer::Spares;
use crate::calls::{Calls, Sink, answer};
use crate::line::Line;
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
