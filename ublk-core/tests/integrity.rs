//! Integrity metadata: the kernel makes it, the server keeps it, and the kernel finds what does not fit.

mod disk;

use std::fs;
use std::os::fd::AsRawFd;

use disk::kernel::{lacks, offered, refused};
use disk::{Client, SOON, bounded, no_devices};
use ublk_core::control::{Checksum, Control, Features, Integrity};
use ublk_core::targets::Mem;
use ublk_core::{
    Builder, Capabilities, DataPath, Errno, ErrorKind, Op, QueueContext, Request, Running,
};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

#[test]
fn a_kernel_without_it_is_named_in_the_refusal() {
    if offered().contains(Features::INTEGRITY) {
        println!("\nnot run: this kernel has integrity metadata");
        return;
    }
    let mem = Mem::with_metadata(MIB, Integrity::protection(Checksum::Ip, 512));
    let e = mem.builder().start().unwrap_err();
    refused(&e, Features::INTEGRITY);
}

/// Ways of data and commands that this kernel has.
fn ways() -> Vec<(DataPath, Features)> {
    let offered = Control::open().unwrap().features().unwrap();
    let paths = [
        (DataPath::UserCopy, Features::USER_COPY),
        (DataPath::ZeroCopy, Features::SUPPORT_ZERO_COPY),
        (DataPath::AutoBufReg, Features::AUTO_BUF_REG),
    ];
    let all = paths.into_iter().filter(|(_, feature)| offered.contains(*feature));
    let all = all.flat_map(|(path, _)| [(path, Features::NONE), (path, Features::BATCH_IO)]);
    all.filter(|(_, more)| offered.contains(*more)).collect()
}

fn told(disk: &Running, name: &str) -> String {
    let block = disk.path().file_name().unwrap().to_string_lossy().into_owned();
    let path = format!("/sys/block/{block}/integrity/{name}");
    fs::read_to_string(path).unwrap().trim().to_owned()
}

#[test]
fn what_is_kept_is_what_the_kernel_says_of_the_disk() {
    if lacks(Features::INTEGRITY) {
        return;
    }
    let with = |metadata_size, checksum, pi_offset, reference_tags, capable, tag_size| Integrity {
        metadata_size,
        interval: 512,
        checksum,
        pi_offset,
        tag_size,
        reference_tags,
        capable,
    };
    for (integrity, format, capable) in [
        (with(8, Checksum::None, 0, false, false, 0), "nop", "0"),
        (with(64, Checksum::Ip, 56, false, true, 0), "T10-DIF-TYPE3-IP", "1"),
        (with(8, Checksum::T10Dif, 0, true, false, 2), "T10-DIF-TYPE1-CRC", "0"),
        (with(16, Checksum::Nvme, 0, false, false, 8), "EXT-DIF-TYPE3-CRC64", "0"),
    ] {
        let disk = Mem::with_metadata(MIB, integrity).builder().start().unwrap();
        assert_eq!(disk.data_path(), DataPath::UserCopy);
        assert_eq!(told(&disk, "format"), format);
        assert_eq!(told(&disk, "device_is_integrity_capable"), capable);
        assert_eq!(told(&disk, "protection_interval_bytes"), "512");
        assert_eq!(told(&disk, "tag_size"), integrity.tag_size.to_string());
        Client::open(disk.path()).read(0, BLOCK).unwrap();
        disk.stop(SOON).unwrap();
    }
    no_devices();
}

#[test]
fn the_kernel_protects_what_is_written_and_finds_what_was_changed() {
    if lacks(Features::INTEGRITY) {
        return;
    }
    for (path, more) in ways() {
        for checksum in [Checksum::T10Dif, Checksum::Nvme] {
            let mem = Mem::with_metadata(4 * MIB, Integrity::protection(checksum, 512));
            let disk = mem.builder().queue_depth(8).data_path(path).require(more);
            let disk = disk.start().unwrap();
            let client = Client::open(disk.path());
            let case = format!("{path} {more} {checksum:?}");
            // Never written, so not protected.
            assert_eq!(client.read(MIB, BLOCK).unwrap(), [0; BLOCK], "{case}");
            let data: Vec<u8> = (0..300_000 / 512 * 512).map(|i| (i % 253) as u8).collect();
            client.write(512, &data).unwrap();
            assert!(client.read(512, data.len()).unwrap() == data, "{case}");
            let size = usize::from(checksum.tuple_size());
            let mut metadata = vec![0; size * (data.len() / 512)];
            mem.read_metadata_at(&mut metadata, 512).unwrap();
            for (tuple, block) in metadata.chunks(size).zip(1u32..) {
                assert!(tuple.ends_with(&block.to_be_bytes()), "{case}: it counts blocks");
            }
            // The data changes, and then the metadata.
            mem.write_at(&[0xee], 1024 + 7).unwrap();
            assert_eq!(client.read_errno(512, BLOCK), libc::EILSEQ, "{case}");
            assert_eq!(client.read_errno(5120, BLOCK), 0, "{case}: elsewhere all is well");
            client.write(512, &data[..BLOCK]).unwrap();
            assert_eq!(client.read_errno(512, BLOCK), 0, "{case}: written again");
            mem.write_metadata_at(&vec![1; size], 1024).unwrap();
            assert_eq!(client.read_errno(512, BLOCK), libc::EILSEQ, "{case}");
            // What is discarded is not protected any more.
            let range = [0u64, 4 * MIB];
            // SAFETY: BLKDISCARD reads two numbers.
            let done = unsafe { libc::ioctl(client.0.as_raw_fd(), 0x1277, range.as_ptr()) };
            assert_eq!(done, 0, "{case}");
            assert_eq!(client.read(512, BLOCK).unwrap(), [0; BLOCK], "{case}");
            drop(client);
            assert_eq!(disk.stop(SOON).unwrap().stats.total().rejected, 0, "{case}");
        }
    }
    no_devices();
}

#[test]
fn a_read_without_metadata_is_not_protected_and_shows_nobody_elses() {
    if lacks(Features::INTEGRITY) {
        return;
    }
    let builder =
        Builder::with_handlers(MIB, Capabilities::WRITE | Capabilities::INTEGRITY, |_| {
            |mut request: Request, _: &mut QueueContext<'_>| {
                if request.op() == Op::Read {
                    let len = request.len() as usize;
                    assert_eq!(request.metadata_len(), len / 512 * 8);
                    assert!(request.flags().integrity());
                    let odd = vec![0; request.metadata_len() - 1];
                    assert_eq!(request.put_metadata(&odd), Err(Errno::EINVAL));
                    assert_eq!(request.metadata(&mut [0; 8]), Err(Errno::EINVAL));
                    request.put(0, &vec![5; len]);
                }
                let _ = request.complete(Ok::<_, Errno>(()));
            }
        });
    let builder = builder.integrity(Integrity::protection(Checksum::T10Dif, 512));
    let disk = builder.start().unwrap();
    let client = Client::open(disk.path());
    client.write(0, &[1; BLOCK]).unwrap();
    assert_eq!(client.read(0, BLOCK).unwrap(), [5; BLOCK]);
    drop(client);
    let stats = disk.stop(SOON).unwrap().stats.total();
    assert_eq!((stats.panics, stats.read.errors), (0, 0));
    no_devices();
}

#[test]
fn what_was_protected_stays_so_with_the_next_server_and_the_next_disk() {
    if lacks(Features::INTEGRITY) {
        return;
    }
    let recovery = Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE;
    for (path, more) in ways() {
        let kept = Integrity::protection(Checksum::T10Dif, 512);
        let mem = Mem::with_metadata(MIB, kept);
        let disk = mem.builder().data_path(path).require(recovery | more).start().unwrap();
        let id = disk.id();
        let client = Client::open(disk.path());
        client.write(0, &[1; 2 * BLOCK]).unwrap();
        bounded("the handover", move || disk.hand_over(SOON).unwrap());
        let recover = |mem: Mem| {
            bounded("a recovery", move || mem.builder().recover(id, &Control::open().unwrap()))
        };
        for other in
            [Mem::new(MIB), Mem::with_metadata(MIB, Integrity::protection(Checksum::Nvme, 512))]
        {
            let e = recover(other).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
            assert!(e.to_string().contains("the disk's metadata is"), "{e}");
        }
        let disk = recover(mem.clone()).unwrap();
        let case = format!("{path} {more}");
        let protects = |client: &Client, fill: u8| {
            assert_eq!(client.read(0, 2 * BLOCK).unwrap(), [fill; 2 * BLOCK], "{case}");
            mem.write_at(&[0xee], 7).unwrap();
            assert_eq!(client.read_errno(0, BLOCK), libc::EILSEQ, "{case}");
            client.write(0, &[fill + 1; 2 * BLOCK]).unwrap();
            assert_eq!(client.read(0, 2 * BLOCK).unwrap(), [fill + 1; 2 * BLOCK], "{case}");
        };
        protects(&client, 1);
        drop(client);
        let added = bounded("the halt", move || disk.halt(SOON).unwrap());
        let disk = added.start().unwrap();
        assert_eq!((disk.id(), told(&disk, "format").as_str()), (id, "T10-DIF-TYPE1-CRC"));
        protects(&Client::open(disk.path()), 2);
        assert_eq!(disk.stop(SOON).unwrap().stats.total().rejected, 0, "{case}");
        no_devices();
    }
}
