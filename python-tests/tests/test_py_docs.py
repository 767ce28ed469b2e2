"""Every public name of the Python package is documented by an example that runs."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING

import pytest

from ublk_rig import docs, layout, served

if TYPE_CHECKING:
    from pathlib import Path

    from ublk_vm.guest import Guest

pytestmark = pytest.mark.usefixtures("package")

EXAMPLES = layout.TREE / "ublk-py/examples"
TUTORIAL = layout.TREE / "docs/python.md"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_every_name_is_documented_by_an_example() -> None:
    found = docs.public()
    assert {"Device.stop", "Device.path", "Request.complete", "Mem.pread", "DataPath"} <= {one.name for one in found}
    assert [one.name for one in found if not one.examples] == []
    skipped = [one.name for one in found for e in one.examples if any(e.options.values())]
    assert skipped == []
    assert docs.stub_differs() == []


def test_every_example_shows_what_happens(guest: Guest) -> None:
    guest.run("modprobe ublk_drv")
    done = guest.run([sys.executable, "-W", "error", "-m", "ublk_rig.docs"], timeout=240, check=False)
    assert done.rc == 0, done.err
    told = json.loads(done.out.splitlines()[-1])
    assert told["failed"] == {}
    # What ran is what was counted.
    assert told["counted"] == {one.name: len(one.examples) for one in docs.public()}


def test_the_readmes_show_the_ramdisk() -> None:
    program = (EXAMPLES / "ramdisk.py").read_text()
    assert program in python_blocks(layout.TREE / "README.md")
    assert program in python_blocks(layout.TREE / "ublk-py/README.md")


def test_the_tutorial_shows_the_programs() -> None:
    shown = python_blocks(TUTORIAL)
    for program in sorted(EXAMPLES.glob("*.py")):
        assert program.read_text() in shown, program


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("ramdisk", []), ("file_disk", ["IMAGE", "64MiB"]), ("async_disk", ["64MiB"]), ("raw_disk", ["64MiB"])],
)
def test_the_programs_of_the_tutorial_are_disks(guest: Guest, name: str, arguments: list[str]) -> None:
    guest.run("modprobe ublk_drv")
    work = guest.run("mktemp -d").out.strip()
    argv = [sys.executable, "-u", str(EXAMPLES / f"{name}.py")]
    argv += [a.replace("IMAGE", f"{work}/image") for a in arguments]
    with served.serving(guest, argv, stop=served.interrupt) as (_, disk):
        verify = ["--rw=randrw", "--bs=4k", "--iodepth=16", "--ioengine=io_uring", "--direct=1", "--verify=crc32c"]
        guest.run(["fio", "--name=v", f"--filename={disk}", "--size=4M", *verify], timeout=120)
        guest.run(f"mkfs.ext4 -q {disk} && mkdir {work}/mnt && mount {disk} {work}/mnt")
        try:
            guest.run(f"head -c 3000000 /dev/urandom > {work}/file && cp {work}/file {work}/mnt")
            guest.run(f"umount {work}/mnt && mount {disk} {work}/mnt && cmp {work}/file {work}/mnt/file")
        finally:
            guest.run(["umount", f"{work}/mnt"])
        guest.run(["e2fsck", "-fn", disk])
    guest.run(["rm", "-r", work])


@pytest.mark.parametrize("binding", ["ublk-py", "ublk-capi"])
def test_errors_name_what_the_language_has(binding: str) -> None:
    """The library's errors speak of its builder's methods: each binding has a word of its language's for each."""
    string = r'"((?:[^"\\]|\\.)*)"'
    table = (layout.TREE / binding / "src/words.rs").read_text()
    words = [
        tuple(text.replace('\\"', '"') for text in pair)
        for pair in re.findall(rf"\(\s*{string},\s*{string},?\s*\)", table, re.DOTALL)
    ]
    assert len(words) > 20
    said = []
    for source in sorted((layout.TREE / "ublk-core/src").rglob("*.rs")):
        if source.stem.endswith("_tests"):
            continue
        code = source.read_text().partition("#[cfg(test)]")[0].replace("'\"'", "")
        code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("//"))
        texts = (re.sub(r"\\\n\s*", "", text) for text in re.findall(string, code, re.DOTALL))
        said += [text for text in texts if "\n" not in text and re.search(r"\b[A-Z]\w+::\w", text)]
    assert len(said) >= 7, said
    for text in said:
        told = text
        for theirs, ours in words:
            told = told.replace(theirs, ours)
        assert "::" not in told, text
