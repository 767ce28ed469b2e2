"""Zoned disks under programs that know zones: fio, blkzone, btrfs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ublk_rig import testdisk

if TYPE_CHECKING:
    from ublk_vm.guest import Guest

ZONE = 4 << 20
# Zones hold less than they are long; two of them are conventional.
ZONED = ["target=zoned", f"zone={ZONE}", f"zone_capacity={3 << 20}", "conventional=2", "max_open=4", "max_active=6"]


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("rw", ["write", "randwrite"])
def test_what_fio_writes_to_zones_it_reads_back(guest: Guest, rw: str) -> None:
    with testdisk.serving(guest, *ZONED, f"size={32 * ZONE}", "block=4096", "queues=2") as disks:
        guest.run(
            [
                *("fio", "--name=v", f"--filename={disks.path}", "--direct=1", "--zonemode=zbd", "--thread"),
                *(f"--rw={rw}", "--bs=64k", "--ioengine=libaio", "--iodepth=8", "--max_open_zones=4"),
                *(f"--offset={2 * ZONE}", f"--size={16 * ZONE}", "--io_size=16M"),
                *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1"),
            ],
            timeout=120,
        )
        stats = disks.stats()
    assert stats["write"]["bytes"] >= 16 << 20
    assert stats["read"]["bytes"] >= 16 << 20
    assert stats["zone_report"]["completed"] > 0
    assert [stats[op]["errors"] for op in ("read", "write", "zone_report", "zone_action")] == [0, 0, 0, 0]
    assert stats["rejected"] == 0


@pytest.mark.vm(smp=4)
def test_blkzone_does_to_zones_what_it_is_told(guest: Guest) -> None:
    with testdisk.serving(guest, *ZONED, f"size={16 * ZONE}") as disks:

        def zones() -> list[str]:
            """One line a zone."""
            return guest.run(["blkzone", "report", disks.path]).out.splitlines()

        def act(what: str, zone: int) -> None:
            guest.run(["blkzone", what, "-o", str(zone * ZONE // 512), "-c", "1", disks.path])

        report = zones()
        assert len(report) == 16
        assert "CONVENTIONAL" in report[1], report
        assert "SEQ_WRITE_REQUIRED" in report[2], report
        assert "cap 0x001800" in report[2], report
        act("open", 2)
        assert "(oe)" in zones()[2], zones()[2]
        guest.run(["dd", "if=/dev/zero", f"of={disks.path}", "bs=4096", f"seek={2 * ZONE // 4096}", "count=3",
                   "oflag=direct", "conv=notrunc"])  # fmt: skip
        assert "wptr 0x000018" in zones()[2], zones()[2]
        act("finish", 2)
        assert "(fu)" in zones()[2], zones()[2]
        act("reset", 2)
        assert "(em)" in zones()[2], zones()[2]
        assert "wptr 0x000000" in zones()[2], zones()[2]


@pytest.mark.vm(smp=4)
def test_four_writers_on_btrfs_find_what_they_appended(guest: Guest) -> None:
    options = ["target=zoned", f"zone={ZONE}", f"size={80 * ZONE}", "block=4096", "queues=4", "depth=32"]
    folder = guest.run(["mktemp", "-d"]).out.strip()
    with testdisk.serving(guest, *options) as disks:
        guest.run(["mkfs.btrfs", "-q", "-K", "-O", "zoned", "-d", "single", "-m", "single", disks.path], timeout=60)
        guest.run(["mount", disks.path, folder], timeout=60)
        guest.run(
            f"cd {folder} && for i in 1 2 3 4; do"
            " (for j in 1 2 3 4 5; do head -c 400003 /dev/urandom > f$i-$j; sync f$i-$j; done) & done; wait",
            timeout=90,
        )
        sums = guest.run(f"cd {folder} && sha256sum f*").out
        assert len(sums.splitlines()) == 20
        guest.run(["umount", folder], timeout=60)
        guest.run(["mount", disks.path, folder], timeout=60)
        again = guest.run(f"cd {folder} && sha256sum f*").out
        guest.run(["umount", folder], timeout=60)
        stats = disks.stats()
    assert again == sums
    assert stats["zone_append"]["bytes"] >= 20 * 400003
    assert [stats[op]["errors"] for op in ("read", "write", "zone_append", "zone_report")] == [0, 0, 0, 0]
    assert stats["rejected"] == 0
