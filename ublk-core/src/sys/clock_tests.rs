//! The worker's clock on a machine whose counter does what it is told.

use std::cell::Cell;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000_000;
/// What a stamp may be off while the counter is even.
const EVEN: u64 = 333_000;

/// Time, a counter, and how often the system's clock was read.
struct Bench {
    nanoseconds: Cell<u64>,
    /// In units of 2^-10 ticks.
    ticks: Cell<u64>,
    /// Ticks a nanosecond, in units of 2^-10.
    rate: Cell<u64>,
    /// What reading the system's clock takes.
    cost: Cell<u64>,
    readings: Cell<u32>,
}

impl Bench {
    fn pass(&self, nanoseconds: u64) {
        self.nanoseconds.set(self.nanoseconds.get() + nanoseconds);
        self.ticks.set(self.ticks.get().wrapping_add(nanoseconds * self.rate.get()));
    }

    /// Sets the counter by so many nanoseconds' ticks.
    fn jump(&self, nanoseconds: i64) {
        let ticks = nanoseconds * 3 * 1024;
        self.ticks.set(self.ticks.get().checked_add_signed(ticks).expect("the counter is high"));
    }
}

impl Source for Rc<Bench> {
    fn ticks(&self) -> u64 {
        self.ticks.get() >> 10
    }

    fn nanoseconds(&self) -> u64 {
        self.readings.set(self.readings.get() + 1);
        self.pass(self.cost.get() / 2);
        let now = self.nanoseconds.get();
        self.pass(self.cost.get() - self.cost.get() / 2);
        now
    }
}

/// A machine of 3 GHz whose clock costs 8 µs, and a clock on it.
fn fresh() -> (Rc<Bench>, Clock<Rc<Bench>>) {
    let bench = Rc::new(Bench {
        nanoseconds: Cell::new(5_000 * MS),
        ticks: Cell::new(1 << 62),
        rate: Cell::new(3 * 1024),
        cost: Cell::new(8_000),
        readings: Cell::new(0),
    });
    (Rc::clone(&bench), Clock::of(bench, true))
}

/// How far stamps were behind and ahead of the time, and how often the clock was read.
#[derive(Debug, Default)]
struct Seen {
    behind: u64,
    ahead: u64,
    readings: u32,
}

/// So many stamps, such a time apart.
fn run(bench: &Bench, clock: &mut Clock<Rc<Bench>>, stamps: u32, apart: u64) -> Seen {
    let before = bench.readings.get();
    let mut seen = Seen::default();
    for _ in 0..stamps {
        bench.pass(apart);
        let last = clock.last;
        let (early, stamp) = (bench.nanoseconds.get(), clock.now().raw());
        assert!(stamp > last, "{stamp} after {last}");
        seen.behind = seen.behind.max(early.saturating_sub(stamp));
        seen.ahead = seen.ahead.max(stamp.saturating_sub(bench.nanoseconds.get()));
    }
    seen.readings = bench.readings.get() - before;
    seen
}

/// A clock that has learned the rate.
fn learned() -> (Rc<Bench>, Clock<Rc<Bench>>) {
    let (bench, mut clock) = fresh();
    run(&bench, &mut clock, 10_000, 20_000);
    assert_ne!(clock.rate, 0);
    (bench, clock)
}

#[test]
fn most_stamps_are_reckoned_and_right() {
    let (bench, mut clock) = fresh();
    // Two stretches of 20 ms tell the rate; until then it is the system's clock.
    let first = run(&bench, &mut clock, 1_000, 20_000);
    assert_eq!(first.readings, 1_000);
    run(&bench, &mut clock, 1_000, 20_000);
    // Two seconds.
    let seen = run(&bench, &mut clock, 100_000, 20_000);
    assert!((20..=30).contains(&seen.readings), "{seen:?}");
    assert!(seen.behind < 1_000 && seen.ahead < 1_000, "{seen:?}");
    // Twenty stamps a millisecond are as many as serve for a reading.
    let seen = run(&bench, &mut clock, 100_000, 1_000);
    assert!((24..=26).contains(&seen.readings), "{seen:?}");
}

#[test]
fn a_machine_without_an_even_counter_has_the_systems_clock() {
    let (bench, _) = fresh();
    let mut clock = Clock::of(Rc::clone(&bench), false);
    let seen = run(&bench, &mut clock, 10_000, 20_000);
    assert_eq!((seen.readings, seen.behind, seen.ahead), (10_000, 0, 0));
}

#[test]
fn a_cheap_clock_is_read_always() {
    let (bench, mut clock) = fresh();
    bench.cost.set(40);
    run(&bench, &mut clock, 10_000, 20_000);
    assert!(!clock.counted);
    let seen = run(&bench, &mut clock, 1_000, 20_000);
    assert_eq!((seen.readings, seen.behind, seen.ahead), (1_000, 0, 0));
}

#[test]
fn a_counter_that_was_set_back_costs_no_more_than_the_reach() {
    for back in [1, 10, 60, 99, 101, 5_000] {
        let (bench, mut clock) = learned();
        bench.jump(-(back * MS as i64));
        let seen = run(&bench, &mut clock, 20_000, 20_000);
        assert!(seen.behind <= REACH.min(back as u64 * MS) + EVEN, "{back}: {seen:?}");
        assert!(seen.ahead <= EVEN, "{back}: {seen:?}");
        let seen = run(&bench, &mut clock, 20_000, 20_000);
        assert!(seen.behind <= EVEN && seen.ahead <= EVEN, "put right: {seen:?}");
        assert!(seen.readings < 10, "and cheap again: {seen:?}");
    }
}

#[test]
fn a_counter_that_was_set_forward_costs_no_more_than_the_reach() {
    for forward in [1, 10, 60, 99, 101, 5_000, 3_600_000] {
        let (bench, mut clock) = learned();
        bench.jump(forward * MS as i64);
        let seen = run(&bench, &mut clock, 20_000, 20_000);
        assert!(seen.ahead <= REACH.min(forward as u64 * MS) + EVEN, "{forward}: {seen:?}");
        assert!(seen.behind <= EVEN, "{forward}: {seen:?}");
        let seen = run(&bench, &mut clock, 20_000, 20_000);
        assert!(seen.behind <= EVEN && seen.ahead <= EVEN, "put right: {seen:?}");
        assert!(seen.readings < 10, "and cheap again: {seen:?}");
    }
}

#[test]
fn a_jump_while_the_rate_is_being_learned_does_not_make_one() {
    for at in [100, 1_000, 1_500] {
        let (bench, mut clock) = fresh();
        run(&bench, &mut clock, at, 20_000);
        bench.jump(3_600_000 * MS as i64);
        let seen = run(&bench, &mut clock, 100_000, 20_000);
        assert!(seen.behind <= EVEN && seen.ahead <= EVEN, "{at}: {seen:?}");
        assert!(seen.readings < 5_000, "{at}: {seen:?}");
    }
}

#[test]
fn a_counter_with_another_rate_is_learned_anew() {
    for (rate, behind, ahead) in [
        // Three quarters: of 133 ms, a quarter is lost.
        (9 * 256, 34 * MS, 0),
        // Half, a tenth: the clock is read after 4096 stamps, 82 ms.
        (3 * 512, 42 * MS, 0),
        (307, 75 * MS, 0),
        // Stands still.
        (0, 83 * MS, 0),
        // A quarter more, ten times as much.
        (15 * 256, 0, 21 * MS),
        (30 * 1024, 0, 91 * MS),
    ] {
        let (bench, mut clock) = learned();
        bench.rate.set(rate);
        let seen = run(&bench, &mut clock, 50_000, 20_000);
        assert!(seen.behind <= behind + EVEN && seen.ahead <= ahead + EVEN, "{rate}: {seen:?}");
        let seen = run(&bench, &mut clock, 50_000, 20_000);
        assert!(seen.behind <= EVEN && seen.ahead <= EVEN, "{rate}: {seen:?}");
        assert!(rate == 0 || seen.readings < 50, "{rate}: cheap again: {seen:?}");
    }
}

#[test]
fn a_long_rest_is_followed_by_a_reading() {
    let (bench, mut clock) = learned();
    for rest in [101 * MS, 10_000 * MS, 86_400_000 * MS] {
        bench.pass(rest);
        let seen = run(&bench, &mut clock, 1, 20_000);
        assert_eq!(seen.readings, 1, "{rest}");
        assert!(seen.behind <= EVEN && seen.ahead <= EVEN, "{rest}: {seen:?}");
        let seen = run(&bench, &mut clock, 1_000, 20_000);
        assert!(seen.readings <= 1, "the rate is known still: {seen:?}");
    }
}

#[test]
fn a_reading_that_was_interrupted_is_not_reckoned_from() {
    let (bench, mut clock) = learned();
    bench.pass(REACH);
    bench.cost.set(3 * MS);
    let seen = run(&bench, &mut clock, 10, 20_000);
    assert_eq!(seen.readings, 10);
    bench.cost.set(8_000);
    let seen = run(&bench, &mut clock, 5_000, 20_000);
    assert!(seen.behind <= EVEN && seen.ahead <= EVEN, "{seen:?}");
    let seen = run(&bench, &mut clock, 5_000, 20_000);
    assert!(seen.readings <= 2, "and the rate was learned anew: {seen:?}");
}

#[test]
fn this_machines_clock_agrees_with_the_systems() {
    // Whichever kind it has: stamps between two readings, for a while.
    let mut clock = Clock::new();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(300) {
        let (before, stamp, after) = (Stamp::now(), clock.now(), Stamp::now());
        assert!(stamp.raw() + REACH >= before.raw(), "{stamp:?} before {before:?}");
        assert!(stamp.raw() <= after.raw() + REACH, "{stamp:?} after {after:?}");
    }
}

/// What may happen to a machine between two stamps.
#[derive(Debug, Clone)]
enum Event {
    Pass(u64),
    Jump(i64),
    Rate(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        20 => (1_000..200 * MS).prop_map(Event::Pass),
        2 => (-100_000 * MS as i64..100_000 * MS as i64).prop_map(Event::Jump),
        2 => (-100 * MS as i64..100 * MS as i64).prop_map(Event::Jump),
        1 => (0..30_000_u64).prop_map(Event::Rate),
    ]
}

proptest! {
    /// Whatever happens, stamps go up and are ahead by no more than the reach; and what was, is forgotten.
    #[test]
    fn whatever_the_counter_does(events in prop::collection::vec(event(), 1..60)) {
        let (bench, mut clock) = learned();
        for event in events {
            match event {
                Event::Pass(time) => bench.pass(time),
                Event::Jump(time) => bench.jump(time),
                Event::Rate(rate) => bench.rate.set(rate),
            }
            // Asserts that they go up.
            let seen = run(&bench, &mut clock, 20, 20_000);
            prop_assert!(seen.ahead <= REACH, "{seen:?}");
        }
        bench.rate.set(3 * 1024);
        run(&bench, &mut clock, 20_000, 20_000);
        let seen = run(&bench, &mut clock, 20_000, 20_000);
        prop_assert!(seen.behind <= EVEN && seen.ahead <= EVEN, "{seen:?}");
    }
}
