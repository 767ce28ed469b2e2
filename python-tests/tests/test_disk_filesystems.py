"""File systems on our disks: made, filled, checked, and still there on the next device of the same contents."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from ublk_rig import testdisk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ublk_vm.guest import Guest

# mkfs.xfs wants 300 MiB; the disks are sparse.
SIZE = 320 << 20
MAKE = {
    "ext4": ["mkfs.ext4", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
}
CHECK = {
    "ext4": ["e2fsck", "-fn"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
}


@contextmanager
def mounted(guest: Guest, disk: str, folder: str, *options: str) -> Iterator[None]:
    """A mount for the length of a block."""
    guest.run(["mount", *options, disk, folder])
    try:
        yield
    finally:
        guest.run(["umount", folder])


def checksums(guest: Guest, folder: str) -> str:
    """Of all files."""
    return guest.run(f"cd {folder} && find . -type f | sort | xargs sha256sum").out


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("target", ["mem", "file"])
@pytest.mark.parametrize("kind", list(MAKE))
def test_a_file_system_is_made_filled_checked_and_found_again(guest: Guest, kind: str, target: str) -> None:
    folder = guest.run(["mktemp", "-d"]).out.strip()
    where = f"path={folder}/img" if target == "file" else "contents=kept"
    options = [f"target={target}", where, f"size={SIZE}", "queues=2"]
    top = f"{folder}/top"
    with testdisk.serving(guest, *options) as disks:
        guest.run([*MAKE[kind], disks.path], timeout=120)
        guest.run(["mkdir", top])
        with mounted(guest, disks.path, top):
            guest.run(
                f"cd {top} && mkdir d && for i in 1 2 3 4 5 6 7 8; do"
                " head -c $((i * 200003)) /dev/urandom > d/file$i; done; rm d/file3; sync d/file4; ln d/file5 d/link"
            )
            before = checksums(guest, top)
        guest.run([*CHECK[kind], disks.path], timeout=120)
        assert disks.stop()["stopped"]["leftovers"] == []
        # A process that writes to the file by itself would not be noticed by a page cache of the disk's.
        disks.start(*options)
        guest.run([*CHECK[kind], disks.path], timeout=120)
        with mounted(guest, disks.path, top, "-o", "ro"):
            assert checksums(guest, top) == before
        assert len(before.splitlines()) == 8
        stats = disks.stats()
        assert all(stats[op]["errors"] == 0 for op in ("read", "write", "flush", "discard", "write_zeroes"))
    guest.run(["rm", "-r", "--one-file-system", folder])


@pytest.mark.vm(smp=4)
def test_trimming_a_file_system_gives_memory_back(guest: Guest) -> None:
    with testdisk.serving(guest, "target=mem", f"size={SIZE}") as disks:
        guest.run(["mkfs.ext4", "-q", disks.path])
        folder = guest.run(["mktemp", "-d"]).out.strip()
        empty = disks.used()
        with mounted(guest, disks.path, folder):
            guest.run(f"head -c 40M /dev/urandom > {folder}/big && sync -f {folder}")
            assert disks.used() > empty + (39 << 20)
            guest.run(f"rm {folder}/big && sync -f {folder} && fstrim {folder}")
            assert disks.used() < empty + (8 << 20)
        guest.run(["rmdir", folder])
