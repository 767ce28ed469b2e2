"""fio writes, reads back and verifies, over every pair of options (over every combination with --full)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ublk_rig import testdisk
from ublk_rig.pairwise import everything, pairwise

if TYPE_CHECKING:
    from ublk_rig.pairwise import Row
    from ublk_vm.guest import Guest

OPTIONS: dict[str, list[Any]] = {
    "service": [
        "target=mem",
        "target=test via=backend",
        "target=test via=backend threads=3",
        "target=test via=async",
        "target=mem workers=2",
        "target=file path=/tmp/fio.img",
    ],
    "bs": [512, 4096, 65536, 1 << 20],
    "rw": ["randwrite", "write", "randrw"],
    "queues": [1, 2, 4],
    "depth": [1, 32, 1024],
    "block": [512, 4096],
    "engine": ["libaio", "io_uring"],
}
# One job for each CPU, so that each hardware queue has work.
JOBS = 4
AREA = 4 << 20


def allowed(row: Row) -> bool:
    """Direct I/O is in whole blocks."""
    return bool(row["bs"] >= row["block"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        choose = everything if metafunc.config.getoption("--full") else pairwise
        rows = choose(OPTIONS, allowed)
        metafunc.parametrize("row", rows, ids=[f"{i}" for i in range(len(rows))])


@pytest.mark.vm(smp=4)
@pytest.mark.time_limit(400)
def test_what_fio_writes_it_reads_back(guest: Guest, row: Row) -> None:
    service, bs, queues, depth = row["service"].split(), row["bs"], row["queues"], row["depth"]
    options = [*service, f"size={JOBS * AREA}", f"queues={queues}", f"depth={depth}", f"block={row['block']}"]
    # Enough to go around each queue's tags, few enough for an emulated processor.
    amount = min(AREA, max(bs * 64, 256 << 10))
    # fio allocates a block for each of them.
    in_flight = min(depth, amount // bs)
    with testdisk.serving(guest, *options) as disks:
        guest.run(
            [
                *("fio", "--name=v", f"--filename={disks.path}", "--direct=1", f"--ioengine={row['engine']}"),
                *(f"--rw={row['rw']}", f"--bs={bs}", f"--iodepth={in_flight}", f"--numjobs={JOBS}"),
                *(f"--size={AREA}", f"--offset_increment={AREA}", f"--io_size={amount}", "--thread"),
                *("--cpus_allowed=0-3", "--cpus_allowed_policy=split", "--group_reporting"),
                *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=1024", "--randrepeat=1"),
            ],
            # Some seconds, unless others use the processor as well.
            timeout=200,
        )
        assert disks.ready[-1]["queues"] == queues
        stats = disks.stats()
    assert all(queue["write"]["bytes"] > 0 and queue["read"]["bytes"] > 0 for queue in stats["queues"]), stats
    # What was written is read at least once.
    assert stats["read"]["bytes"] >= stats["write"]["bytes"] >= amount
    assert (stats["read"]["errors"], stats["write"]["errors"], stats["in_flight"], stats["rejected"]) == (0, 0, 0, 0)
