//! What a queue counts. The worker alone writes, with plain loads and stores; anybody may read.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::request::Op;
use crate::sys::clock::Stamp;

/// A counter with one writer.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        // One writer: no read-modify-write is needed, and none is paid for.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Kinds of operations that are counted apart.
pub(crate) const KINDS: usize = 8;

fn kind(op: Op) -> usize {
    match op {
        Op::Read => 0,
        Op::Write => 1,
        Op::Flush => 2,
        Op::Discard => 3,
        Op::WriteZeroes => 4,
        Op::ZoneAppend => 5,
        Op::ReportZones => 6,
        Op::ZoneOpen | Op::ZoneClose | Op::ZoneFinish | Op::ZoneReset | Op::ZoneResetAll => 7,
    }
}

/// Each power of two of nanoseconds is divided in this many buckets: a bucket is at most 12.5 % wide.
const DIVISIONS: u64 = 8;
/// Up to 2^40 ns, 18 minutes; what takes longer counts there.
const BUCKETS: usize = 38 * DIVISIONS as usize;

fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < DIVISIONS {
        return nanoseconds as usize;
    }
    let octave = u64::from(nanoseconds.ilog2());
    let part = (nanoseconds >> (octave - 3)) & (DIVISIONS - 1);
    (((octave - 2) * DIVISIONS + part) as usize).min(BUCKETS - 1)
}

/// The smallest number of nanoseconds that does not fall in the bucket or one before it.
fn bucket_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < DIVISIONS {
        return bucket + 1;
    }
    let octave = bucket / DIVISIONS + 2;
    (DIVISIONS + bucket % DIVISIONS + 1) << (octave - 3)
}

pub(crate) struct OpMeter {
    pub(crate) completed: Counter,
    pub(crate) bytes: Counter,
    pub(crate) errors: Counter,
    latency: Box<[Counter]>,
}

impl OpMeter {
    fn new() -> Self {
        OpMeter {
            completed: Counter::default(),
            bytes: Counter::default(),
            errors: Counter::default(),
            latency: (0..BUCKETS).map(|_| Counter::default()).collect(),
        }
    }

    pub(crate) fn latency(&self) -> Latency {
        Latency { counts: self.latency.iter().map(Counter::get).collect() }
    }
}

/// When the requests that were out at one moment had arrived.
pub(crate) struct Outstanding(Vec<u64>);

/// One queue's counters.
pub(crate) struct Meter {
    ops: [OpMeter; KINDS],
    pub(crate) dropped: Counter,
    pub(crate) panics: Counter,
    pub(crate) revoked: Counter,
    pub(crate) refused: Counter,
    pub(crate) rejected: Counter,
    /// Requests whose pages the ring would not take.
    pub(crate) unregistered: Counter,
    /// Requests whose data is in shared memory.
    pub(crate) shared: Counter,
    /// When the request of each tag arrived; 0 while the tag is with the kernel.
    started: Box<[AtomicU64]>,
    /// Where the driver punishes what takes long: the earliest that it can have begun to count, which is while the worker
    /// was busy with what came before. Otherwise empty.
    counted: Box<[AtomicU64]>,
}

impl Meter {
    /// `punished`: the age of requests matters to the driver.
    pub(crate) fn new(depth: u16, punished: bool) -> Self {
        let stamps = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        Meter {
            ops: std::array::from_fn(|_| OpMeter::new()),
            dropped: Counter::default(),
            panics: Counter::default(),
            revoked: Counter::default(),
            refused: Counter::default(),
            rejected: Counter::default(),
            unregistered: Counter::default(),
            shared: Counter::default(),
            started: stamps(depth),
            counted: stamps(if punished { depth } else { 0 }),
        }
    }

    pub(crate) fn op(&self, op: Op) -> &OpMeter {
        &self.ops[kind(op)]
    }

    /// Whether the age of requests matters to the driver.
    pub(crate) fn is_punished(&self) -> bool {
        !self.counted.is_empty()
    }

    /// A request was found that may have waited for `lag`.
    pub(crate) fn arrived(&self, tag: u16, now: Stamp, lag: Duration) {
        self.started[usize::from(tag)].store(now.raw(), Ordering::Relaxed);
        if let Some(counted) = self.counted.get(usize::from(tag)) {
            counted.store(now.before(lag).raw(), Ordering::Relaxed);
        }
    }

    /// The request of `tag` ends: `bytes` of it, or an error.
    pub(crate) fn ended(&self, tag: u16, op: Op, result: Option<u64>, now: Stamp) {
        let started = &self.started[usize::from(tag)];
        let meter = self.op(op);
        meter.completed.add(1);
        match result {
            Some(bytes) if op.has_data() => meter.bytes.add(bytes),
            Some(_) => {}
            None => meter.errors.add(1),
        }
        if let Some(then) = Stamp::from_raw(started.load(Ordering::Relaxed)) {
            let took = u64::try_from(now.since(then).as_nanos()).unwrap_or(u64::MAX);
            meter.latency[bucket(took)].add(1);
        }
        started.store(0, Ordering::Relaxed);
        if let Some(counted) = self.counted.get(usize::from(tag)) {
            counted.store(0, Ordering::Relaxed);
        }
    }

    /// What is out now, to be compared with later.
    pub(crate) fn outstanding(&self) -> Outstanding {
        Outstanding(self.started.iter().map(|s| s.load(Ordering::Relaxed)).collect())
    }

    /// Whether a request that was out then still is.
    pub(crate) fn still_out(&self, then: &Outstanding) -> bool {
        let now = self.started.iter().map(|s| s.load(Ordering::Relaxed));
        now.zip(&then.0).any(|(now, then)| now != 0 && now == *then)
    }

    /// How long the driver has counted at most against the request of `tag`; `None` while the tag is with the kernel, or
    /// nobody counts.
    pub(crate) fn age(&self, tag: u16, now: Stamp) -> Option<Duration> {
        let counted = self.counted.get(usize::from(tag))?.load(Ordering::Relaxed);
        Some(now.since(Stamp::from_raw(counted)?))
    }

    /// The greatest [`age`](Self::age).
    pub(crate) fn oldest(&self, now: Stamp) -> Option<Duration> {
        let counted = self.counted.iter().map(|s| s.load(Ordering::Relaxed));
        Some(now.since(counted.filter_map(Stamp::from_raw).min()?))
    }

    /// Requests that are with the backend, and the age of the oldest.
    pub(crate) fn in_flight(&self, now: Stamp) -> (u32, Option<Duration>) {
        let started = self.started.iter().map(|s| s.load(Ordering::Relaxed));
        let mut count = 0;
        let mut oldest: Option<Stamp> = None;
        for stamp in started.filter_map(Stamp::from_raw) {
            count += 1;
            oldest = Some(oldest.map_or(stamp, |o| o.min(stamp)));
        }
        (count, oldest.map(|o| now.since(o)))
    }
}

/// How long requests took, from their arrival at the server to their commit, as a histogram whose buckets
/// are at most 12.5 % wide. By the worker's clock: see [`QueueContext::clock`](crate::QueueContext::clock).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Latency {
    counts: Vec<u64>,
}

impl Latency {
    /// How many requests were measured.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The time within which the fraction `q` (0.0 to 1.0) of the requests ended, rounded up to the end of
    /// a bucket; `None` if there were none.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = ((q.clamp(0.0, 1.0) * count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, n) in self.counts.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return Some(Duration::from_nanos(bucket_end(bucket)));
            }
        }
        None
    }

    pub(crate) fn merge(&mut self, other: &Latency) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (a, b) in self.counts.iter_mut().zip(&other.counts) {
            *a += b;
        }
    }
}

/// The count and a few quantiles: the buckets are hundreds.
impl fmt::Debug for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quantile = |q| self.quantile(q).unwrap_or_default();
        f.debug_struct("Latency")
            .field("count", &self.count())
            .field("p50", &quantile(0.5))
            .field("p99", &quantile(0.99))
            .field("max", &quantile(1.0))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_narrow() {
        let mut end = 0;
        for b in 0..BUCKETS - 1 {
            assert_eq!(bucket(end), b, "start of bucket {b}");
            let next = bucket_end(b);
            assert!(next > end);
            assert!(next - end <= (end / 8).max(1), "bucket {b}: {end}..{next}");
            assert_eq!(bucket(next - 1), b, "end of bucket {b}");
            end = next;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_queue_counts_what_it_served_and_knows_its_oldest_request() {
        let meter = Meter::new(4, false);
        let at = |ns| Stamp::from_raw(ns).unwrap();
        meter.arrived(0, at(100), Duration::ZERO);
        meter.arrived(3, at(50), Duration::from_nanos(40));
        let then = meter.outstanding();
        assert!(meter.still_out(&then));
        assert_eq!(meter.in_flight(at(1050)), (2, Some(Duration::from_nanos(1000))));
        meter.ended(3, Op::Read, Some(4096), at(1050));
        assert!(meter.still_out(&then), "one of the two");
        meter.ended(0, Op::Write, None, at(1100));
        meter.arrived(3, at(1150), Duration::ZERO);
        assert!(!meter.still_out(&then), "another one on the same tag");
        meter.ended(3, Op::Flush, Some(0), at(1150));
        assert_eq!(meter.in_flight(at(2000)), (0, None));
        assert_eq!(meter.op(Op::Read).bytes.get(), 4096);
        assert_eq!(meter.op(Op::Write).errors.get(), 1);
        let median = meter.op(Op::Read).latency().quantile(0.5).unwrap();
        assert!(median > Duration::from_nanos(1000) && median < Duration::from_nanos(1130));
        assert_eq!((meter.oldest(at(2000)), meter.age(3, at(2000))), (None, None), "nobody counts");
    }

    #[test]
    fn where_age_is_punished_it_counts_from_the_earliest_moment_and_latency_does_not() {
        let meter = Meter::new(2, true);
        let (at, ns) = (|ns| Stamp::from_raw(ns).unwrap(), Duration::from_nanos);
        meter.arrived(0, at(1000), ns(400));
        meter.arrived(1, at(1000), ns(5000));
        assert_eq!(
            (meter.age(0, at(1100)), meter.age(1, at(1100))),
            (Some(ns(500)), Some(ns(1099)))
        );
        assert_eq!(meter.oldest(at(1100)), Some(ns(1099)));
        assert_eq!(meter.in_flight(at(1100)), (2, Some(ns(100))));
        meter.ended(1, Op::Read, Some(512), at(1100));
        assert_eq!((meter.oldest(at(1100)), meter.age(1, at(1100))), (Some(ns(500)), None));
        meter.ended(0, Op::Read, Some(512), at(1100));
        assert_eq!(meter.oldest(at(1100)), None);
        assert!(meter.op(Op::Read).latency().quantile(1.0).unwrap() < ns(120));
    }
}
