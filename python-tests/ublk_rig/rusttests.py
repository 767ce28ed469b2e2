"""The Rust tests that need a kernel: built once on the host, listed one by one, run in the guest.

They live in any package of the workspace that has a feature `kernel-tests`, as integration tests whose
`required-features` name it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEATURE = "kernel-tests"
# What a test binary is when it is started again as the server of one of its tests: no test of its own.
ROLE = "server_process"


class BuildFailed(Exception):
    """The test binaries cannot be had."""


@dataclass(frozen=True)
class Case:
    """One test function. `ignored` ones are soaks, for the full run."""

    binary: Path
    target: str
    name: str
    ignored: bool
    package_dir: Path

    def __str__(self) -> str:
        return f"{self.target}::{self.name}"

    def command(self) -> list[str]:
        """Run this test alone."""
        return [str(self.binary), "--exact", self.name, "--nocapture", "--test-threads=1", "--include-ignored"]


def _cargo(workspace: Path, *args: str) -> str:
    cargo = shutil.which("cargo")
    if not cargo:
        raise BuildFailed("cargo is not in PATH")
    env = {"CARGO_BUILD_JOBS": "2", **os.environ}
    done = subprocess.run([cargo, *args], cwd=workspace, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildFailed(f"cargo {' '.join(args)} failed:\n{done.stderr[-8000:]}")
    return done.stdout


def _targets(metadata: dict[str, Any]) -> dict[str, set[str]]:
    """Per package, the names of the tests that need a kernel."""
    return {
        package["name"]: {t["name"] for t in package["targets"] if FEATURE in (t.get("required-features") or ())}
        for package in metadata["packages"]
        if FEATURE in package["features"]
    }


def _list(binary: Path, *more: str) -> list[str]:
    done = subprocess.run(
        [binary, "--list", "--format", "terse", *more], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise BuildFailed(f"{binary} --list failed:\n{done.stderr}")
    return [line.removesuffix(": test") for line in done.stdout.splitlines() if line.endswith(": test")]


@functools.cache
def cases(workspace: Path) -> tuple[Case, ...]:
    """Build and list; a workspace without a single such test is an error, for it was meant to have some."""
    wanted = _targets(json.loads(_cargo(workspace, "metadata", "--no-deps", "--format-version=1")))
    found: list[Case] = []
    for package, names in wanted.items():
        if not names:
            continue
        selected = [f"--test={name}" for name in sorted(names)]
        output = _cargo(
            workspace,
            "test",
            "--no-run",
            "--message-format=json-render-diagnostics",
            "-p",
            package,
            "--features",
            FEATURE,
            *selected,
        )
        for line in output.splitlines():
            message = json.loads(line)
            if message.get("reason") != "compiler-artifact" or not message.get("executable"):
                continue
            target, binary = message["target"], Path(message["executable"])
            if "test" not in target["kind"] or target["name"] not in names:
                continue
            ignored = set(_list(binary, "--ignored"))
            package_dir = Path(message["manifest_path"]).parent
            names_here = [name for name in _list(binary) if name.rpartition("::")[2] != ROLE]
            found += [Case(binary, target["name"], name, name in ignored, package_dir) for name in names_here]
    if not found:
        raise BuildFailed(f"{workspace}: no test needs the feature {FEATURE}; expected some")
    # Cargo tells of binaries as they are done; every process that collects has to find one order.
    return tuple(sorted(found, key=lambda case: (case.package_dir, case.target)))
