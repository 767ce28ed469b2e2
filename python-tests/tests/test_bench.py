"""What the benchmark makes of what it measured."""

from __future__ import annotations

import json

from ublk_rig import bench


def measured(name: str, *iops: float) -> bench.Measured:
    return bench.Measured(name, {w.name: list(iops) for w in bench.WORKLOADS})


def test_ratios_are_taken_within_rounds() -> None:
    results = [measured(c.name, 1000, 3000, 2000) for c in bench.CONTESTANTS]
    # Half of the other's speed in every round, though the rounds differ.
    results[1] = measured("ublk null", 500, 1500, 1000)
    results[1].idle = bench.Memory(3 << 20, 2 << 20)
    lines = bench.table(bench.CONTEST, results).splitlines()
    assert any(line.startswith("| ublk null ") and "1.0 (0.5-1.5)" in line and "3.0 MiB" in line for line in lines)
    assert next(line for line in lines if "ublk null / null_blk" in line).count("0.50 (0.50-0.50)") == 4
    assert "3 times" in bench.doubts(results)
    assert bench.doubts([measured("brd", 1000, 1100)]) == ""


def test_fio_and_proc_are_understood() -> None:
    jobs = [{"jobname": "a", "read": {"iops": 1.5}, "write": {"iops": 2}}]
    assert bench.iops_of(json.dumps({"jobs": jobs})) == {"a": 3.5}
    status = "Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t    20 kB\nVmRSS:\t    10 kB\n"
    assert bench.memory_of(status) == bench.Memory(20480, 10240)
