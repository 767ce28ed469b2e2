//! What is to go wrong with which requests: rules, and the decision that they come to. No I/O here.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use super::random::Random;
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::request::Op;

/// What happens to a request that a [`Rule`] applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// It fails with this errno, and the backend does not see it. Which errnos reach a client unchanged is in
    /// `docs/errors.md`; the others are `EIO` there.
    Error(Errno),
    /// It goes on later, after a time that is drawn anew for each request, evenly between the two. At most a day.
    Delay {
        /// The shortest.
        least: Duration,
        /// The longest.
        most: Duration,
    },
    /// It is dropped without an answer, as by a backend that loses it. The library answers such a request with `EIO`
    /// and counts it in [`QueueStats::dropped`](crate::QueueStats::dropped).
    Drop,
    /// It is kept until [`Faults::release`](super::Faults::release), and then goes on. The client waits meanwhile. A
    /// forced stop of the device answers it with `EIO`.
    Hold,
    /// The backend panics. The library contains that: the client gets `EIO`, and the disk goes on.
    Panic,
    /// The process dies on the spot (`abort(3)`, SIGABRT), and the disk with it, unless it can be recovered.
    Abort,
}

impl Action {
    /// A delay of always the same length.
    pub const fn delay(time: Duration) -> Self {
        Action::Delay { least: time, most: time }
    }
}

/// Which requests something happens to, and what.
///
/// A request *matches* if its operation is among [`ops`](Self::ops) and it touches [`range`](Self::range). Of the
/// requests that match, the rule passes over the first [`skip`](Self::skip); of those that follow it takes each
/// [`every`](Self::every)th, and of these each with [`probability`](Self::probability); it does so at most
/// [`limit`](Self::limit) times.
///
/// ```
/// use std::time::Duration;
/// use ublk_core::targets::{Action, Rule};
/// use ublk_core::{Errno, Op};
///
/// // A bad sector.
/// let bad = Rule::new(Action::Error(Errno::ENODATA)).ops([Op::Read]).range(4096..4608);
/// // One write in a hundred fails, by chance.
/// let flaky = Rule::new(Action::Error(Errno::EIO)).ops([Op::Write]).probability(0.01);
/// // The third flush, and no other, hangs.
/// let stuck = Rule::new(Action::Hold).ops([Op::Flush]).skip(2).limit(1);
/// // Everything takes 2 ms longer.
/// let slow = Rule::new(Action::delay(Duration::from_millis(2)));
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[must_use]
pub struct Rule {
    /// What happens.
    pub action: Action,
    /// The operations; every one if empty.
    pub ops: Vec<Op>,
    /// Bytes of the disk, of which a request touches some. Flushes and other operations without a range match only
    /// rules that have none.
    pub range: Option<Range<u64>>,
    /// 0 to 1.
    pub probability: f64,
    /// 1 for all.
    pub every: u64,
    /// Requests that match and are passed over first.
    pub skip: u64,
    /// How often it is applied; without end if `None`.
    pub limit: Option<u64>,
}

impl Rule {
    /// `action`, for every request.
    pub const fn new(action: Action) -> Self {
        Rule {
            action,
            ops: Vec::new(),
            range: None,
            probability: 1.0,
            every: 1,
            skip: 0,
            limit: None,
        }
    }

    /// Only these operations.
    pub fn ops(mut self, ops: impl IntoIterator<Item = Op>) -> Self {
        self.ops = ops.into_iter().collect();
        self
    }

    /// Only requests that touch these bytes of the disk.
    pub fn range(mut self, bytes: Range<u64>) -> Self {
        self.range = Some(bytes);
        self
    }

    /// By chance, from 0, never, to 1, always.
    pub fn probability(mut self, probability: f64) -> Self {
        self.probability = probability;
        self
    }

    /// Each `n`th request only, which is not 0.
    pub fn every(mut self, n: u64) -> Self {
        self.every = n;
        self
    }

    /// Not the first `n`.
    pub fn skip(mut self, n: u64) -> Self {
        self.skip = n;
        self
    }

    /// Not more than `n` times.
    pub fn limit(mut self, n: u64) -> Self {
        self.limit = Some(n);
        self
    }

    pub(super) fn check(&self) -> Result<()> {
        let why = match (&self.action, &self.range) {
            _ if !(0.0..=1.0).contains(&self.probability) => {
                format!("a probability is from 0 to 1, not {}", self.probability)
            }
            _ if self.every == 0 => "every 0th request is none; 1 is all of them".to_owned(),
            (_, Some(range)) if range.is_empty() => {
                format!("the range from {} to {} has no bytes", range.start, range.end)
            }
            (Action::Delay { least, most }, _) if least > most => {
                format!("a delay of at least {least:?} is not at most {most:?}")
            }
            (Action::Delay { most, .. }, _) if *most > LONGEST => {
                format!("a delay is at most a day, not {most:?}")
            }
            _ => return Ok(()),
        };
        Err(Error::new(ErrorKind::InvalidParameter, "add a rule of faults").because(why))
    }

    fn matches(&self, op: Op, offset: u64, len: u64) -> bool {
        let there = match &self.range {
            None => true,
            Some(range) => {
                len > 0 && offset < range.end && range.start < offset.saturating_add(len)
            }
        };
        there && (self.ops.is_empty() || self.ops.contains(&op))
    }
}

const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Names a rule that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(pub(super) u64);

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a request's way ends before it comes to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Error(Errno),
    Drop,
    Hold,
    Panic,
    Abort,
}

/// What is to be done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// How many delays, and how long they are together.
    pub(super) delays: u64,
    pub(super) delay: Duration,
    pub(super) end: Option<End>,
}

/// A rule in force.
pub(super) struct Armed {
    pub(super) id: RuleId,
    pub(super) rule: Rule,
    /// Requests that matched.
    pub(super) seen: u64,
    pub(super) applied: u64,
    random: Random,
}

impl Armed {
    fn applies(&mut self, op: Op, offset: u64, len: u64) -> bool {
        if !self.rule.matches(op, offset, len) {
            return false;
        }
        self.seen += 1;
        let Some(turn) = self.seen.checked_sub(self.rule.skip).filter(|turn| *turn > 0) else {
            return false;
        };
        let chosen = turn % self.rule.every == 0
            && self.rule.limit.is_none_or(|limit| self.applied < limit)
            && self.random.below_one() < self.rule.probability;
        self.applied += u64::from(chosen);
        chosen
    }
}

/// The rules in force, in the order in which they were added.
#[derive(Default)]
pub(super) struct Rules {
    pub(super) armed: Vec<Armed>,
    seed: u64,
    /// Rules since the last seed: each draws from a sequence of its own, so that others do not disturb it.
    sequences: u64,
    last: u64,
}

impl Rules {
    /// The rule has been checked.
    pub(super) fn add(&mut self, rule: Rule) -> RuleId {
        self.last += 1;
        let (id, random) = (RuleId(self.last), self.sequence());
        self.armed.push(Armed { id, rule, seen: 0, applied: 0, random });
        id
    }

    fn sequence(&mut self) -> Random {
        self.sequences += 1;
        Random::new(self.seed, self.sequences)
    }

    pub(super) fn remove(&mut self, id: RuleId) -> bool {
        let before = self.armed.len();
        self.armed.retain(|armed| armed.id != id);
        self.armed.len() < before
    }

    /// What comes is as in a new set of rules.
    pub(super) fn clear(&mut self) {
        self.armed.clear();
        self.sequences = 0;
    }

    /// Starts all sequences again.
    pub(super) fn reseed(&mut self, seed: u64) {
        self.seed = seed;
        self.sequences = 0;
        for at in 0..self.armed.len() {
            self.armed[at].random = self.sequence();
        }
    }

    /// Delays add up; the first rule of another kind that applies decides, and those after it do not see the request.
    pub(super) fn decide(&mut self, op: Op, offset: u64, len: u64) -> Verdict {
        let mut verdict = Verdict { delays: 0, delay: Duration::ZERO, end: None };
        for armed in &mut self.armed {
            if !armed.applies(op, offset, len) {
                continue;
            }
            verdict.end = Some(match armed.rule.action {
                Action::Delay { least, most } => {
                    verdict.delays += 1;
                    verdict.delay += least + (most - least).mul_f64(armed.random.below_one());
                    continue;
                }
                Action::Error(errno) => End::Error(errno),
                Action::Drop => End::Drop,
                Action::Hold => End::Hold,
                Action::Panic => End::Panic,
                Action::Abort => End::Abort,
            });
            break;
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FAIL: Action = Action::Error(Errno::EIO);

    /// Which of `count` reads of a block each fail.
    fn failing(rules: &mut Rules, count: u64) -> Vec<u64> {
        (0..count).filter(|i| rules.decide(Op::Read, i * 512, 512).end.is_some()).collect()
    }

    fn with(rule: Rule) -> Rules {
        rule.check().unwrap();
        let mut rules = Rules::default();
        rules.add(rule);
        rules
    }

    #[test]
    fn skip_every_and_limit_count_what_matches() {
        assert_eq!(failing(&mut with(Rule::new(FAIL)), 3), [0, 1, 2]);
        assert_eq!(failing(&mut with(Rule::new(FAIL).skip(2).limit(2)), 9), [2, 3]);
        assert_eq!(failing(&mut with(Rule::new(FAIL).every(3)), 9), [2, 5, 8]);
        assert_eq!(failing(&mut with(Rule::new(FAIL).skip(1).every(3).limit(2)), 12), [3, 6]);
        assert_eq!(failing(&mut with(Rule::new(FAIL).skip(u64::MAX)), 9), []);
        assert_eq!(failing(&mut with(Rule::new(FAIL).limit(0)), 9), []);
        let mut rules = with(Rule::new(FAIL).range(1024..1536).limit(1));
        assert_eq!(failing(&mut rules, 9), [2]);
        assert_eq!((rules.armed[0].seen, rules.armed[0].applied), (1, 1));
    }

    #[test]
    fn ops_and_ranges_select() {
        let mut rules = with(Rule::new(FAIL).ops([Op::Write, Op::Flush]).range(1000..2000));
        let mut fails = |op, offset, len| rules.decide(op, offset, len).end.is_some();
        assert!(fails(Op::Write, 0, 1001) && fails(Op::Write, 1999, 1));
        assert!(!fails(Op::Write, 0, 1000) && !fails(Op::Write, 2000, 9));
        assert!(!fails(Op::Read, 1000, 9));
        // It has no range.
        assert!(!fails(Op::Flush, 0, 0));
        let mut rules = with(Rule::new(FAIL).ops([Op::Flush]));
        assert!(rules.decide(Op::Flush, 0, 0).end.is_some());
    }

    #[test]
    fn delays_add_up_and_the_first_other_decides() {
        let ms = Duration::from_millis;
        let mut rules = Rules::default();
        rules.add(Rule::new(Action::delay(ms(2))));
        let drop = rules.add(Rule::new(Action::Drop).every(2));
        rules.add(Rule::new(FAIL));
        rules.add(Rule::new(Action::delay(ms(5))));
        let verdict = |end| Verdict { delays: 1, delay: ms(2), end: Some(end) };
        assert_eq!(rules.decide(Op::Read, 0, 512), verdict(End::Error(Errno::EIO)));
        assert_eq!(rules.decide(Op::Read, 0, 512), verdict(End::Drop));
        assert!(rules.remove(drop) && !rules.remove(drop));
        assert_eq!(rules.decide(Op::Read, 0, 512), verdict(End::Error(Errno::EIO)));
        let seen: Vec<_> = rules.armed.iter().map(|armed| (armed.seen, armed.applied)).collect();
        assert_eq!(seen, [(3, 3), (2, 2), (0, 0)]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let ms = Duration::from_millis;
        for (rule, word) in [
            (Rule::new(FAIL).probability(1.1), "1.1"),
            (Rule::new(FAIL).probability(-0.1), "-0.1"),
            (Rule::new(FAIL).probability(f64::NAN), "NaN"),
            (Rule::new(FAIL).every(0), "every 0th"),
            (Rule::new(FAIL).range(7..7), "from 7 to 7"),
            (Rule::new(Action::Delay { least: ms(3), most: ms(2) }), "at least 3ms"),
            (Rule::new(Action::delay(LONGEST + ms(1))), "a day"),
        ] {
            let e = rule.check().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidParameter);
            assert!(e.to_string().contains(word), "{e}");
        }
    }

    #[test]
    fn a_seed_is_repeated_whatever_was_before_and_whatever_else_there_is() {
        let rule = || Rule::new(FAIL).probability(0.3);
        let mut rules = with(rule());
        let first = failing(&mut rules, 200);
        assert!((30..90).contains(&first.len()), "{} of 200", first.len());
        rules.reseed(0);
        assert_eq!(failing(&mut rules, 200), first);
        rules.reseed(1);
        let other = failing(&mut rules, 200);
        assert_ne!(other, first);
        // A cleared set is as a new one.
        rules.clear();
        rules.add(rule());
        rules.add(Rule::new(Action::Drop).ops([Op::Write]).probability(0.5));
        assert_eq!(failing(&mut rules, 200), other);
        // Rules draw apart from each other.
        rules.clear();
        rules.add(Rule::new(FAIL).ops([Op::Write]));
        rules.add(rule());
        assert_ne!(failing(&mut rules, 200), other);
    }

    proptest! {
        #[test]
        fn chance_keeps_to_its_probability(seed: u64, percent in 0u32..=100) {
            let mut rules = with(Rule::new(FAIL).probability(f64::from(percent) / 100.0));
            rules.reseed(seed);
            let failed = failing(&mut rules, 10_000).len() as f64;
            // Six standard deviations and a little: one in 10^9 by chance, and the seeds are not many.
            let p = f64::from(percent) / 100.0;
            let far = 6.0 * (10_000.0 * p * (1.0 - p)).sqrt();
            prop_assert!((failed - 10_000.0 * p).abs() <= far, "{} of 10000 for {}", failed, p);
        }

        #[test]
        fn delays_keep_to_their_bounds(seed: u64, least in 0u64..1000, more in 0u64..1000) {
            let (least, most) = (Duration::from_micros(least), Duration::from_micros(least + more));
            let mut rules = with(Rule::new(Action::Delay { least, most }));
            rules.reseed(seed);
            for _ in 0..50 {
                let delay = rules.decide(Op::Read, 0, 512).delay;
                prop_assert!(least <= delay && delay <= most, "{:?}", delay);
            }
        }
    }
}
