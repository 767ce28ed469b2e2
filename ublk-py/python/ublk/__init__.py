"""Linux block devices served from Python."""

from __future__ import annotations

from ublk._native import __version__

__all__ = ["__version__"]
