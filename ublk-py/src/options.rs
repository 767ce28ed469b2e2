//! A device as Python describes it, checked before anything exists.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::{PyTraverseError, PyVisit};
use ublk_core::control::{Control, Discard, Features, SegmentLimits, Zoned};
use ublk_core::{Builder, Capabilities, DataPath};

use crate::attend::Interpreter;
use crate::calls::{Calls, Sink};
use crate::device::{Device, Workers};
use crate::errors::{OrRaise, StateError};
use crate::integrity::Described;
use crate::interrupt::{Token, interruptible};
use crate::line::Inbox;
use crate::pool::Pool;
use crate::serve::{Server, Way};
use crate::targets::ready_made;

/// A device's description; `start` or `recover` uses it up.
#[pyclass(frozen, module = "ublk._native")]
pub(crate) struct Spec {
    described: Mutex<Option<(Builder, Option<Server>)>>,
    threads: usize,
}

/// `UBLK_MINORS` of the driver, which refuses others late and in fewer words.
const MINORS: u32 = 1 << 20;

/// Options by name, as the Python side has read them.
struct Options<'a, 'py>(&'a Bound<'py, PyDict>);

impl<'py> Options<'_, 'py> {
    /// An option that was given.
    fn get<T>(&self, name: &str) -> PyResult<Option<T>>
    where
        T: for<'a> FromPyObject<'a, 'py>,
    {
        let Some(value) = self.0.get_item(name)?.filter(|value| !value.is_none()) else {
            return Ok(None);
        };
        value.extract::<T>().map(Some).map_err(|error| {
            let error: PyErr = error.into();
            let py = self.0.py();
            let why = error.value(py);
            let text = format!("{name}={value}: {why}");
            match error.is_instance_of::<PyOverflowError>(py) {
                true => PyValueError::new_err(text),
                false => PyTypeError::new_err(text),
            }
        })
    }

    fn features(&self, name: &str) -> PyResult<Features> {
        let py = self.0.py();
        let names: Vec<String> = self.get(name)?.unwrap_or_default();
        names
            .iter()
            .try_fold(Features::NONE, |all, one| Ok(all | one.parse::<Features>().or_raise(py)?))
    }
}

/// Applies each option that was given by the builder's method of that name, or the one after `=>`.
macro_rules! apply {
    ($builder:ident, $options:ident, $($name:literal: $ty:ty => $method:ident),* $(,)?) => {
        $(if let Some(value) = $options.get::<$ty>($name)? {
            $builder = $builder.$method(value);
        })*
    };
}

#[pymethods]
impl Spec {
    /// `backend`: `Calls`, or a ready-made one. `inbox` for one that an asyncio loop serves; `raw` for one that is
    /// handed the requests.
    #[new]
    #[pyo3(signature = (backend, size, options, inbox=None, raw=false))]
    fn new(
        py: Python<'_>,
        backend: &Bound<'_, PyAny>,
        size: Option<u64>,
        options: &Bound<'_, PyDict>,
        inbox: Option<&Bound<'_, Inbox>>,
        raw: bool,
    ) -> PyResult<Self> {
        let options = Options(options);
        let threads = options.get::<usize>("threads")?.unwrap_or(0);
        if threads > 1024 {
            return Err(PyValueError::new_err(format!("threads={threads}: at most 1024")));
        }
        if let Some(id) = options.get::<u32>("id")?.filter(|id| *id >= MINORS) {
            return Err(PyValueError::new_err(format!(
                "id={id}: below {MINORS}, the driver's minors"
            )));
        }
        let (mut builder, server) = match backend.cast::<Calls>() {
            Ok(calls) => {
                let size = size.ok_or_else(|| PyValueError::new_err("size is missing"))?;
                let (builder, server) = python(calls, size, &options, threads, inbox, raw)?;
                (builder, Some(server))
            }
            Err(_) => {
                if threads > 0 {
                    return Err(PyValueError::new_err(
                        "threads are for backends in Python: ready-made ones do not block their queue",
                    ));
                }
                (ready_made(backend, size)?, None)
            }
        };
        let mut able = Capabilities::NONE;
        if options.get::<bool>("cache")? == Some(false) {
            able = able | Capabilities::FLUSH;
        }
        if options.get::<bool>("fua")? == Some(false) {
            able = able | Capabilities::FUA;
        }
        builder = builder.without(able);
        apply!(builder, options,
            "queues": u16 => queues,
            "depth": u16 => queue_depth,
            "max_io_size": u32 => max_io_bytes,
            "block_size": u32 => logical_block_size,
            "physical_block_size": u32 => physical_block_size,
            "io_min": u32 => io_min,
            "io_opt": u32 => io_opt,
            "rotational": bool => rotational,
            "dma_alignment": u32 => dma_alignment,
            "read_only": bool => read_only,
            "id": u32 => id,
            "fingerprint": u64 => fingerprint,
            "force": bool => force,
            "workers_per_queue": u16 => workers_per_queue,
            "pin": bool => pin,
            "populate": bool => populate,
            "huge_pages": bool => huge_pages,
            "descriptor_size": u16 => descriptor_bytes,
            "max_zero_size": u64 => max_write_zeroes_bytes,
            "allow_many_unprivileged": bool => allow_many_unprivileged,
        );
        if let Some((boundary_mask, max_size, max_count)) = options.get("segments")? {
            builder = builder.segments(SegmentLimits { boundary_mask, max_size, max_count });
        }
        if let Some((granularity, alignment, max_bytes)) =
            options.get::<(u32, u32, Option<u64>)>("trim")?
        {
            let mut discard = Discard { alignment, ..Discard::granules_of(granularity) };
            discard.max_bytes = max_bytes.unwrap_or(discard.max_bytes);
            builder = builder.discard(discard);
        }
        if let Some((zone_bytes, max_open, max_active, max_append_bytes)) = options.get("zoned")? {
            builder = builder.zoned(Zoned { zone_bytes, max_open, max_active, max_append_bytes });
        }
        if let Some(integrity) = options.get::<Described>("integrity")? {
            builder = builder.integrity(integrity.read()?);
        }
        if let Some(path) = options.get::<String>("data_path")? {
            builder = builder.data_path(path.parse::<DataPath>().or_raise(py)?);
        }
        if let Some(seconds) = options.get::<f64>("start_timeout")? {
            let timeout = Duration::try_from_secs_f64(seconds)
                .map_err(|e| PyValueError::new_err(format!("start_timeout={seconds}: {e}")))?;
            builder = builder.start_timeout(timeout);
        }
        if let Some(workers) = options.get::<Py<Workers>>("workers")? {
            builder = builder.workers(&workers.get().get(py, server.is_some())?);
        }
        builder = builder
            .require(options.features("require")?)
            .prefer(options.features("prefer")?)
            .forbid(options.features("forbid")?);
        builder.check().or_raise(py)?;
        Ok(Spec { described: Mutex::new(Some((builder, server))), threads })
    }

    /// The backend, until it goes to the device: its methods' references are the builder's alone.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.described.try_lock().as_deref() {
            Ok(Some((_, Some(server)))) => visit.call(&*server.calls),
            _ => Ok(()),
        }
    }

    /// Adds and starts the device; returns when its disk can be used.
    fn start(&self, py: Python<'_>, token: &Token) -> PyResult<Device> {
        self.bring_up(py, token, |builder| builder.start())
    }

    /// Takes over device `id`, whose server is gone.
    fn recover(&self, py: Python<'_>, id: u32, token: &Token) -> PyResult<Device> {
        self.bring_up(py, token, move |builder| builder.recover(id, &Control::open()?))
    }
}

impl Spec {
    /// Takes the description to a live device.
    pub(crate) fn bring_up(
        &self,
        py: Python<'_>,
        token: &Token,
        up: impl FnOnce(Builder) -> ublk_core::Result<ublk_core::Running> + Send + 'static,
    ) -> PyResult<Device> {
        let described = self.described.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (builder, server) =
            described.ok_or_else(|| StateError::new_err("the device was started before"))?;
        let pool = match &server {
            Some(Server { way: Way::Threads(pool), calls, sink }) => {
                pool.launch(self.threads, calls, sink)?;
                Some(Arc::clone(pool))
            }
            _ => None,
        };
        let builder = builder.cancelled_by(&token.0);
        let running = interruptible(py, &token.0, move || up(builder));
        let running = running.and_then(|running| running.or_raise(py));
        if running.is_err()
            && let Some(pool) = &pool
        {
            pool.close();
        }
        let running = running?;
        let sink = server.as_ref().map(|server| Arc::clone(&server.sink));
        Device::new(py, running, sink, pool)
    }
}

/// A device that Python code serves.
fn python(
    calls: &Bound<'_, Calls>,
    size: u64,
    options: &Options<'_, '_>,
    threads: usize,
    inbox: Option<&Bound<'_, Inbox>>,
    raw: bool,
) -> PyResult<(Builder, Server)> {
    let sink = inbox.map_or_else(Arc::<Sink>::default, |inbox| Arc::clone(&inbox.get().sink));
    let way = match inbox {
        Some(inbox) => Way::Loop(Arc::clone(&inbox.get().line)),
        None if raw => Way::Raw,
        None if threads > 0 => Way::Threads(Arc::new(Pool::default())),
        None => Way::Inline,
    };
    if threads > 0 && !matches!(way, Way::Threads(_)) {
        return Err(PyValueError::new_err(
            "threads are for backends with blocking methods: async ones and handle() overlap by themselves",
        ));
    }
    let calls = Arc::new(calls.clone().unbind());
    let mut able = calls.get().capabilities();
    // Of a raw backend only it knows.
    for (name, capability) in [
        ("can_write", Capabilities::WRITE),
        ("can_flush", Capabilities::FLUSH),
        ("can_fua", Capabilities::FUA),
        ("can_trim", Capabilities::DISCARD),
        ("can_zero", Capabilities::WRITE_ZEROES),
    ] {
        match options.get::<bool>(name)? {
            Some(true) => able = able | capability,
            Some(false) => able = able.without(capability),
            None => {}
        }
    }
    if calls.get().is_raw() && options.0.contains("zoned")? {
        able = able | Capabilities::ZONED;
    }
    if options.get::<Described>("integrity")?.is_some() {
        able = able | Capabilities::INTEGRITY;
    }
    let server = Server { calls, sink, way };
    let theirs = server.clone();
    let builder = Builder::with_handlers(size, able, move |_queue| theirs.handler());
    Ok(match server.way {
        // Their workers run no Python.
        Way::Threads(_) | Way::Loop(_) => (builder, server),
        _ => (builder.attendant(Arc::new(Interpreter)), server),
    })
}
