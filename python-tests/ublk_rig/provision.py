"""Brings a Debian machine to where everything else can run: packages, a virtual environment, our own package in it.

It runs before anything is installed, with the standard library alone; it says what it installs, and when nothing
is missing it is done in a moment.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ublk_rig import layout, wheel

PROJECT = layout.PACKAGE.parent
VENV = wheel.VENV
SYSTEM_PYTHON = Path("/usr/bin/python3")


class CannotProvision(Exception):
    """Something is missing that cannot be installed from here."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"setup: {text}", flush=True)


def wanted_packages() -> dict[str, str]:
    """Package and reason, from packages.txt."""
    lines = (PROJECT / "packages.txt").read_text().splitlines()
    rows = [line.partition("#") for line in lines if line.strip() and not line.startswith("#")]
    return {name.strip(): reason.strip() for name, _, reason in rows}


def _missing(packages: dict[str, str]) -> dict[str, str]:
    if not shutil.which("dpkg-query"):
        raise CannotProvision(
            "this is no Debian: there is no dpkg-query, nor apt-get. What is needed, by Debian's names: "
            + " ".join(packages)
        )
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *packages],
        capture_output=True,
        text=True,
        check=False,
    )
    have = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" installed")}
    return {name: why for name, why in packages.items() if name not in have}


def install(packages: dict[str, str]) -> None:
    """Install what is missing."""
    missing = _missing(packages)
    if not missing:
        say(f"all {len(packages)} Debian packages are here")
        return
    for name, why in missing.items():
        say(f"installing {name} ({why})")
    apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    if os.geteuid() != 0:
        if not shutil.which("sudo"):
            raise CannotProvision(f"not root and no sudo; as root: apt-get install {' '.join(missing)}")
        apt = ["sudo", "DEBIAN_FRONTEND=noninteractive", *apt]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        if subprocess.run([*apt, *step], env=env, check=False).returncode:
            raise CannotProvision(f"apt-get {' '.join(step)} failed")
    if left := _missing(packages):
        raise CannotProvision(f"still missing after the installation: {', '.join(left)}")


def _makes_venvs() -> bool:
    return all(importlib.util.find_spec(m) for m in ("venv", "ensurepip"))


def _interpreter() -> Path:
    """A Python that can make virtual environments: this one, or Debian's with python3-venv."""
    if _makes_venvs():
        return Path(sys.executable).resolve()
    install({"python3": "makes the virtual environment", "python3-venv": "the same"})
    check = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run([SYSTEM_PYTHON, "-c", check], check=False).returncode:
        raise CannotProvision(f"{SYSTEM_PYTHON} is older than 3.11, and {sys.executable} has no venv and ensurepip")
    return SYSTEM_PYTHON.resolve()


def environment() -> None:
    """Make `.venv` with the pinned requirements and this project; again only when those change."""
    inputs = [PROJECT / "requirements.txt", PROJECT / "pyproject.toml"]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in inputs)).hexdigest()
    stamp = VENV / "provisioned"
    if stamp.exists() and stamp.read_text() == digest and (VENV / "bin/python").exists():
        say(f"{VENV} is up to date")
        return
    say(f"making {VENV} with what {inputs[0].relative_to(layout.TREE)} lists")
    subprocess.run([_interpreter(), "-m", "venv", "--clear", VENV], check=True)
    pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", inputs[0]], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--no-deps", "--editable", PROJECT], check=True)
    stamp.write_text(digest)


def too_old(said: str, manifest: str, *, by_rustup: bool) -> str | None:
    """What is wrong with a cargo that says this of itself, by the `rust-version` of the workspace's manifest.

    `by_rustup`: it is one that rustup has installed, and not the distribution's, which stays as it is.
    """
    have = re.match(r"cargo (\d+)\.(\d+)", said)
    want = re.search(r'^rust-version = "(\d+)\.(\d+)', manifest, re.MULTILINE)
    if have and want and tuple(map(int, have.groups())) < tuple(map(int, want.groups())):
        remedy = (
            "rustup update stable" if by_rustup else "install Rust by rustup, and have it in PATH before this one"
        )
        return f"Rust {'.'.join(have.groups())} is too old, {'.'.join(want.groups())} is needed: {remedy}"
    return None


def rust() -> None:
    """See that the compiler, which comes by rustup and not from Debian, will do."""
    if not shutil.which("cargo"):
        raise CannotProvision("no cargo in PATH; rustup installs it")
    done = subprocess.run(["cargo", "--version"], cwd=layout.TREE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotProvision(f"cargo does not run: {done.stderr.strip()}")
    manifest = (layout.TREE / "Cargo.toml").read_text()
    if wrong := too_old(done.stdout, manifest, by_rustup=bool(shutil.which("rustup"))):
        raise CannotProvision(wrong)


def main() -> int:
    """Do it all."""
    try:
        rust()
        install(wanted_packages())
        environment()
        wheel.ensure()
    except (CannotProvision, wheel.CannotBuild, subprocess.CalledProcessError, OSError) as e:
        print(f"setup: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
