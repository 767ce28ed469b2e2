"""What clients ask for is what the backend is asked for: discards, zeroes, flushes, FUA, limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ublk_rig import testdisk

if TYPE_CHECKING:
    from ublk_vm.guest import Guest


MIB = 1 << 20
VIAS = ["backend", "async", "handler"]


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("via", VIAS)
def test_a_discard_arrives_with_its_range(guest: Guest, via: str) -> None:
    with testdisk.serving(guest, "target=test", f"via={via}") as disks:
        guest.run(["blkdiscard", "--offset", str(MIB), "--length", str(4 * MIB), disks.path])
        assert disks.backend()["discards"] == [[MIB, 4 * MIB]]
        assert disks.stats()["discard"] == {"completed": 1, "bytes": 0, "errors": 0}


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("via", VIAS)
def test_a_write_of_zeroes_arrives_with_its_range_and_flag(guest: Guest, via: str) -> None:
    with testdisk.serving(guest, "target=test", f"via={via}") as disks:
        disks.calls(f"write:0:{2 * MIB}:90")
        guest.run(["blkdiscard", "--zeroout", "--offset", str(MIB), "--length", str(MIB), disks.path])
        guest.run(["fallocate", "--punch-hole", "--offset", "0", "--length", str(MIB // 2), disks.path])
        # BLKZEROOUT keeps the space, a hole gives it back.
        assert disks.backend()["zeroes"] == [[MIB, MIB, True], [0, MIB // 2, False]]
        answers = disks.calls(f"read:0:{MIB // 2}", f"read:{MIB // 2}:{MIB // 2}", f"read:{MIB}:{MIB}")
        assert [(a["first"], a["same"]) for a in answers] == [(0, True), (90, True), (0, True)]


@pytest.mark.vm(smp=4)
def test_a_large_discard_is_split_at_its_limit(guest: Guest) -> None:
    with testdisk.serving(guest, "target=test", f"discard=0:65536:{MIB}") as disks:
        guest.run(["blkdiscard", "--offset", "0", "--length", str(4 * MIB), disks.path])
        assert sorted(disks.backend()["discards"]) == [[i * MIB, MIB] for i in range(4)]


@pytest.mark.vm(smp=4)
def test_memory_is_taken_by_writes_and_given_back_by_discards(guest: Guest) -> None:
    with testdisk.serving(guest, "target=mem", "size=1099511627776", "depth=8") as disks:
        assert disks.used() == 0
        before = disks.ask("process")["rss_kib"]
        disks.calls(*(f"write:{i * 8 * MIB}:{8 * MIB}" for i in range(12)))
        assert disks.used() == 96 * MIB
        assert disks.ask("process")["rss_kib"] > before + 90 * 1024
        # Zeroes take nothing, wherever they are written.
        disks.calls(f"write:{1 << 39}:{8 * MIB}:0")
        assert disks.used() == 96 * MIB
        # Half a chunk of 64 KiB is cleared, whole ones go.
        guest.run(["blkdiscard", "--offset", str(32768), "--length", str(96 * MIB), disks.path])
        assert disks.used() == 65536
        assert disks.ask("process")["rss_kib"] < before + 8 * 1024


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("via", VIAS)
def test_each_fsync_of_a_client_is_one_flush(guest: Guest, via: str) -> None:
    with testdisk.serving(guest, "target=test", f"via={via}") as disks:
        flushes = disks.backend()["flush"]
        calls = [c for i in range(10) for c in (f"write:{i * 4096}:4096", "fsync")]
        assert disks.errnos(*calls) == [0] * 20
        backend = disks.backend()
        assert (backend["flush"] - flushes, backend["fua"]) == (10, 0)
        assert disks.stats()["flush"]["errors"] == 0


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("via", VIAS)
def test_each_durable_write_is_one_fua_write(guest: Guest, via: str) -> None:
    with testdisk.serving(guest, "target=test", f"via={via}") as disks:
        before = disks.backend()
        disks.calls(*(f"dsync:{i * 4096}:4096" for i in range(10)), "write:0:4096")
        after = disks.backend()
        assert after["fua"] - before["fua"] == 10
        assert after["write"] - before["write"] == 11
        # The block device's write path ends in its fsync as well (`generic_write_sync`).
        assert after["flush"] - before["flush"] == 10


@pytest.mark.vm(smp=4)
def test_without_fua_a_durable_write_is_a_write_and_a_flush(guest: Guest) -> None:
    with testdisk.serving(guest, "target=test", "caps=WRITE,FLUSH") as disks:
        before = disks.backend()
        disks.calls(*(f"dsync:{i * 4096}:4096" for i in range(5)))
        after = disks.backend()
        assert (after["fua"], after["write"] - before["write"]) == (0, 5)
        # One in place of FUA, and one of the write path's own fsync.
        assert after["flush"] - before["flush"] == 10


@pytest.mark.vm(smp=4)
def test_without_a_cache_no_flush_comes_and_fsync_succeeds(guest: Guest) -> None:
    with testdisk.serving(guest, "target=test", "caps=WRITE") as disks:
        assert disks.errnos("write:0:4096", "fsync", "dsync:0:4096") == [0, 0, 0]
        backend = disks.backend()
        assert (backend["flush"], backend["fua"]) == (0, 0)
        assert disks.attributes()["queue/write_cache"] == "write through"


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("max_io", [4096, 65536, 4 << 20])
def test_no_request_is_larger_than_a_tags_buffer(guest: Guest, max_io: int) -> None:
    with testdisk.serving(guest, "target=test", f"max_io={max_io}", "depth=16") as disks:
        disks.calls(f"write:0:{8 * MIB}:7")
        (answer,) = disks.calls(f"read:0:{8 * MIB}")
        assert (answer["done"], answer["first"], answer["same"]) == (8 * MIB, 7, True)
        # The kernel fills requests up to the limit where it may.
        assert max_io // 4 < disks.backend()["largest"] <= max_io
