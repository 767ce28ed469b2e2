"""Disks whose server is gone, taken over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ublk import _native
from ublk._device import Device

if TYPE_CHECKING:
    from ublk._backend import AnyBackend

__all__ = ["recover", "taken_over"]


class _Recovered(Device):
    """A device that another server had before."""

    def __init__(self, backend: AnyBackend, number: int, *, force: bool, **options: Any) -> None:  # noqa: ANN401
        self._number = number
        self._force = force
        super().__init__(backend, **options)

    def _launch(self) -> _native.Device:
        if self._halted is not None:
            # It is this process's by now.
            return super()._launch()
        return self._spec.recover(self._number, self._starting)


def recover(
    id: int,  # noqa: A002  # the field's own name
    backend: AnyBackend,
    *,
    force: bool = False,
    **options: Any,  # noqa: ANN401  # as of Device
) -> Device:
    """Takes over device ``id``, whose server is gone: one that was made with ``recovery``.

    The disk stays as it is: queues, depth and block sizes are the kernel's. The size, if it is given, and the
    ``fingerprint`` have to be the same, and the backend has to be able to do what the disk advertises.

    Args:
        id: The device's number.
        backend: As of `Device`.
        force: Take it over also if its fingerprint is another.
        options: As of `Device`: ``threads``, ``fingerprint``, ``start_timeout``, …

    Returns:
        The device, live.

    Raises:
        FileNotFoundError: There is no such device.
        OSError: Its server lives (EBUSY).
        StateError: It was made without ``recovery``.
        ValueError: It is not the device that is described here.

    >>> import ublk
    >>> try:
    ...     ublk.recover(99, ublk.Mem("1MiB"))
    ... except FileNotFoundError as error:
    ...     error.filename
    '/dev/ublkc99'
    """
    return taken_over(id, backend, force=force, **options).start()


def taken_over(number: int, backend: AnyBackend, *, force: bool = False, **options: Any) -> Device:  # noqa: ANN401
    """A device whose start takes over another one."""
    if "size" not in options and getattr(backend, "size", None) is None:
        options["size"] = _size_of(number)
    return _Recovered(backend, number, force=force, **options)


def _size_of(number: int) -> int:
    for raw in _native.list_devices():
        if raw["id"] == number and raw["size"]:
            return int(raw["size"])
    raise FileNotFoundError(2, f"cannot recover the device (device {number}): it has no disk", f"/dev/ublkb{number}")
