//! Taking a device down: politely, by force, or because something failed.
//!
//! The order is the kernel's (`ublk_ctrl_stop_dev`, `ublk_ch_release`, `ublk_ctrl_del_dev`): STOP removes
//! the disk, for which the server has to go on answering; it ends the commands of every tag with
//! `ENODEV`; when a queue has all its tags back, its worker unmaps and closes; only then DEL, which would
//! otherwise wait for ourselves.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::life::{Ending, Life, PATIENCE, Phase, State, from_now, identity_of};
use crate::control::node_watch::Watch;
use crate::control::probe::{Probe, Sight};
use crate::control::{DeviceState, Features, Holder, Wait};
use crate::error::{Error, ErrorKind, Result};
use crate::worker::meter::Outstanding;

/// Whether users of the disk keep it from being stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// They do.
    Polite,
    /// They lose it.
    Forced,
}

/// How long workers that are not known to be stuck are given before their rings are taken away: thousands of
/// tags come home one by one, on a machine that may have other things to do.
const LAST_RESORT: Duration = Duration::from_secs(10);

/// Within this a worker of a device that nobody uses yet gives a sign of life, or is taken to be stuck.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// What could not be cleaned up.
pub(super) type Leftovers = Vec<String>;

impl Life {
    /// Stops and deletes the device. Another stop that is at work is waited for. To cancel the wait is to have its
    /// deadline come at once.
    pub(super) fn stop(
        self: &Arc<Self>,
        wait: &Wait,
        manner: Manner,
    ) -> Result<(Ending, Leftovers)> {
        const ATTEMPT: &str = "stop the device";
        self.check_process(ATTEMPT)?;
        self.check_thread(ATTEMPT)?;
        // One that is far away if there is none.
        let deadline = wait.deadline().unwrap_or_else(|| from_now(Duration::MAX));
        let wait = match wait.cancel_token() {
            Some(token) => Wait::until(deadline).cancelled_by(token),
            None => Wait::until(deadline),
        };
        let _listening = wait.cancel_token().map(|token| token.listen(self));
        let ours = loop {
            let mut state = self.lock();
            match state.phase {
                Phase::Starting | Phase::Live => {
                    state.phase = Phase::Ending;
                    break true;
                }
                Phase::Ended(_) => break false,
                Phase::Ending => {}
            }
            drop(state);
            let mut given_up = false;
            let idle = |s: &super::life::State| {
                given_up = wait.is_cancelled();
                s.phase != Phase::Ending || given_up
            };
            let in_time = self.wait_until(Some(deadline + PATIENCE), idle);
            if given_up {
                return Err(Error::new(ErrorKind::Cancelled, ATTEMPT)
                    .on_device(self.info.id)
                    .because("another stop of it is at work, which goes on"));
            }
            if !in_time {
                return Err(Error::new(ErrorKind::TimedOut, ATTEMPT)
                    .on_device(self.info.id)
                    .because("another stop of it has not come to an end"));
            }
        };
        let mut leftovers = Vec::new();
        if ours {
            if manner == Manner::Polite
                && let Err(error) = self.stop_when_free(&wait, true)
            {
                self.resume();
                return Err(error);
            }
            if manner == Manner::Forced && !self.wait_answered_requests(&wait) {
                self.revoke();
            }
            self.remove_disk(&wait, &mut leftovers);
            self.release(PATIENCE, &mut leftovers);
            let failed = self.lock().has_failed();
            self.set_ended(if failed { Ending::Failed } else { Ending::Stopped });
        }
        let ending = match self.lock().phase {
            Phase::Ended(ending) => ending,
            _ => Ending::Stopped,
        };
        self.delete(manner, &mut leftovers);
        Ok((ending, leftovers))
    }

    /// Waits until every request that is out now was answered. False if that did not happen in time.
    ///
    /// STOP waits for requests inside of the kernel, with no way back, and a process that is killed in that
    /// state, on a thread of its own STOP, never ends: the requests are aborted only when `ublkc` is closed,
    /// which the kernel thread that runs the STOP keeps open. So STOP is not begun while a request is stuck.
    pub(super) fn wait_answered_requests(&self, wait: &Wait) -> bool {
        self.wait_answered_while(wait, |_| true)
    }

    /// The same for one who gives up as soon as the device is not as it should be.
    pub(super) fn wait_answered_while(&self, wait: &Wait, on: impl Fn(&State) -> bool) -> bool {
        // A request's end is no event: to announce each would burden them all for the sake of this.
        const STEP: Duration = Duration::from_millis(2);
        let then = self.outstanding();
        loop {
            if !self.still_out(&then) {
                return true;
            }
            let on = {
                let state = self.lock();
                on(&state) && !state.has_failed()
            };
            if wait.is_over() || !on {
                return false;
            }
            let left = wait.remaining().unwrap_or(STEP);
            self.wait_until(Some(Instant::now() + left.min(STEP)), |_| false);
        }
    }

    /// Waits until nobody holds the disk. If it is to go `for_good`, it is removed in the same moment, where the
    /// kernel can do that.
    pub(super) fn stop_when_free(&self, wait: &Wait, for_good: bool) -> Result<()> {
        let id = self.info.id;
        let mut probe = Probe::new(id, &self.path);
        if !self.wait_answered_requests(wait) && !self.lock().has_failed() {
            let mut holders = self.disk_holders();
            if holders.is_empty() {
                match probe.look(PATIENCE) {
                    Sight::Claimed => holders.push(Holder::Unseen),
                    // Nobody waits for what is out: writeback, or what somebody left behind.
                    Sight::Free => self.revoke_outstanding(),
                    // Whoever opens the disk now has nothing of it yet. What he waits for ends; or else the worker is stuck,
                    // and the driver's own look would not come back either.
                    Sight::Late if self.revoke_until_seen(&mut probe) => {}
                    Sight::Late => return Ok(()),
                }
            }
            if !holders.is_empty() {
                return Err(self.busy(holders));
            }
        }
        let watch = Watch::on(Path::new("/dev"));
        loop {
            if self.lock().has_failed() {
                // Nobody can use it any more.
                return Ok(());
            }
            let over = wait.is_over();
            let holders = if for_good && self.info.features.contains(Features::SAFE_STOP_DEV) {
                match self.try_stop(wait) {
                    // Ok, or gone already.
                    Ok(()) => return Ok(()),
                    Err(e) if e.kind() == ErrorKind::Busy => {
                        let mut holders = self.disk_holders();
                        if holders.is_empty() {
                            holders.push(Holder::Unseen);
                        }
                        holders
                    }
                    // It is stopping, as nobody held it, and the rest is not a matter of holders; or it waits for the lock
                    // of the disk before it looks, and what it will see of who has the disk is to be seen from here, too.
                    Err(e) if e.kind() == ErrorKind::TimedOut => {
                        let holders = self.disk_holders();
                        if holders.is_empty() {
                            return Ok(());
                        }
                        return Err(self.busy(holders));
                    }
                    Err(e)
                        if matches!(e.kind(), ErrorKind::WrongState | ErrorKind::NoSuchDevice) =>
                    {
                        return Ok(());
                    }
                    Err(e) => return Err(e),
                }
            } else {
                self.all_holders(&mut probe, over)
            };
            if holders.is_empty() {
                return Ok(());
            }
            if over {
                return Err(self.busy(holders));
            }
            watch.wait(wait.remaining());
        }
    }

    fn busy(&self, holders: Vec<Holder>) -> Error {
        let list: Vec<_> = holders.iter().map(ToString::to_string).collect();
        Error::new(ErrorKind::Busy, "stop the device")
            .on_device(self.info.id)
            .because(list.join("; "))
            .remedy_is("unmount or close it first, or use stop_force to pull it from under them")
            .with_holders(holders)
    }

    /// Who holds the disk; our own `/dev/ublkcN` does not.
    fn disk_holders(&self) -> Vec<Holder> {
        let mut holders = self.control.holders(self.info.id);
        holders.retain(|h| !matches!(h, Holder::Process { disk: false, .. }));
        holders
    }

    /// Who holds the disk, or that somebody does. Only he is missed who has merely opened it, where `/proc` does not
    /// show him. Who waits in the kernel for the disk to be opened counts until the time is `over`.
    fn all_holders(&self, probe: &mut Probe, over: bool) -> Vec<Holder> {
        let mut holders = self.disk_holders();
        if holders.is_empty() {
            let unseen = match probe.look(PATIENCE) {
                Sight::Claimed => true,
                Sight::Late => !over,
                Sight::Free => false,
            };
            holders.extend(unseen.then_some(Holder::Unseen));
        }
        holders
    }

    /// Has the driver stop the disk unless somebody has it open. Also when the wait is over it is asked, and given the time
    /// to say so: an answer that did not come must not be taken for one.
    fn try_stop(&self, wait: &Wait) -> Result<()> {
        let id = self.info.id;
        let least = Instant::now() + PATIENCE;
        let until = Wait::until(wait.deadline().map_or(least, |deadline| deadline.max(least)));
        let until = match wait.cancel_token() {
            Some(token) => until.cancelled_by(token),
            None => until,
        };
        match self.control.try_stop_dev(id, &until) {
            // The first one, if it is with the driver, is in nobody's way.
            Err(e) if e.kind() == ErrorKind::Cancelled => {
                self.control.try_stop_dev(id, &Wait::for_(PATIENCE))
            }
            answer => answer,
        }
    }

    /// Revokes what is out now. The disk goes on: it may turn out that somebody has it whom nothing shows.
    fn revoke_outstanding(&self) {
        for queue in self.queues() {
            queue.worker.revoke_older(self.info.id, Duration::ZERO);
        }
    }

    /// Revokes what is out until the look comes back: who looks for partitions reads on after an error, several times.
    /// False if it does not.
    fn revoke_until_seen(&self, probe: &mut Probe) -> bool {
        const STEP: Duration = Duration::from_millis(10);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let then = self.outstanding();
            self.revoke_outstanding();
            if probe.look(STEP) != Sight::Late {
                return true;
            }
            if !self.wait_ended(&then, Instant::now() + HEARTBEAT) {
                return false;
            }
        }
        false
    }

    /// STOP, with what is stuck revoked at the deadline, and taken from its worker soon after.
    pub(super) fn remove_disk(&self, wait: &Wait, leftovers: &mut Leftovers) {
        let id = self.info.id;
        if self.has_lost_queues() {
            // STOP would wait for requests that only the closing of the device's file ends.
            self.condemn(leftovers);
        }
        for wait in [Some(wait), None, None] {
            let last = Wait::for_(LAST_RESORT);
            let stopped = self.control.stop_dev(id, wait.unwrap_or(&last));
            match stopped {
                Ok(()) => return,
                Err(e) if e.kind() == ErrorKind::NoSuchDevice => return,
                Err(e) if matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::Cancelled) => {
                    if wait.is_some() {
                        self.revoke();
                    } else {
                        self.condemn(leftovers);
                    }
                }
                Err(error) => {
                    tracing::error!(device = id, %error, "STOP failed");
                    self.condemn(leftovers);
                    return;
                }
            }
        }
        leftovers.push(format!("STOP of device {id} has not come back from the kernel"));
    }

    /// The requests that are out now, of each queue.
    fn outstanding(&self) -> Vec<Outstanding> {
        self.queues().iter().map(|q| q.meter.outstanding()).collect()
    }

    /// Whether one of the requests that were out then still is.
    fn still_out(&self, then: &[Outstanding]) -> bool {
        self.queues().iter().zip(then).any(|(q, then)| q.meter.still_out(then))
    }

    /// Waits until requests that were revoked are answered, which takes workers no time that are not stuck in the backend.
    fn wait_ended(&self, then: &[Outstanding], deadline: Instant) -> bool {
        const STEP: Duration = Duration::from_millis(2);
        while self.still_out(then) {
            if Instant::now() >= deadline {
                return false;
            }
            self.wait_until(Some(Instant::now() + STEP), |_| false);
        }
        true
    }

    pub(super) fn revoke(&self) {
        for queue in self.queues() {
            queue.worker.revoke(self.info.id);
        }
    }

    /// Takes the rings from the workers, so that nothing of ours keeps the device's file open and the kernel
    /// aborts what was in progress.
    pub(super) fn condemn(&self, leftovers: &mut Leftovers) {
        let deadline = Instant::now() + PATIENCE;
        for queue in self.queues() {
            if !queue.worker.condemn(deadline) {
                let number = queue.number;
                leftovers.push(format!("the worker of queue {number} could not be ended"));
            }
        }
        drop(self.char_device.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Waits for the workers to let go of the device, and ends those that are its own.
    pub(super) fn release(&self, patience: Duration, leftovers: &mut Leftovers) {
        if !self.wait_released(Instant::now() + LAST_RESORT) {
            self.condemn(leftovers);
        }
        let deadline = Instant::now() + patience;
        if !self.shared_workers {
            for queue in self.queues() {
                queue.worker.end();
            }
            let stuck = self.queues().iter().filter(|q| !q.worker.wait_ended(deadline)).count();
            if stuck > 0 {
                leftovers.push(format!("{stuck} worker thread(s) are stuck in the backend"));
            }
        }
        if let Some(pool) = &self.pool {
            pool.close();
            let stuck = pool.wait(deadline);
            if stuck > 0 {
                leftovers.push(format!("{stuck} pool thread(s) are stuck in the backend"));
            }
        }
    }

    /// Whether somebody else took the device from this server for another one, by QUIESCE.
    fn is_for_the_next_server(&self) -> bool {
        let by_others = self.lock().phase == Phase::Ended(Ending::StoppedByOthers);
        by_others
            && self.info.features.contains(Features::USER_RECOVERY)
            && self.control.get_dev_info(self.info.id).is_ok_and(|i| i.state != DeviceState::Dead)
    }

    /// Deletes the device, once: the number may be somebody else's afterwards.
    pub(super) fn delete(&self, manner: Manner, leftovers: &mut Leftovers) {
        let id = self.info.id;
        // Whoever comes second returns when it is done, as the first one does: the nodes are gone then.
        let _one_at_a_time = self.deletion.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut self.lock().deleted, true) {
            return;
        }
        if self.identity.is_some() && identity_of(id) != self.identity {
            // Somebody else deleted it.
            return;
        }
        if self.is_for_the_next_server() {
            return;
        }
        let wait = Wait::for_(PATIENCE);
        let deleted = match manner {
            Manner::Polite => self.control.del_dev(id, &wait),
            // Who has the disk open keeps its number; nobody should wait for that.
            Manner::Forced => self.control.del_dev_async(id, &wait).or_else(|e| match e.kind() {
                ErrorKind::Unsupported | ErrorKind::InvalidParameter => {
                    self.control.del_dev(id, &wait)
                }
                _ => Err(e),
            }),
        };
        match deleted {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::NoSuchDevice => {}
            Err(e) => {
                // The driver goes on with a command that timed out.
                self.lock().deleted = e.kind() == ErrorKind::TimedOut;
                leftovers.push(e.to_string());
            }
        }
    }

    /// A stop or a handover was given up: the device is served on.
    pub(super) fn resume(&self) {
        self.lock().phase = Phase::Live;
        self.changed.notify_all();
        // What ended or failed meanwhile was taken for a part of it.
        self.notice_end();
        if self.lock().has_failed() {
            self.set_takedown_off();
        }
    }

    /// Whether the device ended by itself while that was taken for somebody's doing.
    pub(super) fn notice_end(&self) {
        let all = {
            let state = self.lock();
            let live = state.phase == Phase::Live && !state.has_failed();
            live && usize::from(state.ended()) == self.queues().len()
        };
        if all {
            self.end_by_others();
        }
    }

    /// After a failed start: everything but the device itself, which whoever added it deletes.
    pub(super) fn undo_start(&self) {
        self.lock().phase = Phase::Ending;
        let mut leftovers = Vec::new();
        self.wait_answered(Instant::now() + PATIENCE);
        // Nobody uses the disk yet: what the backend still holds of the kernel's look at it need not be waited for.
        self.revoke();
        let mut patience = PATIENCE;
        if !self.shared_workers && !self.wait_ended(&self.outstanding(), Instant::now() + HEARTBEAT)
        {
            self.condemn(&mut leftovers);
            patience = HEARTBEAT;
        }
        // Ends the commands of tags that were fetched, also if there is no disk yet. The workers, which may
        // serve other devices, live on.
        self.remove_disk(&Wait::for_(PATIENCE), &mut leftovers);
        self.release(patience, &mut leftovers);
        self.set_ended(Ending::Failed);
        for what in leftovers {
            tracing::warn!(device = self.info.id, "after a failed start: {what}");
        }
    }

    /// After a failure, on a thread of its own.
    pub(super) fn take_down(&self) {
        {
            let mut state = self.lock();
            if state.phase != Phase::Live {
                return;
            }
            state.phase = Phase::Ending;
        }
        let mut leftovers = Vec::new();
        self.revoke();
        self.remove_disk(&Wait::for_(PATIENCE), &mut leftovers);
        self.release(PATIENCE, &mut leftovers);
        self.delete(Manner::Forced, &mut leftovers);
        for what in leftovers {
            tracing::warn!(device = self.info.id, "after a failure: {what}");
        }
        self.set_ended(Ending::Failed);
    }
}
