"""Where this package is, as the guest sees it too, and where its kernels are kept."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """Kernels cost minutes and are the same for every project, hence one cache per user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "ublk-rs"
