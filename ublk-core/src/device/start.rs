//! From a device that the kernel knows to a disk that is served.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::builder::{Builder, Plan};
use super::halt;
use super::life::{Life, PATIENCE, Queue, from_now};
use super::running::Running;
use super::unprivileged::{self, Seat};
use crate::control::NO_UDEV_RULES;
use crate::control::node_watch::{Watch, may_read};
use crate::control::wait::Wake;
use crate::control::{CancelToken, Control, DeviceInfo, DeviceParams, Features, Wait};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;
use crate::sys::memory::Descriptors;
use crate::uring::worker_ring::{Size, defers};
use crate::worker::meter::Meter;
use crate::worker::path::DataPath;
use crate::worker::pool::{Plan as WorkerPlan, WorkerHandle};
use crate::worker::queue::{Events, Lane, Queue as WorkerQueue, Start};

/// A device that the kernel knows: `/dev/ublkcN` exists, the disk does not.
///
/// Dropping it deletes the device.
pub struct Added {
    builder: Builder,
    params: DeviceParams,
    /// It had a disk before.
    again: bool,
    guard: Delete,
}

/// Deletes the device unless it is disarmed.
struct Delete {
    control: Control,
    info: DeviceInfo,
    generation: u32,
    armed: bool,
}

impl Drop for Delete {
    fn drop(&mut self) {
        if !self.armed || self.generation != fork::generation() {
            return;
        }
        let id = self.info.id;
        match self.control.delete(id, &Wait::for_(PATIENCE)) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::NoSuchDevice => {}
            Err(error) => tracing::warn!(device = id, %error, "the device was not deleted"),
        }
    }
}

impl Added {
    pub(super) fn new(builder: Builder, plan: Plan, control: Control) -> Result<Self> {
        // A preference may be granted, too, but does not keep a privileged device away.
        if builder.features.require.contains(Features::UNPRIVILEGED_DEV) {
            drop(Seat::take(builder.many_unprivileged)?);
        }
        let info = control.add_dev(&plan.add(control.features()))?;
        let mut guard = Delete { control, info, generation: fork::generation(), armed: true };
        let params = settled(&plan.params, &guard.info)?;
        guard.info.capacity = Some(params.capacity());
        builder.serves(&guard.info).map_err(|e| e.on_device(guard.info.id))?;
        Ok(Added { builder, params, again: false, guard })
    }

    /// A device whose disk was stopped.
    pub(super) fn again(
        builder: Builder,
        params: DeviceParams,
        control: Control,
        info: DeviceInfo,
    ) -> Self {
        let guard = Delete { control, info, generation: fork::generation(), armed: true };
        Added { builder, params, again: true, guard }
    }

    /// Has the device become what another builder describes, backend included. What was settled when it was added
    /// stays, and what the builder says of it does not count: the number, the queues, their depth, the size of the
    /// largest request, the features and the fingerprint.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] and [`ErrorKind::Unsupported`], as of a start. They are about what the device
    /// has been granted: a feature that is required, or that the data path, the zones or the number of
    /// workers need, and that the device has not got; one that is forbidden and that it has; several workers for each
    /// queue of a device that has [`BATCH_IO`](Features::BATCH_IO) and whose data the driver copies. The former
    /// description stays.
    pub fn describe(&mut self, builder: Builder) -> Result<()> {
        let at = |e: Error| e.on_device(self.guard.info.id);
        let plan = builder.plan().map_err(at)?;
        builder.serves(&self.guard.info).map_err(at)?;
        self.params = settled(&plan.params, &self.guard.info).map_err(at)?;
        self.guard.info.capacity = Some(self.params.capacity());
        self.builder = builder;
        Ok(())
    }

    /// The device's number.
    pub fn id(&self) -> u32 {
        self.guard.info.id
    }

    /// What the driver granted: features, queues (clamped to the number of CPUs), depth.
    pub fn info(&self) -> &DeviceInfo {
        &self.guard.info
    }

    /// The features that the driver granted.
    pub fn features(&self) -> Features {
        self.guard.info.features
    }

    /// Starts the disk: when this returns, its node can be opened.
    ///
    /// # Errors
    ///
    /// What keeps the parts from being made, [`ErrorKind::TimedOut`] after
    /// [`Builder::start_timeout`], [`ErrorKind::Forked`] in a forked child. The device is deleted then.
    pub fn start(mut self) -> Result<Running> {
        let id = self.id();
        if self.guard.generation != fork::generation() {
            return Err(Error::new(ErrorKind::Forked, "start the device")
                .on_device(id)
                .because("it was added by the process that this one was forked from"));
        }
        let deadline = from_now(self.builder.start_timeout);
        let control = self.guard.control.clone();
        let seat = match self.features().contains(Features::UNPRIVILEGED_DEV) {
            true => Some(Seat::take(self.builder.many_unprivileged).map_err(|e| e.on_device(id))?),
            false => None,
        };
        // First, as it waits for udev: until the node is ours the driver takes no command about an unprivileged
        // device, not even its deletion.
        let char_device = control
            .open_char_device(id, &Wait::until(deadline).cancelled_by(&self.builder.cancel))
            .map_err(|e| if seat.is_some() { unprivileged::stays(e) } else { e })?;
        if self.again {
            halt::once_the_old_disk_is_gone(|| control.set_params(id, &self.params))?;
        } else {
            control.set_params(id, &self.params)?;
        }
        let pool = self.builder.service.start(self.builder.threads, &format!("ublk{id}-pool"))?;
        let life = Life::new(
            control.clone(),
            self.guard.info.clone(),
            self.params.clone(),
            PathBuf::from(format!("/dev/ublkb{id}")),
            pool,
            self.builder.workers.is_some(),
            char_device,
        );
        let rise = Rise { builder: &self.builder, info: &self.guard.info, way: Way::Start };
        let watched = match seat {
            Some(seat) => {
                *life.seat.lock().unwrap_or_else(PoisonError::into_inner) = Some(seat);
                unprivileged::watch(&life)
            }
            None => Ok(()),
        };
        match watched.and_then(|()| rise.bring_up(&life, deadline)) {
            Ok(()) => {
                self.guard.armed = false;
                Ok(Running::new(life, self.builder))
            }
            Err(error) => {
                life.undo_start();
                Err(rise.cancelled(error))
                // The guard deletes the device.
            }
        }
    }
}

/// Parameters as the driver has settled what a device's ADD says: it clamps the queues.
fn settled(params: &DeviceParams, info: &DeviceInfo) -> Result<DeviceParams> {
    let builder = params.to_builder().queues(info.queues).queue_depth(info.queue_depth);
    builder.max_io_bytes(info.max_io_bytes).build()
}

/// Which command lets I/O flow once every tag is fetched.
pub(super) enum Way {
    /// START: the disk appears.
    Start,
    /// END_USER_RECOVERY: the disk has been there.
    Recover,
}

/// From an open device to a served disk. Who calls it cleans up if it fails.
pub(super) struct Rise<'a> {
    pub(super) builder: &'a Builder,
    pub(super) info: &'a DeviceInfo,
    pub(super) way: Way,
}

impl Rise<'_> {
    /// What is said of a failure: it may be the end of what the caller gave up.
    pub(super) fn cancelled(&self, error: Error) -> Error {
        if !self.builder.cancel.is_cancelled() {
            return error;
        }
        let attempt = match self.way {
            Way::Start => "start the device",
            Way::Recover => "recover the device",
        };
        Error::new(ErrorKind::Cancelled, attempt)
            .on_device(self.info.id)
            .because("the caller has given it up")
    }

    pub(super) fn bring_up(&self, life: &Arc<Life>, deadline: Instant) -> Result<()> {
        let _listening = self.builder.cancel.listen(life);
        if self.builder.cancel.is_cancelled() {
            life.wake();
        }
        let starts = self.starts(life)?;
        let queues = starts.iter().map(|start| {
            let worker = self.worker(life, start)?;
            Ok(Queue { number: start.queue, worker, meter: Arc::clone(&start.meter) })
        });
        let queues = queues.collect::<Result<Vec<_>>>()?;
        for queue in &queues {
            for warning in queue.worker.warnings() {
                life.warn(warning.clone());
            }
        }
        let workers: Vec<_> = queues.iter().map(|q| Arc::clone(&q.worker)).collect();
        // Before any event of a queue can come.
        let _ = life.queues.set(queues);
        // The tags of a queue that works in batches are all offered by its first worker, before others fetch.
        let (first, others): (Vec<_>, Vec<_>) =
            starts.into_iter().zip(workers).partition(|(s, _)| !s.batched || s.lane.index == 0);
        let mut given = 0;
        let mut fetched = Ok(());
        for part in [first, others] {
            given += part.len();
            for (start, worker) in part {
                let handler = self.builder.service.handler(start.queue, life.pool.as_ref());
                match &fetched {
                    Ok(()) => worker.attach(start, handler),
                    // Whoever cleans up waits for an answer of each.
                    Err(_) => life.fetched(start.queue, Err(unfit(self.info.id))),
                }
            }
            fetched = fetched.and(life.wait_fetched(given, deadline));
        }
        fetched?;
        // Every fetch is submitted; one that the kernel rejects ends the wait.
        let cancel = CancelToken::new();
        life.cancel_on_failure(&cancel);
        let (id, pid) = (self.info.id, std::process::id().cast_signed());
        let wait = Wait::until(deadline).cancelled_by(&cancel);
        let started = match self.way {
            Way::Start => life.control.start_dev(id, pid, &wait),
            Way::Recover => life.control.end_user_recovery(id, pid, &wait),
        };
        match (started, life.failure()) {
            (_, Some(failure)) => return Err(failure),
            (Err(error), None) => return Err(error),
            (Ok(()), None) => {}
        }
        self.wait_for_node(life, deadline)?;
        life.go_live()?;
        // Somebody may have stopped it in between.
        life.notice_end();
        Ok(())
    }

    /// What each queue's worker needs.
    fn starts(&self, life: &Arc<Life>) -> Result<Vec<Start>> {
        let info = self.info;
        let file = life.char_device.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = file.as_ref() else {
            return Err(Error::new(ErrorKind::WrongState, "start the device").on_device(info.id));
        };
        let lanes = self.builder.workers_per_queue;
        let make = |(queue, index)| {
            // SAFETY: the descriptor is open as long as `file` is held, beyond this call.
            let fd = unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) };
            let at = |e: Error| e.on_device(info.id).on_queue(queue);
            let descriptors =
                Descriptors::map(fd, queue, info.queue_depth, usize::from(info.io_desc_size))
                    .map_err(|errno| {
                        at(Error::new(ErrorKind::Io, "map the request descriptors")
                            .with_errno(errno))
                    })?;
            let backing = self.builder.backing;
            let region = WorkerQueue::region_for(info.queue_depth, info.max_io_bytes, backing)
                .map_err(|errno| {
                    at(Error::new(ErrorKind::TooMany, "map the tags' buffers")
                        .with_errno(errno)
                        .because(format!(
                            "{} tags of {} bytes",
                            info.queue_depth, info.max_io_bytes
                        ))
                        .remedy_is("use less queue depth or smaller requests, or raise ulimit -v"))
                })?;
            Ok(Start {
                device: info.id,
                queue,
                lane: Lane { index, count: lanes },
                depth: info.queue_depth,
                buffer: info.max_io_bytes,
                backing,
                encoding: life.control.encoding(),
                char_device: Arc::clone(file),
                descriptors,
                region: Arc::new(region),
                path: DataPath::of(info.features),
                batched: info.features.contains(Features::BATCH_IO),
                shared: Arc::clone(&life.shared),
                zoned: info.features.contains(Features::ZONED),
                integrity: life
                    .params
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .integrity(),
                meter: Arc::new(Meter::new(
                    info.queue_depth,
                    info.features.contains(Features::UNPRIVILEGED_DEV),
                )),
                events: Arc::clone(life) as Arc<dyn Events>,
            })
        };
        (0..info.queues).flat_map(|q| (0..lanes).map(move |lane| (q, lane))).map(make).collect()
    }

    fn worker(&self, life: &Life, start: &Start) -> Result<Arc<WorkerHandle>> {
        if let Some(workers) = &self.builder.workers {
            return Ok(workers.next());
        }
        let (id, queue) = (start.device, start.queue);
        let cpus = if self.builder.pin {
            life.control.get_queue_affinity(id, queue)?.iter().collect()
        } else {
            Vec::new()
        };
        let depth = u32::from(start.depth);
        WorkerHandle::start(WorkerPlan {
            name: match start.lane.count {
                1 => format!("ublk{id}-q{queue}"),
                _ => format!("ublk{id}-q{queue}.{}", start.lane.index),
            },
            // A commit for each tag, and as many operations of futures besides.
            size: Size {
                submissions: (depth + 8).next_power_of_two(),
                completions: (2 * depth + 16).next_power_of_two(),
                files: 4,
                deferred: defers(life.control.features()),
                shared: false,
            },
            cpus,
            attendant: Arc::clone(&self.builder.attendant),
        })
        .map_err(|e| e.on_device(id).on_queue(queue))
    }

    /// The node comes by devtmpfs before START returns; where `/dev` is something else, by udev or not at all.
    fn wait_for_node(&self, life: &Life, deadline: Instant) -> Result<()> {
        let number = std::fs::read_to_string(format!("/sys/class/block/ublkb{}/dev", self.info.id));
        let number = number.unwrap_or_default();
        let there = || {
            std::fs::metadata(&life.path).is_ok_and(|m| {
                let is = format!("{}:{}", libc::major(m.rdev()), libc::minor(m.rdev()));
                m.file_type().is_block_device() && is == number.trim()
            })
        };
        // The owner of an unprivileged one is to be able to open it, too.
        let unprivileged = self.info.features.contains(Features::UNPRIVILEGED_DEV);
        let right = || there() && (!unprivileged || may_read(&life.path));
        if right() {
            return Ok(());
        }
        let patience = deadline.min(Instant::now() + PATIENCE);
        let watch = Watch::on(Path::new("/dev"));
        while Instant::now() < patience {
            if right() {
                return Ok(());
            }
            watch.wait(Some(patience.saturating_duration_since(Instant::now())));
        }
        if there() {
            life.warn(format!(
                "{} was not given to the device's owner: {NO_UDEV_RULES}",
                life.path.display()
            ));
            return Ok(());
        }
        life.warn(format!(
            "{} did not appear: /dev is neither a devtmpfs nor kept by udev; make the node by hand (mknod {} b \
             {})",
            life.path.display(),
            life.path.display(),
            number.trim().replace(':', " ")
        ));
        Ok(())
    }
}

/// For a queue that is not given to its worker, because another was not taken.
fn unfit(id: u32) -> Error {
    Error::new(ErrorKind::WrongState, "give the queue to a worker")
        .on_device(id)
        .because("the device is not started after all")
}

impl std::fmt::Debug for Added {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Added").field("info", &self.guard.info).finish_non_exhaustive()
    }
}
