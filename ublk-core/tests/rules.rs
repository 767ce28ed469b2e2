//! The driver's rules about features, by the driver itself: each combination that we refuse is sent to it byte by
//! byte, past the library, and is refused or silently changed by it. On Linux 7.3, whose rules they are.

mod disk;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::os::fd::AsRawFd;

use disk::{SOON, devices, no_devices};
use ublk_core::control::{
    AddDevice, Control, ControlOptions, DeviceParams, FeatureRequest, Features as F, Wait,
};
use ublk_core::uapi::{self, ublksrv_ctrl_cmd, ublksrv_ctrl_dev_info};
use ublk_core::{Errno, ErrorKind};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Not added, with this errno.
    Refused(Errno),
    /// Added, without these.
    Dropped(F),
}

const EINVAL: Verdict = Verdict::Refused(Errno::EINVAL);

/// ADD_DEV as it is. What was added is deleted again.
fn add(features: F, io_desc_size: u16) -> Verdict {
    let control = std::fs::File::open("/dev/ublk-control").unwrap();
    let mut ring: IoUring<squeue::Entry128, cqueue::Entry> = IoUring::builder().build(8).unwrap();
    let mut info = ublksrv_ctrl_dev_info {
        nr_hw_queues: 1,
        queue_depth: 4,
        max_io_buf_bytes: 64 << 10,
        dev_id: u32::MAX,
        flags: features.bits(),
        io_desc_size,
        ..Default::default()
    };
    let command = ublksrv_ctrl_cmd {
        dev_id: u32::MAX,
        queue_id: u16::MAX,
        len: size_of::<ublksrv_ctrl_dev_info>() as u16,
        addr: (&raw mut info).expose_provenance() as u64,
        ..Default::default()
    };
    let mut payload = [0u8; 80];
    // SAFETY: the struct has no padding, and 32 bytes.
    let bytes = unsafe { std::mem::transmute::<ublksrv_ctrl_cmd, [u8; 32]>(command) };
    payload[..32].copy_from_slice(&bytes);
    let entry = opcode::UringCmd80::new(types::Fd(control.as_raw_fd()), uapi::UBLK_U_CMD_ADD_DEV)
        .cmd(payload)
        .build();
    // SAFETY: `info` outlives the command, which is waited for.
    unsafe { ring.submission().push(&entry).unwrap() };
    ring.submit_and_wait(1).unwrap();
    let result = ring.completion().next().unwrap().result();
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
