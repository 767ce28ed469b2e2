"""Tests that run side by side are counted as if one process had run them, and those of one kernel stay together."""

from __future__ import annotations

import json

import pytest

from ublk_rig.plugin import Rig

pytest_plugins = ["pytester"]

BODY = """
import os, pytest
@pytest.fixture(autouse=True)
def worker(record_property):
    record_property("worker", os.environ["PYTEST_XDIST_WORKER"])
@pytest.mark.parametrize("kernel", ["6.12", "7.3"])
@pytest.mark.parametrize("way", ["one", "other"])
def test_kernel(kernel, way):
    pass
def test_fails():
    assert False, "of " + "course"
def test_skipped():
    pytest.skip("because")
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setattr("ublk_rig.layout.ARTIFACTS", pytester.path / "artifacts")
    return pytester


def test_workers_results_are_the_run_s(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_a=BODY, test_b=BODY)
    done = inner.runpytest_inprocess("-p", "no:cacheprovider", "--rig=qemu", "-n2")
    done.assert_outcomes(passed=8, failed=2, skipped=2)
    tests = json.loads((inner.path / "artifacts/summary.json").read_text())["tests"]
    found = {t["nodeid"]: (t["outcome"], t["reason"]) for t in tests}
    assert found["test_a.py::test_fails"] == ("failed", "test_a.py:10: AssertionError")
    assert found["test_b.py::test_skipped"] == ("skipped", "Skipped: because")
    for kernel in ("6.12", "7.3"):
        workers = {t["properties"]["worker"] for t in tests if kernel in t["nodeid"]}
        assert len(workers) == 1, (kernel, tests)
    assert {t["properties"]["worker"] for t in tests} == {"gw0", "gw1"}


def test_a_worker_that_dies_is_a_failure(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_a=f"{BODY}\ndef test_dies():\n    os._exit(3)\n")
    done = inner.runpytest_inprocess("-p", "no:cacheprovider", "--rig=qemu", "-n2")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    tests = json.loads((inner.path / "artifacts/summary.json").read_text())["tests"]
    assert {t["outcome"] for t in tests if "test_dies" in t["nodeid"]} == {"failed"}


def test_a_host_is_one_machine(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_this_host(rig: Rig, _config: pytest.Config) -> None:
        rig.on_host = True

    monkeypatch.setattr(Rig, "__init__", on_this_host)
    inner.makepyfile(BODY)
    done = inner.runpytest_inprocess("-p", "no:cacheprovider", "-n2")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*this host is one machine*"])
