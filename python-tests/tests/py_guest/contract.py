"""What `Device` promises about its construction, its life and its backend's methods."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ublk
from tests.py_guest.disks import (
    BLOCK,
    MIB,
    SCALE,
    UNSCANNED,
    Gate,
    Ram,
    Reads,
    error_of,
    opened,
    raised,
    read,
    read_at,
    read_error,
    sysfs,
    together,
    until,
    write,
    write_at,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def _nothing(buf: memoryview, offset: int) -> None:
    pass


def test_a_disk_in_a_with_block() -> None:
    backend = Ram()
    with ublk.Device(backend) as device:
        assert device.path == f"/dev/ublkb{device.id}"
        assert device.state == "live"
        assert [i.id for i in ublk.list()] == [device.id]
        assert ublk.list()[0].server_pid == os.getpid()
        write(device.path, BLOCK, b"x" * BLOCK)
        assert read(device.path, BLOCK) == b"x" * BLOCK
    # Stopped and deleted: the nodes are gone when it returns.
    assert not Path(device.path).exists()
    assert not Path(f"/dev/ublkc{device.id}").exists()
    assert ublk.list() == []
    assert (device.state, device.path) == ("stopped", f"/dev/ublkb{device.id}")
    assert device.stats().total.write.completed == 1
    assert backend.data[BLOCK : 2 * BLOCK] == b"x" * BLOCK


def test_construction_creates_nothing_and_refuses_what_is_wrong() -> None:
    before = os.listdir("/proc/self/fd"), threading.active_count(), os.listdir("/proc/self/task")
    device = ublk.Device(Ram())
    assert (os.listdir("/proc/self/fd"), threading.active_count(), os.listdir("/proc/self/task")) == before
    assert (device.state, device.size, device.warnings) == ("new", MIB, [])
    for name in ("id", "path", "data_path", "info"):
        raised(ublk.StateError, lambda name=name: getattr(device, name))
    raised(ublk.StateError, device.wait, "not started")
    raised(TypeError, lambda: pickle.dumps(device), "pickled")
    raised(TypeError, lambda: ublk.Device(object(), size=MIB), "pread", "handle")  # type: ignore[arg-type]
    raised(TypeError, lambda: ublk.Device(types.SimpleNamespace(pread=3), size=MIB), "not a method")  # type: ignore[arg-type]
    both = types.SimpleNamespace(pread=_nothing, handle=print)
    raised(TypeError, lambda: ublk.Device(both, size=MIB), "one or the other")
    raised(TypeError, lambda: ublk.Device(Reads(_nothing)), "size")
    device.stop()
    raised(ublk.StateError, device.start)
    assert device.state == "stopped"
    assert ublk.list() == []


def test_sizes() -> None:
    backend = Reads(_nothing)
    good: list[tuple[Any, int]] = [
        (512, 512),
        ("10GiB", 10 << 30),
        ("10G", 10 << 30),
        ("1K", 1024),
        ("3MiB", 3 << 20),
        ("512KB", 512000),
        ("512MB", 512000000),
        ("2TiB", 2 << 40),
        (" 1 MiB ", MIB),
        ("4096", 4096),
        ("1kib", None),
    ]
    for given, size in good:
        if size is None:
            raised(ValueError, lambda given=given: ublk.Device(backend, size=given), "size=")
        else:
            assert ublk.Device(backend, size=given).size == size
    for wrong in (0, -512, 1, 511, 1000, "", "10 apples", "-1K", "1.5G", "1KB", 1 << 63, "8EiB", True):
        raised(ValueError, lambda wrong=wrong: ublk.Device(backend, size=wrong), "size=")
    raised(ValueError, lambda: ublk.Device(backend, size=512 * 9, block_size=4096), "4096")
    for wrong in (1.5, b"1M", [512]):
        raised(TypeError, lambda wrong=wrong: ublk.Device(backend, size=wrong))
    assert ublk.Device(Ram(2 * MIB)).size == 2 * MIB


def test_every_option_refuses_wrong_values() -> None:
    wrong: list[dict[str, Any]] = [
        {"queues": 0},
        {"queues": 4097},
        {"queues": -1},
        {"depth": 0},
        {"depth": 4097},
        {"block_size": 513},
        {"block_size": 8192},
        {"physical_block_size": 256},
        {"io_min": 1000},
        {"io_opt": 1000},
        {"max_io_size": 5000},
        {"max_io_size": 64 * MIB},
        {"id": -1},
        {"id": 1 << 20},
        {"threads": -1},
        {"threads": 5000},
        {"workers_per_queue": 0},
        {"data_path": "carrier pigeon"},
        {"recovery": "later"},
        {"require": ["NO_SUCH_FEATURE"]},
        {"prefer": ["NO_SUCH_FEATURE"]},
        {"forbid": ["NO_SUCH_FEATURE"]},
        {"start_timeout": -1},
        {"start_timeout": float("nan")},
        {"fingerprint": -1},
        {"fingerprint": 1 << 64},
        {"trim": True},
        {"zero": True},
        {"cache": True},
        {"fua": True},
        {"dma_alignment": 3},
        {"segments": (1, 2, 3)},
        {"descriptor_size": 7},
        {"trim_granularity": 100},
        {"zoned": ublk.Zoned(zone_size=1000)},
        {"stop_timeout": -1},
    ]
    for options in wrong:
        try:
            ublk.Device(Reads(_nothing), size=MIB, **options)
        except (ValueError, OSError) as error:
            assert len(str(error)) > 10, (options, error)
        else:
            raise AssertionError(options)
    for options in (
        {"queues": "2"},
        {"depth": 1.5},
        {"read_only": "yes"},
        {"id": "0"},
        {"workers": 3},
        {"segments": 4},
    ):
        raised(
            TypeError, lambda options=options: ublk.Device(Reads(_nothing), size=MIB, **options), next(iter(options))
        )
    raised(TypeError, lambda: ublk.Device(Reads(_nothing), size=MIB, quues=2))  # type: ignore[call-arg]


def test_stop_is_idempotent_and_names_the_holders() -> None:
    device = ublk.Device(Ram()).start()
    with opened(device.path):
        began = time.monotonic()
        error = raised(TimeoutError, lambda: device.stop(0.3), str(os.getpid()), "stop_force")
        assert isinstance(error, TimeoutError)
        assert time.monotonic() - began < 10 * SCALE
        assert error.filename == device.path
        assert str(os.getpid()) in error.holders[0]  # type: ignore[attr-defined]
        # It goes on.
        assert device.state == "live"
        write(device.path, 0, b"y" * BLOCK)
    device.stop()
    device.stop()
    device.stop_force()
    assert device.wait() is True
    raised(ublk.StateError, device.start)
    raised(ublk.StateError, lambda: device.resize(MIB))
    raised(ublk.StateError, device.hand_over)
    device = ublk.Device(Ram()).start()
    raised(ValueError, lambda: device.stop(-1), "timeout=-1")
    raised(ValueError, lambda: device.stop(float("nan")))
    with opened(device.path) as fd:
        device.stop_force(5)
        assert not Path(device.path).exists()
        # Its capacity is 0 now: the end of the file, or an error.
        assert error_of(lambda: read_at(fd, 0)) or not read_at(fd, 0)


def test_leaving_with_takes_the_disk_from_its_users() -> None:
    with open("/dev/null", "rb") as disk:
        try:
            with ublk.Device(Ram(), stop_timeout=0.2) as device:
                disk = open(device.path, "rb")  # noqa: SIM115, PLW2901
        except TimeoutError as error:
            assert str(os.getpid()) in str(error)
        else:
            raise AssertionError("it says nothing of the users that lost their disk")
        finally:
            disk.close()
    assert ublk.list() == []
    # What the block raised is what comes out.
    raised(KeyError, lambda: _raises_in_with(KeyError("k")))


def _raises_in_with(error: BaseException) -> None:
    with ublk.Device(Ram(), stop_timeout=0.2) as device, opened(device.path):
        raise error


def test_a_device_starts_once_whoever_tries() -> None:
    gate = Gate()
    device = ublk.Device(gate)

    def start(_: int) -> bool:
        try:
            device.start()
        except ublk.StateError:
            return False
        return True

    assert sum(together(4, start)) == 1
    assert sum(x is None for x in together(4, lambda _: device.stop())) == 4
    assert ublk.list() == []


def test_sync_handlers_run_one_at_a_time_per_queue_and_threads_overlap_them() -> None:
    class Counts(Reads):
        def __init__(self) -> None:
            super().__init__(self._pread)
            self.changed = threading.Condition()
            self.now = self.most = 0
            self.least = 1

        def _pread(self, buf: memoryview, offset: int) -> None:
            with self.changed:
                self.now += 1
                self.most = max(self.most, self.now)
                self.changed.notify_all()
                # As many as are to overlap wait for each other; once they have, nobody waits any more.
                self.changed.wait_for(lambda: self.most >= self.least, 10 * SCALE)
            time.sleep(0.01)  # more than may would be seen
            with self.changed:
                self.now -= 1

    for options, least, most in (({}, 1, 1), ({"threads": 4}, 3, 4), ({"queues": 2}, 1, 2)):
        counts = Counts()
        with ublk.Device(counts, size=MIB, prefer=[UNSCANNED], **options) as device:  # type: ignore[arg-type]
            # Until now the kernel may have read, all alone.
            counts.least = least
            # Apart: nothing merges them.
            together(8, lambda i, path=device.path: read(path, 2 * i * BLOCK))
        assert least <= counts.most <= most, (options, counts.most)


def test_what_a_backend_has_is_what_the_disk_advertises() -> None:
    with ublk.Device(Reads(_nothing), size=MIB) as device:
        assert sysfs(device, "../ro") == "1"
        assert sysfs(device, "write_cache") == "write through"
        assert sysfs(device, "fua") == "0"
        assert sysfs(device, "discard_max_bytes") == "0"
        assert sysfs(device, "write_zeroes_max_bytes") == "0"
        raised(PermissionError, lambda: write(device.path, 0, bytes(BLOCK)))
    with ublk.Device(Ram()) as device:
        assert sysfs(device, "../ro") == "0"
        assert sysfs(device, "write_cache") == "write back"
        assert sysfs(device, "fua") == "0"
        assert sysfs(device, "discard_max_bytes") != "0"
        assert sysfs(device, "write_zeroes_max_bytes") != "0"

    class Fua(Ram):
        seen: ublk.Flags | None = None

        def pwrite(self, buf: memoryview, offset: int, *, flags: ublk.Flags) -> None:  # type: ignore[override]
            self.seen = flags
            super().pwrite(buf, offset)

        def zero(self, count: int, offset: int, flags: ublk.Flags = ublk.Flags(0)) -> None:
            assert isinstance(flags, ublk.Flags)
            super().zero(count, offset)

    backend = Fua()
    with ublk.Device(backend) as device:
        assert sysfs(device, "fua") == "1"
        with opened(device.path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC) as fd:
            write_at(fd, 0, b"d" * BLOCK)
        assert backend.seen is not None
        assert ublk.Flags.FUA in backend.seen
        with opened(device.path) as fd:
            write_at(fd, 0, b"d" * BLOCK)
            assert ublk.Flags.FUA not in backend.seen
            before = backend.flushes
            os.fsync(fd)
        assert backend.flushes == before + 1
        subprocess.run(["blkdiscard", "-z", device.path], check=True)
        assert not any(backend.data)
    with ublk.Device(Fua(), cache=False) as device:
        assert (sysfs(device, "write_cache"), sysfs(device, "fua")) == ("write through", "0")
    with ublk.Device(Fua(), fua=False) as device:
        assert (sysfs(device, "write_cache"), sysfs(device, "fua")) == ("write back", "0")


def test_handlers_return_none_or_the_length() -> None:
    class Returns(Ram):
        value: object = None

        def pread(self, buf: memoryview, offset: int) -> None:
            return self.value  # type: ignore[return-value]

        def flush(self) -> None:
            return self.value  # type: ignore[return-value]

    class Later(Returns):
        async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
            return self.value  # type: ignore[return-value]

    for kind in (Returns, Later):
        backend = kind()
        with ublk.Device(backend) as device:
            for value in (None, BLOCK):
                backend.value = value
                assert read_error(device.path) is None
            for value in (0, 1, BLOCK - 1, BLOCK + 1, -1, -22, "done", True, b"", [], OSError(28, "x"), 1 << 70):
                backend.value = value
                assert read_error(device.path) == "EIO", (kind, value)
            with opened(device.path) as fd:
                backend.value = 512
                write_at(fd, 0, bytes(BLOCK))
                raised(OSError, lambda fd=fd: os.fsync(fd))
                backend.value = None
                os.fsync(fd)


def test_modules_and_callable_objects_are_backends() -> None:
    module = types.ModuleType("disk")
    exec(  # noqa: S102
        "data = bytearray(1 << 20)\nsize = len(data)\n"
        "def pread(buf, offset): buf[:] = data[offset:offset + len(buf)]\n"
        "def pwrite(buf, offset): data[offset:offset + len(buf)] = buf\n",
        module.__dict__,
    )
    with ublk.Device(module) as device:
        write(device.path, 0, b"m" * BLOCK)
        assert read(device.path) == b"m" * BLOCK
    ram = Ram()
    parts = types.SimpleNamespace(pread=ram.pread, pwrite=lambda buf, offset: ram.pwrite(buf, offset))
    with ublk.Device(parts, size=MIB) as device:
        write(device.path, 0, b"n" * BLOCK)
    assert ram.data[:BLOCK] == b"n" * BLOCK

    class Inherits(ublk.Backend):
        def pread(self, buf: memoryview, offset: int) -> None:
            buf[:] = b"i" * len(buf)

    with ublk.Device(Inherits(), size=MIB) as device:
        assert read(device.path) == b"i" * BLOCK


def test_async_with_serves_on_the_callers_loop() -> None:
    class Async:
        size = MIB

        def __init__(self) -> None:
            self.threads: set[int] = set()
            self.now = self.most = 0
            self.least = 1

        async def pread(self, buf: memoryview, offset: int) -> None:
            self.threads.add(threading.get_ident())
            self.now += 1
            self.most = max(self.most, self.now)
            end = time.monotonic() + 10 * SCALE
            while self.most < self.least and time.monotonic() < end:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.02)
            self.now -= 1
            buf[:] = b"a" * len(buf)

    async def own() -> None:
        backend = Async()
        async with ublk.Device(backend, prefer=[UNSCANNED]) as device:
            backend.least = 2
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.001)
                    ticks += 1

            task = asyncio.create_task(tick())
            await asyncio.gather(*(asyncio.to_thread(read, device.path, 2 * i * BLOCK) for i in range(4)))
            # Starting and stopping do not block it either.
            other = await ublk.Device(Ram()).start_async()
            await other.stop_async()
            task.cancel()
            assert ticks > 5
            assert backend.threads == {threading.get_ident()}
            assert backend.most > 1
            for call in (device.stop, device.stop_force, device.wait, lambda: device.resize(MIB), device.hand_over):
                raised(ublk.StateError, call, "loop")
        assert not Path(device.path).exists()

    asyncio.run(own())
    # Without one, the device has its own.
    backend = Async()
    with ublk.Device(backend, prefer=[UNSCANNED]) as device:
        backend.least = 2
        assert together(4, lambda i: read(device.path, 2 * i * BLOCK)) == [b"a" * BLOCK] * 4
        assert backend.threads != {threading.get_ident()}
        assert backend.most > 1
    assert not [t for t in threading.enumerate() if t.name == "ublk-loop"]


def test_blocking_calls_from_handlers_are_refused() -> None:
    said: list[BaseException] = []

    class Blocks(Ram):
        device: ublk.Device

        def pread(self, buf: memoryview, offset: int) -> None:
            if not getattr(self, "armed", False):
                return
            for call in (self.device.stop, self.device.stop_force, self.device.wait, lambda: self.device.resize(MIB)):
                try:
                    call()
                except ublk.StateError as error:
                    said.append(error)
                else:
                    said.append(AssertionError(call))

    class Raw(Blocks):
        def __init__(self) -> None:
            super().__init__()
            del self.flushes

        def __getattribute__(self, name: str) -> Any:
            if name in {"pread", "pwrite", "flush", "trim", "zero"}:
                raise AttributeError(name)
            return super().__getattribute__(name)

        def handle(self, request: ublk.Request) -> None:
            if request.op == "read":
                Blocks.pread(self, memoryview(b""), 0)
            request.complete()

    class OwnLoop(Blocks):
        async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
            Blocks.pread(self, buf, offset)

    for kind, options in ((Blocks, {}), (Blocks, {"threads": 2}), (Raw, {}), (OwnLoop, {})):
        said.clear()
        backend = kind()
        with ublk.Device(backend, size=MIB, **options) as device:  # type: ignore[arg-type]
            backend.device, backend.armed = device, True  # type: ignore[attr-defined]
            assert read_error(device.path) is None
            backend.armed = False  # type: ignore[attr-defined]
        # Others may read at the same time.
        assert said, kind
        assert len(said) % 4 == 0, (kind, said)
        assert all(isinstance(error, ublk.StateError) for error in said), (kind, said)
        del backend.device


def test_blocking_calls_from_another_devices_handler_on_the_same_worker_are_refused() -> None:
    pool = ublk.Workers(1)
    said: list[BaseException] = []

    class Blocks(Ram):
        calls: tuple[Callable[[], object], ...] = ()

        def pread(self, buf: memoryview, offset: int) -> None:
            for call in self.calls:
                try:
                    call()
                except ublk.StateError as error:
                    said.append(error)
                else:
                    said.append(AssertionError(call))

    backend = Blocks()
    with (
        ublk.Device(Ram(), workers=pool) as other,
        ublk.Device(backend, workers=pool, prefer=[UNSCANNED]) as device,
    ):
        third = ublk.Device(Ram(), workers=pool)
        backend.calls = (
            other.wait,
            lambda: other.wait(1),
            other.stop,
            other.stop_force,
            lambda: other.resize(2 * MIB),
            # It would wait for a queue to be given to the very worker that is to take it.
            third.start,
        )
        assert read_error(device.path) is None
        calls, backend.calls = len(backend.calls), ()
        assert said
        assert len(said) % calls == 0
        assert all(isinstance(error, ublk.StateError) for error in said), said
        assert all("another thread" in "".join(getattr(error, "__notes__", [])) for error in said[:3]), said
        assert (other.state, third.state) == ("live", "stopped")
        assert read_error(other.path) is None
    # A thread of its own is not the worker.
    waited: list[bool] = []
    backend = Blocks()
    with ublk.Device(Ram(), workers=pool) as other, ublk.Device(backend, workers=pool, threads=1) as device:
        backend.calls = (lambda: waited.append(other.wait(0.001)),)
        assert read_error(device.path) is None
        backend.calls = ()
    assert waited
    assert not any(waited)


def test_wait_ends_with_the_device() -> None:
    device = ublk.Device(Ram()).start()
    assert device.wait(0.01) is False
    done: list[bool] = []
    waiters = [threading.Thread(target=lambda: done.append(device.wait())) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    ublk.delete(device.id)
    for waiter in waiters:
        waiter.join(10 * SCALE)
    assert done == [True] * 3
    device.stop()

    async def main() -> None:
        async with ublk.Device(Ram()) as device:
            waits = [asyncio.create_task(device.wait_async()) for _ in range(2)]
            await asyncio.sleep(0.01)
            waits[0].cancel()
            raised_it = await asyncio.gather(waits[0], return_exceptions=True)
            assert isinstance(raised_it[0], asyncio.CancelledError)
            assert device.state == "live"
            await asyncio.to_thread(ublk.delete, device.id)
            await asyncio.wait_for(waits[1], 10 * SCALE)

    asyncio.run(main())


def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    async def main() -> None:
        for pause in (0, 0.001, 0.01):
            task = asyncio.create_task(ublk.Device(Ram()).start_async())
            await asyncio.sleep(pause)
            task.cancel()
            result = (await asyncio.gather(task, return_exceptions=True))[0]
            if isinstance(result, ublk.Device):
                await result.stop_async()
            else:
                assert isinstance(result, asyncio.CancelledError)
            assert ublk.list() == []

    asyncio.run(main())


def test_importing_touches_no_kernel() -> None:
    trace = "import sys, os; sys.addaudithook(lambda e, a: e == 'open' and 'ublk' in str(a[0]) and str(a[0]).startswith('/dev') and os._exit(3))"
    code = f"{trace}\nimport ublk, threading, os\nassert threading.active_count() == 1\nassert len(os.listdir('/proc/self/task')) == 1"
    # Rings of processes that have ended are taken down when the kernel likes.
    until(lambda: subprocess.run(["modprobe", "-r", "ublk_drv"], check=False, capture_output=True).returncode == 0)
    try:
        subprocess.run([sys.executable, "-c", code], check=True)
        # Nor does describing a device.
        device = ublk.Device(Ram())
        error = raised(FileNotFoundError, device.start, "modprobe ublk_drv")
        assert isinstance(error, FileNotFoundError)
        assert error.filename == "/dev/ublk-control"
        raised(FileNotFoundError, ublk.features, "modprobe ublk_drv")
        raised(FileNotFoundError, ublk.list, "modprobe ublk_drv")
    finally:
        subprocess.run(["modprobe", "ublk_drv"], check=True)


def test_every_option_has_a_type_and_is_in_the_docstring() -> None:
    parameters = inspect.signature(ublk.Device.__init__).parameters
    assert ublk.Device.__doc__
    for name, parameter in parameters.items():
        if name == "self":
            continue
        assert parameter.annotation is not inspect.Parameter.empty
        assert name == "backend" or parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert name in {"backend"} or parameter.default is not inspect.Parameter.empty
        assert f"{name}:" in ublk.Device.__doc__, name
    assert parameters["queues"].default == 1
    assert parameters["depth"].default == 128
    until(lambda: True)
