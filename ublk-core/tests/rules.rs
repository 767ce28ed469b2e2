//! The driver's rules about features and parameters, by the driver itself: each combination that we refuse is sent to it byte by
//! byte, past the library, and is refused or silently changed by it. On Linux 7.3, whose rules they are. And what it
//! answers to a command that comes at the wrong time, with what we make of that.

mod disk;
mod raw_server;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;

use disk::{SOON, bounded, devices, eventually, no_devices};
use raw_server::{Queue, Raw, Style, sectors};
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
    p.len = size_of::<ublk_params>() as u32;
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

/// A section for what the driver alone decides, or for what the device is not; none where one is due; more than a tag's
/// buffer.
const NOT_FITTING: [(Change, &str); 6] = [
    (|p| p.types |= uapi::UBLK_PARAM_TYPE_DEVT, "clear UBLK_PARAM_TYPE_DEVT"),
    (|p| p.types |= uapi::UBLK_PARAM_TYPE_ZONED, "added with ZONED"),
    (|p| p.types |= uapi::UBLK_PARAM_TYPE_INTEGRITY, "added with INTEGRITY"),
    (|p| p.types = 0, "basic parameters are missing"),
    (|p| p.types = uapi::UBLK_PARAM_TYPE_DISCARD, "basic parameters are missing"),
    (|p| p.basic.max_sectors = 129, "66048 bytes, and the device was added with room for 65536"),
];

fn refused_by_us(control: &Control, id: u32, params: ublk_params, words: &str) {
    let e = control.set_raw_params(id, &params).unwrap_err();
    assert_eq!(
        (e.kind(), e.errno(), e.device()),
        (ErrorKind::InvalidParameter, None, Some(id)),
        "{e}"
    );
    assert!(e.to_string().contains(words), "{e}");
}

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
    // What parameters alone do not say: whether they fit the device.
    for (change, words) in NOT_FITTING {
        let mut broken = fine();
        change(&mut broken);
        assert_eq!(set(id, broken), Some(Errno::EINVAL), "{words}: {broken:?}");
        refused_by_us(&control, id, broken, words);
    }
    refused_by_us(&control, id, ublk_params { len: 0, ..fine() }, "len is that of the struct");
    assert_eq!(set(id, fine()), None, "it is not something else that the driver refuses");
    control.set_raw_params(id, &fine()).unwrap();
    // What the driver says back it does not take.
    let said = control.get_raw_params(id).unwrap();
    assert_eq!(set(id, said), Some(Errno::EINVAL));
    assert_eq!(set(id, fine()), None);
    refused_by_us(&control, id, said, "clear UBLK_PARAM_TYPE_DEVT");
    control.delete(id, &Wait::for_(SOON)).unwrap();
    let zones = FeatureRequest::require(F::ZONED | F::USER_COPY);
    let zoned =
        control.add_dev(&AddDevice { features: zones, ..AddDevice::new(&params) }).unwrap().id;
    assert_eq!(set(zoned, fine()), Some(Errno::EINVAL));
    refused_by_us(&control, zoned, fine(), "say nothing of its zones");
    control.delete(zoned, &Wait::for_(SOON)).unwrap();
    no_devices();
}

#[test]
fn the_limit_of_unprivileged_devices_is_named() {
    const LIMIT: &str = "/sys/module/ublk_drv/parameters/ublks_max";
    let before = fs::read_to_string(LIMIT).unwrap();
    fs::write(LIMIT, "0").unwrap();
    let added = unprivileged(|| {
        let params = DeviceParams::builder(1 << 20).build().unwrap();
        let features = FeatureRequest::require(F::UNPRIVILEGED_DEV);
        // Whose threads can do what this one can.
        let control = Control::open().unwrap();
        control.add_dev(&AddDevice { features, ..AddDevice::new(&params) })
    });
    fs::write(LIMIT, before.trim()).unwrap();
    let e = added.unwrap_err();
    assert_eq!((e.kind(), e.errno()), (ErrorKind::TooMany, Some(Errno::EACCES)), "{e}");
    assert!(e.remedy().unwrap().contains(LIMIT), "{e}");
    no_devices();
}

/// A device whose server a test writes by hand.
fn served(features: F) -> Raw {
    let params = DeviceParams::builder(1 << 20).queues(1).queue_depth(2);
    let params = params.max_io_bytes(64 << 10).build().unwrap();
    // Nobody but the tests is to have requests.
    Raw::add_with(&params, features | F::NO_AUTO_PART_SCAN)
}

/// Fetches every tag and serves, until they have come home.
fn serve(raw: &Raw) -> JoinHandle<Vec<i32>> {
    let mut queue = Queue::new(raw, 0, Style::default());
    std::thread::spawn(move || {
        queue.fetch_all();
        queue.serve(sectors)
    })
}

/// Closes the device, does something, and opens it again.
fn reopen(raw: Raw, between: impl FnOnce(&Control, u32)) -> Raw {
    let Raw { control, info, file } = raw;
    drop(file);
    between(&control, info.id);
    let mut file = None;
    eventually("the node opens again", || {
        let node = format!("/dev/ublkc{}", info.id);
        file = OpenOptions::new().read(true).write(true).open(node).ok();
        file.is_some()
    });
    Raw { control, info, file: file.unwrap() }
}

fn stop(raw: &Raw, server: JoinHandle<Vec<i32>>) {
    raw.control.stop_dev(raw.id(), &Wait::for_(SOON)).unwrap();
    let home = bounded("the server ends", move || server.join().unwrap());
    assert_eq!(home, [-libc::ENODEV; 2]);
}

fn end(raw: Raw, server: JoinHandle<Vec<i32>>) {
    stop(&raw, server);
    let Raw { control, info, file } = raw;
    drop(file);
    control.del_dev(info.id, &Wait::for_(SOON)).unwrap();
    no_devices();
}

#[track_caller]
fn said(result: ublk_core::Result<()>, kind: ErrorKind, errno: Errno, words: &str) {
    let e = result.unwrap_err();
    assert_eq!((e.kind(), e.errno()), (kind, Some(errno)), "{e}");
    assert!(e.to_string().contains(words), "{e}");
}

#[test]
fn a_start_that_comes_too_early_is_told_what_is_in_its_way() {
    if !has_the_rules_of_7_3() {
        return;
    }
    let us = std::process::id() as i32;
    let start = |raw: &Raw| raw.control.start_dev(raw.id(), us, &Wait::for_(SOON));
    let raw = served(F::NONE);
    let server = serve(&raw);
    start(&raw).unwrap();
    stop(&raw, server);
    let wrong = ErrorKind::WrongState;
    let mut answer = Ok(());
    eventually("nobody has the disk open", || {
        answer = start(&raw);
        !answer.as_ref().is_err_and(|e| e.errno() == Some(Errno::EEXIST))
    });
    said(answer, wrong, Errno::EBUSY, "has not been closed since");
    let raw = reopen(raw, |_, _| ());
    let server = serve(&raw);
    start(&raw).unwrap();
    let client = File::open(raw.disk()).unwrap();
    stop(&raw, server);
    let raw = reopen(raw, |_, _| ());
    let server = serve(&raw);
    said(start(&raw), wrong, Errno::EEXIST, "former life is still open somewhere");
    drop(client);
    // A closed file is let go of in a moment.
    eventually("the device starts", || start(&raw).is_ok());
    end(raw, server);
}

#[test]
fn a_recovery_is_finished_by_who_has_opened_the_device() {
    if !has_the_rules_of_7_3() {
        return;
    }
    let us = std::process::id() as i32;
    let raw = served(F::USER_RECOVERY);
    let mut queue = Queue::new(&raw, 0, Style::default());
    queue.fetch_all();
    raw.control.start_dev(raw.id(), us, &Wait::for_(SOON)).unwrap();
    // Its server is gone.
    drop(queue);
    let raw = reopen(raw, |control, id| {
        eventually("its end is noticed", || control.start_user_recovery(id).is_ok());
    });
    let server = serve(&raw);
    let finish = |pid| raw.control.end_user_recovery(raw.id(), pid, &Wait::for_(SOON));
    said(
        finish(1),
        ErrorKind::InvalidParameter,
        Errno::EINVAL,
        "another process than the one named",
    );
    finish(us).unwrap();
    end(raw, server);
}
