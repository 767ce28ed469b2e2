//! Batch commands: many tags in one SQE.

use super::assert_layout;
use super::bytes::plain;

/// Elements carry a zone append's LBA.
pub const UBLK_BATCH_F_HAS_ZONE_LBA: u16 = 1 << 0;
/// Elements carry a buffer address.
pub const UBLK_BATCH_F_HAS_BUF_ADDR: u16 = 1 << 1;
/// As [`super::UBLK_AUTO_BUF_REG_FALLBACK`], for the whole batch.
pub const UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK: u16 = 1 << 2;

/// The command of an `IORING_OP_URING_CMD` that is about many tags, at byte 48 of the SQE.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_batch_io {
    /// The queue.
    pub q_id: u16,
    /// `UBLK_BATCH_F_*`.
    pub flags: u16,
    /// Elements at the SQE's `addr`.
    pub nr_elem: u16,
    /// Bytes of an element: 8, and 8 more per optional field.
    pub elem_bytes: u8,
    /// Zero.
    pub reserved: u8,
    /// Zero.
    pub reserved2: u64,
}

assert_layout!(ublk_batch_io: 16, align 8 {
    q_id @ 0, flags @ 2, nr_elem @ 4, elem_bytes @ 6, reserved @ 7, reserved2 @ 8,
});
plain!(ublk_batch_io { q_id, flags, nr_elem, elem_bytes, reserved, reserved2 });

/// The fields that every element has; a `u64` buffer address and a `u64` zone LBA follow where the
/// batch's flags say so.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_elem_header {
    /// The tag.
    pub tag: u16,
    /// Index in the ring's buffer table, with automatic registration.
    pub buf_index: u16,
    /// Of a commit: bytes done, or a negated errno.
    pub result: i32,
}

assert_layout!(ublk_elem_header: 8, align 4 { tag @ 0, buf_index @ 2, result @ 4 });
plain!(ublk_elem_header { tag, buf_index, result });
