//! Ready-made backends that misbehave on purpose: rules before another one, and a cache whose power can be cut.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use ublk_core::targets::{self as core, Action, Faults, OnWorker, Power, Rule, RuleId};
use ublk_core::{Backend, Builder, Capabilities, Errno, Op};

use crate::device::io_error;
use crate::errors::OrRaise;
use crate::files::{File, Stripe};
use crate::targets::{self, Mem, Null, ZonedMem, parse_bytes};
use crate::wrapped::Wrapped;

/// What the rules come before.
#[derive(Clone)]
enum Behind {
    Null(core::Fault<OnWorker<core::Null>>),
    Mem(core::Fault<OnWorker<core::Mem>>),
    File(core::Fault<core::File>),
    Stripe(core::Fault<core::Stripe>),
    Cache(core::Fault<OnWorker<core::WriteCache<Arc<Wrapped>>>>),
}

/// Another ready-made backend, and rules that come before it: requests fail, are late, hang or get lost. For tests of what
/// uses the disk. Rules are changed while it is in use. See ``docs/faults.md``.
///
/// >>> import errno, mmap, ublk
/// >>> fault = ublk.Fault(ublk.Mem("1MiB"))
/// >>> with ublk.Device(fault) as dev:
/// ...     rule = fault.add("error", errno=errno.ENOSPC, ops=["write"])
/// ...     disk = os.open(dev.path, os.O_WRONLY | os.O_DIRECT)
/// ...     try:
/// ...         _ = os.pwritev(disk, [mmap.mmap(-1, 4096)], 0)
/// ...     except OSError as error:
/// ...         print(errno.errorcode[error.errno])
/// ...     finally:
/// ...         os.close(disk)
/// ENOSPC
#[pyclass(frozen, module = "ublk")]
pub(crate) struct Fault {
    behind: Behind,
    calls: Wrapped,
    faults: Faults,
    /// The rules by the numbers that Python has for them.
    rules: std::sync::Mutex<Vec<RuleId>>,
}

fn op_of(name: &str) -> PyResult<Op> {
    Ok(match name {
        "read" => Op::Read,
        "write" => Op::Write,
        "flush" => Op::Flush,
        "trim" => Op::Discard,
        "zero" => Op::WriteZeroes,
        other => {
            return Err(PyValueError::new_err(format!(
                "ops: {other:?} is none of read, write, flush, trim, zero"
            )));
        }
    })
}

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|e| PyValueError::new_err(format!("delay={value}: {e}")))
}

/// One number of seconds, or the least and the most.
fn delay_of(value: Option<&Bound<'_, PyAny>>) -> PyResult<Action> {
    let value = value.ok_or_else(|| PyTypeError::new_err("a delay needs delay=SECONDS"))?;
    if let Ok((least, most)) = value.extract::<(f64, f64)>() {
        return Ok(Action::Delay { least: seconds(least)?, most: seconds(most)? });
    }
    Ok(Action::delay(seconds(value.extract()?)?))
}

impl Fault {
    pub(crate) fn size(&self) -> Option<u64> {
        self.calls.size()
    }

    pub(crate) fn calls(&self) -> Wrapped {
        self.calls.clone()
    }

    /// `size` is the own one, if there is one.
    pub(crate) fn builder(&self, size: u64) -> Builder {
        match self.behind.clone() {
            Behind::Null(fault) => fault.builder(size),
            Behind::Mem(fault) => fault.builder(),
            Behind::File(fault) => fault.builder(),
            Behind::Stripe(fault) => fault.builder(),
            Behind::Cache(fault) => blocks(Builder::new_async(size, fault), &self.calls),
        }
    }

    fn ids(&self) -> std::sync::MutexGuard<'_, Vec<RuleId>> {
        self.rules.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[pymethods]
impl Fault {
    #[new]
    fn new(backend: &Bound<'_, PyAny>) -> PyResult<Self> {
        let calls = calls_of(backend)?;
        let behind = if backend.is_instance_of::<Null>() {
            Behind::Null(core::Fault::new(OnWorker(core::Null::new())))
        } else if let Ok(mem) = backend.cast::<Mem>() {
            Behind::Mem(core::Fault::new(OnWorker(mem.get().inner())))
        } else if let Ok(file) = backend.cast::<File>() {
            Behind::File(core::Fault::new(file.get().inner()))
        } else if let Ok(stripe) = backend.cast::<Stripe>() {
            Behind::Stripe(core::Fault::new(stripe.get().inner()))
        } else if let Ok(cache) = backend.cast::<WriteCache>() {
            Behind::Cache(core::Fault::new(OnWorker(cache.get().cache.clone())))
        } else {
            return Err(PyTypeError::new_err(
                "Fault wraps Null, Mem, File, Stripe or WriteCache, not another Fault: one takes any number of rules",
            ));
        };
        // The same rules hold on both ways to the backend.
        let (faults, calls) = match &behind {
            Behind::Null(fault) => (fault.faults(), fault.beside(calls)),
            Behind::Mem(fault) => (fault.faults(), fault.beside(calls)),
            Behind::File(fault) => (fault.faults(), fault.beside(calls)),
            Behind::Stripe(fault) => (fault.faults(), fault.beside(calls)),
            Behind::Cache(fault) => (fault.faults(), fault.beside(calls)),
        };
        let calls = Wrapped::Fault(Arc::new(calls));
        Ok(Fault { behind, calls, faults, rules: std::sync::Mutex::default() })
    }

    /// Bytes of the disk; None of a `Null`.
    ///
    /// >>> ublk.Fault(ublk.Mem("1MiB")).size
    /// 1048576
    #[getter(size)]
    fn own_size(&self) -> Option<u64> {
        self.size()
    }

    /// Adds a rule behind those that are there, and returns its number.
    ///
    /// A request matches if its operation is among ``ops`` and it touches ``range``. Of those that match, the first ``skip``
    /// are passed over; of the others each ``every``-th is taken, and of these each by ``probability``; ``limit`` times at most.
    ///
    /// Args:
    ///     action: ``"error"`` (with ``errno``), ``"delay"`` (with ``delay``), ``"hold"`` (until `release`), ``"drop"``,
    ///         ``"panic"``, or ``"abort"``, which kills this process.
    ///     errno: What the client sees, where the kernel carries it.
    ///     delay: Seconds, or the least and the most of them.
    ///     ops: Of ``"read"``, ``"write"``, ``"flush"``, ``"trim"`` and ``"zero"``. Default all.
    ///     range: First byte, and the one after the last. Default the whole disk.
    ///     probability: 0 to 1.
    ///     every: 1 for all.
    ///     skip: How many are passed over.
    ///     limit: How often at most. Default without end.
    ///
    /// Raises:
    ///     ValueError: An argument is out of its range.
    ///
    /// >>> fault = ublk.Fault(ublk.Mem("1MiB"))
    /// >>> fault.add("delay", delay=(0.001, 0.01), ops=["read"], probability=0.1) >= 0
    /// True
    #[pyo3(signature = (action, *, errno=None, delay=None, ops=None, range=None, probability=1.0, every=1, skip=0, limit=None))]
    #[allow(clippy::too_many_arguments, reason = "keywords, to Python")]
    fn add(
        &self,
        py: Python<'_>,
        action: &str,
        errno: Option<i32>,
        delay: Option<Bound<'_, PyAny>>,
        ops: Option<Vec<String>>,
        range: Option<(u64, u64)>,
        probability: f64,
        every: u64,
        skip: u64,
        limit: Option<u64>,
    ) -> PyResult<u64> {
        let action = match action {
            "error" => {
                let number =
                    errno.ok_or_else(|| PyTypeError::new_err("an error needs errno=NUMBER"))?;
                let errno = Errno::new(number).ok_or_else(|| {
                    PyValueError::new_err(format!("errno={number}: a number from 1 to 4095"))
                })?;
                Action::Error(errno)
            }
            "delay" => delay_of(delay.as_ref())?,
            "hold" => Action::Hold,
            "drop" => Action::Drop,
            "panic" => Action::Panic,
            "abort" => Action::Abort,
            other => {
                return Err(PyValueError::new_err(format!(
                    "action={other:?}: one of error, delay, hold, drop, panic, abort"
                )));
            }
        };
        let ops = ops.unwrap_or_default();
        let ops = ops.iter().map(|name| op_of(name)).collect::<PyResult<Vec<_>>>()?;
        let mut rule = Rule::new(action).ops(ops).probability(probability).every(every).skip(skip);
        rule.range = range.map(|(start, end)| Range { start, end });
        rule.limit = limit;
        let id = self.faults.add(rule).or_raise(py)?;
        let mut ids = self.ids();
        ids.push(id);
        // A program does not add so many.
        Ok(ids.len() as u64 - 1)
    }

    /// Takes a rule away; False if it is gone.
    ///
    /// >>> fault = ublk.Fault(ublk.Mem("1MiB"))
    /// >>> rule = fault.add("drop")
    /// >>> fault.remove(rule), fault.remove(rule)
    /// (True, False)
    fn remove(&self, rule: usize) -> bool {
        let id = self.ids().get(rule).copied();
        id.is_some_and(|id| self.faults.remove(id))
    }

    /// Takes all rules away. What is held stays held.
    ///
    /// >>> fault = ublk.Fault(ublk.Mem("1MiB"))
    /// >>> rule = fault.add("drop")
    /// >>> fault.clear()
    /// >>> fault.remove(rule)
    /// False
    fn clear(&self) {
        self.faults.clear();
    }

    /// Starts the sequence of random numbers again.
    ///
    /// >>> ublk.Fault(ublk.Mem("1MiB")).seed(42)
    fn seed(&self, seed: u64) {
        self.faults.seed(seed);
    }

    /// Lets all requests go on that are held, and returns how many those were.
    ///
    /// >>> ublk.Fault(ublk.Mem("1MiB")).release()
    /// 0
    fn release(&self) -> usize {
        self.faults.release()
    }

    /// How many requests are held now.
    ///
    /// >>> ublk.Fault(ublk.Mem("1MiB")).held
    /// 0
    #[getter]
    fn held(&self) -> usize {
        self.faults.held()
    }

    /// Waits until at least ``count`` requests are held; False if they are not within ``timeout`` seconds.
    ///
    /// >>> import threading
    /// >>> fault = ublk.Fault(ublk.Mem("1MiB"))
    /// >>> with ublk.Device(fault) as dev:
    /// ...     rule = fault.add("hold", ops=["read"], range=(1 << 19, (1 << 19) + 512), limit=1)
    /// ...     with open(dev.path, "rb", buffering=0) as disk:
    /// ...         client = threading.Thread(target=os.pread, args=(disk.fileno(), 512, 1 << 19))
    /// ...         client.start()
    /// ...         came = fault.wait_held()
    /// ...         released = fault.release()
    /// ...         client.join()
    /// >>> came, released
    /// (True, 1)
    #[pyo3(signature = (count=1, timeout=30.0))]
    fn wait_held(&self, py: Python<'_>, count: usize, timeout: f64) -> PyResult<bool> {
        const STEP: Duration = Duration::from_millis(100);
        let end = Instant::now() + seconds(timeout)?.min(Duration::from_secs(1 << 30));
        // In steps, as no signal ends one.
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if py.detach(|| self.faults.wait_held(count, left.min(STEP))) {
                return Ok(true);
            }
            py.check_signals()?;
            if left <= STEP {
                return Ok(false);
            }
        }
    }

    /// What has been done so far: ``errors``, ``delays``, ``delayed`` (seconds), ``drops``, ``holds``, ``panics``.
    ///
    /// >>> ublk.Fault(ublk.Mem("1MiB")).injected["errors"]
    /// 0
    #[getter]
    fn injected<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let injected = self.faults.injected();
        let dict = PyDict::new(py);
        dict.set_item("errors", injected.errors)?;
        dict.set_item("delays", injected.delays)?;
        dict.set_item("delayed", injected.delayed.as_secs_f64())?;
        dict.set_item("drops", injected.drops)?;
        dict.set_item("holds", injected.holds)?;
        dict.set_item("panics", injected.panics)?;
        Ok(dict)
    }

    /// Fills ``buf`` from byte ``offset`` of the disk, if no rule has something else in mind: delays and ``hold`` block the caller.
    ///
    /// Raises:
    ///     OSError: What a rule says, or the backend behind.
    ///
    /// >>> disk = ublk.Fault(ublk.Mem("1MiB"))
    /// >>> buf = bytearray(b"data")
    /// >>> disk.pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00\x00\x00')
    fn pread(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64) -> PyResult<()> {
        targets::pread(py, &self.calls, &buf, offset)
    }

    /// Stores ``buf`` from byte ``offset`` of the disk; with ``ublk.Flags.FUA`` it is durable then.
    ///
    /// Raises:
    ///     OSError: What a rule says, or the backend behind.
    ///
    /// >>> disk = ublk.Fault(ublk.Mem("1MiB"))
    /// >>> buf = bytearray(4)
    /// >>> disk.pwrite(b"data", 512, ublk.Flags.FUA)
    /// >>> disk.pread(buf, 512)
    /// >>> buf
    /// bytearray(b'data')
    #[pyo3(signature = (buf, offset, flags=0))]
    fn pwrite(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64, flags: u8) -> PyResult<()> {
        targets::pwrite(py, &self.calls, &buf, offset, flags)
    }

    /// Makes durable what was written.
    ///
    /// Raises:
    ///     OSError: What a rule says, or the backend behind.
    ///
    /// >>> disk = ublk.Fault(ublk.Mem("1MiB"))
    /// >>> disk.flush()
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        targets::flush(py, &self.calls)
    }

    /// Forgets a range. Bytes.
    ///
    /// Raises:
    ///     OSError: What a rule says, or the backend behind.
    ///
    /// >>> disk = ublk.Fault(ublk.Mem("1MiB"))
    /// >>> disk.trim(4096, 0)
    fn trim(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        targets::trim(py, &self.calls, count, offset)
    }

    /// Makes a range read as zeroes. Bytes.
    ///
    /// Raises:
    ///     OSError: What a rule says, or the backend behind.
    ///
    /// >>> disk = ublk.Fault(ublk.Mem("1MiB"))
    /// >>> buf = bytearray(4)
    /// >>> disk.pwrite(b"data", 0)
    /// >>> disk.zero(2, 0)
    /// >>> disk.pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00ta')
    fn zero(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        targets::zero(py, &self.calls, count, offset)
    }

    fn __repr__(&self) -> String {
        format!("<ublk.Fault with {} rules>", self.faults.rules().len())
    }
}

/// The most bytes that a disk of a ready-made backend can have by now; None of one that knows no such bound.
#[pyfunction]
pub(crate) fn room(py: Python<'_>, backend: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    if let Ok(mem) = backend.cast::<Mem>() {
        return Ok(Some(mem.get().inner().size()));
    }
    if backend.is_instance_of::<ZonedMem>() {
        // No zoned disk changes its size, as the library says.
        return Ok(None);
    }
    let calls = calls_of(backend)?;
    py.detach(|| calls.room()).map_err(|e| io_error(&e))
}

/// The calls of a ready-made backend that can be behind another.
fn calls_of(backend: &Bound<'_, PyAny>) -> PyResult<Wrapped> {
    if backend.is_instance_of::<Null>() {
        return Ok(Wrapped::Null);
    }
    if let Ok(mem) = backend.cast::<Mem>() {
        let mem = mem.get().inner();
        if Backend::capabilities(&mem).contains(Capabilities::INTEGRITY) {
            return Err(PyValueError::new_err(
                "a Mem with integrity cannot be behind another backend, which passes no metadata on",
            ));
        }
        return Ok(Wrapped::Mem(mem));
    }
    if let Ok(file) = backend.cast::<File>() {
        return Ok(file.get().calls());
    }
    if let Ok(stripe) = backend.cast::<Stripe>() {
        return Ok(stripe.get().calls());
    }
    if let Ok(fault) = backend.cast::<Fault>() {
        return Ok(fault.get().calls());
    }
    if let Ok(cache) = backend.cast::<WriteCache>() {
        return Ok(cache.get().calls.clone());
    }
    Err(PyTypeError::new_err(format!(
        "{} cannot be behind another backend; one in Python can wrap this one, and raise by itself",
        backend.get_type()
    )))
}

/// The blocks of what is behind.
fn blocks(builder: Builder, calls: &Wrapped) -> Builder {
    let block = calls.block();
    builder.logical_block_size(block).physical_block_size(block.max(4096))
}

/// Another ready-made backend behind a volatile write cache whose power can be cut: what was written since the last flush is lost then.
///
/// Args:
///     backend: What is behind it: `Mem`, `File`, `Stripe` or `Fault`, the latter for errors when the cache is written back.
///     capacity: Bytes that the cache holds; when it is full, all is passed on. Default 256 MiB.
///
/// Raises:
///     ValueError: The files behind it are opened with ``direct=True``.
///
/// >>> import ublk
/// >>> cache = ublk.WriteCache(ublk.Mem("1MiB"))
/// >>> with ublk.Device(cache) as dev:
/// ...     with open(dev.path, "r+b", buffering=0) as disk:
/// ...         _ = disk.write(b"x" * 4096)
/// ...         os.fsync(disk.fileno())
/// ...     cache.cut()
/// 0
#[pyclass(frozen, module = "ublk")]
pub(crate) struct WriteCache {
    pub(crate) cache: core::WriteCache<Arc<Wrapped>>,
    calls: Wrapped,
    size: u64,
    power: Power,
}

impl WriteCache {
    pub(crate) fn builder(&self) -> Builder {
        blocks(Builder::new(self.size, self.cache.clone()), &self.calls)
    }
}

#[pymethods]
impl WriteCache {
    #[new]
    #[pyo3(signature = (backend, *, capacity=None))]
    fn new(
        py: Python<'_>,
        backend: &Bound<'_, PyAny>,
        capacity: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let behind = calls_of(backend)?;
        let Some(size) = behind.size() else {
            return Err(PyTypeError::new_err(
                "WriteCache wraps a backend with contents, not a Null",
            ));
        };
        if behind.is_direct() {
            return Err(PyValueError::new_err(
                "direct=True: a WriteCache passes sectors on, which direct I/O does not take",
            ));
        }
        let behind = Arc::new(behind);
        let cache = match capacity {
            Some(capacity) => {
                core::WriteCache::with_capacity(behind, parse_bytes(py, "capacity", &capacity)?)
            }
            None => core::WriteCache::new(behind),
        };
        let calls = Wrapped::Cache(cache.clone());
        Ok(WriteCache { power: cache.power(), cache, calls, size })
    }

    /// Bytes of the disk.
    ///
    /// >>> ublk.WriteCache(ublk.Mem("1MiB")).size
    /// 1048576
    #[getter]
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Cuts the power: what is not durable is lost, and requests fail with EIO until `restore`. Returns the bytes lost.
    ///
    /// >>> ublk.WriteCache(ublk.Mem("1MiB")).cut()
    /// 0
    fn cut(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.power.cut().lost)
    }

    /// As `cut`, but each sector survives with ``probability``. Returns the bytes lost and those that survived.
    ///
    /// Raises:
    ///     ValueError: The probability is not from 0 to 1.
    ///
    /// >>> ublk.WriteCache(ublk.Mem("1MiB")).cut_some(0.5, seed=1)
    /// (0, 0)
    #[pyo3(signature = (probability, seed=0))]
    fn cut_some(&self, py: Python<'_>, probability: f64, seed: u64) -> PyResult<(u64, u64)> {
        let lost = py.detach(|| self.power.cut_some(probability, seed)).or_raise(py)?;
        Ok((lost.lost, lost.survived))
    }

    /// Requests are served again, from what has survived.
    ///
    /// >>> cache = ublk.WriteCache(ublk.Mem("1MiB"))
    /// >>> _ = cache.cut()
    /// >>> cache.restore()
    /// >>> cache.is_on
    /// True
    fn restore(&self, py: Python<'_>) {
        py.detach(|| self.power.restore());
    }

    /// Whether the power is on.
    ///
    /// >>> ublk.WriteCache(ublk.Mem("1MiB")).is_on
    /// True
    #[getter]
    fn is_on(&self, py: Python<'_>) -> bool {
        py.detach(|| self.power.is_on())
    }

    /// Bytes that a cut would lose now.
    ///
    /// >>> ublk.WriteCache(ublk.Mem("1MiB")).unflushed
    /// 0
    #[getter]
    fn unflushed(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.power.unflushed())
    }

    /// Fills ``buf`` from byte ``offset`` of the disk.
    ///
    /// Raises:
    ///     OSError: EIO while the power is off, EINVAL for parts of sectors, or what the backend behind says.
    ///
    /// >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
    /// >>> buf = bytearray(b"x" * 512)
    /// >>> disk.pread(buf, 0)
    /// >>> buf.count(0)
    /// 512
    fn pread(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64) -> PyResult<()> {
        targets::pread(py, &self.calls, &buf, offset)
    }

    /// Stores ``buf`` from byte ``offset`` of the disk; with ``ublk.Flags.FUA`` it is durable then.
    ///
    /// Raises:
    ///     OSError: EIO while the power is off, EINVAL for parts of sectors, or what the backend behind says.
    ///
    /// >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
    /// >>> buf = bytearray(512)
    /// >>> disk.pwrite(b"x" * 512, 512, ublk.Flags.FUA)
    /// >>> disk.pread(buf, 512)
    /// >>> buf.count(b"x")
    /// 512
    #[pyo3(signature = (buf, offset, flags=0))]
    fn pwrite(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64, flags: u8) -> PyResult<()> {
        targets::pwrite(py, &self.calls, &buf, offset, flags)
    }

    /// Makes durable what was written.
    ///
    /// Raises:
    ///     OSError: The power is off (EIO); or what the backend behind says.
    ///
    /// >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
    /// >>> disk.flush()
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        targets::flush(py, &self.calls)
    }

    /// Forgets a range. Bytes.
    ///
    /// Raises:
    ///     OSError: EIO while the power is off, EINVAL for parts of sectors, or what the backend behind says.
    ///
    /// >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
    /// >>> disk.trim(4096, 0)
    fn trim(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        targets::trim(py, &self.calls, count, offset)
    }

    /// Makes a range read as zeroes. Bytes.
    ///
    /// Raises:
    ///     OSError: EIO while the power is off, EINVAL for parts of sectors, or what the backend behind says.
    ///
    /// >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
    /// >>> buf = bytearray(1024)
    /// >>> disk.pwrite(b"x" * 1024, 0)
    /// >>> disk.zero(512, 0)
    /// >>> disk.pread(buf, 0)
    /// >>> buf.count(b"x")
    /// 512
    fn zero(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        targets::zero(py, &self.calls, count, offset)
    }

    fn __repr__(&self) -> String {
        format!("<ublk.WriteCache of {} bytes>", self.size)
    }
}
