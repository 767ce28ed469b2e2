"""One run, several machines: pytest-xdist's workers, each with one kernel at a time.

A worker collects all tests and runs those it is handed; the controller, which collects none, hands them out and
counts. `Scheduler` hands out what shares a machine as one piece, so that two kernels are tested side by side and no
machine is booted twice. Where pytest runs without workers, the one process is both.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xdist.remote import Producer
    from xdist.workermanage import WorkerController

    from ublk_rig.report import Tally

_KEY = "ublk_rig"


class Scheduler(LoadScopeScheduling):  # type: ignore[misc]  # xdist is not typed
    """A worker gets all tests of a kernel, or all of a file that needs none; the largest first."""

    def __init__(self, config: pytest.Config, log: Producer | None, kernels: Sequence[str]) -> None:
        super().__init__(config, log)
        self._kernels = frozenset(kernels)

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        parameters = re.search(r"\[(.*)\]$", test)
        found = self._kernels.intersection(parameters[1].split("-")) if parameters else ()
        return next(iter(found), file)


def is_worker(config: pytest.Config) -> bool:
    """Whether somebody else counts."""
    return hasattr(config, "workerinput")


def is_controller(config: pytest.Config) -> bool:
    """Whether workers run the tests."""
    return not is_worker(config) and bool(getattr(config.option, "numprocesses", None))


class Counting:
    """A plugin that counts every phase of every test, whichever process it ran in."""

    def __init__(self, tally: Tally, boots: list[float]) -> None:
        self._tally = tally
        self._boots = boots

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a phase."""
        outcome = self._tally.add(report.nodeid, report.__dict__.get(_KEY))
        result = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        outcome.phase(report.when, result, report.duration, _reason(report))
        outcome.properties.update(report.user_properties)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Producer) -> Scheduler:
        """Hand tests out by kernel."""
        return Scheduler(config, log, self._tally.requested)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: WorkerController) -> None:
        """Take what a worker knows and no report says; nothing from one that died."""
        told: dict[str, Any] = getattr(node, "workeroutput", {}).get(_KEY, {})
        for nodeid, kernel in told.get("selected", ()):
            self._tally.add(nodeid, kernel)
        self._tally.excused.update(told.get("excused", ()))
        self._tally.releases.update(told.get("releases", {}))
        self._boots.extend(told.get("boots", ()))


def mark(report: pytest.TestReport, kernel: str | None) -> None:
    """Have a report say, wherever it is sent, which kernel its test ran on."""
    report.__dict__[_KEY] = kernel


def hand_in(config: pytest.Config, tally: Tally, boots: list[float]) -> None:
    """What a worker tells the controller at its end."""
    config.workeroutput[_KEY] = {  # type: ignore[attr-defined]
        "selected": [(test.nodeid, test.kernel) for test in tally.tests.values()],
        "excused": sorted(tally.excused),
        "releases": tally.releases,
        "boots": boots,
    }


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return report.longreprtext.strip().splitlines()[-1] if report.failed and report.longreprtext.strip() else ""
