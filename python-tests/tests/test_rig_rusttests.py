"""Finding the Rust tests that need a kernel, with a small workspace in place of ours."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from ublk_rig import rusttests

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = """
[package]
name = "dummy"
version = "0.0.0"
edition = "2021"
[features]
kernel-tests = []
[[test]]
name = "on_kernel"
required-features = ["kernel-tests"]
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARGO_TARGET_DIR", str(tmp_path / "target"))
    (tmp_path / "src").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "Cargo.toml").write_text(MANIFEST)
    (tmp_path / "src/lib.rs").write_text("")
    (tmp_path / "tests/elsewhere.rs").write_text("#[test] fn needs_no_kernel() {}")
    (tmp_path / "tests/on_kernel.rs").write_text(
        "#[test] fn quick() {}\nmod m { #[test] fn inner() {} }\n#[test] #[ignore] fn soak() {}\n"
        "#[test] fn server_process() {}"
    )
    return tmp_path


def test_every_test_function_is_found(workspace: Path) -> None:
    found = {str(c): c for c in rusttests.cases(workspace)}
    assert set(found) == {"on_kernel::quick", "on_kernel::m::inner", "on_kernel::soak"}
    assert [c.name for c in found.values() if c.ignored] == ["soak"]
    case = found["on_kernel::m::inner"]
    assert case.package_dir == workspace
    assert "1 passed" in subprocess.run(case.command(), capture_output=True, text=True, check=True).stdout


def test_no_tests_at_all_is_an_error(workspace: Path) -> None:
    (workspace / "tests/on_kernel.rs").write_text("")
    with pytest.raises(rusttests.BuildFailed, match="expected some"):
        rusttests.cases(workspace)


def test_a_build_that_fails_says_why(workspace: Path) -> None:
    (workspace / "tests/on_kernel.rs").write_text("#[test] fn broken() { nonsense }")
    with pytest.raises(rusttests.BuildFailed, match="nonsense"):
        rusttests.cases(workspace)
