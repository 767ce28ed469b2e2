//! Command numbers: what goes into `cmd_op` of an `IORING_OP_URING_CMD`.
//!
//! Every command since 6.4 is encoded as an ioctl; the bare numbers are the encoding of older
//! drivers, which newer ones accept while built with `CONFIG_BLKDEV_UBLK_LEGACY_OPCODES`. Commands
//! added since have no bare number.

use super::{ublk_batch_io, ublksrv_ctrl_cmd, ublksrv_io_cmd};

// asm-generic/ioctl.h, and the three architectures that have their own.
#[cfg(not(any(target_arch = "mips64", target_arch = "powerpc64", target_arch = "sparc64")))]
mod ioc {
    pub(super) const WRITE: u32 = 1;
    pub(super) const READ: u32 = 2;
    pub(super) const DIR_SHIFT: u32 = 30;
}
#[cfg(any(target_arch = "mips64", target_arch = "powerpc64", target_arch = "sparc64"))]
mod ioc {
    pub(super) const WRITE: u32 = 4;
    pub(super) const READ: u32 = 2;
    pub(super) const DIR_SHIFT: u32 = 29;
}

const fn ioc<T>(dir: u32, nr: u32) -> u32 {
    (dir << ioc::DIR_SHIFT) | ((size_of::<T>() as u32) << 16) | ((b'u' as u32) << 8) | nr
}

const fn ior<T>(nr: u32) -> u32 {
    ioc::<T>(ioc::READ, nr)
}

const fn iowr<T>(nr: u32) -> u32 {
    ioc::<T>(ioc::READ | ioc::WRITE, nr)
}

/// Legacy number of [`UBLK_U_CMD_GET_QUEUE_AFFINITY`].
pub const UBLK_CMD_GET_QUEUE_AFFINITY: u32 = 0x01;
/// Legacy number of [`UBLK_U_CMD_GET_DEV_INFO`].
pub const UBLK_CMD_GET_DEV_INFO: u32 = 0x02;
/// Legacy number of [`UBLK_U_CMD_ADD_DEV`].
pub const UBLK_CMD_ADD_DEV: u32 = 0x04;
/// Legacy number of [`UBLK_U_CMD_DEL_DEV`].
pub const UBLK_CMD_DEL_DEV: u32 = 0x05;
/// Legacy number of [`UBLK_U_CMD_START_DEV`].
pub const UBLK_CMD_START_DEV: u32 = 0x06;
/// Legacy number of [`UBLK_U_CMD_STOP_DEV`].
pub const UBLK_CMD_STOP_DEV: u32 = 0x07;
/// Legacy number of [`UBLK_U_CMD_SET_PARAMS`].
pub const UBLK_CMD_SET_PARAMS: u32 = 0x08;
/// Legacy number of [`UBLK_U_CMD_GET_PARAMS`].
pub const UBLK_CMD_GET_PARAMS: u32 = 0x09;
/// Legacy number of [`UBLK_U_CMD_START_USER_RECOVERY`].
pub const UBLK_CMD_START_USER_RECOVERY: u32 = 0x10;
/// Legacy number of [`UBLK_U_CMD_END_USER_RECOVERY`].
pub const UBLK_CMD_END_USER_RECOVERY: u32 = 0x11;
/// Legacy number of [`UBLK_U_CMD_GET_DEV_INFO2`].
pub const UBLK_CMD_GET_DEV_INFO2: u32 = 0x12;

/// Which CPUs the block layer maps to a queue.
pub const UBLK_U_CMD_GET_QUEUE_AFFINITY: u32 = ior::<ublksrv_ctrl_cmd>(UBLK_CMD_GET_QUEUE_AFFINITY);
/// Read a [`super::ublksrv_ctrl_dev_info`].
pub const UBLK_U_CMD_GET_DEV_INFO: u32 = ior::<ublksrv_ctrl_cmd>(UBLK_CMD_GET_DEV_INFO);
/// Create a device and its `/dev/ublkcN`.
pub const UBLK_U_CMD_ADD_DEV: u32 = iowr::<ublksrv_ctrl_cmd>(UBLK_CMD_ADD_DEV);
/// Delete a device and wait until its number is free.
pub const UBLK_U_CMD_DEL_DEV: u32 = iowr::<ublksrv_ctrl_cmd>(UBLK_CMD_DEL_DEV);
/// Wait for every fetch and create `/dev/ublkbN`.
pub const UBLK_U_CMD_START_DEV: u32 = iowr::<ublksrv_ctrl_cmd>(UBLK_CMD_START_DEV);
/// Remove `/dev/ublkbN` and abort the commands of its server.
pub const UBLK_U_CMD_STOP_DEV: u32 = iowr::<ublksrv_ctrl_cmd>(UBLK_CMD_STOP_DEV);
/// Set the [`super::ublk_params`] of a device that has no disk.
pub const UBLK_U_CMD_SET_PARAMS: u32 = iowr::<ublksrv_ctrl_cmd>(UBLK_CMD_SET_PARAMS);
/// Read the [`super::ublk_params`].
pub const UBLK_U_CMD_GET_PARAMS: u32 = ior::<ublksrv_ctrl_cmd>(UBLK_CMD_GET_PARAMS);
/// Begin to serve a device whose server is gone.
pub const UBLK_U_CMD_START_USER_RECOVERY: u32 =
    iowr::<ublksrv_ctrl_cmd>(UBLK_CMD_START_USER_RECOVERY);
/// Wait for every fetch of the new server and let I/O flow again.
pub const UBLK_U_CMD_END_USER_RECOVERY: u32 = iowr::<ublksrv_ctrl_cmd>(UBLK_CMD_END_USER_RECOVERY);
/// [`UBLK_U_CMD_GET_DEV_INFO`] with the path of the device's node before the payload.
pub const UBLK_U_CMD_GET_DEV_INFO2: u32 = ior::<ublksrv_ctrl_cmd>(UBLK_CMD_GET_DEV_INFO2);
/// Read the driver's feature flags, eight bytes.
pub const UBLK_U_CMD_GET_FEATURES: u32 = ior::<ublksrv_ctrl_cmd>(0x13);
/// Delete a device without waiting for its number.
pub const UBLK_U_CMD_DEL_DEV_ASYNC: u32 = ior::<ublksrv_ctrl_cmd>(0x14);
/// Resize the disk; `data[0]` is the new size in sectors.
pub const UBLK_U_CMD_UPDATE_SIZE: u32 = iowr::<ublksrv_ctrl_cmd>(0x15);
/// Take the device from its server without losing it; `data[0]` is a timeout in milliseconds.
pub const UBLK_U_CMD_QUIESCE_DEV: u32 = iowr::<ublksrv_ctrl_cmd>(0x16);
/// [`UBLK_U_CMD_STOP_DEV`], refused while somebody has the disk open.
pub const UBLK_U_CMD_TRY_STOP_DEV: u32 = iowr::<ublksrv_ctrl_cmd>(0x17);
/// Register a [`super::ublk_shmem_buf_reg`]; the result is its index.
pub const UBLK_U_CMD_REG_BUF: u32 = iowr::<ublksrv_ctrl_cmd>(0x18);
/// Unregister the shared buffer whose index is `data[0]`.
pub const UBLK_U_CMD_UNREG_BUF: u32 = iowr::<ublksrv_ctrl_cmd>(0x19);

/// Legacy number of [`UBLK_U_IO_FETCH_REQ`].
pub const UBLK_IO_FETCH_REQ: u32 = 0x20;
/// Legacy number of [`UBLK_U_IO_COMMIT_AND_FETCH_REQ`].
pub const UBLK_IO_COMMIT_AND_FETCH_REQ: u32 = 0x21;
/// Legacy number of [`UBLK_U_IO_NEED_GET_DATA`].
pub const UBLK_IO_NEED_GET_DATA: u32 = 0x22;

/// Offer a tag to the kernel, before the device starts.
pub const UBLK_U_IO_FETCH_REQ: u32 = iowr::<ublksrv_io_cmd>(UBLK_IO_FETCH_REQ);
/// Give a request's result and offer its tag again.
pub const UBLK_U_IO_COMMIT_AND_FETCH_REQ: u32 =
    iowr::<ublksrv_io_cmd>(UBLK_IO_COMMIT_AND_FETCH_REQ);
/// Name the buffer that a WRITE's data is copied into.
pub const UBLK_U_IO_NEED_GET_DATA: u32 = iowr::<ublksrv_io_cmd>(UBLK_IO_NEED_GET_DATA);
/// Put a request's pages into the ring's buffer table.
pub const UBLK_U_IO_REGISTER_IO_BUF: u32 = iowr::<ublksrv_io_cmd>(0x23);
/// Take a request's pages out of the ring's buffer table.
pub const UBLK_U_IO_UNREGISTER_IO_BUF: u32 = iowr::<ublksrv_io_cmd>(0x24);
/// Offer many tags to the kernel.
pub const UBLK_U_IO_PREP_IO_CMDS: u32 = iowr::<ublk_batch_io>(0x25);
/// Give many results; the completion says how many bytes of the array were consumed.
pub const UBLK_U_IO_COMMIT_IO_CMDS: u32 = iowr::<ublk_batch_io>(0x26);
/// Receive tags with requests into a provided buffer, multishot.
pub const UBLK_U_IO_FETCH_IO_CMDS: u32 = iowr::<ublk_batch_io>(0x27);

#[cfg(target_arch = "x86_64")]
const _: () = {
    assert!(UBLK_U_CMD_ADD_DEV == 0xC020_7504);
    assert!(UBLK_U_CMD_GET_FEATURES == 0x8020_7513);
    assert!(UBLK_U_IO_FETCH_REQ == 0xC010_7520);
    assert!(UBLK_U_IO_FETCH_IO_CMDS == 0xC010_7527);
};
