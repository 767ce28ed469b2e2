//! Clients with mappings of shared memory, and disks that count the requests which lie in it.
#![allow(dead_code, reason = "no suite uses all of it")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ublk_core::control::Features;
use ublk_core::targets::{File as FileTarget, Mem};
use ublk_core::{
    AsyncBackend, Builder, Capabilities, DataPath, Device, Op, QueueContext, Request, Ring,
    SharedBuffer,
};

use crate::disk::Client;

pub(crate) const MIB: u64 = 1 << 20;

/// A client's own mapping of a shared buffer.
pub(crate) struct Mapping {
    pub(crate) start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    pub(crate) fn of(buffer: &SharedBuffer) -> Self {
        let len = buffer.len() as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = buffer.as_file().as_raw_fd();
        // SAFETY: a new mapping.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Mapping { start: NonNull::new(start.cast()).unwrap(), len }
    }

    pub(crate) fn put(&self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.len);
        // SAFETY: inside of the mapping.
        unsafe { self.start.add(at).as_ptr().copy_from(data.as_ptr(), data.len()) };
    }

    pub(crate) fn get(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.len);
        let mut data = vec![0; len];
        // SAFETY: inside of the mapping.
        unsafe { self.start.add(at).as_ptr().copy_to(data.as_mut_ptr(), len) };
        data
    }

    pub(crate) fn write(&self, client: &Client, at: usize, len: usize, offset: u64) {
        // SAFETY: inside of the mapping.
        let n = unsafe {
            let from = self.start.add(at).as_ptr().cast();
            libc::pwrite(client.0.as_raw_fd(), from, len, offset as i64)
        };
        assert_eq!(n, len as isize, "{}", std::io::Error::last_os_error());
    }

    pub(crate) fn read(&self, client: &Client, at: usize, len: usize, offset: u64) {
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
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let mut data = vec![seed; len];
    for (i, piece) in data.chunks_mut(64).enumerate() {
        piece[..8].copy_from_slice(&((i as u64) << 8 | u64::from(seed)).to_le_bytes());
    }
    data
}

/// Writes and reads by way of shared memory, and by other memory, and compares.
pub(crate) fn exercise(disk: &Device, buffer: &SharedBuffer) {
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
pub(crate) fn counting(path: DataPath, features: Features, shared: &Arc<AtomicU64>) -> Builder {
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
pub(crate) struct Counted {
    file: FileTarget,
    shared: Arc<AtomicU64>,
    /// What each request takes at least.
    time: Duration,
}

impl Counted {
    pub(crate) fn builder(path: &str, shared: &Arc<AtomicU64>, time: Duration) -> Builder {
        let file = FileTarget::open(path).unwrap();
        let size = file.size();
        Builder::new_async(size, Counted { file, shared: Arc::clone(shared), time })
    }

    async fn begin(&self, request: &Request, ring: &Ring) {
        self.shared.fetch_add(u64::from(request.is_shared()), Ordering::SeqCst);
        if !self.time.is_zero() {
            ring.sleep(self.time).await;
        }
    }
}

impl AsyncBackend for Counted {
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE | Capabilities::FIXED_BUFFERS
    }
    async fn read(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.begin(request, ring).await;
        self.file.read(request, ring).await
    }
    async fn write(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        self.begin(request, ring).await;
        self.file.write(request, ring).await
    }
}

/// The file behind a test's disk, in memory, gone with the test.
pub(crate) struct Store(pub(crate) String);

impl Store {
    pub(crate) fn new(name: &str) -> Self {
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
