"""What may be done with a request's buffer: everything, for as long as anybody likes."""

from __future__ import annotations

import array
import io
import random
import threading
from typing import Any

import numpy as np

import ublk
from tests.py_guest.disks import (
    BLOCK,
    MIB,
    Ram,
    Reads,
    opened,
    raised,
    read,
    read_at,
    together,
    usable_paths,
    write,
    write_at,
)


class Hoards(Ram):
    """Keeps every view, in every form that a view can have, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[memoryview, bytes]] = []
        self.forms = 0

    def _keep(self, buf: memoryview) -> None:
        seen = bytes(buf)
        form = self.forms % 6
        self.forms += 1
        if form == 0:
            self.kept.append((buf, seen))
        elif form == 1:  # a slice, when the whole is released
            part = buf[512:1024]
            self.kept.append((part, seen[512:1024]))
            buf.release()
        elif form == 2:  # a copy of the view
            copy = memoryview(buf)
            self.kept.append((copy, seen))
            buf.release()
        elif form == 3:  # another type
            cast = buf.cast("I")[::2]
            self.kept.append((cast, bytes(cast)))
            buf.release()
        elif form == 4:  # numpy's
            whole = np.frombuffer(buf, dtype=np.uint8)
            self.kept.append((memoryview(whole[100:200]), seen[100:200]))
        else:  # a read-only view of a view of a view
            view = memoryview(memoryview(buf)[1:])[1:].toreadonly()
            self.kept.append((view, seen[2:]))

    def pread(self, buf: memoryview, offset: int) -> None:
        super().pread(buf, offset)
        self._keep(buf)

    def pwrite(self, buf: memoryview, offset: int) -> None:
        super().pwrite(buf, offset)
        self._keep(buf)

    def check(self) -> None:
        """Nobody has changed what is kept."""
        for view, seen in self.kept:
            assert bytes(view) == seen

    def scribble(self) -> None:
        """Changes what may be changed."""
        for at, (view, _) in enumerate(self.kept):
            if not view.readonly and view.contiguous:
                flat = view.cast("B")
                flat[:] = b"\xee" * len(flat)
                self.kept[at] = (view, bytes(view))


class HoardsLater(Hoards):
    """The same on a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Hoards.pread(self, buf, offset)

    async def pwrite(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Hoards.pwrite(self, buf, offset)


class HoardsRaw:
    """The same with the requests themselves, of which it keeps some as well."""

    def __init__(self) -> None:
        self.inner = Hoards()
        self.size = self.inner.size
        self.requests: list[ublk.Request] = []

    def handle(self, request: ublk.Request) -> None:
        """Serves it, at once or on another thread."""
        if len(self.requests) % 2:
            threading.Thread(target=self._serve, args=(request,)).start()
        else:
            self._serve(request)
        self.requests.append(request)

    def _serve(self, request: ublk.Request) -> None:
        if request.op == "read":
            assert request.buffer is not None
            self.inner.pread(request.buffer, request.offset)
        elif request.op == "write":
            assert request.buffer is not None
            self.inner.pwrite(request.buffer, request.offset)
        request.complete()


def _exercise(device: ublk.Device, hoard: Hoards, seed: int) -> None:
    """Distinct patterns in and out; whatever is scribbled on must not show."""
    rng = random.Random(seed)  # noqa: S311
    model = bytearray(MIB)
    blocks = MIB // BLOCK
    with opened(device.path) as fd:
        for _ in range(40):
            at = rng.randrange(blocks - 4) * BLOCK
            count = rng.randint(1, 4) * BLOCK
            if rng.random() < 0.5:
                data = rng.randbytes(count)
                write_at(fd, at, data)
                model[at : at + count] = data
            else:
                assert read_at(fd, at, count) == model[at : at + count]
            if rng.random() < 0.2:
                hoard.check()
                hoard.scribble()
            if rng.random() < 0.1:
                del hoard.kept[:: rng.randint(1, 3)]
        hoard.check()
        assert read_at(fd, 0, 64 * BLOCK) == model[: 64 * BLOCK]


def test_views_that_are_kept_stay_as_they_are_in_every_data_path() -> None:
    for seed, path in enumerate(usable_paths()):
        hoard = Hoards()
        with ublk.Device(hoard, data_path=path, depth=4) as device:
            assert device.data_path == path
            _exercise(device, hoard, seed)
        # And after the end of the device.
        hoard.check()
        hoard.scribble()
        hoard.check()


def test_views_that_are_kept_by_async_and_raw_backends_and_threads() -> None:
    for path in usable_paths():
        for hoard, options in ((HoardsLater(), {}), (Hoards(), {"threads": 3})):
            with ublk.Device(hoard, data_path=path, depth=4, **options) as device:  # type: ignore[arg-type]
                _exercise(device, hoard, 1)
            hoard.check()
        raw = HoardsRaw()
        with ublk.Device(raw, data_path=path, depth=4, size=MIB) as device:
            _exercise(device, raw.inner, 2)
        raw.inner.check()
        assert all(request.completed for request in raw.requests)


def test_clients_at_the_same_time_see_their_own_data() -> None:
    for path in usable_paths():
        hoard = Hoards()
        with ublk.Device(hoard, data_path=path, queues=2) as device:

            def client(number: int, device: ublk.Device = device) -> None:
                rng = random.Random(number)  # noqa: S311
                with opened(device.path) as fd:
                    for _ in range(15):
                        at = (number + 8 * rng.randrange(16)) * BLOCK
                        data = bytes([number, rng.randrange(256)]) * (BLOCK // 2)
                        write_at(fd, at, data)
                        assert read_at(fd, at) == data

            together(8, client)
            hoard.check()


def test_scribbling_while_the_request_is_answered_reaches_nobody_else() -> None:
    class Races(Ram):
        def __init__(self) -> None:
            super().__init__()
            self.views: list[memoryview] = []
            self.over = False

        def pread(self, buf: memoryview, offset: int) -> None:
            super().pread(buf, offset)
            self.views = [*self.views[-8:], buf]

        def scribble(self) -> None:
            while not self.over:
                for view in self.views:
                    view[:] = b"\xcc" * len(view)

    backend = Races()
    thread = threading.Thread(target=backend.scribble)
    with ublk.Device(backend, depth=2) as device:
        thread.start()
        try:
            with opened(device.path) as fd:
                for at in range(60):
                    block = bytes([at]) * BLOCK
                    write_at(fd, at * BLOCK, block)
                    # The backend's own business is what it reads as; never another's memory.
                    assert set(read_at(fd, at * BLOCK)) <= {at, 0xCC}
                    assert backend.data[at * BLOCK : (at + 1) * BLOCK] == block
        finally:
            backend.over = True
            thread.join()


def test_the_buffer_of_a_read_arrives_zeroed() -> None:
    for path in usable_paths():
        seen: list[bytes] = []

        class Lazy(Ram):
            def pread(self, buf: memoryview, offset: int, seen: list[bytes] = seen) -> None:
                seen.append(bytes(buf))
                if offset == 0:
                    buf[:512] = b"z" * 512

        with ublk.Device(Lazy(), data_path=path, depth=1) as device:
            for _ in range(3):
                write(device.path, 0, b"secret!!" * (BLOCK // 8))
                assert read(device.path, BLOCK) == bytes(BLOCK)
                assert read(device.path) == b"z" * 512 + bytes(BLOCK - 512)
        assert not any(map(any, seen)), path


def test_what_a_buffer_is() -> None:
    seen: dict[str, Any] = {}

    class Looks(Ram):
        def pread(self, buf: memoryview, offset: int) -> None:
            seen["read"] = (type(buf), buf.readonly, buf.format, buf.ndim, len(buf), buf.c_contiguous)
            io.BytesIO(b"r" * len(buf)).readinto(buf)

        def pwrite(self, buf: memoryview, offset: int) -> None:
            seen["write"] = (type(buf), buf.readonly, buf.format, buf.ndim, len(buf), buf.c_contiguous)
            for spoil in (
                lambda: buf.__setitem__(0, 1),
                lambda: np.frombuffer(buf, dtype=np.uint8).__setitem__(0, 1),
                lambda: io.BytesIO(b"x" * BLOCK).readinto(buf),
            ):
                raised((TypeError, ValueError, BufferError), spoil)  # type: ignore[arg-type]
            self.data[offset : offset + len(buf)] = array.array("B", buf).tobytes()

    with ublk.Device(Looks()) as device:
        assert read(device.path) == b"r" * BLOCK
        assert seen["read"] == (memoryview, False, "B", 1, BLOCK, True)
        write(device.path, 0, b"w" * BLOCK)
        assert seen["write"] == (memoryview, True, "B", 1, BLOCK, True)

    # Of a request that was answered no new view is to be had; of memory that is kept it is.
    kept: list[ublk.Request] = []

    class Raw:
        def handle(self, request: ublk.Request) -> None:
            kept.append(request)
            request.complete()

    with ublk.Device(Raw(), size=MIB) as device:
        read(device.path)
        raised(BufferError, lambda: kept[-1].buffer, "answered")


def test_numpy_as_storage() -> None:
    class Numbers:
        size = MIB

        def __init__(self) -> None:
            self.data = np.zeros(MIB, dtype=np.uint8)

        def pread(self, buf: memoryview, offset: int) -> None:
            np.frombuffer(buf, dtype=np.uint8)[:] = self.data[offset : offset + len(buf)]

        def pwrite(self, buf: memoryview, offset: int) -> None:
            self.data[offset : offset + len(buf)] = np.frombuffer(buf, dtype=np.uint8)

    backend = Numbers()
    with ublk.Device(backend) as device:
        write(device.path, BLOCK, bytes(range(256)) * 16)
        assert read(device.path, BLOCK) == bytes(range(256)) * 16
    assert int(backend.data.sum()) == 16 * sum(range(256))


def test_memory_of_kept_views_is_given_back() -> None:
    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    views: list[memoryview] = []

    def keep(buf: memoryview, offset: int) -> None:
        buf[:] = b"k" * len(buf)
        views.append(buf)

    with ublk.Device(Reads(keep), size=64 * MIB, depth=4, max_io_size=512 << 10) as device:
        with opened(device.path) as fd:
            for at in range(8):
                read_at(fd, at * MIB, 512 << 10)
            views.clear()
            before = resident()
            for _ in range(4):
                for at in range(32):
                    read_at(fd, at * MIB, 512 << 10)
                assert resident() > before + 12 * MIB
                assert all(bytes(view[:4096]) == b"k" * 4096 for view in views)
                views.clear()
        assert resident() < before + 8 * MIB
