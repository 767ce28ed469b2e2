"""`python -m ublk_rig [options] -- COMMAND...`: boot a kernel, run one command in it, exit with its status."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ublk_rig import layout
from ublk_vm import kernels, vm
from ublk_vm.channel import MachineDied
from ublk_vm.guest import CommandTimeout, Guest, Shared
from ublk_vm.verdict import problems_in


def main(argv: list[str]) -> int:
    """Show what a command prints in a guest, and what the kernel had to say about it."""
    parser = argparse.ArgumentParser(prog="python -m ublk_rig", description=__doc__)
    parser.add_argument("--kernel", default=kernels.SERIES[-1], help="series, e.g. 6.12 (default: %(default)s)")
    parser.add_argument("--smp", type=int, default=2)
    parser.add_argument("--mem", default="2G")
    parser.add_argument("--icount", action="store_true", help="count instructions instead of time")
    parser.add_argument("--timeout", type=float, default=300, help="native seconds (default: %(default)s)")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(argv)
    try:
        shape = vm.Shape(given.smp, given.mem, given.icount)
        machine = vm.boot(kernels.ensure(given.kernel), shape, layout.ARTIFACTS)
    except (kernels.KernelError, MachineDied) as e:
        print(f"ublk_rig: {e}", file=sys.stderr)
        return 125
    guest = Guest(machine, Shared(layout.ARTIFACTS, vm.SHARED_AT))
    try:
        result = guest.run(given.command, timeout=given.timeout, cwd=Path.cwd(), check=False)
        log = machine.channel.ask("inspect", 30)["log"]
    except (MachineDied, CommandTimeout) as e:
        print(f"ublk_rig: {e}", file=sys.stderr)
        return 125
    finally:
        machine.stop()
    sys.stdout.write(result.out)
    sys.stderr.write(result.err)
    for line in problems_in(log):
        print(f"kernel: {line}", file=sys.stderr)
    print(
        f"[{machine.release} {machine.accel.name}: boot {machine.boot_secs:.1f} s, command {result.secs:.2f} s, "
        f"exit status {result.rc}]",
        file=sys.stderr,
    )
    return result.rc if result.rc >= 0 else 128 - result.rc


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
