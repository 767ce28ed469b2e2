//! How requests come in and results go out: one command per tag.
//!
//! A fetch is a command that the kernel keeps until a request arrives on its tag; a commit carries the
//! result of one request and is the fetch of the next. Commands belong to the thread that submitted the
//! first fetch.

use io_uring::squeue::Entry;
use io_uring::types;

use super::path::DataPath;
use super::slot::Slot;
use crate::error::Errno;
use crate::uapi::{self, ublk_auto_buf_reg};
use crate::uring::sqe::{Encoding, IoCommands, TagBuffer, Target};

/// What the completion of a command means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// A request is in the tag's descriptor.
    Request,
    /// The tag is the kernel's again, for good: the device stops, or the command was taken back.
    Home,
    /// A write has come, and the driver wants to know where its data is to go.
    NeedsBuffer,
    /// The kernel refused the command. Of a commit: the request is still with the server.
    Rejected(Errno),
}

/// The commands of one queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PerTag {
    queue: u16,
    /// The `ublkcN`'s index in the ring's table of files, if it is there.
    file: Option<u32>,
    path: DataPath,
    commands: IoCommands,
}

impl PerTag {
    pub(crate) fn new(queue: u16, target: Target, encoding: Encoding, path: DataPath) -> Self {
        let file = match target {
            Target::Fixed(types::Fixed(index)) => Some(index),
            Target::Fd(_) => None,
        };
        PerTag { queue, file, path, commands: IoCommands::new(target, encoding) }
    }

    pub(crate) fn file(&self) -> Option<u32> {
        self.file
    }

    /// The first command of a tag.
    pub(crate) fn fetch(&self, slot: &Slot) -> Entry {
        self.commands.fetch(self.queue, slot.place().tag, self.buffer(slot))
    }

    /// The result of the tag's request, and the fetch of the next.
    pub(crate) fn commit(&self, slot: &Slot, result: i32) -> Entry {
        self.commands.commit_and_fetch(self.queue, slot.place().tag, result, self.buffer(slot))
    }

    /// Where the data of the tag's write is to go.
    pub(crate) fn need_get_data(&self, slot: &Slot) -> Entry {
        let address = slot.buffer().start().as_ptr() as u64;
        self.commands.need_get_data(self.queue, slot.place().tag, address)
    }

    /// Puts the pages of the tag's request into the ring's table.
    pub(crate) fn register(&self, tag: u16, index: u16) -> Entry {
        self.commands.register_io_buf(self.queue, tag, index)
    }

    /// Takes the pages of the tag's request out of the ring's table.
    pub(crate) fn unregister(&self, tag: u16, index: u16) -> Entry {
        self.commands.unregister_io_buf(self.queue, tag, index)
    }

    /// How an entry names the device's file.
    pub(crate) fn target(&self) -> Target {
        self.commands.target()
    }

    /// When the driver copies, the address is both where it copies a read's data from and where it puts the
    /// next write's data: always the slot's own buffer.
    fn buffer(&self, slot: &Slot) -> TagBuffer {
        match slot.reach() {
            None => TagBuffer::Address(slot.buffer().start().as_ptr() as u64),
            Some(reach) if self.path == DataPath::AutoBufReg => {
                let place = ublk_auto_buf_reg {
                    index: reach.index(),
                    // Without it a request that cannot be registered fails, and nobody here hears of it.
                    flags: uapi::UBLK_AUTO_BUF_REG_FALLBACK,
                    ..Default::default()
                };
                TagBuffer::AutoRegister { place, append: slot.append_sector() }
            }
            Some(_) => match slot.append_sector() {
                0 => TagBuffer::None,
                sector => TagBuffer::ZoneAppend(sector),
            },
        }
    }

    pub(crate) fn interpret(result: i32) -> Arrived {
        match result {
            uapi::UBLK_IO_RES_OK => Arrived::Request,
            uapi::UBLK_IO_RES_NEED_GET_DATA => Arrived::NeedsBuffer,
            uapi::UBLK_IO_RES_ABORT => Arrived::Home,
            // The ring is being torn down around the command.
            r if r == -libc::ECANCELED || r == -libc::EINTR => Arrived::Home,
            // An unknown result is treated like a refusal.
            r => Arrived::Rejected(Errno::from_result(r).unwrap_or(Errno::EIO)),
        }
    }
}
