"""A disk that hands its requests to other threads: raw_disk.py SIZE."""

import contextlib
import errno
import queue
import sys
import threading

import ublk


class Mirror:
    """Two copies in memory, each with a thread of its own; a write is done when both have it."""

    def __init__(self, size):
        self.copies = [bytearray(size), bytearray(size)]
        self.inboxes = [queue.SimpleQueue(), queue.SimpleQueue()]
        self.turn = 0
        self.lock = threading.Lock()
        for number in range(2):
            threading.Thread(target=self.serve, args=(number,), daemon=True).start()

    def handle(self, request):
        # On the device's worker: nothing here may wait.
        match request.op:
            case "read":
                self.turn ^= 1
                self.inboxes[self.turn].put((request, None))
            case "write":
                left = [0, 1]  # each copy is taken off when it is written
                for inbox in self.inboxes:
                    inbox.put((request, left))
            case "flush":
                request.complete()
            case _:
                request.complete(-errno.EOPNOTSUPP)

    def serve(self, number):
        data, inbox = self.copies[number], self.inboxes[number]
        while True:
            request, left = inbox.get()
            start, end = request.offset, request.offset + request.length
            try:
                if left is None:
                    request.buffer[:] = data[start:end]
                    request.complete()
                else:
                    data[start:end] = request.buffer
                    with self.lock:
                        left.remove(number)
                        last = not left
                    if last:
                        request.complete()
            except ublk.GoneError:
                pass  # a stop was faster: the client has its error
            del request  # what is kept, keeps its memory


if __name__ == "__main__":
    size = ublk.parse_size(sys.argv[1])
    with ublk.Device(Mirror(size), size=size, cache=True) as dev, contextlib.suppress(KeyboardInterrupt):
        print(dev.path, flush=True)
        dev.wait()
