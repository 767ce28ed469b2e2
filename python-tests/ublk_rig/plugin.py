"""The pytest plugin: the `guest` fixture on every kernel, and what no test can forget.

Markers:
    vm(smp=2, mem="2G", icount=False, fresh=False)   the machine that a test needs; `fresh` boots one of its own
    console_allow("regex", ...)                      kernel complaints that this test provokes on purpose
    leak_allow("regex", ...)                         what this test leaves on purpose; its machine is discarded
    time_limit(seconds)                              native seconds for the test's body (default 300)
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ublk_rig import host, layout, parallel, wheel
from ublk_rig.pool import Lease, Pool
from ublk_rig.report import Tally
from ublk_rig.watchdog import bounded
from ublk_vm import accel, kernels, vm
from ublk_vm.channel import MachineDied
from ublk_vm.guest import Guest, Shared
from ublk_vm.timescale import Timescale
from ublk_vm.verdict import Verdict, problems_in

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from contextlib import AbstractContextManager

TEST_SECS = 300.0
# Booting has its own bounds, with retries; fetching kernels comes on top in the first test.
SETUP_SECS = 1200.0
TEARDOWN_SECS = 120.0


class Rig:
    """The state of one run."""

    def __init__(self, config: pytest.Config) -> None:
        given = config.getoption("--kernel")
        self.own = None
        if given:
            if not config.getoption("--modules"):
                raise pytest.UsageError("--kernel needs --modules")
            self.own = kernels.own(Path(given), Path(config.getoption("--modules")))
        asked = config.getoption("--kernels")
        rig = config.getoption("--rig")
        if rig == "host" and not host.usable():
            raise pytest.UsageError(
                "--rig=host: /dev/ublk-control is not here or not ours (modprobe ublk_drv? root?)"
            )
        self.on_host = rig == "host" or (rig == "auto" and not given and not asked and host.usable())
        if self.on_host:
            self.labels = [kernels.series_of(Path("/proc/sys/kernel/osrelease").read_text())]
        elif self.own:
            self.labels = [self.own.label]
        else:
            self.labels = [k.strip() for k in (asked or ",".join(kernels.SERIES)).split(",") if k.strip()]
        self.artifacts = layout.ARTIFACTS
        self.pool = Pool(self.artifacts, self.own, on_host=self.on_host)
        self.tally = Tally(self.labels, releases=self.pool.releases)
        self.pending = ""
        # Until a machine is up, its emulation is not known: bound generously.
        self.scale = Timescale.of(emulated=not self.on_host)

    def folder(self, nodeid: str) -> Shared:
        """A test's folder, as host and guest see it."""
        name = re.sub(r"[^\w.=-]+", "_", nodeid.removeprefix("tests/")).strip("_")[:150]
        return Shared(self.artifacts / name, str(self.artifacts / name) if self.on_host else f"{vm.SHARED_AT}/{name}")


_RIG: pytest.StashKey[Rig] = pytest.StashKey()
_GUEST: pytest.StashKey[Guest] = pytest.StashKey()
_LOG: pytest.StashKey[list[str]] = pytest.StashKey()
_FAILED: pytest.StashKey[bool] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the rig's options."""
    group = parser.getgroup("ublk rig")
    group.addoption("--rig", choices=["auto", "qemu", "host"], default="auto", help="where kernel tests run")
    group.addoption("--kernels", help="series to test on, default " + ",".join(kernels.SERIES))
    group.addoption("--kernel", metavar="PATH", help="test on this kernel image instead")
    group.addoption("--modules", metavar="DIR", help="the modules of --kernel (holds lib/modules/RELEASE)")
    group.addoption("--full", action="store_true", help="every combination and the soaks")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers and set the run up."""
    assert __doc__
    for line in __doc__.partition("Markers:\n")[2].strip().splitlines():
        name, text = re.split(r" {2,}", line.strip(), maxsplit=1)
        config.addinivalue_line("markers", f"{name}: {text}")
    try:
        rig = config.stash[_RIG] = Rig(config)
    except kernels.KernelError as e:
        raise pytest.UsageError(str(e)) from e
    if rig.on_host and parallel.is_controller(config):
        raise pytest.UsageError("this host is one machine: without -n, or with --rig=qemu")
    config.pluginmanager.register(parallel.Counting(rig.tally, rig.pool.boots))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say where kernel tests will run, and whether the package that they will find is the tree's."""
    rig = config.stash[_RIG]
    said = [f"ublk rig: {'this host' if rig.on_host else 'QEMU'}, kernels {', '.join(rig.labels)}"]
    if not rig.on_host and (why := accel.closed()):
        said.append(f"kvm: {why}")
    return [*said, f"WARNING: {reason}"] if (reason := wheel.stale()) else said


@pytest.fixture(scope="session")
def package() -> Path:
    """The wheel that `.venv` holds, for tests of the Python package; one that is not the tree's proves nothing."""
    try:
        return wheel.current()
    except wheel.CannotBuild as e:
        pytest.fail(str(e), pytrace=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test with a guest runs once on every kernel."""
    if "guest" in metafunc.fixturenames:
        metafunc.parametrize("guest", metafunc.config.stash[_RIG].labels, indirect=True)


def kernel_of(item: pytest.Item) -> str | None:
    """The kernel that a test runs on."""
    callspec = getattr(item, "callspec", None)
    label: str | None = callspec.params.get("guest") if callspec else None
    return label


def shape_of(item: pytest.Item) -> tuple[vm.Shape, bool]:
    """The machine that a test needs, and whether for itself alone; the nearest marker decides."""
    marker = item.get_closest_marker("vm")
    asked = dict(marker.kwargs) if marker else {}
    fresh = bool(asked.pop("fresh", False))
    try:
        return vm.Shape(**asked), fresh
    except TypeError as e:
        raise pytest.UsageError(f"{item.nodeid}: marker vm: {e}") from e


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order tests so that a machine serves all its tests in a row."""
    rig = config.stash[_RIG]

    def order(item: pytest.Item) -> tuple[int, int, str, bool]:
        kernel = kernel_of(item)
        if kernel is None:
            return (0, 0, "", False)
        shape, fresh = shape_of(item)
        return (1, rig.labels.index(kernel), repr(shape), fresh)

    items.sort(key=order)
    if any("::" in a for a in config.args):
        rig.tally.excused |= set(rig.labels)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """A kernel whose tests the user deselected is not missed."""
    for item in items:
        if (kernel := kernel_of(item)) is not None:
            item.config.stash[_RIG].tally.excused.add(kernel)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Now it is known what should run."""
    tally = session.config.stash[_RIG].tally
    for item in session.items:
        tally.add(item.nodeid, kernel_of(item))


@pytest.fixture
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A machine with a real kernel; see `ublk_vm.guest.Guest`."""
    rig, item = request.config.stash[_RIG], request.node
    shape, fresh = shape_of(item)
    if rig.on_host:
        _skip_if_host_cannot(item, shape, fresh=fresh)
    try:
        lease = rig.pool.take(request.param, shape, fresh=fresh)
    except (MachineDied, kernels.KernelError) as e:
        pytest.fail(f"no machine with kernel {request.param}: {e}", pytrace=False)
    rig.scale = lease.machine.scale
    given = Guest(lease.machine, rig.folder(item.nodeid))
    item.stash[_GUEST] = given
    item.stash[_LOG] = []
    _begin(rig, item, lease)
    yield given
    verdict = _end(rig, item, lease)
    if str(verdict):
        pytest.fail(str(verdict), pytrace=False)


def _skip_if_host_cannot(item: pytest.Item, shape: vm.Shape, *, fresh: bool) -> None:
    if fresh or item.get_closest_marker("leak_allow"):
        pytest.skip("needs a machine that can be thrown away; this is the host")
    if shape.icount:
        pytest.skip("counts instructions in QEMU; this is the host")
    if (cpus := len(os.sched_getaffinity(0))) < shape.smp:
        pytest.skip(f"needs {shape.smp} CPUs, this host has {cpus}")


def _begin(rig: Rig, item: pytest.Item, lease: Lease) -> None:
    try:
        log = lease.inspector.begin()
    except MachineDied as e:
        words = lease.machine.console()[-4000:]
        rig.pool.give_back(lease, soiled=True)
        pytest.fail(f"the machine does not answer before the test: {e}; console:\n{words}", pytrace=False)
    item.stash[_LOG] = log
    if late := problems_in(log):
        rig.pool.give_back(lease, soiled=True)
        pytest.fail("the kernel complained before this test began:\n  " + "\n  ".join(late), pytrace=False)


def _end(rig: Rig, item: pytest.Item, lease: Lease) -> Verdict:
    verdict = Verdict()
    try:
        verdict = lease.inspector.end(_patterns(item, "console_allow"), _patterns(item, "leak_allow"))
        if verdict.soiled and rig.on_host:
            lease.machine.channel.ask("reap", 10)
    except MachineDied as e:
        words = lease.machine.console()[-4000:]
        verdict.left.append(f"a machine that no longer answers ({e}); console:\n{words}")
    item.stash[_LOG] += verdict.log
    # One that failed in the middle has not put back what no inspector looks for: a node's mode, a sysctl, a module.
    failed = item.stash.get(_FAILED, False)
    rig.pool.give_back(lease, soiled=verdict.soiled or bool(str(verdict)) or failed)
    return verdict


def _patterns(item: pytest.Item, marker: str) -> list[str]:
    return [p for m in item.iter_markers(marker) for p in m.args]


def _limit(item: pytest.Item, seconds: float) -> AbstractContextManager[None]:
    rig = item.config.stash[_RIG]
    return bounded(rig.scale.seconds(seconds), item.nodeid, rig.pool.kill_current)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Bound the setup."""
    with _limit(item, SETUP_SECS):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Bound the test."""
    marker = item.get_closest_marker("time_limit")
    with _limit(item, marker.args[0] if marker else TEST_SECS):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Bound the teardown."""
    with _limit(item, TEARDOWN_SECS):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """After the last phase, keep what explains a failure."""
    report = yield
    parallel.mark(report, kernel_of(item))
    item.stash[_FAILED] = report.failed or item.stash.get(_FAILED, False)
    given = item.stash.get(_GUEST, None)
    if given is not None:
        _keep(item.config.stash[_RIG], item, report, given)
    return report


def _keep(rig: Rig, item: pytest.Item, report: pytest.TestReport, given: Guest) -> None:
    folder = rig.folder(item.nodeid).host
    if not item.stash[_FAILED]:
        if report.when == "teardown":
            shutil.rmtree(folder, ignore_errors=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "guest.log").write_text(given.transcript())
    (folder / "console.log").write_text(given.console())
    (folder / "kernel.log").write_text("".join(f"{line}\n" for line in item.stash[_LOG]))
    with (folder / "failure.txt").open("a" if report.when != "setup" else "w") as f:
        f.write(f"== {report.when}: {report.outcome}\n{report.longreprtext}\n")
    if report.failed:
        report.sections.append(("ublk rig", f"kept in {folder}"))


def is_whole(session: pytest.Session, labels: list[str]) -> bool:
    """Whether the run had every test on every kernel, and came to its end."""
    config = session.config
    chosen = config.option.keyword or config.option.markexpr or any("::" in arg for arg in config.args)
    folders = all(Path(arg).is_dir() for arg in config.args)
    ended = all(test.outcome != "not run" for test in config.stash[_RIG].tally.tests.values())
    return bool(folders and ended and not chosen and set(kernels.SERIES) <= set(labels))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the machines; a run that tested no kernel is no pass."""
    rig = session.config.stash[_RIG]
    rig.pool.close()
    if session.config.option.collectonly:
        return
    if parallel.is_worker(session.config):
        parallel.hand_in(session.config, rig.tally, rig.pool.boots)
        return
    if rig.tally.complaints() and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    facts = {
        "rig": "host" if rig.on_host else "qemu",
        "kernels": rig.labels,
        "releases": rig.tally.releases,
        "boots": rig.pool.boots,
        "whole": is_whole(session, rig.labels),
    }
    rig.tally.write(rig.artifacts / "summary.json", facts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many tests ran on which kernel."""
    rig = config.stash[_RIG]
    if config.option.collectonly:
        return
    terminalreporter.section("kernel tests")
    for line in rig.tally.lines():
        terminalreporter.line(line)
    for line in rig.tally.complaints():
        terminalreporter.line(f"NOT A PASS: {line}", red=True)
