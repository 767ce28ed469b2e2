"""A program that runs on the machine under test while the test goes on; made for line protocols on stdin/stdout."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from typing import TYPE_CHECKING, Self, TypeVar

from ublk_vm.channel import Exchange, MachineDied, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_vm.timescale import Timescale

T = TypeVar("T")


class ProcessEnded(Exception):
    """The program ended while a line of it was awaited."""


class NothingInTime(Exception):
    """The program did not say or do in time what was awaited."""


class Process:
    """What `Guest.popen` returns. Timeouts are native seconds: the machine's timescale is applied here."""

    def __init__(self, argv: list[str], exchange: Exchange, scale: Timescale, log: Callable[[str], None]) -> None:
        self.argv = argv
        self._exchange = exchange
        self._scale = scale
        self._log = log
        self._changed = threading.Condition()
        self._out = bytearray()
        self._taken = 0
        self._err = bytearray()
        self._rc: int | None = None
        self._pid: int | None = None
        self._died: MachineDied | None = None
        threading.Thread(target=self._collect, daemon=True, name=f"popen {argv[0]}").start()

    def _collect(self) -> None:
        while True:
            try:
                message = self._exchange.next(86400)
            except MachineDied as e:
                with self._changed:
                    self._died = e
                    self._changed.notify_all()
                return
            with self._changed:
                self._out += decode(message.get("out", ""))
                self._err += decode(message.get("err", ""))
                self._pid = message.get("pid", self._pid)
                if "rc" in message:
                    self._rc = int(message["rc"])
                self._changed.notify_all()
            if "rc" in message:
                self._exchange.channel.forget(self._exchange.number)
                self._log(f"$ {self.argv} ended with {self._rc}\n{self.out}{self.err}")
                return

    @property
    def pid(self) -> int:
        """The program's process there."""
        return self._wait_for("the start of", lambda: self._pid, 30)

    @property
    def out(self) -> str:
        """All of stdout so far, lines already read included."""
        with self._changed:
            return self._out.decode(errors="replace")

    @property
    def err(self) -> str:
        """All of stderr so far."""
        with self._changed:
            return self._err.decode(errors="replace")

    def write(self, data: str | bytes) -> None:
        """Write to stdin as it is."""
        self._exchange.send("stdin", data=encode(data.encode() if isinstance(data, str) else data))

    def write_line(self, line: str) -> None:
        """Write a line to stdin."""
        self.write(line + "\n")

    def close_stdin(self) -> None:
        """End of file for the program."""
        self._exchange.send("eof")

    def read_line(self, timeout: float = 30) -> str:
        """The next line of stdout without its newline; waits for it."""

        def line() -> str | None:
            end = self._out.find(b"\n", self._taken)
            if end < 0:
                if self._rc is None:
                    return None
                raise ProcessEnded(f"{self.argv} ended with {self._rc}; stderr: {self._err.decode(errors='replace')}")
            text = self._out[self._taken : end].decode(errors="replace")
            self._taken = end + 1
            return text

        return self._wait_for("a line of", line, timeout)

    def wait(self, timeout: float = 30) -> int:
        """The exit status (negative: the signal that ended it)."""
        return self._wait_for("the end of", lambda: self._rc, timeout)

    def _wait_for(self, what: str, ready: Callable[[], T | None], timeout: float) -> T:
        deadline = time.monotonic() + self._scale.seconds(timeout)
        with self._changed:
            while (result := ready()) is None:
                if self._died:
                    raise self._died
                left = deadline - time.monotonic()
                if left <= 0:
                    err = self._err.decode(errors="replace")[-2000:]
                    raise NothingInTime(f"no sign of {what} {self.argv} within {timeout} s (native); stderr: {err}")
                self._changed.wait(left)
            return result

    def poll(self) -> int | None:
        """The exit status if it has ended."""
        with self._changed:
            return self._rc

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send a signal to the program and its children."""
        self._exchange.send("signal", sig=int(sig))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(MachineDied, NothingInTime):
            if self.poll() is None:
                self.kill()
                self.wait(15)
