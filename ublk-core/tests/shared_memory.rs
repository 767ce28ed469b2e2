//! Clients that share memory with the server of their disk.

mod disk;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use disk::kernel::{lacks, offered, refused};
use disk::{Aligned, Client, SOON, Server, bounded, eventually, no_devices};
use ublk_core::control::{Control, ControlOptions, Features, Wait};
use ublk_core::targets::{File as FileTarget, Mem, Null};
use ublk_core::{
    AsyncBackend, Builder, Capabilities, DataPath, Device, Errno, ErrorKind, Op, QueueContext,
    Request, Ring, SharedBuffer,
};

const MIB: u64 = 1 << 20;

/// A client's own mapping of a shared buffer.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn of(buffer: &SharedBuffer) -> Self {
        let len = buffer.len() as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = buffer.as_file().as_raw_fd();
        // SAFETY: a new mapping.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Mapping { start: NonNull::new(start.cast()).unwrap(), len }
    }

    fn put(&self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.len);
        // SAFETY: inside of the mapping.
        unsafe { self.start.add(at).as_ptr().copy_from(data.as_ptr(), data.len()) };
    }

    fn get(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.len);
        let mut data = vec![0; len];
        // SAFETY: inside of the mapping.
        unsafe { self.start.add(at).as_ptr().copy_to(data.as_mut_ptr(), len) };
        data
    }

    fn write(&self, client: &Client, at: usize, len: usize, offset: u64) {
        // SAFETY: inside of the mapping.
        let n = unsafe {
            let from = self.start.add(at).as_ptr().cast();
            libc::pwrite(client.0.as_raw_fd(), from, len, offset as i64)
        };
        assert_eq!(n, len as isize, "{}", std::io::Error::last_os_error());
    }

    fn read(&self, client: &Client, at: usize, len: usize, offset: u64) {
        // SAFETY: inside of the mapping.
        let n = unsafe {
            let to = self.start.add(at).as_ptr().cast();
            libc::pread(client.0.as_raw_fd(), to, len, offset as i64)
        };
        assert_eq!(n, len as isize, "{}", std::io::Error::last_os_error());
    }
}

// SAFETY: an address range, accessed by raw copies and by the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Different in every 64 bytes.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let mut data = vec![seed; len];
    for (i, piece) in data.chunks_mut(64).enumerate() {
        piece[..8].copy_from_slice(&((i as u64) << 8 | u64::from(seed)).to_le_bytes());
    }
    data
}

/// Writes and reads by way of shared memory, and by other memory, and compares.
fn exercise(disk: &Device, buffer: &SharedBuffer) {
    let (client, mapping) = (Client::open(disk.path()), Mapping::of(buffer));
    for (round, (at, len, offset)) in
        [(0, 4096, 0), (4096, 65536, 8192), (512, 512, 512), (0, 262_144, MIB)]
            .into_iter()
            .enumerate()
    {
        let data = pattern(len, round as u8);
        mapping.put(at, &data);
        mapping.write(&client, at, len, offset);
        mapping.put(at, &vec![0xff; len]);
        // Other memory has it copied.
        assert!(client.read(offset, len).unwrap() == data, "written from {at}, {len} bytes");
        mapping.read(&client, at, len, offset);
        assert!(mapping.get(at, len) == data, "read to {at}, {len} bytes");
        let other = pattern(len, 100 + round as u8);
        client.write(offset, &other).unwrap();
        mapping.read(&client, at, len, offset);
        assert!(mapping.get(at, len) == other);
    }
}

/// A disk in memory that counts the requests which lie in shared memory.
fn counting(path: DataPath, features: Features, shared: &Arc<AtomicU64>) -> Builder {
    let (mem, shared) = (Mem::new(4 * MIB), Arc::clone(shared));
    let handler = move |mut request: Request, _: &mut QueueContext<'_>| {
        shared.fetch_add(u64::from(request.is_shared()), Ordering::SeqCst);
        let at = request.offset();
        let result = match request.op() {
            Op::Read => {
                let mut data = vec![0; request.len() as usize];
                mem.read_at(&mut data, at).map(|()| request.put(0, &data))
            }
            _ => mem.write_at(request.data(), at),
        };
        request.complete(result).unwrap();
    };
    Builder::with_handlers(4 * MIB, Capabilities::WRITE, move |_| handler.clone())
        .data_path(path)
        .require(Features::SHMEM_ZC | features)
}

/// A file as a disk that counts the same.
struct Counted {
    file: FileTarget,
    shared: Arc<AtomicU64>,
}

impl Counted {
    fn builder(path: &str, shared: &Arc<AtomicU64>) -> Builder {
        let file = FileTarget::open(path).unwrap();
        let size = file.size();
        Builder::new_async(size, Counted { file, shared: Arc::clone(shared) })
    }
}

impl AsyncBackend for Counted {
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE | Capabilities::FIXED_BUFFERS
    }
    async fn read(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.shared.fetch_add(u64::from(request.is_shared()), Ordering::SeqCst);
        self.file.read(request, ring).await
    }
    async fn write(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.shared.fetch_add(u64::from(request.is_shared()), Ordering::SeqCst);
        self.file.write(request, ring).await
    }
}

/// The file behind a test's disk, in memory, gone with the test.
struct Store(String);

impl Store {
    fn new(name: &str) -> Self {
        let path = format!("/dev/shm/ublk-{name}-{}", std::process::id());
        File::create(&path).unwrap().set_len(4 * MIB).unwrap();
        Store(path)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// All but the one with which the driver loses the place of the data.
const PATHS: [DataPath; 4] =
    [DataPath::Copy, DataPath::UserCopy, DataPath::ZeroCopy, DataPath::AutoBufReg];

#[test]
fn requests_in_shared_memory_are_served_where_they_are_on_every_path() {
    if !offered().contains(Features::SHMEM_ZC) {
        let e = Null::new().builder(MIB).require(Features::SHMEM_ZC).start().unwrap_err();
        return refused(&e, Features::SHMEM_ZC);
    }
    for (path, features) in every_way() {
        let shared = Arc::new(AtomicU64::new(0));
        let disk = counting(path, features, &shared).start().unwrap();
        let buffer = SharedBuffer::new(MIB).unwrap();
        let number = disk.share(&buffer).unwrap();
        exercise(&disk, &buffer);
        let seen = shared.load(Ordering::SeqCst);
        assert!(seen >= 12, "{path} {features}: {seen} requests in shared memory");
        disk.unshare(number).unwrap();
        exercise(&disk, &buffer);
        assert_eq!(shared.load(Ordering::SeqCst), seen, "{path} {features}: not any more");
        disk.stop(SOON).unwrap();
    }
    no_devices();
}

/// Each path, with commands for each tag and in batches.
fn every_way() -> impl Iterator<Item = (DataPath, Features)> {
    PATHS.into_iter().flat_map(|path| [Features::NONE, Features::BATCH_IO].map(|f| (path, f)))
}

#[test]
fn a_file_moves_data_between_itself_and_shared_memory() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let store = Store::new("shmem");
    for (path, features) in every_way() {
        let shared = Arc::new(AtomicU64::new(0));
        let disk = Counted::builder(&store.0, &shared).data_path(path);
        let disk = disk.require(Features::SHMEM_ZC | features).start().unwrap();
        let buffers = [SharedBuffer::new(MIB).unwrap(), SharedBuffer::new(MIB).unwrap()];
        for buffer in &buffers {
            let before = shared.load(Ordering::SeqCst);
            disk.share(buffer).unwrap();
            exercise(&disk, buffer);
            let seen = shared.load(Ordering::SeqCst) - before;
            assert!(seen >= 12, "{path} {features}: {seen} requests in shared memory");
        }
        disk.stop(SOON).unwrap();
    }
    no_devices();
}

/// One request of two pieces of memory.
fn both(client: &Client, write: bool, pieces: [(*mut u8, usize); 2], offset: u64) {
    let pieces = pieces.map(|(start, len)| libc::iovec { iov_base: start.cast(), iov_len: len });
    // SAFETY: the callers' pieces are memory of theirs, of that length.
    let n = unsafe {
        match write {
            true => libc::pwritev(client.0.as_raw_fd(), pieces.as_ptr(), 2, offset as i64),
            false => libc::preadv(client.0.as_raw_fd(), pieces.as_ptr(), 2, offset as i64),
        }
    };
    let len = pieces[0].iov_len + pieces[1].iov_len;
    assert_eq!(n, len as isize, "{}", io::Error::last_os_error());
}

#[test]
fn a_request_that_lies_only_partly_in_one_buffer_is_copied() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    const PART: usize = 8192;
    for (path, features) in every_way() {
        let shared = Arc::new(AtomicU64::new(0));
        let disk = counting(path, features, &shared).start().unwrap();
        let buffers = [(); 2].map(|()| SharedBuffer::new(MIB).unwrap());
        buffers.iter().for_each(|buffer| assert!(disk.share(buffer).is_ok()));
        let [one, two] = buffers.each_ref().map(Mapping::of);
        let client = Client::open(disk.path());
        let mut own = Aligned::new(PART);
        // SAFETY: within the mappings.
        let (start, gap, end, next) = unsafe {
            let start = one.start.as_ptr();
            (start, start.add(3 * PART), start.add(MIB as usize - PART), two.start.as_ptr())
        };
        let private = own.as_mut_ptr();
        for (round, pieces) in [
            [(end, PART), (private, PART)],
            [(private, PART), (start, PART)],
            // Past the end of one, which is the start of another.
            [(end, PART), (next, PART)],
            // Twice in the same, with a gap.
            [(start, PART), (gap, PART)],
        ]
        .into_iter()
        .enumerate()
        {
            let what = format!("{path} {features}, {round}");
            let data = [pattern(PART, round as u8), pattern(PART, 100 + round as u8)];
            for (piece, data) in pieces.iter().zip(&data) {
                // SAFETY: memory of that length.
                unsafe { piece.0.copy_from(data.as_ptr(), PART) };
            }
            both(&client, true, pieces, MIB);
            assert!(client.read(MIB, 2 * PART).unwrap() == data.concat(), "{what}");
            let other = [pattern(PART, 150 + round as u8), pattern(PART, 200 + round as u8)];
            client.write(MIB, &other.concat()).unwrap();
            both(&client, false, pieces, MIB);
            for (piece, data) in pieces.iter().zip(&other) {
                let mut seen = vec![0; PART];
                // SAFETY: as above.
                unsafe { piece.0.copy_to(seen.as_mut_ptr(), PART) };
                assert!(seen == *data, "{what}");
            }
        }
        assert_eq!(shared.load(Ordering::SeqCst), 0, "{path} {features}");
        drop(client);
        disk.stop(SOON).unwrap();
    }
}

fn memfd(seals: i32) -> OwnedFd {
    // SAFETY: the name is a C string; the descriptor is new.
    unsafe {
        let fd = libc::memfd_create(c"theirs".as_ptr(), libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0 && libc::ftruncate(fd, MIB as i64) == 0);
        assert_eq!(libc::fcntl(fd, libc::F_ADD_SEALS, seals), 0);
        OwnedFd::from_raw_fd(fd)
    }
}

#[test]
fn a_read_only_buffer_serves_writes_of_the_client_alone() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    for (path, features) in every_way() {
        let shared = Arc::new(AtomicU64::new(0));
        let disk = counting(path, features, &shared).start().unwrap();
        let buffer = SharedBuffer::from_memfd(memfd(libc::F_SEAL_SHRINK), true).unwrap();
        disk.share(&buffer).unwrap();
        let (client, mapping) = (Client::open(disk.path()), Mapping::of(&buffer));
        let data = pattern(8192, 3);
        mapping.put(0, &data);
        mapping.write(&client, 0, 8192, 0);
        assert_eq!(shared.load(Ordering::SeqCst), 1, "{path} {features}");
        mapping.put(0, &[0; 8192]);
        mapping.read(&client, 0, 8192, 0);
        assert!(mapping.get(0, 8192) == data, "{path} {features}");
        assert_eq!(shared.load(Ordering::SeqCst), 1, "{path} {features}: copied");
        drop(client);
        disk.stop(SOON).unwrap();
    }
}

#[test]
fn what_cannot_be_shared_is_refused_with_a_reason() {
    let e = SharedBuffer::from_memfd(memfd(libc::F_SEAL_GROW), false).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidParameter);
    assert!(e.to_string().contains("not sealed against shrinking"), "{e}");
    let plain = OwnedFd::from(File::open("/proc/self/exe").unwrap());
    assert!(SharedBuffer::from_memfd(plain, true).unwrap_err().to_string().contains("F_ADD_SEALS"));
    for bytes in [0, 100, (1 << 32) + 4096] {
        let e = SharedBuffer::new(bytes).unwrap_err();
        assert!(e.to_string().contains("a multiple of"), "{e}");
    }
    let lost = Null::new().builder(MIB).data_path(DataPath::NeedGetData);
    let e = lost.require(Features::SHMEM_ZC).start().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidParameter);
    assert!(e.to_string().contains("need-get-data excludes SHMEM_ZC"), "{e}");
    let buffer = SharedBuffer::new(MIB).unwrap();
    let plain = Null::new().builder(MIB).start().unwrap();
    let e = plain.share(&buffer).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert!(e.to_string().contains("SHMEM_ZC (since Linux 7.1)"), "{e}");
    plain.stop(SOON).unwrap();
    if !offered().contains(Features::SHMEM_ZC) {
        return refused(&e, Features::SHMEM_ZC);
    }
    // On a thread that serves the disk the call would wait for itself.
    let handle = Arc::new(Mutex::new(None::<Device>));
    let answer = Arc::new(Mutex::new(None));
    let (theirs, said) = (Arc::clone(&handle), Arc::clone(&answer));
    let disk = Builder::with_handlers(MIB, Capabilities::WRITE, move |_| {
        let (handle, answer) = (Arc::clone(&theirs), Arc::clone(&said));
        move |request: Request, _: &mut QueueContext<'_>| {
            if let Some(disk) = &*handle.lock().unwrap() {
                let shared = disk.share(&SharedBuffer::new(4096).unwrap());
                *answer.lock().unwrap() = Some(shared.unwrap_err().kind());
            }
            request.complete(Ok::<(), Errno>(())).unwrap();
        }
    });
    let disk = disk.require(Features::SHMEM_ZC).start().unwrap();
    *handle.lock().unwrap() = Some(disk.handle());
    read(disk.path());
    assert_eq!(*answer.lock().unwrap(), Some(ErrorKind::WouldDeadlock));
    *handle.lock().unwrap() = None;
    assert_eq!(disk.unshare(7).unwrap_err().errno(), Some(Errno::ENOENT));
    let number = disk.share(&buffer).unwrap();
    assert_eq!(disk.share(&buffer).unwrap_err().errno(), Some(Errno::EEXIST));
    disk.unshare(number).unwrap();
    disk.share(&buffer).unwrap();
    disk.stop(SOON).unwrap();
    no_devices();
}

fn read(path: &Path) {
    Client::open(path).read(0, 4096).unwrap();
}

/// Memory of any file, while a test uses it.
fn any_file(file: File, bytes: u64) -> SharedBuffer {
    file.set_len(bytes).unwrap();
    // SAFETY: nobody else has the file.
    unsafe { SharedBuffer::from_file(file.into(), false) }.unwrap()
}

fn is_used(buffer: &SharedBuffer) {
    let shared = Arc::new(AtomicU64::new(0));
    let disk = counting(DataPath::Copy, Features::NONE, &shared).start().unwrap();
    disk.share(buffer).unwrap();
    exercise(&disk, buffer);
    assert!(shared.load(Ordering::SeqCst) >= 12);
    disk.stop(SOON).unwrap();
}

#[test]
fn a_file_without_a_seal_is_shared_by_whoever_vouches_for_it() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open("/dev/shm");
    is_used(&any_file(file.unwrap(), MIB));
}

const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

/// Two reserved huge pages, for as long as this lives.
struct HugePages(String);

impl HugePages {
    fn reserve() -> Option<Self> {
        let before = std::fs::read_to_string(RESERVED).ok();
        let Some(before) = before.filter(|_| std::fs::write(RESERVED, "2").is_ok()) else {
            println!("\nnot run: the kernel has no huge pages");
            return None;
        };
        let pages = HugePages(before);
        assert_eq!(std::fs::read_to_string(RESERVED).unwrap().trim(), "2", "reserved");
        Some(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(RESERVED, &self.0);
    }
}

/// A hugetlbfs of our own, for as long as this lives.
struct HugeFs(std::path::PathBuf);

impl HugeFs {
    fn mount() -> Self {
        let dir = std::env::temp_dir().join(format!("ublk-huge-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let done = std::process::Command::new("mount")
            .args(["-t", "hugetlbfs", "none"])
            .arg(&dir)
            .status()
            .unwrap();
        assert!(done.success());
        HugeFs(dir)
    }
}

impl Drop for HugeFs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn huge_pages_are_shared_where_some_are_reserved() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let Some(_reserved) = HugePages::reserve() else { return };
    is_used(&SharedBuffer::huge(2 * MIB).unwrap());
    let fs = HugeFs::mount();
    let path = fs.0.join("memory");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    is_used(&any_file(file, 2 * MIB));
}

/// Held requests, by whoever lets go of them.
type Held = Arc<Mutex<Vec<Request>>>;

/// A disk that answers all but the first request beyond 1 MiB, which it holds.
fn holding(held: &Held, answers: &Arc<AtomicU64>) -> Builder {
    let (held, answers) = (Arc::clone(held), Arc::clone(answers));
    let handler = move |request: Request, _: &mut QueueContext<'_>| {
        let first = request.offset() >= MIB && answers.fetch_add(1, Ordering::SeqCst) == 0;
        match first {
            true => held.lock().unwrap().push(request),
            false => request.complete(Ok::<(), Errno>(())).unwrap(),
        }
    };
    Builder::with_handlers(4 * MIB, Capabilities::WRITE, move |_| handler.clone())
        .require(Features::SHMEM_ZC)
        .prefer(Features::NO_AUTO_PART_SCAN)
}

#[test]
fn a_disk_is_not_frozen_for_a_backend_that_keeps_a_request() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let (held, answers) = (Held::default(), Arc::default());
    let impatient = ControlOptions::new().patience(Duration::from_millis(300)).open().unwrap();
    let disk = holding(&held, &answers).add(&impatient).unwrap().start().unwrap();
    let path = disk.path().to_owned();
    let client = std::thread::spawn(move || Client::reader(&path).read_errno(MIB, 4096));
    eventually("a request is held", || !held.lock().unwrap().is_empty());
    let buffer = SharedBuffer::new(MIB).unwrap();
    let e = disk.share(&buffer).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TimedOut, "{e}");
    assert!(e.to_string().contains("the driver was not asked"), "{e}");
    assert_eq!(disk.unshare(0).unwrap_err().kind(), ErrorKind::TimedOut);
    // Others are served.
    let theirs = disk.path().to_owned();
    assert_eq!(bounded("another", move || Client::reader(&theirs).read_errno(0, 4096)), 0);
    // What asks the driver all the same freezes the disk, and is undone when it comes to be at last.
    let mapping = Mapping::of(&buffer);
    let memory = ublk_core::uapi::ublk_shmem_buf_reg {
        addr: mapping.start.as_ptr() as u64,
        len: MIB,
        ..Default::default()
    };
    // SAFETY: mapped for as long as the disk lives, and nobody has a slice of it.
    let e = unsafe { impatient.reg_buf(disk.id(), &memory) }.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TimedOut, "{e}");
    assert_eq!(impatient.outstanding().len(), 1, "{:?}", impatient.outstanding());
    held.lock().unwrap().drain(..).for_each(|r| r.complete(Ok::<(), Errno>(())).unwrap());
    assert_eq!(client.join().unwrap(), 0);
    eventually("it is undone", || impatient.outstanding().is_empty());
    assert_eq!(disk.share(&buffer).unwrap(), 0, "neither the memory nor the number is taken");
    let client = Client::open(disk.path());
    mapping.write(&client, 0, 65536, 0);
    drop(client);
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn threads_that_share_and_unshare_do_not_forget_each_others_memory() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let shared = Arc::new(AtomicU64::new(0));
    let disk = counting(DataPath::Copy, Features::NONE, &shared).start().unwrap();
    std::thread::scope(|scope| {
        for number in 0..3u64 {
            let disk = &disk;
            scope.spawn(move || {
                let buffer = SharedBuffer::new(65536).unwrap();
                let (client, mapping) = (Client::open(disk.path()), Mapping::of(&buffer));
                for round in 0..8 {
                    let number_here = disk.share(&buffer).unwrap();
                    let data = pattern(4096, (number * 50 + round) as u8);
                    mapping.put(0, &data);
                    mapping.write(&client, 0, 4096, number * 8192);
                    mapping.put(0, &[0; 4096]);
                    mapping.read(&client, 0, 4096, number * 8192);
                    assert!(mapping.get(0, 4096) == data);
                    disk.unshare(number_here).unwrap();
                }
            });
        }
    });
    assert_eq!(shared.load(Ordering::SeqCst), 3 * 8 * 2);
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_disk_that_was_halted_shares_anew() {
    if lacks(Features::SHMEM_ZC | Features::IO_DESC_SIZE) {
        return;
    }
    for path in [DataPath::Copy, DataPath::ZeroCopy] {
        let shared = Arc::new(AtomicU64::new(0));
        let mut disk = counting(path, Features::NONE, &shared).start().unwrap();
        let buffers = [(); 3].map(|()| SharedBuffer::new(MIB).unwrap());
        for buffer in &buffers {
            disk.share(buffer).unwrap();
        }
        exercise(&disk, &buffers[1]);
        let seen = shared.load(Ordering::SeqCst);
        disk = bounded("a halt", move || disk.halt(SOON).unwrap().start().unwrap());
        // Nobody has told the new server of it.
        exercise(&disk, &buffers[1]);
        assert_eq!(shared.load(Ordering::SeqCst), seen, "{path}");
        assert_eq!(disk.share(&buffers[1]).unwrap(), 0, "{path}");
        exercise(&disk, &buffers[1]);
        assert!(shared.load(Ordering::SeqCst) >= seen + 12, "{path}");
        disk.stop(SOON).unwrap();
    }
    no_devices();
}

/// A server's disk: a mode of recovery and, behind a `+` each, a data path and `batch`.
fn recoverable(way: &str, store: &str, shared: &Arc<AtomicU64>) -> Builder {
    let mut builder = Counted::builder(store, shared).queue_depth(16).start_timeout(SOON);
    for word in way.split('+') {
        builder = match word {
            "quiesce" => builder.require(Features::USER_RECOVERY),
            "reissue" => builder.require(Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE),
            "batch" => builder.require(Features::BATCH_IO),
            path => builder.data_path(path.parse().unwrap()),
        };
    }
    builder.require(Features::SHMEM_ZC)
}

/// Not a test of its own: the servers that the tests below start, kill, and have hand over.
#[test]
fn server_process() {
    let Some(role) = disk::role() else { return };
    let control = Control::open().unwrap();
    let shared = Arc::new(AtomicU64::new(0));
    let words: Vec<&str> = role.split(' ').collect();
    let (disk, file) = match words[..] {
        ["serve", way, store, file] => {
            (recoverable(way, store, &shared).add(&control).unwrap().start(), file)
        }
        ["recover", id, way, store, file] => {
            (recoverable(way, store, &shared).recover(id.parse().unwrap(), &control), file)
        }
        _ => panic!("no role {role}"),
    };
    let disk = disk.unwrap();
    disk::say(&format!("ready {}", disk.id()));
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let buffer = SharedBuffer::from_memfd(file.into(), false).unwrap();
    loop {
        match disk::order() {
            'r' => {
                let seen = shared.load(Ordering::SeqCst);
                eventually("requests come", || shared.load(Ordering::SeqCst) > seen + 20);
                disk::say("requests in it");
            }
            's' => match disk.share(&buffer) {
                Ok(number) => disk::say(&format!("shared {number}")),
                Err(e) => disk::say(&format!("shared {e}")),
            },
            'u' => {
                disk.unshare(0).unwrap();
                disk::say("unshared");
            }
            'n' => disk::say(&format!("seen {}", shared.load(Ordering::SeqCst))),
            'h' => {
                disk.hand_over(SOON).unwrap();
                disk::say("handed over");
                disk::idle();
            }
            other => panic!("no order {other}"),
        }
    }
}

/// A client that does direct I/O in its mapping of a buffer, until it is dropped.
struct Busy {
    ended: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Busy {
    fn start(path: &Path, buffer: &SharedBuffer) -> Self {
        let (client, mapping) = (Client::open(path), Mapping::of(buffer));
        let (ended, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (end, count) = (Arc::clone(&ended), Arc::clone(&done));
        let thread = std::thread::spawn(move || {
            for round in 0.. {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                let (at, offset) = (round % 7 * 8192, round as u64 % 11 * 16384);
                let data = pattern(8192, round as u8);
                mapping.put(at, &data);
                mapping.write(&client, at, 8192, offset);
                mapping.put(at, &[0xff; 8192]);
                mapping.read(&client, at, 8192, offset);
                assert!(mapping.get(at, 8192) == data, "round {round}");
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Busy { ended, done, thread: Some(thread) }
    }

    fn gets_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        let ended = || self.thread.as_ref().is_some_and(std::thread::JoinHandle::is_finished);
        eventually("the client gets on", || {
            self.done.load(Ordering::Relaxed) > before + 10 || ended()
        });
        assert!(!ended(), "the client has failed");
    }

    fn end(mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let thread = self.thread.take().unwrap();
        bounded("the client's end", move || thread.join()).unwrap();
    }
}

/// A disk with a buffer that outlives its servers.
struct Succession {
    way: &'static str,
    store: Store,
    buffer: SharedBuffer,
    server: Server,
    id: u32,
}

impl Succession {
    fn start(way: &'static str) -> Self {
        let (store, buffer) = (Store::new("shared"), SharedBuffer::new(MIB).unwrap());
        let role = format!("serve {way} {} {}", store.0, file_of(&buffer));
        let mut server = Server::start("server_process", &role);
        let id = server.hear("ready").parse().unwrap();
        Succession { way, store, buffer, server, id }
    }

    fn ask(&mut self, order: u8, word: &str) -> String {
        self.server.order(order);
        self.server.hear(word)
    }

    fn next(&mut self) -> Server {
        let role =
            format!("recover {} {} {} {}", self.id, self.way, self.store.0, file_of(&self.buffer));
        let mut next = Server::start("server_process", &role);
        assert_eq!(next.hear("ready").parse::<u32>().unwrap(), self.id);
        std::mem::replace(&mut self.server, next)
    }

    fn path(&self) -> std::path::PathBuf {
        format!("/dev/ublkb{}", self.id).into()
    }
}

/// Also after a failure: who waits for a disk without a server waits for ever.
impl Drop for Succession {
    fn drop(&mut self) {
        self.server.kill();
        self.server.wait();
        let _ = Control::open().unwrap().delete(self.id, &Wait::for_(SOON));
    }
}

fn file_of(buffer: &SharedBuffer) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), buffer.as_file().as_raw_fd())
}

#[test]
fn clients_in_shared_memory_notice_nothing_of_a_killed_server() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    for (way, kills) in [
        ("reissue+user-copy", 2),
        ("reissue+zero-copy+batch", 1),
        ("reissue+auto-buf-reg+batch", 1),
        // Which is automatic buffer registration, for a file.
        ("reissue+auto", 1),
    ] {
        let mut disk = Succession::start(way);
        assert_eq!(disk.ask(b's', "shared"), "0");
        let client = Busy::start(&disk.path(), &disk.buffer);
        for _ in 0..kills {
            disk.ask(b'r', "requests in it");
            disk.server.kill();
            disk.server.wait();
            disk.next();
            client.gets_on();
            // The driver knows the memory still; its server does not.
            assert_eq!(disk.ask(b'n', "seen"), "0", "{way}");
            let refused = disk.ask(b's', "shared");
            assert!(refused.contains("shared already") && refused.contains("unshare"), "{refused}");
            disk.ask(b'u', "unshared");
            assert_eq!(disk.ask(b's', "shared"), "0", "{way}");
        }
        disk.ask(b'r', "requests in it");
        client.gets_on();
        client.end();
        drop(disk);
        no_devices();
    }
}

#[test]
fn clients_in_shared_memory_notice_nothing_of_a_handover() {
    if lacks(Features::SHMEM_ZC | Features::QUIESCE) {
        return;
    }
    for way in ["quiesce+user-copy", "quiesce+auto-buf-reg", "reissue+zero-copy+batch"] {
        let mut disk = Succession::start(way);
        assert_eq!(disk.ask(b's', "shared"), "0");
        let client = Busy::start(&disk.path(), &disk.buffer);
        disk.ask(b'r', "requests in it");
        disk.ask(b'h', "handed over");
        // The former server lives on, so that nothing is owed to its end.
        let former = disk.next();
        client.gets_on();
        assert_eq!(disk.ask(b's', "shared"), "0", "{way}: the driver has forgotten it");
        disk.ask(b'r', "requests in it");
        drop(former);
        client.end();
        drop(disk);
        no_devices();
    }
}

#[test]
fn a_disk_that_shares_and_is_recovered_has_a_way_to_its_data() {
    let both = Features::SHMEM_ZC | Features::USER_RECOVERY;
    let null = || Null::new().builder(MIB);
    let e = null().require(both).data_path(DataPath::Copy).check().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidParameter);
    for words in ["SHMEM_ZC and USER_RECOVERY", "exclude the data path copy", "use user-copy"] {
        assert!(e.to_string().contains(words), "{e}");
    }
    let e = null().require(both).forbid(Features::USER_COPY).check().unwrap_err();
    assert!(e.to_string().contains("exclude the data path copy"), "{e}");
    if lacks(both) {
        return;
    }
    let disk = null().require(both).start().unwrap();
    assert_eq!(disk.data_path(), DataPath::UserCopy);
    disk.stop(SOON).unwrap();
    // What is only preferred gives way.
    let disk = null().require(Features::USER_RECOVERY).prefer(Features::SHMEM_ZC);
    let disk = disk.data_path(DataPath::Copy).start().unwrap();
    assert!(!disk.features().contains(Features::SHMEM_ZC));
    disk.stop(SOON).unwrap();
    no_devices();
}
