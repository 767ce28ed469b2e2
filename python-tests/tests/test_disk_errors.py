"""Backends that fail, panic, drop, delay and shorten: the client sees the right errno and the disk goes on."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from ublk_rig import testdisk
from ublk_rig.load import eventually

if TYPE_CHECKING:
    from ublk_vm.guest import Guest


# blk_errors[] of block/blk-core.c: what the block layer carries to an O_DIRECT client as it is.
CARRIED = [
    errno.EOPNOTSUPP,
    errno.ETIMEDOUT,
    errno.ENOSPC,
    errno.ENOLINK,
    errno.EREMOTEIO,
    errno.EBADE,
    errno.ENODATA,
    errno.EILSEQ,
    errno.ENOMEM,
    errno.EBUSY,
    errno.EAGAIN,
    errno.ENODEV,
    errno.EREMCHG,
    errno.ETOOMANYREFS,
    errno.EOVERFLOW,
    errno.ETIME,
    errno.EINVAL,
    errno.EIO,
]
OTHERS = [
    *(errno.EPERM, errno.ENOENT, errno.EINTR, errno.ENXIO, errno.E2BIG, errno.EBADF, errno.EACCES, errno.EFAULT),
    *(errno.EEXIST, errno.EXDEV, errno.EROFS, errno.EPIPE, errno.ERANGE, errno.ENOSYS, errno.ECANCELED, errno.ESTALE),
    *(errno.EDQUOT, errno.ECONNRESET, 4095),
]


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("op", ["read", "write"])
def test_errnos_arrive_as_the_block_layer_carries_them(guest: Guest, op: str) -> None:
    with testdisk.serving(guest, "target=test", "via=handler") as disks:
        numbers = CARRIED + OTHERS
        for i, number in enumerate(numbers):
            disks.arm("error", errno=number, op=op, **{"from": i * 4096, "to": (i + 1) * 4096})
        seen = disks.errnos(*(f"{op}:{i * 4096}:4096" for i in range(len(numbers) + 1)))
        expected = [n if n in CARRIED else errno.EIO for n in numbers]
        table = dict(zip(map(errno.errorcode.get, numbers), zip(expected, seen, strict=False), strict=True))
        assert seen == [*expected, 0], table
        assert disks.stats()[op]["errors"] >= len(numbers)


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("via", ["backend", "async", "handler"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP, errno.EAGAIN])
def test_a_failed_flush_fails_fsync(guest: Guest, via: str, number: int) -> None:
    with testdisk.serving(guest, "target=test", f"via={via}") as disks:
        disks.arm("error", errno=number, op="flush", times=1)
        # The block layer takes EOPNOTSUPP of a flush for success: it must not get that far.
        expected = errno.EIO if number == errno.EOPNOTSUPP else number
        assert disks.errnos("write:0:4096", "fsync", "fsync") == [0, expected, 0]


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("how", ["via=backend", "via=backend threads=3", "via=async", "via=handler"])
def test_a_backend_that_panics_fails_one_request_and_serves_the_next(guest: Guest, how: str) -> None:
    with testdisk.serving(guest, "target=test", testdisk.ALONE, *how.split()) as disks:
        place = 1 << 20
        disks.arm("panic", op="read", every=3, **{"from": place, "to": 2 * place})
        seen = disks.errnos(*(f"read:{place + i * 4096}:4096" for i in range(12)))
        assert seen == [0, 0, errno.EIO] * 4

        def panics() -> int:
            stats = disks.stats()
            return int(stats["panics"] + stats["pool_panics"])

        # The client is answered while the panic is under way.
        eventually(guest, lambda: panics() == 4)
        stats = disks.stats()
        assert (stats["dropped"], stats["in_flight"], stats["read"]["errors"]) == (4, 0, 4)


@pytest.mark.vm(smp=4)
def test_dropped_requests_are_answered_with_eio_and_counted(guest: Guest) -> None:
    with testdisk.serving(guest, "target=test", testdisk.ALONE, "via=handler") as disks:
        disks.arm("drop", op="write", every=2)
        seen = disks.errnos(*(f"write:{i * 4096}:4096" for i in range(6)))
        assert seen == [0, errno.EIO] * 3
        stats = disks.stats()
        assert (stats["dropped"], stats["in_flight"]) == (3, 0)


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("how", ["via=backend", "via=backend threads=4", "via=async", "via=handler"])
def test_delayed_answers_arrive_and_are_right(guest: Guest, how: str) -> None:
    with testdisk.serving(guest, "target=test", testdisk.ALONE, "queues=2", *how.split()) as disks:
        disks.arm("delay", ms=3, every=2)
        _verify(guest, disks.path, "--bs=16k", "--iodepth=8", "--io_size=1M")
        assert disks.stats()["in_flight"] == 0


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("how", ["", "threads=2"])
def test_short_transfers_are_finished(guest: Guest, how: str) -> None:
    with testdisk.serving(guest, "target=test", "via=backend", *how.split()) as disks:
        disks.arm("short", every=2)
        _verify(guest, disks.path, "--bs=64k", "--iodepth=4", "--io_size=2M")
        backend, stats = disks.backend(), disks.stats()
        # More calls than requests: the rest was asked for.
        assert backend["write"] > stats["write"]["completed"] > 0
        assert backend["read"] > stats["read"]["completed"] > 0
        assert stats["read"]["errors"] == stats["write"]["errors"] == 0


@pytest.mark.vm(smp=4)
def test_a_disk_that_failed_works_when_it_is_healed(guest: Guest) -> None:
    with testdisk.serving(guest, "target=test", "via=backend") as disks:
        disks.arm("error", errno=errno.EIO)
        assert disks.errnos("write:0:4096", "read:0:4096", "fsync") == [errno.EIO] * 3
        disks.heal()
        assert disks.errnos("write:0:4096", "read:0:4096", "fsync") == [0] * 3


def _verify(guest: Guest, disk: str, *options: str) -> None:
    guest.run(
        [
            *("fio", "--name=v", f"--filename={disk}", "--direct=1", "--ioengine=libaio", "--rw=randwrite"),
            *("--size=8M", "--verify=crc32c", "--verify_fatal=1", *options),
        ],
        timeout=60,
    )
