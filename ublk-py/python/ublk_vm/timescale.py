"""The one place where a timeout becomes seconds of this machine.

Timeouts are written for a kernel that runs on the processor itself. Under software emulation everything takes
several times as long, and a loaded machine may need more still: UBLK_RIG_TIMESCALE multiplies once more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

EMULATION = 3.0


@dataclass(frozen=True)
class Timescale:
    """How much longer than natively things take."""

    factor: float = 1.0

    @classmethod
    def of(cls, *, emulated: bool) -> Timescale:
        """The scale of a machine, with the user's own multiplier."""
        return cls((EMULATION if emulated else 1.0) * float(os.environ.get("UBLK_RIG_TIMESCALE", "1")))

    def seconds(self, native: float) -> float:
        """How long to wait here for what takes at most `native` seconds natively."""
        return native * self.factor
