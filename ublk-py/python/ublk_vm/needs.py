"""What this machine must have so that a guest can boot on it, and the Debian package that brings it."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from ublk_vm.apt import KEYRING

# The guest sees this machine's files, save these folders: it has its own.
_NOT_SHARED = ("/dev", "/proc", "/sys", "/run")
_SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"
_PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "setpriv": "util-linux"}
_TO_FETCH = {"dpkg-deb": "dpkg", "depmod": "kmod"}


class CannotRun(Exception):
    """No guest can run here; the message says what to do about it."""


def _has(program: str) -> bool:
    found = shutil.which(program, path=os.environ.get("PATH", "") + _SBIN)
    if found and program == "busybox":
        # One that needs libraries does not start in an initramfs that has none.
        return b"/ld-linux" not in Path(found).read_bytes()[:4096]
    return found is not None


def missing(*, fetches: bool) -> list[str]:
    """Debian packages that are missing; `fetches` if the kernels come from Debian too."""
    wanted = {**_PROGRAMS, **(_TO_FETCH if fetches else {})}
    packages = [package for program, package in wanted.items() if not _has(program)]
    if fetches and not KEYRING.exists():
        packages.append("debian-archive-keyring")
    return packages


def check(*, fetches: bool, seen: Path) -> None:
    """Raise CannotRun unless a guest can run here and see the folder `seen`."""
    if platform.machine() != "x86_64":
        raise CannotRun(f"guests are x86_64 machines only; this is {platform.machine()}")
    if fetches and not _has("apt-get"):
        raise CannotRun(
            "kernels come from Debian by apt-get, which is not here: give your own with "
            "--ublk-vm-kernel PATH --ublk-vm-modules DIR"
        )
    if packages := missing(fetches=fetches):
        raise CannotRun(f"missing on this machine, as Debian calls them: apt-get install {' '.join(packages)}")
    for folder in _NOT_SHARED:
        if seen.is_relative_to(folder):
            raise CannotRun(f"{seen}: a guest sees this machine's files, but not those below {folder}")
