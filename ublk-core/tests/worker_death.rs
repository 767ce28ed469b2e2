//! A worker whose ring breaks: the whole device goes, visibly, and nothing is left.
//!
//! The ring is broken without the library's help: its descriptor, found in `/proc/self/fd`, is replaced by
//! that of `/dev/null`, so that the next `io_uring_enter` fails.

mod disk;

use std::fs;
use std::os::fd::AsRawFd;
use std::time::Duration;

use disk::{Client, Ram, SOON, bounded, eventually, no_devices};
use ublk_core::control::Control;
use ublk_core::{Builder, Device, Ending, ErrorKind, Running, Workers};

const MIB: u64 = 1 << 20;

fn rings() -> Vec<i32> {
    let mut rings: Vec<i32> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .filter(|e| fs::read_link(e.path()).is_ok_and(|t| t.to_string_lossy().contains("io_uring")))
        .map(|e| e.file_name().to_str().unwrap().parse().unwrap())
        .collect();
    rings.sort_unstable();
    rings
}

/// Starts something, and says which rings are its workers': those that appeared and stay when the control
/// threads' have gone. Control's own are made before.
fn with_rings<T>(control: &Control, start: impl FnOnce() -> T) -> (T, Vec<i32>) {
    // A command, so that the idle control thread has its ring.
    control.list().unwrap();
    let before = rings();
    let value = start();
    let rings = rings().into_iter().filter(|r| !before.contains(r)).collect();
    (value, rings)
}

fn break_ring(fd: i32) {
    let null = fs::File::open("/dev/null").unwrap();
    // SAFETY: dup3 takes integers. The number keeps being a descriptor of this process, so that its owner
    // closes what it believes to be its ring.
    assert_eq!(unsafe { libc::dup3(null.as_raw_fd(), fd, libc::O_CLOEXEC) }, fd);
}

/// Wakes the workers of a disk, so that those with a broken ring notice.
fn poke(disk: &Device) {
    let path = disk.path().to_owned();
    for _ in 0..4 {
        let path = path.clone();
        // It may be stuck until the disk is gone.
        std::thread::spawn(move || {
            if let Ok(client) = Client::try_open(&path) {
                let _ = client.read(0, 4096);
            }
        });
    }
}

fn died(disk: &Device) {
    let handle = disk.clone();
    let error = bounded("the wait ends", move || handle.wait().unwrap_err());
    assert_eq!(error.kind(), ErrorKind::WorkerDied, "{error}");
    assert_eq!(disk.ending(), Some(Ending::Failed));
}

fn one(queues: u16) -> (Running, Vec<i32>, Control) {
    let control = Control::open().unwrap();
    let (disk, rings) = with_rings(&control, || {
        let builder = Builder::new(MIB, Ram::new(1 << 20)).queues(queues).queue_depth(8);
        builder.add(&control).unwrap().start().unwrap()
    });
    eventually("nobody reads the new disk", || disk.stats().total().in_flight == 0);
    (disk, rings, control)
}

#[test]
fn a_broken_ring_takes_the_device_down() {
    let (disk, rings, control) = one(1);
    Client::open(disk.path()).read(0, 4096).unwrap();
    assert!(!rings.is_empty());
    for ring in rings {
        break_ring(ring);
    }
    poke(&disk);
    died(&disk);
    no_devices();
    assert!(!disk.path().exists());
    assert!(control.list().unwrap().is_empty());
    let stopped = disk.stop(SOON).unwrap();
    assert_eq!(stopped.ending, Ending::Failed);
}

#[test]
fn one_broken_ring_of_two_takes_the_whole_device_down() {
    let (disk, rings, _control) = one(2);
    if disk.info().queues < 2 {
        println!("needs two CPUs, for two queues");
        return;
    }
    break_ring(*rings.last().unwrap());
    // Clients of the queue with the good ring as well: nobody is left waiting.
    let path = disk.path().to_owned();
    let clients: Vec<_> = (0..8u64)
        .map(|i| {
            let path = path.clone();
            std::thread::spawn(move || {
                let Ok(client) = Client::try_open(&path) else { return };
                while client.read(i * 4096, 4096).is_ok() {}
            })
        })
        .collect();
    died(&disk);
    for client in clients {
        bounded("a client ends", move || client.join().unwrap());
    }
    no_devices();
}

#[test]
fn a_worker_that_dies_during_a_polite_stop_takes_the_device_down_all_the_same() {
    let (disk, rings, _control) = one(1);
    let holder = Client::open(disk.path());
    let handle = disk.handle();
    let stop = std::thread::spawn(move || handle.stop(Duration::from_secs(4)));
    std::thread::sleep(Duration::from_millis(500));
    for ring in rings {
        break_ring(ring);
    }
    poke(&disk);
    let stopped = bounded("the stop ends", move || stop.join().unwrap());
    println!("{:?}", stopped.map(|s| (s.ending, s.leftovers)));
    died(&disk);
    drop(holder);
    no_devices();
}

#[test]
fn a_broken_ring_of_a_pool_takes_all_its_devices_down_and_nothing_hangs() {
    let control = Control::open().unwrap();
    let (workers, rings) = with_rings(&control, || Workers::new(1).unwrap());
    let disks: Vec<Running> = (0..3)
        .map(|_| {
            let builder = Builder::new(MIB, Ram::new(1 << 20)).queue_depth(8).workers(&workers);
            builder.add(&control).unwrap().start().unwrap()
        })
        .collect();
    assert_eq!(rings.len(), 1);
    break_ring(rings[0]);
    poke(&disks[0]);
    for disk in &disks {
        died(disk);
    }
    no_devices();
    let error = Builder::new(MIB, Ram::new(1 << 20)).workers(&workers).start().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WorkerDied, "{error}");
    no_devices();
}
