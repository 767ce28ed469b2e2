//! Disks that go from one live server to the next, on a real kernel: under fio, under a mounted file system, with
//! backends that are slow or stuck, and what is refused.

mod disk;

use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use disk::{Client, SOON, Server, bounded, devices, eventually, no_devices};
use ublk_core::control::{Control, DeviceState, Features, Wait};
use ublk_core::targets::File;
use ublk_core::{
    Builder, Capabilities, Ending, Errno, ErrorKind, QueueContext, Request, Running, StopFailed,
    Workers,
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const PLAIN: Features = Features::USER_RECOVERY;

fn offered() -> Features {
    Control::open().unwrap().features().unwrap()
}

/// Whether the driver lets go of servers that live on.
fn can_hand_over() -> bool {
    let can = offered().contains(Features::QUIESCE);
    if !can {
        println!("\nnot run: the driver lacks QUIESCE");
    }
    can
}

fn disk_of(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

fn file_builder(path: &str) -> Builder {
    File::options().open(path).unwrap().builder().queue_depth(16).queues(2)
}

/// Not a test of its own: the servers that the tests below start.
#[test]
fn server_process() {
    let Some(role) = disk::role() else { return };
    let control = Control::open().unwrap();
    let words: Vec<&str> = role.split(' ').collect();
    let running = match words[..] {
        ["quiesce", path] => file_builder(path).require(PLAIN).add(&control).unwrap().start(),
        ["reissue", path] => {
            let reissue = PLAIN | Features::USER_RECOVERY_REISSUE;
            let builder = file_builder(path).require(reissue).forbid(Features::QUIESCE);
            builder.add(&control).unwrap().start()
        }
        ["recover", id, path] => {
            file_builder(path).start_timeout(SOON).recover(id.parse().unwrap(), &control)
        }
        _ => panic!("no role {role}"),
    };
    let running = running.unwrap();
    disk::say(&format!("ready {}", running.id()));
    disk::go_ahead();
    let handle = running.handle();
    running.hand_over(SOON).unwrap();
    assert_eq!(handle.ending(), Some(Ending::HandedOver));
    let total = handle.stats().total();
    assert_eq!((total.dropped, total.revoked, total.rejected), (0, 0, 0));
    disk::say("handed over");
    // It lives on, so that nothing is owed to its end.
    disk::idle();
}

/// The file behind a test's disk, in memory, gone with the test.
struct Store(PathBuf);

impl Store {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(format!("/dev/shm/ublk-{name}-{}", std::process::id()));
        fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        Store(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A disk that wanders from process to process.
struct Wandering {
    store: Store,
    server: Server,
    id: u32,
}

impl Wandering {
    fn start(way: &str) -> Self {
        let store = Store::new(way);
        let mut server = Server::start("server_process", &format!("{way} {}", store.path()));
        let id = server.hear("ready").parse().unwrap();
        Wandering { store, server, id }
    }

    /// The former server lives on, and the next one comes.
    fn hand_over(&mut self) {
        self.server.child.stdin.take().unwrap().write_all(b"x").unwrap();
        self.server.hear("handed over");
        let role = format!("recover {} {}", self.id, self.store.path());
        let mut next = Server::start("server_process", &role);
        assert_eq!(next.hear("ready").parse::<u32>().unwrap(), self.id);
        self.server = next;
    }

    fn end(self) {
        drop(self);
        no_devices();
    }
}

/// Also after a failure: who waits for a disk without a server waits for ever.
impl Drop for Wandering {
    fn drop(&mut self) {
        let deleted = Control::open().and_then(|c| c.delete(self.id, &Wait::for_(SOON)));
        if !std::thread::panicking() {
            deleted.unwrap();
        }
    }
}

/// fio that writes and verifies until it is told to end.
struct Fio {
    child: Child,
    end: PathBuf,
}

impl Fio {
    /// `depth` requests at once from each of two jobs.
    fn start(disk: &Path, depth: u32) -> Self {
        let end = std::env::temp_dir().join(format!("ublk-fio-{}", std::process::id()));
        let _ = fs::remove_file(&end);
        let child = Command::new("fio")
            .args(["--name=v", "--direct=1", "--ioengine=libaio", "--rw=randrw"])
            .arg(format!("--iodepth={depth}"))
            .args(["--bs=4k", "--size=2m", "--offset_increment=2m", "--numjobs=2", "--thread"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=32"])
            .args(["--loops=1000000", "--group_reporting", "--output-format=terse"])
            .args(["--verify_state_save=0", "--terse-version=5"])
            .arg(format!("--filename={}", disk.display()))
            .arg(format!("--trigger-file={}", end.display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Fio { child, end }
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Ends it. It has found no error.
    fn stop(mut self) {
        assert!(self.is_running(), "fio has ended by itself");
        fs::write(&self.end, "x").unwrap();
        eventually("fio ends", || !self.is_running());
        let mut text = String::new();
        let (out, err) = (self.child.stdout.take(), self.child.stderr.take());
        out.unwrap().read_to_string(&mut text).unwrap();
        err.unwrap().read_to_string(&mut text).unwrap();
        assert!(self.child.wait().unwrap().success(), "{text}");
        // The fifth field of version 5 is the error.
        let line = text.lines().find(|line| line.starts_with("5;")).unwrap();
        assert_eq!(line.split(';').nth(4), Some("0"), "{text}");
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = fs::remove_file(&self.end);
    }
}

/// Completed requests of the disk, by the kernel's count.
fn completed(id: u32) -> u64 {
    let stat = fs::read_to_string(format!("/sys/block/ublkb{id}/stat")).unwrap();
    let field = |n| stat.split_whitespace().nth(n).unwrap().parse::<u64>().unwrap();
    field(0) + field(4)
}

fn ten_handovers_under_fio(way: &str) {
    let mut disk = Wandering::start(way);
    let info = Control::open().unwrap().get_dev_info(disk.id).unwrap();
    assert_eq!(info.features.contains(Features::QUIESCE), way == "quiesce");
    let mut fio = Fio::start(&disk_of(disk.id), 16);
    for _ in 0..10 {
        let before = completed(disk.id);
        eventually("fio gets on", || {
            assert!(fio.is_running());
            completed(disk.id) > before + 50
        });
        disk.hand_over();
    }
    let before = completed(disk.id);
    eventually("fio gets on", || completed(disk.id) > before + 50);
    fio.stop();
    disk.end();
}

#[test]
fn ten_handovers_by_quiesce_fail_nothing_under_fio() {
    if can_hand_over() {
        ten_handovers_under_fio("quiesce");
    }
}

#[test]
fn ten_handovers_by_reissue_fail_nothing_under_fio() {
    if can_hand_over() {
        ten_handovers_under_fio("reissue");
    }
}

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program}: {out:?}");
}

#[test]
fn a_file_system_stays_mounted_across_handovers() {
    if !can_hand_over() {
        return;
    }
    let mut disk = Wandering::start("quiesce");
    let path = disk_of(disk.id);
    let path = path.to_str().unwrap();
    run("/sbin/mkfs.ext4", &["-q", path]);
    let point = std::env::temp_dir().join(format!("ublk-handover-{}", std::process::id()));
    fs::create_dir_all(&point).unwrap();
    // Of an error the file system would remember nothing but that it is read-only.
    run("mount", &["-t", "ext4", "-o", "errors=remount-ro", path, point.to_str().unwrap()]);
    let ended = Arc::new(AtomicBool::new(false));
    let writer = {
        let (ended, point) = (Arc::clone(&ended), point.clone());
        std::thread::spawn(move || {
            let mut count = 0u32;
            while !ended.load(Ordering::Relaxed) {
                let mut file = fs::File::create(point.join(format!("f{}", count % 32))).unwrap();
                file.write_all(&count.to_le_bytes().repeat(4096)).unwrap();
                file.sync_all().unwrap();
                count += 1;
            }
            count
        })
    };
    for _ in 0..3 {
        disk.hand_over();
    }
    ended.store(true, Ordering::Relaxed);
    let count = bounded("the writer's end", move || writer.join().unwrap());
    assert!(count > 0);
    for n in count.saturating_sub(32)..count {
        let data = fs::read(point.join(format!("f{}", n % 32))).unwrap();
        assert!(data == n.to_le_bytes().repeat(4096), "file {n}");
    }
    run("umount", &[point.to_str().unwrap()]);
    run("/sbin/e2fsck", &["-f", "-n", path]);
    fs::remove_dir(&point).unwrap();
    disk.end();
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
        // As often as it takes: a tag may be on its way.
        eventually("the device is quiesced", || {
            control.quiesce_dev(id, 100, &Wait::for_(SOON)).unwrap();
            state(id) == DeviceState::Quiesced
        });
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
        let e = Desk::default().builder().require(PLAIN | quiesce).start().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains("lacks QUIESCE (since Linux 6.16)"), "{e}");
        assert_eq!(devices(), []);
    }
}

/// fio goes on across servers that are killed, where their requests are sent to the next.
#[test]
fn ten_kills_with_reissue_fail_nothing_under_fio() {
    let mut disk = Wandering::start("reissue");
    // Less than the tags of a queue: of a full one drivers before 6.16 notice the server's end after 30 seconds.
    let mut fio = Fio::start(&disk_of(disk.id), 4);
    for _ in 0..10 {
        let before = completed(disk.id);
        eventually("fio gets on", || {
            assert!(fio.is_running());
            completed(disk.id) > before + 50
        });
        disk.server.kill();
        disk.server.wait();
        let role = format!("recover {} {}", disk.id, disk.store.path());
        disk.server = Server::start("server_process", &role);
        disk.server.hear("ready");
    }
    fio.stop();
    disk.end();
}
