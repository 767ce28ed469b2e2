//! A disk that is served, the handle for other threads, and what is left when it is stopped.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::builder::Builder;
use super::life::{Ending, Life, Phase, from_now};
use super::start::Added;
use super::stats::{DeviceStats, QueueStats};
use super::stop::Manner;
use crate::control::{DeviceInfo, DeviceParams, DeviceState, Features, Wait};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::clock::Stamp;
use crate::sys::fork;
use crate::worker::path::DataPath;

/// A device's handle, for any thread: cheap to clone, it keeps nothing alive but its own numbers.
///
/// In a forked child every call that could touch the device is refused with [`ErrorKind::Forked`].
#[derive(Clone)]
pub struct Device(Arc<Life>);

impl Device {
    pub(super) fn life(&self) -> &Life {
        &self.0
    }

    /// The device's number.
    pub fn id(&self) -> u32 {
        self.0.info.id
    }

    /// The disk: `/dev/ublkbN`.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The features that the driver granted.
    pub fn features(&self) -> Features {
        self.0.info.features
    }

    /// How the data of its requests moves; never [`DataPath::Auto`].
    pub fn data_path(&self) -> DataPath {
        DataPath::of(self.features())
    }

    /// The device as the driver described it when it was added.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// The disk's parameters, with its present size.
    pub fn params(&self) -> DeviceParams {
        self.0.params.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is not as it should be, though the disk works: a privilege that is missing, for instance.
    pub fn warnings(&self) -> Vec<String> {
        self.0.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where the device is in its life, by the driver's word; `Dead` once it has ended.
    ///
    /// # Errors
    ///
    /// As [`Control::get_dev_info`](crate::control::Control::get_dev_info).
    pub fn state(&self) -> Result<DeviceState> {
        self.0.check_process("ask for the device's state")?;
        match self.0.control.get_dev_info(self.id()) {
            Ok(info) => Ok(info.state),
            Err(e) if e.kind() == ErrorKind::NoSuchDevice => Ok(DeviceState::Dead),
            Err(e) => Err(e),
        }
    }

    /// What the device has counted since it was started.
    pub fn stats(&self) -> DeviceStats {
        let now = Stamp::now();
        let queues = self.0.queues();
        let mut stats = DeviceStats {
            queues: QueueStats::by_queue(queues.iter().map(|q| (q.number, &*q.meter)), now),
            pool_panics: self.0.pool.as_ref().map_or(0, |pool| pool.panics()),
            ..DeviceStats::default()
        };
        for queue in queues {
            let (enters, rings) = queue.worker.activity();
            stats.enters += enters;
            stats.wake_ups += rings;
        }
        stats
    }

    /// How the device ended; `None` while it has not.
    pub fn ending(&self) -> Option<Ending> {
        match self.0.lock().phase {
            Phase::Ended(ending) => Some(ending),
            _ => None,
        }
    }

    /// Waits until the device has ended, by whomever.
    ///
    /// # Errors
    ///
    /// What took it down, if it failed: [`ErrorKind::WorkerDied`] above all. [`ErrorKind::WouldDeadlock`] on
    /// one of its own threads.
    pub fn wait(&self) -> Result<Ending> {
        match self.wait_deadline(None)? {
            Some(ending) => Ok(ending),
            None => unreachable!("without a deadline the wait ends with the device"),
        }
    }

    /// As [`wait`](Self::wait), for a time at most; `None` if the device goes on.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_timeout(&self, time: Duration) -> Result<Option<Ending>> {
        self.wait_deadline(Some(from_now(time)))
    }

    fn wait_deadline(&self, deadline: Option<Instant>) -> Result<Option<Ending>> {
        self.0.check_process("wait for the device")?;
        self.0.check_thread("wait for the device")?;
        if !self.0.wait_until(deadline, |s| matches!(s.phase, Phase::Ended(_))) {
            return Ok(None);
        }
        match (self.ending(), self.0.failure()) {
            (Some(Ending::Failed), Some(error)) => Err(error),
            (ending, _) => Ok(ending),
        }
    }

    /// Stops the disk when nobody uses it, and deletes the device.
    ///
    /// While the disk is open, mounted or claimed it is left alone; that is tried again until `within` has
    /// passed (opens by udev are short). From the moment it is stopped its requests are answered, the
    /// writeback of what the kernel caches included; what the backend still has not answered after `within`
    /// is revoked. Should the backend be stuck on a worker, its ring is taken away: the call returns some
    /// seconds after `within` in any case.
    ///
    /// A device that has ended already is deleted; but not one that has gone to another server, or waits for one
    /// (see [`Ending`]): of that, this only says how it ended.
    ///
    /// On drivers without [`SAFE_STOP_DEV`](Features::SAFE_STOP_DEV) (before Linux 7) the users are those that
    /// this process can see in `/proc` and `/sys`, and mounts and other claims that it cannot see; one that comes at the
    /// last moment loses the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] with [`Error::holders`]: the disk goes on. [`ErrorKind::WouldDeadlock`] on one of
    /// its own threads, [`ErrorKind::Forked`] in a forked child.
    pub fn stop(&self, within: Duration) -> Result<Stopped> {
        self.stopped(&Wait::until(from_now(within)), Manner::Polite)
    }

    /// As [`stop`](Self::stop), whoever uses the disk: it is pulled from under them. What a file system on it
    /// has not written is lost.
    ///
    /// # Errors
    ///
    /// As [`stop`](Self::stop), never `Busy`.
    pub fn stop_force(&self, within: Duration) -> Result<Stopped> {
        self.stopped(&Wait::until(from_now(within)), Manner::Forced)
    }

    /// As [`stop`](Self::stop), with a wait that can be cancelled: that is to have its deadline come at once. A disk
    /// that is in use goes on; one that is not, or that is being removed already, is stopped in moments, and
    /// requests that the backend still holds fail.
    ///
    /// # Errors
    ///
    /// As [`stop`](Self::stop); [`ErrorKind::Cancelled`] if it was another stop that this one waited for.
    pub fn stop_with(&self, wait: &Wait) -> Result<Stopped> {
        self.stopped(wait, Manner::Polite)
    }

    /// As [`stop_force`](Self::stop_force), with a wait that can be cancelled: that is to have its deadline come at once.
    ///
    /// # Errors
    ///
    /// As [`stop_with`](Self::stop_with), never `Busy`.
    pub fn stop_force_with(&self, wait: &Wait) -> Result<Stopped> {
        self.stopped(wait, Manner::Forced)
    }

    fn stopped(&self, wait: &Wait, manner: Manner) -> Result<Stopped> {
        let (ending, leftovers) = self.0.stop(wait, manner)?;
        Ok(Stopped { id: self.id(), ending, leftovers, stats: self.stats() })
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("id", &self.id()).field("ending", &self.ending()).finish()
    }
}

/// A disk that is served, owned.
///
/// All of [`Device`] can be called on it. Dropping it is [`stop_force`](Device::stop_force) within five
/// seconds: it waits for requests in progress and the writeback of the disk's own cache, not for file systems
/// on it. To end without that, stop it; to let it run, leak it or keep it.
pub struct Running {
    device: Device,
    /// What it was made from, for another life.
    builder: Option<Box<Builder>>,
    /// It was stopped: nothing is left to do.
    over: bool,
}

/// How long a dropped device's requests are waited for.
const DROP_WITHIN: Duration = Duration::from_secs(5);

impl Running {
    pub(super) fn new(life: Arc<Life>, builder: Builder) -> Self {
        Running { device: Device(life), builder: Some(Box::new(builder)), over: false }
    }

    /// A handle for other threads.
    pub fn handle(&self) -> Device {
        self.device.clone()
    }

    /// See [`Device::stop`].
    ///
    /// # Errors
    ///
    /// As [`Device::stop`]; the device comes back with the error.
    pub fn stop(self, within: Duration) -> Result<Stopped, StopFailed> {
        self.finish(within, Manner::Polite)
    }

    /// See [`Device::stop_force`].
    ///
    /// # Errors
    ///
    /// As [`Device::stop_force`]; the device comes back with the error.
    pub fn stop_force(self, within: Duration) -> Result<Stopped, StopFailed> {
        self.finish(within, Manner::Forced)
    }

    /// Stops the disk when nobody uses it, as [`stop`](Device::stop) does, and keeps the device: started again it
    /// has the same number, features and fingerprint. In between [`Added::describe`] can give it another size,
    /// other block sizes or limits, or another backend.
    ///
    /// Counters begin at zero again; handles of the device from before say [`Ending::Stopped`]. Memory that was
    /// [shared](Device::share) is shared no more.
    ///
    /// Somebody who opens the disk at the last moment loses it, on every driver, and so does a process that `/proc` does
    /// not show and that has merely opened it (a mount that is not to be seen counts): the command that looks and stops at
    /// once would keep the disk's users out of its next life, if they are not privileged.
    ///
    /// # Errors
    ///
    /// The device comes back. [`ErrorKind::Unsupported`] where the kernel starts no device a second time (by all
    /// that is known, before Linux 7.3); [`ErrorKind::Busy`] as of [`stop`](Device::stop),
    /// [`ErrorKind::WrongState`] if it is ending: the disk goes on, or was ended by others. If the backend is stuck
    /// at the end ([`ErrorKind::TimedOut`]) or the device fails, it is stopped and deleted.
    pub fn halt(self, within: Duration) -> Result<Added, StopFailed> {
        self.halt_with(&Wait::until(from_now(within)))
    }

    /// As [`halt`](Self::halt), with a wait that can be cancelled, as of [`stop_with`](Device::stop_with).
    ///
    /// # Errors
    ///
    /// As [`halt`](Self::halt).
    pub fn halt_with(mut self, wait: &Wait) -> Result<Added, StopFailed> {
        let halted = self.device.0.halt(wait);
        match (halted, self.builder.take()) {
            (Ok((info, params)), Some(builder)) => {
                self.over = true;
                Ok(Added::again(*builder, params, self.device.0.control.clone(), info))
            }
            (Ok(_), None) => unreachable!("only this takes the builder, and the device with it"),
            (Err(error), builder) => {
                self.builder = builder;
                Err(StopFailed { error, device: self })
            }
        }
    }

    /// Gives the disk to the next server, which takes it over by [`Builder::recover`](crate::Builder::recover):
    /// under its users, a mounted file system for instance, and without a failed request. Requests that come
    /// between the two servers wait.
    ///
    /// The disk must have [`USER_RECOVERY`](Features::USER_RECOVERY), and not
    /// [`USER_RECOVERY_FAIL_IO`](Features::USER_RECOVERY_FAIL_IO).
    ///
    /// * With [`QUIESCE`](Features::QUIESCE) (since Linux 6.16; a [`Builder`](crate::Builder) that asks for
    ///   `USER_RECOVERY` prefers it by itself) all that this server has is answered by it first.
    /// * Otherwise it takes [`USER_RECOVERY_REISSUE`](Features::USER_RECOVERY_REISSUE): what this server has not
    ///   answered goes to the next one, which may see again what was done already. The memory of the tags'
    ///   buffers then stays with this process, because the kernel does not say when it has finished with it.
    ///   Before Linux 6.16 a server that lives on would lose requests; there, end the process in place of this.
    ///
    /// Memory that was [shared](Device::share) with clients is shared no more, so that the next server can do that.
    /// That may have happened also if the handover then fails: clients' data is copied until it is shared again.
    ///
    /// The backend's calls are waited for, so that no write of this server meets the next one's. Requests that
    /// a [`QueueHandler`](crate::QueueHandler) has given to other threads are its own business.
    ///
    /// Returns once the driver is ready for the next server. One that was told to recover the disk before waits two
    /// seconds for a server that lives, and then gives up with [`ErrorKind::Busy`].
    ///
    /// # Errors
    ///
    /// The device comes back.
    ///
    /// * [`ErrorKind::Unsupported`] names the feature that is missing and the kernel that brought it;
    ///   [`ErrorKind::WrongState`] if it is ending. This server goes on.
    /// * [`ErrorKind::TimedOut`] if the backend does not answer in time what it had at the call: this server goes
    ///   on. So it does without `QUIESCE` while the driver has not come back from a [`share`](Device::share) or
    ///   [`unshare`](Device::unshare), whose caller may have given up: it waits for requests that nobody would answer.
    ///   If the backend stops answering later than that, the disk is given away all the same, because nothing takes a
    ///   QUIESCE back: [`Device::ending`] is [`Ending::HandedOver`], and the message says what has become of the
    ///   requests.
    pub fn hand_over(mut self, within: Duration) -> Result<(), StopFailed> {
        match self.device.0.hand_over(within) {
            Ok(()) => {
                self.over = true;
                Ok(())
            }
            Err(error) => {
                self.over = self.device.ending() == Some(Ending::HandedOver);
                Err(StopFailed { error, device: self })
            }
        }
    }

    fn finish(mut self, within: Duration, manner: Manner) -> Result<Stopped, StopFailed> {
        match self.device.stopped(&Wait::until(from_now(within)), manner) {
            Ok(stopped) => {
                self.over = true;
                Ok(stopped)
            }
            Err(error) => Err(StopFailed { error, device: self }),
        }
    }
}

impl std::ops::Deref for Running {
    type Target = Device;
    fn deref(&self) -> &Device {
        &self.device
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.over || self.device.0.generation != fork::generation() {
            return;
        }
        match self.device.stop_force(DROP_WITHIN) {
            Ok(stopped) => {
                for what in stopped.leftovers {
                    tracing::warn!(device = stopped.id, "after a drop: {what}");
                }
            }
            Err(error) => {
                tracing::warn!(device = self.device.id(), %error, "a dropped device was not stopped");
            }
        }
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Running").field(&self.device).finish()
    }
}

/// A stop that did not happen: why, and the device, which goes on.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct StopFailed {
    /// Why.
    pub error: Error,
    /// The device.
    pub device: Running,
}

/// The error alone; the device is dropped, which stops it by force.
impl From<StopFailed> for Error {
    fn from(failed: StopFailed) -> Self {
        failed.error
    }
}

/// What is left of a device: how it ended and what it counted.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Stopped {
    /// The number that it had.
    pub id: u32,
    /// How it ended.
    pub ending: Ending,
    /// What could not be cleaned up and why, in words: threads stuck in the backend, a deletion that waits for
    /// somebody who has the device open. Empty as a rule.
    pub leftovers: Vec<String>,
    /// What it counted.
    pub stats: DeviceStats,
}
