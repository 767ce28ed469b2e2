"""The small types of the package: flags, metadata, zones, what a device counts, and how it is described."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "DataPath",
    "DeviceInfo",
    "Flags",
    "Integrity",
    "OpStats",
    "QueueStats",
    "Recovery",
    "Stats",
    "Zone",
    "Zoned",
]

DataPath = Literal["auto", "copy", "need-get-data", "user-copy", "zero-copy", "auto-buf-reg"]
"""How the data of requests moves between the kernel and the server; every backend works with each.

``"auto"``: as is best for the backend; ``"copy"``: the driver copies; ``"user-copy"``: the server copies, by
``pread`` and ``pwrite`` on the device's file (Linux 6.5); ``"zero-copy"`` and ``"auto-buf-reg"``: the client's own
pages, for the backends in Rust that pass data on (Linux 6.15, 6.16). See ``docs/architecture.md``.

>>> import ublk
>>> with ublk.Device(ublk.Mem("1MiB"), data_path="user-copy") as dev:
...     dev.data_path
'user-copy'
"""

Recovery = Literal["wait", "reissue", "fail"]
"""What becomes of a disk whose server is gone until `ublk.recover` takes it over.

``"wait"``: new requests wait, those that the server had fail; ``"reissue"``: those go to the next server, too;
``"fail"``: new requests fail (Linux 6.13).

>>> import ublk
>>> with ublk.Device(ublk.Mem("1MiB"), recovery="wait") as dev:
...     "USER_RECOVERY" in dev.features
True
"""


class Flags(enum.IntFlag):
    """What a request asks for besides its operation.

    A method that takes an argument named ``flags`` is given them.

    >>> Flags.FUA in Flags(1)
    True
    """

    FUA = 1
    """Force unit access: the write is durable before it is answered."""
    NO_UNMAP = 2
    """Of ``zero``: the range's space stays allocated."""
    META = 4
    """A file system's metadata."""
    SWAP = 8
    """Swap traffic: the system waits for memory."""
    INTEGRITY = 16
    """There is metadata beside the data."""


@dataclass(frozen=True, slots=True)
class Zoned:
    """The zones of a zoned disk, for ``Device(zoned=...)``. Sizes in bytes.

    >>> Zoned(zone_size=4 << 20).max_open
    0
    """

    zone_size: int
    """From one zone's start to the next one's: a power of two, and the disk's size a multiple of it."""
    max_open: int = 0
    """Most zones that can be open at a time; 0 for no limit."""
    max_active: int = 0
    """Most zones that can be active (open or closed) at a time; 0 for no limit."""
    max_append: int = 512 << 10
    """The largest append."""


@dataclass(frozen=True, slots=True)
class Integrity:
    """Metadata that a disk keeps beside its data (Linux 7.0), for ``Device(integrity=...)`` and `Mem`.

    The kernel makes protection information for writes, and verifies it for reads: a client whose data, or metadata,
    was changed gets EILSEQ.

    >>> Integrity.protection("nvme").metadata_size
    16
    """

    metadata_size: int
    """Bytes of metadata for each interval, 1 to 255."""
    interval: int = 512
    """Bytes of data that one piece of metadata is for: a power of two from 512 to the logical block size."""
    checksum: Literal["none", "ip", "t10dif", "nvme"] = "none"
    """What the protection information has: T10's of 8 bytes with IP's checksum or T10 DIF's CRC, NVMe's of 16
    bytes, or none: then the metadata is nothing to the kernel."""
    pi_offset: int = 0
    """Where in each piece of metadata the protection information starts."""
    tag_size: int = 0
    """Bytes of the application's tag, for those who look at ``/sys/block/*/integrity``."""
    reference_tags: bool = False
    """Whether the protection information counts blocks, which needs a checksum."""
    capable: bool = False
    """Whether the server itself makes and verifies protection information, for those who look there."""

    @classmethod
    def protection(cls, checksum: Literal["ip", "t10dif", "nvme"] = "t10dif", interval: int = 512) -> Integrity:
        """Protection information that counts blocks, and nothing else.

        >>> Integrity.protection() == Integrity(8, checksum="t10dif", reference_tags=True)
        True
        """
        size = {"ip": 8, "t10dif": 8, "nvme": 16}.get(checksum)
        if size is None:
            raise ValueError(f"checksum={checksum!r}: 'ip', 't10dif' or 'nvme'")
        return cls(size, interval, checksum, reference_tags=True)

    def metadata_bytes(self, count: int) -> int:
        """Bytes of metadata for ``count`` bytes of data.

        >>> Integrity.protection().metadata_bytes(4096)
        64
        """
        return count // self.interval * self.metadata_size


@dataclass(frozen=True, slots=True)
class Zone:
    """A zone, as ``report_zones`` tells of it. Sizes and places in bytes.

    >>> Zone(start=0, length=4 << 20, capacity=4 << 20, write_pointer=0).state
    'empty'
    """

    start: int
    """Where it starts on the disk."""
    length: int
    """From its start to the next zone's."""
    capacity: int
    """What can be written of it."""
    write_pointer: int
    """Where on the disk the next write goes."""
    kind: Literal["conventional", "sequential"] = "sequential"
    """Where it takes writes: anywhere, or at its write pointer only."""
    state: Literal[
        "no-write-pointer",
        "empty",
        "implicitly-open",
        "explicitly-open",
        "closed",
        "full",
        "read-only",
        "offline",
    ] = "empty"
    """Its condition."""


@dataclass(frozen=True, slots=True)
class OpStats:
    """One kind of operation. Times in seconds, from a request's arrival at the server to its answer.

    >>> OpStats().completed
    0
    """

    completed: int = 0
    """Requests that ended, well or not."""
    bytes: int = 0
    """Bytes of those that ended well."""
    errors: int = 0
    """Requests that ended with an error."""
    p50: float | None = None
    """The time within which half of them ended; None if there were none."""
    p90: float | None = None
    """The time within which nine of ten ended."""
    p99: float | None = None
    """The time within which 99 of a hundred ended."""
    p999: float | None = None
    """The time within which 999 of a thousand ended."""
    longest: float | None = None
    """The time within which all ended."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """One queue, or all queues of a device together, since its start.

    >>> QueueStats().in_flight
    0
    """

    read: OpStats = OpStats()
    """Reads: calls of ``pread``."""
    write: OpStats = OpStats()
    """Writes: calls of ``pwrite``."""
    flush: OpStats = OpStats()
    """Calls of ``flush``."""
    trim: OpStats = OpStats()
    """Discards: calls of ``trim``."""
    zero: OpStats = OpStats()
    """Writes of zeroes: calls of ``zero``."""
    append: OpStats = OpStats()
    """Appends to zones."""
    report_zones: OpStats = OpStats()
    """Reports of zones."""
    zone: OpStats = OpStats()
    """Zones that were opened, closed, finished or reset."""
    in_flight: int = 0
    """Requests that are with the backend now."""
    oldest: float | None = None
    """How many seconds the oldest of them has been there."""
    dropped: int = 0
    """Requests that were dropped without an answer; their clients got EIO."""
    panics: int = 0
    """Panics of a backend in Rust."""
    revoked: int = 0
    """Requests that a stop took from their holders."""
    refused: int = 0
    """Requests that were refused because the device was ending."""
    rejected: int = 0
    """Commands that the kernel did not accept. Anything but 0 is a defect of this package."""
    unregistered: int = 0
    """Requests whose pages could not be used in place, so that their data was copied."""
    shared: int = 0
    """Requests whose data lay in memory that clients share (``Device.share``)."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a device has counted since its start.

    >>> Stats().total.read.bytes
    0
    """

    queues: list[QueueStats] = field(default_factory=list)
    """One entry a queue."""
    total: QueueStats = QueueStats()
    """The queues together."""
    enters: int = 0
    """How often the workers entered the kernel."""
    wake_ups: int = 0
    """How often another thread had to wake one of them to hand a result over."""


def stats_of(raw: dict[str, Any]) -> Stats:
    """Objects of what the native side counts."""

    def queue(one: dict[str, Any]) -> QueueStats:
        fields: dict[str, Any] = {name: OpStats(**v) if isinstance(v, dict) else v for name, v in one.items()}
        return QueueStats(**fields)

    return Stats([queue(q) for q in raw["queues"]], queue(raw["total"]), raw["enters"], raw["wake_ups"])


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device of the machine, as `ublk.list` tells of it.

    >>> DeviceInfo(id=3).path
    '/dev/ublkb3'
    """

    id: int
    """Its number: the N of ``/dev/ublkbN``."""
    state: str = "dead"
    """``"live"``, ``"dead"`` (no disk: its server is gone), ``"quiesced"`` or ``"fail-io"`` (for `ublk.recover`)."""
    server_pid: int | None = None
    """The process that serves it, in this process's pid namespace."""
    queues: int = 0
    """Hardware queues."""
    depth: int = 0
    """Requests of each queue that can be in progress."""
    max_io_size: int = 0
    """Bytes of the largest request."""
    features: frozenset[str] = frozenset()
    """What the driver granted it."""
    fingerprint: int = 0
    """What its server gave it to be told by: `Device`'s ``fingerprint``."""
    owner: tuple[int, int] = (0, 0)
    """User and group that added it."""
    size: int | None = None
    """Bytes of its disk; None while it has none."""

    @property
    def path(self) -> str:
        """The disk's node.

        >>> DeviceInfo(id=3).path
        '/dev/ublkb3'
        """
        return f"/dev/ublkb{self.id}"


def info_of(raw: dict[str, Any]) -> DeviceInfo:
    """An object of what the native side says of a device."""
    return DeviceInfo(**{**raw, "features": frozenset(raw["features"])})
