"""Linux block devices served from Python: a class with ``pread`` and ``pwrite`` becomes ``/dev/ublkbN``.

>>> import ublk
>>> class RamDisk:
...     def __init__(self, size):
...         self.data = bytearray(size)
...     def pread(self, buf, offset):
...         buf[:] = self.data[offset : offset + len(buf)]
...     def pwrite(self, buf, offset):
...         self.data[offset : offset + len(buf)] = buf
...     def flush(self):
...         pass
>>> with ublk.Device(RamDisk(1 << 20), size="1MiB") as dev:
...     with open(dev.path, "r+b", buffering=0) as disk:
...         _ = disk.write(b"x" * 512)
...         _ = disk.seek(0)
...         disk.read(3)
b'xxx'
"""

from __future__ import annotations

from ublk._backend import AnyBackend, AsyncBackend, Backend, RawBackend
from ublk._device import Device
from ublk._machine import delete, features, list, quiesce  # noqa: A004
from ublk._native import (
    Fault,
    File,
    GoneError,
    Mem,
    Null,
    Request,
    SharedBuffer,
    StateError,
    Stripe,
    Workers,
    WriteCache,
    ZonedMem,
    __version__,
)
from ublk._recover import recover
from ublk._size import parse_size
from ublk._types import DataPath, DeviceInfo, Flags, Integrity, OpStats, QueueStats, Recovery, Stats, Zone, Zoned

__all__ = [
    "AnyBackend",
    "AsyncBackend",
    "Backend",
    "DataPath",
    "Device",
    "DeviceInfo",
    "Fault",
    "File",
    "Flags",
    "GoneError",
    "Integrity",
    "Mem",
    "Null",
    "OpStats",
    "QueueStats",
    "RawBackend",
    "Recovery",
    "Request",
    "SharedBuffer",
    "StateError",
    "Stats",
    "Stripe",
    "Workers",
    "WriteCache",
    "Zone",
    "Zoned",
    "ZonedMem",
    "__version__",
    "delete",
    "features",
    "list",
    "parse_size",
    "quiesce",
    "recover",
]
