//! Offsets into `/dev/ublkcN`: descriptors by `mmap`, request data by `pread` and `pwrite`.

/// Where the descriptors of queue 0 are mapped from.
///
/// Queue `q` begins `q` × round_up([`UBLK_MAX_QUEUE_DEPTH`] × descriptor size, page) further: the
/// stride is that of the deepest queue, whatever the device's depth (`ublk_ch_mmap`). The kernel
/// divides the offset, so that a smaller stride maps queue 0 without an error.
pub const UBLKSRV_CMD_BUF_OFFSET: u64 = 0;
/// Where request data begins.
pub const UBLKSRV_IO_BUF_OFFSET: u64 = 0x8000_0000;

/// Most tags of a queue.
pub const UBLK_MAX_QUEUE_DEPTH: u16 = 4096;

/// First bit of the offset within a request's data.
pub const UBLK_IO_BUF_OFF: u32 = 0;
/// Bits of the offset within a request's data, hence 32 MiB at most.
pub const UBLK_IO_BUF_BITS: u32 = 25;
/// Mask of the offset within a request's data.
pub const UBLK_IO_BUF_BITS_MASK: u64 = (1 << UBLK_IO_BUF_BITS) - 1;

/// First bit of the tag.
pub const UBLK_TAG_OFF: u32 = UBLK_IO_BUF_BITS;
/// Bits of the tag.
pub const UBLK_TAG_BITS: u32 = 16;
/// Mask of the tag, once shifted down.
pub const UBLK_TAG_BITS_MASK: u64 = (1 << UBLK_TAG_BITS) - 1;

/// First bit of the queue.
pub const UBLK_QID_OFF: u32 = UBLK_TAG_OFF + UBLK_TAG_BITS;
/// Bits of the queue.
pub const UBLK_QID_BITS: u32 = 12;
/// Mask of the queue, once shifted down.
pub const UBLK_QID_BITS_MASK: u64 = (1 << UBLK_QID_BITS) - 1;

/// Most hardware queues of a device, before the driver clamps to the number of CPUs.
pub const UBLK_MAX_NR_QUEUES: u32 = 1 << UBLK_QID_BITS;

/// Bits of an offset from [`UBLKSRV_IO_BUF_OFFSET`].
pub const UBLKSRV_IO_BUF_TOTAL_BITS: u32 = UBLK_QID_OFF + UBLK_QID_BITS;
/// Bytes of all request data together.
pub const UBLKSRV_IO_BUF_TOTAL_SIZE: u64 = 1 << UBLKSRV_IO_BUF_TOTAL_BITS;

/// The bit that selects a request's integrity metadata instead of its data.
pub const UBLK_INTEGRITY_FLAG_OFF: u32 = 62;
/// [`UBLK_INTEGRITY_FLAG_OFF`] as a mask.
pub const UBLKSRV_IO_INTEGRITY_FLAG: u64 = 1 << UBLK_INTEGRITY_FLAG_OFF;
