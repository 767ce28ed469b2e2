"""Disks of ordinary users, with udev and the rules that are shipped: made, served, used and deleted by one."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ublk
from tests.py_guest.disks import BLOCK, MIB, Ram, needs, opened, raised, read, read_at, together, until, write
from ublk_rig import layout
from ublk_rig.pyguest import limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OWNER, STRANGER, GROUP = 1000, 1001, 1000
CONTROL = "/dev/ublk-control"
RULES = Path("/etc/udev/rules.d/80-ublk.rules")
HELPER = Path("/usr/lib/udev/ublk_chown")
# In place of the helper of docs/unprivileged.md, a program in Rust that has to be built: it has a process that is there
# already ask the driver, because an emulated processor takes seconds to start an interpreter.
NAMES = Path("/run/ublk-names")
CHOWN = f"#!/bin/sh\necho $1 > {NAMES}\n"
# The guest may have got its root by chroot, where these programs do nothing unless told.
UDEV = {**os.environ, "SYSTEMD_IGNORE_CHROOT": "1"}


def _udevadm(*words: str) -> bool:
    return subprocess.run(["udevadm", *words], env=UDEV, check=False, capture_output=True).returncode == 0


def _give() -> None:
    """Gives nodes to whom the driver says, for ever."""
    # Also for writing, so that there is always somebody who may write.
    with open(os.open(NAMES, os.O_RDWR)) as names:
        for name in map(str.strip, names):
            owners = [info.owner for info in ublk.list() if name in {f"ublkc{info.id}", f"ublkb{info.id}"}]
            # Those of root are left alone.
            if owners and owners[0] != (0, 0):
                os.chown(f"/dev/{name}", *owners[0])


@contextlib.contextmanager
def _udev() -> Iterator[None]:
    """Runs udev with our rules, and a group for those who may make devices."""
    groups, node = Path("/etc/group"), os.stat(CONTROL)
    before = groups.read_text()
    if "\nublk:" not in before:
        groups.write_text(before + f"ublk:x:{GROUP}:\n")
    RULES.parent.mkdir(parents=True, exist_ok=True)
    RULES.write_bytes((layout.TREE / "udev/80-ublk.rules").read_bytes())
    HELPER.write_text(CHOWN)
    HELPER.chmod(0o755)
    os.mkfifo(NAMES)
    giver = os.fork()
    if giver == 0:
        try:
            _give()
        finally:
            os._exit(1)
    udevd = subprocess.Popen(["/lib/systemd/systemd-udevd"], env=UDEV, stderr=subprocess.DEVNULL)
    try:
        until(lambda: _udevadm("control", "--ping", "--timeout=5"), 30)
        # It was there before udevd.
        assert _udevadm("trigger", "--settle", "--action=add", "--sysname-match=ublk-control")
        yield
    finally:
        udevd.kill()
        udevd.wait()
        os.kill(giver, signal.SIGKILL)
        os.waitpid(giver, 0)
        NAMES.unlink()
        RULES.unlink()
        HELPER.unlink()
        groups.write_text(before)
        os.chown(CONTROL, node.st_uid, node.st_gid)
        os.chmod(CONTROL, stat.S_IMODE(node.st_mode))


def _as_user(user: int, call: Callable[[], None]) -> None:
    """Makes a call in a process of an ordinary user, which ends with it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            os.setgroups([])
            os.setresgid(GROUP, GROUP, GROUP)
            os.setresuid(user, user, user)
            # As of a process that was this user's from its start: /proc/self is its own.
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
            call()
        except BaseException:
            said = traceback.format_exc()
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        said = told.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert said == ""


class Later(Ram):
    """On a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Ram.pread(self, buf, offset)


def _use(device: ublk.Device) -> None:
    assert "UNPRIVILEGED_DEV" in device.features
    assert device.info.owner == (OWNER, GROUP)
    assert device.data_path == "copy"
    with opened(device.path) as fd:
        for at in range(8):
            write(device.path, at * BLOCK, bytes([at + 1]) * BLOCK)
        assert together(8, lambda at: read_at(fd, at * BLOCK)) == [bytes([at + 1]) * BLOCK for at in range(8)]


def _owner() -> None:
    raised(PermissionError, ublk.Device(Ram()).start, "unprivileged=True")
    options: dict[str, Any]
    for options, words in (
        ({"recovery": "wait"}, "cannot be recovered"),
        ({"data_path": "zero-copy"}, "SUPPORT_ZERO_COPY"),
    ):
        raised(ValueError, lambda options=options: ublk.Device(Ram(), unprivileged=True, **options), words)
    with ublk.Device(Ram(), unprivileged=True) as device:
        _use(device)
        assert [info.id for info in ublk.list()] == [device.id]
        # One slow request of either would have the driver kill the server of both.
        raised(OSError, ublk.Device(Ram(), unprivileged=True).start, "allow_many_unprivileged=True")
        for backend, more in ((Ram(), {"threads": 2}), (Later(), {}), (ublk.Mem(MIB), {})):
            with ublk.Device(backend, unprivileged=True, allow_many_unprivileged=True, **more) as other:  # type: ignore[arg-type]
                assert other.id != device.id
                _use(other)
        raised(OSError, lambda: ublk.recover(device.id, Ram()), "recovered")
        other = ublk.Device(Ram(), unprivileged=True, allow_many_unprivileged=True).start()
        ublk.delete(other.id)
        assert other.wait(10)
        other.stop()
        # Made and ended on a loop.
        asyncio.run(_on_a_loop())
    assert ublk.list() == []
    assert not os.path.exists(device.path)


async def _on_a_loop() -> None:
    async with ublk.Device(Later(), unprivileged=True, allow_many_unprivileged=True) as device:
        await asyncio.to_thread(_use, device)


@limit(120)
def test_an_ordinary_user_makes_serves_uses_and_deletes_disks() -> None:
    needs("UNPRIVILEGED_DEV")
    with _udev():
        _as_user(OWNER, _owner)


@limit(120)
def test_a_users_disk_is_nobody_elses() -> None:
    needs("UNPRIVILEGED_DEV")

    def owner() -> None:
        with ublk.Device(Ram(), unprivileged=True) as device:
            os.write(up[1], b"%d\n" % device.id)
            os.read(down[0], 1)
            assert device.state == "live"
            _use(device)

    def stranger() -> None:
        for node in (f"/dev/ublkb{number}", f"/dev/ublkc{number}"):
            raised(PermissionError, lambda node=node: os.open(node, os.O_RDONLY))
        raised(PermissionError, lambda: ublk.delete(number))
        raised(PermissionError, ublk.list)

    up, down = os.pipe(), os.pipe()
    with _udev():
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(AssertionError):
                _as_user(OWNER, owner)
                status = 0
            os._exit(status)
        os.close(up[1])
        with os.fdopen(up[0]) as said:
            number = int(said.readline())
        # What keeps the stranger out is not the control node.
        os.chmod(CONTROL, 0o666)  # noqa: S103
        _as_user(STRANGER, stranger)
        # Root sees whose it is.
        assert [(info.id, info.owner) for info in ublk.list()] == [(number, (OWNER, GROUP))]
        assert read(f"/dev/ublkb{number}") == bytes(BLOCK)
        os.write(down[1], b".")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
