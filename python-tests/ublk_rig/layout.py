"""Where things live: the tree, the artefacts of failures inside of it. The cache of kernels is `ublk_vm`'s."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
TREE = PACKAGE.parent.parent
ARTIFACTS = TREE / "artifacts"
