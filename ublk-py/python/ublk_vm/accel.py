"""Whether KVM really works here.

/dev/kvm may exist and yet hang at the first guest instruction (nested virtualisation that only seems to be there),
so KVM is used only after this kernel has booted with it up to the agent, within a bound. The answer holds until
the machine reboots.
"""

from __future__ import annotations

import fcntl
import functools
import grp
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ublk_vm import layout

if TYPE_CHECKING:
    from collections.abc import Callable

PROBE_SECS = 20.0


@dataclass(frozen=True)
class Accel:
    """How QEMU runs the guest's processors."""

    name: str
    arguments: tuple[str, ...]

    @property
    def emulated(self) -> bool:
        """Whether a program plays the processor."""
        return self.name != "kvm"


KVM = Accel("kvm", ("-accel", "kvm", "-cpu", "host"))
# cx16=off: QEMU 7.2 corrupts the guest at cmpxchg16b.
TCG = Accel("tcg", ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,cx16=off"))
# One instruction is one virtual nanosecond: figures that no load of the host can move.
ICOUNT = Accel("icount", ("-accel", "tcg", "-cpu", "max,cx16=off", "-icount", "shift=0,sleep=off"))


def _may_open_kvm() -> bool:
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def closed() -> str | None:
    """Why emulation is used although there is KVM, and what to do about it: Debian has it for members of a group."""
    device = Path("/dev/kvm")
    if os.environ.get("UBLK_RIG_ACCEL") == "tcg" or not device.exists() or _may_open_kvm():
        return None
    said = "/dev/kvm is not ours to open, using emulation, which takes several times as long"
    try:
        group = grp.getgrgid(device.stat().st_gid).gr_name
    except (OSError, KeyError):
        return said
    return said if group == "root" else f"{said} (sudo usermod -aG {group} $USER, and log in anew)"


@functools.cache
def say(text: str) -> None:
    """Once a process, not at every boot."""
    print(f"kvm: {text}", file=sys.stderr, flush=True)


def choose(release: str, boots_with: Callable[[Accel, float], bool]) -> Accel:
    """KVM if it boots kernel `release` (asked once per boot of this machine), else emulation.

    `boots_with` boots the kernel in question once, within the given seconds.
    """
    if os.environ.get("UBLK_RIG_ACCEL") == "tcg" or not _may_open_kvm():
        if why := closed():
            say(why)
        return TCG
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    store = layout.cache_dir() / "kvm.json"
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answers = _read(store)
        key = f"{boot} {release}"
        if key not in answers:
            print(
                f"kvm: booting {release} to see whether KVM works (at most {PROBE_SECS:.0f} s)",
                file=sys.stderr,
            )
            answers = {k: v for k, v in answers.items() if k.startswith(boot)} | {key: boots_with(KVM, PROBE_SECS)}
            tmp = store.with_suffix(".tmp")
            tmp.write_text(json.dumps(answers))
            tmp.rename(store)
            print(f"kvm: {'works' if answers[key] else 'does not boot, using emulation'}", file=sys.stderr)
    return KVM if answers[key] else TCG


def _read(store: Path) -> dict[str, bool]:
    try:
        return {str(k): bool(v) for k, v in json.loads(store.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}
