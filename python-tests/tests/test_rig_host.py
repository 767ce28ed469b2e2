"""`--rig=host` behaves as the guest does: shown where a host with ublk is at hand, in a guest."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ublk_rig import layout

if TYPE_CHECKING:
    from ublk_vm.guest import Guest

PROJECT = layout.PACKAGE.parent


def test_the_same_tests_run_on_a_host_with_ublk(guest: Guest) -> None:
    """Pytest itself runs in the guest and takes it for its host, as `auto` should once the driver is there."""
    # The base interpreter of a virtual environment lacks pytest.
    interpreter = f"{sys.prefix}/bin/python3"
    guest.run("modprobe ublk_drv")
    done = guest.run(
        [
            *(interpreter, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-s"),
            *("tests/test_rig_vm.py", "-k", "popen or run_reports or timeout or larger or ones_own"),
        ],
        cwd=PROJECT,
        timeout=120,
        check=False,
    )
    assert f"kernel tests: {guest.kernel}: 4 passed, 0 failed, 2 skipped" in done.out, done
    assert done.rc == 0, done
