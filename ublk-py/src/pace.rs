//! How long answers wait to be given to the kernel together.
//!
//! One system call for several answers is what makes small requests cheap, and what makes a client wait for another's
//! handler. An answer must not wait for more than 200 µs, whatever the handlers after it do. Since nothing tells what they
//! will do, each answer is committed at once until some hundred calls were quick; then, and for as long as they are,
//! up to eight answers are committed together. What is left: the first slow call after those keeps the answers before it,
//! seven at the most, until it returns. Only its own worker can commit them, and that is in the call.

use std::time::Duration;

/// How long an answer waits at most, while calls are as they were.
const MOST: Duration = Duration::from_micros(200);
/// So many answers are committed together. More save little: an eighth of a system call is left to each.
const TOGETHER: u32 = 8;
/// A call that takes no longer is quick: eight of them are within the limit.
const QUICK: Duration = Duration::from_micros(25);
/// One that takes longer than this is slow. Between the two are hitches, as happen to any thread on a busy machine.
const SLOW: Duration = Duration::from_micros(100);
/// So many quick calls, and no slow one, are trusted.
const TRUSTED: u32 = 256;
/// A call that takes this long has waited for something, and may do so again.
const WAITED: Duration = Duration::from_millis(1);
/// So many quick calls are trusted after that.
const TRUSTED_AGAIN: u32 = 4096;

/// The pace of one queue. Times are on whichever clock it is given.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Quick calls until they are trusted.
    wanted: u32,
    /// When the last call ended; `None` between turns and after a commit.
    looked: Option<Duration>,
    /// When the first answer that waits was given.
    waiting: Option<Duration>,
    /// Answers that wait.
    answers: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { wanted: TRUSTED, looked: None, waiting: None, answers: 0 }
    }
}

impl Pace {
    /// Before a call that `remaining` others of this turn follow.
    pub(crate) fn begin(&mut self, remaining: usize, now: impl FnOnce() -> Duration) {
        // A request that comes alone waits for nobody, and needs no clock.
        if remaining > 0 && self.looked.is_none() {
            self.looked = Some(now());
        }
    }

    /// After it: whether the answers that wait are to be committed. The end of a turn commits by itself.
    pub(crate) fn must_commit(&mut self, remaining: usize, now: impl FnOnce() -> Duration) -> bool {
        let Some(looked) = self.looked else { return false };
        let now = now();
        let took = now.saturating_sub(looked);
        self.judge(took);
        self.answers += 1;
        let first = *self.waiting.get_or_insert(now);
        // The next call may take as long as this one.
        let must =
            self.wanted > 0 || self.answers >= TOGETHER || now.saturating_sub(first) + took > MOST;
        if must {
            // The commit takes its time, too, which is nobody's call.
            self.end();
        } else {
            self.looked = Some(now);
        }
        must && remaining > 0
    }

    fn judge(&mut self, took: Duration) {
        if took > WAITED {
            self.wanted = TRUSTED_AGAIN;
        } else if took > SLOW {
            self.wanted = self.wanted.max(TRUSTED);
        } else if took <= QUICK {
            self.wanted = self.wanted.saturating_sub(1);
        }
    }

    /// Everything is committed: the turn is over.
    pub(crate) fn end(&mut self) {
        (self.looked, self.waiting, self.answers) = (None, None, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls of a turn that take so many microseconds each, and after which of them was committed.
    fn turn(pace: &mut Pace, now: &mut Duration, calls: &[u64]) -> Vec<usize> {
        let mut commits = Vec::new();
        for (at, micros) in calls.iter().enumerate() {
            let remaining = calls.len() - 1 - at;
            pace.begin(remaining, || *now);
            *now += Duration::from_micros(*micros);
            if pace.must_commit(remaining, || *now) {
                commits.push(at);
            }
        }
        pace.end();
        commits
    }

    /// How long each answer of a turn waited, in microseconds.
    fn waits(pace: &mut Pace, now: &mut Duration, calls: &[u64]) -> Vec<u64> {
        let mut commits = turn(pace, now, calls);
        commits.push(calls.len() - 1);
        let committed = |at| *commits.iter().find(|commit| **commit >= at).unwrap();
        (0..calls.len()).map(|at| calls[at + 1..=committed(at)].iter().sum()).collect()
    }

    fn trusted() -> (Pace, Duration) {
        let (mut pace, mut now) = (Pace::default(), Duration::from_secs(1));
        for _ in 0..TRUSTED {
            turn(&mut pace, &mut now, &[5, 5]);
        }
        assert!(turn(&mut pace, &mut now, &[5; 6]).is_empty());
        (pace, now)
    }

    #[test]
    fn nothing_waits_until_calls_are_trusted() {
        let (mut pace, mut now) = (Pace::default(), Duration::from_secs(1));
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
    fn a_request_that_comes_alone_needs_no_clock() {
        let mut pace = Pace::default();
        pace.begin(0, || unreachable!("nobody waits"));
        assert!(!pace.must_commit(0, || unreachable!("nobody waits")));
    }

    #[test]
    fn calls_that_are_neither_quick_nor_slow_are_never_trusted() {
        let (mut pace, mut now) = (Pace::default(), Duration::from_secs(1));
        for _ in 0..1000 {
            assert_eq!(turn(&mut pace, &mut now, &[60, 60]), [0]);
        }
    }

    #[test]
    fn no_answer_of_a_trusted_call_waits_for_longer_than_the_limit() {
        for micros in 1..=25 {
            let (mut pace, mut now) = trusted();
            let waits = waits(&mut pace, &mut now, &[micros; 200]);
            assert!(waits.iter().all(|wait| *wait <= 200), "{micros}: {waits:?}");
        }
    }

    #[test]
    fn the_first_slow_calls_keep_seven_answers_at_most_and_each_but_once() {
        for quick in [1, 5, 20] {
            for before in 0..100 {
                let (mut pace, mut now) = trusted();
                let mut calls = vec![quick; before];
                // Two slow calls in a row, and others after them.
                calls.extend([5_000_000, 5_000_000, quick, quick, 150, quick]);
                let waits = waits(&mut pace, &mut now, &calls);
                let kept = waits.iter().filter(|wait| **wait > 200).count();
                assert!(kept <= 7, "{quick}, {before}: {kept} wait: {waits:?}");
                assert!(waits.iter().all(|wait| *wait <= 5_000_200), "for one only: {waits:?}");
                // The answer of the slow call itself, and all after it, wait for nobody.
                assert!(waits[before..].iter().all(|wait| *wait == 0), "{waits:?}");
            }
        }
    }

    #[test]
    fn a_clock_that_stands_still_or_jumps_does_no_harm() {
        let (mut pace, mut now) = trusted();
        assert_eq!(turn(&mut pace, &mut now, &[0; 20]), [7, 15]);
        pace.begin(2, || Duration::from_secs(100));
        assert!(!pace.must_commit(2, || Duration::from_secs(1)));
    }
}
