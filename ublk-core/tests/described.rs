//! Devices that are described anew while there is no disk: what was granted when they were added is what counts.

mod disk;

use disk::cycle::{ram, write_and_read};
use disk::kernel::{lacks, offered};
use disk::{SOON, devices, no_devices};
use ublk_core::control::{Control, Features};
use ublk_core::targets::ZonedMem;
use ublk_core::{Added, Builder, DataPath, ErrorKind, Running, Workers};

const MIB: u64 = 1 << 20;

#[track_caller]
fn refused(added: &mut Added, builder: Builder, kind: ErrorKind, words: &str) {
    let e = added.describe(builder).unwrap_err();
    assert_eq!((e.kind(), e.device()), (kind, Some(added.id())), "{e}");
    assert!(e.to_string().contains(words), "{e}");
    assert_eq!(devices(), [added.id()], "it stays");
}

/// The former description, whatever was refused.
fn goes_on(added: Added) -> Running {
    let running = added.start().unwrap();
    write_and_read(&running);
    running
}

#[test]
fn what_a_device_was_not_granted_is_refused_and_it_goes_on_as_it_was() {
    let mut added = ram().add(&Control::open().unwrap()).unwrap();
    let user_copy = ram().data_path(DataPath::UserCopy);
    refused(&mut added, user_copy, ErrorKind::Unsupported, "USER_COPY");
    let zones = ZonedMem::options().create(4 * MIB, MIB).unwrap().builder();
    refused(&mut added, zones, ErrorKind::Unsupported, "ZONED");
    let deeper = ram().queue_depth(64).workers_per_queue(9);
    if offered().contains(Features::PER_IO_DAEMON) {
        refused(&mut added, deeper, ErrorKind::InvalidParameter, "1 to the queue depth, 8");
    } else {
        refused(&mut added, deeper, ErrorKind::Unsupported, "PER_IO_DAEMON");
    }
    goes_on(added).stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_zoned_device_is_not_described_without_zones() {
    let control = Control::open().unwrap();
    let zoned = || ZonedMem::options().create(4 * MIB, MIB).unwrap().builder();
    let mut added = zoned().add(&control).unwrap();
    refused(&mut added, ram(), ErrorKind::InvalidParameter, "with zones");
    added.describe(zoned()).unwrap();
    added.start().unwrap().stop(SOON).unwrap();
    no_devices();
}

/// Several workers would each hand its backend a buffer of its own, when the driver has copied to the first one's.
#[test]
fn workers_share_no_queue_of_a_device_that_was_granted_batches_and_copies() {
    if lacks(Features::BATCH_IO) {
        return;
    }
    let control = Control::open().unwrap();
    for builder in [ram().prefer(Features::BATCH_IO), ram().require(Features::BATCH_IO)] {
        let mut added = builder.add(&control).unwrap();
        assert!(added.features().contains(Features::BATCH_IO));
        for again in [false, true] {
            let two = || ram().workers_per_queue(2);
            refused(&mut added, two(), ErrorKind::InvalidParameter, "the driver does not copy");
            let copying = two().prefer(Features::BATCH_IO);
            refused(&mut added, copying, ErrorKind::InvalidParameter, "the driver does not copy");
            // By what it says of itself it would be fine.
            let other = two().require(Features::BATCH_IO).data_path(DataPath::UserCopy);
            refused(&mut added, other, ErrorKind::Unsupported, "USER_COPY");
            let pooled = two().workers(&Workers::new(1).unwrap());
            refused(&mut added, pooled, ErrorKind::InvalidParameter, "a pool's workers");
            let running = goes_on(added);
            if again {
                running.stop(SOON).unwrap();
                break;
            }
            added = running.halt(SOON).unwrap();
        }
    }
    // Where it does not copy, a device that works in batches needs no PER_IO_DAEMON.
    let batch = || ram().data_path(DataPath::UserCopy).prefer(Features::BATCH_IO);
    let mut added = batch().add(&control).unwrap();
    added.describe(ram().workers_per_queue(2)).unwrap();
    goes_on(added).stop(SOON).unwrap();
    no_devices();
}
