"""The host itself as the machine under test: its own kernel, its own ublk driver, the same agent.

Devices and processes that were there before a test are not the test's.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from ublk_vm import kernels
from ublk_vm.channel import Channel
from ublk_vm.layout import PACKAGE
from ublk_vm.timescale import Timescale

CONTROL = Path("/dev/ublk-control")


def usable() -> bool:
    """Whether tests can use this machine's own driver: it is there, and we are root."""
    return os.geteuid() == 0 and CONTROL.is_char_device() and os.access(CONTROL, os.R_OK | os.W_OK)


class HostMachine:
    """An agent on this machine."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._agent = subprocess.Popen(
                [
                    Path(sys.executable).resolve(),
                    "-I",
                    "-S",
                    PACKAGE / "agent.py",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.channel = Channel(ours)
        self.release = self.channel.wait_ready(20)
        self.label = kernels.series_of(self.release)
        self.cpus = os.cpu_count() or 1
        self.emulated = False
        self.scale = Timescale.of(emulated=False)

    def console(self) -> str:
        """A host has no console of its own for us; its kernel log is read by the agent."""
        return ""

    def stop(self) -> None:
        """End the agent and what it left."""
        self.kill()

    def kill(self) -> None:
        """End the agent; whoever waits for an answer of it gets MachineDied."""
        self._agent.kill()
        self._agent.wait()
        self.channel.close()
