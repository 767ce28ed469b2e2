"""A disk that is somewhere else: async_disk.py HOST PORT SIZE. With no HOST it also plays the somewhere else.

The other side is a toy: `r OFFSET LENGTH` is answered by the bytes, `w OFFSET LENGTH` and the bytes by a newline.
"""

import asyncio
import signal
import socketserver
import sys
import threading

import ublk


class Connection:
    """One request at a time on one connection."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def ask(self, what, offset, length, data=b""):
        self.writer.write(b"%s %d %d\n" % (what, offset, length))
        self.writer.write(data)
        await self.writer.drain()
        return await self.reader.readexactly(length if what == b"r" else 1)


class RemoteDisk:
    def __init__(self, connections):
        self.idle = asyncio.Queue()
        for connection in connections:
            self.idle.put_nowait(connection)

    async def pread(self, buf, offset):
        buf[:] = await self.ask(b"r", offset, len(buf))

    async def pwrite(self, buf, offset):
        await self.ask(b"w", offset, len(buf), buf)

    async def ask(self, *request):
        connection = await self.idle.get()
        try:
            return await connection.ask(*request)
        except BaseException:
            # Out of step with the other side. Whoever has it next gets an error at once, and its client EIO.
            connection.writer.close()
            raise
        finally:
            self.idle.put_nowait(connection)


class SomewhereElse(socketserver.StreamRequestHandler):
    """A server of bytes in memory, which waits where it likes: it has threads of its own."""

    def handle(self):
        store = self.server.store
        while line := self.rfile.readline():
            what, offset, length = line.split()
            start, end = int(offset), int(offset) + int(length)
            if what == b"w":
                store[start:end] = self.rfile.read(end - start)
            self.wfile.write(store[start:end] if what == b"r" else b"\n")


def somewhere_else(size):
    """Starts one; the answer is its address."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), SomewhereElse)
    server.daemon_threads = True
    server.store = bytearray(size)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address


async def main(*arguments):
    *address, size = arguments
    size = ublk.parse_size(size)
    host, port = address or somewhere_else(size)
    connections = [Connection(*await asyncio.open_connection(host, port)) for _ in range(8)]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    async with ublk.Device(RemoteDisk(connections), size=size) as dev:
        print(dev.path, flush=True)
        await stop.wait()
    for connection in connections:
        connection.writer.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
