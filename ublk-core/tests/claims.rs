//! What this library believes of the driver's protocol, shown by a server that shares no code with it.
//!
//! Each of these is easily believed to be otherwise.

mod disk;
mod raw_server;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::time::Duration;

use disk::{Aligned, Client, Ram, SOON, bounded, eventually, no_devices, pin};
use io_uring::IoUring;
use raw_server::{Mapping, Queue, Raw, Style, fill, length_for, offset_of, sectors};
use ublk_core::control::{Control, DeviceParams, Discard, Features, Wait};
use ublk_core::{Backend, Builder, Capabilities, RequestFlags, uapi};

const MIB: u64 = 1 << 20;

fn params(queues: u16, depth: u16) -> DeviceParams {
    DeviceParams::builder(16 * MIB)
        .queues(queues)
        .queue_depth(depth)
        .max_io_bytes(64 << 10)
        .build()
        .unwrap()
}

fn start(control: &Control, id: u32) {
    control.start_dev(id, std::process::id() as i32, &Wait::for_(SOON)).unwrap();
}

/// STOP, every tag home, DEL.
fn end(raw: Raw, servers: Vec<std::thread::JoinHandle<Vec<i32>>>) {
    let Raw { control, info, file } = raw;
    control.stop_dev(info.id, &Wait::for_(SOON)).unwrap();
    for server in servers {
        let home = bounded("the server ends", move || server.join().unwrap());
        assert_eq!(home, vec![-libc::ENODEV; usize::from(info.queue_depth)]);
    }
    drop(file);
    control.del_dev(info.id, &Wait::for_(SOON)).unwrap();
    no_devices();
}

fn expect_sectors(data: &[u8], offset: u64) {
    let mut expected = vec![0; data.len()];
    fill(&mut expected, offset / 512);
    assert_eq!(data, expected);
}

/// A one-queue device whose SQEs are in this style serves reads and writes.
fn works_in_style(style: Style) {
    let raw = Raw::add(&params(1, 4));
    let queue = Queue::new(&raw, 0, style);
    let server = std::thread::spawn(move || {
        let mut queue = queue;
        queue.fetch_all();
        queue.serve(sectors)
    });
    start(&raw.control, raw.id());
    let client = Client::open(&raw.disk());
    expect_sectors(&client.read(65536, 16384).unwrap(), 65536);
    assert_eq!(client.write(0, &[1; 8192]).unwrap(), 8192);
    drop(client);
    end(raw, vec![server]);
}

#[test]
fn sqe_len_is_never_read() {
    for len in [0, 16, 0xdead_beef, u32::MAX] {
        works_in_style(Style { len, ..Style::default() });
    }
}

#[test]
fn fetch_is_c0107520_and_commit_c0107521() {
    assert_eq!(uapi::UBLK_U_IO_FETCH_REQ, 0xC010_7520);
    assert_eq!(uapi::UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0xC010_7521);
    works_in_style(Style { fetch: 0xC010_7520, commit: 0xC010_7521, ..Style::default() });
}

#[test]
fn the_legacy_fetch_20_is_accepted_as_well() {
    works_in_style(Style { fetch: 0x20, commit: 0x21, ..Style::default() });
    // And of one device each command may be numbered either way.
    works_in_style(Style { fetch: 0x20, commit: 0xC010_7521, ..Style::default() });
}

#[test]
fn user_data_comes_back_untouched() {
    works_in_style(Style { user_data: |tag| !u64::from(tag), ..Style::default() });
    works_in_style(Style {
        user_data: |tag| 0x8000_0000_0000_0001 | u64::from(tag) << 40,
        ..Style::default()
    });
}

#[test]
fn the_command_is_at_bytes_48_to_63_of_a_64_byte_sqe() {
    let raw = Raw::add(&params(1, 1));
    let mut queue = Queue::new(&raw, 0, Style::default());
    let entry = queue.entry(queue.style.fetch, 0, -1);
    assert_eq!(size_of_val(&entry), 64);
    assert_eq!(size_of::<uapi::ublksrv_io_cmd>(), 64 - 48);
    // With another queue's number in the first two of these bytes the command is another.
    // SAFETY: an entry is the kernel's 64-byte struct of integers.
    let mut bytes = unsafe { std::mem::transmute::<io_uring::squeue::Entry, [u8; 64]>(entry) };
    bytes[48..50].fill(0xff);
    // SAFETY: as above, any bytes are an entry.
    let spoiled = unsafe { std::mem::transmute::<[u8; 64], io_uring::squeue::Entry>(bytes) };
    queue.push(&spoiled);
    assert_eq!(queue.next().1, -libc::EINVAL);
    // Where it belongs, the tag is taken: a second fetch of it is refused.
    queue.fetch(0);
    queue.fetch(0);
    let refused = queue.next().1;
    assert!([-libc::EBUSY, -libc::EINVAL].contains(&refused), "{refused}");
    drop(queue);
    let Raw { control, info, file } = raw;
    drop(file);
    control.del_dev(info.id, &Wait::for_(SOON)).unwrap();
}

#[test]
fn fetches_complete_with_enodev_on_stop() {
    let raw = Raw::add(&params(1, 16));
    let queue = Queue::new(&raw, 0, Style::default());
    let server = std::thread::spawn(move || {
        let mut queue = queue;
        queue.fetch_all();
        queue.serve(sectors)
    });
    start(&raw.control, raw.id());
    // Its tags come home with ENODEV, all 16: `end` looks.
    end(raw, vec![server]);
}

fn start_in_background(raw: &Raw) -> std::thread::JoinHandle<()> {
    let (control, id) = (raw.control.clone(), raw.id());
    std::thread::spawn(move || start(&control, id))
}

#[test]
fn start_may_come_before_between_and_after_the_fetches() {
    for fetched_before in [0u16, 3, 8] {
        let raw = Raw::add(&params(1, 8));
        let queue = Queue::new(&raw, 0, Style::default());
        let (go, wait) = mpsc::channel();
        let (half, at_half) = mpsc::channel();
        let server = std::thread::spawn(move || {
            let mut queue = queue;
            (0..fetched_before).for_each(|tag| queue.fetch(tag));
            half.send(()).unwrap();
            wait.recv_timeout(SOON).unwrap();
            (fetched_before..8).for_each(|tag| queue.fetch(tag));
            queue.serve(sectors)
        });
        at_half.recv_timeout(SOON).unwrap();
        let starter = start_in_background(&raw);
        if fetched_before < 8 {
            eventually("START is with the kernel", || !raw.control.outstanding().is_empty());
            std::thread::sleep(Duration::from_millis(300));
            assert!(!starter.is_finished(), "START waits for every fetch");
            assert!(!raw.disk().exists());
        }
        go.send(()).unwrap();
        bounded("START", move || starter.join().unwrap());
        expect_sectors(&Client::reader(&raw.disk()).read(0, 4096).unwrap(), 0);
        end(raw, vec![server]);
    }
}

#[test]
fn descriptors_are_mapped_read_only_and_in_whole_queues() {
    let raw = Raw::add(&params(1, 200));
    let len = length_for(200);
    let map = |protection, offset, len| Mapping::new(&raw.file, protection, offset, len).map(drop);
    let (read, write) = (libc::PROT_READ, libc::PROT_WRITE);
    assert_eq!(len, 8192);
    assert_eq!(map(read, 0, len), Ok(()));
    assert_eq!(map(read | write, 0, len), Err(libc::EPERM));
    assert_eq!(map(write, 0, len), Err(libc::EPERM));
    for wrong in [4096, len + 4096, 4096 * 24] {
        assert_eq!(map(read, 0, wrong), Err(libc::EINVAL), "{wrong}");
    }
    // A queue that is not there.
    assert_eq!(map(read, offset_of(1), len), Err(libc::EINVAL));
    let Raw { control, info, file } = raw;
    drop(file);
    control.del_dev(info.id, &Wait::for_(SOON)).unwrap();
}

#[test]
fn queue_1_reads_its_own_descriptors_at_4096_descriptors_from_queue_0() {
    const DEPTH: u16 = 4;
    let raw = Raw::add(&params(2, DEPTH));
    if raw.info.queues < 2 {
        println!("needs two CPUs, for two queues");
        return;
    }
    assert_eq!(offset_of(1), 0x18000, "whatever the depth, which here is {DEPTH}");
    let mapping = |at| Mapping::new(&raw.file, libc::PROT_READ, at, length_for(DEPTH)).unwrap();
    let q0 = mapping(0);
    let q1 = mapping(offset_of(1));
    // The stride that the depth suggests. The kernel divides, and maps queue 0.
    let wrong = mapping(length_for(DEPTH) as u64);
    let on = Arc::new(AtomicBool::new(false));
    let both = Arc::new(Barrier::new(3));
    let seen: Arc<Mutex<Vec<(u16, u16)>>> = Arc::default();
    let servers: Vec<_> = (0..2)
        .map(|number| {
            let queue = Queue::new(&raw, number, Style::default());
            let (on, both, seen) = (Arc::clone(&on), Arc::clone(&both), Arc::clone(&seen));
            std::thread::spawn(move || {
                let mut queue = queue;
                queue.fetch_all();
                queue.serve(|queue, tag, descriptor| {
                    if on.load(Ordering::SeqCst) && descriptor.nr_sectors == 16 {
                        seen.lock().unwrap().push((number, tag));
                        both.wait();
                        // The test looks at the descriptors.
                        both.wait();
                    }
                    sectors(queue, tag, descriptor)
                })
            })
        })
        .collect();
    start(&raw.control, raw.id());
    on.store(true, Ordering::SeqCst);
    let clients: Vec<_> = (0..2u16)
        .map(|number| {
            let cpus = raw.control.get_queue_affinity(raw.id(), number).unwrap();
            let cpu = cpus.iter().next().unwrap();
            let path = raw.disk();
            std::thread::spawn(move || {
                pin(cpu);
                let offset = MIB * (u64::from(number) + 1);
                expect_sectors(&Client::reader(&path).read(offset, 8192).unwrap(), offset);
            })
        })
        .collect();
    let waiting = Arc::clone(&both);
    bounded("a request on each queue", move || waiting.wait());
    let seen = seen.lock().unwrap().clone();
    let tag = |number| seen.iter().find(|(n, _)| *n == number).expect("on both queues").1;
    let start_of = |mapping: &Mapping, tag| mapping.descriptor(tag).start_sector * 512;
    assert_eq!(start_of(&q0, tag(0)), MIB);
    assert_eq!(start_of(&q1, tag(1)), 2 * MIB);
    assert_eq!(start_of(&wrong, tag(0)), MIB, "the wrong stride shows queue 0");
    drop((q0, q1, wrong));
    both.wait();
    for client in clients {
        bounded("a client", move || client.join().unwrap());
    }
    end(raw, servers);
}

#[test]
fn a_commit_from_another_thread_is_einval_and_the_owner_may_still_commit() {
    let raw = Raw::add(&params(1, 2));
    let queue = Queue::new(&raw, 0, Style::default());
    let on = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&on);
    let (sender, receiver) = mpsc::channel();
    let server = std::thread::spawn(move || {
        let mut queue = queue;
        queue.fetch_all();
        queue.serve(|queue, tag, descriptor| {
            if theirs.load(Ordering::SeqCst) {
                let entry = queue.entry(queue.style.commit, tag, 4096);
                let result = std::thread::spawn(move || {
                    let mut ring = IoUring::new(4).unwrap();
                    // SAFETY: the buffer that the entry names lives as long as the queue, which waits
                    // for this thread.
                    unsafe { ring.submission().push(&entry) }.unwrap();
                    ring.submit_and_wait(1).unwrap();
                    ring.completion().next().unwrap().result()
                })
                .join()
                .unwrap();
                sender.send(result).unwrap();
            }
            sectors(queue, tag, descriptor)
        })
    });
    start(&raw.control, raw.id());
    on.store(true, Ordering::SeqCst);
    let client = Client::reader(&raw.disk());
    expect_sectors(&client.read(8192, 4096).unwrap(), 8192);
    assert_eq!(receiver.recv_timeout(SOON).unwrap(), -libc::EINVAL);
    on.store(false, Ordering::SeqCst);
    expect_sectors(&client.read(4096, 4096).unwrap(), 4096);
    drop(client);
    end(raw, vec![server]);
}

#[test]
fn a_request_larger_than_the_buffer_never_happens() {
    let raw = Raw::add(&params(1, 8));
    assert_eq!(raw.info.max_io_bytes, 64 << 10);
    let queue = Queue::new(&raw, 0, Style::default());
    let sizes: Arc<Mutex<Vec<u32>>> = Arc::default();
    let theirs = Arc::clone(&sizes);
    let server = std::thread::spawn(move || {
        let mut queue = queue;
        queue.fetch_all();
        queue.serve(|queue, tag, descriptor| {
            theirs.lock().unwrap().push(descriptor.nr_sectors * 512);
            sectors(queue, tag, descriptor)
        })
    });
    start(&raw.control, raw.id());
    let client = Client::open(&raw.disk());
    expect_sectors(&client.read(0, 4 << 20).unwrap(), 0);
    assert_eq!(client.write(0, &Aligned::new(4 << 20)).unwrap(), 4 << 20);
    drop(client);
    end(raw, vec![server]);
    let sizes = sizes.lock().unwrap();
    assert!(sizes.iter().all(|size| *size <= 64 << 10), "{sizes:?}");
    assert_eq!(sizes.iter().max(), Some(&(64 << 10)));
    assert!(sizes.iter().sum::<u32>() >= 8 << 20);
}

// The same through the library.

/// Does everything, and notes what it was asked.
#[derive(Default)]
struct Able(Mutex<Vec<(&'static str, u64, u64)>>, Capabilities);

impl Backend for Able {
    fn capabilities(&self) -> Capabilities {
        self.1
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.0.lock().unwrap().push(("read", offset, buf.len() as u64));
        fill(buf, offset / 512);
        Ok(buf.len())
    }
    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> std::io::Result<usize> {
        let what = if flags.fua() { "fua" } else { "write" };
        self.0.lock().unwrap().push((what, offset, data.len() as u64));
        Ok(data.len())
    }
    fn flush(&self) -> std::io::Result<()> {
        self.0.lock().unwrap().push(("flush", 0, 0));
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.0.lock().unwrap().push(("discard", offset, len));
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: RequestFlags) -> std::io::Result<()> {
        self.0.lock().unwrap().push(("write_zeroes", offset, len));
        Ok(())
    }
}

fn able(capabilities: Capabilities) -> (Arc<Able>, Builder) {
    let able = Arc::new(Able(Mutex::default(), capabilities));
    let builder = Builder::new(16 * MIB, Arc::clone(&able));
    // Where START does not wait for the partition scan, nobody but the clients is to read.
    (able, builder.prefer(Features::NO_AUTO_PART_SCAN))
}

fn attribute(path: &Path, name: &str) -> String {
    let disk = path.file_name().unwrap().to_str().unwrap();
    let file = format!("/sys/block/{disk}/{name}");
    std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{file}: {e}")).trim().to_owned()
}

#[test]
fn parameters_reach_sysfs() {
    let full = Capabilities::WRITE
        | Capabilities::FLUSH
        | Capabilities::FUA
        | Capabilities::DISCARD
        | Capabilities::WRITE_ZEROES;
    let (_, builder) = able(full);
    let disk = builder
        .logical_block_size(4096)
        .physical_block_size(8192)
        .io_min(16384)
        .io_opt(65536)
        .max_io_bytes(256 << 10)
        .queue_depth(32)
        .rotational(true)
        .discard(Discard::granules_of(8192))
        .max_write_zeroes_bytes(1 << 20)
        .start()
        .unwrap();
    let has = |name: &str, value: &str| assert_eq!(attribute(disk.path(), name), value, "{name}");
    has("size", "32768");
    has("ro", "0");
    has("queue/logical_block_size", "4096");
    has("queue/physical_block_size", "8192");
    has("queue/minimum_io_size", "16384");
    has("queue/optimal_io_size", "65536");
    has("queue/max_hw_sectors_kb", "256");
    has("queue/rotational", "1");
    has("queue/write_cache", "write back");
    has("queue/fua", "1");
    has("queue/discard_granularity", "8192");
    has("queue/write_zeroes_max_bytes", "1048576");
    assert_ne!(attribute(disk.path(), "queue/discard_max_bytes"), "0");
    disk.stop(SOON).unwrap();

    let (_, builder) = able(Capabilities::NONE);
    let disk = builder.start().unwrap();
    let has = |name: &str, value: &str| assert_eq!(attribute(disk.path(), name), value, "{name}");
    has("ro", "1");
    has("queue/logical_block_size", "512");
    has("queue/rotational", "0");
    has("queue/write_cache", "write through");
    has("queue/fua", "0");
    has("queue/discard_max_bytes", "0");
    has("queue/write_zeroes_max_bytes", "0");
    has("queue/max_hw_sectors_kb", "512");
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn with_4096_byte_blocks_offsets_are_bytes_all_the_same() {
    let (seen, builder) = able(Capabilities::WRITE);
    let disk = builder.logical_block_size(4096).start().unwrap();
    let client = Client::open(disk.path());
    eventually("nobody reads the new disk", || disk.stats().total().in_flight == 0);
    seen.0.lock().unwrap().clear();
    expect_sectors(&client.read(40960, 12288).unwrap(), 40960);
    client.write(15 * MIB, &[0; 4096]).unwrap();
    let calls = seen.0.lock().unwrap().clone();
    assert_eq!(calls, [("read", 40960, 12288), ("write", 15 * MIB, 4096)]);
    assert_eq!(client.read_errno(512, 512), libc::EINVAL);
    drop(client);
    disk.stop(SOON).unwrap();
}

#[test]
fn bring_up_needs_no_sleeps() {
    for _ in 0..20 {
        let disk = Builder::new(MIB, Ram::new(1 << 20)).queue_depth(8).start().unwrap();
        assert!(disk.path().exists());
        Client::open(disk.path()).read(0, 4096).unwrap();
        disk.stop(SOON).unwrap();
    }
    no_devices();
}
