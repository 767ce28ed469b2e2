//! A queue as its worker sees it: which tags are out, which are home, and what is committed for each.

use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry;

use super::batch::Batch;
use super::commands::PerTag;
use super::core::Token;
use super::mailbox::Mailbox;
use super::meter::Meter;
use super::path::DataPath;
use super::portal::{Portal, Reach};
use super::shared::SharedBuffers;
use super::slot::{Buffer, Outcome, Place, Slot};
use crate::control::Integrity;
use crate::error::{Errno, Error, ErrorKind};
use crate::request::{Op, Request};
use crate::sys::clock::Stamp;
use crate::sys::fork::OwnFd;
use crate::sys::memory::{Backing, Descriptors, Region, page_size};
use crate::uapi;
use crate::uring::sqe::Encoding;

/// What ends a request.
pub(crate) struct Ending {
    /// Takes its pages out of the ring's table.
    pub(crate) release: Option<Entry>,
    /// Unless it is collected for a batch.
    pub(crate) commit: Option<Entry>,
}

/// What a queue tells its device.
pub(crate) trait Events: Send + Sync {
    /// The worker submitted the first fetch of every tag, or could not.
    fn fetched(&self, queue: u16, result: crate::Result<()>);
    /// The queue cannot go on: the device has to be taken down.
    fn failed(&self, queue: u16, error: Error);
    /// Every tag came home and the worker has let go of the device's file, or (`lost`) its ring is gone.
    fn ended(&self, queue: u16, lost: bool);
}

/// What a worker needs to serve a queue.
pub(crate) struct Start {
    pub(crate) device: u32,
    pub(crate) queue: u16,
    /// In batches any lane may be given any tag; otherwise each has its own.
    pub(crate) lane: Lane,
    pub(crate) depth: u16,
    /// The size of each tag's buffer, in bytes.
    pub(crate) buffer: u32,
    pub(crate) backing: Backing,
    pub(crate) encoding: Encoding,
    pub(crate) char_device: Arc<OwnFd>,
    pub(crate) descriptors: Descriptors,
    /// The tags' buffers and one more, see [`Queue::region_for`].
    pub(crate) region: Arc<Region>,
    pub(crate) path: DataPath,
    /// Requests come and go in batches.
    pub(crate) batched: bool,
    pub(crate) shared: Arc<SharedBuffers>,
    /// Appends say where they went.
    pub(crate) zoned: bool,
    /// Metadata beside the data.
    pub(crate) integrity: Option<Integrity>,
    pub(crate) meter: Arc<Meter>,
    pub(crate) events: Arc<dyn Events>,
}

/// What a revocation by age comes to: commands, and the slots whose operations are to be cancelled.
#[derive(Default)]
pub(crate) struct Overdue {
    pub(crate) entries: Vec<Entry>,
    pub(crate) slots: Vec<Arc<Slot>>,
}

/// Which part of a queue a worker serves, where several share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lane {
    pub(crate) index: u16,
    pub(crate) count: u16,
}

impl Lane {
    /// Whether the tag's commands are this lane's.
    fn owns(self, tag: u16) -> bool {
        tag % self.count == self.index
    }

    /// How many of a queue's tags are this lane's.
    fn tags(self, depth: u16) -> u16 {
        (depth - self.index).div_ceil(self.count)
    }
}

pub(crate) struct Queue {
    start: Start,
    key: u32,
    commands: PerTag,
    /// Where requests come and go in batches.
    batch: Option<Batch>,
    /// Unless the driver copies.
    portal: Option<Arc<Portal>>,
    /// The place of tag 0's pages in the ring's table of buffers; the other tags' follow.
    first_index: u16,
    slots: Vec<Arc<Slot>>,
    /// Tags whose command came back for good.
    home: u16,
    /// The device ends: new requests are answered with EIO at once.
    refusing: bool,
    /// Commands that the kernel rejected, in a row.
    rejections: u32,
    failed: bool,
    /// Requests came since the buffers' memory was last given back, and since the timer last fired.
    touched: bool,
    busy: bool,
    /// What each tag's last request wanted; `None` before its first.
    ops: Vec<Option<Op>>,
    mailbox: Arc<Mailbox>,
}

impl Queue {
    /// The size of a buffer in the region: whole pages, so that memory can be given back tag by tag.
    fn stride(buffer: u32) -> usize {
        (buffer as usize).next_multiple_of(page_size())
    }

    /// The memory of a queue's buffers: one a tag, and a last one that all tags share once the queue
    /// refuses everything and nobody looks at the data any more.
    pub(crate) fn region_for(depth: u16, buffer: u32, backing: Backing) -> Result<Region, Errno> {
        Region::new((usize::from(depth) + 1) * Self::stride(buffer), backing)
    }

    pub(crate) fn new(
        key: u32,
        commands: PerTag,
        batch: Option<Batch>,
        first_index: u16,
        start: Start,
        mailbox: &Arc<Mailbox>,
    ) -> Self {
        let portal = match start.path.is_copied_by_driver() {
            true => None,
            false => Some(Portal::new(&start.char_device, start.path, start.integrity)),
        };
        let mut queue = Queue {
            key,
            commands,
            batch,
            portal,
            first_index,
            slots: Vec::new(),
            home: 0,
            refusing: false,
            rejections: 0,
            failed: false,
            touched: false,
            busy: false,
            ops: vec![None; usize::from(start.depth)],
            mailbox: Arc::clone(mailbox),
            start,
        };
        let slots = (0..queue.start.depth).map(|tag| {
            let at = usize::from(tag) * Self::stride(queue.start.buffer);
            queue.slot(tag, Buffer::new(Arc::clone(&queue.start.region), at, queue.start.buffer))
        });
        queue.slots = slots.collect();
        queue
    }

    fn slot(&self, tag: u16, buffer: Buffer) -> Arc<Slot> {
        let place =
            Place { device: self.start.device, queue: self.start.queue, tag, key: self.key };
        let reach = self.portal.as_ref().map(|p| Reach::new(Arc::clone(p), self.first_index + tag));
        Slot::new(place, buffer, reach, Arc::clone(&self.mailbox))
    }

    /// The slot for a tag whose buffer nobody will look at.
    fn sink(&self, tag: u16) -> Arc<Slot> {
        let at = usize::from(self.start.depth) * Self::stride(self.start.buffer);
        self.slot(tag, Buffer::new(Arc::clone(&self.start.region), at, self.start.buffer))
    }

    /// The commands that offer the tags to the kernel for the first time.
    pub(crate) fn offer(&mut self) -> Vec<Entry> {
        let (key, commands) = (self.key, self.commands);
        match &mut self.batch {
            Some(batch) => {
                let slots = self.slots.iter().map(|slot| &**slot);
                let offer = (self.start.lane.index == 0).then(|| batch.offer(slots));
                offer.into_iter().chain([batch.fetch()]).collect()
            }
            None => {
                let entry = |slot: &Arc<Slot>| {
                    let token = Token::Command { key, tag: slot.place().tag };
                    commands.fetch(slot).user_data(token.encode())
                };
                let lane = self.start.lane;
                self.slots.iter().filter(|slot| lane.owns(slot.place().tag)).map(entry).collect()
            }
        }
    }

    /// The command that commits a result for the tag, unless that is collected.
    fn commit(&mut self, tag: u16, result: i32) -> Option<Entry> {
        let slot = self.slots.get(usize::from(tag))?;
        if let Some(batch) = &mut self.batch {
            batch.commit(slot, result);
            return None;
        }
        let token = Token::Command { key: self.key, tag }.encode();
        Some(self.commands.commit(slot, result).user_data(token))
    }

    /// Where requests come and go in batches.
    pub(crate) fn batch(&mut self) -> Option<&mut Batch> {
        self.batch.as_mut()
    }

    pub(crate) fn take_batch(&mut self) -> Option<Batch> {
        self.batch.take()
    }

    pub(crate) fn commands(&self) -> PerTag {
        self.commands
    }

    pub(crate) fn first_index(&self) -> u16 {
        self.first_index
    }

    /// Whether the ring's table of buffers has places for the queue's tags.
    pub(crate) fn registers(&self) -> bool {
        self.start.path.registers()
    }

    /// Whether several workers serve the queue.
    pub(crate) fn is_shared(&self) -> bool {
        self.start.lane.count > 1
    }

    /// Whether the driver punishes requests that take long.
    pub(crate) fn is_punished(&self) -> bool {
        self.start.meter.is_punished()
    }

    pub(crate) fn depth(&self) -> u16 {
        self.start.depth
    }

    pub(crate) fn key(&self) -> u32 {
        self.key
    }

    pub(crate) fn device(&self) -> u32 {
        self.start.device
    }

    pub(crate) fn number(&self) -> u16 {
        self.start.queue
    }

    pub(crate) fn events(&self) -> &Arc<dyn Events> {
        &self.start.events
    }

    /// A request is in the descriptor of `tag`, for `lag` at most. What is not for the backend comes back as a slot that has
    /// ended (`None` only for a completion that makes no sense, which is logged).
    pub(crate) fn arrived(
        &mut self,
        tag: u16,
        now: Stamp,
        lag: Duration,
    ) -> Result<Request, Option<Arc<Slot>>> {
        let (Some(slot), Some(desc)) =
            (self.slots.get(usize::from(tag)), self.start.descriptors.read(tag))
        else {
            tracing::error!(device = self.start.device, tag, "a request with an impossible tag");
            return Err(None);
        };
        if !slot.issue() {
            tracing::error!(device = self.start.device, tag, "a second request on a tag");
            return Err(None);
        }
        let slot = Arc::clone(slot);
        self.rejections = 0;
        self.touched = true;
        self.busy = true;
        self.start.meter.arrived(tag, now, lag);
        let end = |errno| {
            let outcome = Outcome { result: Err(errno), dropped: false, keeps_buffer: false };
            let ended = slot.finish(outcome);
            debug_assert!(ended, "issued just now");
            Err(Some(Arc::clone(&slot)))
        };
        let op = Op::from_uapi(desc.op());
        // An operation that this crate does not know counts as a flush: it has no data.
        self.ops[usize::from(tag)] = Some(op.unwrap_or(Op::Flush));
        if self.refusing {
            self.start.meter.refused.add(1);
            return end(Errno::EIO);
        }
        let Some(op) = op else {
            return end(Errno::EOPNOTSUPP);
        };
        let bytes = u64::from(desc.nr_sectors) << 9;
        if op.has_data() && bytes > u64::from(slot.buffer().len()) {
            // The limits that the device was made with rule this out.
            tracing::error!(device = self.start.device, tag, bytes, "a request beyond its buffer");
            return end(Errno::EIO);
        }
        if let Some(reach) = slot.reach()
            && self.start.path == DataPath::AutoBufReg
            && op.has_data()
        {
            if desc.op_flags & uapi::UBLK_IO_F_NEED_REG_BUF == 0 {
                reach.set_registered();
            } else {
                reach.set_refused();
                self.start.meter.unregistered.add(1);
            }
        }
        let flagged = desc.op_flags & uapi::UBLK_IO_F_SHMEM_ZC != 0;
        // The driver has not brought the data of such a request.
        let the_only_way = self.portal.is_none();
        let shared = match flagged && op.has_data() {
            true => self.start.shared.part_of(&desc, bytes, the_only_way),
            false => None,
        };
        // Elsewhere it is a request like any other: what a former server knew of its memory is no loss.
        if flagged && shared.is_none() && the_only_way {
            tracing::error!(
                device = self.start.device,
                tag,
                "a request in shared memory that is unknown: a former server's?"
            );
            return end(Errno::EIO);
        }
        slot.set_shared(shared.is_some());
        if shared.is_some() {
            self.start.meter.shared.add(1);
        }
        Ok(Request::new(slot, op, &desc, shared))
    }

    fn op_of(&self, tag: u16) -> Op {
        self.ops[usize::from(tag)].unwrap_or(Op::Flush)
    }

    /// A write has come whose data is to be put somewhere.
    pub(crate) fn needs_buffer(&self, tag: u16) -> Option<Entry> {
        let token = Token::Command { key: self.key, tag }.encode();
        Some(self.commands.need_get_data(self.slots.get(usize::from(tag))?).user_data(token))
    }

    /// The ring would not take a request's pages.
    pub(crate) fn not_registered(&self, tag: u16) {
        self.start.meter.unregistered.add(1);
        if let Some(reach) = self.slots.get(usize::from(tag)).and_then(|slot| slot.reach()) {
            reach.set_refused();
        }
    }

    /// The request of `slot` ends: its pages leave the ring's table, if they are there.
    fn release_pages(&self, slot: &Slot) -> Option<Entry> {
        let reach = slot.reach()?;
        let token = Token::Unregister.encode();
        let tag = slot.place().tag;
        reach.forget().then(|| self.commands.unregister(tag, reach.index()).user_data(token))
    }

    /// The commands that commit what `slot` ended with, in their order; none if it is not the tag's any more,
    /// or has to wait.
    pub(crate) fn settle(&mut self, slot: Arc<Slot>, now: Stamp) -> Option<Ending> {
        let tag = slot.place().tag;
        let current = self.slots.get(usize::from(tag))?;
        if !Arc::ptr_eq(current, &slot) {
            return None;
        }
        let outcome = slot.outcome()?;
        let op = self.op_of(tag);
        self.start.meter.ended(tag, op, outcome.result.ok().map(u64::from), now);
        if outcome.dropped {
            self.start.meter.dropped.add(1);
            tracing::warn!(
                device = self.start.device,
                queue = self.start.queue,
                tag,
                ?op,
                "a request was dropped without an answer: the client gets EIO"
            );
        }
        let mut result = match outcome.result {
            Ok(bytes) => i32::try_from(bytes).unwrap_or(i32::MAX),
            Err(errno) => -errno.raw(),
        };
        let release = self.release_pages(&slot);
        if outcome.keeps_buffer {
            match self.replacement(&slot, outcome) {
                Ok(fresh) => self.slots[usize::from(tag)] = fresh,
                Err(errno) => {
                    result = -errno.raw();
                    self.slots[usize::from(tag)] = self.give_up(tag, errno);
                }
            }
        } else {
            slot.recycle();
        }
        Some(Ending { release, commit: self.commit(tag, result) })
    }

    /// A slot with fresh memory for the tag of `old`, whose buffer somebody keeps. The data of a read moves
    /// along: the address in a commit is where the kernel copies from.
    fn replacement(&self, old: &Slot, outcome: Outcome) -> Result<Arc<Slot>, Errno> {
        let (region, soiled) = match (old.take_moved(), outcome.result) {
            (Some(region), Ok(bytes)) => (region, bytes),
            _ => (Region::new(self.start.buffer as usize, self.start.backing)?, 0),
        };
        let tag = old.place().tag;
        let fresh = self.slot(tag, Buffer::new(Arc::new(region), 0, self.start.buffer));
        fresh.soil(soiled);
        Ok(fresh)
    }

    /// Takes every request that is out from its holder, answers it with EIO, and refuses new ones.
    pub(crate) fn revoke(&mut self, now: Stamp) -> Vec<Entry> {
        self.refusing = true;
        let mut entries = Vec::new();
        for tag in 0..self.start.depth {
            if self.revoke_tag(tag, now) {
                let fresh = self.sink(tag);
                entries.extend(self.answer_revoked(tag, fresh));
            }
        }
        entries
    }

    /// Takes the requests that are out for longer than `age`, all with an age of zero, from their holders and answers them
    /// with EIO. The queue goes on: each tag gets memory of its own.
    pub(crate) fn revoke_older(&mut self, age: Duration, now: Stamp) -> Overdue {
        let mut overdue = Overdue::default();
        for tag in 0..self.start.depth {
            if !age.is_zero() && self.start.meter.age(tag, now).is_none_or(|is| is < age) {
                continue;
            }
            let slot = Arc::clone(&self.slots[usize::from(tag)]);
            if slot.works_on_shared_memory() {
                overdue.slots.push(slot);
                continue;
            }
            if !self.revoke_tag(tag, now) {
                continue;
            }
            let fresh = match Region::new(self.start.buffer as usize, self.start.backing) {
                Ok(region) => self.slot(tag, Buffer::new(Arc::new(region), 0, self.start.buffer)),
                Err(errno) => self.give_up(tag, errno),
            };
            overdue.entries.extend(self.answer_revoked(tag, fresh));
            overdue.slots.push(slot);
        }
        overdue
    }

    /// Takes the request of a tag from its holder. False if there is none, or it ends by itself: what works on the
    /// client's own memory is cancelled first.
    fn revoke_tag(&self, tag: u16, now: Stamp) -> bool {
        let slot = &self.slots[usize::from(tag)];
        if slot.works_on_shared_memory() || !slot.revoke() {
            return false;
        }
        let op = self.op_of(tag);
        tracing::warn!(
            device = self.start.device,
            queue = self.start.queue,
            tag,
            ?op,
            "a request was revoked: the client gets EIO"
        );
        self.start.meter.revoked.add(1);
        self.start.meter.ended(tag, op, None, now);
        true
    }

    /// The commands that answer a request that was taken from its holder, whose tag gets another slot.
    fn answer_revoked(
        &mut self,
        tag: u16,
        fresh: Arc<Slot>,
    ) -> impl Iterator<Item = Entry> + use<> {
        let release = self.release_pages(&self.slots[usize::from(tag)]);
        self.slots[usize::from(tag)] = fresh;
        release.into_iter().chain(self.commit(tag, -libc::EIO))
    }

    /// There is no memory for a tag: it ends here, and the device with it.
    fn give_up(&mut self, tag: u16, errno: Errno) -> Arc<Slot> {
        self.refusing = true;
        self.fail(Error::new(ErrorKind::Io, "get memory for a tag").with_errno(errno));
        self.sink(tag)
    }

    /// The kernel refused a command. A commit is tried once more, as a failure of the request; then the
    /// device is given up.
    pub(crate) fn rejected(&mut self, tag: u16, errno: Errno) -> Option<Entry> {
        self.start.meter.rejected.add(1);
        self.rejections += 1;
        tracing::error!(
            device = self.start.device,
            queue = self.start.queue,
            tag,
            %errno,
            "the kernel rejected a command"
        );
        let fetching = self.ops.get(usize::from(tag)).is_none_or(Option::is_none);
        if fetching || self.rejections > 1 {
            let attempt = if fetching {
                "fetch the first request"
            } else {
                "commit a request and fetch the next"
            };
            self.fail(
                Error::new(ErrorKind::Io, attempt)
                    .on_tag(tag)
                    .with_errno(errno)
                    .because("the kernel rejected the command"),
            );
            return None;
        }
        self.commit(tag, -libc::EIO)
    }

    fn fail(&mut self, error: Error) {
        if !std::mem::replace(&mut self.failed, true) {
            let error = error.on_device(self.start.device).on_queue(self.start.queue);
            self.start.events.failed(self.start.queue, error);
        }
    }

    /// The kernel did not take the offer of all tags.
    pub(crate) fn offer_rejected(&mut self, errno: Errno) {
        self.fail(
            Error::new(ErrorKind::Io, "offer the tags to the kernel")
                .with_errno(errno)
                .because("the kernel rejected the command"),
        );
    }

    /// The fetch of batches ended for no good reason.
    pub(crate) fn fetch_failed(&mut self, errno: Errno) {
        self.fail(
            Error::new(ErrorKind::Io, "fetch requests")
                .with_errno(errno)
                .because("the kernel ended the command"),
        );
    }

    /// Whether the last tag of a queue that works in batches has come home by now. True once.
    pub(crate) fn batch_has_come_home(&mut self) -> bool {
        self.batch.as_mut().is_some_and(Batch::has_come_home)
    }

    /// A tag's command came back for good. Whether it was the last.
    pub(crate) fn came_home(&mut self, _tag: u16) -> bool {
        self.home += 1;
        self.home == self.start.lane.tags(self.start.depth)
    }

    pub(crate) fn has_touched_memory(&self) -> bool {
        self.touched && !self.start.backing.populate && !self.start.backing.huge_pages
    }

    /// Gives the memory of the buffers back if no request came since the last call. Whether the timer
    /// should run on.
    pub(crate) fn give_back_if_idle(&mut self) -> bool {
        if !self.has_touched_memory() {
            return false;
        }
        if std::mem::replace(&mut self.busy, false) {
            return true;
        }
        let free: Vec<&Arc<Slot>> =
            self.slots.iter().filter(|s| s.is_with_kernel() && s.operations() == 0).collect();
        let all = free.len() == self.slots.len();
        // Neighbours in one call: each costs every CPU of the process an interrupt.
        let next_to = |a: &Arc<Slot>, b: &Arc<Slot>| {
            let (a, b) = (a.buffer(), b.buffer());
            Arc::ptr_eq(a.region(), b.region()) && a.offset() + a.len() as usize == b.offset()
        };
        for run in free.chunk_by(|a, b| next_to(a, b)) {
            let first = run[0].buffer();
            let len = run.iter().map(|slot| slot.buffer().len() as usize).sum();
            // SAFETY: of each of these buffers the phase says that no request has it, and that no ring
            // operation uses it was just checked. The kernel fills it only within this thread's enters, and
            // reads it only while it takes a commit, which it has.
            // That memory which the process has locked stays is what its owner wanted.
            let _ = unsafe { first.region().discard(first.offset(), len) };
        }
        self.touched = !all;
        !all
    }

    /// The ring goes away under the commands: their memory is left alone for good, because nobody will tell
    /// when the kernel is done with it. The device's file and mapping are given up.
    pub(crate) fn leave_to_the_kernel(mut self) {
        if let Some(batch) = self.batch.take() {
            std::mem::forget(batch);
        }
        for slot in &self.slots {
            std::mem::forget(Arc::clone(slot.buffer().region()));
        }
    }
}
