//! What `linux/blkzoned.h` adds: the zone descriptors that a REPORT_ZONES request is answered with.

use super::assert_layout;
use super::bytes::plain;

/// The zone takes writes anywhere.
pub const BLK_ZONE_TYPE_CONVENTIONAL: u8 = 1;
/// The zone takes writes at its write pointer only.
pub const BLK_ZONE_TYPE_SEQWRITE_REQ: u8 = 2;
/// The zone prefers writes at its write pointer; the block layer refuses such disks.
pub const BLK_ZONE_TYPE_SEQWRITE_PREF: u8 = 3;

/// The zone has no write pointer.
pub const BLK_ZONE_COND_NOT_WP: u8 = 0x0;
/// Nothing was written.
pub const BLK_ZONE_COND_EMPTY: u8 = 0x1;
/// Opened by a write.
pub const BLK_ZONE_COND_IMP_OPEN: u8 = 0x2;
/// Opened by a command.
pub const BLK_ZONE_COND_EXP_OPEN: u8 = 0x3;
/// Closed with room left.
pub const BLK_ZONE_COND_CLOSED: u8 = 0x4;
/// The zone cannot be written any more.
pub const BLK_ZONE_COND_READONLY: u8 = 0xD;
/// No room is left.
pub const BLK_ZONE_COND_FULL: u8 = 0xE;
/// The zone cannot be used any more.
pub const BLK_ZONE_COND_OFFLINE: u8 = 0xF;
/// The zone is open or closed; in cached reports to clients only, never a server's answer.
pub const BLK_ZONE_COND_ACTIVE: u8 = 0xFF;

/// A zone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct blk_zone {
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub len: u64,
    /// The write pointer, a sector.
    pub wp: u64,
    /// `BLK_ZONE_TYPE_*` (`type` in C).
    pub type_: u8,
    /// `BLK_ZONE_COND_*`.
    pub cond: u8,
    /// 1 if resources for non-sequential writes are in use.
    pub non_seq: u8,
    /// 1 if a reset is recommended.
    pub reset: u8,
    /// Zero.
    pub resv: [u8; 4],
    /// Sectors that can be written.
    pub capacity: u64,
    /// Zero.
    pub reserved: [u8; 24],
}

assert_layout!(blk_zone: 64, align 8 {
    start @ 0, len @ 8, wp @ 16, type_ @ 24, cond @ 25, non_seq @ 26, reset @ 27, resv @ 28, capacity @ 32,
    reserved @ 40,
});
plain!(blk_zone { start, len, wp, type_, cond, non_seq, reset, resv, capacity, reserved });
