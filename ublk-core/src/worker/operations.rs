//! The table of ring operations in flight: what futures wait for, and what keeps their memory.
//!
//! Invariant: memory and files that the kernel was given belong to the entry from submission to completion,
//! whatever happens to the future. A dropped future leaves its entry behind as an orphan, with the
//! operation cancelled; the completion frees it. If the whole ring is dropped with operations in flight,
//! the entries are leaked, because nobody would tell when the kernel is done.

use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Poll, Waker};

use super::slot::Slot;
use crate::sys::shared_memory::SharedMap;

/// What an operation works on.
pub(crate) enum Hold {
    Nothing,
    /// A user's buffer, or a struct that the kernel reads.
    Memory(Box<dyn Any + Send>),
    /// A request's buffer, or the shared memory that its data is in.
    Request(Arc<Slot>, #[allow(dead_code, reason = "held, not read")] Option<Arc<SharedMap>>),
}

pub(crate) struct Keep {
    pub(crate) hold: Hold,
    /// Open until the completion: an entry that is still queued names it by number.
    #[allow(dead_code, reason = "held, not read")]
    pub(crate) file: Option<Arc<OwnedFd>>,
}

enum State {
    InFlight(Option<Waker>),
    Done(i32),
    /// Nobody waits any more.
    Orphan,
}

struct Entry {
    state: State,
    keep: Keep,
}

#[derive(Default)]
pub(crate) struct Operations {
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    in_flight: usize,
}

/// What is left to do, outside of the core's lock, when an operation has completed.
#[derive(Default)]
pub(crate) struct Completed {
    pub(crate) wake: Option<Waker>,
    /// The user's, whose destructors are the user's code.
    pub(crate) garbage: Option<Keep>,
    /// A request's buffer has no more operations on it.
    pub(crate) quiet: Option<Arc<Slot>>,
}

impl Operations {
    pub(crate) fn insert(&mut self, keep: Keep, waker: Waker) -> u32 {
        if let Hold::Request(slot, _) = &keep.hold {
            slot.begin_operation();
        }
        let entry = Some(Entry { state: State::InFlight(Some(waker)), keep });
        self.in_flight += 1;
        match self.free.pop() {
            Some(index) => {
                self.entries[index as usize] = entry;
                index
            }
            None => {
                self.entries.push(entry);
                u32::try_from(self.entries.len() - 1).unwrap_or(u32::MAX)
            }
        }
    }

    fn take(&mut self, index: u32) -> Option<Entry> {
        let entry = self.entries.get_mut(index as usize)?.take();
        if entry.is_some() {
            self.free.push(index);
        }
        entry
    }

    /// A future asks for its result.
    pub(crate) fn poll(&mut self, index: u32, waker: &Waker) -> Poll<(i32, Keep)> {
        let Some(Some(entry)) = self.entries.get_mut(index as usize) else {
            unreachable!("an entry lives until its future has taken the result or was dropped")
        };
        match &mut entry.state {
            State::InFlight(waiting) => {
                match waiting {
                    Some(old) if old.will_wake(waker) => {}
                    _ => *waiting = Some(waker.clone()),
                }
                Poll::Pending
            }
            State::Done(result) => {
                let result = *result;
                match self.take(index) {
                    Some(entry) => Poll::Ready((result, entry.keep)),
                    None => unreachable!("seen above"),
                }
            }
            State::Orphan => unreachable!("an orphan has no future"),
        }
    }

    /// A future is dropped. True if its operation is in flight and should be cancelled; otherwise what it
    /// held is given back, to be dropped outside of the lock.
    pub(crate) fn abandon(&mut self, index: u32) -> (bool, Option<Keep>) {
        match self.entries.get_mut(index as usize) {
            Some(Some(entry)) if matches!(entry.state, State::InFlight(_)) => {
                entry.state = State::Orphan;
                (true, None)
            }
            _ => (false, self.take(index).map(|entry| entry.keep)),
        }
    }

    /// The kernel has completed an operation.
    pub(crate) fn complete(&mut self, index: u32, result: i32) -> Completed {
        let mut done = Completed::default();
        let Some(Some(entry)) = self.entries.get_mut(index as usize) else { return done };
        self.in_flight -= 1;
        if let Hold::Request(slot, _) = &entry.keep.hold
            && slot.end_operation() == 0
        {
            done.quiet = Some(Arc::clone(slot));
        }
        match std::mem::replace(&mut entry.state, State::Done(result)) {
            State::InFlight(waker) => done.wake = waker,
            State::Orphan => done.garbage = self.take(index).map(|entry| entry.keep),
            State::Done(_) => unreachable!("an operation completes once"),
        }
        done
    }

    /// The operations in flight on a slot's buffer.
    pub(crate) fn on_slot<'a>(&'a self, slot: &'a Arc<Slot>) -> impl Iterator<Item = u32> + 'a {
        self.entries.iter().enumerate().filter_map(move |(index, entry)| match entry {
            Some(Entry {
                state: State::InFlight(_) | State::Orphan,
                keep: Keep { hold: Hold::Request(s, _), .. },
            }) if Arc::ptr_eq(s, slot) => u32::try_from(index).ok(),
            _ => None,
        })
    }

    /// The operations in flight for requests of the queue `key` that were revoked, or will be when these have ended.
    pub(crate) fn on_lost_requests(&self, key: u32) -> impl Iterator<Item = u32> + '_ {
        self.entries.iter().enumerate().filter_map(move |(index, entry)| match entry {
            Some(Entry {
                state: State::InFlight(_) | State::Orphan,
                keep: Keep { hold: Hold::Request(s, _), .. },
            }) if s.place().key == key && (s.is_revoked() || s.works_on_shared_memory()) => {
                u32::try_from(index).ok()
            }
            _ => None,
        })
    }

    /// Every operation in flight.
    pub(crate) fn all_in_flight(&self) -> impl Iterator<Item = u32> + '_ {
        self.entries.iter().enumerate().filter_map(|(index, entry)| match entry {
            Some(Entry { state: State::InFlight(_) | State::Orphan, .. }) => {
                u32::try_from(index).ok()
            }
            _ => None,
        })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for Operations {
    fn drop(&mut self) {
        for entry in self.entries.drain(..).flatten() {
            match entry.state {
                State::Done(_) => drop(entry),
                // The kernel may be using it still.
                State::InFlight(_) | State::Orphan => std::mem::forget(entry.keep),
            }
        }
    }
}
