//! Ready-made backends that misbehave on purpose: rules before another one, and a cache whose power can be cut.

use std::ops::Range;
use std::time::Duration;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use ublk_core::targets::{self as core, Action, Faults, OnWorker, Power, Rule, RuleId};
use ublk_core::{Builder, Errno, Op};

use crate::errors::OrRaise;
use crate::targets::{File, Mem, Null, Stripe, parse_size};

/// What the rules come before.
#[derive(Clone)]
enum Behind {
    Null(core::Fault<OnWorker<core::Null>>),
    Mem(core::Fault<OnWorker<core::Mem>>),
    File(core::Fault<core::File>),
    Stripe(core::Fault<core::Stripe>),
    Cache(core::Fault<OnWorker<core::WriteCache<core::Mem>>>),
}

/// Another ready-made backend, and rules that come before it. See `ublk.Fault`.
#[pyclass(frozen, module = "ublk")]
pub(crate) struct Fault {
    behind: Behind,
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
        Some(match &self.behind {
            Behind::Null(_) => return None,
            Behind::Mem(fault) => fault.inner().0.size(),
            Behind::File(fault) => fault.inner().size(),
            Behind::Stripe(fault) => fault.inner().size(),
            Behind::Cache(fault) => fault.inner().0.inner().size(),
        })
    }

    /// `size` is the own one, if there is one.
    pub(crate) fn builder(&self, size: u64) -> Builder {
        match self.behind.clone() {
            Behind::Null(fault) => fault.builder(size),
            Behind::Mem(fault) => fault.builder(),
            Behind::File(fault) => fault.builder(),
            Behind::Stripe(fault) => fault.builder(),
            Behind::Cache(fault) => Builder::new_async(size, fault),
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
            return Err(PyTypeError::new_err(format!(
                "Fault wraps Null, Mem, File, Stripe or WriteCache, not {}; a backend in Python can raise by itself",
                backend.get_type()
            )));
        };
        let faults = match &behind {
            Behind::Null(fault) => fault.faults(),
            Behind::Mem(fault) => fault.faults(),
            Behind::File(fault) => fault.faults(),
            Behind::Stripe(fault) => fault.faults(),
            Behind::Cache(fault) => fault.faults(),
        };
        Ok(Fault { behind, faults, rules: std::sync::Mutex::default() })
    }

    #[getter(size)]
    fn own_size(&self) -> Option<u64> {
        self.size()
    }

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

    fn remove(&self, rule: usize) -> bool {
        let id = self.ids().get(rule).copied();
        id.is_some_and(|id| self.faults.remove(id))
    }

    fn clear(&self) {
        self.faults.clear();
    }

    fn seed(&self, seed: u64) {
        self.faults.seed(seed);
    }

    fn release(&self) -> usize {
        self.faults.release()
    }

    #[getter]
    fn held(&self) -> usize {
        self.faults.held()
    }

    #[pyo3(signature = (count=1, timeout=30.0))]
    fn wait_held(&self, py: Python<'_>, count: usize, timeout: f64) -> PyResult<bool> {
        let timeout = seconds(timeout)?;
        Ok(py.detach(|| self.faults.wait_held(count, timeout)))
    }

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
}

/// A volatile write cache before a `Mem`, whose power can be cut. See `ublk.WriteCache`.
#[pyclass(frozen, module = "ublk")]
pub(crate) struct WriteCache {
    pub(crate) cache: core::WriteCache<core::Mem>,
    power: Power,
}

#[pymethods]
impl WriteCache {
    #[new]
    #[pyo3(signature = (backend, *, capacity=None))]
    fn new(
        py: Python<'_>,
        backend: &Bound<'_, Mem>,
        capacity: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let mem = backend.get().inner();
        let cache = match capacity {
            Some(capacity) => core::WriteCache::with_capacity(mem, parse_size(py, &capacity)?),
            None => core::WriteCache::new(mem),
        };
        Ok(WriteCache { power: cache.power(), cache })
    }

    #[getter]
    pub(crate) fn size(&self) -> u64 {
        self.cache.inner().size()
    }

    fn cut(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.power.cut().lost)
    }

    #[pyo3(signature = (probability, seed=0))]
    fn cut_some(&self, py: Python<'_>, probability: f64, seed: u64) -> PyResult<(u64, u64)> {
        let lost = py.detach(|| self.power.cut_some(probability, seed)).or_raise(py)?;
        Ok((lost.lost, lost.survived))
    }

    fn restore(&self, py: Python<'_>) {
        py.detach(|| self.power.restore());
    }

    #[getter]
    fn is_on(&self, py: Python<'_>) -> bool {
        py.detach(|| self.power.is_on())
    }

    #[getter]
    fn unflushed(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.power.unflushed())
    }

    fn __repr__(&self) -> String {
        format!("ublk.WriteCache(ublk.Mem({}))", self.size())
    }
}
