//! Many devices on few workers: what they share, what they leave, and where a worker's tables end.

mod disk;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use disk::cycle::{nothing_is_left_by, ram, write_and_read};
use disk::kernel::lacks;
use disk::{Client, Held, Ram, SOON, devices, eventually, no_devices};
use ublk_core::control::{Control, Features};
use ublk_core::targets::Null;
use ublk_core::{Builder, Capabilities, Error, ErrorKind, QueueContext, Request, Running, Workers};

const MIB: u64 = 1 << 20;

#[test]
fn a_pool_of_two_workers_serves_eight_devices_while_some_come_and_go() {
    nothing_is_left_by(|| {
        let workers = Workers::new(2).unwrap();
        let start = || ram().workers(&workers).start().unwrap();
        let disks: Vec<Running> = (0..8).map(|_| start()).collect();
        let over = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let clients: Vec<_> = disks
            .iter()
            .take(4)
            .enumerate()
            .map(|(i, disk)| {
                let client = Client::open(disk.path());
                let (over, done) = (Arc::clone(&over), Arc::clone(&done));
                std::thread::spawn(move || {
                    let mut round = 0u8;
                    while !over.load(Ordering::Relaxed) {
                        round = round.wrapping_add(1);
                        let data = [round ^ i as u8; 4096];
                        client.write(8192, &data).unwrap();
                        assert_eq!(client.read(8192, 4096).unwrap(), data);
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let mut disks = disks;
        for _ in 0..10 {
            // The last four take turns in going; new ones come.
            disks.remove(4).stop(SOON).unwrap();
            let fresh = start();
            write_and_read(&fresh);
            disks.push(fresh);
            let so_far = done.load(Ordering::Relaxed);
            eventually("the others go on", || done.load(Ordering::Relaxed) > so_far);
        }
        over.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|c| c.join().unwrap());
        assert!(disks.iter().all(|d| d.ending().is_none()));
        for disk in disks {
            disk.stop(SOON).unwrap();
        }
    });
}

fn open_files(name: &str) -> usize {
    Held::now().files.iter().filter(|file| file.starts_with(name)).count()
}

#[test]
fn devices_of_a_pool_share_one_handle_of_the_driver() {
    let workers = Workers::new(1).unwrap();
    let start = || ram().workers(&workers).start().unwrap();
    let mut disks: Vec<Running> = (0..8).map(|_| start()).collect();
    // So that the first thousand devices fit the usual limit of open files.
    assert_eq!((open_files("/dev/ublkc"), open_files("/dev/ublk-control")), (8, 1));
    disks.remove(0).stop(SOON).unwrap();
    disks.push(start());
    assert_eq!((open_files("/dev/ublkc"), open_files("/dev/ublk-control")), (8, 1));
    for disk in disks {
        disk.stop(SOON).unwrap();
    }
    // A pool without devices does not keep the driver from being unloaded.
    eventually("the driver is let go", || open_files("/dev/ublk-control") == 0);
    start().stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_queue_that_is_too_deep_for_a_shared_worker_is_refused_and_the_others_go_on() {
    let workers = Workers::new(1).unwrap();
    let deep = || {
        Builder::new(MIB, Ram::new(1 << 20)).queue_depth(4096).max_io_bytes(4096).workers(&workers)
    };
    let mut disks = Vec::new();
    let refused = loop {
        match deep().start() {
            Ok(disk) => disks.push(disk),
            Err(e) => break e,
        }
        assert!(disks.len() <= 8, "32,768 tags are the most that a worker takes");
    };
    assert_eq!(refused.kind(), ErrorKind::TooMany, "{refused}");
    assert_eq!(devices().len(), disks.len());
    for disk in &disks {
        assert_eq!(disk.ending(), None);
        write_and_read(disk);
    }
    disks.pop().unwrap().stop(SOON).unwrap();
    // Room again.
    let disk = deep().start().unwrap();
    write_and_read(&disk);
    disks.push(disk);
    for disk in disks {
        disk.stop(SOON).unwrap();
    }
    no_devices();
}

/// The soft limit of open files. Returns what it was.
fn limit_open_files(most: u64) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointers are to an rlimit.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        let before = limit.rlim_cur;
        limit.rlim_cur = most;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
        before
    }
}

/// Starts devices until one is refused, under a limit of open files. The others go on, and one that goes makes room.
fn refused_at_last(workers: &Workers, limit: u64, most: usize) -> (usize, Error) {
    // Only for the starts: to look around takes open files as well.
    let start = || {
        let before = limit_open_files(limit);
        let started = ram().workers(workers).start();
        limit_open_files(before);
        started
    };
    let mut disks = Vec::new();
    let refused = loop {
        match start() {
            Ok(disk) => disks.push(disk),
            Err(e) => break e,
        }
        assert!(disks.len() <= most, "{} are too many", disks.len());
    };
    let count = disks.len();
    assert_eq!(devices().len(), count, "what was refused is gone");
    disks.pop().unwrap().stop(SOON).unwrap();
    disks.push(start().unwrap());
    assert_eq!(start().unwrap_err().kind(), ErrorKind::TooMany);
    for disk in &disks {
        assert_eq!(disk.ending(), None);
        write_and_read(disk);
    }
    for disk in disks {
        disk.stop(SOON).unwrap();
    }
    no_devices();
    (count, refused)
}

#[test]
fn a_workers_table_of_files_is_finite_and_says_so() {
    let before = limit_open_files(40);
    let workers = Workers::new(1).unwrap();
    limit_open_files(before);
    let uses_the_table = {
        let features = Control::open().unwrap().features().unwrap();
        // Where a ring lets go of a file at once; see `forgets_files_at_once`.
        features.contains(ublk_core::control::Features::PER_IO_DAEMON)
    };
    if !uses_the_table {
        // Descriptors are used as they are, as many as may be open.
        let disks: Vec<_> = (0..41).map(|_| ram().workers(&workers).start().unwrap()).collect();
        disks.iter().for_each(|disk| write_and_read(disk));
        drop(disks);
        return no_devices();
    }
    let (count, refused) = refused_at_last(&workers, before, 40);
    assert_eq!((count, refused.kind()), (40, ErrorKind::TooMany), "{refused}");
    assert!(
        refused.to_string().contains("table of 40 files is full; use more workers"),
        "{refused}"
    );
}

#[test]
fn the_limit_of_open_files_is_named_and_the_devices_that_are_there_go_on() {
    let workers = Workers::new(1).unwrap();
    let (count, refused) = refused_at_last(&workers, 48, 48);
    assert!(count > 30, "one open file a device: {count}");
    assert_eq!(refused.kind(), ErrorKind::TooMany, "{refused}");
    let text = refused.to_string();
    assert!(text.contains("EMFILE") && text.contains("ulimit -n"), "{text}");
}

#[test]
fn idle_devices_take_little_memory() {
    let workers = Workers::new(2).unwrap();
    let start = || Null::new().builder(MIB).queue_depth(128).workers(&workers).start().unwrap();
    let mut disks: Vec<Running> = (0..8).map(|_| start()).collect();
    let before = disk::resident_bytes();
    disks.extend((0..32).map(|_| start()));
    let each = disk::resident_bytes().saturating_sub(before) / 32;
    println!("one more idle disk of depth 128 takes {} KiB", each >> 10);
    assert!(each < 96 << 10, "{each} bytes for a disk that nobody uses");
    drop(disks);
    no_devices();
}

/// Sets how much address space this process may have; more than that is not mapped. Returns what it was.
fn limit_address_space(bytes: u64) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is writable, and readable afterwards.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_AS, &raw mut limit), 0);
        let before = std::mem::replace(&mut limit.rlim_cur, bytes);
        assert_eq!(libc::setrlimit(libc::RLIMIT_AS, &raw const limit), 0);
        before
    }
}

#[test]
fn a_queue_that_a_shared_worker_has_no_memory_for_does_not_keep_its_device() {
    if lacks(Features::BATCH_IO) {
        return;
    }
    if std::thread::available_parallelism().unwrap().get() < 2 {
        println!("\nnot run: it needs two CPUs, for two queues");
        return;
    }
    let workers = Workers::new(1).unwrap();
    let neighbour = ram().workers(&workers).start().unwrap();
    let usual = AtomicU64::new(0);
    let batched = Builder::with_handlers(MIB, Capabilities::WRITE, move |queue| {
        match queue {
            // From here until the next queue's turn the worker does nothing but take this one.
            0 => usual.store(limit_address_space(0), Ordering::SeqCst),
            _ => {
                limit_address_space(usual.load(Ordering::SeqCst));
                panic!(
                    "planted: what this one registers must not take the place of the first one's file"
                );
            }
        }
        |request: Request, _: &mut QueueContext<'_>| drop(request)
    });
    let batched = batched.queues(2).require(Features::BATCH_IO);
    let e = batched.id(9).workers(&workers).start().unwrap_err();
    assert!(
        e.to_string().contains("give io_uring buffers") && e.to_string().contains("ENOMEM"),
        "{e}"
    );
    assert_eq!(devices(), [neighbour.id()]);
    // The number is free when nothing has the device's file any more.
    ram().id(9).start().unwrap().stop(SOON).unwrap();
    write_and_read(&neighbour);
    neighbour.stop(SOON).unwrap();
    no_devices();
}
