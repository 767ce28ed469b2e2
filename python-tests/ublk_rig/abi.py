"""The C library's ABI as libabigail describes it, without what no C program can see.

`python -m ublk_rig.abi LIBRARY` prints what is committed as `ublk-capi/libublk_rs.abi`; the library has to be built
with all debug information. abidw describes every type that Rust has made on the way: kept is what the exported
functions reach.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

# Where something was built says nothing about its ABI.
_NOISE = ("path", "comp-dir-path", "language", "filepath", "line", "column", "mangled-name")
_OPTIONS = (
    *("--no-show-locs", "--no-corpus-path", "--no-comp-dir-path", "--drop-undefined-syms", "--no-elf-needed"),
    *("--type-id-style", "hash"),
)


def _reached(root: ET.Element) -> set[str]:
    """The ids of the types that exported functions use, and those that these use."""
    defined = {element.get("id"): element for element in root.iter() if element.get("id")}
    exported = [f for f in root.iter("function-decl") if f.get("elf-symbol-id")]
    found: set[str] = set()
    waiting = list(exported)
    while waiting:
        for element in waiting.pop().iter():
            for key, value in element.attrib.items():
                if key.endswith("type-id") and value not in found and value in defined:
                    found.add(value)
                    waiting.append(defined[value])
    return found


def _prune(parent: ET.Element, types: set[str]) -> bool:
    """Drop what is not reached; whether anything is left."""
    kept = False
    for child in list(parent):
        if child.tag in {"namespace-decl", "abi-instr", "member-type"}:
            wanted = _prune(child, types)
        elif child.tag == "function-decl":
            wanted = child.get("elf-symbol-id") is not None
        elif child.tag in {"elf-function-symbols", "elf-variable-symbols"}:
            wanted = True
        else:
            ids = {e.get("id") for e in child.iter() if e.get("id")}
            wanted = bool(ids & types)
        if wanted:
            kept = True
        else:
            parent.remove(child)
    return kept


def described(library: Path) -> str:
    """The ABI of a library."""
    done = subprocess.run(["abidw", *_OPTIONS, library], capture_output=True, text=True, check=True)
    root = ET.fromstring(done.stdout)  # noqa: S314 - abidw's own
    _prune(root, _reached(root))
    for element in root.iter():
        for name in _NOISE:
            element.attrib.pop(name, None)
    # abidiff wants each to have a name of its own.
    for number, unit in enumerate(root.iter("abi-instr")):
        unit.set("path", f"unit{number}")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


if __name__ == "__main__":
    sys.stdout.write(described(Path(sys.argv[1])))
