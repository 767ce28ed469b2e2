"""The Python package on real kernels: every function of `py_guest`, from the wheel in `.venv`.

Each is a test of its own here. The first one of a module has the guest run all of them that are wanted, because an
emulated processor takes seconds to start an interpreter; the others find their results.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from ublk_rig import layout, pyguest

if TYPE_CHECKING:
    from pathlib import Path

    from ublk_vm.guest import Guest

TESTS = layout.TREE / "python-tests"
CASES = pyguest.cases(TESTS / "tests/py_guest")


def seconds_of(module: str) -> float:
    """What all its tests may take; each has a bound of its own in the guest."""
    return 60 + sum(case.seconds for case in CASES if case.module == module)


class Results:
    """What guests have told, by kernel."""

    def __init__(self, *, full: bool) -> None:
        self._full = full
        self._told: dict[tuple[str, str, str], dict[str, Any]] = {}

    def of(self, guest: Guest, case: pyguest.Case, wanted: list[pyguest.Case]) -> dict[str, Any]:
        """How a test ended; if that is not known, all that are wanted of its module and have not run are run."""
        if (guest.kernel, case.module, case.name) not in self._told:
            self._run(guest, case.module, [c.name for c in wanted if c.module == case.module])
        return self._told[guest.kernel, case.module, case.name]

    def _run(self, guest: Guest, module: str, names: list[str]) -> None:
        names = [n for n in names if (guest.kernel, module, n) not in self._told]
        guest.run("modprobe ublk_drv")
        env = {"PYTHONPATH": str(TESTS), "UBLK_FULL": "1" if self._full else "", "PYTHONDONTWRITEBYTECODE": "1"}
        done = guest.run(pyguest.command(module, names), timeout=seconds_of(module), env=env, check=False)
        for line in done.out.splitlines():
            told = json.loads(line)
            self._told[guest.kernel, module, told["name"]] = told
        for name in names:
            missing = {"outcome": "failed", "text": f"the guest told nothing of it: {done}", "seconds": 0.0}
            self._told.setdefault((guest.kernel, module, name), missing)


@pytest.fixture(scope="module")
def results(pytestconfig: pytest.Config) -> Results:
    return Results(full=bool(pytestconfig.getoption("--full")))


def _parameter(case: pyguest.Case) -> object:
    return pytest.param(case, id=str(case), marks=pytest.mark.time_limit(seconds_of(case.module) + 60))


@pytest.mark.parametrize("case", [_parameter(case) for case in CASES])
@pytest.mark.usefixtures("package")
def test_py(guest: Guest, case: pyguest.Case, results: Results, request: pytest.FixtureRequest) -> None:
    full = bool(request.config.getoption("--full"))
    if case.soak and not full:
        pytest.skip("a soak: runs with --full (make soak)")
    items = [item for item in request.session.items if getattr(item, "function", None) is request.function]
    cases: list[pyguest.Case] = [item.callspec.params["case"] for item in items]  # type: ignore[attr-defined]
    wanted = dict.fromkeys(c for c in cases if full or not c.soak)
    told = results.of(guest, case, list(wanted))
    print(f"{told['seconds']:.2f} s in the guest")
    if told["outcome"] == "skipped":
        pytest.skip(told["text"])
    if told["outcome"] != "passed":
        pytest.fail(told["text"], pytrace=False)


def test_every_module_has_tests(package: Path) -> None:  # noqa: ARG001  # it is the tree's
    missing = {p.stem for p in (TESTS / "tests/py_guest").glob("*.py")} - {c.module for c in CASES} - {"disks"}
    assert not missing
