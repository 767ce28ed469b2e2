"""Random operations of several clients at the same time, against a model, in each data path that Python code can use."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import ublk
from tests.py_guest.disks import BLOCK, FULL, MIB, Ram, opened, read_at, usable_paths, write_at
from ublk_rig.pyguest import limit

if TYPE_CHECKING:
    from collections.abc import Callable

CLIENTS = 4
# Each client has its own part of the disk, so that what it finds there is known whatever the others do at the time.
PART = 64 << 10
BLOCKS = PART // BLOCK
_DISCARD, _ZERO_OUT = 0x1277, 0x127F


class Later(Ram):
    """On a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Ram.pread(self, buf, offset)

    async def pwrite(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Ram.pwrite(self, buf, offset)


class Raw:
    """Serves by the requests themselves."""

    def __init__(self) -> None:
        self.inner = Ram(CLIENTS * PART)
        self.size = self.inner.size

    def handle(self, request: ublk.Request) -> None:
        """Does what it says."""
        inner, buffer = self.inner, request.buffer
        if request.op == "read":
            assert buffer is not None
            inner.pread(buffer, request.offset)
        elif request.op == "write":
            assert buffer is not None
            inner.pwrite(buffer, request.offset)
        elif request.op in {"trim", "zero"}:
            inner.zero(request.length, request.offset)
        request.complete()


def _ioctl(fd: int, number: int, offset: int, count: int) -> None:
    span = (ctypes.c_uint64 * 2)(offset, count)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(fd, ctypes.c_ulong(number), span) != 0:
        raise OSError(ctypes.get_errno(), "ioctl")


places = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 6)).map(lambda t: (t[0], min(t[1], BLOCKS - t[0])))
one = st.one_of(
    st.tuples(st.just("read"), places, st.just(0)),
    st.tuples(st.just("write"), places, st.integers(1, 255)),
    st.tuples(st.sampled_from(["trim", "zero"]), places, st.just(0)),
    st.tuples(st.just("flush"), places, st.just(0)),
)


class Disk(RuleBasedStateMachine):
    """One device per run of the machine; a step is what the clients do at the same time."""

    make: ClassVar[Callable[[], ublk.Device]]

    def __init__(self) -> None:
        super().__init__()
        self.device: ublk.Device | None = None
        self.model = bytearray(CLIENTS * PART)

    @initialize()
    def start(self) -> None:
        """A device, and a client thread for each part."""
        self.device = type(self).make().start()
        self.pool = ThreadPoolExecutor(CLIENTS)

    def _do(self, client: int, todo: list[tuple[str, tuple[int, int], int]]) -> None:
        assert self.device is not None
        with opened(self.device.path) as fd:
            for kind, (block, count), byte in todo:
                at, size = client * PART + block * BLOCK, count * BLOCK
                if kind == "read":
                    assert read_at(fd, at, size) == self.model[at : at + size]
                elif kind == "write":
                    data = bytes([byte, client, block & 255, count]) * (size // 4)
                    write_at(fd, at, data)
                    self.model[at : at + size] = data
                elif kind == "flush":
                    os.fsync(fd)
                else:
                    _ioctl(fd, _ZERO_OUT if kind == "zero" else _DISCARD, at, size)
                    # The backends zero what is trimmed.
                    self.model[at : at + size] = bytes(size)

    @rule(work=st.lists(st.lists(one, min_size=4, max_size=12), min_size=2, max_size=CLIENTS))
    def clients(self, work: list[list[tuple[str, tuple[int, int], int]]]) -> None:
        """Several clients at the same time."""
        for job in [self.pool.submit(self._do, client, todo) for client, todo in enumerate(work)]:
            job.result()

    @invariant()
    def serves(self) -> None:
        """It lives, and no command of it was refused."""
        if self.device is not None:
            assert self.device.stats().total.rejected == 0

    def teardown(self) -> None:
        """All of it, once more."""
        if self.device is None:
            return
        self.pool.shutdown()
        try:
            with opened(self.device.path) as fd:
                assert read_at(fd, 0, CLIENTS * PART) == self.model
        finally:
            self.device.stop()


def _run(make: Callable[[], ublk.Device], examples: int) -> None:
    kind = type("Disk", (Disk,), {"make": staticmethod(make)})
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=examples * (40 if FULL else 1),
            stateful_step_count=12 if not FULL else 30,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@limit(600)
def test_random_operations_in_each_data_path() -> None:
    for path in usable_paths():
        _run(lambda path=path: ublk.Device(Ram(CLIENTS * PART), data_path=path, depth=8), 3)


@limit(600)
def test_random_operations_of_each_kind_of_backend() -> None:
    for options in ({"threads": 3}, {"queues": 2}):
        _run(lambda options=options: ublk.Device(Ram(CLIENTS * PART), **options), 2)  # type: ignore[arg-type]
    _run(lambda: ublk.Device(Later(CLIENTS * PART)), 3)
    _run(lambda: ublk.Device(Raw(), trim=True, zero=True, cache=True), 3)
    assert MIB > CLIENTS * PART
