"""Which machine a test gets: one shared guest at a time, kept while tests of its kernel and shape follow each other.

Two processors and a few gigabytes are all a runner has; a second guest lives only as long as a test that asked
for one of its own.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ublk_rig import host
from ublk_vm import kernels, vm
from ublk_vm.verdict import Inspector

if TYPE_CHECKING:
    from pathlib import Path

    from ublk_vm.vm import Shape

AnyMachine = vm.VirtualMachine | host.HostMachine


class Lease:
    """A machine for one test, and who watches it."""

    def __init__(self, machine: AnyMachine, inspector: Inspector, *, shared: bool) -> None:
        self.machine = machine
        self.inspector = inspector
        self.shared = shared


class Pool:
    """Boots, keeps and throws away machines."""

    def __init__(self, shared: Path, given: kernels.Kernel | None, *, on_host: bool) -> None:
        self._shared = shared
        self._given = given
        self._on_host = on_host
        self._kept: tuple[tuple[str, Shape], Lease] | None = None
        self._current: Lease | None = None
        self.boots: list[float] = []
        # What the kernels behind the labels say of themselves.
        self.releases: dict[str, str] = {}

    @functools.cache  # noqa: B019 - one pool per run
    def _kernel(self, label: str) -> kernels.Kernel | kernels.KernelError:
        try:
            return self._given or kernels.ensure(label)
        except kernels.KernelError as e:
            return e

    def kernel(self, label: str) -> kernels.Kernel:
        """The kernel behind a label; a failure to get it is remembered, for fetching takes minutes."""
        found = self._kernel(label)
        if isinstance(found, kernels.KernelError):
            raise found
        return found

    def _start(self, label: str, shape: Shape, *, shared: bool) -> Lease:
        machine: AnyMachine
        if self._on_host:
            machine = host.HostMachine()
        else:
            machine = vm.boot(self.kernel(label), shape, self._shared)
            self.boots.append(machine.boot_secs)
        self.releases[label] = machine.release
        return Lease(machine, Inspector(machine), shared=shared)

    def take(self, label: str, shape: Shape, *, fresh: bool) -> Lease:
        """A machine for the next test."""
        if fresh and not self._on_host:
            self._current = self._start(label, shape, shared=False)
            return self._current
        key = (label, shape)
        if self._kept and self._kept[0] != key and not self._on_host:
            self.discard(self._kept[1])
        if not self._kept:
            self._kept = (key, self._start(label, shape, shared=True))
        self._current = self._kept[1]
        return self._current

    def give_back(self, lease: Lease, *, soiled: bool) -> None:
        """The test is over; a machine that it soiled serves no other."""
        self._current = None
        if soiled or not lease.shared:
            self.discard(lease)

    def discard(self, lease: Lease) -> None:
        """End a machine."""
        if self._kept and self._kept[1] is lease:
            self._kept = None
        lease.machine.stop()

    def kill_current(self) -> None:
        """End the machine of the running test at once, so that whoever waits for it is released."""
        if self._current:
            self._current.machine.kill()

    def close(self) -> None:
        """End everything."""
        if self._kept:
            self.discard(self._kept[1])
