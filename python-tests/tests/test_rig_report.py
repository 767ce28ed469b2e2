"""What counts as a pass."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ublk_rig.report import Tally

if TYPE_CHECKING:
    from pathlib import Path


def tally(*results: tuple[str, str | None, str]) -> Tally:
    made = Tally(["6.12", "7.3"])
    for name, kernel, outcome in results:
        test = made.add(f"{name}[{kernel}]", kernel)
        if outcome == "skipped":
            test.phase("setup", "skipped", 0.1, "because")
        elif outcome != "not run":
            test.phase("setup", "passed", 0.1, "")
            test.phase("call", outcome, 0.2, "")
            test.phase("teardown", "passed", 0.1, "")
    return made


def test_a_test_on_every_kernel_is_a_pass() -> None:
    done = tally(("a", "6.12", "passed"), ("a", "7.3", "passed"), ("b", "7.3", "skipped"), ("c", None, "passed"))
    assert done.complaints() == []
    assert done.lines() == [
        "kernel tests: 6.12: 1 passed, 0 failed, 0 skipped; 7.3: 1 passed, 0 failed, 1 skipped",
        "  skipped [7.3] b[7.3]: because",
    ]


@pytest.mark.parametrize("outcome", ["skipped", "not run"])
def test_a_kernel_on_which_nothing_ran_is_no_pass(outcome: str) -> None:
    done = tally(("a", "6.12", "passed"), ("a", "7.3", outcome))
    assert done.complaints() == ["kernel 7.3: no test ran (1 selected)"]


def test_a_requested_kernel_without_tests_is_no_pass_unless_deselected() -> None:
    done = tally(("a", "6.12", "passed"))
    assert done.complaints() == ["kernel 7.3: requested, but no test was selected for it"]
    done.excused.add("7.3")
    assert done.complaints() == []


def test_a_kernel_for_which_another_stands_in_is_no_pass() -> None:
    done = tally(("a", "6.12", "passed"), ("a", "7.3", "passed"))
    done.releases |= {"6.12": "6.12.117+deb13-amd64", "7.3": "7.4.1+deb13-amd64"}
    assert done.complaints() == [
        "kernel 7.3: not to be had, these tests ran on 7.4.1+deb13-amd64 in its place",
    ]


def test_deselecting_does_not_excuse_skipping() -> None:
    done = tally(("a", "6.12", "passed"), ("a", "7.3", "skipped"))
    done.excused.add("7.3")
    assert done.complaints()


def test_a_run_without_kernel_tests_claims_nothing_about_kernels() -> None:
    assert tally(("c", None, "passed")).complaints() == []


def test_a_failure_in_any_phase_is_a_failure() -> None:
    done = tally(("a", "7.3", "passed"))
    done.tests["a[7.3]"].phase("teardown", "failed", 0.1, "left behind")
    assert done.counts("7.3") == {"failed": 1}
    assert done.tests["a[7.3]"].reason == "left behind"


def test_the_summary_is_written_for_programs(tmp_path: Path) -> None:
    done = tally(("a", "7.3", "passed"))
    done.tests["a[7.3]"].properties["iops"] = 5
    done.write(tmp_path / "new" / "summary.json", {"rig": "qemu"})
    data = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert data["rig"] == "qemu"
    test = data["tests"][0]
    assert (test["nodeid"], test["kernel"], test["outcome"], test["properties"]) == (
        "a[7.3]",
        "7.3",
        "passed",
        {"iops": 5},
    )
    assert test["duration"] == pytest.approx(0.4)
