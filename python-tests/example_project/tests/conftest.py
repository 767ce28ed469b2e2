"""A disk for the tests that ask for one. All of this runs inside the guest, as root."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import ublk

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 64 << 20


class RamDisk:
    """The disk of the README."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def pread(self, buf: memoryview, offset: int) -> None:
        """Fill `buf` from `offset` on."""
        buf[:] = self.data[offset : offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int) -> None:
        """Keep `buf` at `offset`."""
        self.data[offset : offset + len(buf)] = buf

    def flush(self) -> None:
        """Memory has nothing to flush."""


@pytest.fixture
def disk() -> Iterator[ublk.Device]:
    """A disk for one test; a test that leaves one behind fails."""
    with ublk.Device(RamDisk(SIZE), size=SIZE) as device:
        yield device
