"""The host's half of `--ublk-vm`: no test is collected or run here; the guests' reports are, as if they were ours.

So everything that lives on reports works as ever: the terminal, `-x`, `--junitxml`, `--durations`, exit codes.
With several kernels each test is reported once for each, the kernel's series being its first parameter:
`test_disk[7.3]`, `test_disk[7.3-4096]`; such a name selects that test on that kernel.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from ublk_vm import kernels, layout, needs, vm
from ublk_vm.channel import MachineDied
from ublk_vm.guestrun import GuestLost, GuestRun, Job

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ublk_vm.guestrun import Message

Location = tuple[str, int | None, str]


def labelled(text: str, label: str) -> str:
    """A test's name with its kernel as the first parameter."""
    head, bracket, parameters = text.partition("[")
    return f"{head}[{label}-{parameters}" if bracket else f"{head}[{label}]"


def unlabelled(argument: str, labels: list[str]) -> tuple[str, str | None]:
    """An argument of pytest without the kernel that it names, and that kernel."""
    path, colons, name = argument.partition("::")
    for label in labels if colons else ():
        if name.endswith(f"[{label}]") and name.count("[") == 1:
            return f"{path}::{name.removesuffix(f'[{label}]')}", label
        head, bracket, parameters = name.partition(f"[{label}-")
        if bracket and "[" not in head:
            return f"{path}::{head}[{parameters}", label
    return argument, None


def arguments_for(label: str, arguments: list[str], labels: list[str]) -> list[str] | None:
    """The arguments for one kernel's pytest; None if they name tests of other kernels only."""
    found = [unlabelled(a, labels) for a in arguments]
    mine = [a for a, of in found if of in (None, label)]
    named = [of for _, of in found if of is not None]
    tests_left = any("::" in a for a in mine)
    return None if named and label not in named and not tests_left else mine


@dataclass
class Running:
    """Where one guest's pytest is."""

    label: str
    done: list[str] = field(default_factory=list)
    test: tuple[str, Location] | None = None
    began: float = 0.0
    collected: int | None = None
    code: int = 0
    collect_errors: int = 0
    failed: bool = False


class RemoteRun:
    """Registered with pytest in the place of its own collection and loop."""

    def __init__(self, config: pytest.Config, labels: list[str]) -> None:
        self._config = config
        option = config.getoption
        if option("usepdb") or option("trace"):
            raise pytest.UsageError("--ublk-vm: a debugger has no terminal in a guest")
        if option("numprocesses", None):
            raise pytest.UsageError("--ublk-vm: a guest runs its tests one after another; leave -n out")
        own = option("--ublk-vm-kernel")
        try:
            self._own = kernels.own(Path(own), Path(option("--ublk-vm-modules"))) if own else None
            needs.check(fetches=self._own is None, seen=config.invocation_params.dir)
            # The agent and the worker run from where this package is installed.
            needs.check(fetches=False, seen=layout.PACKAGE)
        except (kernels.KernelError, needs.CannotRun) as e:
            raise pytest.UsageError(f"--ublk-vm: {e}") from e
        self._labels = [self._own.label] if self._own else labels
        self._shape = vm.Shape(option("--ublk-vm-cpus"), option("--ublk-vm-memory"))
        self._artifacts = config.invocation_params.dir / option("--ublk-vm-artifacts")
        self._quiet: float = option("--ublk-vm-timeout")
        self._planned = 0
        self._collected: dict[str, int] = {}

    @property
    def _reporter(self) -> pytest.TerminalReporter | None:
        return cast("pytest.TerminalReporter | None", self._config.pluginmanager.get_plugin("terminalreporter"))

    def _line(self, text: str) -> None:
        if self._config.option.verbose >= 0 and (reporter := self._reporter):
            reporter.ensure_newline()
            reporter.write_line(text)

    def _kernel(self, label: str) -> kernels.Kernel:
        if self._own:
            return self._own
        try:
            kernel = kernels.ensure(label)
        except kernels.KernelError as e:
            raise pytest.UsageError(f"--ublk-vm={label}: {e}") from e
        if kernel.stands_in:
            newest = kernels.series_of(kernel.release)
            raise pytest.UsageError(f"--ublk-vm={label}: Debian has no such kernel now; its newest is {newest}")
        return kernel

    @contextmanager
    def _uncaptured(self) -> Iterator[None]:
        """Progress of what takes minutes (fetching a kernel) must be seen while it lasts."""
        manager: Any = self._config.pluginmanager.get_plugin("capturemanager")
        if manager is None:
            yield
            return
        with manager.global_and_fixture_disabled():
            yield

    def pytest_report_header(self) -> str:
        """Say where the tests run."""
        return f"ublk-vm: in QEMU, on Linux {', '.join(self._labels)}; artifacts: {self._artifacts}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool:
        """The guests collect. A path that does not exist is not worth a boot."""
        for argument in () if self._config.option.pyargs else self._config.args:
            path = Path(str(argument).partition("::")[0])
            if not (self._config.invocation_params.dir / path).exists():
                raise pytest.UsageError(f"file or directory not found: {argument}")
        session.items = []
        session.testscollected = 0
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """One kernel after another."""
        given = list(map(str, self._config.invocation_params.args))
        plan = {label: arguments_for(label, given, self._labels) for label in self._labels}
        self._planned = sum(arguments is not None for arguments in plan.values())
        for label, arguments in plan.items():
            if arguments is None:
                continue
            run = Running(label)
            try:
                self._run(session, run, arguments)
            finally:
                self._expect(session, run, last=True)
            _conclude(session, run)
        return True

    def _run(self, session: pytest.Session, run: Running, arguments: list[str]) -> None:
        """All tests on one kernel, in as many guests as it takes."""
        cwd = self._config.invocation_params.dir
        path = [str(cwd)] if {"", str(cwd)} & set(sys.path) else []
        shared = self._artifacts / run.label
        with self._uncaptured():
            kernel = self._kernel(run.label)
        (shared / "console.log").unlink(missing_ok=True)
        while True:
            self._line(f"ublk-vm: booting Linux {run.label}")
            job = Job(arguments, cwd, path, run.done)
            try:
                with self._uncaptured():
                    guest = GuestRun(kernel, self._shape, shared, job, self._quiet)
            except MachineDied as e:
                pytest.exit(f"no guest with Linux {run.label}: {e}", returncode=pytest.ExitCode.INTERNAL_ERROR)
            with guest:
                machine = guest.machine
                self._line(
                    f"ublk-vm: Linux {machine.release} is up ({machine.accel.name}, {machine.boot_secs:.1f} s)"
                )
                lost = self._listen(session, run, guest)
            if run.failed:
                _keep(shared / "console.log", machine.console())
            if lost is None:
                _remove_if_empty(shared)
                return
            if not self._blame(run, lost, shared / "console.log"):
                return
            if session.shouldfail or session.shouldstop:
                return

    def _listen(self, session: pytest.Session, run: Running, guest: GuestRun) -> GuestLost | None:
        try:
            for message in guest.messages():
                self._take(session, run, message)
                if "started" in message and (session.shouldfail or session.shouldstop):
                    guest.interrupt()
                    return None
        except KeyboardInterrupt:
            self._line("ublk-vm: interrupting the guest's tests; once more to kill the guest")
            guest.interrupt()
            raise
        except GuestLost as lost:
            run.failed = True
            return lost
        return None

    def _take(self, session: pytest.Session, run: Running, message: Message) -> None:
        """Do here what the message says was done there."""
        hook = self._config.hook
        match message:
            case {"collected": int(count), "deselected": int(deselected)}:
                if run.collected is None:
                    run.collected = count
                    self._expect(session, run)
                    self._say_collected(count, deselected)
            case {"collect": data}:
                report = self._report(data)
                run.collect_errors += report.failed
                hook.pytest_collectreport(report=report)
            case {"warning": given}:
                self._warn(given)
            case {"text": str(text)}:
                if reporter := self._reporter:
                    reporter.write(text, flush=True)
            case {"internal": str(text)}:
                self._line("".join(f"INTERNALERROR> {line}\n" for line in text.splitlines()).rstrip())
            case {"exit": str(reason), "code": code}:
                run.code = pytest.ExitCode.INTERRUPTED if code is None else code
                pytest.exit(reason, returncode=run.code)
            case {"end": int(code)}:
                run.code = code
            case _:
                self._take_test(run, message)

    def _take_test(self, run: Running, message: Message) -> None:
        hook = self._config.hook
        match message:
            case {"started": [nodeid, location]}:
                run.test, run.began = (nodeid, tuple(location)), time.monotonic()
                named = self._named(run.label, nodeid, location)
                hook.pytest_runtest_logstart(nodeid=named[0], location=named[1])
            case {"report": data}:
                data["nodeid"], data["location"] = self._named(run.label, data["nodeid"], data["location"])
                report = self._report(data)
                run.failed |= report.failed
                hook.pytest_runtest_logreport(report=report)
            case {"finished": [nodeid, location]}:
                run.done.append(nodeid)
                run.test = None
                named = self._named(run.label, nodeid, location)
                hook.pytest_runtest_logfinish(nodeid=named[0], location=named[1])
            case _:
                raise ValueError(f"the guest's worker said {message}")

    def _report(self, data: dict[str, Any]) -> Any:  # noqa: ANN401 - reports of plugins are classes of their own
        """A report from the guest; JSON knows lists where pytest wants tuples."""
        for key in ("sections", "user_properties"):
            data[key] = [tuple(pair) for pair in data.get(key) or ()]
        if isinstance(data.get("longrepr"), list):
            data["longrepr"] = tuple(data["longrepr"])
        return self._config.hook.pytest_report_from_serializable(config=self._config, data=data)

    def _named(self, label: str, nodeid: str, location: Location) -> tuple[str, Location]:
        if len(self._labels) == 1:
            return nodeid, location
        return labelled(nodeid, label), (location[0], location[1], labelled(location[2], label))

    def _expect(self, session: pytest.Session, run: Running, *, last: bool = False) -> None:
        """How many tests there will be; a kernel that has not collected yet is taken to have as many as this one."""
        if run.collected is not None:
            self._collected[run.label] = run.collected
        known = sum(self._collected.values())
        unknown = 0 if last else self._planned - len(self._collected)
        session.testscollected = known + unknown * (run.collected or 0)

    def _say_collected(self, count: int, deselected: int) -> None:
        text = f"collected {count + deselected} item{'s' if count + deselected != 1 else ''}"
        if deselected:
            text += f" / {deselected} deselected / {count} selected"
            if reporter := self._reporter:
                reporter.stats.setdefault("deselected", []).extend([None] * deselected)
        self._line(text)

    def _warn(self, given: dict[str, Any]) -> None:
        module, name = given["category"]
        category: Any = UserWarning
        try:
            category = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            given["text"] = f"{name}: {given['text']}"
        message = warnings.WarningMessage(given["text"], category, given["filename"], given["lineno"])
        location = given["location"] and tuple(given["location"])
        self._config.hook.pytest_warning_recorded.call_historic(
            kwargs={
                "warning_message": message,
                "nodeid": given["nodeid"],
                "when": given["when"],
                "location": location,
            }
        )

    def _blame(self, run: Running, lost: GuestLost, console: Path) -> bool:
        """Report the test that the guest was lost in as failed; False if there is none, so that nothing can go on."""
        text = f"{lost.why} (Linux {run.label})\nconsole: {console}\n{lost.details}".rstrip()
        hook = self._config.hook
        if run.test is None:
            what = "after its last test" if run.done else "before its first test"
            failed = pytest.CollectReport(f"ublk-vm {run.label}", "failed", f"{what}: {text}", [])
            hook.pytest_collectreport(report=failed)
            run.code = pytest.ExitCode.TESTS_FAILED
            return False
        nodeid, location = self._named(run.label, *run.test)
        took = time.monotonic() - run.began
        report = pytest.TestReport(nodeid, location, {}, "failed", text, "call", duration=took)
        hook.pytest_runtest_logreport(report=report)
        # JUnit closes a test at its teardown.
        hook.pytest_runtest_logreport(report=pytest.TestReport(nodeid, location, {}, "passed", None, "teardown"))
        hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
        run.done.append(run.test[0])
        run.test = None
        return True


def _conclude(session: pytest.Session, run: Running) -> None:
    """End the host's session as the guest's has ended."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)
    if run.code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        pytest.exit(f"the pytest on Linux {run.label} ended with {run.code}, see above", returncode=run.code)
    if run.code == pytest.ExitCode.INTERRUPTED:
        errors = run.collect_errors
        raise session.Interrupted(
            f"{errors} error{'s' if errors != 1 else ''} during collection" if errors else "interrupted in the guest"
        )
    told = run.failed or run.collect_errors
    if run.code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and not told:
        pytest.exit(
            f"the pytest on Linux {run.label} ended with {run.code}, and no test has failed", returncode=run.code
        )


def _keep(path: Path, text: str) -> None:
    """Add a guest's console to those of its predecessors in this run's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(text)


def _remove_if_empty(folder: Path) -> None:
    for path in (folder, folder.parent):
        try:
            path.rmdir()
        except OSError:
            return
