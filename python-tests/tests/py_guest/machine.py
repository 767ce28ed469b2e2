"""The machine's devices, those whose server is gone, the ready-made backends, and zoned disks."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import signal
import subprocess
import tempfile
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ublk
from tests.py_guest.disks import (
    BLOCK,
    MIB,
    SCALE,
    Ram,
    error_of,
    gone,
    needs,
    opened,
    raised,
    read,
    read_at,
    together,
    until,
    write,
    write_at,
)
from ublk_rig.pyguest import NotRun

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
    assert devices[0].wait(10 * SCALE) is True
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
        client.join(20 * SCALE)
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
        # Its pages come as they are written.
        self.data = mmap.mmap(-1, self.size)
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


class RawZones:
    """The requests of such a disk themselves."""

    def __init__(self, zones: Zones) -> None:
        self.size = zones.size
        self.zones = zones
        self.actions = zones.actions

    def handle(self, request: ublk.Request) -> None:
        request.complete(self._answer(request))

    def _answer(self, request: ublk.Request) -> Any:
        if request.op in {"read", "write", "append"}:
            assert request.buffer is not None
        match request.op:
            case "read":
                return self.zones.pread(request.buffer, request.offset)  # type: ignore[arg-type]
            case "write":
                return self.zones.pwrite(request.buffer, request.offset)  # type: ignore[arg-type]
            case "append":
                return self.zones.append(request.buffer, request.offset)  # type: ignore[arg-type]
            case "report_zones":
                return self.zones.report_zones(request.offset, request.zones)
            case "flush":
                return None
            case action:
                return self.zones.zone(action, request.offset)


class RawZonesLater(RawZones):
    """On a loop."""

    async def handle(self, request: ublk.Request) -> None:  # type: ignore[override]
        RawZones.handle(self, request)


def _zones(path: str, action: str, *more: str) -> str:
    done = subprocess.run(["blkzone", action, *more, path], check=True, capture_output=True, text=True)
    return done.stdout


def test_zoned_disks() -> None:
    needs("ZONED")
    shape = ublk.Zoned(zone_size=MIB, max_open=4, max_active=4)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (Zones(), {}),
        (Zones(), {"threads": 2}),
        (ZonesLater(), {}),
        (RawZones(Zones()), {"cache": True}),
        (RawZonesLater(Zones()), {}),
    ]
    for backend, options in cases:
        with ublk.Device(backend, zoned=shape, data_path="user-copy", **options) as device:
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
    raised(ValueError, lambda: ublk.Device(ublk.Mem("8MiB"), zoned=shape), "report_zones()", "handle()")
    raised(ValueError, lambda: ublk.Device(RawZones(Zones()), zoned=ublk.Zoned(3 * MIB)))


class ManyZones(Zones):
    """As many as btrfs wants at least, and as large."""

    ZONE = 4 * MIB
    COUNT = 80

    def __init__(self) -> None:
        super().__init__()
        self.appended = 0

    def append(self, buf: memoryview, zone: int) -> int:
        self.appended += 1
        return super().append(buf, zone)


def test_an_append_went_where_a_raw_backend_says() -> None:
    needs("ZONED")
    subprocess.run(["modprobe", "-q", "btrfs"], check=False)
    if "btrfs" not in Path("/proc/filesystems").read_text():
        raise NotRun("this kernel has no btrfs, which appends")
    zones, data = ManyZones(), os.urandom(400_003)
    shape = ublk.Zoned(zone_size=4 * MIB)
    device = ublk.Device(RawZones(zones), zoned=shape, block_size=4096, data_path="user-copy", cache=True)
    with device, tempfile.TemporaryDirectory() as folder:
        made = ["mkfs.btrfs", "-q", "-K", "-O", "zoned", "-d", "single", "-m", "single", device.path]
        subprocess.run(made, check=True, capture_output=True)
        for turn in range(2):
            subprocess.run(["mount", device.path, folder], check=True)
            try:
                if turn == 0:
                    Path(folder, "file").write_bytes(data)
                else:
                    # Nothing is cached any more.
                    assert Path(folder, "file").read_bytes() == data
            finally:
                subprocess.run(["umount", folder], check=True)
        total = device.stats().total
        assert zones.appended == total.append.completed > 0
        assert (total.append.errors, total.write.errors, total.rejected) == (0, 0, 0)
        assert total.append.bytes >= len(data)


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
