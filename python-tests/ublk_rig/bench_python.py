"""Python beside its alternatives: the README's ramdisk, nbdkit's Python plugin, nbdkit in C, our target in Rust."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ublk_rig import layout, served
from ublk_rig.contest import Contest, Contestant, Disk, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from ublk_vm.guest import Guest

DISK_BYTES = 64 << 20
README_PROGRAM = layout.TREE / "ublk-py/examples/ramdisk.py"

WORKLOADS = (
    Workload("4k randread qd64", "randread", "4k", 64),
    Workload("4k randwrite qd64", "randwrite", "4k", 64),
    Workload("4k randread qd1", "randread", "4k", 1),
    Workload("4k randwrite qd1", "randwrite", "4k", 1),
)
# The same disk for nbdkit, with as much concurrency as it can have.
NBDKIT_PROGRAM = f"""
import nbdkit

API_VERSION = 2
disk = bytearray({DISK_BYTES})

def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def open(readonly): return 1
def get_size(h): return len(disk)
def pread(h, buf, offset, flags): buf[:] = disk[offset:offset + len(buf)]
def pwrite(h, buf, offset, flags): disk[offset:offset + len(buf)] = buf
def flush(h, flags): pass
"""
MEM_PROGRAM = f"""
import ublk
with ublk.Device(ublk.Mem({DISK_BYTES})) as dev:
    print(dev.path)
    dev.wait()
"""


def python(*argv: str) -> Callable[[Guest], AbstractContextManager[Disk]]:
    """A disk of a Python program that prints its path and ends by Ctrl-C."""

    @contextmanager
    def up(guest: Guest) -> Iterator[Disk]:
        guest.run("modprobe ublk_drv")
        with served.serving(guest, [sys.executable, "-u", *argv], stop=served.interrupt) as (server, path):
            yield Disk(path, server.pid)

    return up


@contextmanager
def rust_mem(guest: Guest) -> Iterator[Disk]:
    """The same target as `ublk.Mem`, from a Rust program."""
    guest.run("modprobe ublk_drv")
    program = served.build_example("bench_disk")
    argv = [str(program), "mem", f"size={DISK_BYTES}", "queues=1", "depth=128"]
    with served.serving(guest, argv) as (server, path):
        yield Disk(path, server.pid)


def nbd(number: int, *plugin: str, script: str = "") -> Callable[[Guest], AbstractContextManager[Disk]]:
    """A disk of nbdkit's, over a socket of this machine and the kernel's own client; SCRIPT is the script's path."""

    @contextmanager
    def up(guest: Guest) -> Iterator[Disk]:
        guest.run("modprobe nbd nbds_max=4")
        folder = guest.run("mktemp -d").out.strip()
        socket, path = f"{folder}/socket", f"/dev/nbd{number}"
        # It tells that it listens by its pid file.
        told = f"{folder}/pid"
        guest.run(f"cat > {folder}/disk.py", stdin=script)
        guest.run(
            [
                "nbdkit",
                "--unix",
                socket,
                "--pidfile",
                told,
                *(w.replace("SCRIPT", f"{folder}/disk.py") for w in plugin),
            ]
        )
        pid = guest.run(["cat", told]).out.strip()
        try:
            guest.run(["nbd-client", "-unix", socket, path])
            try:
                yield Disk(path, int(pid))
            finally:
                guest.run(["nbd-client", "-d", path])
        finally:
            guest.run(f"kill {pid}; tail --pid={pid} -f /dev/null; rm -r {folder}")

    return up


CONTEST = Contest(
    "Python",
    DISK_BYTES,
    (
        Contestant("Python RamDisk", python(str(README_PROGRAM)), fill=True),
        Contestant("nbdkit, Python", nbd(0, "python", "SCRIPT", script=NBDKIT_PROGRAM), fill=True),
        Contestant("nbdkit memory, C", nbd(1, "memory", str(DISK_BYTES)), fill=True),
        Contestant("ublk.Mem", python("-c", MEM_PROGRAM), fill=True),
        Contestant("Rust Mem", rust_mem, fill=True),
    ),
    WORKLOADS,
    (
        ("Python RamDisk", "nbdkit, Python"),
        ("Python RamDisk", "nbdkit memory, C"),
        ("Python RamDisk", "ublk.Mem"),
        ("ublk.Mem", "Rust Mem"),
    ),
)
