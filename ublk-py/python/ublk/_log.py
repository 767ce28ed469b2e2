"""From the library's queue of messages to `logging`."""

from __future__ import annotations

import atexit
import logging
import os
import threading

from ublk import _native

__all__ = ["ensure_thread"]

_lock = threading.Lock()
_thread: threading.Thread | None = None


def _run() -> None:
    while (record := _native.next_record()) is not None:
        level, name, text, exception = record
        logging.getLogger(name).log(level, "%s", text, exc_info=exception)


def ensure_thread() -> None:
    """Starts the thread that logs, once; it ends with the program."""
    global _thread  # noqa: PLW0603
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_run, name="ublk-log", daemon=True)
            _thread.start()
            atexit.register(_close)


def _close() -> None:
    if _thread is not None:
        _native.close_log()
        # It logs what is left; a handler that hangs must not hang the exit.
        _thread.join(5)


def _forked() -> None:
    global _thread, _lock
    _native.forked()
    if _thread is not None:
        atexit.unregister(_close)
    _thread, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forked)
