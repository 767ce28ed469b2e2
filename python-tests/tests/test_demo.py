"""What `make demo` and `make bench` do, on every kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ublk_rig import bench, demo, served

if TYPE_CHECKING:
    from ublk_vm.guest import Guest

WORK = "ls -d /tmp/ublk-demo.* /tmp/ublk-lies 2>/dev/null"


@pytest.mark.usefixtures("package")
def test_the_demo_shows_what_it_says(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    guest.run("modprobe ublk_drv")
    demo.show(guest, demo.Programs(), demo.Progress())
    said = capsys.readouterr().out
    assert said.count(f"all {demo.FILES} files are what they were") == 2
    # Two steps come before it has a machine.
    assert said.count(f"/{demo.STEPS}]") == demo.STEPS - 2
    assert not guest.run(WORK, check=False).out


def test_a_demo_that_fails_says_so_and_cleans_up(guest: Guest) -> None:
    server = "/tmp/ublk-lies"
    guest.run(f"printf '#!/bin/sh\\necho /dev/null; cat\\n' > {server} && chmod +x {server}")
    with pytest.raises(served.ServerMisbehaved, match="not a disk"):
        demo.show(guest, demo.Programs(ramdisk=(server,)), demo.Progress())
    guest.run(["rm", server])
    assert not guest.run(WORK, check=False).out


@pytest.mark.vm(mem="3G")
@pytest.mark.time_limit(600)
def test_the_benchmark_measures_every_contestant(guest: Guest, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--full"):
        pytest.skip("runs with --full (make test-full): it needs a larger machine for itself")
    for contest, ratio in zip(bench.CONTESTS, ("ublk mem / brd", "Python RamDisk / nbdkit, Python"), strict=True):
        results = bench.measure(guest, contest, 1, 0.2, lambda _: None)
        assert [m.contestant for m in results] == [c.name for c in contest.contestants]
        assert ratio in bench.table(contest, results)
        assert all(m.idle for m in results if m.contestant.startswith(("ublk", "Python")))
