"""Disks that misbehave by rules, as the programs that are tested with them meet it."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Any

import pytest

from ublk_rig import testdisk
from ublk_rig.load import eventually

if TYPE_CHECKING:
    from ublk_vm.guest import Guest

SIZE = 16 << 20


def faulty(guest: Guest, over: str) -> list[str]:
    """The options of a disk with faults."""
    where = guest.run("mktemp -d").out.strip()
    path = {"file": f"path={where}/img", "stripe": f"path={where}/a,{where}/b chunk=12288"}.get(over, "")
    return ["target=fault", f"over={over}", f"size={SIZE}", testdisk.ALONE, *path.split()]


def fio(guest: Guest, disk: str, *options: str) -> dict[str, Any]:
    """Run to the end, whatever fails; the figures of the job."""
    done = guest.run(
        [
            *("fio", "--name=f", f"--filename={disk}", "--direct=1", "--ioengine=libaio", "--bs=4k"),
            *("--thread", "--continue_on_error=all", "--output-format=json", *options),
        ],
        timeout=120,
        check=False,
    )
    job: dict[str, Any] = json.loads(done.out[done.out.index("{") :])["jobs"][0]
    return job


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("over", ["mem", "file", "stripe"])
def test_a_client_meets_as_many_errors_as_were_injected(guest: Guest, over: str) -> None:
    with testdisk.serving(guest, *faulty(guest, over)) as disks:
        disks.ask("seed", seed=11)
        disks.arm("error", errno=errno.EIO, op="write,read", probability=0.1)
        # One at a time, so that nothing is merged: 500 of each, 100 errors expected, a standard deviation of 9.5.
        job = fio(guest, disks.path, "--rw=randrw", "--iodepth=1", "--size=4M", "--randrepeat=1")
        faults = disks.faults()
        assert job["total_err"] == faults["errors"] == faults["rules"][0]["applied"]
        assert 50 < faults["errors"] < 160
        assert faults["rules"][0]["seen"] >= 1000
        # The errors were the rule's alone.
        disks.heal()
        assert fio(guest, disks.path, "--rw=randrw", "--iodepth=16", "--size=4M")["total_err"] == 0
        assert disks.stats()["in_flight"] == 0


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("over", ["null", "file"])
def test_delays_are_seen_by_each_request_and_not_by_those_behind_it(guest: Guest, over: str) -> None:
    with testdisk.serving(guest, *faulty(guest, over), "queues=1") as disks:
        disks.arm("delay", ms=200, most_ms=300, op="read")
        job = fio(guest, disks.path, "--rw=randread", "--iodepth=32", f"--size={SIZE}", "--io_size=256k")
        latency = job["read"]["clat_ns"]
        assert job["total_err"] == 0
        assert latency["min"] >= 200_000_000
        # 64 reads. One after the other they would take 12.8 s at the very least, and a half of that is ample.
        assert job["read"]["runtime"] < 6400, job["read"]["runtime"]
        faults = disks.faults()
        # Neighbours may have been merged.
        assert 32 < faults["delays"] == faults["rules"][0]["seen"]
        assert 200 * faults["delays"] <= faults["delayed_ms"] <= 300 * faults["delays"]


@pytest.mark.vm(smp=4)
def test_what_a_database_does_when_its_flush_hangs_can_be_watched(guest: Guest) -> None:
    with testdisk.serving(guest, *faulty(guest, "file")) as disks:
        disks.arm("hold", op="flush", times=1)
        with guest.popen([testdisk.program(), "client", disks.path, "direct", "write:0:4096", "fsync"]) as writer:
            eventually(guest, lambda: disks.faults()["held"] == 1)
            assert disks.errnos("write:8192:4096", "read:8192:4096") == [0, 0]
            assert disks.ask("release") == {"answered": 1, "late": 0}
            assert writer.read_line().count('"errno":0') == 2
            assert writer.wait() == 0


@pytest.mark.vm(smp=4)
def test_a_server_that_is_told_to_dies_on_the_request(guest: Guest) -> None:
    options = faulty(guest, "mem")
    with guest.popen([testdisk.program(), "serve", *options]) as server:
        disks = testdisk.Disks(guest, server)
        disks.ready = disks.read(testdisk.START_SECS)["ready"]
        assert disks.errnos("write:0:4096") == [0]
        disks.arm("abort", op="write", **{"from": 1 << 20, "to": 2 << 20}, skip=1)
        assert disks.errnos(f"write:{1 << 20}:4096", f"read:{1 << 20}:4096") == [0, 0]
        assert disks.errnos(f"write:{1 << 20}:4096") == [errno.EIO]
        assert server.wait() == -6
    testdisk.delete(guest, disks.ready[-1]["id"])


@pytest.mark.vm(smp=4)
def test_rules_that_make_no_sense_are_refused(guest: Guest) -> None:
    with testdisk.serving(guest, "target=fault", "over=null") as disks:
        with pytest.raises(testdisk.Refused, match="from 0 to 1"):
            disks.arm("drop", probability=2.0)
        with pytest.raises(testdisk.Refused, match="has no bytes"):
            disks.arm("error", errno=5, **{"from": 8, "to": 8})
        assert disks.faults()["rules"] == []
        assert disks.errnos("write:0:4096", "read:0:4096") == [0, 0]


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("survive", [0.0, 0.5])
def test_a_file_system_keeps_what_was_synced_through_a_power_cut(guest: Guest, survive: float) -> None:
    """What `fsync` promised is there after the crash, in a file system that its journal makes whole again."""
    folder = guest.run("mktemp -d").out.strip()
    with testdisk.serving(guest, "target=cache", f"size={48 << 20}") as disks:
        # What would make durable what is to be lost: the journal's own commits, every five seconds, and the flush of
        # the thread that fills the inode tables later.
        guest.run(f"mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {disks.path}")
        guest.run(f"mount -o errors=continue,commit=3600 {disks.path} {folder}")
        guest.run(f"head -c 300001 /dev/urandom > {folder}/a && sync {folder}/a && sha256sum < {folder}/a > /tmp/sum")
        # Written, with a new name in the directory, and not synced; out of the page cache and into the disk's.
        guest.run(f"dd if=/dev/urandom of={folder}/b bs=64k count=16 oflag=direct status=none")
        assert disks.ask("stats")["unflushed"] >= 1 << 20
        lost = disks.ask("cut", probability=survive, seed=5)
        assert lost["lost"] > 0
        assert (lost["survived"] > 0) == (survive > 0)
        assert disks.errnos("read:0:4096") == [errno.EIO]
        guest.run(["umount", folder], check=False)
        disks.ask("restore")
        assert guest.run(f"dumpe2fs -h {disks.path} 2>/dev/null | grep -c needs_recovery").out.strip() == "1"
        guest.run(["mount", disks.path, folder])
        guest.run(f"sha256sum < {folder}/a | cmp - /tmp/sum")
        guest.run(["umount", folder])
        guest.run(["e2fsck", "-fn", disks.path])
