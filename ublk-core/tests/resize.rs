//! Disks that grow and shrink, and what the kernel looks for on a new one.

mod disk;

use std::process::Command;
use std::time::Duration;

use disk::kernel::{lacks, offered, refused};
use disk::{Client, Ram, SOON, eventually, no_devices};
use ublk_core::control::{Control, Features, SECTOR};
use ublk_core::{Backend, Builder, Device, ErrorKind, RequestFlags};

const MIB: u64 = 1 << 20;

fn ram(size: u64) -> Builder {
    Builder::new(size, Ram::new(64 << 20)).queue_depth(8)
}

fn blockdev(disk: &Device) -> u64 {
    let out = Command::new("/sbin/blockdev").arg("--getsize64").arg(disk.path()).output().unwrap();
    assert!(out.status.success(), "{out:?}");
    String::from_utf8(out.stdout).unwrap().trim().parse().unwrap()
}

/// Every place that says the size says this one.
fn is(disk: &Device, bytes: u64) {
    assert_eq!(blockdev(disk), bytes);
    assert_eq!(disk.params().capacity(), bytes);
    let sysfs = format!("/sys/block/ublkb{}/size", disk.id());
    let sectors: u64 = std::fs::read_to_string(sysfs).unwrap().trim().parse().unwrap();
    assert_eq!(sectors * SECTOR, bytes);
    let control = Control::open().unwrap();
    assert_eq!(control.get_params(disk.id()).unwrap().capacity(), bytes);
    let client = Client::open(disk.path());
    client.write(bytes - 4096, &[7; 4096]).unwrap();
    assert_eq!(client.read(bytes - 4096, 4096).unwrap(), [7; 4096]);
    // Past the end there is nothing.
    assert_eq!(client.read_errno(bytes, 4096), libc::ENODATA);
    assert_eq!(client.write_errno(bytes, &[1; 4096]), libc::ENOSPC);
}

#[test]
fn a_disk_grows_and_shrinks_and_everybody_sees_it() {
    let disk = ram(8 * MIB).start().unwrap();
    if !offered().contains(Features::UPDATE_SIZE) {
        let e = disk.resize(16 * MIB).unwrap_err();
        is(&disk, 8 * MIB);
        disk.stop(SOON).unwrap();
        return refused(&e, Features::UPDATE_SIZE);
    }
    is(&disk, 8 * MIB);
    // Somebody who has it open sees it, too.
    let kept = Client::open(disk.path());
    for size in [16 * MIB, 4 * MIB, 4 * MIB, 64 * MIB, 4096] {
        disk.resize(size).unwrap();
        is(&disk, size);
        kept.read(size - 4096, 4096).unwrap();
    }
    // What was written beyond the end of a disk that shrank is the backend's, not the kernel's.
    disk.resize(16 * MIB).unwrap();
    assert_eq!(kept.read(16 * MIB - 4096, 4096).unwrap(), [7; 4096]);
    drop(kept);
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_size_that_no_disk_has_is_refused_and_changes_nothing() {
    if lacks(Features::UPDATE_SIZE) {
        return;
    }
    let disk = ram(8 * MIB).logical_block_size(4096).start().unwrap();
    for (size, words) in [(4096 + 512, "multiple"), (0, "no bytes"), (1 << 63, "2^63")] {
        let e = disk.resize(size).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
        assert!(e.to_string().contains(words), "{e}");
    }
    is(&disk, 8 * MIB);
    let handle = disk.handle();
    disk.stop(SOON).unwrap();
    assert_eq!(handle.resize(MIB).unwrap_err().kind(), ErrorKind::WrongState);
    assert_eq!(handle.params().capacity(), 8 * MIB);
}

#[test]
fn a_file_system_grows_with_its_disk() {
    if lacks(Features::UPDATE_SIZE) {
        return;
    }
    let run = |program: &str, args: &[&std::ffi::OsStr]| {
        let out = Command::new(program).args(args).output().unwrap();
        assert!(out.status.success(), "{program}: {out:?}");
    };
    let disk = ram(16 * MIB).start().unwrap();
    let path = disk.path().as_os_str();
    run("/sbin/mkfs.ext4", &["-q".as_ref(), path]);
    let point = std::env::temp_dir().join(format!("ublk-resize-{}", std::process::id()));
    std::fs::create_dir_all(&point).unwrap();
    run("mount", &["-t".as_ref(), "ext4".as_ref(), path, point.as_os_str()]);
    std::fs::write(point.join("file"), vec![5; 1 << 20]).unwrap();
    let too_much = vec![6; 30 << 20];
    let e = std::fs::write(point.join("large"), &too_much).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
    // Back again before the file system takes what it got, which it does not notice.
    for size in [64 * MIB, 16 * MIB] {
        disk.resize(size).unwrap();
        assert_eq!(blockdev(&disk), size);
        std::fs::write(point.join("between"), size.to_string()).unwrap();
        run("sync", &["-f".as_ref(), point.as_os_str()]);
        let file = Client::reader(&point.join("file")).read(0, 1 << 20).unwrap();
        assert!(file == vec![5; 1 << 20], "not from a cache");
        assert_eq!(std::fs::read_to_string(point.join("between")).unwrap(), size.to_string());
    }
    disk.resize(64 * MIB).unwrap();
    run("/sbin/resize2fs", &[path]);
    std::fs::write(point.join("large"), &too_much).unwrap();
    run("umount", &[point.as_os_str()]);
    run("/sbin/e2fsck", &["-f".as_ref(), "-n".as_ref(), path]);
    run("mount", &["-t".as_ref(), "ext4".as_ref(), path, point.as_os_str()]);
    assert!(std::fs::read(point.join("file")).unwrap() == vec![5; 1 << 20]);
    assert!(std::fs::read(point.join("large")).unwrap() == too_much);
    run("umount", &[point.as_os_str()]);
    disk.stop(SOON).unwrap();
    no_devices();
}

/// A disk with one partition in its table.
fn partitioned() -> Builder {
    let ram = Ram::new(8 << 20);
    let mut table = [0; 512];
    table[446 + 4] = 0x83;
    table[446 + 8..][..4].copy_from_slice(&2048u32.to_le_bytes());
    table[446 + 12..][..4].copy_from_slice(&4096u32.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    ram.write(&table, 0, RequestFlags::default()).unwrap();
    Builder::new(8 * MIB, ram)
}

#[test]
fn partitions_are_looked_for_unless_that_is_not_wanted() {
    let partition = |disk: &Device| {
        let id = disk.id();
        std::path::PathBuf::from(format!("/sys/block/ublkb{id}/ublkb{id}p1"))
    };
    let disk = partitioned().start().unwrap();
    eventually("the partition is found", || partition(&disk).exists());
    disk.stop(SOON).unwrap();
    let quiet = partitioned().require(Features::NO_AUTO_PART_SCAN);
    if !offered().contains(Features::NO_AUTO_PART_SCAN) {
        return refused(&quiet.start().unwrap_err(), Features::NO_AUTO_PART_SCAN);
    }
    let disk = quiet.start().unwrap();
    Client::open(disk.path()).read(MIB, 4096).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(!partition(&disk).exists());
    // Who asks for them gets them.
    let asked = Command::new("/sbin/blockdev").arg("--rereadpt").arg(disk.path()).status();
    assert!(asked.unwrap().success());
    eventually("the partition is found", || partition(&disk).exists());
    disk.stop(SOON).unwrap();
    no_devices();
}
