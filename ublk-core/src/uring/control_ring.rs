//! A ring for control commands, one in flight at a time.
//!
//! Invariants:
//! * the memory that a command's header names belongs to the ring from submission to completion: it is moved in
//!   and handed back with the answer, and leaked if the ring goes away before;
//! * the 128 bytes of the command's slot stay as they are until its completion, because Linux 6.12 reads them
//!   again from its worker thread: while a command is in flight at most [`SPARE`] further entries are queued,
//!   fewer than the ring has slots.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::sqe::{self, ControlCommand, Encoding};
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::sys::event::Event;
use crate::sys::fork::Listed;
use crate::uapi::ublksrv_ctrl_cmd;

/// The kernel allows a task as many waiting commands as its first ring has entries.
const ENTRIES: u32 = 8;
const SPARE: u32 = 6;

const COMMAND: u64 = 1;
const WAKE: u64 = 2;
const CANCEL: u64 = 3;

pub(crate) struct ControlRing {
    ring: Listed<IoUring<squeue::Entry128>>,
    wake: Arc<Event>,
    wake_armed: bool,
    /// The memory of the command that is with the kernel.
    in_flight: Option<Vec<u8>>,
    spare: u32,
}

/// Why [`ControlRing::wait`] returned.
pub(crate) enum Turn {
    /// The command came back: its result and its memory.
    Done(i32, Vec<u8>),
    /// Somebody signalled the ring's event.
    Woken,
}

impl ControlRing {
    /// Sets the ring up, on the thread that will use it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::IoUringDisabled`] where the system forbids rings, [`ErrorKind::TooMany`] at a
    /// limit of files or memory.
    pub(crate) fn new() -> Result<Self> {
        let ring =
            Listed::make(|| IoUring::<squeue::Entry128>::builder().dontfork().build(ENTRIES))
                .map_err(|e| super::setup_error(Errno::from(&e)))?;
        let wake = Arc::new(Event::new()?);
        Ok(ControlRing { ring, wake, wake_armed: false, in_flight: None, spare: 0 })
    }

    /// What wakes [`wait`](Self::wait) from another thread.
    pub(crate) fn wake(&self) -> Arc<Event> {
        Arc::clone(&self.wake)
    }

    /// Queues a command on the file `control`. `memory` becomes what its address names:
    /// `header.addr` and `header.len` are set from it here. `control` has to stay open until the
    /// command came back.
    ///
    /// # Panics
    ///
    /// If a command is in flight, or the memory exceeds the 65,535 bytes that a header can say.
    pub(crate) fn start(
        &mut self,
        control: RawFd,
        command: ControlCommand,
        encoding: Encoding,
        mut header: ublksrv_ctrl_cmd,
        mut memory: Vec<u8>,
    ) {
        assert!(self.in_flight.is_none(), "one command in flight");
        self.spare = SPARE;
        self.arm_wake();
        if !memory.is_empty() {
            header.addr = memory.as_mut_ptr().expose_provenance() as u64;
            header.len = u16::try_from(memory.len()).expect("a payload of less than 64 KiB");
        }
        let entry = sqe::control(control, command, encoding, &header);
        self.in_flight = Some(memory);
        self.push(entry.user_data(COMMAND));
    }

    /// Asks the kernel to give the command back early. Only commands that sleep interruptibly obey,
    /// with `EINTR`, or `ECANCELED` if they had not begun.
    pub(crate) fn cancel(&mut self) {
        if self.in_flight.is_some() && self.take_spare() {
            let entry = opcode::AsyncCancel::new(COMMAND).build().user_data(CANCEL);
            self.push(entry.into());
        }
    }

    /// Waits until the command comes back or somebody signals the event.
    ///
    /// # Errors
    ///
    /// The ring itself failed; a command in flight is lost to us and its memory leaked.
    pub(crate) fn wait(&mut self) -> Result<Turn> {
        loop {
            let mut woken = false;
            let mut done = None;
            for cqe in self.ring.completion() {
                let cqe: cqueue::Entry = cqe;
                match cqe.user_data() {
                    COMMAND => done = Some(cqe.result()),
                    WAKE => woken = true,
                    // The cancel's own result says nothing that the command's does not.
                    _ => {}
                }
            }
            if woken {
                self.wake_armed = false;
                self.drain_wake();
            }
            if let Some(result) = done {
                let memory = self.in_flight.take().unwrap_or_default();
                return Ok(Turn::Done(result, memory));
            }
            if woken {
                if self.take_spare() {
                    self.arm_wake();
                }
                return Ok(Turn::Woken);
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) => {
                    return Err(Error::new(ErrorKind::Io, "wait for a control command")
                        .with_source(e)
                        .because("io_uring_enter failed"));
                }
            }
        }
    }

    fn take_spare(&mut self) -> bool {
        let some = self.spare > 0;
        self.spare = self.spare.saturating_sub(1);
        some
    }

    fn arm_wake(&mut self) {
        if !self.wake_armed {
            let fd = types::Fd(self.wake.as_raw_fd());
            let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(WAKE);
            self.push(entry.into());
            self.wake_armed = true;
        }
    }

    /// Takes the signal that the poll announced, so that the next poll waits for a new one.
    fn drain_wake(&self) {
        let mut count = 0u64;
        // SAFETY: the pointer is to 8 writable bytes. The read does not block: the poll said that
        // the counter is not zero, and this thread is its only reader.
        unsafe { libc::read(self.wake.as_raw_fd(), (&raw mut count).cast(), 8) };
    }

    fn push(&mut self, entry: squeue::Entry128) {
        // SAFETY: of the three kinds of entries, poll and cancel name no memory; a command's memory
        // is owned by `in_flight` until its completion and leaked by `drop` if that never comes.
        // The files are open: the event is ours, and `start` demands it of the other.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // Entries are submitted before anything waits, and fewer are queued between two waits than
        // fit.
        assert!(pushed.is_ok(), "the submission queue has room");
    }
}

impl Drop for ControlRing {
    fn drop(&mut self) {
        if let Some(memory) = self.in_flight.take() {
            // The kernel may still write to it.
            std::mem::forget(memory);
        }
    }
}
