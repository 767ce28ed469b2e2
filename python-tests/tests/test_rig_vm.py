"""The rig on real kernels: what every other kernel test relies on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ublk_vm.guest import CommandFailed, CommandTimeout
from ublk_vm.process import NothingInTime, ProcessEnded

if TYPE_CHECKING:
    from ublk_vm.guest import Guest


def test_the_kernel_is_the_one_asked_for_and_has_ublk(guest: Guest) -> None:
    assert guest.run(["uname", "-r"]).out.strip() == guest.release
    assert guest.release.startswith(guest.kernel)
    guest.run("modprobe ublk_drv && test -c /dev/ublk-control")


def test_a_ring_of_the_agents_keeps_io_uring_from_being_patched(guest: Guest) -> None:
    assert "anon_inode:[io_uring]" in guest.run("ls -l /proc/$PPID/fd").out


def test_run_reports_output_status_and_environment(guest: Guest) -> None:
    done = guest.run(
        "echo out; echo err >&2; pwd; echo $ADDED; cat; exit 3",
        check=False,
        cwd="/tmp",
        stdin="in",
        env={"ADDED": "yes"},
    )
    assert (done.rc, done.out, done.err) == (3, "out\n/tmp\nyes\nin", "err\n")
    with pytest.raises(CommandFailed, match="ended with 1"):
        guest.run(["false"])
    assert guest.run(["no-such-program"], check=False).rc == 127


def test_a_large_output_arrives_whole(guest: Guest) -> None:
    assert guest.run("seq 1 400000").out.splitlines()[-1] == "400000"


def test_a_timeout_kills_the_whole_session(guest: Guest) -> None:
    began = time.monotonic()
    with pytest.raises(CommandTimeout):
        guest.run("sleep 1000 & sleep 1000", timeout=1)
    assert time.monotonic() - began < guest.scale.seconds(20)


def test_popen_speaks_lines(guest: Guest) -> None:
    with guest.popen("while read l; do echo got $l; done; echo bye >&2; exit 4") as p:
        p.write_line("one")
        assert p.read_line() == "got one"
        with pytest.raises(NothingInTime):
            p.read_line(timeout=0.2)
        p.write_line("two")
        assert p.read_line() == "got two"
        assert p.poll() is None
        p.close_stdin()
        assert p.wait() == 4
        assert p.err == "bye\n"
        with pytest.raises(ProcessEnded):
            p.read_line()


def test_popen_is_killed_by_signal(guest: Guest) -> None:
    p = guest.popen(["sleep", "1000"])
    p.kill()
    assert p.wait() == -9


def test_the_artifact_folder_is_shared_both_ways(guest: Guest) -> None:
    guest.run(f"echo from the guest > {guest.artifacts.guest}/a")
    assert (guest.artifacts.host / "a").read_text() == "from the guest\n"
    (guest.artifacts.host / "b").write_text("from the host\n")
    assert guest.run(["cat", f"{guest.artifacts.guest}/b"]).out == "from the host\n"


@pytest.mark.vm(smp=4, mem="3G")
def test_a_larger_machine(guest: Guest) -> None:
    assert guest.run(["nproc"]).out.strip() == "4"
    assert guest.cpus == 4


@pytest.mark.vm(fresh=True)
def test_a_machine_of_ones_own_is_thrown_away_with_all_its_changes(guest: Guest) -> None:
    guest.run("for m in null_blk brd loop ext4 xfs btrfs; do modprobe $m || exit 1; done")
    guest.run("touch /usr/written-by-the-guest && rm /etc/passwd")
    assert not Path("/usr/written-by-the-guest").exists()
    assert Path("/etc/passwd").exists()
