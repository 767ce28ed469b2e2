"""The Python package's documentation: its public names, and their examples, run where a driver is.

`python -m ublk_rig.docs` runs every example and prints, as JSON, the names with how many there were. It is what tests
run in a guest, in one process.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import itertools
import json
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# For those of one name, on a real processor.
EXAMPLES_SECS = 20
OPTIONS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


@dataclass(frozen=True)
class Documented:
    """A public name and its documentation."""

    name: str
    text: str

    @property
    def examples(self) -> list[doctest.Example]:
        """What its documentation shows."""
        return doctest.DocTestParser().get_examples(self.text)


def public() -> list[Documented]:
    """What users of the package see: exported names, and the methods and properties of exported classes."""
    import ublk  # noqa: PLC0415 - the rig itself does not need it

    found = [Documented("ublk", ublk.__doc__ or "")]
    constants = _constants(Path(ublk.__file__).parent)
    for name in ublk.__all__:
        thing = getattr(ublk, name)
        if not callable(thing) or name in constants:
            found.append(Documented(name, constants.get(name, "")))
            continue
        found.append(Documented(name, inspect.getdoc(thing) or ""))
        if inspect.isclass(thing):
            found += _members(thing, name)
    return found


def _members(cls: type, name: str) -> Iterator[Documented]:
    # Fields of a dataclass are told of where they stand; so are an enumeration's.
    import ublk  # noqa: PLC0415 - as above

    fields = getattr(cls, "__dataclass_fields__", {})
    # A base that is not exported is a part of the class.
    owners = [
        c for c in cls.__mro__ if c is cls or (c.__module__.startswith("ublk.") and c.__name__ not in ublk.__all__)
    ]
    for member, thing in (item for owner in owners for item in vars(owner).items()):
        if member.startswith("_") or member in fields:
            continue
        if isinstance(thing, (staticmethod, classmethod)):
            thing = thing.__func__  # noqa: PLW2901
        if inspect.isroutine(thing) or isinstance(thing, property) or inspect.isdatadescriptor(thing):
            yield Documented(f"{name}.{member}", inspect.getdoc(thing) or "")


def _constants(folder: Path) -> dict[str, str]:
    """The strings after assignments: what has no docstring while it runs."""
    texts = {}
    for path in sorted(folder.glob("*.py*")):
        if path.suffix not in {".py", ".pyi"}:
            continue
        body = ast.parse(path.read_text()).body
        for one, after in itertools.pairwise(body):
            target: ast.expr | None = one.target if isinstance(one, ast.AnnAssign) else None
            if isinstance(one, ast.Assign) and len(one.targets) == 1:
                target = one.targets[0]
            text = (
                after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            )
            if isinstance(target, ast.Name) and isinstance(text, str):
                texts[target.id] = inspect.cleandoc(text)
    return texts


def stub_differs() -> list[str]:
    """Names of the native module whose documentation in the stub is not what `help()` shows."""
    import ublk._native  # noqa: PLC0415

    stub = Path(ublk._native.__file__).parent / "_native.pyi"  # noqa: SLF001
    wrong = []
    for node in ast.parse(stub.read_text()).body:
        if not isinstance(node, ast.ClassDef) or (text := ast.get_docstring(node)) is None:
            continue
        cls = getattr(ublk._native, node.name)  # noqa: SLF001
        pairs: list[tuple[str, str | None, Any]] = [(node.name, text, cls)]
        pairs += [
            (f"{node.name}.{member.name}", ast.get_docstring(member), getattr(cls, member.name))
            for member in node.body
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
        ]
        wrong += [name for name, said, thing in pairs if said != inspect.cleandoc(thing.__doc__ or "")]
    return wrong


class _Request:
    """A client's read of 4096 bytes at byte 8192, as a backend gets it: a new one for each set of examples."""

    def __init__(self) -> None:
        import ublk  # noqa: PLC0415

        self._came = threading.Event()
        self._request: Any = None
        # The kernel's own look for partitions comes before the start's end, or not at all.
        self._armed = False
        scanless = "NO_AUTO_PART_SCAN" in (ublk.features() or ())
        outer = self

        class Keeper:
            def handle(self, request: Any) -> None:  # noqa: ANN401
                if request.offset == 8192 and outer._armed and outer._request is None:
                    outer._request = request
                    outer._came.set()
                else:
                    request.complete()

        self.device = ublk.Device(Keeper(), size="1MiB", read_only=True, partition_scan=not scanless)

    def __enter__(self) -> Any:  # noqa: ANN401
        self.device.start()
        self._armed = True
        self._client = threading.Thread(target=self._read)
        self._client.start()
        if not self._came.wait(60):
            raise TimeoutError("the client's read has not come")
        return self._request

    def _read(self) -> None:
        import mmap  # noqa: PLC0415
        import os  # noqa: PLC0415

        disk = os.open(self.device.path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(disk, [mmap.mmap(-1, 4096)], 8192)
        finally:
            os.close(disk)

    def __exit__(self, *_: object) -> None:
        if not self._request.completed:
            self._request.complete()
        self._client.join()
        self.device.stop()


def run() -> dict[str, int]:
    """Runs the examples of every name; prints those that do not show what happens."""
    import asyncio  # noqa: PLC0415
    import contextlib  # noqa: PLC0415
    import faulthandler  # noqa: PLC0415
    import os  # noqa: PLC0415

    import ublk  # noqa: PLC0415

    limit = EXAMPLES_SECS * float(os.environ.get("UBLK_TIMESCALE", "1"))
    failed: dict[str, int] = {}
    counted: dict[str, int] = {}
    for one in public():
        names = {"ublk": ublk, "asyncio": asyncio, "contextlib": contextlib, "os": os}
        names |= {name: getattr(ublk, name) for name in ublk.__all__ if not name.startswith("_") and name != "list"}
        print(one.name, file=sys.stderr)
        # One that hangs shows where.
        faulthandler.dump_traceback_later(limit, exit=True)
        with contextlib.ExitStack() as stack:
            if "request." in one.text and "def handle" not in one.text:
                names["request"] = stack.enter_context(_Request())
            test = doctest.DocTest(one.examples, names, one.name, None, None, one.text)
            result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=sys.stderr.write)
        counted[one.name] = result.attempted
        if result.failed:
            failed[one.name] = result.failed
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"counted": counted, "failed": failed, "stub": stub_differs()}))
    return failed


if __name__ == "__main__":
    sys.exit(bool(run()))
