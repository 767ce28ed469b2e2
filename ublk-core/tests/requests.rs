//! A request on a real kernel: answered exactly once, whatever its holder does, and its memory nobody else's.

mod disk;

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use disk::{Client, Held, SOON, bounded, devices, eventually, no_devices};
use ublk_core::control::Features;
use ublk_core::{
    Backend, Builder, Capabilities, Errno, KeptBuffer, Op, QueueContext, Request, RequestFlags,
    Running,
};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// Where clients read at the same time, so that the block layer does not merge what they ask for.
const APART: u64 = 8192;

/// A disk whose requests go to `handle` once it is `on`; before (while the partition table is looked for, or
/// udev looks at it) they are answered with zeroes.
struct Switched {
    disk: Running,
    on: Arc<AtomicBool>,
}

fn switched(depth: u16, handle: impl Fn(Request) + Send + Sync + 'static) -> Switched {
    switched_with(Capabilities::WRITE, depth, handle)
}

fn switched_with(
    able: Capabilities,
    depth: u16,
    handle: impl Fn(Request) + Send + Sync + 'static,
) -> Switched {
    let on = Arc::new(AtomicBool::new(false));
    let handle = Arc::new(handle);
    let theirs = Arc::clone(&on);
    let disk = Builder::with_handlers(MIB, able, move |_| {
        let (handle, on) = (Arc::clone(&handle), Arc::clone(&theirs));
        move |request: Request, _: &mut QueueContext<'_>| {
            if on.load(Ordering::SeqCst) {
                handle(request);
            } else {
                let _ = request.complete(Ok::<(), Errno>(()));
            }
        }
    })
    .queue_depth(depth)
    // Where START does not wait for the partition scan, nobody but the clients is to read.
    .prefer(Features::NO_AUTO_PART_SCAN)
    .start()
    .unwrap();
    eventually("nobody reads the new disk", || disk.stats().total().in_flight == 0);
    Switched { disk, on }
}

impl Switched {
    fn on(&self) {
        self.on.store(true, Ordering::SeqCst);
    }
    fn client(&self) -> Client {
        Client::open(self.disk.path())
    }
    /// A read on a thread of its own; its errno.
    fn read(&self, offset: u64, len: usize) -> JoinHandle<Result<Vec<u8>, i32>> {
        let client = self.client();
        std::thread::spawn(move || client.read(offset, len).map_err(|e| e.raw_os_error().unwrap()))
    }
    fn write(&self, offset: u64, data: Vec<u8>) -> JoinHandle<i32> {
        let client = self.client();
        std::thread::spawn(move || client.write_errno(offset, &data))
    }
    fn stop(self) {
        let stopped = self.disk.stop_force(SOON).unwrap();
        assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
        no_devices();
    }
}

fn join<T: Send + 'static>(thread: JoinHandle<T>) -> T {
    bounded("a client gets its answer", move || thread.join().unwrap())
}

/// Requests go to whoever receives.
fn channeled(depth: u16) -> (Switched, mpsc::Receiver<Request>) {
    let (sender, receiver) = mpsc::channel();
    let sender = Mutex::new(sender);
    let disk = switched(depth, move |request| {
        // Nobody receives any more: the request is dropped.
        let _ = sender.lock().unwrap().send(request);
    });
    disk.on();
    (disk, receiver)
}

fn next(receiver: &mpsc::Receiver<Request>) -> Request {
    receiver.recv_timeout(SOON).unwrap()
}

#[test]
fn a_request_is_completed_by_another_thread() {
    let (disk, requests) = channeled(4);
    let reader = disk.read(8192, BLOCK);
    let mut request = next(&requests);
    assert_eq!((request.op(), request.offset(), request.len()), (Op::Read, 8192, 4096));
    request.data_mut().fill(5);
    request.complete(Ok::<(), Errno>(())).unwrap();
    assert_eq!(join(reader).unwrap(), [5; BLOCK]);
    let writer = disk.write(0, vec![6; BLOCK]);
    let request = next(&requests);
    assert_eq!((request.op(), request.data()), (Op::Write, &[6; BLOCK][..]));
    request.complete(Ok::<(), Errno>(())).unwrap();
    assert_eq!(join(writer), 0);
    disk.stop();
}

#[test]
fn a_request_is_completed_after_a_trip_through_eight_threads() {
    let (disk, requests) = channeled(4);
    for round in 0..20 {
        let reader = disk.read(0, BLOCK);
        let mut request = next(&requests);
        for _ in 0..8 {
            request = std::thread::spawn(move || {
                let byte = request.data_mut()[0];
                request.data_mut().fill(byte + 1);
                request
            })
            .join()
            .unwrap();
        }
        std::thread::spawn(move || request.complete(Ok::<(), Errno>(())).unwrap()).join().unwrap();
        assert_eq!(join(reader).unwrap(), [8; BLOCK], "round {round}");
    }
    disk.stop();
}

#[test]
fn a_dropped_request_is_eio_and_counted() {
    let (disk, requests) = channeled(4);
    let reader = disk.read(0, BLOCK);
    drop(next(&requests));
    assert_eq!(join(reader), Err(libc::EIO));
    let writer = disk.write(0, vec![1; BLOCK]);
    let request = next(&requests);
    std::thread::spawn(move || drop(request)).join().unwrap();
    assert_eq!(join(writer), libc::EIO);
    let stats = disk.disk.stats().total();
    assert_eq!((stats.dropped, stats.in_flight), (2, 0), "{stats:#?}");
    assert!(stats.read.errors == 1 && stats.write.errors == 1, "{stats:#?}");
    disk.stop();
}

#[test]
fn a_panic_in_a_handler_is_eio_and_the_next_request_works() {
    let disk = switched(4, |mut request| {
        assert_ne!(request.offset(), 0, "planted");
        request.data_mut().fill(3);
        request.complete(Ok::<(), Errno>(())).unwrap();
    });
    disk.on();
    for _ in 0..5 {
        assert_eq!(join(disk.read(0, BLOCK)), Err(libc::EIO));
        assert_eq!(join(disk.read(4096, BLOCK)).unwrap(), [3; BLOCK]);
    }
    let stats = disk.disk.stats().total();
    assert_eq!((stats.panics, stats.dropped), (5, 5), "{stats:#?}");
    disk.stop();
}

#[test]
fn a_panic_in_a_backend_is_eio_on_the_worker_and_in_the_pool() {
    struct Panics;
    impl Backend for Panics {
        fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            assert_ne!(offset, 65536, "planted");
            buf.fill(4);
            Ok(buf.len())
        }
    }
    for threads in [0, 2] {
        let disk = Builder::new(MIB, Panics).threads(threads).start().unwrap();
        let client = Client::reader(disk.path());
        for _ in 0..3 {
            assert_eq!(client.read_errno(65536, BLOCK), libc::EIO);
            assert_eq!(client.read(0, BLOCK).unwrap(), [4; BLOCK]);
        }
        // The client is answered while the panic is under way.
        let panics = || disk.stats().total().panics + disk.stats().pool_panics;
        eventually("the panics are counted", || panics() == 3);
        drop(client);
        disk.stop(SOON).unwrap();
    }
}

#[test]
fn a_leaked_request_grows_old_and_a_forced_stop_revokes_it_at_its_deadline() {
    let (disk, requests) = channeled(4);
    let reader = disk.read(0, BLOCK);
    std::mem::forget(next(&requests));
    let oldest = || disk.disk.stats().total().oldest.unwrap();
    let first = oldest();
    std::thread::sleep(Duration::from_millis(50));
    assert!(oldest() >= first + Duration::from_millis(50));
    assert_eq!(disk.disk.stats().total().in_flight, 1);
    let began = Instant::now();
    let within = Duration::from_secs(2);
    let stopped = disk.disk.stop_force(within).unwrap();
    assert!(began.elapsed() >= within, "it was given its time");
    assert!(began.elapsed() < within + SOON / 2);
    assert_eq!(stopped.stats.total().revoked, 1);
    assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
    assert_eq!(join(reader), Err(libc::EIO));
    no_devices();
}

#[test]
fn requests_held_across_a_stop_are_gone_and_their_memory_stays_their_own() {
    let before_all = Held::now();
    let (disk, requests) = channeled(8);
    let writers: Vec<_> = (0..4).map(|i| disk.write(i * APART, vec![i as u8 + 1; BLOCK])).collect();
    let readers: Vec<_> = (4..8).map(|i| disk.read(i * APART, BLOCK)).collect();
    let mut held: Vec<Request> = (0..8).map(|_| next(&requests)).collect();
    let expected: BTreeMap<u64, u8> =
        (0..4).map(|i| (i * APART, u8::try_from(i).unwrap() + 1)).collect();
    let stopped = disk.disk.stop_force(Duration::from_secs(1)).unwrap();
    assert_eq!(stopped.stats.total().revoked, 8);
    for client in writers {
        assert_eq!(join(client), libc::EIO);
    }
    for client in readers {
        assert_eq!(join(client), Err(libc::EIO));
    }
    no_devices();
    // Another device works in the same process meanwhile.
    let (other, others) = channeled(8);
    for round in 0..100u8 {
        for (i, request) in held.iter_mut().enumerate() {
            match request.op() {
                Op::Write => {
                    let byte = expected[&request.offset()];
                    assert_eq!(request.data(), &[byte; BLOCK]);
                }
                _ => request.data_mut().fill(round ^ i as u8),
            }
        }
        for (i, request) in held.iter_mut().enumerate() {
            if request.op() == Op::Read {
                assert_eq!(request.data_mut(), &[round ^ i as u8; BLOCK]);
            }
        }
    }
    let reader = other.read(0, BLOCK);
    next(&others).complete(Ok::<(), Errno>(())).unwrap();
    assert_eq!(join(reader).unwrap(), [0; BLOCK]);
    for request in held.drain(..) {
        let (device, tag) = (request.device(), request.tag());
        let gone = request.complete(Ok::<(), Errno>(())).unwrap_err();
        assert_eq!((gone.device, gone.tag), (device, tag));
    }
    other.stop();
    before_all.is_again();
}

#[test]
fn dropping_a_held_request_after_the_end_is_quiet() {
    let (disk, requests) = channeled(4);
    let reader = disk.read(0, BLOCK);
    let held = next(&requests);
    disk.disk.stop_force(Duration::ZERO).unwrap();
    drop(held);
    assert_eq!(join(reader), Err(libc::EIO));
}

/// A gate that a backend waits at.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar, AtomicUsize);

impl Gate {
    fn wait(&self) {
        self.2.fetch_add(1, Ordering::SeqCst);
        let open = self.0.lock().unwrap();
        drop(self.1.wait_while(open, |open| !*open).unwrap());
    }
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

/// Blocks reads of byte 64 Ki on.
struct Stuck(Arc<Gate>);

impl Backend for Stuck {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if offset == 65536 {
            self.0.wait();
        }
        // Late, into memory that must still be there.
        buf.fill(1);
        Ok(buf.len())
    }
}

fn stuck(threads: usize, crowd: u64) {
    let before = Held::now();
    let gate = Arc::new(Gate::default());
    let disk = Builder::new(MIB, Stuck(Arc::clone(&gate))).threads(threads).start().unwrap();
    let client = Client::reader(disk.path());
    let reader = std::thread::spawn(move || client.read_errno(65536, BLOCK));
    eventually("the backend is stuck", || gate.2.load(Ordering::SeqCst) == 1);
    // More come than the kernel has told the worker of; on a pool's second thread they are answered.
    let others: Vec<_> = (0..crowd)
        .map(|i| {
            let client = Client::reader(disk.path());
            std::thread::spawn(move || client.read_errno(i * APART, BLOCK))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let began = Instant::now();
    let stopped = disk.stop_force(Duration::from_secs(1)).unwrap();
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert!(
        stopped.leftovers.iter().any(|l| l.contains("stuck in the backend")),
        "{:?}",
        stopped.leftovers
    );
    assert_eq!(join(reader), libc::EIO);
    for other in others {
        let errno = join(other);
        assert!(errno == libc::EIO || (threads > 0 && errno == 0), "{errno}");
    }
    no_devices();
    // Another disk works while the old backend is stuck.
    let other = Builder::new(MIB, Stuck(Arc::clone(&gate))).start().unwrap();
    Client::reader(other.path()).read(0, BLOCK).unwrap();
    gate.open();
    before_with(&before, &other);
    other.stop(SOON).unwrap();
    before.is_again();
}

/// Only the other disk's threads are left.
fn before_with(before: &Held, other: &Running) {
    let names = |held: &[String]| held.iter().filter(|n| n.starts_with("ublk")).count();
    let own = format!("ublk{}-q", other.id());
    eventually("the released backend's thread has ended", || {
        let now = disk::threads();
        let others = now.iter().filter(|n| n.starts_with(&own) || *n == "ublk-ctl").count();
        names(&now) <= names(&before.threads) + others
    });
}

#[test]
fn a_backend_that_is_stuck_on_its_worker_does_not_stop_the_stop() {
    stuck(0, 0);
}

#[test]
fn a_backend_that_is_stuck_on_its_worker_with_a_crowd_behind_it_does_not_stop_the_stop() {
    stuck(0, 6);
}

#[test]
fn a_backend_that_is_stuck_on_a_pool_does_not_stop_the_stop() {
    stuck(2, 6);
}

#[test]
fn no_two_requests_share_memory() {
    let (disk, requests) = channeled(32);
    let clients: Vec<_> = (0..32).map(|i| disk.read(i * APART, BLOCK)).collect();
    let mut all: Vec<Request> = (0..32).map(|_| next(&requests)).collect();
    let mut ranges: Vec<(usize, usize)> = all
        .iter_mut()
        .map(|r| {
            let range = r.data_mut().as_ptr_range();
            (range.start as usize, range.end as usize)
        })
        .collect();
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0), "{ranges:x?}");
    let mut tags: Vec<_> = all.iter().map(Request::tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..32).collect::<Vec<_>>());
    for (i, request) in all.iter_mut().enumerate() {
        request.data_mut().fill(i as u8);
    }
    for (i, mut request) in all.into_iter().enumerate() {
        assert_eq!(request.data_mut(), &[i as u8; BLOCK]);
        request.complete(Ok::<(), Errno>(())).unwrap();
    }
    for client in clients {
        let got = join(client).unwrap();
        assert!(got.iter().all(|b| *b == got[0]));
    }
    disk.stop();
}

#[test]
fn what_a_backend_does_not_fill_reads_as_zeroes() {
    let disk = switched(1, |mut request| {
        if request.op() == Op::Read {
            match request.offset() {
                // The tag's buffer is full of this afterwards.
                0 => request.data_mut().fill(0xaa),
                4096 => request.put(1000, &[1; 24]),
                8192 => {
                    request.put(4000, &[2; 96]);
                    request.put(0, &[3; 1]);
                    request.put_zeroes(512, 8);
                }
                _ => {}
            }
        }
        request.complete(Ok::<(), Errno>(())).unwrap();
    });
    disk.on();
    let client = disk.client();
    for dirty in [true, false] {
        let soil = || {
            if dirty {
                assert_eq!(client.read(0, BLOCK).unwrap(), [0xaa; BLOCK]);
            } else {
                assert_eq!(client.write(0, &[0xbb; BLOCK]).unwrap(), BLOCK);
            }
        };
        soil();
        let mut expected = [0; BLOCK];
        expected[1000..1024].fill(1);
        assert_eq!(client.read(4096, BLOCK).unwrap(), expected);
        soil();
        let mut expected = [0; BLOCK];
        expected[4000..].fill(2);
        expected[0] = 3;
        assert_eq!(client.read(8192, BLOCK).unwrap(), expected);
        soil();
        assert_eq!(client.read(16384, BLOCK).unwrap(), [0; BLOCK]);
        soil();
        assert_eq!(client.read(16384, 8 * BLOCK).unwrap(), [0; 8 * BLOCK]);
    }
    drop(client);
    disk.stop();
}

#[test]
fn a_kept_buffer_is_nobody_elses_and_the_data_arrives_all_the_same() {
    static ROUND: AtomicU64 = AtomicU64::new(0);
    let kept: Arc<Mutex<Vec<(u8, KeptBuffer)>>> = Arc::default();
    let keep = Arc::clone(&kept);
    let disk = switched(2, move |mut request| {
        let round = ROUND.fetch_add(1, Ordering::SeqCst) as u8;
        if request.op() == Op::Read {
            request.data_mut().fill(round);
        }
        let byte = if request.op() == Op::Read { round } else { request.data()[0] };
        let buffer = request.keep_buffer();
        request.complete(Ok::<(), Errno>(())).unwrap();
        assert_eq!(buffer.len(), BLOCK);
        keep.lock().unwrap().push((byte, buffer));
    });
    disk.on();
    let client = disk.client();
    for round in 0..40 {
        if round % 2 == 0 {
            assert_eq!(client.read(0, BLOCK).unwrap(), [round; BLOCK]);
        } else {
            assert_eq!(client.write(0, &[round ^ 0xff; BLOCK]).unwrap(), BLOCK);
        }
    }
    eventually("all are kept", || kept.lock().unwrap().len() == 40);
    let whole = |byte: u8, buffer: &KeptBuffer| {
        // SAFETY: the buffer is valid and this holder's alone.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr(), buffer.len()) };
        assert!(bytes.iter().all(|b| *b == byte), "{byte}: {:?}", &bytes[..8]);
    };
    for (byte, buffer) in kept.lock().unwrap().iter() {
        whole(*byte, buffer);
    }
    drop(client);
    disk.stop();
    // After the device, as well.
    for (byte, buffer) in kept.lock().unwrap().iter() {
        whole(*byte, buffer);
    }
}

#[test]
fn short_transfers_of_a_backend_are_finished() {
    struct Short(Mutex<Vec<u8>>);
    impl Backend for Short {
        fn capabilities(&self) -> Capabilities {
            Capabilities::WRITE
        }
        fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            let n = buf.len().min(1000);
            buf[..n].copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..n]);
            Ok(n)
        }
        fn write(&self, data: &[u8], offset: u64, _: RequestFlags) -> io::Result<usize> {
            let n = data.len().min(777);
            self.0.lock().unwrap()[offset as usize..][..n].copy_from_slice(&data[..n]);
            Ok(n)
        }
    }
    for threads in [0, 2] {
        let backend = Short(Mutex::new(vec![0; MIB as usize]));
        let disk = Builder::new(MIB, backend).threads(threads).start().unwrap();
        let client = Client::open(disk.path());
        let data: Vec<u8> = (0..65536u32).map(|i| (i / 7) as u8).collect();
        assert_eq!(client.write(12288, &data).unwrap(), data.len());
        assert_eq!(client.read(12288, data.len()).unwrap(), data);
        drop(client);
        disk.stop(SOON).unwrap();
    }
}

/// What `blk_errors[]` (block/blk-core.c) carries to a client as it is.
const CARRIED: &[i32] = &[
    libc::EOPNOTSUPP,
    libc::ETIMEDOUT,
    libc::ENOSPC,
    libc::ENOLINK,
    libc::EREMOTEIO,
    libc::EBADE,
    libc::ENODATA,
    libc::EILSEQ,
    libc::ENOMEM,
    libc::EBUSY,
    libc::EAGAIN,
    libc::EOVERFLOW,
    libc::ETOOMANYREFS,
    libc::ETIME,
    libc::ENODEV,
    libc::EINVAL,
    libc::EIO,
];

/// And what it does not: `EIO` at the client.
const OTHERS: &[i32] = &[
    libc::EPERM,
    libc::EACCES,
    libc::EROFS,
    libc::EFBIG,
    libc::EPIPE,
    libc::EDQUOT,
    libc::ECONNREFUSED,
];

#[test]
fn an_errno_arrives_at_a_direct_client_as_the_table_says() {
    let errno = Arc::new(AtomicI32::new(libc::EIO));
    let theirs = Arc::clone(&errno);
    let disk = switched(4, move |request| {
        let errno = Errno::new(theirs.load(Ordering::SeqCst)).unwrap();
        request.complete(Err(errno)).unwrap();
    });
    disk.on();
    let client = disk.client();
    for (list, carried) in [(CARRIED, true), (OTHERS, false)] {
        for &e in list {
            errno.store(e, Ordering::SeqCst);
            let expected = if carried { e } else { libc::EIO };
            let got = (client.read_errno(0, BLOCK), client.write_errno(0, &[1; BLOCK]));
            // The driver asks EAGAIN of nobody but clients with RWF_NOWAIT: the block layer may retry.
            assert_eq!(got, (expected, expected), "{}", io::Error::from_raw_os_error(e));
        }
    }
    drop(client);
    disk.stop();
}

#[test]
fn the_kinds_of_io_errors_have_errnos() {
    struct Kinds;
    const KINDS: &[(io::ErrorKind, i32)] = &[
        (io::ErrorKind::StorageFull, libc::ENOSPC),
        (io::ErrorKind::TimedOut, libc::ETIMEDOUT),
        (io::ErrorKind::Unsupported, libc::EOPNOTSUPP),
        (io::ErrorKind::OutOfMemory, libc::ENOMEM),
        (io::ErrorKind::Other, libc::EIO),
        (io::ErrorKind::UnexpectedEof, libc::EIO),
    ];
    impl Backend for Kinds {
        fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            match KINDS.get((offset / 4096) as usize).filter(|_| offset.is_multiple_of(4096)) {
                Some((kind, _)) if buf.len() == BLOCK => Err(io::Error::new(*kind, "planted")),
                _ => Ok(buf.len()),
            }
        }
    }
    let disk = Builder::new(MIB, Kinds).start().unwrap();
    let client = Client::reader(disk.path());
    for (i, (kind, errno)) in KINDS.iter().enumerate() {
        assert_eq!(client.read_errno(i as u64 * 4096, BLOCK), *errno, "{kind}");
    }
}

#[test]
fn a_flush_that_fails_fails_the_clients_fsync_whatever_its_errno() {
    let able = Capabilities::WRITE | Capabilities::FLUSH;
    let errno = Arc::new(AtomicI32::new(0));
    let theirs = Arc::clone(&errno);
    let flushes = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&flushes);
    let disk = switched_with(able, 4, move |request| {
        let mut result = Ok(());
        if request.op() == Op::Flush {
            seen.fetch_add(1, Ordering::SeqCst);
            result = Errno::new(theirs.load(Ordering::SeqCst)).map_or(Ok(()), Err);
        }
        request.complete(result).unwrap();
    });
    disk.on();
    let client = disk.client();
    client.write(0, &[1; BLOCK]).unwrap();
    client.fsync().unwrap();
    assert_eq!(flushes.load(Ordering::SeqCst), 1);
    for e in [libc::EOPNOTSUPP, libc::EIO, libc::ENOSPC] {
        errno.store(e, Ordering::SeqCst);
        client.write(0, &[2; BLOCK]).unwrap();
        let got = client.fsync().unwrap_err().raw_os_error();
        let expected = if e == libc::EOPNOTSUPP { libc::EIO } else { e };
        assert_eq!(got, Some(expected));
    }
    errno.store(0, Ordering::SeqCst);
    drop(client);
    disk.stop();
}

#[test]
fn a_worker_enters_the_kernel_at_most_once_for_each_batch() {
    let disk = ublk_core::targets::Null.builder(64 * MIB).queue_depth(64).start().unwrap();
    eventually("nobody reads the new disk", || disk.stats().total().in_flight == 0);
    let before = disk.stats();
    let clients: Vec<_> = (0..16u64)
        .map(|i| {
            let client = Client::open(disk.path());
            std::thread::spawn(move || {
                for n in 0..100 {
                    client.read((i * 100 + n) * 4096, BLOCK).unwrap();
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|c| c.join().unwrap());
    let after = disk.stats();
    let completed = after.total().completed() - before.total().completed();
    let enters = after.enters - before.enters;
    assert!(completed >= 1600);
    // One each at worst, when every batch is one request; a few for the bell, the timer and the start.
    assert!(enters <= completed + 50, "{enters} enters for {completed} requests");
    disk.stop(SOON).unwrap();
}

#[test]
fn of_a_completion_and_a_stop_exactly_one_answers() {
    // Requests are completed by many threads in the very moment in which they are revoked.
    for round in 0..10u32 {
        let (disk, requests) = channeled(16);
        let clients: Vec<_> = (0..16).map(|i| disk.read(i * APART, BLOCK)).collect();
        let held: Vec<Request> = (0..16).map(|_| next(&requests)).collect();
        let completers: Vec<_> = held
            .into_iter()
            .enumerate()
            .map(|(i, mut request)| {
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(100));
                    std::thread::sleep(Duration::from_micros(u64::from(round) * 100 * i as u64));
                    request.data_mut().fill(7);
                    request.complete(Ok::<(), Errno>(())).is_ok()
                })
            })
            .collect();
        let stopped = disk.disk.stop_force(Duration::from_millis(100)).unwrap();
        let completed = completers.into_iter().filter(|_| true).map(join).filter(|ok| *ok).count();
        let mut served = 0;
        for client in clients {
            match join(client) {
                Ok(data) => {
                    assert_eq!(data, [7; BLOCK]);
                    served += 1;
                }
                Err(errno) => assert_eq!(errno, libc::EIO),
            }
        }
        let revoked = stopped.stats.total().revoked as usize;
        assert_eq!(completed + revoked, 16, "round {round}");
        assert!(served <= completed);
        no_devices();
    }
}

#[test]
fn requests_that_are_completed_while_their_thread_panics_are_answered() {
    let (disk, requests) = channeled(4);
    let reader = disk.read(0, BLOCK);
    let request = next(&requests);
    let caught = catch_unwind(AssertUnwindSafe(move || {
        let _held = request;
        panic!("planted");
    }));
    assert!(caught.is_err());
    assert_eq!(join(reader), Err(libc::EIO));
    disk.stop();
    assert!(devices().is_empty());
}
