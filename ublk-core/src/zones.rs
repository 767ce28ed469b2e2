//! Zones of a zoned disk: how they are described to the kernel, and what is done with them.

use crate::uapi::{self, blk_zone};

/// Where a zone takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZoneKind {
    /// Anywhere.
    Conventional,
    /// At its write pointer only.
    Sequential,
}

/// The condition of a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ZoneState {
    /// Of a conventional zone: there is no write pointer.
    NoWritePointer,
    /// Nothing was written.
    Empty,
    /// Opened by a write.
    ImplicitlyOpen,
    /// Opened by [`ZoneAction::Open`].
    ExplicitlyOpen,
    /// Written in part, and not open.
    Closed,
    /// No room is left, or it was finished.
    Full,
    /// Cannot be written any more.
    ReadOnly,
    /// Cannot be used any more.
    Offline,
}

impl ZoneState {
    fn to_uapi(self) -> u8 {
        match self {
            ZoneState::NoWritePointer => uapi::BLK_ZONE_COND_NOT_WP,
            ZoneState::Empty => uapi::BLK_ZONE_COND_EMPTY,
            ZoneState::ImplicitlyOpen => uapi::BLK_ZONE_COND_IMP_OPEN,
            ZoneState::ExplicitlyOpen => uapi::BLK_ZONE_COND_EXP_OPEN,
            ZoneState::Closed => uapi::BLK_ZONE_COND_CLOSED,
            ZoneState::Full => uapi::BLK_ZONE_COND_FULL,
            ZoneState::ReadOnly => uapi::BLK_ZONE_COND_READONLY,
            ZoneState::Offline => uapi::BLK_ZONE_COND_OFFLINE,
        }
    }

    /// Whether it holds resources of an open zone.
    pub fn is_open(self) -> bool {
        matches!(self, ZoneState::ImplicitlyOpen | ZoneState::ExplicitlyOpen)
    }

    /// Whether it holds resources of an active zone: open, or closed.
    pub fn is_active(self) -> bool {
        self.is_open() || self == ZoneState::Closed
    }
}

/// A zone, as a report tells of it. All in bytes, multiples of the logical block size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Zone {
    /// Where it starts on the disk.
    pub start: u64,
    /// From one zone's start to the next one's: the same for all zones of a disk.
    pub len: u64,
    /// What can be written of it, from its start on; not more than `len`.
    pub capacity: u64,
    /// Where on the disk the next write goes: `start` of an empty zone. Of a full one the kernel does not look.
    pub write_pointer: u64,
    /// Where it takes writes.
    pub kind: ZoneKind,
    /// Its condition.
    pub state: ZoneState,
}

impl Zone {
    pub(crate) fn to_uapi(self) -> blk_zone {
        blk_zone {
            start: self.start >> 9,
            len: self.len >> 9,
            wp: self.write_pointer >> 9,
            type_: match self.kind {
                ZoneKind::Conventional => uapi::BLK_ZONE_TYPE_CONVENTIONAL,
                ZoneKind::Sequential => uapi::BLK_ZONE_TYPE_SEQWRITE_REQ,
            },
            cond: self.state.to_uapi(),
            capacity: self.capacity >> 9,
            ..Default::default()
        }
    }
}

/// What is done with a zone, or with all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ZoneAction {
    /// Open it explicitly.
    Open,
    /// Close it, if it is open.
    Close,
    /// Make it full.
    Finish,
    /// Make it empty.
    Reset,
    /// Make every sequential zone empty.
    ResetAll,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_is_told_in_sectors() {
        let zone = Zone {
            start: 4 << 20,
            len: 4 << 20,
            capacity: 3 << 20,
            write_pointer: (4 << 20) + 4096,
            kind: ZoneKind::Sequential,
            state: ZoneState::Closed,
        };
        let expected = blk_zone {
            start: 8192,
            len: 8192,
            wp: 8200,
            type_: 2,
            cond: 4,
            capacity: 6144,
            ..Default::default()
        };
        assert_eq!(zone.to_uapi(), expected);
    }
}
