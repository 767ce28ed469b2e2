//! Opening the driver's character devices, also where `/dev` does not show them.
//!
//! A container often has a `/dev` of its own in which nodes never appear. sysfs knows every
//! device's number, so a process that may make nodes makes one for itself, opens it and removes it.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::answer::NO_UDEV_RULES;
use super::node_maker;
use super::node_watch::Watch;
use super::wait::Wait;
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::sys::fork::OwnFd;

/// Where nodes and device numbers are looked for.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    pub(crate) dev: PathBuf,
    pub(crate) sys: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Places { dev: "/dev".into(), sys: "/sys".into() }
    }
}

impl Places {
    pub(crate) fn char_device(&self, id: u32) -> PathBuf {
        self.dev.join(format!("ublkc{id}"))
    }

    fn char_class(&self) -> PathBuf {
        self.sys.join("class/ublk-char")
    }

    /// The ids of all devices, ascending.
    pub(crate) fn ids(&self) -> io::Result<Vec<u32>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(self.char_class())? {
            let name = entry?.file_name();
            ids.extend(name.to_str().and_then(|n| n.strip_prefix("ublkc")?.parse::<u32>().ok()));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// The size of a device's disk in bytes; `None` while it has no disk.
    pub(crate) fn capacity(&self, id: u32) -> Option<u64> {
        let path = self.sys.join(format!("class/block/ublkb{id}/size"));
        let sectors: u64 = fs::read_to_string(path).ok()?.trim().parse().ok()?;
        sectors.checked_mul(512)
    }
}

/// Opens `/dev/ublk-control`.
///
/// # Errors
///
/// [`ErrorKind::DriverMissing`] where the driver is not loaded, [`ErrorKind::PermissionDenied`].
pub(crate) fn open_control(places: &Places) -> Result<OwnFd> {
    let path = places.dev.join("ublk-control");
    let number = places.sys.join("class/misc/ublk-control/dev");
    match open(&path, &number, 0) {
        Ok(fd) => Ok(fd),
        Err(Failure::NoDevice) => {
            Err(Error::new(ErrorKind::DriverMissing, "open /dev/ublk-control")
                .because("the ublk driver is not loaded")
                .remedy_is(
                    "modprobe ublk_drv (a kernel with CONFIG_BLK_DEV_UBLK, Linux 6.0 or later)",
                ))
        }
        Err(Failure::NoNode(e)) => Err(no_node(&path, e)),
        Err(Failure::Open(e)) => Err(match Errno::from(&e) {
            Errno::ENXIO | Errno::ENODEV => {
                Error::new(ErrorKind::DriverMissing, "open /dev/ublk-control")
                    .because("the node is there and the ublk driver is not loaded")
                    .remedy_is("modprobe ublk_drv")
            }
            Errno::EACCES | Errno::EPERM => Error::new(
                ErrorKind::PermissionDenied,
                "open /dev/ublk-control",
            )
            .because("the node belongs to root")
            .remedy_is(
                "run as root, or install udev/80-ublk.rules (docs/unprivileged.md) and join the group ublk",
            ),
            _ => Error::new(kind_of(&e), "open /dev/ublk-control"),
        }
        .with_source(e)),
    }
}

/// Opens `/dev/ublkcN` for serving, `O_NONBLOCK` so that ring operations on it never go to a kernel
/// worker.
///
/// Until `wait` is over this waits for a node that a device manager has yet to make or to give to
/// us, and for a former server to close the device.
///
/// # Errors
///
/// [`ErrorKind::NoSuchDevice`], [`ErrorKind::Busy`] while another server has it open,
/// [`ErrorKind::PermissionDenied`].
pub(crate) fn open_char_device(places: &Places, id: u32, wait: &Wait) -> Result<OwnFd> {
    let path = places.char_device(id);
    let number = places.char_class().join(format!("ublkc{id}/dev"));
    let mut watch = None;
    loop {
        let failure = match open(&path, &number, libc::O_NONBLOCK) {
            Ok(fd) => return Ok(fd),
            Err(failure) => failure,
        };
        let error = match failure {
            Failure::NoDevice => {
                return Err(Error::new(ErrorKind::NoSuchDevice, format!("open /dev/ublkc{id}"))
                    .on_device(id)
                    .because("no device has this id"));
            }
            Failure::NoNode(e) => no_node(&path, e),
            Failure::Open(e) => match Errno::from(&e) {
                Errno::EBUSY => Error::new(ErrorKind::Busy, format!("open /dev/ublkc{id}"))
                    .with_source(e)
                    .because("another server, or a process that it forked, has it open"),
                Errno::EACCES | Errno::EPERM => {
                    Error::new(ErrorKind::PermissionDenied, format!("open /dev/ublkc{id}"))
                        .with_source(e)
                        .because("the node's permissions do not allow it")
                        .remedy_is(NO_UDEV_RULES)
                }
                _ => {
                    return Err(Error::new(kind_of(&e), format!("open /dev/ublkc{id}"))
                        .on_device(id)
                        .with_source(e));
                }
            },
        };
        if wait.is_over() {
            return Err(error.on_device(id));
        }
        // The first watch is followed by another look, since the event may have come before it.
        match &watch {
            None => watch = Some(Watch::on(&places.dev)),
            Some(watch) => watch.wait(wait.remaining()),
        }
    }
}

enum Failure {
    /// Neither a node nor a number: there is no such device.
    NoDevice,
    /// There is a number, but no node, and none could be made.
    NoNode(io::Error),
    /// The node does not open.
    Open(io::Error),
}

fn open(path: &Path, number: &Path, flags: i32) -> Result<OwnFd, Failure> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC | flags);
    let number = device_number(number);
    match fs::metadata(path) {
        // A node left over from another boot or bound into a container may be another device's.
        Ok(meta)
            if meta.file_type().is_char_device()
                && number.is_none_or(|number| number == meta.rdev()) =>
        {
            OwnFd::open_file(&options, path).map_err(Failure::Open)
        }
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(Failure::Open(e)),
        _ => match number {
            Some(number) => {
                let node = node_maker::PrivateNode::new(number).map_err(Failure::NoNode)?;
                OwnFd::open_file(&options, node.path()).map_err(Failure::Open)
            }
            None => Err(Failure::NoDevice),
        },
    }
}

/// Reads `major:minor` as sysfs says it.
pub(super) fn device_number(path: &Path) -> Option<libc::dev_t> {
    let text = fs::read_to_string(path).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn no_node(path: &Path, e: io::Error) -> Error {
    Error::new(ErrorKind::PermissionDenied, format!("open {}", path.display()))
        .with_source(e)
        .because("the device exists, its node is absent, and making a private one is not permitted")
        .remedy_is("mount devtmpfs on /dev, bind the node into the container, or grant CAP_MKNOD")
}

fn kind_of(e: &io::Error) -> ErrorKind {
    match Errno::from(e) {
        Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM => ErrorKind::TooMany,
        Errno::ENXIO | Errno::ENODEV => ErrorKind::NoSuchDevice,
        _ => ErrorKind::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn places(name: &str) -> Places {
        let root = std::env::temp_dir().join(format!("ublk-node-{}-{name}", std::process::id()));
        let places = Places { dev: root.join("dev"), sys: root.join("sys") };
        fs::create_dir_all(&places.dev).unwrap();
        fs::create_dir_all(places.sys.join("class/ublk-char")).unwrap();
        places
    }

    fn remove(places: &Places) {
        fs::remove_dir_all(places.dev.parent().unwrap()).unwrap();
    }

    #[test]
    fn neither_node_nor_number_is_no_driver_and_no_device() {
        let places = places("none");
        let error = open_control(&places).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::DriverMissing);
        assert!(error.remedy().unwrap().contains("modprobe ublk_drv"));
        let start = Instant::now();
        let wait = Wait::for_(Duration::from_secs(20));
        let error = open_char_device(&places, 5, &wait).err().unwrap();
        assert_eq!((error.kind(), error.device()), (ErrorKind::NoSuchDevice, Some(5)));
        assert!(start.elapsed() < Duration::from_secs(10), "what does not exist is not waited for");
        assert_eq!(places.ids().unwrap(), []);
        remove(&places);
    }

    #[test]
    fn a_node_that_may_not_be_made_is_waited_for_until_the_deadline() {
        let places = places("late");
        // A number that no driver has (the range is reserved for local use) fails to open with
        // ENXIO where the node can be made, and with EPERM where it cannot.
        fs::create_dir_all(places.sys.join("class/ublk-char/ublkc7")).unwrap();
        fs::write(places.sys.join("class/ublk-char/ublkc7/dev"), "240:1048575\n").unwrap();
        let wait = Wait::for_(Duration::from_millis(50));
        let error = open_char_device(&places, 7, &wait).err().unwrap();
        assert!(
            matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::NoSuchDevice),
            "{error:?}"
        );
        assert_eq!(places.ids().unwrap(), [7]);
        remove(&places);
    }

    #[test]
    fn a_file_that_is_no_device_is_not_opened() {
        let places = places("file");
        fs::write(places.dev.join("ublk-control"), "").unwrap();
        assert_eq!(open_control(&places).err().unwrap().kind(), ErrorKind::DriverMissing);
        remove(&places);
    }

    #[test]
    fn numbers_are_read_as_sysfs_writes_them() {
        let places = places("number");
        let file = places.sys.join("dev");
        fs::write(&file, "10:123\n").unwrap();
        assert_eq!(device_number(&file), Some(libc::makedev(10, 123)));
        fs::write(&file, "x").unwrap();
        assert_eq!(device_number(&file), None);
        remove(&places);
    }
}
