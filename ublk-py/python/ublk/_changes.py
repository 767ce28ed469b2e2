"""What is done with a device that is live: it is handed over, halted or resized, and its memory shared."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, SupportsIndex

from ublk import _native
from ublk._backend import READY_MADE
from ublk._blocking import in_thread
from ublk._native import StateError
from ublk._size import parse_size
from ublk._told import Told

if TYPE_CHECKING:
    from ublk._aio import Courier
    from ublk._native import SharedBuffer

__all__ = ["Changes"]

_logger = logging.getLogger("ublk")


def _left(_nothing: object) -> None:
    """Of a call that nobody waits for any more there is nothing to be taken back."""


class Changes(Told):
    """The part of a `Device` that changes it."""

    _courier: Courier | None
    _ready_made: object

    if TYPE_CHECKING:

        def _settle(self, native: _native.Device, halted: _native.Halted | None = None) -> bool: ...
        def _tell_end(self, native: _native.Device, *, ended: bool) -> None: ...

    def hand_over(self, timeout: float = 30.0) -> None:
        """Gives the disk to the next server, which takes it over by `recover`: under its users, a mounted file system
        for instance, and without a failed request. Takes ``recovery="wait"`` or ``"reissue"``, and Linux 6.16.

        Memory that is shared with clients is shared no more, so that the next server can do that. That may have
        happened also if the handover then fails: clients' data is copied until it is shared again.

        Raises:
            OSError: The device or the kernel cannot do that; a note says what is missing.
            TimeoutError: The backend did not answer in time what it had; the message says whether the device goes on.
            StateError: It is not live; or the caller is a method of the backend, or the loop that serves it.
            KeyboardInterrupt: Ctrl-C. The handover comes to its end by itself, since the kernel takes none back.

        >>> import ublk
        >>> mem = ublk.Mem("1MiB")
        >>> if "QUIESCE" in (ublk.features() or ()):
        ...     dev = ublk.Device(mem, recovery="wait").start()
        ...     dev.hand_over()
        ...     ublk.recover(dev.id, mem).stop()
        """  # noqa: D205
        self._check_loop("hand_over")
        native = self._require_live("hand the device over")
        try:
            native.hand_over(timeout)
        finally:
            # Also interrupted, or the backend did not answer, when it had gone already.
            ended = _native.shielded(self._settle, native)
        self._tell_end(native, ended=ended)

    async def hand_over_async(self, timeout: float = 30.0) -> None:
        """As `hand_over`, without blocking the running loop.

        Cancelling it waits for its end, since the kernel takes no handover back.

        >>> import asyncio, ublk
        >>> async def main():
        ...     mem = ublk.Mem("1MiB")
        ...     dev = await ublk.Device(mem, recovery="wait").start_async()
        ...     if "QUIESCE" in (ublk.features() or ()):
        ...         await dev.hand_over_async()
        ...         dev = await asyncio.to_thread(ublk.recover, dev.id, mem)
        ...     await dev.stop_async()
        >>> asyncio.run(main())
        """
        self._check_task("hand the device over")
        await in_thread(lambda: self.hand_over(timeout))

    def halt(self, timeout: float = 30.0) -> None:
        """Takes the disk away when nobody uses it, as `stop` does, and keeps the device: `start` brings it up again,
        with the same number, features and fingerprint, and as it is described by then (`describe`). Its counters
        begin at zero again. ``stop`` deletes it. Linux 7.3.

        Raises:
            TimeoutError: The disk is in use; as of `stop`. It goes on.
            OSError: The kernel's driver starts no device a second time; the disk goes on.
            StateError: It is not live; or the caller is a method of the backend, or the loop that serves it.
            KeyboardInterrupt: Ctrl-C has the deadline come at once, as of `stop`.

        >>> import ublk
        >>> with ublk.Device(ublk.Mem("1MiB")) as dev:
        ...     if "IO_DESC_SIZE" in (ublk.features() or ()):
        ...         dev.halt()
        ...         dev.describe(ublk.Mem("2MiB"))
        ...         assert dev.start().size == 2 << 20
        """  # noqa: D205
        self._check_loop("halt")
        self._halt(timeout, None)

    async def halt_async(self, timeout: float = 30.0) -> None:
        """As `halt`, without blocking the running loop; `start_async` brings the disk up again.

        Cancelling it has the deadline come at once: a disk that is in use goes on, any other is halted.

        >>> import asyncio, ublk
        >>> async def main():
        ...     async with ublk.Device(ublk.Mem("1MiB")) as dev:
        ...         if "IO_DESC_SIZE" in (ublk.features() or ()):
        ...             await dev.halt_async()
        ...             await dev.start_async()
        >>> asyncio.run(main())
        """
        self._check_task("halt the device")
        token = _native.Token()
        await in_thread(lambda: self._halt(timeout, token), token.cancel)

    def _halt(self, timeout: float, token: _native.Token | None) -> None:
        native = self._require_live("halt the device")
        halted: _native.Halted | None = None
        try:
            halted = native.halt(timeout, token)
        finally:
            # Without one if it was stuck, failed, or interrupted at the last moment: stopped and deleted.
            ended = _native.shielded(self._settle, native, halted)
            if halted is None:
                _native.await_lost()
        self._tell_end(native, ended=ended)

    def resize(self, size: SupportsIndex | str) -> None:
        """Gives the disk another size, which its users see at once. A file system has to be told (``resize2fs``),
        before the disk shrinks and after it has grown. Linux 6.16.

        The backend has to serve the larger of the two sizes by then; one in Python sees to that itself. `Mem` has the
        size that it was made with; `File` and `Stripe` have what their files have, so let those grow before.
        Requests beyond the end of a disk that shrank may still be on their way to the backend.

        Raises:
            ValueError: It is no size, or not a multiple of the logical block size; or a ready-made backend has less.
            OSError: The kernel cannot do that, or the disk is zoned.
            TimeoutError: The driver has not answered for 30 seconds, while the device is being stopped, for instance.
            StateError: The device is not live; or the caller is a method of the backend, or the loop that serves it.
            KeyboardInterrupt: Ctrl-C. The disk may get the size all the same, as `size` tells.

        >>> import ublk
        >>> if "UPDATE_SIZE" in (ublk.features() or ()):
        ...     with ublk.Device(ublk.Mem("2MiB")) as dev:
        ...         dev.resize("1MiB")
        ...         assert dev.size == 1 << 20
        ...         dev.resize("2MiB")
        """  # noqa: D205
        self._check_loop("resize")
        self._resize(size)

    async def resize_async(self, size: SupportsIndex | str) -> None:
        """As `resize`, without blocking the running loop.

        Cancelling it does not wait, and the disk may get the size all the same.

        >>> import asyncio, ublk
        >>> async def main():
        ...     async with ublk.Device(ublk.Mem("2MiB")) as dev:
        ...         if "UPDATE_SIZE" in (ublk.features() or ()):
        ...             await dev.resize_async("1MiB")
        >>> asyncio.run(main())
        """
        await in_thread(lambda: self._resize(size), left=_left)

    def _resize(self, size: SupportsIndex | str) -> None:
        native = self._require_live("resize the device")
        count, backend = parse_size(size), self._ready_made
        if isinstance(backend, READY_MADE):
            room = _native.room(backend)
            if room is not None and count > room:
                raise ValueError(
                    f"cannot resize the device{self._which()} to {count} bytes: its backend, {backend!r}, has {room}"
                )
        native.resize(count)

    def share(self, buffer: SharedBuffer) -> int:
        """Has the data of clients' direct I/O from and to this memory used where it is, without a copy by the driver,
        and returns the buffer's number with this device. Takes ``require=["SHMEM_ZC"]``, and Linux 7.1.

        The memory stays locked until `unshare` or the end of the device. This waits for the requests that are out,
        and then the disk stands still for a moment; all other I/O goes on as before. What a client writes to the
        memory while a request is in progress, ready-made backends see as it comes; Python ones get a copy.

        `hand_over` and `halt` end it. The driver keeps what a killed server has shared; to the one that recovers the
        disk requests in it are like others, and it can share the memory again once it has called `unshare` with the
        number that the former one was told.

        Raises:
            OSError: The device has not the feature; a part of the memory is shared already (EEXIST).
            TimeoutError: The backend has not answered within 30 seconds the requests that it had, or the driver a
                former `share` or `unshare`.
            StateError: The device is not live; or the caller is a method of the backend, or the loop that serves it;
                the buffer was made before a fork, by the parent process.
            KeyboardInterrupt: Ctrl-C, at once. What is shared all the same is taken back.

        >>> import mmap, os, ublk
        >>> if "SHMEM_ZC" in (ublk.features() or ()):
        ...     buffer = ublk.SharedBuffer("1MiB")
        ...     with ublk.Device(ublk.Mem("1MiB"), require=["SHMEM_ZC"]) as dev:
        ...         number = dev.share(buffer)
        ...         with mmap.mmap(buffer.fileno(), buffer.size) as memory:
        ...             disk = os.open(dev.path, os.O_RDWR | os.O_DIRECT)
        ...             assert os.preadv(disk, [memory], 0) == 1 << 20
        ...             os.close(disk)
        ...         dev.unshare(number)
        """  # noqa: D205
        self._check_loop("share")
        return self._require_live("share memory").share(buffer)

    async def share_async(self, buffer: SharedBuffer) -> int:
        """As `share`, without blocking the running loop.

        Cancelling it does not wait; what is shared all the same is taken back.

        >>> import asyncio, ublk
        >>> async def main():
        ...     async with ublk.Device(ublk.Mem("1MiB"), prefer=["SHMEM_ZC"]) as dev:
        ...         if "SHMEM_ZC" in dev.features:
        ...             await dev.unshare_async(await dev.share_async(ublk.SharedBuffer("1MiB")))
        >>> asyncio.run(main())
        """
        self._check_task("share memory")
        native = self._require_live("share memory")
        return await in_thread(lambda: native.share(buffer), left=self._take_back)

    def _take_back(self, number: int) -> None:
        try:
            self.unshare(number)
        except (OSError, StateError) as error:
            # Its end is that of what it shares.
            if self._phase == "live":
                _logger.warning("%s: memory that nobody knows of stays shared: %s", self.path, error)

    def unshare(self, number: int) -> None:
        """Ends the sharing of the buffer with this number, which may be one that a former server was told. It waits
        for the requests that are out, and then the disk stands still for a moment.

        Raises:
            OSError: There is none (ENOENT).
            TimeoutError: As of `share`.
            StateError: As of `share`.
            KeyboardInterrupt: Ctrl-C, at once. It ends all the same, if the requests are answered in time.

        >>> import ublk
        >>> if "SHMEM_ZC" in (ublk.features() or ()):
        ...     with ublk.Device(ublk.Mem("1MiB"), require=["SHMEM_ZC"]) as dev:
        ...         dev.unshare(dev.share(ublk.SharedBuffer("1MiB")))
        """  # noqa: D205
        self._check_loop("unshare")
        self._require_live("end the sharing of memory").unshare(number)

    async def unshare_async(self, number: int) -> None:
        """As `unshare`, without blocking the running loop.

        Cancelling it does not wait; it ends all the same, if the requests are answered in time.

        >>> import asyncio, ublk
        >>> async def main():
        ...     async with ublk.Device(ublk.Mem("1MiB"), prefer=["SHMEM_ZC"]) as dev:
        ...         if "SHMEM_ZC" in dev.features:
        ...             await dev.unshare_async(await dev.share_async(ublk.SharedBuffer("1MiB")))
        >>> asyncio.run(main())
        """
        self._check_task("end the sharing of memory")
        native = self._require_live("end the sharing of memory")
        await in_thread(lambda: native.unshare(number), left=_left)

    def _check_loop(self, what: str) -> None:
        """Refuses to block the loop that serves the device."""
        if self._courier is not None and self._courier.is_serving_thread():
            raise StateError(
                f"{what}() would block the event loop that serves the device{self._which()}: await {what}_async()"
            )

    def _check_task(self, what: str) -> None:
        """Refuses to wait for the request that the caller serves."""
        if self._courier is not None and self._courier.is_serving_task(asyncio.current_task()):
            raise StateError(
                f"cannot {what}{self._which()}: the caller is a method of its backend, and would wait for itself"
            )
