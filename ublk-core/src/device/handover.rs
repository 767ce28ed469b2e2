//! Leaving a disk to the next server without a failed request.
//!
//! With QUIESCE the driver keeps new requests back, for the next server, while this one answers what it has. The
//! command ends the waiting commands of idle tags. It does not wait for the others: up to Linux 7.3 its test for
//! busy queues never finds one (`ublk_count_busy_req` counts requests that were not started, and is shown only
//! those that were). A tag that is committed afterwards waits again, with nothing to come, until the next
//! QUIESCE ends that, too. So the command is repeated until every tag is home. Nothing takes it back short of
//! closing the device: so it is not begun before the backend has shown that it answers.
//!
//! Without QUIESCE but with REISSUE the device is closed under its requests, and the driver sends them to the
//! next server.

use std::borrow::Cow;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::life::{Ending, Life, PATIENCE, Phase, from_now};
use crate::control::{DeviceState, Features, QUIESCE_IDLE_MS, Wait};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::clock::Stamp;

const ATTEMPT: &str = "hand the device over";
/// How long tags have to come home after a QUIESCE before requests in progress are looked at.
const HOMEWARD: Duration = Duration::from_millis(20);
/// How long one who is about to ask the driver has, to see that the device is going, where the caller has no time.
const A_MOMENT: Duration = Duration::from_millis(500);
/// A request's end is no event, nor is the driver's having noticed that a server is gone.
const STEP: Duration = Duration::from_millis(2);

/// How a device goes to the next server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Every request is answered here.
    Quiesce,
    /// What is not answered goes to the next server.
    Reissue,
}

/// Decides by what the device was granted and, where no bit of the device says it, by what the driver offers.
fn way(device: Features, driver: Features, shared_workers: bool) -> Result<Way> {
    use Features as F;
    let refuse = |cause: String| Err(Error::new(ErrorKind::Unsupported, ATTEMPT).because(cause));
    let since = |f: Features| format!("{f} (since Linux {})", f.since().unwrap_or("?"));
    if !device.contains(F::USER_RECOVERY) {
        return refuse(format!("it was added without {}", since(F::USER_RECOVERY)))
            .map_err(|e| e.remedy_is("require it of the builder; QUIESCE then comes by itself"));
    }
    if device.contains(F::USER_RECOVERY_FAIL_IO) {
        return refuse(
            "with USER_RECOVERY_FAIL_IO requests fail until the next server is there".into(),
        )
        .map_err(|e| {
            e.remedy_is("add it with USER_RECOVERY alone, or with USER_RECOVERY_REISSUE")
        });
    }
    // Of a device with BATCH_IO the driver fails what comes after a QUIESCE.
    if device.contains(F::QUIESCE) && !device.contains(F::BATCH_IO) {
        return Ok(Way::Quiesce);
    }
    let quiesce = since(F::QUIESCE);
    if !device.contains(F::USER_RECOVERY_REISSUE) {
        return refuse(format!(
            "it has not {quiesce}, and without USER_RECOVERY_REISSUE the requests that this server has would fail"
        ))
        .map_err(|e| e.remedy_is("add it with USER_RECOVERY_REISSUE, or use a newer kernel"));
    }
    // Before, a request that the driver hands to a thread which has closed its ring and lives on was aborted by
    // nobody, and the driver waited for it under its lock. A server that has ended has no such thread.
    if !driver.contains(F::PER_IO_DAEMON) {
        return refuse(format!(
            "the kernel's driver has neither {quiesce} nor {}, without which it loses requests of a server that \
             lives on",
            since(F::PER_IO_DAEMON)
        ))
        .map_err(|e| e.remedy_is("end this process: the next server gets its requests"));
    }
    if shared_workers {
        return refuse(format!(
            "it has not {quiesce}, and its workers serve other devices, from which it cannot be taken apart"
        ));
    }
    Ok(Way::Reissue)
}

impl Life {
    pub(super) fn hand_over(&self, within: Duration) -> Result<()> {
        self.check_process(ATTEMPT)?;
        self.check_thread(ATTEMPT)?;
        let driver = self.control.features().unwrap_or_default();
        let way = way(self.info.features, driver, self.shared_workers)
            .map_err(|e| e.on_device(self.info.id))?;
        let deadline = from_now(within);
        {
            let mut state = self.lock();
            if state.phase != Phase::Live || state.has_failed() {
                return Err(self.refuse(ErrorKind::WrongState, "it is ending, or has ended"));
            }
            state.phase = Phase::Ending;
        }
        let mut unanswered = 0;
        let mut failure = None;
        if way == Way::Quiesce {
            if let Err(error) = self.quiesce(deadline) {
                self.resume();
                return Err(error);
            }
            failure = self.failure();
            unanswered = self.requests_out();
        } else if let Err(error) = self.unshare_before_reissue(deadline) {
            self.resume();
            return Err(error);
        }
        // From here on it is the next server's, also for handles that somebody keeps.
        self.lock().deleted = true;
        if unanswered > 0 && self.shared_workers {
            // To close what they serve would end other devices.
            self.revoke();
            self.quiesce_until(Instant::now() + PATIENCE);
        }
        let came_home = way == Way::Quiesce && self.is_released();
        let free = self.let_go(!came_home);
        self.set_ended(Ending::HandedOver);
        if !free {
            return Err(self.refuse(
                ErrorKind::TimedOut,
                "the backend is stuck: nobody answers the disk until this process has ended, which the next \
                 server waits for",
            ));
        }
        self.wait_closed(deadline.max(Instant::now() + PATIENCE))?;
        if let Some(failure) = failure {
            return Err(failure);
        }
        if unanswered > 0 {
            let reissue = self.info.features.contains(Features::USER_RECOVERY_REISSUE);
            let fate = if reissue && !came_home { "go to the next server" } else { "failed" };
            return Err(self.refuse(
                ErrorKind::TimedOut,
                format!(
                    "the backend did not answer {unanswered} request(s) in time, which {fate}; the disk is \
                     quiesced and waits for the next server"
                ),
            ));
        }
        Ok(())
    }

    fn refuse(&self, kind: ErrorKind, cause: impl Into<Cow<'static, str>>) -> Error {
        Error::new(kind, ATTEMPT).on_device(self.info.id).because(cause)
    }

    /// Takes the disk's requests from this server: every tag comes home, unless requests stay unanswered until
    /// the deadline. An error if the driver was not asked, or refused: then the disk is served on.
    fn quiesce(&self, deadline: Instant) -> Result<()> {
        if !self.wait_answered_requests(&Wait::until(deadline)) {
            return Err(self.failure().unwrap_or_else(|| {
                self.refuse(
                    ErrorKind::TimedOut,
                    "the backend has not answered the requests that it had; this server goes on with the disk",
                )
            }));
        }
        self.unshare_all(deadline.max(Instant::now() + PATIENCE))?;
        let wait = Wait::until(deadline.max(Instant::now() + PATIENCE));
        match self.control.quiesce_dev(self.info.id, QUIESCE_IDLE_MS, &wait) {
            Ok(()) => {}
            // What the driver did not wait for, or may do yet.
            Err(e) if matches!(e.kind(), ErrorKind::Busy | ErrorKind::TimedOut) => {}
            Err(e) => return Err(e),
        }
        self.quiesce_until(deadline);
        Ok(())
    }

    /// What a backend has that does not answer goes to the next server, and with it the memory, of which that one
    /// knows nothing and need not. But once the driver was asked about memory, it has to come back from that before the
    /// device is closed: it waits for requests, with the device's lock held, without which no server gets any.
    fn unshare_before_reissue(&self, deadline: Instant) -> Result<()> {
        let soon = Instant::now() + PATIENCE;
        // Somebody else's turn; from now on there is no other.
        if !self.shared.wait_settled(deadline.min(soon).max(Instant::now() + A_MOMENT)) {
            return Err(self.refuse(
                ErrorKind::TimedOut,
                "the driver was asked about memory that clients share, and waits for requests that the backend has not \
                 answered; this server goes on with the disk",
            ));
        }
        if self.shared.numbers().is_empty() {
            return Ok(());
        }
        let soon = Instant::now() + PATIENCE;
        match self.wait_answered_requests(&Wait::until(soon)) {
            true => self.unshare_all(soon + PATIENCE),
            false => Ok(()),
        }
    }

    /// Repeats QUIESCE until every tag is home, at least once.
    fn quiesce_until(&self, deadline: Instant) {
        loop {
            self.wait_released(Instant::now() + HOMEWARD);
            // Until what is out is answered, another QUIESCE is of no use.
            while !self.is_released() && self.requests_out() > 0 && Instant::now() < deadline {
                self.wait_released(Instant::now() + STEP);
            }
            let over = Instant::now() >= deadline && self.requests_out() > 0;
            if over || self.is_released() || self.lock().has_failed() {
                return;
            }
            let wait = Wait::for_(PATIENCE);
            match self.control.quiesce_dev(self.info.id, QUIESCE_IDLE_MS, &wait) {
                Err(e) if e.kind() != ErrorKind::Busy => {
                    tracing::warn!(device = self.info.id, %e, "a repeated QUIESCE failed");
                    return;
                }
                _ => {}
            }
            if Instant::now() >= deadline {
                self.wait_released(Instant::now() + PATIENCE);
                return;
            }
        }
    }

    fn is_released(&self) -> bool {
        self.wait_released(Instant::now())
    }

    /// Requests that the backend has.
    fn requests_out(&self) -> u32 {
        let now = Stamp::now();
        self.queues().iter().map(|q| q.meter.in_flight(now).0).sum()
    }

    /// Waits until the driver has noticed that this server is gone.
    fn wait_closed(&self, deadline: Instant) -> Result<()> {
        let own = i32::try_from(std::process::id()).ok();
        loop {
            let info = self.control.get_dev_info(self.info.id)?;
            match info.state {
                // The next server may have it already.
                DeviceState::Live if info.server_pid != own => return Ok(()),
                DeviceState::Live if Instant::now() < deadline => std::thread::sleep(STEP),
                DeviceState::Live => {
                    return Err(self.refuse(
                        ErrorKind::TimedOut,
                        "the driver has not finished with this server",
                    ));
                }
                DeviceState::Dead => {
                    return Err(self
                        .refuse(ErrorKind::WrongState, "somebody stopped it meanwhile")
                        .remedy_is("delete it (Control::delete)"));
                }
                _ => return Ok(()),
            }
        }
    }

    /// Closes everything that the driver waits for before it lets another server in; if need be, by force, from
    /// under the workers. The device's file comes last of all: a write that a thread of ours is still making
    /// must not meet those of the next server. False if such a thread does not end; then the device is this
    /// process's for as long as it lives.
    pub(super) fn let_go(&self, by_force: bool) -> bool {
        let file = self.char_device.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut leftovers = Vec::new();
        if by_force {
            self.condemn(&mut leftovers);
            if self.shared_workers {
                leftovers.push("a worker that serves other devices may be stuck".into());
            }
        }
        self.release(PATIENCE, &mut leftovers);
        for what in &leftovers {
            tracing::warn!(
                device = self.info.id,
                "the device is kept from the next server: {what}"
            );
        }
        if !leftovers.is_empty() {
            std::mem::forget(file);
        }
        leftovers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Features as F;

    const LINUX_6_12: F = F::from_bits(0x1fe);
    const LINUX_7_3: F = F::from_bits(0x1f_ffff);
    const PLAIN: F = F::USER_RECOVERY;

    #[test]
    fn a_device_goes_by_the_way_that_its_features_allow() {
        let quiesce = PLAIN | F::QUIESCE;
        let reissue = PLAIN | F::USER_RECOVERY_REISSUE;
        assert_eq!(way(quiesce, LINUX_7_3, false).unwrap(), Way::Quiesce);
        assert_eq!(way(quiesce, LINUX_7_3, true).unwrap(), Way::Quiesce);
        assert_eq!(way(quiesce | reissue, LINUX_7_3, false).unwrap(), Way::Quiesce);
        assert_eq!(way(reissue, LINUX_7_3, false).unwrap(), Way::Reissue);
        assert_eq!(way(quiesce | reissue | F::BATCH_IO, LINUX_7_3, false).unwrap(), Way::Reissue);
    }

    #[test]
    fn what_is_missing_is_named_with_its_version() {
        let reissue = PLAIN | F::USER_RECOVERY_REISSUE;
        for (device, driver, shared, words) in [
            (F::NONE, LINUX_7_3, false, "added without USER_RECOVERY (since Linux 6.1)"),
            (
                PLAIN | F::QUIESCE | F::USER_RECOVERY_FAIL_IO,
                LINUX_7_3,
                false,
                "USER_RECOVERY_FAIL_IO",
            ),
            (PLAIN, LINUX_7_3, false, "it has not QUIESCE (since Linux 6.16)"),
            (PLAIN, LINUX_6_12, false, "it has not QUIESCE (since Linux 6.16)"),
            (PLAIN | F::QUIESCE | F::BATCH_IO, LINUX_7_3, false, "without USER_RECOVERY_REISSUE"),
            (reissue, LINUX_6_12, false, "PER_IO_DAEMON (since Linux 6.16)"),
            (reissue, LINUX_7_3, true, "its workers serve other devices"),
        ] {
            let e = way(device, driver, shared).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            assert!(e.to_string().contains(words), "{e}");
        }
    }
}
