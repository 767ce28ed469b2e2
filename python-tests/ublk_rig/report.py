"""How many tests ran on which kernel, and whether that deserves to be called a pass."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ublk_vm.kernels import series_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass
class Outcome:
    """One test's result over all of its phases."""

    nodeid: str
    kernel: str | None
    outcome: str = "not run"
    duration: float = 0.0
    reason: str = ""
    properties: dict[str, Any] = field(default_factory=dict)

    def phase(self, when: str, outcome: str, duration: float, reason: str) -> None:
        """Take a phase into account: a failure anywhere is a failure."""
        self.duration += duration
        if outcome == "failed":
            self.outcome, self.reason = "failed", self.reason or reason
        elif self.outcome != "failed" and (outcome == "skipped" or when == "call"):
            self.outcome, self.reason = outcome, reason


@dataclass
class Tally:
    """All tests of a run. `excused` are requested kernels that the user's own selection left without a test.

    `releases` is what the kernels that were asked for by their series turned out to be.
    """

    requested: Sequence[str]
    tests: dict[str, Outcome] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)
    releases: dict[str, str] = field(default_factory=dict)

    def add(self, nodeid: str, kernel: str | None) -> Outcome:
        """A selected test."""
        return self.tests.setdefault(nodeid, Outcome(nodeid, kernel))

    def counts(self, kernel: str) -> Counter[str]:
        """Outcomes on one kernel."""
        return Counter(t.outcome for t in self.tests.values() if t.kernel == kernel)

    def complaints(self) -> list[str]:
        """Why this run is no pass although no test failed: kernels that were asked for and saw no test.

        Neither did one for which another stood in.
        """
        if not any(t.kernel for t in self.tests.values()):
            return []
        found = [
            f"kernel {kernel}: not to be had, these tests ran on {release} in its place"
            for kernel, release in self.releases.items()
            if series_of(release) != kernel
        ]
        for kernel in self.requested:
            counts = self.counts(kernel)
            ran = sum(counts.values()) - counts["skipped"] - counts["not run"]
            if ran:
                continue
            if counts:
                found.append(f"kernel {kernel}: no test ran ({sum(counts.values())} selected)")
            elif kernel not in self.excused:
                found.append(f"kernel {kernel}: requested, but no test was selected for it")
        return found

    def lines(self) -> list[str]:
        """The summary for people."""
        parts = []
        for kernel in self.requested:
            c = self.counts(kernel)
            text = f"{kernel}: {c['passed']} passed, {c['failed']} failed, {c['skipped']} skipped"
            extra = [f"{n} {what}" for what in ("xfailed", "not run") if (n := c[what])]
            parts.append(", ".join([text, *extra]))
        found = ["kernel tests: " + "; ".join(parts)]
        found += [
            f"  skipped [{t.kernel or 'host'}] {t.nodeid}: {t.reason}"
            for t in self.tests.values()
            if t.outcome == "skipped"
        ]
        return found

    def write(self, path: Path, facts: dict[str, Any]) -> None:
        """The same for programs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {**facts, "tests": [asdict(t) for t in self.tests.values()], "complaints": self.complaints()}
        path.write_text(json.dumps(data, indent=1, default=str) + "\n")
