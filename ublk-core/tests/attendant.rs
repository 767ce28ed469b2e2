//! What stands around workers, the end of a turn, and results that do not wait for it.

mod disk;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use disk::{Client, Ram, SOON, bounded, eventually, no_devices};
use ublk_core::control::Features;
use ublk_core::targets::Null;
use ublk_core::{
    Attendant, Builder, Capabilities, Errno, ErrorKind, Op, QueueContext, QueueHandler, Request,
    Workers,
};

const MIB: u64 = 1 << 20;

/// Counts, and knows whether a worker is inside of a wait.
#[derive(Default)]
struct Counting {
    attended: AtomicUsize,
    over: AtomicUsize,
    pauses: AtomicUsize,
    waiting: AtomicBool,
}

impl Attendant for Counting {
    fn attend(&self, serve: &mut dyn FnMut()) {
        self.attended.fetch_add(1, SeqCst);
        serve();
        self.over.fetch_add(1, SeqCst);
    }
    fn pause(&self, wait: &mut dyn FnMut()) {
        self.pauses.fetch_add(1, SeqCst);
        self.waiting.store(true, SeqCst);
        wait();
        self.waiting.store(false, SeqCst);
    }
}

#[test]
fn handlers_run_inside_of_the_attendance_and_outside_of_pauses() {
    let counting = Arc::new(Counting::default());
    let theirs = Arc::clone(&counting);
    let asleep = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&asleep);
    let disk = Builder::with_handlers(MIB, Capabilities::NONE, move |_| {
        let (counting, seen) = (Arc::clone(&theirs), Arc::clone(&seen));
        move |request: Request, _: &mut QueueContext<'_>| {
            seen.fetch_add(usize::from(counting.waiting.load(SeqCst)), SeqCst);
            let _ = request.complete(Ok::<(), Errno>(()));
        }
    });
    let disk = disk.attendant(counting.clone()).start().unwrap();
    for _ in 0..20 {
        Client::reader(disk.path()).read(0, 4096).unwrap();
    }
    assert_eq!((counting.attended.load(SeqCst), counting.over.load(SeqCst)), (1, 0));
    assert!(counting.pauses.load(SeqCst) >= 20);
    disk.stop(SOON).unwrap();
    assert_eq!((counting.over.load(SeqCst), asleep.load(SeqCst)), (1, 0));
    no_devices();
}

/// An attendant that does not do its part.
struct Lazy {
    attends: bool,
    panics: bool,
}

impl Attendant for Lazy {
    fn attend(&self, serve: &mut dyn FnMut()) {
        if self.attends {
            serve();
        }
        assert!(!self.panics, "as told");
    }
    fn pause(&self, _wait: &mut dyn FnMut()) {}
}

#[test]
fn an_attendant_that_does_not_do_its_part_hangs_nothing() {
    for panics in [false, true] {
        let lazy = Arc::new(Lazy { attends: false, panics });
        let error = bounded("a start without workers", move || {
            Builder::new(MIB, Ram::new(1 << 20)).attendant(lazy).start().unwrap_err()
        });
        assert_eq!(error.kind(), ErrorKind::WorkerDied);
        no_devices();
        let lazy = Arc::new(Lazy { attends: true, panics });
        let disk = Builder::new(MIB, Ram::new(1 << 20)).attendant(lazy).start().unwrap();
        let client = Client::open(disk.path());
        client.write(0, &[7; 4096]).unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
        drop(client);
        disk.stop(SOON).unwrap();
        no_devices();
    }
}

#[test]
fn a_pool_has_its_own_attendant() {
    let counting = Arc::new(Counting::default());
    let workers = Workers::with_attendant(2, counting.clone()).unwrap();
    let disk = Null.builder(MIB).workers(&workers).start().unwrap();
    Client::reader(disk.path()).read(0, 4096).unwrap();
    disk.stop(SOON).unwrap();
    drop(workers);
    eventually("both workers end", || counting.over.load(SeqCst) == 2);
    assert_eq!(counting.attended.load(SeqCst), 2);
}

/// Holds the worker at one block until it is told to go on; says when a turn has ended.
struct Slow {
    go: Arc<Mutex<Receiver<()>>>,
    turns: Sender<usize>,
    count: usize,
    commits: bool,
}

const SLOW: u64 = MIB / 2;

impl QueueHandler for Slow {
    fn handle(&mut self, request: Request, context: &mut QueueContext<'_>) {
        self.count += 1;
        if request.op() == Op::Read && request.offset() == SLOW {
            if self.commits {
                context.commit();
            }
            let _ = self.go.lock().unwrap().recv_timeout(SOON);
        }
        let _ = request.complete(Ok::<(), Errno>(()));
    }
    fn turn_ended(&mut self, _: &mut QueueContext<'_>) {
        let _ = self.turns.send(std::mem::take(&mut self.count));
    }
}

/// Whether a read that arrives in the same turn as one that is held, before it, is answered meanwhile.
fn answered_meanwhile(commits: bool, batch: bool) -> bool {
    let (go, held) = channel();
    let held = Arc::new(Mutex::new(held));
    let (turns, ended) = channel();
    let disk = Builder::with_handlers(MIB, Capabilities::NONE, move |_| Slow {
        go: Arc::clone(&held),
        turns: turns.clone(),
        count: 0,
        commits,
    });
    let wanted = if batch { Features::BATCH_IO } else { Features::NONE };
    // No reads but ours: elsewhere they are over when the disk has started.
    let quiet = Features::NO_AUTO_PART_SCAN;
    let disk = disk.require(wanted).prefer(quiet).start().unwrap();
    // Open before anything is held: an open waits for the partition scan, and that for the worker.
    let mut clients: Vec<_> = (0..3).map(|_| Client::reader(disk.path())).collect();
    let mut reader = |offset| {
        let client = clients.pop().unwrap();
        let (say, task) = channel();
        let reading = std::thread::spawn(move || {
            say.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
            client.read(offset, 4096).unwrap()
        });
        (reading, Path::new("/proc").join(task.recv().unwrap()))
    };
    // The first holds the worker while two more arrive, which are one turn then.
    let (first, _) = reader(SLOW);
    eventually("the first is out", || disk.stats().queues[0].in_flight > 0);
    // A request is counted before the driver gives it to the worker: who sleeps has done that.
    let (quick, task) = reader(0);
    eventually("the quick one waits", || inflight(disk.path()) >= 2 && sleeps(&task));
    let (second, task) = reader(SLOW);
    eventually("the slow one waits", || inflight(disk.path()) >= 3 && sleeps(&task));
    while ended.try_recv().is_ok() {}
    go.send(()).unwrap();
    first.join().unwrap();
    // Give the quick one the time that it takes if it does not wait for the slow one.
    let end = std::time::Instant::now() + if commits { SOON } else { Duration::from_secs(2) };
    while !quick.is_finished() && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    let answered = quick.is_finished() && !second.is_finished();
    go.send(()).unwrap();
    second.join().unwrap();
    quick.join().unwrap();
    // The turn of the first one, and that of the two.
    assert_eq!(ended.recv_timeout(SOON).unwrap(), 1);
    assert_eq!(ended.recv_timeout(SOON).unwrap(), 2);
    disk.stop(SOON).unwrap();
    no_devices();
    answered
}

/// Whether a thread sleeps until its I/O is over.
fn sleeps(task: &Path) -> bool {
    let stat = std::fs::read_to_string(task.join("stat")).unwrap();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('D'))
}

fn inflight(disk: &Path) -> u32 {
    let name = disk.file_name().unwrap().to_str().unwrap();
    let text = std::fs::read_to_string(format!("/sys/block/{name}/inflight")).unwrap();
    text.split_whitespace().map(|n| n.parse::<u32>().unwrap()).sum()
}

#[test]
fn a_result_that_is_committed_does_not_wait_for_the_turns_end() {
    assert!(answered_meanwhile(true, false));
    // What the method is for: otherwise it would.
    assert!(!answered_meanwhile(false, false));
    let offered = ublk_core::control::Control::open().unwrap().features();
    if offered.is_some_and(|f| f.contains(Features::BATCH_IO)) {
        assert!(answered_meanwhile(true, true), "in batches");
    }
}
