//! What the driver says when it cannot do all that it is told, and what the library makes of it: batches that are
//! taken in part, fetches that run out of buffers, pages that cannot be registered. Caused on purpose, on the real
//! driver: first by a server that shares no code with the library, then behind the library's back.

mod disk;
mod raw_server;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use disk::kernel::lacks;
use disk::{Aligned, Client, SOON, bounded, eventually, no_devices, patience};
use io_uring::{IoUring, cqueue, squeue, types};
use raw_server::{Mapping, Raw, length_for};
use ublk_core::control::{DeviceParams, Features, Wait};
use ublk_core::{
    Builder, Capabilities, DataPath, Errno, ErrorKind, Op, QueueContext, Request, RingFile, uapi,
};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
const DEPTH: u16 = 4;
/// Of the user_data of fetches of batches.
const FETCH: u64 = 1000;
/// Of the user_data of batches.
const BATCH: u64 = 1001;

/// Entries of a ring of buffers, and the buffers, at one address for good.
struct Arrays(Aligned);

impl Arrays {
    const COUNT: u16 = 4;
    const BYTES: usize = 256;

    fn new(ring: &IoUring) -> Self {
        let arrays = Arrays(Aligned::new(2 * BLOCK));
        let entries = arrays.0.as_ptr() as u64;
        // SAFETY: a page of entries, which live as long as the queue that keeps the ring.
        unsafe { ring.submitter().register_buf_ring_with_flags(entries, Self::COUNT, 7, 0) }
            .unwrap();
        arrays
    }

    fn at(number: u16) -> usize {
        BLOCK + usize::from(number) * Self::BYTES
    }

    /// Offers a buffer; it is the `tail`th.
    fn offer(&mut self, tail: u16, number: u16) {
        let address = self.0.as_ptr() as u64 + Self::at(number) as u64;
        let entry = usize::from(tail % Self::COUNT) * 16;
        self.0[entry..entry + 8].copy_from_slice(&address.to_ne_bytes());
        self.0[entry + 8..entry + 12].copy_from_slice(&(Self::BYTES as u32).to_ne_bytes());
        self.0[entry + 12..entry + 14].copy_from_slice(&number.to_ne_bytes());
        // The tail overlays the last field of the first entry.
        self.0[14..16].copy_from_slice(&(tail + 1).to_ne_bytes());
    }

    fn tags(&self, number: u16, bytes: usize) -> Vec<u16> {
        let array = &self.0[Self::at(number)..][..bytes];
        array.chunks_exact(2).map(|word| u16::from_ne_bytes([word[0], word[1]])).collect()
    }
}

/// A device of one queue whose commands are written byte by byte.
struct Server {
    raw: Raw,
    ring: IoUring,
    descriptors: Mapping,
    starting: Option<JoinHandle<()>>,
}

impl Server {
    fn new(features: Features, depth: u16) -> Self {
        let params = DeviceParams::builder(4 * MIB).queues(1).queue_depth(depth);
        let params = params.max_io_bytes(64 << 10).build().unwrap();
        // The scan for partitions would be one more request.
        let raw = Raw::add_with(&params, features | Features::NO_AUTO_PART_SCAN);
        let len = length_for(depth);
        let descriptors = Mapping::new(&raw.file, libc::PROT_READ, 0, len).unwrap();
        Server { raw, ring: IoUring::new(32).unwrap(), descriptors, starting: None }
    }

    fn push(&mut self, sqe: [u8; 64]) {
        // SAFETY: an entry is the kernel's 64-byte struct of integers, and any bytes are one.
        let entry = unsafe { std::mem::transmute::<[u8; 64], squeue::Entry>(sqe) };
        // SAFETY: what the entries of this file point to is read at once, or is an `Arrays` that outlives the ring.
        unsafe { self.ring.submission().push(&entry) }.unwrap();
        self.ring.submit().unwrap();
    }

    fn sqe(&self, cmd_op: u32, user_data: u64) -> [u8; 64] {
        let mut sqe = [0u8; 64];
        sqe[0] = 46; // IORING_OP_URING_CMD
        sqe[4..8].copy_from_slice(&self.raw.file.as_raw_fd().to_ne_bytes());
        sqe[8..12].copy_from_slice(&cmd_op.to_ne_bytes());
        sqe[32..40].copy_from_slice(&user_data.to_ne_bytes());
        sqe
    }

    /// The command of one tag; `addr` is the word of automatic registration.
    fn tag(&mut self, cmd_op: u32, tag: u16, result: i32, addr: u64) {
        let mut sqe = self.sqe(cmd_op, tag.into());
        sqe[16..24].copy_from_slice(&addr.to_ne_bytes());
        sqe[50..52].copy_from_slice(&tag.to_ne_bytes());
        sqe[52..56].copy_from_slice(&result.to_ne_bytes());
        self.push(sqe);
    }

    /// A batch of elements, and its result.
    fn batch(&mut self, cmd_op: u32, elements: &[(u16, i32)]) -> i32 {
        let bytes: Vec<u8> = elements
            .iter()
            .flat_map(|(tag, result)| {
                [&tag.to_ne_bytes()[..], &[0, 0], &result.to_ne_bytes()].concat()
            })
            .collect();
        let mut sqe = self.sqe(cmd_op, BATCH);
        sqe[16..24].copy_from_slice(&(bytes.as_ptr() as u64).to_ne_bytes());
        sqe[52..54].copy_from_slice(&(elements.len() as u16).to_ne_bytes());
        sqe[54] = 8;
        self.push(sqe);
        let done = self.next(patience()).expect("the batch's end");
        assert_eq!(done.user_data(), BATCH);
        done.result()
    }

    fn fetch_batches(&mut self) {
        let mut sqe = self.sqe(uapi::UBLK_U_IO_FETCH_IO_CMDS, FETCH);
        sqe[1] = 1 << 5; // IOSQE_BUFFER_SELECT
        sqe[28..32].copy_from_slice(&uapi::IORING_URING_CMD_MULTISHOT.to_ne_bytes());
        sqe[40..42].copy_from_slice(&7u16.to_ne_bytes());
        sqe[54] = 2;
        self.push(sqe);
    }

    fn next(&mut self, within: Duration) -> Option<cqueue::Entry> {
        let end = Instant::now() + within;
        loop {
            if let Some(cqe) = self.ring.completion().next() {
                return Some(cqe);
            }
            let left = end.checked_duration_since(Instant::now())?;
            let step = types::Timespec::from(left.min(Duration::from_secs(1)));
            let args = types::SubmitArgs::new().timespec(&step);
            let _ = self.ring.submitter().submit_with_args(1, &args);
        }
    }

    /// Has the disk come up; all tags are with the driver.
    fn start(&mut self) {
        let (control, id) = (self.raw.control.clone(), self.raw.id());
        self.starting = Some(std::thread::spawn(move || {
            control.start_dev(id, std::process::id() as i32, &Wait::for_(SOON)).unwrap();
        }));
        let path = self.raw.disk();
        eventually("the disk is there", || path.exists());
        self.starting.take().unwrap().join().unwrap();
    }

    fn client(&self, block: u64) -> JoinHandle<i32> {
        let path = self.raw.disk();
        std::thread::spawn(move || {
            Client::reader(&path).read_errno(block * 2 * BLOCK as u64, BLOCK)
        })
    }

    /// The errno of a client. Nothing else happens to the server meanwhile.
    fn end_of(&mut self, client: JoinHandle<i32>) -> i32 {
        // In the ring, since it is on this thread that the driver does what is to be done for it.
        let end = Instant::now() + patience();
        while !client.is_finished() {
            assert!(Instant::now() < end, "the client does not end");
            let more = self.next(Duration::from_millis(5));
            assert!(more.is_none(), "{more:?}");
        }
        client.join().unwrap()
    }

    /// Ends the device, whatever it is doing.
    fn end(self) {
        let Server { raw: Raw { control, info, file }, ring, descriptors, .. } = self;
        let stop = {
            let control = control.clone();
            std::thread::spawn(move || control.stop_dev(info.id, &Wait::for_(SOON)).unwrap())
        };
        bounded("STOP", move || stop.join().unwrap());
        drop((descriptors, ring, file));
        control.del_dev(info.id, &Wait::for_(SOON)).unwrap();
        no_devices();
    }
}

#[test]
fn the_driver_takes_a_batch_up_to_the_element_that_it_refuses() {
    if lacks(Features::BATCH_IO) {
        return;
    }
    let mut server = Server::new(Features::BATCH_IO | Features::USER_COPY, DEPTH);
    let mut arrays = Arrays::new(&server.ring);
    // One for each of the clients, who may all come before the first is looked at.
    for number in 0..3 {
        arrays.offer(number, number);
    }
    let all: Vec<_> = (0..DEPTH).map(|tag| (tag, 0)).collect();
    let (prepare, commit) = (uapi::UBLK_U_IO_PREP_IO_CMDS, uapi::UBLK_U_IO_COMMIT_IO_CMDS);
    assert_eq!(server.batch(prepare, &all), 0);
    server.fetch_batches();
    server.start();
    let mut tags = Vec::new();
    let clients: Vec<_> = (0..3).map(|block| server.client(block)).collect();
    while tags.len() < 3 {
        let fetched = server.next(patience()).expect("requests");
        assert_eq!(fetched.user_data(), FETCH);
        let array = cqueue::buffer_select(fetched.flags()).expect("an array");
        tags.extend(arrays.tags(array, fetched.result() as usize));
        if !cqueue::more(fetched.flags()) {
            server.fetch_batches();
        }
    }
    let idle = (0..DEPTH).find(|tag| !tags.contains(tag)).unwrap();
    for tag in &tags {
        // The data of a read, by the device's file.
        let at = 0x8000_0000 + (u64::from(*tag) << 25);
        assert_eq!(server.raw.file.write_at(&[5; BLOCK], at).unwrap(), BLOCK);
    }
    let whole = BLOCK as i32;
    // An element is 8 bytes; of what is behind the first there is no word, not even an error.
    let batch = [(tags[0], whole), (idle, whole), (tags[1], whole), (tags[2], whole)];
    assert_eq!(server.batch(commit, &batch), 8);
    assert_eq!(server.batch(commit, &batch[1..]), -libc::EBUSY);
    assert_eq!(server.batch(commit, &batch[2..]), 16);
    for client in clients {
        assert_eq!(server.end_of(client), 0);
    }
    server.end();
}

#[test]
fn a_fetch_ends_with_enobufs_and_the_next_one_brings_what_it_left() {
    if lacks(Features::BATCH_IO) {
        return;
    }
    let mut server = Server::new(Features::BATCH_IO | Features::USER_COPY, DEPTH);
    let mut arrays = Arrays::new(&server.ring);
    arrays.offer(0, 0);
    let all: Vec<_> = (0..DEPTH).map(|tag| (tag, 0)).collect();
    assert_eq!(server.batch(uapi::UBLK_U_IO_PREP_IO_CMDS, &all), 0);
    server.fetch_batches();
    server.start();
    let first = server.client(0);
    let fetched = server.next(patience()).expect("a request");
    assert_eq!((fetched.user_data(), fetched.result()), (FETCH, 2));
    assert!(cqueue::more(fetched.flags()), "it goes on");
    let tag = arrays.tags(0, 2)[0];
    // There is no buffer for this one.
    let second = server.client(1);
    let ended = server.next(patience()).expect("the fetch's end");
    assert_eq!((ended.user_data(), ended.result()), (FETCH, -libc::ENOBUFS));
    assert!(!cqueue::more(ended.flags()));
    arrays.offer(1, 0);
    server.fetch_batches();
    let fetched = server.next(patience()).expect("the request that waited");
    assert_eq!((fetched.user_data(), fetched.result()), (FETCH, 2));
    let next = arrays.tags(0, 2)[0];
    assert_ne!(tag, next);
    let elements = [(tag, -libc::EIO), (next, -libc::ENOSPC)];
    assert_eq!(server.batch(uapi::UBLK_U_IO_COMMIT_IO_CMDS, &elements), 16);
    assert_eq!((server.end_of(first), server.end_of(second)), (libc::EIO, libc::ENOSPC));
    server.end();
}

#[test]
fn a_registration_that_fails_is_told_with_fallback_and_kept_silent_without() {
    if lacks(Features::AUTO_BUF_REG) {
        return;
    }
    const FALLBACK: u64 = 1 << 16;
    // Into the table, beyond it with FALLBACK, beyond it without. Of the latter request nobody hears.
    for (place, told) in [(0, Some(false)), (100 | FALLBACK, Some(true)), (101, None)] {
        // One tag, so that it is known which one a request takes.
        let mut server = Server::new(Features::AUTO_BUF_REG | Features::USER_COPY, 1);
        server.ring.submitter().register_buffers_sparse(2).unwrap();
        server.tag(uapi::UBLK_U_IO_FETCH_REQ, 0, -1, place);
        server.start();
        for _ in 0..3 {
            let client = server.client(1);
            if let Some(flagged) = told {
                let arrived = server.next(patience()).expect("a request");
                assert_eq!((arrived.user_data(), arrived.result()), (0, 0));
                let flags = server.descriptors.descriptor(0).op_flags;
                assert_eq!(flags & uapi::UBLK_IO_F_NEED_REG_BUF != 0, flagged);
                // Either way the data can be moved by the device's file.
                assert_eq!(server.raw.file.write_at(&[6; BLOCK], 0x8000_0000).unwrap(), BLOCK);
                let commit = uapi::UBLK_U_IO_COMMIT_AND_FETCH_REQ;
                server.tag(commit, 0, BLOCK as i32, place);
            }
            let expected = if told.is_none() { libc::EIO } else { 0 };
            assert_eq!(server.end_of(client), expected);
        }
        server.end();
    }
}

fn rings() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let rings = entries.filter(|entry| {
        let target = std::fs::read_link(entry.path());
        target.is_ok_and(|target| target.to_string_lossy().contains("io_uring"))
    });
    rings.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Puts memory into places of the table of buffers of the ring that the calling thread is the only one to use: its
/// worker's. Registrations there fail from now on.
fn occupy(places: impl Iterator<Item = u32>) {
    #[repr(C)]
    struct Update {
        offset: u32,
        resv: u32,
        data: u64,
        tags: u64,
        nr: u32,
        resv2: u32,
    }
    const REGISTER_BUFFERS_UPDATE: u32 = 16;
    let memory = Box::leak(Box::new(Aligned::new(BLOCK)));
    let vec = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: BLOCK };
    let (mut done, places) = (0, places.collect::<Vec<_>>());
    for ring in rings() {
        for place in &places {
            let data = (&raw const vec).expose_provenance() as u64;
            let update = Update { offset: *place, resv: 0, data, tags: 0, nr: 1, resv2: 0 };
            // SAFETY: the struct and the vector are read during the call, the memory is never freed.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_uring_register,
                    ring,
                    REGISTER_BUFFERS_UPDATE,
                    &raw const update,
                    size_of::<Update>(),
                )
            };
            done += u32::from(result == 1);
        }
    }
    assert_eq!(done, places.len() as u32, "one ring's");
}

#[test]
fn pages_that_the_ring_does_not_take_are_copied() {
    if lacks(Features::AUTO_BUF_REG) {
        return;
    }
    let name = format!("/tmp/ublk-unregistered-{}", std::process::id());
    for (path, batch) in [
        (DataPath::AutoBufReg, Features::NONE),
        (DataPath::AutoBufReg, Features::BATCH_IO),
        (DataPath::ZeroCopy, Features::NONE),
        (DataPath::ZeroCopy, Features::BATCH_IO),
    ] {
        let case = format!("{path} {batch}");
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&name);
        let file = file.unwrap();
        file.set_len(4 * MIB).unwrap();
        let file = RingFile::new(file);
        let disk = Builder::with_handlers(4 * MIB, Capabilities::WRITE, move |_| {
            let file = file.clone();
            let mut occupied = false;
            move |request: Request, context: &mut QueueContext<'_>| {
                if !std::mem::replace(&mut occupied, true) {
                    // Its own may be in use.
                    let own = u32::from(request.tag());
                    occupy((0..8).filter(|place| *place != own));
                }
                let (file, ring) = (file.clone(), context.ring().clone());
                context.spawn(async move {
                    let (at, len) = (request.offset(), request.len() as usize);
                    let done = match request.op() {
                        Op::Read => ring.read_to_request(&file, at, &request, 0..len).await,
                        _ => ring.write_from_request(&file, at, &request, 0..len, false).await,
                    };
                    assert_eq!(done.unwrap(), len);
                    let _ = request.complete(Ok::<(), Errno>(()));
                });
            }
        });
        let disk = disk.queue_depth(8).data_path(path).require(batch);
        let disk = disk.prefer(Features::NO_AUTO_PART_SCAN).start().unwrap();
        // Alone, so that no pages are in the places that are taken: those are others' by then.
        Client::reader(disk.path()).read(0, BLOCK).unwrap();
        // Many at once, so that the other tags are used.
        std::thread::scope(|scope| {
            for i in 0..8u64 {
                let path = disk.path();
                let case = &case;
                scope.spawn(move || {
                    let client = Client::open(path);
                    for round in 0..8 {
                        let data = vec![(i * 8 + round) as u8 + 1; 16384];
                        let at = (i * 8 + round) * 32768;
                        client.write(at, &data).unwrap();
                        assert!(client.read(at, data.len()).unwrap() == data, "{case}");
                    }
                });
            }
        });
        let stats = disk.stop(SOON).unwrap().stats.total();
        assert!(stats.unregistered > 0, "{case}: {stats:?}");
        assert_eq!((stats.read.errors, stats.write.errors, stats.rejected), (0, 0, 0), "{case}");
    }
    std::fs::remove_file(&name).unwrap();
    no_devices();
}

/// Commits a tag behind the library's back; in batches anybody may.
fn commit_by_hand(id: u32, tag: u16) {
    let node = format!("/dev/ublkc{id}");
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let mut found = entries.filter(|e| std::fs::read_link(e.path()).is_ok_and(|t| t == *node));
    let fd: i32 = found.next().unwrap().file_name().to_str().unwrap().parse().unwrap();
    let mut element = [0u8; 8];
    element[..2].copy_from_slice(&tag.to_ne_bytes());
    element[4..].copy_from_slice(&(BLOCK as i32).to_ne_bytes());
    let mut sqe = [0u8; 64];
    sqe[0] = 46;
    sqe[4..8].copy_from_slice(&fd.to_ne_bytes());
    sqe[8..12].copy_from_slice(&uapi::UBLK_U_IO_COMMIT_IO_CMDS.to_ne_bytes());
    sqe[16..24].copy_from_slice(&(element.as_ptr() as u64).to_ne_bytes());
    sqe[52] = 1;
    sqe[54] = 8;
    let mut ring = IoUring::new(4).unwrap();
    // SAFETY: an entry is 64 bytes of integers; the element lives until the command has ended.
    unsafe {
        let entry = std::mem::transmute::<[u8; 64], squeue::Entry>(sqe);
        ring.submission().push(&entry).unwrap();
    }
    ring.submit_and_wait(1).unwrap();
    assert_eq!(ring.completion().next().unwrap().result(), 8);
}

#[test]
fn of_a_batch_that_is_taken_in_part_the_others_are_answered_and_the_device_ends_with_the_reason() {
    if lacks(Features::BATCH_IO) {
        return;
    }
    const CLIENTS: u64 = 4;
    let held = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&held);
    let disk = Builder::with_handlers(4 * MIB, Capabilities::WRITE, move |_| {
        let count = Arc::clone(&count);
        let mut kept = Vec::new();
        move |mut request: Request, _: &mut QueueContext<'_>| {
            if request.op() != Op::Read || request.offset() < MIB {
                let _ = request.complete(Ok::<(), Errno>(()));
                return;
            }
            let len = request.len() as usize;
            request.put(0, &vec![7; len]);
            kept.push(request);
            count.fetch_add(1, Ordering::SeqCst);
            if kept.len() as u64 == CLIENTS {
                commit_by_hand(kept[1].device(), kept[1].tag());
                // All in one turn, and so in one batch.
                for request in kept.drain(..) {
                    let _ = request.complete(Ok::<(), Errno>(()));
                }
            }
        }
    });
    let disk = disk.queue_depth(8).data_path(DataPath::UserCopy).require(Features::BATCH_IO);
    let disk = disk.prefer(Features::NO_AUTO_PART_SCAN).start().unwrap();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|i| {
            let path = disk.path().to_owned();
            std::thread::spawn(move || Client::reader(&path).read(MIB + i * 32768, BLOCK))
        })
        .collect();
    for client in clients {
        let data = bounded("a client's end", move || client.join().unwrap());
        assert_eq!(data.unwrap(), [7; BLOCK]);
    }
    let handle = disk.handle();
    let error = bounded("the device's end", move || handle.wait()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    let text = error.to_string();
    assert!(text.contains("commit a request") && text.contains("EBUSY"), "{text}");
    drop(disk);
    no_devices();
}
