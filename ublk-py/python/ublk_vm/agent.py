"""Runs commands on the machine under test for a host at the other end of a stream.

It runs as `python -I -S agent.py [FD]` with the standard library alone: in a guest (no FD: the virtio port named
`ublk.agent`) and, so that both rigs behave alike, on a host. One JSON object a line each way:

    to the agent                                        from the agent
    {op: run, id, argv, env, cwd, timeout, stdin}       {id, pid}, {id, out|err: base64}..., {id, rc, timeout, stuck}
    {op: stdin, id, data} {op: eof, id}
    {op: signal, id, sig}
    {op: inspect, id}                                   {id, report: {...}}
    {op: reap, id}                                      {id, report: {}}
    {op: poweroff}                                      (the stream ends)
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Message = dict[str, Any]
# After SIGKILL a process is gone at once, unless the kernel holds it: then the caller must hear of it.
STUCK_AFTER = 10.0
# A grandchild may keep a pipe open for ever; output that still flows is waited for.
QUIET = 2.0
UBLK_NODE = re.compile(r"ublk[bc]\d")


class Stream:
    """The line protocol over a file descriptor; many threads send."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message whole."""
        data = (json.dumps(message) + "\n").encode()
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]

    def lines(self, *, forever: bool) -> Iterator[Message]:
        """Messages; a virtio port reads as empty while the host is not connected, so there the end is no end."""
        buffer = b""
        while True:
            data = os.read(self._fd, 65536)
            if not data:
                if not forever:
                    return
                time.sleep(0.02)
            buffer += data
            *whole, buffer = buffer.split(b"\n")
            yield from map(json.loads, whole)


class KernelLog:
    """The kernel's log as records: reading it again returns only what is new."""

    def __init__(self, *, from_start: bool) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        if not from_start:
            os.lseek(self._fd, 0, os.SEEK_END)

    def new(self) -> list[str]:
        """The records since the last call."""
        found: list[str] = []
        while True:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return found
            except BrokenPipeError:
                found.append("(records were overwritten before they were read)")
                continue
            head, _, text = record.partition(";")
            micros = int(head.split(",")[2])
            found.append(f"[{micros / 1e6:.6f}] {text.splitlines()[0] if text else ''}")


class Job:
    """A command, in a session of its own so that it can be killed with all of its children."""

    def __init__(self, stream: Stream, message: Message) -> None:
        self._stream = stream
        self._id = message["id"]
        self._timeout = message.get("timeout")
        self.argv: list[str] = message["argv"]
        stdin = message.get("stdin")
        self.process = subprocess.Popen(
            self.argv,
            env={**os.environ, **(message.get("env") or {})},
            cwd=message.get("cwd") or "/",
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._first_input = base64.b64decode(stdin) if isinstance(stdin, str) else b""
        self._closes = isinstance(stdin, str)
        self._last_output = time.monotonic()

    def serve(self) -> None:
        """Pump until the process is over, then tell."""
        assert self.process.stdout
        assert self.process.stderr
        pumps = [
            threading.Thread(target=self._pump, args=a, daemon=True)
            for a in ((self.process.stdout.fileno(), "out"), (self.process.stderr.fileno(), "err"))
        ]
        for pump in pumps:
            pump.start()
        if self._closes:
            threading.Thread(target=self._feed, daemon=True).start()
        timed_out = stuck = False
        try:
            rc = self.process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            self.signal(signal.SIGKILL)
            try:
                rc = self.process.wait(STUCK_AFTER)
            except subprocess.TimeoutExpired:
                stuck, rc = True, -signal.SIGKILL
        self._last_output = time.monotonic()
        while any(p.is_alive() for p in pumps) and time.monotonic() - self._last_output < QUIET:
            for pump in pumps:
                pump.join(0.05)
        self._stream.send({"id": self._id, "rc": rc, "timeout": timed_out, "stuck": stuck})

    def _pump(self, fd: int, kind: str) -> None:
        while data := os.read(fd, 32768):
            self._stream.send({"id": self._id, kind: base64.b64encode(data).decode()})
            self._last_output = time.monotonic()

    def _feed(self) -> None:
        self.write(self._first_input)
        self.close_stdin()

    def write(self, data: bytes) -> None:
        """Feed stdin."""
        assert self.process.stdin
        with contextlib.suppress(OSError, ValueError):  # it may be over, or have closed its end
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def close_stdin(self) -> None:
        """End of file on stdin."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def signal(self, number: int) -> None:
        """Signal the command and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Agent:
    """Knows every session that it started, so that nothing is left behind unseen."""

    def __init__(self, stream: Stream, log: KernelLog) -> None:
        self._stream = stream
        self._log = log
        self._jobs: dict[int, Job] = {}
        self._sessions: set[int] = set()

    def handle(self, message: Message) -> None:
        """Do what the host asks; nothing here waits."""
        match message["op"]:
            case "run":
                self._run(message)
            case "stdin":
                if job := self._jobs.get(message["id"]):
                    job.write(base64.b64decode(message["data"]))
            case "eof":
                if job := self._jobs.get(message["id"]):
                    job.close_stdin()
            case "signal":
                if job := self._jobs.get(message["id"]):
                    job.signal(message["sig"])
            case "inspect":
                self._stream.send({"id": message["id"], "report": self._inspect()})
            case "reap":
                self._reap()
                self._stream.send({"id": message["id"], "report": {}})
            case op:
                raise ValueError(f"unknown operation {op}")

    def _run(self, message: Message) -> None:
        try:
            job = Job(self._stream, message)
        except OSError as e:
            text = f"{message['argv'][0]}: {e}\n"
            self._stream.send({"id": message["id"], "err": base64.b64encode(text.encode()).decode()})
            self._stream.send({"id": message["id"], "rc": 127, "timeout": False, "stuck": False})
            return
        self._jobs[message["id"]] = job
        self._sessions.add(job.process.pid)
        self._stream.send({"id": message["id"], "pid": job.process.pid})

        def serve() -> None:
            job.serve()
            self._jobs.pop(message["id"], None)

        threading.Thread(target=serve, daemon=True).start()

    def _left_processes(self) -> dict[int, str]:
        """Processes of sessions that this agent started, zombies apart."""
        left, alive = {}, set()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                state, _ppid, _pgrp, session = rest.split()[:4]
                if int(session) in self._sessions and state not in "ZX":
                    alive.add(int(session))
                    args = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    left[int(entry.name)] = f"{state} {args.strip() or name.partition('(')[2]}"
        self._sessions &= alive | {job.process.pid for job in list(self._jobs.values())}
        return left

    def _inspect(self) -> Message:
        processes = [f"{pid} {what}" for pid, what in self._left_processes().items()]
        return {"ublk": ublk_nodes(), "mounts": ublk_mounts(), "processes": processes, "log": self._log.new()}

    def _reap(self) -> None:
        for pid in self._left_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ublk_nodes() -> list[str]:
    """Every trace of a ublk device: its nodes, and what sysfs shows of it."""
    return [n for d in ("/dev", "/sys/class/ublk-char", "/sys/block") for n in _ublk_in(d)]


def ublk_mounts() -> list[str]:
    """What is mounted from a ublk disk."""
    return [m for m in Path("/proc/self/mounts").read_text().splitlines() if m.startswith("/dev/ublkb")]


def _ublk_in(directory: str) -> list[str]:
    try:
        return [f"{directory}/{n}" for n in sorted(p.name for p in Path(directory).iterdir()) if UBLK_NODE.match(n)]
    except OSError:
        return []


def _virtio_port() -> str:
    """The port appears when its driver has bound; that is soon, and nothing announces it here."""
    while True:
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == "ublk.agent":
                return f"/dev/{name.parent.name}"
        time.sleep(0.02)


def _keep_a_ring() -> None:
    """Open an io_uring for as long as the machine runs.

    The kernel patches a branch of its submission path when the first ring with an index array comes, as most programs
    have them, and when the last one goes. A processor that TCG emulates may meet the patch's breakpoint after that is
    over: "Oops: int3" in io_submit_sqes, and the machine is gone. With this ring the first comes early, and the last
    never goes. Where there is no io_uring, there is nothing to patch.
    """
    io_uring_setup, params = 425, ctypes.create_string_buffer(120)
    ctypes.CDLL(None).syscall(io_uring_setup, 1, params)


def main(argv: list[str]) -> None:
    """Serve until the stream ends."""
    in_guest = not argv
    if in_guest:
        _keep_a_ring()
    fd = os.open(_virtio_port(), os.O_RDWR) if in_guest else int(argv[0])
    stream = Stream(fd)
    agent = Agent(stream, KernelLog(from_start=in_guest))
    stream.send({"ready": os.uname().release})
    for message in stream.lines(forever=in_guest):
        if message["op"] == "poweroff":
            return
        agent.handle(message)


if __name__ == "__main__":
    main(sys.argv[1:])
