"""``python -m ublk``: what there is here, and disks served by scripts.

Exit status: 0 for success; 1 if the machine refuses, a script fails, or a disk was taken from its users; 2 for a
command line that cannot be understood.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from typing import TYPE_CHECKING, get_args

from ublk import __version__, _native, features, parse_size
from ublk import list as list_devices
from ublk._serve import Mistake, load, serve
from ublk._types import DataPath, Recovery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ublk import DeviceInfo

_EPILOG = """\
SCRIPT is a Python file. If it defines backend(**keys), that returns the backend, given the words key=value of the
command line as keyword arguments, all of them strings. Otherwise the file itself is the backend: a module with
pread(buf, offset), pwrite(buf, offset) and so on; config(key, value), if it has that, is called for each key=value,
and config_complete() after them. The size is --size, or else the backend's attribute `size`.

Prints the disk's path when it can be used, and serves it until SIGINT or SIGTERM. Whoever uses the disk then is
waited for (--stop-timeout), and after that, or at a second signal, the disk is taken from them (exit status 1).
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ublk",
        description="Linux block devices served from Python. Alone: versions, what the driver can do, devices.",
    )
    parser.add_argument("--version", action="version", version=f"ublk {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="serve")
    one = commands.add_parser(
        "serve",
        help="serve a script as a disk",
        description="Serves a Python script as a disk, /dev/ublkbN.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("script", metavar="SCRIPT")
    one.add_argument("keys", metavar="KEY=VALUE", nargs="*", help="what the script is told")
    one.add_argument(
        "-s", "--size", metavar="SIZE", help='bytes of the disk, or "10GiB"; default what the backend says'
    )
    one.add_argument("-q", "--queues", type=int, metavar="N", help="hardware queues (1)")
    one.add_argument("-d", "--depth", type=int, metavar="N", help="requests of each queue in progress (128)")
    one.add_argument("--block-size", type=int, metavar="BYTES", help="logical blocks: 512 to 4096 (512)")
    one.add_argument("--max-io-size", type=_bytes, metavar="SIZE", help="bytes of the largest request (512K)")
    one.add_argument("-r", "--read-only", action="store_true", default=None, help="a disk that nobody writes to")
    one.add_argument("--threads", type=int, metavar="N", help="threads that call the backend (0: the queues' own)")
    one.add_argument("--data-path", choices=get_args(DataPath), help="how data moves (auto)")
    one.add_argument("-n", "--id", type=int, metavar="N", help="the device's number (the lowest that is free)")
    one.add_argument(
        "--recovery", choices=get_args(Recovery), help="what becomes of the disk if this process is killed"
    )
    one.add_argument("--recover", type=int, metavar="N", help="take over device N, which was made with --recovery")
    one.add_argument("--unprivileged", action="store_true", default=None, help="a device of an ordinary user")
    one.add_argument(
        "--stop-timeout", type=float, default=30.0, metavar="SECONDS", help="for the disk's users to leave (30)"
    )
    one.add_argument("-v", "--verbose", action="store_true", help="log more, to stderr")
    return parser


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


_OF_DEVICE = (
    *("size", "queues", "depth", "block_size", "max_io_size", "read_only", "threads", "data_path", "id", "recovery"),
    "unprivileged",
)
# What the kernel has of a device that is taken over.
_NOT_TAKEN_OVER = ("queues", "depth", "block_size", "max_io_size", "id", "unprivileged")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; the result is its exit status."""
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    if given.command is None:
        return _tell()
    # Words may stand among options.
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unknown option: {' '.join(unknown)}")
    keys = []
    for word in [*given.keys, *rest]:
        key, equals, value = word.partition("=")
        if not equals or not key:
            parser.error(f"{word!r} is not of the form key=value")
        keys.append((key, value))
    options = {name: getattr(given, name) for name in _OF_DEVICE if getattr(given, name) is not None}
    if given.recover is not None:
        wrong = [name for name in _NOT_TAKEN_OVER if name in options]
        if wrong:
            parser.error(f"--recover keeps what the device has: --{wrong[0].replace('_', '-')} is not for it")
    logging.basicConfig(level=logging.INFO if given.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        backend = load(given.script, keys)
        return serve(backend, options, taken_over=given.recover, stop_timeout=given.stop_timeout)
    except Mistake as mistake:
        return _fail(str(mistake))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        if given.verbose:
            logging.getLogger("ublk").exception("where it came from:")
        return _fail(str(error), getattr(error, "__notes__", []))


def _fail(message: str, notes: Sequence[str] = ()) -> int:
    print("\n".join([f"ublk: {message}", *(f"  {note}" for note in notes)]), file=sys.stderr)
    return 1


def _tell() -> int:
    print(f"ublk {__version__}, Python {platform.python_version()}, Linux {platform.release()}")
    try:
        offered, devices = features(), list_devices()
    except OSError as error:
        print(
            f"no driver: {error}" if isinstance(error, FileNotFoundError) else f"the driver does not answer: {error}"
        )
        for note in getattr(error, "__notes__", []):
            print(f"  {note}")
        return 1
    if offered is None:
        print("the driver cannot say what it can do (Linux before 6.5)")
    else:
        since = dict(_native.feature_names())
        print("the driver offers, each since Linux ...")
        _columns([(name, since.get(name, "newer than this package")) for name in _in_order(offered, since)])
        missing = [name for name in since if name not in offered]
        if missing:
            print("and lacks")
            _columns([(name, since[name]) for name in missing])
    print("devices" if devices else "no devices")
    _columns([_described(info) for info in devices])
    return 0


def _in_order(offered: frozenset[str], known: dict[str, str]) -> list[str]:
    return [*(name for name in known if name in offered), *sorted(offered - known.keys())]


def _described(info: DeviceInfo) -> tuple[str, ...]:
    size = "no disk" if info.size is None else f"{info.size} bytes"
    server = "nobody serves it" if info.server_pid is None else f"served by process {info.server_pid}"
    return (info.path, info.state, size, f"{info.queues} x {info.depth}", server)


def _columns(rows: Sequence[tuple[str, ...]]) -> None:
    if not rows:
        return
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
