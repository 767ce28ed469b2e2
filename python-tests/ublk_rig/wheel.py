"""`make build`: the Python package as its users get it, a wheel, built when its sources changed and put into `.venv`.

What is tested is what is installed, and what is installed is what the tree says: `stale` tells when it is not.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ublk_rig import layout

SOURCE = layout.TREE / "ublk-py"
VENV = layout.TREE / ".venv"
STAMP = VENV / "ublk-wheel"
# All that ends in the wheel, or decides how it is built.
INPUTS = (
    *("Cargo.toml", "Cargo.lock", ".cargo/config.toml", "LICENSE-MIT", "LICENSE-APACHE"),
    *("ublk-core/Cargo.toml", "ublk-core/src", "ublk-py/Cargo.toml", "ublk-py/pyproject.toml", "ublk-py/README.md"),
    *("ublk-py/src", "ublk-py/python", "python-tests/requirements.txt"),
)


class CannotBuild(Exception):
    """The package does not build or does not install."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"ublk: {text}", flush=True)


def target_dir() -> Path:
    """Where cargo builds the wheel: maturin's settings would throw away what plain cargo built, and the reverse."""
    return Path(os.environ.get("CARGO_TARGET_DIR", layout.TREE / "target")) / "wheel"


def wheel_dir() -> Path:
    """Where the wheel is put."""
    return target_dir() / "dist"


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def digest() -> str:
    """What the tree says: a checksum of every input with its name."""
    total = hashlib.sha256()
    for name in INPUTS:
        for path in _files(layout.TREE / name):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(layout.TREE)} {content}\n".encode())
    return total.hexdigest()


def stale() -> str:
    """Why `.venv` does not hold the package that the tree describes, or nothing."""
    if not STAMP.exists():
        return "the package ublk is not installed in .venv: make build"
    if STAMP.read_text() != digest():
        return "the package ublk in .venv is older than its sources: make build"
    return ""


def build_environment() -> dict[str, str]:
    """What cargo is to know, whoever calls it."""
    return {"CARGO_BUILD_JOBS": "2", **os.environ, "CARGO_TARGET_DIR": str(target_dir())}


def maturin(*arguments: str | Path, cwd: Path = SOURCE) -> None:
    """Run maturin on the package; what it prints is shown only if it fails."""
    done = subprocess.run(
        [VENV / "bin/maturin", *arguments],
        cwd=cwd,
        env=build_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotBuild(f"maturin {arguments[0]} failed:\n{done.stdout}")


def build() -> Path:
    """The wheel of the tree as it is, for the manylinux tag that its symbols allow."""
    shutil.rmtree(wheel_dir(), ignore_errors=True)
    maturin(
        "build", "--release", "--locked", "--auditwheel", "check", "--interpreter", sys_python(), "--out", wheel_dir()
    )
    wheels = list(wheel_dir().glob("ublk-*.whl"))
    if len(wheels) != 1:
        raise CannotBuild(f"maturin left {len(wheels)} wheels in {wheel_dir()}, not one")
    return wheels[0]


def sys_python() -> str:
    """The interpreter of `.venv`."""
    return str(VENV / "bin/python")


def current() -> Path:
    """The wheel that `.venv` holds, if it is the tree's."""
    if reason := stale():
        raise CannotBuild(reason)
    return next(wheel_dir().glob("ublk-*.whl"))


def ensure() -> None:
    """Build and install the package if the sources are not those of the installed one."""
    now = digest()
    if STAMP.exists() and STAMP.read_text() == now and any(wheel_dir().glob("ublk-*.whl")):
        say(f"the package in {VENV} is up to date")
        return
    say("building the wheel (maturin; the first time takes a minute)")
    # From here on, until it is done, what is installed is nobody knows what.
    STAMP.unlink(missing_ok=True)
    made = build()
    say(f"installing {made.name} into {VENV}")
    # No index is asked: the package needs nothing but the interpreter.
    pip = [sys_python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--no-index", "--no-deps", "--force-reinstall", made], check=False)
    if done.returncode:
        raise CannotBuild(f"pip does not install {made}")
    STAMP.write_text(now)


def main() -> int:
    """Bring the package in `.venv` up to date."""
    try:
        ensure()
    except (CannotBuild, OSError) as e:
        print(f"ublk: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
