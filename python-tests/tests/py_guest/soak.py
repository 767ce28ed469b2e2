"""What only shows after a while: the short forms here, the long ones with --full (`make soak`)."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ublk
from tests.py_guest.disks import MIB, Ram, read
from ublk_rig.pyguest import limit, soak


class Later(Ram):
    """On a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Ram.pread(self, buf, offset)


def _held() -> tuple[int, int, int]:
    """Kilobytes of memory, descriptors, threads."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return int(fields["RssAnon"].split()[0]), len(os.listdir("/proc/self/fd")), int(fields["Threads"])


def _lives(count: int) -> None:
    """Devices of every kind, one after another."""
    ram = Ram(64 << 10)
    for number in range(count):
        kind = number % 5
        if kind == 0:
            device = ublk.Device(ram, depth=8)
        elif kind == 1:
            device = ublk.Device(ram, threads=2, depth=8)
        elif kind == 2:
            device = ublk.Device(Later(64 << 10), depth=8)
        elif kind == 3:
            device = ublk.Device(ublk.Mem(64 << 10), depth=8)
        else:
            device = ublk.Device(ram, depth=8, queues=2)
        with device:
            read(device.path)


def _grows_not(cycles: int) -> None:
    warm = max(30, cycles // 10)
    _lives(warm)
    # Threads that end announce it to nobody: what is counted is what stays.
    before = _settled()
    _lives(cycles)
    after = _settled()
    assert after[1] <= before[1], f"descriptors: {before[1]} before, {after[1]} after {cycles} devices"
    assert after[2] <= before[2], f"threads: {before[2]} before, {after[2]} after {cycles} devices"
    # 1 MiB of noise: a device that leaked a page would be four times that after a thousand.
    assert after[0] <= before[0] + 1024, f"memory: {before[0]} kB before, {after[0]} kB after {cycles} devices"


def _settled() -> tuple[int, int, int]:
    deadline = time.monotonic() + 15
    held = _held()
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = _held()
        if now[1:] == held[1:] and now[0] >= held[0]:
            return now
        held = now
    return held


@limit(60)
def test_forty_devices_leave_nothing() -> None:
    _grows_not(40)


@soak
@limit(900)
def test_a_thousand_devices_leave_nothing() -> None:
    _grows_not(1000)


class Moody(Ram):
    """Raises one time in fifty, whatever comes to its mind."""

    KINDS = (
        ValueError,
        KeyError,
        NotImplementedError,
        MemoryError,
        RecursionError,
        TimeoutError,
        OSError,
        StopIteration,
    )

    def __init__(self) -> None:
        super().__init__(16 * MIB)
        self.random = random.Random(50)  # noqa: S311
        self.raised = 0

    def _mood(self) -> None:
        if self.random.random() < 0.02:
            self.raised += 1
            raise self.random.choice(self.KINDS)(self.random.randrange(1, 100))

    def pread(self, buf: memoryview, offset: int) -> None:
        self._mood()
        super().pread(buf, offset)

    def pwrite(self, buf: memoryview, offset: int) -> None:
        self._mood()
        super().pwrite(buf, offset)

    def flush(self) -> None:
        self._mood()

    def zero(self, count: int, offset: int) -> None:
        self._mood()
        super().zero(count, offset)


class MoodyLater(Moody):
    """On a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Moody.pread(self, buf, offset)


def _fio(path: str, seconds: float) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "fio.json"
        argv = [
            *("fio", "--name=moods", f"--filename={path}", "--direct=1", "--rw=randrw", "--bs=4k", "--iodepth=16"),
            *(
                "--ioengine=libaio",
                "--time_based",
                f"--runtime={round(seconds)}",
                "--continue_on_error=all",
                "--fsync=64",
            ),
            # They end it otherwise.
            "--ignore_error=5:95:28:61,5:95:28:61",
            *("--error_dump=0", "--output-format=json", f"--output={out}"),
        ]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=seconds * 3 + 60)
        text = out.read_text()
    job = json.loads(text[text.index("{") :])["jobs"][0]
    assert job["job_runtime"] >= seconds * 900, (job["job_runtime"], done)
    assert job["read"]["total_ios"] + job["write"]["total_ios"] > 100, done
    return {"errors": job["total_err"], "ios": job["read"]["total_ios"] + job["write"]["total_ios"]}


def _moods(seconds: float) -> None:
    logging.getLogger("ublk").addHandler(logging.NullHandler())
    logging.getLogger("ublk").propagate = False
    for backend, options in ((Moody(), {}), (Moody(), {"threads": 3}), (MoodyLater(), {})):
        with ublk.Device(backend, **options) as device:  # type: ignore[arg-type]
            told = _fio(device.path, seconds / 3)
            stats = device.stats().total
            assert stats.in_flight == 0, "something is stuck"
            assert backend.raised > 0
            assert told["errors"] > 0
            assert stats.dropped == stats.rejected == 0
    print(f"{sys.version_info[:2]}: nothing stuck")


@limit(90)
def test_fio_while_exceptions_are_raised() -> None:
    _moods(6)


@soak
@limit(1200)
def test_ten_minutes_of_fio_while_exceptions_are_raised() -> None:
    _moods(600)
