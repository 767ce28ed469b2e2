"""The native half: private. What of it users see, `ublk` exports."""

import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, SupportsIndex, TypeAlias, TypeVar, final

from typing_extensions import Buffer as ReadableBuffer

from ublk._types import Flags, Integrity

__all__ = [
    "Buffer",
    "Calls",
    "Device",
    "Fault",
    "File",
    "GoneError",
    "Halted",
    "Inbox",
    "Leaving",
    "Mem",
    "Null",
    "Request",
    "SharedBuffer",
    "Spec",
    "StateError",
    "Stripe",
    "Token",
    "Workers",
    "WriteCache",
    "ZonedMem",
    "__version__",
    "apart",
    "await_lost",
    "close_log",
    "delete",
    "feature_names",
    "features",
    "finish_endings",
    "forked",
    "list_devices",
    "next_record",
    "quiesce",
    "room",
    "shielded",
]

_T = TypeVar("_T")

__version__: str
"""This package's version.

>>> import ublk
>>> len(ublk.__version__.split("."))
3
"""

_Methods: TypeAlias = Mapping[str, tuple[Callable[..., Any], bool]]
_Size: TypeAlias = SupportsIndex | str

class StateError(RuntimeError):
    """The device is in another state than the call needs, or the call would wait for its own caller.

    >>> import ublk
    >>> try:
    ...     ublk.Device(ublk.Null(), size="1GiB").path
    ... except ublk.StateError as error:
    ...     print(error)
    the device has no number yet: it was not started
    """

class GoneError(StateError):
    """The request was answered by a stop, or its device has ended, before it was completed.

    The client has got EIO. There is nothing to do but to let the request go:

    >>> import ublk
    >>> def complete(request):
    ...     try:
    ...         request.complete()
    ...     except ublk.GoneError:
    ...         return False
    ...     return True
    >>> complete(request)
    True
    """

@final
class Buffer: ...  # of which `memoryview` makes a view

@final
class Calls:
    def __new__(cls, methods: _Methods, flags: Sequence[object]) -> Calls: ...

@final
class Inbox:
    def __new__(cls) -> Inbox: ...
    def fileno(self) -> int: ...
    def reader(self, serve: Callable[[list[Request]], None]) -> Callable[[], None]: ...
    def close(self) -> bool: ...

@final
class Request:
    r"""One request of a disk's client, for `RawBackend` backends: to be completed once, from any thread.

    One that is dropped without that is answered with EIO. Offsets and lengths are bytes.

    >>> import threading, ublk
    >>> class Zeroes:
    ...     def handle(self, request):
    ...         threading.Thread(target=request.complete).start()
    >>> with ublk.Device(Zeroes(), size="1MiB") as dev:
    ...     with open(dev.path, "rb", buffering=0) as disk:
    ...         disk.read(4)
    b'\x00\x00\x00\x00'

    In the examples of its members ``request`` is one that a backend was handed: a client's read of 4096 bytes at byte 8192.
    """

    @property
    def op(self) -> str:
        """``"read"``, ``"write"``, ``"flush"``, ``"trim"`` or ``"zero"``; of a zoned disk also ``"append"``,
        ``"report_zones"``, ``"open"``, ``"close"``, ``"finish"``, ``"reset"`` and ``"reset_all"``.

        >>> request.op
        'read'
        """
    @property
    def offset(self) -> int:
        """Where the range starts; 0 for a flush.

        >>> request.offset
        8192
        """
    @property
    def length(self) -> int:
        """Bytes of the range; 0 for a flush and a report of zones.

        >>> request.length
        4096
        """
    @property
    def flags(self) -> Flags:
        """What it asks for besides.

        >>> ublk.Flags.FUA in request.flags
        False
        """
    @property
    def shared(self) -> bool:
        """Whether the data lies in memory that the client shares with this process (`Device.share`), so that the driver did
        not copy it.

        >>> request.shared
        False
        """
    @property
    def zones(self) -> int:
        """How many zones are to be reported at most; 0 for the other operations.

        >>> request.zones
        0
        """
    @property
    def metadata_length(self) -> int:
        """Bytes of integrity metadata that come with the data of a write, or are wanted with that of a read; 0 where the
        disk has none, or the client brings none.

        >>> request.metadata_length
        0
        """
    def read_metadata(self) -> bytes:
        """A write's integrity metadata, all of it.

        Raises:
            OSError: It is no write, or brings none (EINVAL); the device is ending.
            StateError: It was completed before.

        >>> request.read_metadata()
        Traceback (most recent call last):
        ...
        OSError: [Errno 22] the read of device ... brings no metadata
        """
    def put_metadata(self, data: ReadableBuffer) -> None:
        """Gives a read's integrity metadata to the client: ``metadata_length`` bytes. Without it the data is not protected.

        Raises:
            OSError: It is no read, wants none, or another length (EINVAL); the device is ending.
            StateError: It was completed before.

        >>> request.put_metadata(b"")
        Traceback (most recent call last):
        ...
        OSError: [Errno 22] the read of device ... takes 0 bytes of metadata, not 0
        """
    @property
    def device(self) -> int:
        """The device's number.

        >>> request.device >= 0
        True
        """
    @property
    def queue(self) -> int:
        """The queue's number.

        >>> request.queue
        0
        """
    @property
    def tag(self) -> int:
        """The request's number in its queue, below its depth, used again by later ones.

        >>> 0 <= request.tag < 128
        True
        """
    @property
    def buffer(self) -> memoryview | None:
        """The data, without a copy: of a read to be filled, and zeroed before; of a write read-only; None for the others.

        It may be kept: the memory stays as it is for as long as somebody sees it.

        >>> request.buffer[:5] = b"hello"
        >>> len(request.buffer)
        4096
        """
    @property
    def completed(self) -> bool:
        """Whether it was completed.

        >>> request.completed
        False
        """
    def complete(self, result: object = None) -> None:
        """Answers it: None or the length for success; a negative errno or an exception for failure; of an append the byte
        where the data went, of a report the list of zones.

        Raises:
            StateError: It was completed before.
            GoneError: A stop was faster: the client has got EIO.
            TypeError: It is a negative number that is no errno.

        >>> request.complete()
        >>> request.complete()
        Traceback (most recent call last):
        ...
        ublk.StateError: the read of device ... was completed before
        """
    def _returned(self, value: object) -> None: ...
    def _raised(self, error: BaseException) -> None: ...

@final
class Spec:
    def __new__(
        cls,
        backend: object,
        size: int | None,
        options: dict[str, Any],
        inbox: Inbox | None = None,
        raw: bool = False,
    ) -> Spec: ...
    def start(self, token: Token) -> Device: ...
    def recover(self, id: int, token: Token) -> Device: ...

@final
class Device:
    @property
    def id(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def features(self) -> list[str]: ...
    @property
    def data_path(self) -> str: ...
    @property
    def warnings(self) -> list[str]: ...
    def info(self) -> dict[str, Any]: ...
    def state(self) -> str: ...
    def stats(self) -> dict[str, Any]: ...
    @property
    def size(self) -> int: ...
    def resize(self, size: int) -> None: ...
    def stop(self, timeout: float, force: bool, token: Token | None = None) -> list[str]: ...
    def halt(self, timeout: float, token: Token | None = None) -> Halted: ...
    def share(self, buffer: SharedBuffer) -> int: ...
    def unshare(self, number: int) -> None: ...
    def hand_over(self, timeout: float) -> None: ...
    def check_caller(self, what: str) -> None: ...
    def ended_fd(self) -> int: ...
    def ending(self) -> str | None: ...
    def has_ended(self) -> bool: ...
    def take_fatal(self) -> BaseException | None: ...
    def abandon(self, then: Callable[[], object] | None = None) -> None: ...

@final
class Halted:
    def start(self, spec: Spec, token: Token) -> Device: ...
    def is_there(self) -> bool: ...
    def delete(self) -> None: ...

@final
class Token:
    def __new__(cls) -> Token: ...
    def cancel(self) -> None: ...
    def cancelled(self) -> bool: ...

class Leaving:
    def __new__(cls, *_args: object, **_options: object) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

@final
class SharedBuffer:
    """Memory that clients of a disk share with its server (`Device.share`): direct I/O from and to it is not copied by the
    driver. It is a memory file, which both map.

    Args:
        size: Bytes, a multiple of 4096 up to 4 GiB: an int, or a string as of `parse_size`.
        huge_pages: Of the system's huge pages, which have to be reserved (``vm.nr_hugepages``).

    Raises:
        ValueError: It is another size.
        OSError: The memory is not to be had.

    >>> import mmap, ublk
    >>> buffer = ublk.SharedBuffer("1MiB")
    >>> with mmap.mmap(buffer.fileno(), buffer.size) as memory:
    ...     memory[:4] = b"data"
    """

    def __new__(cls, size: _Size, *, huge_pages: bool = False) -> SharedBuffer: ...
    @staticmethod
    def from_fd(fd: int, *, read_only: bool = False) -> SharedBuffer:
        """Memory of somebody else's: a memory file that is sealed against shrinking (``F_SEAL_SHRINK``). The descriptor
        stays the caller's.

        Args:
            fd: Its descriptor.
            read_only: It may not be written to: it serves writes of the client alone.

        Raises:
            ValueError: It is not sealed, or its size is no multiple of 4096 up to 4 GiB.

        >>> import fcntl, os
        >>> fd = os.memfd_create("shared", os.MFD_ALLOW_SEALING)
        >>> os.ftruncate(fd, 1 << 20)
        >>> _ = fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        >>> ublk.SharedBuffer.from_fd(fd).size
        1048576
        """
    def fileno(self) -> int:
        """The memory file's descriptor, for ``mmap``, and for other processes by way of ``/proc/PID/fd/N``. It is closed with
        this object.

        >>> ublk.SharedBuffer("1MiB").fileno() > 2
        True
        """
    @property
    def size(self) -> int:
        """Bytes.

        >>> ublk.SharedBuffer("1MiB").size
        1048576
        """

@final
class Workers:
    """Worker threads that devices share, in place of one for each queue: for many devices.

    A backend that blocks stalls every device on its worker: give such a device ``threads``. The threads are started with
    the first device, and end with the pool and the last one.

    Args:
        count: How many, 1 to 1024.

    Raises:
        ValueError: It is another number.

    >>> import contextlib, ublk
    >>> pool = ublk.Workers(2)
    >>> with contextlib.ExitStack() as stack:
    ...     disks = [ublk.Device(ublk.Null(), size="1GiB", workers=pool) for _ in range(3)]
    ...     len({stack.enter_context(disk).path for disk in disks})
    3
    """

    def __new__(cls, count: int) -> Workers: ...
    @property
    def count(self) -> int:
        """How many there are, 1 to 1024.

        >>> ublk.Workers(2).count
        2
        """

@final
class Null:
    """Answers every request at once: reads give zeroes, writes are forgotten. For measuring what everything else costs.

    >>> import ublk
    >>> with ublk.Device(ublk.Null(), size="1TiB") as dev:
    ...     dev.size == 1 << 40
    True
    """

    def __new__(cls) -> Null: ...
    def pread(self, buf: ReadableBuffer, offset: int) -> None:
        r"""Fills ``buf`` with zeroes.

        >>> buf = bytearray(b"data")
        >>> ublk.Null().pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00\x00\x00')
        """
    def pwrite(self, buf: ReadableBuffer, offset: int, flags: int = 0) -> None:
        """Forgets ``buf``.

        >>> ublk.Null().pwrite(b"data", 0)
        """
    def flush(self) -> None:
        """Does nothing.

        >>> ublk.Null().flush()
        """
    def trim(self, count: int, offset: int) -> None:
        """Does nothing.

        >>> ublk.Null().trim(4096, 0)
        """
    def zero(self, count: int, offset: int) -> None:
        """Does nothing.

        >>> ublk.Null().zero(4096, 0)
        """

@final
class Mem:
    """A sparse disk in memory: what was written takes memory, what was discarded gives it back.

    Its methods are those of a `Backend`, for Python backends that wrap it.

    Args:
        size: Bytes of the disk: an int, or a string as of `parse_size`.
        integrity: The metadata that it keeps beside the data (Linux 7.0).

    Raises:
        ValueError: It is no size, or no such checksum.

    >>> import ublk
    >>> class Logged:
    ...     def __init__(self):
    ...         self.mem, self.log = ublk.Mem("1MiB"), []
    ...     def pread(self, buf, offset):
    ...         self.log.append((offset, len(buf)))
    ...         self.mem.pread(buf, offset)
    >>> with ublk.Device(Logged(), size="1MiB") as dev:
    ...     dev.size
    1048576
    """

    def __new__(cls, size: _Size, *, integrity: Integrity | None = None) -> Mem: ...
    @property
    def size(self) -> int:
        """Bytes of the disk.

        >>> ublk.Mem("1MiB").size
        1048576
        """
    @property
    def used(self) -> int:
        """Bytes of memory that the contents take.

        >>> mem = ublk.Mem("1GiB")
        >>> mem.used
        0
        >>> mem.pwrite(b"x" * 4096, 0)
        >>> 0 < mem.used < 1 << 24
        True
        """
    def pread(self, buf: ReadableBuffer, offset: int) -> None:
        r"""Fills ``buf`` from byte ``offset`` on.

        Raises:
            OSError: The range is not within the disk (EINVAL).

        >>> buf = bytearray(4)
        >>> ublk.Mem("1MiB").pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00\x00\x00')
        """
    def pwrite(self, buf: ReadableBuffer, offset: int, flags: int = 0) -> None:
        """Stores ``buf`` from byte ``offset`` on.

        Raises:
            OSError: The range is not within the disk (EINVAL).

        >>> mem, buf = ublk.Mem("1MiB"), bytearray(4)
        >>> mem.pwrite(b"data", 512)
        >>> mem.pread(buf, 512)
        >>> buf
        bytearray(b'data')
        """
    def flush(self) -> None:
        """Does nothing: memory is as durable as it gets.

        >>> ublk.Mem("1MiB").flush()
        """
    def trim(self, count: int, offset: int) -> None:
        """Gives the memory of a range back, which reads as zeroes then. Bytes.

        Raises:
            OSError: The range is not within the disk (EINVAL).

        >>> mem = ublk.Mem("1MiB")
        >>> mem.pwrite(b"x" * mem.size, 0)
        >>> mem.trim(mem.size, 0)
        >>> mem.used
        0
        """
    def zero(self, count: int, offset: int) -> None:
        r"""Makes a range read as zeroes. Bytes.

        Raises:
            OSError: The range is not within the disk (EINVAL).

        >>> mem, buf = ublk.Mem("1MiB"), bytearray(4)
        >>> mem.pwrite(b"data", 0)
        >>> mem.zero(2, 0)
        >>> mem.pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00ta')
        """
    def read_metadata(self, count: int, offset: int) -> bytes:
        r"""``count`` bytes of the integrity metadata, from that of the data at byte ``offset`` on. Of data that was never
        written it is ones in all bits.

        Raises:
            OSError: There is none, or not so much of it (EINVAL).

        >>> mem = ublk.Mem("1MiB", integrity=ublk.Integrity.protection())
        >>> mem.read_metadata(8, 4096)
        b'\xff\xff\xff\xff\xff\xff\xff\xff'
        """
    def write_metadata(self, data: ReadableBuffer, offset: int) -> None:
        """Stores integrity metadata, from that of the data at byte ``offset`` on: to see the kernel find what does not fit.

        Raises:
            OSError: There is none, or not so much of it (EINVAL).

        >>> mem = ublk.Mem("1MiB", integrity=ublk.Integrity.protection())
        >>> mem.write_metadata(b"damaged.", 4096)
        """

@final
class File:
    """A regular file, or another block device, as a disk; served without a copy where the kernel allows it.

    Args:
        path: The file.
        create: Makes a sparse file of this size if there is none.
        direct: Goes past the page cache (``O_DIRECT``).
        read_only: Opens it for reading alone.
        sync: ``"flush"``: data is durable after a client's flush, as on most disks; ``"write"``: after every write.
        block_size: Bytes of the disk's logical blocks. Default the least that the file allows.

    Raises:
        OSError: What ``open(2)`` says.
        ValueError: A size does not fit the file.

    >>> import pathlib, tempfile, ublk
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "disk.img")
    ...     with ublk.Device(ublk.File(path, create="64MiB")) as dev:
    ...         dev.size
    67108864
    """

    def __new__(
        cls,
        path: str | os.PathLike[str],
        *,
        create: _Size | None = None,
        direct: bool = False,
        read_only: bool = False,
        sync: str = "flush",
        block_size: int | None = None,
    ) -> File: ...
    @property
    def size(self) -> int:
        """Bytes of the file when it was opened.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
        >>> file.size
        1048576
        """
    @property
    def path(self) -> os.PathLike[str]:
        """The file.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
        >>> file.path.name
        'disk.img'
        """
    def pread(self, buf: ReadableBuffer, offset: int) -> None:
        r"""Fills ``buf`` from byte ``offset`` of the file.

        Raises:
            OSError: What ``pread(2)`` says; EIO beyond the file's end.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
        >>> file.pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00\x00\x00')
        """
    def pwrite(self, buf: ReadableBuffer, offset: int, flags: int = 0) -> None:
        """Stores ``buf`` from byte ``offset`` of the file; with ``ublk.Flags.FUA`` it is durable then.

        Raises:
            OSError: What ``pwrite(2)`` says.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
        >>> file.pwrite(b"data", 512)
        >>> file.pread(buf, 512)
        >>> buf
        bytearray(b'data')
        """
    def flush(self) -> None:
        """Makes durable what was written (``fdatasync(2)``).

        Raises:
            OSError: What that says.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
        >>> file.flush()
        """
    def trim(self, count: int, offset: int) -> None:
        """Gives the space of a range back, which reads as zeroes then. Bytes.

        Raises:
            OSError: What ``fallocate(2)`` says.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
        >>> file.trim(4096, 0)
        """
    def zero(self, count: int, offset: int) -> None:
        r"""Makes a range read as zeroes: by a hole where the file system has them, otherwise by writing. Bytes.

        Raises:
            OSError: What ``fallocate(2)`` or ``pwrite(2)`` says.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> file, buf = ublk.File(folder + "/disk.img", create="1MiB"), bytearray(4)
        >>> file.pwrite(b"data", 0)
        >>> file.zero(2, 0)
        >>> file.pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00ta')
        """

@final
class Stripe:
    """Several files or block devices as one disk (RAID 0), in turns of a chunk.

    Args:
        members: The files, in their order.
        chunk: Bytes that go to a member before it is the next one's turn: a multiple of the logical block size. Default
            512 KiB. It has to be the same each time.
        create: Makes members that do not exist, large enough for a disk of this size.
        direct: Goes past the page cache (``O_DIRECT``).
        read_only: Opens them for reading alone.
        sync: As of `File`.
        block_size: Bytes of the disk's logical blocks. Default the least that the members allow.

    Raises:
        OSError: What ``open(2)`` says of a member.
        ValueError: The sizes do not fit together.

    >>> import pathlib, tempfile, ublk
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     members = [pathlib.Path(folder, name) for name in ("a", "b")]
    ...     with ublk.Device(ublk.Stripe(members, create="64MiB")) as dev:
    ...         dev.size
    67108864
    """

    def __new__(
        cls,
        members: Sequence[str | os.PathLike[str]],
        *,
        chunk: _Size | None = None,
        create: _Size | None = None,
        direct: bool = False,
        read_only: bool = False,
        sync: str = "flush",
        block_size: int | None = None,
    ) -> Stripe: ...
    @property
    def size(self) -> int:
        """Bytes of the disk.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB").size >> 20
        64
        """
    @property
    def chunk(self) -> int:
        """Bytes of a chunk.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB", chunk="64KiB").chunk
        65536
        """
    def pread(self, buf: ReadableBuffer, offset: int) -> None:
        r"""Fills ``buf`` from byte ``offset`` of the disk.

        Raises:
            OSError: What the members' files say; EINVAL beyond the disk's end.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
        >>> buf = bytearray(b"data")
        >>> disk.pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00\x00\x00')
        """
    def pwrite(self, buf: ReadableBuffer, offset: int, flags: int = 0) -> None:
        """Stores ``buf`` from byte ``offset`` of the disk; with ``ublk.Flags.FUA`` it is durable then.

        Raises:
            OSError: What the members' files say; EINVAL beyond the disk's end.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
        >>> buf = bytearray(4)
        >>> disk.pwrite(b"data", 512, ublk.Flags.FUA)
        >>> disk.pread(buf, 512)
        >>> buf
        bytearray(b'data')
        """
    def flush(self) -> None:
        """Makes durable what was written.

        Raises:
            OSError: What the members' files say; EINVAL beyond the disk's end.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
        >>> disk.flush()
        """
    def trim(self, count: int, offset: int) -> None:
        """Forgets a range. Bytes.

        Raises:
            OSError: What the members' files say; EINVAL beyond the disk's end.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
        >>> disk.trim(4096, 0)
        """
    def zero(self, count: int, offset: int) -> None:
        r"""Makes a range read as zeroes. Bytes.

        Raises:
            OSError: What the members' files say; EINVAL beyond the disk's end.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> disk = ublk.Stripe([folder + "/a", folder + "/b"], create="64MiB")
        >>> buf = bytearray(4)
        >>> disk.pwrite(b"data", 0)
        >>> disk.zero(2, 0)
        >>> disk.pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00ta')
        """

@final
class Fault:
    """Another ready-made backend, and rules that come before it: requests fail, are late, hang or get lost. For tests of what
    uses the disk. Rules are changed while it is in use. See ``docs/faults.md``.

    >>> import errno, mmap, ublk
    >>> fault = ublk.Fault(ublk.Mem("1MiB"))
    >>> with ublk.Device(fault) as dev:
    ...     rule = fault.add("error", errno=errno.ENOSPC, ops=["write"])
    ...     disk = os.open(dev.path, os.O_WRONLY | os.O_DIRECT)
    ...     try:
    ...         _ = os.pwritev(disk, [mmap.mmap(-1, 4096)], 0)
    ...     except OSError as error:
    ...         print(errno.errorcode[error.errno])
    ...     finally:
    ...         os.close(disk)
    ENOSPC
    """

    def __new__(cls, backend: Null | Mem | File | Stripe | WriteCache) -> Fault: ...
    @property
    def size(self) -> int | None:
        """Bytes of the disk; None of a `Null`.

        >>> ublk.Fault(ublk.Mem("1MiB")).size
        1048576
        """
    def add(
        self,
        action: str,
        *,
        errno: int | None = None,
        delay: float | tuple[float, float] | None = None,
        ops: Sequence[str] | None = None,
        range: tuple[int, int] | None = None,
        probability: float = 1.0,
        every: int = 1,
        skip: int = 0,
        limit: int | None = None,
    ) -> int:
        """Adds a rule behind those that are there, and returns its number.

        A request matches if its operation is among ``ops`` and it touches ``range``. Of those that match, the first ``skip``
        are passed over; of the others each ``every``-th is taken, and of these each by ``probability``; ``limit`` times at most.

        Args:
            action: ``"error"`` (with ``errno``), ``"delay"`` (with ``delay``), ``"hold"`` (until `release`), ``"drop"``,
                ``"panic"``, or ``"abort"``, which kills this process.
            errno: What the client sees, where the kernel carries it.
            delay: Seconds, or the least and the most of them.
            ops: Of ``"read"``, ``"write"``, ``"flush"``, ``"trim"`` and ``"zero"``. Default all.
            range: First byte, and the one after the last. Default the whole disk.
            probability: 0 to 1.
            every: 1 for all.
            skip: How many are passed over.
            limit: How often at most. Default without end.

        Raises:
            ValueError: An argument is out of its range.

        >>> fault = ublk.Fault(ublk.Mem("1MiB"))
        >>> fault.add("delay", delay=(0.001, 0.01), ops=["read"], probability=0.1) >= 0
        True
        """
    def remove(self, rule: int) -> bool:
        """Takes a rule away; False if it is gone.

        >>> fault = ublk.Fault(ublk.Mem("1MiB"))
        >>> rule = fault.add("drop")
        >>> fault.remove(rule), fault.remove(rule)
        (True, False)
        """
    def clear(self) -> None:
        """Takes all rules away. What is held stays held.

        >>> fault = ublk.Fault(ublk.Mem("1MiB"))
        >>> rule = fault.add("drop")
        >>> fault.clear()
        >>> fault.remove(rule)
        False
        """
    def seed(self, seed: int) -> None:
        """Starts the sequence of random numbers again.

        >>> ublk.Fault(ublk.Mem("1MiB")).seed(42)
        """
    def release(self) -> int:
        """Lets all requests go on that are held, and returns how many those were.

        >>> ublk.Fault(ublk.Mem("1MiB")).release()
        0
        """
    @property
    def held(self) -> int:
        """How many requests are held now.

        >>> ublk.Fault(ublk.Mem("1MiB")).held
        0
        """
    def wait_held(self, count: int = 1, timeout: float = 30.0) -> bool:
        """Waits until at least ``count`` requests are held; False if they are not within ``timeout`` seconds.

        >>> import threading
        >>> fault = ublk.Fault(ublk.Mem("1MiB"))
        >>> with ublk.Device(fault) as dev:
        ...     rule = fault.add("hold", ops=["read"], range=(1 << 19, (1 << 19) + 512), limit=1)
        ...     with open(dev.path, "rb", buffering=0) as disk:
        ...         client = threading.Thread(target=os.pread, args=(disk.fileno(), 512, 1 << 19))
        ...         client.start()
        ...         came = fault.wait_held()
        ...         released = fault.release()
        ...         client.join()
        >>> came, released
        (True, 1)
        """
    @property
    def injected(self) -> dict[str, float]:
        """What has been done so far: ``errors``, ``delays``, ``delayed`` (seconds), ``drops``, ``holds``, ``panics``.

        >>> ublk.Fault(ublk.Mem("1MiB")).injected["errors"]
        0
        """
    def pread(self, buf: ReadableBuffer, offset: int) -> None:
        r"""Fills ``buf`` from byte ``offset`` of the disk, if no rule has something else in mind: delays and ``hold`` block the caller.

        Raises:
            OSError: What a rule says, or the backend behind.

        >>> disk = ublk.Fault(ublk.Mem("1MiB"))
        >>> buf = bytearray(b"data")
        >>> disk.pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00\x00\x00')
        """
    def pwrite(self, buf: ReadableBuffer, offset: int, flags: int = 0) -> None:
        """Stores ``buf`` from byte ``offset`` of the disk; with ``ublk.Flags.FUA`` it is durable then.

        Raises:
            OSError: What a rule says, or the backend behind.

        >>> disk = ublk.Fault(ublk.Mem("1MiB"))
        >>> buf = bytearray(4)
        >>> disk.pwrite(b"data", 512, ublk.Flags.FUA)
        >>> disk.pread(buf, 512)
        >>> buf
        bytearray(b'data')
        """
    def flush(self) -> None:
        """Makes durable what was written.

        Raises:
            OSError: What a rule says, or the backend behind.

        >>> disk = ublk.Fault(ublk.Mem("1MiB"))
        >>> disk.flush()
        """
    def trim(self, count: int, offset: int) -> None:
        """Forgets a range. Bytes.

        Raises:
            OSError: What a rule says, or the backend behind.

        >>> disk = ublk.Fault(ublk.Mem("1MiB"))
        >>> disk.trim(4096, 0)
        """
    def zero(self, count: int, offset: int) -> None:
        r"""Makes a range read as zeroes. Bytes.

        Raises:
            OSError: What a rule says, or the backend behind.

        >>> disk = ublk.Fault(ublk.Mem("1MiB"))
        >>> buf = bytearray(4)
        >>> disk.pwrite(b"data", 0)
        >>> disk.zero(2, 0)
        >>> disk.pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00ta')
        """

@final
class WriteCache:
    """Another ready-made backend behind a volatile write cache whose power can be cut: what was written since the last flush is lost then.

    Args:
        backend: What is behind it: `Mem`, `File`, `Stripe` or `Fault`, the latter for errors when the cache is written back.
        capacity: Bytes that the cache holds; when it is full, all is passed on. Default 256 MiB.

    Raises:
        ValueError: The files behind it are opened with ``direct=True``.

    >>> import ublk
    >>> cache = ublk.WriteCache(ublk.Mem("1MiB"))
    >>> with ublk.Device(cache) as dev:
    ...     with open(dev.path, "r+b", buffering=0) as disk:
    ...         _ = disk.write(b"x" * 4096)
    ...         os.fsync(disk.fileno())
    ...     cache.cut()
    0
    """

    def __new__(
        cls, backend: Mem | File | Stripe | Fault | WriteCache, *, capacity: _Size | None = None
    ) -> WriteCache: ...
    @property
    def size(self) -> int:
        """Bytes of the disk.

        >>> ublk.WriteCache(ublk.Mem("1MiB")).size
        1048576
        """
    def cut(self) -> int:
        """Cuts the power: what is not durable is lost, and requests fail with EIO until `restore`. Returns the bytes lost.

        >>> ublk.WriteCache(ublk.Mem("1MiB")).cut()
        0
        """
    def cut_some(self, probability: float, seed: int = 0) -> tuple[int, int]:
        """As `cut`, but each sector survives with ``probability``. Returns the bytes lost and those that survived.

        Raises:
            ValueError: The probability is not from 0 to 1.

        >>> ublk.WriteCache(ublk.Mem("1MiB")).cut_some(0.5, seed=1)
        (0, 0)
        """
    def restore(self) -> None:
        """Requests are served again, from what has survived.

        >>> cache = ublk.WriteCache(ublk.Mem("1MiB"))
        >>> _ = cache.cut()
        >>> cache.restore()
        >>> cache.is_on
        True
        """
    @property
    def is_on(self) -> bool:
        """Whether the power is on.

        >>> ublk.WriteCache(ublk.Mem("1MiB")).is_on
        True
        """
    @property
    def unflushed(self) -> int:
        """Bytes that a cut would lose now.

        >>> ublk.WriteCache(ublk.Mem("1MiB")).unflushed
        0
        """
    def pread(self, buf: ReadableBuffer, offset: int) -> None:
        r"""Fills ``buf`` from byte ``offset`` of the disk.

        Raises:
            OSError: EIO while the power is off, EINVAL for parts of sectors, or what the backend behind says.

        >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
        >>> buf = bytearray(b"x" * 512)
        >>> disk.pread(buf, 0)
        >>> buf.count(0)
        512
        """
    def pwrite(self, buf: ReadableBuffer, offset: int, flags: int = 0) -> None:
        """Stores ``buf`` from byte ``offset`` of the disk; with ``ublk.Flags.FUA`` it is durable then.

        Raises:
            OSError: EIO while the power is off, EINVAL for parts of sectors, or what the backend behind says.

        >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
        >>> buf = bytearray(512)
        >>> disk.pwrite(b"x" * 512, 512, ublk.Flags.FUA)
        >>> disk.pread(buf, 512)
        >>> buf.count(b"x")
        512
        """
    def flush(self) -> None:
        """Makes durable what was written.

        Raises:
            OSError: The power is off (EIO); or what the backend behind says.

        >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
        >>> disk.flush()
        """
    def trim(self, count: int, offset: int) -> None:
        """Forgets a range. Bytes.

        Raises:
            OSError: EIO while the power is off, EINVAL for parts of sectors, or what the backend behind says.

        >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
        >>> disk.trim(4096, 0)
        """
    def zero(self, count: int, offset: int) -> None:
        """Makes a range read as zeroes. Bytes.

        Raises:
            OSError: EIO while the power is off, EINVAL for parts of sectors, or what the backend behind says.

        >>> disk = ublk.WriteCache(ublk.Mem("1MiB"))
        >>> buf = bytearray(1024)
        >>> disk.pwrite(b"x" * 1024, 0)
        >>> disk.zero(512, 0)
        >>> disk.pread(buf, 0)
        >>> buf.count(b"x")
        512
        """

@final
class ZonedMem:
    """A zoned disk in memory, with write pointers, resources of open and active zones, and appends.

    Args:
        size: Bytes of the disk: a multiple of ``zone_size``.
        zone_size: Bytes from one zone's start to the next one's: a power of two.
        conventional: How many zones, the first ones, take writes anywhere.
        zone_capacity: Bytes that each sequential zone holds. Default the zone size.
        max_open: Most open zones; 0 for no limit.
        max_active: Most active zones; 0 for no limit.
        max_append: Bytes of the largest append. Default 512 KiB.

    Raises:
        ValueError: The sizes do not fit together.

    >>> import ublk
    >>> with ublk.Device(ublk.ZonedMem("64MiB", "4MiB")) as dev:
    ...     with open(f"/sys/block/ublkb{dev.id}/queue/zoned") as zoned:
    ...         zoned.read().strip()
    'host-managed'
    """

    def __new__(
        cls,
        size: _Size,
        zone_size: _Size,
        *,
        conventional: int = 0,
        zone_capacity: int | None = None,
        max_open: int = 0,
        max_active: int = 0,
        max_append: int | None = None,
    ) -> ZonedMem: ...
    @property
    def size(self) -> int:
        """Bytes of the disk.

        >>> disk = ublk.ZonedMem("64MiB", "4MiB")
        >>> disk.size >> 20
        64
        """
    @property
    def used(self) -> int:
        """Bytes of memory that the contents take.

        >>> disk = ublk.ZonedMem("64MiB", "4MiB")
        >>> disk.used
        0
        """
    def pread(self, buf: ReadableBuffer, offset: int) -> None:
        r"""Fills ``buf`` from byte ``offset`` on.

        Raises:
            OSError: The range is not within the disk (EINVAL).

        >>> disk = ublk.ZonedMem("64MiB", "4MiB")
        >>> buf = bytearray(b"data")
        >>> disk.pread(buf, 0)
        >>> buf
        bytearray(b'\x00\x00\x00\x00')
        """
    def pwrite(self, buf: ReadableBuffer, offset: int) -> None:
        """Stores ``buf`` from byte ``offset`` on, which is the write pointer of a sequential zone.

        Raises:
            OSError: It is not (EIO), or the zone is full.

        >>> disk = ublk.ZonedMem("64MiB", "4MiB")
        >>> disk.pwrite(b"x" * 512, 0)
        >>> try:
        ...     disk.pwrite(b"x" * 512, 0)
        ... except OSError as error:
        ...     error.errno == 5
        True
        """

def next_record() -> tuple[int, str, str, BaseException | None] | None: ...
def shielded(call: Callable[..., _T], *args: object) -> _T: ...
def apart(call: Callable[[], None]) -> None: ...
def await_lost() -> None: ...
def finish_endings() -> None: ...
def close_log() -> None: ...
def forked() -> None: ...
def features() -> list[str] | None: ...
def feature_names() -> list[tuple[str, str]]: ...
def list_devices() -> list[dict[str, Any]]: ...
def delete(id: int, timeout: float) -> None: ...
def quiesce(id: int, timeout: float) -> None: ...
def room(backend: object) -> int | None: ...
