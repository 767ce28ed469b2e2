//! Feature flags of a device, `flags` of [`super::ublksrv_ctrl_dev_info`].

/// A request's pages can be registered with a ring and never mapped.
pub const UBLK_F_SUPPORT_ZERO_COPY: u64 = 1 << 0;
/// Requests reach the server through task work; current drivers force it on.
pub const UBLK_F_URING_CMD_COMP_IN_TASK: u64 = 1 << 1;
/// The server names a WRITE's buffer when it arrives and not before.
pub const UBLK_F_NEED_GET_DATA: u64 = 1 << 2;
/// The disk outlives its server; requests in the dead server fail.
pub const UBLK_F_USER_RECOVERY: u64 = 1 << 3;
/// With recovery: requests in the dead server are sent again.
pub const UBLK_F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
/// The device belongs to the user who added it.
pub const UBLK_F_UNPRIVILEGED_DEV: u64 = 1 << 5;
/// Commands are encoded as ioctls; current drivers force it on.
pub const UBLK_F_CMD_IOCTL_ENCODE: u64 = 1 << 6;
/// Data moves by `pread` and `pwrite` on `/dev/ublkcN`.
pub const UBLK_F_USER_COPY: u64 = 1 << 7;
/// The disk is zoned.
pub const UBLK_F_ZONED: u64 = 1 << 8;
/// With recovery: I/O fails while no server serves.
pub const UBLK_F_USER_RECOVERY_FAIL_IO: u64 = 1 << 9;
/// The driver knows UPDATE_SIZE.
pub const UBLK_F_UPDATE_SIZE: u64 = 1 << 10;
/// The driver registers a request's pages before it delivers the request.
pub const UBLK_F_AUTO_BUF_REG: u64 = 1 << 11;
/// The driver knows QUIESCE_DEV.
pub const UBLK_F_QUIESCE: u64 = 1 << 12;
/// Each tag may be served by its own task.
pub const UBLK_F_PER_IO_DAEMON: u64 = 1 << 13;
/// Any task may register and unregister a request's pages.
pub const UBLK_F_BUF_REG_OFF_DAEMON: u64 = 1 << 14;
/// Requests and results travel in arrays.
pub const UBLK_F_BATCH_IO: u64 = 1 << 15;
/// Requests may carry integrity metadata.
pub const UBLK_F_INTEGRITY: u64 = 1 << 16;
/// The driver knows TRY_STOP_DEV.
pub const UBLK_F_SAFE_STOP_DEV: u64 = 1 << 17;
/// The kernel does not look for partitions when the disk appears.
pub const UBLK_F_NO_AUTO_PART_SCAN: u64 = 1 << 18;
/// Buffers that server and client share are used without a copy.
pub const UBLK_F_SHMEM_ZC: u64 = 1 << 19;
/// Descriptors have the size that `io_desc_size` says.
pub const UBLK_F_IO_DESC_SIZE: u64 = 1 << 20;
