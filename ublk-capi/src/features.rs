//! The driver's features, as numbers with names.

use std::ffi::{CStr, c_char};

/// Requests' pages can be registered with a ring. Since Linux 6.15.
pub const UBLK_RS_FEATURE_SUPPORT_ZERO_COPY: u64 = 1 << 0;
/// Requests arrive through task work; forced on by current drivers. Since Linux 6.0.
pub const UBLK_RS_FEATURE_URING_CMD_COMP_IN_TASK: u64 = 1 << 1;
/// The server names a WRITE's buffer when the request arrives. Since Linux 6.0.
pub const UBLK_RS_FEATURE_NEED_GET_DATA: u64 = 1 << 2;
/// The disk outlives its server; I/O waits for the next one. Since Linux 6.1.
pub const UBLK_RS_FEATURE_USER_RECOVERY: u64 = 1 << 3;
/// With USER_RECOVERY: requests that a dead server held are sent to the next one. Since Linux 6.1.
pub const UBLK_RS_FEATURE_USER_RECOVERY_REISSUE: u64 = 1 << 4;
/// The device belongs to an unprivileged user. Since Linux 6.3.
pub const UBLK_RS_FEATURE_UNPRIVILEGED_DEV: u64 = 1 << 5;
/// Commands are ioctl numbers; forced on by current drivers. Since Linux 6.4.
pub const UBLK_RS_FEATURE_CMD_IOCTL_ENCODE: u64 = 1 << 6;
/// Data moves by pread and pwrite on the device node. Since Linux 6.5.
pub const UBLK_RS_FEATURE_USER_COPY: u64 = 1 << 7;
/// The disk is zoned. Since Linux 6.6.
pub const UBLK_RS_FEATURE_ZONED: u64 = 1 << 8;
/// With USER_RECOVERY: I/O fails while there is no server. Since Linux 6.13.
pub const UBLK_RS_FEATURE_USER_RECOVERY_FAIL_IO: u64 = 1 << 9;
/// The disk can be resized. Since Linux 6.16.
pub const UBLK_RS_FEATURE_UPDATE_SIZE: u64 = 1 << 10;
/// The driver registers requests' pages by itself. Since Linux 6.16.
pub const UBLK_RS_FEATURE_AUTO_BUF_REG: u64 = 1 << 11;
/// With USER_RECOVERY: the device can be taken from a live server. Since Linux 6.16.
pub const UBLK_RS_FEATURE_QUIESCE: u64 = 1 << 12;
/// Each tag may have its own thread; forced on by current drivers, except with BATCH_IO. Since Linux 6.16.
pub const UBLK_RS_FEATURE_PER_IO_DAEMON: u64 = 1 << 13;
/// Any thread may register a request's pages; forced on by current drivers. Since Linux 6.17.
pub const UBLK_RS_FEATURE_BUF_REG_OFF_DAEMON: u64 = 1 << 14;
/// Requests and results travel in arrays. Since Linux 7.0.
pub const UBLK_RS_FEATURE_BATCH_IO: u64 = 1 << 15;
/// Requests may carry integrity metadata. Since Linux 7.0.
pub const UBLK_RS_FEATURE_INTEGRITY: u64 = 1 << 16;
/// The device can be stopped only if unused; forced on by current drivers. Since Linux 7.0.
pub const UBLK_RS_FEATURE_SAFE_STOP_DEV: u64 = 1 << 17;
/// The kernel does not look for partitions when the disk appears. Since Linux 7.0.
pub const UBLK_RS_FEATURE_NO_AUTO_PART_SCAN: u64 = 1 << 18;
/// Memory shared with clients is used without a copy. Since Linux 7.1.
pub const UBLK_RS_FEATURE_SHMEM_ZC: u64 = 1 << 19;
/// Descriptors have a chosen size. Since Linux 7.3.
pub const UBLK_RS_FEATURE_IO_DESC_SIZE: u64 = 1 << 20;

/// By bit.
const NAMES: &[(u64, &CStr)] = &[
    (UBLK_RS_FEATURE_SUPPORT_ZERO_COPY, c"SUPPORT_ZERO_COPY"),
    (UBLK_RS_FEATURE_URING_CMD_COMP_IN_TASK, c"URING_CMD_COMP_IN_TASK"),
    (UBLK_RS_FEATURE_NEED_GET_DATA, c"NEED_GET_DATA"),
    (UBLK_RS_FEATURE_USER_RECOVERY, c"USER_RECOVERY"),
    (UBLK_RS_FEATURE_USER_RECOVERY_REISSUE, c"USER_RECOVERY_REISSUE"),
    (UBLK_RS_FEATURE_UNPRIVILEGED_DEV, c"UNPRIVILEGED_DEV"),
    (UBLK_RS_FEATURE_CMD_IOCTL_ENCODE, c"CMD_IOCTL_ENCODE"),
    (UBLK_RS_FEATURE_USER_COPY, c"USER_COPY"),
    (UBLK_RS_FEATURE_ZONED, c"ZONED"),
    (UBLK_RS_FEATURE_USER_RECOVERY_FAIL_IO, c"USER_RECOVERY_FAIL_IO"),
    (UBLK_RS_FEATURE_UPDATE_SIZE, c"UPDATE_SIZE"),
    (UBLK_RS_FEATURE_AUTO_BUF_REG, c"AUTO_BUF_REG"),
    (UBLK_RS_FEATURE_QUIESCE, c"QUIESCE"),
    (UBLK_RS_FEATURE_PER_IO_DAEMON, c"PER_IO_DAEMON"),
    (UBLK_RS_FEATURE_BUF_REG_OFF_DAEMON, c"BUF_REG_OFF_DAEMON"),
    (UBLK_RS_FEATURE_BATCH_IO, c"BATCH_IO"),
    (UBLK_RS_FEATURE_INTEGRITY, c"INTEGRITY"),
    (UBLK_RS_FEATURE_SAFE_STOP_DEV, c"SAFE_STOP_DEV"),
    (UBLK_RS_FEATURE_NO_AUTO_PART_SCAN, c"NO_AUTO_PART_SCAN"),
    (UBLK_RS_FEATURE_SHMEM_ZC, c"SHMEM_ZC"),
    (UBLK_RS_FEATURE_IO_DESC_SIZE, c"IO_DESC_SIZE"),
];

/// The kernel's name of a single feature, without UBLK_F_; NULL for one that this version does not know, or several.
/// Lives for ever. Never blocks.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_feature_name(feature: u64) -> *const c_char {
    NAMES.iter().find(|(bit, _)| *bit == feature).map_or(std::ptr::null(), |(_, n)| n.as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublk_core::control::Features;

    #[test]
    fn features_are_the_cores() {
        let all = NAMES.iter().fold(0, |all, (bit, _)| all | bit);
        assert_eq!(all, Features::known().bits());
        for (bit, name) in NAMES {
            assert_eq!(Features::from_bits(*bit).name(), name.to_str().ok());
        }
    }
}
