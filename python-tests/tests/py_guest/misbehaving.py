"""Disks that misbehave on purpose, `Fault` and `WriteCache`, and `Stripe`: what they do, counted."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ublk
from tests.py_guest.disks import (
    BLOCK,
    MIB,
    SCALE,
    UNSCANNED,
    error_of,
    opened,
    raised,
    read,
    read_at,
    sysfs,
    together,
    until,
    write,
    write_at,
)
from ublk_rig.pyguest import limit

if TYPE_CHECKING:
    from collections.abc import Iterator

BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
# Away from where the kernel looks for partitions.
FAR = MIB // 2
THERE = (FAR, MIB)


def _apart(i: int) -> int:
    """Where the `i`th of several at a time goes: neighbours could be merged into one request."""
    return FAR + 2 * i * BLOCK


def _range(fd: int, request: int, offset: int, count: int) -> None:
    fcntl.ioctl(fd, request, struct.pack("QQ", offset, count))


class Wraps:
    """A Python class around a ready-made backend."""

    def __init__(self, inner: Any, size: int | None = None) -> None:
        self.inner = inner
        self.size = size or inner.size
        self.fuas = 0

    def pread(self, buf: memoryview, offset: int) -> None:
        self.inner.pread(buf, offset)

    def pwrite(self, buf: memoryview, offset: int, flags: ublk.Flags) -> None:
        self.fuas += ublk.Flags.FUA in flags
        self.inner.pwrite(buf, offset, flags)

    def flush(self) -> None:
        self.inner.flush()

    def trim(self, count: int, offset: int) -> None:
        self.inner.trim(count, offset)

    def zero(self, count: int, offset: int) -> None:
        self.inner.zero(count, offset)


def _backends(folder: Path) -> Iterator[Any]:
    """One of each that can be behind another, of 1 MiB."""
    yield ublk.Mem(MIB)
    yield ublk.File(folder / "disk", create=MIB)
    yield ublk.Stripe([folder / "a", folder / "b"], create=MIB, chunk="8KiB")
    yield ublk.WriteCache(ublk.Mem(MIB))


# Fault.


def test_errors_come_to_the_operations_and_the_range_of_a_rule() -> None:
    fault = ublk.Fault(ublk.WriteCache(ublk.Mem(MIB)))
    with ublk.Device(fault) as device, opened(device.path) as fd:
        calls = {
            "read": lambda: read_at(fd, FAR),
            "write": lambda: write_at(fd, FAR, b"w" * BLOCK),
            "flush": lambda: os.fsync(fd),
            "trim": lambda: _range(fd, BLKDISCARD, FAR, BLOCK),
            "zero": lambda: _range(fd, BLKZEROOUT, FAR, BLOCK),
        }
        for op, call in calls.items():
            before = fault.injected["errors"]
            rule = fault.add("error", errno=errno.ENOSPC, ops=[op], range=None if op == "flush" else THERE)
            seen = {name: error_of(one) for name, one in calls.items()}
            assert {name for name, error in seen.items() if error} == {op}, (op, seen)
            assert seen[op] == "ENOSPC", seen
            assert fault.injected["errors"] == before + 1
            if op != "flush":
                # Just outside of the range.
                assert error_of(lambda: read_at(fd, FAR - BLOCK)) is None
                assert error_of(lambda: write_at(fd, FAR - BLOCK, bytes(BLOCK))) is None
            assert fault.remove(rule)
            assert error_of(call) is None
            assert not fault.remove(rule)
        # What the block layer has no word for is EIO (docs/errors.md).
        for number, name in ((errno.ENODATA, "ENODATA"), (errno.ETIMEDOUT, "ETIMEDOUT"), (errno.EPERM, "EIO")):
            fault.add("error", errno=number, ops=["read"], range=THERE)
            assert error_of(lambda: read_at(fd, FAR)) == name
            fault.clear()
        assert device.stats().total.read.errors == fault.injected["errors"] - 4
        assert error_of(lambda: read_at(fd, FAR)) is None


def test_which_requests_a_rule_takes_is_exact() -> None:
    fault = ublk.Fault(ublk.Mem(MIB))
    with ublk.Device(fault) as device, opened(device.path) as fd:

        def pattern(count: int) -> str:
            return "".join(".x"[error_of(lambda: read_at(fd, FAR)) is not None] for _ in range(count))

        for options, expected in (
            ({}, "xxxxxxxx"),
            ({"skip": 3}, "...xxxxx"),
            ({"every": 3}, "..x..x.."),
            ({"skip": 1, "every": 2}, "..x.x.x."),
            ({"limit": 2}, "xx......"),
            ({"skip": 1, "every": 2, "limit": 2}, "..x.x..."),
            ({"probability": 0.0}, "........"),
        ):
            before = fault.injected["errors"]
            fault.add("error", errno=errno.EIO, ops=["read"], range=THERE, **options)
            assert pattern(8) == expected, options
            assert fault.injected["errors"] - before == expected.count("x")
            fault.clear()
        # By chance, and the same again after the same seed.
        patterns = []
        for seed in (7, 7, 8):
            fault.seed(seed)
            fault.add("error", errno=errno.EIO, ops=["read"], range=THERE, probability=0.5)
            patterns.append(pattern(120))
            fault.clear()
        assert patterns[0] == patterns[1] != patterns[2]
        assert all(30 <= p.count("x") <= 90 for p in patterns), patterns
        # The first rule that ends a request decides.
        fault.add("error", errno=errno.ENODATA, ops=["read"], range=THERE, limit=1)
        fault.add("error", errno=errno.ENOSPC, ops=["read"], range=THERE)
        assert [error_of(lambda: read_at(fd, FAR)) for _ in range(2)] == ["ENODATA", "ENOSPC"]


def test_delays_take_their_time_and_others_pass() -> None:
    fault = ublk.Fault(ublk.Mem(MIB))
    with ublk.Device(fault, prefer=[UNSCANNED]) as device, opened(device.path) as fd:
        for delay, least in ((0.03, 0.03), ((0.02, 0.04), 0.02)):
            before = fault.injected
            fault.add("delay", delay=delay, ops=["read"], range=THERE)
            began = time.monotonic()
            for _ in range(3):
                read_at(fd, FAR)
            assert time.monotonic() - began >= 3 * least
            after = fault.injected
            assert after["delays"] - before["delays"] == 3
            assert 3 * least - 1e-6 <= after["delayed"] - before["delayed"] <= 3 * 0.04 + 1e-6
            fault.clear()
        # They take no thread: eight that are delayed are delayed together, and one that is not passes them.
        fault.add("delay", delay=SCALE, ops=["read"], range=THERE)
        began = time.monotonic()
        slow = threading.Thread(target=together, args=(8, lambda i: read_at(fd, _apart(i))))
        slow.start()
        until(lambda: device.stats().total.in_flight == 8)
        read_at(fd, 0)
        assert device.stats().total.in_flight == 8
        slow.join()
        assert SCALE <= time.monotonic() - began < 6 * SCALE
        # Those of two rules add up.
        fault.clear()
        fault.add("delay", delay=0.02)
        fault.add("delay", delay=0.03)
        began = time.monotonic()
        read_at(fd, FAR)
        assert time.monotonic() - began >= 0.05


def test_requests_are_held_until_they_are_released() -> None:
    fault = ublk.Fault(ublk.Mem(MIB))
    with ublk.Device(fault, prefer=[UNSCANNED]) as device, opened(device.path) as fd:
        assert fault.wait_held(timeout=0.05) is False
        assert (fault.held, fault.release()) == (0, 0)
        fault.add("hold", ops=["write"], range=THERE)
        done: list[Any] = []
        client = threading.Thread(
            target=lambda: done.append(together(3, lambda i: write_at(fd, _apart(i), b"h" * BLOCK)))
        )
        client.start()
        assert fault.wait_held(3, 30 * SCALE)
        assert fault.held == 3
        assert fault.wait_held(4, 0.05) is False
        assert device.stats().total.in_flight == 3
        # Others pass, and taking the rule away does not release what is held.
        assert read_at(fd, FAR) == bytes(BLOCK)
        fault.clear()
        write_at(fd, FAR + 8 * BLOCK, b"o" * BLOCK)
        assert fault.held == 3
        assert not done
        assert fault.release() == 3
        client.join()
        assert fault.held == 0
        assert [read_at(fd, _apart(i)) for i in range(3)] == [b"h" * BLOCK] * 3
        assert fault.injected["holds"] == 3
    # A stop by force answers what is held with EIO.
    device = ublk.Device(fault).start()
    fault.add("hold", ops=["read"], range=THERE)
    errors: list[str | None] = []
    reader = threading.Thread(target=lambda: errors.append(error_of(lambda: read(device.path, FAR))))
    reader.start()
    assert fault.wait_held(timeout=30 * SCALE)
    device.stop_force(0.1)
    reader.join()
    assert errors == ["EIO"]
    fault.release()


def test_ctrl_c_ends_the_wait_for_held_requests() -> None:
    fault = ublk.Fault(ublk.Mem(MIB))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()

    def waits() -> None:
        timer.start()
        fault.wait_held(timeout=60)

    raised(KeyboardInterrupt, waits)
    assert time.monotonic() - began < 5 * SCALE


def test_requests_are_dropped_and_handlers_panic() -> None:
    fault = ublk.Fault(ublk.Mem(MIB))
    with ublk.Device(fault) as device, opened(device.path) as fd:
        fault.add("drop", ops=["read"], range=THERE, limit=2)
        assert [error_of(lambda: read_at(fd, FAR)) for _ in range(3)] == ["EIO", "EIO", None]
        fault.add("panic", ops=["read"], range=THERE, limit=1)
        assert [error_of(lambda: read_at(fd, FAR)) for _ in range(2)] == ["EIO", None]
        assert (fault.injected["drops"], fault.injected["panics"]) == (2, 1)
        total = device.stats().total
        assert (total.dropped, total.panics) == (3, 1)  # a panic drops its request
        assert device.state == "live"


def test_a_rule_kills_the_server() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        fault = ublk.Fault(ublk.Mem(MIB))
        # A look for partitions would wait for the next server, and with it the client's close.
        device = ublk.Device(fault, recovery="wait", prefer=[UNSCANNED]).start()
        fault.add("abort", ops=["write"], range=THERE)
        os.write(writer, b"%d\n" % device.id)
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        number = int(said.readline())
    done: list[str | None] = []
    client = threading.Thread(
        target=lambda: done.append(error_of(lambda: write(f"/dev/ublkb{number}", FAR, bytes(BLOCK))))
    )
    client.start()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGABRT
    client.join()
    assert done == ["EIO"]
    # The disk waits for the next server.
    with ublk.recover(number, ublk.Mem(MIB)) as device:
        assert device.id == number
        assert read(device.path, FAR) == bytes(BLOCK)


def test_rules_that_make_no_sense_are_refused() -> None:
    fault = ublk.Fault(ublk.Mem(MIB))
    for kind, action, options, words in (
        (ValueError, "explode", {}, "explode"),
        (TypeError, "error", {}, "errno"),
        (ValueError, "error", {"errno": 0}, "errno=0"),
        (ValueError, "error", {"errno": 5000}, "errno=5000"),
        (TypeError, "delay", {}, "delay"),
        (ValueError, "delay", {"delay": -1.0}, "delay=-1"),
        (ValueError, "delay", {"delay": (3.0, 2.0)}, "delay"),
        (ValueError, "delay", {"delay": 1e6}, "a day"),
        (ValueError, "drop", {"probability": 1.1}, "1.1"),
        (ValueError, "drop", {"probability": float("nan")}, "NaN"),
        (ValueError, "drop", {"every": 0}, "every 0th"),
        (ValueError, "drop", {"range": (7, 7)}, "7"),
        (ValueError, "drop", {"ops": ["write", "wish"]}, "wish"),
    ):
        raised(kind, lambda action=action, options=options: fault.add(action, **options), words)
    assert "0 rules" in repr(fault)
    raised(TypeError, lambda: ublk.Fault(fault), "another Fault")  # type: ignore[arg-type]
    raised(TypeError, lambda: ublk.Fault(object()), "cannot be behind")  # type: ignore[arg-type]
    raised(ValueError, lambda: ublk.Device(fault, size=2 * MIB), "size")
    raised(TypeError, lambda: ublk.Device(ublk.Fault(ublk.Null())), "size")


@limit(60)
def test_faults_come_before_every_backend_and_in_python_classes() -> None:
    with tempfile.TemporaryDirectory() as name:
        for behind in [ublk.Null(), *_backends(Path(name))]:
            for wrapped in (False, True):
                fault = ublk.Fault(behind)
                assert fault.size == (None if isinstance(behind, ublk.Null) else MIB)
                backend: Any = Wraps(fault, MIB) if wrapped else fault
                with ublk.Device(backend, size=MIB) as device, opened(device.path) as fd:
                    write_at(fd, FAR, b"f" * 3 * BLOCK)
                    fault.add("error", errno=errno.ENODATA, ops=["read"], range=(FAR + BLOCK, FAR + 2 * BLOCK))
                    seen = [error_of(lambda at=at: read_at(fd, FAR + at * BLOCK)) for at in range(3)]  # type: ignore[misc]
                    assert seen == [None, "ENODATA", None], (behind, wrapped)
                    fault.clear()
                    fault.add("panic", ops=["write"], range=THERE, limit=1)
                    fault.add("drop", ops=["write"], range=THERE, limit=1)
                    seen = [error_of(lambda: write_at(fd, FAR + 8 * BLOCK, b"g" * BLOCK)) for _ in range(3)]
                    assert seen == ["EIO", "EIO", None], (behind, wrapped)
                    os.fsync(fd)
                    expected = bytes(3 * BLOCK) if isinstance(behind, ublk.Null) else b"f" * 3 * BLOCK
                    assert read_at(fd, FAR, 3 * BLOCK) == expected
                    _range(fd, BLKZEROOUT, FAR, BLOCK)
                    _range(fd, BLKDISCARD, FAR + BLOCK, BLOCK)
                    assert read_at(fd, FAR, 2 * BLOCK) == bytes(2 * BLOCK)
                assert fault.injected == fault.injected | {"errors": 1, "panics": 1, "drops": 1}


# WriteCache.


def _cut_and_look(cache: ublk.WriteCache, backend: Any) -> None:
    """What is not flushed is lost, to the byte, and nothing else is."""
    with ublk.Device(backend) as device, opened(device.path) as fd:
        assert (sysfs(device, "write_cache"), sysfs(device, "fua")) == ("write back", "1")
        flushed = os.urandom(4 * BLOCK)
        write_at(fd, FAR, flushed)
        assert cache.unflushed == 4 * BLOCK
        os.fsync(fd)
        assert cache.unflushed == 0
        # Three blocks over and behind what is flushed, one of them twice: two are new places, one is old.
        write_at(fd, FAR + 3 * BLOCK, b"1" * BLOCK)
        write_at(fd, FAR + 3 * BLOCK, b"2" * BLOCK)
        write_at(fd, FAR + 9 * BLOCK, b"3" * 2 * BLOCK)
        assert cache.unflushed == 3 * BLOCK
        # What the disk was asked to make durable by itself is no part of that, nor are ranges that were discarded.
        durable = os.urandom(BLOCK)
        cache.pwrite(durable, FAR + 20 * BLOCK, ublk.Flags.FUA)
        write_at(fd, FAR + 24 * BLOCK, b"5" * 2 * BLOCK)
        assert cache.unflushed == 5 * BLOCK
        _range(fd, BLKDISCARD, FAR + 24 * BLOCK, BLOCK)
        _range(fd, BLKZEROOUT, FAR + 25 * BLOCK, BLOCK)
        assert cache.unflushed == 3 * BLOCK
        # A client sees it all.
        assert read_at(fd, FAR, 4 * BLOCK) == flushed[: 3 * BLOCK] + b"2" * BLOCK
        assert cache.is_on
        assert cache.cut() == 3 * BLOCK
        assert (cache.is_on, cache.unflushed) == (False, 0)
        assert cache.cut() == 0
        errors = [
            error_of(call)
            for call in (lambda: read_at(fd, FAR), lambda: write_at(fd, FAR, flushed), lambda: os.fsync(fd))
        ]
        assert errors == ["EIO"] * 3
        cache.restore()
        assert cache.is_on
        assert read_at(fd, FAR, 4 * BLOCK) == flushed
        assert read_at(fd, FAR + 9 * BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
        assert read_at(fd, FAR + 20 * BLOCK) == durable
        assert read_at(fd, FAR + 24 * BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
        # And it goes on.
        write_at(fd, FAR, b"n" * BLOCK)
        os.fsync(fd)
        assert cache.cut() == 0
        cache.restore()
        assert read_at(fd, FAR) == b"n" * BLOCK


@limit(60)
def test_a_power_cut_loses_what_was_not_flushed_and_nothing_else() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for behind in _backends(folder):
            if isinstance(behind, ublk.WriteCache):
                continue
            cache = ublk.WriteCache(behind)
            assert cache.size == MIB
            _cut_and_look(cache, cache)
        # In a Python class, behind rules and before them.
        cache = ublk.WriteCache(ublk.Mem(MIB))
        wraps = Wraps(cache)
        _cut_and_look(cache, wraps)
        assert wraps.fuas == 0
        with ublk.Device(wraps) as device, opened(device.path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC) as fd:
            write_at(fd, FAR, b"f" * BLOCK)
            assert wraps.fuas == 1
            assert cache.cut() == 0
        cache.restore()
        cache = ublk.WriteCache(ublk.Mem(MIB))
        _cut_and_look(cache, ublk.Fault(cache))
        cache = ublk.WriteCache(ublk.Fault(ublk.File(folder / "other", create=MIB)))
        _cut_and_look(cache, cache)
        # What is in the file is what a cut leaves.
        assert (folder / "other").read_bytes()[FAR : FAR + BLOCK] == b"n" * BLOCK


def test_some_of_what_was_not_flushed_survives_by_chance() -> None:
    outcomes = []
    for seed in (1, 1, 2):
        cache = ublk.WriteCache(ublk.Mem(MIB))
        with ublk.Device(cache) as device, opened(device.path) as fd:
            write_at(fd, FAR, b"o" * 64 * BLOCK)
            os.fsync(fd)
            write_at(fd, FAR, b"n" * 64 * BLOCK)
            assert cache.unflushed == 64 * BLOCK
            lost, survived = cache.cut_some(0.5, seed)
            assert lost + survived == 64 * BLOCK
            cache.restore()
            data = read_at(fd, FAR, 64 * BLOCK)
            # By sectors, each the one or the other, in the numbers that were told.
            sectors = [data[at : at + 512] for at in range(0, len(data), 512)]
            assert all(sector in {b"o" * 512, b"n" * 512} for sector in sectors)
            assert sectors.count(b"n" * 512) * 512 == survived
            assert 0.3 < survived / (64 * BLOCK) < 0.7
            outcomes.append(data)
    assert outcomes[0] == outcomes[1] != outcomes[2]
    for probability, expected in ((0.0, (BLOCK, 0)), (1.0, (0, BLOCK))):
        cache = ublk.WriteCache(ublk.Mem(MIB))
        cache.pwrite(b"n" * BLOCK, 0)
        assert cache.cut_some(probability) == expected
    for wrong in (-0.1, 1.5, float("nan")):
        raised(ValueError, lambda wrong=wrong: cache.cut_some(wrong), "probability")


def test_a_cache_that_is_full_passes_on_what_it_has() -> None:
    mem = ublk.Mem(MIB)
    cache = ublk.WriteCache(mem, capacity="64KiB")
    with ublk.Device(cache) as device, opened(device.path) as fd:
        for at in range(100):
            write_at(fd, at * BLOCK, bytes([at]) * BLOCK)
            assert cache.unflushed <= 64 << 10
        lost = cache.cut()
        assert lost <= 64 << 10
        cache.restore()
        data = [read_at(fd, at * BLOCK) for at in range(100)]
        kept = [at for at in range(100) if data[at] == bytes([at]) * BLOCK]
        # At 0 nobody can tell; the others are there or were lost.
        assert all(data[at] == bytes(BLOCK) for at in range(100) if at not in kept)
        assert abs((100 - len(kept)) * BLOCK - lost) <= BLOCK
    assert ublk.WriteCache(mem).size == MIB
    raised(TypeError, lambda: ublk.WriteCache(ublk.Null()), "Null")  # type: ignore[arg-type]
    raised(TypeError, lambda: ublk.WriteCache(Wraps(mem)), "cannot be behind")  # type: ignore[arg-type]
    raised(ValueError, lambda: ublk.WriteCache(mem, capacity="much"), "much")
    # It remembers sectors: a part of one would be lost.
    before = cache.unflushed
    for call in (
        lambda: cache.pwrite(b"part", 0),
        lambda: cache.pread(bytearray(512), 4),
        lambda: cache.zero(4, 512),
        lambda: cache.trim(4, 0),
    ):
        error = raised(OSError, call)
        assert isinstance(error, OSError)
        assert error.errno == errno.EINVAL
    assert cache.unflushed == before


def test_a_cache_tells_when_it_cannot_be_written_back() -> None:
    fault = ublk.Fault(ublk.Mem(MIB))
    cache = ublk.WriteCache(fault)
    with ublk.Device(cache) as device, opened(device.path) as fd:
        fault.add("error", errno=errno.ENOSPC, ops=["write"], range=THERE, limit=1)
        write_at(fd, FAR, b"w" * BLOCK)  # into the cache
        assert error_of(lambda: os.fsync(fd)) in {"EIO", "ENOSPC"}
        assert cache.unflushed == BLOCK
        os.fsync(fd)
        assert cache.unflushed == 0
        buffer = bytearray(BLOCK)
        fault.pread(buffer, FAR)
        assert buffer == b"w" * BLOCK


# Stripe.


def _laid_out(members: list[Path], chunk: int, size: int) -> bytes:
    """The disk's contents by the members' files: chunk after chunk in turn."""
    contents = [path.read_bytes() for path in members]
    data = bytearray()
    for number in range(-(-size // chunk)):
        at = number // len(members) * chunk
        data += contents[number % len(members)][at : at + chunk]
    return bytes(data[:size])


@limit(90)
def test_a_stripe_deals_chunks_out_in_turn() -> None:
    rng = random.Random(5)  # noqa: S311
    with tempfile.TemporaryDirectory() as name:
        for count, chunk in ((3, 512 * 7), (2, 4096 * 3), (5, 64 << 10), (1, 4096)):
            members = [Path(name, f"{count}-{chunk}-{i}") for i in range(count)]
            for wrapped in (False, True):
                stripe = ublk.Stripe(members, create=MIB, chunk=chunk)
                size = stripe.size
                # Whole stripes, enough of them.
                assert stripe.chunk == chunk
                assert stripe.size % (chunk * count) == 0
                assert MIB <= stripe.size < MIB + chunk * count
                assert {path.stat().st_size for path in members} == {size // count}
                model = bytearray(_laid_out(members, chunk, size))
                with ublk.Device(Wraps(stripe) if wrapped else stripe) as device, opened(device.path) as fd:
                    assert device.size == size
                    for _ in range(40):
                        length = rng.randrange(1, 128) * 512
                        offset = rng.randrange(0, (size - length) // 512) * 512
                        match rng.randrange(5):
                            case 0:
                                _range(fd, BLKDISCARD, offset, length)
                                model[offset : offset + length] = bytes(length)
                            case 1:
                                _range(fd, BLKZEROOUT, offset, length)
                                model[offset : offset + length] = bytes(length)
                            case 2:
                                assert read_at(fd, offset, length) == model[offset : offset + length]
                            case _:
                                data = rng.randbytes(length)
                                write_at(fd, offset, data)
                                model[offset : offset + length] = data
                    os.fsync(fd)
                    assert read_at(fd, 0, 512 << 10) == model[: 512 << 10]
                    assert _laid_out(members, chunk, size) == model, (count, chunk, wrapped)
                    # A discard gives the space back.
                    before = sum(path.stat().st_blocks for path in members)
                    _range(fd, BLKDISCARD, 0, size // 4096 * 4096)
                    assert sum(path.stat().st_blocks for path in members) < before / 4
                # Nothing is beyond its end, and it does not grow.
                for call in (stripe.pread, stripe.pwrite):
                    raised(OSError, lambda call=call, size=size: call(bytearray(512), size))  # type: ignore[misc]
                assert {path.stat().st_size for path in members} == {size // count}


def test_options_of_a_stripe() -> None:
    with tempfile.TemporaryDirectory() as name:
        members = [Path(name, one) for one in "abc"]
        raised(FileNotFoundError, lambda: ublk.Stripe(members), "a", "create=")
        stripe = ublk.Stripe(members, create="3MiB", chunk="64KiB", block_size=4096)
        with ublk.Device(stripe) as device:
            assert sysfs(device, "logical_block_size") == "4096"
            assert sysfs(device, "minimum_io_size") == str(64 << 10)
            assert (sysfs(device, "write_cache"), sysfs(device, "fua")) == ("write back", "1")
            raised(OSError, lambda: read(device.path, 0, 512))
            fingerprint = device.info.fingerprint
        with ublk.Device(ublk.Stripe(members[::-1], chunk="64KiB")) as device:
            # Another order is another disk.
            assert device.info.fingerprint not in {0, fingerprint}
        with ublk.Device(ublk.Stripe(members, chunk="64KiB", sync="write")) as device:
            assert sysfs(device, "write_cache") == "write through"
            write(device.path, 0, b"s" * BLOCK)
        with ublk.Device(ublk.Stripe(members, chunk="64KiB", read_only=True)) as device:
            assert sysfs(device, "../ro") == "1"
            assert read(device.path) == b"s" * BLOCK
            raised(PermissionError, lambda: write(device.path, 0, bytes(BLOCK)))
        # It is not made larger than it is.
        assert ublk.Stripe(members, chunk="64KiB", create="6MiB").size == stripe.size
        assert "3 members" in repr(stripe)
        for wrong, words in (
            ({"chunk": 0}, "chunk"),
            ({"chunk": 1000}, "1000"),
            ({"chunk": "2MiB"}, "less than a chunk"),
            ({"sync": "never"}, "sync="),
            ({"block_size": 300}, "300"),
        ):
            raised(ValueError, lambda wrong=wrong: ublk.Stripe(members, **wrong), words)
        raised(ValueError, lambda: ublk.Stripe([members[0], members[0]]), "the same file")
        raised(ValueError, lambda: ublk.Stripe([]), "none")
        try:
            direct = ublk.Stripe(members, chunk="64KiB", direct=True)
        except OSError as error:
            # Not every file system has it.
            assert "direct=True" in "".join([str(error), *getattr(error, "__notes__", [])])
        else:
            raised(ValueError, lambda: ublk.WriteCache(direct), "direct=True")
            with ublk.Device(direct) as device, opened(device.path) as fd:
                write_at(fd, FAR, b"d" * BLOCK)
                assert read_at(fd, FAR) == b"d" * BLOCK
