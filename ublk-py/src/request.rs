//! The request itself, in the hands of Python code.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBaseException, PyOSError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use ublk_core::{Errno, Op, Request as Inner};

use crate::buffer::Buffer;
use crate::calls::{Answer, Sink, close, flag_bits, keep, op_name, place};
use crate::errors::{GoneError, StateError};

/// One request of a disk's client, for `RawBackend` backends: to be completed once, from any thread.
///
/// One that is dropped without that is answered with EIO. Offsets and lengths are bytes.
///
/// >>> import threading, ublk
/// >>> class Zeroes:
/// ...     def handle(self, request):
/// ...         threading.Thread(target=request.complete).start()
/// >>> with ublk.Device(Zeroes(), size="1MiB") as dev:
/// ...     with open(dev.path, "rb", buffering=0) as disk:
/// ...         disk.read(4)
/// b'\x00\x00\x00\x00'
///
/// In the examples of its members ``request`` is one that a backend was handed: a client's read of 4096 bytes at byte 8192.
#[pyclass(frozen, module = "ublk")]
pub(crate) struct Request {
    inner: Mutex<Option<Inner>>,
    buffer: Option<Py<Buffer>>,
    sink: Arc<Sink>,
    op: Op,
    offset: u64,
    len: u64,
    flags: u8,
    shared: bool,
    zones: u32,
    metadata: usize,
    device: u32,
    queue: u16,
    tag: u16,
}

impl Request {
    pub(crate) fn new(py: Python<'_>, mut inner: Inner, sink: Arc<Sink>) -> PyResult<Self> {
        let op = inner.op();
        let buffer = match op {
            Op::Read | Op::Write | Op::ZoneAppend => {
                let buffer = Py::new(py, Buffer::new())?;
                buffer.get().open(&mut inner);
                Some(buffer)
            }
            _ => None,
        };
        Ok(Request {
            buffer,
            sink,
            op,
            offset: inner.offset(),
            len: inner.len(),
            flags: flag_bits(inner.flags()),
            shared: inner.is_shared(),
            zones: inner.zones(),
            metadata: inner.metadata_len(),
            device: inner.device(),
            queue: inner.queue(),
            tag: inner.tag(),
            inner: Mutex::new(Some(inner)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Inner>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> PyResult<Inner> {
        self.lock().take().ok_or_else(|| self.completed_before())
    }

    fn named(&self) -> String {
        let op = op_name(self.op);
        format!("the {op} of device {}, queue {}, tag {}", self.device, self.queue, self.tag)
    }

    fn completed_before(&self) -> PyErr {
        StateError::new_err(format!("{} was completed before", self.named()))
    }

    fn no_metadata(&self, errno: Errno, why: &str) -> PyErr {
        let why = if errno == Errno::EINVAL { why } else { "cannot move its metadata" };
        PyOSError::new_err((errno.raw(), format!("{} {why}", self.named())))
    }

    /// A handler that was given this raised an exception: unless it was completed, it fails.
    pub(crate) fn handler_raised(&self, py: Python<'_>, error: &PyErr) {
        let taken = self.lock().take();
        match taken {
            Some(inner) => {
                let answer = self.sink.raised(py, &inner, error);
                let _ = answer.give(inner, self.buffer.as_ref().map(Py::get));
            }
            None => {
                let what = format!("handle() of /dev/ublkb{}", self.device);
                let _ = self.sink.errno(py, &what, error);
            }
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let taken = self.lock().take();
        if let Some(mut inner) = taken {
            // Views may have outlived this object; the answer is that of a dropped request, counted and logged.
            let buffer = self.buffer.as_ref().map(Py::get);
            let kept = close(&mut inner, buffer);
            drop(inner);
            keep(buffer, kept);
        }
    }
}

#[pymethods]
impl Request {
    /// ``"read"``, ``"write"``, ``"flush"``, ``"trim"`` or ``"zero"``; of a zoned disk also ``"append"``,
    /// ``"report_zones"``, ``"open"``, ``"close"``, ``"finish"``, ``"reset"`` and ``"reset_all"``.
    ///
    /// >>> request.op
    /// 'read'
    #[getter]
    fn op(&self) -> &'static str {
        op_name(self.op)
    }

    /// Where the range starts; 0 for a flush.
    ///
    /// >>> request.offset
    /// 8192
    #[getter]
    fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the range; 0 for a flush and a report of zones.
    ///
    /// >>> request.length
    /// 4096
    #[getter]
    fn length(&self) -> u64 {
        self.len
    }

    /// What it asks for besides.
    ///
    /// >>> ublk.Flags.FUA in request.flags
    /// False
    #[getter]
    fn flags<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.import(intern!(py, "ublk._types"))?.getattr(intern!(py, "Flags"))?.call1((self.flags,))
    }

    /// Whether the data lies in memory that the client shares with this process (`Device.share`), so that the driver did
    /// not copy it.
    ///
    /// >>> request.shared
    /// False
    #[getter]
    fn shared(&self) -> bool {
        self.shared
    }

    /// How many zones are to be reported at most; 0 for the other operations.
    ///
    /// >>> request.zones
    /// 0
    #[getter]
    fn zones(&self) -> u32 {
        self.zones
    }

    /// Bytes of integrity metadata that come with the data of a write, or are wanted with that of a read; 0 where the
    /// disk has none, or the client brings none.
    ///
    /// >>> request.metadata_length
    /// 0
    #[getter]
    fn metadata_length(&self) -> usize {
        self.metadata
    }

    /// A write's integrity metadata, all of it.
    ///
    /// Raises:
    ///     OSError: It is no write, or brings none (EINVAL); the device is ending.
    ///     StateError: It was completed before.
    ///
    /// >>> request.read_metadata()
    /// Traceback (most recent call last):
    /// ...
    /// OSError: [Errno 22] the read of device ... brings no metadata
    fn read_metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, self.metadata, |data| {
            let mut inner = self.lock();
            let inner = inner.as_mut().ok_or_else(|| self.completed_before())?;
            // Attached: who waits for the lock is, too. It is a copy of at most half of the data.
            inner.metadata(data).map_err(|errno| self.no_metadata(errno, "brings no metadata"))
        })
    }

    /// Gives a read's integrity metadata to the client: ``metadata_length`` bytes. Without it the data is not protected.
    ///
    /// Raises:
    ///     OSError: It is no read, wants none, or another length (EINVAL); the device is ending.
    ///     StateError: It was completed before.
    ///
    /// >>> request.put_metadata(b"")
    /// Traceback (most recent call last):
    /// ...
    /// OSError: [Errno 22] the read of device ... takes 0 bytes of metadata, not 0
    fn put_metadata(&self, py: Python<'_>, data: PyBuffer<u8>) -> PyResult<()> {
        let data = data.to_vec(py)?;
        let mut inner = self.lock();
        let inner = inner.as_mut().ok_or_else(|| self.completed_before())?;
        inner.put_metadata(&data).map_err(|errno| {
            let takes = if self.op == Op::Read { self.metadata } else { 0 };
            self.no_metadata(errno, &format!("takes {takes} bytes of metadata, not {}", data.len()))
        })
    }

    /// The device's number.
    ///
    /// >>> request.device >= 0
    /// True
    #[getter]
    fn device(&self) -> u32 {
        self.device
    }

    /// The queue's number.
    ///
    /// >>> request.queue
    /// 0
    #[getter]
    fn queue(&self) -> u16 {
        self.queue
    }

    /// The request's number in its queue, below its depth, used again by later ones.
    ///
    /// >>> 0 <= request.tag < 128
    /// True
    #[getter]
    fn tag(&self) -> u16 {
        self.tag
    }

    /// The data, without a copy: of a read to be filled, and zeroed before; of a write read-only; None for the others.
    ///
    /// It may be kept: the memory stays as it is for as long as somebody sees it.
    ///
    /// >>> request.buffer[:5] = b"hello"
    /// >>> len(request.buffer)
    /// 4096
    #[getter]
    fn buffer<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyMemoryView>>> {
        self.buffer.as_ref().map(|buffer| Buffer::view(buffer.bind(py))).transpose()
    }

    /// Whether it was completed.
    ///
    /// >>> request.completed
    /// False
    #[getter]
    fn completed(&self) -> bool {
        self.lock().is_none()
    }

    /// Answers it: None or the length for success; a negative errno or an exception for failure; of an append the byte
    /// where the data went, of a report the list of zones.
    ///
    /// Raises:
    ///     StateError: It was completed before.
    ///     GoneError: A stop was faster: the client has got EIO.
    ///     TypeError: It is a negative number that is no errno.
    ///
    /// >>> request.complete()
    /// >>> request.complete()
    /// Traceback (most recent call last):
    /// ...
    /// ublk.StateError: the read of device ... was completed before
    #[pyo3(signature = (result=None))]
    fn complete(&self, py: Python<'_>, result: Option<Bound<'_, PyAny>>) -> PyResult<()> {
        let answer = match &result {
            Some(value) if value.is_instance_of::<PyBaseException>() => {
                let error = PyErr::from_value(value.clone());
                let what = format!("{} of /dev/ublkb{}", op_name(self.op), self.device);
                Some(Answer::Plain(Err(self.sink.errno(py, &what, &error))))
            }
            Some(value) => match value.extract::<i64>() {
                Ok(number) if number < 0 => {
                    let errno = number.checked_neg().and_then(|n| i32::try_from(n).ok());
                    let errno = errno.and_then(Errno::new).ok_or_else(|| {
                        PyTypeError::new_err(format!("{number} is no negated errno (-1 to -4095)"))
                    })?;
                    Some(Answer::Plain(Err(errno)))
                }
                _ => None,
            },
            None => None,
        };
        let inner = self.take()?;
        let answer = match answer {
            Some(answer) => answer,
            None => {
                let value = result.unwrap_or_else(|| py.None().into_bound(py));
                self.sink.judge(py, &inner, Ok(value))
            }
        };
        answer
            .give(inner, self.buffer.as_ref().map(Py::get))
            .map_err(|gone| GoneError::new_err(gone.to_string()))
    }

    /// The method that was called for this request returned.
    fn _returned(&self, py: Python<'_>, value: Bound<'_, PyAny>) -> PyResult<()> {
        let inner = self.take()?;
        // Gone: a stop was faster.
        let _ =
            self.sink.judge(py, &inner, Ok(value)).give(inner, self.buffer.as_ref().map(Py::get));
        Ok(())
    }

    /// The handler that has this request raised an exception.
    fn _raised(&self, py: Python<'_>, error: Bound<'_, PyBaseException>) {
        self.handler_raised(py, &PyErr::from_value(error.into_any()));
    }

    fn __repr__(&self) -> String {
        match &*self.lock() {
            Some(inner) => format!("<ublk.Request: {}>", place(inner)),
            None => {
                format!("<ublk.Request: {} of /dev/ublkb{}, completed>", self.op(), self.device)
            }
        }
    }
}
