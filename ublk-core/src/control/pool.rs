//! Control threads: each has a ring and at most one command in flight.
//!
//! io_uring ties a command to the thread that entered it, and STOP_DEV and DEL_DEV cannot be taken
//! back from the kernel: a thread that submitted one waits as long as the kernel likes. So commands
//! never run on the caller's thread, a command finds a thread of its own however many are stuck,
//! and a caller that stops waiting leaves its thread behind, which ends with the command.
//!
//! Idle threads are used again and end themselves after [`IDLE`]; dropping the pool ends them at
//! once.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::answer;
use super::wait::{Wait, Wake};
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::sys::event::Event;
use crate::sys::fork::{self, OwnFd};
use crate::sys::thread;
use crate::uapi::ublksrv_ctrl_cmd;
use crate::uring::control_ring::{ControlRing, Turn};
use crate::uring::sqe::{ControlCommand, Encoding};

/// How long a thread waits for another command before it ends.
const IDLE: Duration = Duration::from_secs(3);
/// How long a caller whose wait is over lets the kernel give an interruptible command back.
const GRACE: Duration = Duration::from_secs(2);

/// A command with what it needs.
pub(crate) struct Work {
    pub(crate) command: ControlCommand,
    pub(crate) encoding: Encoding,
    pub(crate) header: ublksrv_ctrl_cmd,
    /// What the header's address names: a path, if any, then the payload.
    pub(crate) memory: Vec<u8>,
    /// Hears of the answer on the control thread: before whoever waits for it, and also if nobody does any more.
    pub(crate) heard: Option<Heard>,
    /// Takes the effect back if the command succeeds after its caller has given up.
    pub(crate) undo: Option<Undo>,
}

pub(crate) type Heard = Box<dyn FnOnce(&Answer) + Send>;
pub(crate) type Undo = Box<dyn FnOnce(&Answer) -> Work + Send>;

/// What the kernel answered: a result of at least 0 or a negated errno, and the memory.
pub(crate) struct Answer {
    pub(crate) result: i32,
    pub(crate) memory: Vec<u8>,
}

/// A command that is with the kernel.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Outstanding {
    /// The command.
    pub command: ControlCommand,
    /// The device that it is about; none for commands about the driver and for ADD_DEV with any id.
    pub device: Option<u32>,
    /// When it was handed to the kernel.
    pub since: Instant,
    /// Whether its caller has stopped waiting.
    pub abandoned: bool,
}

pub(crate) struct Pool {
    shared: Arc<Shared>,
    generation: u32,
}

struct Shared {
    control: OwnFd,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Arc<Job>>,
    /// Threads that are idle or about to look for work; each takes one of the queued jobs.
    available: usize,
    threads: HashMap<u64, Thread>,
    next_thread: u64,
    running: Vec<Arc<Job>>,
    closed: bool,
}

struct Thread {
    handle: JoinHandle<()>,
    busy: bool,
}

struct Job {
    command: ControlCommand,
    device: Option<u32>,
    state: Mutex<JobState>,
    changed: Condvar,
}

struct JobState {
    phase: Phase,
    cancel: bool,
    /// The caller has gone: nobody takes the answer.
    abandoned: bool,
    /// The kernel has answered a caller that was there, who takes the answer even if its wait is over by now.
    answered: bool,
}

enum Phase {
    Queued(Work),
    Running { since: Instant, wake: Arc<Event> },
    Done(Result<Answer>),
    Over,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wake for Job {
    fn wake(&self) {
        // With the lock, so that it cannot fall between the waiter's look at the token and its
        // sleep.
        let _state = lock(&self.state);
        self.changed.notify_all();
    }
}

impl Pool {
    pub(crate) fn new(control: OwnFd) -> Self {
        let shared = Shared { control, state: Mutex::new(State::default()), work: Condvar::new() };
        Pool { shared: Arc::new(shared), generation: fork::generation() }
    }

    /// Runs a command and waits for its answer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Forked`] in a forked child, [`ErrorKind::TimedOut`] or [`ErrorKind::Cancelled`]
    /// if the wait ends first, and whatever keeps a thread or ring from being made. An errno of the
    /// kernel is not an error here.
    pub(crate) fn run(&self, work: Work, wait: &Wait) -> Result<Answer> {
        let command = work.command;
        let device = device_of(&work);
        if self.generation != fork::generation() {
            return Err(place(Error::new(ErrorKind::Forked, command.verb()), device)
                .because("the control handle was opened before a fork, by the parent process")
                .remedy_is("open another Control in the child"));
        }
        if wait.is_over() {
            return Err(over(command, device, wait)
                .because("the wait was over before it began; the kernel was not asked"));
        }
        let job = Arc::new(Job {
            command,
            device,
            state: Mutex::new(JobState {
                phase: Phase::Queued(work),
                cancel: false,
                abandoned: false,
                answered: false,
            }),
            changed: Condvar::new(),
        });
        let _listening = wait.cancel_token().map(|token| token.listen(&job));
        Shared::submit(&self.shared, &job)?;
        job.wait(wait)
    }

    pub(crate) fn outstanding(&self) -> Vec<Outstanding> {
        if self.generation != fork::generation() {
            return Vec::new();
        }
        let running = lock(&self.shared.state).running.clone();
        running.iter().filter_map(|job| job.outstanding()).collect()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            // The threads are the parent's; the lock may be held by one that does not exist here.
            return;
        }
        let idle: Vec<_> = {
            let mut state = lock(&self.shared.state);
            state.closed = true;
            // A thread that is with the kernel finds its entry gone and ends when it comes back.
            state.threads.drain().filter(|(_, t)| !t.busy).map(|(_, t)| t.handle).collect()
        };
        self.shared.work.notify_all();
        for handle in idle {
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn submit(this: &Arc<Self>, job: &Arc<Job>) -> Result<()> {
        let mut state = lock(&this.state);
        if state.queue.len() >= state.available {
            let id = state.next_thread;
            let shared = Arc::clone(this);
            // The new thread's first step is to take the lock that is held here.
            let handle = thread::spawn("ublk-ctl".into(), move || shared.serve(id))?;
            state.next_thread += 1;
            state.available += 1;
            state.threads.insert(id, Thread { handle, busy: false });
        }
        state.queue.push_back(Arc::clone(job));
        drop(state);
        this.work.notify_one();
        Ok(())
    }

    fn serve(&self, id: u64) {
        let mut ring = None;
        while let Some(job) = self.next_job(id) {
            let mut outcome = None;
            if let Some((work, ring)) = job.begin(&mut ring) {
                outcome = Some(self.execute(&job, ring, work));
            }
            if matches!(outcome, Some(Err(_))) {
                // A ring that failed is not used again.
                ring = None;
            }
            {
                let mut state = lock(&self.state);
                state.running.retain(|j| !Arc::ptr_eq(j, &job));
                state.available += 1;
                if let Some(thread) = state.threads.get_mut(&id) {
                    thread.busy = false;
                }
            }
            // After the books: who sees the answer finds the thread available.
            if let Some(outcome) = outcome {
                job.finish(outcome);
            }
        }
    }

    /// The next job, or `None` when the thread has to end.
    fn next_job(&self, id: u64) -> Option<Arc<Job>> {
        let mut state = lock(&self.state);
        let deadline = Instant::now() + IDLE;
        loop {
            if let Some(job) = state.queue.pop_front() {
                state.available -= 1;
                if let Some(thread) = state.threads.get_mut(&id) {
                    thread.busy = true;
                }
                state.running.push(Arc::clone(&job));
                return Some(job);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                state.available -= 1;
                state.threads.remove(&id);
                return None;
            }
            state = self.work.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn execute(&self, job: &Job, ring: &mut ControlRing, mut work: Work) -> Result<Answer> {
        let undo = work.undo.take();
        let answer = self.drive(Some(job), ring, work)?;
        if !job.is_awaited() && answer.result >= 0 {
            // What came to be after its caller had given up belongs to nobody.
            if let Some(undo) = undo {
                self.undo(job, ring, undo(&answer));
            }
        }
        Ok(answer)
    }

    /// Hands a command to the kernel and waits until it comes back.
    fn drive(&self, job: Option<&Job>, ring: &mut ControlRing, work: Work) -> Result<Answer> {
        let Work { command, encoding, header, memory, heard, .. } = work;
        tracing::trace!(?command, device = header.dev_id, "submit");
        ring.start(self.control.as_raw_fd(), command, encoding, header, memory);
        let mut cancelled = false;
        loop {
            let turn = match ring.wait() {
                Ok(turn) => turn,
                Err(error) => {
                    // The command is with the kernel still, as is the memory that whoever wants to hear of it keeps.
                    std::mem::forget(heard);
                    return Err(error);
                }
            };
            match turn {
                Turn::Done(result, memory) => {
                    tracing::debug!(?command, device = header.dev_id, result, "control command");
                    let answer = Answer { result, memory };
                    if let Some(heard) = heard {
                        heard(&answer);
                    }
                    return Ok(answer);
                }
                Turn::Woken => {
                    if !cancelled && job.is_some_and(Job::is_cancelled) {
                        cancelled = true;
                        ring.cancel();
                    }
                }
            }
        }
    }

    fn undo(&self, job: &Job, ring: &mut ControlRing, work: Work) {
        let (device, late, undo) = (work.header.dev_id, job.command, work.command);
        tracing::warn!(
            device,
            ?late,
            ?undo,
            "a command succeeded after its deadline: it is undone"
        );
        match self.drive(None, ring, work) {
            Ok(answer) if answer.result >= 0 => {}
            Ok(answer) => tracing::error!(device, ?undo, answer.result, "it cannot be undone"),
            Err(e) => tracing::error!(device, ?undo, "it cannot be undone: {e}"),
        }
    }
}

impl Job {
    /// Takes the work and a ring to run it on; `None` if its caller has gone or there is no ring.
    fn begin<'r>(&self, slot: &'r mut Option<ControlRing>) -> Option<(Work, &'r mut ControlRing)> {
        let made = match slot {
            Some(_) => Ok(()),
            None => ControlRing::new().map(|ring| *slot = Some(ring)),
        };
        let mut state = lock(&self.state);
        match (std::mem::replace(&mut state.phase, Phase::Over), made, slot) {
            (Phase::Queued(work), Ok(()), Some(ring)) => {
                state.phase = Phase::Running { since: Instant::now(), wake: ring.wake() };
                Some((work, ring))
            }
            (Phase::Queued(_), Err(e), _) => {
                state.phase = Phase::Done(Err(e));
                self.changed.notify_all();
                None
            }
            _ => None,
        }
    }

    fn finish(&self, outcome: Result<Answer>) {
        let mut state = lock(&self.state);
        state.phase = Phase::Done(outcome);
        self.changed.notify_all();
    }

    fn is_cancelled(&self) -> bool {
        lock(&self.state).cancel
    }

    /// The kernel has answered. Whether somebody waits for that, who then takes it, however late it is: decided
    /// once, so that what the command did is either the caller's or undone.
    fn is_awaited(&self) -> bool {
        let mut state = lock(&self.state);
        state.answered = !state.abandoned;
        state.answered
    }

    fn outstanding(&self) -> Option<Outstanding> {
        let state = lock(&self.state);
        match state.phase {
            Phase::Running { since, .. } => Some(Outstanding {
                command: self.command,
                device: self.device,
                since,
                abandoned: state.abandoned,
            }),
            _ => None,
        }
    }

    fn wait(&self, wait: &Wait) -> Result<Answer> {
        let state = self.sleep_until(lock(&self.state), |_| wait.is_over(), || wait.remaining());
        let mut state = state;
        match std::mem::replace(&mut state.phase, Phase::Over) {
            Phase::Done(outcome) => outcome,
            Phase::Running { since, wake } if is_interruptible(self.command) => {
                state.cancel = true;
                wake.signal();
                state.phase = Phase::Running { since, wake };
                let end = Instant::now() + GRACE;
                let left = || end.saturating_duration_since(Instant::now());
                let mut state = self.sleep_until(state, |_| left().is_zero(), || Some(left()));
                match std::mem::replace(&mut state.phase, Phase::Over) {
                    Phase::Done(Ok(answer)) if is_given_back(answer.result) => {
                        Err(over(self.command, self.device, wait)
                            .because("the kernel gave the unfinished command back"))
                    }
                    // It ended by itself at the last moment.
                    Phase::Done(outcome) => outcome,
                    running => {
                        state.phase = running;
                        Err(self.abandon(&mut state, wait))
                    }
                }
            }
            running @ Phase::Running { .. } => {
                state.phase = running;
                Err(self.abandon(&mut state, wait))
            }
            // No thread has taken it; the one that will finds nothing to do.
            Phase::Queued(_) | Phase::Over => Err(over(self.command, self.device, wait)
                .because("no control thread was free in time; the kernel was not asked")),
        }
    }

    /// Sleeps until the job is done or `over` says so, in steps of at most `left`. What the kernel has answered is
    /// done in a moment, and waited for.
    fn sleep_until<'a>(
        &'a self,
        mut state: MutexGuard<'a, JobState>,
        over: impl Fn(&JobState) -> bool,
        left: impl Fn() -> Option<Duration>,
    ) -> MutexGuard<'a, JobState> {
        while !matches!(state.phase, Phase::Done(_)) && (state.answered || !over(&state)) {
            state = match left().filter(|_| !state.answered) {
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        state
    }

    fn abandon(&self, state: &mut JobState, wait: &Wait) -> Error {
        state.abandoned = true;
        over(self.command, self.device, wait).because(
            "the kernel has not given the command back; it goes on in the background, on its own thread",
        )
    }
}

/// Whether the driver sleeps interruptibly in the command, so that a cancel takes it back without a
/// trace. STOP_DEV does not (it drains the disk), and an interrupted DEL_DEV has deleted but not
/// waited.
fn is_interruptible(command: ControlCommand) -> bool {
    matches!(
        command,
        ControlCommand::StartDev | ControlCommand::EndUserRecovery | ControlCommand::QuiesceDev
    )
}

fn is_given_back(result: i32) -> bool {
    matches!(Errno::from_result(result), Some(Errno::EINTR | Errno::ECANCELED))
}

fn device_of(work: &Work) -> Option<u32> {
    let about_one = work.command != ControlCommand::GetFeatures;
    (about_one && work.header.dev_id != u32::MAX).then_some(work.header.dev_id)
}

fn place(error: Error, device: Option<u32>) -> Error {
    match device {
        Some(id) => error.on_device(id),
        None => error,
    }
}

/// The error of a wait that ended before its command; the caller says what became of the command.
fn over(command: ControlCommand, device: Option<u32>, wait: &Wait) -> Error {
    let kind = if wait.is_cancelled() { ErrorKind::Cancelled } else { ErrorKind::TimedOut };
    let error = place(Error::new(kind, command.verb()), device);
    match answer::slow_remedy(command) {
        Some(remedy) => error.remedy_is(remedy),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Any file will do: one that has no commands answers EOPNOTSUPP, which is an answer.
    fn pool() -> Pool {
        let null = OwnFd::open_file(
            std::fs::OpenOptions::new().read(true),
            std::path::Path::new("/dev/zero"),
        );
        Pool::new(null.unwrap())
    }

    fn work() -> Work {
        Work {
            command: ControlCommand::GetDevInfo,
            encoding: Encoding::Ioctl,
            header: ublksrv_ctrl_cmd { dev_id: 3, ..Default::default() },
            memory: vec![0; 64],
            heard: None,
            undo: None,
        }
    }

    fn rings_allowed() -> bool {
        ControlRing::new().is_ok()
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no io_uring")]
    fn answers_come_back_from_threads_that_are_used_again() {
        if !rings_allowed() {
            return;
        }
        let pool = pool();
        for _ in 0..50 {
            let answer = pool.run(work(), &Wait::forever()).unwrap();
            assert_eq!(answer.result, -libc::EOPNOTSUPP);
            assert_eq!(answer.memory.len(), 64);
        }
        assert_eq!(lock(&pool.shared.state).next_thread, 1);
        assert!(pool.outstanding().is_empty());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no io_uring")]
    fn many_callers_share_a_pool() {
        if !rings_allowed() {
            return;
        }
        let pool = pool();
        std::thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| {
                    for _ in 0..50 {
                        pool.run(work(), &Wait::forever()).unwrap();
                    }
                });
            }
        });
        let state = lock(&pool.shared.state);
        assert!(state.next_thread <= 8, "{} threads for 8 callers", state.next_thread);
        assert_eq!(state.available, state.threads.len());
    }

    fn running() -> Job {
        let wake = Arc::new(Event::new().unwrap());
        let phase = Phase::Running { since: Instant::now(), wake };
        Job {
            command: ControlCommand::RegBuf,
            device: Some(3),
            state: Mutex::new(JobState { phase, cancel: false, abandoned: false, answered: false }),
            changed: Condvar::new(),
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no eventfd that blocks")]
    fn what_a_command_did_is_its_callers_or_undone() {
        let at_once = Wait::for_(Duration::ZERO);
        let late = running();
        assert_eq!(late.wait(&at_once).err().map(|e| e.kind()), Some(ErrorKind::TimedOut));
        assert!(!late.is_awaited(), "to be undone");
        let just_in_time = running();
        assert!(just_in_time.is_awaited(), "to be taken");
        std::thread::scope(|s| {
            let caller = s.spawn(|| just_in_time.wait(&at_once).map(|answer| answer.result));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!caller.is_finished());
            just_in_time.finish(Ok(Answer { result: 7, memory: Vec::new() }));
            assert_eq!(caller.join().unwrap().unwrap(), 7);
        });
    }

    #[test]
    fn a_wait_that_is_over_asks_nothing() {
        let token = super::super::CancelToken::new();
        token.cancel();
        let error = pool().run(work(), &Wait::forever().cancelled_by(&token)).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        let error = pool().run(work(), &Wait::for_(Duration::ZERO)).err().unwrap();
        assert_eq!((error.kind(), error.device()), (ErrorKind::TimedOut, Some(3)));
    }
}
