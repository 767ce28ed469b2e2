//! What the driver does to the server of an unprivileged device, and how it is kept from doing it.
//!
//! A request that takes longer than the block layer's timeout makes the driver kill the whole process that serves
//! the device (`ublk_timeout`). So a watchdog takes requests from the backend in time, and one process has one such
//! device, unless it is told otherwise.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::life::{Life, Phase};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::clock::Stamp;
use crate::sys::{fork, thread};

/// The block layer's own, where it cannot be read.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// The timeout may be changed at any time, which is no event, nor is a request's arrival.
const STEP: Duration = Duration::from_secs(1);

/// A node that was not handed over keeps its device from being deleted by its owner.
pub(super) fn stays(error: Error) -> Error {
    if error.kind() != ErrorKind::PermissionDenied {
        return error;
    }
    let cause = error.cause().unwrap_or_default().to_owned();
    error.because(format!(
        "{cause} (nor does the driver let you delete the device then: it stays until root does)"
    ))
}

/// How many devices of this process count: the generation that it was forked in, and their number.
static SEATS: AtomicU64 = AtomicU64::new(0);

/// A device's place in the process that its requests can have killed.
pub(super) struct Seat(u32);

fn taken(word: u64, generation: u32) -> u32 {
    // A forked child serves nothing of its parent's.
    if (word >> 32) as u32 == generation { word as u32 } else { 0 }
}

impl Seat {
    /// Takes a place. Unless there may be `many`, it has to be the only one.
    pub(super) fn take(many: bool) -> Result<Self> {
        let generation = fork::generation();
        let one_more = |word| match taken(word, generation) {
            0 => Some(u64::from(generation) << 32 | 1),
            n if many => Some(u64::from(generation) << 32 | u64::from(n + 1)),
            _ => None,
        };
        match SEATS.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more) {
            Ok(_) => Ok(Seat(generation)),
            Err(_) => Err(Error::new(ErrorKind::TooMany, "add the device")
                .because(
                    "this process serves an unprivileged device already, and for one slow request of either the \
                     driver would kill the server of both",
                )
                .remedy_is("serve it in a process of its own, or use Builder::allow_many_unprivileged")),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let generation = self.0;
        let one_less = |word| (taken(word, generation) > 0).then(|| word - 1);
        let _ = SEATS.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less);
    }
}

/// When a request is given up.
#[derive(Debug, PartialEq, Eq)]
struct Limits {
    /// Its worker takes it from the backend.
    revoke: Duration,
    /// The worker has not done so, because it is the one that is stuck: it is given up itself.
    condemn: Duration,
}

impl Limits {
    fn of(timeout: Duration) -> Self {
        Limits { revoke: timeout * 2 / 3, condemn: timeout * 5 / 6 }
    }

    fn read(path: &Path) -> Self {
        let milliseconds = std::fs::read_to_string(path).ok().and_then(|t| t.trim().parse().ok());
        Self::of(milliseconds.map_or(DEFAULT_TIMEOUT, Duration::from_millis))
    }
}

/// Starts the thread that looks after the device's requests until it ends.
pub(super) fn watch(life: &Arc<Life>) -> Result<()> {
    let id = life.info.id;
    let theirs = Arc::clone(life);
    thread::spawn(format!("ublk{id}-watch"), move || look_after(&theirs))
        .map(drop)
        .map_err(|e| e.on_device(id))
}

fn look_after(life: &Life) {
    let id = life.info.id;
    let path = PathBuf::from(format!("/sys/class/block/ublkb{id}/queue/io_timeout"));
    let mut next = Duration::ZERO;
    while !life.wait_until(Some(Instant::now() + next), |s| matches!(s.phase, Phase::Ended(_))) {
        let limits = Limits::read(&path);
        next = STEP;
        for queue in life.queues() {
            let Some(age) = queue.meter.oldest(Stamp::now()) else { continue };
            if age >= limits.condemn {
                tracing::error!(
                    device = id,
                    queue = queue.number,
                    "a worker is stuck in the backend"
                );
                give_up(life);
                return;
            } else if age >= limits.revoke {
                queue.worker.revoke_older(id, limits.revoke);
                next = next.min(limits.condemn - age);
            } else {
                next = next.min(limits.revoke - age);
            }
        }
    }
}

/// Takes the device's file from everything of ours, so that the driver aborts what is out. Its failure takes the device
/// down then.
fn give_up(life: &Life) {
    // First: a STOP that were begun with the file open would wait for the very request, and a process that is
    // killed meanwhile never ends.
    drop(life.char_device.lock().unwrap_or_else(PoisonError::into_inner).take());
    let mut leftovers = Vec::new();
    life.condemn(&mut leftovers);
    for what in leftovers {
        tracing::error!(
            device = life.info.id,
            "a slow request may have the process killed: {what}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_one_seat_unless_it_wants_more() {
        let first = Seat::take(false).unwrap();
        let error = Seat::take(false).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::TooMany);
        assert!(error.to_string().contains("allow_many_unprivileged"), "{error}");
        let second = Seat::take(true).unwrap();
        drop(first);
        assert!(Seat::take(false).is_err(), "one is left");
        drop(second);
        drop(Seat::take(false).unwrap());
    }

    #[test]
    fn without_a_readable_timeout_it_is_the_block_layers() {
        let limits = Limits::read(Path::new("/nowhere"));
        assert_eq!(limits, Limits::of(Duration::from_secs(30)));
        assert_eq!(limits.revoke, Duration::from_secs(20));
        assert!(limits.condemn > limits.revoke && limits.condemn < Duration::from_secs(30));
    }
}
