"""The C library as a user has it: built, installed into a prefix of its own, and programs compiled against it."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ublk_rig import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CAPI = layout.TREE / "ublk-capi"
EXAMPLES = CAPI / "examples"
TESTS = CAPI / "tests/c"
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class CannotBuild(AssertionError):
    """The library or a program does not build."""


@dataclass(frozen=True)
class Flavour:
    """How a program is compiled."""

    compiler: str = "gcc"
    flags: tuple[str, ...] = ()
    static: bool = False

    @property
    def tag(self) -> str:
        """For file names."""
        static = ["static"] if self.static else []
        sanitized = ["sanitized"] if self.flags == SANITIZED else []
        return "-".join([self.compiler, *static, *sanitized])


def target_dir() -> Path:
    """Where cargo builds."""
    return Path(os.environ.get("CARGO_TARGET_DIR", layout.TREE / "target"))


def make(*argv: str, env: dict[str, str] | None = None) -> str:
    """The library's Makefile."""
    done = subprocess.run(
        ["make", "-s", "-C", CAPI, *argv],
        env={**os.environ, "CARGO_BUILD_JOBS": "2", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotBuild(f"make {' '.join(argv)}:\n{done.stdout}")
    return done.stdout


def _built() -> str:
    """What there is to install, in short."""
    out = target_dir() / "capi/release"
    files = [
        *(CAPI / name for name in ("Makefile", "ublk-rs.pc.in")),
        *sorted((layout.TREE / "include").iterdir()),
        *sorted(out.glob("libublk_rs.*")),
        *sorted(out.glob("man/*")),
    ]
    digest = hashlib.sha256((out / "native-static-libs").read_bytes())
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def _building() -> Iterator[None]:
    """One process builds at a time."""
    target_dir().mkdir(parents=True, exist_ok=True)
    with (target_dir() / "capi.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _made(out: Path, inputs: Sequence[str | Path], command: Callable[[Path], Sequence[str | Path]]) -> Path:
    """What the command makes of the inputs, at `out`, and not again for the same: a guest may be looking at it.

    A `Path` among the inputs stands for its content.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    part, stamp = out.with_name(out.name + ".part"), out.with_name(out.name + ".made")
    argv = command(part)
    digest = hashlib.sha256(repr([str(a) for a in argv]).encode())
    for item in inputs:
        digest.update(item.read_bytes() if isinstance(item, Path) else item.encode())
    key = digest.hexdigest()
    if out.exists() and stamp.exists() and stamp.read_text() == key:
        return out
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise CannotBuild(f"{argv[0]} for {out.name}:\n{done.stderr}")
    stamp.unlink(missing_ok=True)
    part.rename(out)
    stamp.write_text(key)
    return out


@functools.cache
def prefix() -> Path:
    """Build the library and install it, once a session, and only if it is another: guests may be looking at it."""
    where = target_dir() / "capi/prefix"
    where.mkdir(parents=True, exist_ok=True)
    with _building():
        make("all")
        stamp, built = where / "installed", _built()
        if not stamp.exists() or stamp.read_text() != built:
            stamp.unlink(missing_ok=True)
            make("install", f"PREFIX={where}")
            stamp.write_text(built)
    return where


def _version() -> str:
    return (prefix() / "installed").read_text()


@functools.cache
def stripped() -> Path:
    """The shared library without what a debugger knows, of which valgrind would read all: a third of its start."""
    into = target_dir() / "capi/stripped"
    library = (prefix() / "lib/libublk_rs.so.0").resolve()
    with _building():
        _made(into / "libublk_rs.so.0", [_version()], lambda part: ["strip", "--strip-debug", "-o", part, library])
    return into


def pkg_config(*argv: str, where: Path | None = None) -> list[str]:
    """What pkg-config says of the installed library."""
    env = {**os.environ, "PKG_CONFIG_PATH": str((where or prefix()) / "lib/pkgconfig")}
    done = subprocess.run(["pkg-config", *argv, "ublk-rs"], env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def _flags(source: Path, flavour: Flavour) -> list[str]:
    lib = str(prefix() / "lib")
    if flavour.static:
        found = [
            lib + "/libublk_rs.a" if f == "-lublk_rs" else f for f in pkg_config("--cflags", "--libs", "--static")
        ]
    else:
        found = [*pkg_config("--cflags", "--libs"), f"-Wl,-rpath,{lib},--enable-new-dtags"]
    standard = "-std=c++17" if source.suffix == ".cpp" else "-std=c11"
    return [standard, "-O2", "-g", *STRICT, *flavour.flags, str(source), "-pthread", *found]


@functools.cache
def program(source: Path, flavour: Flavour = Flavour()) -> Path:
    """Compile a program against the installed library."""
    compiler = flavour.compiler.replace("gcc", "g++").replace("clang", "clang++")
    compiler = compiler if source.suffix == ".cpp" else flavour.compiler
    if not shutil.which(compiler):
        raise CannotBuild(f"no {compiler}: run `make setup`")
    out = target_dir() / "capi/programs" / f"{source.stem}-{flavour.tag}"
    flags = _flags(source, flavour)
    with _building():
        return _made(out, [_version(), *_sources(source)], lambda part: [compiler, *flags, "-o", part])


def _sources(source: Path) -> list[Path]:
    """A program and what it may include."""
    return [source, *sorted(source.parent.glob("*.h*"))]


TRIPLE = "x86_64-unknown-linux-gnu"


def no_nightly() -> str:
    """Why Rust cannot be sanitized here, if it cannot."""
    try:
        done = subprocess.run(
            ["rustc", "+nightly", "--print", "sysroot"], cwd=layout.TREE, capture_output=True, text=True, check=False
        )
    except OSError:
        return "no rustc"
    return "" if done.returncode == 0 else "no nightly toolchain: Rust is not sanitized"


@functools.cache
def sanitized_archive() -> Path:
    """The library, its Rust under AddressSanitizer (std's as it comes)."""
    target = target_dir() / "sanitized"
    done = subprocess.run(
        ["cargo", "+nightly", "build", "--quiet", "--release", "-p", "ublk-capi", "--target", TRIPLE],
        cwd=layout.TREE,
        env={
            "CARGO_BUILD_JOBS": "2",
            **os.environ,
            "RUSTFLAGS": "-Zsanitizer=address",
            "CARGO_TARGET_DIR": str(target),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotBuild(done.stdout)
    return target / TRIPLE / "release/libublk_rs.a"


@functools.cache
def sanitized_program(source: Path) -> Path:
    """A program and the library in it, both sanitized."""
    archive = sanitized_archive()
    out = target_dir() / "capi/programs" / f"{source.stem}-all-sanitized"
    rest = [f for f in pkg_config("--cflags", "--libs", "--static") if f != "-lublk_rs"]
    # gcc brings the runtime; the compilers agree on what it is asked.
    flags = ["-std=c11", "-O1", "-g", "-fsanitize=address"]
    with _building():
        return _made(
            out,
            [_version(), archive, *_sources(source)],
            lambda part: ["gcc", *flags, source, archive, "-pthread", *rest, "-o", part],
        )
