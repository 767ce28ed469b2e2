"""`make demo`: a disk from a Rust program, from its first byte to a verified restart, step by step."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ublk_rig import served, session
from ublk_vm import kernels
from ublk_vm.channel import MachineDied
from ublk_vm.guest import CommandFailed, CommandTimeout, Guest
from ublk_vm.process import NothingInTime, ProcessEnded
from ublk_vm.vm import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK_BYTES = 256 << 20
FILES = 40
STEPS = 11


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


def show(guest: Guest, program: str, progress: Progress) -> None:
    """Everything after the machine is up."""
    work = guest.run("mktemp -d /tmp/ublk-demo.XXXXXX").out.strip()
    image, folder = f"{work}/disk.img", f"{work}/mnt"
    argv = [program, image, str(DISK_BYTES)]
    try:
        guest.run(f"mkdir {folder} && truncate -s {DISK_BYTES} {image}")
        progress.step(f"start the server: file_disk disk.img {DISK_BYTES}")
        with served.serving(guest, argv) as (_, device):
            size = guest.run(["blockdev", "--getsize64", device]).out.strip()
            progress.detail(f"{device} is a disk of {int(size) >> 20} MiB")
            progress.step(f"make a filesystem: mkfs.ext4 {device}")
            guest.run(["mkfs.ext4", "-q", device], timeout=120)
            progress.step(f"mount it and write {FILES} files")
            with _mounted(guest, device, folder):
                before = _write_files(guest, folder)
                progress.detail(guest.run(f"df -h --output=used {folder} | tail -1").out.strip() + " written")
                progress.step("unmount it")
            progress.step("stop the server: the disk is gone, its data is in disk.img")
        guest.run(f"test ! -e {device}")
        progress.step("start the server again on the same file")
        with served.serving(guest, argv) as (_, device):
            progress.detail(f"{device} is back")
            progress.step(f"check the filesystem: e2fsck -fn {device}")
            guest.run(["e2fsck", "-fn", device], timeout=120)
            progress.step("mount it and verify every checksum")
            with _mounted(guest, device, folder):
                after = _checksums(guest, folder)
            if before != after or len(after.splitlines()) != FILES:
                raise CommandFailed(f"the files differ after the restart:\n{before}\n{after}")
            progress.detail(f"all {FILES} files are what they were")
        guest.run(f"test ! -e {device}")
    finally:
        progress.step("clean up")
        guest.run(["rm", "-r", "--one-file-system", work])


def main() -> int:
    """Run the demo; the exit status says whether all of it was true."""
    progress = Progress()
    try:
        progress.step("build the server (cargo example file_disk)")
        program = served.build_example("file_disk")
        progress.step("get a machine with the ublk driver")
        with session.machine(Shape(), kernels.SERIES[-1], progress.detail) as guest:
            guest.run("modprobe ublk_drv && test -c /dev/ublk-control")
            show(guest, str(program), progress)
    except (
        *(served.NoSuchExample, served.ServerMisbehaved, kernels.KernelError, MachineDied),
        *(CommandFailed, CommandTimeout, NothingInTime, ProcessEnded),
    ) as e:
        print(f"demo: FAILED: {e}", file=sys.stderr)
        return 1
    progress.detail("done: a disk served from userspace kept its data across a restart", indent=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
