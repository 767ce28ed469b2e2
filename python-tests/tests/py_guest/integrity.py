"""Integrity metadata: made by the kernel, kept by backends, and found out by the kernel where it does not fit."""

from __future__ import annotations

import errno
from pathlib import Path

import ublk
from tests.py_guest.disks import BLOCK, MIB, error_of, has, needs, opened, raised, read_at, write_at

PROTECTED = ublk.Integrity.protection()
FAR = MIB // 2


class Keeper:
    """Data, and 8 bytes of metadata for each 512 of it."""

    size = MIB

    def __init__(self) -> None:
        self.data = bytearray(MIB)
        self.metadata = bytearray(b"\xff" * PROTECTED.metadata_bytes(MIB))
        self.seen: list[tuple[str, int, int]] = []
        self.refused: list[str] = []

    def handle(self, request: ublk.Request) -> None:
        span = slice(request.offset, request.offset + request.length)
        beside = slice(*(PROTECTED.metadata_bytes(at) for at in (span.start, span.stop)))
        self.seen.append((request.op, request.length, request.metadata_length))
        assert (request.metadata_length > 0) == (ublk.Flags.INTEGRITY in request.flags)
        match request.op:
            case "read":
                assert request.buffer is not None
                request.buffer[:] = self.data[span]
                self._refuse(request.read_metadata)
                if request.metadata_length:
                    self._refuse(lambda: request.put_metadata(bytes(request.metadata_length + 1)))
                    request.put_metadata(self.metadata[beside])
            case "write":
                assert request.buffer is not None
                self.data[span] = request.buffer
                self._refuse(lambda: request.put_metadata(bytes(request.metadata_length)))
                self.metadata[beside] = (
                    request.read_metadata() if request.metadata_length else b"\xff" * len(self.metadata[beside])
                )
        request.complete()
        if request.op == "read":
            error = raised(ublk.StateError, lambda: request.put_metadata(bytes(8)), "completed before")
            self.refused.append(str(error))

    def _refuse(self, call: object) -> None:
        assert callable(call)
        error = raised(OSError, call, "metadata")
        assert isinstance(error, OSError)
        assert error.errno == errno.EINVAL
        self.refused.append(str(error))


def test_a_backend_keeps_metadata_beside_its_data() -> None:
    needs("INTEGRITY")
    backend = Keeper()
    with ublk.Device(backend, integrity=PROTECTED) as device, opened(device.path) as fd:
        assert device.data_path == "user-copy"
        assert Path(f"/sys/block/ublkb{device.id}/integrity/format").read_text().strip() == "T10-DIF-TYPE1-CRC"
        write_at(fd, FAR, b"w" * BLOCK)
        assert ("write", BLOCK, 64) in backend.seen
        first = PROTECTED.metadata_bytes(FAR)
        for at in range(8):
            tuple_of = backend.metadata[first + 8 * at : first + 8 * at + 8]
            # One checksum, since the data is the same; and the number of the 512 bytes.
            assert tuple_of[:2] == backend.metadata[first : first + 2]
            assert int.from_bytes(tuple_of[4:], "big") == FAR // 512 + at
        assert read_at(fd, FAR) == b"w" * BLOCK
        assert ("read", BLOCK, 64) in backend.seen
        assert read_at(fd, 0) == bytes(BLOCK), "never written, not protected"
        for where, at in ((backend.data, FAR + 700), (backend.metadata, first + 7)):
            where[at] ^= 1
            assert error_of(lambda: read_at(fd, FAR)) == "EILSEQ"
            where[at] ^= 1
            assert error_of(lambda: read_at(fd, FAR)) is None
        assert len(backend.refused) >= 3
        assert device.stats().total.read.errors == 0, "they are the kernel's, and nobody tells the server"


def test_a_mem_keeps_metadata_and_shows_it() -> None:
    needs("INTEGRITY")
    for integrity in (PROTECTED, ublk.Integrity.protection("nvme"), ublk.Integrity(16, checksum="ip", pi_offset=8)):
        mem = ublk.Mem(MIB, integrity=integrity)
        with ublk.Device(mem) as device, opened(device.path) as fd:
            write_at(fd, FAR, b"m" * BLOCK)
            there = mem.read_metadata(integrity.metadata_bytes(BLOCK), FAR)
            assert set(there) != {0xFF}
            assert mem.read_metadata(integrity.metadata_size, 0) == b"\xff" * integrity.metadata_size
            mem.write_metadata(bytes(len(there)), FAR)
            assert error_of(lambda: read_at(fd, FAR)) == "EILSEQ"
            mem.write_metadata(there, FAR)
            assert read_at(fd, FAR) == b"m" * BLOCK
            mem.pwrite(b"x" * 512, FAR)
            assert error_of(lambda: read_at(fd, FAR)) == "EILSEQ"


def test_what_is_no_integrity_is_refused() -> None:
    raised(ValueError, lambda: ublk.Device(ublk.Mem(MIB), integrity=PROTECTED), "Mem has its own")
    raised(ValueError, lambda: ublk.Integrity.protection("md5"), "md5")
    raised(ValueError, lambda: ublk.Device(Keeper(), integrity=ublk.Integrity(8, checksum="crc")), "crc")
    raised(ValueError, lambda: ublk.Device(Keeper(), integrity=ublk.Integrity(0)), "metadata")
    raised(ValueError, lambda: ublk.Device(Keeper(), integrity=ublk.Integrity(256)), "metadata_size=256")
    raised(ValueError, lambda: ublk.Mem(MIB, integrity=ublk.Integrity(8, interval=-1)), "interval=-1")
    raised(TypeError, lambda: ublk.Device(Keeper(), integrity=8), "integrity")
    raised(ValueError, lambda: ublk.Device(Keeper(), require=["INTEGRITY"]), "integrity=")
    raised(ValueError, lambda: ublk.Fault(ublk.Mem(MIB, integrity=PROTECTED)), "passes no metadata on")
    for mem in (ublk.Mem(MIB), ublk.Mem(MIB, integrity=PROTECTED)):
        raised(OSError, lambda mem=mem: mem.read_metadata(1 << 40, 0))
        raised(OSError, lambda mem=mem: mem.read_metadata(8, MIB))
        raised(OSError, lambda mem=mem: mem.write_metadata(bytes(8), MIB))
    if not has("INTEGRITY"):
        error = raised(OSError, ublk.Device(Keeper(), integrity=PROTECTED).start, "INTEGRITY", "7.0")
        assert isinstance(error, OSError)
        assert error.errno == errno.EOPNOTSUPP
