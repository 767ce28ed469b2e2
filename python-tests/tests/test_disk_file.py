"""The file target: what is on the disk is in the file, through a restart, in holes and on a block device."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from ublk_rig import testdisk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ublk_vm.guest import Guest

MIB = 1 << 20
SIZE = 16 * MIB


@contextmanager
def scratch(guest: Guest) -> Iterator[str]:
    """A folder on ext4 on the kernel's ramdisk: with direct I/O, holes and zeroed ranges."""
    guest.run("modprobe brd rd_nr=1 rd_size=65536")
    try:
        guest.run("mkfs.ext4 -q /dev/ram0 && mkdir -p /tmp/ext4 && mount /dev/ram0 /tmp/ext4")
        yield "/tmp/ext4"
        guest.run("umount /tmp/ext4")
    finally:
        guest.run("umount /tmp/ext4 2> /dev/null; modprobe -r brd")


def blocks(guest: Guest, path: str) -> int:
    """KiB that a file takes."""
    return int(guest.run(["stat", "-c", "%b", path]).out) // 2


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("options", ["direct=0", "direct=1", "direct=1 block=4096", "every_write=1"])
def test_a_file_holds_what_was_written_through_a_restart(guest: Guest, options: str) -> None:
    with scratch(guest) as folder, testdisk.serving(guest) as disks:
        what = ["target=file", f"path={folder}/img", f"size={SIZE}", *options.split()]
        disks.start(*what)
        assert blocks(guest, f"{folder}/img") < 64
        calls = [f"write:0:{MIB}:1", f"dsync:{MIB}:4096:2", f"write:{SIZE - 4096}:4096:3", "fsync"]
        assert disks.errnos(*calls) == [0] * 4
        # The same bytes at the same places: nothing but the disk's contents is in the file.
        there = guest.run(f"for at in 0 {MIB} {SIZE - 4096}; do od -An -tu1 -N1 -j$at {folder}/img; done")
        assert there.out.split() == ["1", "2", "3"]
        disks.stop()
        disks.start(*what)
        answers = disks.calls(
            f"read:0:{MIB}", f"read:{MIB}:4096", f"read:{SIZE - 4096}:4096", f"read:{2 * MIB}:{MIB}"
        )
        assert [(a["first"], a["same"]) for a in answers] == [(1, True), (2, True), (3, True), (0, True)]
        cache = "write through" if "every_write" in options else "write back"
        assert disks.attributes()["queue/write_cache"] == cache


@pytest.mark.vm(smp=4)
def test_discards_make_holes_and_zeroes_keep_their_space_where_asked(guest: Guest) -> None:
    with scratch(guest) as folder, testdisk.serving(guest) as disks:
        disks.start("target=file", f"path={folder}/img", f"size={SIZE}")
        disks.calls(f"write:0:{4 * MIB}:9", "fsync")
        full = blocks(guest, f"{folder}/img")
        assert full >= 4096
        guest.run(["blkdiscard", "--offset", "0", "--length", str(MIB), disks.path])
        assert blocks(guest, f"{folder}/img") <= full - 1024
        # Zeroed in place, then punched.
        guest.run(["blkdiscard", "--zeroout", "--offset", str(MIB), "--length", str(MIB), disks.path])
        assert full - 1100 < blocks(guest, f"{folder}/img") <= full - 1024
        guest.run(["fallocate", "--punch-hole", "--offset", str(2 * MIB), "--length", str(MIB), disks.path])
        assert blocks(guest, f"{folder}/img") <= full - 2048
        answers = disks.calls(*(f"read:{i * MIB}:{MIB}" for i in range(4)))
        assert [(a["first"], a["same"]) for a in answers] == [(0, True), (0, True), (0, True), (9, True)]


@pytest.mark.vm(smp=4)
def test_zeroes_are_written_where_the_file_system_cannot_make_them(guest: Guest) -> None:
    # tmpfs has holes but no zeroed ranges.
    guest.run("mkdir /tmp/tmpfs && mount -t tmpfs none /tmp/tmpfs")
    try:
        with testdisk.serving(guest, "target=file", "path=/tmp/tmpfs/img", f"size={SIZE}") as disks:
            disks.calls(f"write:0:{4 * MIB}:9", "fsync")
            guest.run(["blkdiscard", "--zeroout", "--offset", str(MIB), "--length", str(MIB), disks.path])
            assert blocks(guest, "/tmp/tmpfs/img") == 4096
            answers = disks.calls(*(f"read:{i * MIB}:{MIB}" for i in range(4)))
            assert [(a["first"], a["same"]) for a in answers] == [(9, True), (0, True), (9, True), (9, True)]
            assert disks.stats()["write_zeroes"]["errors"] == 0
    finally:
        guest.run("umount /tmp/tmpfs && rmdir /tmp/tmpfs")


@pytest.mark.vm(smp=4)
def test_a_flush_reaches_the_file_and_a_fua_write_is_durable(guest: Guest) -> None:
    """A disk on the file of a disk: the lower one counts what the upper one's file target does."""
    with testdisk.serving(guest) as disks:
        lower = disks.start("target=test", f"size={SIZE}")
        number = disks.ready[-1]["id"]
        disks.start("target=file", f"path={lower}", "direct=1")

        def flushes() -> int:
            count: int = disks.ask("stats", id=number)["backend"]["flush"]
            return count

        before = flushes()
        assert disks.errnos("write:0:4096", "fsync", "write:4096:4096", "fsync") == [0] * 4
        assert flushes() == before + 2
        before = disks.ask("stats", id=number)["backend"]["fua"]
        assert disks.errnos("dsync:8192:4096") == [0]
        assert disks.ask("stats", id=number)["backend"]["fua"] == before + 1
        # A flush that fails below fails above.
        disks.ask("arm", id=number, action="error", errno=5, op="flush")
        assert disks.errnos("write:0:4096", "fsync") == [0, 5]
        disks.ask("heal", id=number)
        # Discards and zeroes go down as well.
        guest.run(["blkdiscard", "--zeroout", "--offset", "0", "--length", str(MIB), disks.path])
        assert [0, MIB, True] in disks.ask("stats", id=number)["backend"]["zeroes"]
        assert disks.stop()["stopped"]["leftovers"] == []


@pytest.mark.vm(smp=4)
def test_a_block_device_in_use_and_a_missing_file_are_refused(guest: Guest) -> None:
    with scratch(guest) as folder, testdisk.serving(guest) as disks:
        with pytest.raises(testdisk.Refused, match="mounted or claimed") as refused:
            disks.start("target=file", "path=/dev/ram0")
        assert refused.value.kind == "Busy"
        with pytest.raises(testdisk.Refused, match=r"/no/such/file.*ENOENT"):
            disks.start("target=file", "path=/no/such/file")
        # The file system's block, 4096, is more than these: fine for buffered I/O, and for direct on a ramdisk.
        guest.run(["truncate", "-s", "1000", f"{folder}/odd"])
        with pytest.raises(testdisk.Refused, match=r"1000 bytes.*truncate"):
            disks.start("target=file", f"path={folder}/odd")
        assert testdisk.devices(guest) == []


@pytest.mark.vm(smp=4)
def test_a_file_that_shrinks_fails_reads_beyond_its_end(guest: Guest) -> None:
    guest.run(["truncate", "-s", str(SIZE), "/tmp/shrinks"])
    with testdisk.serving(guest, "target=file", "path=/tmp/shrinks") as disks:
        guest.run(["truncate", "-s", str(MIB), "/tmp/shrinks"])
        assert disks.errnos(f"read:{MIB - 4096}:4096", f"read:{MIB}:4096", f"write:{MIB}:4096") == [0, 5, 0]
        assert disks.errnos(f"read:{MIB}:4096") == [0]
    guest.run(["rm", "/tmp/shrinks"])
