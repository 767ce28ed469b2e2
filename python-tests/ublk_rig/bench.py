"""`make bench`: our disks against the kernel's own, in one guest, as medians of interleaved rounds.

Every round measures every contestant once, so that a machine which slows down half-way slows all of them. Figures
from an emulated processor compare with each other and with nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ublk_rig import kernels, layout, served, session
from ublk_rig.channel import MachineDied
from ublk_rig.guest import CommandFailed, CommandTimeout, Guest
from ublk_rig.process import NothingInTime, ProcessEnded
from ublk_rig.vm import Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

DISK_BYTES = 256 << 20


@dataclass(frozen=True)
class Disk:
    """A disk that is up: where it is, and who serves it (None: the kernel)."""

    path: str
    server_pid: int | None = None


@dataclass(frozen=True)
class Contestant:
    """A kind of disk and how to bring one up; `against` is what its ratio is taken to, `example` what serves it."""

    name: str
    against: str | None
    up: Callable[[Guest], AbstractContextManager[Disk]]
    example: str | None = None


@dataclass(frozen=True)
class Workload:
    """One fio job."""

    name: str
    rw: str
    bs: str
    iodepth: int


WORKLOADS = (
    Workload("4k randread qd1", "randread", "4k", 1),
    Workload("4k randread qd32", "randread", "4k", 32),
    Workload("4k randwrite qd32", "randwrite", "4k", 32),
    Workload("128k read qd8", "read", "128k", 8),
)


@contextmanager
def null_blk(guest: Guest) -> Iterator[Disk]:
    """The kernel's disk that does nothing: the cost of the block layer alone."""
    guest.run("modprobe null_blk nr_devices=1 queue_mode=2 irqmode=0 submit_queues=1 hw_queue_depth=128 gb=1")
    try:
        yield Disk("/dev/nullb0")
    finally:
        guest.run("modprobe -r null_blk")


@contextmanager
def brd(guest: Guest) -> Iterator[Disk]:
    """The kernel's ramdisk, filled, for a page that was never written is read without being copied."""
    guest.run(f"modprobe brd rd_nr=1 rd_size={DISK_BYTES >> 10}")
    try:
        yield _filled(guest, Disk("/dev/ram0"))
    finally:
        guest.run("modprobe -r brd")


@contextmanager
def loop(guest: Guest) -> Iterator[Disk]:
    """The kernel's loop driver over a file in memory."""
    backing = "/dev/shm/ublk-bench.img"  # noqa: S108 - tmpfs is the point
    guest.run(f"modprobe loop && truncate -s {DISK_BYTES} {backing}")
    path = guest.run(["losetup", "--find", "--show", backing]).out.strip()
    try:
        yield _filled(guest, Disk(path))
    finally:
        guest.run(f"losetup -d {path} && rm {backing}")


def ours(example: str, *argv: str, fill: bool) -> Callable[[Guest], AbstractContextManager[Disk]]:
    """A disk served by one of our examples."""

    @contextmanager
    def up(guest: Guest) -> Iterator[Disk]:
        program = served.build_example(example)
        guest.run("modprobe ublk_drv")
        with served.serving(guest, [program, *argv]) as (server, path):
            disk = Disk(path, server.pid)
            yield _filled(guest, disk) if fill else disk

    return up


def _filled(guest: Guest, disk: Disk) -> Disk:
    guest.run(["fio", *_fio(disk.path, Workload("fill", "write", "1m", 8)), "--size=100%"], timeout=120)
    return disk


CONTESTANTS = (
    Contestant("null_blk", None, null_blk),
    Contestant("ublk null", "null_blk", ours("null_disk", str(DISK_BYTES), fill=False), "null_disk"),
    Contestant("brd", None, brd),
    Contestant("loop on tmpfs", "brd", loop),
    Contestant("ublk mem", "brd", ours("ramdisk", str(DISK_BYTES), fill=True), "ramdisk"),
)


@dataclass
class Measured:
    """What one contestant reached: IOPS per workload and round; peak memory of its idle server in bytes."""

    contestant: str
    against: str | None
    iops: dict[str, list[float]] = field(default_factory=dict)
    idle_peak_bytes: int | None = None

    def median(self, workload: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.iops[workload])


def _fio(path: str, workload: Workload) -> list[str]:
    return [
        *("--name=bench", f"--filename={path}", f"--rw={workload.rw}", f"--bs={workload.bs}"),
        *(f"--iodepth={workload.iodepth}", "--ioengine=io_uring", "--direct=1", "--gtod_reduce=1", "--norandommap"),
    ]


def iops_of(output: str) -> float:
    """IOPS of reads and writes together, from fio's JSON."""
    job = json.loads(output)["jobs"][0]
    return float(job["read"]["iops"]) + float(job["write"]["iops"])


def _round(guest: Guest, disk: Disk, measured: Measured, secs: float) -> None:
    for workload in WORKLOADS:
        argv = [
            *("fio", *_fio(disk.path, workload), f"--size={DISK_BYTES}"),
            *("--time_based", f"--runtime={secs:g}", "--output-format=json"),
        ]
        done = guest.run(argv, timeout=60 + 2 * secs)
        measured.iops.setdefault(workload.name, []).append(iops_of(done.out))


def _peak(guest: Guest, pid: int) -> int:
    status = guest.run(f"grep VmHWM /proc/{pid}/status").out.split()
    return int(status[1]) << 10


def ready(say: Callable[[str], None]) -> list[Contestant]:
    """Build what is served by us, before a guest has looked at the build; what there is not is named and left out."""
    found = []
    for contestant in CONTESTANTS:
        try:
            if contestant.example:
                served.build_example(contestant.example)
        except served.NoSuchExample as e:
            say(f"not measured: {contestant.name} ({e})")
        else:
            found.append(contestant)
    return found


def measure(
    guest: Guest, contestants: list[Contestant], rounds: int, secs: float, say: Callable[[str], None]
) -> list[Measured]:
    """All contestants side by side."""
    found: list[tuple[Disk, Measured]] = []
    with ExitStack() as stack:
        for contestant in contestants:
            disk = stack.enter_context(contestant.up(guest))
            measured = Measured(contestant.name, contestant.against)
            if disk.server_pid is not None:
                measured.idle_peak_bytes = _peak(guest, disk.server_pid)
            found.append((disk, measured))
        for n in range(rounds):
            for disk, measured in found:
                _round(guest, disk, measured, secs)
            say(f"round {n + 1} of {rounds}")
    return [measured for _, measured in found]


def table(results: list[Measured]) -> str:
    """Medians in thousands of IOPS, each with its ratio to what it is compared with."""
    by_name = {m.contestant: m for m in results}
    rows = [["", *(w.name for w in WORKLOADS), "idle server"]]
    for m in results:
        cells = []
        for w in WORKLOADS:
            median = m.median(w.name)
            base = by_name.get(m.against or "")
            ratio = f" ({median / base.median(w.name):.2f} of {base.contestant})" if base else ""
            cells.append(f"{median / 1000:.1f}k{ratio}")
        memory = f"{m.idle_peak_bytes / (1 << 20):.1f} MiB" if m.idle_peak_bytes else "-"
        rows.append([m.contestant, *cells, memory])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main(argv: list[str]) -> int:
    """Measure, print the table, keep the figures in artifacts/bench.json."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--secs", type=float, default=2.0, help="per contestant, workload and round")
    parser.add_argument("--kernel", default=kernels.SERIES[-1])
    parser.add_argument("--icount", action="store_true", help="count instructions: the same figures under any load")
    given = parser.parse_args(argv)
    shape = Shape(smp=1 if given.icount else 2, mem="3G", icount=given.icount)

    def say(text: str) -> None:
        print(f"bench: {text}", file=sys.stderr, flush=True)

    contestants = ready(say)
    try:
        with session.machine(shape, given.kernel, say, only_guests=True) as guest:
            results = measure(guest, contestants, given.rounds, given.secs, say)
    except (
        *(served.ServerMisbehaved, kernels.KernelError, MachineDied),
        *(CommandFailed, CommandTimeout, NothingInTime, ProcessEnded),
    ) as e:
        print(f"bench: FAILED: {e}", file=sys.stderr)
        return 1
    layout.ARTIFACTS.mkdir(exist_ok=True)
    (layout.ARTIFACTS / "bench.json").write_text(json.dumps([asdict(m) for m in results], indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
