"""What becomes of a backend's exceptions, and how the package says what the kernel refuses."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import ublk
from tests.py_guest.disks import (
    BLOCK,
    MIB,
    SCALE,
    Gate,
    Ram,
    Reads,
    error_of,
    gone,
    opened,
    raised,
    read,
    read_error,
    together,
    until,
    write,
    write_at,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# What the block layer carries to an O_DIRECT client (blk_errors[]).
CARRIED = {"EOPNOTSUPP", "ETIMEDOUT", "ENOSPC", "ENOLINK", "ENODATA", "EILSEQ", "ENOMEM"}
NOT_CARRIED = {"EIO", "ENOENT", "EPERM", "EACCES", "ECONNRESET", "EPIPE"}


class Raises(Ram):
    """Raises what it was told to."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | type[BaseException] | None = None

    def _act(self) -> None:
        if self.error is not None:
            raise self.error

    def pread(self, buf: memoryview, offset: int) -> None:
        self._act()

    def pwrite(self, buf: memoryview, offset: int) -> None:
        self._act()

    def flush(self) -> None:
        self._act()


class RaisesLater(Raises):
    """The same on a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self._act()

    async def flush(self) -> None:  # type: ignore[override]
        self._act()


class RaisesRaw:
    """The same with the request itself: raised by `handle`, or handed to `complete`."""

    size = MIB

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.raises = True

    def handle(self, request: ublk.Request) -> None:
        """Fails."""
        if self.error is not None and self.raises:
            raise self.error
        request.complete(self.error)


class Records(logging.Handler):
    """What was logged under ublk.*."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        logging.getLogger("ublk").addHandler(self)
        logging.getLogger("ublk").setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, name: str) -> list[logging.LogRecord]:
        """Those of one logger."""
        return [record for record in self.records if record.name == name]


def _name(number: int) -> str:
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode[number]


def _seen(call: Callable[[], object]) -> str | None:
    try:
        call()
    except OSError as error:
        return _name(error.errno or 0)
    return None


def test_an_errno_is_what_the_client_sees() -> None:
    for backend, options in ((Raises(), {}), (Raises(), {"threads": 2}), (RaisesLater(), {}), (RaisesRaw(), {})):
        with ublk.Device(backend, size=MIB, **options) as device:  # type: ignore[arg-type]
            for name in sorted(CARRIED | NOT_CARRIED):
                backend.error = OSError(getattr(errno, name), "no")
                wants = name if name in CARRIED else "EIO"
                assert _seen(lambda path=device.path: read(path)) == wants, (type(backend), name)
            backend.error = None
            assert read_error(device.path) is None
            for error in (
                OSError(),
                OSError("words"),
                OSError(0, "zero"),
                OSError(-5, "negative"),
                OSError(1 << 40, "huge"),
            ):
                backend.error = error
                assert read_error(device.path) == "EIO", error
            backend.error = NotImplementedError()
            assert _seen(lambda path=device.path: read(path)) == "EOPNOTSUPP"
            for kind in (ValueError, KeyError, asyncio.CancelledError, TimeoutError, StopIteration):
                backend.error = kind()
                assert read_error(device.path) == "EIO", kind
            # Alive in spite of everything.
            backend.error = None
            assert read_error(device.path) is None
    raw = RaisesRaw()
    raw.raises = False
    with ublk.Device(raw) as device:
        raw.error = OSError(errno.ENOSPC, "full")
        assert read_error(device.path) == "ENOSPC"
        raw.error = ValueError()
        assert read_error(device.path) == "EIO"


def test_a_flush_that_fails_is_never_a_success() -> None:
    for backend in (Raises(), RaisesLater()):
        with ublk.Device(backend) as device, opened(device.path) as fd:
            for error in (
                NotImplementedError(),
                OSError(errno.EOPNOTSUPP, "no"),
                OSError(errno.ENOSPC, "full"),
                ValueError(),
            ):
                backend.error = None
                write_at(fd, 0, bytes(BLOCK))
                backend.error = error
                seen = error_of(lambda fd=fd: os.fsync(fd))
                wants = "ENOSPC" if getattr(error, "errno", None) == errno.ENOSPC else "EIO"
                assert seen == wants, (type(backend), error, seen)
            backend.error = None
            os.fsync(fd)


def test_mistakes_are_logged_with_their_tracebacks_and_answers_are_not() -> None:
    log = Records()
    for backend in (Raises(), RaisesLater(), RaisesRaw()):
        log.records.clear()
        with ublk.Device(backend, size=MIB) as device:
            backend.error = OSError(errno.ENOSPC, "an answer")
            read_error(device.path)
            backend.error = NotImplementedError()
            read_error(device.path)
            backend.error = ZeroDivisionError("a mistake")
            read_error(device.path)
            until(lambda: log.of("ublk.backend"))
            backend.error = None
        for record in log.of("ublk.backend"):
            assert record.levelno == logging.ERROR
            assert f"read of {device.path} at byte" in record.getMessage() or "handle()" in record.getMessage()
            assert record.exc_info is not None
            assert isinstance(record.exc_info[1], ZeroDivisionError)
            trace = record.exc_info[2]
            assert trace is not None
            names = []
            while trace is not None:
                names.append(trace.tb_frame.f_code.co_name)
                trace = trace.tb_next
            assert names[-1] in {"_act", "handle"}, names
    log.records.clear()
    bad = Reads(lambda buf, offset: 7)
    with ublk.Device(bad, size=MIB) as device:
        read_error(device.path)
        until(lambda: log.of("ublk.backend"))
    assert "returned 7, not None or 4096" in log.of("ublk.backend")[0].getMessage()


def test_the_log_is_bounded_and_no_worker_waits_for_it() -> None:
    blocked, seen = threading.Event(), threading.Event()
    messages: list[str] = []

    class Stuck(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())
            seen.set()
            blocked.wait(60)

    logger = logging.getLogger("ublk")
    logger.propagate = False
    handler = Stuck()
    logger.addHandler(handler)

    def fails(buf: memoryview, offset: int) -> None:
        raise ValueError("again")

    with ublk.Device(Reads(fails), size=MIB) as device, opened(device.path) as fd:
        for _ in range(1500):
            error_of(lambda: os.preadv(fd, [bytearray(0)], 0))
        for _ in range(1300):
            assert _direct_error(fd)
        assert seen.wait(10)
        assert len(messages) == 1
        blocked.set()
        until(lambda: any("were lost" in message for message in messages))
        until(lambda: len(messages) > 1000)
    # A logging handler that raises costs its own message alone.
    logger.removeHandler(handler)

    class Broken(logging.Handler):
        count = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.count += 1
            raise RuntimeError("not my day")

    broken = Broken()
    logger.addHandler(broken)
    with ublk.Device(Reads(fails), size=MIB) as device:
        read_error(device.path)
        until(lambda: broken.count)
        first = broken.count
        read_error(device.path)
        until(lambda: broken.count > first)
    logger.removeHandler(broken)


def _direct_error(fd: int, memory: Any = None) -> bool:
    import mmap  # noqa: PLC0415

    with mmap.mmap(-1, BLOCK) as page:
        try:
            os.preadv(fd, [page], 0)
        except OSError:
            return True
    return False


class Stop(BaseException):
    """No Exception."""


def test_what_is_no_exception_ends_the_device_and_comes_out_of_wait_or_stop() -> None:
    for backend, options in ((Raises(), {}), (Raises(), {"threads": 2}), (RaisesLater(), {}), (RaisesRaw(), {})):
        for error in (KeyboardInterrupt(), SystemExit(3), Stop()):
            backend.error = None
            device = ublk.Device(backend, size=MIB, **options).start()  # type: ignore[arg-type]
            backend.error = error
            # This one, or one of udev's that came before it and has ended the disk.
            read_error(device.path)
            assert raised(type(error), lambda device=device: device.wait(20 * SCALE)) is error
            # Once: then it is only over.
            assert device.wait(20 * SCALE) is True
            device.stop()
            gone(device)
        backend.error = None
        device = ublk.Device(backend, size=MIB, **options).start()  # type: ignore[arg-type]
        backend.error = Stop()
        read_error(device.path)
        raised(Stop, device.stop)
        device.stop()
        raised(Stop, lambda backend=backend, options=options: _fatal_in_with(backend, options))
    until(lambda: not ublk.list())


def _fatal_in_with(backend: Any, options: dict[str, Any]) -> None:
    backend.error = None
    with ublk.Device(backend, size=MIB, **options) as device:
        backend.error = Stop()
        read_error(device.path)


def test_a_fatal_error_while_starting() -> None:
    def dies(buf: memoryview, offset: int) -> None:
        raise Stop

    # The kernel's partition scan reads, so START or what follows it meets this.
    try:
        with ublk.Device(Reads(dies), size=MIB) as device:
            read_error(device.path)
            device.wait(20)
    except Stop:
        pass
    else:
        raise AssertionError("it was lost")
    until(lambda: not ublk.list())


def test_requests_that_nobody_answers() -> None:
    class Forgets:
        size = MIB

        def handle(self, request: ublk.Request) -> None:
            pass

    with (
        ublk.Device(Forgets(), partition_scan=False)
        if ublk.features() and "NO_AUTO_PART_SCAN" in ublk.features()
        else ublk.Device(Forgets()) as device
    ):  # type: ignore[operator]
        assert read_error(device.path) == "EIO"
        assert device.stats().total.dropped >= 1

    kept: list[ublk.Request] = []

    class Keeps:
        size = MIB

        def handle(self, request: ublk.Request) -> None:
            if armed:
                kept.append(request)
            else:
                request.complete()

    armed = False
    device = ublk.Device(Keeps()).start()
    armed = True
    client = threading.Thread(target=lambda: error_of(lambda: read(device.path)))
    client.start()
    until(lambda: kept)
    assert device.stats().total.in_flight >= 1
    until(lambda: device.stats().total.oldest)
    buffer = kept[0].buffer
    device.stop_force(0.2)
    client.join(10 * SCALE)
    assert not client.is_alive()
    # The answer was given by the stop; the memory is still there.
    raised(ublk.GoneError, kept[0].complete)
    raised(ublk.StateError, kept[0].complete, "before")
    if buffer is not None and not buffer.readonly:
        buffer[:] = b"!" * len(buffer)
    assert device.stats().total.revoked >= 1


def test_a_request_is_completed_once() -> None:
    said: list[object] = []

    class Twice:
        size = MIB

        def handle(self, request: ublk.Request) -> None:
            assert not request.completed
            for wrong in (-5000, -(1 << 40)):
                try:
                    request.complete(wrong)
                except TypeError as error:
                    said.append(error)
            request.complete(
                -errno.ENOSPC if request.op == "read" and request.offset == MIB // 2 else request.length or None
            )
            assert request.completed
            try:
                request.complete()
            except ublk.StateError as error:
                said.append(error)

    with ublk.Device(Twice(), trim=True, zero=True, cache=True) as device:
        assert read_error(device.path) is None
        assert read_error(device.path, MIB // 2) == "ENOSPC"
        write(device.path, 0, bytes(BLOCK))
        with opened(device.path) as fd:
            os.fsync(fd)
        subprocess.run(["blkdiscard", "-f", device.path], check=True)
        subprocess.run(["blkdiscard", "-f", "-z", device.path], check=True)
    assert len(said) % 3 == 0
    assert len(said) >= 18


def test_what_the_kernel_refuses_is_the_right_oserror() -> None:
    with ublk.Device(Ram(), id=7) as device:
        assert device.id == 7
        error = raised(FileExistsError, ublk.Device(Ram(), id=7).start)
        assert isinstance(error, FileExistsError)
        assert (error.errno, error.filename) == (errno.EEXIST, "/dev/ublkc7")
        assert error.__notes__
        raised(ublk.StateError, lambda: ublk.recover(7, Ram()), "USER_RECOVERY")
    for call in (
        lambda: ublk.recover(99, Ram()),
        lambda: ublk.delete(99),
        lambda: ublk.recover(99, Reads(lambda b, o: None)),
    ):
        error = raised(FileNotFoundError, call)
        assert isinstance(error, FileNotFoundError)
        assert error.filename in {"/dev/ublkc99", "/dev/ublkb99"}, error.filename
    raised(ValueError, lambda: ublk.delete(1, timeout=-1))
    # An ordinary user.
    code = (
        "import os, ublk\nos.setgid(65534); os.setuid(65534)\n"
        "class R:\n  def pread(self, buf, offset): pass\n"
        "for call in (ublk.Device(R(), size=4096).start, ublk.features):\n"
        "  try: call()\n"
        "  except PermissionError as e:\n"
        "    assert e.errno in (1, 13) and e.filename == '/dev/ublk-control', (e.errno, e.filename)\n"
        "    notes = ' '.join(e.__notes__)\n"
        "    assert 'root' in notes and 'udev' in notes, notes\n"
        "  else: raise SystemExit('no PermissionError')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_start_that_takes_too_long() -> None:
    gate = Gate()
    gate.closed = True
    began = time.monotonic()
    try:
        # Its partition scan waits for a read that is not answered.
        device = ublk.Device(gate, start_timeout=0.5).start()
    except TimeoutError as error:
        assert error.errno == errno.ETIMEDOUT
    else:
        gate.go.set()
        device.stop()
    gate.go.set()
    assert time.monotonic() - began < 30 * SCALE
    until(lambda: not ublk.list())


def test_tracing_reaches_logging() -> None:
    log = Records()
    with ublk.Device(Ram()) as device:
        together(2, lambda i: read(device.path, i * BLOCK))
    until(lambda: [r for r in log.records if r.name.startswith("ublk.") and r.name != "ublk.backend"])
    assert all(r.name == "ublk" or r.name.startswith("ublk.") for r in log.records)
