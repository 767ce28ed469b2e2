//! Zoned disks: what clients see of the zones, and what reaches the backend of what they do.

mod btrfs;
mod disk;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io};

use disk::kernel::lacks;
use disk::{Client, SOON, bounded, no_devices};
use ublk_core::control::{Control, DeviceState, Features, Zoned};
use ublk_core::targets::ZonedMem;
use ublk_core::{
    AsyncBackend, Backend, Builder, Capabilities, DataPath, Device, Errno, ErrorKind, Op,
    QueueContext, Request, RequestFlags, Ring, RingFile, Zone, ZoneAction, ZoneKind, ZoneState,
};

const MIB: u64 = 1 << 20;
const ZONE: u64 = 4 * MIB;
const BLOCK: u64 = 4096;

#[repr(C)]
struct Range {
    sector: u64,
    sectors: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Reported {
    start: u64,
    len: u64,
    wp: u64,
    kind: u8,
    state: u8,
    flags: [u8; 6],
    capacity: u64,
    reserved: [u8; 24],
}

#[repr(C)]
struct Report {
    sector: u64,
    count: u32,
    flags: u32,
    zones: [Reported; 64],
}

const BLKREPORTZONE: u64 = 0xC010_1282;
const BLKRESETZONE: u64 = 0x4010_1283;
const BLKGETZONESZ: u64 = 0x8004_1284;
const BLKGETNRZONES: u64 = 0x8004_1285;
const BLKOPENZONE: u64 = 0x4010_1286;
const BLKCLOSEZONE: u64 = 0x4010_1287;
const BLKFINISHZONE: u64 = 0x4010_1288;

/// The zones from byte `offset` on, as the kernel reports them.
fn report(client: &Client, offset: u64) -> Vec<Reported> {
    let mut report =
        Report { sector: offset >> 9, count: 64, flags: 0, zones: [Reported::default(); 64] };
    // SAFETY: a report with room for as many zones as it says.
    let done = unsafe { libc::ioctl(client.0.as_raw_fd(), BLKREPORTZONE as _, &raw mut report) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    report.zones[..report.count as usize].to_vec()
}

/// Does something with `count` zones; the errno, 0 for success.
fn act(client: &Client, action: u64, first: u64, count: u64) -> i32 {
    let range = Range { sector: (first * ZONE) >> 9, sectors: (count * ZONE) >> 9 };
    // SAFETY: the ioctls read a range.
    match unsafe { libc::ioctl(client.0.as_raw_fd(), action as _, &raw const range) } {
        0 => 0,
        _ => io::Error::last_os_error().raw_os_error().unwrap(),
    }
}

fn number(client: &Client, ask: u64) -> u32 {
    let mut number = 0u32;
    // SAFETY: the ioctls write a u32.
    let done = unsafe { libc::ioctl(client.0.as_raw_fd(), ask as _, &raw mut number) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    number
}

fn limit(device: &Device, name: &str) -> String {
    let block = device.path().file_name().unwrap().to_string_lossy().into_owned();
    fs::read_to_string(format!("/sys/block/{block}/queue/{name}")).unwrap().trim().to_owned()
}

fn state(mem: &ZonedMem, zone: usize) -> ZoneState {
    mem.zones()[zone].state
}

/// The paths that this kernel has for zoned disks, with and without batches.
fn ways() -> Vec<(DataPath, Features)> {
    let offered = Control::open().unwrap().features().unwrap();
    let paths = [
        (DataPath::UserCopy, Features::USER_COPY),
        (DataPath::ZeroCopy, Features::SUPPORT_ZERO_COPY),
        (DataPath::AutoBufReg, Features::AUTO_BUF_REG),
    ];
    let all = paths.into_iter().filter(|(_, feature)| offered.contains(*feature));
    let all = all.flat_map(|(path, _)| [(path, Features::NONE), (path, Features::BATCH_IO)]);
    // The driver does not get this one right, and the builder refuses it.
    let refused = (DataPath::AutoBufReg, Features::BATCH_IO);
    all.filter(|way| offered.contains(way.1) && *way != refused).collect()
}

#[test]
fn clients_see_the_zones_that_the_backend_has() {
    let mem = ZonedMem::options().conventional(2).zone_capacity(3 * MIB).max_open(4).max_active(6);
    let mem = mem.max_append_bytes(256 << 10).create(16 * ZONE, ZONE).unwrap();
    // A report of 16 zones is 1,024 bytes: any buffer takes it.
    let disk = mem.builder().logical_block_size(BLOCK as u32).start().unwrap();
    assert!(disk.features().contains(Features::ZONED));
    assert_eq!(disk.data_path(), DataPath::UserCopy);
    assert_eq!(limit(&disk, "zoned"), "host-managed");
    assert_eq!(limit(&disk, "max_open_zones"), "4");
    assert_eq!(limit(&disk, "max_active_zones"), "6");
    assert_eq!(limit(&disk, "zone_append_max_bytes"), (256 << 10).to_string());
    assert_eq!(limit(&disk, "nr_zones"), "16");
    let client = Client::open(disk.path());
    assert_eq!((number(&client, BLKGETZONESZ), number(&client, BLKGETNRZONES)), (8192, 16));
    client.write(2 * ZONE, &[5; 3 * BLOCK as usize]).unwrap();
    let all = report(&client, 0);
    assert_eq!(all.len(), 16);
    for (zone, told) in mem.zones().iter().zip(&all) {
        assert_eq!((told.start << 9, told.len << 9), (zone.start, ZONE));
        assert_eq!(told.capacity << 9, zone.capacity);
    }
    assert_eq!((all[0].kind, all[0].state, all[0].capacity), (1, 0, 8192));
    assert_eq!((all[2].kind, all[2].state, all[2].capacity), (2, 2, 6144));
    assert_eq!(all[2].wp, (2 * ZONE + 3 * BLOCK) >> 9);
    assert_eq!((all[3].state, all[3].wp), (1, (3 * ZONE) >> 9));
    assert_eq!(report(&client, 13 * ZONE), all[13..], "from the middle");
    // By hand the driver would do it, and the kernel know of no zone more.
    let control = Control::open().unwrap();
    let by_hand = control.update_size(disk.id(), 32 * ZONE).unwrap_err();
    for e in [disk.resize(32 * ZONE).unwrap_err(), by_hand] {
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    }
    assert_eq!(control.get_dev_info(disk.id()).unwrap().capacity, Some(16 * ZONE));
    drop(client);
    let stats = disk.stop(SOON).unwrap().stats.total();
    assert!(stats.zone_report.completed >= 2, "at the start, and for the clients");
    assert_eq!((stats.rejected, stats.zone_report.errors), (0, 0));
    no_devices();
}

#[test]
fn zones_that_do_not_fit_one_answer_are_asked_for_in_several() {
    // 64 zones of a report fill a request of 4 KiB.
    let mem = ZonedMem::options().create(300 * MIB, MIB).unwrap();
    let disk = mem.builder().max_io_bytes(4096).start().unwrap();
    let client = Client::open(disk.path());
    assert_eq!(number(&client, BLKGETNRZONES), 300);
    let middle = report(&client, 100 * MIB);
    assert_eq!((middle.len(), middle[63].start << 9), (64, 163 * MIB));
    drop(client);
    assert!(disk.stop(SOON).unwrap().stats.total().zone_report.completed >= 6);
    no_devices();
}

#[test]
fn zones_are_opened_closed_finished_and_reset() {
    let mem = ZonedMem::options().conventional(1).create(8 * ZONE, ZONE).unwrap();
    let disk = mem.builder().start().unwrap();
    let client = Client::open(disk.path());
    assert_eq!(act(&client, BLKOPENZONE, 1, 2), 0);
    assert_eq!([1, 2, 3].map(|z| state(&mem, z)), {
        use ZoneState::{Empty, ExplicitlyOpen};
        [ExplicitlyOpen, ExplicitlyOpen, Empty]
    });
    client.write(ZONE, &[1; BLOCK as usize]).unwrap();
    assert_eq!(act(&client, BLKCLOSEZONE, 1, 2), 0);
    assert_eq!((state(&mem, 1), state(&mem, 2)), (ZoneState::Closed, ZoneState::Empty));
    assert_eq!(act(&client, BLKFINISHZONE, 1, 1), 0);
    assert_eq!(state(&mem, 1), ZoneState::Full);
    assert_eq!(client.write_errno(ZONE + BLOCK, &[2; BLOCK as usize]), libc::EIO, "it is full");
    assert_eq!(client.read(ZONE, BLOCK as usize).unwrap(), [1; BLOCK as usize]);
    assert_eq!(client.read(ZONE + BLOCK, BLOCK as usize).unwrap(), [0; BLOCK as usize]);
    assert_eq!(act(&client, BLKRESETZONE, 1, 1), 0);
    assert_eq!(state(&mem, 1), ZoneState::Empty);
    assert_eq!(client.read(ZONE, BLOCK as usize).unwrap(), [0; BLOCK as usize]);
    for zone in [0, 3, 5] {
        client.write(zone * ZONE, &[3; BLOCK as usize]).unwrap();
    }
    assert_eq!(act(&client, BLKRESETZONE, 0, 8), 0, "all");
    assert!(mem.zones()[1..].iter().all(|zone| zone.state == ZoneState::Empty));
    assert_eq!(client.read(0, BLOCK as usize).unwrap(), [3; BLOCK as usize], "conventional");
    drop(client);
    let stats = disk.stop(SOON).unwrap().stats.total();
    assert!(stats.zone_action.completed >= 6, "{:?}", stats.zone_action.completed);
    assert_eq!((stats.zone_action.errors, stats.rejected), (0, 0));
    no_devices();
}

#[test]
fn writes_elsewhere_than_at_the_write_pointer_fail() {
    let mem = ZonedMem::options().create(4 * ZONE, ZONE).unwrap();
    let disk = mem.builder().start().unwrap();
    let client = Client::open(disk.path());
    let block = [7; BLOCK as usize];
    assert_eq!(client.write_errno(ZONE + BLOCK, &block), libc::EIO);
    // After a write that failed, the kernel wants to see the zone's write pointer.
    report(&client, ZONE);
    client.write(ZONE, &block).unwrap();
    assert_eq!(client.write_errno(ZONE, &block), libc::EIO);
    report(&client, ZONE);
    client.write(ZONE + BLOCK, &block).unwrap();
    assert_eq!(mem.zones()[1].write_pointer, ZONE + 2 * BLOCK);
    drop(client);
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn limits_reach_the_client_by_their_own_errors() {
    let mem = ZonedMem::options().max_open(2).max_active(3).create(8 * ZONE, ZONE).unwrap();
    let disk = mem.builder().start().unwrap();
    let client = Client::open(disk.path());
    let block = [7; BLOCK as usize];
    for zone in 0..3 {
        client.write(zone * ZONE, &block).unwrap();
    }
    assert_eq!(state(&mem, 0), ZoneState::Closed, "to make room");
    assert_eq!(client.write_errno(3 * ZONE, &block), libc::EOVERFLOW, "a fourth active zone");
    assert_eq!(act(&client, BLKFINISHZONE, 0, 1), 0);
    assert_eq!(act(&client, BLKOPENZONE, 1, 2), 0);
    assert_eq!(act(&client, BLKOPENZONE, 3, 1), libc::ETOOMANYREFS, "a third open zone");
    report(&client, 3 * ZONE);
    assert_eq!(act(&client, BLKCLOSEZONE, 1, 1), 0);
    client.write(3 * ZONE, &block).unwrap();
    drop(client);
    disk.stop(SOON).unwrap();
    no_devices();
}

/// What btrfs wants at least, and some.
const ZONES: u64 = 80;

fn without_btrfs() -> bool {
    let without = !btrfs::is_known();
    if without {
        println!("\nnot run: this kernel has no btrfs, which appends");
    }
    without
}

/// Has the file's data written, and waits for it.
fn write_out(file: &fs::File) {
    let all = libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: numbers.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, all) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

#[test]
fn four_writers_append_on_every_path_and_each_finds_its_data() {
    if without_btrfs() {
        return;
    }
    for (path, more) in ways() {
        let mem = ZonedMem::options().max_append_bytes(64 << 10).create(ZONES * ZONE, ZONE);
        let builder = mem.unwrap().builder().logical_block_size(BLOCK as u32).queues(4);
        let disk = builder.queue_depth(8).data_path(path).require(more).start().unwrap();
        assert_eq!(disk.data_path(), path);
        btrfs::make(disk.path());
        let mount = btrfs::Mount::new(disk.path());
        std::thread::scope(|scope| {
            for writer in 0..4u8 {
                let at = mount.file(&format!("{writer}"));
                scope.spawn(move || {
                    let mut file = fs::File::create(at).unwrap();
                    for round in 0..6u8 {
                        file.write_all(&[writer * 6 + round + 1; 100_000]).unwrap();
                        // Not fsync: of several at a time on zones, btrfs fails some with EAGAIN.
                        write_out(&file);
                    }
                });
            }
        });
        drop(mount);
        // Nothing is cached any more.
        let mount = btrfs::Mount::new(disk.path());
        for writer in 0..4u8 {
            let data = fs::read(mount.file(&format!("{writer}"))).unwrap();
            assert_eq!(data.len(), 600_000, "{path} {more}");
            for (round, piece) in (0..6u8).zip(data.chunks(100_000)) {
                assert!(piece.iter().all(|b| *b == writer * 6 + round + 1), "{path} {more}");
            }
        }
        drop(mount);
        let stats = disk.stop(SOON).unwrap().stats.total();
        let (append, errors) = (&stats.zone_append, stats.zone_append.errors);
        assert_eq!((errors, stats.rejected, stats.write.errors), (0, 0, 0), "{path} {more}");
        assert!(append.completed >= 24 && append.bytes >= 4 * 600_000, "{path} {more}");
    }
    no_devices();
}

/// Says that appends went one block further than they did.
struct Liar(ZonedMem, AtomicU64);

impl Backend for Liar {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read(buf, offset)
    }
    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> io::Result<usize> {
        self.0.write(data, offset, flags)
    }
    fn report_zones(&self, offset: u64, count: u32) -> io::Result<Vec<Zone>> {
        self.0.report_zones(offset, count)
    }
    fn append(&self, data: &[u8], zone: u64, flags: RequestFlags) -> io::Result<u64> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Ok(self.0.append(data, zone, flags)? + BLOCK)
    }
    fn zone_action(&self, action: ZoneAction, zone: u64) -> io::Result<()> {
        self.0.zone_action(action, zone)
    }
}

#[test]
fn an_append_went_where_the_backend_says() {
    if without_btrfs() {
        return;
    }
    let mem = ZonedMem::options().create(ZONES * ZONE, ZONE).unwrap();
    let zoned = Zoned { zone_bytes: ZONE, max_open: 0, max_active: 0, max_append_bytes: 64 << 10 };
    let backend = Arc::new(Liar(mem, AtomicU64::new(0)));
    let builder = Builder::new(ZONES * ZONE, Arc::clone(&backend)).zoned(zoned);
    let disk = builder.logical_block_size(BLOCK as u32).start().unwrap();
    btrfs::make(disk.path());
    let mount = btrfs::Mount::new(disk.path());
    let at = mount.file("file");
    fs::write(&at, [7; 8192]).unwrap();
    fs::File::open(&at).unwrap().sync_all().unwrap();
    drop(mount);
    let mount = btrfs::Mount::new(disk.path());
    // It looks where the disk said, and finds something else.
    let e = fs::read(&at).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::EIO));
    assert!(backend.1.load(Ordering::Relaxed) > 0);
    drop(mount);
    disk.stop(SOON).unwrap();
    no_devices();
}

/// Keeps the data in a file, to which it goes by the ring; the zones' states are another's.
struct Asynchronous {
    zones: ZonedMem,
    data: RingFile,
}

impl Asynchronous {
    async fn store(&self, request: &Request, at: u64, ring: &Ring) -> io::Result<()> {
        let len = request.len() as usize;
        match ring.write_from_request(&self.data, at, request, 0..len, false).await? {
            n if n == len => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}

impl AsyncBackend for Asynchronous {
    fn capabilities(&self) -> Capabilities {
        self.zones.capabilities()
    }
    async fn read(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        let (at, len) = (request.offset(), request.len() as usize);
        match ring.read_to_request(&self.data, at, request, 0..len).await? {
            n if n == len => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
    async fn write(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        let zeroes = vec![0; request.len() as usize];
        self.zones.write(&zeroes, request.offset(), request.flags())?;
        self.store(request, request.offset(), ring).await
    }
    async fn report_zones(&self, offset: u64, count: u32, _: &Ring) -> io::Result<Vec<Zone>> {
        self.zones.report_zones(offset, count)
    }
    async fn append(&self, request: &mut Request, ring: &Ring) -> io::Result<u64> {
        let zeroes = vec![0; request.len() as usize];
        let at = self.zones.append(&zeroes, request.offset(), request.flags())?;
        self.store(request, at, ring).await?;
        Ok(at)
    }
    async fn zone_action(&self, action: ZoneAction, zone: u64, _: &Ring) -> io::Result<()> {
        self.zones.zone_action(action, zone)
    }
}

#[test]
fn an_asynchronous_backend_appends_by_its_ring_on_every_path() {
    let name = format!("/tmp/ublk-zoned-{}", std::process::id());
    for (path, more) in ways() {
        let options =
            fs::File::options().read(true).write(true).create(true).truncate(true).clone();
        let file = options.open(&name).unwrap();
        file.set_len(ZONES * ZONE).unwrap();
        let zones = ZonedMem::options().create(ZONES * ZONE, ZONE).unwrap();
        let zoned =
            Zoned { zone_bytes: ZONE, max_open: 0, max_active: 0, max_append_bytes: 64 << 10 };
        let backend = Asynchronous { zones: zones.clone(), data: RingFile::new(file) };
        let builder = Builder::new_async(ZONES * ZONE, backend).zoned(zoned);
        let builder = builder.logical_block_size(BLOCK as u32).queue_depth(16);
        let disk = builder.data_path(path).require(more).start().unwrap();
        let client = Client::open(disk.path());
        client.write(ZONE, &[4; BLOCK as usize]).unwrap();
        assert_eq!(act(&client, BLKCLOSEZONE, 1, 1), 0);
        assert_eq!(state(&zones, 1), ZoneState::Closed);
        assert_eq!(report(&client, ZONE)[0].wp << 9, ZONE + BLOCK);
        assert_eq!(client.read(ZONE, BLOCK as usize).unwrap(), [4; BLOCK as usize]);
        assert_eq!(act(&client, BLKRESETZONE, 1, 1), 0);
        drop(client);
        if btrfs::is_known() {
            btrfs::make(disk.path());
            let data: Vec<u8> = (0..700_000).map(|i| (i / 4096 + i % 249) as u8).collect();
            let mount = btrfs::Mount::new(disk.path());
            fs::write(mount.file("file"), &data).unwrap();
            drop(mount);
            let mount = btrfs::Mount::new(disk.path());
            assert!(fs::read(mount.file("file")).unwrap() == data, "{path} {more}");
            drop(mount);
            let append = disk.stats().total().zone_append;
            assert!(append.bytes >= 700_000 && append.completed >= 10, "{path} {more}");
        }
        let stats = disk.stop(SOON).unwrap().stats.total();
        assert_eq!((stats.rejected, stats.unregistered, stats.zone_append.errors), (0, 0, 0));
    }
    fs::remove_file(&name).unwrap();
    no_devices();
}

#[test]
fn a_report_without_zones_fails_the_start_and_leaves_nothing() {
    let zoned = Zoned { zone_bytes: ZONE, max_open: 0, max_active: 0, max_append_bytes: 64 << 10 };
    for empty in [false, true] {
        let caps = Capabilities::WRITE | Capabilities::ZONED;
        let builder = Builder::with_handlers(8 * ZONE, caps, move |_| {
            move |request: Request, _: &mut QueueContext<'_>| {
                let _ = match request.op() {
                    // The kernel would ask for ever.
                    Op::ReportZones if empty => request.complete_report(&[]),
                    _ => request.complete(Ok::<_, io::Error>(())),
                };
            }
        });
        let e = builder.zoned(zoned).start().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Io, "{e}");
        no_devices();
    }
}

#[test]
fn zones_that_the_kernel_does_not_take_fail_the_start_by_their_name() {
    let zoned = Zoned { zone_bytes: ZONE, max_open: 0, max_active: 0, max_append_bytes: 64 << 10 };
    type Spoil = fn(&mut Zone);
    let sound: Spoil = |_| ();
    for (what, spoil) in [
        ("sound", sound),
        ("a capacity beyond the zone", |zone| zone.capacity = ZONE + BLOCK),
        ("no capacity", |zone| zone.capacity = 0),
        ("a gap", |zone| zone.start += BLOCK),
        ("another length", |zone| zone.len = ZONE / 2),
        ("room left in a conventional zone", |zone| {
            zone.kind = ZoneKind::Conventional;
            zone.state = ZoneState::NoWritePointer;
            zone.capacity = ZONE / 2;
        }),
    ] {
        let caps = Capabilities::WRITE | Capabilities::ZONED;
        let builder = Builder::with_handlers(8 * ZONE, caps, move |_| {
            move |request: Request, _: &mut QueueContext<'_>| {
                let first = request.offset() / ZONE;
                let zone = |number| {
                    let start = number * ZONE;
                    let (kind, state) = (ZoneKind::Sequential, ZoneState::Empty);
                    let (len, capacity) = (ZONE, ZONE);
                    let mut zone = Zone { start, len, capacity, write_pointer: start, kind, state };
                    if number == 1 {
                        spoil(&mut zone);
                    }
                    zone
                };
                let _ = match request.op() {
                    Op::ReportZones => {
                        let zones: Vec<_> =
                            (first..first + u64::from(request.zones())).map(zone).collect();
                        request.complete_report(&zones)
                    }
                    _ => request.complete(Ok::<_, io::Error>(())),
                };
            }
        });
        match builder.zoned(zoned).start() {
            Ok(disk) => {
                assert_eq!(what, "sound");
                assert_eq!(disk.state().unwrap(), DeviceState::Live);
                disk.stop(SOON).unwrap();
            }
            Err(e) => {
                assert_eq!(
                    (e.kind(), e.errno()),
                    (ErrorKind::InvalidParameter, Some(Errno::ENODEV)),
                    "{what}: {e}"
                );
                assert!(
                    e.to_string().contains("refuses the zones that the backend reports"),
                    "{what}: {e}"
                );
                assert_ne!(what, "sound", "{e}");
            }
        }
        no_devices();
    }
}

/// Where its zones' write pointers are is the next server's to know, and the next disk's.
#[test]
fn a_zoned_disk_is_handed_over_recovered_halted_and_started() {
    // The last because it came with what lets a device start twice.
    if lacks(Features::QUIESCE | Features::IO_DESC_SIZE) {
        return;
    }
    let options = || ZonedMem::options().conventional(1).max_open(3);
    let recovery = Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE;
    for (path, more) in ways() {
        let mem = options().create(4 * ZONE, ZONE).unwrap();
        let builder = mem.builder().data_path(path).require(recovery | more);
        let disk = builder.start().unwrap();
        let id = disk.id();
        let client = Client::open(disk.path());
        let block = |n: u8| [n; BLOCK as usize];
        let write_pointer = || report(&client, ZONE)[0].wp << 9;
        client.write(ZONE, &block(1)).unwrap();
        assert_eq!(act(&client, BLKFINISHZONE, 2, 1), 0);
        bounded("the handover", move || disk.hand_over(SOON).unwrap());
        let recover = |mem: &ZonedMem| {
            let builder = mem.builder();
            bounded("a recovery", move || builder.recover(id, &Control::open().unwrap()))
        };
        let other = options().max_open(2).create(4 * ZONE, ZONE).unwrap();
        let e = recover(&other).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
        assert!(e.to_string().contains("the disk's zones are"), "{e}");
        let disk = recover(&mem).unwrap();
        assert_eq!(disk.data_path(), path);
        assert_eq!(write_pointer(), ZONE + BLOCK, "{path} {more}");
        client.write(ZONE + BLOCK, &block(2)).unwrap();
        assert_eq!(client.write_errno(ZONE, &block(9)), libc::EIO, "not at the write pointer");
        assert_eq!(write_pointer(), ZONE + 2 * BLOCK, "{path} {more}");
        assert_eq!(client.read(ZONE, 8192).unwrap(), [block(1), block(2)].concat());
        assert_eq!(client.write_errno(2 * ZONE, &block(9)), libc::EIO, "it is full");
        assert_eq!(act(&client, BLKRESETZONE, 2, 1), 0);
        client.write(2 * ZONE, &block(4)).unwrap();
        drop(client);
        // Its next disk is asked for its zones anew.
        let added = bounded("the halt", move || disk.halt(SOON).unwrap());
        assert_eq!(added.id(), id);
        let disk = added.start().unwrap();
        assert_eq!(limit(&disk, "zoned"), "host-managed");
        let client = Client::open(disk.path());
        let pointers: Vec<_> = report(&client, 0).iter().map(|zone| zone.wp << 9).collect();
        assert_eq!(pointers[1..], [ZONE + 2 * BLOCK, 2 * ZONE + BLOCK, 3 * ZONE], "{path} {more}");
        client.write(ZONE + 2 * BLOCK, &block(3)).unwrap();
        assert_eq!(client.read(ZONE + 2 * BLOCK, BLOCK as usize).unwrap(), block(3));
        drop(client);
        assert_eq!(disk.stop(SOON).unwrap().stats.total().rejected, 0, "{path} {more}");
        no_devices();
    }
}

#[test]
fn appends_go_on_with_the_next_server() {
    if lacks(Features::QUIESCE) || without_btrfs() {
        return;
    }
    let recovery = Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE;
    let most = [(DataPath::UserCopy, Features::NONE), (DataPath::ZeroCopy, Features::BATCH_IO)];
    for (path, more) in ways().into_iter().filter(|way| most.contains(way)) {
        let mem = ZonedMem::options().create(ZONES * ZONE, ZONE).unwrap();
        let builder = mem.builder().logical_block_size(BLOCK as u32).data_path(path);
        let disk = builder.require(recovery | more).start().unwrap();
        let id = disk.id();
        btrfs::make(disk.path());
        let mount = btrfs::Mount::new(disk.path());
        let append = |name: u8| {
            let mut file = fs::File::create(mount.file(&name.to_string())).unwrap();
            file.write_all(&[name; 100_000]).unwrap();
            write_out(&file);
        };
        append(1);
        bounded("the handover", move || disk.hand_over(SOON).unwrap());
        let disk = mem.builder().recover(id, &Control::open().unwrap()).unwrap();
        append(2);
        drop(mount);
        let mount = btrfs::Mount::new(disk.path());
        for name in [1, 2] {
            let data = fs::read(mount.file(&name.to_string())).unwrap();
            assert!(data.len() == 100_000 && data.iter().all(|b| *b == name), "{path} {more}");
        }
        drop(mount);
        let stats = disk.stop(SOON).unwrap().stats.total();
        assert!(stats.zone_append.completed > 0, "{path} {more}");
        assert_eq!((stats.zone_append.errors, stats.rejected), (0, 0), "{path} {more}");
        no_devices();
    }
}
