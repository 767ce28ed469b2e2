//! Errors of the library as Python's.

use pyo3::exceptions::{
    PyFileExistsError, PyFileNotFoundError, PyNotImplementedError, PyOSError, PyPermissionError,
    PyRuntimeError, PyTimeoutError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::types::PyType;
use pyo3::{PyTypeInfo, create_exception};
use ublk_core::{Errno, Error, ErrorKind};

use crate::words::pythonic;

create_exception!(
    ublk,
    StateError,
    PyRuntimeError,
    r#"The device is in another state than the call needs, or the call would wait for its own caller.

>>> import ublk
>>> try:
...     ublk.Device(ublk.Null(), size="1GiB").path
... except ublk.StateError as error:
...     print(error)
the device has no number yet: it was not started"#
);
create_exception!(
    ublk,
    GoneError,
    StateError,
    r#"The request was answered by a stop, or its device has ended, before it was completed.

The client has got EIO. There is nothing to do but to let the request go:

>>> import ublk
>>> def complete(request):
...     try:
...         request.complete()
...     except ublk.GoneError:
...         return False
...     return True
>>> complete(request)
True"#
);

/// The exception for an error: an `OSError` of the fitting kind where the kernel or the system refused something.
pub(crate) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    let text = text(error);
    let made = match error.kind() {
        ErrorKind::InvalidParameter => Ok(PyValueError::new_err(text)),
        ErrorKind::WrongState | ErrorKind::WouldDeadlock | ErrorKind::Forked => {
            Ok(StateError::new_err(text))
        }
        ErrorKind::Gone => Ok(GoneError::new_err(text)),
        kind => {
            let (class, errno) = class(py, kind);
            let errno = error.errno().map_or(errno, Errno::raw);
            os_error(&class, errno, &text, file(error).as_deref())
        }
    };
    let made = made.unwrap_or_else(|e| e);
    if let Some(remedy) = error.remedy() {
        // A failure to add a note must not hide the error itself.
        let _ = made.value(py).call_method1("add_note", (pythonic(remedy),));
    }
    made
}

/// What was tried, where, and why it failed: the remedy is a note, the errno a field.
fn text(error: &Error) -> String {
    let place = [
        error.device().map(|d| format!("device {d}")),
        error.queue().map(|q| format!("queue {q}")),
        error.tag().map(|t| format!("tag {t}")),
    ];
    let place: Vec<_> = place.into_iter().flatten().collect();
    let mut text = format!("cannot {}", error.attempt());
    if !place.is_empty() {
        text += &format!(" ({})", place.join(", "));
    }
    match (error.cause(), error.errno()) {
        (Some(cause), _) => text += &format!(": {}", pythonic(cause)),
        (None, Some(errno)) => text += &format!(": {errno}"),
        (None, None) => {}
    }
    text
}

/// The class for a kind, and the number where the kernel gave none.
fn class(py: Python<'_>, kind: ErrorKind) -> (Bound<'_, PyType>, i32) {
    match kind {
        ErrorKind::DriverMissing => (PyFileNotFoundError::type_object(py), libc::ENOENT),
        ErrorKind::NoSuchDevice => (PyFileNotFoundError::type_object(py), libc::ENODEV),
        ErrorKind::IdTaken => (PyFileExistsError::type_object(py), libc::EEXIST),
        ErrorKind::PermissionDenied => (PyPermissionError::type_object(py), libc::EACCES),
        ErrorKind::TimedOut => (PyTimeoutError::type_object(py), libc::ETIMEDOUT),
        ErrorKind::Busy => (PyOSError::type_object(py), libc::EBUSY),
        ErrorKind::Unsupported | ErrorKind::IoUringDisabled => {
            (PyOSError::type_object(py), libc::EOPNOTSUPP)
        }
        ErrorKind::TooMany => (PyOSError::type_object(py), libc::ENOSPC),
        ErrorKind::Cancelled => (PyOSError::type_object(py), libc::ECANCELED),
        _ => (PyOSError::type_object(py), libc::EIO),
    }
}

/// The node that an error is about.
fn file(error: &Error) -> Option<String> {
    match (error.kind(), error.device()) {
        (ErrorKind::DriverMissing, _) => Some("/dev/ublk-control".to_owned()),
        (_, Some(id)) => Some(format!("/dev/ublkc{id}")),
        (ErrorKind::PermissionDenied, None) => Some("/dev/ublk-control".to_owned()),
        _ => None,
    }
}

fn os_error(
    class: &Bound<'_, PyType>,
    errno: i32,
    text: &str,
    file: Option<&str>,
) -> PyResult<PyErr> {
    let made = match file {
        Some(file) => class.call1((errno, text, file))?,
        None => class.call1((errno, text))?,
    };
    Ok(PyErr::from_value(made))
}

/// A stop that found the disk in use until its deadline.
pub(crate) fn still_held(py: Python<'_>, error: &Error) -> PyErr {
    let class = PyTimeoutError::type_object(py);
    let disk = error.device().map(|id| format!("/dev/ublkb{id}"));
    let made = os_error(&class, libc::EBUSY, &text(error), disk.as_deref());
    let made = made.unwrap_or_else(|e| e);
    let holders: Vec<_> = error.holders().iter().map(ToString::to_string).collect();
    let _ = made.value(py).setattr("holders", holders);
    if let Some(remedy) = error.remedy() {
        let _ = made.value(py).call_method1("add_note", (pythonic(remedy),));
    }
    made
}

/// What a client of the disk is told when a backend raised this.
pub(crate) fn errno_of(py: Python<'_>, error: &PyErr) -> Errno {
    if error.is_instance_of::<PyOSError>(py) {
        let number = error.value(py).getattr("errno").and_then(|e| e.extract::<i32>());
        return number.ok().and_then(Errno::new).unwrap_or(Errno::EIO);
    }
    if error.is_instance_of::<PyNotImplementedError>(py) {
        return Errno::EOPNOTSUPP;
    }
    Errno::EIO
}

/// For `Result`s of the library inside of functions that Python calls.
pub(crate) trait OrRaise<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for ublk_core::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|e| raise(py, &e))
    }
}
