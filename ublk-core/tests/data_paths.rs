//! Every way to move data, with every kind of backend: what a client writes is what the backend gets, what the
//! backend says is what a client reads, and nothing of one request shows in another.

mod disk;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use disk::kernel::{lacks, offered, refused};
use disk::{Client, Ram, SOON, eventually, no_devices, pin};
use ublk_core::control::{Control, Features};
use ublk_core::targets::{File as FileTarget, Mem, Null};
use ublk_core::{
    Builder, Capabilities, DataPath, Device, Errno, ErrorKind, Gone, Op, QueueContext, Request,
    Workers,
};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

const PATHS: [(DataPath, Features); 5] = [
    (DataPath::Copy, Features::NONE),
    (DataPath::NeedGetData, Features::NEED_GET_DATA),
    (DataPath::UserCopy, Features::USER_COPY),
    (DataPath::ZeroCopy, Features::SUPPORT_ZERO_COPY),
    (DataPath::AutoBufReg, Features::AUTO_BUF_REG),
];

/// A way to move data together with one to move commands.
#[derive(Clone, Copy, Debug)]
struct Way {
    path: DataPath,
    batch: bool,
}

impl Way {
    fn tune(self, builder: Builder) -> Builder {
        let batch = if self.batch { Features::BATCH_IO } else { Features::NONE };
        builder.data_path(self.path).require(batch)
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.path, if self.batch { " in batches" } else { "" })
    }
}

/// Those that this kernel has.
fn ways() -> Vec<Way> {
    let offered = offered();
    let all = PATHS.iter().flat_map(|(path, f)| [(*path, *f, false), (*path, *f, true)]);
    all.filter(|(path, feature, batch)| {
        offered.contains(*feature)
            && (!batch || offered.contains(Features::BATCH_IO) && *path != DataPath::NeedGetData)
    })
    .map(|(path, _, batch)| Way { path, batch })
    .collect()
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i / 7 + i * 31 + seed * 13) % 251) as u8).collect()
}

/// Writes and reads requests of many sizes, at odd places, and compares.
fn exercise(client: &Client, size: u64) {
    let mut expected = vec![0; size as usize];
    let shapes = [(0, 512), (512, 4096), (8192, 65536), (MIB - 512, 1024), (3 << 18, 524_288)];
    for (seed, (offset, len)) in shapes.into_iter().enumerate() {
        let data = pattern(len, seed);
        assert_eq!(client.write(offset, &data).unwrap(), len);
        expected[offset as usize..][..len].copy_from_slice(&data);
    }
    for (offset, len) in shapes.into_iter().chain([(0, MIB as usize), (4096, 4096)]) {
        let read = client.read(offset, len).unwrap();
        assert!(read == expected[offset as usize..][..len], "{len} bytes at {offset}");
    }
}

#[test]
fn a_backend_of_slices_works_on_every_path() {
    for way in ways() {
        for threads in [0, 2] {
            let disk = Builder::new(4 * MIB, Ram::new(4 << 20)).queue_depth(8);
            let disk = way.tune(disk).threads(threads).start().unwrap();
            assert_eq!(disk.data_path(), way.path);
            exercise(&Client::open(disk.path()), 4 * MIB);
            let stopped = disk.stop(SOON).unwrap();
            assert_eq!(stopped.stats.total().rejected, 0, "{way}");
        }
    }
    no_devices();
}

#[test]
fn a_file_works_on_every_path_and_has_the_data() {
    for way in ways().into_iter().chain([Way { path: DataPath::Auto, batch: false }]) {
        let name = format!("/tmp/ublk-paths-{}", std::process::id());
        File::create(&name).unwrap().set_len(4 * MIB).unwrap();
        let disk = FileTarget::open(&name).unwrap().builder().queue_depth(8);
        let disk = way.tune(disk).start().unwrap();
        match way.path {
            DataPath::Auto if offered().contains(Features::AUTO_BUF_REG) => {
                assert_eq!(disk.data_path(), DataPath::AutoBufReg);
            }
            DataPath::Auto => assert_eq!(disk.data_path(), DataPath::Copy),
            path => assert_eq!(disk.data_path(), path),
        }
        let client = Client::open(disk.path());
        exercise(&client, 4 * MIB);
        let data = pattern(65536, 99);
        client.write(2 * MIB, &data).unwrap();
        client.fsync().unwrap();
        let mut file = File::open(&name).unwrap();
        file.seek(SeekFrom::Start(2 * MIB)).unwrap();
        let mut there = vec![0; data.len()];
        file.read_exact(&mut there).unwrap();
        assert!(there == data, "{way}: the file's contents");
        drop(client);
        let stats = disk.stop(SOON).unwrap().stats.total();
        assert_eq!((stats.rejected, stats.unregistered), (0, 0), "{way}");
        std::fs::remove_file(&name).unwrap();
    }
    no_devices();
}

/// Bytes of the tags' buffers that are in use: of the mapping that has as many, and is empty for a forked child.
fn buffers_in_use(at_least: u64) -> u64 {
    let mappings = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut size, mut resident, mut found, mut used) = (0, 0, false, 0);
    for line in mappings.lines() {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap();
        let kib = |word: Option<&str>| word.unwrap().parse::<u64>().unwrap() << 10;
        match name {
            "Size:" => size = kib(words.next()),
            "Rss:" => resident = kib(words.next()),
            "VmFlags:" if size >= at_least && words.any(|flag| flag == "wf") => {
                found = true;
                used += resident;
            }
            _ => {}
        }
    }
    assert!(found, "no mapping of {at_least} bytes:\n{mappings}");
    used
}

/// Has a file served, and says how much of the tags' buffers that has ever taken.
fn taken_by_a_file(way: Way) -> u64 {
    const LEN: usize = 512 << 10;
    let name = format!("/tmp/ublk-no-copies-{}", std::process::id());
    File::create(&name).unwrap().set_len(4 * MIB).unwrap();
    let disk = FileTarget::open(&name).unwrap().builder().queues(1).queue_depth(33);
    let disk = way.tune(disk).max_io_bytes(LEN as u32).start().unwrap();
    let client = Client::open(disk.path());
    let mut most = 0;
    for round in 0..16 {
        let at = round as u64 % 8 * LEN as u64;
        let data = pattern(LEN, round);
        client.write(at, &data).unwrap();
        most = most.max(buffers_in_use(33 * LEN as u64));
        assert!(client.read(at, LEN).unwrap() == data, "{way}");
        most = most.max(buffers_in_use(33 * LEN as u64));
    }
    drop(client);
    assert_eq!(disk.stop(SOON).unwrap().stats.total().unregistered, 0, "{way}");
    std::fs::remove_file(&name).unwrap();
    most
}

#[test]
fn a_files_data_is_not_copied_where_clients_pages_are_registered() {
    if lacks(Features::AUTO_BUF_REG | Features::SUPPORT_ZERO_COPY) {
        return;
    }
    for way in ways() {
        let taken = taken_by_a_file(way);
        if matches!(way.path, DataPath::ZeroCopy | DataPath::AutoBufReg) {
            assert_eq!(taken, 0, "{way}");
        } else {
            // What is copied is seen.
            assert!(taken >= 512 << 10, "{way}: {taken}");
        }
    }
    no_devices();
}

#[test]
fn ring_operations_on_the_device_do_not_go_to_the_kernels_workers() {
    let disk = Null::new().builder(MIB).data_path(DataPath::UserCopy).start().unwrap();
    let node = std::path::PathBuf::from(format!("/dev/ublkc{}", disk.id()));
    let mut seen = 0;
    for fd in std::fs::read_dir("/proc/self/fd").unwrap().map(|fd| fd.unwrap().file_name()) {
        let fd = fd.to_str().unwrap();
        if std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|file| file == node) {
            let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
            let flags = told.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
            assert_ne!(flags & libc::O_NONBLOCK, 0, "{flags:o}");
            seen += 1;
        }
    }
    assert!(seen > 0, "it is open");
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn ready_made_targets_work_on_every_path() {
    for way in ways() {
        let mem = Mem::new(4 * MIB);
        let disk = way.tune(mem.builder()).queue_depth(4).start().unwrap();
        exercise(&Client::open(disk.path()), 4 * MIB);
        disk.stop(SOON).unwrap();
        let disk = way.tune(Null::new().builder(4 * MIB)).start().unwrap();
        let client = Client::open(disk.path());
        client.write(0, &[7; BLOCK]).unwrap();
        assert_eq!(client.read(0, BLOCK).unwrap(), [0; BLOCK], "{way}");
        drop(client);
        disk.stop(SOON).unwrap();
    }
}

/// A handler that is a function.
fn handled(
    way: Way,
    handle: impl FnMut(Request, &mut QueueContext<'_>) + Clone + Send + Sync + 'static,
) -> Builder {
    way.tune(Builder::with_handlers(4 * MIB, Capabilities::WRITE, move |_| handle.clone()))
        .queue_depth(2)
}

/// What reads of the first 64 KiB are answered with, apart from the kernel's own looks at the disk.
fn is_probe(request: &Request) -> bool {
    request.op() != Op::Read || request.offset() < MIB
}

#[test]
fn what_a_handler_leaves_out_of_a_read_is_zero_whatever_was_there_before() {
    for way in ways() {
        let disk = handled(way, |mut request: Request, _: &mut QueueContext<'_>| {
            if !is_probe(&request) {
                match request.offset() / MIB {
                    1 => request.data_mut().fill(0xee),
                    2 => {
                        request.put(512, &[0x11; 512]);
                        request.put_zeroes(4096, 100);
                        request.put(8192 - 10, &[0x22; 10]);
                    }
                    _ => {
                        // What was put before does not show on a path without copies; the slice counts.
                        request.put(0, &[0x33; 512]);
                        let copied = matches!(request.data_path(), DataPath::Copy);
                        let data = request.data_mut();
                        assert_eq!(data[0], if copied { 0x33 } else { 0 });
                        data[1] = 0x44;
                        data[0] = 0x33;
                        request.put(600, &[0x55]);
                    }
                }
            }
            request.complete(Ok::<(), Errno>(())).unwrap();
        });
        let disk = disk.start().unwrap();
        let client = Client::open(disk.path());
        for _ in 0..2 {
            assert_eq!(client.read(MIB, 8192).unwrap(), [0xee; 8192]);
            let mut expected = vec![0; 8192];
            expected[512..1024].fill(0x11);
            expected[8192 - 10..].fill(0x22);
            assert!(client.read(2 * MIB, 8192).unwrap() == expected, "{way}");
            let read = client.read(3 * MIB, 8192).unwrap();
            assert_eq!((read[0], read[1], read[600]), (0x33, 0x44, 0x55), "{way}");
            assert!(read[601..].iter().all(|b| *b == 0), "{way}");
        }
        drop(client);
        disk.stop(SOON).unwrap();
    }
}

#[test]
fn a_request_may_be_finished_by_another_thread_on_every_path() {
    for way in ways() {
        let (send, receive) = mpsc::channel::<Request>();
        let store = Arc::new(Mutex::new(vec![0; 4 << 20]));
        let thread = std::thread::spawn(move || {
            for mut request in receive {
                let at = request.offset() as usize;
                let mut store = store.lock().unwrap();
                match request.op() {
                    Op::Read => {
                        let len = request.len() as usize;
                        request.data_mut().copy_from_slice(&store[at..][..len]);
                    }
                    _ => store[at..][..request.data().len()].copy_from_slice(request.data()),
                }
                request.complete(Ok::<(), Errno>(())).unwrap();
            }
        });
        let disk = handled(way, move |request, _: &mut QueueContext<'_>| {
            send.send(request).unwrap();
        });
        let disk = disk.queue_depth(8).start().unwrap();
        exercise(&Client::open(disk.path()), 4 * MIB);
        disk.stop(SOON).unwrap();
        thread.join().unwrap();
    }
}

#[test]
fn a_kept_buffer_is_its_holders_on_every_path() {
    for way in ways() {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&kept);
        let disk = handled(way, move |mut request: Request, _: &mut QueueContext<'_>| {
            if is_probe(&request) && request.op() == Op::Read {
                request.complete(Ok::<(), Errno>(())).unwrap();
                return;
            }
            let mut kept = theirs.lock().unwrap();
            let fill = 0x60 + kept.len() as u8;
            match request.op() {
                Op::Read => request.data_mut().fill(fill),
                _ => assert_eq!(request.data()[0], 0x77),
            }
            let buffer = request.keep_buffer();
            let is_read = request.op() == Op::Read;
            request.complete(Ok::<(), Errno>(())).unwrap();
            if is_read {
                // What its holder writes from now on is no client's.
                // SAFETY: the buffer is this holder's alone.
                unsafe { buffer.as_ptr().write_bytes(fill | 0x80, buffer.len()) };
            }
            kept.push(buffer);
        });
        let disk = disk.start().unwrap();
        let client = Client::open(disk.path());
        for round in 0..4u8 {
            let read = client.read(MIB, BLOCK).unwrap();
            assert!(read == [0x60 + 2 * round; BLOCK], "{way}: {:?}", &read[..8]);
            client.write(0, &[0x77; BLOCK]).unwrap();
        }
        drop(client);
        disk.stop(SOON).unwrap();
        for (i, buffer) in kept.lock().unwrap().iter().enumerate() {
            // SAFETY: the buffer is this holder's alone, and has that many bytes.
            let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr(), buffer.len()) };
            let fill = if i % 2 == 0 { 0xe0 + i as u8 } else { 0x77 };
            assert!(bytes.iter().all(|b| *b == fill), "{way}: buffer {i}");
        }
    }
}

#[test]
fn a_held_request_is_revoked_on_every_path_and_its_late_data_goes_nowhere() {
    for way in ways() {
        let held = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&held);
        let disk = handled(way, move |request: Request, _: &mut QueueContext<'_>| {
            if is_probe(&request) && request.op() == Op::Read {
                request.complete(Ok::<(), Errno>(())).unwrap();
            } else {
                theirs.lock().unwrap().push(request);
            }
        });
        let disk = disk.queue_depth(2).start().unwrap();
        let device = disk.path().to_owned();
        let client = std::thread::spawn(move || Client::open(&device).read_errno(MIB, BLOCK));
        eventually("the request is held", || held.lock().unwrap().len() == 1);
        disk.stop_force(Duration::from_millis(300)).unwrap();
        assert_eq!(client.join().unwrap(), libc::EIO, "{way}");
        let mut request = held.lock().unwrap().pop().unwrap();
        request.put(0, &[1; 512]);
        request.data_mut().fill(2);
        let gone = request.complete(Ok::<(), Errno>(()));
        assert!(matches!(gone, Err(Gone { tag: 0 | 1, .. })), "{way}");
        no_devices();
    }
}

/// Fills a read from a file by two operations at a time.
#[test]
fn parts_of_a_request_go_to_the_ring_together_on_every_path() {
    let name = format!("/tmp/ublk-parts-{}", std::process::id());
    let contents = pattern(4 << 20, 5);
    std::fs::write(&name, &contents).unwrap();
    for way in ways() {
        let file = File::options().read(true).write(true).open(&name).unwrap();
        let file = ublk_core::RingFile::new(file);
        let running = Arc::new(AtomicUsize::new(0));
        let together = Arc::new(AtomicBool::new(false));
        let (count, both) = (Arc::clone(&running), Arc::clone(&together));
        let disk = handled(way, move |request: Request, context: &mut QueueContext<'_>| {
            let (file, ring) = (file.clone(), context.ring().clone());
            let (count, both) = (Arc::clone(&count), Arc::clone(&both));
            context.spawn(async move {
                let half = (request.len() / 2) as usize;
                let part = |range: std::ops::Range<usize>| {
                    let (ring, file, request) = (&ring, &file, &request);
                    let (count, both) = (&count, &both);
                    async move {
                        if count.fetch_add(1, Ordering::SeqCst) == 1 {
                            both.store(true, Ordering::SeqCst);
                        }
                        let at = request.offset() + range.start as u64;
                        let len = range.len();
                        let n = match request.op() {
                            Op::Read => ring.read_to_request(file, at, request, range).await,
                            _ => ring.write_from_request(file, at, request, range, false).await,
                        };
                        count.fetch_sub(1, Ordering::SeqCst);
                        assert_eq!(n.unwrap(), len);
                    }
                };
                join(part(0..half), part(half..2 * half)).await;
                let _ = request.complete(Ok::<(), Errno>(()));
            });
        });
        let disk = disk.start().unwrap();
        let client = Client::open(disk.path());
        for (offset, len) in [(MIB, 8192), (2 * MIB, 262_144), (0, 1024)] {
            let read = client.read(offset, len).unwrap();
            assert!(read == contents[offset as usize..][..len], "{way}: {len} at {offset}");
            client.write(offset, &read).unwrap();
        }
        assert!(together.load(Ordering::SeqCst), "{way}: one after the other");
        drop(client);
        let stats = disk.stop(SOON).unwrap().stats.total();
        assert_eq!(stats.unregistered, 0, "{way}");
    }
    assert!(std::fs::read(&name).unwrap() == contents);
    std::fs::remove_file(&name).unwrap();
}

/// Runs two futures together.
async fn join(a: impl Future<Output = ()>, b: impl Future<Output = ()>) {
    let (mut a, mut b) = (Box::pin(a), Box::pin(b));
    let (mut a_done, mut b_done) = (false, false);
    std::future::poll_fn(move |context| {
        a_done = a_done || a.as_mut().poll(context).is_ready();
        b_done = b_done || b.as_mut().poll(context).is_ready();
        if a_done && b_done { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[test]
fn devices_of_every_path_share_a_worker() {
    let workers = Workers::new(1).unwrap();
    let disks: Vec<_> = ways()
        .into_iter()
        .map(|way| {
            let name = format!("/tmp/ublk-share-{}-{way}", std::process::id());
            File::create(&name).unwrap().set_len(4 * MIB).unwrap();
            let disk = FileTarget::open(&name).unwrap().builder();
            let disk = way.tune(disk).queue_depth(16).workers(&workers).start().unwrap();
            std::fs::remove_file(name).unwrap();
            disk
        })
        .collect();
    std::thread::scope(|scope| {
        for disk in &disks {
            scope.spawn(|| exercise(&Client::open(disk.path()), 4 * MIB));
        }
    });
    // The places of one that left are the next one's.
    for disk in disks {
        let path = disk.data_path();
        disk.stop(SOON).unwrap();
        let next = Mem::new(4 * MIB).builder().data_path(path).workers(&workers).start().unwrap();
        exercise(&Client::open(next.path()), 4 * MIB);
        next.stop(SOON).unwrap();
    }
    no_devices();
}

#[test]
fn a_workers_table_of_buffers_is_finite_and_says_so() {
    if lacks(Features::AUTO_BUF_REG) {
        return;
    }
    let workers = Workers::new(1).unwrap();
    let start = || {
        let disk = Null::new().builder(MIB).queue_depth(4096).data_path(DataPath::AutoBufReg);
        disk.workers(&workers).start()
    };
    let mut disks = Vec::new();
    let error = loop {
        match start() {
            Ok(disk) => disks.push(disk),
            Err(error) => break error,
        }
    };
    assert_eq!(disks.len(), 4, "16384 places");
    assert_eq!(error.kind(), ErrorKind::TooMany, "{error}");
    assert!(error.to_string().contains("table of 16384 buffers"), "{error}");
    disks.pop().unwrap().stop(SOON).unwrap();
    disks.push(start().unwrap());
    drop(disks);
    no_devices();
}

#[test]
fn a_path_that_the_kernel_lacks_is_refused_by_name_before_anything_exists() {
    let offered = offered();
    for (path, feature) in PATHS {
        if !offered.contains(feature) {
            refused(&Null::new().builder(MIB).data_path(path).start().unwrap_err(), feature);
        }
    }
    for features in [Features::USER_COPY, Features::AUTO_BUF_REG | Features::NEED_GET_DATA] {
        let e = Null::new().builder(MIB).require(features).start().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
        assert!(e.to_string().contains("Builder::data_path"), "{e}");
    }
    let shallow = || Null::new().builder(MIB).queue_depth(1);
    let e = shallow().require(Features::BATCH_IO).start().unwrap_err();
    assert!(e.to_string().contains("queue depth of at least 2"), "{e}");
    if !offered.contains(Features::BATCH_IO) {
        let e = Null::new().builder(MIB).require(Features::BATCH_IO).start().unwrap_err();
        refused(&e, Features::BATCH_IO);
    }
    shallow().prefer(Features::BATCH_IO).start().unwrap().stop(SOON).unwrap();
    no_devices();
}

/// The driver takes a wrong place of a queue's descriptors for another queue's, silently: so each has its client.
fn on_each_queue(disk: &Device) {
    let control = Control::open().unwrap();
    for queue in 0..disk.info().queues {
        let served = || disk.stats().queues[usize::from(queue)].write.completed;
        let before = served();
        let cpu = control.get_queue_affinity(disk.id(), queue).unwrap().iter().next().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pin(cpu);
                exercise(&Client::open(disk.path()), 4 * MIB);
                // As it was for the next one.
                assert_eq!(Client::open(disk.path()).write(0, &vec![0; 4 << 20]).unwrap(), 4 << 20);
            });
        });
        assert!(served() >= before + 6, "queue {queue}");
    }
}

#[test]
fn descriptors_may_be_larger() {
    for (bytes, fine) in
        [(24, true), (32, true), (64, true), (256, true), (16, false), (260, false), (264, false)]
    {
        let disk =
            Builder::new(4 * MIB, Ram::new(4 << 20)).queues(2).descriptor_bytes(bytes).start();
        match disk {
            Ok(disk) => {
                assert!(fine, "{bytes}");
                assert_eq!(disk.info().io_desc_size, bytes);
                on_each_queue(&disk);
                disk.stop(SOON).unwrap();
            }
            Err(e) if fine => refused(&e, Features::IO_DESC_SIZE),
            Err(e) => assert!(e.to_string().contains("24 to 256"), "{e}"),
        }
    }
}

/// Whether the worker names of this process say that a queue has several.
fn lanes_of(id: u32) -> usize {
    disk::threads().iter().filter(|name| name.starts_with(&format!("ublk{id}-q0."))).count()
}

#[test]
fn several_workers_share_a_queue() {
    if !offered().contains(Features::PER_IO_DAEMON) {
        let e = Null::new().builder(MIB).workers_per_queue(2).start().unwrap_err();
        return refused(&e, Features::PER_IO_DAEMON);
    }
    for way in ways() {
        if way.batch && matches!(way.path, DataPath::Copy | DataPath::NeedGetData) {
            let disk = way.tune(Null::new().builder(MIB)).workers_per_queue(2);
            let e = disk.start().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidParameter);
            assert!(e.to_string().contains("the driver does not copy"), "{e}");
            continue;
        }
        let threads = Arc::new(Mutex::new(std::collections::HashSet::new()));
        let (seen, store) = (Arc::clone(&threads), Mem::new(4 * MIB));
        let disk = handled(way, move |mut request: Request, _: &mut QueueContext<'_>| {
            seen.lock().unwrap().insert(std::thread::current().id());
            let at = request.offset();
            let result = match request.op() {
                Op::Read => store.read_at(request.data_mut(), at),
                _ => store.write_at(request.data(), at),
            };
            // So that others have to take what comes meanwhile.
            std::thread::sleep(Duration::from_millis(2));
            request.complete(result).unwrap();
        });
        let disk = disk.queue_depth(10).workers_per_queue(3).start().unwrap();
        // The threads of the disk before, which had the same number, may not have ended yet.
        eventually("three lanes", || lanes_of(disk.id()) == 3);
        exercise(&Client::open(disk.path()), 4 * MIB);
        // In batches they take turns, and two shares of the tags are as many as there are clients.
        let least = if way.batch { 2 } else { 3 };
        // Which tags are used is the kernel's choice.
        eventually("all workers have served", || {
            std::thread::scope(|scope| {
                for i in 0..8u64 {
                    let path = disk.path();
                    scope.spawn(move || {
                        let client = Client::open(path);
                        for round in 0..16 {
                            let data = pattern(BLOCK, (i * 16 + round) as usize);
                            let at = 2 * MIB + (i * 16 + round) * 2 * BLOCK as u64;
                            client.write(at, &data).unwrap();
                            assert!(client.read(at, BLOCK).unwrap() == data);
                        }
                    });
                }
            });
            threads.lock().unwrap().len() >= least
        });
        let stopped = disk.stop(SOON).unwrap();
        assert_eq!(stopped.stats.queues.len(), 1);
        let total = stopped.stats.total();
        assert!(total.write.completed >= 128 && total.read.completed >= 128, "{total:?}");
        assert_eq!((total.rejected, total.in_flight), (0, 0), "{way}");
    }
    for (workers, words) in [(0, "1 to the queue depth"), (5, "1 to the queue depth")] {
        let disk = Null::new().builder(MIB).queue_depth(4).workers_per_queue(workers);
        let e = disk.start().unwrap_err();
        assert!(e.to_string().contains(words), "{e}");
    }
    no_devices();
}
