//! The memory of the tags' buffers: used when it is touched, given back when the queue is idle.

mod disk;

use std::time::{Duration, Instant};

use disk::{Aligned, Client, SOON, no_devices, resident_bytes};
use ublk_core::control::Features;
use ublk_core::targets::Null;

const MIB: u64 = 1 << 20;

/// A resident size below `most`, at the latest at the deadline.
fn falls_below(most: u64) -> Result<(), u64> {
    let end = Instant::now() + SOON;
    loop {
        let now = resident_bytes();
        if now < most {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(now);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Keeps many requests of the largest size in flight. Returns the largest resident size seen.
fn load(path: &std::path::Path) -> u64 {
    let clients: Vec<_> = (0..8u64)
        .map(|i| {
            let client = Client::open(path);
            std::thread::spawn(move || {
                let data = Aligned::new(4 << 20);
                for n in 0..4 {
                    client.write((i * 4 + n) % 15 * 4 * MIB, &data).unwrap();
                }
            })
        })
        .collect();
    let mut most = 0;
    while clients.iter().any(|c| !c.is_finished()) {
        most = most.max(resident_bytes());
        std::thread::sleep(Duration::from_millis(1));
    }
    clients.into_iter().for_each(|c| c.join().unwrap());
    most.max(resident_bytes())
}

#[test]
fn a_queues_buffers_cost_nothing_before_and_give_their_memory_back_after() {
    let before = resident_bytes();
    let disk = Null.builder(64 * MIB).queue_depth(128).start().unwrap();
    let started = resident_bytes();
    // 128 buffers of 512 KiB are 64 MiB.
    assert!(started < before + 8 * MIB, "{before} {started}");
    load(disk.path());
    // Older drivers may fill a buffer at any moment, so that none can be given back.
    if disk.features().contains(Features::PER_IO_DAEMON) {
        // The clients' own memory is freed by now; what is left is the buffers'.
        let end = falls_below(started + 8 * MIB);
        assert_eq!(end, Ok(()), "started with {started}");
    }
    // And the disk works on, with fresh memory.
    let client = Client::open(disk.path());
    assert!(client.read(0, 1 << 20).unwrap().iter().all(|b| *b == 0));
    drop(client);
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn the_load_of_these_tests_does_use_the_buffers() {
    let before = resident_bytes();
    let disk = Null.builder(64 * MIB).queue_depth(128).populate(true).start().unwrap();
    let started = resident_bytes();
    assert!(started > before + 60 * MIB, "populated: {before} {started}");
    load(disk.path());
    std::thread::sleep(Duration::from_secs(3));
    assert!(resident_bytes() > before + 60 * MIB, "populated memory stays");
    disk.stop(SOON).unwrap();
    assert_eq!(falls_below(before + 16 * MIB), Ok(()));
}
