"""Clients that keep a disk busy, and waiting for what comes by itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_vm.guest import Guest
    from ublk_vm.process import Process


def eventually(guest: Guest, true: Callable[[], bool], secs: float = 20) -> None:
    """Something that comes by itself, without an event that could be waited for from outside."""
    deadline = time.monotonic() + guest.scale.seconds(secs)
    while not true():
        assert time.monotonic() < deadline, true
        time.sleep(0.05)


def load(guest: Guest, disk: str, *options: str) -> Process:
    """Reads and writes until the disk fails or the program is ended."""
    return guest.popen(
        [
            *("fio", "--name=l", f"--filename={disk}", "--direct=1", "--ioengine=libaio", "--rw=randrw", "--bs=4k"),
            *(
                "--iodepth=16",
                "--size=8M",
                "--time_based",
                "--runtime=600",
                "--thread",
                "--output=/dev/null",
                *options,
            ),
        ]
    )


def requests_done(guest: Guest, number: int) -> int:
    """Writes that a disk has completed, by the kernel's count."""
    return int(guest.run(f"awk '{{print $5}}' /sys/block/ublkb{number}/stat").out)
