"""What a backend is, and what one can do."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ublk._native import Fault, File, Mem, Null, Stripe, WriteCache, ZonedMem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType

    from ublk._native import Request

__all__ = ["AnyBackend", "AsyncBackend", "Backend", "RawBackend", "inspect_backend"]


class Backend(Protocol):
    """A disk: any object that has ``pread``. Which of the others it has decides what the disk can do.

    ``buf`` supports the buffer protocol, without a copy, and may be kept: the memory stays as it is for as long as
    somebody sees it. Offsets and counts are bytes, multiples of the logical block size, within the disk.

    ========================  ==============================================================================
    ``pread(buf, offset)``    fills ``buf``, which arrives zeroed
    ``pwrite(buf, offset)``   stores ``buf``, which is read-only. Without it the disk is read-only
    ``flush()``               makes durable what was written. Without it the disk advertises no volatile cache
    ``trim(count, offset)``   forgets a range
    ``zero(count, offset)``   makes a range read as zeroes
    ========================  ==============================================================================

    Each returns None, or the full length; anything else is EIO for the client. An ``OSError`` tells the client its
    errno, where the kernel carries that (``docs/errors.md``); ``NotImplementedError`` is EOPNOTSUPP; every other
    exception is EIO, and is logged.

    One that takes an argument named ``flags`` is given `Flags` by that name. If ``pwrite`` does (and there is a
    ``flush``), the disk advertises FUA: with ``Flags.FUA`` the data is durable before ``pwrite`` returns. The
    attribute ``size``, if there is one, is the disk's size unless `Device` is told another.

    A zoned disk (``Device(zoned=...)``) also has ``report_zones(offset, count)``, which returns a list of `Zone`,
    ``append(buf, zone)``, which returns the byte of the disk where the data went, and ``zone(action, offset)`` for
    ``"open"``, ``"close"``, ``"finish"``, ``"reset"`` and ``"reset_all"``.

    A module with these functions is a backend, too. Subclassing this is optional; it only helps a type checker.

    >>> class Zeroes:
    ...     def pread(self, buf, offset):
    ...         pass
    >>> from ublk import Device
    >>> Device(Zeroes(), size="1GiB")
    <ublk.Device: not started>
    """

    def pread(self, buf: memoryview, offset: int, /) -> int | None:
        """Fills ``buf`` from byte ``offset`` of the disk.

        >>> class Letters:
        ...     def pread(self, buf, offset):
        ...         buf[:] = b"A" * len(buf)
        >>> import ublk
        >>> with ublk.Device(Letters(), size="1MiB") as dev:
        ...     with open(dev.path, "rb", buffering=0) as disk:
        ...         disk.read(3)
        b'AAA'
        """


class AsyncBackend(Protocol):
    """A disk whose methods are ``async``: they run on an asyncio loop, many at a time.

    As `Backend` otherwise; methods that are not ``async`` may stand among them, and run on the loop as well. The
    loop is the caller's in ``async with Device(...)``, otherwise one that the device runs on a thread of its own.

    >>> class Slow:
    ...     async def pread(self, buf, offset):
    ...         await asyncio.sleep(0.01)
    >>> import asyncio
    >>> from ublk import Device
    >>> Device(Slow(), size=4096)
    <ublk.Device: not started>
    """

    def pread(self, buf: memoryview, offset: int, /) -> Awaitable[int | None]:
        """Fills ``buf`` from byte ``offset`` of the disk.

        >>> class Letters:
        ...     async def pread(self, buf, offset):
        ...         await asyncio.sleep(0.001)
        ...         buf[:] = b"A" * len(buf)
        >>> import asyncio, ublk
        >>> with ublk.Device(Letters(), size="1MiB") as dev:
        ...     with open(dev.path, "rb", buffering=0) as disk:
        ...         disk.read(3)
        b'AAA'
        """


class RawBackend(Protocol):
    """A disk that is handed the requests themselves, to be completed from any thread, at any time.

    What the disk can do cannot be seen from its methods, so `Device` is told: ``read_only``, ``cache``, ``fua``,
    ``trim``, ``zero``, ``zoned`` and ``integrity``.

    >>> class Echo:
    ...     def handle(self, request):
    ...         request.complete()
    >>> from ublk import Device
    >>> Device(Echo(), size=4096)
    <ublk.Device: not started>
    """

    def handle(self, request: Request, /) -> object:
        """Takes a request, which is to be completed once, at any time: nothing here may wait.

        >>> class Letters:
        ...     def handle(self, request):
        ...         if request.op == "read":
        ...             request.buffer[:] = b"A" * request.length
        ...         request.complete()
        >>> import ublk
        >>> with ublk.Device(Letters(), size="1MiB", read_only=True) as dev:
        ...     with open(dev.path, "rb", buffering=0) as disk:
        ...         disk.read(3)
        b'AAA'
        """


AnyBackend: TypeAlias = (
    "Backend | AsyncBackend | RawBackend | ModuleType | Null | Mem | File | Stripe | ZonedMem | Fault | WriteCache"
)
"""Everything that `Device` takes.

>>> import ublk
>>> def serve(backend: "ublk.AnyBackend") -> ublk.Device:
...     return ublk.Device(backend, size="1GiB")
>>> serve(ublk.Null()).size >> 30
1
"""

READY_MADE = (Null, Mem, File, Stripe, ZonedMem, Fault, WriteCache)

_METHODS = ("pread", "pwrite", "flush", "trim", "zero", "report_zones", "append", "zone", "handle")


@dataclass(frozen=True, slots=True)
class Found:
    """A backend in Python, looked at."""

    methods: dict[str, tuple[Callable[..., Any], bool]]
    """The methods that it has, each with whether it takes ``flags``."""
    is_async: bool
    raw: bool


def _takes_flags(method: Callable[..., Any]) -> bool:
    try:
        return "flags" in inspect.signature(method).parameters
    except (TypeError, ValueError):  # some builtins have none
        return False


def _is_async(method: Callable[..., Any]) -> bool:
    call = getattr(method, "__call__", None)  # noqa: B004  # an object whose __call__ is async
    return inspect.iscoroutinefunction(method) or inspect.iscoroutinefunction(call)


def inspect_backend(backend: object) -> Found:
    """Finds what a backend in Python can do.

    Raises:
        TypeError: It has neither ``pread`` nor ``handle``, or one of its methods cannot be called.
    """
    methods: dict[str, tuple[Callable[..., Any], bool]] = {}
    for name in _METHODS:
        method = getattr(backend, name, None)
        # What is inherited from the protocols is a description, not a method.
        if method is None or getattr(method, "__module__", None) == __name__:
            continue
        if not callable(method):
            raise TypeError(f"{backend!r}: {name} is a {type(method).__name__}, not a method")
        methods[name] = (method, _takes_flags(method))
    raw = "handle" in methods
    if not raw and "pread" not in methods:
        raise TypeError(f"{backend!r} is no backend: it has neither pread(buf, offset) nor handle(request)")
    if raw and len(methods) > 1:
        others = ", ".join(sorted(methods.keys() - {"handle"}))
        raise TypeError(f"{backend!r} has handle(request) and {others}: one or the other")
    return Found(methods, any(_is_async(method) for method, _ in methods.values()), raw)
