"""A disk whose contents are a file: file_disk.py FILE SIZE."""

import contextlib
import ctypes
import errno
import os
import sys

import ublk

PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
fallocate = ctypes.CDLL(None, use_errno=True).fallocate
fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class FileDisk:
    def __init__(self, path, size):
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.size = ublk.parse_size(size)
        os.ftruncate(self.fd, self.size)

    def pread(self, buf, offset):
        # The kernel copies from the page cache to the client's request: no bytes object in between.
        if os.preadv(self.fd, [buf], offset) != len(buf):
            raise OSError(errno.EIO, "the file is shorter than the disk")

    def pwrite(self, buf, offset, flags):
        if os.pwritev(self.fd, [buf], offset) != len(buf):
            raise OSError(errno.ENOSPC, "the file system is full")
        if flags & ublk.Flags.FUA:
            self.flush()

    def flush(self):
        os.fdatasync(self.fd)

    def trim(self, count, offset):
        if fallocate(self.fd, PUNCH_HOLE, offset, count):
            raise OSError(ctypes.get_errno(), "cannot punch a hole")

    zero = trim


if __name__ == "__main__":
    disk = FileDisk(sys.argv[1], sys.argv[2])
    # Four threads: while one waits for the file, the others serve.
    with ublk.Device(disk, threads=4) as dev, contextlib.suppress(KeyboardInterrupt):
        print(dev.path, flush=True)
        dev.wait()
