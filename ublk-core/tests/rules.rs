//! The driver's rules about features and parameters, by the driver itself: each combination that we refuse is sent to it byte by
//! byte, past the library, and is refused or silently changed by it. On Linux 7.3, whose rules they are.

mod disk;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::os::fd::AsRawFd;

use disk::{SOON, devices, no_devices};
use ublk_core::control::{
    AddDevice, Control, ControlOptions, DeviceParams, Discard, FeatureRequest, Features as F,
    ParamsBuilder, SegmentLimits, Wait,
};
use ublk_core::uapi::{self, ublk_params, ublksrv_ctrl_cmd, ublksrv_ctrl_dev_info};
use ublk_core::{Errno, ErrorKind};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Not added, with this errno.
    Refused(Errno),
    /// Added, without these.
    Dropped(F),
}

const EINVAL: Verdict = Verdict::Refused(Errno::EINVAL);

/// A control command as it is, and the kernel's answer.
///
/// # Safety
///
/// The command's address is of memory of that length, to be read and written.
unsafe fn command(number: u32, command: ublksrv_ctrl_cmd) -> i32 {
    let control = std::fs::File::open("/dev/ublk-control").unwrap();
    let mut ring: IoUring<squeue::Entry128, cqueue::Entry> = IoUring::builder().build(8).unwrap();
    let mut payload = [0u8; 80];
    // SAFETY: the struct has no padding, and 32 bytes.
    let bytes = unsafe { std::mem::transmute::<ublksrv_ctrl_cmd, [u8; 32]>(command) };
    payload[..32].copy_from_slice(&bytes);
    let entry = opcode::UringCmd80::new(types::Fd(control.as_raw_fd()), number);
    // SAFETY: the command is waited for; the rest is the caller's promise.
    unsafe { ring.submission().push(&entry.cmd(payload).build()).unwrap() };
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}

/// ADD_DEV as it is. What was added is deleted again.
fn add(features: F, io_desc_size: u16) -> Verdict {
    let mut info = ublksrv_ctrl_dev_info {
        nr_hw_queues: 1,
        queue_depth: 4,
        max_io_buf_bytes: 64 << 10,
        dev_id: u32::MAX,
        flags: features.bits(),
        io_desc_size,
        ..Default::default()
    };
    let add = ublksrv_ctrl_cmd {
        dev_id: u32::MAX,
        queue_id: u16::MAX,
        len: size_of::<ublksrv_ctrl_dev_info>() as u16,
        addr: (&raw mut info).expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the address is of `info`, with its length.
    let result = unsafe { command(uapi::UBLK_U_CMD_ADD_DEV, add) };
    if let Some(errno) = Errno::from_result(result) {
        return Verdict::Refused(errno);
    }
    // SAFETY: the kernel has written it.
    let info = unsafe { std::ptr::read_volatile(&raw const info) };
    let granted = F::from_bits(info.flags);
    let control = ControlOptions::new().device_paths(true).open().unwrap();
    control.delete(info.dev_id, &Wait::for_(SOON)).unwrap();
    Verdict::Dropped(features - granted)
}

/// Runs something on a thread that may not do what CAP_SYS_ADMIN allows.
fn unprivileged<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    const VERSION_3: u32 = 0x2008_0522;
    const SYS_ADMIN: u32 = 1 << 21;
    let thread = std::thread::spawn(move || {
        let header = [VERSION_3, 0];
        let mut sets = [0u32; 6];
        // SAFETY: the structs of capget(2) and capset(2): two words, and twice three.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()), 0);
            sets[0] &= !SYS_ADMIN;
            assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()), 0);
        }
        run()
    });
    thread.join().unwrap()
}

/// What we say of it.
fn ours(features: F, io_desc_size: u16) -> (ErrorKind, String) {
    let control = Control::open().unwrap();
    let params = DeviceParams::builder(1 << 20).build().unwrap();
    let features = FeatureRequest::require(features);
    let device = AddDevice { io_desc_size, features, ..AddDevice::new(&params) };
    let before = devices();
    let error = control.add_dev(&device).unwrap_err();
    assert_eq!(devices(), before, "refused before anything is created");
    (error.kind(), error.to_string())
}

fn has_the_rules_of_7_3() -> bool {
    let has = Control::open().unwrap().features().unwrap().contains(F::IO_DESC_SIZE);
    if !has {
        println!("\nnot run: the rules are those of Linux 7.3");
    }
    has
}

#[test]
fn what_we_refuse_the_driver_refuses_or_changes_in_silence() {
    if !has_the_rules_of_7_3() {
        return;
    }
    let recovery = F::USER_RECOVERY;
    let dropped = Verdict::Dropped;
    for (features, size, verdict, words) in [
        (F::USER_RECOVERY_REISSUE, 24, EINVAL, "need USER_RECOVERY"),
        (F::USER_RECOVERY_FAIL_IO, 24, EINVAL, "need USER_RECOVERY"),
        (F::USER_RECOVERY_REISSUE | F::USER_RECOVERY_FAIL_IO, 24, EINVAL, "need USER_RECOVERY"),
        (
            recovery | F::USER_RECOVERY_REISSUE | F::USER_RECOVERY_FAIL_IO,
            24,
            EINVAL,
            "exclude each other",
        ),
        (F::QUIESCE, 24, EINVAL, "QUIESCE needs USER_RECOVERY"),
        (F::ZONED, 24, EINVAL, "ZONED needs USER_COPY or SUPPORT_ZERO_COPY"),
        (F::ZONED | F::AUTO_BUF_REG, 24, EINVAL, "ZONED needs USER_COPY or SUPPORT_ZERO_COPY"),
        (F::INTEGRITY, 24, EINVAL, "INTEGRITY needs USER_COPY"),
        (F::INTEGRITY | F::SUPPORT_ZERO_COPY, 24, EINVAL, "INTEGRITY needs USER_COPY"),
        (
            F::NEED_GET_DATA | F::USER_COPY,
            24,
            dropped(F::NEED_GET_DATA),
            "NEED_GET_DATA is dropped",
        ),
        (
            F::NEED_GET_DATA | F::SUPPORT_ZERO_COPY,
            24,
            dropped(F::NEED_GET_DATA),
            "NEED_GET_DATA is dropped",
        ),
        (
            F::NEED_GET_DATA | F::AUTO_BUF_REG,
            24,
            dropped(F::NEED_GET_DATA),
            "NEED_GET_DATA is dropped",
        ),
        (F::NEED_GET_DATA | F::BATCH_IO, 24, dropped(F::NEED_GET_DATA), "NEED_GET_DATA is dropped"),
        (F::PER_IO_DAEMON | F::BATCH_IO, 24, dropped(F::PER_IO_DAEMON), "PER_IO_DAEMON is dropped"),
        (F::IO_DESC_SIZE, 16, EINVAL, "24 to 256 bytes"),
        (F::IO_DESC_SIZE, 28, EINVAL, "in steps of 8, not 28"),
        (F::IO_DESC_SIZE, 264, EINVAL, "not 264"),
    ] {
        assert_eq!(add(features, size), verdict, "the driver, about {features}");
        let (kind, text) = ours(features, size);
        assert_eq!(kind, ErrorKind::InvalidParameter, "{features}: {text}");
        assert!(text.contains(words), "{text}");
    }
    // And what is allowed is taken: it is not something else that the driver refuses.
    for features in [
        recovery | F::USER_RECOVERY_REISSUE | F::QUIESCE,
        recovery | F::USER_RECOVERY_FAIL_IO | F::QUIESCE,
        F::ZONED | F::USER_COPY,
        F::NEED_GET_DATA,
        F::BATCH_IO,
        F::IO_DESC_SIZE,
    ] {
        assert_eq!(add(features, 24), dropped(F::NONE), "{features}");
    }
    no_devices();
}

#[test]
fn what_we_refuse_the_unprivileged_the_driver_does_not_give_them() {
    if !has_the_rules_of_7_3() {
        return;
    }
    let unprivileged_dev = F::UNPRIVILEGED_DEV;
    let dropped = Verdict::Dropped;
    for (features, verdict, words) in [
        (F::USER_RECOVERY, dropped(F::USER_RECOVERY), "cannot be recovered"),
        (
            F::USER_RECOVERY | F::USER_RECOVERY_REISSUE,
            dropped(F::USER_RECOVERY | F::USER_RECOVERY_REISSUE),
            "cannot be recovered",
        ),
        (
            F::USER_RECOVERY | F::USER_RECOVERY_FAIL_IO,
            dropped(F::USER_RECOVERY),
            "cannot be recovered",
        ),
        (F::USER_COPY, EINVAL, "excludes USER_COPY"),
        (F::SUPPORT_ZERO_COPY, EINVAL, "excludes USER_COPY, SUPPORT_ZERO_COPY"),
        (F::AUTO_BUF_REG, EINVAL, "excludes USER_COPY, SUPPORT_ZERO_COPY and AUTO_BUF_REG"),
    ] {
        let features = features | unprivileged_dev;
        assert_eq!(
            unprivileged(move || add(features, 24)),
            verdict,
            "the driver, about {features}"
        );
        let (kind, text) = ours(features, 24);
        assert_eq!(kind, ErrorKind::InvalidParameter, "{features}: {text}");
        assert!(text.contains(words), "{text}");
    }
    assert_eq!(unprivileged(move || add(unprivileged_dev, 24)), dropped(F::NONE));
    assert_eq!(unprivileged(|| add(F::NONE, 24)), Verdict::Refused(Errno::EPERM));
    // The privileged do not get it; that shows only afterwards.
    assert_eq!(add(unprivileged_dev, 24), dropped(unprivileged_dev));
    let (kind, text) = ours(unprivileged_dev, 24);
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(text.contains("only to callers without CAP_SYS_ADMIN"), "{text}");
    no_devices();
}

/// SET_PARAMS as it is.
fn set(id: u32, mut params: ublk_params) -> Option<Errno> {
    params.len = size_of::<ublk_params>() as u32;
    let set = ublksrv_ctrl_cmd {
        dev_id: id,
        queue_id: u16::MAX,
        len: size_of::<ublk_params>() as u16,
        addr: (&raw mut params).expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the address is of `params`, with its length.
    Errno::from_result(unsafe { command(uapi::UBLK_U_CMD_SET_PARAMS, set) })
}

/// What is fine, with every section that the tests below change.
fn fine() -> ublk_params {
    let mut p = ublk_params::default();
    p.basic.logical_bs_shift = 9;
    p.basic.physical_bs_shift = 12;
    p.basic.io_min_shift = 9;
    p.basic.io_opt_shift = 12;
    p.basic.max_sectors = 128;
    p.basic.dev_sectors = 2048;
    p.discard.discard_granularity = 512;
    p.discard.max_discard_sectors = 2048;
    p.discard.max_discard_segments = 1;
    p.dma.alignment = 511;
    p.seg.seg_boundary_mask = 0xffff;
    p.seg.max_segment_size = 65536;
    p.seg.max_segments = 8;
    p.types = uapi::UBLK_PARAM_TYPE_BASIC
        | uapi::UBLK_PARAM_TYPE_DISCARD
        | uapi::UBLK_PARAM_TYPE_DMA_ALIGN
        | uapi::UBLK_PARAM_TYPE_SEGMENT;
    p
}

type Change = fn(&mut ublk_params);
type Describe = fn(ParamsBuilder) -> ParamsBuilder;

const LIMITS: SegmentLimits =
    SegmentLimits { boundary_mask: 0xffff, max_size: 65536, max_count: 8 };

/// Each rule of `ublk_validate_params`: what breaks it, how a user of ours would, and what we say.
const BROKEN: [(Change, Describe, &str); 12] = [
    (|p| p.basic.logical_bs_shift = 8, |b| b.logical_block_size(256), "logical block size"),
    (|p| p.basic.logical_bs_shift = 13, |b| b.logical_block_size(8192), "logical block size"),
    (|p| p.basic.physical_bs_shift = 8, |b| b.physical_block_size(256), "physical block size"),
    (
        |p| p.basic.physical_bs_shift = 29,
        |b| b.physical_block_size(512 << 20),
        "physical block size",
    ),
    (|p| p.basic.io_min_shift = 29, |b| b.io_min(512 << 20), "minimal I/O size"),
    (|p| p.basic.io_opt_shift = 29, |b| b.io_opt(512 << 20), "optimal I/O size"),
    (|p| p.basic.max_sectors = 7, |b| b.max_io_bytes(2048), "page size"),
    (
        |p| p.discard.discard_granularity = 0,
        |b| b.discard(Discard { granularity: 0, ..Discard::granules_of(512) }),
        "granularity is not 0",
    ),
    (
        |p| p.discard.max_discard_segments = 2,
        |b| b.discard(Discard { max_segments: 2, ..Discard::granules_of(512) }),
        "1 segment, not 2",
    ),
    (|p| p.dma.alignment = 8191, |b| b.dma_alignment(8192), "DMA alignment"),
    (
        |p| p.seg.seg_boundary_mask = 0x1000,
        |b| b.segments(SegmentLimits { boundary_mask: 0x1000, ..LIMITS }),
        "segment boundary mask",
    ),
    (
        |p| p.seg.max_segment_size = 512,
        |b| b.segments(SegmentLimits { max_size: 512, ..LIMITS }),
        "largest segment",
    ),
];

#[test]
fn parameters_that_we_refuse_the_driver_refuses() {
    if !has_the_rules_of_7_3() {
        return;
    }
    let control = Control::open().unwrap();
    let params = DeviceParams::builder(1 << 20).max_io_bytes(64 << 10).build().unwrap();
    let id = control.add_dev(&AddDevice::new(&params)).unwrap().id;
    assert_eq!(set(id, fine()), None);
    for (change, describe, words) in BROKEN {
        let mut broken = fine();
        change(&mut broken);
        assert_eq!(set(id, broken), Some(Errno::EINVAL), "the driver, about {words}: {broken:?}");
        let refused = describe(DeviceParams::builder(1 << 20)).build().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidParameter);
        assert!(refused.to_string().contains(words), "{refused}");
    }
    // What cannot be said to our builder at all: a section for what the driver alone decides, none where one is due,
    // more than a tag's buffer.
    for change in [
        (|p| p.types |= uapi::UBLK_PARAM_TYPE_DEVT) as Change,
        |p| p.types |= uapi::UBLK_PARAM_TYPE_ZONED,
        |p| p.types |= uapi::UBLK_PARAM_TYPE_INTEGRITY,
        |p| p.types = 0,
        |p| p.types = uapi::UBLK_PARAM_TYPE_DISCARD,
        |p| p.basic.max_sectors = 129,
    ] {
        let mut broken = fine();
        change(&mut broken);
        assert_eq!(set(id, broken), Some(Errno::EINVAL), "{broken:?}");
    }
    assert_eq!(set(id, fine()), None, "it is not something else that the driver refuses");
    control.delete(id, &Wait::for_(SOON)).unwrap();
    no_devices();
}
