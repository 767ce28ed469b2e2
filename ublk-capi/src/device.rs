//! The device's handle: made, described, started, stopped, freed.

use std::ffi::{CString, c_char};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use ublk_core::control::Control;
use ublk_core::{Added, Builder, Capabilities, Error, ErrorKind, Request, Result, Running};

use crate::backend::Callbacks;
use crate::boundary::{self, invalid};
use crate::fork;
use crate::inbox::Inbox;
use crate::options::{Config, Id};
use crate::serve::{self, Submitter};
use crate::table::Table;
use crate::targets::Target;

/// A device: first a description, then a disk, then what is left of it. All its functions may be called from any thread
/// at any time, but for ublk_rs_device_free(), which must be the last.
#[repr(C)]
pub struct ublk_rs_device {
    _private: [u8; 0],
}

/// Wait as long as it takes.
pub const UBLK_RS_FOREVER: u64 = u64::MAX;

/// Who answers the requests.
#[derive(Clone)]
pub(crate) enum Source {
    Program(Arc<Callbacks>),
    Ready(Target),
}

/// Where the device is in its life.
enum Phase {
    /// Not started, or halted: options can be set.
    Described(Option<Box<Added>>),
    /// A call is at work on it that nothing may come between.
    Changing,
    Running(Box<Running>),
    /// It is nobody's any more.
    Over,
}

struct State {
    phase: Phase,
    config: Config,
    /// What the program asks while it runs, and afterwards.
    device: Option<ublk_core::Device>,
}

/// What a handle points to.
pub(crate) struct Device {
    state: Mutex<State>,
    /// Until it is closed.
    source: Mutex<Option<Source>>,
    table: Arc<Table<Request>>,
    inbox: OnceLock<Arc<Inbox>>,
    /// `/dev/ublkbN`, of each life that had another than the one before: strings that were given out live as long as this.
    paths: Mutex<Vec<CString>>,
    generation: u32,
    /// For what has to keep it.
    this: Weak<Device>,
}

fn wrong_state(attempt: &'static str, cause: &'static str) -> Error {
    Error::new(ErrorKind::WrongState, attempt).because(cause)
}

/// From milliseconds, of which the most that there are mean for ever.
pub(crate) fn millis(ms: u64) -> Duration {
    match ms {
        UBLK_RS_FOREVER => Duration::MAX,
        ms => Duration::from_millis(ms),
    }
}

fn possible_cpus() -> usize {
    // SAFETY: takes an integer.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) }).unwrap_or(1)
}

impl Device {
    pub(crate) fn new(source: Source) -> Arc<Self> {
        Arc::new_cyclic(|this| Device {
            state: Mutex::new(State {
                phase: Phase::Described(None),
                config: Config::new(),
                device: None,
            }),
            source: Mutex::new(Some(source)),
            // The driver makes no more queues than there can be CPUs.
            table: Arc::new(Table::new(possible_cpus())),
            inbox: OnceLock::new(),
            paths: Mutex::default(),
            generation: fork::generation(),
            this: Weak::clone(this),
        })
    }

    /// # Safety
    ///
    /// `handle` is NULL or a device that is not freed while the result is used.
    pub(crate) unsafe fn of<'a>(
        handle: *const ublk_rs_device,
        attempt: &'static str,
    ) -> Result<&'a Device> {
        // SAFETY: the caller's promise; every handle of this type is one of `Arc::into_raw`.
        unsafe { boundary::shared(handle.cast(), attempt, "device") }
    }

    /// # Safety
    ///
    /// As [`of`](Self::of).
    pub(crate) unsafe fn kept(
        handle: *const ublk_rs_device,
        attempt: &'static str,
    ) -> Result<Arc<Device>> {
        // SAFETY: the caller's promise.
        let device = unsafe { Self::of(handle, attempt) }?;
        device.this.upgrade().ok_or_else(|| wrong_state(attempt, "it is being freed"))
    }

    pub(crate) fn table(&self) -> &Arc<Table<Request>> {
        &self.table
    }

    pub(crate) fn inbox(&self) -> Option<&Arc<Inbox>> {
        self.inbox.get()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the process that made it. In a forked child nothing is left to be done with it.
    #[inline]
    pub(crate) fn is_ours(&self) -> bool {
        self.generation == fork::current()
    }

    fn check_process(&self, attempt: &'static str) -> Result<()> {
        match self.is_ours() {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Forked, attempt)
                .because("the device belongs to the process that this one was forked from")),
        }
    }

    /// The options, while they can be set.
    pub(crate) fn configure<R>(
        &self,
        attempt: &'static str,
        change: impl FnOnce(&mut Config) -> Result<R>,
    ) -> Result<R> {
        let mut state = self.lock();
        match state.phase {
            Phase::Described(_) => change(&mut state.config),
            _ => Err(wrong_state(
                attempt,
                "options are set before the device starts, or while it is halted",
            )),
        }
    }

    /// What the options are.
    pub(crate) fn config<R>(&self, look: impl FnOnce(&Config) -> R) -> R {
        look(&self.lock().config)
    }

    /// The device of the core's, once there is one.
    pub(crate) fn core(&self, attempt: &'static str) -> Result<ublk_core::Device> {
        let device = self.lock().device.clone();
        device.ok_or_else(|| wrong_state(attempt, "it was not started"))
    }

    /// The same, of one that is there for the asking: before it was started there is nothing to say.
    pub(crate) fn core_if_any(&self) -> Option<ublk_core::Device> {
        self.lock().device.clone()
    }

    /// `/dev/ublkbN`, with a NUL at its end, for as long as this lives; NULL before there was one.
    pub(crate) fn path(&self) -> *const c_char {
        let paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        // The vector may move, not what its elements own; and none is ever taken out.
        paths.last().map_or(ptr::null(), |path| path.as_ptr())
    }

    fn is_now_at(&self, path: CString) {
        let mut paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        if paths.last() != Some(&path) {
            paths.push(path);
        }
    }

    fn builder(self: &Arc<Self>, config: &Config, shape: Option<u16>) -> Result<Builder> {
        let attempt = "describe the device";
        let dispatch = config.is(Id::Dispatch);
        let source = self.source().ok_or_else(|| wrong_state(attempt, "it is being freed"))?;
        let builder = match &source {
            Source::Ready(_) if dispatch => {
                return Err(invalid(attempt, "dispatch is for backends of the program's own"));
            }
            Source::Ready(target) => target.builder(config)?,
            Source::Program(callbacks) => {
                let size =
                    config.number(Id::Size).ok_or_else(|| invalid(attempt, "no size was set"))?;
                let mut caps = match callbacks.submits() {
                    true => config.capabilities(),
                    false => callbacks.capabilities(),
                };
                if config.is(Id::Fua) {
                    caps = caps | Capabilities::FUA;
                }
                if config.number(Id::MetadataSize).is_some() && !callbacks.submits() {
                    return Err(invalid(
                        attempt,
                        "integrity metadata is for a backend with submit",
                    ));
                }
                if callbacks.has_zones() && config.number(Id::ZoneBytes).is_none() {
                    return Err(invalid(attempt, "a backend with zones needs zone_bytes"));
                }
                let inbox = match dispatch {
                    true => Some(self.inbox_made(attempt)?),
                    false => None,
                };
                if dispatch && config.number(Id::Threads).unwrap_or(0) > 0 {
                    return Err(invalid(attempt, "dispatch and threads exclude each other"));
                }
                let depth = match shape {
                    Some(depth) => depth,
                    None => config.fit(Id::QueueDepth)?.unwrap_or(128),
                };
                serve::builder(self, callbacks, inbox, size, depth.into(), caps)
            }
        };
        config.apply(builder, matches!(source, Source::Ready(_)))
    }

    fn inbox_made(&self, attempt: &'static str) -> Result<&Arc<Inbox>> {
        if let Some(inbox) = self.inbox.get() {
            return Ok(inbox);
        }
        let made = Arc::new(Inbox::new(attempt)?);
        Ok(self.inbox.get_or_init(|| made))
    }

    /// Starts the device, or takes one over whose server is gone.
    fn bring_up(
        self: &Arc<Self>,
        attempt: &'static str,
        up: impl FnOnce(&Arc<Self>, &Config, &mut Option<Box<Added>>) -> Result<Running> + Send,
    ) -> Result<()> {
        self.check_process(attempt)?;
        boundary::may_wait(attempt)?;
        let (config, mut added) = {
            let mut state = self.lock();
            match std::mem::replace(&mut state.phase, Phase::Changing) {
                Phase::Described(added) => (state.config.clone(), added),
                other => {
                    state.phase = other;
                    return Err(wrong_state(attempt, "it was started before"));
                }
            }
        };
        if config.is(Id::Dispatch)
            && let Ok(inbox) = self.inbox_made(attempt)
        {
            inbox.adopt();
        }
        let done = self.dispatching(|| up(self, &config, &mut added));
        let mut state = self.lock();
        match done {
            Ok(running) => {
                let text = running.path().as_os_str().as_encoded_bytes().to_vec();
                self.is_now_at(CString::new(text).unwrap_or_default());
                state.device = Some(running.handle());
                state.phase = Phase::Running(Box::new(running));
                Ok(())
            }
            Err(error) => {
                // Nothing is left of the attempt but a halted device that is not what the options describe: these can
                // be mended, and it is tried again.
                state.phase = Phase::Described(added);
                Err(error)
            }
        }
    }

    pub(crate) fn start(self: &Arc<Self>) -> Result<()> {
        self.bring_up("start the device", |this, config, halted| {
            if let Some(added) = halted {
                let depth = added.info().queue_depth;
                added.describe(this.builder(config, Some(depth))?)?;
            }
            match halted.take() {
                Some(added) => added.start(),
                None => this.builder(config, None)?.start(),
            }
        })
    }

    pub(crate) fn recover(self: &Arc<Self>, id: u32) -> Result<()> {
        self.bring_up("recover the device", |this, config, added| {
            if added.is_some() {
                return Err(wrong_state(
                    "recover the device",
                    "it was halted, and is started again",
                ));
            }
            let control = Control::open()?;
            // Queues and depth are the kernel's.
            let depth = control.get_dev_info(id).map(|info| info.queue_depth).ok();
            this.builder(config, depth)?.recover(id, &control)
        })
    }

    /// Does something that waits for requests to be answered. If it is this very thread that answers them, it goes on
    /// doing so meanwhile.
    pub(crate) fn dispatching<R: Send>(&self, wait: impl FnOnce() -> R + Send) -> R {
        let Some(inbox) = self.inbox.get().filter(|inbox| inbox.is_mine()) else { return wait() };
        let done = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            /// Says that the wait is over, also if that thread panics.
            struct Over<'a>(&'a Inbox, &'a AtomicBool);
            impl Drop for Over<'_> {
                fn drop(&mut self) {
                    self.1.store(true, Ordering::SeqCst);
                    self.0.wake();
                }
            }
            let waiting = scope.spawn(move || {
                let _over = Over(inbox, done);
                wait()
            });
            loop {
                inbox.clear_signal();
                let _ = self.dispatch(u32::MAX);
                // Set before the wake: one that came before the signal was cleared is seen here.
                if done.load(Ordering::SeqCst) {
                    break;
                }
                inbox.wait();
            }
            inbox.wake();
            match waiting.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Calls the program for the requests that have come by now: those that come meanwhile have the next turn, or a busy
    /// disk would keep its caller. `Err` if there are none and none will come any more.
    pub(crate) fn dispatch(&self, most: u32) -> std::result::Result<u32, ()> {
        let (Some(inbox), Some(Source::Program(callbacks))) = (self.inbox.get(), self.source())
        else {
            return Err(());
        };
        let submitter = match callbacks.submits() {
            true => Some(Submitter {
                callbacks: Arc::clone(&callbacks),
                table: Arc::clone(&self.table),
                device: self.this.upgrade().ok_or(())?,
            }),
            false => None,
        };
        let _inside = boundary::Inside::of_callback();
        let most = most.min(u32::try_from(inbox.waiting().max(1)).unwrap_or(u32::MAX));
        let mut done = 0;
        while done < most {
            match (inbox.next(), &submitter) {
                (Ok(request), Some(submitter)) => submitter.submit(request),
                (Ok(request), None) => serve::call(&callbacks, request),
                (Err(false), _) if done == 0 => return Err(()),
                (Err(_), _) => return Ok(done),
            }
            done += 1;
        }
        inbox.settle();
        Ok(done)
    }

    fn waits(&self, attempt: &'static str) -> Result<ublk_core::Device> {
        self.check_process(attempt)?;
        boundary::may_wait(attempt)?;
        self.core(attempt)
    }

    /// Waits for the device's end.
    pub(crate) fn wait(&self, time: Duration) -> Result<ublk_core::Ending> {
        let attempt = "wait for the device";
        let core = self.waits(attempt)?;
        let ended = self.dispatching(|| match time {
            Duration::MAX => core.wait().map(Some),
            time => core.wait_timeout(time),
        })?;
        ended.ok_or_else(|| {
            Error::new(ErrorKind::TimedOut, attempt).on_device(core.id()).because("it goes on")
        })
    }

    pub(crate) fn stop(&self, within: Duration, force: bool) -> Result<ublk_core::Stopped> {
        let core = self.waits("stop the device")?;
        let stopped = self.dispatching(|| match force {
            true => core.stop_force(within),
            false => core.stop(within),
        })?;
        let over = {
            let mut state = self.lock();
            match state.phase {
                // A halted device is deleted, as it goes.
                Phase::Running(_) | Phase::Described(Some(_)) => {
                    std::mem::replace(&mut state.phase, Phase::Over)
                }
                _ => return Ok(stopped),
            }
        };
        // Outside of the lock, and with nothing left to stop.
        drop(over);
        Ok(stopped)
    }

    /// Does something to the running device that may give it away.
    fn change(
        &self,
        attempt: &'static str,
        act: impl FnOnce(Running) -> std::result::Result<Phase, ublk_core::StopFailed> + Send,
    ) -> Result<()> {
        self.waits(attempt)?;
        let running = {
            let mut state = self.lock();
            match std::mem::replace(&mut state.phase, Phase::Changing) {
                Phase::Running(running) => running,
                other => {
                    state.phase = other;
                    return Err(wrong_state(attempt, "it does not run"));
                }
            }
        };
        let done = self.dispatching(|| act(*running));
        let mut state = self.lock();
        match done {
            Ok(phase) => {
                state.phase = phase;
                Ok(())
            }
            Err(failed) => {
                state.phase = Phase::Running(Box::new(failed.device));
                Err(failed.error)
            }
        }
    }

    pub(crate) fn halt(&self, within: Duration) -> Result<()> {
        self.change("halt the device", |running| {
            running.halt(within).map(|added| Phase::Described(Some(Box::new(added))))
        })
    }

    pub(crate) fn hand_over(&self, within: Duration) -> Result<()> {
        self.change("hand the device over", |running| {
            running.hand_over(within).map(|()| Phase::Over)
        })
    }

    fn source(&self) -> Option<Source> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets go of everything but the memory. The program's `destroy` may complete what it has kept: it is called while the
    /// device is whole.
    pub(crate) fn close(&self) {
        let phase = std::mem::replace(&mut self.lock().phase, Phase::Over);
        self.dispatching(|| drop(phase));
        if let Some(inbox) = self.inbox.get() {
            inbox.clear();
        }
        let source = self.source.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(source);
    }
}

// What it has of the core's is dropped by whoever comes last, on any thread.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Device>();
};
