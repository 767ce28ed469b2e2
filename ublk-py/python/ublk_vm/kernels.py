"""The kernels under test: Debian's own packages, fetched once, kept in a cache that proves itself intact.

A kernel is asked for by its series ("6.12", "7.3"). The cache holds `kernels/RELEASE/{vmlinuz,lib/modules/RELEASE}`,
`headers/VERSION/usr/include` (the UAPI headers of the newest series) and `chosen.json`, which says what each series
resolved to and when Debian was last asked.

A series that Debian has dropped is served from the cache for as long as that is whole. Only without it another one
stands in, and `Kernel.stands_in` says so: whoever tests on it tests another kernel.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ublk_vm import apt, layout, manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUITES = ("trixie", "trixie-backports")
SERIES = ("6.12", "7.3")
HEADERS_SERIES = "7.3"
ASK_DEBIAN_AGAIN_AFTER = 7 * 24 * 3600.0
# The plain flavour only: the cloud kernels lack 9p, the rt ones are not what users run.
_IMAGE = re.compile(r"linux-image-((\d+\.\d+)\.\d+[^-]*-amd64)")


class KernelError(Exception):
    """A kernel to test on cannot be had."""


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel: `modules` holds `lib/modules/RELEASE`."""

    label: str
    release: str
    vmlinuz: Path
    modules: Path

    @property
    def module_dir(self) -> Path:
        """The directory with modules.dep."""
        return self.modules / "lib/modules" / self.release

    @property
    def stands_in(self) -> bool:
        """Whether it is of another series than was asked for."""
        return series_of(self.release) != self.label


def say(text: str) -> None:
    """Progress goes to stderr: stdout belongs to answers (`headers` prints a path)."""
    print(f"kernels: {text}", file=sys.stderr, flush=True)


def series_of(release: str) -> str:
    """The label of a release: 7.3 for 7.3.4+deb13-amd64."""
    found = re.match(r"\d+\.\d+", release)
    if not found:
        raise KernelError(f"not a kernel release: {release}")
    return found[0]


def own(vmlinuz: Path, modules: Path) -> Kernel:
    """A kernel given by the user; `modules` is lib/modules/RELEASE itself or a root that holds one."""
    roots = [modules] if (modules / "modules.dep").exists() else sorted(modules.glob("lib/modules/*"))
    if len(roots) != 1 or not (roots[0] / "modules.dep").exists():
        raise KernelError(f"{modules}: expected one lib/modules/RELEASE with a modules.dep (depmod makes it)")
    module_dir = roots[0].resolve()
    if module_dir.parent.name != "modules" or module_dir.parent.parent.name != "lib":
        raise KernelError(f"{module_dir}: modules must lie in ROOT/lib/modules/RELEASE")
    if not vmlinuz.is_file():
        raise KernelError(f"{vmlinuz}: no such kernel image")
    return Kernel(series_of(module_dir.name), module_dir.name, vmlinuz.resolve(), module_dir.parents[2])


def newest_image(names: list[str], series: str) -> str | None:
    """The newest release of a series among package names, by Debian's own version order."""
    newest: str | None = None
    for name in names:
        found = _IMAGE.fullmatch(name)
        if found and found[2] == series and (newest is None or _newer(found[1], newest)):
            newest = found[1]
    return newest


def _newer(a: str, b: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", a, "gt", b], check=False).returncode == 0


def _resolve(a: apt.Apt, series: str) -> str:
    release = newest_image(a.names("linux-image-"), series)
    if release:
        return release
    found = _IMAGE.search(a.field("linux-image-amd64", "Depends"))
    if not found:
        raise KernelError(f"Debian has no kernel {series} and linux-image-amd64 names none")
    return found[1]


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _install(target: Path, fill: Callable[[Path], dict[str, str]]) -> None:
    """Fill a new directory and move it into place: a reader sees the whole entry or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        facts = fill(part)
        manifest.write(part, facts)
        part.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _fetch_kernel(a: apt.Apt, release: str, target: Path) -> None:
    say(f"{release}: fetching")
    image = f"linux-image-{release}"
    # From 7.x on the image is a shell around linux-binary-*, linux-modules-* and linux-base-* of its release.
    parts = re.findall(rf"linux-[a-z]+-{re.escape(release)}(?![\w.+-])", a.field(image, "Depends"))

    def fill(entry: Path) -> dict[str, str]:
        with tempfile.TemporaryDirectory(prefix="unpack.", dir=target.parent) as d:
            a.unpack([image, *dict.fromkeys(parts)], Path(d))
            modules = next(Path(d).rglob(f"lib/modules/{release}"), None)
            vmlinuz = next((p for p in Path(d).rglob("vmlinuz*") if p.is_file()), None)
            if modules is None or vmlinuz is None:
                raise KernelError(f"{image}: the packages hold no kernel image or no modules")
            (entry / "lib/modules").mkdir(parents=True)
            shutil.copyfile(vmlinuz, entry / "vmlinuz")
            modules.rename(entry / "lib/modules" / release)
        subprocess.run([_depmod(), "-b", entry, release], check=True)
        return {"release": release, "version": a.field(image, "Version")}

    _install(target, fill)


def _depmod() -> str:
    found = shutil.which("depmod", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        raise KernelError("depmod is missing: apt-get install kmod")
    return found


def _fetch_headers(a: apt.Apt, version: str, target: Path) -> None:
    say(f"linux-libc-dev {version}: fetching")

    def fill(entry: Path) -> dict[str, str]:
        a.unpack([f"linux-libc-dev={version}"], entry)
        _gather_asm(entry)
        return {"version": version}

    _install(target, fill)


def _gather_asm(entry: Path) -> None:
    """Make `usr/include` usable by itself: Debian keeps <asm/*.h> in a multiarch folder beside it."""
    asm = entry / "usr/include/asm"
    if asm.exists():
        return
    for p in entry.rglob("types.h"):
        if p.parent.name == "asm" and ("x86_64-linux-gnu" in str(p) or "uapi/x86" in str(p)):
            shutil.copytree(p.parent, asm)
            return
    raise KernelError("linux-libc-dev holds no <asm/types.h> for x86")


def _read_chosen(cache: Path) -> dict[str, str]:
    try:
        data = json.loads((cache / "chosen.json").read_text())
        return {str(k): str(v) for k, v in data.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_chosen(cache: Path, chosen: dict[str, str]) -> None:
    tmp = cache / "chosen.json.tmp"
    tmp.write_text(json.dumps(chosen, indent=1))
    tmp.rename(cache / "chosen.json")


def _is_old(chosen: dict[str, str], key: str) -> bool:
    return time.time() - float(chosen.get(f"{key} asked", "0")) > ASK_DEBIAN_AGAIN_AFTER


def _required(release: str) -> tuple[str, ...]:
    return "vmlinuz", f"lib/modules/{release}/modules.dep", f"lib/modules/{release}/modules.dep.bin"


def _intact(cache: Path, chosen: dict[str, str], key: str) -> bool:
    """Whether the entry that a series (or "headers") resolved to is there, whole."""
    if key not in chosen:
        return False
    entry, required = _entry(cache, key, chosen[key])
    try:
        manifest.verify(entry, required)
    except manifest.BrokenEntry as e:
        if entry.exists():
            say(f"cache entry is broken and will be fetched again: {e}")
            shutil.rmtree(entry)
        return False
    return True


def _entry(cache: Path, key: str, value: str) -> tuple[Path, tuple[str, ...]]:
    if key == "headers":
        return cache / "headers" / value, ("usr/include/linux/ublk_cmd.h", "usr/include/asm/types.h")
    return cache / "kernels" / value, _required(value)


def _is_of(key: str, value: str) -> bool:
    """Whether what a series (or "headers") resolved to is of that series."""
    return series_of(value) == (HEADERS_SERIES if key == "headers" else key)


def _cached(cache: Path, key: str) -> str | None:
    """The newest that the cache has of a series (or of its headers), whole."""
    folder = cache / ("headers" if key == "headers" else "kernels")
    found: str | None = None
    for entry in folder.glob("[0-9]*"):
        better = _is_of(key, entry.name) and (found is None or _newer(entry.name, found))
        if better and _intact(cache, {key: entry.name}, key):
            found = entry.name
    return found


def _headers_version(a: apt.Apt, release: str) -> str:
    """The linux-libc-dev built from the same source as `release`, or the newest."""
    upstream = release.split("+", maxsplit=1)[0]
    versions = a.versions("linux-libc-dev")
    return next((v for v in versions if v.startswith((f"{upstream}-", f"{upstream}+"))), versions[0])


def _fetch(cache: Path, keys: list[str], chosen: dict[str, str]) -> None:
    with apt.opened(SUITES) as a:
        for key in keys:
            if key == "headers":
                value = _headers_version(a, chosen.get(HEADERS_SERIES) or _resolve(a, HEADERS_SERIES))
            else:
                value = _resolve(a, key)
            if not _is_of(key, value):
                kept = _cached(cache, key)
                say(f"{key}: Debian has none any more; " + (f"keeping {kept}" if kept else f"{value} stands in"))
                value = kept or value
            chosen[key] = value
            if _intact(cache, chosen, key):
                say(f"{key}: {value}, already here")
                continue
            entry, _ = _entry(cache, key, value)
            (_fetch_headers if key == "headers" else _fetch_kernel)(a, value, entry)
            say(f"{key}: {value}, fetched into {entry}")


def _ensure(keys: list[str], *, refresh: bool) -> dict[str, str]:
    """Make every key's entry present and intact; ask Debian only for what is missing, broken or old."""
    cache = layout.cache_dir()
    with _locked(cache):
        chosen = _read_chosen(cache)
        for key in keys:
            if not (key in chosen and _is_of(key, chosen[key])) and (found := _cached(cache, key)):
                chosen[key] = found
        have = {k for k in keys if _intact(cache, chosen, k)}
        wanted = [k for k in keys if refresh or k not in have or _is_old(chosen, k)]
        if not wanted:
            return chosen
        fresh = dict(chosen)
        try:
            _fetch(cache, wanted, fresh)
        except (apt.AptError, KernelError, subprocess.CalledProcessError, OSError) as e:
            if set(wanted) <= have:
                say(f"Debian could not be asked for newer kernels ({e}); using the cache")
                return chosen
            raise KernelError(f"cannot fetch {', '.join(wanted)}: {e}") from e
        fresh.update({f"{key} asked": str(time.time()) for key in wanted})
        _write_chosen(cache, fresh)
        return fresh


@functools.cache
def ensure(label: str) -> Kernel:
    """The kernel of a series, fetched if the cache has no intact one; see `Kernel.stands_in`."""
    release = _ensure([label], refresh=False)[label]
    root = layout.cache_dir() / "kernels" / release
    return Kernel(label, release, root / "vmlinuz", root)


def headers() -> Path:
    """The include directory with the newest series' UAPI headers."""
    version = _ensure(["headers"], refresh=False)["headers"]
    return layout.cache_dir() / "headers" / version / "usr/include"


def main(argv: list[str]) -> int:
    """`fetch` brings everything up to date; `headers` prints the include directory."""
    try:
        match argv:
            case ["fetch"]:
                chosen = _ensure([*SERIES, "headers"], refresh=True)
                for key in (*SERIES, "headers"):
                    print(f"{key}: {chosen[key]}")
            case ["headers"]:
                print(headers())
            case _:
                print("usage: python -m ublk_vm.kernels fetch|headers", file=sys.stderr)
                return 2
    except KernelError as e:
        print(f"kernels: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
