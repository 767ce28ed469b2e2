"""The machine's devices, and what its driver can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ublk import _native
from ublk._types import DeviceInfo, info_of

if TYPE_CHECKING:
    import builtins

__all__ = ["delete", "features", "list", "quiesce"]


def list() -> builtins.list[DeviceInfo]:  # noqa: A001
    """Every device of this machine that the caller may ask about, by ascending number, whoever serves it.

    Raises:
        FileNotFoundError: The driver is not loaded.
        PermissionError: The caller may ask about none of them.

    >>> import ublk
    >>> with ublk.Device(ublk.Mem("1MiB")) as dev:
    ...     dev.id in [info.id for info in ublk.list()]
    True
    """
    return [info_of(raw) for raw in _native.list_devices()]


def delete(id: int, timeout: float = 30.0) -> None:  # noqa: A002
    """Stops a device, whoever made it, and deletes it: also one whose server is gone. Its disk is pulled from
    under its users.

    Args:
        id: The device's number.
        timeout: Seconds to wait.

    Raises:
        FileNotFoundError: There is no such device.
        TimeoutError: Its server does not answer, or somebody has it open; the message says who.

    >>> import ublk
    >>> dev = ublk.Device(ublk.Mem("1MiB"), recovery="wait").start()
    >>> ublk.delete(dev.id)
    >>> dev.wait(10)
    True
    >>> dev.stop()
    """  # noqa: D205
    _native.delete(id, timeout)


def quiesce(id: int, timeout: float = 30.0) -> None:  # noqa: A002
    """Takes a live disk from its server, whoever that is, for another one to `recover`: new requests wait until then.
    A server that is to give it away by itself has `Device.hand_over`. Linux 6.16.

    The server's device ends as if it had been stopped by others. Requests that it has are waited for.

    Args:
        id: The device's number.
        timeout: Seconds to wait.

    Raises:
        FileNotFoundError: There is no such device.
        StateError: It has no disk: its server is gone, or somebody stopped it meanwhile.
        OSError: It was made without ``recovery``, with ``recovery="fail"`` and without ``require=["QUIESCE"]``, with
            ``BATCH_IO``, or by an older kernel.
        TimeoutError: Its server has not let go of it. The disk's new requests wait all the same, until it has.

    >>> import ublk
    >>> mem = ublk.Mem("1MiB")
    >>> if "QUIESCE" in (ublk.features() or ()):
    ...     dev = ublk.Device(mem, recovery="wait").start()
    ...     ublk.quiesce(dev.id)
    ...     assert dev.wait(10)
    ...     dev.stop()
    ...     ublk.recover(dev.id, mem).stop()
    """  # noqa: D205
    _native.quiesce(id, timeout)


def features() -> frozenset[str] | None:
    """Names of the features that the kernel's driver offers (``UBLK_F_*``); None if it cannot say (before Linux 6.5).

    Raises:
        FileNotFoundError: The driver is not loaded.
        PermissionError: The caller may not open ``/dev/ublk-control``.

    >>> import ublk
    >>> "USER_RECOVERY" in ublk.features()
    True
    """
    offered = _native.features()
    return None if offered is None else frozenset(offered)
