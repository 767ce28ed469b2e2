//! Disks that go from one server process to the next, on a real kernel, under fio and under a mounted file system.

mod disk;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use disk::kernel::{lacks, offered};
use disk::{SOON, Server, bounded, eventually, no_devices};
use ublk_core::control::{Control, Features, Wait};
use ublk_core::targets::File;
use ublk_core::{Builder, Ending};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const PLAIN: Features = Features::USER_RECOVERY;

/// Whether the driver lets go of servers that live on.
fn can_hand_over() -> bool {
    !lacks(Features::QUIESCE)
}

fn disk_of(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

fn file_builder(path: &str) -> Builder {
    File::options().open(path).unwrap().builder().queue_depth(16).queues(2)
}

/// How the disk is let go of and, behind a `+` each, a data path (by default the file's favourite) and `batch`.
fn way(builder: Builder, name: &str) -> Builder {
    let mut words = name.split('+');
    let builder = match words.next().unwrap() {
        "quiesce" => builder.require(PLAIN),
        "reissue" => {
            builder.require(PLAIN | Features::USER_RECOVERY_REISSUE).forbid(Features::QUIESCE)
        }
        other => panic!("no way {other}"),
    };
    words.fold(builder, |builder, word| match word {
        "batch" => builder.require(Features::BATCH_IO),
        path => builder.data_path(path.parse().unwrap()),
    })
}

/// Not a test of its own: the servers that the tests below start.
#[test]
fn server_process() {
    let Some(role) = disk::role() else { return };
    let control = Control::open().unwrap();
    let words: Vec<&str> = role.split(' ').collect();
    let running = match words[..] {
        ["serve", name, path] => way(file_builder(path), name).add(&control).unwrap().start(),
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
        let mut server = Server::start("server_process", &format!("serve {way} {}", store.path()));
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

/// Waits until it has had so many requests more.
fn gets_on(fio: &mut Fio, id: u32) {
    let before = completed(id);
    eventually("fio gets on", || {
        assert!(fio.is_running());
        completed(id) > before + 50
    });
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
    assert_eq!(info.features.contains(Features::QUIESCE), way.starts_with("quiesce"));
    let mut fio = Fio::start(&disk_of(disk.id), 16);
    for _ in 0..10 {
        gets_on(&mut fio, disk.id);
        disk.hand_over();
    }
    gets_on(&mut fio, disk.id);
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

fn stays_mounted(way: &str) {
    let mut disk = Wandering::start(way);
    let path = disk_of(disk.id);
    let path = path.to_str().unwrap();
    run("/sbin/mkfs.ext4", &["-q", path]);
    let point = std::env::temp_dir().join(format!("ublk-handover-{}", std::process::id()));
    fs::create_dir_all(&point).unwrap();
    // Of an error the file system would remember nothing but that it is read-only.
    run("mount", &["-t", "ext4", "-o", "errors=remount-ro", path, point.to_str().unwrap()]);
    let (ended, files) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let writer = {
        let (ended, files, point) = (Arc::clone(&ended), Arc::clone(&files), point.clone());
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let count = files.load(Ordering::Relaxed);
                let mut file = fs::File::create(point.join(format!("f{}", count % 32))).unwrap();
                file.write_all(&count.to_le_bytes().repeat(4096)).unwrap();
                file.sync_all().unwrap();
                files.store(count + 1, Ordering::Relaxed);
            }
        })
    };
    let gets_on = || {
        let before = files.load(Ordering::Relaxed);
        eventually("the file system is written to", || {
            assert!(!writer.is_finished(), "the writer has ended");
            files.load(Ordering::Relaxed) > before + 2
        });
    };
    for _ in 0..2 {
        gets_on();
        disk.hand_over();
    }
    gets_on();
    ended.store(true, Ordering::Relaxed);
    bounded("the writer's end", move || writer.join().unwrap());
    let count = files.load(Ordering::Relaxed);
    for n in count.saturating_sub(32)..count {
        let data = fs::read(point.join(format!("f{}", n % 32))).unwrap();
        assert!(data == n.to_le_bytes().repeat(4096), "file {n}");
    }
    run("umount", &[point.to_str().unwrap()]);
    run("/sbin/e2fsck", &["-f", "-n", path]);
    fs::remove_dir(&point).unwrap();
    disk.end();
}

#[test]
fn a_file_system_stays_mounted_across_handovers() {
    if !can_hand_over() {
        return;
    }
    stays_mounted("quiesce");
    // Which cannot be quiesced with requests about.
    if offered().contains(Features::BATCH_IO) {
        stays_mounted("reissue+auto-buf-reg+batch");
    }
}

/// fio goes on across servers that are killed, where their requests are sent to the next.
fn killed_under_fio(way: &str, kills: u32) {
    let mut disk = Wandering::start(way);
    // Less than the tags of a queue: of a full one drivers before 6.16 notice the server's end after 30 seconds.
    let mut fio = Fio::start(&disk_of(disk.id), 4);
    for _ in 0..kills {
        gets_on(&mut fio, disk.id);
        disk.server.kill();
        disk.server.wait();
        let role = format!("recover {} {}", disk.id, disk.store.path());
        disk.server = Server::start("server_process", &role);
        disk.server.hear("ready");
    }
    gets_on(&mut fio, disk.id);
    fio.stop();
    disk.end();
}

#[test]
fn ten_kills_with_reissue_fail_nothing_under_fio() {
    let ways = [
        ("reissue+zero-copy", Features::SUPPORT_ZERO_COPY),
        ("reissue+auto-buf-reg+batch", Features::BATCH_IO),
    ];
    let mut kills = 10;
    for (way, _) in ways.into_iter().filter(|(_, needed)| offered().contains(*needed)) {
        killed_under_fio(way, 3);
        kills -= 3;
    }
    // By the file's favourite.
    killed_under_fio("reissue", kills);
}
