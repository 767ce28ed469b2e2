//! Memory that the server shares with the clients of its disk.

use super::assert_layout;
use super::bytes::plain;

/// Pin the pages for reading only, as a write-sealed memfd needs; serves WRITE requests only.
pub const UBLK_SHMEM_BUF_READ_ONLY: u32 = 1 << 0;

/// A shared buffer, the payload of REG_BUF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_shmem_buf_reg {
    /// Its address in the calling process, a multiple of the page size.
    pub addr: u64,
    /// Bytes, a multiple of the page size, at most 4 GiB.
    pub len: u64,
    /// [`UBLK_SHMEM_BUF_READ_ONLY`] or 0.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

assert_layout!(ublk_shmem_buf_reg: 24, align 8 { addr @ 0, len @ 8, flags @ 16, reserved @ 20 });
plain!(ublk_shmem_buf_reg { addr, len, flags, reserved });

/// The byte offset in the `addr` of a descriptor with [`super::UBLK_IO_F_SHMEM_ZC`].
pub const UBLK_SHMEM_ZC_OFF_MASK: u64 = 0xffff_ffff;
/// First bit of the buffer's index in that `addr`.
pub const UBLK_SHMEM_ZC_IDX_OFF: u32 = 32;
/// Mask of the buffer's index, once shifted down.
pub const UBLK_SHMEM_ZC_IDX_MASK: u64 = 0xffff;

/// `ublk_shmem_zc_addr()`: what a descriptor says for an index and an offset.
pub const fn ublk_shmem_zc_addr(index: u16, offset: u32) -> u64 {
    (index as u64) << UBLK_SHMEM_ZC_IDX_OFF | offset as u64
}

/// `ublk_shmem_zc_index()`: the buffer's index.
pub const fn ublk_shmem_zc_index(addr: u64) -> u16 {
    ((addr >> UBLK_SHMEM_ZC_IDX_OFF) & UBLK_SHMEM_ZC_IDX_MASK) as u16
}

/// `ublk_shmem_zc_offset()`: the offset in the buffer, in bytes.
pub const fn ublk_shmem_zc_offset(addr: u64) -> u32 {
    (addr & UBLK_SHMEM_ZC_OFF_MASK) as u32
}
