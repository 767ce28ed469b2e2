//! A device that is served, and pools of workers.

use std::io::{PipeReader, Write, pipe};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use pyo3::exceptions::{PyBaseException, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use ublk_core::control::{CancelToken, Wait};
use ublk_core::{Ending, Errno, Error, ErrorKind, Running};

use crate::attend::Interpreter;
use crate::calls::Sink;
use crate::errors::{OrRaise, StateError, raise, still_held};
use crate::halted::Halted;
use crate::interrupt::{Token, interruptible, left_alone};
use crate::machine::describe;
use crate::pool::Pool;
use crate::share::{SharedBuffer, Sharing};
use crate::stats::stats;

/// A live device's handle.
#[pyclass(frozen, module = "ublk._native")]
pub(crate) struct Device {
    running: Arc<Mutex<Option<Running>>>,
    handle: ublk_core::Device,
    sink: Option<Arc<Sink>>,
    pool: Option<Arc<Pool>>,
    ended: Mutex<Option<PipeReader>>,
    /// A forked child has the object, but not the device.
    process: u32,
}

/// How long the threads of a pool are waited for when their device has ended.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same, when a stop was given up.
const BRIEFLY: Duration = Duration::from_millis(100);

impl Device {
    pub(crate) fn new(
        py: Python<'_>,
        running: Running,
        sink: Option<Arc<Sink>>,
        pool: Option<Arc<Pool>>,
    ) -> PyResult<Self> {
        let handle = running.handle();
        let device = Device {
            handle,
            running: Arc::new(Mutex::new(Some(running))),
            sink,
            pool,
            ended: Mutex::default(),
            process: std::process::id(),
        };
        let lives = device.sink.as_ref().is_none_or(|sink| sink.set_device(device.handle.clone()));
        if !lives {
            device.stop(py, 5.0, true, None)?;
            if let Some(fatal) = device.take_fatal() {
                return Err(PyErr::from_value(fatal.into_bound(py).into_any()));
            }
        }
        Ok(device)
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what would wait for its own caller.
    fn check_thread(&self, what: &str) -> PyResult<()> {
        match self.sink.as_ref().is_some_and(|sink| sink.is_current()) {
            true => Err(StateError::new_err(format!(
                "cannot {what} (device {}): the caller is a method of its backend, and would wait for itself",
                self.handle.id()
            ))),
            false => Ok(()),
        }
    }
}

/// The pool's threads go when there are no more requests. How many are stuck.
fn end_pool(pool: Option<&Pool>, patience: Duration) -> usize {
    match pool {
        Some(pool) => {
            pool.close();
            pool.wait(patience)
        }
        None => 0,
    }
}

/// Threads that stop devices whose handles are gone. Locked by threads only that are attached to the interpreter, as the
/// one is that forks: so a child never finds it locked.
static ENDING: Mutex<Vec<(Why, JoinHandle<()>)>> = Mutex::new(Vec::new());

/// Why a thread is at work that nobody waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// An exception came between a start, or a halt, and whoever was to have the handle.
    HandleLost,
    /// The handle was collected, or a call given up.
    Abandoned,
}

fn ending() -> MutexGuard<'static, Vec<(Why, JoinHandle<()>)>> {
    ENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The program does not end before the thread, which takes seconds at the most.
pub(crate) fn finish_before_exit(why: Why, thread: JoinHandle<()>) {
    let mut ending = ending();
    ending.retain(|(_, thread)| !thread.is_finished());
    ending.push((why, thread));
}

/// On a thread of its own, which the program waits for when it ends.
pub(crate) fn end_apart(why: Why, end: impl FnOnce() + Send + 'static) {
    // Without a thread for it, here; it takes seconds at the most.
    match std::thread::Builder::new().name("ublk-py-stop".into()).spawn(end) {
        Ok(thread) => finish_before_exit(why, thread),
        Err(error) => crate::log::complaint(format!("no thread to stop a device: {error}")),
    }
}

/// Before the program ends: a device that is being stopped would stay behind, dead.
#[pyfunction]
pub(crate) fn finish_endings(py: Python<'_>) {
    let threads = std::mem::take(&mut *ending());
    // Each of them ends within seconds, as stops by force do.
    py.detach(|| threads.into_iter().for_each(|(_, thread)| drop(thread.join())));
}

/// Waits for the ends of devices whose handles were lost; a signal's handler that raises ends the wait.
#[pyfunction]
pub(crate) fn await_lost(py: Python<'_>) -> PyResult<()> {
    let lost: Vec<_> = ending().extract_if(.., |(why, _)| *why == Why::HandleLost).collect();
    if lost.is_empty() {
        return Ok(());
    }
    interruptible(py, &CancelToken::new(), || {
        lost.into_iter().for_each(|(_, thread)| drop(thread.join()));
    })
}

/// In a forked child, which has none of these threads.
pub(crate) fn forget_endings() {
    std::mem::forget(std::mem::take(&mut *ending()));
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|e| PyValueError::new_err(format!("{name}={value}: {e}")))
}

#[pymethods]
impl Device {
    #[getter]
    fn id(&self) -> u32 {
        self.handle.id()
    }

    #[getter]
    fn path(&self) -> String {
        self.handle.path().display().to_string()
    }

    #[getter]
    fn features(&self) -> Vec<String> {
        crate::machine::names(self.handle.features())
    }

    #[getter]
    fn data_path(&self) -> String {
        self.handle.data_path().to_string()
    }

    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.handle.warnings()
    }

    /// The device as the driver described it, and its present size.
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let info = describe(py, self.handle.info())?;
        // A resize that is under way keeps them.
        let params = py.detach(|| self.handle.params());
        info.set_item("size", params.capacity())?;
        info.set_item("block_size", params.logical_block_size())?;
        Ok(info)
    }

    /// The driver's word for where the device is in its life.
    fn state(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| self.handle.state()).map(|s| s.to_string()).or_raise(py)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        stats(py, &self.handle.stats())
    }

    /// Bytes of the disk.
    #[getter]
    fn size(&self) -> u64 {
        self.handle.params().capacity()
    }

    fn resize(&self, py: Python<'_>, size: u64) -> PyResult<()> {
        self.check_thread("resize the device")?;
        let handle = self.handle.clone();
        left_alone(py, move || handle.resize(size))?.or_raise(py)
    }

    /// Stops and deletes; what could not be cleaned up, in words.
    ///
    /// A signal's handler that raises has the deadline come at once, as the token does.
    #[pyo3(signature = (timeout, force, token=None))]
    fn stop(
        &self,
        py: Python<'_>,
        timeout: f64,
        force: bool,
        token: Option<&Token>,
    ) -> PyResult<Vec<String>> {
        self.check_thread("stop the device")?;
        let within = seconds("timeout", timeout)?;
        let token = token.map_or_else(CancelToken::new, |token| token.0.clone());
        let wait = Wait::for_(within).cancelled_by(&token);
        let (handle, running, pool) =
            (self.handle.clone(), Arc::clone(&self.running), self.pool.clone());
        let token_of_stop = token.clone();
        let stopped = interruptible(py, &token, move || {
            let stopped = match force {
                true => handle.stop_force_with(&wait),
                false => handle.stop_with(&wait),
            };
            stopped.map(|stopped| {
                // It has nothing left to do.
                drop(running.lock().unwrap_or_else(PoisonError::into_inner).take());
                let mut leftovers = stopped.leftovers;
                // Whoever gave it up does not wait for who may never come.
                let patience = if token_of_stop.is_cancelled() { BRIEFLY } else { PATIENCE };
                match end_pool(pool.as_deref(), patience) {
                    0 => {}
                    stuck => leftovers.push(format!("{stuck} thread(s) are stuck in the backend")),
                }
                leftovers
            })
        })?;
        stopped.map_err(|error| match error.kind() {
            ErrorKind::Busy => still_held(py, &error),
            _ => raise(py, &error),
        })
    }

    /// Takes the disk away and keeps the device, for another life.
    #[pyo3(signature = (timeout, token=None))]
    fn halt(&self, py: Python<'_>, timeout: f64, token: Option<&Token>) -> PyResult<Halted> {
        self.check_caller(py, "halt the device")?;
        let within = seconds("timeout", timeout)?;
        let token = token.map_or_else(CancelToken::new, |token| token.0.clone());
        let wait = Wait::for_(within).cancelled_by(&token);
        let (running, pool, id) = (Arc::clone(&self.running), self.pool.clone(), self.handle.id());
        let halted = interruptible(py, &token, move || {
            let lock = || running.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(taken) = lock().take() else {
                return Err(Error::new(ErrorKind::WrongState, "halt the device")
                    .on_device(id)
                    .because("it has been stopped or handed over"));
            };
            match taken.halt_with(&wait) {
                Ok(added) => {
                    end_pool(pool.as_deref(), PATIENCE);
                    Ok(added)
                }
                Err(failed) => {
                    *lock() = Some(failed.device);
                    Err(failed.error)
                }
            }
        })?;
        halted.map(Halted::new).map_err(|error| match error.kind() {
            ErrorKind::Busy => still_held(py, &error),
            _ => raise(py, &error),
        })
    }

    /// Has clients' data in this memory used where it is; the buffer's number.
    fn share(&self, py: Python<'_>, buffer: &SharedBuffer) -> PyResult<u16> {
        self.check_thread("share memory")?;
        let (handle, buffer) = (self.handle.clone(), Arc::clone(&buffer.0));
        let shared = left_alone(py, move || Sharing::begin(handle, &buffer))?;
        shared.map(Sharing::number).or_raise(py)
    }

    fn unshare(&self, py: Python<'_>, number: u16) -> PyResult<()> {
        self.check_thread("end the sharing of memory")?;
        let handle = self.handle.clone();
        left_alone(py, move || handle.unshare(number))?.or_raise(py)
    }

    /// Gives the disk to the next server.
    fn hand_over(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        self.check_thread("hand the device over")?;
        let within = seconds("timeout", timeout)?;
        let (running, pool, id) = (Arc::clone(&self.running), self.pool.clone(), self.handle.id());
        // Nothing takes it back: whoever gives it up leaves it to its end.
        let handed = interruptible(py, &CancelToken::new(), move || {
            let lock = || running.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(taken) = lock().take() else {
                return Err(Error::new(ErrorKind::WrongState, "hand the device over")
                    .on_device(id)
                    .because("it has been stopped or handed over"));
            };
            match taken.hand_over(within) {
                Ok(()) => {
                    end_pool(pool.as_deref(), PATIENCE);
                    Ok(())
                }
                Err(failed) => {
                    *lock() = Some(failed.device);
                    Err(failed.error)
                }
            }
        })?;
        handed.or_raise(py)
    }

    /// Raises a StateError if the caller is a method of a backend that a thread of the device's has called.
    fn check_caller(&self, py: Python<'_>, what: &str) -> PyResult<()> {
        self.check_thread(what)?;
        // Also one of another device's, on a worker that serves this one as well.
        match self.handle.wait_timeout(Duration::ZERO) {
            Err(error) if error.kind() == ErrorKind::WouldDeadlock => Err(raise(py, &error)),
            _ => Ok(()),
        }
    }

    /// A descriptor that is readable when the device has ended.
    fn ended_fd(&self) -> PyResult<i32> {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reader) = &*ended {
            return Ok(reader.as_raw_fd());
        }
        let (reader, mut writer) = pipe()?;
        let handle = self.handle.clone();
        std::thread::Builder::new().name("ublk-py-wait".into()).spawn(move || {
            // How it ended is asked for by who reads. A byte and not the end of the pipe, which a forked child may
            // have open, too.
            let _ = handle.wait();
            let _ = writer.write_all(b".");
        })?;
        let fd = reader.as_raw_fd();
        *ended = Some(reader);
        Ok(fd)
    }

    /// Whether it has.
    fn has_ended(&self) -> bool {
        self.handle.ending().is_some()
    }

    /// How the device ended, None while it lives; raises what took it down.
    fn ending(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        let ending = match self.handle.ending() {
            None => return Ok(None),
            Some(Ending::Failed) => self.handle.wait().or_raise(py)?,
            Some(ending) => ending,
        };
        Ok(Some(match ending {
            Ending::Stopped => "stopped",
            Ending::StoppedByOthers => "stopped-by-others",
            Ending::HandedOver => "handed-over",
            Ending::Failed => "failed",
            _ => "ended",
        }))
    }

    /// What a handler raised that ends the device, once.
    fn take_fatal(&self) -> Option<Py<PyBaseException>> {
        self.sink.as_ref()?.take_fatal()
    }

    /// Stops by force, without waiting; `then` is called when that is done.
    #[pyo3(signature = (then=None))]
    fn abandon(&self, then: Option<Py<PyAny>>) {
        self.end_apart(Why::Abandoned, PATIENCE, then);
    }
}

impl Device {
    /// Stops by force, on a thread of its own.
    fn end_apart(&self, why: Why, within: Duration, then: Option<Py<PyAny>>) {
        let (running, pool) = (self.running().take(), self.pool.clone());
        let Some(running) = running else { return };
        let end = move || {
            if let Err(failed) = running.stop_force(within) {
                crate::log::complaint(format!("a device was not stopped: {}", failed.error));
            }
            if let Some(pool) = pool {
                pool.close();
            }
            // Not at all if the interpreter is going.
            let _ = Python::try_attach(|py| {
                if let Some(Err(error)) = then.map(|then| then.bind(py).call0().map(drop)) {
                    crate::log::exception(py, "after a device that was not closed".into(), &error);
                }
            });
        };
        end_apart(why, end);
    }
}

impl Drop for Device {
    /// Whoever loses the handle (by an exception in the moment of the start, say) is attached to the interpreter, and
    /// the workers that would be waited for may need it.
    fn drop(&mut self) {
        if std::process::id() == self.process {
            // Nobody knows of its disk yet: what the kernel asks of it is not waited for.
            self.end_apart(Why::HandleLost, Duration::ZERO, None);
        }
    }
}

/// Worker threads that devices share, in place of one for each queue: for many devices.
///
/// A backend that blocks stalls every device on its worker: give such a device ``threads``. The threads are started with
/// the first device, and end with the pool and the last one.
///
/// Args:
///     count: How many, 1 to 1024.
///
/// Raises:
///     ValueError: It is another number.
///
/// >>> import contextlib, ublk
/// >>> pool = ublk.Workers(2)
/// >>> with contextlib.ExitStack() as stack:
/// ...     disks = [ublk.Device(ublk.Null(), size="1GiB", workers=pool) for _ in range(3)]
/// ...     len({stack.enter_context(disk).path for disk in disks})
/// 3
#[pyclass(frozen, module = "ublk")]
pub(crate) struct Workers {
    count: usize,
    /// For devices that no Python code serves.
    plain: OnceLock<ublk_core::Workers>,
    /// For the others: these workers are attached to the interpreter.
    attached: OnceLock<ublk_core::Workers>,
}

impl Workers {
    pub(crate) fn get(&self, py: Python<'_>, python: bool) -> PyResult<ublk_core::Workers> {
        let cell = if python { &self.attached } else { &self.plain };
        if let Some(workers) = cell.get() {
            return Ok(workers.clone());
        }
        let made = py.detach(|| match python {
            true => ublk_core::Workers::with_attendant(self.count, Arc::new(Interpreter)),
            false => ublk_core::Workers::new(self.count),
        });
        let made = made.or_raise(py)?;
        Ok(cell.get_or_init(|| made).clone())
    }
}

#[pymethods]
impl Workers {
    #[new]
    fn new(count: usize) -> PyResult<Self> {
        if !(1..=1024).contains(&count) {
            return Err(PyValueError::new_err(format!("count={count}: 1 to 1024 workers")));
        }
        Ok(Workers { count, plain: OnceLock::new(), attached: OnceLock::new() })
    }

    /// How many there are, 1 to 1024.
    ///
    /// >>> ublk.Workers(2).count
    /// 2
    #[getter]
    fn count(&self) -> usize {
        self.count
    }
}

/// For functions that take an errno from a failed call.
pub(crate) fn io_error(error: &std::io::Error) -> PyErr {
    let errno = Errno::from(error).raw();
    pyo3::exceptions::PyOSError::new_err((errno, error.to_string()))
}
