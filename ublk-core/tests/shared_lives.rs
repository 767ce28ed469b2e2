//! Memory that clients share with the server of their disk, when that server goes: killed, by a handover, by a halt.

mod disk;
mod sharing;

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use disk::kernel::lacks;
use disk::{Client, SOON, Server, bounded, eventually, no_devices};
use sharing::{Counted, MIB, Mapping, Store, counting, exercise, pattern};
use ublk_core::control::{Control, ControlCommand, ControlOptions, DeviceState, Features, Wait};
use ublk_core::targets::Null;
use ublk_core::uapi::ublk_shmem_buf_reg;
use ublk_core::{
    Builder, Capabilities, DataPath, Device, Errno, ErrorKind, QueueContext, Request, SharedBuffer,
};

#[test]
fn a_disk_that_was_halted_shares_anew() {
    if lacks(Features::SHMEM_ZC | Features::IO_DESC_SIZE) {
        return;
    }
    for path in [DataPath::Copy, DataPath::ZeroCopy] {
        let shared = Arc::new(AtomicU64::new(0));
        let mut disk = counting(path, Features::NONE, &shared).start().unwrap();
        let buffers = [(); 3].map(|()| SharedBuffer::new(MIB).unwrap());
        for buffer in &buffers {
            disk.share(buffer).unwrap();
        }
        exercise(&disk, &buffers[1]);
        let seen = shared.load(Ordering::SeqCst);
        disk = bounded("a halt", move || disk.halt(SOON).unwrap().start().unwrap());
        // Nobody has told the new server of it.
        exercise(&disk, &buffers[1]);
        assert_eq!(shared.load(Ordering::SeqCst), seen, "{path}");
        assert_eq!(disk.share(&buffers[1]).unwrap(), 0, "{path}");
        exercise(&disk, &buffers[1]);
        assert!(shared.load(Ordering::SeqCst) >= seen + 12, "{path}");
        disk.stop(SOON).unwrap();
    }
    no_devices();
}

/// A server's disk: a mode of recovery and, behind a `+` each, a data path, `batch` and `slow`.
fn recoverable(way: &str, store: &str, shared: &Arc<AtomicU64>) -> Builder {
    let time = Duration::from_millis(if way.contains("slow") { 20 } else { 0 });
    let builder = Counted::builder(store, shared, time);
    let mut builder = builder.queue_depth(16).start_timeout(SOON);
    for word in way.split('+') {
        builder = match word {
            "quiesce" => builder.require(Features::USER_RECOVERY),
            "reissue" => builder.require(Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE),
            "fail-io" => builder.require(Features::USER_RECOVERY | Features::USER_RECOVERY_FAIL_IO),
            "slow" => builder,
            "batch" => builder.require(Features::BATCH_IO),
            path => builder.data_path(path.parse().unwrap()),
        };
    }
    builder.require(Features::SHMEM_ZC)
}

/// Not a test of its own: the servers that the tests below start, kill, and have hand over.
#[test]
fn server_process() {
    let Some(role) = disk::role() else { return };
    let control = Control::open().unwrap();
    let shared = Arc::new(AtomicU64::new(0));
    let words: Vec<&str> = role.split(' ').collect();
    let (disk, file) = match words[..] {
        ["serve", way, store, file] => {
            (recoverable(way, store, &shared).add(&control).unwrap().start(), file)
        }
        ["recover", id, way, store, file] => {
            (recoverable(way, store, &shared).recover(id.parse().unwrap(), &control), file)
        }
        _ => panic!("no role {role}"),
    };
    let disk = disk.unwrap();
    disk::say(&format!("ready {}", disk.id()));
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let buffer = SharedBuffer::from_memfd(file.into(), false).unwrap();
    let mut others = Vec::new();
    loop {
        match disk::order() {
            'r' => {
                let seen = shared.load(Ordering::SeqCst);
                eventually("requests come", || shared.load(Ordering::SeqCst) > seen + 20);
                disk::say("requests in it");
            }
            's' => match disk.share(&buffer) {
                Ok(number) => disk::say(&format!("shared {number}")),
                Err(e) => disk::say(&format!("shared {e}")),
            },
            'u' => {
                disk.unshare(0).unwrap();
                disk::say("unshared");
            }
            't' => others = begin_to_tidy_up(&disk),
            'n' => disk::say(&format!("seen {}", shared.load(Ordering::SeqCst))),
            'h' => {
                disk.hand_over(SOON).unwrap();
                others.into_iter().for_each(|other| other.join().unwrap());
                disk::say("handed over");
                disk::idle();
            }
            other => panic!("no order {other}"),
        }
    }
}

/// Has many begin to ask the driver for the end of what nobody shares, for which it has the disk stand still all the same.
fn begin_to_tidy_up(disk: &Device) -> Vec<JoinHandle<()>> {
    const MANY: usize = 8;
    let begun = Arc::new(Barrier::new(MANY + 1));
    let tidy_up = || {
        let (disk, begun) = (disk.clone(), Arc::clone(&begun));
        std::thread::spawn(move || {
            begun.wait();
            let e = disk.unshare(7).unwrap_err();
            let in_time = e.errno() == Some(Errno::ENOENT);
            assert!(in_time || e.kind() == ErrorKind::WrongState, "{e}");
        })
    };
    let threads = std::iter::repeat_with(tidy_up).take(MANY).collect();
    begun.wait();
    // Requests take longer, for which they wait.
    std::thread::sleep(Duration::from_millis(5));
    threads
}

/// A client that does direct I/O in its mapping of a buffer, until it is dropped.
struct Busy {
    ended: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    fn start(path: &Path, buffer: &SharedBuffer) -> Self {
        Self::one_of_many(0, path, buffer)
    }

    /// Up to a dozen do not get into each other's way.
    fn one_of_many(number: usize, path: &Path, buffer: &SharedBuffer) -> Self {
        let (client, mapping) = (Client::open(path), Mapping::of(buffer));
        let (ended, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (end, count) = (Arc::clone(&ended), Arc::clone(&done));
        let thread = std::thread::spawn(move || {
            for round in 0.. {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                let at = number * 65536 + round % 7 * 8192;
                let offset = number as u64 * 262_144 + round as u64 % 11 * 16384;
                let data = pattern(8192, round as u8);
                mapping.put(at, &data);
                mapping.write(&client, at, 8192, offset);
                mapping.put(at, &[0xff; 8192]);
                mapping.read(&client, at, 8192, offset);
                assert!(mapping.get(at, 8192) == data, "round {round}");
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Busy { ended, done, thread: Some(thread) }
    }

    fn gets_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        let ended = || self.thread.as_ref().is_some_and(JoinHandle::is_finished);
        eventually("the client gets on", || {
            self.done.load(Ordering::Relaxed) > before + 3 || ended()
        });
        assert!(!ended(), "the client has failed");
    }

    fn end(mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let thread = self.thread.take().unwrap();
        bounded("the client's end", move || thread.join()).unwrap();
    }
}

/// A disk with a buffer that outlives its servers.
struct Succession {
    way: &'static str,
    store: Store,
    buffer: SharedBuffer,
    server: Server,
    id: u32,
}

impl Succession {
    fn start(way: &'static str) -> Self {
        let (store, buffer) = (Store::new("shared"), SharedBuffer::new(MIB).unwrap());
        let role = format!("serve {way} {} {}", store.0, file_of(&buffer));
        let mut server = Server::start("server_process", &role);
        let id = server.hear("ready").parse().unwrap();
        Succession { way, store, buffer, server, id }
    }

    fn ask(&mut self, order: u8, word: &str) -> String {
        self.server.order(order);
        self.server.hear(word)
    }

    fn next(&mut self) -> Server {
        let role =
            format!("recover {} {} {} {}", self.id, self.way, self.store.0, file_of(&self.buffer));
        let mut next = Server::start("server_process", &role);
        assert_eq!(next.hear("ready").parse::<u32>().unwrap(), self.id);
        std::mem::replace(&mut self.server, next)
    }

    fn path(&self) -> std::path::PathBuf {
        format!("/dev/ublkb{}", self.id).into()
    }
}

/// Also after a failure: who waits for a disk without a server waits for ever.
impl Drop for Succession {
    fn drop(&mut self) {
        self.server.kill();
        self.server.wait();
        let _ = Control::open().unwrap().delete(self.id, &Wait::for_(SOON));
    }
}

fn file_of(buffer: &SharedBuffer) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), buffer.as_file().as_raw_fd())
}

/// Without a server the driver would wait for its next one, and that one for the driver.
fn refuses_without_a_server(id: u32, state: DeviceState, buffer: &SharedBuffer) {
    let control = Control::open().unwrap();
    eventually("its end is noticed", || control.get_dev_info(id).unwrap().state == state);
    let mapping = Mapping::of(buffer);
    let addr = mapping.start.as_ptr() as u64;
    let memory = ublk_shmem_buf_reg { addr, len: MIB, ..Default::default() };
    // SAFETY: mapped, and nobody has a slice of it.
    let registered = unsafe { control.reg_buf(id, &memory) };
    for e in [control.unreg_buf(id, 0).unwrap_err(), registered.unwrap_err()] {
        assert_eq!(e.kind(), ErrorKind::WrongState, "{e}");
        assert!(e.to_string().contains("recover the device first"), "{e}");
    }
    assert!(control.outstanding().is_empty());
}

#[test]
fn clients_in_shared_memory_notice_nothing_of_a_killed_server() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    for (way, kills) in [
        ("reissue+user-copy", 2),
        ("reissue+zero-copy+batch", 1),
        ("reissue+auto-buf-reg+batch", 1),
        // Which is automatic buffer registration, for a file.
        ("reissue+auto", 1),
    ] {
        let mut disk = Succession::start(way);
        assert_eq!(disk.ask(b's', "shared"), "0");
        let client = Busy::start(&disk.path(), &disk.buffer);
        for _ in 0..kills {
            disk.ask(b'r', "requests in it");
            disk.server.kill();
            disk.server.wait();
            refuses_without_a_server(disk.id, DeviceState::Quiesced, &disk.buffer);
            disk.next();
            client.gets_on();
            // The driver knows the memory still; its server does not.
            assert_eq!(disk.ask(b'n', "seen"), "0", "{way}");
            let refused = disk.ask(b's', "shared");
            assert!(refused.contains("shared already") && refused.contains("unshare"), "{refused}");
            disk.ask(b'u', "unshared");
            assert_eq!(disk.ask(b's', "shared"), "0", "{way}");
        }
        disk.ask(b'r', "requests in it");
        client.gets_on();
        client.end();
        drop(disk);
        no_devices();
    }
}

#[test]
fn clients_in_shared_memory_notice_nothing_of_a_handover() {
    if lacks(Features::SHMEM_ZC | Features::QUIESCE) {
        return;
    }
    for way in ["quiesce+user-copy", "quiesce+auto-buf-reg", "reissue+zero-copy+batch"] {
        let mut disk = Succession::start(way);
        assert_eq!(disk.ask(b's', "shared"), "0");
        let client = Busy::start(&disk.path(), &disk.buffer);
        disk.ask(b'r', "requests in it");
        disk.ask(b'h', "handed over");
        // The former server lives on, so that nothing is owed to its end.
        let former = disk.next();
        client.gets_on();
        assert_eq!(disk.ask(b's', "shared"), "0", "{way}: the driver has forgotten it");
        disk.ask(b'r', "requests in it");
        drop(former);
        client.end();
        drop(disk);
        no_devices();
    }
}

#[test]
fn who_tidies_up_meanwhile_does_not_keep_a_disk_from_its_next_server() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let mut disk = Succession::start("reissue+zero-copy+batch+slow");
    assert_eq!(disk.ask(b's', "shared"), "0");
    let clients = [0, 1, 2].map(|number| Busy::one_of_many(number, &disk.path(), &disk.buffer));
    clients.iter().for_each(Busy::gets_on);
    disk.server.order(b't');
    disk.ask(b'h', "handed over");
    let former = disk.next();
    clients.iter().for_each(Busy::gets_on);
    drop(former);
    clients.into_iter().for_each(Busy::end);
    assert_eq!(disk.ask(b's', "shared"), "0", "the driver has forgotten it");
    drop(disk);
    no_devices();
}

#[test]
fn a_disk_whose_io_fails_without_a_server_has_nobody_to_share_with_either() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let mut disk = Succession::start("fail-io+user-copy");
    disk.server.kill();
    disk.server.wait();
    refuses_without_a_server(disk.id, DeviceState::FailIo, &disk.buffer);
    drop(disk);
    no_devices();
}

#[test]
fn a_disk_is_not_handed_over_while_the_driver_waits_for_its_requests() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let held = Arc::new(Mutex::new(Vec::<Request>::new()));
    let theirs = Arc::clone(&held);
    let handler = move |request: Request, _: &mut QueueContext<'_>| match request.offset() {
        MIB.. => theirs.lock().unwrap().push(request),
        _ => request.complete(Ok::<(), Errno>(())).unwrap(),
    };
    let control = ControlOptions::new().patience(Duration::from_millis(500)).open().unwrap();
    let mut disk = Builder::with_handlers(4 * MIB, Capabilities::NONE, move |_| handler.clone())
        .require(Features::SHMEM_ZC | Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE)
        .forbid(Features::QUIESCE)
        .prefer(Features::NO_AUTO_PART_SCAN)
        .add(&control)
        .unwrap()
        .start()
        .unwrap();
    let (id, path) = (disk.id(), disk.path().to_owned());
    let read = || {
        let (path, before) = (path.clone(), held.lock().unwrap().len());
        let client = std::thread::spawn(move || Client::reader(&path).read_errno(MIB, 4096));
        eventually("it is held", || held.lock().unwrap().len() > before);
        client
    };
    let answer = |client: JoinHandle<i32>| {
        held.lock().unwrap().remove(0).complete(Ok::<(), Errno>(())).unwrap();
        assert_eq!(bounded("the client", move || client.join().unwrap()), 0);
    };
    let is_asked = || control.outstanding().iter().any(|o| o.command == ControlCommand::RegBuf);
    let buffer = SharedBuffer::new(MIB).unwrap();
    // Whoever shares waits for what is out when he comes, and the driver for what has come since.
    let late = std::thread::scope(|scope| {
        loop {
            let first = read();
            let (comes, has_come) = mpsc::channel();
            let (device, buffer) = (disk.handle(), &buffer);
            let sharing = scope.spawn(move || {
                comes.send(()).unwrap();
                device.share(buffer).unwrap_err()
            });
            has_come.recv().unwrap();
            let second = read();
            answer(first);
            eventually("the driver is asked, or not", || is_asked() || sharing.is_finished());
            if is_asked() {
                assert_eq!(sharing.join().unwrap().kind(), ErrorKind::TimedOut);
                return second;
            }
            // It came too early, and was waited for.
            answer(second);
            assert!(sharing.join().unwrap().to_string().contains("was not asked"));
        }
    });
    let e = disk.unshare(0).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TimedOut, "{e}");
    assert!(e.to_string().contains("the driver was not asked"), "{e}");
    let failed = disk.hand_over(Duration::ZERO).unwrap_err();
    assert_eq!(failed.error.kind(), ErrorKind::TimedOut, "{}", failed.error);
    assert!(failed.error.to_string().contains("this server goes on"), "{}", failed.error);
    disk = failed.device;
    answer(late);
    eventually("it is undone", || control.outstanding().is_empty());
    assert_eq!(disk.share(&buffer).unwrap(), 0);
    disk.hand_over(SOON).unwrap();
    refuses_without_a_server(id, DeviceState::Quiesced, &buffer);
    control.delete(id, &Wait::for_(SOON)).unwrap();
    no_devices();
}

#[test]
fn a_disk_that_shares_and_is_recovered_has_a_way_to_its_data() {
    let both = Features::SHMEM_ZC | Features::USER_RECOVERY;
    let null = || Null::new().builder(MIB);
    let e = null().require(both).data_path(DataPath::Copy).check().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidParameter);
    for words in ["SHMEM_ZC and USER_RECOVERY", "exclude the data path copy", "use user-copy"] {
        assert!(e.to_string().contains(words), "{e}");
    }
    let e = null().require(both).forbid(Features::USER_COPY).check().unwrap_err();
    assert!(e.to_string().contains("exclude the data path copy"), "{e}");
    if lacks(both) {
        return;
    }
    let disk = null().require(both).start().unwrap();
    assert_eq!(disk.data_path(), DataPath::UserCopy);
    disk.stop(SOON).unwrap();
    // What is only preferred gives way.
    let disk = null().require(Features::USER_RECOVERY).prefer(Features::SHMEM_ZC);
    let disk = disk.data_path(DataPath::Copy).start().unwrap();
    assert!(!disk.features().contains(Features::SHMEM_ZC));
    disk.stop(SOON).unwrap();
    no_devices();
}
