//! What describes a device: the payload of control commands and the answer of ADD_DEV and
//! GET_DEV_INFO.

use super::assert_layout;
use super::bytes::plain;

/// No server serves the device and it has no disk.
pub const UBLK_S_DEV_DEAD: u16 = 0;
/// The device's disk exists and its server answers.
pub const UBLK_S_DEV_LIVE: u16 = 1;
/// The server is gone, the disk exists, I/O waits for a new server.
pub const UBLK_S_DEV_QUIESCED: u16 = 2;
/// The server is gone, the disk exists, I/O fails until a new server comes.
pub const UBLK_S_DEV_FAIL_IO: u16 = 3;

/// Bytes that GET_FEATURES writes.
pub const UBLK_FEATURES_LEN: usize = 8;

/// The command of an `IORING_OP_URING_CMD` to `/dev/ublk-control`, at byte 48 of a 128-byte SQE.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublksrv_ctrl_cmd {
    /// The device; `u32::MAX` lets ADD_DEV choose.
    pub dev_id: u32,
    /// `u16::MAX` where the command is not about a queue.
    pub queue_id: u16,
    /// Bytes at `addr`, the path included.
    pub len: u16,
    /// A buffer of the command, in or out.
    pub addr: u64,
    /// A value of the command.
    pub data: [u64; 1],
    /// Bytes of the device node's path before the payload at `addr`, with its NUL; 0 for none.
    pub dev_path_len: u16,
    /// Zero.
    pub pad: u16,
    /// Zero.
    pub reserved: u32,
}

assert_layout!(ublksrv_ctrl_cmd: 32, align 8 {
    dev_id @ 0, queue_id @ 4, len @ 6, addr @ 8, data @ 16, dev_path_len @ 24, pad @ 26, reserved @ 28,
});
plain!(ublksrv_ctrl_cmd { dev_id, queue_id, len, addr, data, dev_path_len, pad, reserved });

/// A device as ADD_DEV takes and answers it and as GET_DEV_INFO reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublksrv_ctrl_dev_info {
    /// Hardware queues.
    pub nr_hw_queues: u16,
    /// Tags of each queue.
    pub queue_depth: u16,
    /// One of `UBLK_S_DEV_*`; the driver's to write.
    pub state: u16,
    /// Bytes of a descriptor, with `UBLK_F_IO_DESC_SIZE`; earlier drivers leave what was passed.
    pub io_desc_size: u16,
    /// Bytes of the largest request.
    pub max_io_buf_bytes: u32,
    /// The device's number.
    pub dev_id: u32,
    /// The server's process id in the caller's namespace, -1 for none; the driver's to write.
    pub ublksrv_pid: i32,
    /// Zero.
    pub pad1: u32,
    /// `UBLK_F_*`: asked for in ADD_DEV's input, granted in its answer.
    pub flags: u64,
    /// The server's own, kept by the driver and returned untouched.
    pub ublksrv_flags: u64,
    /// The user that added the device; the driver's to write.
    pub owner_uid: u32,
    /// The group that added the device; the driver's to write.
    pub owner_gid: u32,
    /// Zero.
    pub reserved1: u64,
    /// Zero.
    pub reserved2: u64,
}

assert_layout!(ublksrv_ctrl_dev_info: 64, align 8 {
    nr_hw_queues @ 0, queue_depth @ 2, state @ 4, io_desc_size @ 6, max_io_buf_bytes @ 8, dev_id @ 12,
    ublksrv_pid @ 16, pad1 @ 20, flags @ 24, ublksrv_flags @ 32, owner_uid @ 40, owner_gid @ 44,
    reserved1 @ 48, reserved2 @ 56,
});
plain!(ublksrv_ctrl_dev_info {
    nr_hw_queues,
    queue_depth,
    state,
    io_desc_size,
    max_io_buf_bytes,
    dev_id,
    ublksrv_pid,
    pad1,
    flags,
    ublksrv_flags,
    owner_uid,
    owner_gid,
    reserved1,
    reserved2,
});
