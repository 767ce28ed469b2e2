"""Everything that is checked on the host, before any kernel boots.

A tool that a developer may not have (Miri, cargo-deny) is used where it is there; where it is not, one line says
so. Nothing is skipped in silence.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ublk_rig import layout
from ublk_vm import kernels

if TYPE_CHECKING:
    from collections.abc import Callable

PROJECT = layout.PACKAGE.parent
TOOLS = Path(sys.executable).parent
# All of our Python, as seen from PROJECT.
PYTHON = (".", "../ublk-py/python")


@dataclass(frozen=True)
class Check:
    """A command, and why it may not be possible to run it here."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path = layout.TREE
    absent: Callable[[], str] = lambda: ""


def _output(*argv: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    try:
        done = subprocess.run(
            argv,
            cwd=layout.TREE,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
    except OSError:
        return 127, ""
    return done.returncode, done.stdout


def _needs(reason: str, *argv: str) -> Callable[[], str]:
    return lambda: "" if _output(*argv)[0] == 0 else reason


def _python(tool: str, *argv: str) -> list[str]:
    return [str(TOOLS / tool), *argv]


def lint() -> list[Check]:
    """Formatting, lints, documentation, types."""
    return [
        Check(
            "cargo fmt",
            ["cargo", "fmt", "--all", "--check"],
            absent=_needs("no rustfmt", "cargo", "fmt", "--version"),
        ),
        Check(
            "clippy",
            ["cargo", "clippy", "--quiet", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"],
            absent=_needs("no clippy", "cargo", "clippy", "--version"),
        ),
        Check("cargo doc", ["cargo", "doc", "--quiet", "--workspace", "--no-deps"], {"RUSTDOCFLAGS": "-D warnings"}),
        Check("ruff check", _python("ruff", "check", *PYTHON), cwd=PROJECT),
        Check("ruff format", _python("ruff", "format", "--check", *PYTHON), cwd=PROJECT),
        Check("mypy", _python("mypy"), cwd=PROJECT),
        # The stub against the module as it was built; for a stale one it would prove nothing.
        Check("the package is current", _python("python", "-m", "ublk_rig.wheel")),
        Check("stubtest", _python("python", "-P", "-m", "mypy.stubtest", "ublk._native")),
    ]


def _loom_env() -> dict[str, str]:
    # Another cfg rebuilds everything: a target directory of its own keeps both builds warm.
    target = os.environ.get("CARGO_TARGET_DIR", str(layout.TREE / "target"))
    flags = f"{os.environ.get('RUSTFLAGS', '')} --cfg loom".strip()
    return {"RUSTFLAGS": flags, "CARGO_TARGET_DIR": f"{target}/loom", "LOOM_MAX_PREEMPTIONS": "3"}


LOOM = ["cargo", "test", "--quiet", "--release", "-p", "ublk-core", "--lib", "loom"]
MIRI = ["cargo", "+nightly", "miri", "test", "--quiet", "-p", "ublk-core", "--lib"]
# Of the C library, what keeps requests by number; the rest calls C.
MIRI_CAPI = ["cargo", "+nightly", "miri", "test", "--quiet", "-p", "ublk-capi", "--lib", "table"]


def _no_loom() -> str:
    code, listed = _output(*LOOM, "--", "--list", "--format", "terse", env=_loom_env())
    # A build that fails is not absent: running it shows why.
    return "ublk-core has no loom tests" if code == 0 and ": test" not in listed else ""


def host() -> list[Check]:
    """Tests that need no ublk driver: units, doctests, the probe of the kernel's header, models, Miri, licences."""
    include = str(kernels.headers())
    return [
        Check(
            "host tests and the probe of ublk_cmd.h",
            ["cargo", "test", "--quiet", "--workspace", "--features", "ublk-core/header-test"],
            {"UBLK_UAPI_INCLUDE": include},
        ),
        Check("loom", LOOM, _loom_env(), absent=_no_loom),
        Check(
            "miri",
            MIRI,
            {"MIRIFLAGS": "-Zmiri-disable-isolation"},
            absent=_needs("no nightly toolchain with miri", "cargo", "+nightly", "miri", "--version"),
        ),
        Check(
            "miri, the C library's table",
            MIRI_CAPI,
            absent=_needs("no nightly toolchain with miri", "cargo", "+nightly", "miri", "--version"),
        ),
        Check(
            "cargo-deny",
            ["cargo", "deny", "--all-features", "check", "bans", "licenses", "sources"],
            absent=_needs("no cargo-deny", "cargo", "deny", "--version"),
        ),
    ]


def run(checks: list[Check]) -> int:
    """Run all, even after a failure: one run should show everything that is wrong."""
    failed = []
    for check in checks:
        if reason := check.absent():
            print(f"not run: {check.name} ({reason})", flush=True)
            continue
        began = time.monotonic()
        done = subprocess.run(check.argv, cwd=check.cwd, env={**os.environ, **check.env}, check=False)
        verdict = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"{check.name}: {verdict}, {time.monotonic() - began:.1f} s", flush=True)
        if done.returncode:
            failed.append(check.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def main(argv: list[str]) -> int:
    """`lint` or `host`."""
    match argv:
        case ["lint"]:
            return run(lint())
        case ["host"]:
            try:
                return run(host())
            except kernels.KernelError as e:
                print(f"kernels: {e}", file=sys.stderr)
                return 1
        case _:
            print("usage: python -m ublk_rig.checks lint|host", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
