"""What is done with a device that is live: it is handed over, taken away, halted, resized; also by coroutines."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ublk
from tests.py_guest.disks import (
    BLOCK,
    FAR,
    MIB,
    SCALE,
    FarHeld,
    Ram,
    gone,
    has,
    needs,
    opened,
    raised,
    read,
    read_at,
    read_error,
    sysfs,
    until,
    write,
    write_at,
)

if TYPE_CHECKING:
    from collections.abc import Callable


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
            device.hand_over()
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
        device.resize("2MiB")
    assert device.size == 2 * MIB


def test_a_ready_made_backend_is_not_asked_for_more_than_it_has() -> None:
    needs("UPDATE_SIZE")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("file", "a", "b")]
        for path in paths:
            path.write_bytes(bytes(MIB))

        def grow(to: int) -> None:
            for path in paths:
                os.truncate(path, to)

        file, stripe = ublk.File(paths[0]), ublk.Stripe(paths[1:], chunk="64KiB")
        fixed: list[Any] = [ublk.Mem(2 * MIB), ublk.Fault(ublk.Mem(2 * MIB)), ublk.WriteCache(ublk.Mem(2 * MIB))]
        growing: list[tuple[Any, int]] = [(file, 1), (ublk.Fault(file), 1), (stripe, 2), (ublk.WriteCache(stripe), 2)]
        for backend, factor in [*((backend, 2) for backend in fixed), *growing]:
            grow(MIB)
            has_now = factor * MIB
            with ublk.Device(backend) as device, opened(device.path) as fd:
                words = (f"device {device.id}", repr(backend), str(has_now))
                raised(ValueError, lambda device=device, more=has_now + BLOCK: device.resize(more), *words)
                assert device.size == has_now
                device.resize(MIB // 2)
                device.resize(has_now)
                if backend in fixed:
                    continue
                grow(3 * MIB)
                device.resize(3 * has_now)
                write_at(fd, 3 * has_now - BLOCK, b"g" * BLOCK)
                assert read_at(fd, 3 * has_now - BLOCK) == b"g" * BLOCK
                raised(ValueError, lambda device=device, more=3 * has_now + BLOCK: device.resize(more))
        with ublk.Device(ublk.Null(), size=MIB) as device:
            device.resize("1TiB")
            assert read(device.path, (1 << 40) - BLOCK) == bytes(BLOCK)


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


def test_a_device_that_was_taken_over_is_halted_and_started_again() -> None:
    needs("IO_DESC_SIZE")
    device = ublk.Device(Ram(), recovery="wait").start()
    device.hand_over()
    with ublk.recover(device.id, Ram()) as device:
        device.halt()
        device.start()
        assert read_error(device.path) is None


def _halted_and_lost() -> None:
    device = ublk.Device(ublk.Mem(MIB)).start()
    device.halt()


def test_the_async_forms_are_for_the_loop_that_serves() -> None:
    async def main() -> None:
        backend = Later(2 * MIB)
        options: dict[str, Any] = {"recovery": "wait", "prefer": ["SHMEM_ZC"]}
        async with ublk.Device(backend, size=MIB, **options) as device:
            buffer = ublk.SharedBuffer(MIB)
            refused: list[tuple[str, Callable[[], object]]] = [
                ("hand_over", device.hand_over),
                ("halt", device.halt),
                ("resize", lambda: device.resize(MIB)),
                ("share", lambda: device.share(buffer)),
                ("unshare", lambda: device.unshare(0)),
                ("stop", device.stop),
                ("stop_force", device.stop_force),
                ("wait", device.wait),
            ]
            for name, call in refused:
                raised(ublk.StateError, call, f"{name}() would block", f"device {device.id}", f"await {name}_async()")
                assert callable(getattr(device, f"{name}_async"))
            raised(ublk.StateError, lambda: device.__exit__(None, None, None), f"device {device.id}", "async with")
            # While they wait, the loop serves.
            if has("UPDATE_SIZE"):
                await device.resize_async("2MiB")
                assert device.size == 2 * MIB
                assert await asyncio.to_thread(read, device.path, 2 * MIB - BLOCK) == bytes(BLOCK)
                await device.resize_async(MIB)
            if "SHMEM_ZC" in device.features:
                number = await device.share_async(buffer)
                assert await asyncio.to_thread(read, device.path) == bytes(BLOCK)
                await device.unshare_async(number)
                error = await _raised(OSError, device.unshare_async(number))
                assert isinstance(error, OSError)
                assert error.errno == errno.ENOENT
            if has("IO_DESC_SIZE"):
                await device.halt_async()
                assert device.state == "halted"
                await device.start_async()
                # Not on the loop: it waits for the kernel's look for partitions, which the loop serves.
                fd = await asyncio.to_thread(os.open, device.path, os.O_RDONLY)
                await _raised(TimeoutError, device.halt_async(0.2))
                # Nor this: it wants the lock under which the kernel looks.
                await asyncio.to_thread(os.close, fd)
            if has("QUIESCE"):
                await device.hand_over_async()
                assert (device.state, [info.state for info in ublk.list()]) == ("stopped", ["quiesced"])
                device = await asyncio.to_thread(ublk.recover, device.id, Later(), size=MIB)  # noqa: PLW2901
                await device.stop_async()
        gone(device)

    asyncio.run(main())


async def _raised(kind: type[BaseException], call: Any) -> BaseException:
    try:
        await call
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def test_a_coroutine_of_the_backend_does_not_wait_for_its_own_request() -> None:
    buffer = ublk.SharedBuffer(MIB)
    said: list[str] = []

    class Tries(Ram):
        device: ublk.Device | None = None

        async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
            device, self.device = self.device, None
            if device is not None:
                calls = (
                    device.hand_over_async(),
                    device.halt_async(),
                    device.share_async(buffer),
                    device.unshare_async(0),
                    device.stop_async(),
                    device.stop_force_async(),
                )
                said.extend([str(await _raised(ublk.StateError, call)) for call in calls])
            Ram.pread(self, buf, offset)

    backend = Tries()
    with ublk.Device(backend, recovery="wait", prefer=["SHMEM_ZC"]) as device:
        backend.device = device
        read(device.path)
        assert len(said) == 6
        assert all(f"device {device.id}" in text and "wait for itself" in text for text in said), said


def test_errors_of_what_has_ended_name_the_device() -> None:
    device = ublk.Device(Ram(), id=9).start()
    device.stop()
    for call in (
        device.hand_over,
        device.halt,
        device.start,
        lambda: device.resize(MIB),
        lambda: device.share(ublk.SharedBuffer(MIB)),
        lambda: device.info,
        lambda: device.describe(Ram()),
    ):
        raised(ublk.StateError, call, "device 9")
    raised(ublk.StateError, lambda: device.unshare(0), "end the sharing", "device 9")


def test_a_disk_is_taken_from_a_server_that_does_not_know() -> None:
    raised(FileNotFoundError, lambda: ublk.quiesce(77))
    with ublk.Device(Ram()) as device:
        error = raised(OSError, lambda: ublk.quiesce(device.id))
        assert isinstance(error, OSError)
        assert error.errno == errno.EOPNOTSUPP
        assert read(device.path) == bytes(BLOCK)
    needs("QUIESCE")
    started, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _device = ublk.Device(FarHeld(closed=False), recovery="wait", id=4).start()
        os.write(tell, b".")
        signal.pause()
    os.close(tell)
    assert os.read(started, 1) == b"."
    os.close(started)
    with opened("/dev/ublkb4") as fd:
        assert read_at(fd, 0) == bytes(BLOCK)
        ublk.quiesce(4)
        assert [(info.id, info.state) for info in ublk.list()] == [(4, "quiesced")]
        # Once more: it is what was asked for.
        ublk.quiesce(4)
        held = FarHeld(closed=False)
        device = ublk.recover(4, held)
        write_at(fd, 0, b"n" * BLOCK)
        # One that has requests is waited for.
        held.closed = True
        seen: list[bytes] = []
        client = threading.Thread(target=lambda: seen.append(read_at(fd, FAR)))
        client.start()
        held.arrived.wait(60)
        raised(TimeoutError, lambda: ublk.quiesce(4, 0.2), "device 4", "not let go")
        assert device.state == "live"
        waiting = threading.Thread(target=ublk.quiesce, args=(4,))
        waiting.start()
        held.let_go()
        waiting.join()
        client.join()
        assert seen == [bytes(BLOCK)]
        assert device.wait(10 * SCALE)
        until(lambda: [info.state for info in ublk.list()] == ["quiesced"])
        device.stop()
        last = ublk.recover(4, held)
        assert read_at(fd, 0) == bytes(BLOCK)
    last.stop()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
