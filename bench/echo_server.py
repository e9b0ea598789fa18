"""The bare peer: what uvloop can do at most in Python, with no product behind it.

An asyncio.Protocol that answers every newline with one fixed short line, all the answers to a chunk in one
write. It parses nothing and keeps nothing, so a broker measured against it shows what its own work costs.
Prints its port on the first line of standard output; ends on SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import cast

import uvloop

REPLY = b"127.0.0.5\n"
BACKLOG = 1024


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(REPLY * data.count(b"\n"))


async def serve() -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=BACKLOG)
    print(server.sockets[0].getsockname()[1], flush=True)
    await stopped.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(serve())
    sys.exit(0)
