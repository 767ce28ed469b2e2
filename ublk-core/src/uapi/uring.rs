//! The constants of `linux/io_uring.h` that ublk needs and the `io-uring` crate does not export.

/// `uring_cmd_flags`: `buf_index` names a registered buffer.
pub const IORING_URING_CMD_FIXED: u32 = 1 << 0;
/// `uring_cmd_flags`: one command, many completions, each into a provided buffer.
pub const IORING_URING_CMD_MULTISHOT: u32 = 1 << 1;
/// The opcode of a uring_cmd.
pub const IORING_OP_URING_CMD: u8 = 46;
/// The opcode of a uring_cmd in a 128-byte entry of a ring with mixed sizes, since 6.19.
pub const IORING_OP_URING_CMD128: u8 = 64;
/// `io_uring_setup`: entries of 64 and of 128 bytes in one ring.
pub const IORING_SETUP_SQE_MIXED: u32 = 1 << 19;
/// `io_uring_setup`: completions of 16 and of 32 bytes in one ring.
pub const IORING_SETUP_CQE_MIXED: u32 = 1 << 18;
