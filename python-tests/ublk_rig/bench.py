"""`make bench`: our disks against the kernel's own, and Python's against nbdkit's, as medians of interleaved rounds.

Every round measures every contestant once, so that a machine which slows down half-way slows all of them, and each
round begins with another one. Figures from an emulated processor compare with each other and with nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ublk_rig import bench_python, capi, layout, served, session
from ublk_rig.contest import Contest, Contestant, Disk, Workload
from ublk_vm import kernels
from ublk_vm.channel import MachineDied
from ublk_vm.guest import CommandFailed, CommandTimeout, Guest
from ublk_vm.process import NothingInTime, ProcessEnded
from ublk_vm.vm import Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

DISK_BYTES = 256 << 20
QUEUES, DEPTH = 1, 128
# Rounds that differ by more than this were not under the same conditions.
STEADY = 2.0


WORKLOADS = (
    Workload("4k randread qd1", "randread", "4k", 1),
    Workload("4k randread qd32", "randread", "4k", 32),
    Workload("4k randwrite qd32", "randwrite", "4k", 32),
    Workload("128k read qd8", "read", "128k", 8),
)


@contextmanager
def null_blk(guest: Guest) -> Iterator[Disk]:
    """The kernel's disk that does nothing: the cost of the block layer alone."""
    guest.run(
        f"modprobe null_blk nr_devices=1 queue_mode=2 irqmode=0 gb=1 submit_queues={QUEUES} hw_queue_depth={DEPTH}"
    )
    try:
        yield Disk("/dev/nullb0")
    finally:
        guest.run("modprobe -r null_blk")


@contextmanager
def brd(guest: Guest) -> Iterator[Disk]:
    """The kernel's ramdisk."""
    guest.run(f"modprobe brd rd_nr=1 rd_size={DISK_BYTES >> 10}")
    try:
        yield Disk("/dev/ram0")
    finally:
        guest.run("modprobe -r brd")


@contextmanager
def loop(guest: Guest) -> Iterator[Disk]:
    """The kernel's loop driver over a file in memory."""
    backing = "/dev/shm/ublk-bench.img"  # noqa: S108 - tmpfs is the point
    guest.run(f"modprobe loop && truncate -s {DISK_BYTES} {backing}")
    path = guest.run(["losetup", "--find", "--show", backing]).out.strip()
    try:
        yield Disk(path)
    finally:
        guest.run(f"losetup -d {path} && rm {backing}")


def ours(kind: str, *options: str) -> Callable[[Guest], AbstractContextManager[Disk]]:
    """A disk served by the example `bench_disk`."""

    @contextmanager
    def up(guest: Guest) -> Iterator[Disk]:
        program = served.build_example("bench_disk")
        guest.run("modprobe ublk_drv")
        argv = [str(program), kind, f"size={DISK_BYTES}", f"queues={QUEUES}", f"depth={DEPTH}", *options]
        with served.serving(guest, argv) as (server, path):
            yield Disk(path, server.pid)

    return up


def our_file(*options: str) -> Callable[[Guest], AbstractContextManager[Disk]]:
    """A disk that is a file in memory."""

    @contextmanager
    def up(guest: Guest) -> Iterator[Disk]:
        backing = guest.run("mktemp -u -p /dev/shm ublk-bench.XXXXXX").out.strip()
        with ours("file", f"path={backing}", *options)(guest) as disk:
            yield disk
        guest.run(["rm", backing])

    return up


def in_c(style: str) -> Callable[[Guest], AbstractContextManager[Disk]]:
    """A disk that keeps nothing, served through the C library."""

    @contextmanager
    def up(guest: Guest) -> Iterator[Disk]:
        program = capi.program(capi.TESTS / "null.c")
        guest.run("modprobe ublk_drv")
        argv = [str(program), style, f"size={DISK_BYTES}", f"queues={QUEUES}", f"queue_depth={DEPTH}"]
        with served.serving(guest, argv) as (server, path):
            yield Disk(path, server.pid)

    return up


# A page or chunk that was never written is read without being copied: what keeps data is filled first.
CONTESTANTS = (
    Contestant("null_blk", null_blk),
    Contestant("ublk null", ours("null")),
    Contestant("ublk null, batch", ours("null", "batch=1"), newest=True),
    Contestant("ublk null in C", in_c("calls")),
    Contestant("ublk null in C, submit", in_c("submit")),
    Contestant("brd", brd, fill=True),
    Contestant("loop on tmpfs", loop, fill=True),
    Contestant("ublk mem", ours("mem"), fill=True),
    Contestant("ublk mem, user copy", ours("mem", "data=user-copy"), fill=True),
    Contestant("ublk file on tmpfs", our_file(), fill=True),
    Contestant("ublk file on tmpfs, copied", our_file("data=copy"), fill=True),
)
RATIOS = (
    ("ublk null", "null_blk"),
    ("ublk null, batch", "ublk null"),
    ("ublk null in C", "ublk null"),
    ("ublk null in C, submit", "ublk null"),
    ("ublk mem", "brd"),
    ("ublk mem", "loop on tmpfs"),
    ("ublk mem, user copy", "ublk mem"),
    ("ublk file on tmpfs", "loop on tmpfs"),
    ("ublk file on tmpfs", "ublk file on tmpfs, copied"),
    ("loop on tmpfs", "brd"),
)
CONTEST = Contest("Rust", DISK_BYTES, CONTESTANTS, WORKLOADS, RATIOS)
CONTESTS = (CONTEST, bench_python.CONTEST)
# Disks on shared workers, to see what one more takes.
CROWD = 64


@dataclass(frozen=True)
class Memory:
    """What a server took when its disk was up and idle, in bytes: at most so far (VmHWM), and at that moment."""

    peak: int
    resident: int


@dataclass
class Measured:
    """What one contestant reached: IOPS per workload and round; the memory of its idle server, if it has one."""

    contestant: str
    iops: dict[str, list[float]] = field(default_factory=dict)
    idle: Memory | None = None


def _options(workload: Workload) -> list[str]:
    return [f"--rw={workload.rw}", f"--bs={workload.bs}", f"--iodepth={workload.iodepth}"]


def _fill(guest: Guest, disk: Disk, size: int) -> None:
    how = ["--name=fill", *_options(Workload("fill", "write", "1m", 8)), "--ioengine=io_uring", "--direct=1"]
    guest.run(["fio", *how, f"--filename={disk.path}", f"--size={size}"], timeout=120)


def iops_of(output: str) -> dict[str, float]:
    """IOPS of reads and writes together, by job, from fio's JSON."""
    jobs = json.loads(output)["jobs"]
    return {job["jobname"]: float(job["read"]["iops"]) + float(job["write"]["iops"]) for job in jobs}


def _round(guest: Guest, contest: Contest, disk: Disk, measured: Measured, secs: float) -> None:
    """All workloads, one after the other, in one fio: under emulation its start takes seconds."""
    argv = ["fio", "--output-format=json", "--ioengine=io_uring", "--direct=1", "--gtod_reduce=1", "--norandommap"]
    argv += [
        f"--filename={disk.path}",
        f"--size={contest.disk_bytes}",
        "--time_based",
        f"--runtime={secs:g}",
        "--thread",
    ]
    for workload in contest.workloads:
        argv += [f"--name={workload.name}", "--stonewall", *_options(workload)]
    done = guest.run(argv, timeout=60 + 3 * secs * len(contest.workloads))
    for name, iops in iops_of(done.out).items():
        if not iops:
            raise CommandFailed(f"{measured.contestant}: no I/O in {name}: {done}")
        measured.iops.setdefault(name, []).append(iops)


def memory_of(status: str) -> Memory:
    """From /proc/PID/status."""
    lines = (line.split() for line in status.splitlines())
    kib = {words[0]: int(words[1]) for words in lines if words[0] in {"VmHWM:", "VmRSS:"}}
    return Memory(kib["VmHWM:"] << 10, kib["VmRSS:"] << 10)


def _up(guest: Guest, contestant: Contestant, size: int, stack: ExitStack) -> tuple[Disk, Measured]:
    disk = stack.enter_context(contestant.up(guest))
    measured = Measured(contestant.name)
    if disk.server_pid is not None:
        # Before any of its contents count.
        measured.idle = memory_of(guest.run(["cat", f"/proc/{disk.server_pid}/status"]).out)
    if contestant.fill:
        _fill(guest, disk, size)
    return disk, measured


def measure(guest: Guest, contest: Contest, rounds: int, secs: float, say: Callable[[str], None]) -> list[Measured]:
    """All contestants side by side."""
    with ExitStack() as stack:
        found = []
        for contestant in contest.contestants:
            if contestant.newest and not guest.release.startswith(kernels.SERIES[-1]):
                say(f"without {contestant.name}: Linux {guest.release} is too old")
                continue
            say(f"bringing up {contestant.name}")
            found.append(_up(guest, contestant, contest.disk_bytes, stack))
        for n in range(rounds):
            first = n % len(found)
            for disk, measured in found[first:] + found[:first]:
                say(f"round {n + 1} of {rounds}: {measured.contestant}")
                _round(guest, contest, disk, measured, secs)
    return [measured for _, measured in found]


def crowd(guest: Guest) -> str:
    """What many idle disks take."""
    each = {}
    for count in (2, CROWD):
        with ours("null", f"count={count}")(guest) as disk:
            each[count] = memory_of(guest.run(["cat", f"/proc/{disk.server_pid}/status"]).out).resident
    one = (each[CROWD] - each[2]) / (CROWD - 2) / 1024
    return f"{CROWD} idle disks on 2 shared workers: {_mib(each[CROWD])} resident; one more disk takes {one:.0f} KiB."


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def table(contest: Contest, results: list[Measured]) -> str:
    """Medians (and extremes) in thousands of I/Os a second with each idle server's memory; then the ratios."""
    names = [w.name for w in contest.workloads]
    rows = [["kIOPS, median (least-most)", *names, "idle server: peak (VmHWM)", "resident (VmRSS)"]]
    for m in results:
        memory = [_mib(m.idle.peak), _mib(m.idle.resident)] if m.idle else ["", ""]
        rows.append([m.contestant, *(_spread([n / 1000 for n in m.iops[name]], ".1f") for name in names), *memory])
    by_name = {m.contestant: m for m in results}
    ratios = [["ratio, median over the rounds (least-most)", *names]]
    for ours_, theirs in contest.ratios:
        if ours_ not in by_name or theirs not in by_name:
            continue
        # Within a round both met the same load, or nearly.
        pairs = {n: zip(by_name[ours_].iops[n], by_name[theirs].iops[n], strict=True) for n in names}
        ratios.append([f"{ours_} / {theirs}", *(_spread([a / b for a, b in pairs[n]], ".2f") for n in names)])
    return f"{_markdown(rows)}\n\n{_markdown(ratios)}"


def doubts(results: list[Measured]) -> str:
    """What makes the figures worth little, if anything does."""
    spread = max(max(values) / min(values) for m in results for values in m.iops.values())
    if spread < STEADY:
        return ""
    return (
        f"The same thing was up to {spread:.0f} times as fast in one round as in another: something else used the"
        " machine. Measure again when it is idle, with more --rounds, or with --icount."
    )


def conditions(guest: Guest, rounds: int, secs: float, *, icount: bool) -> str:
    """Under which circumstances this was measured."""
    text = (
        f"Linux {guest.release}, {guest.cpus} CPUs; {rounds} rounds of {secs:g} s each; disks of"
        f" {DISK_BYTES >> 20} MiB ({bench_python.DISK_BYTES >> 20} MiB of Python's); ublk disks and null_blk with"
        f" {QUEUES} queue of depth {DEPTH}."
    )
    if guest.emulated:
        text += " The processor is emulated: compare the figures with each other and with nothing else."
    if icount:
        text += " Instructions are counted in place of time."
    return text


def main(argv: list[str]) -> int:
    """Measure, print the table, keep the figures in artifacts/bench.json."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--secs", type=float, default=2.0, help="per contestant, workload and round")
    parser.add_argument("--kernel", default=kernels.SERIES[-1])
    parser.add_argument("--table", choices=[c.name for c in CONTESTS], help="only this one")
    parser.add_argument("--only", default="", help="contestants whose name begins with this")
    parser.add_argument("--icount", action="store_true", help="count instructions: the same figures under any load")
    given = parser.parse_args(argv)
    shape = Shape(smp=1 if given.icount else 2, mem="3G", icount=given.icount)

    def say(text: str) -> None:
        print(f"bench: {text}", file=sys.stderr, flush=True)

    try:
        say("building the servers (cargo example bench_disk)")
        # Before a guest looks at the host's files.
        served.build_example("bench_disk")
        capi.program(capi.TESTS / "null.c")
        with session.machine(shape, given.kernel, say, only_guests=True) as guest:
            contests = [c.only(given.only) for c in CONTESTS if given.table in {None, c.name}]
            results = {c.name: measure(guest, c, given.rounds, given.secs, say) for c in contests}
            many = ""
            if CONTEST in contests:
                say("many disks")
                many = crowd(guest)
            under = conditions(guest, given.rounds, given.secs, icount=given.icount)
    except (
        *(capi.CannotBuild, served.NoSuchExample, served.ServerMisbehaved, kernels.KernelError, MachineDied),
        *(CommandFailed, CommandTimeout, NothingInTime, ProcessEnded),
    ) as e:
        print(f"bench: FAILED: {e}", file=sys.stderr)
        return 1
    layout.ARTIFACTS.mkdir(exist_ok=True)
    kept = {"conditions": under, "crowd": many}
    figures = {name: [asdict(m) for m in measured] for name, measured in results.items()}
    (layout.ARTIFACTS / "bench.json").write_text(json.dumps({**kept, **figures}, indent=1) + "\n")
    tables = [table(contest, results[contest.name]) for contest in contests]
    unsteady = doubts([m for measured in results.values() for m in measured])
    print("\n\n".join(text for text in (under, *tables, many, unsteady) if text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
