//! Time stamps that fit one atomic word, and the clock by which workers take them.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::ticks;

fn base() -> Instant {
    static BASE: OnceLock<Instant> = OnceLock::new();
    *BASE.get_or_init(Instant::now)
}

/// Nanoseconds on the monotonic clock, never zero, so that zero can mean "not running".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Stamp(u64);

impl Stamp {
    /// By the system's clock.
    pub(crate) fn now() -> Self {
        let base = base();
        Stamp(u64::try_from(base.elapsed().as_nanos()).unwrap_or(u64::MAX).saturating_add(1))
    }

    pub(crate) fn raw(self) -> u64 {
        self.0
    }

    pub(crate) fn from_raw(raw: u64) -> Option<Self> {
        (raw != 0).then_some(Stamp(raw))
    }

    /// The stamp of that long before.
    pub(crate) fn before(self, by: Duration) -> Self {
        let by = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        Stamp(self.0.saturating_sub(by).max(1))
    }

    /// How long ago `earlier` was; zero if it was not.
    pub(crate) fn since(self, earlier: Stamp) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// What a [`Clock`] is made of.
pub(crate) trait Source {
    /// A counter that is cheap to read and has some rate.
    fn ticks(&self) -> u64;
    /// The system's monotonic clock.
    fn nanoseconds(&self) -> u64;
}

/// The machine's.
pub(crate) struct Machine;

impl Source for Machine {
    #[inline]
    fn ticks(&self) -> u64 {
        ticks::now()
    }

    fn nanoseconds(&self) -> u64 {
        Stamp::now().raw()
    }
}

/// For so many nanoseconds after the system's clock was read a stamp is reckoned from that reading.
const REACH: u64 = 100_000_000;
/// And for so many stamps: a counter that stands still lets no time pass.
const STAMPS: u32 = 4096;
/// Nanoseconds between two readings that tell the counter's rate.
const BASELINE: u64 = 20_000_000;
/// Two rates that differ by no more than a part in 2^10 are one: clocks are set right by half of that at most.
const ALIKE: u32 = 10;
/// A reading that took so many nanoseconds was interrupted: it does not tell what the counter said at the time.
const INTERRUPTED: u64 = 50_000;
/// A system's clock that is read within so many nanoseconds is not worth being spared.
const CHEAP: u64 = 100;
/// Binary places of a rate.
const PLACES: u32 = 32;

/// Both clocks at one moment.
#[derive(Clone, Copy)]
struct Reading {
    ticks: u64,
    nanoseconds: u64,
}

/// One thread's clock. Its stamps compare with those of [`Stamp::now`], and each is later than the one before.
///
/// Where the system's clock is a system call, and the processor has an even counter, most stamps are reckoned: from the
/// last reading of the system's clock, by the ticks since, at the rate at which they came between earlier readings.
/// The clock is read again after 100 ms or 4096 stamps, and whenever the counter is not where such a stamp can be: before
/// the last reading, or more than 100 ms after it. The rate is used when two stretches of 20 ms or more agreed on it to
/// a part in 1024, and every later stretch has to agree with the one before.
///
/// How wrong a stamp can be:
///
/// * While the counter is even: by a third of a millisecond. A reading that was not seen to be interrupted is off by 25 µs
///   at most, and so a stretch's rate by 50 µs in 20 ms, which makes 250 µs in 100 ms. Commonly it is a few µs.
/// * Whatever the counter does: never by more than 100 ms ahead of the system's clock. Behind it, by the time that the
///   counter has lost since the last reading: 100 ms if it was set back, since it cannot be set back beyond the reading
///   unnoticed, and that much again if that happens again before the next reading. One that slows down, or stands
///   still, is found out by 4096 stamps.
///
/// So a virtual machine that moves, one that was suspended, and processors whose counters differ, cost that much, and
/// the next reading puts it right. It is good for statistics and for what a moment more or less does not matter to.
pub(crate) struct Clock<S = Machine> {
    source: S,
    /// Whether the counter is of any use.
    counted: bool,
    /// The last stamp.
    last: u64,
    /// What stamps are reckoned from, while some are left.
    anchor: Reading,
    /// Nanoseconds a tick, in units of 2^-32; 0 while unknown.
    rate: u64,
    /// Ticks after the anchor.
    reach: u64,
    /// Stamps until the clock is read again.
    left: u32,
    /// Where the stretch began that is being measured.
    begun: Option<Reading>,
    /// The rate of the last stretch; 0 if there was none.
    measured: u64,
}

impl Clock {
    /// For the calling thread.
    pub(crate) fn new() -> Self {
        Self::of(Machine, ticks::are_even())
    }
}

impl<S: Source> Clock<S> {
    fn of(source: S, counted: bool) -> Self {
        let anchor = Reading { ticks: 0, nanoseconds: 0 };
        Clock {
            source,
            counted,
            last: 0,
            anchor,
            rate: 0,
            reach: 0,
            left: 0,
            begun: None,
            measured: 0,
        }
    }

    #[inline]
    pub(crate) fn now(&mut self) -> Stamp {
        let now = match self.reckon() {
            Some(now) => now,
            None => self.read(),
        };
        // Two requests with one tag and one stamp would be one request (`Meter::still_out`).
        self.last = now.max(self.last.saturating_add(1));
        Stamp(self.last)
    }

    #[inline]
    fn reckon(&mut self) -> Option<u64> {
        self.left = self.left.checked_sub(1)?;
        // A counter before the anchor is far beyond the reach.
        let since = self.source.ticks().wrapping_sub(self.anchor.ticks);
        (since < self.reach).then(|| self.anchor.nanoseconds + scaled(since, self.rate))
    }

    /// Reads the system's clock, and learns.
    #[cold]
    fn read(&mut self) -> u64 {
        self.left = 0;
        if !self.counted {
            return self.source.nanoseconds();
        }
        let before = self.source.ticks();
        let nanoseconds = self.source.nanoseconds();
        let took = self.source.ticks().wrapping_sub(before);
        let reading = Reading { ticks: before.wrapping_add(took / 2), nanoseconds };
        self.learn(reading);
        match scaled(took, self.rate) {
            _ if self.rate == 0 => {}
            // Or the rate is not what it was.
            took if took > INTERRUPTED => (self.begun, self.measured, self.rate) = (None, 0, 0),
            took if took <= CHEAP => self.counted = false,
            _ => (self.anchor, self.left) = (reading, STAMPS),
        }
        nanoseconds
    }

    fn learn(&mut self, reading: Reading) {
        let Some(begun) = self.begun else {
            self.begun = Some(reading);
            return;
        };
        let time = reading.nanoseconds.saturating_sub(begun.nanoseconds);
        let backwards = reading.ticks <= begun.ticks;
        if !backwards && time < BASELINE {
            return;
        }
        self.begun = Some(reading);
        let before = std::mem::replace(&mut self.measured, 0);
        self.rate = 0;
        if backwards {
            return;
        }
        let measured = (u128::from(time) << PLACES) / u128::from(reading.ticks - begun.ticks);
        self.measured = u64::try_from(measured).unwrap_or(0);
        let alike = self.measured.abs_diff(before) <= before >> ALIKE;
        let reach = (u128::from(REACH) << PLACES).checked_div(measured);
        if let (true, Some(Ok(reach))) = (alike && before != 0, reach.map(u64::try_from)) {
            (self.rate, self.reach) = (self.measured, reach);
        }
    }
}

/// Ticks in nanoseconds.
#[inline]
fn scaled(ticks: u64, rate: u64) -> u64 {
    // Truncates only what is far beyond every limit.
    let wide = (u128::from(ticks) * u128::from(rate)) >> PLACES;
    u64::try_from(wide).unwrap_or(u64::MAX)
}

// Not for Miri: a million steps of safe arithmetic.
#[cfg(all(test, not(miri)))]
#[path = "clock_tests.rs"]
mod tests;
