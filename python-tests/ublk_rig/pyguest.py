"""Tests of the Python package that are plain functions: listed here, run in a guest by the interpreter of `.venv`.

On the host `cases` lists them without importing anything. In the guest `python -m ublk_rig.pyguest MODULE
FUNCTION...` imports the module once, which is what costs time, and runs each function in a forked process of its
own: it can end its interpreter, exhaust it or be killed by what it tests. A line of JSON tells how each has ended.
A device or a thread that is left, and a complaint of the kernel, fail it. A function that the kernel rules out
raises `NotRun`; decorators say what the host has to know: `soak` (with --full only), `limit(seconds)`.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import ublk
from ublk_vm.verdict import problems_in

if TYPE_CHECKING:
    from collections.abc import Callable

    Test = TypeVar("Test", bound=Callable[..., None])

NOT_RUN = "not run: "
DEFAULT_SECS = 30.0
_OURS = ("ublk",)


class NotRun(Exception):
    """This kernel cannot do what the test needs; says what."""


def soak(test: Test) -> Test:
    """It takes minutes: with --full only."""
    return test


def limit(_seconds: float) -> Callable[[Test], Test]:
    """Native seconds that it may take, in place of a minute."""
    return lambda test: test


@dataclass(frozen=True)
class Case:
    """One function."""

    module: str
    name: str
    soak: bool
    seconds: float

    def __str__(self) -> str:
        return f"{self.module}::{self.name}"


def command(module: str, names: list[str]) -> list[str]:
    """Runs tests of a module, with every warning an error."""
    return [sys.executable, *("-X", "dev", "-W", "error", "-m", "ublk_rig.pyguest"), module, *names]


def cases(folder: Path) -> list[Case]:
    """Every function of the folder's modules whose name begins with test_."""
    return [
        _case(path.stem, node)
        for path in sorted(folder.glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def _case(module: str, node: ast.FunctionDef) -> Case:
    seconds, is_soak = DEFAULT_SECS, False
    for decorator in node.decorator_list:
        match decorator:
            case ast.Name(id="soak"):
                is_soak = True
            case ast.Call(func=ast.Name(id="limit"), args=[ast.Constant(value=float() | int() as given)]):
                seconds = float(given)
    return Case(module, node.name, is_soak, seconds)


def threads_of_ours() -> list[str]:
    """Names of the native threads of devices."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            if name.startswith(_OURS) and name not in {"ublk-log", "ublk-ctl"}:
                found.append(name)
    return found


def _left_behind() -> list[str]:
    """What is left after a test, once what ends by itself had its time."""
    deadline = time.monotonic() + 10
    while True:
        gc.collect()
        left = [f"device {info.id}" for info in ublk.list()] + [f"thread {name}" for name in threads_of_ours()]
        if not left or time.monotonic() > deadline:
            return left
        # Threads that end announce it to nobody.
        time.sleep(0.02)


def _child(test: Callable[[], None], seconds: float) -> int:
    faulthandler.enable()
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        test()
    except NotRun as reason:
        print(f"{NOT_RUN}{reason}")
        return 0
    except BaseException as error:  # noqa: BLE001  # this is what tests end with
        told = traceback.TracebackException.from_exception(error, capture_locals=True)
        for frame in told.stack:
            # Disks are large.
            frame.locals = {name: text[:300] for name, text in (frame.locals or {}).items()}
        print("".join(told.format())[-20000:])
        return 1
    if left := _left_behind():
        print(f"left behind: {', '.join(left)}")
        return 1
    return 0


class _KernelLog:
    """What the kernel says from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def lines(self) -> list[str]:
        """Since the last call."""
        found = []
        while True:
            try:
                found.append(os.read(self._fd, 8192).decode(errors="replace").partition(";")[2].strip())
            except BlockingIOError:
                return found
            except BrokenPipeError:  # some were lost
                continue


def _wait(pid: int, seconds: float) -> int | None:
    """The status of a child; None if not even SIGKILL ended it."""
    pidfd = os.pidfd_open(pid)
    try:
        for signal_number in (None, signal.SIGKILL):
            if signal_number is not None:
                os.kill(pid, signal_number)
            if select.select([pidfd], [], [], seconds)[0]:
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return None
    finally:
        os.close(pidfd)


def _run(test: Callable[[], None], seconds: float, log: _KernelLog) -> tuple[str, str]:
    """How a test ended, and what is to be said of it."""
    with tempfile.TemporaryFile() as said:
        log.lines()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os.setsid()
            status = _child(test, seconds)
            sys.stdout.flush()
            # As a program ends: what is registered for that runs, and what it leaves is found.
            sys.exit(status)
        ended = _wait(pid, seconds + 30)
        said.seek(0)
        text = said.read().decode(errors="replace")
    outcome = "passed" if ended == 0 else "failed"
    if ended == 0 and NOT_RUN in text:
        return "skipped", text.partition(NOT_RUN)[2].strip()
    if ended != 0:
        text += f"\nthe test's process ended with {ended}"
    for info in ublk.list():
        outcome, text = "failed", f"{text}\nleft behind: {info}"
        with contextlib.suppress(OSError):
            ublk.delete(info.id, 10)
    if problems := problems_in(log.lines()):
        outcome, text = "failed", "\n".join([text, "the kernel complained:", *problems])
    return outcome, text


def main(module: str, *names: str) -> int:
    """Runs tests, one after another."""
    scale = float(os.environ.get("UBLK_TIMESCALE", "1"))
    known = {
        case.name: case for case in cases(Path(__file__).parent.parent / "tests/py_guest") if case.module == module
    }
    tests = importlib.import_module(f"tests.py_guest.{module}")
    log = _KernelLog()
    for name in names:
        began = time.monotonic()
        outcome, text = _run(getattr(tests, name), known[name].seconds * scale, log)
        told = {"name": name, "outcome": outcome, "text": text, "seconds": time.monotonic() - began}
        print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    # By its own name, as the tests know it: `NotRun` is one class.
    sys.exit(importlib.import_module("ublk_rig.pyguest").main(*sys.argv[1:]))
