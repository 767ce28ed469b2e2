//! A recovery that was itself killed, on drivers that do not forget it.
//!
//! Before Linux 6.16 only START_USER_RECOVERY forgets the fetches of a former server, and it relies on every
//! queue having had all of its own (`ublk_queue_reinit` puts the queue's task, which is there from the last
//! fetch on). A server that died between its fetches leaves the command refused, if no queue is complete, or
//! has it follow a null pointer, if only some are. So whatever is missing is fetched first, by a thread
//! that ends at once: of a queue that is complete the driver refuses it, and no request comes meanwhile,
//! because the disk stays quiesced until END_USER_RECOVERY.

use std::os::fd::AsRawFd;

use io_uring::types::Fixed;

use crate::control::{Control, DeviceInfo, Features};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork::OwnFd;
use crate::sys::thread;
use crate::uring::sqe::{IoCommands, TagBuffer, Target};
use crate::uring::worker_ring::{Size, WorkerRing};

/// What the driver is given as the buffer of a tag: never read or written, but not null.
static NOWHERE: u8 = 0;

/// Whether the driver has to be helped: those with PER_IO_DAEMON forget when `/dev/ublkcN` is closed.
pub(super) fn is_needed(control: &Control) -> bool {
    !control.features().is_some_and(|f| f.contains(Features::PER_IO_DAEMON))
}

/// Fetches every tag that is not fetched, and lets go of all.
pub(super) fn complete_fetches(control: &Control, info: &DeviceInfo, file: OwnFd) -> Result<()> {
    let (queues, depth) = (info.queues, info.queue_depth);
    let encoding = control.encoding();
    let fetching = thread::spawn(format!("ublk{}-mend", info.id), move || {
        let all = u32::from(queues) * u32::from(depth);
        let submissions = u32::from(depth).next_power_of_two();
        let completions = all.next_power_of_two().clamp(2 * submissions, 65_536);
        let mut ring = WorkerRing::new(Size {
            submissions,
            completions,
            files: 1,
            shared: false,
            deferred: false,
        })?;
        ring.register_file(0, file.as_raw_fd()).map_err(|errno| {
            Error::new(ErrorKind::Io, "register /dev/ublkcN with the ring").with_errno(errno)
        })?;
        let commands = IoCommands::new(Target::Fixed(Fixed(0)), encoding);
        for queue in 0..queues {
            for tag in 0..depth {
                let buffer = TagBuffer::Address(std::ptr::from_ref(&NOWHERE) as u64);
                let entry = commands.fetch(queue, tag, buffer);
                // SAFETY: the address is a static's, and the driver moves no data before a request.
                while unsafe { ring.push(&entry) }.is_err() {
                    ring.enter(0)?;
                    ring.reap(|_, _, _| {});
                }
            }
            while ring.queued() > 0 {
                ring.enter(0)?;
                ring.reap(|_, _, _| {});
            }
        }
        Ok(())
    })?;
    // The driver wants the task that fetched to be gone, not only its ring.
    fetching.join().unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::WorkerDied, "complete the fetches of a former server"))
    })
}
