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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ublk_rig import kernels, layout

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
    Capability("File systems: ext4, xfs, btrfs", r"test_disk_filesystems"),
    Capability("Verified I/O (fio): sizes, queues, depths, block sizes", r"test_disk_fio"),
    Capability(
        "Errnos, failed flushes, panics reach the client as they should", r"errno|flush_that_fails|test_disk_err"
    ),
    Capability("Flush, FUA, discard, write zeroes", r"test_disk_operations"),
    Capability("Block sizes, limits, read-only and the rest reach sysfs", r"test_disk_parameters|parameters_reach"),
    Capability("Killed servers leave what can be deleted", r"killed|server_that_forgot"),
    Capability(
        "Stop with a deadline, by force, by others, under load",
        r"(life::|test_disk_life).*(stop|drop|delete|revoked|held)",
    ),
    Capability("Bring-up, many devices, nothing left behind", r"life::|test_disk_life"),
    Capability("A worker that dies takes its device down", r"worker_death::"),
    Capability("Recovery: a disk outlives its killed server", r"recovery::|ten_kills"),
    Capability("Live handover: no failed I/O under fio and ext4", r"handover::|letting_go::"),
    Capability("A device that is stopped and started again", r"restart::"),
    Capability("Commands by bare numbers (legacy opcodes)", r"legacy::"),
    Capability("Resizing; no scan for partitions", r"resize::"),
    Capability("Zoned disks: zones, limits, appends", r"zoned::|test_disk_zoned"),
    Capability("Integrity metadata, made and verified by the kernel", r"integrity::"),
    Capability("Forked children hold nothing", r"fork::"),
    Capability("Requests: completed anywhere, exactly once", r"requests::"),
    Capability("Async backends on the worker's ring", r"async_ring::"),
    Capability("Files and block devices as disks", r"test_disk_file\.py"),
    Capability("Memory given back when idle", r"memory::"),
    Capability("Control commands, features, parameters, from any thread", r"control::|rules::"),
    Capability("The C and C++ library: examples, life, misuse", r"test_capi_kernel\.py"),
    Capability("What the driver's protocol was once believed to be", r"claims::"),
)
# Tests of the rig show nothing about disks.
RIG = re.compile(r"test_rig_|test_support|test_bench|test_demo")


@dataclass(frozen=True)
class Table:
    """Outcomes by capability and kernel, and the kernel tests that no capability claims."""

    kernels: list[str]
    cells: dict[str, dict[str, Counter[str]]]
    unclaimed: list[str]


def collect(summary: dict[str, Any]) -> Table:
    """Sort a run's tests into rows and columns."""
    cells: dict[str, dict[str, Counter[str]]] = {c.name: {} for c in CAPABILITIES}
    unclaimed = []
    for test in summary["tests"]:
        nodeid, kernel = test["nodeid"], test["kernel"]
        if kernel is None or RIG.search(nodeid):
            continue
        row = next((c.name for c in CAPABILITIES if re.search(c.tests, nodeid)), None)
        if row is None:
            unclaimed.append(nodeid)
        else:
            cells[row].setdefault(kernel, Counter())[test["outcome"]] += 1
    seen = {kernel for row in cells.values() for kernel in row}
    return Table([k for k in kernels.SERIES if k in seen] + sorted(seen - set(kernels.SERIES)), cells, unclaimed)


def cell(outcomes: Counter[str]) -> str:
    """What one kernel's tests of one capability say."""
    ran = outcomes["passed"] + outcomes["failed"] + outcomes["xfailed"]
    if not ran:
        return "not tested"
    text = f"yes ({outcomes['passed']})"
    if bad := outcomes["failed"] + outcomes["xfailed"]:
        text = f"**no**: {bad} of {ran} fail"
    return text


def render(table: Table) -> str:
    """The table, as Markdown."""
    if not table.kernels:
        raise NoTable("no test of a capability ran on any kernel")
    rows = [["", *(f"Linux {k}" for k in table.kernels)]]
    rows += [[name, *(cell(by.get(k, Counter())) for k in table.kernels)] for name, by in table.cells.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join([*lines, "", "In brackets: how many tests passed, none having failed."])


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
    parser.add_argument("--print", action="store_true", help="print the table and leave the README alone")
    given = parser.parse_args(argv)
    try:
        table = collect(json.loads(given.summary.read_text()))
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
