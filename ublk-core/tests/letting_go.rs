//! Live servers that give their disk away, seen from inside: backends that are slow or stuck at that moment, shared
//! workers, others that interfere, and what is refused.

mod disk;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use disk::kernel::{lacks, offered, refused};
use disk::{Client, SOON, bounded, devices, eventually, no_devices};
use ublk_core::control::{CancelToken, Control, DeviceState, Features, Wait};
use ublk_core::{
    Builder, Capabilities, Ending, Errno, ErrorKind, QueueContext, Request, Running, StopFailed,
    Workers,
};

const SIZE: u64 = 16 << 20;
const PLAIN: Features = Features::USER_RECOVERY;

/// Whether the driver lets go of servers that live on.
fn can_hand_over() -> bool {
    !lacks(Features::QUIESCE)
}

/// Requests wait here until the test answers them, in the order of their arrival.
#[derive(Clone, Default)]
struct Desk {
    holding: Arc<AtomicBool>,
    held: Arc<Mutex<VecDeque<Request>>>,
}

impl Desk {
    fn builder(&self) -> Builder {
        let desk = self.clone();
        Builder::with_handlers(SIZE, Capabilities::WRITE, move |_| {
            let desk = desk.clone();
            move |request: Request, _: &mut QueueContext<'_>| {
                if desk.holding.load(Ordering::Relaxed) {
                    desk.held.lock().unwrap().push_back(request);
                } else {
                    let _ = request.complete(Ok::<(), Errno>(()));
                }
            }
        })
        // A scan that is held would hold everybody up.
        .prefer(Features::NO_AUTO_PART_SCAN)
    }

    fn hold(&self, hold: bool) {
        self.holding.store(hold, Ordering::Relaxed);
    }

    fn count(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    fn has(&self, count: usize) {
        eventually("requests arrive", || self.count() == count);
    }

    fn answer(&self) {
        self.held.lock().unwrap().pop_front().unwrap().complete(Ok::<(), Errno>(())).unwrap();
    }
}

/// A client that reads one block and says how it went.
fn reading(disk: &Running, offset: u64) -> JoinHandle<i32> {
    let path = disk.path().to_path_buf();
    std::thread::spawn(move || Client::reader(&path).read_errno(offset, 4096))
}

fn errno_of(client: JoinHandle<i32>) -> i32 {
    bounded("the client's end", move || client.join().unwrap())
}

fn recover(id: u32) -> Running {
    bounded("a recovery", move || {
        Desk::default().builder().recover(id, &Control::open().unwrap()).unwrap()
    })
}

fn stop(disk: Running) {
    assert_eq!(disk.stop(SOON).unwrap().ending, Ending::Stopped);
    no_devices();
}

fn state(id: u32) -> DeviceState {
    Control::open().unwrap().get_dev_info(id).unwrap().state
}

#[test]
fn a_backend_that_does_not_answer_keeps_its_disk() {
    if !can_hand_over() {
        return;
    }
    let desk = Desk::default();
    let disk = desk.builder().require(PLAIN).queue_depth(4).start().unwrap();
    assert!(disk.features().contains(Features::QUIESCE), "it comes with USER_RECOVERY");
    desk.hold(true);
    let client = reading(&disk, 0);
    desk.has(1);
    let failed = disk.hand_over(Duration::from_millis(200)).unwrap_err();
    assert_eq!(failed.error.kind(), ErrorKind::TimedOut);
    assert!(failed.error.to_string().contains("this server goes on"), "{}", failed.error);
    let disk = failed.device;
    assert_eq!((disk.ending(), disk.state().unwrap()), (None, DeviceState::Live));
    desk.answer();
    assert_eq!(errno_of(client), 0);
    desk.hold(false);
    assert_eq!(errno_of(reading(&disk, 4096)), 0);
    let (id, handle) = (disk.id(), disk.handle());
    disk.hand_over(SOON).unwrap();
    assert_eq!(handle.wait().unwrap(), Ending::HandedOver);
    stop(recover(id));
}

/// A handover that began with a request on the disk's only tag, and found another one there when that was answered:
/// the driver takes neither for an obstacle. The second request is with the desk.
struct HalfWay {
    desk: Desk,
    id: u32,
    second: JoinHandle<i32>,
    handing: JoinHandle<Result<(), StopFailed>>,
}

impl HalfWay {
    fn new(with: Features, within: Duration) -> Self {
        for _ in 0..50 {
            if let Some(half_way) = Self::attempt(with, within) {
                return half_way;
            }
        }
        panic!("the driver is always asked before the second request comes");
    }

    /// `None` if the driver was asked before the second request came, which is then the next server's.
    fn attempt(with: Features, within: Duration) -> Option<Self> {
        let desk = Desk::default();
        let disk = desk.builder().require(PLAIN | with).queue_depth(1).start().unwrap();
        let id = disk.id();
        desk.hold(true);
        let first = reading(&disk, 0);
        desk.has(1);
        let second = reading(&disk, 8192);
        let handle = disk.handle();
        let handing = std::thread::spawn(move || disk.hand_over(within));
        // That is refused from the moment when it begins.
        eventually("the handover begins", || handle.resize(SIZE).is_err());
        desk.answer();
        assert_eq!(errno_of(first), 0);
        eventually("the second request comes or is kept back", || {
            handing.is_finished() || desk.count() == 1
        });
        if desk.count() == 1 {
            return Some(HalfWay { desk, id, second, handing });
        }
        handing.join().unwrap().unwrap();
        let next = recover(id);
        assert_eq!(errno_of(second), 0);
        stop(next);
        None
    }

    /// How the handover ends.
    fn end(self) -> (Result<(), StopFailed>, Desk, JoinHandle<i32>) {
        let HalfWay { desk, second, handing, .. } = self;
        (bounded("the handover", move || handing.join().unwrap()), desk, second)
    }
}

#[test]
fn a_request_on_the_only_tag_is_answered_before_the_disk_goes() {
    if !can_hand_over() {
        return;
    }
    let half_way = HalfWay::new(Features::NONE, SOON);
    // The driver has been asked by now, or soon.
    std::thread::sleep(Duration::from_millis(100));
    assert!(!half_way.handing.is_finished());
    let id = half_way.id;
    assert_eq!(state(id), DeviceState::Live);
    half_way.desk.answer();
    let (handed, _, second) = half_way.end();
    handed.unwrap();
    assert_eq!(errno_of(second), 0);
    assert_eq!(state(id), DeviceState::Quiesced);
    stop(recover(id));
}

#[test]
fn what_is_not_answered_half_way_fails_or_goes_to_the_next_server_and_the_error_says_which() {
    if !can_hand_over() {
        return;
    }
    let mut reissue = false;
    let mut tries = 0..50;
    loop {
        assert!(tries.next().is_some(), "no handover was given up half-way");
        let with = if reissue { Features::USER_RECOVERY_REISSUE } else { Features::NONE };
        let half_way = HalfWay::new(with, Duration::from_secs(1));
        let id = half_way.id;
        let (handed, desk, second) = half_way.end();
        let failed = handed.unwrap_err();
        assert_eq!(failed.error.kind(), ErrorKind::TimedOut);
        if failed.device.ending().is_none() {
            // The second request came before the handover had looked for requests.
            desk.answer();
            assert_eq!(errno_of(second), 0);
            stop(failed.device);
            continue;
        }
        let words = if reissue { "go to the next server" } else { "failed" };
        let text = failed.error.to_string();
        assert!(text.contains("did not answer 1 request(s)") && text.contains(words), "{text}");
        assert_eq!(failed.device.ending(), Some(Ending::HandedOver));
        assert_eq!(failed.device.state().unwrap(), DeviceState::Quiesced);
        // It is the next server's: neither a stop nor a drop touches it.
        failed.device.handle().stop_force(SOON).unwrap();
        drop(failed);
        assert_eq!(devices(), [id]);
        if reissue {
            let disk = recover(id);
            assert_eq!(errno_of(second), 0);
            return stop(disk);
        }
        assert_eq!(errno_of(second), libc::EIO);
        stop(recover(id));
        reissue = true;
    }
}

#[test]
fn one_device_of_two_on_shared_workers_is_handed_over() {
    if !can_hand_over() {
        return;
    }
    let pool = Workers::new(1).unwrap();
    let shared = || Desk::default().builder().require(PLAIN).workers(&pool).queue_depth(8);
    let (going, staying) = (shared().start().unwrap(), shared().start().unwrap());
    let id = going.id();
    going.hand_over(SOON).unwrap();
    assert_eq!(errno_of(reading(&staying, 0)), 0);
    let next = recover(id);
    assert_eq!(errno_of(reading(&next, 0)), 0);
    next.stop(SOON).unwrap();
    stop(staying);
}

#[test]
fn a_device_that_somebody_else_quiesces_is_left_to_the_next_server() {
    if !can_hand_over() {
        return;
    }
    for force in [false, true] {
        let disk = Desk::default().builder().require(PLAIN).start().unwrap();
        assert_eq!(errno_of(reading(&disk, 0)), 0);
        let (id, handle) = (disk.id(), disk.handle());
        let control = Control::open().unwrap();
        control.quiesce(id, &Wait::for_(SOON)).unwrap();
        assert_eq!(state(id), DeviceState::Quiesced);
        control.quiesce(id, &Wait::for_(SOON)).unwrap();
        assert_eq!(handle.wait().unwrap(), Ending::StoppedByOthers);
        assert_eq!(handle.state().unwrap(), DeviceState::Quiesced);
        assert!(handle.stats().total().completed() > 0);
        let failed = disk.hand_over(SOON).unwrap_err();
        assert_eq!(failed.error.kind(), ErrorKind::WrongState);
        let disk = failed.device;
        if force {
            disk.stop_force(SOON).unwrap();
        } else {
            drop(disk);
        }
        assert_eq!((devices(), state(id)), (vec![id], DeviceState::Quiesced));
        stop(recover(id));
    }
}

#[test]
fn who_quiesces_a_disk_waits_for_the_requests_that_its_server_has() {
    if !can_hand_over() {
        return;
    }
    let desk = Desk::default();
    let disk = desk.builder().require(PLAIN).start().unwrap();
    let (id, control) = (disk.id(), Control::open().unwrap());
    desk.hold(true);
    let held = reading(&disk, 0);
    desk.has(1);
    // The driver says that it has quiesced it, and has not.
    let error = control.quiesce(id, &Wait::for_(Duration::from_millis(300))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("its server has not let go of it"), "{error}");
    assert_eq!(state(id), DeviceState::Live);
    let token = CancelToken::new();
    let wait = Wait::forever().cancelled_by(&token);
    let waits = std::thread::spawn(move || control.quiesce(id, &wait).unwrap_err().kind());
    token.cancel();
    assert_eq!(bounded("a wait that is given up", || waits.join().unwrap()), ErrorKind::Cancelled);
    let quiesces = std::thread::spawn(move || {
        Control::open().unwrap().quiesce(id, &Wait::for_(SOON)).unwrap();
        state(id)
    });
    desk.answer();
    assert_eq!(errno_of(held), 0);
    assert_eq!(bounded("the disk is quiesced", || quiesces.join().unwrap()), DeviceState::Quiesced);
    drop(disk);
    stop(recover(id));
}

#[test]
fn a_batched_disk_is_not_quiesced() {
    if !can_hand_over() || lacks(Features::BATCH_IO) {
        return;
    }
    let granted = PLAIN | Features::QUIESCE | Features::BATCH_IO;
    let disk = Desk::default().builder().require(granted).start().unwrap();
    let error = Control::open().unwrap().quiesce(disk.id(), &Wait::for_(SOON)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("of a device with BATCH_IO"), "{error}");
    assert_eq!(errno_of(reading(&disk, 0)), 0);
    stop(disk);
}

#[test]
fn what_cannot_be_handed_over_says_what_is_missing_and_goes_on() {
    let fail_io = PLAIN | Features::USER_RECOVERY_FAIL_IO;
    let reissue = PLAIN | Features::USER_RECOVERY_REISSUE;
    let quiesce = Features::QUIESCE;
    let mut cases = vec![
        (Features::NONE, quiesce, "without USER_RECOVERY (since Linux 6.1)"),
        (PLAIN, quiesce, "it has not QUIESCE (since Linux 6.16)"),
    ];
    if offered().contains(fail_io) {
        cases.push((fail_io, quiesce, "with USER_RECOVERY_FAIL_IO requests fail"));
        cases.push((fail_io | quiesce, Features::NONE, "with USER_RECOVERY_FAIL_IO requests fail"));
    }
    if !offered().contains(Features::PER_IO_DAEMON) {
        cases.push((PLAIN, Features::NONE, "it has not QUIESCE (since Linux 6.16)"));
        cases.push((
            reissue,
            Features::NONE,
            "neither QUIESCE (since Linux 6.16) nor PER_IO_DAEMON",
        ));
    }
    for (require, forbid, words) in cases {
        let disk = Desk::default().builder().require(require).forbid(forbid).start().unwrap();
        let failed = disk.hand_over(SOON).unwrap_err();
        assert_eq!(failed.error.kind(), ErrorKind::Unsupported);
        assert!(failed.error.to_string().contains(words), "{}", failed.error);
        assert_eq!(errno_of(reading(&failed.device, 0)), 0);
        stop(failed.device);
    }
    if !offered().contains(quiesce) {
        refused(&Desk::default().builder().require(PLAIN | quiesce).start().unwrap_err(), quiesce);
    }
}
