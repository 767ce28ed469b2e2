//! Requests that are with the program, found by a number that is of no use to anybody afterwards.
//!
//! Every tag of every queue has an entry, and the entry a word: a generation and a phase.
//!
//! | phase  | the cell                              | leaves it                                |
//! |--------|---------------------------------------|------------------------------------------|
//! | `FREE` | is empty                              | `insert`, which makes it `BUSY`          |
//! | `HELD` | has the request of this generation    | `take` and `with`, which make it `BUSY`  |
//! | `BUSY` | is the one's that made it so          | that one, by a store of `HELD` or `FREE` |
//!
//! `BUSY` is entered by a compare-and-swap on the whole word, so exactly one thread is in a cell; a number of another
//! generation finds nothing. A request that comes while its tag's entry is still taken (its predecessor was revoked and
//! the program has not let go of it) goes to a map behind a lock.

use std::cell::UnsafeCell;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

const TAG_BITS: u32 = 12;
const QUEUE_BITS: u32 = 12;
const PLACE_BITS: u32 = TAG_BITS + QUEUE_BITS;
/// Set in numbers of the map.
const SPARE: u64 = 1 << 63;
const GENERATION: u64 = (1 << (63 - PLACE_BITS)) - 1;

const FREE: u64 = 0;
const HELD: u64 = 1;
const BUSY: u64 = 2;
const PHASE: u64 = 3;

/// Why a number was of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It was completed, or never given out.
    Stale,
    /// Another thread is at the request right now.
    Busy,
}

struct Entry<T> {
    word: AtomicU64,
    cell: UnsafeCell<MaybeUninit<T>>,
}

// SAFETY: the cell is touched only by the thread that has made the word `BUSY`, of which there is one at a time; the
// stores that end `BUSY` release, and the swap that begins it acquires. So a `T` is handed from thread to thread, never
// shared.
unsafe impl<T: Send> Sync for Entry<T> {}

impl<T> Entry<T> {
    fn new() -> Self {
        Entry { word: AtomicU64::new(FREE), cell: UnsafeCell::new(MaybeUninit::uninit()) }
    }

    /// Makes the entry busy if it is in this state.
    fn enter(&self, from: u64) -> Result<(), u64> {
        self.word
            .compare_exchange(from, from & !PHASE | BUSY, Ordering::Acquire, Ordering::Relaxed)
            .map(drop)
    }

    fn insert(&self, value: T) -> Result<u64, T> {
        let word = self.word.load(Ordering::Relaxed);
        if word & PHASE != FREE || self.enter(word).is_err() {
            return Err(value);
        }
        // 0 is no generation, so that no number is 0.
        let generation = ((word >> 2) & GENERATION) % GENERATION + 1;
        // SAFETY: this thread has made the entry busy, so the cell is its alone; it was free, so nothing is in it.
        unsafe { (*self.cell.get()).write(value) };
        self.word.store(generation << 2 | HELD, Ordering::Release);
        Ok(generation)
    }

    fn hold(&self, generation: u64) -> Result<(), Refusal> {
        match self.enter(generation << 2 | HELD) {
            Ok(()) => Ok(()),
            Err(word) if word == generation << 2 | BUSY => Err(Refusal::Busy),
            Err(_) => Err(Refusal::Stale),
        }
    }

    fn take(&self, generation: u64) -> Result<T, Refusal> {
        self.hold(generation)?;
        // SAFETY: busy by this thread, and it was held: there is a value, which leaves the cell for good as the entry
        // becomes free.
        let value = unsafe { (*self.cell.get()).assume_init_read() };
        self.word.store(generation << 2 | FREE, Ordering::Release);
        Ok(value)
    }

    fn with<R>(&self, generation: u64, look: impl FnOnce(&mut T) -> R) -> Result<R, Refusal> {
        struct Release<'a>(&'a AtomicU64, u64);
        impl Drop for Release<'_> {
            fn drop(&mut self) {
                self.0.store(self.1, Ordering::Release);
            }
        }
        self.hold(generation)?;
        // Also if `look` panics.
        let _release = Release(&self.word, generation << 2 | HELD);
        // SAFETY: busy by this thread, and it was held: there is a value, and nobody else at it until the release.
        Ok(look(unsafe { (*self.cell.get()).assume_init_mut() }))
    }
}

impl<T> Drop for Entry<T> {
    fn drop(&mut self) {
        if *self.word.get_mut() & PHASE == HELD {
            // SAFETY: held: there is a value, and nobody else has the entry any more.
            unsafe { self.cell.get_mut().assume_init_drop() };
        }
    }
}

/// A queue's, by tag.
type Entries<T> = Box<[Entry<T>]>;

struct Spares<T> {
    next: u64,
    values: HashMap<u64, T>,
}

/// See the module's text.
pub(crate) struct Table<T> {
    queues: Box<[OnceLock<Entries<T>>]>,
    spares: Mutex<Spares<T>>,
}

impl<T> Table<T> {
    /// For so many queues. More are served, too, by the map.
    pub(crate) fn new(queues: usize) -> Self {
        Table {
            queues: (0..queues).map(|_| OnceLock::new()).collect(),
            spares: Mutex::new(Spares { next: 1, values: HashMap::new() }),
        }
    }

    /// Makes room for a queue's tags, unless there is some.
    pub(crate) fn prepare(&self, queue: u16, depth: usize) {
        if let Some(entries) = self.queues.get(usize::from(queue)) {
            entries.get_or_init(|| (0..depth.min(1 << TAG_BITS)).map(|_| Entry::new()).collect());
        }
    }

    fn entry(&self, queue: usize, tag: usize) -> Option<&Entry<T>> {
        self.queues.get(queue)?.get()?.get(tag)
    }

    fn spares(&self) -> MutexGuard<'_, Spares<T>> {
        self.spares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, number: u64) -> Result<(&Entry<T>, u64), Refusal> {
        let tag = number as usize & ((1 << TAG_BITS) - 1);
        let queue = (number >> TAG_BITS) as usize & ((1 << QUEUE_BITS) - 1);
        Ok((self.entry(queue, tag).ok_or(Refusal::Stale)?, number >> PLACE_BITS))
    }

    /// Keeps a request; its number is never 0.
    pub(crate) fn insert(&self, queue: u16, tag: u16, value: T) -> u64 {
        let value = match self.entry(queue.into(), tag.into()) {
            Some(entry) => match entry.insert(value) {
                Ok(generation) => {
                    return generation << PLACE_BITS
                        | u64::from(queue) << TAG_BITS
                        | u64::from(tag);
                }
                Err(value) => value,
            },
            None => value,
        };
        let mut spares = self.spares();
        let number = SPARE | spares.next;
        spares.next += 1;
        spares.values.insert(number, value);
        number
    }

    /// Gives the request back, once.
    pub(crate) fn take(&self, number: u64) -> Result<T, Refusal> {
        if number & SPARE != 0 {
            return self.spares().values.remove(&number).ok_or(Refusal::Stale);
        }
        let (entry, generation) = self.find(number)?;
        entry.take(generation)
    }

    /// Looks at the request.
    pub(crate) fn with<R>(
        &self,
        number: u64,
        look: impl FnOnce(&mut T) -> R,
    ) -> Result<R, Refusal> {
        if number & SPARE != 0 {
            return self.spares().values.get_mut(&number).map(look).ok_or(Refusal::Stale);
        }
        let (entry, generation) = self.find(number)?;
        entry.with(generation, look)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    fn table() -> Table<Arc<()>> {
        let table = Table::new(2);
        table.prepare(0, 4);
        table.prepare(1, 4);
        table
    }

    #[test]
    fn a_number_serves_once() {
        let (table, value) = (table(), Arc::new(()));
        let number = table.insert(1, 3, Arc::clone(&value));
        assert_ne!(number, 0);
        assert_eq!(table.with(number, |v| Arc::strong_count(v)), Ok(2));
        table.take(number).unwrap();
        assert_eq!(table.take(number), Err(Refusal::Stale));
        assert_eq!(table.with(number, |_| ()), Err(Refusal::Stale));
        let next = table.insert(1, 3, Arc::clone(&value));
        assert_ne!(next, number);
        assert_eq!(table.take(number), Err(Refusal::Stale));
        drop(table);
        assert_eq!(Arc::strong_count(&value), 1, "what was held is dropped with the table");
    }

    #[test]
    fn numbers_that_were_never_given_out_are_stale() {
        let table = table();
        for number in [0, 1, u64::MAX, SPARE, 1 << PLACE_BITS, 5 << PLACE_BITS | 0xfff] {
            assert_eq!(table.take(number), Err(Refusal::Stale), "{number:#x}");
        }
    }

    #[test]
    fn a_tag_whose_former_request_is_still_held_has_another_number() {
        let (table, value) = (table(), Arc::new(()));
        let old = table.insert(0, 0, Arc::clone(&value));
        let new = table.insert(0, 0, Arc::clone(&value));
        let beyond = table.insert(9, 4000, Arc::clone(&value));
        assert_eq!(Arc::strong_count(&value), 4);
        assert_eq!(table.with(new, |_| ()), Ok(()));
        for number in [old, new, beyond] {
            table.take(number).unwrap();
            assert_eq!(table.take(number), Err(Refusal::Stale));
        }
    }

    #[test]
    fn who_is_at_a_request_is_alone() {
        let (table, value) = (table(), Arc::new(()));
        let number = table.insert(0, 1, value);
        let inner = table.with(number, |_| (table.take(number), table.with(number, |_| ())));
        assert_eq!(inner, Ok((Err(Refusal::Busy), Err(Refusal::Busy))));
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            table.with(number, |_| panic!("planted"))
        }));
        assert!(caught.is_err());
        table.take(number).unwrap();
    }

    #[test]
    fn of_many_threads_that_take_one_gets_it() {
        let table = Arc::new(table());
        let won = Arc::new(AtomicUsize::new(0));
        for _ in 0..100 {
            let number = table.insert(0, 2, Arc::new(()));
            let threads = (0..4).map(|_| {
                let (table, won) = (Arc::clone(&table), Arc::clone(&won));
                std::thread::spawn(move || {
                    if table.take(number).is_ok() {
                        won.fetch_add(1, Ordering::Relaxed);
                    }
                })
            });
            for thread in threads.collect::<Vec<_>>() {
                thread.join().unwrap();
            }
        }
        assert_eq!(won.load(Ordering::Relaxed), 100);
    }
}
