//! The handle by which rules are changed while the disk is in use, and what it shares with the backend.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::fault_gate::Gate;
use super::fault_rules::{End, Rule, RuleId, Rules, Verdict};
use crate::error::Result;
use crate::request::Op;

/// What a [`Fault`](super::Fault) and its handles share.
#[derive(Default)]
pub(super) struct State {
    /// Whether there are rules: requests of a disk that behaves take no lock.
    armed: AtomicBool,
    rules: Mutex<Rules>,
    pub(super) gate: Gate,
    errors: AtomicU64,
    delays: AtomicU64,
    delayed_ns: AtomicU64,
    drops: AtomicU64,
    holds: AtomicU64,
    panics: AtomicU64,
}

impl State {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        // Planted panics come after the lock was given back.
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be done with a request, if anything; counted as done.
    pub(super) fn decide(&self, op: Op, offset: u64, len: u64) -> Option<Verdict> {
        if !self.armed.load(Ordering::Acquire) {
            return None;
        }
        let verdict = self.rules().decide(op, offset, len);
        let one = |count: &AtomicU64| count.fetch_add(1, Ordering::Relaxed);
        self.delays.fetch_add(verdict.delays, Ordering::Relaxed);
        let nanos = u64::try_from(verdict.delay.as_nanos()).unwrap_or(u64::MAX);
        self.delayed_ns.fetch_add(nanos, Ordering::Relaxed);
        match verdict.end {
            None if verdict.delays == 0 => return None,
            None | Some(End::Abort) => 0,
            Some(End::Error(_)) => one(&self.errors),
            Some(End::Drop) => one(&self.drops),
            Some(End::Hold) => one(&self.holds),
            Some(End::Panic) => one(&self.panics),
        };
        Some(verdict)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Rules) -> T) -> T {
        let mut rules = self.rules();
        let done = change(&mut rules);
        self.armed.store(!rules.armed.is_empty(), Ordering::Release);
        done
    }
}

/// The handle of a [`Fault`](super::Fault): changes its rules while the disk is in use, from any thread, and says what
/// has been done.
///
/// A change holds for requests that arrive after it. Rules are looked at in the order in which they were added: delays
/// add up, and the first rule of another kind that applies decides.
///
/// When the last handle is gone, the rules go on, but requests are not held any more, because nobody could release
/// them.
pub struct Faults(Arc<State>);

/// What has been done to requests since the start, by rules that are there and by those that were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Injected {
    /// Requests that failed with a rule's errno.
    pub errors: u64,
    /// Delays; a request that two rules delay counts twice.
    pub delays: u64,
    /// How long all delays were together.
    pub delayed: Duration,
    /// Requests dropped without an answer.
    pub drops: u64,
    /// Requests held, released or not.
    pub holds: u64,
    /// Panics.
    pub panics: u64,
}

/// A rule and what it has done.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RuleStatus {
    /// Its name.
    pub id: RuleId,
    /// As it was added.
    pub rule: Rule,
    /// Requests that matched.
    pub seen: u64,
    /// Those of them that it was applied to.
    pub applied: u64,
}

impl Faults {
    pub(super) fn new(state: &Arc<State>) -> Self {
        state.gate.keep();
        Faults(Arc::clone(state))
    }

    /// Adds a rule behind those that are there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`](crate::ErrorKind::InvalidParameter) for a probability outside 0 to 1, an
    /// `every` of 0, a range or a delay whose end is before its start, a delay of more than a day.
    pub fn add(&self, rule: Rule) -> Result<RuleId> {
        rule.check()?;
        Ok(self.0.change(|rules| rules.add(rule)))
    }

    /// Puts these rules in the place of all others, at once.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add); nothing is changed then.
    pub fn set(&self, rules: impl IntoIterator<Item = Rule>) -> Result<Vec<RuleId>> {
        let new: Vec<_> = rules.into_iter().collect();
        new.iter().try_for_each(Rule::check)?;
        Ok(self.0.change(|rules| {
            rules.clear();
            new.into_iter().map(|rule| rules.add(rule)).collect()
        }))
    }

    /// Takes a rule away; false if there is none of that name.
    pub fn remove(&self, id: RuleId) -> bool {
        self.0.change(|rules| rules.remove(id))
    }

    /// Takes all rules away: the disk behaves. What is held stays held.
    pub fn clear(&self) {
        self.0.change(Rules::clear);
    }

    /// Starts the sequence of random numbers again from `seed`, for the rules that are there and those that follow.
    /// Without it, it is 0. The same rules then decide the same about the same requests in the same order; which
    /// order that is when several are in progress is the client's and the kernel's business.
    pub fn seed(&self, seed: u64) {
        self.0.change(|rules| rules.reseed(seed));
    }

    /// The rules in force and what they have done.
    pub fn rules(&self) -> Vec<RuleStatus> {
        let rules = self.0.rules();
        let status = rules.armed.iter().map(|armed| RuleStatus {
            id: armed.id,
            rule: armed.rule.clone(),
            seen: armed.seen,
            applied: armed.applied,
        });
        status.collect()
    }

    /// Lets all requests go on that are held; returns how many those were.
    pub fn release(&self) -> usize {
        self.0.gate.release()
    }

    /// How many requests are held now.
    pub fn held(&self) -> usize {
        self.0.gate.count()
    }

    /// Waits until at least `count` requests are held; false if they are not within `timeout`.
    pub fn wait_held(&self, count: usize, timeout: Duration) -> bool {
        self.0.gate.wait_until(count, timeout)
    }

    /// What has been done so far.
    pub fn injected(&self) -> Injected {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let state = &*self.0;
        Injected {
            errors: count(&state.errors),
            delays: count(&state.delays),
            delayed: Duration::from_nanos(count(&state.delayed_ns)),
            drops: count(&state.drops),
            holds: count(&state.holds),
            panics: count(&state.panics),
        }
    }
}

impl Clone for Faults {
    fn clone(&self) -> Self {
        Faults::new(&self.0)
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.0.gate.leave();
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("rules", &self.rules())
            .field("held", &self.held())
            .field("injected", &self.injected())
            .finish()
    }
}
