"""`python -m ublk_rig.support`: what works on which kernel, from test results into the README.

A capability is a row, and the tests that show it are those whose names match its pattern. The block between the two
markers in README.md is replaced by what artifacts/summary.json (or the file that is named) says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ublk_rig import layout
from ublk_vm import kernels

# A test's property: what it saw refused, for the kernel lacks it.
REFUSED = "refused"
# How the reason of a skip begins that says the same, after a word of pytest's own.
SKIPPED = "Skipped: "
LACKS = "the driver lacks "
NOTE = (
    'In brackets: how many tests passed, none having failed. "no" and "not": the kernel\'s driver lacks these; who'
    " asks for one gets an error that names it, and no device."
)
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"


class NoTable(Exception):
    """The table cannot be made."""


@dataclass(frozen=True)
class Capability:
    """A row: its words, and a regular expression that the names of its tests match."""

    name: str
    tests: str


# The first row that matches a test claims it: the special before the general.
CAPABILITIES = (
    Capability("The README's ramdisk: mkfs, mount, write, read back", r"test_readme\.py"),
    Capability("The Python package: contract, buffers, errors, asyncio", r"test_py_"),
    Capability("The C library: examples, misuse, valgrind, sanitizers", r"test_capi_"),
    Capability("File systems: ext4, xfs, btrfs", r"test_disk_filesystems"),
    Capability("Verified I/O (fio): sizes, queues, depths, block sizes", r"test_disk_fio"),
    Capability("Several files as one disk (stripe)", r"stripe::"),
    Capability("Disks that misbehave by rules (fault)", r"fault::|test_disk_fault"),
    Capability("Every data path, command strategy and target through a life", r"test_disk_matrix"),
    Capability("Data paths and batches, with every kind of backend; several workers a queue", r"data_paths::"),
    Capability("Memory that clients share (SHMEM_ZC)", r"shared_(memory|lives)::|test_examples.*shares_memory"),
    Capability("Devices of ordinary users, with udev", r"\bunprivileged::|test_examples.*alice"),
    Capability(
        "Errnos, failed flushes, panics reach the client as they should", r"errno|flush_that_fails|test_disk_err"
    ),
    Capability("Flush, FUA, discard, write zeroes", r"test_disk_operations"),
    Capability("Block sizes, limits, read-only and the rest reach sysfs", r"test_disk_parameters|parameters_reach"),
    Capability("Killed servers leave what can be deleted", r"\bkilled::|test_a_killed"),
    Capability("Many devices on few workers", r"\bmany::|test_many_disks|test_disk_life.*shared_worker"),
    Capability(
        "Stop with a deadline, by force, by others, under load",
        r"(life::|test_disk_life).*(stop|drop|delete|revoked|held)",
    ),
    Capability("Bring-up, nothing left behind", r"life::|cancelled::|described::|test_disk_life"),
    Capability("A worker that dies takes its device down", r"worker_death::"),
    Capability("Recovery: a disk outlives its killed server", r"recovery::|ten_kills"),
    Capability(
        "Live handover: no failed I/O under fio and ext4", r"handover::|letting_go::|test_examples.*successor"
    ),
    Capability("A device that is stopped and started again", r"restart::"),
    Capability("Commands by bare numbers (legacy opcodes)", r"legacy::"),
    Capability("Resizing; no scan for partitions", r"resize::"),
    Capability("Zoned disks: zones, limits, appends", r"zoned::|test_disk_zoned|test_examples.*zones"),
    Capability("Integrity metadata, made and verified by the kernel", r"integrity::"),
    Capability("Forked children hold nothing", r"fork::"),
    Capability("Requests: completed anywhere, exactly once", r"requests::|attendant::"),
    Capability("Async backends on the worker's ring", r"async_ring::"),
    Capability("Files and block devices as disks", r"test_disk_file\.py"),
    Capability("Memory given back when idle", r"memory::"),
    Capability("Control commands, features, parameters, from any thread", r"control::|rules::|\blate::"),
    Capability("Batches taken in part, pages that cannot be registered: what comes of it", r"driver_failures::"),
    Capability("The driver's protocol, point by point", r"claims::"),
)
# Tests of the rig show nothing about disks.
RIG = re.compile(r"test_rig_|test_support|test_bench|test_demo")


@dataclass
class Cell:
    """The tests of one capability on one kernel."""

    outcomes: Counter[str] = field(default_factory=Counter)
    # Driver features, with the release that brought them.
    lacking: set[str] = field(default_factory=set)

    def add(self, test: dict[str, Any]) -> None:
        """Count a test. One that saw what the kernel lacks refused shows nothing of it at work."""
        outcome, lacking = test["outcome"], list(test.get("properties", {}).get(REFUSED, []))
        if outcome == "passed" and lacking:
            outcome = "refused"
        reason = test.get("reason", "").removeprefix(SKIPPED)
        if reason.startswith(LACKS):
            lacking += re.findall(r"\w+ \(since Linux [\d.]+\)", reason)
        self.outcomes[outcome] += 1
        self.lacking.update(words.replace("since Linux", "since") for words in lacking)

    def __str__(self) -> str:
        passed, bad = self.outcomes["passed"], self.outcomes["failed"] + self.outcomes["xfailed"]
        lacking = ", ".join(sorted(self.lacking))
        if bad:
            return f"**no**: {bad} of {bad + passed + self.outcomes['refused']} fail"
        if passed:
            return f"yes ({passed})" + (f"; not {lacking}" if lacking else "")
        return f"no: {lacking}" if lacking else "not tested"


@dataclass(frozen=True)
class Table:
    """Cells by capability and kernel, and the kernel tests that no capability claims."""

    kernels: list[str]
    cells: dict[str, dict[str, Cell]]
    unclaimed: list[str]
    # What tests have measured, by its name and kernel: the most.
    figures: dict[str, dict[str, float]]
    # What the kernels say of themselves.
    releases: dict[str, str] = field(default_factory=dict)

    def heading(self, kernel: str) -> str:
        """The column of a kernel: what ran, whatever it was asked for as."""
        release = self.releases.get(kernel)
        if release is None:
            return f"Linux {kernel}"
        return f"Linux {kernels.series_of(release)} ({re.split('[-+]', release)[0]})"


def row_of(nodeid: str) -> str | None:
    """The row that a kernel test belongs to."""
    return next((c.name for c in CAPABILITIES if re.search(c.tests, nodeid)), None)


def collect(summary: dict[str, Any]) -> Table:
    """Sort a run's tests into rows and columns."""
    cells: dict[str, dict[str, Cell]] = {c.name: {} for c in CAPABILITIES}
    unclaimed = []
    figures: dict[str, dict[str, float]] = {}
    for test in summary["tests"]:
        nodeid, kernel = test["nodeid"], test["kernel"]
        if kernel is None or RIG.search(nodeid):
            continue
        row = row_of(nodeid)
        for name, value in test.get("properties", {}).items():
            if name == REFUSED:
                continue
            by = figures.setdefault(name, {})
            by[kernel] = max(value, by.get(kernel, value))
        if row is None:
            unclaimed.append(nodeid)
        else:
            cells[row].setdefault(kernel, Cell()).add(test)
    seen = {kernel for row in cells.values() for kernel in row}
    columns = [k for k in kernels.SERIES if k in seen] + sorted(seen - set(kernels.SERIES))
    return Table(columns, cells, unclaimed, figures, summary.get("releases", {}))


def render(table: Table) -> str:
    """The table, as Markdown."""
    if not table.kernels:
        raise NoTable("no test of a capability ran on any kernel")
    rows = [["", *map(table.heading, table.kernels)]]
    rows += [[name, *(str(by.get(k, Cell())) for k in table.kernels)] for name, by in table.cells.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    lines += ["", NOTE]
    for name, by in table.figures.items():
        values = ", ".join(f"{by[k]:g} on Linux {k}" for k in table.kernels if k in by)
        lines += ["", f"{name}: {values}."]
    return "\n".join(lines)


def replaced(readme: str, block: str) -> str:
    """The README with another block between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise NoTable(f"README.md has no block between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(argv: list[str]) -> int:
    """Write the block, or say what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m ublk_rig.support", description=__doc__)
    parser.add_argument("summary", nargs="?", type=Path, default=layout.ARTIFACTS / "summary.json")
    parser.add_argument("--readme", type=Path, default=layout.TREE / "README.md")
    parser.add_argument("--partial", action="store_true", help="also from a run of some of the tests")
    parser.add_argument("--print", action="store_true", help="print the table and leave the README alone")
    given = parser.parse_args(argv)
    try:
        summary = json.loads(given.summary.read_text())
        if not (summary.get("whole") or given.partial or given.print):
            raise NoTable(f"{given.summary} is of a run of some of the tests, and says nothing about the others")
        table = collect(summary)
        block = render(table)
        if given.print:
            print(block)
        else:
            given.readme.write_text(replaced(given.readme.read_text(), block))
    except (NoTable, OSError, ValueError, KeyError) as e:
        print(f"support: {e}", file=sys.stderr)
        return 1
    for nodeid in table.unclaimed:
        print(f"support: no row claims {nodeid}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
