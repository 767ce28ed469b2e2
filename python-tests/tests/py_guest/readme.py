"""The README's program, as it is printed there, with a file system and verified I/O on its disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import ublk
from tests.py_guest.disks import SCALE
from ublk_rig import layout
from ublk_rig.pyguest import limit


@limit(90)
def test_the_program_of_the_readme_is_a_disk() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (layout.TREE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (program,) = [block for block in blocks if "RamDisk" in block]
    with tempfile.TemporaryDirectory() as folder:
        file, mount = Path(folder) / "disk.py", Path(folder) / "mnt"
        file.write_text(program)
        mount.mkdir()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            [sys.executable, file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as server:
            assert server.stdout is not None
            assert server.stderr is not None
            try:
                path = server.stdout.readline().strip()
                assert path.startswith("/dev/ublkb"), server.stderr.read()
                _use(path, mount)
            finally:
                # Ctrl-C stops it cleanly.
                server.send_signal(signal.SIGINT)
                _, said = server.communicate(timeout=30 * SCALE)
            assert "KeyboardInterrupt" in said
            assert server.returncode == -signal.SIGINT
        assert not Path(path).exists()
        assert ublk.list() == []


def _use(path: str, mount: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", path], check=True)
    subprocess.run(["mount", path, mount], check=True)
    try:
        verify = ("--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--ioengine=libaio", "--iodepth=8")
        fio = [
            "fio",
            "--name=verify",
            f"--directory={mount}",
            "--direct=1",
            "--bs=4k",
            "--size=4m",
            *verify,
            "--output-format=terse",
        ]
        subprocess.run(fio, check=True, capture_output=True)
    finally:
        subprocess.run(["umount", mount], check=True)
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)
