"""A device's life: many of them, stops with and without users, and servers that die."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ublk_rig import testdisk
from ublk_rig.load import eventually, load, requests_done

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_vm.guest import Guest


def settled(disks: testdisk.Disks) -> dict[str, Any]:
    """What the server has when the threads have ended that end by themselves when idle, and nothing changes."""
    passing = ("ublk-ctl", "iou-wrk")
    seen: list[dict[str, Any]] = []

    def still() -> bool:
        seen.append(disks.ask("process"))
        former, now = seen[-2:] if len(seen) > 1 else ({}, seen[-1])
        same = all(now[what] == former.get(what) for what in ("threads", "fds", "maps"))
        return same and not any(name.startswith(passing) for name in now["thread_names"])

    eventually(disks.guest, still, 30)
    return seen[-1]


def as_before(disks: testdisk.Disks, before: dict[str, Any]) -> dict[str, Any]:
    """What the server has once it has as many threads and descriptors as before: who was joined may linger."""
    seen: list[dict[str, Any]] = []

    def same() -> bool:
        seen.append(settled(disks))
        return all(seen[-1][what] == before[what] for what in ("threads", "fds"))

    eventually(disks.guest, same, 30)
    return seen[-1]


@pytest.mark.vm(smp=4)
def test_two_hundred_devices_one_after_the_other_leave_nothing(guest: Guest) -> None:
    # Otherwise each two threads that happen to overlap would leave an arena of the allocator's.
    with testdisk.serving(guest, env={"MALLOC_ARENA_MAX": "1"}) as disks:
        # What is allocated once and kept is there after the first few.
        disks.ask("cycle", times=20, options="target=mem queues=2", timeout=60)
        before = settled(disks)
        disks.ask("cycle", times=200, options="target=mem queues=2", timeout=200)
        after = as_before(disks, before)
        # Stacks that glibc keeps may be a few more; one left by each device would be 200.
        assert after["maps"] <= before["maps"] + 20, (before, after)
        # 200 devices with as little as 8 KiB each left behind would show.
        assert after["rss_kib"] < before["rss_kib"] + 1024, (before, after)
        assert testdisk.devices(guest) == []


def written_and_read(paths: list[str]) -> str:
    """A script that gives each disk contents of its own, and then looks for them, past the page cache."""
    disks = " ".join(paths)
    return (
        f"set -e; i=0; for d in {disks}; do i=$((i+1)); echo disk $i | dd of=$d conv=sync status=none; done;"
        f"i=0; for d in {disks}; do i=$((i+1)); l=$(dd if=$d iflag=direct count=1 status=none | head -n1); "
        '[ "$l" = "disk $i" ] || { echo "$d: $l"; exit 1; }; done'
    )


@pytest.mark.vm(smp=4)
@pytest.mark.time_limit(900)
@pytest.mark.parametrize(("workers", "count"), [("", 32), ("workers=2", 64), ("workers=2", 512)])
def test_many_disks_at_once(
    guest: Guest,
    workers: str,
    count: int,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    if count > 64 and not pytestconfig.getoption("--full"):
        pytest.skip("a soak: runs with --full (make test-full)")
    few = ("target=mem", "depth=16", "size=1048576", *workers.split())
    # Otherwise each of the threads would leave an arena of the allocator's.
    with testdisk.serving(guest, env={"MALLOC_ARENA_MAX": "1"}) as disks:

        def start(count: int) -> list[dict[str, Any]]:
            ready: list[dict[str, Any]]
            ready = disks.ask("start", options=" ".join((*few, f"count={count}")), timeout=60 + count)["ready"]
            return ready

        def stop(disk: dict[str, Any]) -> None:
            assert disks.ask("stop", id=disk["id"], within=30)["stopped"]["leftovers"] == []

        # What is made once is there then: a pool's workers, or as many stacks as glibc keeps of threads that ended.
        for disk in start(4 if workers else 24):
            stop(disk)
        before = settled(disks)
        crowd = start(count // 2)
        idle = (settled(disks)["rss_kib"] - before["rss_kib"]) / (count // 2)
        of = "mem, depth 16, on shared workers" if workers else "mem, depth 16"
        record_property(f"KiB for an idle disk ({of})", round(idle))
        assert idle < (64 if workers else 256)
        disks.start("target=mem", "size=8388608", *workers.split())
        busy = disks.ready[-1]
        # The others come and go while this one is used.
        with load(guest, busy["path"]) as fio:
            crowd += start(count - len(crowd) - 1)
            assert len({disk["path"] for disk in crowd}) == count - 1
            guest.run(written_and_read([disk["path"] for disk in crowd]), timeout=60 + count)
            for disk in crowd[::2]:
                stop(disk)
            done = requests_done(guest, busy["id"])
            eventually(guest, lambda: requests_done(guest, busy["id"]) > done)
            assert fio.poll() is None
            fio.kill()
            fio.wait()
        for disk in (busy, *crowd[1::2]):
            stop(disk)
        after = as_before(disks, before)
        assert after["maps"] <= before["maps"] + 20, (before, after)
        # A pool's rings have been used all over by then. What the busy one's client had written was 8 MiB; of the
        # 512, 10 KiB left behind by each would show.
        assert after["rss_kib"] < before["rss_kib"] + 4096 + 2 * count, (before, after)
        assert testdisk.devices(guest) == []


@pytest.mark.vm(smp=4)
def test_a_disk_on_a_shared_worker_goes_while_its_neighbours_are_idle(guest: Guest) -> None:
    """io_uring before 6.13 keeps a registered file as long as older commands of other files are in flight."""
    with testdisk.serving(guest) as disks:
        disks.start("target=mem", "count=3", "workers=1")
        for disk in (disks.ready[1], disks.ready[0], disks.ready[2]):
            assert disks.ask("stop", id=disk["id"], within=30)["stopped"]["leftovers"] == []
        assert testdisk.devices(guest) == []


@pytest.mark.vm(smp=4)
def test_a_stop_names_the_process_that_holds_the_disk_in_time(guest: Guest) -> None:
    with testdisk.serving(guest, "target=mem", "size=8388608") as disks, load(guest, disks.path) as fio:
        eventually(guest, lambda: disks.stats()["write"]["completed"] > 100)
        with pytest.raises(testdisk.Refused) as refused:
            disks.stop(within=1)
        assert refused.value.kind == "Busy"
        assert any("fio" in holder for holder in refused.value.holders), refused.value.holders
        assert refused.value.answer["secs"] < guest.scale.seconds(1) + guest.scale.seconds(3)
        # It went on: nothing failed.
        done = disks.stats()["write"]["completed"]
        eventually(guest, lambda: disks.stats()["write"]["completed"] > done)
        assert fio.poll() is None
        fio.kill()
        fio.wait()
        assert disks.stop(within=20)["stopped"]["ending"] == "Stopped"


@pytest.mark.vm(smp=4)
def test_a_stop_names_the_mount_and_works_when_it_is_gone(guest: Guest) -> None:
    with testdisk.serving(guest, "target=mem") as disks:
        guest.run(f"mkfs.ext4 -q {disks.path} && mkdir -p /tmp/held && mount {disks.path} /tmp/held")
        with pytest.raises(testdisk.Refused) as refused:
            disks.stop(within=0.5)
        assert refused.value.holders == ["it is mounted on /tmp/held"]
        guest.run("echo still there > /tmp/held/file && sync /tmp/held/file && umount /tmp/held")
        assert disks.stop(within=20)["stopped"]["leftovers"] == []


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize(
    "how", ["target=mem queues=4", "target=test via=async queues=2", "target=test via=backend threads=4"]
)
def test_a_forced_stop_under_load_is_bounded(guest: Guest, how: str) -> None:
    with testdisk.serving(guest, *how.split(), "size=8388608") as disks, load(guest, disks.path) as fio:
        eventually(guest, lambda: disks.stats()["write"]["completed"] > 100)
        done = disks.stop(within=5, force=True)
        assert done["stopped"]["leftovers"] == []
        assert done["secs"] < guest.scale.seconds(15)
        # The client met errors, and nothing holds it.
        assert fio.wait(30) != 0
        assert done["stopped"]["stats"]["in_flight"] == 0
        assert testdisk.devices(guest) == []


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("action", ["leak", "hold", "stuck"])
def test_what_a_backend_keeps_is_revoked_at_the_deadline(guest: Guest, action: str) -> None:
    quiet = "prefer=NO_AUTO_PART_SCAN"
    with testdisk.serving(guest, "target=test", "via=handler", "queues=1", quiet) as disks:
        disks.arm(action, op="write", times=1)
        with guest.popen([testdisk.program(), "client", disks.path, "direct", "write:0:4096"]) as writer:
            eventually(guest, lambda: disks.stats()["in_flight"] == 1)
            done = disks.stop(within=1, force=True)
            assert done["secs"] < guest.scale.seconds(1 + 15)
            assert '"errno":5' in writer.read_line()
            assert writer.wait() == 0
        stats = done["stopped"]["stats"]
        assert testdisk.devices(guest) == []
        if action == "stuck":
            assert "stuck" in "".join(done["stopped"]["leftovers"])
        else:
            assert (stats["revoked"], done["stopped"]["leftovers"]) == (1, [])
        released = disks.ask("release")
        assert released == {"answered": 0, "late": 1 if action == "hold" else 0}
        # All threads of the device are gone when the backend has let go.
        eventually(guest, lambda: not [n for n in disks.ask("process")["thread_names"] if n.startswith("ublk0")])
        # The next device of the process works.
        disks.start("target=test")
        assert disks.errnos("write:0:4096", "read:0:4096") == [0, 0]


@pytest.mark.vm(smp=4)
def test_held_requests_that_are_answered_in_time_succeed(guest: Guest) -> None:
    with testdisk.serving(guest, "target=test", "via=handler", "prefer=NO_AUTO_PART_SCAN") as disks:
        disks.arm("hold", op="write", times=1)
        with guest.popen([testdisk.program(), "client", disks.path, "direct", "write:0:4096", "read:0:4096"]) as user:
            eventually(guest, lambda: disks.backend()["held"] == 1)
            stats = disks.stats()
            assert (stats["in_flight"], stats["oldest_ms"] is not None) == (1, True)
            assert disks.ask("release") == {"answered": 1, "late": 0}
            assert '"first":165' in user.read_line()
            assert user.wait() == 0


@pytest.mark.vm(smp=4)
def test_a_device_that_somebody_else_deletes_ends_for_its_server(guest: Guest) -> None:
    with testdisk.serving(guest, "target=mem") as disks:
        testdisk.delete(guest, disks.ready[-1]["id"])
        assert disks.ask("wait", within=guest.scale.seconds(20)) == {"ended": "StoppedByOthers"}
        assert testdisk.devices(guest) == []


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("when", ["added", "starting", "idle", "load"])
def test_a_killed_server_leaves_a_device_that_delete_clears(guest: Guest, when: str) -> None:
    hold = [f"hold_at={when}", "target=test"] if when in {"added", "starting"} else ["target=mem", "size=8388608"]
    with guest.popen([testdisk.program(), "serve", *hold]) as server:
        first = server.read_line()
        assert ("stage" if hold[0].startswith("hold") else "ready") in first, first
        (device,) = testdisk.devices(guest)
        fio = load(guest, f"/dev/ublkb{device['id']}") if when == "load" else None
        if fio:
            eventually(guest, lambda: requests_done(guest, device["id"]) > 100)
        server.kill()
        assert server.wait() == -9
    if fio:
        # Its I/O fails: nothing answers any more.
        assert fio.wait(60) != 0
    assert [d["id"] for d in testdisk.devices(guest)] == [device["id"]]
    testdisk.delete(guest, device["id"])
    assert testdisk.devices(guest) == []
