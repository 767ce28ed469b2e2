//! Clients that share memory with the server of their disk.

mod disk;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use disk::kernel::{lacks, offered, refused};
use disk::{Client, SOON, no_devices};
use ublk_core::control::Features;
use ublk_core::targets::{File as FileTarget, Mem, Null};
use ublk_core::{
    Builder, Capabilities, DataPath, Device, Errno, ErrorKind, Op, QueueContext, Request,
    SharedBuffer,
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

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 3) as u8 ^ (i % 239) as u8 ^ seed).collect()
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
fn counting(path: DataPath, shared: &Arc<AtomicU64>) -> Builder {
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
        .require(Features::SHMEM_ZC)
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
    for path in PATHS {
        let shared = Arc::new(AtomicU64::new(0));
        let disk = counting(path, &shared).start().unwrap();
        let buffer = SharedBuffer::new(MIB).unwrap();
        let number = disk.share(&buffer).unwrap();
        exercise(&disk, &buffer);
        let seen = shared.load(Ordering::SeqCst);
        assert!(seen >= 12, "{path}: {seen} requests in shared memory");
        disk.unshare(number).unwrap();
        exercise(&disk, &buffer);
        assert_eq!(shared.load(Ordering::SeqCst), seen, "{path}: not any more");
        disk.stop(SOON).unwrap();
    }
    no_devices();
}

#[test]
fn a_file_moves_data_between_itself_and_shared_memory() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let name = format!("/tmp/ublk-shmem-{}", std::process::id());
    for path in PATHS {
        for batch in [Features::NONE, Features::BATCH_IO] {
            File::create(&name).unwrap().set_len(4 * MIB).unwrap();
            let disk = FileTarget::open(&name).unwrap().builder().data_path(path);
            let disk = disk.require(Features::SHMEM_ZC | batch).start().unwrap();
            let buffers = [SharedBuffer::new(MIB).unwrap(), SharedBuffer::new(MIB).unwrap()];
            for buffer in &buffers {
                disk.share(buffer).unwrap();
                exercise(&disk, buffer);
            }
            disk.stop(SOON).unwrap();
        }
    }
    std::fs::remove_file(&name).unwrap();
    no_devices();
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
    let shared = Arc::new(AtomicU64::new(0));
    let disk = counting(DataPath::Copy, &shared).start().unwrap();
    let buffer = SharedBuffer::from_memfd(memfd(libc::F_SEAL_SHRINK), true).unwrap();
    disk.share(&buffer).unwrap();
    let (client, mapping) = (Client::open(disk.path()), Mapping::of(&buffer));
    let data = pattern(8192, 3);
    mapping.put(0, &data);
    mapping.write(&client, 0, 8192, 0);
    assert_eq!(shared.load(Ordering::SeqCst), 1);
    mapping.put(0, &[0; 8192]);
    mapping.read(&client, 0, 8192, 0);
    assert!(mapping.get(0, 8192) == data);
    assert_eq!(shared.load(Ordering::SeqCst), 1, "copied");
    drop(client);
    disk.stop(SOON).unwrap();
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

#[test]
fn huge_pages_are_shared_where_some_are_reserved() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let reserved = "/proc/sys/vm/nr_hugepages";
    let before = std::fs::read_to_string(reserved);
    if before.is_err() || std::fs::write(reserved, "2").is_err() {
        println!("\nnot run: the kernel has no huge pages");
        return;
    }
    let now: u32 = std::fs::read_to_string(reserved).unwrap().trim().parse().unwrap();
    assert_eq!(now, 2, "reserved");
    let shared = Arc::new(AtomicU64::new(0));
    let disk = counting(DataPath::Copy, &shared).start().unwrap();
    let buffer = SharedBuffer::huge(2 * MIB).unwrap();
    disk.share(&buffer).unwrap();
    exercise(&disk, &buffer);
    assert!(shared.load(Ordering::SeqCst) >= 12);
    disk.stop(SOON).unwrap();
    drop(buffer);
    std::fs::write(reserved, before.unwrap()).unwrap();
}
