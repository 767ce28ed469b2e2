//! A worker's mailbox: everything that other threads tell it.
//!
//! Finished requests and woken tasks come by lock-free stacks, the rare rest (attach a queue, revoke its
//! requests, end) as messages under a mutex. All of them ring the same doorbell.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::executor::TaskNode;
use super::handoff::{Doorbell, Push, Stack};
use super::meter::Counter;
use super::slot::Slot;
use super::turn::Message;
use crate::error::Result;
use crate::sys::event::Event;

pub(crate) struct Mailbox {
    finished: Stack<Slot>,
    ready: Stack<TaskNode>,
    /// `None` once the worker is gone.
    messages: Mutex<Option<Vec<Message>>>,
    has_messages: AtomicBool,
    bell: Doorbell,
    /// How often somebody had to wake the worker.
    rings: AtomicU64,
    /// How often the worker entered the kernel. Here, because readers cannot wait for the core's lock.
    pub(crate) enters: Counter,
    /// `None` where nobody ever sleeps on it (models and tests of the parts).
    event: Option<Event>,
}

impl Mailbox {
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Self::with(Some(Event::new()?)))
    }

    #[cfg(test)]
    pub(crate) fn detached() -> Arc<Self> {
        Self::with(None)
    }

    fn with(event: Option<Event>) -> Arc<Self> {
        Arc::new(Mailbox {
            finished: Stack::new(),
            ready: Stack::new(),
            messages: Mutex::new(Some(Vec::new())),
            has_messages: AtomicBool::new(false),
            bell: Doorbell::new(),
            rings: AtomicU64::new(0),
            enters: Counter::default(),
            event,
        })
    }

    fn ring(&self) {
        if self.bell.must_ring() {
            self.rings.fetch_add(1, Ordering::Relaxed);
            if let Some(event) = &self.event {
                event.signal();
            }
        }
    }

    /// Hands a slot back whose request has ended. False if the worker is gone.
    pub(crate) fn finished(&self, slot: Arc<Slot>) -> bool {
        match self.finished.push(slot) {
            Push::Queued => self.ring(),
            Push::AlreadyQueued => {}
            Push::Closed => return false,
        }
        true
    }

    /// A task can go on. Without effect if the worker is gone.
    pub(crate) fn ready(&self, task: Arc<TaskNode>) {
        if self.ready.push(task) == Push::Queued {
            self.ring();
        }
    }

    /// Sends a message; gives it back if the worker is gone.
    pub(crate) fn send(&self, message: Message) -> std::result::Result<(), Message> {
        {
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            match messages.as_mut() {
                Some(list) => list.push(message),
                None => return Err(message),
            }
            self.has_messages.store(true, Ordering::Release);
        }
        self.ring();
        Ok(())
    }

    pub(crate) fn take_finished(&self, out: &mut Vec<Arc<Slot>>) {
        self.finished.drain(out);
    }

    pub(crate) fn take_ready(&self, out: &mut Vec<Arc<TaskNode>>) {
        self.ready.drain(out);
    }

    pub(crate) fn take_messages(&self) -> Vec<Message> {
        if !self.has_messages.load(Ordering::Relaxed) {
            return Vec::new();
        }
        self.has_messages.store(false, Ordering::Relaxed);
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Whether the worker should look for messages.
    #[inline]
    pub(crate) fn has_messages(&self) -> bool {
        self.has_messages.load(Ordering::Relaxed)
    }

    /// Takes what can be done while a turn's requests are being handed out: revocations, unless one is of a device
    /// whose queue is still to be taken in.
    pub(crate) fn take_revocations(&self) -> Vec<Message> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(list) = messages.as_mut() else { return Vec::new() };
        let mut attached = Vec::new();
        let (taken, left) = std::mem::take(list).into_iter().partition(|message| match message {
            Message::Attach(start, _) => {
                attached.push(start.device);
                false
            }
            Message::Revoke { device } | Message::RevokeOlder { device, .. } => {
                !attached.contains(device)
            }
            Message::Abandon | Message::End => false,
        });
        *list = left;
        self.has_messages.store(!list.is_empty(), Ordering::Relaxed);
        taken
    }

    /// The worker wants to sleep: whether there is nothing to do. Followed by [`awake`](Self::awake).
    pub(crate) fn may_sleep(&self) -> bool {
        self.bell.fall_asleep();
        self.finished.is_empty()
            && self.ready.is_empty()
            && !self.has_messages.load(Ordering::Relaxed)
    }

    pub(crate) fn awake(&self) {
        self.bell.wake_up();
    }

    /// How often the worker had to be woken.
    pub(crate) fn rings(&self) -> u64 {
        self.rings.load(Ordering::Relaxed)
    }

    /// The worker is gone: nothing is accepted any more. Gives back the messages that it did not read.
    pub(crate) fn close(&self) -> Vec<Message> {
        self.finished.close(&mut Vec::new());
        self.ready.close(&mut Vec::new());
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.take().unwrap_or_default()
    }

    /// Whether the worker is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// What the worker reads from in its ring.
    pub(crate) fn event_fd(&self) -> Option<RawFd> {
        self.event.as_ref().map(AsRawFd::as_raw_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn revocations_are_taken_alone_and_what_is_left_is_not_forgotten() {
        let mailbox = Mailbox::detached();
        assert!(!mailbox.has_messages());
        let age = Duration::from_secs(1);
        let all =
            [Message::RevokeOlder { device: 1, age }, Message::End, Message::Revoke { device: 2 }];
        for message in all {
            assert!(mailbox.send(message).is_ok());
        }
        let taken = mailbox.take_revocations();
        assert!(
            matches!(
                taken[..],
                [Message::RevokeOlder { device: 1, .. }, Message::Revoke { device: 2 }]
            ),
            "in their order"
        );
        assert!(mailbox.has_messages());
        assert!(mailbox.take_revocations().is_empty());
        assert!(matches!(mailbox.take_messages()[..], [Message::End]));
        assert!(!mailbox.has_messages());
        assert!(mailbox.send(Message::Revoke { device: 0 }).is_ok());
        assert_eq!(mailbox.take_revocations().len(), 1);
        assert!(!mailbox.has_messages());
    }
}
