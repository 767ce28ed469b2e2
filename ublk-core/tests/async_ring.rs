//! Futures on the worker's own ring, on a real kernel: files, sockets, timers, and what becomes of memory
//! whose future is dropped.

mod disk;

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::Poll;
use std::time::{Duration, Instant};

use disk::kernel::offered;
use disk::{Client, Held, SOON, bounded, eventually, no_devices};
use ublk_core::control::Features;
use ublk_core::{
    AsyncBackend, Builder, Capabilities, DataPath, Errno, Op, QueueContext, Request, Ring,
    RingFile, Running,
};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

fn temporary(dir: &str) -> File {
    let path = format!("{dir}/ublk-async-{}", std::process::id());
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(true).clone();
    let file = options.open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(16 * MIB).unwrap();
    file
}

/// A disk in a file, all by the ring.
struct FileDisk(RingFile, Arc<AtomicUsize>);

impl AsyncBackend for FileDisk {
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
            | Capabilities::FLUSH
            | Capabilities::FUA
            | Capabilities::DISCARD
            | Capabilities::WRITE_ZEROES
    }
    async fn read(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        let len = request.len() as usize;
        let mut done = 0;
        while done < len {
            let at = request.offset() + done as u64;
            match ring.read_to_request(&self.0, at, request, done..len).await? {
                0 => break,
                n => done += n,
            }
        }
        Ok(())
    }
    async fn write(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        let len = request.len() as usize;
        let mut done = 0;
        while done < len {
            let (at, durable) = (request.offset() + done as u64, request.flags().fua());
            done += ring.write_from_request(&self.0, at, request, done..len, durable).await?;
        }
        Ok(())
    }
    async fn flush(&self, ring: &Ring) -> io::Result<()> {
        self.1.fetch_add(1, Ordering::SeqCst);
        ring.fsync(&self.0, true).await
    }
    async fn discard(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        ring.fallocate(&self.0, mode, request.offset(), request.len()).await
    }
    async fn write_zeroes(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.discard(request, ring).await
    }
}

fn file_disk_in(dir: &str) {
    let file = temporary(dir);
    let check = file.try_clone().unwrap();
    let flushes = Arc::new(AtomicUsize::new(0));
    let disk = Builder::new_async(16 * MIB, FileDisk(RingFile::new(file), Arc::clone(&flushes)))
        .queues(2)
        .queue_depth(32)
        .start()
        .unwrap();
    let clients: Vec<_> = (0..8u64)
        .map(|i| {
            let client = Client::open(disk.path());
            std::thread::spawn(move || {
                for n in 0..20u64 {
                    let offset = i * MIB + n * 16384;
                    let data = vec![(i * 20 + n) as u8; 16384];
                    assert_eq!(client.write(offset, &data).unwrap(), data.len());
                    assert_eq!(client.read(offset, data.len()).unwrap(), data);
                }
            })
        })
        .collect();
    for client in clients {
        bounded("a client", move || client.join().unwrap());
    }
    let client = Client::open(disk.path());
    client.fsync().unwrap();
    assert!(flushes.load(Ordering::SeqCst) >= 1);
    // What the disk says is what the file says.
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_at(&check, &mut byte, 7 * MIB + 19 * 16384).unwrap();
    assert_eq!(byte, [(7 * 20 + 19) as u8]);
    // BLKDISCARD and BLKZEROOUT reach the file.
    for request in [0x1277, 0x127f] {
        client.write(0, &[1; 16384]).unwrap();
        let range = [4096u64, 8192];
        // SAFETY: both ioctls read two u64.
        let done =
            unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&client.0), request, &range) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        let mut expected = vec![1; 16384];
        expected[4096..12288].fill(0);
        assert_eq!(client.read(0, 16384).unwrap(), expected);
    }
    drop(client);
    let stats = disk.stats().total();
    assert!(stats.discard.completed >= 1 && stats.write_zeroes.completed >= 1, "{stats:#?}");
    let stopped = disk.stop(SOON).unwrap();
    assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
    no_devices();
}

#[test]
fn a_file_is_a_disk_on_tmpfs() {
    file_disk_in("/dev/shm");
}

#[test]
fn a_file_is_a_disk_on_the_root_file_system() {
    file_disk_in("/var/tmp");
}

/// A disk whose handler is a closure that gets the requests of byte 64 Ki, and answers the others.
fn caught(
    depth: u16,
    handle: impl Fn(Request, &mut QueueContext<'_>) + Send + Sync + 'static,
) -> Running {
    let handle = Arc::new(handle);
    Builder::with_handlers(MIB, Capabilities::WRITE, move |_| {
        let handle = Arc::clone(&handle);
        move |request: Request, context: &mut QueueContext<'_>| {
            if request.offset() == 65536 && request.len() as usize == BLOCK {
                handle(request, context);
            } else {
                let _ = request.complete(Ok::<(), Errno>(()));
            }
        }
    })
    .queue_depth(depth)
    // What is in flight is the client's: elsewhere than in START, nobody looks for partitions.
    .prefer(Features::NO_AUTO_PART_SCAN)
    .start()
    .unwrap()
}

fn read(disk: &Running) -> std::thread::JoinHandle<Result<Vec<u8>, i32>> {
    let client = Client::reader(disk.path());
    std::thread::spawn(move || client.read(65536, BLOCK).map_err(|e| e.raw_os_error().unwrap()))
}

fn join<T: Send + 'static>(thread: std::thread::JoinHandle<T>) -> T {
    bounded("a client gets its answer", move || thread.join().unwrap())
}

fn stop(disk: Running) {
    let stopped = disk.stop_force(SOON).unwrap();
    assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
    no_devices();
}

/// The reading and the writing end.
fn pipe() -> (RingFile, File) {
    let mut fds = [0; 2];
    // SAFETY: the array is writable for two descriptors.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: both were made just now and belong to nobody else.
    let (reader, writer) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
    (RingFile::new(reader), writer.into())
}

/// Polls once and says whether that was all it took.
async fn poll_once(future: &mut Pin<Box<impl Future>>) -> bool {
    std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_ready())).await
}

#[test]
fn a_future_that_never_ends_is_revoked_by_a_forced_stop() {
    struct Never(Arc<AtomicUsize>);
    impl AsyncBackend for Never {
        async fn read(&self, request: &mut Request, _: &Ring) -> io::Result<()> {
            if request.offset() == 65536 {
                self.0.fetch_add(1, Ordering::Relaxed);
                std::future::pending::<()>().await;
            }
            Ok(())
        }
    }
    let before = Held::now();
    let begun = Arc::new(AtomicUsize::new(0));
    let disk = Builder::new_async(MIB, Never(Arc::clone(&begun))).start().unwrap();
    let client = read(&disk);
    eventually("it is there", || begun.load(Ordering::Relaxed) == 1);
    let stopped = disk.stop_force(Duration::from_secs(1)).unwrap();
    assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
    assert_eq!(stopped.stats.total().revoked, 1);
    assert_eq!(join(client), Err(libc::EIO));
    no_devices();
    before.is_again();
}

#[test]
fn an_operation_that_never_ends_is_revoked_by_a_forced_stop() {
    let before = Held::now();
    let (reader, writer) = pipe();
    let disk = caught(4, move |request, context| {
        let (ring, file) = (context.ring().clone(), reader.clone());
        context.spawn(async move {
            let done = ring.read_to_request(&file, u64::MAX, &request, 0..BLOCK).await;
            let _ = request.complete(done.map(drop));
        });
    });
    let client = read(&disk);
    eventually("it is there", || disk.stats().total().in_flight == 1);
    let began = Instant::now();
    let stopped = disk.stop_force(Duration::from_secs(1)).unwrap();
    assert!(began.elapsed() < SOON);
    assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
    assert_eq!(join(client), Err(libc::EIO));
    no_devices();
    drop(writer);
    before.is_again();
}

#[test]
fn a_dropped_futures_buffer_outlives_it_and_the_operation_is_cancelled() {
    let (reader, writer) = pipe();
    let ended: Arc<Mutex<Vec<usize>>> = Arc::default();
    let seen = Arc::clone(&ended);
    let disk = caught(4, move |mut request, context| {
        let (ring, file, seen) = (context.ring().clone(), reader.clone(), Arc::clone(&seen));
        context.spawn(async move {
            // Many reads that get nothing, dropped in flight.
            for _ in 0..64 {
                let mut read = Box::pin(ring.read(&file, vec![0u8; BLOCK], u64::MAX));
                assert!(!poll_once(&mut read).await);
                drop(read);
            }
            // Memory of the same size is wanted at once: it must not be what the kernel still has.
            let mut fresh: Vec<_> = (0..64).map(|i| vec![i as u8; BLOCK]).collect();
            ring.sleep(Duration::from_millis(50)).await;
            assert!(fresh.iter().enumerate().all(|(i, v)| v.iter().all(|b| *b == i as u8)));
            seen.lock().unwrap().push(fresh.len());
            request.put(0, &fresh.pop().unwrap());
            request.complete(Ok::<(), Errno>(())).unwrap();
        });
    });
    let mut writer = writer;
    for _ in 0..3 {
        assert_eq!(join(read(&disk)).unwrap(), [63; BLOCK]);
    }
    assert_eq!(*ended.lock().unwrap(), [64; 3]);
    // Nobody reads any more: what is written stays in the pipe.
    writer.write_all(b"nobody").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    stop(disk);
}

#[test]
fn a_commit_waits_for_the_operation_on_its_memory() {
    // The future is dropped with its read in flight, then the request is completed.
    let (reader, writer) = pipe();
    let disk = caught(1, move |request, context| {
        let (ring, file) = (context.ring().clone(), reader.clone());
        context.spawn(async move {
            {
                let mut read = Box::pin(ring.read_to_request(&file, u64::MAX, &request, 0..BLOCK));
                assert!(!poll_once(&mut read).await);
            }
            // Not filled, and the kernel may be writing still: this cannot be a success.
            let _ = request.complete(Ok::<(), Errno>(()));
        });
    });
    for _ in 0..5 {
        assert_eq!(join(read(&disk)), Err(libc::EIO));
    }
    // The tag was never lost: others are served, with clean buffers.
    assert_eq!(Client::reader(disk.path()).read(0, BLOCK).unwrap(), [0; BLOCK]);
    assert_eq!(disk.stats().total().in_flight, 0);
    drop(writer);
    stop(disk);
}

#[test]
fn a_leaked_future_does_not_keep_the_request_from_being_answered() {
    let (reader, writer) = pipe();
    let disk = caught(1, move |request, context| {
        let (ring, file) = (context.ring().clone(), reader.clone());
        context.spawn(async move {
            let shared = Rc::new(request);
            let theirs = Rc::clone(&shared);
            let mut read = Box::pin(async move {
                let _ = ring.read_to_request(&file, u64::MAX, &theirs, 0..BLOCK).await;
            });
            assert!(!poll_once(&mut read).await);
            // Leaked with its request: only a stop can answer it.
            std::mem::forget(read);
            drop(shared);
        });
    });
    let client = read(&disk);
    eventually("it is there", || disk.stats().total().in_flight == 1);
    let stopped = disk.stop_force(Duration::from_millis(500)).unwrap();
    assert_eq!(stopped.stats.total().revoked, 1);
    assert_eq!(join(client), Err(libc::EIO));
    no_devices();
    drop(writer);
}

#[test]
fn access_by_reference_is_refused_while_an_operation_is_in_flight() {
    let (reader, writer) = pipe();
    let refused = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&refused);
    let disk = caught(1, move |request, context| {
        let (ring, file, seen) = (context.ring().clone(), reader.clone(), Arc::clone(&seen));
        context.spawn(async move {
            let mut request = request;
            {
                let mut read = Box::pin(ring.read_to_request(&file, u64::MAX, &request, 0..BLOCK));
                assert!(!poll_once(&mut read).await);
            }
            let access = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                request.data_mut()[0] = 1;
            }));
            seen.store(access.is_err(), Ordering::SeqCst);
            // Cancelled by then.
            while std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| request.put(0, &[5])))
                .is_err()
            {
                ring.sleep(Duration::from_millis(1)).await;
            }
            request.complete(Ok::<(), Errno>(())).unwrap();
        });
    });
    let data = join(read(&disk)).unwrap();
    assert_eq!((data[0], &data[1..]), (5, &[0; BLOCK - 1][..]));
    assert!(refused.load(Ordering::SeqCst));
    drop(writer);
    stop(disk);
}

#[test]
fn a_timer_waits_its_time() {
    let disk = caught(4, |request, context| {
        let ring = context.ring().clone();
        context.spawn(async move {
            ring.sleep(Duration::from_millis(200)).await;
            let _ = request.complete(Ok::<(), Errno>(()));
        });
    });
    let began = Instant::now();
    join(read(&disk)).unwrap();
    assert!(began.elapsed() >= Duration::from_millis(200));
    stop(disk);
}

#[test]
fn a_socket_is_a_disk() {
    // The other side answers each 4 bytes with a block of their sum's low byte.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut socket = theirs;
        let mut question = [0; 4];
        while socket.read_exact(&mut question).is_ok() {
            let sum: u8 = question.iter().fold(0, |a, b| a.wrapping_add(*b));
            socket.write_all(&[sum; BLOCK]).unwrap();
        }
    });
    let socket = RingFile::new(OwnedFd::from(ours));
    let disk = caught(1, move |mut request, context| {
        let (ring, socket) = (context.ring().clone(), socket.clone());
        context.spawn(async move {
            assert_eq!(request.op(), Op::Read);
            let (sent, _) = ring.send(&socket, vec![1u8, 2, 3, 4]).await;
            assert_eq!(sent.unwrap(), 4);
            let mut at = 0;
            while at < BLOCK {
                let (got, data) = ring.recv(&socket, vec![0u8; BLOCK - at]).await;
                let got = got.unwrap();
                request.put(at, &data[..got]);
                at += got;
            }
            request.complete(Ok::<(), Errno>(())).unwrap();
        });
    });
    for _ in 0..5 {
        assert_eq!(join(read(&disk)).unwrap(), [10; BLOCK]);
    }
    stop(disk);
    bounded("the socket is closed with the disk", move || server.join().unwrap());
}

#[test]
fn five_thousand_operations_at_once_on_a_small_ring_all_end() {
    const MANY: usize = 5000;
    let file = RingFile::new(temporary("/dev/shm"));
    let ended = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&ended);
    let disk = caught(2, move |request, context| {
        let request = Rc::new(RefCell::new(Some(request)));
        let left = Rc::new(RefCell::new(MANY));
        for i in 0..MANY {
            let (ring, file) = (context.ring().clone(), file.clone());
            let (request, left, seen) = (Rc::clone(&request), Rc::clone(&left), Arc::clone(&seen));
            context.spawn(async move {
                if i % 2 == 0 {
                    let (got, data) = ring.read(&file, vec![1u8; 64], (i * 64) as u64).await;
                    assert_eq!((got.unwrap(), data), (64, vec![0; 64]));
                } else {
                    ring.sleep(Duration::from_millis(1)).await;
                }
                seen.fetch_add(1, Ordering::SeqCst);
                *left.borrow_mut() -= 1;
                if *left.borrow() == 0 {
                    let request = request.borrow_mut().take().unwrap();
                    request.complete(Ok::<(), Errno>(())).unwrap();
                }
            });
        }
    });
    join(read(&disk)).unwrap();
    assert_eq!(ended.load(Ordering::SeqCst), MANY);
    assert_eq!(disk.stats().total().panics, 0);
    stop(disk);
}

#[test]
fn a_task_that_panics_is_counted_and_its_request_is_eio() {
    let disk = caught(4, |request, context| {
        context.spawn(async move {
            let _held = request;
            panic!("planted");
        });
    });
    for _ in 0..3 {
        assert_eq!(join(read(&disk)), Err(libc::EIO));
    }
    let stats = disk.stats().total();
    assert_eq!((stats.panics, stats.dropped), (3, 3), "{stats:#?}");
    stop(disk);
}

#[test]
fn a_task_is_woken_from_another_thread() {
    let (sender, receiver) = mpsc::channel::<(std::task::Waker, Arc<AtomicBool>)>();
    let sender = Mutex::new(sender);
    let disk = caught(4, move |request, context| {
        let ready = Arc::new(AtomicBool::new(false));
        let sender = sender.lock().unwrap().clone();
        context.spawn(async move {
            let mut told = false;
            std::future::poll_fn(|context| {
                if ready.load(Ordering::SeqCst) {
                    return Poll::Ready(());
                }
                if !std::mem::replace(&mut told, true) {
                    sender.send((context.waker().clone(), Arc::clone(&ready))).unwrap();
                }
                Poll::Pending
            })
            .await;
            request.complete(Ok::<(), Errno>(())).unwrap();
        });
    });
    for _ in 0..20 {
        let client = read(&disk);
        let (waker, ready) = receiver.recv_timeout(SOON).unwrap();
        ready.store(true, Ordering::SeqCst);
        waker.wake();
        join(client).unwrap();
    }
    stop(disk);
}

/// Disks whose workers pass requests on: what is read at `PASSED` goes from the first worker to the second, whose ring
/// is to read a file to it.
#[test]
fn a_ring_does_not_work_on_the_requests_of_another_worker() {
    const PASSED: u64 = MIB;
    let paths = [
        (DataPath::Copy, Features::NONE),
        (DataPath::UserCopy, Features::USER_COPY),
        (DataPath::ZeroCopy, Features::SUPPORT_ZERO_COPY),
        (DataPath::AutoBufReg, Features::AUTO_BUF_REG),
    ];
    for (path, _) in paths.into_iter().filter(|(_, feature)| offered().contains(*feature)) {
        let (pass, passed) = mpsc::channel::<Request>();
        let (tell, told) = mpsc::channel();
        let first = Builder::with_handlers(2 * MIB, Capabilities::NONE, move |_| {
            let pass = pass.clone();
            move |request: Request, _: &mut QueueContext<'_>| match request.offset() {
                PASSED => pass.send(request).unwrap(),
                _ => request.complete(Ok::<(), Errno>(())).unwrap(),
            }
        });
        let first = first.queue_depth(8).data_path(path).start().unwrap();
        let client = Client::open(first.path());
        let client = std::thread::spawn(move || client.read(PASSED, BLOCK));
        let received = Arc::new(Mutex::new(Some(passed.recv_timeout(SOON).unwrap())));
        let second = Builder::with_handlers(2 * MIB, Capabilities::NONE, move |_| {
            let (received, tell) = (Arc::clone(&received), tell.clone());
            move |own: Request, context: &mut QueueContext<'_>| {
                let ring = context.ring().clone();
                let theirs = received.lock().unwrap().take();
                let tell = tell.clone();
                context.spawn(async move {
                    let file = RingFile::new(temporary("/tmp"));
                    if let Some(theirs) = theirs {
                        let read = ring.read_to_request(&file, 0, &theirs, 0..BLOCK).await;
                        tell.send(read.unwrap_err().raw_os_error()).unwrap();
                        theirs.complete(Err(Errno::ENOSPC)).unwrap();
                    }
                    let len = own.len() as usize;
                    let read = ring.read_to_request(&file, 0, &own, 0..len).await;
                    own.complete(read.map(drop)).unwrap();
                });
            }
        });
        let second = second.queue_depth(8).data_path(path).start().unwrap();
        Client::open(second.path()).read(0, BLOCK).unwrap();
        assert_eq!(told.recv_timeout(SOON).unwrap(), Some(libc::EXDEV), "{path}");
        let answer = bounded("the client", move || client.join().unwrap());
        assert_eq!(answer.unwrap_err().raw_os_error(), Some(libc::ENOSPC), "{path}");
        second.stop(SOON).unwrap();
        stop(first);
    }
}

#[test]
fn a_worker_that_ends_with_operations_in_flight_ends_all_the_same() {
    let before = Held::now();
    let (reader, writer) = pipe();
    let disk = caught(4, move |request, context| {
        for _ in 0..16 {
            let (ring, file) = (context.ring().clone(), reader.clone());
            // They outlive their request.
            context.spawn(async move {
                let _ = ring.read(&file, vec![0u8; BLOCK], u64::MAX).await;
            });
        }
        request.complete(Ok::<(), Errno>(())).unwrap();
    });
    join(read(&disk)).unwrap();
    stop(disk);
    drop(writer);
    before.is_again();
}
