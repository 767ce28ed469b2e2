"""``python -m ublk serve``: a script as a disk."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.machinery
import importlib.util
import inspect
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ublk._device import Device
from ublk._recover import taken_over

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from types import ModuleType, TracebackType

    from ublk._backend import AnyBackend

__all__ = ["Mistake", "load", "serve"]

_FORCE_WITHIN = 5.0


class Mistake(Exception):
    """What the user has to mend: a message, and no traceback."""


def load(script: str, keys: Sequence[tuple[str, str]]) -> AnyBackend:
    """The backend that a script defines.

    A script that has ``backend(**keys)`` returns it from there. Any other is the backend itself: a module with
    ``pread`` and its like, told each key by ``config(key, value)``, and then, if it has that, ``config_complete()``.

    Args:
        script: The script's path.
        keys: The words ``key=value`` of the command line.

    Raises:
        Mistake: There is no such script, it fails, or it does not take these keys.
    """
    module = _run(script)
    make = getattr(module, "backend", None)
    if callable(make):
        return _made(script, make, keys)
    config = getattr(module, "config", None)
    if keys and not callable(config):
        raise Mistake(
            f"{script} takes no keys ({keys[0][0]}=...): it has neither backend(**keys) nor config(key, value)"
        )
    for key, value in keys:
        assert callable(config)
        _call(f"{script}: {key}={value}", config, key, value)
    complete = getattr(module, "config_complete", None)
    if callable(complete):
        _call(script, complete)
    # Whether it is a backend, Device finds out.
    return module


def _run(script: str) -> ModuleType:
    path = Path(script).resolve()
    if not path.is_file():
        raise Mistake(f"{script}: there is no such script")
    # As `python script.py` has it: modules beside the script can be imported.
    sys.path.insert(0, str(path.parent))
    name = path.stem
    if name in sys.modules:
        name = f"{name}_script"
    # A source file whatever it is called.
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except Exception as error:
        raise Mistake(_own_traceback(error, script)) from error
    return module


def _made(script: str, make: Callable[..., AnyBackend], keys: Sequence[tuple[str, str]]) -> AnyBackend:
    given = dict(keys)
    if len(given) != len(keys):
        twice = next(key for key in given if sum(key == k for k, _ in keys) > 1)
        raise Mistake(f"{script}: {twice}= is given more than once")
    try:
        signature = inspect.signature(make)
        signature.bind(**given)
    except TypeError as error:
        raise Mistake(f"{script}: backend{inspect.signature(make)} and {_words(given)}: {error}") from None
    made: AnyBackend = _call(script, make, **given)
    return made


def _words(keys: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in keys.items()) or "no keys"


def _call(what: str, function: Callable[..., Any], *args: str, **keys: str) -> Any:  # noqa: ANN401
    """Calls a function of the script: what it says of its arguments is a message, the rest shows where it was."""
    try:
        return function(*args, **keys)
    except (ValueError, OSError) as error:
        raise Mistake(f"{what}: {error}") from error
    except Exception as error:
        raise Mistake(_own_traceback(error, what)) from error


def _own_traceback(error: Exception, what: str) -> str:
    """The part of a traceback that is the script's."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith((__file__, "<frozen importlib")):
        trace = trace.tb_next
    return f"{what} fails:\n{''.join(traceback.format_exception(type(error), error, trace)).rstrip()}"


def serve(backend: AnyBackend, options: dict[str, Any], *, taken_over: int | None, stop_timeout: float) -> int:
    """Serves a disk until SIGINT, SIGTERM or its end, and gives the exit status.

    Prints the disk's path when it can be used. A second signal does not wait for the disk's users.
    """
    return asyncio.run(_serve(backend, options, taken_over, stop_timeout))


async def _serve(backend: AnyBackend, options: dict[str, Any], taken_over: int | None, stop_timeout: float) -> int:
    loop = asyncio.get_running_loop()
    asked, hurried = asyncio.Event(), asyncio.Event()

    def heard() -> None:
        (hurried if asked.is_set() else asked).set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, heard)
    device = await _start(backend, options, taken_over, asked)
    if device is None:
        return 0
    print(device.path, flush=True)
    status = 0
    try:
        await _first(device.wait_async(), asked.wait())
    finally:
        status = await _end(device, hurried, stop_timeout)
    return status


async def _start(
    backend: AnyBackend, options: dict[str, Any], number: int | None, asked: asyncio.Event
) -> Device | None:
    """None if it was given up for a signal."""
    device = Device(backend, **options) if number is None else taken_over(number, backend, **options)
    start, stop = asyncio.ensure_future(device.start_async()), asyncio.ensure_future(asked.wait())
    await asyncio.wait((start, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not start.done():
        start.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await start
        return None
    return await start


async def _first(*coroutines: Coroutine[object, object, object]) -> None:
    """Waits for one of them, and raises what it raises."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _end(device: Device, hurried: asyncio.Event, timeout: float) -> int:
    """Stops a disk: politely until the time is over or the user loses patience, then by force."""
    stop = asyncio.ensure_future(device.stop_async(timeout))
    impatience = asyncio.ensure_future(hurried.wait())
    await asyncio.wait((stop, impatience), return_when=asyncio.FIRST_COMPLETED)
    impatience.cancel()
    if stop.done():
        try:
            await stop
        except TimeoutError as held:
            print(f"ublk: {held}; it is taken from them", file=sys.stderr)
        else:
            return 0
    await device.stop_force_async(_FORCE_WITHIN)
    with contextlib.suppress(TimeoutError, OSError):
        await stop
    return 1
