//! What the library has to say, handed to a function of the program's.

use std::ffi::{c_char, c_int, c_void};
use std::fmt::Write;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Once, PoisonError, RwLock};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::boundary::{Inside, answer};
use crate::error::c_string;
use crate::words::of_c;

/// Nothing.
pub const UBLK_RS_LOG_OFF: u32 = 0;
/// What went wrong: a defect, or a backend that broke a rule.
pub const UBLK_RS_LOG_ERROR: u32 = 1;
/// What should be looked at.
pub const UBLK_RS_LOG_WARN: u32 = 2;
/// What happened, seldom.
pub const UBLK_RS_LOG_INFO: u32 = 3;
/// What happened, more of it.
pub const UBLK_RS_LOG_DEBUG: u32 = 4;
/// Everything.
pub const UBLK_RS_LOG_TRACE: u32 = 5;

/// Takes a line of the library's: its level, UBLK_RS_LOG_*, and its text without a newline, valid during the call. Any
/// thread, several at a time; must not block, and must not call what waits.
pub type ublk_rs_log_fn =
    Option<unsafe extern "C" fn(user: *mut c_void, level: u32, message: *const c_char)>;

struct Listener {
    function: unsafe extern "C" fn(user: *mut c_void, level: u32, message: *const c_char),
    user: *mut c_void,
}

// SAFETY: the pointer is only handed to the function, which may be called on any thread and on several at a time by its
// type's contract.
unsafe impl Send for Listener {}
// SAFETY: as above.
unsafe impl Sync for Listener {}

static LISTENER: RwLock<Option<Arc<Listener>>> = RwLock::new(None);
static LEVEL: AtomicU32 = AtomicU32::new(UBLK_RS_LOG_OFF);
static INSTALLED: Once = Once::new();

fn number(level: &Level) -> u32 {
    match *level {
        Level::ERROR => UBLK_RS_LOG_ERROR,
        Level::WARN => UBLK_RS_LOG_WARN,
        Level::INFO => UBLK_RS_LOG_INFO,
        Level::DEBUG => UBLK_RS_LOG_DEBUG,
        Level::TRACE => UBLK_RS_LOG_TRACE,
    }
}

/// An event as one line: the message, then the fields.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value}"),
            name => write!(self.fields, " {name}={value}"),
        };
    }
}

struct Teller {
    spans: AtomicU64,
}

impl Subscriber for Teller {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && number(metadata.level()) <= LEVEL.load(Ordering::Relaxed)
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(self.spans.fetch_add(1, Ordering::Relaxed) | 1 << 63)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let listener = LISTENER.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(listener) = listener else { return };
        let mut line = Line::default();
        event.record(&mut line);
        let text = c_string(&of_c(&format!("{}{}", line.message, line.fields)));
        let _inside = Inside::of_callback();
        // SAFETY: the function's contract; the text is a string for the call.
        unsafe {
            (listener.function)(listener.user, number(event.metadata().level()), text.as_ptr());
        }
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Has a function of the program's told what the library has to say, in the whole process. Without one it says nothing.
///
/// Never blocks. Any thread, at any time. A function that was replaced may still be running on other threads when this
/// returns: what user stands for should live as long as the program.
///
/// @param function  the function; NULL for none
/// @param user      what it is given
/// @param level     the most that it is told: UBLK_RS_LOG_ERROR to UBLK_RS_LOG_TRACE
/// @return 0; -EINVAL for a level that is none
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_set_log(
    function: ublk_rs_log_fn,
    user: *mut c_void,
    level: u32,
) -> c_int {
    if level > UBLK_RS_LOG_TRACE {
        return -libc::EINVAL;
    }
    answer(-libc::ENOTRECOVERABLE, || {
        let listener = function.map(|function| Arc::new(Listener { function, user }));
        let told = if listener.is_some() { level } else { UBLK_RS_LOG_OFF };
        *LISTENER.write().unwrap_or_else(PoisonError::into_inner) = listener;
        LEVEL.store(told, Ordering::Relaxed);
        INSTALLED.call_once(|| {
            // In a program that has a subscriber of its own this library's lines go there.
            let _ = tracing::subscriber::set_global_default(Teller { spans: AtomicU64::new(1) });
        });
        tracing::callsite::rebuild_interest_cache();
        0
    })
}
