//! The part of a worker that the kernel sees: its ring, its queues' commands and descriptors, and the
//! operations in flight.
//!
//! It lives in a [`Shared`] cell whose lock the worker holds while it submits, waits and reaps, and does not
//! hold while user code runs. So whoever has to take a device from a worker that is stuck in user code can
//! take the whole core away, and with it everything that keeps the device open; when the worker comes back,
//! it finds the cell empty and ends.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use io_uring::{cqueue, squeue, types};

use super::batch::Batch;
use super::commands::{Arrived, PerTag};
use super::mailbox::Mailbox;
use super::operations::{Keep, Operations};
use super::queue::{Ending, Events, Overdue, Queue, Start};
use super::slot::{Place, Slot};
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::request::Request;
use crate::sys::clock::{Clock, Stamp};
use crate::uring::sqe::Target;
use crate::uring::worker_ring::{Size, WorkerRing};

/// What a completion's `user_data` says.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) enum Token {
    /// A command of a queue's tag.
    Command { key: u32, tag: u16 },
    /// Somebody rang.
    Bell,
    /// A ring operation.
    Operation(u32),
    /// A cancellation: its own result does not matter, the cancelled operation's does.
    Cancel,
    /// The timer after which idle memory is given back.
    Idle,
    /// A request's pages were to be put into the ring's table.
    Register { key: u32, tag: u16 },
    /// A request's pages leave the ring's table; they may not have got there.
    Unregister,
    /// A queue's tags were offered, all at once.
    Offer { key: u32 },
    /// A queue's fetch of requests in batches.
    Fetch { key: u32 },
    /// A batch of results.
    Commit { key: u32, index: u16 },
}

impl Token {
    pub(crate) fn encode(self) -> u64 {
        match self {
            Token::Command { key, tag } => 1 << 56 | u64::from(key) << 16 | u64::from(tag),
            Token::Bell => 2 << 56,
            Token::Operation(index) => 3 << 56 | u64::from(index),
            Token::Cancel => 4 << 56,
            Token::Idle => 5 << 56,
            Token::Register { key, tag } => 6 << 56 | u64::from(key) << 16 | u64::from(tag),
            Token::Unregister => 7 << 56,
            Token::Offer { key } => 8 << 56 | u64::from(key) << 16,
            Token::Fetch { key } => 9 << 56 | u64::from(key) << 16,
            Token::Commit { key, index } => 10 << 56 | u64::from(key) << 16 | u64::from(index),
        }
    }

    pub(crate) fn decode(word: u64) -> Option<Self> {
        Some(match word >> 56 {
            1 => Token::Command { key: (word >> 16) as u32, tag: word as u16 },
            2 => Token::Bell,
            3 => Token::Operation(word as u32),
            4 => Token::Cancel,
            5 => Token::Idle,
            6 => Token::Register { key: (word >> 16) as u32, tag: word as u16 },
            7 => Token::Unregister,
            8 => Token::Offer { key: (word >> 16) as u32 },
            9 => Token::Fetch { key: (word >> 16) as u32 },
            10 => Token::Commit { key: (word >> 16) as u32, index: word as u16 },
            _ => return None,
        })
    }
}

/// What a turn brought, to be dealt with outside of the lock.
#[derive(Default)]
pub(crate) struct Harvest {
    /// Requests for the handler of queue `key`.
    pub(crate) requests: Vec<(u32, Request)>,
    /// Futures that can go on.
    pub(crate) wakers: Vec<Waker>,
    /// Users' buffers whose futures were dropped.
    pub(crate) garbage: Vec<Keep>,
    /// Queues whose tags have all come home.
    pub(crate) ended: Vec<u32>,
}

impl Harvest {
    pub(crate) fn is_empty(&self) -> bool {
        self.requests.is_empty()
            && self.wakers.is_empty()
            && self.garbage.is_empty()
            && self.ended.is_empty()
    }
}

/// How long a queue is idle before the memory of its buffers is given back.
const IDLE: Duration = Duration::from_secs(1);

/// Places of the largest table of buffers that a ring takes (`IORING_MAX_REG_BUFFERS`).
const MOST_BUFFERS: u32 = 1 << 14;

/// While queues are punished for what takes long: a worker that was busy for longer asks what has come meanwhile before
/// it sleeps.
const SHORT: Duration = Duration::from_millis(100);

/// Pieces of work that an enter does at most before it returns to a thread that defers them, once or twice
/// (`IO_LOCAL_TW_DEFAULT_MAX`, since Linux 6.13).
const PASS: u32 = 20;

/// How often a submission that the kernel has no memory for is tried again.
const SUBMIT_TRIES: u32 = 10_000;

pub(crate) struct Core {
    ring: WorkerRing,
    queues: Vec<Option<Queue>>,
    operations: Operations,
    /// Entries that found the submission queue full. What they point to is kept as for those in it.
    backlog: VecDeque<squeue::Entry>,
    /// Futures that wait for room in the submission queue.
    parked: Vec<Waker>,
    /// Slots that ended and can be committed now.
    settled: Vec<Arc<Slot>>,
    /// Empty; kept for its allocation.
    finished: Vec<Arc<Slot>>,
    /// Sum of the queues' depths.
    admitted: u32,
    /// Queues whose requests come and go in batches.
    batched: u32,
    /// Queues whose driver punishes requests that take long.
    punished: u32,
    /// While there are such: when completions were last collected, which left none behind, and how long before the last
    /// enter that was.
    reaped: Stamp,
    lag: Duration,
    files: Vec<bool>,
    /// Which places of the table of buffers are taken; empty while there is no table.
    buffers: Vec<bool>,
    shared: bool,
    mailbox: Arc<Mailbox>,
    /// Where the kernel puts the event counter's value. Boxed: its address is given to the kernel.
    bell: Box<u64>,
    bell_armed: bool,
    idle_after: Box<io_uring::types::Timespec>,
    idle_armed: bool,
    closing: bool,
    clock: Clock,
}

impl Core {
    pub(crate) fn new(size: Size, mailbox: Arc<Mailbox>) -> Result<Self> {
        Ok(Core {
            ring: WorkerRing::new(size)?,
            queues: Vec::new(),
            operations: Operations::default(),
            backlog: VecDeque::new(),
            parked: Vec::new(),
            settled: Vec::new(),
            finished: Vec::new(),
            admitted: 0,
            batched: 0,
            punished: 0,
            reaped: Stamp::now(),
            lag: Duration::ZERO,
            files: vec![false; size.files as usize],
            buffers: Vec::new(),
            shared: size.shared,
            mailbox,
            bell: Box::new(0),
            bell_armed: false,
            idle_after: Box::new(io_uring::types::Timespec::from(IDLE)),
            idle_armed: false,
            closing: false,
            clock: Clock::new(),
        })
    }

    /// Queues an entry.
    ///
    /// # Safety
    ///
    /// As [`WorkerRing::push`].
    pub(crate) unsafe fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller's promise; an entry in the backlog goes to the same place later.
        if !self.backlog.is_empty() || unsafe { self.ring.push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    /// Room for an operation of a future; otherwise its waker is called after the next enter.
    pub(crate) fn room_or_park(&mut self, waker: &Waker) -> bool {
        let room = self.backlog.is_empty() && self.ring.room() > 0;
        if !room {
            self.parked.push(waker.clone());
        }
        room
    }

    pub(crate) fn operations(&mut self) -> &mut Operations {
        &mut self.operations
    }

    /// Asks the kernel to end a future's operation early.
    pub(crate) fn cancel_operation(&mut self, index: u32) {
        self.cancel(Token::Operation(index));
    }

    /// Asks the kernel to end something early. What is cancelled completes by itself, sooner or later.
    fn cancel(&mut self, token: Token) {
        let entry = io_uring::opcode::AsyncCancel::new(token.encode())
            .build()
            .user_data(Token::Cancel.encode());
        // SAFETY: the entry has no addresses.
        unsafe { self.push(entry) };
    }

    /// Takes a queue in: registers its device's file and submits the first fetch of each of its tags.
    ///
    /// # Errors
    ///
    /// With [`ErrorKind::TooMany`] if the worker's tables are full, and what the kernel refuses.
    pub(crate) fn attach(&mut self, start: Start) -> Result<u32> {
        let (device, number, depth) = (start.device, start.queue, start.depth);
        let events = Arc::clone(&start.events);
        let fail = |e: Error| e.on_device(device).on_queue(number);
        // One completion of a command and one of the operation behind it for each tag, and the bell.
        let limit = self.ring.completions();
        if self.admitted + u32::from(depth) > limit {
            return Err(fail(
                Error::new(ErrorKind::TooMany, "give the queue to a worker")
                    .because(format!(
                        "the worker serves {} tags, its completion queue holds {limit}, the queue has {depth}",
                        self.admitted
                    ))
                    .remedy_is("use more workers, or less queue depth"),
            ));
        }
        let first_index = match start.path.registers() {
            true => self.places_for(depth).map_err(fail)?,
            false => 0,
        };
        let target = self.target(&start).map_err(fail)?;
        let key = match self.queues.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                self.queues.push(None);
                self.queues.len() - 1
            }
        };
        let key = u32::try_from(key).unwrap_or(u32::MAX);
        let commands = PerTag::new(number, target, start.encoding, start.path);
        let batch = match start.batched {
            true => match Batch::new(&self.ring, key, target, &start) {
                Ok(batch) => Some(batch),
                Err(errno) => {
                    // Left in the table it would keep the device from being deleted.
                    if let Some(file) = commands.file() {
                        self.ring.unregister_file(file);
                    }
                    return Err(fail(
                        Error::new(ErrorKind::Io, "give io_uring buffers").with_errno(errno),
                    ));
                }
            },
            false => None,
        };
        let mut queue = Queue::new(key, commands, batch, first_index, start, &self.mailbox);
        for entry in queue.offer() {
            // SAFETY: the addresses are the slots' buffers, which the queue keeps until every tag is home, or
            // those of a batch's elements, which it keeps until they are offered.
            unsafe { self.push(entry) };
        }
        if let Some(file) = commands.file() {
            self.files[file as usize] = true;
        }
        self.take_places(&queue, true);
        self.batched += u32::from(queue.batch().is_some());
        if queue.is_punished() {
            if self.punished == 0 {
                self.reaped = self.clock.now();
            }
            self.punished += 1;
        }
        self.admitted += u32::from(depth);
        self.queues[key as usize] = Some(queue);
        // The fetches have to reach the kernel before START can end; their completions are not waited for.
        for _ in 0..SUBMIT_TRIES {
            self.enter(0)?;
            if self.backlog.is_empty() && self.ring.queued() == 0 {
                return Ok(key);
            }
        }
        // It is here and lets go of its tags as any other; so it is not refused, but has failed.
        let error = Error::new(ErrorKind::TooMany, "submit the first fetch of every tag")
            .because("the kernel has no memory for the commands");
        events.failed(number, fail(error));
        Ok(key)
    }

    /// How the commands of a queue name its device's file: by a registration, unless that would keep the
    /// device from being deleted for as long as others on the ring are idle.
    fn target(&mut self, start: &Start) -> Result<Target> {
        let fd = start.char_device.as_raw_fd();
        if self.shared && !self.ring.forgets_files_at_once() {
            // Open as long as the queue is here: it keeps `start`.
            return Ok(Target::Fd(types::Fd(fd)));
        }
        let Some(file) = self.files.iter().position(|used| !used) else {
            return Err(Error::new(ErrorKind::TooMany, "give the queue to a worker")
                .because(format!("its table of {} files is full", self.files.len()))
                .remedy_is("use more workers"));
        };
        let index = u32::try_from(file).unwrap_or(u32::MAX);
        self.ring.register_file(index, fd).map_err(|errno| {
            Error::new(ErrorKind::Io, "register /dev/ublkcN with the ring").with_errno(errno)
        })?;
        Ok(Target::Fixed(types::Fixed(index)))
    }

    /// Neighbouring places in the table of buffers, one a tag. The first queue that needs some makes the table.
    fn places_for(&mut self, depth: u16) -> Result<u16> {
        if self.buffers.is_empty() {
            let count = if self.shared { MOST_BUFFERS } else { u32::from(depth) };
            self.ring.make_buffer_table(count).map_err(|errno| {
                Error::new(ErrorKind::TooMany, "make a table of buffers for io_uring")
                    .with_errno(errno)
            })?;
            self.buffers = vec![false; count as usize];
        }
        let free = self.buffers.windows(depth.into()).position(|w| w.iter().all(|used| !used));
        free.and_then(|first| u16::try_from(first).ok()).ok_or_else(|| {
            Error::new(ErrorKind::TooMany, "give the queue to a worker")
                .because(format!(
                    "its table of {} buffers has no {depth} places in a row left",
                    self.buffers.len()
                ))
                .remedy_is("use more workers, less queue depth, or a data path that copies")
        })
    }

    fn take_places(&mut self, queue: &Queue, taken: bool) {
        if queue.registers() {
            let first = usize::from(queue.first_index());
            self.buffers[first..first + usize::from(queue.depth())].fill(taken);
        }
    }

    /// The place in the table of buffers where a request's pages are, or will be by the time that the next
    /// entry is taken; `None` if they have to be copied.
    pub(crate) fn pages_of(&mut self, slot: &Slot) -> Option<u16> {
        let reach = slot.reach()?;
        if reach.may_register() {
            let Place { key, tag, .. } = slot.place();
            let entry = self.queue(key)?.commands().register(tag, reach.index());
            reach.set_registered();
            // SAFETY: the entry has no address.
            unsafe { self.push(entry.user_data(Token::Register { key, tag }.encode())) };
        }
        reach.is_registered().then_some(reach.index())
    }

    /// Whether the request of a slot came to this worker.
    pub(crate) fn issued(&self, slot: &Slot) -> bool {
        Arc::ptr_eq(slot.mailbox(), &self.mailbox)
    }

    /// How an entry names the file of the device that a slot's request is of.
    pub(crate) fn target_of(&mut self, slot: &Slot) -> Option<Target> {
        Some(self.queue(slot.place().key)?.commands().target())
    }

    fn queue(&mut self, key: u32) -> Option<&mut Queue> {
        self.queues.get_mut(key as usize)?.as_mut()
    }

    /// Lets go of a queue whose tags have come home: of its mapping, its registration and its device's file.
    pub(crate) fn detach(&mut self, key: u32) -> Option<Queue> {
        let mut queue = self.queues.get_mut(key as usize)?.take()?;
        if let Some(batch) = queue.take_batch() {
            batch.free(&self.ring);
            self.batched -= 1;
        }
        self.punished -= u32::from(queue.is_punished());
        if let Some(file) = queue.commands().file() {
            self.ring.unregister_file(file);
            self.files[file as usize] = false;
        }
        self.take_places(&queue, false);
        self.admitted -= u32::from(queue.depth());
        Some(queue)
    }

    pub(crate) fn has_queues(&self) -> bool {
        self.queues.iter().any(Option::is_some)
    }

    /// Requests have ended: their results are committed.
    pub(crate) fn settle(&mut self, finished: &mut Vec<Arc<Slot>>) {
        self.settled.append(finished);
        if self.settled.is_empty() {
            return;
        }
        let now = self.clock.now();
        let mut settled = std::mem::take(&mut self.settled);
        for slot in settled.drain(..) {
            self.settle_one(slot, now);
        }
        if self.settled.is_empty() {
            // Keeps the allocation.
            self.settled = settled;
        }
        self.flush();
    }

    /// Commits what has ended so far, in the middle of a turn.
    pub(crate) fn commit_finished(&mut self) {
        let mut finished = std::mem::take(&mut self.finished);
        self.mailbox.take_finished(&mut finished);
        if !finished.is_empty() {
            self.settle(&mut finished);
            // What failed here fails again in the next turn, where somebody hears of it.
            let _ = self.enter(0);
        }
        self.finished = finished;
    }

    /// The worker's clock.
    pub(crate) fn now(&mut self) -> Stamp {
        self.clock.now()
    }

    /// Commits what was collected for batches.
    fn flush(&mut self) {
        if self.batched == 0 {
            return;
        }
        for at in 0..self.queues.len() {
            let batch = self.queues[at].as_mut().and_then(Queue::batch);
            if let Some(entry) = batch.and_then(Batch::flush) {
                // SAFETY: the address is of the elements, which the batch keeps until they are committed.
                unsafe { self.push(entry) };
            }
        }
    }

    fn settle_one(&mut self, slot: Arc<Slot>, now: Stamp) {
        if slot.operations() > 0 {
            // The commit waits for what the kernel still does with the buffer.
            let pending: Vec<_> = self.operations.on_slot(&slot).collect();
            for index in pending {
                self.cancel(Token::Operation(index));
            }
            return;
        }
        let place = slot.place();
        let Some(queue) = self.queue(place.key) else { return };
        if let Some(Ending { release, commit }) = queue.settle(slot, now) {
            for entry in release.into_iter().chain(commit) {
                // SAFETY: the address is the slot's buffer, which the queue keeps until every tag is home.
                unsafe { self.push(entry) };
            }
        }
    }

    /// Answers every request of the queue that is out with EIO, and from now on every new one.
    pub(crate) fn revoke(&mut self, key: u32) {
        let Some(queue) = self.queue(key) else { return };
        let entries = queue.revoke(Stamp::now());
        for entry in entries {
            // SAFETY: the address is the buffer of the slot that the queue keeps for the tag.
            unsafe { self.push(entry) };
        }
        // What still works on the clients' own pages keeps their requests from ending.
        let pending: Vec<_> = self.operations.on_lost_requests(key).collect();
        for index in pending {
            self.cancel(Token::Operation(index));
        }
        self.flush();
    }

    /// Answers the requests of the queue that are out for longer than `age` with EIO; the queue is served on.
    pub(crate) fn revoke_older(&mut self, key: u32, age: Duration) {
        let Some(queue) = self.queue(key) else { return };
        let Overdue { entries, slots } = queue.revoke_older(age, Stamp::now());
        for entry in entries {
            // SAFETY: the address is the buffer of the slot that the queue keeps for the tag.
            unsafe { self.push(entry) };
        }
        for slot in slots {
            let pending: Vec<_> = self.operations.on_slot(&slot).collect();
            for index in pending {
                self.cancel(Token::Operation(index));
            }
        }
        self.flush();
    }

    /// Hands the entries to the kernel and waits for `want` completions.
    pub(crate) fn enter(&mut self, want: u32) -> Result<()> {
        if !self.bell_armed && !self.closing {
            self.arm_bell();
        }
        // What waits for room in the submission queue may be the bell itself, or what ends what is waited for.
        let want = if self.backlog.is_empty() { want } else { 0 };
        self.mailbox.enters.add(1);
        self.ring.enter(want)?;
        while let Some(entry) = self.backlog.front() {
            // SAFETY: what the entry points to is kept since it was put here.
            if unsafe { self.ring.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
        Ok(())
    }

    fn arm_bell(&mut self) {
        let Some(fd) = self.mailbox.event_fd() else { return };
        let entry = io_uring::opcode::Read::new(
            io_uring::types::Fd(fd),
            (&raw mut *self.bell).cast(),
            size_of::<u64>() as u32,
        )
        .build()
        .user_data(Token::Bell.encode());
        self.bell_armed = true;
        // SAFETY: the counter is boxed, so its address is stable; the box is freed only after the ring, or
        // leaked with it (see `Drop`), and nothing else touches it.
        unsafe { self.push(entry) };
    }

    fn arm_idle_timer(&mut self) {
        if self.idle_armed || self.closing {
            return;
        }
        self.idle_armed = true;
        let entry = io_uring::opcode::Timeout::new(&raw const *self.idle_after)
            .build()
            .user_data(Token::Idle.encode());
        // SAFETY: the time is boxed and never changed; freed as the bell.
        unsafe { self.push(entry) };
    }

    /// Whether entries wait for the kernel.
    pub(crate) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty() || !self.parked.is_empty() || !self.settled.is_empty()
    }

    /// Before an enter whose completions will be collected, all of which may have waited since the last were. Whether that
    /// is so long that the enter must not sleep: what comes while it does has not waited at all.
    pub(crate) fn note_lag(&mut self) -> bool {
        self.lag = match self.punished {
            0 => Duration::ZERO,
            _ => self.clock.now().since(self.reaped),
        };
        self.lag > SHORT
    }

    /// Collects what has completed. Whether there may be more, which has waited as long, and which the next enter brings.
    pub(crate) fn reap(&mut self, harvest: &mut Harvest) -> bool {
        harvest.wakers.append(&mut self.parked);
        let mut now = (self.punished > 0).then(|| self.clock.now());
        self.reaped = now.unwrap_or(self.reaped);
        let lag = self.lag;
        let mut idle = false;
        let Core { ring, queues, operations, settled, bell_armed, idle_armed, clock, .. } = self;
        let mut again = Vec::new();
        let mut tags = Vec::new();
        let mut hand_over = false;
        let collected = ring.reap(|word, result, flags| match Token::decode(word) {
            Some(Token::Command { key, tag }) => {
                let Some(Some(queue)) = queues.get_mut(key as usize) else {
                    tracing::error!(key, tag, "a completion for a queue that is gone");
                    return;
                };
                match PerTag::interpret(result) {
                    Arrived::NeedsBuffer => again.extend(queue.needs_buffer(tag)),
                    Arrived::Request => {
                        let now = *now.get_or_insert_with(|| clock.now());
                        match queue.arrived(tag, now, lag) {
                            Ok(request) => harvest.requests.push((key, request)),
                            Err(slot) => settled.extend(slot),
                        }
                    }
                    Arrived::Home => {
                        if queue.came_home(tag) {
                            harvest.ended.push(key);
                        }
                    }
                    Arrived::Rejected(errno) => again.extend(queue.rejected(tag, errno)),
                }
            }
            Some(Token::Fetch { key }) => {
                let Some(Some(queue)) = queues.get_mut(key as usize) else { return };
                let Some(batch) = queue.batch() else { return };
                let (array, more) = (cqueue::buffer_select(flags), cqueue::more(flags));
                let fetched = batch.fetched(result, array, more, &mut tags);
                // Another worker waits for its turn.
                hand_over |= fetched.again.is_some() && queue.is_shared();
                again.extend(fetched.again);
                for tag in tags.drain(..) {
                    let now = *now.get_or_insert_with(|| clock.now());
                    match queue.arrived(tag, now, lag) {
                        Ok(request) => harvest.requests.push((key, request)),
                        Err(slot) => settled.extend(slot),
                    }
                }
                if let Some(errno) = fetched.failure {
                    queue.fetch_failed(errno);
                }
                harvest.ended.extend(queue.batch_has_come_home().then_some(key));
            }
            Some(Token::Commit { key, index }) => {
                let Some(Some(queue)) = queues.get_mut(key as usize) else { return };
                let Some(batch) = queue.batch() else { return };
                let committed = batch.committed(index, result);
                again.extend(committed.again);
                if let Some((tag, errno)) = committed.rejected {
                    // What it is tried again with is collected.
                    again.extend(queue.rejected(tag, errno));
                }
                harvest.ended.extend(queue.batch_has_come_home().then_some(key));
            }
            Some(Token::Offer { key }) => {
                let Some(Some(queue)) = queues.get_mut(key as usize) else { return };
                if let Some(batch) = queue.batch() {
                    batch.offered();
                }
                if let Some(errno) = Errno::from_result(result).filter(|e| *e != Errno::ENODEV) {
                    queue.offer_rejected(errno);
                }
            }
            Some(Token::Bell) => *bell_armed = false,
            Some(Token::Operation(index)) => {
                let done = operations.complete(index, result);
                harvest.wakers.extend(done.wake);
                harvest.garbage.extend(done.garbage);
                settled.extend(done.quiet.filter(|slot| slot.outcome().is_some()));
            }
            Some(Token::Register { key, tag }) => {
                if let (Some(errno), Some(Some(queue))) =
                    (Errno::from_result(result), queues.get(key as usize))
                {
                    tracing::debug!(tag, %errno, "a request's pages could not be registered");
                    queue.not_registered(tag);
                }
            }
            Some(Token::Cancel | Token::Unregister) => {}
            Some(Token::Idle) => {
                *idle_armed = false;
                idle = true;
            }
            None => tracing::error!(word, result, "a completion that nobody asked for"),
        });
        for entry in again {
            // SAFETY: the address is the buffer of the slot that the queue keeps for the tag, or of the elements
            // that its batch keeps.
            unsafe { self.push(entry) };
        }
        self.flush();
        if hand_over {
            // What is wrong with the ring, the next enter says again.
            let _ = self.enter(0);
        }
        if idle || !harvest.requests.is_empty() {
            self.look_after_memory(idle);
        }
        self.punished > 0 && collected >= PASS
    }

    /// Gives the buffers' memory back once a queue was idle for a while. Only where completions arrive
    /// inside of an enter alone: elsewhere the kernel may be filling a buffer this very moment.
    fn look_after_memory(&mut self, timer_fired: bool) {
        if !self.ring.delivers_only_in_enter() {
            return;
        }
        // A commit that the kernel has not taken yet still needs its buffer's data, and so does a request
        // whose completion has not been seen.
        let quiet = self.backlog.is_empty() && self.ring.is_quiet();
        let timer_fired = timer_fired && quiet;
        let mut active = false;
        for queue in self.queues.iter_mut().flatten() {
            active |=
                if timer_fired { queue.give_back_if_idle() } else { queue.has_touched_memory() };
        }
        if active {
            self.arm_idle_timer();
        }
    }

    /// Whether the ring may be closed while its thread lives: if it is empty, or the driver is of the kind that lets
    /// completions wait for the next enter.
    pub(crate) fn may_go_before_its_thread(&self) -> bool {
        self.ring.delivers_only_in_enter() || !self.has_queues()
    }

    /// The queues' numbers and whom to tell of them.
    pub(crate) fn listeners(&self) -> Vec<(u16, Arc<dyn Events>)> {
        self.queues.iter().flatten().map(|q| (q.number(), Arc::clone(q.events()))).collect()
    }

    /// The worker's numbers of the queues of a device.
    pub(crate) fn keys_of(&self, device: u32) -> Vec<u32> {
        let keys = self.queues.iter().flatten().filter(|q| q.device() == device);
        keys.map(Queue::key).collect()
    }

    /// Cancels everything in flight and waits for it, a bounded time. For a worker without queues that ends.
    pub(crate) fn drain(&mut self, harvest: &mut Harvest, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.closing = true;
        let mut pending: Vec<_> = self.operations.all_in_flight().map(Token::Operation).collect();
        pending.extend(self.bell_armed.then_some(Token::Bell));
        pending.extend(self.idle_armed.then_some(Token::Idle));
        for token in pending {
            self.cancel(token);
        }
        while self.operations.in_flight() > 0 || self.bell_armed || self.idle_armed {
            if Instant::now() >= deadline || self.enter(1).is_err() {
                return;
            }
            self.reap(harvest);
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.bell_armed || self.idle_armed {
            // The kernel cancels these reads some time after the ring is closed: 8 and 16 bytes are left to
            // it for good.
            std::mem::forget(std::mem::take(&mut self.bell));
            let timer =
                std::mem::replace(&mut self.idle_after, Box::new(io_uring::types::Timespec::new()));
            std::mem::forget(timer);
        }
        for queue in self.queues.drain(..).flatten() {
            queue.leave_to_the_kernel();
        }
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
