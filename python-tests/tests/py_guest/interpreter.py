"""The package and the interpreter: its end, forks, signals, threads, and answers that do not wait for each other."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ublk
from tests.py_guest.disks import (
    BLOCK,
    FULL,
    MIB,
    SCALE,
    UNSCANNED,
    Gate,
    Ram,
    error_of,
    gone,
    opened,
    raised,
    read,
    read_at,
    read_error,
    tasks,
    together,
    until,
    write,
)
from ublk_rig.pyguest import limit, threads_of_ours

PRELUDE = """
import asyncio, fcntl, gc, io, mmap, os, signal, sys, threading, time, warnings
import ublk
class Ram:
    size = 1 << 20
    def __init__(self): self.data = bytearray(self.size)
    def pread(self, buf, offset): buf[:] = self.data[offset:offset + len(buf)]
    def pwrite(self, buf, offset): self.data[offset:offset + len(buf)] = buf
class Async(Ram):
    async def pread(self, buf, offset): Ram.pread(self, buf, offset)
def read(path):
    # An object, which closes itself: a number that Ctrl-C keeps from its `try` would have the disk in use for ever.
    with io.FileIO(path) as disk:
        fcntl.fcntl(disk, fcntl.F_SETFL, os.O_DIRECT)
        return os.preadv(disk.fileno(), [mmap.mmap(-1, 4096)], 4096)
"""


def program(code: str, *, status: int = 0, seconds: float = 15.0, alone: bool = True) -> str:
    """Runs a program to its end, and says what it wrote to stderr; no device may be left."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(PRELUDE + textwrap.dedent(code))
        argv = [sys.executable, "-X", "dev", str(file)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds * SCALE, check=False)
    assert done.returncode == status, (code, done)
    assert not (alone and ublk.list()), (code, done)
    return done.stderr


ENDS = [
    "dev = ublk.Device(Ram()).start()\nread(dev.path)",
    "dev = ublk.Device(Ram()).start()\nread(dev.path)\nsys.exit(0)",
    # Asynchronous ones, on their own loop, and on one that has gone.
    "dev = ublk.Device(Async()).start()\nread(dev.path)",
    """
    async def main():
        dev = await ublk.Device(Async()).start_async()
        await asyncio.to_thread(read, dev.path)
        return dev
    dev = asyncio.run(main())
    try: read(dev.path)
    except OSError as e: assert e.errno == 5, e
    else: raise SystemExit("who has answered?")
    """,
    # With users, with other threads, with a pool, with ready-made backends.
    "dev = ublk.Device(Ram(), threads=3, queues=2).start()\nread(dev.path)\ndisk = open(dev.path, 'rb')",
    "devs = [ublk.Device(ublk.Mem('1MiB')).start() for _ in range(4)]",
    """
    dev = ublk.Device(Ram()).start()
    def use():
        for _ in range(50): read(dev.path)
    threading.Thread(target=use).start()  # not a daemon: it is waited for
    """,
]


@limit(60)
def test_programs_that_end_with_a_live_device() -> None:
    # Two at a time, as many as there are processors: what takes long is to start an interpreter.
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda code: program(code, alone=False), ENDS))
    assert not ublk.list()
    # They hold their devices until the very end; nobody has lost one.
    assert not [text for text in said if "unclosed <ublk.Device" in text], said
    # The one whose loop was closed says so, once, and nobody else says anything.
    assert [text.count("the event loop takes no requests any more") for text in said] == [0, 0, 0, 1, 0, 0, 0], said
    assert not any("Traceback" in text for text in said), said
    with ThreadPoolExecutor(2) as pool:
        lost = pool.submit(program, f"{ENDS[0]}\ndel dev; gc.collect()", alone=False)
        failed = pool.submit(program, f"{ENDS[0]}\nraise ZeroDivisionError", status=1, alone=False)
        assert "ResourceWarning: unclosed <ublk.Device /dev/ublkb" in lost.result()
        assert "ZeroDivisionError" in failed.result()
    assert not ublk.list()


STUCK = """
class Stuck(Ram):
    armed = False
    def pread(self, buf, offset):
        if self.armed:
            reached.set()
            time.sleep(1000)
reached = threading.Event()
backend = Stuck()
dev = ublk.Device(backend{options}).start()
backend.armed = True
def use():
    try: read(dev.path)
    except OSError: pass
threading.Thread(target=use, daemon=True).start()
reached.wait()
"""


def test_programs_that_end_while_a_handler_does_not() -> None:
    # At the same time: each takes as long as the stop of a stuck device does.
    codes = [STUCK.replace("{options}", options) for options in ("", ", threads=2")]
    together(2, lambda i: program(codes[i], seconds=28, alone=False))
    assert not ublk.list()


def test_an_unclosed_device_warns_and_is_stopped() -> None:
    for backend in (Ram(), ublk.Mem(MIB), Later()):
        device = ublk.Device(backend).start()
        place = device.path
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del device
            gc.collect()
        assert [w.category for w in caught] == [ResourceWarning]
        assert caught[0].source is not None
        assert place in str(caught[0].message)
        del caught
        gc.collect()
        until(lambda: not ublk.list())
        until(lambda: not [t for t in threading.enumerate() if t.name == "ublk-loop"])
    # One that was never started says nothing.
    device = ublk.Device(Ram())
    del device
    gc.collect()


class Later(Ram):
    """On a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Ram.pread(self, buf, offset)


def test_a_forked_child_holds_nothing() -> None:
    def ours() -> set[str]:
        # That of a call which is over has been joined, and may still be seen for a moment.
        return set(threads_of_ours()) - {"ublk-py-call"}

    backend = Ram()
    backend.data[:BLOCK] = b"f" * BLOCK
    with ublk.Device(backend) as device, ublk.Device(Later(), threads=0) as other:
        before = ours()
        for way in ("exit", "_exit", "del", "signal"):
            pid = os.fork()
            if pid == 0:
                _child(way, device)
            _, status = os.waitpid(pid, 0)
            wants = -signal.SIGTERM if way == "signal" else 0
            assert os.waitstatus_to_exitcode(status) == wants, (way, status)
            assert read(device.path) == b"f" * BLOCK
            assert read_error(other.path) is None
        until(lambda: ours() == before)
        # A child that lives on does not keep the device.
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(1)
        try:
            device.stop(10)
            gone(device)
            assert read_error(other.path) is None
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _child(way: str, device: ublk.Device) -> None:
    """In the child: the object is there, the device is not."""
    try:
        for call in (
            device.stop,
            device.wait,
            device.hand_over,
            lambda: device.resize(MIB),
            device.stop_force,
            lambda: device.info,
        ):
            raised(ublk.StateError, call)
        assert not threads_of_ours()
        links = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        ]
        assert not [link for link in links if "ublkc" in link or "io_uring" in link], links
        # The disk is one that another process serves.
        assert read(device.path) == b"f" * BLOCK
        if way == "del":
            del device
            gc.collect()
        if way == "exit":
            import atexit  # noqa: PLC0415

            atexit._run_exitfuncs()
        if way == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
    except BaseException:
        import traceback  # noqa: PLC0415

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def test_a_forked_child_can_serve_a_device_of_its_own() -> None:
    with ublk.Device(Ram()) as device:
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                with ublk.Device(Later()) as mine, ublk.Device(Ram(), threads=2) as another:
                    assert len({mine.id, another.id, device.id}) == 3
                    assert read_error(mine.path) is None
                    assert read_error(another.path) is None
                status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert [info.id for info in ublk.list()] == [device.id]


def _serve(queue: multiprocessing.SimpleQueue[str]) -> None:
    with ublk.Device(Ram()) as device:
        write(device.path, 0, b"p" * BLOCK)
        assert read(device.path) == b"p" * BLOCK
        queue.put(device.path)


def _use(path: str, queue: multiprocessing.SimpleQueue[str]) -> None:
    read(path)
    queue.put("read")


@limit(60)
def test_multiprocessing_by_every_method() -> None:
    with ublk.Device(Ram()) as device:
        for method in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context(method)
            queue = context.SimpleQueue()
            processes = [
                context.Process(target=_use, args=(device.path, queue)),  # type: ignore[attr-defined]
                context.Process(target=_serve, args=(queue,)),  # type: ignore[attr-defined]
            ]
            for process in processes:
                process.start()
            told = sorted(queue.get() for _ in processes)
            for process in processes:
                process.join(30 * SCALE)
                assert process.exitcode == 0, (method, process)
            assert told[1] == "read"
            assert [info.id for info in ublk.list()] == [device.id], method


LIFE = """
import faulthandler
# Not the watchdog: a child of a process that has one must not ask for its own.
faulthandler.register(signal.SIGUSR1, all_threads=True)
limit = time.monotonic() + 30
print("ready", flush=True)
try:
    while True:
        with ublk.Device({backend}) as dev:
            for _ in range(3): read(dev.path)
            dev.wait(0.01)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    while dev_list := [d for d in ublk.list() if d.server_pid == os.getpid()]:
        # One whose start was broken off ends on its own.
        time.sleep(0.01)
        if time.monotonic() > limit: raise SystemExit(f"left: {{dev_list}}")
"""


@limit(120)
def test_a_real_ctrl_c_at_any_moment() -> None:
    rng = random.Random(int(os.environ.get("UBLK_SEED", "4")))  # noqa: S311
    kinds = ("Ram()", "Ram(), threads=2", "Async()", "ublk.Mem('1MiB')")
    rounds = 60 if FULL else 2
    for kind in kinds:
        # The loop of lives is forked from one interpreter, so that a round costs no start of one.
        compiled = compile(PRELUDE + LIFE.format(backend=kind), "life", "exec")
        for _ in range(rounds):
            _interrupt_one(compiled, rng.uniform(0, 0.1 * SCALE), kind)
    assert not ublk.list()


def _interrupt_one(compiled: object, after: float, kind: str) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.dup2(writer, 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 1
        try:
            exec(compiled, {"__name__": "__main__"})  # type: ignore[call-overload]  # noqa: S102
            status = 0
        except KeyboardInterrupt:
            status = 0  # in the few instructions around the block
        except BaseException:
            import traceback  # noqa: PLC0415

            traceback.print_exc()
        import atexit  # noqa: PLC0415

        atexit._run_exitfuncs()
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        assert said.readline() == b"ready\n"
        time.sleep(after)
        os.kill(pid, signal.SIGINT)
        try:
            until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), 20)
        except AssertionError:
            os.kill(pid, signal.SIGUSR1)  # where it hangs
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            raise
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, (kind, after, status)
    until(lambda: not ublk.list())


def test_ctrl_c_ends_waits_at_once() -> None:
    with ublk.Device(Ram()) as device:
        for timeout in (None, 60.0):
            timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
            began = time.monotonic()

            def waits(timeout: float | None = timeout, timer: threading.Timer = timer) -> None:
                timer.start()
                device.wait(timeout)

            raised(KeyboardInterrupt, waits)
            assert time.monotonic() - began < 5 * SCALE
            timer.join()
            assert device.state == "live"
            assert read_error(device.path) is None


def test_workers_block_signals_and_run_one_thread_a_queue() -> None:
    before = set(tasks())
    with ublk.Device(Ram(), queues=2) as one, ublk.Device(Ram(), threads=3) as two, ublk.Device(Later()) as three:
        for device in (one, two, three):
            read(device.path)
        # A thread has its name once it has run, and one that serves may not have.
        until(lambda: sum(name.startswith("ublk-py-") and name != "ublk-py-call" for name in tasks().values()) >= 3)
        names = []
        ours = {task for task, name in tasks().items() if task not in before and name != "ublk-py-call"}
        for task in ours:
            try:
                status = Path(f"/proc/self/task/{task}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # one that ends when it has been idle
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            name = fields["Name"]
            if not name.startswith("ublk"):
                continue
            names.append(name)
            if name not in {"ublk-log"}:
                # All but the two that cannot be blocked, and glibc's own two.
                assert int(fields["SigBlk"], 16) | 0x1_8004_0100 == 0xFFFF_FFFF_FFFF_FFFF | 0x1_8004_0100, (
                    name,
                    fields["SigBlk"],
                )
        assert sum(name.startswith(f"ublk{one.id}-q") for name in names) == min(2, os.cpu_count() or 1), names
        assert sum(name.startswith("ublk-py-") for name in names) == 3, names


def test_faulthandler_sees_workers_and_threads_do_not_stop() -> None:
    gate = Gate()
    with ublk.Device(gate) as device:
        gate.closed = True
        client = threading.Thread(target=error_of, args=(lambda: read(device.path),))
        client.start()
        assert gate.arrived.wait(10 * SCALE)
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = file.read().decode()
        assert "in pread" in text, text
        # Its queue waits; everything else goes on.
        with ublk.Device(Ram()) as another:
            assert read_error(another.path) is None
        gate.go.set()
        client.join(10 * SCALE)


def _state(task: int | None) -> str:
    return Path(f"/proc/self/task/{task}/stat").read_text().rpartition(") ")[2][0]


def test_answers_do_not_wait_for_a_slow_handler_of_their_turn() -> None:
    """Quick ones are answered while a slow one of the same turn, which came behind them, is still at work."""
    first, slow = 2 * BLOCK, 4 * BLOCK
    quick = [(6 + 2 * i) * BLOCK for i in range(6)]
    arrived, go, answered = threading.Event(), threading.Event(), threading.Event()
    told: list[bool] = []

    class Mixed(Ram):
        def pread(self, buf: memoryview, offset: int) -> None:
            if offset == first and not go.is_set():
                arrived.set()
                go.wait(20 * SCALE)
            elif offset == slow:
                told.append(answered.wait(5 * SCALE))

    with ublk.Device(Mixed(), depth=32, prefer=[UNSCANNED]) as device:
        inflight = Path(f"/sys/block/{Path(device.path).name}/inflight")

        def sent(offset: int) -> threading.Thread:
            def client() -> None:
                with opened(device.path) as fd:
                    read_at(fd, offset)

            before = int(inflight.read_text().split()[0])
            thread = threading.Thread(target=client)
            thread.start()
            until(lambda: int(inflight.read_text().split()[0]) > before)
            # It is counted before the driver gives it to the worker: who sleeps has done that.
            until(lambda: _state(thread.native_id) == "D")
            return thread

        # While the worker is at the first one, the others come, in this order: its next turn has them all.
        holding = sent(first)
        assert arrived.wait(10 * SCALE)
        clients = [sent(offset) for offset in quick]
        last = sent(slow)
        go.set()
        for thread in clients:
            thread.join()
        answered.set()
        last.join()
        holding.join()
    assert told == [True]


def test_a_loop_that_is_closed_answers_with_eio() -> None:
    async def main() -> ublk.Device:
        device = await ublk.Device(Later()).start_async()
        await asyncio.to_thread(read, device.path)
        return device

    device = asyncio.run(main())
    assert read_error(device.path) == "EIO"
    assert read_error(device.path) == "EIO"
    device.stop()
    gone(device)

    async def leaves() -> None:
        async with ublk.Device(Later()) as device:
            await asyncio.to_thread(read, device.path)
            raise ZeroDivisionError

    raised(ZeroDivisionError, lambda: asyncio.run(leaves()))
    assert not ublk.list()


def test_cycles_through_the_backend_are_no_leak() -> None:
    class Knows(Ram):
        device: ublk.Device

    class KnowsLater(Later):
        device: ublk.Device

    def make() -> None:
        for kind in (Knows, KnowsLater):
            backend = kind()
            backend.device = ublk.Device(backend)
            weak.append(_weak(backend))
            # And one that has lived.
            backend = kind()
            backend.device = ublk.Device(backend)
            with backend.device:
                read(backend.device.path)
            weak.append(_weak(backend))

    weak: list[object] = []
    for _ in range(3):
        make()
    gc.collect()
    alive = [w for w in weak if w() is not None]  # type: ignore[operator]
    assert not alive, f"{len(alive)} backends of {len(weak)} that knew their devices are still there"


def _weak(thing: object) -> object:
    import weakref  # noqa: PLC0415

    return weakref.ref(thing)
