//! Clients that share memory with the server of their disk.

mod disk;
mod sharing;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use disk::kernel::{lacks, offered, refused};
use disk::{Aligned, Client, SOON, bounded, eventually, impatience, no_devices};
use sharing::{Counted, MIB, Mapping, Store, counting, exercise, pattern};
use ublk_core::control::{ControlOptions, Features};
use ublk_core::targets::Null;
use ublk_core::{
    Builder, Capabilities, DataPath, Device, Errno, ErrorKind, QueueContext, Request, SharedBuffer,
};

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
        let disk = Counted::builder(&store.0, &shared, Duration::ZERO).data_path(path);
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
        if std::fs::read_to_string(RESERVED).unwrap().trim() != "2" {
            println!("\nnot run: the kernel finds no memory for huge pages");
            return None;
        }
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
    let impatient = ControlOptions::new().patience(impatience()).open().unwrap();
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
    assert_eq!(disk.stop(SOON).unwrap().stats.total().shared, 3 * 8 * 2);
    no_devices();
}
