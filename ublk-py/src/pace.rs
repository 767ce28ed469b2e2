//! How long answers wait to be given to the kernel together.
//!
//! One system call for all answers of a turn is what makes small requests cheap, and what makes a client wait for
//! another's handler. An answer must not wait for more than 200 µs, whatever the handlers after it do. Since nothing
//! tells what they will do, each answer is committed at once until some hundred calls were quick; then, and for as long
//! as they are, answers are committed together. What is left: the first slow call after those keeps the answers before it,
//! seven at the most, until it returns. Only its own worker can commit them, and that is in the call.

use std::time::{Duration, Instant};

/// How long an answer waits at most, while calls are as they were.
const MOST: Duration = Duration::from_micros(200);
/// Trusted calls between two looks at the clock.
const STRIDE: u32 = 8;
/// A call that takes no longer is quick: a stride of them is within the limit.
const QUICK: Duration = Duration::from_micros(25);
/// One that takes longer than this is slow. Between the two are hitches, as happen to any thread on a busy machine.
const SLOW: Duration = Duration::from_micros(100);
/// So many quick calls, and no slow one, are trusted.
const TRUSTED: u32 = 256;
/// A call that takes this long has waited for something, and may do so again.
const WAITED: Duration = Duration::from_millis(1);
/// So many quick calls are trusted after that.
const TRUSTED_AGAIN: u32 = 4096;

/// The pace of one queue.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Quick calls until they are trusted.
    wanted: u32,
    /// The last look at the clock; `None` between turns and after a commit.
    looked: Option<Instant>,
    /// When the first answer that waits was given, or before.
    waiting: Option<Instant>,
    /// Calls since the last look.
    calls: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { wanted: TRUSTED, looked: None, waiting: None, calls: 0 }
    }
}

impl Pace {
    /// Before a call that `remaining` others of this turn follow.
    pub(crate) fn begin(&mut self, remaining: usize) {
        self.begin_at(remaining, Instant::now);
    }

    fn begin_at(&mut self, remaining: usize, now: impl FnOnce() -> Instant) {
        // A request that comes alone waits for nobody, and needs no clock.
        if remaining > 0 && self.looked.is_none() {
            self.looked = Some(now());
        }
    }

    /// After it: whether the answers that wait are to be committed. The end of a turn commits by itself.
    pub(crate) fn must_commit(&mut self, remaining: usize) -> bool {
        self.must_commit_at(remaining, Instant::now)
    }

    fn must_commit_at(&mut self, remaining: usize, now: impl FnOnce() -> Instant) -> bool {
        let Some(looked) = self.looked else { return false };
        self.calls += 1;
        if self.wanted == 0 && remaining > 0 && self.calls < STRIDE {
            return false;
        }
        let now = now();
        let took = now.duration_since(looked);
        let calls = std::mem::take(&mut self.calls);
        self.judge(took, calls);
        let since = *self.waiting.get_or_insert(looked);
        // The next stride may take as long as this one.
        let must = self.wanted > 0 || now.duration_since(since) + took > MOST;
        if must {
            // The commit takes its time, too, which is nobody's call.
            (self.looked, self.waiting) = (None, None);
        } else {
            self.looked = Some(now);
        }
        must && remaining > 0
    }

    fn judge(&mut self, took: Duration, calls: u32) {
        if took > WAITED {
            self.wanted = TRUSTED_AGAIN;
        } else if took > MOST.min(SLOW * calls) {
            self.wanted = self.wanted.max(TRUSTED);
        } else if took <= QUICK * calls {
            self.wanted = self.wanted.saturating_sub(calls);
        }
    }

    /// The turn is over: everything is committed.
    pub(crate) fn end(&mut self) {
        (self.looked, self.waiting, self.calls) = (None, None, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls of a turn that take so many microseconds each, and after which of them was committed.
    fn turn(pace: &mut Pace, now: &mut Instant, calls: &[u64]) -> Vec<usize> {
        let mut commits = Vec::new();
        for (at, micros) in calls.iter().enumerate() {
            let remaining = calls.len() - 1 - at;
            pace.begin_at(remaining, || *now);
            *now += Duration::from_micros(*micros);
            if pace.must_commit_at(remaining, || *now) {
                commits.push(at);
            }
        }
        pace.end();
        commits
    }

    fn trusted() -> (Pace, Instant) {
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        for _ in 0..TRUSTED {
            turn(&mut pace, &mut now, &[5, 5]);
        }
        assert!(turn(&mut pace, &mut now, &[5; 6]).is_empty());
        (pace, now)
    }

    #[test]
    fn nothing_waits_until_calls_are_trusted() {
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        assert_eq!(turn(&mut pace, &mut now, &[5, 5, 5]), [0, 1]);
        let (mut pace, mut now) = trusted();
        // Hitches leave that as it is.
        assert!(turn(&mut pace, &mut now, &[5, 90, 5, 5]).is_empty());
        // A wait is the end of it, for long.
        turn(&mut pace, &mut now, &[5, 5000, 5]);
        for _ in 0..TRUSTED {
            assert_eq!(turn(&mut pace, &mut now, &[5, 5]), [0]);
        }
    }

    #[test]
    fn calls_that_are_neither_quick_nor_slow_are_never_trusted() {
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        for _ in 0..1000 {
            assert_eq!(turn(&mut pace, &mut now, &[60, 60]), [0]);
        }
    }

    #[test]
    fn no_answer_of_a_trusted_call_waits_for_longer_than_the_limit() {
        for micros in 1..=25 {
            let (mut pace, mut now) = trusted();
            let commits = turn(&mut pace, &mut now, &[micros; 200]);
            let mut first = 0;
            for last in commits.into_iter().chain([199]) {
                // The first of these answers was given when its call ended.
                let waited = (last - first) as u64 * micros;
                assert!(waited <= 200, "{micros}: from {first} to {last}, {waited}");
                first = last + 1;
            }
        }
    }
}
