//! What another process sees of a server that dies: it is killed at every moment of its life, and what it leaves
//! can be deleted.

mod disk;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use disk::{Client, Ram, SOON, Server, bounded, devices, no_devices};
use ublk_core::control::{Control, Features, Wait};
use ublk_core::{Builder, Capabilities, Errno, ErrorKind, QueueContext, Request};

const MIB: u64 = 1 << 20;

fn ram() -> Builder {
    Builder::new(MIB, Ram::new(1 << 20)).queue_depth(8)
}

/// Not a test of its own: the servers that the tests below start and kill.
#[test]
fn server_process() {
    let Some(role) = disk::role() else { return };
    match role.as_str() {
        "added" => {
            let control = Control::open().unwrap();
            let added = ram().add(&control).unwrap();
            disk::say(&format!("ready {}", added.id()));
            disk::idle();
        }
        "forgotten" => {
            let running = ram().start().unwrap();
            disk::say(&format!("ready {}", running.id()));
            std::mem::forget(running);
            // As main would: without destructors.
            std::process::exit(0);
        }
        "starting" => {
            // The fetches of one queue are submitted, those of the other are not: START waits.
            let control = Control::open().unwrap();
            let builder = Builder::with_handlers(MIB, Capabilities::WRITE, |queue| {
                if queue == 1 {
                    disk::say("fetching");
                    disk::idle();
                }
                |request: Request, _: &mut QueueContext<'_>| drop(request)
            });
            let added = builder.queues(2).queue_depth(8).add(&control).unwrap();
            disk::say(&format!("ready {}", added.id()));
            let id = added.id();
            // START itself is on its way as well.
            std::thread::spawn(move || {
                let _ = control.start_dev(id, std::process::id() as i32, &Wait::forever());
            });
            let _ = added.start();
            disk::idle();
        }
        "idle" => {
            let running = ram().start().unwrap();
            disk::say(&format!("ready {}", running.id()));
            disk::idle();
        }
        "holding" => {
            let held = Arc::new(Mutex::new(Vec::new()));
            let on = Arc::new(AtomicBool::new(false));
            let (keep, holding) = (Arc::clone(&held), Arc::clone(&on));
            let running = Builder::with_handlers(MIB, Capabilities::WRITE, move |_| {
                let (keep, holding) = (Arc::clone(&keep), Arc::clone(&holding));
                move |request: Request, _: &mut QueueContext<'_>| {
                    if holding.load(Ordering::Relaxed) {
                        keep.lock().unwrap().push(request);
                        disk::say("held");
                    } else {
                        let _ = request.complete(Ok::<(), Errno>(()));
                    }
                }
            })
            .queue_depth(8)
            // A held scan of the partitions would keep everybody from opening the disk.
            .prefer(Features::NO_AUTO_PART_SCAN)
            .start()
            .unwrap();
            on.store(true, Ordering::Relaxed);
            disk::say(&format!("ready {}", running.id()));
            disk::idle();
        }
        // Its whole life again and again, so that a kill meets any moment of it.
        "passing" => loop {
            // Where the kernel looks for partitions behind a start's back, that is a client like any other.
            let quiet = ram().prefer(Features::NO_AUTO_PART_SCAN);
            let running = quiet.start().unwrap();
            let scans = !running.features().contains(Features::NO_AUTO_PART_SCAN);
            disk::say(&format!("ready {}", running.id()));
            running.stop(SOON).unwrap();
            if scans {
                // A start that reads the disk is no moment to be killed in: a dead end as well.
                disk::idle();
            }
        },
        "clear" => clear_all(),
        other => panic!("no role {other}"),
    }
}

/// Deletes what an earlier test left behind: `UBLK_TEST_ROLE=clear`, for loops by hand.
fn clear_all() {
    let control = Control::open().unwrap();
    for id in devices() {
        let _ = control.delete(id, &Wait::for_(SOON));
    }
}

fn server(role: &str) -> (Server, u32) {
    let mut server = Server::start("server_process", role);
    let id = server.hear("ready").parse().unwrap();
    (server, id)
}

/// Nobody uses the disk: SIGKILL of a server whose STOP, or START, waits for a request is a dead end of the kernel, which
/// `docs/gotchas.md` describes.
#[test]
fn a_server_killed_while_it_stops_leaves_what_can_be_deleted() {
    for round in 0..20 {
        let (mut server, _) = server("passing");
        // From the middle of a stop to well into the next start, on a fast machine and a slow one.
        std::thread::sleep(Duration::from_micros(400 * round * round));
        server.kill();
        server.wait();
        bounded("the deletion", || {
            let control = Control::open().unwrap();
            for id in devices() {
                match control.delete(id, &Wait::for_(SOON)) {
                    Ok(()) => {}
                    Err(e) => assert_eq!(e.kind(), ErrorKind::NoSuchDevice, "{e}"),
                }
            }
        });
        no_devices();
    }
    // The driver takes new devices: nobody is stuck with its mutex.
    let disk = bounded("another start", || ram().start().unwrap());
    disk.stop(SOON).unwrap();
    no_devices();
}

/// Deletes what a dead server left, in whatever state it is by then.
fn clear(id: u32) {
    bounded("the deletion", move || {
        let control = Control::open().unwrap();
        match control.delete(id, &Wait::for_(SOON)) {
            Ok(()) => {}
            Err(e) => assert_eq!(e.kind(), ErrorKind::NoSuchDevice, "{e}"),
        }
    });
    no_devices();
}

#[test]
fn a_server_killed_after_add_leaves_what_can_be_deleted() {
    let (mut server, id) = server("added");
    server.kill();
    server.wait();
    clear(id);
}

#[test]
fn a_server_killed_while_it_starts_leaves_what_can_be_deleted() {
    if std::thread::available_parallelism().unwrap().get() < 2 {
        println!("needs two CPUs, for two queues");
        return;
    }
    let (mut server, id) = server("starting");
    server.hear("fetching");
    server.kill();
    server.wait();
    clear(id);
}

#[test]
fn an_idle_server_killed_leaves_what_can_be_deleted() {
    let (mut server, id) = server("idle");
    server.kill();
    server.wait();
    clear(id);
}

#[test]
fn a_server_that_forgot_its_disk_and_ended_leaves_what_can_be_deleted() {
    let (mut server, id) = server("forgotten");
    assert!(server.wait().success());
    clear(id);
}

fn killed_with_requests(requests: u64) {
    let (mut server, id) = server("holding");
    let clients: Vec<_> = (0..requests)
        .map(|i| {
            let client = Client::reader(Path::new(&format!("/dev/ublkb{id}")));
            // Apart, so that the block layer does not merge them.
            std::thread::spawn(move || client.read_errno(i * 8192, 4096))
        })
        .collect();
    for _ in 0..requests {
        server.hear("held");
    }
    server.kill();
    server.wait();
    // On 6.12 the requests of a queue whose every tag is out are failed by the block layer's timeout of 30
    // seconds only.
    for client in clients {
        let errno = bounded("the client gets its error", move || client.join().unwrap());
        assert_eq!(errno, libc::EIO);
    }
    clear(id);
}

#[test]
fn a_server_killed_with_some_requests_leaves_what_can_be_deleted() {
    killed_with_requests(3);
}

#[test]
fn a_server_killed_with_every_tag_out_leaves_what_can_be_deleted() {
    killed_with_requests(8);
}
