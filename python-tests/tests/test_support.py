"""The README's table says what the tests said."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from ublk_rig import layout, support

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]


def outcome(name: str, kernel: str | None, result: str = "passed") -> dict[str, Any]:
    return {"nodeid": f"tests/{name}[{kernel}]", "kernel": kernel, "outcome": result}


def summary(*tests: dict[str, Any]) -> dict[str, Any]:
    return {"tests": list(tests), "whole": True}


def row(table: str, words: str) -> str:
    return next(line for line in table.splitlines() if words in line)


def test_outcomes_become_cells() -> None:
    table = support.render(
        support.collect(
            summary(
                outcome("test_readme.py::test_a", "7.3"),
                outcome("test_readme.py::test_a", "6.12"),
                outcome("test_readme.py::test_b", "6.12"),
                outcome("test_disk_operations.py::test_c", "6.12", "failed"),
                outcome("test_disk_operations.py::test_d", "6.12"),
                outcome("test_disk_operations.py::test_c", "7.3", "skipped"),
            )
        )
    )
    assert table.splitlines()[0] == "|  | Linux 6.12 | Linux 7.3 |"
    assert row(table, "ramdisk").endswith("| yes (2) | yes (1) |")
    assert row(table, "discard").endswith("| **no**: 1 of 2 fail | not tested |")
    assert row(table, "Forked").endswith("| not tested | not tested |")


def skipped(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, reason: str) -> str:
    """What stands in a run's summary as the reason of a test that was skipped for this one."""
    monkeypatch.setattr("ublk_rig.layout.ARTIFACTS", pytester.path / "artifacts")
    pytester.makepyfile(f"import pytest\ndef test_skipped():\n    pytest.skip({reason!r})\n")
    pytester.runpytest_inprocess("-p", "no:cacheprovider", "--rig=qemu").assert_outcomes(skipped=1)
    (test,) = json.loads((pytester.path / "artifacts/summary.json").read_text())["tests"]
    return str(test["reason"])


def test_what_a_kernel_lacks_is_no_capability_of_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = outcome("test_rust.py::test_rust[shared_memory::a]", "6.12") | {
        "properties": {support.REFUSED: ["SHMEM_ZC (since Linux 7.1)"]}
    }
    said = "the driver lacks BATCH_IO (since Linux 7.0), AUTO_BUF_REG (since Linux 6.16), and so on"
    batch = outcome("test_rust.py::test_rust[data_paths::a]", "6.12", "skipped") | {
        "reason": skipped(pytester, monkeypatch, said)
    }
    failed = outcome("test_rust.py::test_rust[driver_failures::a]", "6.12", "skipped") | {"reason": batch["reason"]}
    works = outcome("test_rust.py::test_rust[data_paths::b]", "6.12")
    table = support.collect(summary(shared, batch, failed, works))
    assert row(support.render(table), "SHMEM_ZC").endswith("| no: SHMEM_ZC (since 7.1) |")
    words = "yes (1); not AUTO_BUF_REG (since 6.16), BATCH_IO (since 7.0)"
    assert row(support.render(table), "Data paths").endswith(f"| {words} |")
    words = "no: AUTO_BUF_REG (since 6.16), BATCH_IO (since 7.0)"
    assert row(support.render(table), "Batches taken in part").endswith(f"| {words} |")
    assert table.figures == {}


def test_a_column_is_named_after_what_ran() -> None:
    run = summary(outcome("test_readme.py::test_a", "7.3"), outcome("test_readme.py::test_a", "6.12"))
    run["releases"] = {"6.12": "6.12.117+deb13-amd64", "7.3": "7.4.1-rc1+deb13-amd64"}
    table = support.render(support.collect(run))
    assert table.splitlines()[0] == "|  | Linux 6.12 (6.12.117) | Linux 7.4 (7.4.1) |"


def test_a_test_counts_once_and_what_nobody_claims_is_named() -> None:
    table = support.collect(
        summary(
            outcome("test_rust_kernel.py::test_rust[7.3-killed::a_server_killed_after_add]", "7.3"),
            outcome("test_something.py::test_new", "7.3"),
            outcome("test_rig_vm.py::test_popen", "7.3"),
            outcome("test_host.py::test_no_kernel", None),
        )
    )
    assert sum(cell.outcomes.total() for by in table.cells.values() for cell in by.values()) == 1
    assert table.cells["Killed servers leave what can be deleted"]["7.3"].outcomes["passed"] == 1
    assert table.unclaimed == ["tests/test_something.py::test_new[7.3]"]


def test_only_the_block_is_replaced(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "summary.json"
    readme.write_text(f"before\n{support.BEGIN}\nold\n{support.END}\nafter\n")
    results.write_text(json.dumps(summary(outcome("test_readme.py::test_a", "7.3"))))
    for _ in range(2):
        assert support.main([str(results), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{support.BEGIN}\n| ")
        assert text.endswith(f"\n{support.END}\nafter\n")
        assert "\nold\n" not in text


def test_every_kernel_test_of_this_run_has_its_row(request: pytest.FixtureRequest) -> None:
    items = [item for item in request.session.items if "guest" in getattr(item, "fixturenames", ())]
    names = {item.nodeid for item in items if not support.RIG.search(item.nodeid)}
    assert {name for name in names if support.row_of(name) is None} == set()


def test_the_table_in_the_readme_has_the_rows_of_today() -> None:
    block = (layout.TREE / "README.md").read_text().partition(support.BEGIN)[2].partition(support.END)[0]
    rows = re.findall(r"^\| ([^|]+) \|", block, re.MULTILINE)
    if "Not made yet" not in block:
        assert rows == [c.name for c in support.CAPABILITIES], "make it again: python -m ublk_rig.support"
        assert "**no**" not in block


def test_what_was_measured_is_stated() -> None:
    measured = outcome("test_disk_life.py::test_a", "7.3") | {"properties": {"KiB for an idle disk": 18}}
    more = outcome("test_disk_life.py::test_b", "7.3") | {"properties": {"KiB for an idle disk": 20}}
    assert "KiB for an idle disk: 20 on Linux 7.3." in support.render(support.collect(summary(measured, more)))


def test_a_run_of_some_of_the_tests_makes_no_table(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "summary.json"
    readme.write_text(f"{support.BEGIN}{support.END}")
    results.write_text(json.dumps(summary(outcome("test_readme.py::test_a", "7.3")) | {"whole": False}))
    assert support.main([str(results), "--readme", str(readme)]) == 1
    assert support.main([str(results), "--readme", str(readme), "--partial"]) == 0
    assert "ramdisk" in readme.read_text()


@pytest.mark.parametrize("tests", [[], [outcome("test_rig_vm.py::test_a", "7.3")]])
def test_without_results_the_readme_stays(tmp_path: Path, tests: list[dict[str, Any]]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "summary.json"
    readme.write_text("as it was")
    results.write_text(json.dumps(summary(*tests)))
    assert support.main([str(results), "--readme", str(readme)]) == 1
    assert readme.read_text() == "as it was"
