//! Starting workers, speaking to them, and taking devices from one that is stuck.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::attendant::{Attendant, Unattended};
use super::cell::Shared;
use super::core::Core;
use super::mailbox::Mailbox;
use super::queue::Start;
use super::turn::{HandlerFactory, Message, Worker, Wreck, lose, refuse};
use crate::control::{Control, WeakControl};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::thread::ExitWatch;
use crate::sys::{fork, thread};
use crate::uring::worker_ring::{Size, defers};

/// How a worker is made.
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) size: Size,
    /// The CPUs that it is to run on, as far as the process may; empty: not pinned.
    pub(crate) cpus: Vec<u32>,
    pub(crate) attendant: Arc<dyn Attendant>,
}

/// One worker, from outside.
pub(crate) struct WorkerHandle {
    mailbox: Arc<Mailbox>,
    shared: Arc<Shared>,
    ended: Arc<Ended>,
    thread: OnceLock<ThreadId>,
    warnings: Vec<String>,
    /// Its ring was taken away.
    condemned: AtomicBool,
    generation: u32,
}

#[derive(Default)]
struct Ended {
    yes: Mutex<bool>,
    changed: Condvar,
}

impl Ended {
    fn set(&self) {
        *self.yes.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    fn wait(&self, time: Duration) -> bool {
        let yes = self.yes.lock().unwrap_or_else(PoisonError::into_inner);
        *self
            .changed
            .wait_timeout_while(yes, time, |yes| !*yes)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }
}

/// What a worker's thread reports once it has its ring.
type Report = Result<(ThreadId, Vec<String>)>;

impl WorkerHandle {
    /// Starts the thread and waits until it has its ring.
    pub(crate) fn start(plan: Plan) -> Result<Arc<Self>> {
        let mailbox = Mailbox::new()?;
        let shared = Shared::empty();
        let ended = Arc::new(Ended::default());
        let (report, started) = std::sync::mpsc::sync_channel::<Report>(1);
        let theirs = (Arc::clone(&mailbox), Arc::clone(&shared), Arc::clone(&ended));
        thread::spawn(plan.name, move || {
            let (mailbox, shared, ended) = theirs;
            match prepare(&plan.cpus, plan.size, &mailbox) {
                Ok((core, warnings)) => {
                    shared.fill(core);
                    let _ = report.send(Ok((std::thread::current().id(), warnings)));
                    match Worker::new(shared, mailbox, plan.attendant).run() {
                        Some(wreck) => bury(wreck, ended),
                        None => ended.set(),
                    }
                }
                Err(e) => {
                    let _ = report.send(Err(e));
                    ended.set();
                }
            }
        })?;
        let (id, warnings) = started.recv().unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::WorkerDied, "start a worker").because("it ended at once"))
        })?;
        Ok(Arc::new(WorkerHandle {
            mailbox,
            shared,
            ended,
            thread: OnceLock::from(id),
            warnings,
            condemned: AtomicBool::new(false),
            generation: fork::generation(),
        }))
    }

    /// Gives the worker a queue; the answer goes to the queue's listener.
    pub(crate) fn attach(&self, start: Start, handler: HandlerFactory) {
        let message = Message::Attach(Box::new(start), handler);
        if let Err(Message::Attach(start, _)) = self.mailbox.send(message) {
            let gone = Error::new(ErrorKind::WorkerDied, "give the queue to a worker");
            refuse(&start, gone.because("the worker has ended"));
        }
    }

    /// Answers what the device's holders keep, and refuses what comes.
    pub(crate) fn revoke(&self, device: u32) {
        // A worker that is gone has nothing to revoke.
        let _ = self.mailbox.send(Message::Revoke { device });
    }

    /// Answers what the device's holders keep for longer than `age`.
    pub(crate) fn revoke_older(&self, device: u32, age: Duration) {
        // A worker that is gone has nothing to revoke.
        let _ = self.mailbox.send(Message::RevokeOlder { device, age });
    }

    /// Tells the worker to end once it has no queue.
    pub(crate) fn end(&self) {
        let _ = self.mailbox.send(Message::End);
    }

    /// Waits for the thread's end. False if it has not come.
    pub(crate) fn wait_ended(&self, deadline: Instant) -> bool {
        self.ended.wait(deadline.saturating_duration_since(Instant::now()))
    }

    /// Whether the thread has ended or its ring was taken away.
    fn has_ended(&self) -> bool {
        self.mailbox.is_closed()
    }

    /// Takes the ring and everything on it from the worker, whether it is stuck in user code or not, so that
    /// the kernel can abort what it served. False if that did not succeed in time.
    pub(crate) fn condemn(&self, deadline: Instant) -> bool {
        if self.condemned.load(Ordering::Acquire) {
            return true;
        }
        let _ = self.mailbox.send(Message::Abandon);
        loop {
            if let Some(core) = self.shared.try_take() {
                self.condemned.store(true, Ordering::Release);
                self.mailbox.close();
                let stuck = Error::new(ErrorKind::WorkerDied, "serve the device")
                    .because("its worker was stuck in the backend and had its ring taken away");
                lose(core, Some(&stuck));
                return true;
            }
            // The worker holds the ring: it is about to read the message, unless it is inside of a long
            // kernel call. Its end wakes us.
            if self.ended.wait(Duration::from_millis(10)) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
        }
    }

    /// Whether the caller is this worker.
    pub(crate) fn is_current(&self) -> bool {
        self.thread.get() == Some(&std::thread::current().id())
    }

    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// How often the worker entered the kernel, and how often it had to be woken.
    pub(crate) fn activity(&self) -> (u64, u64) {
        (self.mailbox.enters.get(), self.mailbox.rings())
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        if self.generation == fork::generation() {
            self.end();
        }
    }
}

/// How long the kernel may take to end a thread that has nothing left to do.
const LAST_BREATH: Duration = Duration::from_secs(5);

/// On a dying worker's thread: has another remove what it leaves when it has ended.
fn bury(wreck: Wreck, ended: Arc<Ended>) {
    let watch = ExitWatch::on_this_thread();
    let (wreck, theirs) = (Arc::new(Mutex::new(Some(wreck))), Arc::clone(&ended));
    let left = Arc::clone(&wreck);
    let remove = move |wreck: &Mutex<Option<Wreck>>| {
        if let Some(wreck) = wreck.lock().unwrap_or_else(PoisonError::into_inner).take() {
            wreck.remove();
        }
    };
    let spawned = thread::spawn("ublk-undertaker".to_owned(), move || {
        if let Some(watch) = watch {
            let _ = watch.wait(LAST_BREATH);
        }
        remove(&left);
        theirs.set();
    });
    if spawned.is_err() {
        remove(&wreck);
        ended.set();
    }
}

/// On the worker's thread: its CPUs, its standing with memory reclaim, its ring.
fn prepare(cpus: &[u32], size: Size, mailbox: &Arc<Mailbox>) -> Result<(Core, Vec<String>)> {
    let mut warnings = Vec::new();
    let allowed = thread::allowed_cpus();
    let cpus: Vec<u32> = cpus.iter().copied().filter(|cpu| allowed.contains(cpu)).collect();
    if !cpus.is_empty()
        && let Err(errno) = thread::pin(&cpus)
    {
        warnings.push(format!("a worker could not be pinned to its queue's CPUs: {errno}"));
    }
    if let Err(errno) = thread::set_io_flusher() {
        warnings.push(format!(
            "workers are not I/O flushers ({errno}; needs CAP_SYS_RESOURCE): under memory pressure the disk \
             can deadlock against its own writeback"
        ));
    }
    Ok((Core::new(size, Arc::clone(mailbox))?, warnings))
}

/// Worker threads that serve the queues of any number of devices.
///
/// By default each queue of a device has a worker of its own. A pool of few workers is for many devices:
///
/// ```no_run
/// use ublk_core::{Builder, Workers, targets::Null};
///
/// # fn main() -> ublk_core::Result<()> {
/// let workers = Workers::new(2)?;
/// let disks = (0..32)
///     .map(|_| Builder::new(1 << 30, Null::new()).workers(&workers).start())
///     .collect::<ublk_core::Result<Vec<_>>>()?;
/// # drop(disks);
/// # Ok(())
/// # }
/// ```
///
/// Clones are the same pool. Its threads end when the last clone and the last device on it are gone. A
/// backend that blocks stalls every device that shares its worker: give such a device
/// [`threads`](crate::Builder::threads). Each device takes one open file (`/dev/ublkcN`): the usual limit of 1024 is
/// one of about a thousand devices. A worker serves at most 32,768 tags and has 16,384 places for registered
/// buffers; what does not fit is refused with [`ErrorKind::TooMany`]. A worker that has to be given up, because a backend is stuck on it
/// when its device is stopped, takes the other devices that it serves down with it.
#[derive(Clone)]
pub struct Workers(Arc<Inner>);

struct Inner {
    workers: Vec<Arc<WorkerHandle>>,
    next: AtomicUsize,
    /// What the devices on it speak to the driver by, as long as there is one.
    control: Mutex<WeakControl>,
    generation: u32,
}

impl Workers {
    /// Starts `count` workers. How their rings are set up depends on the driver, which should be loaded by now.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] for 0, and what keeps a thread or ring from being made.
    pub fn new(count: usize) -> Result<Self> {
        Self::with_attendant(count, Arc::new(Unattended))
    }

    /// As [`new`](Self::new), with an [`Attendant`] around each of them.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_attendant(count: usize, attendant: Arc<dyn Attendant>) -> Result<Self> {
        if count == 0 {
            return Err(Error::new(ErrorKind::InvalidParameter, "start a pool of workers")
                .because("it needs at least one"));
        }
        // A driver that cannot be asked now is taken for the strictest.
        let deferred = defers(Control::open().ok().and_then(|control| control.features()));
        let workers = (0..count).map(|i| {
            WorkerHandle::start(Plan {
                name: format!("ublk-pool-{i}"),
                size: Size {
                    submissions: 4096,
                    completions: 32_768,
                    files: pool_files(),
                    shared: true,
                    deferred,
                },
                cpus: Vec::new(),
                attendant: Arc::clone(&attendant),
            })
        });
        let workers = workers.collect::<Result<Vec<_>>>()?;
        Ok(Workers(Arc::new(Inner {
            workers,
            next: AtomicUsize::new(0),
            control: Mutex::default(),
            generation: fork::generation(),
        })))
    }

    /// The number of workers.
    pub fn count(&self) -> usize {
        self.0.workers.len()
    }

    /// One handle of the driver for all devices: otherwise each would take another descriptor, and threads for
    /// its commands. A pool without devices keeps none, so that the driver can be unloaded.
    ///
    /// # Errors
    ///
    /// As [`Control::open`], [`ErrorKind::Forked`] in a forked child, and [`ErrorKind::WouldDeadlock`] on one of its
    /// workers.
    pub(crate) fn control(&self) -> Result<Control> {
        if self.0.generation != fork::generation() {
            return Err(Error::new(ErrorKind::Forked, "start a device on a pool of workers")
                .because("the pool was made before a fork, by the parent process"));
        }
        if self.0.workers.iter().any(|worker| worker.is_current()) {
            return Err(Error::new(
                ErrorKind::WouldDeadlock,
                "start a device on a pool of workers",
            )
            .because("the calling thread is one of them, which the start would wait for")
            .remedy_is("call it from another thread"));
        }
        let mut kept = self.0.control.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(control) = kept.upgrade() {
            return Ok(control);
        }
        let control = Control::open()?;
        *kept = control.downgrade();
        Ok(control)
    }

    /// The worker for another queue: each in turn, but for those that had to be given up.
    pub(crate) fn next(&self) -> Arc<WorkerHandle> {
        let workers = &self.0.workers;
        let first = self.0.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..workers.len()).map(|i| &workers[first.wrapping_add(i) % workers.len()]);
        // If all are gone, the first one says so.
        let alive = in_turn.clone().find(|worker| !worker.has_ended());
        Arc::clone(alive.unwrap_or(&workers[first % workers.len()]))
    }
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("count", &self.count()).finish()
    }
}

/// Places in the table of registered files of a pool's worker: a table may not be larger than the limit of
/// open files (`io_sqe_files_register`).
fn pool_files() -> u32 {
    const WANTED: u32 = 1024;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a writable rlimit.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } {
        0 => u32::try_from(limit.rlim_cur).unwrap_or(WANTED).clamp(1, WANTED),
        _ => 64,
    }
}
