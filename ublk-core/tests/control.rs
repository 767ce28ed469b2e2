//! The control plane against a real driver. Runs as root where `ublk_drv` is loaded, one test at a
//! time.

mod disk;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use disk::node::{AsItWas, CONTROL};
use disk::{SOON, eventually};
use ublk_core::control::{
    AddDevice, CancelToken, Control, ControlCommand, ControlOptions, DeviceParams, DeviceState,
    Discard, Encoding, FeatureRequest, Features, Holder, SegmentLimits, Wait, Zoned,
};
use ublk_core::targets::Null;
use ublk_core::uapi::ublk_shmem_buf_reg;
use ublk_core::{Ending, Errno, ErrorKind, Running};

fn both_encodings(test: impl Fn(Control)) {
    for encoding in [Encoding::Ioctl, Encoding::Legacy] {
        let control = ControlOptions::new().encoding(encoding).open().unwrap();
        assert_eq!(control.encoding(), encoding);
        test(control);
    }
}

fn params() -> DeviceParams {
    DeviceParams::builder(64 << 20).queue_depth(4).build().unwrap()
}

fn add(control: &Control) -> u32 {
    control.add_dev(&AddDevice::new(&params())).unwrap().id
}

fn delete(control: &Control, id: u32) {
    control.delete(id, &Wait::for_(SOON)).unwrap();
}

fn ids(control: &Control) -> BTreeSet<u32> {
    control.list().unwrap().iter().map(|d| d.id).collect()
}

fn is_recent(control: &Control) -> bool {
    // 6.16 and later; parameter sections have no bits of their own.
    control.get_features().unwrap().contains(Features::AUTO_BUF_REG)
}

fn open_files() -> Vec<String> {
    let fds = fs::read_dir("/proc/self/fd").unwrap();
    let mut targets: Vec<_> = fds
        .filter_map(|fd| Some(fs::read_link(fd.ok()?.path()).ok()?.to_string_lossy().into_owned()))
        .collect();
    targets.sort();
    targets
}

fn control_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter(|task| {
            let comm = task.as_ref().unwrap().path().join("comm");
            fs::read_to_string(comm).is_ok_and(|name| name.trim() == "ublk-ctl")
        })
        .count()
}

#[test]
fn the_driver_says_what_it_supports() {
    both_encodings(|control| {
        let features = control.get_features().unwrap();
        assert_eq!(control.features(), Some(features));
        assert!(features.contains(Features::CMD_IOCTL_ENCODE | Features::USER_COPY));
        assert_eq!(features - Features::known(), Features::NONE, "a newer driver: teach us");
        println!("{features}");
    });
}

#[test]
fn a_device_is_added_described_and_deleted() {
    both_encodings(|control| {
        let params = DeviceParams::builder(128 << 20)
            .logical_block_size(4096)
            .queues(2)
            .queue_depth(17)
            .max_io_bytes(256 << 10)
            .rotational(true)
            .read_only(true)
            .volatile_cache(true)
            .fua(true)
            .io_opt(64 << 10)
            .discard(Discard::granules_of(4096))
            .max_write_zeroes_bytes(1 << 20)
            .build()
            .unwrap();
        let mut request =
            AddDevice::new(&params).features(FeatureRequest::require(Features::USER_COPY));
        request.server_flags = 0x1122_3344_5566_7788;
        let added = control.add_dev(&request).unwrap();
        assert!((1..=2).contains(&added.queues), "clamped to the CPUs");
        assert_eq!((added.queue_depth, added.max_io_bytes), (17, 256 << 10));
        assert!(added.features.contains(Features::USER_COPY | Features::CMD_IOCTL_ENCODE));
        assert_eq!((added.state, added.server_pid), (DeviceState::Dead, None));
        assert_eq!(added.io_desc_size, 24);

        let id = added.id;
        assert_eq!(control.get_dev_info(id).unwrap(), added);
        assert_eq!(control.get_dev_info2(id).unwrap(), added);
        assert_eq!(control.list().unwrap(), std::slice::from_ref(&added));
        assert_eq!(added.server_flags, 0x1122_3344_5566_7788);

        let error = control.get_params(id).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WrongState, "{error}");
        control.set_params(id, &params).unwrap();
        let expected = params.to_builder().queues(added.queues).build().unwrap();
        assert_eq!(control.get_params(id).unwrap(), expected);
        // Again: a device that has not started can be given others.
        control.set_params(id, &params.to_builder().capacity(1 << 20).build().unwrap()).unwrap();
        assert_eq!(control.get_params(id).unwrap().capacity(), 1 << 20);

        control.del_dev(id, &Wait::for_(SOON)).unwrap();
        assert!(control.list().unwrap().is_empty());
        assert!(!fs::exists(format!("/dev/ublkc{id}")).unwrap());
    });
}

#[test]
fn del_dev_async_deletes() {
    let control = Control::open().unwrap();
    let id = add(&control);
    control.del_dev_async(id, &Wait::for_(SOON)).unwrap();
    eventually("the id is free", || control.list().unwrap().is_empty());
}

#[test]
fn a_taken_id_is_its_own_error() {
    both_encodings(|control| {
        let request = AddDevice::new(&params()).id(Some(77));
        assert_eq!(control.add_dev(&request).unwrap().id, 77);
        let error = control.add_dev(&request).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::IdTaken, Some(Errno::EEXIST)));
        assert_eq!(error.device(), Some(77));
        delete(&control, 77);
    });
}

#[repr(align(4096))]
struct Page([u8; 4096]);

#[test]
fn what_does_not_exist_is_its_own_error() {
    static PAGE: Page = Page([0; 4096]);
    let at = PAGE.0.as_ptr() as u64;
    let page = ublk_shmem_buf_reg { addr: at, len: 4096, flags: 1, reserved: 0 };
    both_encodings(|control| {
        let wait = Wait::for_(SOON);
        let id = 4_000;
        for result in [
            control.quiesce_dev(id, 20, &wait),
            control.try_stop_dev(id, &wait),
            control.update_size(id, 1 << 20),
            // SAFETY: a static of zeroes that nobody else looks at, for clients to read.
            unsafe { control.reg_buf(id, &page) }.map(drop),
            control.unreg_buf(id, 0),
            control.del_dev(id, &wait),
            control.del_dev_async(id, &wait),
            control.start_dev(id, std::process::id() as i32, &wait),
            control.stop_dev(id, &wait),
            control.set_params(id, &params()),
            control.get_params(id).map(drop),
            control.get_dev_info(id).map(drop),
            control.get_dev_info2(id).map(drop),
            control.get_queue_affinity(id, 0).map(drop),
            control.start_user_recovery(id),
            control.end_user_recovery(id, 1, &wait),
            control.delete(id, &wait),
        ] {
            let error = result.unwrap_err();
            assert_eq!(
                (error.kind(), error.device()),
                (ErrorKind::NoSuchDevice, Some(id)),
                "{error}"
            );
        }
    });
}

#[test]
fn bad_arguments_are_refused_with_their_reason() {
    let control = Control::open().unwrap();
    let mut request = AddDevice::new(&params());
    request.queue_depth = 5000;
    assert_eq!(control.add_dev(&request).unwrap_err().kind(), ErrorKind::InvalidParameter);
    let id = add(&control);
    for queue in [1, 99, u16::MAX] {
        let error = control.get_queue_affinity(id, queue).unwrap_err();
        assert_eq!((error.kind(), error.queue()), (ErrorKind::InvalidParameter, Some(queue)));
        assert!(error.to_string().contains("the device has one queue"), "{error}");
    }
    control.set_params(id, &params()).unwrap();
    let zones = Zoned { zone_bytes: 1 << 20, max_open: 0, max_active: 0, max_append_bytes: 4096 };
    let zones = params().to_builder().zoned(zones).build().unwrap();
    let larger = params().to_builder().max_io_bytes(1 << 20).build().unwrap();
    for (params, words) in [
        (zones, "added with ZONED"),
        (
            larger,
            "largest request has 1048576 bytes, and the device was added with room for 524288",
        ),
    ] {
        let error = control.set_params(id, &params).unwrap_err();
        assert_eq!((error.kind(), error.device()), (ErrorKind::InvalidParameter, Some(id)));
        assert!(error.to_string().contains(words), "{error}");
    }
    // What is refused by us leaves what was set before; the driver would forget it.
    assert_eq!(control.get_params(id).unwrap().capacity(), 64 << 20);
    delete(&control, id);
    let id = add(&control);
    let error = control.start_dev(id, 1, &Wait::for_(SOON)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidParameter, "no parameters: {error}");
    if is_recent(&control) {
        for result in
            [control.try_stop_dev(id, &Wait::for_(SOON)), control.update_size(id, 1 << 20)]
        {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WrongState, "no disk: {error}");
        }
        let error = control.update_size(id, 1000).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidParameter, "{error}");
    } else {
        let error = control.try_stop_dev(id, &Wait::for_(SOON)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
    control.stop_dev(id, &Wait::for_(SOON)).unwrap();
    delete(&control, id);
}

/// A disk of which nobody looks for partitions.
fn live(require: Features) -> Running {
    let builder = Null::new().builder(64 << 20).queue_depth(4).require(require);
    builder.prefer(Features::NO_AUTO_PART_SCAN).start().unwrap()
}

/// The version that brought what a driver lacks, in the words of the refusal.
fn without(command: &str, feature: Features) -> (ErrorKind, String) {
    let known = Control::open().unwrap().features().unwrap().contains(feature);
    let words = match known {
        true => format!("added without {command}"),
        false => format!("does not know this command (since Linux {})", feature.since().unwrap()),
    };
    (ErrorKind::Unsupported, words)
}

#[test]
fn each_command_names_the_rule_that_its_caller_breaks() {
    type Said = (ErrorKind, String);
    let control = Control::open().unwrap();
    let (wait, us) = (Wait::for_(SOON), std::process::id() as i32);
    let (invalid, wrong) = (ErrorKind::InvalidParameter, ErrorKind::WrongState);
    let said = |kind, words: &str| (kind, words.to_owned());
    let refused = |what: &str, result: ublk_core::Result<()>, (kind, words): Said| {
        let e = result.expect_err(what);
        assert_eq!(e.kind(), kind, "{what}: {e}");
        assert!(e.to_string().contains(&words), "{what}: {e}");
        assert!(control.outstanding().is_empty(), "{what}");
    };
    let bare = add(&control);
    let plain = live(Features::NONE);
    let kept = live(Features::USER_RECOVERY);
    let never = control.add_dev(
        &AddDevice::new(&params())
            .features(FeatureRequest::require(Features::USER_RECOVERY).prefer(Features::QUIESCE)),
    );
    let never = never.unwrap().id;

    let start = |id, pid| control.start_dev(id, pid, &wait);
    for pid in [0, -1, i32::MIN] {
        refused("START", start(bare, pid), (invalid, format!("positive, not {pid}")));
    }
    refused("START", start(bare, us), said(invalid, "no parameters are set"));
    refused("START", start(plain.id(), us), said(wrong, "live already"));
    if is_recent(&control) {
        // The driver compares it once every tag is fetched.
        refused("START", start(plain.id(), 1), said(invalid, "another process than 1"));
    }
    let set = |id| control.set_params(id, &params());
    refused("SET_PARAMS", set(plain.id()), said(wrong, "settled once the disk exists"));

    let begin = |id| control.start_user_recovery(id);
    let end = |id, pid| control.end_user_recovery(id, pid, &wait);
    for id in [bare, plain.id()] {
        refused("START_USER_RECOVERY", begin(id), said(wrong, "without USER_RECOVERY"));
        refused("END_USER_RECOVERY", end(id, us), said(wrong, "without USER_RECOVERY"));
    }
    refused("START_USER_RECOVERY", begin(never), said(wrong, "has no disk"));
    refused("END_USER_RECOVERY", end(never, us), said(wrong, "has no disk"));
    let busy = ErrorKind::Busy;
    refused("START_USER_RECOVERY", begin(kept.id()), said(busy, "former server is not gone"));
    refused("END_USER_RECOVERY", end(kept.id(), us), said(wrong, "not being recovered"));
    refused("END_USER_RECOVERY", end(kept.id(), 0), said(invalid, "positive, not 0"));

    let quiesce = |id| control.quiesce_dev(id, 20, &wait);
    for id in [bare, plain.id()] {
        refused("QUIESCE_DEV", quiesce(id), without("QUIESCE", Features::QUIESCE));
    }
    if control.features().unwrap().contains(Features::QUIESCE) {
        refused("QUIESCE_DEV", quiesce(never), said(wrong, "has no disk"));
    }
    let resize = control.update_size(bare, 1 << 20);
    if !control.features().unwrap().contains(Features::UPDATE_SIZE) {
        refused("UPDATE_SIZE", resize, without("", Features::UPDATE_SIZE));
    }
    if !control.features().unwrap().contains(Features::SAFE_STOP_DEV) {
        let stop = control.try_stop_dev(plain.id(), &wait);
        refused("TRY_STOP_DEV", stop, without("", Features::SAFE_STOP_DEV));
    }
    // Nothing of all this has changed anything.
    assert_eq!(control.get_dev_info(bare).unwrap().state, DeviceState::Dead);
    for disk in [plain, kept] {
        assert_eq!(disk.state().unwrap(), DeviceState::Live);
        assert!(fs::read(disk.path()).is_ok());
        disk.stop(SOON).unwrap();
    }
    delete(&control, bare);
    delete(&control, never);
}

#[test]
fn memory_that_cannot_be_registered_is_refused_with_its_rule() {
    static PAGES: [Page; 2] = [const { Page([0; 4096]) }; 2];
    let control = Control::open().unwrap();
    let bare = add(&control);
    let at = PAGES[0].0.as_ptr() as u64;
    let fine = ublk_shmem_buf_reg { addr: at, len: 4096, flags: 1, reserved: 0 };
    let register = |id, buffer: ublk_shmem_buf_reg| {
        // SAFETY: a static of zeroes that nobody else looks at, for clients to read.
        unsafe { control.reg_buf(id, &buffer) }
    };
    for (buffer, words) in [
        (ublk_shmem_buf_reg { flags: 2, ..fine }, "READ_ONLY alone"),
        (ublk_shmem_buf_reg { reserved: 1, ..fine }, "reserved is 0"),
        (ublk_shmem_buf_reg { len: 0, ..fine }, "1 to 4294967296 bytes, not 0"),
        (ublk_shmem_buf_reg { len: (1 << 32) + 4096, ..fine }, "1 to 4294967296 bytes, not"),
        (ublk_shmem_buf_reg { len: 100, ..fine }, "whole pages of 4096 bytes, not 100"),
        (ublk_shmem_buf_reg { addr: at + 512, ..fine }, "whole pages of 4096 bytes"),
    ] {
        // Also by drivers that would say that they do not know the command.
        let e = register(bare, buffer).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
        assert!(e.to_string().contains(words), "{e}");
    }
    let e = control.unreg_buf(bare, 65536).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
    assert!(e.to_string().contains("0 to 65535, not 65536"), "{e}");
    let (kind, words) = without("SHMEM_ZC", Features::SHMEM_ZC);
    for e in [register(bare, fine).unwrap_err(), control.unreg_buf(bare, 0).unwrap_err()] {
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(&words), "{e}");
    }
    delete(&control, bare);
    if !control.features().unwrap().contains(Features::SHMEM_ZC) {
        return;
    }
    let request = AddDevice::new(&params()).features(FeatureRequest::require(Features::SHMEM_ZC));
    let id = control.add_dev(&request).unwrap().id;
    let e = control.unreg_buf(id, 0).unwrap_err();
    assert_eq!(e.errno(), Some(Errno::ENOENT));
    assert!(e.to_string().contains("no buffer has this index"), "{e}");
    let index = register(id, fine).unwrap();
    let e = register(id, ublk_shmem_buf_reg { len: 8192, ..fine }).unwrap_err();
    assert_eq!(e.errno(), Some(Errno::EEXIST));
    assert!(e.to_string().contains("registered already"), "{e}");
    // Nobody's memory.
    let e = register(id, ublk_shmem_buf_reg { addr: 4096, ..fine }).unwrap_err();
    assert_eq!(e.errno(), Some(Errno::EFAULT));
    assert!(e.to_string().contains("not all of it is mapped"), "{e}");
    control.unreg_buf(id, index).unwrap();
    assert_eq!(register(id, fine).unwrap(), index);
    delete(&control, id);
}

#[test]
fn a_disk_that_is_open_is_not_stopped_by_who_only_tries() {
    let control = Control::open().unwrap();
    if !control.features().unwrap().contains(Features::SAFE_STOP_DEV) {
        let e = control.try_stop_dev(0, &Wait::for_(SOON)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoSuchDevice, "{e}");
        println!("\nnot run: the driver lacks SAFE_STOP_DEV (since Linux 7.0)");
        return;
    }
    let disk = live(Features::NONE);
    let (id, path) = (disk.id(), disk.path().to_owned());
    let client = fs::File::open(&path).unwrap();
    let e = control.try_stop_dev(id, &Wait::for_(SOON)).unwrap_err();
    assert_eq!((e.kind(), e.errno()), (ErrorKind::Busy, Some(Errno::EBUSY)));
    assert!(e.to_string().contains(&format!("(pid {})", std::process::id())), "{e}");
    assert_eq!(control.get_dev_info(id).unwrap().state, DeviceState::Live);
    assert_eq!(fs::read(&path).unwrap().len(), 64 << 20, "it works on, and can be opened");
    drop(client);
    // A closed file is let go of in a moment.
    eventually("it is stopped", || control.try_stop_dev(id, &Wait::for_(SOON)).is_ok());
    assert_eq!(control.get_dev_info(id).unwrap().state, DeviceState::Dead);
    assert!(!path.exists());
    assert_eq!(disk.wait().unwrap(), Ending::StoppedByOthers);
    disk.stop(SOON).unwrap();
}

#[test]
fn every_cpu_belongs_to_one_queue() {
    both_encodings(|control| {
        let params = params().to_builder().queues(4).build().unwrap();
        let device = control.add_dev(&AddDevice::new(&params)).unwrap();
        let mut seen = BTreeSet::new();
        for queue in 0..device.queues {
            for cpu in control.get_queue_affinity(device.id, queue).unwrap().iter() {
                assert!(seen.insert(cpu), "CPU {cpu} belongs to two queues");
            }
        }
        let online = std::thread::available_parallelism().unwrap().get();
        assert!(seen.len() >= online, "{seen:?} on {online} CPUs");
        delete(&control, device.id);
    });
}

#[test]
fn a_section_that_the_driver_drops_is_an_error() {
    both_encodings(|control| {
        let id = add(&control);
        let dma = params().to_builder().dma_alignment(512).build().unwrap();
        let limits = SegmentLimits { boundary_mask: 0xffff, max_size: 65536, max_count: 32 };
        let segments = params().to_builder().segments(limits).build().unwrap();
        for (params, name) in [(dma, "DMA alignment"), (segments, "segment")] {
            match control.set_params(id, &params) {
                Ok(()) => {
                    assert!(is_recent(&control));
                    let info = control.get_dev_info(id).unwrap();
                    let expected = params.to_builder().queues(info.queues).build().unwrap();
                    assert_eq!(control.get_params(id).unwrap(), expected);
                }
                Err(e) => {
                    assert!(!is_recent(&control), "{e}");
                    assert_eq!(e.kind(), ErrorKind::Unsupported);
                    assert!(e.cause().unwrap().contains(name), "{e}");
                }
            }
        }
        delete(&control, id);
    });
}

#[test]
fn a_feature_that_is_missing_or_forbidden_leaves_no_device() {
    let control = Control::open().unwrap();
    let unknown = Features::from_bits(1 << 62);
    let cases = [
        (FeatureRequest::require(unknown), ErrorKind::Unsupported, "bit62"),
        (
            FeatureRequest::default().forbid(Features::CMD_IOCTL_ENCODE),
            ErrorKind::Unsupported,
            "forces CMD_IOCTL_ENCODE on",
        ),
        // Offered by the driver, and cleared for root.
        (
            FeatureRequest::require(Features::UNPRIVILEGED_DEV),
            ErrorKind::Unsupported,
            "callers without CAP_SYS_ADMIN",
        ),
        (FeatureRequest::require(Features::ZONED), ErrorKind::InvalidParameter, "ZONED needs"),
    ];
    for (request, kind, words) in cases {
        let error = control.add_dev(&AddDevice::new(&params()).features(request)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.cause().unwrap().contains(words), "{error}");
        assert!(control.list().unwrap().is_empty(), "{error}");
    }
    let request = FeatureRequest::require(Features::BATCH_IO);
    match control.add_dev(&AddDevice::new(&params()).features(request)) {
        Ok(device) => {
            assert!(device.features.contains(Features::BATCH_IO));
            assert!(!device.features.contains(Features::PER_IO_DAEMON));
            delete(&control, device.id);
        }
        Err(e) => assert!(e.cause().unwrap().contains("BATCH_IO (since Linux 7.0)"), "{e}"),
    }
    // A preference is granted or not; the answer says.
    let request = FeatureRequest::default().prefer(Features::known());
    let device = control.add_dev(&AddDevice::new(&params()).features(request)).unwrap();
    println!("preferring everything: {}", device.features);
    delete(&control, device.id);
}

#[test]
fn a_start_that_nobody_fetches_for_is_taken_back_at_its_deadline() {
    both_encodings(|control| {
        let id = add(&control);
        control.set_params(id, &params()).unwrap();
        let pid = std::process::id() as i32;
        let begin = Instant::now();
        let error =
            control.start_dev(id, pid, &Wait::for_(Duration::from_millis(300))).unwrap_err();
        assert_eq!((error.kind(), error.device()), (ErrorKind::TimedOut, Some(id)));
        assert!(error.cause().unwrap().contains("gave the unfinished command back"), "{error}");
        assert!(begin.elapsed() >= Duration::from_millis(300));
        assert!(control.outstanding().is_empty());
        // The thread is free, the device as before.
        assert_eq!(control.get_dev_info(id).unwrap().state, DeviceState::Dead);
        delete(&control, id);
    });
}

#[test]
fn a_start_is_cancelled_from_another_thread_at_once() {
    let control = Control::open().unwrap();
    let id = add(&control);
    control.set_params(id, &params()).unwrap();
    let token = CancelToken::new();
    std::thread::scope(|s| {
        let starter = s.spawn(|| {
            let wait = Wait::for_(SOON).cancelled_by(&token);
            control.start_dev(id, std::process::id() as i32, &wait)
        });
        eventually("the start is with the kernel", || {
            control.outstanding().iter().any(|o| o.command == ControlCommand::StartDev)
        });
        let one = control.outstanding()[0];
        assert_eq!((one.device, one.abandoned), (Some(id), false));
        // While it waits other commands pass.
        assert_eq!(control.get_dev_info(id).unwrap().id, id);
        let begin = Instant::now();
        token.cancel();
        let error = starter.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert!(error.cause().unwrap().contains("gave the unfinished command back"), "{error}");
        assert!(begin.elapsed() < SOON / 3);
    });
    delete(&control, id);
}

#[test]
fn a_deletion_that_a_holder_blocks_goes_on_by_itself() {
    let control = Control::open().unwrap();
    let id = add(&control);
    let node = fs::File::options().read(true).write(true).open(format!("/dev/ublkc{id}")).unwrap();
    let holders = control.holders(id);
    let us = std::process::id();
    assert!(
        holders.iter().any(|h| matches!(h, Holder::Process { pid, disk: false, .. } if *pid == us)),
        "{holders:?}"
    );
    let error = control.delete(id, &Wait::for_(Duration::from_millis(300))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    let cause = error.cause().unwrap();
    assert!(cause.contains("goes on in the background"), "{error}");
    assert!(cause.contains(&format!("(pid {us}) has the server's node open")), "{error}");
    let stuck = control.outstanding();
    assert_eq!(stuck.len(), 1);
    assert_eq!((stuck[0].command, stuck[0].device), (ControlCommand::DelDev, Some(id)));
    assert!(stuck[0].abandoned);
    // It blocks nobody else.
    let other = add(&control);
    delete(&control, other);
    // A handle that goes away meanwhile leaves the command to its thread, which ends with it.
    let observer = Control::open().unwrap();
    drop(control);
    // A joined thread stays in /proc for a moment.
    eventually("the idle threads have ended", || control_threads() == 2);
    drop(node);
    eventually("the device is gone", || !ids(&observer).contains(&id));
    eventually("the stuck thread has ended", || control_threads() <= 1);
}

#[test]
fn a_hundred_devices_one_after_another_leave_nothing() {
    eventually("former tests' threads have ended", || control_threads() == 0);
    let before = open_files();
    for encoding in [Encoding::Ioctl, Encoding::Legacy] {
        let control = ControlOptions::new().encoding(encoding).open().unwrap();
        for _ in 0..50 {
            let id = add(&control);
            control.set_params(id, &params()).unwrap();
            control.del_dev(id, &Wait::for_(SOON)).unwrap();
        }
        eventually("one caller has one thread", || control_threads() == 1);
        assert!(control.list().unwrap().is_empty());
    }
    eventually("no thread is left", || control_threads() == 0);
    assert_eq!(open_files(), before);
}

#[test]
fn idle_threads_end_by_themselves() {
    let control = Control::open().unwrap();
    eventually("there is one thread", || control_threads() == 1);
    let files = open_files().len();
    eventually("the thread ends", || control_threads() == 0);
    assert!(open_files().len() < files, "and takes its ring along");
    control.get_features().unwrap();
}

#[test]
fn eight_threads_share_a_handle() {
    let control = Control::open().unwrap();
    std::thread::scope(|s| {
        for _ in 0..8 {
            let control = control.clone();
            s.spawn(move || {
                for _ in 0..5 {
                    let id = add(&control);
                    control.set_params(id, &params()).unwrap();
                    assert_eq!(control.get_params(id).unwrap().capacity(), 64 << 20);
                    assert_eq!(control.get_dev_info(id).unwrap().id, id);
                    control.delete(id, &Wait::for_(SOON)).unwrap();
                }
            });
        }
    });
    assert!(control_threads() <= 8);
    assert!(control.list().unwrap().is_empty());
}

#[test]
fn devices_are_found_where_dev_is_empty() {
    let dir = std::env::temp_dir().join("ublk-empty-dev");
    fs::create_dir_all(&dir).unwrap();
    let control = ControlOptions::new().dev_dir(&dir).open().unwrap();
    let id = add(&control);
    assert_eq!(ids(&control), [id].into());
    // The driver itself goes by the path that it is told.
    let node = dir.join(format!("ublkc{id}"));
    let refused = |errno, words: &str| {
        let error = control.get_dev_info2(id).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::PermissionDenied, Some(errno)));
        assert!(error.to_string().contains(words), "{error}");
    };
    refused(Errno::ENOENT, &format!("{} is not there", node.display()));
    fs::write(&node, "").unwrap();
    refused(Errno::EPERM, "its path is another node's");
    fs::remove_file(&node).unwrap();
    delete(&control, id);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "private nodes are removed");
}

#[test]
fn io_uring_that_is_switched_off_is_its_own_error() {
    let switch = "/proc/sys/kernel/io_uring_disabled";
    fs::write(switch, "2").unwrap();
    let opened = Control::open();
    fs::write(switch, "0").unwrap();
    let error = opened.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::IoUringDisabled);
    assert!(error.remedy().unwrap().contains("kernel.io_uring_disabled"), "{error}");
    Control::open().unwrap();
}

#[test]
fn a_forked_child_is_refused_and_the_parent_goes_on() {
    let control = Control::open().unwrap();
    let id = add(&control);
    // SAFETY: the child makes one call, which is refused before it takes a lock, and exits without
    // destructors.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let refused = control.get_features().is_err_and(|e| e.kind() == ErrorKind::Forked);
        let empty = control.outstanding().is_empty();
        // SAFETY: ends the child.
        unsafe { libc::_exit(if refused && empty { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: `status` is writable for the call.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0);
    assert_eq!(control.get_dev_info(id).unwrap().id, id);
    delete(&control, id);
}

const NOBODY: u32 = 65534;

/// Says to this very test, started again as another user, that it is the user's part.
const AS_USER: &str = "UBLK_TEST_AS_USER";

fn unprivileged_user() {
    let control = ControlOptions::new().device_paths(true).open().unwrap();
    let request = AddDevice::new(&params());
    assert_eq!(control.add_dev(&request).unwrap_err().kind(), ErrorKind::PermissionDenied);
    let request = request.features(FeatureRequest::require(Features::UNPRIVILEGED_DEV));
    let device = control.add_dev(&request).unwrap();
    assert_eq!(device.owner_uid, NOBODY);
    let id = device.id;
    assert_eq!(control.get_dev_info(id).unwrap_err().kind(), ErrorKind::PermissionDenied);
    println!("\nadded {id}");
    // The part of udev, played by the test that started us, is done when our input ends.
    std::io::stdin().lines().for_each(drop);
    assert_eq!(control.get_dev_info(id).unwrap(), device);
    control.set_params(id, &params()).unwrap();
    assert_eq!(control.get_params(id).unwrap().capacity(), 64 << 20);
    assert!(!control.get_queue_affinity(id, 0).unwrap().is_empty());
    assert_eq!(ids(&control), [id].into());
    let error = control.del_dev_async(id, &Wait::for_(SOON)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    // The driver looks at the caller first, and at the command then.
    let error = control.try_stop_dev(id, &Wait::for_(SOON)).unwrap_err();
    match control.features().unwrap().contains(Features::SAFE_STOP_DEV) {
        true => assert_eq!(error.kind(), ErrorKind::WrongState, "{error}"),
        false => assert!(error.to_string().contains("since Linux 7.0"), "{error}"),
    }
    delete(&control, id);
}

/// Root is told of another's device what the driver wants of root, too.
fn paths_are_asked_for(control: &Control, id: u32) {
    let (wait, us) = (Wait::for_(SOON), std::process::id() as i32);
    for result in [
        control.get_dev_info(id).map(drop),
        control.get_params(id).map(drop),
        control.set_params(id, &params()),
        control.get_queue_affinity(id, 0).map(drop),
        control.start_dev(id, us, &wait),
        control.stop_dev(id, &wait),
        control.start_user_recovery(id),
        control.end_user_recovery(id, us, &wait),
        control.del_dev(id, &wait),
    ] {
        let error = result.unwrap_err();
        assert_eq!((error.kind(), error.device()), (ErrorKind::InvalidParameter, Some(id)));
        assert!(error.to_string().contains("wants the path of its node"), "{error}");
        assert!(error.remedy().unwrap().contains("device_paths(true)"), "{error}");
    }
    assert!(control.get_dev_info2(id).unwrap().features.contains(Features::UNPRIVILEGED_DEV));
    assert!(ids(control).contains(&id));
}

/// This very test, as another user.
fn as_user(test: &str) -> std::process::Child {
    std::process::Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(AS_USER, "1")
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

/// The driver's node is the user's, for as long as this lives.
fn theirs() -> AsItWas {
    let before = AsItWas::of(CONTROL);
    std::os::unix::fs::chown(CONTROL, Some(NOBODY), None).unwrap();
    before
}

#[test]
fn an_unprivileged_user_has_a_device_of_its_own() {
    if std::env::var_os(AS_USER).is_some() {
        return unprivileged_user();
    }
    let _theirs = theirs();
    // Root's own device is neither listed nor touched.
    let control = Control::open().unwrap();
    let roots = add(&control);
    let mut user = as_user("an_unprivileged_user_has_a_device_of_its_own");
    let mut said = String::new();
    for line in BufReader::new(user.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(id) = line.strip_prefix("added ") {
            std::os::unix::fs::chown(format!("/dev/ublkc{id}"), Some(NOBODY), None).unwrap();
            paths_are_asked_for(&control, id.parse().unwrap());
            user.stdin.take().unwrap().flush().unwrap();
        }
        said += &line;
        said += "\n";
    }
    assert!(user.wait().unwrap().success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
    assert_eq!(ids(&control), [roots].into());
    delete(&control, roots);
}
