"""What is measured side by side: disks, workloads, and how disks compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ublk_vm.guest import Guest


@dataclass(frozen=True)
class Disk:
    """A disk that is up: where it is, and who serves it (None: the kernel)."""

    path: str
    server_pid: int | None = None


@dataclass(frozen=True)
class Contestant:
    """A kind of disk, how to bring one up, and whether it is written once before it is measured."""

    name: str
    up: Callable[[Guest], AbstractContextManager[Disk]]
    fill: bool = False
    # What earlier drivers do not have.
    newest: bool = False


@dataclass(frozen=True)
class Workload:
    """One fio job."""

    name: str
    rw: str
    bs: str
    iodepth: int


@dataclass(frozen=True)
class Contest:
    """Disks that are up together, and measured in turns."""

    name: str
    disk_bytes: int
    contestants: tuple[Contestant, ...]
    workloads: tuple[Workload, ...]
    # Which of them is divided by which.
    ratios: tuple[tuple[str, str], ...]

    def only(self, prefix: str) -> Contest:
        """The same with those contestants whose name begins so."""
        return replace(self, contestants=tuple(c for c in self.contestants if c.name.startswith(prefix)))
