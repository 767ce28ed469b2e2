"""What the tests of the package share: backends, and clients that go past the page cache."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ublk
from ublk_rig.pyguest import NotRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
BLOCK = 4096
FULL = bool(os.environ.get("UBLK_FULL"))
SCALE = float(os.environ.get("UBLK_TIMESCALE", "1"))
# To prefer where nobody but the test's own clients is to have requests. Where the driver has no such feature, START waits
# for the kernel's look for partitions; where it has, that look begins at some time after START.
UNSCANNED = "NO_AUTO_PART_SCAN"
# As Python code can use them: all of them.
DATA_PATHS: tuple[ublk.DataPath, ...] = ("copy", "need-get-data", "user-copy", "zero-copy", "auto-buf-reg")
_NEEDS = {
    "need-get-data": "NEED_GET_DATA",
    "user-copy": "USER_COPY",
    "zero-copy": "SUPPORT_ZERO_COPY",
    "auto-buf-reg": "AUTO_BUF_REG",
}


# What one of the kernels that are tested on has not.
_SINCE = {"UPDATE_SIZE": "6.16", "QUIESCE": "6.16", "INTEGRITY": "7.0", "SHMEM_ZC": "7.1", "IO_DESC_SIZE": "7.3"}


def usable_paths() -> list[ublk.DataPath]:
    """The data paths that this kernel has."""
    return [path for path in DATA_PATHS if path not in _NEEDS or has(_NEEDS[path])]


def has(feature: str) -> bool:
    """Whether the driver offers a feature."""
    return feature in (ublk.features() or ())


def tasks() -> dict[int, str]:
    """The threads of this process, with their names. One that has just been joined may still be ending."""
    found = {}
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            found[int(task)] = Path(f"/proc/self/task/{task}/comm").read_text().strip()
    return found


def needs(feature: str) -> None:
    """Rules the test out where the driver lacks the feature."""
    if not has(feature):
        raise NotRun(f"the driver lacks {feature} (since Linux {_SINCE[feature]})")


class Ram:
    """The ramdisk of the README, with all that a backend may have."""

    def __init__(self, size: int = MIB) -> None:
        self.size = size
        self.data = bytearray(size)
        self.flushes = 0

    def pread(self, buf: memoryview, offset: int) -> None:
        """Fills the buffer."""
        buf[:] = self.data[offset : offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int) -> None:
        """Stores it."""
        self.data[offset : offset + len(buf)] = buf

    def flush(self) -> None:
        """Counts."""
        self.flushes += 1

    def trim(self, count: int, offset: int) -> None:
        """Forgets."""
        self.zero(count, offset)

    def zero(self, count: int, offset: int) -> None:
        """Zeroes."""
        self.data[offset : offset + count] = bytes(count)


class Reads:
    """The least that a backend is; `pread` is what it is given."""

    def __init__(self, pread: Callable[[memoryview, int], Any]) -> None:
        self.pread = pread


@contextlib.contextmanager
def opened(path: str, flags: int = os.O_RDWR | os.O_DIRECT) -> Iterator[int]:
    """A descriptor of a disk."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_at(fd: int, offset: int, count: int = BLOCK) -> bytes:
    """Reads past the page cache."""
    with mmap.mmap(-1, count) as memory:
        got = os.preadv(fd, [memory], offset)
        return bytes(memory[:got])


def write_at(fd: int, offset: int, data: bytes) -> None:
    """Writes past the page cache."""
    with mmap.mmap(-1, len(data)) as memory:
        memory[:] = data
        assert os.pwritev(fd, [memory], offset) == len(data)


def read(path: str, offset: int = 0, count: int = BLOCK) -> bytes:
    """As `read_at`, of a path."""
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        return read_at(fd, offset, count)


def write(path: str, offset: int, data: bytes) -> None:
    """As `write_at`, of a path."""
    with opened(path) as fd:
        write_at(fd, offset, data)


def error_of(call: Callable[[], object]) -> str | None:
    """The name of the errno that a call fails with; None if it does not."""
    try:
        call()
    except OSError as error:
        assert error.errno is not None
        return errno.errorcode[error.errno]
    return None


def read_error(path: str, offset: int = 0) -> str | None:
    """The name of the errno that a direct read fails with."""
    return error_of(lambda: read(path, offset))


def raised(kind: type[BaseException], call: Callable[[], object], *words: str) -> BaseException:
    """The exception that a call has to raise, whose text has these words in it."""
    try:
        call()
    except kind as error:
        text = "\n".join([str(error), *getattr(error, "__notes__", [])])
        assert all(word in text for word in words), (words, text)
        return error
    raise AssertionError(f"no {kind.__name__}")


def together(count: int, call: Callable[[int], object]) -> list[Any]:
    """The results of calls made at the same time."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def sysfs(device: ublk.Device, name: str) -> str:
    """An attribute of the disk's queue, or of the disk if it begins with ../."""
    with open(f"/sys/block/ublkb{device.id}/queue/{name}", encoding="ascii") as file:
        return file.read().strip()


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Waits for what announces itself to nobody."""
    deadline = time.monotonic() + seconds * SCALE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def gone(device: ublk.Device) -> None:
    """Its nodes are: a promise for the moment at which a stop returns. The driver frees its number when it likes."""
    assert not os.path.exists(device.path)
    assert not os.path.exists(f"/dev/ublkc{device.id}")


class Gate:
    """A backend whose reads wait until they may go on."""

    def __init__(self, size: int = MIB) -> None:
        self.size = size
        self.arrived = threading.Event()
        self.go = threading.Event()
        self.closed = False

    def pread(self, buf: memoryview, offset: int) -> None:
        """Waits, if it was told to."""
        if self.closed:
            self.arrived.set()
            self.go.wait(60)


class Held:
    """A raw backend that answers nothing while it is told so."""

    size = MIB

    def __init__(self, *, closed: bool = True) -> None:
        self.closed = closed
        self.arrived = threading.Event()
        self.requests: list[ublk.Request] = []

    def handle(self, request: ublk.Request) -> None:
        """Keeps it, or answers it."""
        if self.closed:
            self.requests.append(request)
            self.arrived.set()
        else:
            request.complete()

    def let_go(self) -> None:
        """Answers what it has, and all that comes."""
        self.closed = False
        while self.requests:
            self.requests.pop().complete()


# Away from where the kernel looks for partitions, by now or later.
FAR = MIB // 2


class FarHeld(Held):
    """Holds what is there only."""

    def handle(self, request: ublk.Request) -> None:
        """Keeps it, or answers it."""
        if request.offset >= FAR:
            super().handle(request)
        else:
            request.complete()
