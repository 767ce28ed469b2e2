//! Requests of zoned disks whose answer is more than success.

use super::{Gone, Op, Request};
use crate::error::Errno;
use crate::uapi::bytes::bytes_of;
use crate::zones::Zone;

impl Request {
    /// How many zones are to be reported at most, beginning with the one that holds the offset; 0 for all other
    /// operations.
    pub fn zones(&self) -> u32 {
        self.zones
    }

    /// Answers an append: all of it was written at byte `offset` of the disk, a multiple of the logical block size.
    ///
    /// # Errors
    ///
    /// [`Gone`], as [`complete`](Self::complete).
    pub fn complete_append(mut self, offset: u64) -> Result<(), Gone> {
        let sensible = self.op == Op::ZoneAppend && offset >= self.offset && offset & 0x1ff == 0;
        if sensible {
            self.slot().set_append_sector(offset >> 9);
            self.told = true;
        }
        self.end(if sensible { Ok(()) } else { Err(Errno::EIO) })
    }

    /// Answers a report of zones, of which the first is the one that holds the request's offset and each other
    /// follows its predecessor. Not more than [`zones`](Self::zones) are used; for the rest, if there were fewer, the
    /// kernel asks again. None at all is `EIO`, because it would ask for ever.
    ///
    /// # Errors
    ///
    /// [`Gone`], as [`complete`](Self::complete).
    pub fn complete_report(mut self, zones: &[Zone]) -> Result<(), Gone> {
        let wire: Vec<_> = zones.iter().take(self.zones as usize).map(|z| z.to_uapi()).collect();
        if !wire.is_empty() && wire.iter().all(|zone| zone.len > 0) {
            let bytes: Vec<u8> = wire.iter().flat_map(bytes_of).copied().collect();
            self.push(0, &bytes);
            self.told = true;
        }
        self.end(Ok(()))
    }
}
