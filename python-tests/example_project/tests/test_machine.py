"""What a test can rely on in the guest."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest


def test_root_with_a_driver(ublk_vm_kernel: str | None) -> None:
    assert ublk_vm_kernel is not None, "run with pytest --ublk-vm=7.3"
    assert platform.release().startswith(f"{ublk_vm_kernel}.")
    assert os.geteuid() == 0
    assert Path("/dev/ublk-control").is_char_device()


def test_changes_end_with_the_guest(ublk_vm_artifacts: Path) -> None:
    """Every file of the host is here, writable, and nothing reaches the host but what goes into the one folder."""
    (Path(__file__).parent / "written-by-the-guest").touch()
    (ublk_vm_artifacts / "release.txt").write_text(platform.release())


@pytest.mark.ublk_vm_allow("WARNING: provoked")
def test_a_complaint_of_the_kernel_that_is_expected() -> None:
    """Without the marker this test would fail."""
    Path("/dev/kmsg").write_text("<4>WARNING: provoked by a test\n")
