//! Several files as one disk, on every data path: each byte is where the layout says, parts that fail fail their
//! request, and flushes and discards reach every member that they concern.

mod disk;

use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use disk::kernel::lacks;
use disk::{Client, SOON, no_devices};
use ublk_core::control::{Control, Features};
use ublk_core::targets::{Action, Fault, Mem, OnWorker, Rule, Stripe};
use ublk_core::{Builder, DataPath, Errno, Op};

const MIB: u64 = 1 << 20;

/// Files of one test, removed at the end.
struct Members(Vec<PathBuf>);

impl Members {
    fn new(name: &str, count: usize) -> Self {
        let folder = PathBuf::from(format!("/dev/shm/ublk-stripe-{name}-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        Members((0..count).map(|i| folder.join(i.to_string())).collect())
    }

    /// The disk's bytes, put together from the members without the library's help.
    fn contents(&self, chunk: usize) -> Vec<u8> {
        let members: Vec<_> = self.0.iter().map(|path| fs::read(path).unwrap()).collect();
        let stripes = members[0].len() / chunk;
        let mut disk = Vec::new();
        for stripe in 0..stripes {
            for member in &members {
                disk.extend_from_slice(&member[stripe * chunk..][..chunk]);
            }
        }
        disk
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0[0].parent().unwrap());
    }
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut byte = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..len).map(|_| byte()).collect()
}

/// BLKDISCARD and BLKZEROOUT.
fn ioctl_range(client: &Client, request: libc::c_ulong, offset: u64, len: u64) {
    let range = [offset, len];
    // SAFETY: both ioctls read two u64.
    let done = unsafe { libc::ioctl(client.0.as_raw_fd(), request as _, &range) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

#[test]
fn every_byte_is_where_the_layout_says_on_every_path() {
    let offered = Control::open().unwrap().features().unwrap();
    let paths = [
        (DataPath::Auto, Features::NONE),
        (DataPath::Copy, Features::NONE),
        (DataPath::NeedGetData, Features::NEED_GET_DATA),
        (DataPath::UserCopy, Features::USER_COPY),
        (DataPath::ZeroCopy, Features::SUPPORT_ZERO_COPY),
        (DataPath::AutoBufReg, Features::AUTO_BUF_REG),
    ];
    // One that cuts requests into hundreds of pieces, one that is no power of two, one that most fit into.
    let shapes = [(512u64, 3usize), (10_752, 5), (256 << 10, 2), (4096, 1)];
    for (path, _) in paths.into_iter().filter(|(_, needed)| offered.contains(*needed)) {
        for (chunk, count) in shapes {
            let members = Members::new("paths", count);
            let stripe = Stripe::options().chunk(chunk).create(2 * MIB).open(&members.0).unwrap();
            let size = stripe.size();
            assert!(size >= 2 * MIB && size % (chunk * count as u64) == 0);
            let disk = stripe.builder().data_path(path).queue_depth(8).start().unwrap();
            if path == DataPath::Auto && offered.contains(Features::AUTO_BUF_REG) {
                assert_eq!(disk.data_path(), DataPath::AutoBufReg);
            }
            let client = Client::open(disk.path());
            let mut expected = vec![0; size as usize];
            let ranges = [
                (0, 512),
                (chunk - 512, 1024),
                (1536, 131_072),
                (chunk, chunk.min(MIB)),
                (MIB - 512, 512 * 1024 + 1024),
                (size - 4096, 4096),
            ];
            for (seed, (offset, len)) in ranges.into_iter().enumerate() {
                let data = noise(len as usize, seed as u64 + 1);
                assert_eq!(client.write(offset, &data).unwrap(), data.len());
                expected[offset as usize..][..data.len()].copy_from_slice(&data);
            }
            let what = format!("{path}, {count} members, chunks of {chunk}");
            for (offset, len) in ranges.into_iter().chain([(0, MIB), (MIB, MIB)]) {
                let read = client.read(offset, len as usize).unwrap();
                assert!(read == expected[offset as usize..][..len as usize], "{what}: {offset}");
            }
            // Across members, beginning and ending within a chunk.
            ioctl_range(&client, BLKDISCARD, 8192 + 512, 600 << 10);
            expected[8192 + 512..][..600 << 10].fill(0);
            ioctl_range(&client, BLKZEROOUT, MIB + 1024, 300 << 10);
            expected[MIB as usize + 1024..][..300 << 10].fill(0);
            for (offset, len) in [(0, MIB), (MIB, MIB)] {
                let read = client.read(offset, len as usize).unwrap();
                assert!(read == expected[offset as usize..][..len as usize], "{what}: zeroed");
            }
            client.fsync().unwrap();
            assert!(members.contents(chunk as usize) == expected, "{what}: the members");
            drop(client);
            let stats = disk.stop(SOON).unwrap().stats.total();
            assert_eq!((stats.rejected, stats.unregistered), (0, 0), "{what}");
            assert_eq!((stats.read.errors, stats.write.errors), (0, 0), "{what}");
        }
    }
    no_devices();
}

#[test]
fn a_part_that_fails_fails_its_request_and_no_other() {
    let members = Members::new("fails", 3);
    let stripe = Stripe::options().chunk(4096).create(3 * MIB).open(&members.0).unwrap();
    let disk = stripe.builder().start().unwrap();
    let client = Client::open(disk.path());
    client.write(0, &vec![7; MIB as usize]).unwrap();
    // Member 1 loses what is beyond its first chunk.
    fs::File::options().write(true).open(&members.0[1]).unwrap().set_len(4096).unwrap();
    assert_eq!(client.read(0, 3 * 4096).unwrap(), [7; 3 * 4096]);
    assert_eq!(client.read_errno(3 * 4096, 3 * 4096), libc::EIO);
    assert_eq!(client.read_errno(4 * 4096, 4096), libc::EIO);
    assert_eq!(client.read(5 * 4096, 2 * 4096).unwrap(), [7; 2 * 4096]);
    // A write makes it grow again.
    client.write(4 * 4096, &[9; 4096]).unwrap();
    assert_eq!(client.read(4 * 4096, 4096).unwrap(), [9; 4096]);
    drop(client);
    disk.stop(SOON).unwrap();
}

/// A stripe over disks of our own, which count and fail.
#[test]
fn flushes_and_errors_of_members_that_are_disks_come_through() {
    let lower: Vec<_> = (0..2)
        .map(|_| {
            let fault = Fault::new(OnWorker(Cached(Mem::new(4 * MIB))));
            let faults = fault.faults();
            (Builder::new_async(4 * MIB, fault).start().unwrap(), faults)
        })
        .collect();
    let paths: Vec<_> = lower.iter().map(|(disk, _)| disk.path().to_owned()).collect();
    let stripe = Stripe::options().chunk(64 << 10).direct(true).open(&paths).unwrap();
    assert_eq!(stripe.size(), 8 * MIB);
    let twice = Stripe::open([&paths[0], &paths[0]]).unwrap_err();
    assert_eq!(twice.errno(), Some(Errno::EBUSY), "{twice}");
    let disk = stripe.builder().start().unwrap();
    let client = Client::open(disk.path());
    let flushes =
        || lower.iter().map(|(d, _)| d.stats().total().flush.completed).collect::<Vec<_>>();
    // Both have something to make durable: the block layer does not send a flush for nothing.
    client.write(0, &[1; 128 << 10]).unwrap();
    let before = flushes();
    client.fsync().unwrap();
    let after = flushes();
    assert!(after[0] > before[0] && after[1] > before[1], "{before:?} {after:?}");
    // Any member that cannot flush is a flush that failed.
    for (_, faults) in &lower {
        faults.add(Rule::new(Action::Error(Errno::EIO)).ops([Op::Flush]).limit(1)).unwrap();
        client.write(0, &[2; 128 << 10]).unwrap();
        assert_eq!(client.fsync().unwrap_err().raw_os_error(), Some(libc::EIO));
        client.fsync().unwrap();
    }
    // The errno of the part that failed; of two, that of the first.
    lower[1].1.add(Rule::new(Action::Error(Errno::ENOSPC)).ops([Op::Write])).unwrap();
    assert_eq!(client.write_errno(0, &[3; 64 << 10]), 0);
    assert_eq!(client.write_errno(0, &[3; 128 << 10]), libc::ENOSPC);
    lower[0].1.add(Rule::new(Action::Error(Errno::ETIMEDOUT)).ops([Op::Write])).unwrap();
    assert_eq!(client.write_errno(0, &[3; 128 << 10]), libc::ETIMEDOUT);
    lower.iter().for_each(|(_, faults)| faults.clear());
    // Parts are under way at the same time: both members have theirs while neither answers.
    for (_, faults) in &lower {
        faults.add(Rule::new(Action::Hold).ops([Op::Write]).limit(1)).unwrap();
    }
    let writer = std::thread::spawn(move || {
        client.write(0, &[4; 128 << 10]).unwrap();
        client
    });
    assert!(lower.iter().all(|(_, faults)| faults.wait_held(1, SOON)));
    assert_eq!(lower[0].1.release(), 1);
    assert!(!writer.is_finished());
    assert_eq!(lower[1].1.release(), 1);
    drop(writer.join().unwrap());
    disk.stop(SOON).unwrap();
    for (disk, _) in lower {
        disk.stop(SOON).unwrap();
    }
    no_devices();
}

/// Memory that says it has a volatile cache, so that flushes come.
struct Cached(Mem);

impl ublk_core::Backend for Cached {
    fn capabilities(&self) -> ublk_core::Capabilities {
        ublk_core::Capabilities::WRITE | ublk_core::Capabilities::FLUSH
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.0.read_at(buf, offset).map(|()| buf.len())
    }
    fn write(
        &self,
        data: &[u8],
        offset: u64,
        _: ublk_core::RequestFlags,
    ) -> std::io::Result<usize> {
        self.0.write_at(data, offset).map(|()| data.len())
    }
    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn members_in_another_order_do_not_recover_a_disk() {
    let members = Members::new("recovers", 2);
    let options = Stripe::options().chunk(4096).create(2 * MIB);
    let open = |members: [&PathBuf; 2]| options.open(members).unwrap().builder();
    let [a, b] = &members.0[..] else { unreachable!("two") };
    let disk = open([a, b]).require(Features::USER_RECOVERY).start().unwrap();
    let id = disk.id();
    let client = Client::open(disk.path());
    client.write(0, &[1; 4096]).unwrap();
    client.write(4096, &[2; 4096]).unwrap();
    drop(client);
    let control = Control::open().unwrap();
    if lacks(Features::QUIESCE) {
        disk.stop(SOON).unwrap();
        return;
    }
    disk.hand_over(SOON).unwrap();
    let e = open([b, a]).recover(id, &control).unwrap_err();
    assert!(e.to_string().contains("fingerprint"), "{e}");
    let disk = open([a, b]).recover(id, &control).unwrap();
    let client = Client::open(disk.path());
    assert_eq!(client.read(0, 8192).unwrap(), [[1; 4096], [2; 4096]].concat());
    drop(client);
    disk.stop_force(SOON).unwrap();
    no_devices();
}
