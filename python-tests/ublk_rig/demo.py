"""`make demo`: disks from Python programs, from the first byte to a verified restart, step by step."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ublk_rig import layout, served, session, wheel
from ublk_vm import kernels
from ublk_vm.channel import MachineDied
from ublk_vm.guest import CommandFailed, CommandTimeout, Guest
from ublk_vm.process import NothingInTime, ProcessEnded
from ublk_vm.vm import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DISK_BYTES = 256 << 20
FILES = 40
STEPS = 15
# The programs of the README and of docs/python.md.
EXAMPLES = layout.TREE / "ublk-py/examples"


class Progress:
    """Numbers the steps and tells the time."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._step = 0

    def step(self, text: str) -> None:
        """A step begins."""
        self._step += 1
        self.detail(f"[{self._step:2}/{STEPS}] {text}", indent=0)

    def detail(self, text: str, indent: int = 8) -> None:
        """Something worth knowing about the step."""
        print(f"{time.monotonic() - self._began:6.1f} s  {' ' * indent}{text}", flush=True)


def _write_files(guest: Guest, folder: str) -> str:
    """Files of many sizes, flushed to the disk; the answer is their checksums."""
    guest.run(
        f"cd {folder} && mkdir d0 d1 d2 d3 && for i in $(seq {FILES}); do"
        " head -c $((i * i * 300 + i)) /dev/urandom > d$((i % 4))/file$i; done && sync -f .",
        timeout=120,
    )
    return _checksums(guest, folder)


def _checksums(guest: Guest, folder: str) -> str:
    return guest.run(f"cd {folder} && find . -type f -print0 | sort -z | xargs -0 sha256sum", timeout=120).out


@contextmanager
def _mounted(guest: Guest, device: str, folder: str) -> Iterator[None]:
    guest.run(["mount", device, folder])
    try:
        yield
    finally:
        guest.run(["umount", folder], timeout=120)


@dataclass(frozen=True)
class Programs:
    """What is shown: command lines of Python programs, which print their disk's path and end by Ctrl-C."""

    ramdisk: tuple[str, ...] = (sys.executable, "-u", str(EXAMPLES / "ramdisk.py"))
    # Told the file and its size.
    file_disk: tuple[str, ...] = (sys.executable, "-u", str(EXAMPLES / "file_disk.py"))


def show(guest: Guest, programs: Programs, progress: Progress) -> None:
    """Everything after the machine is up."""
    work = guest.run("mktemp -d /tmp/ublk-demo.XXXXXX").out.strip()
    try:
        guest.run(f"mkdir {work}/mnt")
        _in_memory(guest, programs.ramdisk, f"{work}/mnt", progress)
        _in_a_file(guest, [*programs.file_disk, f"{work}/disk.img", str(DISK_BYTES)], f"{work}/mnt", progress)
    finally:
        progress.step("clean up")
        guest.run(["rm", "-r", "--one-file-system", work])


def _in_memory(guest: Guest, argv: Sequence[str], folder: str, progress: Progress) -> None:
    """The README's program."""
    progress.step("start the README's ten lines of Python: python ramdisk.py")
    with served.serving(guest, argv, stop=served.interrupt) as (_, device):
        _size(guest, device, progress)
        progress.step(f"make a filesystem: mkfs.ext4 {device}")
        guest.run(["mkfs.ext4", "-q", device], timeout=120)
        progress.step(f"mount it, write {FILES} files, mount it anew and verify them")
        with _mounted(guest, device, folder):
            before = _write_files(guest, folder)
        with _mounted(guest, device, folder):
            _compare(before, _checksums(guest, folder), progress)
        progress.step("Ctrl-C: the disk is gone, and its data with it")
    guest.run(f"test ! -e {device}")


def _in_a_file(guest: Guest, argv: Sequence[str], folder: str, progress: Progress) -> None:
    """Data that outlives the program."""
    progress.step(f"start a disk that keeps its data: python file_disk.py disk.img {DISK_BYTES}")
    with served.serving(guest, argv, stop=served.interrupt) as (_, device):
        _size(guest, device, progress)
        progress.step(f"make a filesystem: mkfs.ext4 {device}")
        guest.run(["mkfs.ext4", "-q", device], timeout=120)
        progress.step(f"mount it and write {FILES} files")
        with _mounted(guest, device, folder):
            before = _write_files(guest, folder)
            progress.detail(guest.run(f"df -h --output=used {folder} | tail -1").out.strip() + " written")
            progress.step("unmount it")
        progress.step("Ctrl-C: the disk is gone, its data is in disk.img")
    guest.run(f"test ! -e {device}")
    progress.step("start the program again on the same file")
    with served.serving(guest, argv, stop=served.interrupt) as (_, device):
        progress.detail(f"{device} is back")
        progress.step(f"check the filesystem: e2fsck -fn {device}")
        guest.run(["e2fsck", "-fn", device], timeout=120)
        progress.step("mount it and verify every checksum")
        with _mounted(guest, device, folder):
            _compare(before, _checksums(guest, folder), progress)
    guest.run(f"test ! -e {device}")


def _size(guest: Guest, device: str, progress: Progress) -> None:
    size = guest.run(["blockdev", "--getsize64", device]).out.strip()
    progress.detail(f"{device} is a disk of {int(size) >> 20} MiB")


def _compare(before: str, after: str, progress: Progress) -> None:
    if before != after or len(after.splitlines()) != FILES:
        raise CommandFailed(f"the files are not what was written:\n{before}\n{after}")
    progress.detail(f"all {FILES} files are what they were")


def main() -> int:
    """Run the demo; the exit status says whether all of it was true."""
    progress = Progress()
    try:
        progress.step("see that the package in .venv is the tree's")
        wheel.current()
        progress.step("get a machine with the ublk driver")
        with session.machine(Shape(), kernels.SERIES[-1], progress.detail) as guest:
            guest.run("modprobe ublk_drv && test -c /dev/ublk-control")
            show(guest, Programs(), progress)
    except (
        *(wheel.CannotBuild, served.ServerMisbehaved, kernels.KernelError, MachineDied),
        *(CommandFailed, CommandTimeout, NothingInTime, ProcessEnded),
    ) as e:
        print(f"demo: FAILED: {e}", file=sys.stderr)
        return 1
    progress.detail("done: a disk served from Python kept its data across a restart", indent=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
