"""Ctrl-C, and other signals, while a call of the package waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ublk
from tests.py_guest.disks import (
    BLOCK,
    FAR,
    MIB,
    SCALE,
    UNSCANNED,
    FarHeld,
    Gate,
    Held,
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
    until,
)
from ublk_rig.pyguest import NotRun, limit, threads_of_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from types import FrameType

# What "at once" is, where the calls would wait for a minute.
AT_ONCE = 4 * SCALE


@contextlib.contextmanager
def interrupted(when: Callable[[], object], *, seconds: float = AT_ONCE) -> Iterator[None]:
    """Sends this process SIGINT as soon as `when` returns; what is inside is to end at once after that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent: list[float] = []

    def send() -> None:
        when()
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
        if sent:
            assert time.monotonic() - sent[0] < seconds, "it took its time"
    finally:
        thread.join()
    assert sent


ZONED = ublk.Zoned(zone_size=MIB)


class HeldZones:
    """A zoned disk that is not described while it is told so: START waits for that, on every kernel."""

    size = 4 * MIB

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.go = threading.Event()

    def pread(self, buf: memoryview, offset: int) -> None:
        """Zeroes."""

    def pwrite(self, buf: memoryview, offset: int) -> None:
        """Nothing."""

    def zone(self, action: str, offset: int) -> None:
        """Nothing."""

    def append(self, buf: memoryview, zone: int) -> int:
        """At the start."""
        return zone

    def report_zones(self, offset: int, count: int) -> list[ublk.Zone]:
        """Waits."""
        self.arrived.set()
        self.go.wait(60)
        starts = range(offset, min(offset + count * MIB, self.size), MIB)
        return [ublk.Zone(start=at, length=MIB, capacity=MIB, write_pointer=at) for at in starts]


class HeldZonesByLoop(HeldZones):
    """The same on a loop."""

    async def report_zones(self, offset: int, count: int) -> list[ublk.Zone]:  # type: ignore[override]
        """Waits for what does not come."""
        self.arrived.set()
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        return []


class Later(Ram):
    """On a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        """Reads."""
        Ram.pread(self, buf, offset)


class FarGate(Gate):
    """Holds what is there only."""

    def pread(self, buf: memoryview, offset: int) -> None:
        """Waits there."""
        if offset >= FAR:
            super().pread(buf, offset)


def _closed_gate() -> Gate:
    gate = Gate()
    gate.closed = True
    return gate


@limit(60)
def test_ctrl_c_in_a_start_takes_down_what_has_come_up() -> None:
    # Up to Linux 6.18 START waits for the kernel's look for partitions, and that for the read that these hold; later
    # ones look when it has returned. It waits for the zones of a zoned disk in each case.
    cases: list[tuple[Any, dict[str, Any]]] = [
        (HeldZones(), {"threads": 2, "zoned": ZONED}),
        (HeldZonesByLoop(), {"zoned": ZONED}),
        (HeldZones(), {"threads": 1, "zoned": ZONED, "workers": ublk.Workers(1)}),
    ]
    if not has("NO_AUTO_PART_SCAN"):
        cases += [(Held(), {}), (_closed_gate(), {"threads": 1}), (Held(), {"workers": ublk.Workers(1)})]
    for backend, options in cases:
        device = ublk.Device(backend, start_timeout=60, **options)
        with interrupted(lambda backend=backend: backend.arrived.wait(60)):
            raised(KeyboardInterrupt, device.start)
        # At once: nothing is left to be waited for.
        assert ublk.list() == []
        assert not [name for name in os.listdir("/dev") if name.startswith("ublk") and name != "ublk-control"]
        assert device.state == "stopped"
        raised(ublk.StateError, device.start)
        raised(ublk.StateError, lambda device=device: device.path)
        if not isinstance(backend, Held):
            backend.go.set()
        else:
            for request in backend.requests:
                raised(ublk.GoneError, request.complete)


@limit(60)
def test_ctrl_c_in_a_start_whose_worker_is_stuck_in_the_backend() -> None:
    backend = HeldZones()
    device = ublk.Device(backend, start_timeout=60, zoned=ZONED)
    with interrupted(lambda: backend.arrived.wait(60), seconds=9 * SCALE):
        raised(KeyboardInterrupt, device.start)
    # Its ring was taken from the worker, which nothing can end.
    assert ublk.list() == []
    backend.go.set()


def test_a_second_ctrl_c_does_not_wait_for_what_the_first_one_ended() -> None:
    backend = HeldZones()
    device = ublk.Device(backend, start_timeout=60, zoned=ZONED)

    def first() -> None:
        backend.arrived.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        # The stuck worker is given a second.
        time.sleep(0.1)

    with interrupted(first, seconds=SCALE):
        raised(KeyboardInterrupt, device.start)
    backend.go.set()
    until(lambda: not ublk.list())


def test_a_start_that_takes_too_long_leaves_nothing() -> None:
    for backend, options in ((HeldZones(), {"threads": 1}), (HeldZonesByLoop(), {}), (HeldZones(), {})):
        began = time.monotonic()
        device = ublk.Device(backend, start_timeout=0.5, zoned=ZONED, **options)  # type: ignore[arg-type]
        raised(TimeoutError, device.start)
        # A worker that is stuck in the backend is given two seconds, and START two.
        assert 0.5 <= time.monotonic() - began < (8 * SCALE if "threads" not in options else 4 * SCALE)
        assert ublk.list() == []
        backend.go.set()


def test_handlers_that_do_not_raise_let_the_call_go_on() -> None:
    backend = HeldZones()
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: seen.append(number))
    device = ublk.Device(backend, start_timeout=60, zoned=ZONED)

    def handled() -> None:
        backend.arrived.wait(60)
        os.kill(os.getpid(), signal.SIGUSR1)
        # While start() waits, and not when it returns.
        until(lambda: seen)
        backend.go.set()

    thread = threading.Thread(target=handled)
    thread.start()
    with device:
        assert seen == [signal.SIGUSR1]
        thread.join()
        assert read_error(device.path) is None
    signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_in_a_stop_leaves_a_disk_that_is_in_use() -> None:
    with ublk.Device(Ram()) as device:
        with opened(device.path) as fd:
            began = time.monotonic()
            with interrupted(lambda: until(lambda: time.monotonic() > began + 0.2)):
                raised(KeyboardInterrupt, lambda: device.stop(60))
            assert device.state == "live"
            assert read_at(fd, 0) == bytes(BLOCK)
        read(device.path)
        device.stop(60)
        gone(device)
        assert device.state == "stopped"


@limit(60)
def test_ctrl_c_in_a_stop_that_waits_for_the_backend_ends_it() -> None:
    for backend, options in ((FarHeld(), {}), (FarGate(), {"threads": 1})):
        backend.closed = False  # type: ignore[attr-defined]
        device = ublk.Device(backend, **options).start()  # type: ignore[arg-type]
        backend.closed = True  # type: ignore[attr-defined]
        backend.arrived.clear()  # type: ignore[attr-defined]
        errors: list[str | None] = []
        client = threading.Thread(
            target=lambda device=device, errors=errors: errors.append(read_error(device.path, FAR))
        )
        client.start()
        backend.arrived.wait(60)  # type: ignore[attr-defined]
        began = time.monotonic()
        with interrupted(lambda began=began: until(lambda: time.monotonic() > began + 0.2)):
            raised(KeyboardInterrupt, lambda device=device: device.stop_force(60))
        client.join()
        assert errors == ["EIO"]
        # It was stopped and deleted, and knows.
        assert device.state == "stopped"
        gone(device)
        assert device.stats().total.revoked >= 1
        device.stop()
        if isinstance(backend, Gate):
            backend.go.set()


def test_ctrl_c_while_leaving_with_takes_the_disk_from_its_users() -> None:
    device = ublk.Device(Ram(), stop_timeout=60)

    def use() -> None:
        with device:
            fds.append(os.open(device.path, os.O_RDONLY | os.O_DIRECT))
            began.append(time.monotonic())

    fds: list[int] = []
    began: list[float] = []
    with interrupted(lambda: until(lambda: began and time.monotonic() > began[0] + 0.2)):
        raised(KeyboardInterrupt, use)
    assert device.state == "stopped"
    assert error_of(lambda: read_at(fds[0], 0)) is not None or read_at(fds[0], 0) == b""
    os.close(fds[0])
    until(lambda: not ublk.list())


class Sweep:
    """Raises KeyboardInterrupt at one of the moments in which the interpreter handles signals: at the beginning of a
    function in Python, and after a call of one in C. Only within the package, and on this thread. A second one, if it is
    to be, at the beginning of the next function.
    """  # noqa: D205

    def __init__(self, at: int, *, twice: bool = False) -> None:
        self._at = at
        self._twice = twice
        self._passed = 0
        self.where = ""

    def __enter__(self) -> Self:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_raised: object) -> None:
        sys.setprofile(None)
        sys.settrace(None)

    def _again(self, frame: FrameType, event: str, _what: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME) and frame.f_code.co_name != "__del__":
            raise KeyboardInterrupt

    def _look(self, frame: FrameType, event: str, function: Any) -> None:
        code = frame.f_code
        # What is raised in __del__ goes nowhere.
        if event not in {"call", "c_return"} or not code.co_filename.startswith(HOME) or code.co_name == "__del__":
            return
        self._passed += 1
        if self._passed == self._at:
            called = f" after {function.__name__}" if event == "c_return" else ""
            self.where = f"{code.co_qualname}:{frame.f_lineno}{called}"
            if self._twice:
                sys.settrace(self._again)
            raise KeyboardInterrupt


HOME = f"{Path(ublk.__file__).parent}/"


def _with(device: ublk.Device) -> None:
    with device:
        device.wait(0)


def _by_hand(device: ublk.Device) -> None:
    device.start()
    device.stop(60)


@limit(150)
def test_ctrl_c_at_every_moment_of_a_life_leaves_nothing() -> None:
    devices: list[Callable[[], ublk.Device]] = [
        lambda: ublk.Device(Ram()),
        lambda: ublk.Device(Ram(), threads=2),
        lambda: ublk.Device(Later()),
        lambda: ublk.Device(ublk.Mem(MIB)),
    ]
    lives = [(make, _with, False) for make in devices]
    for make, live, twice in [*lives, (devices[2], _by_hand, False), (devices[2], _with, True)]:
        live(make())
        moments: list[str] = []
        while True:
            device = make()
            began = time.monotonic()
            with Sweep(len(moments) + 1, twice=twice) as sweep:
                try:
                    live(device)
                except KeyboardInterrupt:
                    assert sweep.where
                else:
                    assert not sweep.where, f"{sweep.where}: it was swallowed"
            if not sweep.where:
                break
            moments.append(sweep.where)
            if live is _by_hand:
                # It was started, or not; a stop that was interrupted may have to be called again.
                device.stop(60)
            assert time.monotonic() - began < AT_ONCE, sweep.where
            assert device.state in {"new", "stopped"}, (sweep.where, device.state)
            assert ublk.list() == [], sweep.where
            assert "ublk-loop" not in [thread.name for thread in threading.enumerate()], sweep.where
            until(lambda: not threads_of_ours())
        # That these are there says that it works.
        assert {name.partition(":")[0] for name in moments} >= {"Device.start", "Device._bring_up"}, moments
        assert [name for name in moments if name.endswith(" after start")], moments


def test_ctrl_c_while_a_takeover_and_a_deletion_wait_for_another_process() -> None:
    arrived, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        held = Held(closed=False)
        device = ublk.Device(held, recovery="wait", id=5, size=MIB, prefer=[UNSCANNED]).start()
        held.arrived.clear()
        held.closed = True
        os.write(arrived[1], b"s")
        held.arrived.wait(60)
        os.write(arrived[1], b"r")
        os.read(go[0], 1)
        held.closed = False
        for request in held.requests:
            request.complete()
        device.wait()
        device.stop()
        os._exit(0)
    os.read(arrived[0], 1)
    began = time.monotonic()
    # A server that lives is given two seconds to be gone.
    with interrupted(lambda: until(lambda: time.monotonic() > began + 0.3), seconds=1.5 * SCALE):
        raised(KeyboardInterrupt, lambda: ublk.recover(5, Held()))
    assert [(info.id, info.state, info.server_pid) for info in ublk.list()] == [(5, "live", pid)]
    client = threading.Thread(target=read_error, args=("/dev/ublkb5",))
    client.start()
    os.read(arrived[0], 1)
    began = time.monotonic()
    with interrupted(lambda: until(lambda: time.monotonic() > began + 0.3)):
        raised(KeyboardInterrupt, lambda: ublk.delete(5, 60))
    # What the driver has begun it goes on with, as soon as the server answers.
    os.write(go[1], b".")
    client.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with contextlib.suppress(FileNotFoundError):
        ublk.delete(5)
    assert ublk.list() == []


def test_a_handover_that_is_given_up_comes_to_its_end_by_itself() -> None:
    needs("QUIESCE")
    held = Held(closed=False)
    # Requests of a look for partitions would wait for the next server, and with them who closes the disk.
    device = ublk.Device(held, recovery="wait", prefer=[UNSCANNED]).start()
    held.closed = True
    held.arrived.clear()
    seen: list[bytes] = []
    client = threading.Thread(target=lambda: seen.append(read(device.path)))
    client.start()
    held.arrived.wait(60)
    began = time.monotonic()

    def twice() -> None:
        until(lambda: time.monotonic() > began + 0.2)
        os.kill(os.getpid(), signal.SIGINT)
        # The first one waits for what comes of it, ten seconds.
        time.sleep(0.1)

    with interrupted(twice, seconds=SCALE):
        raised(KeyboardInterrupt, lambda: device.hand_over(60))
    held.closed = False
    for request in held.requests:
        request.complete()
    client.join()
    assert seen == [bytes(BLOCK)]
    until(lambda: [info.state for info in ublk.list()] == ["quiesced"])
    # It is the next server's.
    device.stop()
    assert device.state == "stopped"
    ublk.recover(device.id, held).stop()
    assert ublk.list() == []


def _held_read() -> tuple[FarHeld, ublk.Device, threading.Thread]:
    """A device with a request that is not answered, and the client that waits for it."""
    held = FarHeld(closed=False)
    device = ublk.Device(held, prefer=["SHMEM_ZC", UNSCANNED], recovery="wait").start()
    return held, device, _reads(held, device)


def _reads(held: FarHeld, device: ublk.Device) -> threading.Thread:
    held.arrived.clear()
    held.closed = True
    client = threading.Thread(target=read_error, args=(device.path, FAR))
    client.start()
    held.arrived.wait(60)
    return client


def _let_go(held: FarHeld, client: threading.Thread) -> None:
    held.let_go()
    client.join()


def _in_a_while() -> Callable[[], None]:
    began = time.monotonic()
    return lambda: until(lambda: time.monotonic() > began + 0.2)


@limit(60)
def test_ctrl_c_while_memory_is_shared_and_no_more_shared() -> None:
    needs("SHMEM_ZC")
    buffer = ublk.SharedBuffer(MIB)
    held, device, client = _held_read()
    # It waits for the read.
    with interrupted(_in_a_while()):
        raised(KeyboardInterrupt, lambda: device.share(buffer))
    _let_go(held, client)

    # What was shared is taken back: it can be shared anew.
    got: list[int] = []

    def shared_anew() -> bool:
        with contextlib.suppress(OSError):
            got.append(device.share(buffer))
        return bool(got)

    until(shared_anew)
    client = _reads(held, device)
    with interrupted(_in_a_while()):
        raised(KeyboardInterrupt, lambda: device.unshare(got[0]))
    _let_go(held, client)
    until(lambda: error_of(lambda: device.unshare(got[0])) == "ENOENT")
    assert read(device.path) == bytes(BLOCK)
    # One that the driver has let go on for as long as the device lives does not keep that from its end.
    client = _reads(held, device)
    with interrupted(_in_a_while()):
        raised(KeyboardInterrupt, lambda: device.share(buffer))
    device.stop_force(0.2)
    client.join()
    gone(device)


async def _given_up(call: Coroutine[Any, Any, object]) -> None:
    began = time.monotonic()
    try:
        await asyncio.wait_for(call, 0.2)
    except TimeoutError:
        assert time.monotonic() - began < AT_ONCE
    else:
        raise AssertionError("it did not wait for the request that is out")


def test_a_cancelled_sharing_is_taken_back_and_does_not_wait() -> None:
    needs("SHMEM_ZC")
    buffer = ublk.SharedBuffer(MIB)
    held, device, client = _held_read()

    async def main() -> None:
        nonlocal client
        began = time.monotonic()
        await _given_up(device.share_async(buffer))
        _let_go(held, client)
        got: list[int] = []
        while not got:
            with contextlib.suppress(OSError):
                got = [await device.share_async(buffer)]
            assert time.monotonic() - began < 20 * SCALE
        client = await asyncio.to_thread(_reads, held, device)
        await _given_up(device.unshare_async(got[0]))
        _let_go(held, client)
        # It is not taken back: the driver knows the number no more.
        await asyncio.to_thread(until, lambda: error_of(lambda: device.unshare(got[0])) == "ENOENT")
        # In time, it stays.
        await device.unshare_async(await device.share_async(buffer))

    asyncio.run(main())
    device.stop()


def test_ctrl_c_while_a_disk_is_taken_from_a_server_with_requests() -> None:
    needs("QUIESCE")
    held, device, client = _held_read()
    with interrupted(_in_a_while()):
        raised(KeyboardInterrupt, lambda: ublk.quiesce(device.id, 60))
    assert device.state == "live"
    _let_go(held, client)
    ublk.quiesce(device.id)
    assert device.wait(10)
    device.stop()
    with ublk.recover(device.id, held) as device:
        assert read(device.path) == bytes(BLOCK)


def test_a_cancelled_start_and_a_cancelled_stop_do_not_wait() -> None:
    async def main() -> None:
        for backend, options in ((HeldZones(), {"threads": 1}), (HeldZonesByLoop(), {})):
            began = time.monotonic()
            device = ublk.Device(backend, zoned=ZONED, start_timeout=60, **options)  # type: ignore[arg-type]
            start = asyncio.create_task(device.start_async())
            await asyncio.to_thread(backend.arrived.wait, 60)
            start.cancel()
            result = (await asyncio.gather(start, return_exceptions=True))[0]
            assert isinstance(result, asyncio.CancelledError), result
            assert time.monotonic() - began < AT_ONCE
            assert ublk.list() == []
            backend.go.set()
        async with ublk.Device(Ram()) as device:
            with opened(device.path, os.O_RDONLY):
                began = time.monotonic()
                raised_it: list[BaseException] = []
                try:
                    await asyncio.wait_for(device.stop_async(60), 0.2)
                except TimeoutError as error:
                    raised_it.append(error)
                assert raised_it
                assert time.monotonic() - began < AT_ONCE
                assert device.state == "live"

    asyncio.run(main())


def test_a_signal_ends_a_script_that_is_being_started() -> None:
    if has("NO_AUTO_PART_SCAN"):
        raise NotRun("START does not wait for the look for partitions, nor can a script's disk be zoned")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "held.py")
        script.write_text(
            "import threading\nsize = 1 << 20\n"
            "def pread(buf, offset):\n    print('held', flush=True)\n    threading.Event().wait(60)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-m", "ublk", "serve", script, "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "held\n"
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=30 * SCALE)
        assert (server.returncode, "Traceback" in said) == (0, False), said
    assert ublk.list() == []
