//! A request's pages in the table of a ring that is not its worker's.

use super::Request;
use crate::error::Errno;
use crate::uring::sqe::{Encoding, IoCommands, raw_entry};
use crate::worker::path::DataPath;

impl Request {
    /// The submission queue entry, 64 bytes, that puts the request's pages into place `index` of the (sparse) table of
    /// registered buffers of a ring of the caller's: READ_FIXED, SEND_ZC and their like then work on the client's own
    /// memory, whose byte 0 has address 0, up to the request's [length](Self::len). Its `user_data` is 0, for the caller
    /// to set.
    ///
    /// It is for a ring in this process, on any thread, to be submitted while the request is not completed. The pages have
    /// to leave the table again by [`unregister_entry`](Self::unregister_entry): as long as they are there, the client has
    /// no answer. A read that this was called for is not zeroed by [`complete`](Self::complete) where nothing was put:
    /// what ring operations have left alone keeps the client's own bytes.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` unless the device's data path is [`DataPath::ZeroCopy`]; `EINVAL` for a request without data, or whose
    /// data is in [shared memory](Self::is_shared); `ENODEV` if the request was
    /// revoked or the device has ended. The kernel itself answers the entry
    /// with `EINVAL` on a thread that is not the tag's worker before
    /// [`BUF_REG_OFF_DAEMON`](crate::control::Features::BUF_REG_OFF_DAEMON) (Linux 6.17).
    pub fn register_entry(&self, index: u16) -> Result<[u8; 64], Errno> {
        if !self.slot().is_owned() {
            // The tag may be another request's.
            return Err(Errno::ENODEV);
        }
        let commands = self.foreign_commands()?;
        // The length of a request with data is a buffer's, a u32.
        self.filled.borrow_mut().add(0..self.len as u32);
        Ok(raw_entry(&commands.register_io_buf(self.queue(), self.tag(), index)))
    }

    /// The submission queue entry that takes the pages out of the table again: the same `index`, the same ring.
    ///
    /// # Errors
    ///
    /// As [`register_entry`](Self::register_entry).
    pub fn unregister_entry(&self, index: u16) -> Result<[u8; 64], Errno> {
        let commands = self.foreign_commands()?;
        Ok(raw_entry(&commands.unregister_io_buf(self.queue(), self.tag(), index)))
    }

    fn foreign_commands(&self) -> Result<IoCommands, Errno> {
        let reach = self.slot().reach().ok_or(Errno::EOPNOTSUPP)?;
        if reach.portal().path() != DataPath::ZeroCopy {
            return Err(Errno::EOPNOTSUPP);
        }
        if !self.op.has_data() || self.shared.is_some() {
            return Err(Errno::EINVAL);
        }
        let target = reach.portal().target().ok_or(Errno::ENODEV)?;
        // Commands that are younger than the old numbers have no other.
        Ok(IoCommands::new(target, Encoding::Ioctl))
    }
}
