//! How a test handler misbehaves: rules that a test arms and heals while the disk is in use.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use ublk_core::{Errno, Op};

use crate::faults;

/// What happens to a request that a rule applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// It fails.
    Error(Errno),
    /// The backend panics.
    Panic,
    /// It is dropped without an answer.
    Drop,
    /// It is leaked.
    Leak,
    /// It is kept, and answered when the test says `release`.
    Hold,
    /// The thread blocks until the test says `release`.
    Stuck,
    /// It is answered later.
    Delay(Duration),
    /// A part of it is transferred, by a blocking call.
    Short,
}

struct Rule {
    op: Option<Op>,
    from: u64,
    to: u64,
    /// It applies to each `every`th of the requests that fit.
    every: u64,
    /// How often it still applies.
    times: u64,
    seen: u64,
    action: Action,
}

#[derive(Default)]
pub(crate) struct Rules(Mutex<Vec<Rule>>);

impl Rules {
    /// `action` with `errno` or `ms`; `op`, `from`, `to`, `every` and `times` say which requests.
    pub(crate) fn arm(&self, command: &Value) -> Result<(), String> {
        let number = |key: &str, default| command[key].as_u64().unwrap_or(default);
        let action = match command["action"].as_str() {
            Some("error") => {
                let errno = Errno::new(number("errno", 0) as i32);
                Action::Error(errno.ok_or("an errno is 1 to 4095")?)
            }
            Some("panic") => Action::Panic,
            Some("drop") => Action::Drop,
            Some("leak") => Action::Leak,
            Some("hold") => Action::Hold,
            Some("stuck") => Action::Stuck,
            Some("delay") => Action::Delay(Duration::from_millis(number("ms", 1))),
            Some("short") => Action::Short,
            other => return Err(format!("no action {other:?}")),
        };
        let op = command["op"].as_str().map(faults::op).transpose()?;
        let (from, to) = (number("from", 0), number("to", u64::MAX));
        let (every, times) = (number("every", 1).max(1), number("times", u64::MAX));
        self.lock().push(Rule { op, from, to, every, times, seen: 0, action });
        Ok(())
    }

    /// No rule any more.
    pub(crate) fn heal(&self) {
        self.lock().clear();
    }

    /// What is to happen to a request.
    pub(crate) fn decide(&self, op: Op, offset: u64, len: u64) -> Option<Action> {
        let mut rules = self.lock();
        let fits = |r: &Rule| {
            r.op.is_none_or(|o| o == op)
                && r.times > 0
                // A flush has no range.
                && (len == 0 || (offset < r.to && offset + len > r.from))
        };
        for rule in rules.iter_mut() {
            if fits(rule) {
                rule.seen += 1;
                if rule.seen % rule.every == 0 {
                    rule.times -= 1;
                    return Some(rule.action);
                }
            }
        }
        None
    }

    // A planted panic comes after the lock was given back.
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Rule>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
