//! Requests and their commands: the descriptor that the kernel writes and the command that the
//! server sends.

use super::assert_layout;
use super::bytes::plain;

/// The request waits in its descriptor.
pub const UBLK_IO_RES_OK: i32 = 0;
/// The server has to name a buffer with NEED_GET_DATA.
pub const UBLK_IO_RES_NEED_GET_DATA: i32 = 1;
/// The tag is gone: do not fetch again.
pub const UBLK_IO_RES_ABORT: i32 = -libc::ENODEV;

/// Read from the disk.
pub const UBLK_IO_OP_READ: u32 = 0;
/// Write to the disk.
pub const UBLK_IO_OP_WRITE: u32 = 1;
/// Make everything that completed before durable.
pub const UBLK_IO_OP_FLUSH: u32 = 2;
/// The range's content is not needed any more.
pub const UBLK_IO_OP_DISCARD: u32 = 3;
/// Never sent by the driver.
pub const UBLK_IO_OP_WRITE_SAME: u32 = 4;
/// The range has to read as zeroes.
pub const UBLK_IO_OP_WRITE_ZEROES: u32 = 5;
/// Open a zone explicitly.
pub const UBLK_IO_OP_ZONE_OPEN: u32 = 10;
/// Close an open zone.
pub const UBLK_IO_OP_ZONE_CLOSE: u32 = 11;
/// Move a zone's write pointer to its end.
pub const UBLK_IO_OP_ZONE_FINISH: u32 = 12;
/// Write at a zone's write pointer and say where that was.
pub const UBLK_IO_OP_ZONE_APPEND: u32 = 13;
/// Empty every zone.
pub const UBLK_IO_OP_ZONE_RESET_ALL: u32 = 14;
/// Empty a zone.
pub const UBLK_IO_OP_ZONE_RESET: u32 = 15;
/// Fill the buffer with [`super::blk_zone`] structs.
pub const UBLK_IO_OP_REPORT_ZONES: u32 = 18;

// The flags are bits of the whole `op_flags` word; the header's own ublksrv_get_flags() shifts the
// word and does not match them.
/// Do not retry device errors.
pub const UBLK_IO_F_FAILFAST_DEV: u32 = 1 << 8;
/// Do not retry transport errors.
pub const UBLK_IO_F_FAILFAST_TRANSPORT: u32 = 1 << 9;
/// Do not retry driver errors.
pub const UBLK_IO_F_FAILFAST_DRIVER: u32 = 1 << 10;
/// Metadata of a file system.
pub const UBLK_IO_F_META: u32 = 1 << 11;
/// Durable before it completes.
pub const UBLK_IO_F_FUA: u32 = 1 << 13;
/// WRITE_ZEROES may not deallocate.
pub const UBLK_IO_F_NOUNMAP: u32 = 1 << 15;
/// Swap traffic.
pub const UBLK_IO_F_SWAP: u32 = 1 << 16;
/// Automatic registration failed: register by hand.
pub const UBLK_IO_F_NEED_REG_BUF: u32 = 1 << 17;
/// The request has integrity metadata.
pub const UBLK_IO_F_INTEGRITY: u32 = 1 << 18;
/// `addr` is an index and offset into a shared buffer, see [`super::UBLK_SHMEM_ZC_IDX_OFF`].
pub const UBLK_IO_F_SHMEM_ZC: u32 = 1 << 19;

/// A request, in the memory that the server maps from `/dev/ublkcN`, indexed by tag.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublksrv_io_desc {
    /// `UBLK_IO_OP_*` in bits 0 to 7, `UBLK_IO_F_*` in the others.
    pub op_flags: u32,
    /// Length in 512-byte sectors; for REPORT_ZONES a number of zones (`nr_zones` in the kernel's
    /// union).
    pub nr_sectors: u32,
    /// Start in 512-byte sectors.
    pub start_sector: u64,
    /// The buffer of the last fetch, or what a flag says.
    pub addr: u64,
}

assert_layout!(ublksrv_io_desc: 24, align 8 {
    op_flags @ 0, nr_sectors @ 4, start_sector @ 8, addr @ 16,
});
plain!(ublksrv_io_desc { op_flags, nr_sectors, start_sector, addr });

impl ublksrv_io_desc {
    /// `UBLK_IO_OP_*`.
    pub const fn op(&self) -> u32 {
        self.op_flags & 0xff
    }

    /// `UBLK_IO_F_*`, not shifted, so that the constants match.
    pub const fn flags(&self) -> u32 {
        self.op_flags & !0xff
    }
}

/// The command of an `IORING_OP_URING_CMD` to `/dev/ublkcN`, at byte 48 of the SQE.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublksrv_io_cmd {
    /// The queue.
    pub q_id: u16,
    /// The tag.
    pub tag: u16,
    /// Of a commit: bytes done, or a negated errno.
    pub result: i32,
    /// The tag's buffer, the index of a registered one, or a zone append's LBA in sectors
    /// (`zone_append_lba` in the kernel's union).
    pub addr: u64,
}

assert_layout!(ublksrv_io_cmd: 16, align 8 { q_id @ 0, tag @ 2, result @ 4, addr @ 8 });
plain!(ublksrv_io_cmd { q_id, tag, result, addr });

/// If automatic registration fails, deliver the request with [`UBLK_IO_F_NEED_REG_BUF`] and do not
/// fail it.
pub const UBLK_AUTO_BUF_REG_FALLBACK: u8 = 1 << 0;
/// Every flag of [`ublk_auto_buf_reg`].
pub const UBLK_AUTO_BUF_REG_F_MASK: u8 = UBLK_AUTO_BUF_REG_FALLBACK;

/// Where the driver registers a request's pages; travels in the SQE's `addr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_auto_buf_reg {
    /// Index in the ring's buffer table.
    pub index: u16,
    /// [`UBLK_AUTO_BUF_REG_FALLBACK`] or 0.
    pub flags: u8,
    /// Zero.
    pub reserved0: u8,
    /// Zero.
    pub reserved1: u32,
}

assert_layout!(ublk_auto_buf_reg: 8, align 4 { index @ 0, flags @ 2, reserved0 @ 3, reserved1 @ 4 });
plain!(ublk_auto_buf_reg { index, flags, reserved0, reserved1 });

/// `ublk_auto_buf_reg_to_sqe_addr()`.
pub const fn ublk_auto_buf_reg_to_sqe_addr(reg: &ublk_auto_buf_reg) -> u64 {
    reg.index as u64
        | (reg.flags as u64) << 16
        | (reg.reserved0 as u64) << 24
        | (reg.reserved1 as u64) << 32
}

/// `ublk_sqe_addr_to_auto_buf_reg()`.
pub const fn ublk_sqe_addr_to_auto_buf_reg(addr: u64) -> ublk_auto_buf_reg {
    ublk_auto_buf_reg {
        index: addr as u16,
        flags: (addr >> 16) as u8,
        reserved0: (addr >> 24) as u8,
        reserved1: (addr >> 32) as u32,
    }
}
