//! A worker's thread: the loop that commits, waits, reaps, and hands requests to their queues' handlers.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::attendant::Attendant;
use super::cell::Shared;
use super::core::{Core, Harvest};
use super::executor::{Executor, Task};
use super::mailbox::Mailbox;
use super::meter::Meter;
use super::queue::{Events, Start};
use super::ring::Ring;
use super::slot::Slot;
use crate::backend::{QueueContext, QueueHandler};
use crate::error::{Error, ErrorKind, Result};

/// Makes a queue's handler, on the worker's thread.
pub(crate) type HandlerFactory = Box<dyn FnOnce() -> Box<dyn QueueHandler> + Send>;

/// What other threads ask of a worker.
pub(crate) enum Message {
    /// Serve a queue.
    Attach(Box<Start>, HandlerFactory),
    /// Answer the requests of a device that are out with EIO, and every later one.
    Revoke { device: u32 },
    /// Answer the requests of a device that are out for longer with EIO, and go on serving.
    RevokeOlder { device: u32, age: Duration },
    /// Drop the ring at once, with everything on it.
    Abandon,
    /// End when no queue is left.
    End,
}

/// A queue's part on the user's side.
struct Served {
    handler: Box<dyn QueueHandler>,
    meter: Arc<Meter>,
}

/// How the loop ended.
enum End {
    /// As asked.
    Quiet,
    /// Somebody took the core away, and has told the devices.
    Taken,
    /// It was told to drop everything.
    Abandoned,
}

pub(crate) struct Worker {
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    attendant: Arc<dyn Attendant>,
    ring: Ring,
    executor: Executor,
    served: Vec<Option<Served>>,
    finished: Vec<Arc<Slot>>,
    harvest: Harvest,
    spawned: Vec<Task>,
    /// Queues that requests of this turn are of.
    touched: Vec<u32>,
    ending: bool,
}

impl Worker {
    pub(crate) fn new(
        shared: Arc<Shared>,
        mailbox: Arc<Mailbox>,
        attendant: Arc<dyn Attendant>,
    ) -> Self {
        Worker {
            ring: Ring::new(Arc::clone(&shared)),
            executor: Executor::new(Arc::clone(&mailbox)),
            shared,
            mailbox,
            attendant,
            touched: Vec::new(),
            served: Vec::new(),
            finished: Vec::new(),
            harvest: Harvest::default(),
            spawned: Vec::new(),
            ending: false,
        }
    }

    /// Serves until told to end. Whatever happens in here, the ring is gone and every device knows when
    /// it returns, unless it returns a [`Wreck`]: that has to be removed when the thread has ended.
    #[must_use]
    pub(crate) fn run(self) -> Option<Wreck> {
        let attendant = Arc::clone(&self.attendant);
        let (mut worker, mut wreck) = (Some(self), None);
        let attended = catch_unwind(AssertUnwindSafe(|| {
            attendant.attend(&mut || {
                if let Some(mut worker) = worker.take() {
                    let ended = catch_unwind(AssertUnwindSafe(|| worker.serve()));
                    wreck = worker.finish(ended);
                }
            });
        }));
        if let Err(panic) = attended {
            let text = panic_text(&*panic);
            tracing::error!(text, "a worker's attendant panicked");
        }
        if let Some(worker) = worker.take() {
            let unattended = Error::new(ErrorKind::WorkerDied, "serve the device")
                .because("its attendant did not let the worker begin");
            wreck = worker.finish(Ok(Err(unattended)));
        }
        wreck
    }

    /// The end of a worker, however it came.
    fn finish(self, ended: std::thread::Result<Result<End>>) -> Option<Wreck> {
        let error = match ended {
            Ok(Ok(End::Quiet | End::Taken)) => None,
            Ok(Ok(End::Abandoned)) => Some(
                Error::new(ErrorKind::WorkerDied, "serve the device")
                    .because("its worker was told to give up"),
            ),
            Ok(Err(error)) => Some(error),
            Err(panic) => {
                let text = panic_text(&*panic);
                Some(Error::new(ErrorKind::WorkerDied, "serve the device").because(format!(
                    "its worker panicked, which is a defect of this library: {text}"
                )))
            }
        };
        let unread = self.mailbox.close();
        let wreck = self.shared.take().and_then(|core| match core.may_go_before_its_thread() {
            true => {
                lose(core, error.as_ref());
                None
            }
            false => Some(Wreck { core, error }),
        });
        for message in unread {
            if let Message::Attach(start, _) = message {
                let gone = Error::new(ErrorKind::WorkerDied, "give the queue to a worker");
                start.events.fetched(start.queue, Err(gone.because("the worker has ended")));
            }
        }
        // What is left is the user's: tasks and handlers. Their destructors are contained.
        let Worker { executor, served, .. } = self;
        let _ = catch_unwind(AssertUnwindSafe(|| drop(executor)));
        for served in served.into_iter().flatten() {
            let _ = catch_unwind(AssertUnwindSafe(|| drop(served)));
        }
        wreck
    }

    fn serve(&mut self) -> Result<End> {
        loop {
            for message in self.mailbox.take_messages() {
                match message {
                    Message::Attach(start, factory) => {
                        if !self.attach(*start, factory)? {
                            return Ok(End::Taken);
                        }
                    }
                    Message::Revoke { .. } | Message::RevokeOlder { .. } => {
                        let Some(mut core) = self.shared.lock() else { return Ok(End::Taken) };
                        revoke(&mut core, &message);
                    }
                    Message::Abandon => return Ok(End::Abandoned),
                    Message::End => self.ending = true,
                }
            }
            self.mailbox.take_finished(&mut self.finished);
            {
                let Some(mut core) = self.shared.lock() else { return Ok(End::Taken) };
                if self.ending && !core.has_queues() {
                    core.drain(&mut self.harvest, DRAIN_LIMIT);
                    return Ok(End::Quiet);
                }
                core.settle(&mut self.finished);
                let nothing_to_do = !self.executor.has_ready()
                    && self.harvest.is_empty()
                    && !core.has_backlog()
                    && self.mailbox.may_sleep();
                let (mailbox, harvest) = (&self.mailbox, &mut self.harvest);
                let (mut core, mut entered) = (Some(core), Ok(()));
                let mut enter = || {
                    let Some(mut core) = core.take() else { return };
                    let waited = core.note_lag();
                    entered = core.enter(u32::from(nothing_to_do && !waited));
                    mailbox.awake();
                    while entered.is_ok() && core.reap(harvest) {
                        entered = core.enter(0);
                    }
                };
                if nothing_to_do {
                    self.attendant.pause(&mut enter);
                }
                // Once only, whatever the attendant did.
                enter();
                entered?;
            }
            self.deliver();
            if !self.harvest.ended.is_empty() && !self.detach_ended() {
                return Ok(End::Taken);
            }
        }
    }

    /// Takes a queue in. False if the core was taken away.
    fn attach(&mut self, start: Start, factory: HandlerFactory) -> Result<bool> {
        let (device, number) = (start.device, start.queue);
        let events = Arc::clone(&start.events);
        let meter = Arc::clone(&start.meter);
        let Ok(handler) = catch_unwind(AssertUnwindSafe(factory)) else {
            let error = Error::new(ErrorKind::Io, "make the queue's handler")
                .on_device(device)
                .on_queue(number)
                .because("it panicked");
            events.fetched(number, Err(error));
            return Ok(true);
        };
        let attached = {
            let Some(mut core) = self.shared.lock() else {
                let gone = Error::new(ErrorKind::WorkerDied, "give the queue to a worker");
                events.fetched(number, Err(gone));
                return Ok(false);
            };
            core.attach(start)
        };
        match attached {
            Ok(key) => {
                let at = key as usize;
                if self.served.len() <= at {
                    self.served.resize_with(at + 1, || None);
                }
                self.served[at] = Some(Served { handler, meter });
                events.fetched(number, Ok(()));
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WorkerDied => Err(error),
            Err(error) => {
                events.fetched(number, Err(error));
                Ok(true)
            }
        }
    }

    /// Runs the user's code for what a turn brought.
    fn deliver(&mut self) {
        if !self.harvest.garbage.is_empty() {
            for keep in self.harvest.garbage.drain(..) {
                let _ = catch_unwind(AssertUnwindSafe(|| drop(keep)));
            }
        }
        for waker in self.harvest.wakers.drain(..) {
            let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        }
        let mut requests = self.harvest.requests.drain(..);
        let mut revoked = false;
        while let Some((key, request)) = requests.next() {
            // Those before it may have taken long.
            if self.mailbox.has_messages() {
                match revoke_meanwhile(&self.mailbox, &self.shared) {
                    Some(some) => revoked |= some,
                    None => break,
                }
            }
            if revoked && request.is_revoked() {
                continue;
            }
            let remaining = requests.len();
            let Some(Some(served)) = self.served.get_mut(key as usize) else {
                drop(request);
                continue;
            };
            let place = (request.device(), request.queue(), request.tag());
            let context = QueueContext::new(&self.ring, &mut self.spawned, remaining);
            let caught = contained(served, context, |handler, context| {
                handler.handle(request, context);
            });
            if let Err(text) = caught {
                let (device, queue, tag) = place;
                tracing::error!(
                    device,
                    queue,
                    tag,
                    text,
                    "the backend panicked: the client gets EIO"
                );
            }
            for task in self.spawned.drain(..) {
                self.executor.spawn(key, task);
            }
            if self.touched.last() != Some(&key) && !self.touched.contains(&key) {
                self.touched.push(key);
            }
        }
        drop(requests);
        for key in self.touched.drain(..) {
            let Some(Some(served)) = self.served.get_mut(key as usize) else { continue };
            let context = QueueContext::new(&self.ring, &mut self.spawned, 0);
            let caught = contained(served, context, |handler, context| {
                handler.turn_ended(context);
            });
            if let Err(text) = caught {
                tracing::error!(text, "the backend panicked at the end of a turn");
            }
            for task in self.spawned.drain(..) {
                self.executor.spawn(key, task);
            }
        }
        let served = &self.served;
        self.executor.run(|key| {
            if let Some(Some(served)) = served.get(key as usize) {
                served.meter.panics.add(1);
            }
        });
    }

    /// Lets go of the queues whose tags have come home. False if the core was taken away.
    fn detach_ended(&mut self) -> bool {
        for key in std::mem::take(&mut self.harvest.ended) {
            let queue = {
                let Some(mut core) = self.shared.lock() else { return false };
                core.detach(key)
            };
            let Some(queue) = queue else { continue };
            let (number, events) = (queue.number(), Arc::clone(queue.events()));
            self.executor.drop_queue(key);
            let served = self.served.get_mut(key as usize).and_then(Option::take);
            let _ = catch_unwind(AssertUnwindSafe(|| drop(served)));
            // The mapping and the file go before the device hears of it: it waits for that to delete.
            drop(queue);
            events.ended(number, false);
        }
        true
    }
}

/// Does what a message about revocation says.
fn revoke(core: &mut Core, message: &Message) {
    let (Message::Revoke { device } | Message::RevokeOlder { device, .. }) = *message else {
        return;
    };
    for key in core.keys_of(device) {
        match *message {
            Message::RevokeOlder { age, .. } => core.revoke_older(key, age),
            _ => core.revoke(key),
        }
    }
}

/// Between two requests of a turn: answers what was revoked since the turn began. Whether there was any; `None` if the
/// core was taken away, and the rest of the turn is nobody's any more.
#[cold]
fn revoke_meanwhile(mailbox: &Mailbox, shared: &Shared) -> Option<bool> {
    let mut core = shared.lock()?;
    let messages = mailbox.take_revocations();
    if messages.is_empty() {
        return Some(false);
    }
    // What has been answered is not late.
    core.commit_finished();
    for message in &messages {
        revoke(&mut core, message);
    }
    // What fails here fails again in the next turn, where somebody hears of it.
    let _ = core.enter(0);
    Some(true)
}

/// Runs a handler's code, and says what it panicked with.
fn contained(
    served: &mut Served,
    mut context: QueueContext<'_>,
    run: impl FnOnce(&mut dyn QueueHandler, &mut QueueContext<'_>),
) -> std::result::Result<(), String> {
    let handler = &mut *served.handler;
    catch_unwind(AssertUnwindSafe(|| run(handler, &mut context))).map_err(|panic| {
        served.meter.panics.add(1);
        panic_text(&*panic).to_owned()
    })
}

/// How long a worker waits at its end for ring operations whose futures were dropped.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// What a worker that died leaves behind where its ring must outlive its thread.
///
/// Drivers before PER_IO_DAEMON abort a dead server's requests once, and what they hand to its thread afterwards is
/// answered by nobody. When the thread ends first, the kernel sees to both.
pub(crate) struct Wreck {
    core: Core,
    error: Option<Error>,
}

impl Wreck {
    pub(crate) fn remove(self) {
        lose(self.core, self.error.as_ref());
    }
}

/// Drops a core with its queues on it, and tells their devices.
pub(crate) fn lose(core: Core, error: Option<&Error>) {
    let listeners = core.listeners();
    drop(core);
    for (queue, events) in listeners {
        if let Some(error) = error {
            let mut told = Error::new(error.kind(), error.attempt().to_owned()).on_queue(queue);
            if let Some(cause) = error.cause() {
                told = told.because(cause.to_owned());
            }
            if let Some(errno) = error.errno() {
                told = told.with_errno(errno);
            }
            events.failed(queue, told);
        }
        events.ended(queue, true);
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    if let Some(text) = panic.downcast_ref::<&str>() {
        text
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text
    } else {
        "(no message)"
    }
}

/// For the listeners of a queue that was never attached.
pub(crate) fn refuse(start: &Start, error: Error) {
    let events: &dyn Events = &*start.events;
    events.fetched(start.queue, Err(error));
}
