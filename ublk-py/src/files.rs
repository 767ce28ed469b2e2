//! The ready-made backends that keep a disk's data in files.

use std::path::PathBuf;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use ublk_core::targets as core;

use crate::errors::OrRaise;
use crate::targets::{flush, parse_bytes, pread, pwrite, trim, zero};
use crate::wrapped::Wrapped;

fn sync_policy(name: &str) -> PyResult<core::SyncPolicy> {
    match name {
        "flush" => Ok(core::SyncPolicy::OnFlush),
        "write" => Ok(core::SyncPolicy::EveryWrite),
        other => Err(PyValueError::new_err(format!("sync={other:?}: \"flush\" or \"write\""))),
    }
}

/// A regular file, or another block device, as a disk; served without a copy where the kernel allows it.
///
/// Args:
///     path: The file.
///     create: Makes a sparse file of this size if there is none.
///     direct: Goes past the page cache (``O_DIRECT``).
///     read_only: Opens it for reading alone.
///     sync: ``"flush"``: data is durable after a client's flush, as on most disks; ``"write"``: after every write.
///     block_size: Bytes of the disk's logical blocks. Default the least that the file allows.
///
/// Raises:
///     OSError: What ``open(2)`` says.
///     ValueError: A size does not fit the file.
///
/// >>> import pathlib, tempfile, ublk
/// >>> with tempfile.TemporaryDirectory() as folder:
/// ...     path = pathlib.Path(folder, "disk.img")
/// ...     with ublk.Device(ublk.File(path, create="64MiB")) as dev:
/// ...         dev.size
/// 67108864
#[pyclass(frozen, module = "ublk")]
pub(crate) struct File {
    inner: core::File,
    path: PathBuf,
    calls: Wrapped,
}

impl File {
    pub(crate) fn inner(&self) -> core::File {
        self.inner.clone()
    }

    pub(crate) fn calls(&self) -> Wrapped {
        self.calls.clone()
    }
}

#[pymethods]
impl File {
    #[new]
    #[pyo3(signature = (path, *, create=None, direct=false, read_only=false, sync="flush", block_size=None))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        create: Option<Bound<'_, PyAny>>,
        direct: bool,
        read_only: bool,
        sync: &str,
        block_size: Option<u32>,
    ) -> PyResult<Self> {
        let mut options = core::File::options().direct(direct).read_only(read_only);
        if let Some(size) = create {
            options = options.create(parse_bytes(py, "create", &size)?);
        }
        if let Some(bytes) = block_size {
            options = options.logical_block_size(bytes);
        }
        options = options.sync(sync_policy(sync)?);
        let inner = py.detach(|| options.open(&path)).or_raise(py)?;
        let calls = Wrapped::file(&inner)?;
        Ok(File { inner, path, calls })
    }

    /// Bytes of the file when it was opened.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
    /// >>> file.size
    /// 1048576
    #[getter]
    fn size(&self) -> u64 {
        self.inner.size()
    }

    /// The file.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
    /// >>> file.path.name
    /// 'disk.img'
    #[getter]
    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// Fills ``buf`` from byte ``offset`` of the file.
    ///
    /// Raises:
    ///     OSError: What ``pread(2)`` says; EIO beyond the file's end.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
    /// >>> file.pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00\x00\x00')
    fn pread(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64) -> PyResult<()> {
        pread(py, &self.calls, &buf, offset)
    }

    /// Stores ``buf`` from byte ``offset`` of the file; with ``ublk.Flags.FUA`` it is durable then.
    ///
    /// Raises:
    ///     OSError: What ``pwrite(2)`` says.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
    /// >>> file.pwrite(b"data", 512)
    /// >>> file.pread(buf, 512)
    /// >>> buf
    /// bytearray(b'data')
    #[pyo3(signature = (buf, offset, flags=0))]
    fn pwrite(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64, flags: u8) -> PyResult<()> {
        pwrite(py, &self.calls, &buf, offset, flags)
    }

    /// Makes durable what was written (``fdatasync(2)``).
    ///
    /// Raises:
    ///     OSError: What that says.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
    /// >>> file.flush()
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        flush(py, &self.calls)
    }

    /// Gives the space of a range back, which reads as zeroes then. Bytes.
    ///
    /// Raises:
    ///     OSError: What ``fallocate(2)`` says.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
    /// >>> file.trim(4096, 0)
    fn trim(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        trim(py, &self.calls, count, offset)
    }

    /// Makes a range read as zeroes: by a hole where the file system has them, otherwise by writing. Bytes.
    ///
    /// Raises:
    ///     OSError: What ``fallocate(2)`` or ``pwrite(2)`` says.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
    /// >>> file.pwrite(b"data", 0)
    /// >>> file.zero(2, 0)
    /// >>> file.pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00ta')
    fn zero(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        zero(py, &self.calls, count, offset)
    }

    fn __repr__(&self) -> String {
        format!("ublk.File({:?})", self.path.display().to_string())
    }
}

/// Several files or block devices as one disk (RAID 0), in turns of a chunk.
///
/// Args:
///     members: The files, in their order.
///     chunk: Bytes that go to a member before it is the next one's turn: a multiple of the logical block size. Default
///         512 KiB. It has to be the same each time.
///     create: Makes members that do not exist, large enough for a disk of this size.
///     direct: Goes past the page cache (``O_DIRECT``).
///     read_only: Opens them for reading alone.
///     sync: As of `File`.
///     block_size: Bytes of the disk's logical blocks. Default the least that the members allow.
///
/// Raises:
///     OSError: What ``open(2)`` says of a member.
///     ValueError: The sizes do not fit together.
///
/// >>> import pathlib, tempfile, ublk
/// >>> with tempfile.TemporaryDirectory() as folder:
/// ...     members = [pathlib.Path(folder, name) for name in ("a", "b")]
/// ...     with ublk.Device(ublk.Stripe(members, create="64MiB")) as dev:
/// ...         dev.size
/// 67108864
#[pyclass(frozen, module = "ublk")]
pub(crate) struct Stripe {
    inner: core::Stripe,
    calls: Wrapped,
}

impl Stripe {
    pub(crate) fn inner(&self) -> core::Stripe {
        self.inner.clone()
    }

    pub(crate) fn calls(&self) -> Wrapped {
        self.calls.clone()
    }
}

#[pymethods]
impl Stripe {
    #[new]
    #[pyo3(signature = (members, *, chunk=None, create=None, direct=false, read_only=false, sync="flush", block_size=None))]
    #[allow(clippy::too_many_arguments, reason = "keywords, to Python")]
    fn new(
        py: Python<'_>,
        members: Vec<PathBuf>,
        chunk: Option<Bound<'_, PyAny>>,
        create: Option<Bound<'_, PyAny>>,
        direct: bool,
        read_only: bool,
        sync: &str,
        block_size: Option<u32>,
    ) -> PyResult<Self> {
        let mut options =
            core::Stripe::options().direct(direct).read_only(read_only).sync(sync_policy(sync)?);
        if let Some(chunk) = chunk {
            options = options.chunk(parse_bytes(py, "chunk", &chunk)?);
        }
        if let Some(size) = create {
            options = options.create(parse_bytes(py, "create", &size)?);
        }
        if let Some(bytes) = block_size {
            options = options.logical_block_size(bytes);
        }
        let inner = py.detach(|| options.open(&members)).or_raise(py)?;
        Ok(Stripe { calls: Wrapped::stripe(inner.clone())?, inner })
    }

    /// Bytes of the disk.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB").size >> 20
    /// 64
    #[getter]
    fn size(&self) -> u64 {
        self.inner.size()
    }

    /// Bytes of a chunk.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB", chunk="64KiB").chunk
    /// 65536
    #[getter]
    fn chunk(&self) -> u64 {
        self.inner.chunk()
    }

    /// Fills ``buf`` from byte ``offset`` of the disk.
    ///
    /// Raises:
    ///     OSError: What the members' files say; EINVAL beyond the disk's end.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
    /// >>> buf = bytearray(b"data")
    /// >>> disk.pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00\x00\x00')
    fn pread(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64) -> PyResult<()> {
        pread(py, &self.calls, &buf, offset)
    }

    /// Stores ``buf`` from byte ``offset`` of the disk; with ``ublk.Flags.FUA`` it is durable then.
    ///
    /// Raises:
    ///     OSError: What the members' files say; EINVAL beyond the disk's end.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
    /// >>> buf = bytearray(4)
    /// >>> disk.pwrite(b"data", 512, ublk.Flags.FUA)
    /// >>> disk.pread(buf, 512)
    /// >>> buf
    /// bytearray(b'data')
    #[pyo3(signature = (buf, offset, flags=0))]
    fn pwrite(&self, py: Python<'_>, buf: PyBuffer<u8>, offset: u64, flags: u8) -> PyResult<()> {
        pwrite(py, &self.calls, &buf, offset, flags)
    }

    /// Makes durable what was written.
    ///
    /// Raises:
    ///     OSError: What the members' files say; EINVAL beyond the disk's end.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
    /// >>> disk.flush()
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        flush(py, &self.calls)
    }

    /// Forgets a range. Bytes.
    ///
    /// Raises:
    ///     OSError: What the members' files say; EINVAL beyond the disk's end.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
    /// >>> disk.trim(4096, 0)
    fn trim(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        trim(py, &self.calls, count, offset)
    }

    /// Makes a range read as zeroes. Bytes.
    ///
    /// Raises:
    ///     OSError: What the members' files say; EINVAL beyond the disk's end.
    ///
    /// >>> import tempfile
    /// >>> folder = tempfile.mkdtemp()
    /// >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
    /// >>> buf = bytearray(4)
    /// >>> disk.pwrite(b"data", 0)
    /// >>> disk.zero(2, 0)
    /// >>> disk.pread(buf, 0)
    /// >>> buf
    /// bytearray(b'\x00\x00ta')
    fn zero(&self, py: Python<'_>, count: u64, offset: u64) -> PyResult<()> {
        zero(py, &self.calls, count, offset)
    }

    fn __repr__(&self) -> String {
        format!("<ublk.Stripe of {} members>", self.inner.members())
    }
}
