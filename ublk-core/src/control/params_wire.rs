//! [`DeviceParams`] as the kernel's struct and back, and the comparison of what was asked with what
//! was taken.

use super::params::{DeviceParams, Discard, SECTOR, SegmentLimits, Zoned};
use crate::error::{Error, ErrorKind, Result};
use crate::uapi::*;

fn sectors(bytes: u64) -> u32 {
    // Checked by the builder to fit.
    u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX)
}

fn shift(bytes: u32) -> u8 {
    bytes.trailing_zeros() as u8
}

impl DeviceParams {
    /// As SET_PARAMS takes them. Queues, depth and the buffers' size are ADD_DEV's.
    pub fn to_uapi(&self) -> ublk_params {
        let p = &self.0;
        let attrs = [
            (p.read_only, UBLK_ATTR_READ_ONLY),
            (p.rotational, UBLK_ATTR_ROTATIONAL),
            (p.volatile_cache, UBLK_ATTR_VOLATILE_CACHE),
            (p.fua, UBLK_ATTR_FUA),
        ];
        let mut params = ublk_params {
            len: size_of::<ublk_params>() as u32,
            types: UBLK_PARAM_TYPE_BASIC,
            basic: ublk_param_basic {
                attrs: attrs.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit),
                logical_bs_shift: shift(p.logical_block_size),
                physical_bs_shift: shift(p.physical_block_size),
                io_opt_shift: shift(p.io_opt),
                io_min_shift: shift(p.io_min),
                max_sectors: sectors(p.max_io_bytes.into()),
                dev_sectors: p.capacity / SECTOR,
                ..Default::default()
            },
            ..Default::default()
        };
        if p.discard.is_some() || p.max_write_zeroes_bytes > 0 {
            params.types |= UBLK_PARAM_TYPE_DISCARD;
            params.discard = ublk_param_discard {
                // The section is also write-zeroes', and its granularity is never 0.
                discard_granularity: p.discard.map_or(p.logical_block_size, |d| d.granularity),
                discard_alignment: p.discard.map_or(0, |d| d.alignment),
                max_discard_sectors: p.discard.map_or(0, |d| sectors(d.max_bytes)),
                max_discard_segments: p.discard.map_or(0, |d| d.max_segments),
                max_write_zeroes_sectors: sectors(p.max_write_zeroes_bytes),
                reserved0: 0,
            };
        }
        if let Some(zoned) = p.zoned {
            params.types |= UBLK_PARAM_TYPE_ZONED;
            params.basic.chunk_sectors = sectors(zoned.zone_bytes);
            params.zoned = ublk_param_zoned {
                max_open_zones: zoned.max_open,
                max_active_zones: zoned.max_active,
                max_zone_append_sectors: sectors(zoned.max_append_bytes),
                ..Default::default()
            };
        }
        if let Some(alignment) = p.dma_alignment {
            params.types |= UBLK_PARAM_TYPE_DMA_ALIGN;
            params.dma.alignment = alignment - 1;
        }
        if let Some(limits) = p.segments {
            params.types |= UBLK_PARAM_TYPE_SEGMENT;
            params.seg = ublk_param_segment {
                seg_boundary_mask: limits.boundary_mask,
                max_segment_size: limits.max_size,
                max_segments: limits.max_count,
                pad: [0; 2],
            };
        }
        params
    }

    /// From what GET_PARAMS says, with the device's queues, depth and buffer size.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] where another server set what this library would not: then
    /// the raw struct of [`Control::get_raw_params`](super::Control::get_raw_params) is the place
    /// to look.
    pub fn from_uapi(params: &ublk_params, info: &ublksrv_ctrl_dev_info) -> Result<Self> {
        let basic = &params.basic;
        let has = |section| params.types & section != 0;
        let bytes = |shift: u8| 1u32.checked_shl(shift.into()).unwrap_or(0);
        let attr = |bit| basic.attrs & bit != 0;
        if !has(UBLK_PARAM_TYPE_BASIC) {
            return Err(Error::new(ErrorKind::WrongState, "understand the device's parameters")
                .on_device(info.dev_id)
                .because("no parameters have been set"));
        }
        let largest = (u64::from(basic.max_sectors) * SECTOR).min(info.max_io_buf_bytes.into());
        let mut builder = DeviceParams::builder(basic.dev_sectors.saturating_mul(SECTOR))
            .queues(info.nr_hw_queues)
            .queue_depth(info.queue_depth)
            .max_io_bytes(largest as u32)
            .logical_block_size(bytes(basic.logical_bs_shift))
            .physical_block_size(bytes(basic.physical_bs_shift))
            .io_min(bytes(basic.io_min_shift))
            .io_opt(bytes(basic.io_opt_shift))
            .read_only(attr(UBLK_ATTR_READ_ONLY))
            .rotational(attr(UBLK_ATTR_ROTATIONAL))
            .volatile_cache(attr(UBLK_ATTR_VOLATILE_CACHE))
            .fua(attr(UBLK_ATTR_FUA));
        if has(UBLK_PARAM_TYPE_DISCARD) {
            let d = &params.discard;
            builder =
                builder.max_write_zeroes_bytes(u64::from(d.max_write_zeroes_sectors) * SECTOR);
            if d.max_discard_sectors > 0 {
                builder = builder.discard(Discard {
                    alignment: d.discard_alignment,
                    granularity: d.discard_granularity,
                    max_bytes: u64::from(d.max_discard_sectors) * SECTOR,
                    max_segments: d.max_discard_segments,
                });
            }
        }
        if has(UBLK_PARAM_TYPE_ZONED) {
            builder = builder.zoned(Zoned {
                zone_bytes: u64::from(basic.chunk_sectors) * SECTOR,
                max_open: params.zoned.max_open_zones,
                max_active: params.zoned.max_active_zones,
                max_append_bytes: u64::from(params.zoned.max_zone_append_sectors) * SECTOR,
            });
        }
        if has(UBLK_PARAM_TYPE_DMA_ALIGN) {
            builder = builder.dma_alignment(params.dma.alignment.saturating_add(1));
        }
        if has(UBLK_PARAM_TYPE_SEGMENT) {
            builder = builder.segments(SegmentLimits {
                boundary_mask: params.seg.seg_boundary_mask,
                max_size: params.seg.max_segment_size,
                max_count: params.seg.max_segments,
            });
        }
        builder.build().map_err(|e| e.on_device(info.dev_id))
    }
}

/// Whether the driver took what it was given: it masks sections that it does not know and reports
/// success.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`], naming the section that is missing or different.
pub(crate) fn check_taken(asked: &ublk_params, taken: &ublk_params) -> Result<()> {
    let sections: [(u32, &str, &str, bool); 6] = [
        (UBLK_PARAM_TYPE_BASIC, "basic", "6.0", asked.basic == taken.basic),
        (
            UBLK_PARAM_TYPE_DISCARD,
            "discard and write-zeroes",
            "6.0",
            asked.discard == taken.discard,
        ),
        (UBLK_PARAM_TYPE_ZONED, "zone", "6.6", asked.zoned == taken.zoned),
        (UBLK_PARAM_TYPE_DMA_ALIGN, "DMA alignment", "6.15", asked.dma == taken.dma),
        (UBLK_PARAM_TYPE_SEGMENT, "segment", "6.15", asked.seg == taken.seg),
        (UBLK_PARAM_TYPE_INTEGRITY, "integrity", "7.0", asked.integrity == taken.integrity),
    ];
    for (section, name, since, same) in sections {
        if asked.types & section == 0 {
            continue;
        }
        let refused = Error::new(ErrorKind::Unsupported, "set the device's parameters");
        if taken.types & section == 0 {
            return Err(refused.because(format!(
                "the driver dropped the {name} parameters (since Linux {since})"
            )));
        }
        if !same {
            return Err(refused.because(format!("the driver changed the {name} parameters")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_or_changed_section_is_named() {
        let asked = DeviceParams::builder(1 << 20).dma_alignment(512).build().unwrap().to_uapi();
        assert!(check_taken(&asked, &asked).is_ok());
        let mut taken = asked;
        taken.types &= !UBLK_PARAM_TYPE_DMA_ALIGN;
        // What GET_PARAMS adds by itself is no difference.
        taken.types |= UBLK_PARAM_TYPE_DEVT;
        let error = check_taken(&asked, &taken).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.cause().unwrap().contains("DMA alignment parameters (since Linux 6.15)"));
        let mut taken = asked;
        taken.basic.dev_sectors = 1;
        assert!(check_taken(&asked, &taken).unwrap_err().cause().unwrap().contains("basic"));
    }

    #[test]
    fn write_zeroes_alone_needs_a_granularity_and_no_discard() {
        let params = DeviceParams::builder(1 << 20)
            .logical_block_size(4096)
            .max_write_zeroes_bytes(1 << 20)
            .build()
            .unwrap()
            .to_uapi();
        assert_eq!(params.types, UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DISCARD);
        assert_eq!(params.discard.discard_granularity, 4096);
        assert_eq!(params.discard.max_discard_sectors, 0);
        assert_eq!(params.discard.max_discard_segments, 0);
        assert_eq!(params.discard.max_write_zeroes_sectors, 2048);
    }
}
