//! What a device's workers, handles and stops share: where it is in its life.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::unprivileged::Seat;
use crate::control::wait::Wake;
use crate::control::{CancelToken, Control, DeviceInfo, DeviceParams};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork::OwnFd;
use crate::sys::{fork, thread};
use crate::worker::meter::Meter;
use crate::worker::pool::WorkerHandle;
use crate::worker::queue::Events;
use crate::worker::serve::Pool;
use crate::worker::shared::SharedBuffers;

/// The inode of the device's directory in sysfs, which no two devices have in one boot.
pub(super) fn identity_of(id: u32) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(std::fs::metadata(format!("/sys/class/ublk-char/ublkc{id}")).ok()?.ino())
}

/// How a device ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// By its own server's stop, or its [`halt`](crate::Running::halt).
    Stopped,
    /// Somebody else stopped or deleted it, or quiesced it for another server;
    /// [`Device::state`](crate::Device::state) tells. Of these only a stopped one is deleted by a stop of this
    /// server's.
    StoppedByOthers,
    /// This server gave it away by [`Running::hand_over`](crate::Running::hand_over); the disk is the next
    /// server's.
    HandedOver,
    /// It was taken down because something failed; [`Device::wait`](crate::Device::wait) says what.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Starting,
    Live,
    /// A stop or a takedown is at work.
    Ending,
    Ended(Ending),
}

pub(super) struct State {
    pub(super) phase: Phase,
    /// Queues whose first fetches are with the kernel.
    fetched: u16,
    /// Queues that their workers did not take.
    refused: u16,
    /// Queues that the workers have let go of.
    ended: u16,
    /// Of these, those whose ring went away under them.
    lost: u16,
    /// The first thing that went wrong.
    failure: Option<Failure>,
    /// A deletion was begun that succeeded, or may still.
    pub(super) deleted: bool,
}

impl State {
    pub(super) fn ended(&self) -> u16 {
        self.ended
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    /// The disk is there. Unless something has failed: whoever starts it cleans up then, and from now on the takedown.
    fn go_live(&mut self) {
        if self.phase == Phase::Starting && self.failure.is_none() {
            self.phase = Phase::Live;
        }
    }
}

/// An error that more than one caller gets to see.
#[derive(Clone)]
struct Failure {
    kind: ErrorKind,
    text: String,
}

/// One queue and who serves it, or a part of it and one of those who do.
pub(super) struct Queue {
    pub(super) number: u16,
    pub(super) worker: Arc<WorkerHandle>,
    pub(super) meter: Arc<Meter>,
}

pub(crate) struct Life {
    pub(super) control: Control,
    pub(super) info: DeviceInfo,
    /// Only a resize changes them.
    pub(super) params: Mutex<DeviceParams>,
    pub(super) resizing: Mutex<()>,
    pub(super) path: PathBuf,
    pub(super) generation: u32,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    /// Held by who deletes the device.
    pub(super) deletion: Mutex<()>,
    /// Set once, when the workers are there.
    pub(super) queues: std::sync::OnceLock<Vec<Queue>>,
    pub(super) pool: Option<Arc<Pool>>,
    pub(super) shared_workers: bool,
    /// Memory that clients share with the server.
    pub(super) shared: Arc<SharedBuffers>,
    /// `/dev/ublkcN`, until the device ends. The rings hold it as well.
    pub(super) char_device: Mutex<Option<Arc<OwnFd>>>,
    pub(super) warnings: Mutex<Vec<String>>,
    /// Of an unprivileged device, while it is served.
    pub(super) seat: Mutex<Option<Seat>>,
    /// What tells the device from a later one with its number.
    pub(super) identity: Option<u64>,
    /// A failed queue has set the takedown off.
    taking_down: AtomicBool,
    /// Ends the wait for START when something fails before.
    start: Mutex<Option<CancelToken>>,
    /// For the thread that takes the device down.
    pub(super) this: Weak<Life>,
}

impl Life {
    #[allow(clippy::too_many_arguments)] // the parts of one thing, made in one place
    pub(super) fn new(
        control: Control,
        info: DeviceInfo,
        params: DeviceParams,
        path: PathBuf,
        pool: Option<Arc<Pool>>,
        shared_workers: bool,
        char_device: OwnFd,
    ) -> Arc<Self> {
        let identity = identity_of(info.id);
        Arc::new_cyclic(|this| Life {
            control,
            info,
            params: Mutex::new(params),
            resizing: Mutex::default(),
            path,
            generation: fork::generation(),
            state: Mutex::new(State {
                phase: Phase::Starting,
                fetched: 0,
                refused: 0,
                ended: 0,
                lost: 0,
                failure: None,
                deleted: false,
            }),
            changed: Condvar::new(),
            queues: std::sync::OnceLock::new(),
            pool,
            shared_workers,
            shared: Arc::default(),
            deletion: Mutex::default(),
            char_device: Mutex::new(Some(Arc::new(char_device))),
            warnings: Mutex::new(Vec::new()),
            seat: Mutex::new(None),
            identity,
            taking_down: AtomicBool::new(false),
            start: Mutex::new(None),
            this: Weak::clone(this),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn queues(&self) -> &[Queue] {
        self.queues.get().map_or(&[], Vec::as_slice)
    }

    /// Waits until `done` says so. False at the deadline (`None`: forever).
    pub(super) fn wait_until(
        &self,
        deadline: Option<Instant>,
        mut done: impl FnMut(&State) -> bool,
    ) -> bool {
        let mut state = self.lock();
        loop {
            if done(&state) {
                return true;
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Whether the first fetches of so many queues are with the kernel, or something failed.
    pub(super) fn wait_fetched(&self, queues: usize, deadline: Instant) -> Result<()> {
        let in_time = self.wait_until(Some(deadline), |s| {
            usize::from(s.fetched) >= queues || s.failure.is_some()
        });
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if in_time {
            return Ok(());
        }
        Err(Error::new(ErrorKind::TimedOut, "fetch the first requests")
            .on_device(self.info.id)
            .because("a worker did not submit its fetches in time"))
    }

    /// Whether every queue was let go of by its worker.
    pub(super) fn wait_released(&self, deadline: Instant) -> bool {
        let queues = self.queues().len();
        self.wait_until(Some(deadline), |s| usize::from(s.ended + s.refused) >= queues)
    }

    /// Waits until every queue is with its worker, was refused by it, or went down with it: no first fetch
    /// comes after this.
    pub(super) fn wait_answered(&self, deadline: Instant) -> bool {
        let queues = self.queues().len();
        self.wait_until(Some(deadline), |s| {
            usize::from(s.fetched + s.refused) >= queues || s.lost > 0
        })
    }

    /// What went wrong, as an error of its own for each who asks.
    pub(super) fn failure(&self) -> Option<Error> {
        let failure = self.lock().failure.clone()?;
        Some(
            Error::new(failure.kind, "serve the device")
                .on_device(self.info.id)
                .because(failure.text),
        )
    }

    /// Ends the start. What fails before this is an error of it, what fails afterwards one of the live device: each is
    /// seen to once.
    pub(super) fn go_live(&self) -> Result<()> {
        let starting = {
            let mut state = self.lock();
            state.go_live();
            state.phase == Phase::Starting
        };
        match self.failure() {
            Some(failure) if starting => Err(failure),
            _ => Ok(()),
        }
    }

    /// Notes the first failure.
    pub(super) fn note_failure(&self, error: &Error) {
        let failure = Failure { kind: error.kind(), text: error.to_string() };
        self.lock().failure.get_or_insert(failure);
        self.changed.notify_all();
        if let Some(token) = &*self.start.lock().unwrap_or_else(PoisonError::into_inner) {
            token.cancel();
        }
    }

    /// Has the first failure, if it has not happened yet, cancel a wait.
    pub(super) fn cancel_on_failure(&self, token: &CancelToken) {
        *self.start.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
        if self.lock().failure.is_some() {
            token.cancel();
        }
    }

    pub(super) fn has_lost_queues(&self) -> bool {
        self.lock().lost > 0
    }

    /// Ends the phase; the device's file is closed before anybody hears of it.
    pub(super) fn set_ended(&self, ending: Ending) {
        drop(self.char_device.lock().unwrap_or_else(PoisonError::into_inner).take());
        drop(self.seat.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.lock().phase = Phase::Ended(ending);
        self.changed.notify_all();
    }

    pub(super) fn warn(&self, warning: String) {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        if !warnings.contains(&warning) {
            tracing::warn!(device = self.info.id, "{warning}");
            warnings.push(warning);
        }
    }

    /// Refuses a handle that a forked child has.
    pub(super) fn check_process(&self, attempt: &'static str) -> Result<()> {
        if self.generation == fork::generation() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Forked, attempt)
            .on_device(self.info.id)
            .because("the device belongs to the process that this one was forked from"))
    }

    /// Refuses a call that would wait for its own thread.
    pub(super) fn check_thread(&self, attempt: &'static str) -> Result<()> {
        let current: ThreadId = std::thread::current().id();
        let worker = self.queues().iter().any(|q| q.worker.is_current());
        let pooled = self.pool.as_ref().is_some_and(|p| p.has_thread(current));
        if worker || pooled {
            return Err(Error::new(ErrorKind::WouldDeadlock, attempt)
                .on_device(self.info.id)
                .because("the calling thread serves the device")
                .remedy_is("call it from another thread"));
        }
        Ok(())
    }

    /// Notes that somebody else ended the device. What it had is let go of now, also if its handles are
    /// kept; the threads end by themselves.
    pub(super) fn end_by_others(&self) {
        tracing::info!(device = self.info.id, "the device was stopped by somebody else");
        if !self.shared_workers {
            for queue in self.queues() {
                queue.worker.end();
            }
        }
        if let Some(pool) = &self.pool {
            pool.close();
        }
        self.set_ended(Ending::StoppedByOthers);
    }

    /// Starts the thread that takes the device down after a failure.
    pub(super) fn set_takedown_off(&self) {
        if self.taking_down.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(life) = self.this.upgrade() else { return };
        let id = self.info.id;
        let spawned = thread::spawn(format!("ublk{id}-down"), move || life.take_down());
        if let Err(error) = spawned {
            tracing::error!(device = id, %error, "the failed device could not be taken down");
        }
    }
}

/// A start that is given up by its caller.
impl Wake for Life {
    fn wake(&self) {
        {
            let mut state = self.lock();
            if state.phase == Phase::Starting {
                let text = "the caller has given it up".to_owned();
                state.failure.get_or_insert(Failure { kind: ErrorKind::Cancelled, text });
            }
        }
        self.changed.notify_all();
        if self.lock().phase != Phase::Starting {
            // A stop that waits for another one has looked again.
            return;
        }
        // START waits inside of the kernel for what the backend holds of its look for partitions.
        self.revoke();
        if let Some(token) = &*self.start.lock().unwrap_or_else(PoisonError::into_inner) {
            token.cancel();
        }
    }
}

impl Events for Life {
    fn fetched(&self, queue: u16, result: Result<()>) {
        match result {
            Ok(()) => self.lock().fetched += 1,
            Err(error) => {
                self.note_failure(&error.on_device(self.info.id).on_queue(queue));
                self.lock().refused += 1;
            }
        }
        self.changed.notify_all();
    }

    fn failed(&self, queue: u16, error: Error) {
        tracing::error!(device = self.info.id, queue, %error, "a queue failed");
        self.note_failure(&error.on_device(self.info.id).on_queue(queue));
        // Until it is live, whoever starts it cleans up.
        let live = self.lock().phase == Phase::Live;
        if live {
            self.set_takedown_off();
        }
    }

    fn ended(&self, _queue: u16, lost: bool) {
        let by_others = {
            let mut state = self.lock();
            state.ended += 1;
            state.lost += u16::from(lost);
            let all = usize::from(state.ended) == self.queues().len();
            all && state.phase == Phase::Live && state.failure.is_none()
        };
        if by_others {
            self.end_by_others();
        }
        self.changed.notify_all();
    }
}

/// A time from now; far away if the clock cannot say it.
pub(super) fn from_now(time: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
    Instant::now() + time.min(FAR)
}

/// How long steps may take that no user's code has a part in.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn starting(failure: Option<Failure>) -> State {
        State {
            phase: Phase::Starting,
            fetched: 1,
            refused: 0,
            ended: 0,
            lost: 0,
            failure,
            deleted: false,
        }
    }

    #[test]
    fn a_device_that_has_failed_never_goes_live() {
        let failure = || Failure { kind: ErrorKind::WorkerDied, text: String::from("planted") };
        let mut state = starting(Some(failure()));
        state.go_live();
        // So that who starts it undoes that, and no takedown deletes what was to be recovered.
        assert_eq!(state.phase, Phase::Starting);
        let mut state = starting(None);
        state.go_live();
        assert_eq!(state.phase, Phase::Live);
        state.failure = Some(failure());
        state.go_live();
        assert_eq!(state.phase, Phase::Live);
        state.phase = Phase::Ended(Ending::StoppedByOthers);
        state.go_live();
        assert_eq!(state.phase, Phase::Ended(Ending::StoppedByOthers));
    }
}
