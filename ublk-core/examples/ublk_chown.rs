//! The helper of `udev/80-ublk.rules`: gives the node of a device that an ordinary user has added to its owner.
//!
//! `ublk_chown ublkc3` and `ublk_chown ublkb3` run as root, by udev, when the node has appeared.
//!
//! The node is opened before the driver is asked whose device it is, without following a link, compared with the
//! number that sysfs says, and given away by its open file. So if the number has become another device's meanwhile,
//! what changes its owner is the inode of the device that is gone.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use ublk_core::ErrorKind;
use ublk_core::control::{Control, Features};

fn error(text: String) -> io::Error {
    io::Error::other(text)
}

/// The class of a node in sysfs, its device's number, and whether it is the disk.
fn parse(name: &str) -> io::Result<(&'static str, u32, bool)> {
    let number = |prefix| name.strip_prefix(prefix).and_then(|n: &str| n.parse::<u32>().ok());
    let parsed = match (number("ublkc"), number("ublkb")) {
        (Some(id), _) => Some(("ublk-char", id, false)),
        (_, Some(id)) => Some(("block", id, true)),
        _ => None,
    };
    // Not "+3", and not "03".
    parsed
        .filter(|(_, id, _)| name.get(5..) == Some(id.to_string().as_str()))
        .ok_or_else(|| error(format!("{name:?} is neither ublkcN nor ublkbN")))
}

fn open(name: &str, class: &str, is_disk: bool) -> io::Result<File> {
    let node = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(format!("/dev/{name}"))?;
    let is = node.metadata()?;
    let kind =
        if is_disk { is.file_type().is_block_device() } else { is.file_type().is_char_device() };
    let number = format!("{}:{}", libc::major(is.rdev()), libc::minor(is.rdev()));
    let wanted = fs::read_to_string(format!("/sys/class/{class}/{name}/dev"))?;
    if !kind || number != wanted.trim() {
        return Err(error(format!("/dev/{name} is {number}, the device is {}", wanted.trim())));
    }
    Ok(node)
}

/// Gives the node to the device's owner. False if the device is not an ordinary user's, or gone by now.
pub(crate) fn give(name: &str) -> io::Result<bool> {
    let (class, id, is_disk) = parse(name)?;
    let gone = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    let node = match open(name, class, is_disk) {
        Err(e) if gone(&e) => return Ok(false),
        node => node?,
    };
    let info = match Control::open()?.get_dev_info2(id) {
        Err(e) if e.kind() == ErrorKind::NoSuchDevice => return Ok(false),
        info => info?,
    };
    if !info.features.contains(Features::UNPRIVILEGED_DEV) {
        return Ok(false);
    }
    let (uid, gid) = (info.owner_uid, info.owner_gid);
    // SAFETY: the descriptor is open, and the path a NUL-terminated constant.
    let done =
        unsafe { libc::fchownat(node.as_raw_fd(), c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH) };
    match done {
        0 => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

#[allow(dead_code, reason = "a test has this file as a module")]
fn main() -> Result<(), String> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let [name] = names.as_slice() else {
        return Err("usage: ublk_chown ublkcN|ublkbN".into());
    };
    give(name).map(drop).map_err(|e| format!("{name} was not given to its owner: {e}"))
}
