"""`pytest --ublk-vm` as a user runs it: from the wheel in an environment of its own, on real kernels."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ublk_rig import layout
from ublk_vm import kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = layout.TREE / "python-tests/example_project"
pytestmark = pytest.mark.time_limit(400)


@pytest.fixture(scope="module")
def environment(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and the pinned pytest, and not with the rig."""
    where = tmp_path_factory.mktemp("user") / "venv"
    subprocess.run([Path(sys.executable).resolve(), "-m", "venv", "--without-pip", where], check=True)
    pins = (layout.TREE / "python-tests/requirements.txt").read_text()
    pytest_pin = re.search(r"^pytest==.*$", pins, re.MULTILINE)
    assert pytest_pin
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", where / "bin/python", "install", "--quiet"),
            *("--disable-pip-version-check", "-c", layout.TREE / "python-tests/requirements.txt"),
            *(pytest_pin[0], package),
        ],
        check=True,
    )
    return where


@pytest.fixture
def series(request: pytest.FixtureRequest) -> list[str]:
    """The kernels that this run is about, newest last."""
    asked: str | None = request.config.getoption("--kernels")
    return asked.split(",") if asked else list(kernels.SERIES)


class User:
    """Runs pytest in a project."""

    def __init__(self, environment: Path, where: Path) -> None:
        self.where = where
        self._argv = [str(environment / "bin/pytest"), "-p", "no:cacheprovider"]

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Both of its streams come by one pipe."""
        return subprocess.Popen(
            # A shell's background jobs ignore Ctrl-C, and so would this, if the tests are one.
            ["env", "--default-signal=INT", *self._argv, *options],
            cwd=self.where,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *options: str) -> tuple[int, str]:
        """Its exit status and what it printed."""
        with self.start(*options) as process:
            try:
                out, _ = process.communicate()
            except BaseException:
                process.kill()
                raise
        return process.returncode, out


@pytest.fixture
def user(environment: Path, tmp_path: Path) -> Iterator[User]:
    yield User(environment, tmp_path)
    # A guest holds the tree's files; none may outlive its run.
    assert not subprocess.run(["pgrep", "-f", f"path={tmp_path}"], capture_output=True, check=False).stdout


def cases(path: Path) -> dict[str, str]:
    """What JUnit's file says of each test."""
    found = {}
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 - our own file
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[case.attrib["name"]] = bad[0] if bad else "passed"
    return found


def test_the_example_project_passes_on_every_kernel(user: User, series: list[str]) -> None:
    shutil.copytree(PROJECT, user.where, dirs_exist_ok=True)
    code, out = user.run(f"--ublk-vm={','.join(series)}", "--junitxml=junit.xml", "-W", "error")
    assert code == 0, out
    told = cases(user.where / "junit.xml")
    assert set(told.values()) == {"passed"}, told
    for kernel in series:
        mark = f"[{kernel}" if len(series) > 1 else ""
        assert any(name.startswith(f"test_what_is_written_is_read{mark}") for name in told)
        assert (user.where / f"ublk-vm-artifacts/{kernel}/release.txt").read_text().startswith(f"{kernel}.")
    assert not (user.where / "tests/written-by-the-guest").exists(), "the overlay let a write through"


FAILING = """
import os, signal, subprocess, warnings
import pytest

@pytest.fixture(scope="module")
def numbers():
    print("made once")
    yield [1, 2]

@pytest.mark.parametrize("n", [1, 2])
def test_passes(n, numbers):
    assert n in numbers

def test_fails():
    assert {"k": [1, 2, 3]} == {"k": [1, 2, 4]}

def test_skips():
    pytest.skip("not today")

@pytest.mark.xfail(strict=True)
def test_xfails():
    assert False

def test_warns():
    warnings.warn("careful")

def test_provokes_the_kernel():
    open("/dev/kmsg", "w").write("<4>WARNING: CPU: 0 PID: 1 at planted\\n")

def test_takes_the_process_down():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_takes_the_kernel_down():
    open("/proc/sysrq-trigger", "w").write("c")
    signal.pause()

def test_never_ends():
    signal.pause()

def test_leaves_a_disk():
    subprocess.run(["mknod", "/dev/ublkc7", "c", "240", "7"], check=True)

def test_deselected():
    pass
"""


def test_every_way_to_fail_is_reported_and_spares_the_others(user: User, series: list[str]) -> None:
    (user.where / "test_all.py").write_text(FAILING)
    code, out = user.run(
        *(f"--ublk-vm={series[-1]}", "--ublk-vm-timeout=2", "--junitxml=junit.xml", "-rA", "--durations=2"),
        *("-k", "not deselected", "--ublk-vm-artifacts=kept"),
    )
    assert code == pytest.ExitCode.TESTS_FAILED, out
    assert "4 failed, 5 passed, 1 skipped, 1 deselected, 1 xfailed, 1 warning, 2 errors" in out, out
    told = cases(user.where / "junit.xml")
    assert told == {
        **dict.fromkeys(["test_passes[1]", "test_passes[2]", "test_warns"], "passed"),
        **dict.fromkeys(["test_skips", "test_xfails"], "skipped"),
        "test_fails": "failure",
        "test_provokes_the_kernel": "error",
        "test_takes_the_process_down": "failure",
        "test_takes_the_kernel_down": "failure",
        "test_never_ends": "failure",
        "test_leaves_a_disk": "error",
    }
    for said in (
        "AssertionError: assert {'k': [1, 2, 3]} == {'k': [1, 2, 4]}",  # rewriting works
        "UserWarning: careful",
        "WARNING: CPU: 0 PID: 1 at planted",
        "died of SIGSEGV",
        "Fatal Python error: Segmentation fault",
        "the guest died",
        "Kernel panic - not syncing",
        "no result for",
        "in test_never_ends",
        "device /dev/ublkc7, there since test_all.py::test_leaves_a_disk",
        "slowest 2 durations",
    ):
        assert said in out, said
    console = user.where / f"kept/{series[-1]}/console.log"
    assert str(console) in out
    assert "Kernel panic" in console.read_text()


STOPPING = """
import signal
import pytest

@pytest.fixture
def held(ublk_vm_artifacts):
    (ublk_vm_artifacts / "held").touch()
    yield
    (ublk_vm_artifacts / "torn-down").touch()

def test_first(): pass
def test_second(): assert False
def test_third(): pass
def test_waits(held): signal.pause()
"""


def test_the_first_failure_stops_it_on_every_kernel(user: User, series: list[str]) -> None:
    (user.where / "test_stop.py").write_text(STOPPING)
    both = list(dict.fromkeys([*series, *kernels.SERIES]))
    code, out = user.run(f"--ublk-vm={','.join(both)}", "-x", "-v")
    assert code == pytest.ExitCode.TESTS_FAILED, out
    assert f"test_stop.py::test_first[{both[0]}] PASSED" in out
    assert "1 failed, 1 passed" in out
    assert "stopping after 1 failures" in out
    assert out.count("is up (") == 1, "the second kernel was not to be booted"


ENDS_BADLY = """
import os

def pytest_sessionfinish(session):
    if "UBLK_VM_KERNEL" in os.environ:
        session.exitstatus = 1
"""


def test_a_bad_end_that_no_test_has_told_of_is_no_pass(user: User, series: list[str]) -> None:
    (user.where / "conftest.py").write_text(ENDS_BADLY)
    (user.where / "test_one.py").write_text("def test_passes(): pass\n")
    code, out = user.run(f"--ublk-vm={series[-1]}")
    assert code == pytest.ExitCode.TESTS_FAILED, out
    assert "1 passed" in out
    assert f"Linux {series[-1]} ended with 1, and no test has failed" in out


def test_ctrl_c_tears_fixtures_down_and_leaves_no_guest(user: User, series: list[str]) -> None:
    (user.where / "test_stop.py").write_text(STOPPING)
    folder = user.where / f"ublk-vm-artifacts/{series[-1]}"
    with user.start(f"--ublk-vm={series[-1]}", "test_stop.py::test_waits", "-v") as process:
        assert process.stdout
        said = ""
        for line in iter(process.stdout.readline, ""):
            said += line
            if line.startswith("collected"):
                break
        while not (folder / "held").exists() and process.poll() is None:
            time.sleep(0.05)
        # As a terminal does it: to the whole group, QEMU being in none of it.
        os.killpg(process.pid, signal.SIGINT)
        said += process.stdout.read()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, said
    assert "KeyboardInterrupt" in said
    assert (folder / "torn-down").exists(), said
