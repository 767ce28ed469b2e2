//! Integrity metadata beside a request's data, which moves by the device's file alone.

use super::{Op, Request};
use crate::error::Errno;

impl Request {
    /// Bytes of integrity metadata that come with the data; 0 without [`RequestFlags::integrity`](crate::RequestFlags::integrity).
    pub fn metadata_len(&self) -> usize {
        let integrity = self.slot().reach().and_then(|reach| reach.portal().integrity());
        match integrity {
            Some(integrity) if self.flags.integrity() && self.op.has_data() => {
                // Of a request's bytes, at most 2^25, 255 for each 512.
                integrity.metadata_bytes(self.len) as usize
            }
            _ => 0,
        }
    }

    /// Copies a write's integrity metadata, all of it.
    ///
    /// # Errors
    ///
    /// `EINVAL` if `buf` has not [`metadata_len`](Self::metadata_len) bytes or the request brings none; otherwise the
    /// device is ending.
    pub fn metadata(&self, buf: &mut [u8]) -> Result<(), Errno> {
        if !self.op.brings_data() || buf.is_empty() || buf.len() != self.metadata_len() {
            return Err(Errno::EINVAL);
        }
        self.slot().pull_metadata(buf)
    }

    /// Gives a read's integrity metadata to the client, all of it. For a read that is completed well without it, there
    /// are ones in all bits, which the kernel takes for data that is not protected.
    ///
    /// # Errors
    ///
    /// `EINVAL` if `data` has not [`metadata_len`](Self::metadata_len) bytes or the request wants none; otherwise the
    /// device is ending.
    pub fn put_metadata(&mut self, data: &[u8]) -> Result<(), Errno> {
        if self.op != Op::Read || data.is_empty() || data.len() != self.metadata_len() {
            return Err(Errno::EINVAL);
        }
        self.slot().push_metadata(data)?;
        self.marked = true;
        Ok(())
    }
}
