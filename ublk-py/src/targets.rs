//! The ready-made backends, but for those in [`files`](crate::files) and [`faults`](crate::faults): served by Rust alone, and
//! callable from Python backends that wrap them. How all of them are told apart and called.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use ublk_core::targets as core;
use ublk_core::{Backend, Builder, RequestFlags};

use crate::device::io_error;
use crate::errors::OrRaise;
use crate::faults::{Fault, WriteCache};
use crate::files::{File, Stripe};
use crate::integrity::Described;
use crate::wrapped::{Aligned, Wrapped};

/// A device of a ready-made backend, of its own size unless it has none.
pub(crate) fn ready_made(backend: &Bound<'_, PyAny>, size: Option<u64>) -> PyResult<Builder> {
    let fits = |own: u64| match size {
        Some(size) if size != own => {
            Err(PyValueError::new_err(format!("size={size}: the backend has {own} bytes")))
        }
        _ => Ok(()),
    };
    if backend.is_instance_of::<Null>() {
        let size = size.ok_or_else(|| PyValueError::new_err("size is missing"))?;
        return Ok(core::Null::new().builder(size));
    }
    if let Ok(mem) = backend.cast::<Mem>() {
        fits(mem.get().0.size())?;
        return Ok(mem.get().0.builder());
    }
    if let Ok(file) = backend.cast::<File>() {
        fits(file.get().inner().size())?;
        return Ok(file.get().inner().builder());
    }
    if let Ok(zoned) = backend.cast::<ZonedMem>() {
        fits(zoned.get().0.size())?;
        return Ok(zoned.get().0.builder());
    }
    if let Ok(stripe) = backend.cast::<Stripe>() {
        fits(stripe.get().inner().size())?;
        return Ok(stripe.get().inner().builder());
    }
    if let Ok(fault) = backend.cast::<Fault>() {
        let own = fault.get().size();
        own.map_or(Ok(()), fits)?;
        let size = own.or(size).ok_or_else(|| PyValueError::new_err("size is missing"))?;
        return Ok(fault.get().builder(size));
    }
    if let Ok(cache) = backend.cast::<WriteCache>() {
        fits(cache.get().size())?;
        return Ok(cache.get().builder());
    }
    Err(PyTypeError::new_err(format!("{} is no backend", backend.get_type())))
}

/// Bytes of a size as Python code writes it: an int, or a string like "10GiB".
pub(crate) fn parse_size(py: Python<'_>, size: &Bound<'_, PyAny>) -> PyResult<u64> {
    py.import("ublk._size")?.call_method1("parse_size", (size,))?.extract()
}

/// The same for an argument of another name, which is what an error is to speak of.
pub(crate) fn parse_bytes(py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<u64> {
    parse_size(py, value).map_err(|error| {
        let text = error.value(py).to_string();
        match text.strip_prefix("size=") {
            Some(rest) => PyErr::from_type(error.get_type(py), format!("{name}={rest}")),
            None => error,
        }
    })
}

/// The bytes of a buffer, copied: other threads may be writing to it.
fn bytes(py: Python<'_>, buffer: &PyBuffer<u8>) -> PyResult<Aligned> {
    let mut memory = Aligned::new(buffer.item_count());
    buffer.copy_to_slice(py, memory.data())?;
    Ok(memory)
}

/// Reads into a vector, and copies that to a buffer.
fn fill(
    py: Python<'_>,
    buffer: &PyBuffer<u8>,
    read: impl FnOnce(&mut [u8]) -> std::io::Result<()> + Send,
) -> PyResult<()> {
    let mut memory = Aligned::new(buffer.item_count());
    py.detach(|| read(memory.data())).map_err(|e| io_error(&e))?;
    buffer.copy_from_slice(py, memory.data())
}

/// The method of that name, of a backend that is wrapped. Whatever it waits for, others go on meanwhile.
pub(crate) fn pread(
    py: Python<'_>,
    calls: &Wrapped,
    buf: &PyBuffer<u8>,
    offset: u64,
) -> PyResult<()> {
    let mut memory = Aligned::new(buf.item_count());
    called(py, || calls.read(memory.data(), offset))?;
    buf.copy_from_slice(py, memory.data())
}

pub(crate) fn pwrite(
    py: Python<'_>,
    calls: &Wrapped,
    buf: &PyBuffer<u8>,
    offset: u64,
    flags: u8,
) -> PyResult<()> {
    let mut data = bytes(py, buf)?;
    let fua = flags & FUA != 0;
    let flags = RequestFlags::default();
    let flags = if fua { flags.with_fua() } else { flags };
    called(py, || calls.write(data.data(), offset, flags)).map(drop)
}

/// `ublk.Flags.FUA`.
const FUA: u8 = 1;

pub(crate) fn flush(py: Python<'_>, calls: &Wrapped) -> PyResult<()> {
    called(py, || calls.flush())
}

pub(crate) fn trim(py: Python<'_>, calls: &Wrapped, count: u64, offset: u64) -> PyResult<()> {
    called(py, || calls.discard(offset, count))
}

pub(crate) fn zero(py: Python<'_>, calls: &Wrapped, count: u64, offset: u64) -> PyResult<()> {
    called(py, || calls.write_zeroes(offset, count, RequestFlags::default()))
}

/// A panic by rule is a mistake of the backend's, and not the end of the interpreter's business with it.
fn called<T: Send>(
    py: Python<'_>,
    call: impl FnOnce() -> std::io::Result<T> + Send,
) -> PyResult<T> {
    let call = AssertUnwindSafe(call);
    match py.detach(|| catch_unwind(call)) {
        Ok(done) => done.map_err(|e| io_error(&e)),
        Err(panic) => Err(PyRuntimeError::new_err(match panic.downcast_ref::<String>() {
            Some(text) => text.clone(),
            None => "the backend panicked".to_owned(),
        })),
    }
}

/// Answers every request at once: reads give zeroes, writes are forgotten. For measuring what everything else costs.
///
/// >>> import ublk
/// >>> with ublk.Device(ublk.Null(), size="1TiB") as dev:
/// ...     dev.size == 1 << 40
/// True
#[pyclass(frozen, module = "ublk")]
pub(crate) struct Null;

#[pymethods]
impl Null {
    #[new]
    fn new() -> Self {
        Null
    }

    /// Fills ``buf`` with zeroes.
    ///
    /// >>> buf = bytearray(b"data")
    /// >>> ublk.Null().pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00\x00\x00')
    fn pread(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64) -> PyResult<()> {
        let _ = offset;
        fill(py, &buf, |_| Ok(()))
    }

    /// Forgets ``buf``.
    ///
    /// >>> ublk.Null().pwrite(b"data", 0)
    #[pyo3(signature = (buf, offset, flags=0))]
    fn pwrite(&self, buf: PyBuffer<u8>, offset: u64, flags: u8) {
        let _ = (buf, offset, flags);
    }

    /// Does nothing.
    ///
    /// >>> ublk.Null().flush()
    fn flush(&self) {}

    /// Does nothing.
    ///
    /// >>> ublk.Null().trim(4096, 0)
    fn trim(&self, count: u64, offset: u64) {
        let _ = (count, offset);
    }

    /// Does nothing.
    ///
    /// >>> ublk.Null().zero(4096, 0)
    fn zero(&self, count: u64, offset: u64) {
        let _ = (count, offset);
    }

    fn __repr__(&self) -> &'static str {
        "ublk.Null()"
    }
}

/// A sparse disk in memory: what was written takes memory, what was discarded gives it back.
///
/// Its methods are those of a `Backend`, for Python backends that wrap it.
///
/// Args:
///     size: Bytes of the disk: an int, or a string as of `parse_size`.
///     integrity: The metadata that it keeps beside the data (Linux 7.0).
///
/// Raises:
///     ValueError: It is no size, or no such checksum.
///
/// >>> import ublk
/// >>> class Logged:
/// ...     def __init__(self):
/// ...         self.mem, self.log = ublk.Mem("1MiB"), []
/// ...     def pread(self, buf, offset):
/// ...         self.log.append((offset, len(buf)))
/// ...         self.mem.pread(buf, offset)
/// >>> with ublk.Device(Logged(), size="1MiB") as dev:
/// ...     dev.size
/// 1048576
#[pyclass(frozen, module = "ublk")]
pub(crate) struct Mem(core::Mem);

impl Mem {
    pub(crate) fn inner(&self) -> core::Mem {
        self.0.clone()
    }
}

#[pymethods]
impl Mem {
    #[new]
    #[pyo3(signature = (size, *, integrity=None))]
    fn new(
        py: Python<'_>,
        size: &Bound<'_, PyAny>,
        integrity: Option<Described>,
    ) -> PyResult<Self> {
        let size = parse_size(py, size)?;
        Ok(Mem(match integrity {
            Some(integrity) => core::Mem::with_metadata(size, integrity.read()?),
            None => core::Mem::new(size),
        }))
    }

    /// Bytes of the disk.
    ///
    /// >>> ublk.Mem("1MiB").size
    /// 1048576
    #[getter]
    fn size(&self) -> u64 {
        self.0.size()
    }

    /// Bytes of memory that the contents take.
    ///
    /// >>> mem = ublk.Mem("1GiB")
    /// >>> mem.used
    /// 0
    /// >>> mem.pwrite(b"x" * 4096, 0)
    /// >>> 0 < mem.used < 1 << 24
    /// True
    #[getter]
    fn used(&self) -> u64 {
        self.0.used()
    }

    /// Fills ``buf`` from byte ``offset`` on.
    ///
    /// Raises:
    ///     OSError: The range is not within the disk (EINVAL).
    ///
    /// >>> buf = bytearray(4)
    /// >>> ublk.Mem("1MiB").pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00\x00\x00')
    fn pread(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64) -> PyResult<()> {
        fill(py, &buf, |data| self.0.read_at(data, offset))
    }

    /// Stores ``buf`` from byte ``offset`` on.
    ///
    /// Raises:
    ///     OSError: The range is not within the disk (EINVAL).
    ///
    /// >>> mem, buf = ublk.Mem("1MiB"), bytearray(4)
    /// >>> mem.pwrite(b"data", 512)
    /// >>> mem.pread(buf, 512)
    /// >>> buf
    /// bytearray(b'data')
    #[pyo3(signature = (buf, offset, flags=0))]
    fn pwrite(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64, flags: u8) -> PyResult<()> {
        // Memory is as durable as it gets.
        let _ = flags;
        let mut data = bytes(py, &buf)?;
        py.detach(|| self.0.write_at(data.data(), offset)).map_err(|e| io_error(&e))
    }

    /// Does nothing: memory is as durable as it gets.
    ///
    /// >>> ublk.Mem("1MiB").flush()
    fn flush(&self) {}

    /// Gives the memory of a range back, which reads as zeroes then. Bytes.
    ///
    /// Raises:
    ///     OSError: The range is not within the disk (EINVAL).
    ///
    /// >>> mem = ublk.Mem("1MiB")
    /// >>> mem.pwrite(b"x" * mem.size, 0)
    /// >>> mem.trim(mem.size, 0)
    /// >>> mem.used
    /// 0
    fn trim(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        self.zero(py, count, offset)
    }

    /// Makes a range read as zeroes. Bytes.
    ///
    /// Raises:
    ///     OSError: The range is not within the disk (EINVAL).
    ///
    /// >>> mem, buf = ublk.Mem("1MiB"), bytearray(4)
    /// >>> mem.pwrite(b"data", 0)
    /// >>> mem.zero(2, 0)
    /// >>> mem.pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00ta')
    fn zero(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        py.detach(|| self.0.zero(offset, count)).map_err(|e| io_error(&e))
    }

    /// ``count`` bytes of the integrity metadata, from that of the data at byte ``offset`` on. Of data that was never
    /// written it is ones in all bits.
    ///
    /// Raises:
    ///     OSError: There is none, or not so much of it (EINVAL).
    ///
    /// >>> mem = ublk.Mem("1MiB", integrity=ublk.Integrity.protection())
    /// >>> mem.read_metadata(8, 4096)
    /// b'\xff\xff\xff\xff\xff\xff\xff\xff'
    fn read_metadata<'py>(
        &self,
        py: Python<'py>,
        count: usize,
        offset: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let most = self.0.size().saturating_mul(255);
        if u64::try_from(count).is_ok_and(|count| count > most) {
            return Err(PyOSError::new_err((libc::EINVAL, "there is not so much metadata")));
        }
        PyBytes::new_with(py, count, |data| {
            self.0.read_metadata_at(data, offset).map_err(|e| io_error(&e))
        })
    }

    /// Stores integrity metadata, from that of the data at byte ``offset`` on: to see the kernel find what does not fit.
    ///
    /// Raises:
    ///     OSError: There is none, or not so much of it (EINVAL).
    ///
    /// >>> mem = ublk.Mem("1MiB", integrity=ublk.Integrity.protection())
    /// >>> mem.write_metadata(b"damaged.", 4096)
    fn write_metadata(&self, py: Python<'_>, data: PyBuffer<u8>, offset: u64) -> PyResult<()> {
        let mut data = bytes(py, &data)?;
        self.0.write_metadata_at(data.data(), offset).map_err(|e| io_error(&e))
    }

    fn __repr__(&self) -> String {
        format!("ublk.Mem({})", self.0.size())
    }
}

/// A zoned disk in memory, with write pointers, resources of open and active zones, and appends.
///
/// Args:
///     size: Bytes of the disk: a multiple of ``zone_size``.
///     zone_size: Bytes from one zone's start to the next one's: a power of two.
///     conventional: How many zones, the first ones, take writes anywhere.
///     zone_capacity: Bytes that each sequential zone holds. Default the zone size.
///     max_open: Most open zones; 0 for no limit.
///     max_active: Most active zones; 0 for no limit.
///     max_append: Bytes of the largest append. Default 512 KiB.
///
/// Raises:
///     ValueError: The sizes do not fit together.
///
/// >>> import ublk
/// >>> with ublk.Device(ublk.ZonedMem("64MiB", "4MiB")) as dev:
/// ...     with open(f"/sys/block/ublkb{dev.id}/queue/zoned") as zoned:
/// ...         zoned.read().strip()
/// 'host-managed'
#[pyclass(frozen, module = "ublk")]
pub(crate) struct ZonedMem(core::ZonedMem);

#[pymethods]
impl ZonedMem {
    #[new]
    #[pyo3(signature = (size, zone_size, *, conventional=0, zone_capacity=None, max_open=0, max_active=0, max_append=None))]
    #[allow(clippy::too_many_arguments, reason = "keywords, to Python")]
    fn new(
        py: Python<'_>,
        size: &Bound<'_, PyAny>,
        zone_size: &Bound<'_, PyAny>,
        conventional: u32,
        zone_capacity: Option<u64>,
        max_open: u32,
        max_active: u32,
        max_append: Option<u64>,
    ) -> PyResult<Self> {
        let mut options = core::ZonedMem::options()
            .conventional(conventional)
            .max_open(max_open)
            .max_active(max_active);
        if let Some(bytes) = zone_capacity {
            options = options.zone_capacity(bytes);
        }
        if let Some(bytes) = max_append {
            options = options.max_append_bytes(bytes);
        }
        let (size, zone_size) = (parse_size(py, size)?, parse_bytes(py, "zone_size", zone_size)?);
        Ok(ZonedMem(options.create(size, zone_size).or_raise(py)?))
    }

    /// Bytes of the disk.
    ///
    /// >>> disk = ublk.ZonedMem("64MiB", "4MiB")
    /// >>> disk.size >> 20
    /// 64
    #[getter]
    fn size(&self) -> u64 {
        self.0.size()
    }

    /// Bytes of memory that the contents take.
    ///
    /// >>> disk = ublk.ZonedMem("64MiB", "4MiB")
    /// >>> disk.used
    /// 0
    #[getter]
    fn used(&self) -> u64 {
        self.0.used()
    }

    /// Fills ``buf`` from byte ``offset`` on.
    ///
    /// Raises:
    ///     OSError: The range is not within the disk (EINVAL).
    ///
    /// >>> disk = ublk.ZonedMem("64MiB", "4MiB")
    /// >>> buf = bytearray(b"data")
    /// >>> disk.pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00\x00\x00')
    fn pread(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64) -> PyResult<()> {
        fill(py, &buf, |data| {
            // A backend's read is of the whole buffer or an error.
            self.0.read(data, offset).map(drop)
        })
    }

    /// Stores ``buf`` from byte ``offset`` on, which is the write pointer of a sequential zone.
    ///
    /// Raises:
    ///     OSError: It is not (EIO), or the zone is full.
    ///
    /// >>> disk = ublk.ZonedMem("64MiB", "4MiB")
    /// >>> disk.pwrite(b"x" * 512, 0)
    /// >>> try:
    /// ...     disk.pwrite(b"x" * 512, 0)
    /// ... except OSError as error:
    /// ...     error.errno == 5
    /// True
    fn pwrite(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64) -> PyResult<()> {
        let mut data = bytes(py, &buf)?;
        let written = py.detach(|| self.0.write(data.data(), offset, RequestFlags::default()));
        written.map(drop).map_err(|e| io_error(&e))
    }

    fn __repr__(&self) -> String {
        format!("ublk.ZonedMem({})", self.0.size())
    }
}
