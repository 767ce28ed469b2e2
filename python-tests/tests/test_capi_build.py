"""The C library without a kernel: header, symbols, ABI, what is installed, and that programs compile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ublk_rig import abi, capi, layout

if TYPE_CHECKING:
    from collections.abc import Iterator

C_STANDARDS = ("c99", "c11", "c2x")
CXX_STANDARDS = ("c++11", "c++14", "c++17", "c++20")
PROGRAMS = sorted([*capi.EXAMPLES.glob("*.c*"), *capi.TESTS.glob("*.c*")])
BASELINE = capi.CAPI / "libublk_rs.abi"


def run(*argv: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert not ok or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("standard", [*C_STANDARDS, *CXX_STANDARDS])
def test_the_header_compiles_alone(tmp_path: Path, compiler: str, standard: str) -> None:
    language = "c++" if "++" in standard else "c"
    source = tmp_path / "alone"
    # Twice: its guard, too.
    source.write_text("#include <ublk_rs.h>\n#include <ublk_rs.h>\n")
    include = f"-I{layout.TREE / 'include'}"
    run(compiler, f"-std={standard}", *capi.STRICT, include, "-fsyntax-only", "-x", language, source)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_the_cxx_header_compiles_alone(tmp_path: Path, compiler: str, standard: str) -> None:
    source = tmp_path / "alone"
    source.write_text("#include <ublk_rs.hpp>\n#include <ublk_rs.hpp>\n")
    include = f"-I{layout.TREE / 'include'}"
    run(compiler, f"-std={standard}", *capi.STRICT, include, "-fsyntax-only", "-x", "c++", source)


def test_symbols_are_those_of_the_list() -> None:
    capi.make("check-symbols")
    listed = (capi.CAPI / "symbols.txt").read_text().split()
    assert listed == sorted(listed)
    header = (layout.TREE / "include/ublk_rs.h").read_text()
    declared = re.findall(r"^[a-z].*?\b(ublk_rs_\w+)\(", header, re.MULTILINE)
    assert sorted(declared) == listed


def test_the_cxx_header_has_all_of_it() -> None:
    header = (layout.TREE / "include/ublk_rs.hpp").read_text()
    listed = (capi.CAPI / "symbols.txt").read_text().split()
    assert [name for name in listed if not re.search(rf"\b{name}\(", header)] == []


def test_a_symbol_too_many_is_noticed(tmp_path: Path) -> None:
    listed = capi.CAPI / "symbols.txt"
    planted = tmp_path / "symbols.txt"
    planted.write_text(listed.read_text() + "ublk_rs_zzz\n")
    library = capi.prefix() / "lib/libublk_rs.so"
    found = run("nm", "-D", "--defined-only", library).stdout
    names = sorted(re.findall(r" [TDBR] (\w+)@@UBLK_RS_0$", found, re.MULTILINE))
    assert names == listed.read_text().split()
    assert names != planted.read_text().split()
    # Nothing of Rust's gets out under any other name.
    assert all("@@UBLK_RS_0" in line or line.endswith(" A UBLK_RS_0") for line in found.splitlines())


def test_the_library_is_what_a_linker_expects() -> None:
    lib = capi.prefix() / "lib"
    version = re.findall(r'^version = "(.*)"', (layout.TREE / "Cargo.toml").read_text(), re.MULTILINE)[0]
    assert (lib / "libublk_rs.so").readlink() == Path("libublk_rs.so.0")
    assert (lib / "libublk_rs.so.0").readlink() == Path(f"libublk_rs.so.{version}")
    dynamic = run("readelf", "-d", lib / "libublk_rs.so").stdout
    assert "Library soname: [libublk_rs.so.0]" in dynamic
    assert "NODELETE" in dynamic
    assert "TEXTREL" not in dynamic
    assert (lib / "libublk_rs.a").exists()
    assert capi.pkg_config("--modversion") == [version]
    assert "-lpthread" in capi.pkg_config("--libs", "--static") or "-lc" in capi.pkg_config("--libs", "--static")


def test_each_function_has_a_man_page() -> None:
    pages = {page.stem for page in (capi.prefix() / "share/man/man3").glob("*.3")}
    assert pages == set((capi.CAPI / "symbols.txt").read_text().split())
    # Formatted without a complaint.
    page = capi.prefix() / "share/man/man3/ublk_rs_device_stop.3"
    shown = run("man", "--warnings", "-l", page)
    assert "EBUSY" in shown.stdout
    assert not shown.stderr


def test_it_can_be_staged_and_takes_no_rust(tmp_path: Path) -> None:
    """As root has it under sudo: by another PATH, in another home."""
    capi.prefix()
    (tmp_path / "home").mkdir()
    bare = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path / "home")}
    capi.make("install", "PREFIX=/opt/ublk", f"DESTDIR={tmp_path}", "CARGO=no-cargo", "PYTHON=no-python", env=bare)
    assert (tmp_path / "opt/ublk/lib/libublk_rs.so.0").exists()
    text = (tmp_path / "opt/ublk/lib/pkgconfig/ublk-rs.pc").read_text()
    assert "prefix=/opt/ublk\n" in text
    assert str(tmp_path) not in text


def test_what_was_not_built_is_not_installed(tmp_path: Path) -> None:
    to = ("PREFIX=/usr/local", f"DESTDIR={tmp_path / 'root'}")
    with pytest.raises(capi.CannotBuild, match=r"nothing is built in .*: first, as yourself, make -C "):
        capi.make("install", *to, f"OUT={tmp_path}")
    capi.prefix()
    out = tmp_path / "out"
    out.mkdir()
    for file in (capi.target_dir() / "capi/release").iterdir():
        (out / file.name).symlink_to(file)
    (out / "built").unlink()
    (out / "built").touch()
    os.utime(out / "built", (0, 0))
    with pytest.raises(capi.CannotBuild, match=r"\.(rs|h|hpp|txt) is newer than what is built"):
        capi.make("install", *to, f"OUT={out}")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("source", PROGRAMS, ids=lambda p: p.name)
def test_programs_compile_from_what_is_installed(source: Path, compiler: str) -> None:
    capi.program(source, capi.Flavour(compiler))


def test_a_program_links_statically() -> None:
    program = capi.program(capi.EXAMPLES / "ramdisk.c", capi.Flavour(static=True))
    assert "libublk_rs" not in run("ldd", program).stdout


def test_the_ramdisk_is_thirty_lines() -> None:
    lines = (capi.EXAMPLES / "ramdisk.c").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


@pytest.fixture(scope="session")
def debuggable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The library with everything that a debugger knows, which is what tells its types."""
    out = tmp_path_factory.mktemp("abi")
    capi.make("archive", "PROFILE=dev", f"OUT={out}")
    version = capi.pkg_config("--modversion")[0]
    capi.make(f"{out}/libublk_rs.so.{version}", "PROFILE=dev", f"OUT={out}")
    yield out / f"libublk_rs.so.{version}"
    shutil.rmtree(out)


def abidiff(old: Path, new: Path) -> subprocess.CompletedProcess[str]:
    return run("abidiff", "--no-unreferenced-symbols", old, new, ok=False)


def test_the_abi_is_the_committed_one(debuggable: Path) -> None:
    done = abidiff(BASELINE, debuggable)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}; if that is meant: python -m ublk_rig.abi"


def test_another_signature_is_another_abi(tmp_path: Path, debuggable: Path) -> None:
    """The library's own description, but for the type of one parameter."""
    text = abi.described(debuggable)
    small = re.search(r'name="u32" size-in-bits="32" id="(\w+)"', text)
    assert small
    planted = tmp_path / "planted.abi"
    parameter = r'(<function-decl name="ublk_rs_device_stop" (?:.*\n)*?.*type-id=)"\w+"( name="timeout_ms")'
    changed, count = re.subn(parameter, rf'\1"{small[1]}"\2', text, count=1)
    assert count == 1
    planted.write_text(text)
    assert abidiff(BASELINE, planted).returncode == 0
    planted.write_text(changed)
    done = abidiff(BASELINE, planted)
    assert done.returncode & 4, done.stdout + done.stderr
    assert "ublk_rs_device_stop" in done.stdout
