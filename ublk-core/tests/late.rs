//! Commands that succeed after their callers have given up: what came to be belongs to nobody, and is undone.

mod disk;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use disk::{SOON, devices, eventually, impatience, no_devices};
use ublk_core::control::{
    AddDevice, Control, ControlOptions, DeviceParams, FeatureRequest, Features, Wait,
};
use ublk_core::{Builder, Capabilities, Errno, ErrorKind, QueueContext, Request, Running};

const SIZE: u64 = 1 << 20;
/// The number of what is added too late: nobody else's.
const LATE: u32 = 77;

fn impatient() -> ControlOptions {
    ControlOptions::new().patience(impatience())
}

/// Requests that are held, as long as there is a list to hold them in.
type Held = Arc<Mutex<Option<Vec<Request>>>>;

fn is_held(held: &Held) -> bool {
    held.lock().unwrap().as_ref().is_some_and(|held| !held.is_empty())
}

fn answer(request: Request) {
    let _ = request.complete(Ok::<(), Errno>(()));
}

/// A disk that holds a request. Its deletion waits for that, and keeps the driver from adding others.
struct Blocked {
    disk: Running,
    held: Held,
    client: JoinHandle<std::io::Result<Vec<u8>>>,
    deletion: JoinHandle<ublk_core::Result<()>>,
}

impl Blocked {
    fn new() -> Self {
        let held = Held::default();
        let theirs = Arc::clone(&held);
        let disk = Builder::with_handlers(SIZE, Capabilities::NONE, move |_| {
            let held = Arc::clone(&theirs);
            move |request: Request, _: &mut QueueContext<'_>| match &mut *held.lock().unwrap() {
                Some(held) => held.push(request),
                None => answer(request),
            }
        });
        let disk = disk.prefer(Features::NO_AUTO_PART_SCAN).start().unwrap();
        *held.lock().unwrap() = Some(Vec::new());
        let (id, path) = (disk.id(), disk.path().to_owned());
        let client = std::thread::spawn(move || fs::read(path));
        eventually("a request is held", || is_held(&held));
        let control = Control::open().unwrap();
        let deletion = std::thread::spawn(move || control.del_dev(id, &Wait::for_(SOON)));
        // It has the device's lock then, and the one that all additions take.
        let asker = impatient().open().unwrap();
        eventually("the driver waits for the request", || {
            // Twice: once it may just have been slow.
            (0..2).all(|_| asker.get_params(id).is_err_and(|e| e.kind() == ErrorKind::TimedOut))
        });
        Blocked { disk, held, client, deletion }
    }

    fn release(self) {
        let held = self.held.lock().unwrap().take();
        held.into_iter().flatten().for_each(answer);
        // What it has read of a disk that goes is its own business.
        let _ = self.client.join().unwrap();
        let _ = self.disk.wait();
        drop(self.disk);
        self.deletion.join().unwrap().unwrap();
    }
}

fn add_too_late(control: &Control, features: Features) {
    let params = DeviceParams::builder(SIZE).queue_depth(4).build().unwrap();
    let request =
        AddDevice::new(&params).id(Some(LATE)).features(FeatureRequest::require(features));
    let e = control.add_dev(&request).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TimedOut, "{e}");
    assert!(e.to_string().contains("goes on in the background"), "{e}");
}

#[test]
fn a_device_that_is_added_late_is_deleted() {
    let hurried = impatient().open().unwrap();
    let blocked = Blocked::new();
    add_too_late(&hurried, Features::NONE);
    blocked.release();
    eventually("it is undone", || hurried.outstanding().is_empty());
    assert!(devices().is_empty());
}

const NOBODY: u32 = 65534;
/// Says to a test, started again as another user, that it is the user's part.
const AS_USER: &str = "UBLK_TEST_AS_USER";

/// The driver's node is the user's, for as long as this lives.
struct Theirs;

impl Theirs {
    fn new() -> Self {
        chown("/dev/ublk-control", Some(NOBODY), None).unwrap();
        Theirs
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        let _ = chown("/dev/ublk-control", Some(0), None);
    }
}

fn as_user(test: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(AS_USER, "1")
        .uid(NOBODY)
        .gid(NOBODY)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn an_unprivileged_device_that_is_added_late_is_deleted_once_it_is_its_owners() {
    if std::env::var_os(AS_USER).is_some() {
        let control = impatient().device_paths(true).open().unwrap();
        add_too_late(&control, Features::UNPRIVILEGED_DEV);
        println!("\nlate");
        return eventually("it is undone", || control.outstanding().is_empty());
    }
    let _theirs = Theirs::new();
    let mut blocked = Some(Blocked::new());
    let mut user =
        as_user("an_unprivileged_device_that_is_added_late_is_deleted_once_it_is_its_owners");
    let mut said = String::new();
    for line in BufReader::new(user.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line == "late"
            && let Some(blocked) = blocked.take()
        {
            blocked.release();
            // The part of udev: until it is done the driver takes no command about the device.
            eventually("the device is there", || devices().contains(&LATE));
            std::thread::sleep(Duration::from_millis(50));
            assert!(devices().contains(&LATE), "the driver has let nobody's owner delete it");
            chown(format!("/dev/ublkc{LATE}"), Some(NOBODY), None).unwrap();
        }
        said += &line;
        said += "\n";
    }
    assert!(user.wait().unwrap().success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
    no_devices();
}
