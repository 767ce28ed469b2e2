"""The native half: private. What of it users see, `ublk` exports."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex, TypeAlias, final

from typing_extensions import Buffer as ReadableBuffer

from ublk._types import Flags

__all__ = [
    "Buffer",
    "Calls",
    "Device",
    "File",
    "GoneError",
    "Inbox",
    "Mem",
    "Null",
    "Request",
    "Spec",
    "StateError",
    "Workers",
    "ZonedMem",
    "__version__",
    "close_log",
    "delete",
    "feature_names",
    "features",
    "forked",
    "list_devices",
    "next_record",
]

__version__: str

_Methods: TypeAlias = Mapping[str, tuple[Callable[..., Any], bool]]
_Size: TypeAlias = SupportsIndex | str

class StateError(RuntimeError):
    """The device is in another state than the call needs, or the call would wait for its own caller."""

class GoneError(StateError):
    """The request was answered by a stop, or its device has ended, before it was completed."""

@final
class Buffer: ...  # of which `memoryview` makes a view

@final
class Calls:
    def __new__(cls, methods: _Methods, flags: Sequence[object]) -> Calls: ...

@final
class Inbox:
    def __new__(cls) -> Inbox: ...
    def connect(self, event_loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None: ...
    def disconnect(self) -> None: ...
    def take(self) -> list[Request]: ...

@final
class Request:
    """One request of a disk's client, for `RawBackend` backends: to be completed once, from any thread.

    One that is dropped without that is answered with EIO. Offsets and lengths are bytes.
    """

    @property
    def op(self) -> str:
        """``"read"``, ``"write"``, ``"flush"``, ``"trim"`` or ``"zero"``; of a zoned disk also ``"append"``,
        ``"report_zones"``, ``"open"``, ``"close"``, ``"finish"``, ``"reset"`` and ``"reset_all"``.
        """
    @property
    def offset(self) -> int:
        """Where the range starts; 0 for a flush."""
    @property
    def length(self) -> int:
        """Bytes of the range; 0 for a flush and a report of zones."""
    @property
    def flags(self) -> Flags:
        """What it asks for besides."""
    @property
    def zones(self) -> int:
        """How many zones are to be reported at most."""
    @property
    def device(self) -> int:
        """The device's number."""
    @property
    def queue(self) -> int:
        """The queue's number."""
    @property
    def tag(self) -> int:
        """The request's number in its queue, used again by later ones."""
    @property
    def buffer(self) -> memoryview | None:
        """The data: of a read to be filled, of a write read-only; None for the others."""
    @property
    def completed(self) -> bool:
        """Whether it was completed."""
    def complete(self, result: object = None) -> None:
        """Answers it: None or the length for success; a negative errno or an exception for failure; of an append the byte
        where the data went, of a report the list of zones.

        Raises:
            StateError: It was completed before.
            GoneError: A stop was faster: the client has got EIO.
        """
    def _returned(self, value: object, /) -> None: ...
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
    def start(self) -> Device: ...
    def recover(self, id: int) -> Device: ...

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
    def resize(self, size: int) -> None: ...
    def stop(self, timeout: float, force: bool) -> list[str]: ...
    def hand_over(self, timeout: float) -> None: ...
    def check_caller(self, what: str) -> None: ...
    def ended_fd(self) -> int: ...
    def ending(self) -> str | None: ...
    def take_fatal(self) -> BaseException | None: ...
    def abandon(self, then: Callable[[], object] | None = None) -> None: ...

@final
class Workers:
    """Worker threads that devices share, in place of one for each queue: for many devices.

    A backend that blocks stalls every device on its worker: give such a device ``threads``. The threads are started with
    the first device, and end with the pool and the last one.
    """

    def __new__(cls, count: int) -> Workers: ...
    @property
    def count(self) -> int:
        """How many there are, 1 to 1024."""

@final
class Null:
    """Answers every request at once: reads give zeroes, writes are forgotten. For measuring what everything else costs."""

    def __new__(cls) -> Null: ...
    def pread(self, buf: ReadableBuffer, offset: int) -> None: ...
    def pwrite(self, buf: ReadableBuffer, offset: int) -> None: ...
    def flush(self) -> None: ...
    def trim(self, count: int, offset: int) -> None: ...
    def zero(self, count: int, offset: int) -> None: ...

@final
class Mem:
    """A sparse disk in memory: what was written takes memory, what was discarded gives it back.

    Its methods are those of a `Backend`, for Python backends that wrap it.
    """

    def __new__(cls, size: _Size) -> Mem: ...
    @property
    def size(self) -> int:
        """Bytes of the disk."""
    @property
    def used(self) -> int:
        """Bytes of memory that the contents take."""
    def pread(self, buf: ReadableBuffer, offset: int) -> None: ...
    def pwrite(self, buf: ReadableBuffer, offset: int) -> None: ...
    def flush(self) -> None: ...
    def trim(self, count: int, offset: int) -> None: ...
    def zero(self, count: int, offset: int) -> None: ...

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
        """Bytes of the file when it was opened."""
    @property
    def path(self) -> os.PathLike[str]:
        """The file."""
    def pread(self, buf: ReadableBuffer, offset: int) -> None: ...
    def pwrite(self, buf: ReadableBuffer, offset: int) -> None: ...
    def flush(self) -> None: ...
    def trim(self, count: int, offset: int) -> None: ...
    def zero(self, count: int, offset: int) -> None: ...

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
        """Bytes of the disk."""
    @property
    def used(self) -> int:
        """Bytes of memory that the contents take."""
    def pread(self, buf: ReadableBuffer, offset: int) -> None: ...
    def pwrite(self, buf: ReadableBuffer, offset: int) -> None: ...

def next_record() -> tuple[int, str, str, BaseException | None] | None: ...
def finish_endings() -> None: ...
def close_log() -> None: ...
def forked() -> None: ...
def features() -> list[str] | None: ...
def feature_names() -> list[tuple[str, str]]: ...
def list_devices() -> list[dict[str, Any]]: ...
def delete(id: int, timeout: float) -> None: ...
