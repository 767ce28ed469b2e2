"""A bound on every phase of every test, whatever it is stuck in.

When time is up, the stacks of all threads are written down, the machine under test is killed (which releases
whoever waits for it) and the main thread gets an exception. Should even that not help, the process ends itself.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

LAST_RESORT = 120.0


class TestTimeout(Exception):
    """A test exceeded its time as a whole."""

    __test__ = False


@contextmanager
def bounded(seconds: float, what: str, release: Callable[[], None]) -> Iterator[None]:
    """Interrupt the block after `seconds`; only the main thread may use this."""

    def expired(_signal: int, _frame: FrameType | None) -> None:
        print(f"\n{what}: over its {seconds:.0f} s; all threads:", file=sys.__stderr__)
        if sys.__stderr__:
            faulthandler.dump_traceback(sys.__stderr__)
        release()
        raise TestTimeout(f"{what} took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if sys.__stderr__:
        faulthandler.dump_traceback_later(seconds + LAST_RESORT, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
