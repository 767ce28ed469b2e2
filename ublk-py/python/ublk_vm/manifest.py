"""A cache entry is trusted only as a whole: a manifest lists the sha256 of each of its files.

A fetch that was interrupted, a full disk or a curious `rm` would otherwise show up much later, as a guest
that does not boot.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NAME = "manifest.json"


class BrokenEntry(Exception):
    """A cache entry is not what its manifest says."""


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write(entry: Path, facts: dict[str, str]) -> None:
    """Record every file of `entry`, and `facts` about where it came from."""
    files = {
        str(p.relative_to(entry)): _digest(p)
        for p in sorted(entry.rglob("*"))
        if p.is_file() and not p.is_symlink() and p.name != NAME
    }
    (entry / NAME).write_text(json.dumps({"facts": facts, "files": files}, indent=0))


def verify(entry: Path, required: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the facts of an entry whose every file is intact; `required` names files it must hold."""
    try:
        data = json.loads((entry / NAME).read_text())
        facts, files = dict(data["facts"]), dict(data["files"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BrokenEntry(f"{entry}: no usable {NAME}: {e}") from e
    for name in required:
        if name not in files:
            raise BrokenEntry(f"{entry}: {name} is missing from {NAME}")
    for name, digest in files.items():
        try:
            found = _digest(entry / name)
        except OSError as e:
            raise BrokenEntry(f"{entry}: {name}: {e}") from e
        if found != digest:
            raise BrokenEntry(f"{entry}: {name} does not have the recorded sha256")
    return facts
