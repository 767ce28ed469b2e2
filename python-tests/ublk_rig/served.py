"""Disks served by the workspace's example programs, for the demo and the benchmarks.

An example that serves a disk prints one line, `/dev/ublkbN`, when the disk is usable, and stops cleanly on SIGINT,
SIGTERM or the end of its stdin.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ublk_rig import layout
from ublk_vm.channel import MachineDied
from ublk_vm.process import NothingInTime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ublk_vm.guest import Guest
    from ublk_vm.process import Process

START_SECS = 30
STOP_SECS = 30


class NoSuchExample(Exception):
    """The example cannot be built."""


class ServerMisbehaved(Exception):
    """A server did not announce its disk or did not stop cleanly."""


@functools.cache
def build_example(name: str, package: str = "ublk-core") -> Path:
    """Build an example, optimised, and return the program; cargo's own progress goes to the terminal."""
    cargo = shutil.which("cargo")
    if not cargo:
        raise NoSuchExample("cargo is not in PATH")
    done = subprocess.run(
        [cargo, "build", "--release", "-p", package, "--example", name, "--message-format=json-render-diagnostics"],
        cwd=layout.TREE,
        env={"CARGO_BUILD_JOBS": "2", **os.environ},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NoSuchExample(f"example {name} of {package} does not build")
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == name:
            return Path(message["executable"])
    raise NoSuchExample(f"cargo built no example {name}")


def start(guest: Guest, argv: Sequence[str | Path]) -> tuple[Process, str]:
    """Start a server and wait for its disk."""
    server = guest.popen(argv)
    device = server.read_line(START_SECS).strip()
    if not device.startswith("/dev/ublkb"):
        server.kill()
        raise ServerMisbehaved(f"{argv[0]} announced {device!r}, not a disk; stderr: {server.err}")
    return server, device


def stop(server: Process) -> None:
    """Stop a server the clean way."""
    server.close_stdin()
    if code := server.wait(STOP_SECS):
        raise ServerMisbehaved(f"{server.argv[0]} ended with {code}; stderr: {server.err}")


def interrupt(server: Process) -> None:
    """Stop a Python program by Ctrl-C, which `Device` makes a clean end of, and Python a death by SIGINT."""
    server.kill(signal.SIGINT)
    if (code := server.wait(STOP_SECS)) not in {0, -signal.SIGINT}:
        raise ServerMisbehaved(f"{server.argv[0]} ended with {code}; stderr: {server.err}")


@contextmanager
def serving(
    guest: Guest, argv: Sequence[str | Path], stop: Callable[[Process], None] = stop
) -> Iterator[tuple[Process, str]]:
    """A served disk for the length of a block."""
    server, device = start(guest, argv)
    with server:
        try:
            yield server, device
        except BaseException:
            # Killing a server leaves its device; only its own way out removes it.
            with contextlib.suppress(MachineDied, NothingInTime, ServerMisbehaved):
                stop(server)
            raise
        stop(server)
