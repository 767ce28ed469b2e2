"""From the library's queue of messages to `logging`."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import traceback

from ublk import _native

__all__ = ["ensure_thread"]

_lock = threading.Lock()
_thread: threading.Thread | None = None


def _run() -> None:
    while (record := _native.next_record()) is not None:
        level, name, text, exception = record
        try:
            logging.getLogger(name).log(level, "%s", text, exc_info=exception)
        except Exception:  # noqa: BLE001
            # A logging handler of the program's: the next message may fare better.
            traceback.print_exc()
        # Its traceback has the backend's frames, and they the request's memory: not until the next message comes.
        del record, exception


def ensure_thread() -> None:
    """Starts the thread that logs, once; it ends with the program."""
    if _thread is None:
        # Ctrl-C in the middle of a thread's start would leave one that nobody knows; or Python's own lock, broken.
        _native.shielded(_start)


def _start() -> None:
    global _thread  # noqa: PLW0603
    with _lock:
        if _thread is None:
            thread = threading.Thread(target=_run, name="ublk-log", daemon=True)
            thread.start()
            # Not before: Ctrl-C may come in between, and one that was not started cannot be joined.
            _thread = thread


def _close() -> None:
    if _thread is not None:
        _native.close_log()
        # It logs what is left; a handler that hangs must not hang the exit.
        _thread.join(5)


def _forked() -> None:
    global _thread, _lock
    _native.forked()
    _thread, _lock = None, threading.Lock()


# Before the devices register theirs, and so after them at the end.
atexit.register(_close)
os.register_at_fork(after_in_child=_forked)
