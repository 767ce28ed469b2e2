import ublk

class RamDisk:
    def __init__(self, size): self.data = bytearray(size)
    def pread(self, buf, offset): buf[:] = self.data[offset:offset + len(buf)]
    def pwrite(self, buf, offset): self.data[offset:offset + len(buf)] = buf
    def flush(self): pass

with ublk.Device(RamDisk(1 << 30), size="1GiB") as dev:
    print(dev.path)      # /dev/ublkb0
    dev.wait()           # Ctrl-C stops it cleanly
