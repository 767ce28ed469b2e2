//! Devices that lose their disk and get another: STOP, and START once more.

mod disk;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use disk::kernel::{lacks, offered};
use disk::{Client, Held, SOON, devices, eventually, no_devices, threads};
use ublk_core::control::{CancelToken, Control, DeviceState, Features, Holder, Wait};
use ublk_core::targets::Mem;
use ublk_core::{
    Added, Backend, Builder, Capabilities, Device, Ending, Errno, Error, ErrorKind, QueueContext,
    Request, RequestFlags, Running, Workers,
};

const MIB: u64 = 1 << 20;

/// Memory that lives as long as any of its disks.
struct Kept(Arc<Mem>);

impl Backend for Kept {
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.0.read_at(buf, offset).map(|()| buf.len())
    }
    fn write(&self, data: &[u8], offset: u64, _: RequestFlags) -> std::io::Result<usize> {
        self.0.write_at(data, offset).map(|()| data.len())
    }
}

fn disk(memory: &Arc<Mem>, size: u64) -> Builder {
    Builder::new(size, Kept(Arc::clone(memory))).queue_depth(8)
}

/// Whether the driver starts a device a second time.
fn restarts() -> bool {
    let can = Control::open().unwrap().features().unwrap().contains(Features::IO_DESC_SIZE);
    if !can {
        println!("\nnot run: the driver starts no device a second time");
    }
    can
}

fn halt(disk: Running) -> Added {
    disk::bounded("a halt", move || disk.halt(SOON).unwrap())
}

fn block_size(disk: &Device) -> u64 {
    let path = format!("/sys/block/ublkb{}/queue/logical_block_size", disk.id());
    std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

#[test]
fn a_driver_that_starts_no_device_twice_is_named_and_the_disk_goes_on() {
    if Control::open().unwrap().features().unwrap().contains(Features::IO_DESC_SIZE) {
        println!("\nnot run: the driver starts devices as often as one likes");
        return;
    }
    let running = disk(&Arc::new(Mem::new(MIB)), MIB).start().unwrap();
    let failed = running.halt(SOON).unwrap_err();
    assert_eq!(failed.error.kind(), ErrorKind::Unsupported);
    assert!(failed.error.to_string().contains("since Linux 7.3"), "{}", failed.error);
    println!("\nrefused: a second start (since Linux 7.3)");
    Client::open(failed.device.path()).read(0, 4096).unwrap();
    failed.device.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_device_is_halted_and_started_ten_times_and_keeps_its_number_and_data() {
    if !restarts() {
        return;
    }
    let memory = Arc::new(Mem::new(MIB));
    let mut running = disk(&memory, MIB).fingerprint(77).start().unwrap();
    let id = running.id();
    let mut held = None;
    for round in 0..10u8 {
        let client = Client::open(running.path());
        if round > 0 {
            assert_eq!(client.read(0, 4096).unwrap(), [round; 4096]);
        }
        client.write(0, &[round + 1; 4096]).unwrap();
        drop(client);
        let old = running.handle();
        let added = halt(running);
        assert_eq!(
            (old.wait().unwrap(), old.state().unwrap()),
            (Ending::Stopped, DeviceState::Dead)
        );
        // A handle of its former life does not delete it.
        old.stop_force(SOON).unwrap();
        assert_eq!((added.id(), devices()), (id, vec![id]));
        assert!(!running_disk(id));
        running = added.start().unwrap();
        assert_eq!((running.id(), running.info().server_flags), (id, 77));
        assert_eq!(old.ending(), Some(Ending::Stopped));
        held.get_or_insert_with(Held::now).is_again();
    }
    assert_eq!(running.stop(SOON).unwrap().id, id);
    no_devices();
}

fn running_disk(id: u32) -> bool {
    std::path::Path::new(&format!("/sys/block/ublkb{id}")).exists()
}

#[test]
fn between_two_lives_a_disk_may_be_described_anew() {
    if !restarts() {
        return;
    }
    let memory = Arc::new(Mem::new(8 * MIB));
    let running = disk(&memory, MIB).start().unwrap();
    running.resize(2 * MIB).unwrap();
    let (id, depth) = (running.id(), running.info().queue_depth);
    let mut added = halt(running);
    assert_eq!(added.info().capacity, Some(2 * MIB), "a resize is not forgotten");
    let e = added.describe(disk(&memory, 1000)).unwrap_err();
    assert_eq!((e.kind(), e.device()), (ErrorKind::InvalidParameter, Some(id)));
    let e = added.describe(disk(&memory, MIB).require(Features::USER_RECOVERY)).unwrap_err();
    assert_eq!((e.kind(), e.device()), (ErrorKind::Unsupported, Some(id)));
    added.describe(disk(&memory, 4 * MIB).logical_block_size(4096).queue_depth(64)).unwrap();
    let running = added.start().unwrap();
    assert_eq!((running.params().capacity(), block_size(&running)), (4 * MIB, 4096));
    assert_eq!(running.info().queue_depth, depth, "settled when it was added");
    assert_eq!(running.info().capacity, Some(4 * MIB));
    Client::open(running.path()).write(4 * MIB - 4096, &[1; 4096]).unwrap();
    // Read-only, by another backend, not started: a drop deletes what was halted.
    let mut added = halt(running);
    added.describe(disk(&memory, 4 * MIB).read_only(true)).unwrap();
    let running = added.start().unwrap();
    assert!(running.params().read_only());
    assert_eq!(Client::reader(running.path()).read(4 * MIB - 4096, 4096).unwrap(), [1; 4096]);
    drop(halt(running));
    no_devices();
}

#[test]
fn a_disk_that_is_used_is_not_halted_and_goes_on() {
    if !restarts() {
        return;
    }
    let running = disk(&Arc::new(Mem::new(MIB)), MIB).start().unwrap();
    let client = Client::open(running.path());
    let failed = running.halt(std::time::Duration::from_millis(100)).unwrap_err();
    assert_eq!(failed.error.kind(), ErrorKind::Busy);
    assert!(!failed.error.holders().is_empty());
    client.write(0, &[1; 4096]).unwrap();
    drop(client);
    let running = halt(failed.device).start().unwrap();
    // Everybody who may open the disk can: a TRY_STOP would have kept the unprivileged out of this life, too.
    let path = running.path().to_path_buf();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", path.display())).args(["of=/dev/null", "count=1"]).uid(65_534);
    let out = dd.output().unwrap();
    assert!(out.status.success(), "{out:?}");
    running.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_disk_on_shared_workers_and_one_that_can_be_recovered_are_restarted_beside_others() {
    if !restarts() {
        return;
    }
    let pool = Workers::new(1).unwrap();
    let memory = Arc::new(Mem::new(MIB));
    let neighbour = disk(&memory, MIB).workers(&pool).start().unwrap();
    let recoverable = disk(&memory, MIB).require(Features::USER_RECOVERY).workers(&pool);
    let mut running = recoverable.start().unwrap();
    for round in 0..3u8 {
        Client::open(running.path()).write(4096, &[round; 4096]).unwrap();
        running = halt(running).start().unwrap();
        assert_eq!(Client::open(neighbour.path()).read(4096, 4096).unwrap(), [round; 4096]);
    }
    // It is what it was also in this respect.
    if running.features().contains(Features::QUIESCE) {
        let id = running.id();
        running.hand_over(SOON).unwrap();
        let control = Control::open().unwrap();
        running = disk(&memory, MIB).recover(id, &control).unwrap();
        assert_eq!(Client::open(running.path()).read(4096, 4096).unwrap(), [2; 4096]);
        // Nor does it matter who started it.
        running = halt(running).start().unwrap();
        Client::open(running.path()).read(4096, 4096).unwrap();
    }
    running.stop(SOON).unwrap();
    neighbour.stop(SOON).unwrap();
    no_devices();
}

/// A file system that is mounted where this process does not see it.
struct Elsewhere {
    shell: Child,
    lines: BufReader<ChildStdout>,
}

impl Elsewhere {
    fn mount(disk: &Path) -> Self {
        let point = std::env::temp_dir().join(format!("ublk-elsewhere-{}", std::process::id()));
        std::fs::create_dir_all(&point).unwrap();
        let script = r#"set -e; mount "$0" "$1"; echo mounted; read go; echo kept > "$1/file"; sync "$1/file"; umount "$1"; rmdir "$1"; echo free"#;
        let mut shell = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", script])
            .args([disk, &point])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(shell.stdout.take().unwrap());
        let mut this = Elsewhere { shell, lines };
        this.hear("mounted");
        this
    }

    fn hear(&mut self, word: &str) {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), word);
    }

    /// Writes to it, and unmounts.
    fn end(mut self) {
        self.shell.stdin.take().unwrap().write_all(b"\n").unwrap();
        self.hear("free");
        assert!(self.shell.wait().unwrap().success());
    }
}

#[test]
fn a_mount_that_nobody_sees_keeps_the_disk_from_a_stop_and_a_halt() {
    let memory = Arc::new(Mem::new(16 * MIB));
    let mut running = disk(&memory, 16 * MIB).start().unwrap();
    let path = running.path().to_owned();
    assert!(Command::new("mkfs.ext4").arg("-q").arg(&path).status().unwrap().success());
    let elsewhere = Elsewhere::mount(&path);
    let seen = Control::open().unwrap().holders(running.id());
    assert!(seen.iter().all(|h| matches!(h, Holder::Process { disk: false, .. })), "{seen:?}");
    let within = Duration::from_millis(300);
    let unseen = |e: &Error| {
        assert_eq!((e.kind(), e.holders()), (ErrorKind::Busy, &[Holder::Unseen][..]), "{e}");
    };
    let failed = running.stop(within).unwrap_err();
    unseen(&failed.error);
    running = failed.device;
    if offered().contains(Features::IO_DESC_SIZE) {
        let failed = running.halt(within).unwrap_err();
        unseen(&failed.error);
        running = failed.device;
    }
    elsewhere.end();
    disk::bounded("a stop", move || running.stop(SOON).unwrap());
    no_devices();
}

/// Keeps every request, and says what it was for.
fn keeper(offsets: &Sender<u64>) -> Builder {
    let offsets = Mutex::new(offsets.clone());
    Builder::with_handlers(MIB, Capabilities::WRITE, move |_queue| {
        let offsets = offsets.lock().unwrap().clone();
        let mut kept = Vec::new();
        move |request: Request, _: &mut QueueContext<'_>| {
            let _ = offsets.send(request.offset());
            kept.push(request);
        }
    })
    .queues(1)
    .queue_depth(8)
}

#[test]
fn a_disk_whose_first_read_is_never_answered_is_stopped_and_halted() {
    // Elsewhere it does not start.
    if lacks(Features::SAFE_STOP_DEV) {
        return;
    }
    let (tell, offsets) = channel();
    let within = Duration::from_millis(100);
    let held = || {
        let disk = keeper(&tell).start().unwrap();
        assert_eq!(offsets.recv_timeout(SOON), Ok(0), "somebody looks for partitions");
        disk
    };
    let disk = held();
    let handle = disk.handle();
    let stopped = disk::bounded("a stop", move || disk.stop(within).unwrap());
    assert_eq!((stopped.ending, handle.ending()), (Ending::Stopped, Some(Ending::Stopped)));
    assert!(stopped.leftovers.is_empty() && stopped.stats.total().revoked > 0, "{stopped:?}");
    if offered().contains(Features::IO_DESC_SIZE) {
        let _of_the_former_disk = offsets.try_iter().count();
        let disk = held();
        drop(disk::bounded("a halt", move || disk.halt(within).unwrap()));
    }
    let probes = || threads().iter().filter(|name| name.ends_with("-probe")).count();
    eventually("nobody looks at it any more", || probes() == 0);
    no_devices();
}

/// From `linux/fs.h`: looks for partitions anew, with the lock of the disk held.
const BLKRRPART: libc::Ioctl = 0x125f;

#[test]
fn a_disk_that_its_user_has_scanned_is_not_stopped_because_the_driver_cannot_look() {
    if lacks(Features::SAFE_STOP_DEV) {
        return;
    }
    let (began, begun) = channel();
    let (answer, answers) = channel::<()>();
    let both = Mutex::new((began, Some(answers)));
    let workers = Workers::new(1).unwrap();
    // What the neighbour's disk is asked for the worker does not see while this one's backend keeps it.
    let stuck = Builder::with_handlers(MIB, Capabilities::WRITE, move |_queue| {
        let mut both = both.lock().unwrap();
        let (began, answers) = (both.0.clone(), both.1.take().unwrap());
        move |request: Request, _: &mut QueueContext<'_>| {
            if request.offset() == MIB / 2 {
                began.send(()).unwrap();
                let _ = answers.recv();
            }
            request.complete(Ok::<(), Errno>(())).unwrap();
        }
    });
    let stuck = stuck.queues(1).workers(&workers).start().unwrap();
    let control = Control::open().unwrap();
    let neighbour = disk(&Arc::new(Mem::new(MIB)), MIB).queues(1).workers(&workers);
    let running = neighbour.add(&control).unwrap().start().unwrap();
    let user = Client::open(running.path());
    let path = stuck.path().to_owned();
    let reader = std::thread::spawn(move || Client::reader(&path).read_errno(MIB / 2, 4096));
    begun.recv_timeout(SOON).unwrap();
    let file = user.0.try_clone().unwrap();
    // SAFETY: the request takes no argument.
    let scan = std::thread::spawn(move || unsafe { libc::ioctl(file.as_raw_fd(), BLKRRPART) });
    let inflight = format!("/sys/block/ublkb{}/inflight", running.id());
    eventually("the look for partitions waits", || {
        std::fs::read_to_string(&inflight).unwrap().split_whitespace().any(|n| n != "0")
    });
    let token = CancelToken::new();
    let (wait, device) = (Wait::forever().cancelled_by(&token), running.handle());
    let stop = std::thread::spawn(move || device.stop_with(&wait));
    eventually("the driver is asked", || !control.outstanding().is_empty());
    token.cancel();
    let error = disk::bounded("a stop", move || stop.join().unwrap().unwrap_err());
    let us = std::process::id();
    let is_us = |h: &Holder| matches!(h, Holder::Process { pid, disk: true, .. } if *pid == us);
    assert!(error.kind() == ErrorKind::Busy && error.holders().iter().any(is_us), "{error}");
    drop(answer);
    assert_eq!((reader.join().unwrap(), scan.join().unwrap()), (0, 0));
    user.read(0, 4096).unwrap();
    drop(user);
    running.stop(SOON).unwrap();
    stuck.stop(SOON).unwrap();
    no_devices();
}
