//! Disks that misbehave by rules, as their clients see it: in both kinds of backend, on every data path.

mod disk;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use disk::kernel::lacks;
use disk::{Client, Ram, SOON, eventually, no_devices};
use ublk_core::control::{Control, Features};
use ublk_core::targets::{
    Action, Fault, Faults, File, Mem, Null, OnWorker, Rule, Stripe, WriteCache,
};
use ublk_core::{Builder, DataPath, Errno, Op, Running};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// Away from what the kernel looks at when a disk appears.
const PLACE: u64 = MIB;

/// With no requests but those of the test's clients.
fn quiet(builder: Builder) -> Builder {
    builder.prefer(Features::NO_AUTO_PART_SCAN)
}

fn error(errno: Errno) -> Rule {
    Rule::new(Action::Error(errno))
}

fn here() -> Rule {
    error(Errno::ENOSPC).range(PLACE..PLACE + BLOCK as u64)
}

/// Memory behind each kind of backend: on the worker's ring, by calls on the worker, by calls on threads.
fn kinds() -> Vec<(&'static str, Builder, Faults)> {
    let ring = Fault::new(OnWorker(Mem::new(4 * MIB)));
    let calls = Fault::new(Ram::new(4 << 20));
    let pooled = Fault::new(Ram::new(4 << 20));
    let handles = [ring.faults(), calls.faults(), pooled.faults()];
    let builders = [
        ("futures", ring.builder()),
        ("calls", Builder::new(4 * MIB, calls)),
        ("threads", Builder::new(4 * MIB, pooled).threads(2)),
    ];
    builders.into_iter().zip(handles).map(|((name, b), faults)| (name, quiet(b), faults)).collect()
}

fn serve_mem(tune: impl FnOnce(Builder) -> Builder) -> (Running, Faults) {
    let fault = Fault::new(OnWorker(Mem::new(4 * MIB)));
    let faults = fault.faults();
    (tune(quiet(fault.builder())).start().unwrap(), faults)
}

/// Files of one test, removed at the end.
struct Files(Vec<PathBuf>);

impl Files {
    fn new(count: usize) -> Self {
        let name = |i| PathBuf::from(format!("/dev/shm/ublk-fault-{}-{i}", std::process::id()));
        Files((0..count).map(name).collect())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.0.iter().for_each(|path| drop(std::fs::remove_file(path)));
    }
}

#[test]
fn an_errno_arrives_where_its_rule_says_in_every_target_and_on_every_path() {
    let offered = Control::open().unwrap().features().unwrap();
    let paths = [
        (DataPath::Copy, Features::NONE),
        (DataPath::NeedGetData, Features::NEED_GET_DATA),
        (DataPath::UserCopy, Features::USER_COPY),
        (DataPath::ZeroCopy, Features::SUPPORT_ZERO_COPY),
        (DataPath::AutoBufReg, Features::AUTO_BUF_REG),
    ];
    let files = Files::new(3);
    for (path, _) in paths.into_iter().filter(|(_, needed)| offered.contains(*needed)) {
        let file = Fault::new(File::options().create(4 * MIB).open(&files.0[0]).unwrap());
        let stripe = Stripe::options().chunk(1536).create(4 * MIB).open(&files.0[1..]).unwrap();
        let stripe = Fault::new(stripe);
        let null = Fault::new(OnWorker(Null::new()));
        let handles = [file.faults(), stripe.faults(), null.faults()];
        let builders = [
            ("file", file.builder()),
            ("stripe", stripe.builder()),
            ("null", null.builder(4 * MIB)),
        ];
        let others = builders.into_iter().zip(handles).map(|((n, b), faults)| (n, b, faults));
        for (name, builder, faults) in others.chain(kinds()) {
            let disk = builder.data_path(path).start().unwrap();
            let client = Client::open(disk.path());
            let what = format!("{name} by {path}");
            client.write(PLACE, &[1; 3 * BLOCK]).unwrap();
            let rule = faults.add(here().ops([Op::Read])).unwrap();
            assert_eq!(client.read_errno(PLACE, BLOCK), libc::ENOSPC, "{what}");
            assert_eq!(client.read_errno(PLACE + BLOCK as u64 - 512, 1024), libc::ENOSPC, "{what}");
            assert_eq!(client.read_errno(PLACE + BLOCK as u64, BLOCK), 0, "{what}");
            assert_eq!(client.read_errno(PLACE - 512, 512), 0, "{what}");
            assert_eq!(client.write_errno(PLACE, &[2; BLOCK]), 0, "{what}");
            let status = faults.rules();
            assert_eq!((status.len(), status[0].id, status[0].applied), (1, rule, 2), "{what}");
            faults.set([here().ops([Op::Write])]).unwrap();
            assert_eq!(client.write_errno(PLACE, &[3; BLOCK]), libc::ENOSPC, "{what}");
            let stored = if name == "null" { [0; BLOCK] } else { [2; BLOCK] };
            assert_eq!(client.read(PLACE, BLOCK).unwrap(), stored, "{what}: it was not written");
            faults.clear();
            assert_eq!(client.write_errno(PLACE, &[3; BLOCK]), 0, "{what}");
            assert_eq!(faults.injected().errors, 3, "{what}");
            drop(client);
            disk.stop(SOON).unwrap();
        }
    }
    no_devices();
}

#[test]
fn what_is_dropped_or_panics_is_eio_and_counted() {
    for (name, builder, faults) in kinds() {
        let disk = builder.start().unwrap();
        let client = Client::open(disk.path());
        let at_place = |action| Rule::new(action).range(PLACE..2 * MIB).ops([Op::Read]);
        faults.add(at_place(Action::Drop).limit(2)).unwrap();
        let read = || client.read_errno(PLACE, BLOCK);
        assert_eq!([read(), read(), read()], [libc::EIO, libc::EIO, 0], "{name}");
        faults.set([at_place(Action::Panic).every(2).limit(2)]).unwrap();
        assert_eq!([read(), read(), read(), read(), read()], [0, libc::EIO, 0, libc::EIO, 0]);
        // The client is answered while the panic is under way.
        let panics = || disk.stats().total().panics + disk.stats().pool_panics;
        eventually("the panics are counted", || panics() == 2);
        let total = disk.stats().total();
        assert_eq!(total.dropped, 4, "{name}");
        assert_eq!((total.in_flight, total.read.errors), (0, 4), "{name}");
        let injected = faults.injected();
        assert_eq!((injected.drops, injected.panics, injected.errors), (2, 2, 0), "{name}");
        drop(client);
        disk.stop(SOON).unwrap();
    }
}

#[test]
fn every_misbehaviour_with_ring_operations_on_clients_pages_and_in_batches() {
    if lacks(Features::AUTO_BUF_REG | Features::BATCH_IO) {
        return;
    }
    let files = Files::new(1);
    for (path, batch) in [
        (DataPath::ZeroCopy, Features::NONE),
        (DataPath::ZeroCopy, Features::BATCH_IO),
        (DataPath::AutoBufReg, Features::BATCH_IO),
        (DataPath::UserCopy, Features::BATCH_IO),
    ] {
        let what = format!("{path} {batch}");
        let file = Fault::new(File::options().create(4 * MIB).open(&files.0[0]).unwrap());
        let faults = file.faults();
        let disk = file.builder().data_path(path).require(batch).queues(1).start().unwrap();
        let client = Client::open(disk.path());
        let at_place = |action| Rule::new(action).range(PLACE..2 * MIB);
        client.write(PLACE, &[1; 2 * BLOCK]).unwrap();
        let calls = || {
            let read = client.read_errno(PLACE, BLOCK);
            [read, client.write_errno(PLACE + 4 * BLOCK as u64, &[2; BLOCK])]
        };
        for (action, errno) in [
            (Action::Error(Errno::ENOSPC), libc::ENOSPC),
            (Action::Drop, libc::EIO),
            (Action::Panic, libc::EIO),
        ] {
            faults.set([at_place(action).limit(2)]).unwrap();
            assert_eq!([calls(), calls()], [[errno; 2], [0; 2]], "{what}");
        }
        let delay = Duration::from_millis(20);
        faults.set([at_place(Action::delay(delay))]).unwrap();
        let began = Instant::now();
        assert_eq!(client.read(PLACE, BLOCK).unwrap(), [1; BLOCK], "{what}");
        client.write(PLACE + BLOCK as u64, &[3; BLOCK]).unwrap();
        assert!(began.elapsed() >= 2 * delay, "{what}");
        faults.set([at_place(Action::Hold)]).unwrap();
        let held = reads(&disk, 4);
        assert!(faults.wait_held(4, SOON), "{what}");
        faults.clear();
        assert_eq!(client.read(PLACE + BLOCK as u64, BLOCK).unwrap(), [3; BLOCK], "{what}");
        assert_eq!(faults.release(), 4, "{what}");
        assert!(held.into_iter().all(|reader| reader.join().unwrap() == 0), "{what}");
        eventually("the panics are counted", || disk.stats().total().panics == 2);
        drop(client);
        let total = disk.stop(SOON).unwrap().stats.total();
        assert_eq!((total.dropped, total.in_flight), (4, 0), "{what}");
        assert_eq!((total.rejected, total.unregistered), (0, 0), "{what}");
        let stored = std::fs::read(&files.0[0]).unwrap();
        let blocks = [1, 3, 0, 0, 2].map(|byte| vec![byte; BLOCK]).concat();
        assert!(stored[PLACE as usize..][..blocks.len()] == blocks, "{what}");
        std::fs::remove_file(&files.0[0]).unwrap();
    }
    no_devices();
}

#[test]
fn delays_are_at_least_as_long_as_they_say() {
    let (least, most) = (Duration::from_millis(30), Duration::from_millis(60));
    for (name, builder, faults) in kinds() {
        let disk = builder.start().unwrap();
        let client = Client::open(disk.path());
        faults.add(Rule::new(Action::Delay { least, most }).range(PLACE..2 * MIB)).unwrap();
        for _ in 0..5 {
            let began = Instant::now();
            client.read(PLACE, BLOCK).unwrap();
            assert!(began.elapsed() >= least, "{name}: {:?}", began.elapsed());
        }
        let injected = faults.injected();
        assert_eq!(injected.delays, 5, "{name}");
        assert!((5 * least..=5 * most).contains(&injected.delayed), "{name}: {injected:?}");
        drop(client);
        disk.stop(SOON).unwrap();
    }
}

/// Reads at different places, each by a thread of its own.
fn reads(disk: &Running, count: u64) -> Vec<std::thread::JoinHandle<i32>> {
    (0..count)
        .map(|i| {
            let client = Client::reader(disk.path());
            // Apart, so that nothing merges them.
            std::thread::spawn(move || client.read_errno(PLACE + i * 65536, BLOCK))
        })
        .collect()
}

#[test]
fn what_waits_on_the_ring_keeps_nobody_else_waiting() {
    let (disk, faults) = serve_mem(|b| b.queues(1));
    faults.add(Rule::new(Action::Hold).range(PLACE..2 * MIB)).unwrap();
    let held = reads(&disk, 8);
    assert!(faults.wait_held(8, SOON), "{faults:?}");
    assert_eq!(disk.stats().total().in_flight, 8);
    // The one worker serves others, and there is a change of rules for those that come.
    let client = Client::open(disk.path());
    assert_eq!(client.read_errno(3 * MIB, BLOCK), 0);
    faults.set([Rule::new(Action::delay(Duration::from_secs(2))).range(PLACE..2 * MIB)]).unwrap();
    let late = reads(&disk, 4);
    eventually("all are delayed", || faults.injected().delays == 4);
    assert_eq!(client.read_errno(3 * MIB, BLOCK), 0);
    assert_eq!(faults.held(), 8);
    assert!(!held.iter().any(|reader| reader.is_finished()));
    assert_eq!(faults.release(), 8);
    assert_eq!(faults.held(), 0);
    for reader in held.into_iter().chain(late) {
        assert_eq!(reader.join().unwrap(), 0);
    }
    assert_eq!(faults.injected().holds, 8);
    drop(client);
    disk.stop(SOON).unwrap();
}

#[test]
fn a_call_that_is_held_goes_on_when_released_and_when_its_last_handle_is_dropped() {
    for (name, builder, faults) in kinds() {
        let disk = builder.start().unwrap();
        faults.add(Rule::new(Action::Hold).range(PLACE..2 * MIB)).unwrap();
        for last in [false, true] {
            let reader = reads(&disk, 1).remove(0);
            assert!(faults.wait_held(1, SOON), "{name}");
            if last {
                drop(faults);
                assert_eq!(reader.join().unwrap(), 0, "{name}");
                break;
            }
            assert_eq!(faults.release(), 1, "{name}");
            assert_eq!(reader.join().unwrap(), 0, "{name}");
        }
        // With nobody to release it, nothing is held.
        assert_eq!(reads(&disk, 1).remove(0).join().unwrap(), 0, "{name}");
        disk.stop(SOON).unwrap();
    }
}

#[test]
fn a_forced_stop_answers_what_is_held() {
    let (disk, faults) = serve_mem(|b| b);
    faults.add(Rule::new(Action::Hold).range(PLACE..2 * MIB)).unwrap();
    let readers = reads(&disk, 3);
    assert!(faults.wait_held(3, SOON));
    let stopped = disk.stop_force(Duration::from_millis(300)).unwrap();
    assert_eq!(stopped.leftovers, Vec::<String>::new());
    for reader in readers {
        assert_eq!(reader.join().unwrap(), libc::EIO);
    }
    assert_eq!((faults.held(), faults.release()), (0, 0));
    no_devices();
}

#[test]
fn a_rate_keeps_to_its_bounds_and_a_seed_repeats_it() {
    const READS: usize = 600;
    let (disk, faults) = serve_mem(|b| b.queues(1));
    let client = Client::open(disk.path());
    let run = |seed| {
        faults.clear();
        faults.seed(seed);
        let rule = error(Errno::EIO).ops([Op::Read]).range(PLACE..4 * MIB).probability(0.25);
        faults.add(rule).unwrap();
        let before = faults.injected().errors;
        let failed: Vec<_> = (0..READS)
            .filter(|i| client.read_errno(PLACE + (i % 64 * BLOCK) as u64, BLOCK) != 0)
            .collect();
        assert_eq!(faults.injected().errors - before, failed.len() as u64);
        // 150 expected, a standard deviation of 10.6; with these seeds it is what it is.
        assert!((100..200).contains(&failed.len()), "{} of {READS}", failed.len());
        failed
    };
    let (first, other, again) = (run(7), run(8), run(7));
    assert_eq!(first, again);
    assert_ne!(first, other);
    drop(client);
    disk.stop(SOON).unwrap();
}

#[test]
fn rules_change_while_the_disk_is_busy() {
    for (name, builder, faults) in kinds() {
        let disk = builder.queues(2).start().unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let (met, errnos) = mpsc::channel();
        let clients: Vec<_> = (0..4u64)
            .map(|i| {
                let (client, over, met) =
                    (Client::open(disk.path()), Arc::clone(&over), met.clone());
                std::thread::spawn(move || {
                    let mut seen = 0;
                    while !over.load(Ordering::Relaxed) {
                        let errno = client.write_errno(PLACE + i * 65536, &[i as u8; BLOCK]);
                        if errno != seen {
                            met.send(errno).unwrap();
                            seen = errno;
                        }
                    }
                })
            })
            .collect();
        drop(met);
        let theirs = faults.clone();
        for errno in [Errno::ENOSPC, Errno::ETIMEDOUT] {
            // From another thread than the one before.
            let theirs = theirs.clone();
            std::thread::spawn(move || theirs.set([error(errno).ops([Op::Write])]))
                .join()
                .unwrap()
                .unwrap();
            for _ in 0..4 {
                assert_eq!(errnos.recv_timeout(SOON).unwrap(), errno.raw(), "{name}");
            }
        }
        faults.clear();
        for _ in 0..4 {
            assert_eq!(errnos.recv_timeout(SOON).unwrap(), 0, "{name}");
        }
        over.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|client| client.join().unwrap());
        assert!(faults.injected().errors >= 8, "{name}");
        disk.stop(SOON).unwrap();
    }
}

#[test]
fn a_power_cut_loses_what_was_not_flushed_and_nothing_else() {
    for pooled in [false, true] {
        let cache = WriteCache::new(Mem::new(4 * MIB));
        let power = cache.power();
        let disk = match pooled {
            true => Builder::new(4 * MIB, cache).threads(2),
            false => Builder::new_async(4 * MIB, OnWorker(cache)),
        };
        let disk = disk.start().unwrap();
        let client = Client::open(disk.path());
        let write = |block: u64, byte| {
            client.write(PLACE + block * BLOCK as u64, &[byte; BLOCK]).unwrap();
        };
        (0..3).for_each(|block| write(block, 1));
        client.fsync().unwrap();
        assert_eq!(power.unflushed(), 0);
        (0..3).for_each(|block| write(block, 2));
        let lost = power.cut();
        assert_eq!((lost.lost, lost.survived), (3 * BLOCK as u64, 0));
        assert_eq!(client.read_errno(PLACE, BLOCK), libc::EIO);
        assert_eq!(client.write_errno(PLACE, &[9; BLOCK]), libc::EIO);
        assert_eq!(client.fsync().unwrap_err().raw_os_error(), Some(libc::EIO));
        power.restore();
        assert_eq!(client.read(PLACE, 3 * BLOCK).unwrap(), [1; 3 * BLOCK]);
        drop(client);
        disk.stop(SOON).unwrap();
    }
    no_devices();
}
