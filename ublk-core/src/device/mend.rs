//! A recovery that was itself killed, on drivers that do not forget it.
//!
//! Before Linux 6.16 only START_USER_RECOVERY forgets the fetches of a former server, and it relies on every
//! queue having had all of its own (`ublk_queue_reinit` puts the queue's task, which is there from the last
//! fetch on). A server that died between its fetches leaves the command refused, if no queue is complete, or
//! has it follow a null pointer with the device's lock held, if only some are. So whatever is missing is fetched
//! first, by a thread that ends at once: of a queue that is complete the driver refuses it, and no request comes
//! meanwhile, because the disk stays quiesced until END_USER_RECOVERY.
//!
//! That command is sent only if the driver's answers say that every queue is complete.

use std::os::fd::AsRawFd;

use io_uring::squeue;
use io_uring::types::Fixed;

use crate::control::{Control, DeviceInfo, Features};
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::sys::fork::OwnFd;
use crate::sys::thread;
use crate::uring::sqe::{IoCommands, TagBuffer, Target};
use crate::uring::worker_ring::{Size, WorkerRing};
use crate::worker::path::DataPath;

/// What the driver is given as the buffer of a tag: never read or written, but not null.
static NOWHERE: u8 = 0;

/// Whether the driver has to be helped: those with PER_IO_DAEMON forget when `/dev/ublkcN` is closed.
pub(super) fn is_needed(control: &Control) -> bool {
    !control.features().is_some_and(|f| f.contains(Features::PER_IO_DAEMON))
}

/// Fetches every tag that is not fetched, and lets go of all.
///
/// # Errors
///
/// What the kernel refuses, and [`ErrorKind::WrongState`] if a queue is not complete afterwards: START_USER_RECOVERY
/// must not be sent then.
pub(super) fn complete_fetches(control: &Control, info: &DeviceInfo, file: OwnFd) -> Result<()> {
    let (id, encoding) = (info.id, control.encoding());
    let (queues, depth) = (info.queues, info.queue_depth);
    let buffer = buffer_of(info.features);
    let fetching = thread::spawn(format!("ublk{id}-mend"), move || {
        let mut ring = ring_for(queues, depth)?;
        ring.register_file(0, file.as_raw_fd()).map_err(|errno| {
            Error::new(ErrorKind::Io, "register /dev/ublkcN with the ring").with_errno(errno)
        })?;
        let commands = IoCommands::new(Target::Fixed(Fixed(0)), encoding);
        for queue in 0..queues {
            let fetches = (0..depth).map(|tag| commands.fetch(queue, tag, buffer));
            let first = u64::from(queue) * u64::from(depth);
            // SAFETY: the address is a static's, and the driver moves no data before a request.
            let answers = unsafe { answers(&mut ring, first, fetches) }?;
            verdict(&answers).map_err(|e| e.on_device(id).on_queue(queue))?;
        }
        Ok(())
    })?;
    // The driver wants the task that fetched to be gone, not only its ring.
    fetching
        .join()
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::WorkerDied, ATTEMPT).on_device(id)))
}

const ATTEMPT: &str = "complete the fetches of a former server";

/// Where the driver copies it wants an address with a fetch; elsewhere it wants none.
fn buffer_of(features: Features) -> TagBuffer {
    match DataPath::of(features).is_copied_by_driver() {
        true => TagBuffer::Address(std::ptr::from_ref(&NOWHERE) as u64),
        false => TagBuffer::None,
    }
}

fn ring_for(queues: u16, depth: u16) -> Result<WorkerRing> {
    let submissions = u32::from(depth).next_power_of_two();
    let all = u32::from(queues) * u32::from(depth);
    WorkerRing::new(Size {
        submissions,
        completions: all.next_power_of_two().clamp(2 * submissions, 65_536),
        files: 1,
        shared: false,
        deferred: false,
    })
}

/// Submits commands, and what the driver answers to each at once: `None` if it keeps the command. Their numbers are `first`
/// and those after it, and no other command's on the ring.
///
/// # Safety
///
/// As [`WorkerRing::push`].
unsafe fn answers(
    ring: &mut WorkerRing,
    first: u64,
    entries: impl ExactSizeIterator<Item = squeue::Entry>,
) -> Result<Vec<Option<Errno>>> {
    let mut answers = vec![None; entries.len()];
    let mut collect = |ring: &mut WorkerRing| {
        ring.enter(0)?;
        ring.reap(|number, result, _| {
            // Before them are commands of other queues, which the driver kept and has given back since.
            let at = number.checked_sub(first).and_then(|at| usize::try_from(at).ok());
            if let Some(answer) = at.and_then(|at| answers.get_mut(at)) {
                *answer = Errno::from_result(result);
            }
        });
        Ok::<_, Error>(())
    };
    for (number, entry) in (first..).zip(entries) {
        let entry = entry.user_data(number);
        // SAFETY: the caller's promise.
        while unsafe { ring.push(&entry) }.is_err() {
            collect(ring)?;
        }
    }
    while ring.queued() > 0 {
        collect(ring)?;
    }
    Ok(answers)
}

/// Whether a queue is complete, by what the driver answered to a fetch of each of its tags.
///
/// A tag is fetched if the driver keeps the command, or has one already (EBUSY); also if it gives the command back
/// (ENODEV), as it does with all that it has when it notices the former server's end only now (`ublk_quiesce_work_fn`):
/// no fetch is refused so, and the tag stays counted. A queue that was complete before is another task's, which makes it
/// EINVAL for all.
fn verdict(answers: &[Option<Errno>]) -> Result<()> {
    let of_another = |answer: &Option<Errno>| *answer == Some(Errno::EINVAL);
    let fetched =
        |answer: &Option<Errno>| matches!(answer, None | Some(Errno::EBUSY | Errno::ENODEV));
    if answers.iter().all(of_another) || answers.iter().all(fetched) {
        return Ok(());
    }
    let mut error = Error::new(ErrorKind::WrongState, ATTEMPT)
        .because("its last server died before all tags were fetched, and the driver refuses to take the rest")
        .remedy_is("delete the device and add it again: this kernel cannot recover it");
    let refused = answers.iter().enumerate().find(|(_, answer)| !fetched(answer));
    if let Some((tag, Some(errno))) = refused {
        error = error.on_tag(tag as u16).with_errno(*errno);
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_complete_if_all_is_fetched_or_all_is_anothers() {
        let (kept, active, anothers) = (None, Some(Errno::EBUSY), Some(Errno::EINVAL));
        let given_back = Some(Errno::ENODEV);
        for complete in [
            [kept; 3],
            [active; 3],
            [active, kept, active],
            [given_back, active, kept],
            [anothers; 3],
        ] {
            verdict(&complete).unwrap();
        }
        let other = Some(Errno::EOPNOTSUPP);
        for (answers, tag) in [
            ([kept, anothers, kept], 1),
            ([active, active, anothers], 2),
            ([anothers, anothers, active], 0),
            ([other; 3], 0),
            ([given_back, kept, other], 2),
        ] {
            let e = verdict(&answers).unwrap_err();
            assert_eq!((e.kind(), e.tag()), (ErrorKind::WrongState, Some(tag)), "{e}");
        }
    }

    #[test]
    fn an_address_goes_only_where_the_driver_copies() {
        for copied in [Features::NONE, Features::NEED_GET_DATA, Features::USER_RECOVERY] {
            assert!(matches!(buffer_of(copied), TagBuffer::Address(a) if a != 0), "{copied}");
        }
        for not in [Features::USER_COPY, Features::SUPPORT_ZERO_COPY] {
            assert_eq!(buffer_of(Features::USER_RECOVERY | not), TagBuffer::None, "{not}");
        }
    }
}
