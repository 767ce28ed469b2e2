"""What a device says of itself, before, during and after its life."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from ublk._native import StateError
from ublk._types import DeviceInfo, Stats, info_of, stats_of

if TYPE_CHECKING:
    from ublk import _native


class Told:
    """The part of a `Device` that is looked at."""

    _size: int

    def __init__(self) -> None:
        self._native: _native.Device | None = None
        self._phase: Literal["new", "starting", "live", "halted", "stopped"] = "new"
        self._place: tuple[int, str] | None = None
        self._last_stats = Stats()
        self._pid = os.getpid()

    @property
    def id(self) -> int:
        """The device's number, also after its end.

        Raises:
            StateError: It was not started.

        >>> import ublk
        >>> with ublk.Device(ublk.Null(), size="1GiB") as dev:
        ...     dev.id >= 0
        True
        """
        return self._where()[0]

    @property
    def path(self) -> str:
        """The disk's node, ``/dev/ublkbN``, also after its end.

        Raises:
            StateError: It was not started.

        >>> import ublk
        >>> with ublk.Device(ublk.Null(), size="1GiB") as dev:
        ...     dev.path.startswith("/dev/ublkb")
        True
        """
        return self._where()[1]

    def _where(self) -> tuple[int, str]:
        if self._place is None:
            raise StateError("the device has no number yet: it was not started")
        return self._place

    @property
    def size(self) -> int:
        """Bytes of the disk.

        >>> import ublk
        >>> ublk.Device(ublk.Null(), size="1KiB").size
        1024
        """
        native = self._native
        return native.size if native is not None else self._size

    @property
    def state(self) -> str:
        """Where it is in its life: ``"new"``, ``"live"``, ``"quiesced"``, ``"fail-io"`` (by the driver's word),
        ``"dead"``, ``"halted"`` or ``"stopped"``.

        >>> import ublk
        >>> ublk.Device(ublk.Null(), size="1KiB").state
        'new'
        """  # noqa: D205
        native = self._native
        return native.state() if native is not None else self._phase

    @property
    def features(self) -> frozenset[str]:
        """The features that the driver granted; empty unless it is live.

        >>> import ublk
        >>> with ublk.Device(ublk.Null(), size="1GiB") as dev:
        ...     "CMD_IOCTL_ENCODE" in dev.features
        True
        """
        return frozenset(self._native.features) if self._native is not None else frozenset()

    @property
    def data_path(self) -> str:
        """How the data moves; never ``"auto"``.

        Raises:
            StateError: It is not live.

        >>> import ublk
        >>> with ublk.Device(ublk.Mem("1MiB")) as dev:
        ...     dev.data_path
        'copy'
        """
        return self._require_live("say how data moves").data_path

    @property
    def info(self) -> DeviceInfo:
        """The device as the driver described it.

        Raises:
            StateError: It is not live.

        >>> import ublk
        >>> with ublk.Device(ublk.Mem("1MiB"), depth=16) as dev:
        ...     dev.info.depth
        16
        """
        raw = self._require_live("describe the device").info()
        raw.pop("block_size")
        return info_of({**raw, "state": "live"})

    @property
    def warnings(self) -> list[str]:
        """What is not as it should be, though the disk works: a privilege that is missing, for instance.

        >>> import ublk
        >>> ublk.Device(ublk.Null(), size="1KiB").warnings
        []
        """
        return list(self._native.warnings) if self._native is not None else []

    def stats(self) -> Stats:
        """What it has counted since its start; the last word after its end.

        >>> import ublk
        >>> with ublk.Device(ublk.Mem("1MiB")) as dev:
        ...     with open(dev.path, "rb", buffering=0) as disk:
        ...         _ = disk.read(4096)
        ...     dev.stats().total.read.bytes >= 4096
        True
        """
        native = self._native
        return stats_of(native.stats()) if native is not None else self._last_stats

    def _which(self) -> str:
        """Its number, for the message of an error."""
        return "" if self._place is None else f" (device {self._place[0]})"

    def _started(self) -> _native.Device | None:
        self._check_process()
        if self._native is None and self._phase in {"new", "starting"}:
            raise StateError("the device was not started")
        return self._native

    def _require_live(self, what: str) -> _native.Device:
        self._check_process()
        if self._native is None:
            raise StateError(f"cannot {what}{self._which()}: it is {self._phase}, not live")
        return self._native

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise StateError(f"the device{self._which()} belongs to the process that this one was forked from")
