"""What a disk is for: bytes, and a filesystem."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import ublk


@pytest.mark.parametrize("size", [512, 4096, 1 << 20])
def test_what_is_written_is_read(disk: ublk.Device, size: int) -> None:
    pattern = os.urandom(size)
    path = Path(disk.path)
    with path.open("r+b", buffering=0) as f:
        f.write(pattern)
        os.fsync(f.fileno())
    with path.open("rb") as f:
        assert f.read(size) == pattern


def test_a_filesystem_survives_a_check(disk: ublk.Device, ublk_vm_artifacts: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", disk.path], check=True)
    checked = subprocess.run(["e2fsck", "-fn", disk.path], capture_output=True, text=True, check=True)
    (ublk_vm_artifacts / "e2fsck.txt").write_text(checked.stdout)
