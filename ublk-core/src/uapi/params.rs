//! Parameters of a disk: the sections of `SET_PARAMS` and `GET_PARAMS`.

use super::assert_layout;
use super::bytes::plain;

/// The disk cannot be written.
pub const UBLK_ATTR_READ_ONLY: u32 = 1 << 0;
/// The disk seeks.
pub const UBLK_ATTR_ROTATIONAL: u32 = 1 << 1;
/// Completed writes may be lost until a flush.
pub const UBLK_ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// Writes may be asked to be durable by themselves.
pub const UBLK_ATTR_FUA: u32 = 1 << 3;

/// The basic section, the only mandatory one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_param_basic {
    /// `UBLK_ATTR_*`.
    pub attrs: u32,
    /// Base-2 logarithm of the logical block size in bytes.
    pub logical_bs_shift: u8,
    /// Base-2 logarithm of the physical block size in bytes.
    pub physical_bs_shift: u8,
    /// Base-2 logarithm of the optimal I/O size in bytes.
    pub io_opt_shift: u8,
    /// Base-2 logarithm of the minimal I/O size in bytes.
    pub io_min_shift: u8,
    /// Largest request in 512-byte sectors.
    pub max_sectors: u32,
    /// A boundary in 512-byte sectors that no request crosses, 0 for none; a zoned disk's zone
    /// size.
    pub chunk_sectors: u32,
    /// Capacity in 512-byte sectors.
    pub dev_sectors: u64,
    /// A memory boundary mask that no gap between segments violates, 0 for none.
    pub virt_boundary_mask: u64,
}

assert_layout!(ublk_param_basic: 32, align 8 {
    attrs @ 0, logical_bs_shift @ 4, physical_bs_shift @ 5, io_opt_shift @ 6, io_min_shift @ 7,
    max_sectors @ 8, chunk_sectors @ 12, dev_sectors @ 16, virt_boundary_mask @ 24,
});
plain!(ublk_param_basic {
    attrs,
    logical_bs_shift,
    physical_bs_shift,
    io_opt_shift,
    io_min_shift,
    max_sectors,
    chunk_sectors,
    dev_sectors,
    virt_boundary_mask,
});

/// Discard and write zeroes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_param_discard {
    /// Bytes from the disk's start to the first discard granule.
    pub discard_alignment: u32,
    /// Bytes of a discard granule, not 0.
    pub discard_granularity: u32,
    /// Largest discard in 512-byte sectors, 0 for no discard.
    pub max_discard_sectors: u32,
    /// Largest WRITE_ZEROES in 512-byte sectors, 0 for none.
    pub max_write_zeroes_sectors: u32,
    /// 1 where there is discard.
    pub max_discard_segments: u16,
    /// Zero.
    pub reserved0: u16,
}

assert_layout!(ublk_param_discard: 20, align 4 {
    discard_alignment @ 0, discard_granularity @ 4, max_discard_sectors @ 8, max_write_zeroes_sectors @ 12,
    max_discard_segments @ 16, reserved0 @ 18,
});
plain!(ublk_param_discard {
    discard_alignment,
    discard_granularity,
    max_discard_sectors,
    max_write_zeroes_sectors,
    max_discard_segments,
    reserved0,
});

/// Device numbers, read only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_param_devt {
    /// Major number of `/dev/ublkcN`.
    pub char_major: u32,
    /// Minor number of `/dev/ublkcN`.
    pub char_minor: u32,
    /// Major number of `/dev/ublkbN`, 0 while it does not exist.
    pub disk_major: u32,
    /// Minor number of `/dev/ublkbN`.
    pub disk_minor: u32,
}

assert_layout!(ublk_param_devt: 16, align 4 {
    char_major @ 0, char_minor @ 4, disk_major @ 8, disk_minor @ 12,
});
plain!(ublk_param_devt { char_major, char_minor, disk_major, disk_minor });

/// Zones.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_param_zoned {
    /// Most open zones, 0 for no limit.
    pub max_open_zones: u32,
    /// Most active zones, 0 for no limit.
    pub max_active_zones: u32,
    /// Largest zone append in 512-byte sectors, not 0.
    pub max_zone_append_sectors: u32,
    /// Zero.
    pub reserved: [u8; 20],
}

assert_layout!(ublk_param_zoned: 32, align 4 {
    max_open_zones @ 0, max_active_zones @ 4, max_zone_append_sectors @ 8, reserved @ 12,
});
plain!(ublk_param_zoned { max_open_zones, max_active_zones, max_zone_append_sectors, reserved });

/// Memory alignment of direct I/O.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_param_dma_align {
    /// A mask: the alignment in bytes less one.
    pub alignment: u32,
    /// Zero.
    pub pad: [u8; 4],
}

assert_layout!(ublk_param_dma_align: 8, align 4 { alignment @ 0, pad @ 4 });
plain!(ublk_param_dma_align { alignment, pad });

/// Smallest segment limit in bytes.
pub const UBLK_MIN_SEGMENT_SIZE: u32 = 4096;

/// Limits of a request's memory segments.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_param_segment {
    /// A mask: no segment crosses a multiple of it plus one, a power of two of at least 4096.
    pub seg_boundary_mask: u64,
    /// Bytes of the largest segment, at least 4096.
    pub max_segment_size: u32,
    /// Most segments.
    pub max_segments: u16,
    /// Zero.
    pub pad: [u8; 2],
}

assert_layout!(ublk_param_segment: 16, align 8 {
    seg_boundary_mask @ 0, max_segment_size @ 8, max_segments @ 12, pad @ 14,
});
plain!(ublk_param_segment { seg_boundary_mask, max_segment_size, max_segments, pad });

/// `linux/fs.h`: the device verifies or generates protection information.
pub const LBMD_PI_CAP_INTEGRITY: u32 = 1 << 0;
/// `linux/fs.h`: the reference tag counts blocks.
pub const LBMD_PI_CAP_REFTAG: u32 = 1 << 1;
/// `linux/fs.h`: no checksum.
pub const LBMD_PI_CSUM_NONE: u8 = 0;
/// `linux/fs.h`: the checksum of IP, 2 bytes.
pub const LBMD_PI_CSUM_IP: u8 = 1;
/// `linux/fs.h`: CRC16 of T10 DIF, 2 bytes.
pub const LBMD_PI_CSUM_CRC16_T10DIF: u8 = 2;
/// `linux/fs.h`: CRC64 of NVMe, 8 bytes.
pub const LBMD_PI_CSUM_CRC64_NVME: u8 = 4;

/// Integrity metadata.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_param_integrity {
    /// `LBMD_PI_CAP_*`.
    pub flags: u32,
    /// Most segments of metadata, 0 for no limit.
    pub max_integrity_segments: u16,
    /// Base-2 logarithm of the bytes of data that one tuple protects.
    pub interval_exp: u8,
    /// Bytes of metadata per interval, not 0.
    pub metadata_size: u8,
    /// Offset of the protection information in the metadata.
    pub pi_offset: u8,
    /// `LBMD_PI_CSUM_*`.
    pub csum_type: u8,
    /// Bytes of the application tag.
    pub tag_size: u8,
    /// Zero.
    pub pad: [u8; 5],
}

assert_layout!(ublk_param_integrity: 16, align 4 {
    flags @ 0, max_integrity_segments @ 4, interval_exp @ 6, metadata_size @ 7, pi_offset @ 8, csum_type @ 9,
    tag_size @ 10, pad @ 11,
});
plain!(ublk_param_integrity {
    flags,
    max_integrity_segments,
    interval_exp,
    metadata_size,
    pi_offset,
    csum_type,
    tag_size,
    pad,
});

/// [`ublk_params::basic`] is filled in.
pub const UBLK_PARAM_TYPE_BASIC: u32 = 1 << 0;
/// [`ublk_params::discard`] is filled in.
pub const UBLK_PARAM_TYPE_DISCARD: u32 = 1 << 1;
/// [`ublk_params::devt`] is filled in; never in SET_PARAMS.
pub const UBLK_PARAM_TYPE_DEVT: u32 = 1 << 2;
/// [`ublk_params::zoned`] is filled in.
pub const UBLK_PARAM_TYPE_ZONED: u32 = 1 << 3;
/// [`ublk_params::dma`] is filled in.
pub const UBLK_PARAM_TYPE_DMA_ALIGN: u32 = 1 << 4;
/// [`ublk_params::seg`] is filled in.
pub const UBLK_PARAM_TYPE_SEGMENT: u32 = 1 << 5;
/// [`ublk_params::integrity`] is filled in.
pub const UBLK_PARAM_TYPE_INTEGRITY: u32 = 1 << 6;

/// Everything that describes a disk; sections that `types` does not name are ignored.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub struct ublk_params {
    /// Bytes of the struct, in both commands; older drivers know a prefix and ignore the rest.
    pub len: u32,
    /// `UBLK_PARAM_TYPE_*`.
    pub types: u32,
    /// Block sizes, capacity, attributes.
    pub basic: ublk_param_basic,
    /// Discard and write zeroes.
    pub discard: ublk_param_discard,
    /// Device numbers.
    pub devt: ublk_param_devt,
    /// Zones.
    pub zoned: ublk_param_zoned,
    /// Memory alignment.
    pub dma: ublk_param_dma_align,
    /// Zero. The compiler's gap before `seg` in C, made a field so that none of the bytes that the
    /// kernel copies is uninitialised.
    pub hole: u32,
    /// Memory segments.
    pub seg: ublk_param_segment,
    /// Integrity metadata.
    pub integrity: ublk_param_integrity,
}

assert_layout!(ublk_params: 152, align 8 {
    len @ 0, types @ 4, basic @ 8, discard @ 40, devt @ 60, zoned @ 76, dma @ 108, hole @ 116, seg @ 120,
    integrity @ 136,
});
plain!(ublk_params { len, types, basic, discard, devt, zoned, dma, hole, seg, integrity });
