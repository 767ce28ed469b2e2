"""Devices: how one is described, started and stopped."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import select
import threading
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex, TypeAlias

from ublk import _log, _native
from ublk._aio import Courier
from ublk._backend import READY_MADE, AnyBackend, inspect_backend
from ublk._blocking import in_thread, settle
from ublk._changes import Changes
from ublk._native import StateError
from ublk._size import parse_size
from ublk._types import DataPath, Flags, Integrity, Recovery, Zoned, stats_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from ublk._native import Workers

__all__ = ["Device"]

_logger = logging.getLogger("ublk")
_FLAGS: list[Any] = [Flags(bits) for bits in range(32)]
_RECOVERY = {
    "wait": ("USER_RECOVERY",),
    "reissue": ("USER_RECOVERY", "USER_RECOVERY_REISSUE"),
    "fail": ("USER_RECOVERY", "USER_RECOVERY_FAIL_IO"),
}
_FORCE_WITHIN = 5.0

_live: weakref.WeakSet[Device] = weakref.WeakSet()
_Description: TypeAlias = (
    "tuple[AnyBackend, SupportsIndex | str | None, int | None, dict[str, Any], dict[str, bool | None]]"
)


class Device(_native.Leaving, Changes):
    """A disk, ``/dev/ublkbN``, that this process serves.

    Making one checks everything that needs no kernel, and creates nothing. ``with`` starts it, and stops **and
    deletes** it at the end:

    >>> import ublk
    >>> with ublk.Device(ublk.Mem("64MiB")) as dev:
    ...     size = os.stat(dev.path).st_rdev != 0
    >>> os.path.exists(dev.path)
    False

    Args:
        backend: Who answers the requests: any object with ``pread``, ``pwrite``, … (`Backend`), with ``async`` ones
            (`AsyncBackend`), with ``handle`` (`RawBackend`), a module with such functions, or a ready-made one
            (`Null`, `Mem`, `File`, `Stripe`, `ZonedMem`, `Fault`, `WriteCache`).
        size: Bytes of the disk, a multiple of the logical block size: an int, or a string like ``"10GiB"`` (see
            `parse_size`). May be left out if the backend has a ``size``.
        block_size: Bytes of a logical block: a power of two, 512 to 4096. Default 512, or what the backend needs.
        physical_block_size: Bytes of a physical block: a power of two from the logical one on. Default 4096.
        io_min: Bytes of the smallest I/O that is not slow: a power of two. Default the physical block size.
        io_opt: Bytes of the best I/O: a power of two. Default the physical block size.
        queues: Hardware queues, 1 to 4096; the driver clamps them to the number of CPUs. A synchronous backend is
            entered once per queue at a time, so concurrently if there are more than one.
        depth: Requests of each queue that can be in progress, 1 to 4096.
        max_io_size: Bytes of the largest request: a multiple of 4096, at most 32 MiB. Default 512 KiB.
        read_only: A read-only disk, also if the backend has ``pwrite``.
        rotational: Whether the disk claims to seek.
        cache: False: no volatile cache is advertised, and ``flush`` is not called. Default: one if there is a
            ``flush``. For `RawBackend`: whether it has one.
        fua: False: no FUA is advertised. Default: if ``pwrite`` takes ``flags`` and there is a ``flush``. For
            `RawBackend`: whether it does.
        trim: For `RawBackend`: whether it takes discards. Otherwise it has a ``trim`` or not.
        trim_granularity: Bytes of the unit of discards. Default one logical block.
        max_trim_size: Bytes of the largest discard. Default what one request can say.
        zero: For `RawBackend`: whether it takes writes of zeroes. Otherwise it has a ``zero`` or not.
        max_zero_size: Bytes of the largest write of zeroes. Default what one request can say.
        zoned: The zones of a zoned disk, whose backend has the zone methods, or is a `RawBackend`.
        integrity: The metadata that is kept beside the data, of a `RawBackend`; `Mem` has an argument of its own.
        data_path: How the data moves: see `DataPath`.
        recovery: What becomes of the disk if this process is gone: by default it goes, too. See `Recovery`.
        fingerprint: 64 bits that the kernel keeps with the device, and that `recover` compares. Default 0; of a
            `Stripe` what tells its members, their order and the chunks from others.
        id: The device's number, below 2**20. Default the lowest that is free.
        threads: Threads that call the methods of a synchronous backend, so that a slow call does not stall its
            queue: up to 1024. Default 0: each queue's worker calls them itself, one at a time.
        workers: A pool that devices share, in place of a worker for each queue.
        workers_per_queue: Workers that share each queue (Linux 6.16).
        pin: Whether each queue's worker runs only on the CPUs whose I/O comes by that queue.
        populate: Faults the requests' buffers in at the start, and keeps them.
        huge_pages: Allows transparent huge pages for them.
        dma_alignment: Bytes that the memory of direct I/O is aligned to: a power of two, 2 to 4096 (Linux 6.15).
        segments: Limits of memory segments: ``(boundary_mask, max_size, max_count)`` (Linux 6.15).
        descriptor_size: Bytes of a request's descriptor, 24 to 256 (Linux 7.3).
        batch: Whether requests and results travel in batches (Linux 7.0): True asks for it, False forbids it. Default
            neither, which is no.
        partition_scan: False: the kernel does not look for partitions (Linux 7.0).
        unprivileged: A device of an ordinary user: see ``docs/unprivileged.md``.
        allow_many_unprivileged: Whether this process may serve more than one of those.
        require: Names of features without which there is to be no device: see `features`.
        prefer: Names of features to be asked for where the kernel has them.
        forbid: Names of features with which there is to be no device.
        start_timeout: Seconds that the start may take.
        stop_timeout: Seconds that leaving ``with`` waits for users of the disk, before it is taken from them.

    Raises:
        TypeError: The backend is none, or an option is of the wrong type.
        ValueError: A size or an option breaks a rule, which the message names.
        OSError: What the options ask for is not to be had from this version.
    """

    _force = False

    def __init__(
        self,
        backend: AnyBackend,
        *,
        size: SupportsIndex | str | None = None,
        block_size: int | None = None,
        physical_block_size: int | None = None,
        io_min: int | None = None,
        io_opt: int | None = None,
        queues: int = 1,
        depth: int = 128,
        max_io_size: int | None = None,
        read_only: bool = False,
        rotational: bool = False,
        cache: bool | None = None,
        fua: bool | None = None,
        trim: bool | None = None,
        trim_granularity: int | None = None,
        max_trim_size: int | None = None,
        zero: bool | None = None,
        max_zero_size: int | None = None,
        zoned: Zoned | None = None,
        integrity: Integrity | None = None,
        data_path: DataPath = "auto",
        recovery: Recovery | None = None,
        fingerprint: int | None = None,
        id: int | None = None,  # noqa: A002  # the field's own name
        threads: int = 0,
        workers: Workers | None = None,
        workers_per_queue: int = 1,
        pin: bool = True,
        populate: bool = False,
        huge_pages: bool = False,
        dma_alignment: int | None = None,
        segments: tuple[int, int, int] | None = None,
        descriptor_size: int | None = None,
        batch: bool | None = None,
        partition_scan: bool = True,
        unprivileged: bool = False,
        allow_many_unprivileged: bool = False,
        require: Iterable[str] = (),
        prefer: Iterable[str] = (),
        forbid: Iterable[str] = (),
        start_timeout: float = 30.0,
        stop_timeout: float = 30.0,
    ) -> None:
        super().__init__()
        self._halted: _native.Halted | None = None
        self._lock = threading.Lock()
        self._courier: Courier | None = None
        self._starting = _native.Token()
        if not stop_timeout >= 0:
            raise ValueError(f"stop_timeout={stop_timeout}: seconds, 0 or more")
        self._stop_timeout = stop_timeout
        requires, prefers, forbids = list(require), list(prefer), list(forbid)
        if recovery is not None:
            if recovery not in _RECOVERY:
                raise ValueError(f"recovery={recovery!r}: one of {', '.join(map(repr, _RECOVERY))}, or None")
            requires += _RECOVERY[recovery]
        if batch is not None:
            (requires if batch else forbids).append("BATCH_IO")
        if not partition_scan:
            requires.append("NO_AUTO_PART_SCAN")
        if unprivileged:
            requires.append("UNPRIVILEGED_DEV")
        options: dict[str, Any] = {
            "block_size": block_size,
            "physical_block_size": physical_block_size,
            "io_min": io_min,
            "io_opt": io_opt,
            "queues": queues,
            "depth": depth,
            "max_io_size": max_io_size,
            "read_only": read_only,
            "rotational": rotational,
            "cache": cache,
            "fua": fua,
            "max_zero_size": max_zero_size,
            "data_path": data_path,
            "fingerprint": fingerprint,
            "id": id,
            "threads": threads,
            "workers": workers,
            "workers_per_queue": workers_per_queue,
            "pin": pin,
            "populate": populate,
            "huge_pages": huge_pages,
            "dma_alignment": dma_alignment,
            "segments": segments,
            "descriptor_size": descriptor_size,
            "integrity": integrity,
            "allow_many_unprivileged": allow_many_unprivileged,
            "require": requires,
            "prefer": prefers,
            "forbid": forbids,
            "start_timeout": start_timeout,
        }
        if trim_granularity is not None or max_trim_size is not None:
            options["trim"] = (trim_granularity or block_size or 512, 0, max_trim_size)
        if zoned is not None:
            options["zoned"] = (zoned.zone_size, zoned.max_open, zoned.max_active, zoned.max_append)
        said = {"write": not read_only, "flush": cache, "fua": fua, "trim": trim, "zero": zero}
        self._describe(backend, size, block_size, options, said)

    def _describe(
        self,
        backend: AnyBackend,
        size: SupportsIndex | str | None,
        block_size: int | None,
        options: dict[str, Any],
        said: dict[str, bool | None],
    ) -> None:
        """Looks at the backend, and has everything checked."""
        # For another life, until there can be none.
        self._described: _Description | None = (backend, size, block_size, dict(options), said)
        options["force"] = self._force
        self._ready_made = backend if isinstance(backend, READY_MADE) else None
        found = None if self._ready_made is not None else inspect_backend(backend)
        if size is None:
            size = getattr(backend, "size", None)
            if size is None:
                raise TypeError(f"Device() needs a size: {type(backend).__name__} has none")
        self._size = parse_size(size, block_size=block_size or 512)
        if options["integrity"] is not None and (found is None or not found.raw):
            raise ValueError(
                "integrity is for backends with handle(), whose requests show the metadata; Mem has its own"
            )
        if found is None:
            self._spec = _native.Spec(backend, self._size, options)
            return
        if found.raw:
            options |= {f"can_{name}": bool(able) for name, able in said.items()}
            options["cache"] = options["fua"] = None
        else:
            wrong = [name for name in ("trim", "zero") if said[name] and name not in found.methods]
            if wrong:
                raise ValueError(f"{wrong[0]}=True: the backend has no {wrong[0]}()")
            for name in ("trim", "zero"):
                if said[name] is False:
                    options[f"can_{name}"] = False
            if said["flush"] and "flush" not in found.methods:
                raise ValueError("cache=True: the backend has no flush()")
            if said["fua"] and not ("flush" in found.methods and found.methods.get("pwrite", (None, False))[1]):
                raise ValueError("fua=True: it takes a flush(), and a pwrite() with an argument named flags")
        calls = _native.Calls(found.methods, _FLAGS)
        if found.is_async:
            self._courier = Courier(found)
        inbox = self._courier.inbox if self._courier else None
        self._spec = _native.Spec(calls, self._size, options, inbox, raw=found.raw and not found.is_async)

    # Life.

    def start(self) -> Self:
        """Makes the device; returns when the disk can be used: its node is there, and opens.

        Raises:
            StateError: It was started before.
            FileNotFoundError: The driver is not loaded (``modprobe ublk_drv``).
            PermissionError: The caller may not make devices.
            FileExistsError: The ``id`` is taken.
            OSError: What else the kernel refuses; a note says what to do.
            TimeoutError: It took longer than ``start_timeout``.
            KeyboardInterrupt: Ctrl-C, at once: what had come up is taken down and deleted. The same for whatever the
                handler of a signal raises.

        >>> import ublk
        >>> dev = ublk.Device(ublk.Null(), size="1GiB").start()
        >>> dev.stop()
        """
        self._begin()
        try:
            if self._courier is not None:
                _native.shielded(self._courier.run, "ublk-loop")
            return self._bring_up()
        except BaseException:
            _native.apart(self._give_up)
            raise

    async def start_async(self) -> Self:
        """As `start`, without blocking the running loop, which an ``async`` backend is served by.

        Cancelling it takes down what has come up.

        >>> import asyncio, ublk
        >>> async def main():
        ...     dev = await ublk.Device(ublk.Mem("1MiB")).start_async()
        ...     await dev.stop_async()
        >>> asyncio.run(main())
        """
        self._begin()
        try:
            if self._courier is not None:
                self._courier.attach(asyncio.get_running_loop())
            return await in_thread(self._bring_up, self._starting.cancel)
        except BaseException:
            # Cancelled, for instance, when the device had come up.
            await in_thread(self._give_up)
            raise

    def _begin(self) -> None:
        self._check_process()
        _log.ensure_thread()
        before = None
        try:
            with self._lock:
                if self._phase not in {"new", "halted"}:
                    raise StateError(f"the device{self._which()} was started before: make a new one")
                before, self._phase = self._phase, "starting"
            if self._halted is not None and self._described is not None:
                # Another life: with workers, threads and a loop of its own.
                self._starting = _native.Token()
                self._courier = None
                self._describe(*self._described)
        except BaseException:
            # Ctrl-C comes between any two calls: it was not begun.
            if before is not None:
                self._phase = before
            raise

    def _bring_up(self) -> Self:
        # First: from the moment that it has a device, the program's end finds it.
        _live.add(self)
        native = self._native = self._launch()
        self._place = (native.id, native.path)
        self._halted = None
        self._phase = "live"
        for warning in native.warnings:
            _logger.warning("%s: %s", native.path, warning)
        return self

    def _give_up(self) -> None:
        """After a start that failed, or that an exception came between. Where no signal's handler runs."""
        if self._halted is not None and self._halted.is_there():
            # What was described does not fit the device, which waits for another start.
            self._phase = "halted"
            self._end_loop()
            return
        self._halted = None
        if self._native is None:
            # Should there be a device whose handle was lost with the exception, the handle's end stops it.
            self._phase, self._described = "stopped", None
            _live.discard(self)
            _native.await_lost()
            self._end_loop()
            return
        try:
            # Nobody knows of its disk yet: what the kernel asks of it is not waited for.
            self._stop(0, force=True)
        except Exception:
            _logger.exception("%r: it was not stopped after a start that failed", self)

    def _launch(self) -> _native.Device:
        if self._halted is not None:
            return self._halted.start(self._spec, self._starting)
        return self._spec.start(self._starting)

    def stop(self, timeout: float = 30.0) -> None:
        """Stops the disk when nobody uses it, and deletes the device: when this returns, its nodes are gone.

        Opens that are short, like udev's, are waited for. Requests that the backend does not answer within
        ``timeout`` seconds fail with EIO. Calling it again does nothing.

        Raises:
            TimeoutError: The disk is in use; the message and the attribute ``holders`` say by whom. It goes on.
            StateError: The caller is a method of the backend, or the loop that serves it.
            BaseException: What a method of the backend raised that is no `Exception`, unless `wait` has raised it.
            KeyboardInterrupt: Ctrl-C has the deadline come at once: a disk that is in use goes on, any other is
                stopped and deleted first. The same for whatever the handler of a signal raises.

        >>> import ublk
        >>> dev = ublk.Device(ublk.Null(), size="1GiB").start()
        >>> dev.stop(timeout=10)
        >>> dev.stop()
        """
        self._check_loop("stop")
        self._stop(timeout, force=False)

    def stop_force(self, timeout: float = 30.0) -> None:
        """As `stop`, whoever uses the disk: it is pulled from under them. A file system on it loses what it has not
        written.

        >>> import ublk
        >>> dev = ublk.Device(ublk.Mem("1MiB")).start()
        >>> with open(dev.path, "rb") as disk:
        ...     dev.stop_force(5)
        """  # noqa: D205
        self._check_loop("stop_force")
        self._stop(timeout, force=True)

    async def stop_async(self, timeout: float = 30.0) -> None:
        """As `stop`, without blocking the running loop.

        Cancelling it has the deadline come at once: a disk that is in use goes on, any other is stopped.

        >>> import asyncio, ublk
        >>> async def main():
        ...     async with ublk.Device(ublk.Mem("1MiB")) as dev:
        ...         await dev.stop_async()
        >>> asyncio.run(main())
        """
        self._check_task("stop the device")
        token = _native.Token()
        await in_thread(lambda: self._stop(timeout, force=False, token=token), token.cancel)

    async def stop_force_async(self, timeout: float = 30.0) -> None:
        """As `stop_force`, without blocking the running loop.

        >>> import asyncio, ublk
        >>> async def main():
        ...     async with ublk.Device(ublk.Mem("1MiB")) as dev:
        ...         await dev.stop_force_async()
        >>> asyncio.run(main())
        """
        self._check_task("stop the device")
        token = _native.Token()
        await in_thread(lambda: self._stop(timeout, force=True, token=token), token.cancel)

    def _stop(self, timeout: float, *, force: bool, token: _native.Token | None = None) -> None:
        self._check_process()
        native = self._native
        if native is None:
            with self._lock:
                if self._phase == "starting":
                    raise StateError("the device is being started by another thread: stop it when it has come up")
                self._phase, self._described = "stopped", None
                halted, self._halted = self._halted, None
            if halted is not None:
                _live.discard(self)
                halted.delete()
            return
        leftovers: list[str] = []
        try:
            leftovers = native.stop(timeout, force, token)
        finally:
            # A stop that a signal interrupts comes to its end all the same, unless the disk is in use. Whatever a
            # signal's handler raises, it raises after one of these two calls.
            ended = _native.shielded(self._settle, native)
        for leftover in leftovers:
            _logger.warning("%s: %s", native.path, leftover)
        self._tell_end(native, ended=ended)

    def _settle(self, native: _native.Device, halted: _native.Halted | None = None) -> bool:
        """Takes note of the device's end, if it has ended. False if its loop goes on all the same.

        Half of this would be a loop that nobody ends: call it shielded.
        """
        if not native.has_ended():
            return True
        with self._lock:
            if self._native is None:
                return True
            self._last_stats, self._size = stats_of(native.stats()), native.size
            self._native = None
            self._halted = halted
            self._phase = "stopped" if halted is None else "halted"
        if halted is None:
            _live.discard(self)
            # A backend that nobody else has ends here, its files with it.
            self._described = self._ready_made = None
        return self._courier is None or self._courier.end(_FORCE_WITHIN)

    def _tell_end(self, native: _native.Device, *, ended: bool) -> None:
        if not ended:
            _logger.warning("%r: its event loop does not end", self)
        fatal = native.take_fatal()
        if fatal is not None:
            raise fatal

    def _end_loop(self) -> None:
        if self._courier is not None and not self._courier.end(_FORCE_WITHIN):
            _logger.warning("%r: its event loop does not end", self)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the device has ended, by whomever, and says whether it has.

        Signals are handled meanwhile: Ctrl-C raises KeyboardInterrupt here.

        Args:
            timeout: Seconds; None waits for ever.

        Raises:
            OSError: What took it down, if it failed.
            StateError: It was not started; or the caller is a method of the backend, or the loop that serves it.
            BaseException: What a method of the backend raised that is no `Exception`.

        >>> import ublk
        >>> with ublk.Device(ublk.Null(), size="1GiB") as dev:
        ...     dev.wait(timeout=0.01)
        False
        """
        self._check_loop("wait")
        native = self._started()
        if native is None:
            return True
        native.check_caller("wait for the device")
        poll = select.poll()
        poll.register(native.ended_fd(), select.POLLIN)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = -1 if end is None else max(0.0, end - time.monotonic()) * 1000
            if poll.poll(left):
                return self._ended(native)
            if end is not None and time.monotonic() >= end:
                return False

    async def wait_async(self) -> None:
        """As `wait`, without blocking the running loop. Cancelling it leaves the device as it is.

        >>> import asyncio, ublk
        >>> async def main():
        ...     async with ublk.Device(ublk.Mem("1MiB")) as dev:
        ...         with contextlib.suppress(TimeoutError):
        ...             await asyncio.wait_for(dev.wait_async(), 0.01)
        >>> asyncio.run(main())
        """
        native = self._started()
        if native is None:
            return
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        # Another descriptor of it: two waits of one loop must not take each other's.
        fd = os.dup(native.ended_fd())
        try:
            loop.add_reader(fd, settle, ended)
            await ended
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        self._ended(native)

    def _ended(self, native: _native.Device) -> bool:
        fatal = native.take_fatal()
        if fatal is not None:
            raise fatal
        native.ending()
        return True

    def describe(self, backend: AnyBackend, **options: Any) -> None:  # noqa: ANN401  # as of the constructor
        """Has a device that is halted become another at its next start: another backend, another size, other limits.

        What the driver settled when it was added stays, whatever is said of it here: the number, the queues, their
        depth, ``max_io_size``, the features and the fingerprint.

        Args:
            backend: As of the constructor.
            options: As of the constructor.

        Raises:
            StateError: It is not halted.
            TypeError, ValueError: As of the constructor.

        >>> import ublk
        >>> try:
        ...     ublk.Device(ublk.Null(), size="1GiB").describe(ublk.Mem("1MiB"))
        ... except ublk.StateError as error:
        ...     print(error)
        cannot describe the device anew: it is new, not halted
        """
        other = Device(backend, **options)
        with self._lock:
            if self._halted is None:
                raise StateError(f"cannot describe the device{self._which()} anew: it is {self._phase}, not halted")
            self._described, self._size, self._stop_timeout = other._described, other._size, other._stop_timeout

    # Python's own.

    def __enter__(self) -> Self:
        return self if self._phase == "live" else self.start()

    async def __aenter__(self) -> Self:
        return self if self._phase == "live" else await self.start_async()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        token = _native.Token()
        await in_thread(lambda: self._leave(error, token), token.cancel)

    def _leave(self, error: BaseException | None, token: _native.Token, loop: object = None) -> None:
        """Politely first, then by force: nothing is left behind. On a thread that no signal's handler runs on.

        With a caller's loop it refuses to block that, if it serves the device.
        """
        if self._courier is not None and self._courier.is_serving(loop):
            raise StateError(
                f"leaving `with` would block the event loop that serves the device{self._which()}: use `async with`"
            )
        native = self._native
        try:
            self._stop(self._stop_timeout, force=False, token=token)
        except TimeoutError as held:
            if not token.cancelled():
                _logger.warning("%s; it is taken from them", held)
            self._stop(_FORCE_WITHIN, force=True)
            if error is None:
                raise
        except BaseException as fatal:
            # The device's own end, told.
            if self._native is not None and self._native is native:
                self._stop(_FORCE_WITHIN, force=True)
            if fatal is not error:
                raise

    def __del__(self) -> None:
        native, halted = getattr(self, "_native", None), getattr(self, "_halted", None)
        if (native is None and halted is None) or self._pid != os.getpid():
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        # A device without a disk is deleted with its object.
        if native is not None:
            native.abandon(self._courier.dismiss if self._courier is not None else None)

    def __repr__(self) -> str:
        if self._place is None:
            return "<ublk.Device: not started>"
        return f"<ublk.Device {self._place[1]}: {self._phase}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Device cannot be pickled: it belongs to the process that serves it")


def _stop_all() -> None:
    """At the program's end."""
    for device in list(_live):
        # Nothing that one of them raises, not even a handler's KeyboardInterrupt, keeps the others from their end.
        with contextlib.suppress(BaseException):
            device._stop(_FORCE_WITHIN, force=True)  # noqa: SLF001
    _native.finish_endings()


def _forked() -> None:
    _live.clear()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_forked)
