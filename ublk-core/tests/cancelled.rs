//! Starts and stops that are given up by their callers.

mod disk;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use disk::cycle::{nothing_is_left_by, ram, write_and_read};
use disk::{Client, SOON, devices, no_devices};
use ublk_core::control::{CancelToken, Wait, Zoned};
use ublk_core::{Builder, Capabilities, Ending, ErrorKind, Op, QueueContext, Request};

const MIB: u64 = 1 << 20;
/// What must not be waited for.
const MINUTES: Duration = Duration::from_secs(600);

/// A zoned disk whose zones nobody tells of: START waits for them, and the requests are kept.
fn untold(kept: &mpsc::Sender<Request>) -> Builder {
    let kept = kept.clone();
    let able = Capabilities::WRITE | Capabilities::ZONED;
    Builder::with_handlers(4 * MIB, able, move |_queue| {
        let kept = kept.clone();
        move |request: Request, _: &mut QueueContext<'_>| match request.op() {
            Op::ReportZones => kept.send(request).unwrap(),
            _ => drop(request),
        }
    })
    .zoned(Zoned { zone_bytes: MIB, max_open: 0, max_active: 0, max_append_bytes: 65536 })
    .start_timeout(MINUTES)
}

#[test]
fn a_start_that_is_cancelled_takes_down_what_has_come_up() {
    nothing_is_left_by(|| {
        let (kept, requests) = mpsc::channel();
        let token = CancelToken::new();
        let builder = untold(&kept).cancelled_by(&token);
        let start = std::thread::spawn(move || builder.start());
        let request = requests.recv_timeout(SOON).unwrap();
        let began = Instant::now();
        token.cancel();
        let error = start.join().unwrap().unwrap_err();
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert!(error.to_string().contains("cannot start the device"), "{error}");
        assert!(devices().is_empty());
        // Its memory is this thread's until it lets go; its answer comes too late.
        request.complete_report(&[]).unwrap_err();
    });
}

#[test]
fn a_start_whose_token_was_cancelled_before_makes_nothing() {
    let token = CancelToken::new();
    token.cancel();
    let error = ram().cancelled_by(&token).start().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    no_devices();
}

#[test]
fn a_token_does_nothing_to_a_disk_that_has_started() {
    let token = CancelToken::new();
    let disk = ram().cancelled_by(&token).start().unwrap();
    token.cancel();
    write_and_read(&disk);
    assert_eq!(disk.stop(SOON).unwrap().ending, Ending::Stopped);
}

#[test]
fn a_stop_that_is_cancelled_leaves_a_disk_in_use_and_stops_any_other() {
    let disk = ram().start().unwrap();
    let client = Client::open(disk.path());
    let token = CancelToken::new();
    let (began, handle) = (Instant::now(), disk.handle());
    let wait = Wait::for_(MINUTES).cancelled_by(&token);
    let stop = std::thread::spawn(move || handle.stop_with(&wait));
    std::thread::sleep(Duration::from_millis(50));
    token.cancel();
    let error = stop.join().unwrap().unwrap_err();
    assert!(began.elapsed() < SOON);
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(!error.holders().is_empty());
    client.read(0, 4096).unwrap();
    drop(client);
    // As with no time at all.
    let stopped = disk.stop_with(&Wait::for_(MINUTES).cancelled_by(&token)).unwrap();
    assert_eq!(stopped.ending, Ending::Stopped);
    no_devices();
}

#[test]
fn a_forced_stop_that_is_cancelled_waits_for_no_request() {
    let (kept, requests) = mpsc::channel();
    let disk = Builder::with_handlers(MIB, Capabilities::WRITE, move |_queue| {
        let kept = kept.clone();
        move |request: Request, _: &mut QueueContext<'_>| match request.offset() {
            8192 => kept.send(request).unwrap(),
            _ => request.complete(Ok::<(), ublk_core::Errno>(())).unwrap(),
        }
    });
    let disk = disk.start().unwrap();
    let client = Client::open(disk.path());
    let reader = std::thread::spawn(move || client.read(8192, 4096));
    let request = requests.recv_timeout(SOON).unwrap();
    let token = CancelToken::new();
    let (began, handle) = (Instant::now(), disk.handle());
    let wait = Wait::for_(MINUTES).cancelled_by(&token);
    let stop = std::thread::spawn(move || handle.stop_force_with(&wait));
    std::thread::sleep(Duration::from_millis(50));
    token.cancel();
    assert_eq!(stop.join().unwrap().unwrap().ending, Ending::Stopped);
    assert!(began.elapsed() < SOON);
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    request.complete(Ok::<(), ublk_core::Errno>(())).unwrap_err();
}
