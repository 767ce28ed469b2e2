//! A device of an ordinary user: made, served, used and deleted without a capability, with udev and the rules that are
//! shipped. This very binary is started again as the user, as a stranger, and as udev's helper.

mod disk;
mod sharing;
#[path = "../examples/ublk_chown.rs"]
mod ublk_chown;

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use disk::kernel::{lacks, offered};
use disk::node::{AsItWas, CONTROL};
use disk::{Client, SOON, eventually};
use ublk_core::control::{Control, ControlOptions, Features as F, Wait};
use ublk_core::{
    Backend, Builder, Capabilities, DataPath, Ending, Errno, Error, ErrorKind, QueueContext,
    Request, SharedBuffer,
    targets::{File, Mem},
};

const OWNER: u32 = 1000;
const STRANGER: u32 = 1001;
/// Says to this binary, started again, who it is.
const ROLE: &str = "UBLK_TEST_ROLE";
/// The device, or the node, that it is about.
const ABOUT: &str = "UBLK_TEST_ABOUT";
const HELPER: &str = "/usr/lib/udev/ublk_chown";
/// The guest may have reached its root by chroot, where these programs do nothing unless told.
const CHROOT: &str = "SYSTEMD_IGNORE_CHROOT";
const SIZE: u64 = 1 << 20;

fn again(test: &str, role: &str, about: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(ROLE, role).env(ABOUT, about);
    command
}

fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

fn about() -> String {
    std::env::var(ABOUT).unwrap()
}

/// udevd with the rules that we ship, and a group for those who may make devices.
struct Udev {
    udevd: Child,
    groups: String,
    _control: AsItWas,
}

impl Udev {
    fn start(test: &str) -> Self {
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let control = AsItWas::of(CONTROL);
        let groups = fs::read_to_string("/etc/group").unwrap();
        if !groups.contains("\nublk:") {
            fs::write("/etc/group", format!("{groups}\nublk:x:{OWNER}:\n")).unwrap();
        }
        fs::create_dir_all("/etc/udev/rules.d").unwrap();
        fs::copy(tree.join("udev/80-ublk.rules"), "/etc/udev/rules.d/80-ublk.rules").unwrap();
        let exe = std::env::current_exe().unwrap();
        let script = format!(
            "#!/bin/sh\n{ROLE}=helper {ABOUT}=\"$1\" exec {} --exact {test} --nocapture\n",
            exe.display()
        );
        fs::write(HELPER, script).unwrap();
        fs::set_permissions(HELPER, fs::Permissions::from_mode(0o755)).unwrap();
        let udevd = Command::new("/lib/systemd/systemd-udevd").env(CHROOT, "1").spawn().unwrap();
        let this = Udev { udevd, groups, _control: control };
        eventually("udevd answers", || udevadm(&["control", "--ping", "--timeout=5"]));
        // It was there before udevd.
        assert!(udevadm(&["trigger", "--settle", "--action=add", "--sysname-match=ublk-control"]));
        this
    }
}

fn udevadm(args: &[&str]) -> bool {
    Command::new("udevadm").env(CHROOT, "1").args(args).status().unwrap().success()
}

impl Drop for Udev {
    fn drop(&mut self) {
        let _ = self.udevd.kill();
        let _ = self.udevd.wait();
        let _ = fs::write("/etc/group", &self.groups);
        let _ = fs::remove_file("/etc/udev/rules.d/80-ublk.rules");
        let _ = fs::remove_file(HELPER);
    }
}

/// The user's part, at work.
struct User {
    child: Child,
    input: Option<ChildStdin>,
    lines: io::Lines<BufReader<std::process::ChildStdout>>,
    said: String,
}

impl User {
    fn start(test: &str, role: &str, about: &str, uid: u32) -> Self {
        let mut child = again(test, role, about)
            .uid(uid)
            .gid(uid)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        User { input: child.stdin.take(), child, lines, said: String::new() }
    }

    /// Waits for a line that begins so, and returns its rest.
    fn hears(&mut self, start: &str) -> String {
        for line in self.lines.by_ref() {
            let line = line.unwrap();
            if let Some(rest) = line.strip_prefix(start) {
                return rest.to_owned();
            }
            self.said += &(line + "\n");
        }
        panic!("the user did not say {start:?}:\n{}", self.said);
    }

    fn go_on(&mut self) {
        self.input.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    fn succeeds(mut self) {
        drop(self.input.take());
        for line in self.lines.by_ref() {
            self.said += &(line.unwrap() + "\n");
        }
        assert!(self.child.wait().unwrap().success(), "{}", self.said);
        assert!(self.said.contains("1 passed"), "{}", self.said);
    }
}

/// In the user's part: waits until the test that started it says so.
fn pause() {
    io::stdin().read_line(&mut String::new()).unwrap();
}

fn has(error: &Error, kind: ErrorKind, text: &str) {
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(text), "{error}");
}

fn mem() -> Builder {
    Builder::new(SIZE, Mem::new(SIZE)).require(F::UNPRIVILEGED_DEV)
}

fn owner() {
    let not_asked = Builder::new(SIZE, Mem::new(SIZE)).start().unwrap_err();
    has(&not_asked, ErrorKind::PermissionDenied, "UNPRIVILEGED_DEV");
    let recoverable = mem().require(F::USER_RECOVERY).start().unwrap_err();
    has(&recoverable, ErrorKind::InvalidParameter, "cannot be recovered");
    let zero_copy = mem().data_path(DataPath::ZeroCopy).start().unwrap_err();
    has(&zero_copy, ErrorKind::InvalidParameter, "SUPPORT_ZERO_COPY");
    let disk = mem().start().unwrap();
    let id = disk.id();
    assert_eq!(disk.info().owner_uid, OWNER);
    let second = mem().start().unwrap_err();
    has(&second, ErrorKind::TooMany, "allow_many_unprivileged");
    mem().allow_many_unprivileged(true).start().unwrap().stop(SOON).unwrap();
    let client = Client::open(disk.path());
    client.0.write_all_at(&disk::Aligned::new(4096), 4096).unwrap();
    assert_eq!(client.read(4096, 4096).unwrap(), [0; 4096]);
    let recovery = mem().recover(id, &Control::open().unwrap()).unwrap_err();
    has(&recovery, ErrorKind::Unsupported, "lets none of these be recovered");
    println!("\nserving {id}");
    pause();
    drop(client);
    disk.stop(SOON).unwrap();
    // What would work on clients' own pages has them copied: the driver gives them to the privileged alone.
    let path = std::env::temp_dir().join(format!("ublk-unprivileged-{}", std::process::id()));
    let file = File::options().create(SIZE).open(&path).unwrap();
    let disk = file.builder().require(F::UNPRIVILEGED_DEV).start().unwrap();
    assert_eq!(disk.data_path(), DataPath::Copy);
    let client = Client::open(disk.path());
    client.write(4096, &[7; 4096]).unwrap();
    assert_eq!(client.read(4096, 4096).unwrap(), [7; 4096]);
    assert_eq!(fs::read(&path).unwrap()[4095..4098], [0, 7, 7]);
    drop(client);
    disk.stop(SOON).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(!Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists());
    if offered().contains(F::UPDATE_SIZE | F::SHMEM_ZC) {
        changed_while_it_is_used();
        shared_too_late();
    }
    // By force, with the disk open: what the driver has no short deletion for.
    let disk = mem().start().unwrap();
    let client = Client::open(disk.path());
    let id = disk.id();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| disk.stop_force(SOON));
        eventually("the disk is gone", || client.read(0, 4096).is_err());
        drop(client);
        stop.join().unwrap().unwrap();
    });
    assert!(!Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists());
}

/// By commands that have to name the device's node as every other.
fn changed_while_it_is_used() {
    let shared = Arc::new(AtomicU64::new(0));
    let disk = sharing::counting(DataPath::Copy, F::UNPRIVILEGED_DEV, &shared).start().unwrap();
    let size = || {
        let told = fs::read_to_string(format!("/sys/block/ublkb{}/size", disk.id())).unwrap();
        told.trim().parse::<u64>().unwrap() * 512
    };
    let whole = size();
    disk.resize(whole / 2).unwrap();
    assert_eq!(size(), whole / 2);
    disk.resize(whole).unwrap();
    assert_eq!(size(), whole);
    let buffer = SharedBuffer::new(SIZE).unwrap();
    let number = disk.share(&buffer).unwrap();
    sharing::exercise(&disk, &buffer);
    let counted = shared.load(Ordering::SeqCst);
    assert!(counted >= 12, "{counted}");
    disk.unshare(number).unwrap();
    sharing::exercise(&disk, &buffer);
    assert_eq!(shared.load(Ordering::SeqCst), counted, "it is not shared any more");
    assert_eq!(disk.share(&buffer).unwrap(), number);
    disk.stop(SOON).unwrap();
}

/// Memory that the driver takes when nobody waits for it any more is taken back, by a command that names the node, too.
fn shared_too_late() {
    let (kept, requests) = channel::<Request>();
    let kept: Arc<Mutex<Sender<Request>>> = Arc::new(Mutex::new(kept));
    let builder = Builder::with_handlers(SIZE, Capabilities::WRITE, move |_queue| {
        let (kept, mut all) = (kept.lock().unwrap().clone(), false);
        move |request: Request, _: &mut QueueContext<'_>| match request.offset() {
            KEPT if !all => {
                all = true;
                kept.send(request).unwrap();
            }
            _ => request.complete(Ok::<(), Errno>(())).unwrap(),
        }
    });
    let features = F::UNPRIVILEGED_DEV | F::SHMEM_ZC;
    let disk = builder.queues(1).require(features).prefer(F::NO_AUTO_PART_SCAN).start().unwrap();
    let reader = Client::reader(disk.path());
    let reader = std::thread::spawn(move || reader.read_errno(KEPT, 4096));
    let request = requests.recv().unwrap();
    let impatient = ControlOptions::new().device_paths(true).patience(Duration::from_millis(300));
    let impatient = impatient.open().unwrap();
    let buffer = SharedBuffer::new(SIZE).unwrap();
    let mapping = sharing::Mapping::of(&buffer);
    let addr = mapping.start.as_ptr() as u64;
    let memory = ublk_core::uapi::ublk_shmem_buf_reg { addr, len: SIZE, ..Default::default() };
    // SAFETY: mapped for as long as the disk lives, and nobody has a slice of it.
    let late = unsafe { impatient.reg_buf(disk.id(), &memory) }.unwrap_err();
    has(&late, ErrorKind::TimedOut, "");
    request.complete(Ok::<(), Errno>(())).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
    eventually("it is undone", || impatient.outstanding().is_empty());
    assert_eq!(disk.share(&buffer).unwrap(), 0, "neither the memory nor the number is taken");
    disk.stop(SOON).unwrap();
}

fn stranger() {
    let id: u32 = about().parse().unwrap();
    let open = fs::File::open(format!("/dev/ublkb{id}")).unwrap_err();
    assert_eq!(open.kind(), io::ErrorKind::PermissionDenied);
    let control = ControlOptions::new().device_paths(true).open().unwrap();
    let wait = Wait::for_(SOON);
    for refused in [
        control.get_dev_info(id).map(drop),
        control.get_dev_info2(id).map(drop),
        control.stop_dev(id, &wait),
        control.del_dev(id, &wait),
        control.delete(id, &wait),
        Control::open().unwrap().delete(id, &wait),
    ] {
        has(&refused.unwrap_err(), ErrorKind::PermissionDenied, "its node");
    }
}

#[test]
fn an_ordinary_user_makes_serves_uses_and_deletes_a_device() {
    const TEST: &str = "an_ordinary_user_makes_serves_uses_and_deletes_a_device";
    match role().as_deref() {
        Some("helper") => return ublk_chown::give(&about()).map(drop).unwrap(),
        Some("owner") => return owner(),
        Some("stranger") => return stranger(),
        _ => {}
    }
    let _udev = Udev::start(TEST);
    has(&mem().start().unwrap_err(), ErrorKind::Unsupported, "without CAP_SYS_ADMIN");
    let mut owner = User::start(TEST, "owner", "", OWNER);
    let id = owner.hears("serving ");
    // What keeps the stranger out is not the control node.
    fs::set_permissions(CONTROL, fs::Permissions::from_mode(0o666)).unwrap();
    User::start(TEST, "stranger", &id, STRANGER).succeeds();
    owner.go_on();
    owner.succeeds();
}

/// Tells the test, which is root, to shorten the timeout of the device's requests.
fn shortened(id: u32) {
    println!("\nserving {id}");
    pause();
}

const KEPT: u64 = 8192;
/// Keep the worker for a half and for a quarter of the timeout.
const HALF: u64 = SIZE - 16384;
const QUARTER: u64 = SIZE - 8192;
/// More than io_uring brings at once.
const AT_ONCE: u64 = 60;

/// Requests that take their time, on the worker: apart, so that nothing merges them, and where nobody looks who wants to
/// know what is on the disk.
fn slow(i: u64) -> u64 {
    SIZE / 2 + i * 8192 + 4096
}

fn is_slow(offset: u64) -> bool {
    offset >= SIZE / 2 && offset % 8192 == 4096
}

fn keeper() {
    let (kept, requests) = channel::<Request>();
    let (begun, busy) = channel::<()>();
    let tell = Arc::new(Mutex::new((kept, begun)));
    let disk = Builder::with_handlers(SIZE, Capabilities::WRITE, move |_queue| {
        let (kept, begun) = tell.lock().unwrap().clone();
        move |request: Request, _: &mut QueueContext<'_>| match request.offset() {
            KEPT => kept.send(request).unwrap(),
            offset @ (HALF | QUARTER) => {
                begun.send(()).unwrap();
                std::thread::sleep(timeout() / if offset == HALF { 2 } else { 4 });
                request.complete(Ok::<(), Errno>(())).unwrap();
            }
            offset if is_slow(offset) => {
                std::thread::sleep(timeout() / 20);
                request.complete(Ok::<(), Errno>(())).unwrap();
            }
            _ => request.complete(Ok::<(), Errno>(())).unwrap(),
        }
    })
    .queues(1)
    // So that no timer of idle memory wakes the worker.
    .queue_depth(64)
    .populate(true)
    .require(F::UNPRIVILEGED_DEV)
    .start()
    .unwrap();
    shortened(disk.id());
    let client = Client::open(disk.path());
    let begin = Instant::now();
    assert_eq!(client.read(KEPT, 4096).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert!(begin.elapsed() < timeout(), "{:?}", begin.elapsed());
    assert!(begin.elapsed() >= timeout() / 2, "{:?}: too early", begin.elapsed());
    // The late answer harms nobody, and the tag serves on with a buffer of its own.
    let mut late = requests.recv().unwrap();
    late.data_mut().fill(0xee);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| client.read(KEPT, 4096).unwrap());
        let mut request = requests.recv().unwrap();
        late.data_mut().fill(0xdd);
        request.data_mut().fill(0x11);
        late.complete(Ok::<(), Errno>(())).unwrap_err();
        request.complete(Ok::<(), Errno>(())).unwrap();
        assert_eq!(reader.join().unwrap(), [0x11; 4096]);
    });
    let whole = || {
        for at in (0..64).map(|i| i * 4096).filter(|at| *at != KEPT) {
            assert_eq!(client.read(at, 4096).unwrap(), [0; 4096]);
        }
    };
    whole();
    assert_eq!(disk.stats().total().revoked, 1);
    // Each quick enough, together too slow: what comes with one turn is not left to the turn's end. And what comes later,
    // because io_uring does not bring it all at once, has waited as long.
    let read = |at| {
        let client = Client::reader(disk.path());
        std::thread::spawn(move || client.read_errno(at, 4096))
    };
    let begin = Instant::now();
    let first = read(HALF);
    busy.recv().unwrap();
    let readers: Vec<_> = (0..AT_ONCE).map(|i| read(slow(i))).collect();
    assert_eq!(first.join().unwrap(), 0);
    let errnos: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    assert!(begin.elapsed() < timeout(), "{:?}", begin.elapsed());
    let failed = errnos.iter().filter(|errno| **errno == libc::EIO).count() as u64;
    assert!(errnos.iter().all(|errno| [0, libc::EIO].contains(errno)), "{errnos:?}");
    assert!((1..AT_ONCE).contains(&failed), "{errnos:?}");
    assert_eq!(disk.stats().total().revoked, 1 + failed);
    whole();
    // A worker that was busy, and has nothing to do now: what comes then has not waited. With half of the timeout.
    shortened(disk.id());
    assert_eq!(read(QUARTER).join().unwrap(), 0);
    let reader = read(KEPT);
    let request = requests.recv().unwrap();
    std::thread::sleep(timeout() / 6);
    request.complete(Ok::<(), Errno>(())).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
    drop(client);
    assert_eq!(disk.stop(SOON).unwrap().ending, Ending::Stopped);
}

/// What the block layer's timeout is made. A third of it is all the time that the watchdog has: more of it on a machine
/// that is slow, by the rig's word.
fn timeout() -> Duration {
    let scale = std::env::var("UBLK_TIMESCALE").ok().and_then(|scale| scale.parse::<f64>().ok());
    Duration::from_secs(6).mul_f64((scale.unwrap_or(1.0) / 2.0).clamp(1.0, 8.0))
}

#[test]
fn a_request_that_takes_too_long_fails_and_its_server_lives() {
    const TEST: &str = "a_request_that_takes_too_long_fails_and_its_server_lives";
    match role().as_deref() {
        Some("helper") => return ublk_chown::give(&about()).map(drop).unwrap(),
        Some("keeper") => return keeper(),
        _ => {}
    }
    let _udev = Udev::start(TEST);
    let mut owner = User::start(TEST, "keeper", "", OWNER);
    for timeout in [timeout(), timeout() / 2] {
        let id = owner.hears("serving ");
        let timeout = timeout.as_millis().to_string();
        fs::write(format!("/sys/block/ublkb{id}/queue/io_timeout"), timeout).unwrap();
        owner.go_on();
    }
    owner.succeeds();
}

/// Takes less time for one request than anybody is punished for, and for two more.
#[derive(Clone, Default)]
struct Stuck(Arc<AtomicU32>);

impl Backend for Stuck {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if is_slow(offset) {
            self.0.fetch_add(1, Ordering::SeqCst);
            // Of the timeout, which is twice that, this is a bit less than two thirds.
            std::thread::sleep(timeout() * 5 / 4);
        }
        buf.fill(0);
        Ok(buf.len())
    }
}

/// A backend that keeps its worker itself. The second request waits for the first where nobody sees it, and the driver's
/// clock goes on.
fn stuck() {
    let stuck = Stuck::default();
    let disk =
        Builder::new(SIZE, stuck.clone()).queues(1).require(F::UNPRIVILEGED_DEV).start().unwrap();
    shortened(disk.id());
    let reads = |at| {
        let client = Client::reader(disk.path());
        std::thread::spawn(move || client.read_errno(at, 4096))
    };
    let first = reads(slow(0));
    eventually("it is at work", || stuck.0.load(Ordering::SeqCst) == 1);
    let second = reads(slow(1));
    assert_eq!(first.join().unwrap(), 0);
    assert_ne!(second.join().unwrap(), 0);
    let error = disk.wait().unwrap_err();
    has(&error, ErrorKind::WorkerDied, "stuck in the backend");
}

#[test]
fn a_worker_that_is_stuck_costs_the_device_and_not_the_server() {
    const TEST: &str = "a_worker_that_is_stuck_costs_the_device_and_not_the_server";
    match role().as_deref() {
        Some("helper") => return ublk_chown::give(&about()).map(drop).unwrap(),
        Some("stuck") => return stuck(),
        _ => {}
    }
    // The only way of drivers before it to abort requests whose server has closed the device is to kill the server.
    if lacks(F::PER_IO_DAEMON) {
        return;
    }
    let _udev = Udev::start(TEST);
    let mut owner = User::start(TEST, "stuck", "", OWNER);
    let id = owner.hears("serving ");
    // Time enough between giving up and being killed, also on an emulated machine.
    let timeout = (2 * timeout()).as_millis().to_string();
    fs::write(format!("/sys/block/ublkb{id}/queue/io_timeout"), timeout).unwrap();
    owner.go_on();
    owner.succeeds();
}
