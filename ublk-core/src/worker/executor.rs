//! A worker's tasks: futures that are polled on the worker's own thread.

use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

use super::handoff::{Link, Linked};
use super::mailbox::Mailbox;

/// A future of the user's, which answers a request.
pub(crate) type Task = Pin<Box<dyn Future<Output = ()>>>;

/// What a task's wakers share: how the worker finds the task.
pub(crate) struct TaskNode {
    index: usize,
    link: Link<TaskNode>,
    mailbox: Arc<Mailbox>,
}

impl Linked for TaskNode {
    fn link(&self) -> &Link<Self> {
        &self.link
    }
}

impl Wake for TaskNode {
    fn wake(self: Arc<Self>) {
        let node = Arc::clone(&self);
        // Waking twice queues it once. A waker that outlives its task wakes whichever task has the
        // place by then, for nothing.
        node.mailbox.ready(self);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.mailbox.ready(Arc::clone(self));
    }
}

struct Place {
    waker: Waker,
    task: Option<(u32, Task)>,
}

/// How many tasks are polled before the worker commits and reaps again.
const BUDGET: usize = 256;

pub(crate) struct Executor {
    mailbox: Arc<Mailbox>,
    places: Vec<Place>,
    free: Vec<usize>,
    ready: VecDeque<usize>,
    woken: Vec<Arc<TaskNode>>,
}

impl Executor {
    pub(crate) fn new(mailbox: Arc<Mailbox>) -> Self {
        Executor {
            mailbox,
            places: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            woken: Vec::new(),
        }
    }

    /// Takes a task of the queue `key`; it is polled in this turn.
    pub(crate) fn spawn(&mut self, key: u32, task: Task) {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = self.places.len();
                let node = Arc::new(TaskNode {
                    index,
                    link: Link::new(),
                    mailbox: Arc::clone(&self.mailbox),
                });
                let waker = Waker::from(node);
                self.places.push(Place { waker, task: None });
                index
            }
        };
        self.places[index].task = Some((key, task));
        self.ready.push_back(index);
    }

    /// Polls what can go on, up to the budget. Calls `panicked(key)` for a task that panicked.
    pub(crate) fn run(&mut self, mut panicked: impl FnMut(u32)) {
        self.mailbox.take_ready(&mut self.woken);
        self.ready.extend(self.woken.drain(..).map(|node| node.index));
        for _ in 0..BUDGET {
            let Some(index) = self.ready.pop_front() else { return };
            let place = &mut self.places[index];
            let Some((key, task)) = &mut place.task else { continue };
            let key = *key;
            let mut context = Context::from_waker(&place.waker);
            let polled = catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(&mut context)));
            match polled {
                Ok(poll) if poll.is_pending() => {}
                outcome => {
                    if outcome.is_err() {
                        panicked(key);
                    }
                    self.end(index, &mut panicked);
                }
            }
        }
    }

    fn end(&mut self, index: usize, panicked: &mut impl FnMut(u32)) {
        let Some((key, task)) = self.places[index].task.take() else { return };
        self.free.push(index);
        // The destructor is the user's code as well. What it holds of the request answers it.
        if catch_unwind(AssertUnwindSafe(|| drop(task))).is_err() {
            panicked(key);
        }
    }

    /// Whether there is something to poll now.
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Drops the tasks of a queue that has ended.
    pub(crate) fn drop_queue(&mut self, key: u32) {
        for index in 0..self.places.len() {
            if self.places[index].task.as_ref().is_some_and(|(k, _)| *k == key) {
                self.end(index, &mut |_| {});
            }
        }
    }

    #[cfg(test)]
    fn waker(&self, index: usize) -> Waker {
        self.places[index].waker.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;
    use std::task::Poll;

    #[test]
    fn a_task_is_polled_once_for_each_round_of_wake_ups() {
        let mailbox = Mailbox::detached();
        let mut executor = Executor::new(Arc::clone(&mailbox));
        let polls = Rc::new(Cell::new(0));
        let seen = Rc::clone(&polls);
        executor.spawn(
            0,
            Box::pin(std::future::poll_fn(move |_| {
                seen.set(seen.get() + 1);
                if seen.get() == 3 { Poll::Ready(()) } else { Poll::Pending }
            })),
        );
        executor.run(|_| panic!("nobody panicked"));
        executor.run(|_| panic!("nobody panicked"));
        assert_eq!(polls.get(), 1);
        let waker = executor.waker(0);
        for expected in [2, 3, 3] {
            let waker = waker.clone();
            std::thread::spawn(move || {
                waker.wake_by_ref();
                waker.wake();
            })
            .join()
            .unwrap();
            executor.run(|_| panic!("nobody panicked"));
            assert_eq!(polls.get(), expected);
        }
    }

    #[test]
    fn a_panic_ends_its_task_alone() {
        let mut executor = Executor::new(Mailbox::detached());
        let done = Rc::new(Cell::new(false));
        let seen = Rc::clone(&done);
        executor.spawn(1, Box::pin(async { panic!("planted") }));
        executor.spawn(2, Box::pin(async move { seen.set(true) }));
        let mut panics = Vec::new();
        executor.run(|key| panics.push(key));
        assert_eq!((panics, done.get()), (vec![1], true));
        assert!(!executor.has_ready());
    }

    #[test]
    fn an_ended_queue_takes_its_tasks_along() {
        let mut executor = Executor::new(Mailbox::detached());
        let held = Rc::new(());
        for key in [1, 2] {
            let held = Rc::clone(&held);
            executor.spawn(
                key,
                Box::pin(async move {
                    std::future::pending::<()>().await;
                    drop(held);
                }),
            );
        }
        executor.run(|_| ());
        executor.drop_queue(1);
        assert_eq!(Rc::strong_count(&held), 2);
    }
}
