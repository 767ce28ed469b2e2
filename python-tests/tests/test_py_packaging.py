"""The Python package as its users get it: what is in the wheel and the sdist, and that they install and import."""

from __future__ import annotations

import email.parser
import functools
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ublk_rig import interpreters, layout, wheel

if TYPE_CHECKING:
    from email.message import Message

    from ublk_rig.interpreters import Interpreter

VERSION = tomllib.loads((layout.TREE / "Cargo.toml").read_text())["workspace"]["package"]["version"]
WITH_GIL = [i for i in interpreters.found() if not i.free_threaded]
FREE_THREADED = [i for i in interpreters.found() if i.free_threaded]
# The libraries that every manylinux policy lets a wheel take from the system.
SYSTEM_LIBRARIES = {
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libpthread.so.0",
    "libdl.so.2",
    "ld-linux-x86-64.so.2",
}
# In the fresh environment: the package is there, whole, and its machines need neither it nor pytest.
CHECK = """
import importlib.metadata, pathlib, sys
import ublk_vm.kernels, ublk_vm.vm
assert not {"ublk", "pytest"} & set(sys.modules), "ublk_vm imports more than itself"
import ublk
where = pathlib.Path(ublk.__file__).parent
assert where.is_relative_to(sys.prefix), where
assert (where / "py.typed").exists() and (where / "_native.pyi").exists()
assert ublk.__version__ == importlib.metadata.version("ublk"), ublk.__version__
points = importlib.metadata.entry_points(group="pytest11")
assert [p.value for p in points] == ["ublk_vm.plugin"], points
gil = getattr(sys, "_is_gil_enabled", lambda: True)()
print(ublk.__version__, "gil" if gil else "no gil")
"""


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    wheel.maturin("sdist", "--out", out)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="session")
def from_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built of the sdist alone, by pip, through the build system that it declares."""
    out = tmp_path_factory.mktemp("from-sdist")
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out, sdist)
    (made,) = out.iterdir()
    return made


def pip(*arguments: str | Path, python: Path | None = None) -> None:
    target = ["--python", str(python)] if python else []
    environment = {**wheel.build_environment(), "PATH": f"{wheel.VENV}/bin:{wheel.build_environment()['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "pip", *target, "--quiet", "--disable-pip-version-check", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def installed(interpreter: Interpreter, made: Path, where: Path) -> str:
    """What the check prints in a fresh environment that holds the package and nothing else."""
    subprocess.run([interpreter.path, "-m", "venv", "--without-pip", where], check=True)
    python = where / "bin/python"
    pip("install", "--no-index", made, python=python)
    done = subprocess.run(
        [python, "-W", "error", "-c", CHECK], cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_this_machine_has_interpreters() -> None:
    """Without any, the tests below would be none."""
    assert WITH_GIL


@pytest.mark.parametrize("interpreter", WITH_GIL, ids=str)
def test_the_wheel_installs_and_imports(interpreter: Interpreter, package: Path, tmp_path: Path) -> None:
    assert installed(interpreter, package, tmp_path / "venv") == f"{VERSION} gil"


@pytest.mark.parametrize("interpreter", WITH_GIL, ids=str)
def test_the_sdist_builds_installs_and_imports(interpreter: Interpreter, from_sdist: Path, tmp_path: Path) -> None:
    assert installed(interpreter, from_sdist, tmp_path / "venv") == f"{VERSION} gil"


def test_a_wheel_for_free_threading_keeps_the_gil_off(sdist: Path, tmp_path: Path) -> None:
    if not FREE_THREADED:
        pytest.skip("no free-threaded CPython on this machine; UBLK_PYTHONS=/path/to/python3.14t gives one")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for number, interpreter in enumerate(FREE_THREADED):
        out = tmp_path / f"wheel{number}"
        wheel.maturin("build", "--release", "--interpreter", str(interpreter.path), "--out", out, cwd=source)
        (made,) = out.iterdir()
        assert re.search(r"-cp3\d+-cp3\d+t-", made.name), made.name
        assert installed(interpreter, made, tmp_path / f"venv{number}") == f"{VERSION} no gil"


@functools.cache
def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as z:
        return {name: z.read(name) for name in z.namelist()}


def metadata(path: Path) -> Message:
    text = members(path)[f"ublk-{VERSION}.dist-info/METADATA"].decode()
    return email.parser.Parser().parsestr(text)


@pytest.mark.parametrize("which", ["package", "from_sdist"])
def test_the_wheel_holds_the_sources_and_nothing_else(which: str, request: pytest.FixtureRequest) -> None:
    python = layout.TREE / "ublk-py/python"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."],
        cwd=python,
        capture_output=True,
        text=True,
        check=True,
    )
    sources = {name for name in listed.stdout.splitlines() if (python / name).exists()}
    assert {"ublk/py.typed", "ublk/_native.pyi", "ublk_vm/py.typed", "ublk_vm/guest_init.sh"} <= sources
    info = f"ublk-{VERSION}.dist-info"
    made = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    licences = {f"{info}/licenses/{name}" for name in ("LICENSE-MIT", "LICENSE-APACHE")}
    held = members(request.getfixturevalue(which))
    assert set(held) == sources | made | licences | {"ublk/_native.abi3.so"}
    for licence in licences:
        assert held[licence] == (layout.TREE / Path(licence).name).read_bytes()
    assert str(layout.TREE).encode() not in held["ublk/_native.abi3.so"], "the builder's folders are named in it"


def test_the_sdist_holds_what_it_takes_to_build(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"PKG-INFO", "Cargo.lock", "Cargo.toml", "pyproject.toml", "README.md", "LICENSE-MIT", "LICENSE-APACHE"}
    assert wanted | {"ublk-py/src/lib.rs", "ublk-core/src/lib.rs", "python/ublk/py.typed"} <= names
    stray = [
        n for n in names if re.search(r"(^|/)(target|__pycache__|python-tests|\.git|\.cargo)(/|$)|\.(so|pyc)$", n)
    ]
    assert not stray


def test_the_metadata_says_what_a_user_wants_to_know(package: Path) -> None:
    said = metadata(package)
    assert (said["Name"], said["Version"], said["Requires-Python"]) == ("ublk", VERSION, ">=3.11")
    assert said["License-Expression"] == "MIT OR Apache-2.0"
    assert said.get_all("License-File") == ["LICENSE-MIT", "LICENSE-APACHE"]
    classifiers = said.get_all("Classifier", [])
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed", "Framework :: Pytest"} <= set(classifiers)
    assert not [c for c in classifiers if c.startswith("License ::")], "PEP 639 has the expression in their place"
    assert said.get_all("Requires-Dist") == ["pytest>=8 ; extra == 'vm'"], "the package itself needs no other"


def test_the_readme_is_the_description_and_stands_alone(package: Path) -> None:
    """An index shows it far from the tree: no link may be relative, and every fence must close."""
    said = metadata(package)
    assert said["Description-Content-Type"].startswith("text/markdown")
    text = said.get_payload()
    assert isinstance(text, str)
    assert text.strip() == (layout.TREE / "ublk-py/README.md").read_text().strip()
    assert text.startswith("# ublk\n")
    assert text.count("\n```") % 2 == 0
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert not [link for link in links if "://" not in link]
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(program, "README.md", "exec")


def test_the_platform_tag_is_what_the_symbols_allow(package: Path, tmp_path: Path) -> None:
    """The policy of a tag is checked by maturin; here, by what the library itself says that it needs."""
    found = re.fullmatch(rf"ublk-{re.escape(VERSION)}-cp311-abi3-manylinux_2_(\d+)_x86_64\.whl", package.name)
    assert found, package.name
    library = tmp_path / "_native.abi3.so"
    library.write_bytes(members(package)["ublk/_native.abi3.so"])
    versions = subprocess.run(["readelf", "-VW", library], capture_output=True, text=True, check=True).stdout
    newest = max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", versions))
    assert newest <= int(found[1])
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert needed <= SYSTEM_LIBRARIES, "libpython, or another library that a user may not have"
