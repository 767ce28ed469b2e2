"""Every way to move data and commands, with every target, through what a disk goes through in its life.

Pairs of options in an ordinary run, every combination with --full: among those that the older kernel can do and among
all. What a kernel cannot do is refused by name, which is what the test sees to there. What no kernel can do is listed
with the reason: as skipped tests with --full, and its refusals are tested always.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from ublk_rig import support, testdisk
from ublk_rig.load import eventually, load, requests_done
from ublk_rig.pairwise import everything, pairwise

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_rig.pairwise import Row
    from ublk_vm.guest import Guest

OPTIONS: dict[str, list[Any]] = {
    "life": ["filesystem", "verify", "stop", "kill"],
    "target": ["null", "mem", "file", "stripe"],
    "data": ["copy", "need-get-data", "user-copy", "zero-copy", "auto-buf-reg", "shared-memory"],
    "commands": ["per-tag", "batch"],
    "workers": [1, 3],
}
SIZE = 24 << 20
# What the driver has to have, by the name that a refusal must give.
NEEDS = {
    "need-get-data": "NEED_GET_DATA",
    "user-copy": "USER_COPY",
    "zero-copy": "SUPPORT_ZERO_COPY",
    "auto-buf-reg": "AUTO_BUF_REG",
    "shared-memory": "SHMEM_ZC",
    "batch": "BATCH_IO",
}
# As much as the requests of one fio process can have in progress.
SHARED = 8 << 20
# Odd, so that requests span several members and begin and end within chunks.
CHUNK = 21 * 512


def impossible(row: Row) -> str | None:
    """Why no kernel can do this."""
    if row["target"] == "null" and row["life"] in {"filesystem", "verify"}:
        return "null stores nothing that could be read back"
    if row["commands"] == "batch" and row["data"] == "need-get-data":
        return "the driver clears NEED_GET_DATA on devices with BATCH_IO"
    if row["commands"] == "batch" and row["workers"] > 1 and row["data"] in {"copy", "shared-memory"}:
        return "the driver copies before it is known which worker takes the request"
    return None


def possible(row: Row) -> bool:
    """Whether some kernel can do it."""
    return impossible(row) is None


def possible_on_6_12(row: Row) -> bool:
    """Whether every kernel that we test on can."""
    old = row["data"] in {"copy", "need-get-data", "user-copy"}
    return possible(row) and old and row["commands"] == "per-tag" and row["workers"] == 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" not in metafunc.fixturenames:
        return
    cells: list[Any]
    if metafunc.config.getoption("--full"):
        rows = everything(OPTIONS, lambda _: True)
        reasons = [impossible(row) for row in rows]
        marks = [[pytest.mark.skip(reason=f"impossible: {reason}")] if reason else [] for reason in reasons]
        cells = [pytest.param(row, marks=mark) for row, mark in zip(rows, marks, strict=True)]
    else:
        everywhere = pairwise(OPTIONS, possible_on_6_12)
        cells = rows = everywhere + pairwise(OPTIONS, possible, everywhere)
    metafunc.parametrize("row", cells, ids=["-".join(str(value) for value in row.values()) for row in rows])


def how(row: Row, where: str) -> list[str]:
    """The options of a row's disk."""
    paths = {"file": f"path={where}/img", "stripe": f"path={where}/a,{where}/b,{where}/c chunk={CHUNK}"}
    require = [NEEDS[name] for name in (row["data"], row["commands"]) if name in {"shared-memory", "batch"}]
    data = "copy" if row["data"] == "shared-memory" else row["data"]
    options = f"target={row['target']} {paths.get(row['target'], '')} data={data} require={','.join(require)}"
    return [*options.split(), f"lanes={row['workers']}", f"size={SIZE}", "queues=2", "depth=32"]


@pytest.mark.vm(smp=4)
def test_a_disk_lives_through_it(guest: Guest, row: Row, record_property: Callable[[str, object], None]) -> None:
    options = how(row, guest.run("mktemp -d").out.strip())
    with testdisk.serving(guest) as disks:
        offered = set(disks.ask("features")["features"])
        needed = {NEEDS[name] for name in (row["data"], row["commands"]) if name in NEEDS}
        if row["workers"] > 1 and row["commands"] == "per-tag":
            needed.add("PER_IO_DAEMON")
        if missing := needed - offered:
            assert not possible_on_6_12(row), missing
            with pytest.raises(testdisk.Refused) as refused:
                disks.start(*options)
            assert refused.value.kind == "Unsupported"
            named = {name: re.search(rf"{name} \(since Linux [\d.]+\)", refused.value.text) for name in missing}
            assert all(named.values()), refused.value.text
            assert testdisk.devices(guest) == []
            record_property(support.REFUSED, [found[0] for found in named.values() if found])
            return
    share = row["data"] == "shared-memory"
    lives = {"filesystem": filesystem, "verify": verify, "stop": stop, "kill": kill}
    lives[row["life"]](guest, options, share=share)
    assert testdisk.devices(guest) == []


@pytest.mark.vm(smp=4)
def test_what_no_kernel_can_do_is_refused_before_anything_exists(guest: Guest) -> None:
    with testdisk.serving(guest) as disks:
        offered = set(disks.ask("features")["features"])
        asked = 0
        for row in everything(OPTIONS, lambda row: row["life"] == "stop" and not possible(row)):
            with pytest.raises(testdisk.Refused) as refused:
                disks.start(*how(row, "/tmp"))
            assert refused.value.kind in {"InvalidParameter", "Unsupported"}, refused.value
            # A kernel without batches may refuse these first.
            reasons = ["BATCH_IO (since Linux "]
            reasons += ["NEED_GET_DATA"] if row["data"] == "need-get-data" else []
            reasons += ["it copies before it is known"] if row["workers"] > 1 else []
            assert any(reason in refused.value.text for reason in reasons), refused.value
            asked += 1
            assert testdisk.devices(guest) == []
        assert asked == 4 * (2 + 1 + 1)
        assert "USER_COPY" in offered


def memory(disks: testdisk.Disks, *, share: bool) -> list[str]:
    """Options of fio for memory that the last disk knows, if it is to."""
    if not share:
        return []
    return [f"--mem=mmapshared:{disks.ask('share', bytes=SHARED)['path']}"]


def filesystem(guest: Guest, options: list[str], *, share: bool) -> None:
    """Made, filled, checked."""
    folder = guest.run("mktemp -d").out.strip()
    with testdisk.serving(guest, *options) as disks:
        # File systems use pages of their own: beside shared memory they are served as ever.
        memory(disks, share=share)
        guest.run(
            f"mkfs.ext4 -q {disks.path} && mount {disks.path} {folder} &&"
            f" head -c 3000001 /dev/urandom > {folder}/a && cp {folder}/a {folder}/b && sync {folder}/b &&"
            f" umount {folder} && e2fsck -fn {disks.path} && mount -o ro {disks.path} {folder} &&"
            f" cmp {folder}/a {folder}/b && umount {folder}",
            timeout=120,
        )
        clean(disks, share=False)


def verify(guest: Guest, options: list[str], *, share: bool) -> None:
    """What fio writes it reads back."""
    with testdisk.serving(guest, *options) as disks:
        # Two jobs would write to the same memory.
        jobs = ["--size=16M", "--io_size=8M"] if share else ["--size=8M", "--io_size=4M", "--numjobs=2"]
        guest.run(
            [
                *("fio", "--name=v", f"--filename={disks.path}", "--direct=1", "--ioengine=io_uring", "--rw=randrw"),
                *("--bsrange=512-128k", "--blockalign=512", "--iodepth=32", "--thread", *jobs),
                *("--offset_increment=8M", "--group_reporting", *memory(disks, share=share)),
                *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--randrepeat=1"),
            ],
            timeout=90,
        )
        clean(disks, share=share)


def clean(disks: testdisk.Disks, *, share: bool) -> None:
    """Nothing failed, and nothing had to be done another way."""
    stats = was_shared(disks, share=share)
    assert stats["write"]["bytes"] > 0
    assert all(stats[op]["errors"] == 0 for op in ("read", "write")), stats
    assert (stats["in_flight"], stats["rejected"], stats["unregistered"]) == (0, 0, 0), stats
    assert disks.stop()["stopped"]["leftovers"] == []


def was_shared(disks: testdisk.Disks, *, share: bool) -> dict[str, Any]:
    """What was counted. Of what shared memory served: nearly everything, or nothing at all."""
    stats = disks.stats()
    done = stats["read"]["completed"] + stats["write"]["completed"]
    assert (stats["shared"] > done / 2) if share else (stats["shared"] == 0), stats
    return stats


def stop(guest: Guest, options: list[str], *, share: bool) -> None:
    """Pulled from under its users."""
    with testdisk.serving(guest, *options) as disks, load(guest, disks.path, *memory(disks, share=share)):
        eventually(guest, lambda: disks.stats()["write"]["completed"] > 100)
        was_shared(disks, share=share)
        done = disks.stop(within=5, force=True)
        assert done["stopped"]["leftovers"] == []
        assert done["stopped"]["stats"]["rejected"] == 0
        assert done["secs"] < guest.scale.seconds(15)


def kill(guest: Guest, options: list[str], *, share: bool) -> None:
    """The server dies; somebody else clears up."""
    with guest.popen([testdisk.program(), "serve", *options]) as server:
        disks = testdisk.Disks(guest, server)
        disks.ready = disks.read(testdisk.START_SECS)["ready"]
        (device,) = testdisk.devices(guest)
        fio = load(guest, disks.path, *memory(disks, share=share))
        eventually(guest, lambda: requests_done(guest, device["id"]) > 100)
        was_shared(disks, share=share)
        server.kill()
        assert server.wait() == -9
    assert fio.wait(60) != 0
    testdisk.delete(guest, device["id"])
