//! How requests come in and results go out: one command per tag.
//!
//! A fetch is a command that the kernel keeps until a request arrives on its tag; a commit carries the
//! result of one request and is the fetch of the next. Commands belong to the thread that submitted the
//! first fetch.

use io_uring::squeue::Entry;
use io_uring::types;

use super::slot::Slot;
use crate::error::Errno;
use crate::uapi;
use crate::uring::sqe::{Encoding, IoCommands, TagBuffer, Target};

/// What the completion of a command means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// A request is in the tag's descriptor.
    Request,
    /// The tag is the kernel's again, for good: the device stops, or the command was taken back.
    Home,
    /// The kernel refused the command. Of a commit: the request is still with the server.
    Rejected(Errno),
}

/// The commands of one queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PerTag {
    queue: u16,
    /// The `ublkcN`'s index in the ring's table of files, if it is there.
    file: Option<u32>,
    commands: IoCommands,
}

impl PerTag {
    pub(crate) fn new(queue: u16, target: Target, encoding: Encoding) -> Self {
        let file = match target {
            Target::Fixed(types::Fixed(index)) => Some(index),
            Target::Fd(_) => None,
        };
        PerTag { queue, file, commands: IoCommands::new(target, encoding) }
    }

    pub(crate) fn file(&self) -> Option<u32> {
        self.file
    }

    /// The first command of a tag.
    pub(crate) fn fetch(&self, slot: &Slot) -> Entry {
        self.commands.fetch(self.queue, slot.place().tag, Self::buffer(slot))
    }

    /// The result of the tag's request, and the fetch of the next.
    pub(crate) fn commit(&self, slot: &Slot, result: i32) -> Entry {
        self.commands.commit_and_fetch(self.queue, slot.place().tag, result, Self::buffer(slot))
    }

    /// In copy mode the address is both where the driver copies a read's data from and where it puts the
    /// next write's data: always the slot's own buffer.
    fn buffer(slot: &Slot) -> TagBuffer {
        TagBuffer::Address(slot.buffer().start().as_ptr() as u64)
    }

    pub(crate) fn interpret(result: i32) -> Arrived {
        match result {
            uapi::UBLK_IO_RES_OK => Arrived::Request,
            uapi::UBLK_IO_RES_ABORT => Arrived::Home,
            // The ring is being torn down around the command.
            r if r == -libc::ECANCELED || r == -libc::EINTR => Arrived::Home,
            // NEED_GET_DATA (1) is never asked for; an unknown result is treated like a refusal.
            r => Arrived::Rejected(Errno::from_result(r).unwrap_or(Errno::EIO)),
        }
    }
}
