//! A disk's parameters, checked before the kernel sees them.
//!
//! The driver answers every broken rule with EINVAL (`ublk_validate_params`) and the block layer
//! with a failed start (`blk_validate_limits`). Here each rule has words of its own.

use crate::error::{Error, ErrorKind, Result};
use crate::sys::memory::page_size;
use crate::uapi;

/// Bytes of a sector, the unit of every sector count in the kernel's interface.
pub const SECTOR: u64 = 512;
/// Bytes of the largest request in any mode: 25 bits of the offset that user copy reads and writes
/// at.
pub const MAX_IO_BYTES: u32 = 1 << uapi::UBLK_IO_BUF_BITS;
/// Bytes of the largest request unless asked otherwise.
pub const DEFAULT_MAX_IO_BYTES: u32 = 512 << 10;
/// The driver's bound of physical block, minimal and optimal I/O size.
const MAX_HINT: u32 = 256 << 20;

/// What the disk does with discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Discard {
    /// Bytes from the disk's start to the first granule: a multiple of the logical block size below
    /// the granularity.
    pub alignment: u32,
    /// Bytes of a granule: a multiple of the logical block size, not 0.
    pub granularity: u32,
    /// Bytes of the largest discard: a multiple of the logical block size, not 0, below 2 TiB.
    pub max_bytes: u64,
    /// Ranges of one discard; the driver takes 1 only.
    pub max_segments: u16,
}

impl Discard {
    /// Any number of granules at a time, aligned to the disk's start.
    pub const fn granules_of(granularity: u32) -> Self {
        // What one request can say, in whole granules of up to 4 KiB.
        Discard {
            alignment: 0,
            granularity,
            max_bytes: (u32::MAX as u64 & !0xfff),
            max_segments: 1,
        }
    }
}

/// Limits of a request's memory segments. All three count, and they exist since Linux 6.15.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentLimits {
    /// No segment crosses a multiple of this plus one, which is a power of two of at least 4096.
    pub boundary_mask: u64,
    /// Bytes of the largest segment, at least 4096.
    pub max_size: u32,
    /// Most segments of a request, at least 1.
    pub max_count: u16,
}

/// The zones of a zoned disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Zoned {
    /// Bytes from one zone's start to the next one's: a power of two, a multiple of the logical block size, below
    /// 2 TiB. The capacity is a multiple of it.
    pub zone_bytes: u64,
    /// Most zones that can be open at a time; 0 for no limit.
    pub max_open: u32,
    /// Most zones that can be active (open or closed) at a time, not below `max_open`; 0 for no limit.
    pub max_active: u32,
    /// Bytes of the largest append: a multiple of the logical block size, not 0. The kernel makes it no larger than
    /// the largest request and a zone.
    pub max_append_bytes: u64,
}

/// A disk's parameters. A value of this type breaks no rule: [`ParamsBuilder::build`] checks them
/// all.
///
/// ```
/// use ublk_core::control::DeviceParams;
///
/// let params = DeviceParams::builder(64 << 20).logical_block_size(4096).queue_depth(64).build()?;
/// assert_eq!(params.capacity(), 64 << 20);
///
/// let error = DeviceParams::builder(1000).build().unwrap_err();
/// assert!(error.to_string().contains("capacity"));
/// # Ok::<(), ublk_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceParams(pub(super) Fields);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fields {
    pub(super) capacity: u64,
    pub(super) queues: u16,
    pub(super) queue_depth: u16,
    pub(super) max_io_bytes: u32,
    pub(super) logical_block_size: u32,
    pub(super) physical_block_size: u32,
    pub(super) io_min: u32,
    pub(super) io_opt: u32,
    pub(super) read_only: bool,
    pub(super) rotational: bool,
    pub(super) volatile_cache: bool,
    pub(super) fua: bool,
    pub(super) discard: Option<Discard>,
    pub(super) max_write_zeroes_bytes: u64,
    pub(super) dma_alignment: Option<u32>,
    pub(super) segments: Option<SegmentLimits>,
    pub(super) zoned: Option<Zoned>,
}

/// Makes [`DeviceParams`]; what is not said has a default.
#[derive(Clone, Debug)]
#[must_use]
pub struct ParamsBuilder {
    fields: Fields,
    physical_block_size: Option<u32>,
    io_min: Option<u32>,
    io_opt: Option<u32>,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $ty:ty => $($field:ident).+ $(, $wrap:ident)?;)*) => {
        impl ParamsBuilder {
            $($(#[$doc])* pub fn $name(mut self, $name: $ty) -> Self {
                self.$($field).+ = setters!(@ $name $($wrap)?);
                self
            })*
        }
    };
    (@ $name:ident) => { $name };
    (@ $name:ident $wrap:ident) => { $wrap($name) };
}

setters! {
    /// Hardware queues, 1 to 4096, default 1. The driver clamps them to the number of CPUs.
    queues: u16 => fields.queues;
    /// Tags of each queue, 1 to 4096, default 128.
    queue_depth: u16 => fields.queue_depth;
    /// Bytes of the largest request: a multiple of the page size, at most 32 MiB, default 512 KiB.
    max_io_bytes: u32 => fields.max_io_bytes;
    /// Bytes of a logical block: a power of two from 512 to the page size, default 512.
    logical_block_size: u32 => fields.logical_block_size;
    /// Bytes of a physical block: a power of two from the logical block size to 256 MiB, default
    /// 4096.
    physical_block_size: u32 => physical_block_size, Some;
    /// Bytes of the smallest I/O that is not slow: a power of two from 512 to 256 MiB, default the
    /// physical block size.
    io_min: u32 => io_min, Some;
    /// Bytes of the best I/O: a power of two from 512 to 256 MiB, default the physical block size.
    io_opt: u32 => io_opt, Some;
    /// Whether the disk cannot be written; default no.
    read_only: bool => fields.read_only;
    /// Whether the disk seeks; default no.
    rotational: bool => fields.rotational;
    /// Whether completed writes may be lost until a flush, so that the kernel sends flushes;
    /// default no.
    volatile_cache: bool => fields.volatile_cache;
    /// Whether single writes can be asked to be durable; needs a volatile cache. Default no.
    fua: bool => fields.fua;
    /// What the disk does with discards; default: it takes none.
    discard: Discard => fields.discard, Some;
    /// Bytes of the largest WRITE_ZEROES: a multiple of the logical block size below 2 TiB. Default
    /// 0: it takes none.
    max_write_zeroes_bytes: u64 => fields.max_write_zeroes_bytes;
    /// Bytes that the memory of direct I/O is aligned to: a power of two from 2 to the page size.
    /// Asked for explicitly, it is a requirement: drivers before Linux 6.15 do not know it.
    /// Default: the kernel's choice.
    dma_alignment: u32 => fields.dma_alignment, Some;
    /// Limits of memory segments. Asked for explicitly, they are a requirement: drivers before
    /// Linux 6.15 do not know them.
    segments: SegmentLimits => fields.segments, Some;
    /// Zones, of a device with [`Features::ZONED`](super::Features::ZONED); default: it has none.
    zoned: Zoned => fields.zoned, Some;
}

impl ParamsBuilder {
    /// Bytes of the disk: a multiple of the logical block size.
    pub fn capacity(mut self, capacity: u64) -> Self {
        self.fields.capacity = capacity;
        self
    }

    /// Checks everything.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`], naming the rule that is broken and the value that breaks
    /// it.
    pub fn build(&self) -> Result<DeviceParams> {
        let mut fields = self.fields.clone();
        // A block that is larger than 4096 is its own physical block.
        let physical = self.physical_block_size.unwrap_or(fields.logical_block_size.max(4096));
        fields.physical_block_size = physical;
        fields.io_min = self.io_min.unwrap_or(physical);
        fields.io_opt = self.io_opt.unwrap_or(physical);
        fields.check(page_size() as u64).map_err(|rule| {
            Error::new(ErrorKind::InvalidParameter, "use the device's parameters").because(rule)
        })?;
        Ok(DeviceParams(fields))
    }
}

impl DeviceParams {
    /// Begins with a capacity in bytes and the defaults.
    pub fn builder(capacity: u64) -> ParamsBuilder {
        ParamsBuilder {
            fields: Fields {
                capacity,
                queues: 1,
                queue_depth: 128,
                max_io_bytes: DEFAULT_MAX_IO_BYTES,
                logical_block_size: 512,
                physical_block_size: 0,
                io_min: 0,
                io_opt: 0,
                read_only: false,
                rotational: false,
                volatile_cache: false,
                fua: false,
                discard: None,
                max_write_zeroes_bytes: 0,
                dma_alignment: None,
                segments: None,
                zoned: None,
            },
            physical_block_size: None,
            io_min: None,
            io_opt: None,
        }
    }

    /// Begins with these parameters.
    pub fn to_builder(&self) -> ParamsBuilder {
        ParamsBuilder {
            fields: self.0.clone(),
            physical_block_size: Some(self.0.physical_block_size),
            io_min: Some(self.0.io_min),
            io_opt: Some(self.0.io_opt),
        }
    }
}

macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident: $ty:ty;)*) => {
        impl DeviceParams {
            $($(#[$doc])* pub fn $name(&self) -> $ty {
                self.0.$name
            })*
        }
    };
}

getters! {
    /// Bytes of the disk.
    capacity: u64;
    /// Hardware queues.
    queues: u16;
    /// Tags of each queue.
    queue_depth: u16;
    /// Bytes of the largest request.
    max_io_bytes: u32;
    /// Bytes of a logical block.
    logical_block_size: u32;
    /// Bytes of a physical block.
    physical_block_size: u32;
    /// Bytes of the smallest I/O that is not slow.
    io_min: u32;
    /// Bytes of the best I/O.
    io_opt: u32;
    /// Whether the disk cannot be written.
    read_only: bool;
    /// Whether the disk seeks.
    rotational: bool;
    /// Whether completed writes may be lost until a flush.
    volatile_cache: bool;
    /// Whether single writes can be asked to be durable.
    fua: bool;
    /// What the disk does with discards.
    discard: Option<Discard>;
    /// Bytes of the largest WRITE_ZEROES, 0 for none.
    max_write_zeroes_bytes: u64;
    /// Bytes that the memory of direct I/O is aligned to, where it was said.
    dma_alignment: Option<u32>;
    /// Limits of memory segments, where they were said.
    segments: Option<SegmentLimits>;
    /// Zones, of a zoned disk.
    zoned: Option<Zoned>;
}

/// The rule that is broken, with the value that breaks it.
type Checked = Result<(), String>;

fn rule(holds: bool, words: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(words()) }
}

fn power_of_two(name: &str, value: u32, least: u64, most: u64) -> Checked {
    rule(value.is_power_of_two() && (least..=most).contains(&value.into()), || {
        format!("the {name} is a power of two from {least} to {most} bytes, not {value}")
    })
}

impl Fields {
    fn check(&self, page: u64) -> Checked {
        self.check_blocks(page)?;
        self.check_queues(page)?;
        rule(!self.fua || self.volatile_cache, || {
            "FUA needs a volatile cache: without one every write is durable".into()
        })?;
        self.check_discard()?;
        self.zoned.map_or(Ok(()), |zoned| self.check_zones(zoned))?;
        if let Some(alignment) = self.dma_alignment {
            // The block layer reads an alignment of 1 as "not said" and takes 512.
            power_of_two("DMA alignment", alignment, 2, page)?;
        }
        self.segments.map_or(Ok(()), |limits| limits.check())
    }

    fn check_blocks(&self, page: u64) -> Checked {
        let block = self.logical_block_size;
        power_of_two("logical block size", block, SECTOR, page)?;
        power_of_two(
            "physical block size",
            self.physical_block_size,
            block.into(),
            MAX_HINT.into(),
        )?;
        power_of_two("minimal I/O size", self.io_min, SECTOR, MAX_HINT.into())?;
        power_of_two("optimal I/O size", self.io_opt, SECTOR, MAX_HINT.into())?;
        self.whole_blocks("capacity", self.capacity)?;
        rule(self.capacity <= i64::MAX as u64, || {
            format!("the capacity is less than 2^63 bytes, not {}", self.capacity)
        })
    }

    fn check_queues(&self, page: u64) -> Checked {
        let most = uapi::UBLK_MAX_NR_QUEUES as u16;
        rule((1..=most).contains(&self.queues), || {
            format!("a device has 1 to {most} queues, not {}", self.queues)
        })?;
        let deepest = uapi::UBLK_MAX_QUEUE_DEPTH;
        rule((1..=deepest).contains(&self.queue_depth), || {
            format!("the queue depth is 1 to {deepest}, not {}", self.queue_depth)
        })?;
        let io = self.max_io_bytes;
        rule(
            u64::from(io) >= page && u64::from(io).is_multiple_of(page) && io <= MAX_IO_BYTES,
            || {
                format!(
                    "the largest I/O is a multiple of the page size ({page}) up to {MAX_IO_BYTES} bytes, not {io}"
                )
            },
        )
    }

    fn check_discard(&self) -> Checked {
        self.sectors_of_u32("largest WRITE_ZEROES", self.max_write_zeroes_bytes)?;
        let Some(discard) = self.discard else {
            return Ok(());
        };
        let Discard { alignment, granularity, max_bytes, max_segments } = discard;
        rule(granularity > 0, || "the discard granularity is not 0".into())?;
        self.whole_blocks("discard granularity", granularity.into())?;
        self.whole_blocks("discard alignment", alignment.into())?;
        rule(alignment < granularity, || {
            format!("the discard alignment ({alignment}) is below the granularity ({granularity})")
        })?;
        rule(max_bytes > 0, || "the largest discard is not 0: leave discard out instead".into())?;
        self.sectors_of_u32("largest discard", max_bytes)?;
        rule(max_segments == 1, || {
            format!("the driver takes discards of 1 segment, not {max_segments}")
        })
    }

    fn check_zones(&self, zoned: Zoned) -> Checked {
        let Zoned { zone_bytes, max_open, max_active, max_append_bytes } = zoned;
        rule(zone_bytes.is_power_of_two(), || {
            format!("the zone size is a power of two, not {zone_bytes} bytes")
        })?;
        self.sectors_of_u32("zone size", zone_bytes)?;
        rule(self.capacity > 0 && self.capacity.is_multiple_of(zone_bytes), || {
            format!(
                "the capacity is a multiple of the zone size ({zone_bytes}), not {} bytes",
                self.capacity
            )
        })?;
        let zones = self.capacity / zone_bytes;
        for (name, most) in [("open", max_open), ("active", max_active)] {
            rule(u64::from(most) <= zones, || {
                format!("of {zones} zones not {most} can be {name} at a time: 0 sets no limit")
            })?;
        }
        rule(max_active == 0 || max_open <= max_active, || {
            format!("an open zone is active: not {max_open} of {max_active} active zones are open")
        })?;
        rule(max_append_bytes > 0, || "the largest append is not 0".into())?;
        self.sectors_of_u32("largest append", max_append_bytes)
    }

    fn whole_blocks(&self, name: &str, bytes: u64) -> Checked {
        let block = self.logical_block_size;
        rule(bytes.is_multiple_of(block.into()), || {
            format!(
                "the {name} is a multiple of the logical block size ({block}), not {bytes} bytes"
            )
        })
    }

    fn sectors_of_u32(&self, name: &str, bytes: u64) -> Checked {
        self.whole_blocks(name, bytes)?;
        rule(bytes / SECTOR <= u32::MAX.into(), || {
            format!("the {name} is below 2 TiB, not {bytes} bytes")
        })
    }
}

impl SegmentLimits {
    fn check(&self) -> Checked {
        let least = uapi::UBLK_MIN_SEGMENT_SIZE;
        let boundary = self.boundary_mask.checked_add(1);
        rule(boundary.is_some_and(|b| b.is_power_of_two() && b >= least.into()), || {
            format!(
                "the segment boundary mask plus one is a power of two of at least {least}, not {:#x} plus one",
                self.boundary_mask
            )
        })?;
        rule(self.max_size >= least, || {
            format!("the largest segment has at least {least} bytes, not {}", self.max_size)
        })?;
        rule(self.max_count > 0, || "a request has at least 1 segment, not 0".into())
    }
}

#[cfg(test)]
#[path = "params_tests.rs"]
mod tests;
