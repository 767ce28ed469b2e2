"""What makes a test fail although it passed: a kernel that complained, or something left behind."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ublk_vm.guest import Machine

# I/O errors are not here: tests inject them.
_PROBLEM = re.compile(
    r"""
      \bKernel\ panic\b
    | \bBUG:\ | \bkernel\ BUG\ at\b
    | \bOops:\ | \bgeneral\ protection\ fault\b | \bunable\ to\ handle\b
    | \bWARNING:\                                   # WARN(), lockdep, suspicious RCU usage
    | \bINFO:\ task\ .*\bblocked\ for\b
    | \brcu.*\bdetected\b.*\bstall | \brcu.*\bself-detected\ stall
    | \bwatchdog:\ .*\b(?:soft|hard)\ (?:lockup|LOCKUP) | \bBUG:\ workqueue\ lockup\b
    | \b(?:KASAN|KCSAN|KFENCE|UBSAN|KMSAN):\  | \brefcount_t:\  | \blist_(?:add|del)\ corruption\b
    | \bpossible\ (?:circular\ locking|recursive\ locking|irq\ lock\ inversion)
    | \bOut\ of\ memory:\ | \boom-kill:
    """,
    re.VERBOSE,
)
SETTLE_SECS = 3.0
ANSWER_SECS = 20.0


def problems_in(lines: Iterable[str], allowed: Sequence[str] = ()) -> list[str]:
    """Lines of a kernel log that no passing test may cause, save those that match an `allowed` pattern."""
    allow = [re.compile(a) for a in allowed]
    return [line for line in lines if _PROBLEM.search(line) and not any(a.search(line) for a in allow)]


@dataclass
class Verdict:
    """What was found after a test."""

    kernel_problems: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    # Something was left, allowed or not: the next test needs a fresh machine.
    soiled: bool = False

    def __str__(self) -> str:
        parts = []
        if self.kernel_problems:
            parts.append("the kernel complained:\n  " + "\n  ".join(self.kernel_problems))
        if self.left:
            parts.append("left behind:\n  " + "\n  ".join(self.left))
        return "\n".join(parts)


def _belongings(report: dict[str, Any]) -> set[str]:
    return {
        *(f"device {n}" for n in report["ublk"]),
        *(f"mount {m}" for m in report["mounts"]),
        *(f"process {p}" for p in report["processes"]),
    }


class Inspector:
    """Watches one machine from test to test."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._before: set[str] = set()

    def _ask(self) -> dict[str, Any]:
        return self._machine.channel.ask("inspect", self._machine.scale.seconds(ANSWER_SECS))

    def begin(self) -> list[str]:
        """Note what is there already; return the log lines that no test has accounted for."""
        report = self._ask()
        self._before = _belongings(report)
        log: list[str] = report["log"]
        return log

    def end(self, console_allow: Sequence[str] = (), leak_allow: Sequence[str] = ()) -> Verdict:
        """Judge what a test did. A device's last node may take a moment to go; a leak stays."""
        verdict = Verdict()
        allow = [re.compile(a) for a in leak_allow]
        deadline = time.monotonic() + self._machine.scale.seconds(SETTLE_SECS)
        while True:
            report = self._ask()
            verdict.log += report["log"]
            left = sorted(_belongings(report) - self._before)
            verdict.left = [item for item in left if not any(a.search(item) for a in allow)]
            if not verdict.left or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        verdict.soiled = bool(left)
        verdict.kernel_problems = problems_in(verdict.log, console_allow)
        return verdict
