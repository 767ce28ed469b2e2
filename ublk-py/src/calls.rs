//! The methods of a Python backend, and what comes of calling them.

use std::cell::Cell;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use pyo3::exceptions::{PyBaseException, PyException, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use pyo3::{PyTraverseError, PyVisit};
use pyo3::{import_exception, intern};
use ublk_core::{
    Capabilities, Errno, Gone, KeptBuffer, Op, Request, RequestFlags, Zone, ZoneAction, ZoneKind,
    ZoneState,
};

use crate::buffer::{Buffer, Spares};
use crate::errors::errno_of;
use crate::log;

import_exception!(asyncio, CancelledError);

/// How long a device is given that a handler's `KeyboardInterrupt`, or its like, stops.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// A method, and whether it takes `flags`.
struct Method {
    function: Py<PyAny>,
    flags: bool,
}

/// A backend's methods, found by the Python side.
#[pyclass(frozen, module = "ublk._native")]
pub(crate) struct Calls {
    pread: Option<Method>,
    pwrite: Option<Method>,
    flush: Option<Method>,
    trim: Option<Method>,
    zero: Option<Method>,
    report_zones: Option<Method>,
    append: Option<Method>,
    zone: Option<Method>,
    handle: Option<Method>,
    /// `ublk.Flags` for every combination of [`flag_bits`].
    flags: Vec<Py<PyAny>>,
}

#[pymethods]
impl Calls {
    /// `methods` has `(function, takes flags)` by name; `flags` an object for each of 0 to 31.
    #[new]
    fn new(methods: &Bound<'_, PyDict>, flags: Vec<Py<PyAny>>) -> PyResult<Self> {
        if flags.len() != 32 {
            return Err(PyTypeError::new_err("there are 32 combinations of flags"));
        }
        let method = |name: &str| -> PyResult<Option<Method>> {
            let Some(found) = methods.get_item(name)? else { return Ok(None) };
            let (function, flags) = found.extract()?;
            Ok(Some(Method { function, flags }))
        };
        Ok(Calls {
            pread: method("pread")?,
            pwrite: method("pwrite")?,
            flush: method("flush")?,
            trim: method("trim")?,
            zero: method("zero")?,
            report_zones: method("report_zones")?,
            append: method("append")?,
            zone: method("zone")?,
            handle: method("handle")?,
            flags,
        })
    }

    /// A backend may know its device.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let methods = [
            &self.pread,
            &self.pwrite,
            &self.flush,
            &self.trim,
            &self.zero,
            &self.report_zones,
            &self.append,
            &self.zone,
            &self.handle,
        ];
        methods.into_iter().flatten().try_for_each(|method| visit.call(&method.function))
    }
}

/// The flags that Python sees, as `ublk.Flags` numbers them.
pub(crate) fn flag_bits(flags: RequestFlags) -> u8 {
    u8::from(flags.fua())
        | u8::from(flags.no_unmap()) << 1
        | u8::from(flags.meta()) << 2
        | u8::from(flags.swap()) << 3
        | u8::from(flags.integrity()) << 4
}

/// The name that Python has for an operation.
pub(crate) fn op_name(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write => "write",
        Op::Flush => "flush",
        Op::Discard => "trim",
        Op::WriteZeroes => "zero",
        Op::ZoneAppend => "append",
        Op::ReportZones => "report_zones",
        op => op.zone_action().map_or("unknown", action_name),
    }
}

fn action_name(action: ZoneAction) -> &'static str {
    match action {
        ZoneAction::Open => "open",
        ZoneAction::Close => "close",
        ZoneAction::Finish => "finish",
        ZoneAction::Reset => "reset",
        ZoneAction::ResetAll => "reset_all",
        _ => "unknown",
    }
}

impl Calls {
    /// What the disk can advertise. FUA needs a `pwrite` that sees it.
    pub(crate) fn capabilities(&self) -> Capabilities {
        let mut able = Capabilities::NONE;
        for (is, capability) in [
            (self.pwrite.is_some(), Capabilities::WRITE),
            (self.flush.is_some(), Capabilities::FLUSH),
            (self.trim.is_some(), Capabilities::DISCARD),
            (self.zero.is_some(), Capabilities::WRITE_ZEROES),
            (self.report_zones.is_some(), Capabilities::ZONED),
        ] {
            if is {
                able = able | capability;
            }
        }
        let sees_fua = self.pwrite.as_ref().is_some_and(|m| m.flags);
        if self.flush.is_some() && sees_fua { able | Capabilities::FUA } else { able }
    }

    /// Whether it is handed the requests themselves.
    pub(crate) fn is_raw(&self) -> bool {
        self.handle.is_some()
    }

    /// The method for an operation.
    fn method(&self, op: Op) -> Option<&Method> {
        match op {
            Op::Read => self.pread.as_ref(),
            Op::Write => self.pwrite.as_ref(),
            Op::Flush => self.flush.as_ref(),
            Op::Discard => self.trim.as_ref(),
            Op::WriteZeroes => self.zero.as_ref(),
            Op::ZoneAppend => self.append.as_ref(),
            Op::ReportZones => self.report_zones.as_ref(),
            _ => self.zone.as_ref(),
        }
    }

    /// Calls the backend's method for a request whose data `buffer` shows.
    pub(crate) fn call<'py>(
        &self,
        py: Python<'py>,
        request: &Request,
        buffer: Option<&Bound<'py, Buffer>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let op = request.op();
        let Some(method) = self.method(op) else {
            return Err(Errno::EOPNOTSUPP).map_err(|e| std::io::Error::from(e).into());
        };
        let function = method.function.bind(py);
        let offset = request.offset();
        // The only reference to the view is the arguments', so that a backend which keeps none leaves none.
        let args: Bound<'py, PyTuple> = match (op, buffer) {
            (_, Some(buffer)) => (Buffer::view(buffer)?, offset).into_pyobject(py)?,
            (Op::Flush, None) => PyTuple::empty(py),
            (Op::ReportZones, None) => (offset, request.zones()).into_pyobject(py)?,
            (Op::Discard | Op::WriteZeroes, None) => (request.len(), offset).into_pyobject(py)?,
            (op, None) => (op_name(op), offset).into_pyobject(py)?,
        };
        if !method.flags {
            return function.call1(args);
        }
        let kwargs = PyDict::new(py);
        let flags = &self.flags[usize::from(flag_bits(request.flags()))];
        kwargs.set_item(intern!(py, "flags"), flags)?;
        function.call(args, Some(&kwargs))
    }

    /// The raw level: hands over the request itself.
    pub(crate) fn hand(&self, py: Python<'_>, request: Bound<'_, PyAny>) -> PyResult<()> {
        match &self.handle {
            Some(method) => method.function.bind(py).call1((request,)).map(drop),
            None => Err(PyTypeError::new_err("the backend has no handle()")),
        }
    }
}

/// What a request is answered with.
pub(crate) enum Answer {
    Plain(Result<(), Errno>),
    /// The byte where an append went.
    Appended(u64),
    Zones(Vec<Zone>),
}

impl Answer {
    pub(crate) const EIO: Answer = Answer::Plain(Err(Errno::EIO));

    /// Completes the request; views of its memory that are left keep that.
    pub(crate) fn give(self, mut request: Request, buffer: Option<&Buffer>) -> Result<(), Gone> {
        let kept = close(&mut request, buffer);
        let told = match self {
            Answer::Plain(result) => request.complete(result),
            Answer::Appended(offset) => request.complete_append(offset),
            Answer::Zones(zones) => request.complete_report(&zones),
        };
        keep(buffer, kept);
        told
    }
}

/// Before a request ends: no view is made any more, and the memory of those that are left is theirs.
pub(crate) fn close(request: &mut Request, buffer: Option<&Buffer>) -> Option<KeptBuffer> {
    let seen = buffer.is_some_and(|buffer| !buffer.close());
    seen.then(|| request.keep_buffer())
}

/// After it: until they are gone.
pub(crate) fn keep(buffer: Option<&Buffer>, kept: Option<KeptBuffer>) {
    if let (Some(buffer), Some(kept)) = (buffer, kept) {
        buffer.keep(kept);
    }
}

/// Where a device's handlers report what ends it, and who tells of their mistakes.
#[derive(Default)]
pub(crate) struct Sink {
    /// The device, once it is there.
    device: OnceLock<ublk_core::Device>,
    /// What a handler raised that is no mere failure of a request: `KeyboardInterrupt` and the like.
    fatal: Mutex<Option<Py<PyBaseException>>>,
}

thread_local! {
    /// The sink of the device whose handler is running on this thread; an address that is only compared.
    static SERVING: Cell<*const Sink> = const { Cell::new(std::ptr::null()) };
}

impl Sink {
    /// Calls into the backend.
    pub(crate) fn serving<T>(&self, call: impl FnOnce() -> T) -> T {
        let before = SERVING.replace(self);
        let done = call();
        SERVING.set(before);
        done
    }

    /// Whether the caller is called by a handler of the device, and would wait for itself.
    pub(crate) fn is_current(&self) -> bool {
        std::ptr::eq(SERVING.get(), self)
    }

    /// The device has come up. False if a handler wanted it to end before.
    pub(crate) fn set_device(&self, device: ublk_core::Device) -> bool {
        let _ = self.device.set(device);
        self.fatal.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    pub(crate) fn take_fatal(&self) -> Option<Py<PyBaseException>> {
        self.fatal.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What a call came to: `returned` is a success if it is None or the length.
    pub(crate) fn judge(
        &self,
        py: Python<'_>,
        request: &Request,
        returned: PyResult<Bound<'_, PyAny>>,
    ) -> Answer {
        let op = request.op();
        match returned {
            Ok(value) if matches!(op, Op::ZoneAppend | Op::ReportZones) => {
                match special(op, &value) {
                    Ok(answer) => answer,
                    Err(error) => self.raised(py, request, &error),
                }
            }
            Ok(value) if value.is_none() => Answer::Plain(Ok(())),
            Ok(value) if value.extract::<u64>().is_ok_and(|n| n == request.len()) => {
                Answer::Plain(Ok(()))
            }
            Ok(value) => {
                let wants = match op {
                    Op::Flush => "None".to_owned(),
                    _ => format!("None or {}", request.len()),
                };
                let given = value.repr().map_or_else(|_| "something".to_owned(), |r| r.to_string());
                log::complaint(format!("{}: returned {given}, not {wants}: EIO", place(request)));
                Answer::EIO
            }
            Err(error) => self.raised(py, request, &error),
        }
    }

    /// A backend's exception: an errno for the client, a message for the log, or the end of the device.
    pub(crate) fn raised(&self, py: Python<'_>, request: &Request, error: &PyErr) -> Answer {
        Answer::Plain(Err(self.errno(py, &place(request), error)))
    }

    /// As [`raised`](Self::raised), for a request that is described in words.
    pub(crate) fn errno(&self, py: Python<'_>, place: &str, error: &PyErr) -> Errno {
        if !error.is_instance_of::<PyException>(py) && !error.is_instance_of::<CancelledError>(py) {
            self.end_with(error.clone_ref(py).into_value(py));
            return Errno::EIO;
        }
        let errno = errno_of(py, error);
        // What a backend says by an errno is an answer; everything else is a mistake.
        let meant = error.is_instance_of::<pyo3::exceptions::PyOSError>(py)
            || error.is_instance_of::<pyo3::exceptions::PyNotImplementedError>(py);
        if !meant {
            log::exception(py, format!("{place}: the client gets EIO"), error);
        }
        errno
    }

    fn end_with(&self, exception: Py<PyBaseException>) {
        {
            let mut fatal = self.fatal.lock().unwrap_or_else(PoisonError::into_inner);
            if fatal.is_some() {
                return;
            }
            *fatal = Some(exception);
        }
        let Some(device) = self.device.get().cloned() else { return };
        // Not here: this thread has to answer requests until the disk is gone.
        let spawned = std::thread::Builder::new().name("ublk-py-stop".into()).spawn(move || {
            if let Err(error) = device.stop_force(STOP_WITHIN) {
                log::complaint(format!("after an exception that ends the device: {error}"));
            }
        });
        if let Err(error) = spawned {
            log::complaint(format!("no thread to stop the device: {error}"));
        }
    }
}

/// A request in words.
pub(crate) fn place(request: &Request) -> String {
    let (op, device) = (op_name(request.op()), request.device());
    match request.op() {
        Op::Flush | Op::ZoneResetAll => format!("{op} of /dev/ublkb{device}"),
        _ => format!(
            "{op} of /dev/ublkb{device} at byte {}, {} bytes",
            request.offset(),
            request.len()
        ),
    }
}

fn special(op: Op, value: &Bound<'_, PyAny>) -> PyResult<Answer> {
    if op == Op::ZoneAppend {
        return value.extract().map(Answer::Appended);
    }
    let mut zones = Vec::new();
    for zone in value.try_iter()? {
        let zone = zone?;
        let number = |name| zone.getattr(name)?.extract::<u64>();
        let word = |name| zone.getattr(name)?.extract::<String>();
        zones.push(Zone {
            start: number("start")?,
            len: number("length")?,
            capacity: number("capacity")?,
            write_pointer: number("write_pointer")?,
            kind: match word("kind")?.as_str() {
                "conventional" => ZoneKind::Conventional,
                "sequential" => ZoneKind::Sequential,
                other => return Err(PyTypeError::new_err(format!("{other:?} is no kind of zone"))),
            },
            state: match word("state")?.as_str() {
                "no-write-pointer" => ZoneState::NoWritePointer,
                "empty" => ZoneState::Empty,
                "implicitly-open" => ZoneState::ImplicitlyOpen,
                "explicitly-open" => ZoneState::ExplicitlyOpen,
                "closed" => ZoneState::Closed,
                "full" => ZoneState::Full,
                "read-only" => ZoneState::ReadOnly,
                "offline" => ZoneState::Offline,
                other => {
                    return Err(PyTypeError::new_err(format!("{other:?} is no state of a zone")));
                }
            },
        });
    }
    Ok(Answer::Zones(zones))
}

/// Answers a request by a call on this thread.
pub(crate) fn answer(
    py: Python<'_>,
    calls: &Calls,
    sink: &Sink,
    spares: &mut Spares,
    mut request: Request,
) {
    let has_data = matches!(request.op(), Op::Read | Op::Write | Op::ZoneAppend);
    let buffer = match has_data.then(|| spares.take(py)).transpose() {
        Ok(buffer) => buffer,
        Err(error) => {
            let answer = sink.raised(py, &request, &error);
            // Gone: a stop was faster.
            let _ = answer.give(request, None);
            return;
        }
    };
    if let Some(buffer) = &buffer {
        buffer.get().open(&mut request);
    }
    let returned = calls.call(py, &request, buffer.as_ref().map(|b| b.bind(py)));
    let answer = sink.judge(py, &request, returned);
    let _ = answer.give(request, buffer.as_ref().map(Py::get));
    if let Some(buffer) = buffer {
        spares.put(py, buffer);
    }
}
