"""Calls that block, for those who may not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_thread", "settle"]

_T = TypeVar("_T")


def settle(future: asyncio.Future[None]) -> None:
    """Ends a wait, unless somebody was faster."""
    if not future.done():
        future.set_result(None)


async def in_thread(
    call: Callable[[], _T],
    give_up: Callable[[], object] | None = None,
    *,
    left: Callable[[_T], object] | None = None,
) -> _T:
    """Runs a call that blocks on a thread of its own; a cancellation gives it up and waits for what comes of that.

    With `left` a cancellation does not wait: what the call returns all the same is handed to that, on a thread.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    returned: list[_T] = []
    raised: list[BaseException] = []
    # Of who ends first, the call or the wait for it.
    first = threading.Lock()

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:  # noqa: BLE001  # it is raised where the call was made
            raised.append(error)
        if not first.acquire(blocking=False):
            if left is not None and returned:
                left(returned.pop())
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, done)

    threading.Thread(target=run, name="ublk-call", daemon=True).start()
    cancelled: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError as error:
            if left is not None and first.acquire(blocking=False):
                raise
            if cancelled is None and give_up is not None:
                give_up()
            cancelled = error
    # That a call which was given up fails is what was asked for.
    if raised and (cancelled is None or not isinstance(raised[0], Exception)):
        raise raised.pop()
    if cancelled is not None:
        if left is not None and returned:
            threading.Thread(target=left, args=(returned.pop(),), name="ublk-call", daemon=True).start()
        raise cancelled
    return returned.pop()
