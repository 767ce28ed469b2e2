//! Messages of the library and exceptions of backends, on their way to Python's `logging`.
//!
//! Whoever has something to say puts it in a bounded queue and goes on, attached to the interpreter or not; a Python
//! thread takes it from there. What finds the queue full is counted and not kept.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyBaseException;
use pyo3::prelude::*;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record as SpanRecord};
use tracing::{Event, Level, Metadata, Subscriber};

/// Messages that wait at most.
const ROOM: usize = 1024;

/// One message: `logging`'s level, the logger's name, the text, and the exception that it is about.
pub(crate) struct Record {
    level: u8,
    target: String,
    text: String,
    exception: Option<Py<PyBaseException>>,
}

#[derive(Default)]
struct Waiting {
    records: VecDeque<Record>,
    lost: u64,
    closed: bool,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The queue of this process. A forked child gets its own, as the lock of the parent's may be held for ever there.
static QUEUE: AtomicPtr<Queue> = AtomicPtr::new(std::ptr::null_mut());

fn queue() -> &'static Queue {
    let mut at = QUEUE.load(Ordering::Acquire);
    if at.is_null() {
        let fresh = Box::into_raw(Box::<Queue>::default());
        match QUEUE.compare_exchange(at, fresh, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => at = fresh,
            Err(theirs) => {
                // SAFETY: made by `into_raw` above, and nobody else has seen it.
                drop(unsafe { Box::from_raw(fresh) });
                at = theirs;
            }
        }
    }
    // SAFETY: what is put there comes from a box that is never freed.
    unsafe { &*at }
}

fn push(record: Record) {
    let queue = queue();
    let mut waiting = queue.lock();
    if waiting.closed || waiting.records.len() >= ROOM {
        waiting.lost += 1;
        return;
    }
    waiting.records.push_back(record);
    drop(waiting);
    queue.arrived.notify_one();
}

/// A backend's exception, with its traceback.
pub(crate) fn exception(py: Python<'_>, text: String, error: &PyErr) {
    // Not `value`: that lacks the traceback where the interpreter is older than 3.12.
    let exception = Some(error.clone_ref(py).into_value(py));
    push(Record { level: 40, target: "ublk.backend".to_owned(), text, exception });
}

/// Something that is wrong with what a backend did.
pub(crate) fn complaint(text: String) {
    push(Record { level: 40, target: "ublk.backend".to_owned(), text, exception: None });
}

/// Waits for the next message: `(level, logger, text, exception or None)`; None when the log is closed.
#[pyfunction]
pub(crate) fn next_record(
    py: Python<'_>,
) -> Option<(u8, String, String, Option<Py<PyBaseException>>)> {
    py.detach(|| {
        let queue = queue();
        let mut waiting = queue.lock();
        loop {
            if waiting.lost > 0 && waiting.records.len() < ROOM {
                let lost = std::mem::take(&mut waiting.lost);
                if !waiting.closed {
                    return Some((
                        30,
                        "ublk".to_owned(),
                        format!(
                            "{lost} messages were lost: they came faster than they were logged"
                        ),
                        None,
                    ));
                }
            }
            if let Some(record) = waiting.records.pop_front() {
                return Some((record.level, record.target, record.text, record.exception));
            }
            if waiting.closed {
                return None;
            }
            waiting = queue.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    })
}

/// Nothing is taken any more; what waits is still handed out.
#[pyfunction]
pub(crate) fn close_log() {
    let queue = queue();
    queue.lock().closed = true;
    queue.arrived.notify_all();
}

/// In a forked child.
#[pyfunction]
pub(crate) fn forked() {
    crate::device::forget_endings();
    QUEUE.store(Box::into_raw(Box::default()), Ordering::Release);
}

/// Brings the library's messages here, unless the process has a subscriber already.
pub(crate) fn install() {
    let _ = tracing::subscriber::set_global_default(Bridge);
}

struct Bridge;

impl Subscriber for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::DEBUG
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &SpanRecord<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let level = match *event.metadata().level() {
            Level::ERROR => 40,
            Level::WARN => 30,
            Level::INFO => 20,
            _ => 10,
        };
        let mut line = Line::default();
        event.record(&mut line);
        let target = event.metadata().target().replace("::", ".").replacen("ublk_core", "ublk", 1);
        push(Record { level, target, text: line.text(), exception: None });
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// An event's fields in words.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn text(self) -> String {
        if self.fields.is_empty() {
            self.message
        } else {
            format!("{} ({})", self.message, self.fields)
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            let comma = if self.fields.is_empty() { "" } else { ", " };
            let _ = write!(self.fields, "{comma}{}={value:?}", field.name());
        }
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}
