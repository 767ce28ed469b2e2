//! Devices whose every command is a bare number, as before Linux 6.4, on kernels that still take them.

mod disk;

use std::path::{Path, PathBuf};
use std::time::Duration;

use disk::{Client, Ram, SOON, Server, bounded, devices, no_devices, patience};
use ublk_core::control::{Control, ControlOptions, DeviceState, Encoding, Features, Wait};
use ublk_core::targets::File;
use ublk_core::{Builder, Ending, ErrorKind};

const MIB: u64 = 1 << 20;

fn legacy() -> Control {
    let control = ControlOptions::new().encoding(Encoding::Legacy).open().unwrap();
    assert_eq!(control.encoding(), Encoding::Legacy);
    control
}

fn write_and_read(path: &Path, fill: u8) {
    let client = Client::open(path);
    client.write(8192, &[fill; 8192]).unwrap();
    client.fsync().unwrap();
    assert_eq!(client.read(8192, 8192).unwrap(), [fill; 8192]);
}

#[test]
fn a_device_lives_a_whole_life_by_bare_numbers() {
    let control = legacy();
    let builder = || Builder::new(MIB, Ram::new(1 << 20)).queues(2).queue_depth(8);
    let added = builder().add(&control).unwrap();
    let id = added.id();
    assert_eq!(control.get_dev_info(id).unwrap().state, DeviceState::Dead);
    let running = added.start().unwrap();
    assert_eq!(control.get_dev_info(id).unwrap().state, DeviceState::Live);
    assert_eq!(control.get_dev_info2(id).unwrap().id, id);
    assert_eq!(control.get_params(id).unwrap().capacity(), MIB);
    assert!(control.get_queue_affinity(id, 0).unwrap().iter().next().is_some());
    write_and_read(running.path(), 7);
    assert_eq!(running.stats().total().rejected, 0);
    assert_eq!(running.stop(SOON).unwrap().ending, Ending::Stopped);
    no_devices();
    // By force, with a client; and only added.
    let running = builder().add(&control).unwrap().start().unwrap();
    let client = Client::open(running.path());
    running.stop_force(SOON).unwrap();
    drop(client);
    drop(builder().add(&control).unwrap());
    no_devices();
    // Errors are the same.
    let e = control.stop_dev(id, &Wait::for_(SOON)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NoSuchDevice);
}

/// Not a test of its own: the server that the test below kills.
#[test]
fn server_process() {
    let Some(path) = disk::role() else { return };
    let running = file_builder(&path).add(&legacy()).unwrap().start().unwrap();
    disk::say(&format!("ready {}", running.id()));
    disk::idle();
}

fn file_builder(path: &str) -> Builder {
    let builder = File::options().create(MIB).open(path).unwrap().builder();
    builder.queue_depth(8).require(Features::USER_RECOVERY)
}

#[test]
fn a_killed_server_s_device_is_recovered_and_handed_over_by_bare_numbers() {
    let store = PathBuf::from(format!("/dev/shm/ublk-legacy-{}", std::process::id()));
    let path = store.to_str().unwrap().to_owned();
    let mut server = Server::start("server_process", &path);
    let id: u32 = server.hear("ready").parse().unwrap();
    let node = PathBuf::from(format!("/dev/ublkb{id}"));
    write_and_read(&node, 3);
    server.kill();
    server.wait();
    let recover = || {
        let builder = file_builder(&path).start_timeout(patience() - Duration::from_secs(10));
        bounded("a recovery", move || builder.recover(id, &legacy()).unwrap())
    };
    let mut running = recover();
    assert_eq!(Client::open(&node).read(8192, 8192).unwrap(), [3; 8192]);
    write_and_read(&node, 4);
    if running.features().contains(Features::QUIESCE) {
        running.hand_over(SOON).unwrap();
        running = recover();
        write_and_read(&node, 5);
    }
    running.stop(SOON).unwrap();
    std::fs::remove_file(&store).unwrap();
    assert_eq!(devices(), []);
}
