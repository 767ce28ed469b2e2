//! Where held requests wait: as threads, if the backend blocks, or as futures.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

#[derive(Default)]
pub(super) struct Gate {
    held: Mutex<Held>,
    opened: Condvar,
    arrived: Condvar,
}

#[derive(Default)]
struct Held {
    /// How often it was opened.
    generation: u64,
    threads: usize,
    futures: BTreeMap<u64, Waker>,
    next: u64,
    /// Who can open it. With nobody left, nothing is held.
    keepers: usize,
}

impl Held {
    fn count(&self) -> usize {
        self.threads + self.futures.len()
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Held> {
        // Nothing in here panics with the lock held.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn keep(&self) {
        self.lock().keepers += 1;
    }

    /// A keeper goes; the last one opens the gate.
    pub(super) fn leave(&self) {
        let mut held = self.lock();
        held.keepers -= 1;
        if held.keepers == 0 {
            self.open(held);
        }
    }

    /// Lets all go on that wait, and says how many those were.
    pub(super) fn release(&self) -> usize {
        self.open(self.lock())
    }

    fn open(&self, mut held: MutexGuard<'_, Held>) -> usize {
        let count = held.count();
        held.generation += 1;
        held.threads = 0;
        let futures = std::mem::take(&mut held.futures);
        drop(held);
        self.opened.notify_all();
        futures.into_values().for_each(Waker::wake);
        count
    }

    pub(super) fn count(&self) -> usize {
        self.lock().count()
    }

    /// Waits until `count` are held. False if they are not within `timeout`.
    pub(super) fn wait_until(&self, count: usize, timeout: Duration) -> bool {
        let began = Instant::now();
        let mut held = self.lock();
        while held.count() < count {
            let Some(left) = timeout.checked_sub(began.elapsed()).filter(|left| !left.is_zero())
            else {
                return false;
            };
            held = self.arrived.wait_timeout(held, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Blocks the thread until the gate is opened.
    pub(super) fn block(&self) {
        let mut held = self.lock();
        if held.keepers == 0 {
            return;
        }
        let from = held.generation;
        held.threads += 1;
        self.arrived.notify_all();
        while held.generation == from {
            held = self.opened.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A future that ends when the gate is opened.
    pub(super) fn wait(&self) -> Waiting<'_> {
        Waiting { gate: self, place: None }
    }
}

pub(super) struct Waiting<'a> {
    gate: &'a Gate,
    /// Where the waker is, and since which opening.
    place: Option<(u64, u64)>,
}

impl Future for Waiting<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut held = self.gate.lock();
        let (place, from) = match self.place {
            Some(there) => there,
            None if held.keepers == 0 => return Poll::Ready(()),
            None => {
                held.next += 1;
                (held.next, held.generation)
            }
        };
        if held.generation != from {
            return Poll::Ready(());
        }
        held.futures.insert(place, context.waker().clone());
        self.gate.arrived.notify_all();
        drop(held);
        self.place = Some((place, from));
        Poll::Pending
    }
}

impl Drop for Waiting<'_> {
    /// A revoked request is not held any more.
    fn drop(&mut self) {
        if let Some((place, _)) = self.place {
            let waker = self.gate.lock().futures.remove(&place);
            // Outside of the lock.
            drop(waker);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn futures_and_threads_wait_until_it_is_opened() {
        let gate = Arc::new(Gate::default());
        gate.keep();
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = Context::from_waker(&waker);
        let mut one = pin!(gate.wait());
        {
            let mut dropped = pin!(gate.wait());
            assert!(one.as_mut().poll(&mut context).is_pending());
            assert!(dropped.as_mut().poll(&mut context).is_pending());
            assert_eq!(gate.count(), 2);
        }
        // One has gone with the block, as with a revoked request.
        assert_eq!(gate.count(), 1);
        let theirs = Arc::clone(&gate);
        let thread = std::thread::spawn(move || theirs.block());
        assert!(gate.wait_until(2, Duration::from_secs(60)));
        assert!(!gate.wait_until(9, Duration::from_millis(1)));
        assert_eq!(gate.release(), 2);
        thread.join().unwrap();
        assert_eq!((gate.count(), woken.0.load(Ordering::SeqCst)), (0, 1));
        assert!(one.as_mut().poll(&mut context).is_ready());
        // What comes later is held again.
        let mut two = pin!(gate.wait());
        assert!(two.as_mut().poll(&mut context).is_pending());
        // With nobody to open it, it is open.
        gate.leave();
        assert!(two.as_mut().poll(&mut context).is_ready());
        assert!(pin!(gate.wait()).poll(&mut context).is_ready());
        gate.block();
    }
}
