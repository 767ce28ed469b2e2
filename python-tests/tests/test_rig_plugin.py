"""What the plugin catches that a test does not see itself: pytest runs of their own, with a guest each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ublk_vm import kernels
from ublk_vm.layout import cache_dir

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

# pytester has a home of its own; the kernels stay where they are.
CACHE = cache_dir().parent


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An inner run keeps its artefacts to itself."""
    monkeypatch.setattr("ublk_rig.layout.ARTIFACTS", pytester.path / "artifacts")
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    return pytester


def run(inner: pytest.Pytester, body: str, *options: str) -> pytest.RunResult:
    inner.makepyfile(test_inner=f"import pytest, time\n{body}")
    return inner.runpytest_inprocess("-p", "no:cacheprovider", "--rig=qemu", "--kernels=7.3", *options)


def artifact(inner: pytest.Pytester, name: str) -> str:
    found: list[Path] = sorted((inner.path / "artifacts").glob(f"*/{name}"))
    assert len(found) == 1, found
    return found[0].read_text()


def test_a_kernel_warning_and_leaks_fail_tests_and_spare_the_next(inner: pytest.Pytester) -> None:
    """One guest after another: whoever soils one is told, and whoever follows gets a clean one."""
    done = run(
        inner,
        """
def test_warning(guest):
    guest.run("echo 'WARNING: CPU: 0 PID: 1 at planted' > /dev/kmsg")
def test_after_warning(guest):
    guest.run(["true"])
@pytest.mark.console_allow("planted")
def test_allowed_warning(guest):
    guest.run("echo 'WARNING: CPU: 0 PID: 1 at planted' > /dev/kmsg")
def test_leaked_node(guest):
    guest.run("mknod /dev/ublkc7 c 240 7")
def test_after_leak(guest):
    guest.run("test ! -e /dev/ublkc7")
    guest.run("touch /tmp/kept")
def test_failed(guest):
    guest.run("test -e /tmp/kept && echo 1 > /proc/sys/vm/overcommit_memory")
    guest.run(["false"])
def test_after_failure(guest):
    guest.run("grep 0 /proc/sys/vm/overcommit_memory")
@pytest.mark.leak_allow("ublkc7$")
def test_allowed_leak(guest):
    guest.run("mknod /dev/ublkc7 c 240 7")
def test_left_processes(guest):
    guest.popen(["sleep", "1000"])
    guest.run("sleep 2000 > /dev/null 2>&1 < /dev/null &")
@pytest.mark.vm(fresh=True)
def test_hung_task(guest):
    guest.run("echo 2 > /proc/sys/kernel/hung_task_timeout_secs; cd /dev/shm; modprobe loop;"
              "truncate -s 64M i; mkfs.ext4 -q i; mkdir m; mount i m; fsfreeze -f m;"
              "touch m/a & sleep 12; fsfreeze -u /dev/shm/m; wait; umount m")
def test_ends_well(guest):
    guest.run("test ! -e /dev/ublkc7 && ! pgrep -x sleep")
""",
    )
    done.assert_outcomes(passed=10, failed=1, errors=4)
    done.stdout.fnmatch_lines(["*WARNING: CPU: 0 PID: 1 at planted*", "*kept in *"])
    done.stdout.fnmatch_lines(["*left behind*", "*device /dev/ublkc7*"])
    done.stdout.fnmatch_lines(["*process * sleep 1000*", "*process * sleep 2000*"])
    done.stdout.fnmatch_lines(["*INFO: task touch:* blocked for more than*"])
    done.stdout.fnmatch_lines(["kernel tests: 7.3: 6 passed, 5 failed, 0 skipped"])
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    data = json.loads((inner.path / "artifacts/summary.json").read_text())
    assert [t["outcome"] for t in data["tests"]].count("failed") == 5
    assert list(data["releases"]) == ["7.3"]
    assert kernels.series_of(data["releases"]["7.3"]) == "7.3"


def test_a_dying_kernel_fails_its_test_alone(inner: pytest.Pytester) -> None:
    done = run(
        inner,
        """
def test_panic(guest):
    guest.run("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger")
def test_next(guest):
    guest.run(["true"])
""",
    )
    outcomes = done.parseoutcomes()
    assert (outcomes["failed"], outcomes["passed"]) == (1, 1)
    assert "sysrq" in artifact(inner, "guest.log")
    assert "Kernel panic" in artifact(inner, "console.log")
    done.stdout.fnmatch_lines(["kernel tests: 7.3: 1 passed, 1 failed, 0 skipped"])


def test_a_test_that_never_ends_is_ended(inner: pytest.Pytester) -> None:
    done = run(
        inner,
        """
@pytest.mark.time_limit(1)
def test_waits_for_the_guest(guest):
    guest.run(["sleep", "1000"], timeout=1000)
@pytest.mark.time_limit(1)
def test_waits_for_nothing():
    time.sleep(1000)
def test_next(guest):
    guest.run(["true"])
""",
    )
    outcomes = done.parseoutcomes()
    assert (outcomes["failed"], outcomes["passed"]) == (2, 1)
    done.stdout.fnmatch_lines(["*took longer than*"])


def test_an_all_skipped_run_is_no_pass(inner: pytest.Pytester) -> None:
    done = run(inner, "def test_skipped(guest): pytest.skip('not today')")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(
        ["*skipped [[]7.3] *test_skipped[[]7.3]: *not today", "NOT A PASS: kernel 7.3: no test ran*"]
    )


def test_skipped_by_marker_is_no_pass(inner: pytest.Pytester) -> None:
    done = run(inner, "@pytest.mark.skip(reason='never')\ndef test_skipped(guest): pass")
    assert done.ret == pytest.ExitCode.TESTS_FAILED


def test_a_run_without_kernel_tests_passes(inner: pytest.Pytester) -> None:
    assert run(inner, "def test_plain(): pass").ret == pytest.ExitCode.OK


def test_an_unknown_shape_is_refused(inner: pytest.Pytester) -> None:
    done = run(inner, "@pytest.mark.vm(cores=4)\ndef test_shape(guest): pass")
    assert done.ret == pytest.ExitCode.USAGE_ERROR


def test_machines_are_not_thrashed(inner: pytest.Pytester) -> None:
    """Interleaved shapes and kernels are sorted: the collection alone shows it."""
    inner.makepyfile(
        test_inner="""
import pytest
@pytest.mark.vm(smp=4)
def test_a(guest): pass
def test_b(guest): pass
@pytest.mark.vm(smp=4)
def test_c(guest): pass
def test_d(): pass
"""
    )
    done = inner.runpytest_inprocess("--collect-only", "-q", "--rig=qemu")
    order = [line.split("::")[1] for line in done.outlines if "::" in line]
    assert order == [
        *["test_d", "test_b[6.12]", "test_a[6.12]", "test_c[6.12]"],
        *["test_b[7.3]", "test_a[7.3]", "test_c[7.3]"],
    ]
