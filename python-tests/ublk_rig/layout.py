"""Where things live: the tree, the cache outside of it, the artefacts of failures inside of it."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
TREE = PACKAGE.parent.parent
ARTIFACTS = TREE / "artifacts"


def cache_dir() -> Path:
    """Kernels cost minutes and are the same for every checkout, hence one cache per user, outside the tree."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "ublk-rs"
