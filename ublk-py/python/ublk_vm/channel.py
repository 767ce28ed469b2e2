"""The host's end of the stream to an agent: many commands at a time, each with its own answers."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import queue
import socket
import threading
from typing import Any

Message = dict[str, Any]


class MachineDied(Exception):
    """The machine under test is gone or does not answer."""


class Channel:
    """Sends messages to an agent and sorts its answers by command."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()
        self._lock = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[Message | None]] = {}
        self._ids = itertools.count(1)
        self._ready: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._closed = False
        self._reader = threading.Thread(target=self._read, daemon=True, name="ublk-vm channel")
        self._reader.start()

    def _read(self) -> None:
        buffer = b""
        while True:
            try:
                data = self._sock.recv(1 << 16)
            except OSError:
                break
            if not data:
                break
            *whole, buffer = (buffer + data).split(b"\n")
            for line in whole:
                self._sort(json.loads(line))
        with self._lock:
            self._closed = True
            for waiting in self._waiting.values():
                waiting.put(None)
        self._ready.put(None)

    def _sort(self, message: Message) -> None:
        if "ready" in message:
            self._ready.put(message)
            return
        with self._lock:
            waiting = self._waiting.get(message["id"])
        if waiting:
            waiting.put(message)

    def wait_ready(self, timeout: float) -> str:
        """The kernel release that the agent reports once it is up."""
        try:
            message = self._ready.get(timeout=timeout)
        except queue.Empty:
            raise MachineDied(f"not up after {timeout:.0f} s") from None
        if message is None:
            raise MachineDied("ended before its agent was up")
        return str(message["ready"])

    def send(self, message: Message) -> None:
        """Send without expecting an answer."""
        data = (json.dumps(message) + "\n").encode()
        try:
            with self._send_lock:
                self._sock.sendall(data)
        except OSError as e:
            raise MachineDied(f"cannot be reached: {e}") from e

    def open(self, message: Message) -> Exchange:
        """Send a message under a new id and collect its answers."""
        answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        number = next(self._ids)
        with self._lock:
            if self._closed:
                raise MachineDied("is gone")
            self._waiting[number] = answers
        exchange = Exchange(self, number, answers)
        self.send({**message, "id": number})
        return exchange

    def forget(self, number: int) -> None:
        """Nobody waits for this command's answers any more."""
        with self._lock:
            self._waiting.pop(number, None)

    def ask(self, op: str, timeout: float) -> Message:
        """A question with one answer."""
        exchange = self.open({"op": op})
        try:
            report: Message = exchange.next(timeout)["report"]
        finally:
            self.forget(exchange.number)
        return report

    def close(self) -> None:
        """End the stream; whoever waits on it is told."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._reader.join(5)
        self._sock.close()


class Exchange:
    """One command's answers, in order."""

    def __init__(self, channel: Channel, number: int, answers: queue.SimpleQueue[Message | None]) -> None:
        self.channel = channel
        self.number = number
        self._answers = answers

    def poll(self, timeout: float) -> Message | None:
        """The next answer, or None if there is none in time; MachineDied once there will be none."""
        try:
            message = self._answers.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return None
        if message is None:
            self._answers.put(None)
            raise MachineDied("died")
        return message

    def next(self, timeout: float) -> Message:
        """The next answer; MachineDied if there is none in time, for an agent answers whatever its commands do."""
        message = self.poll(timeout)
        if message is None:
            raise MachineDied(f"did not answer for {timeout:.0f} s")
        return message

    def send(self, op: str, **more: object) -> None:
        """A message that belongs to this command."""
        self.channel.send({"op": op, "id": self.number, **more})


def encode(data: bytes) -> str:
    """Bytes on the wire."""
    return base64.b64encode(data).decode()


def decode(text: str) -> bytes:
    """Bytes from the wire."""
    return base64.b64decode(text)
