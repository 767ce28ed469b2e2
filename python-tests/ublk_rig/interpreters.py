"""The Python interpreters of this machine that the package is made for, wherever they were installed.

`UBLK_PYTHONS` adds some (paths, with colons between them): a free-threaded one, say.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

OLDEST = (3, 11)
# Version managers, and the images in which wheels are built; what is in PATH comes on top.
_PLACES = (
    "~/.pyenv/versions/*/bin/python3",
    "~/.local/share/uv/python/*/bin/python3",
    "~/.asdf/installs/python/*/bin/python3",
    "/opt/python/*/bin/python3",
    "/usr/local/bin/python3*",
    "/usr/bin/python3*",
)
_ASK = """
import json, os, platform, sys, sysconfig
print(json.dumps([list(sys.version_info[:3]), platform.python_implementation(), os.path.realpath(sys.executable),
                  bool(sysconfig.get_config_var("Py_GIL_DISABLED"))]))
"""


@dataclass(frozen=True)
class Interpreter:
    """One that runs."""

    path: Path
    version: tuple[int, ...]
    free_threaded: bool

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.version))}{'t' if self.free_threaded else ''} {self.path}"


def _ask(path: Path) -> Interpreter | None:
    """What an interpreter says of itself; None if it does not run, as a version manager's stub may not."""
    try:
        done = subprocess.run([path, "-I", "-c", _ASK], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    version, implementation, real, free_threaded = json.loads(done.stdout)
    if implementation != "CPython" or tuple(version) < OLDEST:
        return None
    return Interpreter(Path(real), tuple(version), free_threaded)


def _candidates() -> list[Path]:
    given = [Path(p) for p in os.environ.get("UBLK_PYTHONS", "").split(":") if p]
    in_path = [p for d in os.environ.get("PATH", "").split(":") if d for p in Path(d).glob("python3*")]
    known = [p for place in _PLACES for p in Path("/").glob(str(Path(place).expanduser()).lstrip("/"))]
    return [p for p in (*given, *in_path, *known) if not p.name.endswith(("-config", ".py"))]


@functools.cache
def found() -> tuple[Interpreter, ...]:
    """Every CPython from 3.11 on, each installation once, oldest first."""
    real = {path.resolve(): path for path in reversed(_candidates())}
    answers = [_ask(path) for path in real.values()]
    unique = {answer.path: answer for answer in answers if answer}
    return tuple(sorted(unique.values(), key=lambda i: (i.version, str(i.path))))
