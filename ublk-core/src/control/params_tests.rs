//! The builder against the driver's rules, written again from the driver.

use proptest::prelude::*;

use super::*;
use crate::uapi::*;

const PAGE: u64 = 4096;

/// `ublk_validate_params` of 7.3 without its zone and integrity branches, and the checks of
/// ADD_DEV, on a kernel with 4 KiB pages.
fn driver_takes(
    p: &ublk_params,
    queues: u16,
    depth: u16,
    max_io_buf_bytes: u32,
) -> Result<(), u32> {
    let fail = |holds: bool, line: u32| if holds { Err(line) } else { Ok(()) };
    fail(depth > 4096 || depth == 0 || queues > 4096 || queues == 0, line!())?;
    let max_io_buf_bytes = max_io_buf_bytes / 4096 * 4096;
    fail(p.types & UBLK_PARAM_TYPE_BASIC == 0, line!())?;
    let b = &p.basic;
    fail(b.logical_bs_shift > 12 || b.logical_bs_shift < 9, line!())?;
    fail(b.physical_bs_shift > 28 || b.io_min_shift > 28 || b.io_opt_shift > 28, line!())?;
    fail(b.logical_bs_shift > b.physical_bs_shift, line!())?;
    fail(b.max_sectors > max_io_buf_bytes >> 9, line!())?;
    fail(b.max_sectors < 8, line!())?;
    if p.types & UBLK_PARAM_TYPE_DISCARD != 0 {
        let d = &p.discard;
        fail(d.max_discard_sectors != 0 && d.max_discard_segments != 1, line!())?;
        fail(d.discard_granularity == 0, line!())?;
    }
    fail(p.types & UBLK_PARAM_TYPE_DEVT != 0, line!())?;
    if p.types & UBLK_PARAM_TYPE_DMA_ALIGN != 0 {
        fail(p.dma.alignment >= 4096, line!())?;
        fail(!(p.dma.alignment + 1).is_power_of_two(), line!())?;
    }
    if p.types & UBLK_PARAM_TYPE_SEGMENT != 0 {
        let boundary = p.seg.seg_boundary_mask.wrapping_add(1);
        fail(!boundary.is_power_of_two(), line!())?;
        fail(boundary < 4096, line!())?;
        fail(p.seg.max_segment_size < 4096, line!())?;
    }
    Ok(())
}

// Mostly what is allowed, sometimes its neighbour, sometimes anything.
fn size() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => (9u32..=12).prop_map(|s| 1 << s),
        3 => (0u32..=31).prop_map(|s| 1 << s),
        1 => any::<u32>(),
    ]
}

fn bytes() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..1 << 20).prop_map(|n| n * 4096),
        2 => (0u64..1 << 20).prop_map(|n| n * 512),
        1 => any::<u64>(),
    ]
}

fn count(most: u16) -> impl Strategy<Value = u16> {
    prop_oneof![8 => 1..=most, 1 => Just(0), 1 => any::<u16>()]
}

prop_compose! {
    fn discards()(
        alignment in prop_oneof![5 => Just(0u32), 1 => size()],
        granularity in prop_oneof![5 => size(), 1 => Just(0u32)],
        max_bytes in bytes(),
        max_segments in prop_oneof![8 => Just(1u16), 1 => any::<u16>()],
    ) -> Discard {
        Discard { alignment, granularity, max_bytes, max_segments }
    }
}

prop_compose! {
    fn segments()(
        boundary_mask in prop_oneof![
            6 => (12u32..63).prop_map(|s| (1u64 << s) - 1),
            1 => Just(u64::MAX),
            1 => any::<u64>(),
        ],
        max_size in prop_oneof![4 => 4096u32.., 1 => any::<u32>()],
        max_count in any::<u16>(),
    ) -> SegmentLimits {
        SegmentLimits { boundary_mask, max_size, max_count }
    }
}

prop_compose! {
    fn builders()(
        capacity in bytes(),
        queues in count(4096),
        depth in count(4096),
        max_io in prop_oneof![8 => (1u32..=8192).prop_map(|n| n * 4096), 1 => any::<u32>()],
        (block, physical, io_min, io_opt) in (
            size(), proptest::option::of(size()), proptest::option::of(size()), proptest::option::of(size()),
        ),
        flags in any::<[bool; 4]>(),
        discard in proptest::option::of(discards()),
        zeroes in bytes(),
        dma in proptest::option::of(size()),
        segments in proptest::option::of(segments()),
    ) -> ParamsBuilder {
        let mut builder = DeviceParams::builder(capacity)
            .queues(queues)
            .queue_depth(depth)
            .max_io_bytes(max_io)
            .logical_block_size(block)
            .read_only(flags[0])
            .rotational(flags[1])
            .volatile_cache(flags[2] || flags[3])
            .fua(flags[3])
            .max_write_zeroes_bytes(zeroes);
        builder.physical_block_size = physical;
        builder.io_min = io_min;
        builder.io_opt = io_opt;
        builder.fields.discard = discard;
        builder.fields.dma_alignment = dma;
        builder.fields.segments = segments;
        builder
    }
}

fn info(params: &DeviceParams) -> ublksrv_ctrl_dev_info {
    ublksrv_ctrl_dev_info {
        nr_hw_queues: params.queues(),
        queue_depth: params.queue_depth(),
        max_io_buf_bytes: params.max_io_bytes(),
        ..Default::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 8 } else { 4000 }, failure_persistence: None, ..Default::default() })]

    #[test]
    fn what_is_accepted_the_driver_takes_and_what_is_rejected_names_a_rule(builder in builders()) {
        match builder.build() {
            Ok(params) => {
                let raw = params.to_uapi();
                let taken =
                    driver_takes(&raw, params.queues(), params.queue_depth(), params.max_io_bytes());
                prop_assert!(taken.is_ok(), "the driver's rule at line {:?}: {params:?}", taken);
                prop_assert_eq!(DeviceParams::from_uapi(&raw, &info(&params)).unwrap(), params.clone());
                prop_assert_eq!(params.to_builder().build().unwrap(), params);
            }
            Err(e) => {
                prop_assert_eq!(e.kind(), ErrorKind::InvalidParameter);
                let cause = e.cause().unwrap();
                prop_assert!(cause.contains(" is ") || cause.contains(" has ") || cause.contains(" takes "), "{cause}");
            }
        }
    }

    #[test]
    fn what_the_driver_refuses_is_refused(builder in builders()) {
        // Past the builder's checks: the struct that would have been sent.
        let mut fields = builder.fields.clone();
        fields.physical_block_size = builder.physical_block_size.unwrap_or(4096.max(fields.logical_block_size));
        fields.io_min = builder.io_min.unwrap_or(fields.physical_block_size);
        fields.io_opt = builder.io_opt.unwrap_or(fields.physical_block_size);
        prop_assume!(fields.dma_alignment != Some(0));
        let params = DeviceParams(fields);
        let raw = params.to_uapi();
        if driver_takes(&raw, params.queues(), params.queue_depth(), params.max_io_bytes()).is_err() {
            prop_assert!(params.0.check(PAGE).is_err(), "{params:?}");
        }
    }
}

fn cause(builder: ParamsBuilder) -> String {
    builder.build().unwrap_err().cause().unwrap().to_owned()
}

#[test]
fn every_rule_has_words_and_the_value() {
    let ok = || DeviceParams::builder(1 << 20);
    let discard = Discard::granules_of(4096);
    let limits = SegmentLimits { boundary_mask: 0xffff, max_size: 65536, max_count: 8 };
    for (builder, words) in [
        (ok().logical_block_size(256), "logical block size is a power of two from 512 to"),
        (ok().logical_block_size(513), "not 513"),
        (
            ok().logical_block_size(4096).physical_block_size(512),
            "physical block size is a power of two from 4096",
        ),
        (ok().physical_block_size(512 << 20), "to 268435456 bytes, not 536870912"),
        (ok().io_min(0), "minimal I/O size"),
        (ok().io_opt(1000), "optimal I/O size"),
        (ok().capacity(1000), "capacity is a multiple of the logical block size (512), not 1000"),
        (ok().capacity(1 << 63), "capacity is less than 2^63"),
        (ok().queues(0), "1 to 4096 queues, not 0"),
        (ok().queues(4097), "not 4097"),
        (ok().queue_depth(0), "queue depth is 1 to 4096, not 0"),
        (ok().max_io_bytes(2048), "multiple of the page size"),
        (ok().max_io_bytes(64 << 20), "up to 33554432 bytes, not 67108864"),
        (ok().fua(true), "FUA needs a volatile cache"),
        (ok().discard(Discard { granularity: 0, ..discard }), "granularity is not 0"),
        (
            ok().discard(Discard { granularity: 700, ..discard }),
            "discard granularity is a multiple",
        ),
        (ok().discard(Discard { alignment: 4096, ..discard }), "discard alignment (4096) is below"),
        (ok().discard(Discard { alignment: 5, ..discard }), "discard alignment is a multiple"),
        (ok().discard(Discard { max_bytes: 0, ..discard }), "largest discard is not 0"),
        (ok().discard(Discard { max_bytes: 1 << 41, ..discard }), "below 2 TiB"),
        (ok().discard(Discard { max_segments: 2, ..discard }), "1 segment, not 2"),
        (ok().max_write_zeroes_bytes(100), "largest WRITE_ZEROES is a multiple"),
        (ok().dma_alignment(1), "DMA alignment is a power of two from 2"),
        (ok().dma_alignment(1 << 20), "DMA alignment"),
        (ok().segments(SegmentLimits { boundary_mask: 0x1000, ..limits }), "segment boundary mask"),
        (
            ok().segments(SegmentLimits { boundary_mask: u64::MAX, ..limits }),
            "segment boundary mask",
        ),
        (
            ok().segments(SegmentLimits { max_size: 512, ..limits }),
            "largest segment has at least 4096",
        ),
        (ok().segments(SegmentLimits { max_count: 0, ..limits }), "at least 1 segment"),
    ] {
        let cause = cause(builder);
        assert!(cause.contains(words), "{cause:?} does not say {words:?}");
    }
}

#[test]
fn the_defaults_are_sound() {
    let params = DeviceParams::builder(0).build().unwrap();
    assert_eq!(params.max_io_bytes(), 512 << 10);
    assert_eq!((params.logical_block_size(), params.physical_block_size()), (512, 4096));
    assert_eq!((params.io_min(), params.io_opt()), (4096, 4096));
    let params = DeviceParams::builder(4096).discard(Discard::granules_of(4096)).build().unwrap();
    assert_eq!(params.to_uapi().types, UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DISCARD);
}
