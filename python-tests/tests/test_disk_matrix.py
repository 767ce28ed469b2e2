"""Every way to move data and commands, with every target, through what a disk goes through in its life.

Pairs of options in an ordinary run, every combination with --full. What a kernel cannot do is refused by name, which
is what the test sees to there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ublk_rig import testdisk
from ublk_rig.load import eventually, load, requests_done
from ublk_rig.pairwise import everything, pairwise

if TYPE_CHECKING:
    from ublk_rig.pairwise import Row
    from ublk_vm.guest import Guest

OPTIONS: dict[str, list[Any]] = {
    "life": ["filesystem", "verify", "stop", "kill"],
    "target": ["null", "mem", "file"],
    "data": ["copy", "need-get-data", "user-copy", "zero-copy", "auto-buf-reg"],
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
    "batch": "BATCH_IO",
}


def impossible(row: Row) -> str | None:
    """Why no kernel can do this."""
    if row["target"] == "null" and row["life"] in {"filesystem", "verify"}:
        return "it stores nothing"
    if row["commands"] == "batch" and row["data"] == "need-get-data":
        return "the driver clears NEED_GET_DATA on devices with BATCH_IO"
    if row["commands"] == "batch" and row["workers"] > 1 and row["data"] == "copy":
        return "the driver copies before it is known which worker takes the request"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        choose = everything if metafunc.config.getoption("--full") else pairwise
        rows = choose(OPTIONS, lambda row: impossible(row) is None)
        names = ["-".join(str(value) for value in row.values()) for row in rows]
        metafunc.parametrize("row", rows, ids=names)


@pytest.mark.vm(smp=4)
def test_a_disk_lives_through_it(guest: Guest, row: Row) -> None:
    where = {"file": f"path={guest.run('mktemp -d').out.strip()}/img"}.get(row["target"], "")
    require = "require=BATCH_IO" if row["commands"] == "batch" else ""
    options = [f"target={row['target']}", where, f"data={row['data']}", require, f"lanes={row['workers']}"]
    options = [*filter(None, options), f"size={SIZE}", "queues=2", "depth=32"]
    with testdisk.serving(guest) as disks:
        offered = set(disks.ask("features")["features"])
        needed = {NEEDS[name] for name in (row["data"], row["commands"]) if name in NEEDS}
        if row["workers"] > 1 and row["commands"] == "per-tag":
            needed.add("PER_IO_DAEMON")
        if missing := needed - offered:
            with pytest.raises(testdisk.Refused) as refused:
                disks.start(*options)
            assert refused.value.kind == "Unsupported"
            assert all(f"{name} (since Linux " in refused.value.text for name in missing), refused.value.text
            assert testdisk.devices(guest) == []
            return
    {"filesystem": filesystem, "verify": verify, "stop": stop, "kill": kill}[row["life"]](guest, options)
    assert testdisk.devices(guest) == []


def filesystem(guest: Guest, options: list[str]) -> None:
    """Made, filled, checked."""
    folder = guest.run("mktemp -d").out.strip()
    with testdisk.serving(guest, *options) as disks:
        guest.run(
            f"mkfs.ext4 -q {disks.path} && mount {disks.path} {folder} &&"
            f" head -c 3000001 /dev/urandom > {folder}/a && cp {folder}/a {folder}/b && sync {folder}/b &&"
            f" umount {folder} && e2fsck -fn {disks.path} && mount -o ro {disks.path} {folder} &&"
            f" cmp {folder}/a {folder}/b && umount {folder}",
            timeout=120,
        )
        clean(disks)


def verify(guest: Guest, options: list[str]) -> None:
    """What fio writes it reads back."""
    with testdisk.serving(guest, *options) as disks:
        guest.run(
            [
                *("fio", "--name=v", f"--filename={disks.path}", "--direct=1", "--ioengine=io_uring", "--rw=randrw"),
                *("--bsrange=512-128k", "--blockalign=512", "--iodepth=32", "--size=8M", "--io_size=4M", "--thread"),
                *("--numjobs=2", "--offset_increment=8M", "--group_reporting"),
                *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--randrepeat=1"),
            ],
            timeout=90,
        )
        clean(disks)


def clean(disks: testdisk.Disks) -> None:
    """Nothing failed, and nothing had to be done another way."""
    stats = disks.stats()
    assert stats["write"]["bytes"] > 0
    assert all(stats[op]["errors"] == 0 for op in ("read", "write")), stats
    assert (stats["in_flight"], stats["rejected"], stats["unregistered"]) == (0, 0, 0), stats
    assert disks.stop()["stopped"]["leftovers"] == []


def stop(guest: Guest, options: list[str]) -> None:
    """Pulled from under its users."""
    with testdisk.serving(guest, *options) as disks, load(guest, disks.path):
        eventually(guest, lambda: disks.stats()["write"]["completed"] > 100)
        done = disks.stop(within=5, force=True)
        assert done["stopped"]["leftovers"] == []
        assert done["stopped"]["stats"]["rejected"] == 0
        assert done["secs"] < guest.scale.seconds(15)


def kill(guest: Guest, options: list[str]) -> None:
    """The server dies; somebody else clears up."""
    with guest.popen([testdisk.program(), "serve", *options]) as server:
        server.read_line()
        (device,) = testdisk.devices(guest)
        fio = load(guest, f"/dev/ublkb{device['id']}")
        eventually(guest, lambda: requests_done(guest, device["id"]) > 100)
        server.kill()
        assert server.wait() == -9
    assert fio.wait(60) != 0
    testdisk.delete(guest, device["id"])
