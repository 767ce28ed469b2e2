//! Whether somebody has claimed a disk whom nobody sees: a file system that is mounted in another namespace, or what is on
//! top of it. The kernel lets nobody open a disk exclusively while it, or a partition of it, is claimed.
//!
//! It refuses that at once (`bdev_open` asks for the claim before it takes the disk's `open_mutex`). So an open that does
//! not come back tells that nobody has a claim: it waits for that lock, which whoever looks for partitions holds.
//!
//! A process in another namespace that merely has it open claims nothing, and is not found. The look is not noticed: what
//! has udev look at a disk again is the close of one that was open for writing.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::node::device_number;
use super::node_maker::PrivateNode;
use crate::error::Errno;
use crate::sys::thread;

/// What the kernel refuses at once is refused within this.
const REFUSAL: Duration = Duration::from_secs(1);

/// What a look says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    /// Somebody has claimed the disk.
    Claimed,
    /// Nobody has, or the disk cannot be looked at.
    Free,
    /// Nobody has so far; who opens the disk now waits in the kernel, as the look itself does.
    Late,
}

/// Looks at one disk, as often as one likes.
pub(crate) struct Probe {
    id: u32,
    path: Option<PathBuf>,
    /// For the look, where `/dev` has none.
    _node: Option<PrivateNode>,
    /// Of a look that has not come back.
    pending: Option<Receiver<Step>>,
    /// It is in the kernel.
    opening: bool,
}

/// What a look's thread tells.
enum Step {
    /// It opens the disk now.
    Opening,
    /// Whether it was refused.
    Refused(bool),
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
        Probe { id, path, _node: node, pending: None, opening: false }
    }

    /// Looks at the disk. `patience` is for the look to begin: what it finds it says soon after. A look that has not come
    /// back is waited for again, for that time.
    pub(crate) fn look(&mut self, patience: Duration) -> Sight {
        let Some(steps) = self.pending.take().or_else(|| self.begin()) else { return Sight::Free };
        let soon = patience.min(REFUSAL);
        let mut deadline = Instant::now() + if self.opening { soon } else { patience };
        loop {
            match steps.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Step::Opening) => {
                    self.opening = true;
                    deadline = Instant::now() + soon;
                }
                Ok(Step::Refused(true)) => return Sight::Claimed,
                Ok(Step::Refused(false)) | Err(RecvTimeoutError::Disconnected) => {
                    return Sight::Free;
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.pending = Some(steps);
                    // Nobody has looked: that must not be taken for an answer.
                    return if self.opening { Sight::Late } else { Sight::Claimed };
                }
            }
        }
    }

    /// On a thread of its own, because an open may read the disk's partition table, which a stuck server does not
    /// answer.
    fn begin(&mut self) -> Option<Receiver<Step>> {
        let path = self.path.clone()?;
        self.opening = false;
        let (tell, steps) = channel();
        let body = move || {
            let _ = tell.send(Step::Opening);
            let flags = libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC;
            let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
            let refused = opened.as_ref().is_err_and(|e| Errno::from(e) == Errno::EBUSY);
            // We are not to be what the disk's end waits for.
            drop(opened);
            let _ = tell.send(Step::Refused(refused));
        };
        thread::spawn_apart(format!("ublk{}-probe", self.id), body).ok()?;
        Some(steps)
    }
}
