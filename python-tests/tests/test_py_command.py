"""`python -m ublk`: what it tells, and disks that scripts serve."""

from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from ublk_rig import served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ublk_vm.guest import Guest
    from ublk_vm.process import Process

pytestmark = pytest.mark.usefixtures("package")

UBLK = [sys.executable, "-m", "ublk"]
SIZE = 16 << 20

# In nbdkit's manner: the file is the backend.
MODULE = """
import store
size = "16MiB"
data = bytearray()

def config(key, value):
    global size
    if key != "size":
        raise ValueError("size=... is the only key")
    size = value

def config_complete():
    store.make(size)

def pread(buf, offset):
    buf[:] = store.data[offset : offset + len(buf)]

def pwrite(buf, offset):
    store.data[offset : offset + len(buf)] = buf

def flush():
    pass
"""
STORE = """
import ublk
data = bytearray()

def make(size):
    global data
    data = bytearray(ublk.parse_size(size))
"""
FUNCTION = """
import asyncio, ublk

class Slow:
    def __init__(self, size, pause):
        self.mem, self.size, self.pause = ublk.Mem(size), size, pause

    async def pread(self, buf, offset):
        await asyncio.sleep(self.pause)
        self.mem.pread(buf, offset)

    async def pwrite(self, buf, offset):
        self.mem.pwrite(buf, offset)

def backend(*, size="16MiB", pause="0.001"):
    return Slow(size, float(pause))
"""
BROKEN = """
def backend():
    return 1 // 0
"""


@pytest.fixture
def scripts(guest: Guest) -> Iterator[str]:
    folder = guest.run("mktemp -d").out.strip()
    for name, text in (("ram.py", MODULE), ("store.py", STORE), ("slow", FUNCTION), ("broken.py", BROKEN)):
        guest.run(f"cat > {folder}/{name}", stdin=text)
    guest.run("modprobe ublk_drv")
    yield folder
    guest.run(["rm", "-r", folder])


@contextmanager
def serving(guest: Guest, *argv: str, signal: str = "TERM", code: int = 0) -> Iterator[tuple[Process, str]]:
    """A disk of the command's, that a signal ends."""
    with guest.popen([*UBLK, "serve", *argv]) as server:
        disk = server.read_line(served.START_SECS).strip()
        assert disk.startswith("/dev/ublkb"), server.err
        try:
            yield server, disk
        finally:
            guest.run(["kill", f"-{signal}", str(server.pid)])
            assert server.wait(served.STOP_SECS) == code, server.err
        guest.run(["test", "!", "-e", disk])


def test_without_a_driver_it_says_how_to_get_one() -> None:
    if subprocess.run(["test", "-e", "/dev/ublk-control"], check=False).returncode == 0:
        pytest.skip("this machine has the driver")
    told = subprocess.run(UBLK, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert platform.release() in told.stdout
    assert "no driver" in told.stdout
    assert "modprobe ublk_drv" in told.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["serve", "/nowhere.py"], "no such script"),
        (["serve", "x.py", "--sizes", "1"], "unknown option"),
        (["serve", "x.py", "word"], "key=value"),
        (["serve", "x.py", "--recover", "1", "--depth", "3"], "--depth"),
        (["serve", "x.py", "--max-io-size", "many"], "not a size"),
    ],
)
def test_mistakes_on_the_command_line_need_no_kernel(argv: list[str], says: str) -> None:
    done = subprocess.run([*UBLK, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == (1 if argv == ["serve", "/nowhere.py"] else 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_it_tells_of_the_driver_and_its_devices(guest: Guest, scripts: str) -> None:
    told = guest.run(UBLK).out
    assert guest.release in told
    assert "no devices" in told
    offered, _, lacked = told.partition("and lacks")
    assert any(line.split() == ["USER_RECOVERY", "6.1"] for line in offered.splitlines())
    newest = [line.split() for line in (lacked if guest.kernel == "6.12" else offered).splitlines()]
    assert ["QUIESCE", "6.16"] in newest
    with serving(guest, f"{scripts}/ram.py", "--queues", "1", "--depth", "16") as (server, disk):
        line = guest.run(UBLK).out.splitlines()[-1].split()
        assert line[:3] == [disk, "live", str(SIZE)]
        assert line[-1] == str(server.pid)
        assert "1 x 16" in " ".join(line)


def test_a_script_is_a_disk(guest: Guest, scripts: str) -> None:
    # Both kinds of script, both signals, words among options, a script's own imports, options that arrive.
    with serving(guest, f"{scripts}/ram.py", "--depth", "8", "size=32M", signal="INT") as (_, disk):
        assert guest.run(["blockdev", "--getsize64", disk]).out.strip() == str(32 << 20)
        guest.run(f"head -c 1M /dev/urandom | tee /tmp/a | dd of={disk} oflag=direct bs=4k iflag=fullblock 2>&1")
        guest.run(
            f"dd if={disk} iflag=direct bs=4k count=256 of=/tmp/b 2>&1 && cmp /tmp/a /tmp/b && rm /tmp/a /tmp/b"
        )
    with serving(guest, f"{scripts}/slow", "pause=0.002", "--read-only", "--id", "7") as (_, disk):
        assert disk == "/dev/ublkb7"
        assert guest.run(["blockdev", "--getro", disk]).out.strip() == "1"
        guest.run(f"dd if={disk} iflag=direct bs=4k count=16 of=/dev/null 2>&1")


def test_what_a_script_or_the_kernel_refuses_is_said_without_a_traceback(guest: Guest, scripts: str) -> None:
    for argv, says in (
        ([f"{scripts}/ram.py", "color=red"], "size=... is the only key"),
        ([f"{scripts}/slow", "size=many"], "not a size"),
        ([f"{scripts}/slow", "color=red"], "color=red"),
        ([f"{scripts}/slow", "--size", "1000"], "multiple of the logical block size"),
        ([f"{scripts}/store.py"], "no backend"),
        ([f"{scripts}/ram.py", "--recover", "4711"], "4711"),
    ):
        done = guest.run([*UBLK, "serve", *argv], check=False)
        assert done.rc == 1
        assert says in done.err
        assert "Traceback" not in done.err
    # A defect of the script is shown with the script's own lines.
    done = guest.run([*UBLK, "serve", f"{scripts}/broken.py"], check=False)
    assert done.rc == 1
    assert "ZeroDivisionError" in done.err
    assert "_serve.py" not in done.err


def test_a_disk_in_use_is_waited_for_unless_the_user_insists(guest: Guest, scripts: str) -> None:
    with guest.popen([*UBLK, "serve", f"{scripts}/ram.py", "--stop-timeout", "20"]) as server:
        disk = server.read_line(served.START_SECS).strip()
        with guest.popen(f"exec 3< {disk}; echo open; read line") as user:
            assert user.read_line(10).strip() == "open"
            guest.run(["kill", "-INT", str(server.pid)])
            # It is alive, and waits; what it has is served.
            guest.run(f"dd if={disk} iflag=direct bs=4k count=1 of=/dev/null 2>&1")
            guest.run(["kill", "-INT", str(server.pid)])
            assert server.wait(10) == 1, server.err
            user.close_stdin()
            user.wait()


def test_a_disk_is_taken_over_after_a_kill(guest: Guest, scripts: str) -> None:
    kept = f"{scripts}/kept.py"
    guest.run(
        f"cat > {kept}", stdin=f"import ublk\ndef backend():\n    return ublk.File('{scripts}/img', create='16MiB')\n"
    )
    with guest.popen([*UBLK, "serve", kept, "--recovery", "wait"]) as server:
        disk = server.read_line(served.START_SECS).strip()
        guest.run(f"head -c 4096 /dev/urandom > {scripts}/a && dd if={scripts}/a of={disk} oflag=direct bs=4k 2>&1")
        server.kill()
        server.wait(10)
    number = disk.removeprefix("/dev/ublkb")
    with serving(guest, kept, "--recover", number) as (_, again):
        assert again == disk
        guest.run(f"dd if={disk} iflag=direct bs=4k count=1 of={scripts}/b 2>&1 && cmp {scripts}/a {scripts}/b")
