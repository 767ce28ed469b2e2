"""The disks that tests serve: the workspace's `ublk-testdisk`, started in a guest and told what to do.

Its options and commands are described in `testdisk/src/options.rs` and `testdisk/src/commands.rs`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ublk_rig import layout
from ublk_vm.channel import MachineDied
from ublk_vm.process import NothingInTime, ProcessEnded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ublk_vm.guest import Guest
    from ublk_vm.process import Process

START_SECS = 60.0
ANSWER_SECS = 60.0
# The option of a disk on which nobody but the test's own clients is to have requests. Where the driver has no such
# feature, START waits for the kernel's look for partitions; where it has, that look begins at some time after START.
ALONE = "prefer=NO_AUTO_PART_SCAN"


class NoTestdisk(Exception):
    """The program cannot be built."""


@dataclass
class Refused(Exception):
    """The program answered a command with an error."""

    kind: str
    text: str
    errno: int | None
    holders: list[str]
    answer: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@functools.cache
def program() -> Path:
    """Build it, optimised: an emulated processor is slow enough."""
    cargo = shutil.which("cargo")
    if not cargo:
        raise NoTestdisk("cargo is not in PATH")
    done = subprocess.run(
        [cargo, "build", "--release", "-p", "ublk-testdisk", "--message-format=json-render-diagnostics"],
        cwd=layout.TREE,
        env={"CARGO_BUILD_JOBS": "2", **os.environ},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        for line in done.stdout.splitlines():
            message = json.loads(line)
            if message.get("executable") and message["target"]["name"] == "ublk-testdisk":
                return Path(message["executable"])
    raise NoTestdisk("ublk-testdisk does not build")


class Disks:
    """A server process and its disks. Timeouts are native seconds."""

    def __init__(self, guest: Guest, process: Process) -> None:
        self.guest = guest
        self.process = process
        self.ready: list[dict[str, Any]] = []

    def read(self, timeout: float = ANSWER_SECS) -> dict[str, Any]:
        """The next line of the program; an error is raised."""
        answer: dict[str, Any] = json.loads(self.process.read_line(timeout))
        if error := answer.get("error"):
            raise Refused(error["kind"], error["text"], error["errno"], error["holders"], answer)
        return answer

    def ask(self, cmd: str, *, timeout: float = ANSWER_SECS, **fields: object) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._send({"cmd": cmd, **fields})
        return self.read(timeout)

    def _send(self, command: dict[str, object]) -> None:
        self.process.write_line(json.dumps(command))

    def start(self, *options: str) -> str:
        """Start another disk (or several); the last one's path."""
        self.ready += self.ask("start", options=" ".join(options), timeout=START_SECS)["ready"]
        return self.path

    @property
    def path(self) -> str:
        """The disk that was started last."""
        path: str = self.ready[-1]["path"]
        return path

    @property
    def name(self) -> str:
        """Its name in sysfs."""
        return Path(self.path).name

    @property
    def features(self) -> list[str]:
        """What the driver granted."""
        features: list[str] = self.ready[-1]["features"]
        return features

    def arm(self, action: str, **fields: str | float) -> None:
        """Make the disk misbehave; see `testdisk/src/faults.rs`, and `rules.rs` for handlers."""
        self._send({"cmd": "arm", "action": action, **fields})
        self.read()

    def heal(self) -> None:
        """No misbehaviour any more."""
        self.ask("heal")

    def stats(self) -> dict[str, Any]:
        """What the library has counted."""
        stats: dict[str, Any] = self.ask("stats")["stats"]
        return stats

    def backend(self) -> dict[str, Any]:
        """What the test backend has seen."""
        backend: dict[str, Any] = self.ask("stats")["backend"]
        return backend

    def faults(self) -> dict[str, Any]:
        """What rules have done."""
        faults: dict[str, Any] = self.ask("stats")["faults"]
        return faults

    def used(self) -> int:
        """Bytes of memory that the contents take."""
        used: int = self.ask("stats")["used"]
        return used

    def stop(self, within: float = 10, *, force: bool = False) -> dict[str, Any]:
        """Stop the last disk; `within` is native seconds here too."""
        scaled = self.guest.scale.seconds(within)
        return self.ask("stop", within=scaled, force=force, timeout=within + 60)

    def attributes(self) -> dict[str, str]:
        """What sysfs says about the last disk: "queue/rotational" and so on."""
        done = self.guest.run(f"cd /sys/block/{self.name} && grep -s . * queue/* mq/*/nr_tags", check=False)
        return dict(line.split(":", 1) for line in done.out.splitlines())

    def calls(self, *calls: str, manner: str = "direct") -> list[dict[str, Any]]:
        """Use the last disk; see `testdisk/src/client.rs`."""
        done = self.guest.run([program(), "client", self.path, manner, *calls])
        answers: list[dict[str, Any]] = json.loads(done.out)["calls"]
        return answers

    def errnos(self, *calls: str, manner: str = "direct") -> list[int]:
        """The errno of each call."""
        return [answer["errno"] for answer in self.calls(*calls, manner=manner)]


@contextmanager
def serving(guest: Guest, *options: str, env: dict[str, str] | None = None) -> Iterator[Disks]:
    """Disks as described, served for the length of a block; none without options."""
    with guest.popen([program(), "serve", *options], env=env) as process:
        disks = Disks(guest, process)
        disks.ready = disks.read(START_SECS)["ready"]
        try:
            yield disks
        except BaseException:
            # The failure of the block is what matters; the disks must go nevertheless.
            with contextlib.suppress(MachineDied, NothingInTime, ProcessEnded, AssertionError):
                finish(disks)
            raise
        finish(disks)


def finish(disks: Disks) -> None:
    """End the server the clean way and see that it left nothing."""
    disks.process.close_stdin()
    assert disks.process.wait(60) == 0, disks.process.err
    last = json.loads(disks.process.out.splitlines()[-1])
    assert last == {"bye": True, "leftovers": []}, last


def delete(guest: Guest, number: int) -> None:
    """Delete a device by its number, from a process of its own."""
    guest.run([program(), "delete", str(number)])


def devices(guest: Guest) -> list[dict[str, Any]]:
    """The devices that the driver knows."""
    devices: list[dict[str, Any]] = json.loads(guest.run([program(), "list"]).out)["devices"]
    return devices
