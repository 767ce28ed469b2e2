//! The life of a device on a real kernel: every way up, every way down, and nothing left behind.

mod disk;

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use disk::cycle::{nothing_is_left_by, ram, write_and_read};
use disk::kernel::lacks;
use disk::{Client, Ram, SOON, anonymous_bytes, bounded, devices, eventually, no_devices};
use ublk_core::control::{Control, Features, Holder, Wait};
use ublk_core::targets::Null;
use ublk_core::{
    Backend, Builder, Capabilities, Device, Ending, ErrorKind, QueueContext, Request, Workers,
};

const MIB: u64 = 1 << 20;

#[test]
fn a_disk_is_built_started_used_and_stopped_and_nothing_is_left() {
    nothing_is_left_by(|| {
        let disk = ram().queues(2).start().unwrap();
        assert_eq!(disk.path(), Path::new(&format!("/dev/ublkb{}", disk.id())));
        write_and_read(&disk);
        assert_eq!(disk.ending(), None);
        assert_eq!(disk.wait_timeout(Duration::from_millis(10)).unwrap(), None);
        let stats = disk.stats().total();
        assert!(stats.write.bytes >= 8192 && stats.read.bytes >= 8192, "{stats:?}");
        assert_eq!(stats.rejected, 0);
        let path = disk.path().to_owned();
        let stopped = disk.stop(SOON).unwrap();
        assert_eq!(stopped.ending, Ending::Stopped);
        assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
        assert!(!path.exists());
        assert!(devices().is_empty());
    });
}

#[test]
fn what_was_added_and_is_dropped_is_deleted() {
    let control = Control::open().unwrap();
    let added = ram().add(&control).unwrap();
    assert_eq!(devices(), [added.id()]);
    drop(added);
    assert!(devices().is_empty());
}

#[test]
fn what_was_added_can_be_started_later() {
    let control = Control::open().unwrap();
    let added = ram().add(&control).unwrap();
    let disk = added.start().unwrap();
    write_and_read(&disk);
    disk.stop(SOON).unwrap();
}

#[test]
fn a_path_is_usable_when_start_returns_twenty_times() {
    for _ in 0..20 {
        let disk = ram().start().unwrap();
        Client::open(disk.path()).read(0, 4096).unwrap();
        disk.stop_force(SOON).unwrap();
    }
}

#[test]
fn a_bad_description_makes_nothing() {
    nothing_is_left_by(|| {
        let e = ram().logical_block_size(1000).start().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
        let e = Builder::new(1000, Ram::new(1000)).start().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
        let e = ram().require(Features::USER_COPY).start().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
    });
}

#[test]
fn a_handler_that_cannot_be_made_makes_the_start_fail_and_leaves_nothing() {
    nothing_is_left_by(|| {
        let began = Instant::now();
        let e = Builder::with_handlers(MIB, Capabilities::WRITE, |queue| {
            assert!(queue == 0 && std::hint::black_box(false), "planted");
            |request: Request, _: &mut QueueContext<'_>| drop(request)
        })
        .queue_depth(8)
        .start()
        .unwrap_err();
        assert!(e.to_string().contains("panicked"), "{e}");
        // Nothing that has to be waited for was ever begun.
        assert!(began.elapsed() < SOON / 2);
    });
}

#[test]
fn one_handler_of_two_that_cannot_be_made_makes_the_start_fail_and_leaves_nothing() {
    nothing_is_left_by(|| {
        let e = Builder::with_handlers(MIB, Capabilities::WRITE, |queue| {
            assert_ne!(queue, 1, "planted");
            |request: Request, _: &mut QueueContext<'_>| drop(request)
        })
        .queues(2)
        .queue_depth(8)
        .start()
        .unwrap_err();
        assert!(e.to_string().contains("panicked"), "{e}");
    });
}

#[test]
fn a_failed_start_on_a_pool_leaves_its_other_devices_alone() {
    let workers = Workers::new(2).unwrap();
    let disk = ram().workers(&workers).start().unwrap();
    for _ in 0..2 {
        let e = Builder::with_handlers(MIB, Capabilities::WRITE, |queue| {
            assert!(queue == 0 && std::hint::black_box(false), "planted");
            |request: Request, _: &mut QueueContext<'_>| drop(request)
        })
        .workers(&workers)
        .start()
        .unwrap_err();
        assert!(e.to_string().contains("panicked"), "{e}");
        assert_eq!(disk.ending(), None);
        write_and_read(&disk);
    }
    // And the pool takes others still.
    let other = ram().workers(&workers).start().unwrap();
    write_and_read(&other);
    assert_eq!(devices().len(), 2);
    other.stop(SOON).unwrap();
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_taken_id_is_an_error_and_its_owner_goes_on() {
    let disk = ram().id(5).start().unwrap();
    let e = ram().id(5).start().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::IdTaken, "{e}");
    assert_eq!(devices(), [5]);
    write_and_read(&disk);
    disk.stop(SOON).unwrap();
}

#[test]
fn a_node_that_somebody_has_open_is_busy_and_the_device_is_deleted_once_it_is_closed() {
    let control = Control::open().unwrap();
    let added = ram().start_timeout(Duration::from_secs(1)).add(&control).unwrap();
    let node = format!("/dev/ublkc{}", added.id());
    let mut file = None;
    eventually("the node opens", || {
        file = fs::OpenOptions::new().read(true).write(true).open(&node).ok();
        file.is_some()
    });
    let closer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(3));
        drop(file);
    });
    let e = added.start().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
    closer.join().unwrap();
    no_devices();
}

#[test]
fn a_polite_stop_names_who_has_the_disk_open_and_the_disk_goes_on() {
    let disk = ram().start().unwrap();
    let client = Client::open(disk.path());
    client.write(0, &[7; 4096]).unwrap();
    let failed = disk.stop(Duration::from_millis(200)).unwrap_err();
    assert_eq!(failed.error.kind(), ErrorKind::Busy, "{}", failed.error);
    let us = std::process::id();
    let holds = |h: &Holder| matches!(h, Holder::Process { pid, disk: true, .. } if *pid == us);
    assert!(failed.error.holders().iter().any(holds), "{:?}", failed.error.holders());
    let disk = failed.device;
    assert_eq!(disk.ending(), None);
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    // A new opener is let in as well.
    assert_eq!(Client::open(disk.path()).read(0, 4096).unwrap(), [7; 4096]);
    drop(client);
    assert_eq!(disk.stop(SOON).unwrap().ending, Ending::Stopped);
    no_devices();
}

#[test]
fn a_polite_stop_without_any_time_never_pulls_the_disk_from_its_users() {
    for within in [Duration::ZERO, Duration::from_nanos(1), Duration::from_micros(300)] {
        let disk = ram().start().unwrap();
        let client = Client::open(disk.path());
        let failed = disk.stop(within).unwrap_err();
        assert_eq!(failed.error.kind(), ErrorKind::Busy, "{within:?}: {}", failed.error);
        client.read(0, 4096).unwrap();
        drop(client);
        failed.device.stop(SOON).unwrap();
    }
}

#[test]
fn a_stop_may_be_given_all_the_time_there_is() {
    let disk = ram().start_timeout(Duration::MAX).start().unwrap();
    assert!(bounded("a wait", {
        let handle = disk.handle();
        move || {
            let waiter = std::thread::spawn(move || handle.wait_timeout(Duration::MAX));
            std::thread::sleep(Duration::from_millis(50));
            !waiter.is_finished()
        }
    }));
    disk.stop(Duration::MAX).unwrap();
    let disk = ram().start().unwrap();
    disk.stop_force(Duration::MAX).unwrap();
    no_devices();
}

#[test]
fn a_polite_stop_names_another_process_and_waits_for_it() {
    let disk = ram().start().unwrap();
    let mut other = std::process::Command::new("sleep")
        .arg("1000")
        .stdin(fs::File::open(disk.path()).unwrap())
        .spawn()
        .unwrap();
    let failed = disk.stop(Duration::from_millis(200)).unwrap_err();
    let pid = other.id();
    let holds = |h: &Holder| matches!(h, Holder::Process { pid: p, .. } if *p == pid);
    assert!(failed.error.holders().iter().any(holds), "{:?}", failed.error);
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        other.kill().unwrap();
        other.wait().unwrap();
    });
    failed.device.stop(SOON).unwrap();
    killer.join().unwrap();
    no_devices();
}

#[test]
fn a_polite_stop_refuses_while_a_file_system_is_mounted() {
    let mkfs =
        ["/sbin/mkfs.ext2", "/usr/sbin/mkfs.ext2"].into_iter().find(|p| Path::new(p).exists());
    let mkfs = mkfs.expect("mkfs.ext2, of e2fsprogs");
    let disk = Builder::new(8 * MIB, Ram::new(8 << 20)).start().unwrap();
    let made = std::process::Command::new(mkfs).arg("-q").arg(disk.path()).status().unwrap();
    assert!(made.success());
    let point = std::env::temp_dir().join(format!("ublk-life-{}", std::process::id()));
    fs::create_dir_all(&point).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "ext4"])
        .arg(disk.path())
        .arg(&point)
        .status()
        .unwrap();
    assert!(mounted.success());
    fs::write(point.join("file"), b"contents").unwrap();
    let failed = disk.stop(Duration::from_millis(200)).unwrap_err();
    let holds = |h: &Holder| matches!(h, Holder::Mount(at) if *at == point);
    assert!(failed.error.holders().iter().any(holds), "{:?}", failed.error);
    assert_eq!(fs::read(point.join("file")).unwrap(), b"contents");
    assert!(std::process::Command::new("umount").arg(&point).status().unwrap().success());
    failed.device.stop(SOON).unwrap();
    fs::remove_dir(&point).unwrap();
    no_devices();
}

#[test]
fn a_stop_from_a_second_handle_after_the_first_is_quiet() {
    let disk = ram().start().unwrap();
    let other = disk.handle();
    assert_eq!(disk.stop(SOON).unwrap().ending, Ending::Stopped);
    assert_eq!(other.ending(), Some(Ending::Stopped));
    assert_eq!(other.wait().unwrap(), Ending::Stopped);
    for stopped in [other.stop(SOON), other.stop_force(SOON)] {
        let stopped = stopped.unwrap();
        assert_eq!(stopped.ending, Ending::Stopped);
        assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
    }
    no_devices();
}

#[test]
fn a_late_stop_does_not_touch_the_device_that_has_the_id_by_then() {
    let disk = ram().id(3).start().unwrap();
    let other = disk.handle();
    disk.stop(SOON).unwrap();
    let heir = ram().id(3).start().unwrap();
    other.stop(SOON).unwrap();
    other.stop_force(SOON).unwrap();
    assert_eq!(heir.ending(), None);
    write_and_read(&heir);
    heir.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn dropping_what_others_deleted_does_not_touch_the_device_that_has_the_id_by_then() {
    let control = Control::open().unwrap();
    let disk = ram().id(3).start().unwrap();
    control.stop_dev(3, &Wait::for_(SOON)).unwrap();
    assert_eq!(disk.wait().unwrap(), Ending::StoppedByOthers);
    control.del_dev(3, &Wait::for_(SOON)).unwrap();
    let heir = ram().id(3).start().unwrap();
    drop(disk);
    assert_eq!(heir.ending(), None);
    write_and_read(&heir);
    heir.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn two_stops_at_once_both_end_well() {
    for _ in 0..5 {
        let disk = ram().start().unwrap();
        let handles: Vec<_> = (0..4).map(|_| disk.handle()).collect();
        let stops: Vec<_> =
            handles.into_iter().map(|h| std::thread::spawn(move || h.stop(SOON))).collect();
        for stop in stops {
            assert_eq!(stop.join().unwrap().unwrap().ending, Ending::Stopped);
        }
        drop(disk);
        no_devices();
    }
}

#[test]
fn a_stop_from_inside_a_handler_is_refused() {
    for threads in [0, 2] {
        struct Stopper(OnceLock<Device>, Mutex<Vec<ErrorKind>>);
        impl Backend for Stopper {
            fn read(&self, buf: &mut [u8], _: u64) -> io::Result<usize> {
                if let Some(device) = self.0.get() {
                    let kinds = [
                        device.stop(SOON).unwrap_err().kind(),
                        device.stop_force(SOON).unwrap_err().kind(),
                        device.wait().unwrap_err().kind(),
                    ];
                    self.1.lock().unwrap().extend(kinds);
                }
                Ok(buf.len())
            }
        }
        let stopper = Arc::new(Stopper(OnceLock::new(), Mutex::default()));
        let disk = Builder::new(MIB, Arc::clone(&stopper)).threads(threads).start().unwrap();
        let _ = stopper.0.set(disk.handle());
        Client::reader(disk.path()).read(0, 4096).unwrap();
        let kinds = stopper.1.lock().unwrap().clone();
        assert!(kinds.len() >= 3, "{kinds:?}");
        assert!(kinds.iter().all(|k| *k == ErrorKind::WouldDeadlock), "{kinds:?}");
        disk.stop(SOON).unwrap();
    }
}

#[test]
fn a_forced_stop_pulls_the_disk_from_its_opener() {
    let disk = ram().start().unwrap();
    let client = Client::open(disk.path());
    client.read(0, 4096).unwrap();
    let began = Instant::now();
    let stopped = disk.stop_force(Duration::from_secs(5)).unwrap();
    assert!(began.elapsed() < SOON);
    assert_eq!(stopped.ending, Ending::Stopped);
    assert!(client.read(0, 4096).is_err());
    drop(client);
    no_devices();
}

#[test]
fn a_forced_stop_under_load_answers_every_client() {
    let disk = Builder::new(MIB, Ram::new(1 << 20)).queues(2).queue_depth(16).start().unwrap();
    let clients: Vec<_> = (0..8)
        .map(|i| {
            let client = Client::open(disk.path());
            std::thread::spawn(move || {
                let mut n = 0u64;
                while client.read(i * 4096, 4096).is_ok() {
                    n += 1;
                }
                n
            })
        })
        .collect();
    eventually("the clients are at work", || disk.stats().total().read.completed > 100);
    disk.stop_force(Duration::from_secs(10)).unwrap();
    let reads = clients.into_iter().map(|c| bounded("the client ends", move || c.join().unwrap()));
    assert!(reads.sum::<u64>() > 100);
    no_devices();
}

/// Gives up CAP_SYS_ADMIN, on this thread: who has it opens a disk also while it goes.
fn without_privilege() {
    const VERSION_3: u32 = 0x2008_0522;
    const SYS_ADMIN: u32 = 1 << 21;
    let (header, mut sets) = ([VERSION_3, 0], [0u32; 6]);
    // SAFETY: the structs of capget(2) and capset(2): two words, and twice three.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()), 0);
        sets[0] &= !SYS_ADMIN;
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()), 0);
    }
}

#[test]
fn a_disk_that_could_be_opened_is_not_stopped_in_that_moment() {
    if lacks(Features::SAFE_STOP_DEV) {
        return;
    }
    for round in 0..20 {
        let disk = ram().require(Features::NO_AUTO_PART_SCAN).start().unwrap();
        let (path, opened) = (disk.path().to_owned(), Arc::new(AtomicU32::new(0)));
        let count = Arc::clone(&opened);
        let opener = std::thread::spawn(move || {
            without_privilege();
            loop {
                match Client::try_open(&path) {
                    Ok(client) => {
                        // Whoever got it may use it.
                        client.read(0, 4096).unwrap_or_else(|e| panic!("round {round}: {e}"));
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(e) => return e.raw_os_error(),
                }
                // For the stop to find a gap.
                std::thread::sleep(Duration::from_micros(100));
            }
        });
        eventually("the opener is at work", || opened.load(Ordering::Relaxed) > 3);
        disk.stop(SOON).unwrap();
        let refused = bounded("the opener", move || opener.join()).unwrap();
        assert!(matches!(refused, Some(libc::ENXIO | libc::ENOENT | libc::ENODEV)), "{refused:?}");
    }
    no_devices();
}

#[test]
fn a_disk_that_is_mounted_where_nobody_can_see_it_is_busy() {
    if lacks(Features::SAFE_STOP_DEV) {
        return;
    }
    let disk = Builder::new(4 * MIB, Ram::new(4 << 20)).start().unwrap();
    let dir = std::env::temp_dir().join(format!("ublk-unseen-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    assert!(Command::new("mkfs.ext4").arg("-q").arg(disk.path()).status().unwrap().success());
    let script = "mount $1 $2 && echo mounted && read line";
    let mut elsewhere = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"])
        .args([disk.path(), &dir])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(elsewhere.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "mounted\n");
    let failed = bounded("the stop", move || disk.stop(Duration::from_millis(300)).unwrap_err());
    assert_eq!(failed.error.kind(), ErrorKind::Busy, "{}", failed.error);
    assert_eq!(failed.error.holders(), [Holder::Unseen]);
    drop(elsewhere.stdin.take());
    elsewhere.wait().unwrap();
    failed.device.stop(SOON).unwrap();
    fs::remove_dir(dir).unwrap();
    no_devices();
}

fn stopped_by_others(end: impl FnOnce(&Control, u32) + Send + 'static, threads: usize) {
    nothing_is_left_by(|| {
        let disk = ram().threads(threads).queues(2).start().unwrap();
        write_and_read(&disk);
        let id = disk.id();
        let ender = std::thread::spawn(move || end(&Control::open().unwrap(), id));
        let handle = disk.handle();
        assert_eq!(bounded("the wait", move || handle.wait().unwrap()), Ending::StoppedByOthers);
        bounded("the other's command", move || ender.join().unwrap());
        // Also while the handle is still there, nothing works for a disk that is not.
        eventually("the threads have ended", || {
            disk::threads().iter().all(|name| !name.starts_with("ublk") || name == "ublk-ctl")
        });
        let stopped = disk.stop(SOON).unwrap();
        assert_eq!(stopped.ending, Ending::StoppedByOthers);
        assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
    });
}

#[test]
fn a_device_that_somebody_else_stops_is_noticed_and_released() {
    stopped_by_others(|control, id| control.stop_dev(id, &Wait::for_(SOON)).unwrap(), 0);
}

#[test]
fn a_device_that_somebody_else_deletes_is_noticed_and_released() {
    stopped_by_others(|control, id| control.delete(id, &Wait::for_(SOON)).unwrap(), 0);
}

#[test]
fn a_device_with_a_pool_of_threads_that_somebody_else_deletes_is_released() {
    stopped_by_others(|control, id| control.delete(id, &Wait::for_(SOON)).unwrap(), 3);
}

#[test]
fn fifty_devices_one_after_the_other_leave_nothing() {
    nothing_is_left_by(|| {
        let cycle = || {
            let disk = ram().queues(2).threads(1).start().unwrap();
            Client::open(disk.path()).read(0, 4096).unwrap();
            disk.stop_force(SOON).unwrap();
        };
        (0..5).for_each(|_| cycle());
        let before = anonymous_bytes();
        (0..50).for_each(|_| cycle());
        let growth = anonymous_bytes().saturating_sub(before);
        // One cycle's buffers are 2 × 9 × 512 KiB.
        assert!(growth < 32 << 20, "{growth} bytes more are mapped");
    });
}

#[test]
fn two_devices_of_a_process_do_not_mix() {
    let disks: Vec<_> = (0..2).map(|_| ram().start().unwrap()).collect();
    let clients: Vec<_> = disks.iter().map(|d| Client::open(d.path())).collect();
    for (i, client) in clients.iter().enumerate() {
        client.write(0, &[i as u8 + 1; 4096]).unwrap();
    }
    for (i, client) in clients.iter().enumerate() {
        assert_eq!(client.read(0, 4096).unwrap(), [i as u8 + 1; 4096]);
    }
    drop(clients);
    let mut disks = disks.into_iter();
    disks.next().unwrap().stop(SOON).unwrap();
    write_and_read(&disks.next().unwrap());
    no_devices();
}

#[test]
fn dropping_a_running_disk_stops_and_deletes_it() {
    nothing_is_left_by(|| {
        let disk = ram().start().unwrap();
        let path = disk.path().to_owned();
        let client = Client::open(&path);
        drop(disk);
        assert!(client.read(0, 4096).is_err());
        drop(client);
        eventually("the node is gone", || !path.exists());
    });
}

#[test]
fn a_device_that_is_stopped_from_another_thread_while_it_starts_never_hangs() {
    // On drivers before it, such a STOP corrupts the kernel's memory (docs/gotchas.md).
    let features = Control::open().unwrap().features();
    if !features.is_some_and(|f| f.contains(Features::PER_IO_DAEMON)) {
        println!(
            "\nnot run: the driver lacks PER_IO_DAEMON, and a STOP in the middle of a FETCH may panic it"
        );
        return;
    }
    let began = Instant::now();
    ram().start().unwrap().stop(SOON).unwrap();
    // From the first moment to when it has ended, on this machine.
    let (rounds, whole) = (20, began.elapsed());
    // The outcome of each race differs; what must not happen is a hang, or a disk that nobody serves.
    for round in 0..rounds {
        let control = Control::open().unwrap();
        let added = ram().add(&control).unwrap();
        let id = added.id();
        let racer = std::thread::spawn(move || {
            std::thread::sleep(whole * round / rounds);
            let _ = control.stop_dev(id, &Wait::for_(SOON));
        });
        let started = bounded("the start", move || added.start());
        racer.join().unwrap();
        if let Ok(disk) = started {
            if !disk.path().exists() || Client::try_open(disk.path()).is_err() {
                let handle = disk.handle();
                assert_eq!(
                    bounded("the wait", move || handle.wait().unwrap()),
                    Ending::StoppedByOthers
                );
            }
            bounded("the drop", move || drop(disk));
        }
        no_devices();
    }
}

#[test]
fn a_null_disk_survives_a_hundred_openers() {
    let disk = Null.builder(MIB).start().unwrap();
    let (done, all) = mpsc::channel();
    for _ in 0..10 {
        let (done, path) = (done.clone(), disk.path().to_owned());
        std::thread::spawn(move || {
            for _ in 0..10 {
                Client::open(&path).read(0, 512).unwrap();
            }
            done.send(()).unwrap();
        });
    }
    for _ in 0..10 {
        all.recv_timeout(SOON).unwrap();
    }
    disk.stop(SOON).unwrap();
    no_devices();
}

/// A gate that a backend waits at.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn wait(&self) {
        let open = self.0.lock().unwrap();
        drop(self.1.wait_while(open, |open| !*open).unwrap());
    }
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

#[test]
fn a_handler_that_takes_for_ever_to_make_does_not_hang_the_start() {
    nothing_is_left_by(|| {
        let gate = Arc::new(Gate::default());
        let theirs = Arc::clone(&gate);
        let builder = Builder::with_handlers(MIB, Capabilities::WRITE, move |queue| {
            if queue == 0 {
                theirs.wait();
            }
            |request: Request, _: &mut QueueContext<'_>| drop(request)
        });
        let builder = builder.queues(2).queue_depth(8).start_timeout(Duration::from_secs(1));
        let e = bounded("the start", move || builder.start().unwrap_err());
        assert_eq!(e.kind(), ErrorKind::TimedOut, "{e}");
        no_devices();
        gate.open();
    });
}

#[test]
fn a_stop_waits_for_a_slow_answer_within_its_time() {
    struct Slow(Arc<Gate>, Arc<AtomicBool>);
    impl Backend for Slow {
        fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            // Where nobody looks for partitions.
            if offset == 65536 {
                self.1.store(true, Ordering::Relaxed);
                self.0.wait();
            }
            buf.fill(9);
            Ok(buf.len())
        }
    }
    let gate = Arc::new(Gate::default());
    let begun = Arc::new(AtomicBool::new(false));
    let disk = Builder::new(MIB, Slow(Arc::clone(&gate), Arc::clone(&begun))).start().unwrap();
    let client = Client::reader(disk.path());
    let reader = std::thread::spawn(move || client.read(65536, 8192));
    eventually("the read is there", || begun.load(Ordering::Relaxed));
    let stop = std::thread::spawn(move || disk.stop_force(SOON).unwrap());
    std::thread::sleep(Duration::from_millis(300));
    assert!(!stop.is_finished());
    gate.open();
    let stopped = bounded("the stop", move || stop.join().unwrap());
    assert!(stopped.leftovers.is_empty() && stopped.stats.total().revoked == 0, "{stopped:?}");
    assert_eq!(reader.join().unwrap().unwrap(), [9; 8192]);
    no_devices();
}
