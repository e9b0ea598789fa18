"""Worker ports on the loopback addresses the fault proxy gives to instances.

A stand-in listens where a real machine would, `loopback_address(instance_id):port`, and speaks dserv's
framing: a 4-byte big-endian length, then that many bytes; the answer to a script is `ok:` and the script.
Opening and closing it is a test's way to say when a worker shows readiness, and when it is dead. A fleet
does that by itself for every instance the proxy reports running.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from tests.support.ec2_wire import AddressKind, loopback_address
from tests.support.fault_proxy import FaultProxy
from tests.support.loop_thread import LoopThread

FRAME_BYTES_MAX = 16 * 2**20  # a longer frame is a client that lost its place; the connection ends
LENGTH_BYTES: Final = 4
ANSWER_PREFIX = b"ok:"


class WorkerStandIn:
    """One worker port. `start` returns when it accepts connections, `stop` when it refuses them.

    Port 0 takes a free one; `port` says which. Stopping also cuts the connections it has, as a machine
    that is gone does.
    """

    def __init__(self, address: str, port: int, loop: LoopThread) -> None:
        self.address, self.port = address, port
        self.scripts: list[bytes] = []
        self.connections_accepted = 0
        self._loop = loop
        self._server: asyncio.Server | None = None
        self._serving: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    def start(self) -> None:
        self._loop.call(self._start())

    def stop(self) -> None:
        self._loop.call(self._stop())

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def _start(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accepted, self.address, self.port, backlog=1024)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        # No new connection, then a turn for those just accepted: asyncio's server trips over one that is
        # still on its way when it closes, and leaves its socket open.
        for listener in server.sockets:
            asyncio.get_running_loop().remove_reader(listener.fileno())
        await asyncio.sleep(0)
        server.close()
        for writer in self._serving:
            writer.transport.abort()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Not a coroutine: a stop must know, and cut, a connection whose task has not run yet."""
        if self._server is None:
            writer.transport.abort()
            return
        self.connections_accepted += 1
        self._serving[writer] = asyncio.create_task(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # Ends on the client's end of file, on a frame that is too long, and when the stand-in stops.
            while (script := await _read_frame(reader)) is not None:
                self.scripts.append(script)
                writer.write(frame(ANSWER_PREFIX + script))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self._serving.pop(writer, None)
            writer.close()


class WorkerFleet:
    """Stand-ins for the proxy's instances, all on one port, each on its instance's own addresses.

    `automatic`: a port opens before the first answer that shows its instance running, and closes when the
    instance is terminated or reclaimed. Otherwise the test opens and closes them.
    """

    def __init__(
        self, proxy: FaultProxy, *, automatic: bool, kinds: Iterable[AddressKind] = ("public",)
    ) -> None:
        self._proxy, self._automatic, self._kinds = proxy, automatic, tuple(kinds)
        self._loop = LoopThread("worker-fleet")
        self._stand_ins: dict[str, list[WorkerStandIn]] = {}
        # Holding the port on 127.0.0.1 keeps the kernel from giving it to anybody else meanwhile.
        self._reservation = socket.socket()
        self._reservation.bind(("127.0.0.1", 0))
        self.port: int = self._reservation.getsockname()[1]

    def __enter__(self) -> Self:
        self._loop.start()
        if self._automatic:
            self._proxy.on_terminated(self.close)
            for instance_id in self._proxy.on_shown_running(self.open):
                self.open(instance_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._proxy.unlisten(self.open, self.close)
        for instance_id in list(self._stand_ins):
            self.close(instance_id)
        self._loop.stop()
        self._reservation.close()

    def open(self, instance_id: str) -> None:
        """The instance's worker port accepts connections when this returns."""
        for stand_in in self._of(instance_id):
            stand_in.start()

    def close(self, instance_id: str) -> None:
        """The instance's worker port refuses connections when this returns."""
        for stand_in in self._of(instance_id):
            stand_in.stop()

    def stand_in(self, instance_id: str) -> WorkerStandIn:
        """The stand-in on the first kind of address."""
        return self._of(instance_id)[0]

    def _of(self, instance_id: str) -> list[WorkerStandIn]:
        addresses = [loopback_address(instance_id, kind) for kind in self._kinds]
        return self._stand_ins.setdefault(
            instance_id, [WorkerStandIn(address, self.port, self._loop) for address in addresses]
        )


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


async def _read_frame(reader: asyncio.StreamReader) -> bytes | None:
    with contextlib.suppress(asyncio.IncompleteReadError):
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        return await reader.readexactly(length) if length <= FRAME_BYTES_MAX else None
    return None


def evaluate(address: str, port: int, script: str, timeout_seconds: float = 5.0) -> str:
    """One script sent to a worker port and its answer. Raises OSError."""
    with socket.create_connection((address, port), timeout_seconds) as connection:
        connection.sendall(frame(script.encode()))
        stream = connection.makefile("rb")
        length = int.from_bytes(stream.read(LENGTH_BYTES), "big")
        return stream.read(length).decode()
