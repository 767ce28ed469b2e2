"""A machine for a program rather than for a test: this host if it has ublk, otherwise a guest."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ublk_rig import host
from ublk_vm import kernels, vm
from ublk_vm.guest import Guest, Shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ublk_vm.vm import Shape


@contextmanager
def machine(shape: Shape, label: str, say: Callable[[str], None], *, only_guests: bool = False) -> Iterator[Guest]:
    """A guest of the given shape and kernel, or this host; `say` hears which."""
    with tempfile.TemporaryDirectory(prefix="ublk-shared.") as d:
        if host.usable() and not only_guests:
            here = host.HostMachine()
            say(f"using this machine's own ublk driver, Linux {here.release}")
            try:
                yield Guest(here, Shared(Path(d), d))
            finally:
                here.stop()
            return
        say(f"booting Linux {label} in QEMU")
        booted = vm.boot(kernels.ensure(label), shape, Path(d))
        say(f"Linux {booted.release} is up ({booted.accel.name}, {booted.boot_secs:.1f} s)")
        try:
            yield Guest(booted, Shared(Path(d), vm.SHARED_AT))
        finally:
            booted.stop()
