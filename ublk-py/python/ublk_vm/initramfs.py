"""The initramfs: a static busybox, the modules that lead to the host's root, and one script.

The archive format (cpio "newc") is a page of code, so that no packer has to be installed or trusted to be
deterministic.
"""

from __future__ import annotations

import lzma
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from ublk_vm import layout, moduledeps

if TYPE_CHECKING:
    from ublk_vm.kernels import Kernel

NEEDED = ("virtio_pci", "virtio_console", "overlay", "9p", "9pnet_virtio")
_DIRECTORY, _FILE, _NODE = 0o040755, 0o100755, 0o020600


def busybox() -> Path:
    """The host's static busybox; it serves in the initramfs and, through 9p, as the guest's first shell."""
    found = shutil.which("busybox")
    if not found:
        raise FileNotFoundError("busybox is missing: apt-get install busybox-static")
    return Path(found).resolve()


def _entry(number: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def archive(files: dict[str, bytes]) -> bytes:
    """A cpio archive of `files`, all executable, with the directories that they need and a console."""
    directories = dict.fromkeys(str(p) for name in files for p in reversed(Path(name).parents) if str(p) != ".")
    directories.setdefault("dev")
    parts = [_entry(n, d, _DIRECTORY) for n, d in enumerate(directories, 1)]
    parts.append(_entry(len(parts) + 1, "dev/console", _NODE, device=(5, 1)))
    parts += [_entry(n, name, _FILE, data) for n, (name, data) in enumerate(files.items(), len(parts) + 1)]
    parts.append(_entry(0, "TRAILER!!!", 0))
    packed = b"".join(parts)
    return packed + bytes(-len(packed) % 512)


def _module(path: Path) -> bytes:
    match path.suffix:
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".zst":
            return subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout
        case _:
            return path.read_bytes()


def build(kernel: Kernel, settings: dict[str, str]) -> bytes:
    """An initramfs for `kernel`; both init scripts read `settings` as shell variables."""
    dep = (kernel.module_dir / "modules.dep").read_text()
    files = {
        "init": (layout.PACKAGE / "initramfs_init.sh").read_bytes(),
        "bin/busybox": busybox().read_bytes(),
        "rig.env": "".join(f"{k}={shlex.quote(v)}\n" for k, v in settings.items()).encode(),
    }
    order = []
    for path in moduledeps.insmod_order(dep, NEEDED):
        name = Path(path).name.split(".ko")[0] + ".ko"
        files[f"modules/{name}"] = _module(kernel.module_dir / path)
        order.append(name)
    files["modules/order"] = "".join(f"{name}\n" for name in order).encode()
    return archive(files)
