"""In which order to insmod: the initramfs has no modprobe and wants as few modules as possible."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def _name(path: str) -> str:
    return Path(path).name.split(".ko")[0].replace("-", "_")


def insmod_order(modules_dep: str, names: Iterable[str]) -> list[str]:
    """Paths of the named modules and of all that they need, each after its needs.

    A name that modules.dep does not list is built into the kernel and left out.
    """
    needs: dict[str, list[str]] = {}
    for line in modules_dep.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    by_name = {_name(path): path for path in needs}
    order: dict[str, None] = {}

    def add(path: str, above: tuple[str, ...]) -> None:
        if path in order or path in above:
            return
        for need in needs.get(path, ()):
            add(need, (*above, path))
        order[path] = None

    for name in names:
        if found := by_name.get(name.replace("-", "_")):
            add(found, ())
    return list(order)
