//! Disks that outlive their servers, on a real kernel: killed under load, taken over, and never lost on the
//! way.

#[path = "recovering/clients.rs"]
mod clients;
mod disk;
mod raw_server;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fs, io};

use clients::Clients;
use disk::kernel::{lacks, offered};
use disk::{Client, SOON, Server, bounded, devices, eventually, no_devices};
use raw_server::{Queue, Raw, Style};
use ublk_core::control::{Control, DeviceState, Features, Wait};
use ublk_core::targets::{self, Action, Fault, Rule};
use ublk_core::{
    AsyncBackend, Backend, Builder, Capabilities, Device, Ending, Errno, ErrorKind, QueueContext,
    Request, RequestFlags, Running, Workers,
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;
const PRINT: u64 = 0xfeed_0000_beef;

const PLAIN: Features = Features::USER_RECOVERY;

/// The features of a mode.
fn mode(name: &str) -> Features {
    match name {
        "plain" => PLAIN,
        "reissue" => PLAIN | Features::USER_RECOVERY_REISSUE,
        "fail-io" => PLAIN | Features::USER_RECOVERY_FAIL_IO,
        other => panic!("no mode {other}"),
    }
}

/// Enough that a kill meets requests.
const LATE: Duration = Duration::from_micros(300);

/// A file that outlives the server, slowly.
struct Slow(File);

impl Slow {
    fn open(path: &Path) -> Self {
        Slow(File::options().read(true).write(true).open(path).unwrap())
    }
}

impl Backend for Slow {
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_exact_at(buf, offset).map(|()| buf.len())
    }
    fn write(&self, data: &[u8], offset: u64, _: RequestFlags) -> io::Result<usize> {
        std::thread::sleep(LATE);
        self.0.write_all_at(data, offset).map(|()| data.len())
    }
}

fn builder(path: &Path) -> Builder {
    Builder::new(SIZE, Slow::open(path)).queue_depth(16).fingerprint(PRINT).threads(4)
}

fn is_file(way: &str) -> bool {
    way.contains("zero-copy") || way.contains("auto-buf-reg")
}

/// What serves a [`way`]: where the clients' pages are registered, the ring's own reads and writes of them, as late.
fn server_of(name: &str, path: &Path) -> Builder {
    if !is_file(name) {
        return builder(path);
    }
    let fault = Fault::new(targets::File::open(path).unwrap());
    fault.faults().add(Rule::new(Action::delay(LATE))).unwrap();
    fault.builder().queue_depth(16).fingerprint(PRINT)
}

/// The file behind a test's disk, gone with the test.
struct Store(PathBuf);

impl Store {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ublk-{name}-{}", std::process::id()));
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        Store(path)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn two_cpus() -> bool {
    std::thread::available_parallelism().unwrap().get() >= 2
}

/// A mode of recovery and, behind a `+` each, a data path and `batch`.
fn way(builder: Builder, name: &str) -> Builder {
    let mut words = name.split('+');
    let mut builder = builder.require(mode(words.next().unwrap()));
    for word in words {
        builder = match word {
            "batch" => builder.require(Features::BATCH_IO),
            path => builder.data_path(path.parse().unwrap()),
        };
    }
    builder
}

/// Not a test of its own: the servers that the tests below start and kill.
#[test]
fn server_process() {
    let Some(role) = disk::role() else { return };
    let words: Vec<&str> = role.split(' ').collect();
    let control = Control::open().unwrap();
    let _kept = match words[..] {
        ["serve", name, path] => {
            let builder = server_of(name, Path::new(path)).queues(2);
            way(builder, name).add(&control).unwrap().start()
        }
        ["recover", name, id, path] => {
            let builder = server_of(name, Path::new(path)).start_timeout(SOON);
            disk::say("begins");
            builder.recover(id.parse().unwrap(), &control)
        }
        ["hold", id, name] => {
            let hold = |_| {
                let mut held = Vec::new();
                move |request: Request, _: &mut QueueContext<'_>| {
                    // Who looks for partitions keeps others from opening the disk.
                    if request.offset() < MIB {
                        let _ = request.complete(Ok::<(), Errno>(()));
                        return;
                    }
                    held.push(request);
                    disk::say("held");
                }
            };
            let builder = Builder::with_handlers(SIZE, Capabilities::WRITE, hold)
                .queue_depth(4)
                .fingerprint(PRINT);
            match id.parse() {
                Ok(id) => builder.recover(id, &control),
                Err(_) => builder.require(mode(name)).start(),
            }
        }
        // A recovery that never ends: one queue's worker does not come to its fetches.
        ["stuck", name, id, path, queue] => {
            let stuck: u16 = queue.parse().unwrap();
            let able = match is_file(name) {
                true => targets::File::open(path).unwrap().capabilities(),
                false => Capabilities::WRITE,
            };
            Builder::with_handlers(SIZE, able, move |queue| {
                if queue == stuck {
                    // The other queue's are given time.
                    std::thread::sleep(Duration::from_millis(300));
                    disk::say("stuck");
                    disk::idle();
                }
                |request: Request, _: &mut QueueContext<'_>| drop(request)
            })
            .fingerprint(PRINT)
            .recover(id.parse().unwrap(), &control)
        }
        ["half", id, queue] => half(id.parse().unwrap(), queue.parse().unwrap()),
        _ => panic!("no role {role}"),
    };
    let running = _kept.unwrap();
    disk::say(&format!("ready {}", running.id()));
    // Some are killed here; the others are told to let go.
    disk::go_ahead();
    running.hand_over(SOON).unwrap();
    disk::say("handed over");
    disk::idle();
}

/// A recovery that stops in the middle of a queue's fetches, which none of the library's does: its fetches of a queue
/// are one system call's. Those of the queues before it are complete. The server before it has to have fetched
/// everything, because this is START_USER_RECOVERY as it comes.
fn half(id: u32, queue: u16) -> ! {
    let raw = Raw::take_over(id);
    let addresses = !raw.info.features.contains(Features::USER_COPY);
    let style = Style { addresses, ..Style::default() };
    let mut queues: Vec<_> = (0..=queue).map(|number| Queue::new(&raw, number, style)).collect();
    for (number, queue_of) in (0..).zip(&mut queues) {
        let fetched = if number == queue { queue_of.depth / 2 } else { queue_of.depth };
        (0..fetched).for_each(|tag| queue_of.fetch(tag));
    }
    // One that is refused is answered at once.
    for queue in &mut queues {
        assert!(queue.ring.completion().next().is_none(), "the driver refuses a fetch");
    }
    disk::say("half");
    disk::idle()
}

fn child(role: &str) -> Server {
    Server::start("server_process", role)
}

fn serve(name: &str, store: &Store) -> (Server, u32) {
    let mut server = child(&format!("serve {name} {}", store.0.display()));
    let id = server.hear("ready").parse().unwrap();
    (server, id)
}

fn next_server(name: &str, id: u32, store: &Store) -> Server {
    child(&format!("recover {name} {id} {}", store.0.display()))
}

fn killed(mut server: Server) {
    server.kill();
    server.wait();
}

fn disk_of(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

fn waits_for_a_server(id: u32) {
    let control = Control::open().unwrap();
    eventually("the driver notices", || {
        matches!(
            control.get_dev_info(id).unwrap().state,
            DeviceState::Quiesced | DeviceState::FailIo
        )
    });
}

fn recover(id: u32, builder: Builder) -> ublk_core::Result<Running> {
    bounded("a recovery", move || {
        builder
            .start_timeout(disk::patience() - Duration::from_secs(10))
            .recover(id, &Control::open().unwrap())
    })
}

fn stop(disk: Running) {
    assert_eq!(disk.stop(SOON).unwrap().ending, Ending::Stopped);
    no_devices();
}

fn works(disk: &Device) {
    let client = Client::open(disk.path());
    client.write(SIZE - 4096, &[9; 4096]).unwrap();
    assert_eq!(client.read(SIZE - 4096, 4096).unwrap(), [9; 4096]);
}

/// Kills the server again and again under clients that check what they read. Returns the errors that they saw.
fn killed_under_load(name: &str, kills: u32) -> u64 {
    let store = Store::new(name);
    let (mut server, id) = serve(name, &store);
    let clients = Clients::start(&disk_of(id), 8, (SIZE - MIB) / 8);
    for _ in 0..kills {
        clients.advance(10);
        killed(server);
        server = next_server(name, id, &store);
        assert_eq!(server.hear("ready").parse::<u32>().unwrap(), id);
    }
    clients.advance(10);
    let errors = clients.stop();
    killed(server);
    let disk = recover(id, server_of(name, &store.0)).unwrap();
    assert_eq!(disk.state().unwrap(), DeviceState::Live);
    works(&disk);
    stop(disk);
    errors
}

#[test]
fn ten_kills_fail_only_what_the_server_had_and_lose_nothing() {
    let errors = killed_under_load("plain", 10);
    println!("{errors} requests failed");
    assert!((1..=80).contains(&errors), "{errors}");
}

#[test]
fn ten_kills_with_reissue_fail_nothing() {
    assert_eq!(killed_under_load("reissue", 10), 0);
}

/// From one live process to the next. The former one lives on, so that nothing is owed to its end.
fn handed_over_under_load(name: &str, times: u32) {
    let store = Store::new("handover");
    let (mut server, id) = serve(name, &store);
    let clients = Clients::start(&disk_of(id), 8, (SIZE - MIB) / 8);
    for _ in 0..times {
        clients.advance(10);
        server.child.stdin.take().unwrap().write_all(b"x").unwrap();
        let mut next = next_server(name, id, &store);
        server.hear("handed over");
        next.hear("ready");
        server = next;
    }
    clients.advance(10);
    assert_eq!(clients.stop(), 0, "{name}");
    killed(server);
    stop(recover(id, server_of(name, &store.0)).unwrap());
}

#[test]
fn handovers_under_load_fail_nothing() {
    if lacks(Features::QUIESCE) {
        return;
    }
    handed_over_under_load("reissue", 7);
    handed_over_under_load("plain+zero-copy", 3);
    if offered().contains(Features::BATCH_IO) {
        handed_over_under_load("reissue+copy+batch", 3);
        handed_over_under_load("reissue+auto-buf-reg+batch", 3);
    }
}

#[test]
fn kills_lose_nothing_on_any_data_path() {
    let ways = [
        ("reissue+user-copy", 2, Features::USER_COPY),
        ("plain+need-get-data", 2, Features::NEED_GET_DATA),
        ("plain+zero-copy", 3, Features::SUPPORT_ZERO_COPY),
        ("reissue+auto-buf-reg", 3, Features::AUTO_BUF_REG),
        ("fail-io+auto-buf-reg", 3, Features::AUTO_BUF_REG),
        ("reissue+copy+batch", 2, Features::BATCH_IO),
        ("plain+auto-buf-reg+batch", 3, Features::BATCH_IO),
        ("fail-io+user-copy+batch", 2, Features::BATCH_IO),
        ("reissue+zero-copy+batch", 3, Features::BATCH_IO),
    ];
    for (name, kills, needed) in ways.into_iter().filter(|(.., needed)| offered().contains(*needed))
    {
        let errors = killed_under_load(name, kills);
        println!("{name}: {errors} requests failed");
        assert!(!name.starts_with("reissue") || errors == 0, "{name} ({needed}): {errors}");
    }
}

const PATHS: [(&str, Features); 5] = [
    ("copy", Features::NONE),
    ("need-get-data", Features::NEED_GET_DATA),
    ("user-copy", Features::USER_COPY),
    ("zero-copy", Features::SUPPORT_ZERO_COPY),
    ("auto-buf-reg", Features::AUTO_BUF_REG),
];

/// Each mode of recovery with each way to move data and commands that this kernel has.
fn every_way() -> Vec<String> {
    let mut ways = Vec::new();
    for name in
        ["plain", "reissue", "fail-io"].into_iter().filter(|name| offered().contains(mode(name)))
    {
        for (path, needed) in PATHS.into_iter().filter(|(_, needed)| offered().contains(*needed)) {
            ways.push(format!("{name}+{path}"));
            // The driver clears NEED_GET_DATA on devices with BATCH_IO.
            if offered().contains(Features::BATCH_IO) && needed != Features::NEED_GET_DATA {
                ways.push(format!("{name}+{path}+batch"));
            }
        }
    }
    ways
}

#[test]
#[ignore = "a soak: every mode of recovery with every data path"]
fn ten_kills_lose_nothing_in_any_mode_on_any_data_path() {
    for name in every_way() {
        let errors = killed_under_load(&name, 10);
        println!("{name}: {errors} requests failed");
        assert!(!name.starts_with("reissue") || errors == 0, "{name}: {errors}");
    }
}

#[test]
#[ignore = "a soak: every data path"]
fn handovers_under_load_fail_nothing_on_any_data_path() {
    if lacks(Features::QUIESCE) {
        return;
    }
    for name in every_way() {
        // With FAIL_IO requests between two servers fail, and a device in batches is let go by REISSUE only.
        if !name.starts_with("fail-io") && (!name.ends_with("batch") || name.starts_with("reissue"))
        {
            handed_over_under_load(&name, 5);
        }
    }
}

#[test]
fn ten_kills_with_fail_io_lose_nothing() {
    if !offered().contains(mode("fail-io")) {
        let store = Store::new("refused");
        let e = builder(&store.0).require(mode("fail-io")).start().unwrap_err();
        return disk::kernel::refused(&e, Features::USER_RECOVERY_FAIL_IO);
    }
    println!("{} requests failed", killed_under_load("fail-io", 10));
}

#[test]
fn with_fail_io_nobody_waits_while_there_is_no_server() {
    if lacks(mode("fail-io")) {
        return;
    }
    let store = Store::new("nobody-waits");
    let (server, id) = serve("fail-io", &store);
    let client = Client::open(&disk_of(id));
    killed(server);
    waits_for_a_server(id);
    // Of what the server has at its end, EIO; of what comes later, this.
    assert_eq!(client.read_errno(0, 4096), libc::EREMOTEIO);
    assert_eq!(client.write_errno(0, &[1; 4096]), libc::EREMOTEIO);
    let disk = recover(id, builder(&store.0)).unwrap();
    client.write(0, &[1; 4096]).unwrap();
    drop(client);
    stop(disk);
}

/// Killed with a request on every tag, which drivers before 6.16 notice by the timeout of requests only.
fn killed_with_every_tag(name: &str) -> Vec<i32> {
    let store = Store::new(name);
    let mut server = child(&format!("hold - {name}"));

    let id: u32 = server.hear("ready").parse().unwrap();
    let clients: Vec<_> = (0..4)
        .map(|i| {
            let path = disk_of(id);
            // Apart from each other, so that no scheduler merges two into one request.
            std::thread::spawn(move || Client::reader(&path).read_errno(MIB + i * MIB / 2, 4096))
        })
        .collect();
    for _ in 0..4 {
        server.hear("held");
    }
    killed(server);
    let disk = recover(id, builder(&store.0)).unwrap();
    let errnos = bounded("the clients' end", move || {
        clients.into_iter().map(|c| c.join().unwrap()).collect()
    });
    stop(disk);
    errnos
}

#[test]
fn a_full_server_killed_is_recovered() {
    assert_eq!(killed_with_every_tag("reissue"), [0; 4]);
    assert_eq!(killed_with_every_tag("plain"), [libc::EIO; 4]);
}

/// Recoveries in which a queue's worker does not come to its fetches are killed, and `more` at any other moment.
fn recoveries_killed(name: &str, stuck: &[u16], more: u64) {
    let store = Store::new("twice");
    let (server, id) = serve(name, &store);
    let client = Client::open(&disk_of(id));
    client.write(0, &[3; 4096]).unwrap();
    killed(server);
    // A former server with no fetch, with those of the first queue, with those of the second.
    for queue in stuck {
        let mut stuck = child(&format!("stuck {name} {id} {} {queue}", store.0.display()));
        stuck.hear("stuck");
        killed(stuck);
    }
    for delay in 0..more {
        let mut server = next_server(name, id, &store);
        server.hear("begins");
        std::thread::sleep(Duration::from_millis(delay * 20));
        server.kill();
        server.wait();
    }
    let disk = recover(id, server_of(name, &store.0)).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [3; 4096], "{name}");
    drop(client);
    stop(disk);
}

#[test]
fn a_recovery_that_is_killed_can_be_recovered() {
    if !two_cpus() {
        println!("\nnot run: it needs two CPUs, for two queues");
        return;
    }
    recoveries_killed("reissue", &[0, 1, 0, 1], 6);
    // What a driver before 6.16 is to be told of the tags that were not fetched is another thing where it copies.
    recoveries_killed("reissue+user-copy", &[0, 1], 0);
    if offered().contains(Features::BATCH_IO) {
        recoveries_killed("reissue+auto-buf-reg+batch", &[0, 1], 2);
        recoveries_killed("fail-io+zero-copy", &[1], 0);
    }
}

/// Of which a server was killed in the middle of the fetches of this queue.
fn half_fetched(name: &str, queue: u16) {
    let store = Store::new("half");
    let (server, id) = serve(name, &store);
    killed(server);
    let mut half = child(&format!("half {id} {queue}"));
    half.hear("half");
    killed(half);
    // Before 6.16 the end of a complete queue ends the others as well; without one there is no end.
    if offered().contains(Features::PER_IO_DAEMON) || queue > 0 {
        let disk = recover(id, server_of(name, &store.0)).unwrap();
        works(&disk);
        return stop(disk);
    }
    let next = server_of(name, &store.0).start_timeout(Duration::from_secs(2));
    let e = bounded("a recovery", move || next.recover(id, &Control::open().unwrap()).unwrap_err());
    assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
    assert!(e.to_string().contains("has it open"), "{e}");
    assert_eq!(devices(), [id], "it stays");
    bounded("the deletion", move || {
        Control::open().unwrap().delete(id, &Wait::for_(SOON)).unwrap();
    });
    no_devices();
}

#[test]
fn a_recovery_that_is_killed_in_the_middle_of_its_fetches() {
    if !two_cpus() {
        println!("\nnot run: it needs two CPUs, for two queues");
        return;
    }
    half_fetched("reissue", 0);
    half_fetched("reissue", 1);
    half_fetched("plain+user-copy", 1);
}

#[test]
fn a_recovery_that_fails_leaves_the_device_to_the_next() {
    let store = Store::new("fails");
    let (server, id) = serve("plain", &store);
    killed(server);
    for planted in [0, u16::MAX] {
        let failing = Builder::with_handlers(SIZE, Capabilities::WRITE, move |queue| {
            assert!(queue != planted && planted != u16::MAX, "planted");
            |request: Request, _: &mut QueueContext<'_>| drop(request)
        });
        let e = recover(id, failing.fingerprint(PRINT)).unwrap_err();
        assert!(e.to_string().contains("panicked"), "{e}");
        waits_for_a_server(id);
    }
    let disk = recover(id, builder(&store.0)).unwrap();
    works(&disk);
    // What was recovered is deleted by a drop, like any other.
    drop(disk);
    no_devices();
}

#[test]
fn who_may_not_recover_a_device_is_told_why() {
    let store = Store::new("refusals");
    let (server, id) = serve("plain", &store);
    let refused = |builder: Builder, kind, words: &str| {
        let e = recover(id, builder).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(words), "{e}");
    };
    let ours = || builder(&store.0);
    refused(ours(), ErrorKind::Busy, &format!("process {}", server.child.id()));
    killed(server);
    refused(ours().fingerprint(5), ErrorKind::InvalidParameter, "fingerprint is 0xfeed0000beef");
    let small = Builder::new(MIB, Slow::open(&store.0)).fingerprint(PRINT);
    refused(small, ErrorKind::InvalidParameter, "4194304 bytes, not 1048576");
    refused(ours().logical_block_size(4096), ErrorKind::InvalidParameter, "512 bytes, not 4096");
    refused(ours().read_only(true), ErrorKind::InvalidParameter, "can be written");
    let reissue = Features::USER_RECOVERY_REISSUE;
    refused(ours().require(PLAIN | reissue), ErrorKind::Unsupported, "USER_RECOVERY_REISSUE");
    let pool = Workers::new(1).unwrap();
    refused(ours().workers(&pool), ErrorKind::Unsupported, "workers of its own");
    let cached = Builder::with_handlers(SIZE, Capabilities::WRITE | Capabilities::FLUSH, |_| {
        |request: Request, _: &mut QueueContext<'_>| drop(request)
    });
    refused(cached.fingerprint(PRINT), ErrorKind::InvalidParameter, "volatile cache");
    let disk = recover(id, ours().fingerprint(5).force(true)).unwrap();
    works(&disk);
    stop(disk);
    refused(ours(), ErrorKind::NoSuchDevice, "");
}

#[test]
fn a_device_without_recovery_or_without_a_disk_is_refused() {
    let store = Store::new("without");
    let disk = builder(&store.0).start().unwrap();
    let e = recover(disk.id(), builder(&store.0)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::WrongState);
    assert!(e.to_string().contains("without USER_RECOVERY"), "{e}");
    let failed = disk.hand_over(SOON).unwrap_err();
    assert_eq!(failed.error.kind(), ErrorKind::Unsupported, "{}", failed.error);
    works(&failed.device);
    stop(failed.device);
    let control = Control::open().unwrap();
    let added = builder(&store.0).require(PLAIN).add(&control).unwrap();
    let e = recover(added.id(), builder(&store.0)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::WrongState);
    assert!(e.to_string().contains("has no disk"), "{e}");
    drop(added);
    no_devices();
}

#[test]
fn a_disk_that_nobody_recovers_is_deleted() {
    let store = Store::new("unwanted");
    let (server, id) = serve("plain", &store);
    killed(server);
    waits_for_a_server(id);
    bounded("the deletion", move || {
        Control::open().unwrap().delete(id, &Wait::for_(SOON)).unwrap();
    });
    no_devices();
}

#[test]
fn a_disk_that_was_handed_over_waits_for_its_next_server() {
    static READ: AtomicBool = AtomicBool::new(false);
    let store = Store::new("waiting");
    let disk = builder(&store.0).require(PLAIN).start().unwrap();
    works(&disk);
    if lacks(Features::QUIESCE) {
        return stop(disk);
    }
    let handle = disk.handle();
    let id = handle.id();
    bounded("the handover", move || disk.hand_over(SOON).unwrap());
    assert_eq!(handle.ending(), Some(Ending::HandedOver));
    assert_eq!(handle.state().unwrap(), DeviceState::Quiesced);
    // A handle that is left over does not delete what is the next server's.
    handle.stop_force(SOON).unwrap();
    assert_eq!(devices(), [id]);
    let client = std::thread::spawn(move || {
        let data = Client::open(&disk_of(id)).read(SIZE - 4096, 4096);
        READ.store(true, Ordering::SeqCst);
        data
    });
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        assert!(!READ.load(Ordering::SeqCst), "there is nobody who could have answered");
        std::thread::sleep(Duration::from_millis(10));
    }
    let disk = recover(id, builder(&store.0)).unwrap();
    assert_eq!(client.join().unwrap().unwrap(), [9; 4096]);
    assert_eq!(disk.stats().total().rejected, 0);
    stop(disk);
}
