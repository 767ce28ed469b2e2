"""The guest's half of `--ublk-vm`: an ordinary pytest whose reports go to the host instead of a terminal.

`python -P -m ublk_vm.worker`, with the job as JSON on stdin. What it has to say it says on stdout, one JSON object a
line; what the tests themselves write there (with `-s`) goes to stderr.

    {started: [nodeid, location]} {report: ...} {finished: [nodeid, location]}     a test
    {collected: n, deselected: n} {collect: report}                                the collection
    {warning: {...}} {internal: text} {exit: reason, code}                         besides
    {end: exit status}                                                             the last one
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ublk_vm.agent import KernelLog, ublk_mounts, ublk_nodes
from ublk_vm.plugin import KERNEL_VARIABLE
from ublk_vm.verdict import SETTLE_SECS, problems_in

if TYPE_CHECKING:
    import warnings
    from collections.abc import Generator, Sequence

Location = tuple[str, int | None, str]


class Line:
    """The way to the host. Threads of a test may cause messages too (warnings)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def say(self, **message: object) -> None:
        """Send a message whole; what JSON has no word for is sent as it prints."""
        data = (json.dumps(message, default=repr) + "\n").encode()
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]


class Reporter:
    """Sends what a terminal would have shown."""

    def __init__(self, line: Line, done: Sequence[str], kernel: str) -> None:
        self._line = line
        self._done = frozenset(done)
        self._kernel = kernel
        self._deselected = 0
        # A server that a test forks must not speak for it.
        self._pid = os.getpid()

    def _say(self, **message: object) -> None:
        if os.getpid() == self._pid:
            self._line.say(**message)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Keep the terminal's plugin, which others ask for a writer, but nothing of what it writes."""
        manager = config.pluginmanager
        if (terminal := manager.get_plugin("terminalreporter")) is not None:
            manager.unregister(terminal)
            nowhere = open(os.devnull, "w")  # noqa: PTH123, SIM115 - as long as the terminal's plugin
            config.add_cleanup(nowhere.close)
            manager.register(pytest.TerminalReporter(config, nowhere), "terminalreporter")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """A guest that takes over from one that died leaves out what that one has done."""
        items[:] = [item for item in items if item.nodeid not in self._done]

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Count."""
        self._deselected += len(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Tell how many tests there are."""
        self._say(collected=len(session.items), deselected=self._deselected)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Only what went wrong is worth a line."""
        if not report.passed:
            self._send("collect", report)

    def pytest_runtest_logstart(self, nodeid: str, location: Location) -> None:
        """A test begins."""
        self._say(started=[nodeid, location])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of it is over."""
        self._send("report", report)

    def pytest_runtest_logfinish(self, nodeid: str, location: Location) -> None:
        """All of it is over."""
        self._say(finished=[nodeid, location])

    def _send(self, kind: str, report: pytest.CollectReport | pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._say(**{kind: data})

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Remember whose hooks serialise."""
        self._config = session.config

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: tuple[str, int, str] | None
    ) -> None:
        """A warning, as far as text can carry it."""
        category = warning_message.category
        self._say(
            warning={
                "text": str(warning_message.message),
                "category": [category.__module__, category.__qualname__],
                "filename": warning_message.filename,
                "lineno": warning_message.lineno,
                "when": when,
                "nodeid": nodeid,
                "location": location,
            }
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_internalerror(self, excrepr: object) -> None:
        """Pytest itself failed."""
        self._say(internal=str(excrepr))

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """The host's Ctrl-C, or `pytest.exit()` of a test."""
        if isinstance(excinfo.value, pytest.exit.Exception):
            self._say(exit=str(excinfo.value.msg), code=excinfo.value.returncode)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Let reports for programs (JUnit) name the kernel."""
        item.user_properties.append(("kernel", self._kernel))


class Witness:
    """Fails a test during which the kernel complained, and the last one if disks are left behind."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._log = KernelLog(from_start=False)
        self._lines: list[str] = []
        self._first_seen: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Judge when everything that the test made has been torn down."""
        try:
            result = yield
        except BaseException:
            if found := self._complaints(item):
                item.add_report_section("teardown", "verdict", found)
            raise
        found = self._complaints(item)
        self._note_devices(item.nodeid)
        if nextitem is None:
            found += self._left()
        if found:
            pytest.fail(found.rstrip(), pytrace=False)
        return result

    def _complaints(self, item: pytest.Item) -> str:
        self._lines += self._log.new()
        allowed = [str(pattern) for marker in item.iter_markers("ublk_vm_allow") for pattern in marker.args]
        found = problems_in(self._lines, allowed)
        return "".join(f"{line}\n" for line in ["the kernel complained:", *found]) if found else ""

    def _note_devices(self, nodeid: str) -> None:
        there = self._belongings()
        self._first_seen = {name: self._first_seen.get(name, nodeid) for name in there}

    @staticmethod
    def _belongings() -> list[str]:
        return [*(f"device {n}" for n in ublk_nodes()), *(f"mount {m}" for m in ublk_mounts())]

    def _left(self) -> str:
        """A device's last node may take a moment to go; one that somebody forgot stays."""
        deadline = time.monotonic() + SETTLE_SECS * self._scale
        while (left := self._belongings()) and time.monotonic() < deadline:
            time.sleep(0.05)
        lines = [f"{name}, there since {self._first_seen.get(name, 'the end')}" for name in left]
        return "".join(f"{line}\n" for line in ["left behind:", *lines]) if lines else ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Show what the kernel said beside what the test said."""
        if call.when == "setup":
            self._lines = []
        report = yield
        self._lines += self._log.new()
        if report.failed and self._lines:
            report.sections.append(("Kernel log", "\n".join(self._lines)))
        return report


def main() -> int:
    """Run the job."""
    line = Line(os.dup(1))
    os.dup2(2, 1)
    job: dict[str, Any] = json.load(sys.stdin)
    sys.path[:0] = job["path"]
    scale = float(os.environ.get("UBLK_TIMESCALE", "1"))
    plugins = [Reporter(line, job["done"], job["release"]), Witness(scale)]
    code = pytest.main(job["args"], plugins=plugins)
    line.say(end=int(code))
    return int(code)


if __name__ == "__main__":
    assert KERNEL_VARIABLE in os.environ, "the guest's half of --ublk-vm; the host starts it"
    sys.exit(main())
