"""A valgrind that knows io_uring's waits: Debian 12's own, 3.19, stands still in them.

Debian's next release has one. It is fetched as the kernels are (the machine's own mirror, signatures checked), kept
in the same cache, and run from there: it needs nothing but an old libc.
"""

from __future__ import annotations

import fcntl
import functools
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from ublk_vm import apt, layout, manifest

SUITE = "trixie"
OLDEST = (3, 24)
PARTS = ("usr/bin/valgrind", "usr/libexec/valgrind/memcheck-amd64-linux")


class NoValgrind(AssertionError):
    """None can be had."""


def _entries(cache: Path) -> list[Path]:
    found = []
    for entry in sorted(cache.glob("[0-9]*")):
        try:
            manifest.verify(entry, PARTS)
        except manifest.BrokenEntry:
            shutil.rmtree(entry)
            continue
        found.append(entry)
    return found


def _fetch(cache: Path) -> Path:
    with apt.opened((SUITE,)) as a:
        version = a.versions("valgrind")[0]
        part = Path(tempfile.mkdtemp(prefix=".valgrind.", dir=cache))
        try:
            a.unpack(["valgrind"], part)
            manifest.write(part, {"version": version, "fetched": str(time.time())})
            part.chmod(0o755)
            entry = cache / re.sub(r"[^\w.+-]", "_", version)
            shutil.rmtree(entry, ignore_errors=True)
            return part.rename(entry)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@functools.cache
def command() -> tuple[list[str], dict[str, str]]:
    """How to run it, and with what environment: every error, and every byte that is lost, is a failure."""
    cache = layout.cache_dir() / "valgrind"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with (cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entry = next(iter(_entries(cache)), None) or _fetch(cache)
    except (apt.AptError, subprocess.CalledProcessError, OSError) as e:
        raise NoValgrind(f"cannot fetch valgrind: {e}") from e
    env = {"VALGRIND_LIB": str(entry / "usr/libexec/valgrind")}
    program = str(entry / "usr/bin/valgrind")
    said = subprocess.run([program, "--version"], env=env, capture_output=True, text=True, check=True).stdout
    version = tuple(int(n) for n in re.findall(r"\d+", said)[:2])
    if version < OLDEST:
        raise NoValgrind(f"{said.strip()} is older than {OLDEST[0]}.{OLDEST[1]}")
    argv = [program, "--quiet", "--error-exitcode=99", "--leak-check=full", "--errors-for-leak-kinds=definite"]
    return [*argv, "--show-leak-kinds=definite", "--fair-sched=yes"], env
