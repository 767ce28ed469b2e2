"""Memory that a disk's clients share with its server."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from typing import Any

import ublk
from tests.py_guest.disks import BLOCK, MIB, Ram, has, needs, opened, raised, usable_paths

F_ADD_SEALS, F_SEAL_SHRINK = 1033, 0x0002


class Counts:
    """A raw ramdisk that counts the requests whose data was not copied."""

    def __init__(self, size: int = MIB) -> None:
        self.size = size
        self.data = bytearray(size)
        self.shared = 0
        self.all = 0

    def handle(self, request: ublk.Request) -> None:
        """Serves it."""
        self.all += 1
        self.shared += request.shared
        start, end = request.offset, request.offset + request.length
        if request.op == "read":
            assert request.buffer is not None
            request.buffer[:] = self.data[start:end]
        elif request.op == "write":
            assert request.buffer is not None
            self.data[start:end] = request.buffer
        request.complete()


def _exercise(device: ublk.Device, buffer: ublk.SharedBuffer) -> None:
    """Six requests from and to the memory."""
    with mmap.mmap(buffer.fileno(), buffer.size) as memory, opened(device.path) as fd:
        view = memoryview(memory)
        for turn, (at, length, offset) in enumerate(
            ((0, BLOCK, 0), (BLOCK, 4 * BLOCK, MIB // 2), (MIB // 2, MIB // 4, 0))
        ):
            data = os.urandom(length)
            view[at : at + length] = data
            assert os.pwritev(fd, [view[at : at + length]], offset) == length
            view[at : at + length] = bytes(length)
            assert os.preadv(fd, [view[at : at + length]], offset) == length
            assert view[at : at + length] == data, turn
            # Just that: its neighbours are as they were.
            assert not any(view[at + length : at + length + BLOCK])
            view[at : at + length] = bytes(length)
        view.release()


def test_clients_data_is_used_where_it_is_by_every_backend() -> None:
    if not has("SHMEM_ZC"):
        raised(OSError, ublk.Device(Ram(), require=["SHMEM_ZC"]).start, "SHMEM_ZC", "7.1")
        return
    buffer = ublk.SharedBuffer("1MiB")
    assert (buffer.size, "1048576" in repr(buffer)) == (MIB, True)
    for path in usable_paths():
        if path == "need-get-data":
            raised(
                ValueError, lambda: ublk.Device(Ram(), data_path="need-get-data", require=["SHMEM_ZC"]), "SHMEM_ZC"
            )
            continue
        raw = Counts()
        with ublk.Device(raw, data_path=path, require=["SHMEM_ZC"], max_io_size=MIB) as device:
            _exercise(device, buffer)
            assert raw.shared == 0
            number = device.share(buffer)
            _exercise(device, buffer)
            assert raw.shared == 6, path
            error = raised(OSError, lambda device=device: device.share(buffer))
            assert isinstance(error, OSError)
            assert error.errno == errno.EEXIST
            device.unshare(number)
            _exercise(device, buffer)
            assert raw.shared == 6, path
            error = raised(OSError, lambda device=device, number=number: device.unshare(number))
            assert isinstance(error, OSError)
            assert error.errno == errno.ENOENT
    for backend in (Ram(), ublk.Mem(MIB), ublk.Null()):
        with ublk.Device(backend, size=MIB, require=["SHMEM_ZC"]) as device:
            device.share(buffer)
            if not isinstance(backend, ublk.Null):
                _exercise(device, buffer)


def test_what_cannot_be_shared_is_refused() -> None:
    for wrong in (1, 5000, "8GiB", 0):
        raised(ValueError, lambda wrong=wrong: ublk.SharedBuffer(wrong))
    fd = os.memfd_create("plain", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    raised(ValueError, lambda: ublk.SharedBuffer.from_fd(fd), "sealed")
    raised(ValueError, lambda: ublk.SharedBuffer.from_fd(-1), "fd=-1")
    raised(OSError, lambda: ublk.SharedBuffer.from_fd(1 << 20))
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    theirs = ublk.SharedBuffer.from_fd(fd)
    os.close(fd)
    assert theirs.size == MIB
    with ublk.Device(Ram()) as device:
        raised(OSError, lambda: device.share(theirs), "SHMEM_ZC")
    raised(ublk.StateError, lambda: device.share(theirs))
    raised(ublk.StateError, lambda: device.unshare(0))
    needs("SHMEM_ZC")
    said: list[Any] = []

    class Shares(Ram):
        device: ublk.Device | None = None

        def pread(self, buf: memoryview, offset: int) -> None:
            if self.device is not None:
                try:
                    self.device.share(theirs)
                except ublk.StateError as error:
                    said.append(error)
            super().pread(buf, offset)

    backend = Shares()
    with ublk.Device(backend, require=["SHMEM_ZC"]) as device:
        backend.device = device
        with opened(device.path) as disk:
            reader = threading.Thread(target=os.preadv, args=(disk, [mmap.mmap(-1, BLOCK)], 0))
            reader.start()
            reader.join()
        backend.device = None
        assert said
        device.share(theirs)
        _exercise(device, theirs)
