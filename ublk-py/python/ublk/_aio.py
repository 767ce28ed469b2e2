"""Backends whose methods are ``async``."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from typing import TYPE_CHECKING

from ublk._native import Inbox

if TYPE_CHECKING:
    from ublk._backend import Found
    from ublk._native import Request

__all__ = ["Courier"]


class Courier:
    """Brings requests from the workers to a loop, and runs the backend's methods there."""

    def __init__(self, found: Found) -> None:
        self.inbox = Inbox()
        self._methods = found.methods
        self._raw = found.raw
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # Whether the loop is one of its own, and whether that is to end.
        self._own = self._over = False
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on requests are served by this loop, whose thread calls this."""
        self._loop = loop
        # Nobody else keeps the reader: its end is how the inbox learns that the loop was closed.
        loop.add_reader(self.inbox.fileno(), self.inbox.reader(self._drain))

    def run(self, name: str) -> None:
        """Runs a loop of its own on a thread, until `end`. Call it shielded."""
        failed: list[BaseException] = []
        ready = threading.Event()

        async def serve() -> None:
            self._stop = asyncio.Event()
            self.attach(asyncio.get_running_loop())
            ready.set()
            # Dismissed before there was a loop to be told: by an exception, anywhere below.
            if not self._over:
                await self._stop.wait()

        def main() -> None:
            try:
                asyncio.run(serve())
            except BaseException as error:
                failed.append(error)
                if ready.is_set():
                    raise
            finally:
                ready.set()

        self._own = True
        # A daemon, lest a device that was never closed keeps the program from ending.
        thread = threading.Thread(target=main, name=name, daemon=True)
        thread.start()
        # Only now can it be joined.
        self._thread = thread
        ready.wait()
        if self._loop is None:
            raise failed[0]

    def end(self, within: float) -> bool:
        """Ends a loop of its own. False if it did not end in time. Call it shielded."""
        self.dismiss()
        if self._thread is None:
            return True
        self._thread.join(within)
        return not self._thread.is_alive()

    def dismiss(self) -> None:
        """Has a loop of its own end, and does not wait for that. There are no more requests."""
        self._over = True
        first = self.inbox.close()
        loop = self._loop
        if loop is None:
            return
        with contextlib.suppress(RuntimeError):  # it has ended already
            if first:
                # Once: by then the number may be another file's.
                loop.call_soon_threadsafe(loop.remove_reader, self.inbox.fileno())
            if self._own:
                loop.call_soon_threadsafe(self._stop.set)

    def is_serving_thread(self) -> bool:
        """Whether the caller is on the loop that serves."""
        return self.is_serving(asyncio._get_running_loop())  # noqa: SLF001

    def is_serving(self, loop: object) -> bool:
        """Whether this is the loop that serves."""
        return self._loop is not None and loop is self._loop

    def is_serving_task(self, task: object) -> bool:
        """Whether a method of the backend runs in this task."""
        return task in self._tasks

    def _drain(self, requests: list[Request]) -> None:
        loop = self._loop
        assert loop is not None
        for request in requests:
            if sys.version_info >= (3, 12):
                # What needs no wait is done at once.
                asyncio.Task(self._serve(request), loop=loop, eager_start=True)
            else:
                loop.create_task(self._serve(request))  # the loop keeps it until it runs

    async def _serve(self, request: Request) -> None:
        task = asyncio.current_task(self._loop)
        assert task is not None
        # The loop keeps a task only while it is about to run. A callback of the task's would be one more round of it.
        self._tasks.add(task)
        try:
            result = self._call(request)
            if asyncio.iscoroutine(result) or hasattr(result, "__await__"):
                result = await result
        except BaseException as error:  # noqa: BLE001  # the client is answered whatever it is
            request._raised(error)  # noqa: SLF001
        else:
            if not self._raw:
                request._returned(result)  # noqa: SLF001
        finally:
            self._tasks.discard(task)

    def _call(self, request: Request) -> object:
        if self._raw:
            return self._methods["handle"][0](request)
        op = request.op
        name = _METHOD_OF.get(op, "zone")
        method, takes_flags = self._methods[name]
        flags = {"flags": request.flags} if takes_flags else {}
        # No reference to the buffer stays here: it belongs to the method.
        if op == "flush":
            return method(**flags)
        if op in {"read", "write", "append"}:
            return method(request.buffer, request.offset, **flags)
        if op in {"trim", "zero"}:
            return method(request.length, request.offset, **flags)
        if op == "report_zones":
            return method(request.offset, request.zones, **flags)
        return method(op, request.offset, **flags)


_METHOD_OF = {
    "read": "pread",
    "write": "pwrite",
    "flush": "flush",
    "trim": "trim",
    "zero": "zero",
    "append": "append",
    "report_zones": "report_zones",
}
