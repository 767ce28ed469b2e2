"""The pytest plugin `--ublk-vm`: tests that run inside a guest with a real kernel, as root, with the driver loaded.

Every pytest of an environment that has this package loads this file: it imports nothing and does nothing until one
of its options is given.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

# Set in the guest: which kernel it runs, and the folder that outlives it.
KERNEL_VARIABLE = "UBLK_VM_KERNEL"
ARTIFACTS_VARIABLE = "UBLK_VM_ARTIFACTS"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the options."""
    group = parser.getgroup("ublk-vm", "tests in virtual machines with a real kernel and the ublk driver")
    group.addoption(
        "--ublk-vm",
        metavar="KERNEL[,KERNEL]",
        help="run the tests in a guest with each of these Debian kernels, e.g. 6.12,7.3",
    )
    group.addoption(
        "--ublk-vm-artifacts",
        metavar="DIR",
        default="ublk-vm-artifacts",
        help="the folder that guests can write to, one below it for each kernel (default: %(default)s)",
    )
    group.addoption("--ublk-vm-kernel", metavar="PATH", help="run on this kernel image instead")
    group.addoption("--ublk-vm-modules", metavar="DIR", help="the modules of --ublk-vm-kernel (lib/modules/RELEASE)")
    group.addoption(
        "--ublk-vm-cpus", metavar="N", type=int, default=2, help="the guest's CPUs (default: %(default)s)"
    )
    group.addoption("--ublk-vm-memory", metavar="SIZE", default="2G", help="its memory (default: %(default)s)")
    group.addoption(
        "--ublk-vm-timeout",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="how long a test may go on without a result, in seconds of a machine that is not emulated; "
        "0: for ever (default: %(default)s)",
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Take the run over if it was asked for; in the guest it was, and is."""
    config.addinivalue_line(
        "markers",
        "ublk_vm_allow(regex, ...): complaints of the kernel that this test provokes on purpose; "
        "others fail it under --ublk-vm",
    )
    asked = config.getoption("--ublk-vm")
    own = config.getoption("--ublk-vm-kernel")
    if not (asked or own) or KERNEL_VARIABLE in os.environ or config.option.collectonly or config.option.help:
        return
    if asked and own:
        raise pytest.UsageError("--ublk-vm and --ublk-vm-kernel: one of them")
    if own and not config.getoption("--ublk-vm-modules"):
        raise pytest.UsageError("--ublk-vm-kernel needs --ublk-vm-modules DIR")
    labels = [label.strip() for label in (asked or "").split(",") if label.strip()]
    for label in labels:
        if not re.fullmatch(r"\d+\.\d+", label):
            raise pytest.UsageError(f"--ublk-vm={asked}: {label!r} is no series of kernels such as 7.3")
    from ublk_vm import remote  # noqa: PLC0415 - whoever does not ask for it pays nothing

    config.pluginmanager.register(remote.RemoteRun(config, list(dict.fromkeys(labels))), "ublk_vm_remote")


@pytest.fixture(scope="session")
def ublk_vm_kernel() -> str | None:
    """The series of the guest's kernel, "7.3"; None outside of a guest."""
    return os.environ.get(KERNEL_VARIABLE)


@pytest.fixture(scope="session")
def ublk_vm_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder whose content outlives the guest; outside of a guest, a temporary one."""
    if folder := os.environ.get(ARTIFACTS_VARIABLE):
        return Path(folder)
    return tmp_path_factory.mktemp("ublk-vm-artifacts")
