"""One guest that runs one pytest: booted, fed its job, listened to, and ended, whatever becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from ublk_vm import vm
from ublk_vm.channel import Exchange, MachineDied, decode, encode
from ublk_vm.guest import CommandTimeout, Guest, Shared
from ublk_vm.plugin import ARTIFACTS_VARIABLE, KERNEL_VARIABLE
from ublk_vm.verdict import SETTLE_SECS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ublk_vm.kernels import Kernel

Message = dict[str, Any]
# What a pytest that was interrupted gets for its fixtures' teardown; what one that is over gets for its exit.
TEARDOWN_SECS = 30.0
EXIT_SECS = 10.0
# What starting Python and collecting the tests may take, in native seconds, unless a test may take longer.
START_SECS = 120.0
# What a test that took its process down is shown to have written, in bytes.
LAST_WORDS = 8192
# Belongs to the host's session, or is the guest's own.
_NOT_PASSED_ON = ("PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "PYTEST_CURRENT_TEST", "PYTHONSTARTUP", "DISPLAY")


class GuestLost(Exception):
    """The guest, or the pytest in it, ended before its work was done; `details` is what it left to read."""

    def __init__(self, why: str, details: str) -> None:
        super().__init__(why)
        self.why = why
        self.details = details


@dataclass(frozen=True)
class Job:
    """What the guest's pytest is to do."""

    args: list[str]
    cwd: Path
    path: list[str]
    done: list[str] = field(default_factory=list)


def _environment(label: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    path = f"{vm.guest_path()}:{os.environ.get('PATH', '')}"
    return {**kept, "PATH": path, KERNEL_VARIABLE: label, ARTIFACTS_VARIABLE: vm.SHARED_AT}


class GuestRun:
    """A context: the guest runs inside of it. `quiet` is how long it may say nothing: native seconds, 0 for ever."""

    def __init__(self, kernel: Kernel, shape: vm.Shape, shared: Path, job: Job, quiet: float) -> None:
        self._label = kernel.label
        self._job = job
        self.machine = vm.boot(kernel, shape, shared)
        try:
            self._quiet = self.machine.scale.seconds(quiet) if quiet else None
            self._guest = Guest(self.machine, Shared(shared, vm.SHARED_AT))
            done = self._guest.run("modprobe ublk_drv && test -c /dev/ublk-control", check=False)
            if done.rc:
                raise MachineDied(f"it has no ublk driver: {done.err.strip() or 'no /dev/ublk-control'}")
            self._exchange = self._start()
        except BaseException:
            self.machine.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.machine.stop()

    def _start(self) -> Exchange:
        job = {**vars(self._job), "cwd": None, "release": self.machine.release}
        environment = {**_environment(self._label), "UBLK_TIMESCALE": f"{self.machine.scale.factor:g}"}
        return self.machine.channel.open(
            {
                "op": "run",
                "argv": [sys.executable, "-P", "-m", "ublk_vm.worker"],
                "env": environment,
                "cwd": str(self._job.cwd),
                "timeout": None,
                "stdin": encode(json.dumps(job).encode()),
            }
        )

    def messages(self) -> Iterator[Message]:
        """What the worker says, `{text}` being what tests write past pytest; GuestLost if it does not end well."""
        rest, said, testing, ended = b"", b"", False, False
        while True:
            try:
                answer = self._exchange.poll(EXIT_SECS if ended else self._patience(testing=testing))
            except MachineDied as e:
                if ended:
                    return
                raise GuestLost("the guest died", self.machine.console()[-4000:]) from e
            if answer is None:
                if ended:
                    return  # its threads or children hold it; they end with the machine
                limit = self._patience(testing=testing)
                raise GuestLost(f"no result for {limit:.0f} s", self._stacks())
            if "err" in answer:
                text = decode(answer["err"])
                said = (said + text)[-LAST_WORDS:]
                yield {"text": text.decode(errors="replace")}
            *whole, rest = (rest + decode(answer.get("out", ""))).split(b"\n")
            for line in whole:
                message = json.loads(line)
                ended = ended or "end" in message
                if "started" in message:
                    said, testing = b"", True
                yield message
            if "rc" in answer:
                if not ended:
                    raise GuestLost(_how(answer["rc"]), said.decode(errors="replace"))
                return

    def _patience(self, *, testing: bool) -> float:
        if self._quiet is None:
            return 365 * 86400.0
        if testing:
            # After the last test the worker itself may wait for a device to go.
            return self._quiet + self.machine.scale.seconds(SETTLE_SECS)
        return max(self._quiet, self.machine.scale.seconds(START_SECS))

    def _stacks(self) -> str:
        """Where the tests are, by Python (faulthandler answers SIGABRT) and by the kernel."""
        said = bytearray()
        with contextlib.suppress(MachineDied):
            self._exchange.send("signal", sig=int(signal.SIGABRT))
            deadline = time.monotonic() + EXIT_SECS
            while (answer := self._exchange.poll(deadline - time.monotonic())) is not None:
                said += decode(answer.get("err", ""))
                if "rc" in answer:
                    break
        blocked = ""
        with contextlib.suppress(MachineDied, CommandTimeout):
            blocked = self._guest.run("dmesg -C; echo w > /proc/sysrq-trigger; dmesg", timeout=20, check=False).out
        return f"{said.decode(errors='replace')}\ntasks that the kernel holds:\n{blocked}"

    def interrupt(self) -> None:
        """Ctrl-C for the worker; it may tear its fixtures down, within a bound."""
        with contextlib.suppress(MachineDied):
            self._exchange.send("signal", sig=int(signal.SIGINT))
            deadline = time.monotonic() + self.machine.scale.seconds(TEARDOWN_SECS)
            while (answer := self._exchange.poll(deadline - time.monotonic())) is not None:
                if "rc" in answer:
                    return


def _how(rc: int) -> str:
    if rc >= 0:
        return f"the tests' process ended itself with status {rc}"
    with contextlib.suppress(ValueError):
        return f"the tests' process died of {signal.Signals(-rc).name}"
    return f"the tests' process died of signal {-rc}"
