//! How other threads speak to a worker: a lock-free stack of shared nodes, and a doorbell that is rung
//! only when the worker sleeps.
//!
//! Any thread pushes, one thread (the worker) drains. A node is in at most one stack, at most once: its
//! [`Link`] says whether it is queued, so pushing it again is refused and needs no allocation. The
//! worker goes to sleep only after it announced so and then found the stack empty; a pusher looks at the
//! announcement only after its push. A sequentially consistent fence stands between the two steps on
//! either side, so that one of the two sees the other: no wake-up is lost. `tests::loom` explores every
//! interleaving of that.

use std::sync::Arc;

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicPtr, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering, fence};

/// A node's place in a [`Stack`].
pub(crate) struct Link<T> {
    next: AtomicPtr<T>,
    queued: AtomicBool,
}

impl<T> Link<T> {
    pub(crate) fn new() -> Self {
        Link { next: AtomicPtr::new(std::ptr::null_mut()), queued: AtomicBool::new(false) }
    }
}

/// What can be pushed: a shared object with a link in it. An object is used with one stack only.
pub(crate) trait Linked: Sized {
    fn link(&self) -> &Link<Self>;
}

/// What became of a push.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Push {
    /// The worker will find it.
    Queued,
    /// It was queued already; the worker will find it once.
    AlreadyQueued,
    /// The worker is gone.
    Closed,
}

/// A stack that any thread pushes to and one thread drains.
///
/// Each queued node owns one reference count of its `Arc`, given up by `into_raw` in `push` and taken back
/// by `from_raw` in `drain`.
pub(crate) struct Stack<T: Linked> {
    head: AtomicPtr<T>,
    /// The nodes are `Arc<T>`s that move between threads.
    owns: std::marker::PhantomData<Arc<T>>,
}

/// The head of a closed stack: no address of a `T`, which is aligned to more than one byte because its
/// link is.
fn closed<T>() -> *mut T {
    const { assert!(align_of::<T>() > 1) };
    std::ptr::without_provenance_mut(1)
}

impl<T: Linked> Stack<T> {
    pub(crate) fn new() -> Self {
        Stack { head: AtomicPtr::new(std::ptr::null_mut()), owns: std::marker::PhantomData }
    }

    pub(crate) fn push(&self, node: Arc<T>) -> Push {
        // Acquire pairs with the release in `drain`: the drainer is done with the link when it is free.
        if node.link().queued.swap(true, Ordering::AcqRel) {
            return Push::AlreadyQueued;
        }
        let raw = Arc::into_raw(node).cast_mut();
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            if head == closed() {
                // SAFETY: `raw` came from `into_raw` above and was not published: its count is ours.
                let node = unsafe { Arc::from_raw(raw) };
                node.link().queued.store(false, Ordering::Release);
                return Push::Closed;
            }
            // SAFETY: as above, the count that `raw` stands for is still ours, so the node is alive.
            unsafe { &*raw }.link().next.store(head, Ordering::Relaxed);
            match self.head.compare_exchange_weak(head, raw, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return Push::Queued,
                Err(seen) => head = seen,
            }
        }
    }

    /// Whether nothing is queued. Says so reliably only after [`Doorbell::fall_asleep`].
    pub(crate) fn is_empty(&self) -> bool {
        let head = self.head.load(Ordering::Relaxed);
        head.is_null() || head == closed()
    }

    /// Takes everything, oldest first, to the end of `out`.
    pub(crate) fn drain(&self, out: &mut Vec<Arc<T>>) {
        // The common case costs a load, not a write to a shared line.
        let head = self.head.load(Ordering::Relaxed);
        if head.is_null() || head == closed() {
            return;
        }
        // Only this thread closes the stack, so it is not closed between the load and the swap.
        let head = self.head.swap(std::ptr::null_mut(), Ordering::Acquire);
        Self::unlink(head, out);
    }

    /// Refuses every push from now on, and takes what is queued.
    pub(crate) fn close(&self, out: &mut Vec<Arc<T>>) {
        let head = self.head.swap(closed(), Ordering::AcqRel);
        if head != closed() {
            Self::unlink(head, out);
        }
    }

    fn unlink(mut head: *mut T, out: &mut Vec<Arc<T>>) {
        let first = out.len();
        while !head.is_null() {
            // SAFETY: every pointer in the chain came from `into_raw` in `push`, and the swap that gave us
            // the chain gave us its counts: nobody else takes them back. The acquire of that swap pairs
            // with the release of each push (the pushes form a release sequence), so that `next` and what
            // the pusher wrote to the node are visible.
            let node = unsafe { Arc::from_raw(head) };
            head = node.link().next.load(Ordering::Relaxed);
            node.link().queued.store(false, Ordering::Release);
            out.push(node);
        }
        out[first..].reverse();
    }
}

impl<T: Linked> Drop for Stack<T> {
    fn drop(&mut self) {
        self.close(&mut Vec::new());
    }
}

/// Whether the worker sleeps, and so has to be woken.
pub(crate) struct Doorbell {
    asleep: AtomicBool,
}

impl Doorbell {
    pub(crate) fn new() -> Self {
        Doorbell { asleep: AtomicBool::new(false) }
    }

    /// The worker is about to sleep. It must look for work once more after this, before it does.
    pub(crate) fn fall_asleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The worker is awake.
    pub(crate) fn wake_up(&self) {
        // Relaxed: a pusher that still reads `true` rings once for nothing.
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// After work was handed over: whether the caller is the one who has to wake the worker.
    #[must_use]
    pub(crate) fn must_ring(&self) -> bool {
        fence(Ordering::SeqCst);
        // The load keeps the line shared while the worker is awake. Of several pushers one rings.
        self.asleep.load(Ordering::Relaxed)
            && self
                .asleep
                .compare_exchange(true, false, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        value: u32,
        link: Link<Node>,
    }

    impl Node {
        fn new(value: u32) -> Arc<Self> {
            Arc::new(Node { value, link: Link::new() })
        }
    }

    impl Linked for Node {
        fn link(&self) -> &Link<Self> {
            &self.link
        }
    }

    fn values(nodes: &[Arc<Node>]) -> Vec<u32> {
        nodes.iter().map(|n| n.value).collect()
    }

    #[cfg(not(loom))]
    mod plain {
        use super::*;

        #[test]
        fn nodes_come_out_in_the_order_they_went_in_and_can_go_in_again() {
            let stack = Stack::new();
            let (a, b) = (Node::new(1), Node::new(2));
            let mut out = Vec::new();
            for _ in 0..2 {
                assert_eq!(stack.push(a.clone()), Push::Queued);
                assert_eq!(stack.push(a.clone()), Push::AlreadyQueued);
                assert_eq!(stack.push(b.clone()), Push::Queued);
                assert!(!stack.is_empty());
                stack.drain(&mut out);
                assert!(stack.is_empty());
            }
            assert_eq!(values(&out), [1, 2, 1, 2]);
        }

        #[test]
        fn a_closed_stack_refuses_and_keeps_nothing() {
            let stack = Stack::new();
            let (a, b) = (Node::new(1), Node::new(2));
            assert_eq!(stack.push(a.clone()), Push::Queued);
            let mut out = Vec::new();
            stack.close(&mut out);
            assert_eq!(values(&out), [1]);
            assert_eq!(stack.push(b.clone()), Push::Closed);
            assert_eq!(stack.push(b.clone()), Push::Closed);
            stack.drain(&mut out);
            drop((out, stack));
            assert_eq!((Arc::strong_count(&a), Arc::strong_count(&b)), (1, 1));
        }

        #[test]
        fn a_dropped_stack_drops_what_is_queued() {
            let stack = Stack::new();
            let a = Node::new(1);
            assert_eq!(stack.push(a.clone()), Push::Queued);
            drop(stack);
            assert_eq!(Arc::strong_count(&a), 1);
        }

        #[test]
        fn many_threads_push_and_every_node_arrives_once() {
            let rounds = if cfg!(miri) { 20 } else { 2000 };
            let stack = Stack::new();
            let mut out = Vec::new();
            std::thread::scope(|s| {
                let pushers: Vec<_> = (0..4)
                    .map(|t| {
                        let stack = &stack;
                        s.spawn(move || {
                            for i in 0..rounds {
                                assert_eq!(stack.push(Node::new(t * rounds + i)), Push::Queued);
                            }
                        })
                    })
                    .collect();
                while !pushers.iter().all(|p| p.is_finished()) {
                    stack.drain(&mut out);
                }
            });
            stack.drain(&mut out);
            let mut got = values(&out);
            got.sort_unstable();
            assert_eq!(got, (0..4 * rounds).collect::<Vec<_>>());
        }
    }

    /// `make test` runs these with `RUSTFLAGS='--cfg loom'`.
    #[cfg(loom)]
    mod loom {
        use super::*;
        use ::loom::sync::{Condvar, Mutex};
        use ::loom::thread;

        struct Shared {
            stack: Stack<Node>,
            bell: Doorbell,
            rung: Mutex<bool>,
            wake: Condvar,
        }

        impl Shared {
            fn new() -> Arc<Self> {
                Arc::new(Shared {
                    stack: Stack::new(),
                    bell: Doorbell::new(),
                    rung: Mutex::new(false),
                    wake: Condvar::new(),
                })
            }

            fn hand_over(&self, value: u32) -> Push {
                let pushed = self.stack.push(Node::new(value));
                if self.bell.must_ring() {
                    *self.rung.lock().unwrap() = true;
                    self.wake.notify_one();
                }
                pushed
            }

            /// The worker's way of waiting: it deadlocks (which loom reports) if a wake-up is lost.
            fn wait(&self) {
                self.bell.fall_asleep();
                if self.stack.is_empty() {
                    let mut rung = self.rung.lock().unwrap();
                    while !*rung {
                        rung = self.wake.wait(rung).unwrap();
                    }
                    *rung = false;
                }
                self.bell.wake_up();
            }
        }

        #[test]
        fn no_wake_up_is_lost_and_nothing_arrives_twice() {
            ::loom::model(|| {
                let shared = Shared::new();
                let pushers: Vec<_> = (1..=2)
                    .map(|value| {
                        let shared = shared.clone();
                        thread::spawn(move || assert_eq!(shared.hand_over(value), Push::Queued))
                    })
                    .collect();
                let mut got = Vec::new();
                while got.len() < 2 {
                    shared.stack.drain(&mut got);
                    if got.len() < 2 {
                        // A ring that was meant for an earlier sleep may end this one early: allowed.
                        shared.wait();
                    }
                }
                let mut values = values(&got);
                values.sort_unstable();
                assert_eq!(values, [1, 2]);
                for p in pushers {
                    p.join().unwrap();
                }
            });
        }

        #[test]
        fn a_push_that_races_with_the_end_is_either_drained_or_refused() {
            ::loom::model(|| {
                let shared = Shared::new();
                let pusher = {
                    let shared = shared.clone();
                    thread::spawn(move || shared.hand_over(1))
                };
                let mut got = Vec::new();
                shared.stack.close(&mut got);
                match pusher.join().unwrap() {
                    Push::Queued => assert_eq!(got.len(), 1),
                    Push::Closed => assert!(got.is_empty()),
                    Push::AlreadyQueued => unreachable!("pushed once"),
                }
            });
        }

        #[test]
        fn a_node_pushed_by_two_threads_arrives_and_stays_whole() {
            ::loom::model(|| {
                let shared = Shared::new();
                let node = Node::new(7);
                let other = {
                    let (shared, node) = (shared.clone(), node.clone());
                    thread::spawn(move || shared.stack.push(node))
                };
                let ours = shared.stack.push(node.clone());
                let mut got = Vec::new();
                shared.stack.drain(&mut got);
                let theirs = other.join().unwrap();
                shared.stack.drain(&mut got);
                let queued = [&ours, &theirs].into_iter().filter(|p| **p == Push::Queued).count();
                assert_eq!(got.len(), queued);
                assert!(queued >= 1);
            });
        }
    }
}
