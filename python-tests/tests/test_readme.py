"""What the README shows is what is compiled and run."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

import pytest

from ublk_rig import capi, layout, served, support, testdisk

if TYPE_CHECKING:
    from pathlib import Path

    from ublk_vm.guest import Guest

EXAMPLES = layout.TREE / "ublk-core/examples"
DISK_BYTES = 64 << 20
PAGES = [layout.TREE / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((layout.TREE / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_ramdisk_of_the_readme_is_the_example() -> None:
    assert (EXAMPLES / "ramdisk.rs").read_text() in blocks(layout.TREE / "README.md", "rust")


def test_the_ramdisk_in_c_of_the_readme_is_the_example() -> None:
    assert (capi.EXAMPLES / "ramdisk.c").read_text() in blocks(layout.TREE / "README.md", "c")


def test_the_readme_has_a_place_for_the_table() -> None:
    text = (layout.TREE / "README.md").read_text()
    assert support.replaced(text, "x").count("\nx\n") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize(
    "page", [*PAGES, layout.TREE / "ublk-py/README.md"], ids=lambda p: str(p.relative_to(layout.TREE))
)
def test_pip_is_given_what_is_there(page: Path) -> None:
    """Nothing is published: a name would be somebody else's package. And Debian's own Python refuses pip."""
    extras = tomllib.loads((layout.TREE / "ublk-py/pyproject.toml").read_text())["project"]["optional-dependencies"]
    for what in re.findall(r"pip install +(\S+)", page.read_text()):
        path, _, extra = what.strip("'`").rstrip("]").partition("[")
        assert path.startswith("./"), what
        assert (layout.TREE / path / "pyproject.toml").exists(), what
        assert not extra or extra in extras, what
    for block in blocks(page, "console"):
        before, pip, _ = block.partition("$ pip install")
        assert not pip or "python3 -m venv venv && . venv/bin/activate" in before, block


def test_errors_are_in_every_language_what_the_page_says() -> None:
    told = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", (layout.TREE / "docs/errors.md").read_text(), re.MULTILINE
    )
    core = (layout.TREE / "ublk-core/src/error.rs").read_text()
    kinds = re.findall(r"^    (\w+),$", core.partition("pub enum ErrorKind {")[2].partition("\n}")[0], re.MULTILINE)
    pages = {kind: (python, c) for kind, python, c in told if not kind.isupper()}
    python_side = (layout.TREE / "ublk-py/src/errors.rs").read_text()
    c_side = (layout.TREE / "ublk-capi/src/error.rs").read_text()
    classes = {"InvalidParameter": "ValueError", "Gone": "GoneError"}
    classes |= dict.fromkeys(("WrongState", "WouldDeadlock", "Forked"), "StateError")
    for names, cls in re.findall(r"((?:ErrorKind::\w+(?: \| )?)+) => \{?\s*\(Py(\w+)::", python_side):
        classes |= dict.fromkeys(re.findall(r"::(\w+)", names), cls)
    numbers = dict(re.findall(r"UBLK_RS_KIND_(\w+) => (?:said\()?libc::(E\w+)", c_side))
    assert sorted(pages) == sorted(kinds)
    for kind, (python, c) in pages.items():
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", kind).upper()
        assert classes.get(kind, "OSError") in python, (kind, python)
        assert f"-{numbers.get(name, 'EIO')}" in c, (kind, c)


def test_the_ramdisk_is_a_disk(guest: Guest) -> None:
    program = served.build_example("ramdisk")
    folder = guest.run("mktemp -d").out.strip()
    guest.run("modprobe ublk_drv")
    with guest.popen([program, str(DISK_BYTES)]) as server:
        disk = server.read_line(served.START_SECS)
        number = int(disk.removeprefix("/dev/ublkb"))
        try:
            assert guest.run(["blockdev", "--getsize64", disk]).out.strip() == str(DISK_BYTES)
            guest.run(["mkfs.ext4", "-q", disk])
            # Twice: the second mount reads what the first one wrote, and not its cache.
            guest.run(f"mount {disk} {folder} && head -c 5000000 /dev/urandom > {folder}/file")
            before = guest.run(f"sha256sum < {folder}/file && umount {folder}").out
            after = guest.run(f"mount {disk} {folder} && sha256sum < {folder}/file && umount {folder}").out
            assert before == after
            guest.run(["e2fsck", "-fn", disk])
        finally:
            guest.run(f"umount -q {folder}; rmdir {folder}", check=False)
            # It serves until somebody stops the device: here, another process.
            testdisk.delete(guest, number)
        assert server.wait(served.STOP_SECS) == 0, server.err
