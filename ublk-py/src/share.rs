//! Memory that a disk's clients share with its server.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use ublk_core::{Device, ErrorKind};

use crate::errors::OrRaise;
use crate::targets::parse_size;

/// Memory that clients of a disk share with its server (`Device.share`): direct I/O from and to it is not copied by the
/// driver. It is a memory file, which both map.
///
/// Args:
///     size: Bytes, a multiple of 4096 up to 4 GiB: an int, or a string as of `parse_size`.
///     huge_pages: Of the system's huge pages, which have to be reserved (``vm.nr_hugepages``).
///
/// Raises:
///     ValueError: It is another size.
///     OSError: The memory is not to be had.
///
/// >>> import mmap, ublk
/// >>> buffer = ublk.SharedBuffer("1MiB")
/// >>> with mmap.mmap(buffer.fileno(), buffer.size) as memory:
/// ...     memory[:4] = b"data"
#[pyclass(frozen, module = "ublk")]
pub(crate) struct SharedBuffer(pub(crate) Arc<ublk_core::SharedBuffer>);

#[pymethods]
impl SharedBuffer {
    #[new]
    #[pyo3(signature = (size, *, huge_pages=false))]
    fn new(py: Python<'_>, size: &Bound<'_, PyAny>, huge_pages: bool) -> PyResult<Self> {
        let size = parse_size(py, size)?;
        let made = py.detach(|| match huge_pages {
            true => ublk_core::SharedBuffer::huge(size),
            false => ublk_core::SharedBuffer::new(size),
        });
        Ok(SharedBuffer(Arc::new(made.or_raise(py)?)))
    }

    /// Memory of somebody else's: a memory file that is sealed against shrinking (``F_SEAL_SHRINK``). The descriptor
    /// stays the caller's.
    ///
    /// Args:
    ///     fd: Its descriptor.
    ///     read_only: It may not be written to: it serves writes of the client alone.
    ///
    /// Raises:
    ///     ValueError: It is not sealed, or its size is no multiple of 4096 up to 4 GiB.
    ///
    /// >>> import fcntl, os
    /// >>> fd = os.memfd_create("shared", os.MFD_ALLOW_SEALING)
    /// >>> os.ftruncate(fd, 1 << 20)
    /// >>> _ = fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    /// >>> ublk.SharedBuffer.from_fd(fd).size
    /// 1048576
    #[staticmethod]
    #[pyo3(signature = (fd, *, read_only=false))]
    fn from_fd(py: Python<'_>, fd: RawFd, read_only: bool) -> PyResult<Self> {
        if fd < 0 {
            return Err(PyValueError::new_err(format!("fd={fd}: it is no descriptor")));
        }
        // SAFETY: it is duplicated at once, which fails if it is not open.
        let theirs = unsafe { BorrowedFd::borrow_raw(fd) };
        let own = theirs.try_clone_to_owned()?;
        let made = py.detach(|| ublk_core::SharedBuffer::from_memfd(own, read_only));
        Ok(SharedBuffer(Arc::new(made.or_raise(py)?)))
    }

    /// The memory file's descriptor, for ``mmap``, and for other processes by way of ``/proc/PID/fd/N``. It is closed with
    /// this object.
    ///
    /// >>> ublk.SharedBuffer("1MiB").fileno() > 2
    /// True
    fn fileno(&self) -> RawFd {
        self.0.as_file().as_fd().as_raw_fd()
    }

    /// Bytes.
    ///
    /// >>> ublk.SharedBuffer("1MiB").size
    /// 1048576
    #[getter]
    fn size(&self) -> u64 {
        self.0.len()
    }

    fn __repr__(&self) -> String {
        format!("<ublk.SharedBuffer of {} bytes>", self.0.len())
    }
}

/// A buffer that a device shares, on the way to whoever is to have its number: without one it is taken back.
pub(crate) struct Sharing {
    device: Device,
    number: u16,
    arrived: bool,
}

impl Sharing {
    pub(crate) fn begin(
        device: Device,
        buffer: &ublk_core::SharedBuffer,
    ) -> ublk_core::Result<Self> {
        let number = device.share(buffer)?;
        Ok(Sharing { device, number, arrived: false })
    }

    /// It stays shared.
    pub(crate) fn number(mut self) -> u16 {
        self.arrived = true;
        self.number
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        if self.arrived {
            return;
        }
        let (device, number) = (self.device.clone(), self.number);
        let take_back = move || match device.unshare(number) {
            // Its end is that of what it shares.
            Err(error) if error.kind() != ErrorKind::WrongState => {
                crate::log::complaint(format!("memory that nobody knows of stays shared: {error}"));
            }
            _ => {}
        };
        // The driver waits for requests, and whoever lost the number for nothing.
        let spawned = std::thread::Builder::new().name("ublk-py-unshare".into()).spawn(take_back);
        if let Err(error) = spawned {
            crate::log::complaint(format!("no thread to take shared memory back: {error}"));
        }
    }
}
