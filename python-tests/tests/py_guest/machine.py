"""The machine's devices, those that change servers, the ready-made backends, and zoned disks."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import tempfile
import threading
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import ublk
from tests.py_guest.disks import (
    BLOCK,
    MIB,
    Ram,
    error_of,
    gone,
    has,
    needs,
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


def _server(made: Callable[[], ublk.Device]) -> int:
    """A process that serves a device until it is killed.

    Its start has returned by then: a device is live, and can be read, before, and a kill then is a dead end of Linux 6.12.
    """
    started, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _device = made().start()
        os.write(tell, b".")
        signal.pause()
    os.close(tell)
    assert os.read(started, 1) == b"."
    os.close(started)
    return pid


def test_list_delete_and_features() -> None:
    offered = ublk.features()
    assert offered is None or "USER_RECOVERY" in offered
    devices = [ublk.Device(Ram(), queues=1, depth=2 << i).start() for i in range(3)]
    listed = {info.id: info for info in ublk.list()}
    assert sorted(listed) == [info.id for info in ublk.list()]
    for i, device in enumerate(devices):
        info = listed[device.id]
        assert (info.depth, info.state, info.server_pid, info.size) == (2 << i, "live", os.getpid(), MIB)
        assert info.path == device.path
        assert info.owner == (0, 0)
    ublk.delete(devices[0].id)
    gone(devices[0])
    assert devices[0].wait(10) is True
    for device in devices:
        device.stop()
    # One whose server was killed.
    pid = _server(lambda: ublk.Device(Ram(), id=40))
    assert [i.state for i in ublk.list() if i.id == 40] == ["live"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until(lambda: ublk.list()[0].state == "dead")
    assert ublk.list()[0].size is None
    ublk.delete(40)
    until(lambda: not ublk.list())


def test_the_next_process_recovers_what_a_killed_one_left() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "disk"
        store.write_bytes(bytes(MIB))
        pid = _server(lambda: ublk.Device(OnFile(store), recovery="wait", fingerprint=77, id=3, queues=1))
        write("/dev/ublkb3", BLOCK, b"1" * BLOCK)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        until(lambda: ublk.list()[0].state == "quiesced")
        # Who describes another device is refused, and it stays.
        raised(ValueError, lambda: ublk.recover(3, OnFile(store), fingerprint=78), "fingerprint")
        raised(ValueError, lambda: ublk.recover(3, OnFile(store), fingerprint=78), "force=True")
        raised(ValueError, lambda: ublk.recover(3, OnFile(store), fingerprint=77, size=2 * MIB))
        assert ublk.list()[0].state == "quiesced"
        waiting: list[bytes] = []
        client = threading.Thread(target=lambda: waiting.append(read("/dev/ublkb3", BLOCK)))
        client.start()
        device = ublk.recover(3, OnFile(store), fingerprint=77)
        client.join(20)
        assert waiting == [b"1" * BLOCK]
        assert (device.id, device.state, device.size) == (3, "live", MIB)
        device.stop()
        gone(device)
        # By force, whatever its fingerprint is.
        pid = _server(lambda: ublk.Device(OnFile(store), recovery="wait", fingerprint=77, id=3, queues=1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        until(lambda: ublk.list()[0].state == "quiesced")
        raised(ValueError, lambda: ublk.recover(3, OnFile(store), fingerprint=78), "fingerprint")
        with ublk.recover(3, OnFile(store), fingerprint=78, force=True) as device:
            assert device.info.fingerprint == 77
            assert read("/dev/ublkb3", BLOCK) == b"1" * BLOCK


class OnFile(Ram):
    """Keeps its data in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def pread(self, buf: memoryview, offset: int) -> None:
        os.preadv(self._fd, [buf], offset)

    def pwrite(self, buf: memoryview, offset: int) -> None:
        os.pwrite(self._fd, buf, offset)

    def trim(self, count: int, offset: int) -> None:
        self.zero(count, offset)

    def zero(self, count: int, offset: int) -> None:
        os.pwrite(self._fd, bytes(count), offset)


class Later(Ram):
    """On a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Ram.pread(self, buf, offset)


def test_a_disk_is_handed_over_under_its_users() -> None:
    if not has("QUIESCE"):
        device = ublk.Device(Ram(), recovery="wait").start()
        error = raised(OSError, device.hand_over)
        assert isinstance(error, OSError)
        # It goes on.
        assert read_error(device.path) is None
        device.stop()
        return
    backend = Later()
    device = ublk.Device(backend, recovery="wait").start()
    with opened(device.path) as fd:
        for turn in range(4):
            write_at(fd, turn * BLOCK, bytes([turn]) * BLOCK)
            (device.hand_over if turn % 2 else device.quiesce)()
            assert device.state == "stopped"
            raised(ublk.StateError, device.hand_over)
            assert device.wait() is True
            device = ublk.recover(device.id, backend)
            assert read_at(fd, turn * BLOCK) == bytes([turn]) * BLOCK
    raised(ublk.StateError, ublk.Device(backend).hand_over)
    device.stop()
    plain = ublk.Device(Ram()).start()
    raised(OSError, plain.hand_over, "USER_RECOVERY")
    assert read_error(plain.path) is None
    plain.stop()


def test_resize() -> None:
    backend = Ram(4 * MIB)
    with ublk.Device(backend, size=MIB) as device:
        if not has("UPDATE_SIZE"):
            raised(OSError, lambda: device.resize(2 * MIB))
            return
        with opened(device.path) as fd:
            device.resize("2MiB")
            assert device.size == 2 * MIB
            assert os.lseek(fd, 0, os.SEEK_END) == 2 * MIB
            write_at(fd, 2 * MIB - BLOCK, b"e" * BLOCK)
            device.resize(MIB)
            assert os.lseek(fd, 0, os.SEEK_END) == MIB == device.info.size
        for wrong in (0, -1, 1000, "x"):
            raised(ValueError, lambda wrong=wrong: device.resize(wrong))
        assert device.size == MIB


def _check(backend: object, size: int) -> None:
    with ublk.Device(backend) as device:  # type: ignore[arg-type]
        assert device.size == size
        with opened(device.path) as fd:
            write_at(fd, BLOCK, b"r" * BLOCK)
            assert read_at(fd, BLOCK) == b"r" * BLOCK
            os.fsync(fd)
        subprocess.run(["blkdiscard", "-f", "-z", device.path], check=True)
        assert read(device.path, BLOCK) == bytes(BLOCK)
        subprocess.run(["blkdiscard", "-f", device.path], check=True)


def test_ready_made_backends_serve_and_can_be_wrapped() -> None:
    mem = ublk.Mem("2MiB")
    assert (mem.size, mem.used) == (2 * MIB, 0)
    _check(mem, 2 * MIB)
    raised(TypeError, lambda: ublk.Device(ublk.Null()), "size")
    with ublk.Device(ublk.Null(), size="1TiB") as device:
        write(device.path, 0, b"0" * BLOCK)
        assert read(device.path) == bytes(BLOCK)
    raised(ValueError, lambda: ublk.Device(ublk.Null(), size=MIB, threads=2), "threads")
    raised(ValueError, lambda: ublk.Device(mem, size=MIB), "size")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk"
        raised(FileNotFoundError, lambda: ublk.File(path))
        file = ublk.File(path, create="1MiB")
        assert (file.size, Path(file.path)) == (MIB, path)
        _check(file, MIB)
        assert path.stat().st_size == MIB
        with ublk.Device(ublk.File(path, read_only=True)) as device:
            raised(PermissionError, lambda: write(device.path, 0, bytes(BLOCK)))
        raised(ValueError, lambda: ublk.File(path, sync="never"), "sync")
        for target in (ublk.Mem(MIB), ublk.File(path), ublk.File(path, sync="write")):
            for wrapper in (Wraps(target), WrapsLater(target)):
                _check(wrapper, MIB)
                assert wrapper.calls > 3
                # Past its end.
                raised(OSError, lambda target=target: target.pread(bytearray(BLOCK), MIB))
    # Their methods are Python's, too.
    buffer = bytearray(BLOCK)
    mem.pwrite(b"m" * BLOCK, 0)
    mem.pread(buffer, 0)
    assert buffer == b"m" * BLOCK
    assert mem.used >= BLOCK
    mem.trim(2 * MIB, 0)
    assert mem.used == 0
    raised((BufferError, TypeError), lambda: mem.pread(b"read only", 0))  # type: ignore[arg-type]


class Wraps:
    """Counts calls of a ready-made backend."""

    def __init__(self, inner: ublk.Mem | ublk.File) -> None:
        self.inner = inner
        self.size = inner.size
        self.calls = 0

    def pread(self, buf: memoryview, offset: int) -> None:
        self.calls += 1
        self.inner.pread(buf, offset)

    def pwrite(self, buf: memoryview, offset: int) -> None:
        self.calls += 1
        self.inner.pwrite(buf, offset)

    def flush(self) -> None:
        self.calls += 1
        self.inner.flush()

    def trim(self, count: int, offset: int) -> None:
        self.inner.trim(count, offset)

    def zero(self, count: int, offset: int) -> None:
        self.inner.zero(count, offset)


class WrapsLater(Wraps):
    """On a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Wraps.pread(self, buf, offset)

    async def flush(self) -> None:  # type: ignore[override]
        Wraps.flush(self)


def test_a_device_on_a_file_on_a_device() -> None:
    with tempfile.TemporaryDirectory() as folder, ublk.Device(Ram(32 * MIB)) as below:
        subprocess.run(["mkfs.ext4", "-q", below.path], check=True)
        subprocess.run(["mount", below.path, folder], check=True)
        try:
            with ublk.Device(ublk.File(Path(folder) / "inner", create=MIB)) as above:
                write(above.path, 0, b"a" * BLOCK)
                assert read(above.path) == b"a" * BLOCK
        finally:
            subprocess.run(["umount", folder], check=True)


def test_a_device_that_has_stopped_lets_its_backend_go() -> None:
    for options in ({}, {"threads": 2}):
        backend = Ram()
        alive = weakref.ref(backend)
        device = ublk.Device(backend, **options).start()  # type: ignore[arg-type]
        del backend
        gc.collect()
        assert alive() is not None
        device.stop()
        gc.collect()
        assert alive() is None, options
        assert device.state == "stopped"
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "disk")
        device = ublk.Device(ublk.File(path, create=MIB)).start()

        def opened_here() -> list[str]:
            found = []
            for fd in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.append(str(fd.readlink()))
            return found

        assert path in opened_here()
        device.stop()
        assert path not in opened_here()


class Zones:
    """A zoned disk in Python: zones of 1 MiB, the first one conventional."""

    ZONE = MIB
    COUNT = 8

    def __init__(self) -> None:
        self.size = self.ZONE * self.COUNT
        self.data = bytearray(self.size)
        self.pointers = [i * self.ZONE for i in range(self.COUNT)]
        self.state = ["no-write-pointer"] + ["empty"] * (self.COUNT - 1)
        self.actions: list[tuple[str, int]] = []

    def pread(self, buf: memoryview, offset: int) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int) -> None:
        number = offset // self.ZONE
        if number and offset != self.pointers[number]:
            raise OSError(errno.EIO, "not at the write pointer")
        self.data[offset : offset + len(buf)] = buf
        self._moved(number, offset + len(buf))

    def _moved(self, number: int, pointer: int) -> None:
        if number:
            self.pointers[number] = pointer
            self.state[number] = "full" if pointer == (number + 1) * self.ZONE else "implicitly-open"

    def flush(self) -> None:
        pass

    def append(self, buf: memoryview, zone: int) -> int:
        number = zone // self.ZONE
        at = self.pointers[number]
        self.data[at : at + len(buf)] = buf
        self._moved(number, at + len(buf))
        return at

    def report_zones(self, offset: int, count: int) -> list[ublk.Zone]:
        first = offset // self.ZONE
        return [
            ublk.Zone(
                start=i * self.ZONE,
                length=self.ZONE,
                capacity=self.ZONE,
                write_pointer=self.pointers[i],
                kind="sequential" if i else "conventional",
                state=self.state[i],  # type: ignore[arg-type]
            )
            for i in range(first, min(first + count, self.COUNT))
        ]

    def zone(self, action: str, offset: int) -> None:
        self.actions.append((action, offset))
        number = offset // self.ZONE
        if action == "reset":
            self.pointers[number], self.state[number] = offset, "empty"
        elif action == "reset_all":
            for i in range(1, self.COUNT):
                self.pointers[i], self.state[i] = i * self.ZONE, "empty"
        elif action == "finish":
            self.pointers[number], self.state[number] = offset + self.ZONE, "full"
        elif action == "open":
            self.state[number] = "explicitly-open"
        elif action == "close":
            self.state[number] = "closed" if self.pointers[number] > offset else "empty"
        else:
            raise NotImplementedError


class ZonesLater(Zones):
    """On a loop."""

    async def append(self, buf: memoryview, zone: int) -> int:  # type: ignore[override]
        return Zones.append(self, buf, zone)

    async def report_zones(self, offset: int, count: int) -> list[ublk.Zone]:  # type: ignore[override]
        return Zones.report_zones(self, offset, count)


def _zones(path: str, action: str, *more: str) -> str:
    done = subprocess.run(["blkzone", action, *more, path], check=True, capture_output=True, text=True)
    return done.stdout


def test_zoned_disks() -> None:
    needs("ZONED")
    shape = ublk.Zoned(zone_size=MIB, max_open=4, max_active=4)
    for backend, options in ((Zones(), {}), (Zones(), {"threads": 2}), (ZonesLater(), {})):
        with ublk.Device(backend, zoned=shape, data_path="user-copy", **options) as device:  # type: ignore[arg-type]
            base = Path(f"/sys/block/ublkb{device.id}/queue")
            assert (base / "zoned").read_text().strip() == "host-managed"
            assert (base / "nr_zones").read_text().strip() == "8"
            assert (base / "max_open_zones").read_text().strip() == "4"
            report = _zones(device.path, "report")
            assert report.count("SEQ_WRITE_REQUIRED") == 7, report
            with opened(device.path) as fd:
                write_at(fd, 2 * MIB, b"z" * BLOCK)
                write_at(fd, 2 * MIB + BLOCK, b"y" * BLOCK)
                assert read_at(fd, 2 * MIB, 2 * BLOCK) == b"z" * BLOCK + b"y" * BLOCK
                # Not at the write pointer: the kernel says no, or the backend.
                assert error_of(lambda fd=fd: write_at(fd, 2 * MIB + 8 * BLOCK, bytes(BLOCK)))
            sector = str(3 * MIB >> 9)
            for action in ("open", "close", "finish", "reset"):
                _zones(device.path, action, "-o", sector, "-c", "1")
                assert (action, 3 * MIB) in backend.actions, backend.actions
            assert device.stats().total.report_zones.completed >= 1
            assert device.stats().total.zone.completed >= 4
    with ublk.Device(ublk.ZonedMem("8MiB", "1MiB", conventional=1)) as device:
        write(device.path, MIB, b"m" * BLOCK)
        assert read(device.path, MIB) == b"m" * BLOCK
    raised(ValueError, lambda: ublk.ZonedMem("8MiB", "3MiB"))


def test_raw_requests_are_completed_from_anywhere() -> None:
    class Raw:
        size = MIB

        def __init__(self) -> None:
            self.data = bytearray(MIB)
            self.queue: list[ublk.Request] = []
            self.arrived = threading.Condition()
            self.over = False

        def handle(self, request: ublk.Request) -> None:
            with self.arrived:
                self.queue.append(request)
                self.arrived.notify()

        def work(self) -> None:
            while True:
                with self.arrived:
                    self.arrived.wait_for(lambda: self.queue or self.over)
                    if not self.queue:
                        return
                    request = self.queue.pop()
                self.serve(request)

        def serve(self, request: ublk.Request) -> None:
            span = slice(request.offset, request.offset + request.length)
            match request.op:
                case "read":
                    assert request.buffer is not None
                    request.buffer[:] = self.data[span]
                case "write":
                    assert request.buffer is not None
                    self.data[span] = request.buffer
                case "trim" | "zero":
                    assert request.buffer is None
                    self.data[span] = bytes(request.length)
            assert str(request.device) in repr(request)
            request.complete(request.length if request.op in {"read", "write"} else None)
            assert "completed" in repr(request)

    class RawLater(Raw):
        async def handle(self, request: ublk.Request) -> None:  # type: ignore[override]
            self.serve(request)

    for raw in (Raw(), RawLater()):
        threads = [threading.Thread(target=raw.work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            with ublk.Device(raw, cache=True, trim=True, zero=True, queues=2) as device:

                def client(number: int, path: str = device.path) -> None:
                    with opened(path) as fd:
                        for turn in range(6):
                            data = bytes([number, turn]) * (BLOCK // 2)
                            write_at(fd, number * BLOCK, data)
                            assert read_at(fd, number * BLOCK) == data

                together(8, client)
                subprocess.run(["blkdiscard", "-f", "-z", device.path], check=True)
                assert not any(raw.data)
        finally:
            with raw.arrived:
                raw.over = True
                raw.arrived.notify_all()
            for thread in threads:
                thread.join()


def test_a_description_is_held_against_what_was_granted() -> None:
    """The driver would copy to one worker's buffers what another one takes."""
    needs("IO_DESC_SIZE")
    with ublk.Device(Ram(), batch=True) as device:
        device.halt()
        device.describe(Ram(), workers_per_queue=2)
        raised(ValueError, device.start, "the driver does not copy")
        assert device.state == "halted"
        device.describe(Ram())
        device.start()
        write(device.path, 0, b"y" * BLOCK)
        assert read(device.path, 0) == b"y" * BLOCK


def test_a_device_is_halted_and_started_again() -> None:
    if not has("IO_DESC_SIZE"):
        with ublk.Device(Ram()) as device:
            # It goes on.
            raised(OSError, device.halt, "7.3", "make a new one")
            assert read_error(device.path) is None
        return
    for kind, options in ((Ram, {"threads": 2}), (Later, {}), (Ram, {"recovery": "wait", "fingerprint": 5})):
        backend = kind()
        with ublk.Device(backend, id=7, depth=16, **options) as device:  # type: ignore[arg-type]
            node, features = os.stat("/dev/ublkc7").st_ino, device.features
            for turn in range(3):
                write(device.path, turn * BLOCK, bytes([turn + 1]) * BLOCK)
                device.halt()
                assert device.state == "halted"
                assert not os.path.exists(device.path)
                # The device is the same one all the time.
                assert os.stat("/dev/ublkc7").st_ino == node
                assert [(info.id, info.state, info.size) for info in ublk.list()] == [(7, "dead", None)]
                assert (device.id, device.features) == (7, frozenset())
                assert device.stats().total.write.completed == 1
                assert device.wait()
                for call in (device.halt, lambda: device.info, lambda: device.resize(MIB)):
                    raised(ublk.StateError, call)
                assert device.start() is device
                assert (device.features, device.info.depth) == (features, 16)
                assert device.stats().total.write.completed == 0
                assert read(device.path, turn * BLOCK) == bytes([turn + 1]) * BLOCK
            # In use, it goes on.
            with opened(device.path) as fd:
                raised(TimeoutError, lambda: device.halt(0.2), str(os.getpid()))
                assert read_at(fd, 0) == bytes([1]) * BLOCK
            # What is described anew need not fit.
            device.halt()
            device.describe(Ram(2 * MIB), require=["NO_AUTO_PART_SCAN"])
            raised(OSError, device.start, "NO_AUTO_PART_SCAN")
            assert device.state == "halted"
            device.describe(Ram(2 * MIB), block_size=4096, queues=4)
            device.start()
            assert (device.size, sysfs(device, "logical_block_size"), device.info.queues) == (2 * MIB, "4096", 1)
            write(device.path, MIB, b"z" * BLOCK)
        gone(device)
        assert device.state == "stopped"
        raised(ublk.StateError, device.start)
    # A device that is halted is deleted by a stop, and with its object.
    device = ublk.Device(Ram()).start()
    device.halt()
    device.stop()
    assert (ublk.list(), device.state) == ([], "stopped")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _halted_and_lost()
        gc.collect()
    assert [w.category for w in caught] == [ResourceWarning]
    # The warning has the device.
    caught.clear()
    gc.collect()
    until(lambda: not ublk.list())


def _halted_and_lost() -> None:
    device = ublk.Device(ublk.Mem(MIB)).start()
    device.halt()
