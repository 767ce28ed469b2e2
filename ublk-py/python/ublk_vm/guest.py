"""What a test sees of the machine under test; the same in QEMU and on a host."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ublk_vm.channel import Channel, Exchange, MachineDied, decode, encode
from ublk_vm.process import Process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ublk_vm.timescale import Timescale

ANSWER_SLACK = 20.0
TRANSCRIPT_LIMIT = 4 << 20


class Machine(Protocol):
    """What a guest needs of the machine that it runs on."""

    label: str
    release: str
    cpus: int
    emulated: bool
    channel: Channel
    scale: Timescale

    def console(self) -> str:
        """Everything the kernel has written to its console."""


@dataclass(frozen=True)
class Result:
    """How a command ended; `secs` is what the caller waited."""

    argv: list[str]
    rc: int
    out: str
    err: str
    secs: float

    def __str__(self) -> str:
        ended = f"{self.argv} ended with {self.rc} after {self.secs:.2f} s"
        return f"{ended}\nstdout: {self.out[-4000:]}\nstderr: {self.err[-4000:]}"


class CommandFailed(AssertionError):
    """A command that had to succeed did not."""


class CommandTimeout(AssertionError):
    """A command did not end in time; its processes were killed."""


@dataclass(frozen=True)
class Shared:
    """A folder of this test that host and guest both write to, as each of them sees it. Kept when the test fails."""

    host: Path
    guest: str

    def create(self) -> Shared:
        """Make the folder; most tests need none."""
        self.host.mkdir(parents=True, exist_ok=True)
        return self


class Guest:
    """A machine under test, for one test. All timeouts are native seconds."""

    def __init__(self, machine: Machine, artifacts: Shared) -> None:
        self._machine = machine
        self._artifacts = artifacts
        self._transcript: list[str] = []
        self._transcript_size = 0
        self._console_from = len(machine.console())

    @property
    def kernel(self) -> str:
        """The label of the kernel: "6.12", "7.3"."""
        return self._machine.label

    @property
    def release(self) -> str:
        """The kernel release as uname says it."""
        return self._machine.release

    @property
    def cpus(self) -> int:
        """How many processors the kernel has."""
        return self._machine.cpus

    @property
    def emulated(self) -> bool:
        """Whether a program plays the processor: figures of speed mean little then."""
        return self._machine.emulated

    @property
    def scale(self) -> Timescale:
        """For the timeouts that a test hands to programs in the guest."""
        return self._machine.scale

    @property
    def artifacts(self) -> Shared:
        """This test's shared folder, made on first use."""
        return self._artifacts.create()

    def run(
        self,
        argv: Sequence[str | Path] | str,
        *,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: str | bytes | None = None,
        check: bool = True,
    ) -> Result:
        """Run a command (a string goes to bash) as root and wait for it.

        CommandTimeout kills its whole session first. With `check`, an exit status other than 0 is CommandFailed.
        """
        command = _argv(argv)
        began = time.monotonic()
        limit = self.scale.seconds(timeout)
        data = stdin.encode() if isinstance(stdin, str) else stdin
        exchange = self._open(command, env, cwd, limit, stdin=None if data is None else encode(data))
        out, err = bytearray(), bytearray()
        deadline = began + limit + self.scale.seconds(ANSWER_SLACK)
        try:
            while "rc" not in (message := exchange.next(deadline - time.monotonic())):
                out += decode(message.get("out", ""))
                err += decode(message.get("err", ""))
        except MachineDied as e:
            self._note(f"$ {command}\n{out.decode(errors='replace')}{err.decode(errors='replace')}(machine {e})")
            raise MachineDied(
                f"{self.release} {e} while running {command}; console:\n{self.console()[-4000:]}"
            ) from e
        finally:
            exchange.channel.forget(exchange.number)
        result = Result(
            command,
            int(message["rc"]),
            out.decode(errors="replace"),
            err.decode(errors="replace"),
            time.monotonic() - began,
        )
        self._note(f"$ {result}")
        if message["timeout"]:
            held = " and the kernel holds it: SIGKILL does not end it" if message["stuck"] else ""
            raise CommandTimeout(f"over {timeout} s (native){held}: {result}")
        if check and result.rc:
            raise CommandFailed(str(result))
        return result

    def popen(
        self,
        argv: Sequence[str | Path] | str,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> Process:
        """Start a program and go on; it must be over when the test is."""
        command = _argv(argv)
        self._note(f"$ {command} started")
        exchange = self._open(command, env, cwd, None, stdin=True)
        return Process(command, exchange, self.scale, self._note)

    def _open(
        self,
        argv: list[str],
        env: Mapping[str, str] | None,
        cwd: str | Path | None,
        limit: float | None,
        *,
        stdin: str | bool | None,
    ) -> Exchange:
        """Start a command; `stdin` is what it reads, True for a pipe that stays open, None for nothing."""
        # Programs under test have timeouts of their own, and need to know how slow this machine is.
        environment = {"UBLK_TIMESCALE": f"{self.scale.factor:g}", **(env or {})}
        where = str(cwd) if cwd else None
        return self._machine.channel.open(
            {"op": "run", "argv": argv, "env": environment, "cwd": where, "timeout": limit, "stdin": stdin}
        )

    def console(self) -> str:
        """What the kernel wrote to its console since this test began (warnings and worse)."""
        return self._machine.console()[self._console_from :]

    def transcript(self) -> str:
        """Every command of this test with its output."""
        return "\n".join(self._transcript)

    def _note(self, text: str) -> None:
        if self._transcript_size < TRANSCRIPT_LIMIT:
            self._transcript_size += len(text)
            self._transcript.append(text)


def _argv(argv: Sequence[str | Path] | str) -> list[str]:
    return ["/bin/bash", "-c", argv] if isinstance(argv, str) else [str(a) for a in argv]
