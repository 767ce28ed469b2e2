//! Whether somebody has claimed a disk whom nobody sees: a file system that is mounted in another namespace, or what is on
//! top of it. The kernel lets nobody open a disk exclusively while it, or a partition of it, is claimed.
//!
//! A process in another namespace that merely has it open claims nothing, and is not found. The look is not noticed: what
//! has udev look at a disk again is the close of one that was open for writing.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use super::node::device_number;
use super::node_maker::PrivateNode;
use crate::error::Errno;
use crate::sys::thread;

/// Looks at one disk, as often as one likes.
pub(crate) struct Probe {
    id: u32,
    path: Option<PathBuf>,
    /// For the look, where `/dev` has none.
    _node: Option<PrivateNode>,
    /// Of a look that has not come back.
    answer: Option<Receiver<bool>>,
}

impl Probe {
    /// Of the disk of device `id`, whose node is to be found under `path`.
    pub(crate) fn new(id: u32, path: &Path) -> Self {
        let number = device_number(Path::new(&format!("/sys/class/block/ublkb{id}/dev")));
        let is_it = fs::metadata(path)
            .is_ok_and(|meta| meta.file_type().is_block_device() && number == Some(meta.rdev()));
        let node = match number {
            Some(number) if !is_it => PrivateNode::of_block_device(number).ok(),
            _ => None,
        };
        let path = match &node {
            Some(node) => Some(node.path().to_owned()),
            None => is_it.then(|| path.to_owned()),
        };
        Probe { id, path, _node: node, answer: None }
    }

    /// Whether the disk is claimed. Also if the answer has not come in time: it is not to be taken for one. No, where
    /// the disk cannot be looked at.
    pub(crate) fn is_claimed(&mut self, patience: Duration) -> bool {
        let Some(answer) = self.answer.take().or_else(|| self.look()) else { return false };
        match answer.recv_timeout(patience) {
            Ok(claimed) => claimed,
            Err(RecvTimeoutError::Disconnected) => false,
            Err(RecvTimeoutError::Timeout) => {
                self.answer = Some(answer);
                true
            }
        }
    }

    /// On a thread of its own, because an open may read the disk's partition table, which a stuck server does not
    /// answer.
    fn look(&self) -> Option<Receiver<bool>> {
        let path = self.path.clone()?;
        let (answer, answers) = channel();
        let body = move || {
            let flags = libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC;
            let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
            let claimed = opened.as_ref().is_err_and(|e| Errno::from(e) == Errno::EBUSY);
            // We are not to be what the disk's end waits for.
            drop(opened);
            let _ = answer.send(claimed);
        };
        thread::spawn_apart(format!("ublk{}-probe", self.id), body).ok()?;
        Some(answers)
    }
}
