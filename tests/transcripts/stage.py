"""A whole broker for one performance: a real Daemon, a cloud in memory behind it, sockets or none before it.

The same stage stands on virtual time (`ports=False`, connections in memory) and on real loopback sockets.
Headers of a transcript say how the pools are configured and what the cloud does; directions are carried out
here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from broker.clock import Clock, SystemClock
from broker.core import errors
from broker.core.errors import BrokerError
from broker.core.model import InstanceState, WorkerState
from broker.core.settings import Settings, parse
from broker.daemon import Daemon
from broker.testing import Client, FakeCloud, LoopClock, silent_log
from tests.transcripts.transcript import (
    CLOSES,
    SAYS_NO_MORE,
    VANISHES,
    Direction,
    Ends,
    Faulty,
    Hears,
    Memory,
    Says,
    Transcript,
)

SECONDS_MAX = 10.0  # real seconds for what takes milliseconds; virtual performances have no such hurry
FAILURES = 100  # of one call in a row: more than any performance makes
PEER = "127.0.0.1"


def settings_of(transcript: Transcript) -> Settings:
    """The configuration that the headers ask for; ports are free ones."""
    broker = {"id": "lab", "listen": f"{PEER}:0", "http": f"{PEER}:0", **transcript.headers.get("broker", {})}
    pools = {
        about.removeprefix("pool "): values
        for about, values in transcript.headers.items()
        if about.startswith("pool ")
    }
    return parse({"broker": broker, "pool": pools}, {})


@dataclass(slots=True)
class Stage:
    """One broker that is up."""

    daemon: Daemon
    cloud: FakeCloud
    ports: bool
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    wires: list[SocketWire] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether clients can connect, and the cloud has been looked at or will not let itself be."""
        place = self.daemon.context.clouds.all[0]
        if self.ports and not self.daemon.server.addresses:
            return False
        return place.recovered or place.error is not None or bool(self.cloud.hold and place.opened)

    @property
    def port(self) -> int:
        return int(self.daemon.server.addresses[0].rpartition(":")[2])

    async def connect(self) -> SocketWire:
        """A connection over loopback; closed with the stage."""
        self.wires.append(await SocketWire.to(self.port))
        return self.wires[-1]

    async def until(self, condition: Callable[[], object], seconds_max: float = SECONDS_MAX) -> None:
        """Let time pass until something holds. Raises TimeoutError."""
        async with asyncio.timeout(seconds_max):
            while not condition():
                await asyncio.sleep(0.002)

    async def carry_out(self, direction: Direction) -> None:
        """See the format's list of directions."""
        match direction.verb:
            case "waiting":
                await self.until(lambda: len(self.daemon.context.waiting) == direction.amount)
            case "booting":
                registry = self.daemon.context.registry
                await self.until(lambda: registry.count("default", WorkerState.BOOTING) == direction.amount)
            case "seconds":
                await asyncio.sleep(direction.amount)
            case "boot":
                await self.boot()
            case "protect":
                await self.protect()
            case "silent":
                self.cloud.hold["connect"] = asyncio.Event()
            case "stop":
                self.stop.set()

    async def boot(self) -> None:
        """Wait for a pending machine, and let it boot."""
        await self.until(self._pending)
        for instance_id in self._pending():
            self.cloud.boot(instance_id)

    async def protect(self) -> None:
        """A person puts the tag on every machine that runs, and the broker lists them once more."""
        for instance_id in self.cloud.running():
            self.cloud.retag(instance_id, protect="yes")
        await self.daemon.reconcile.scan()

    def _pending(self) -> list[str]:
        machines = self.cloud.machines.items()
        return [id_ for id_, machine in machines if machine.instance.state is InstanceState.PENDING]


@asynccontextmanager
async def stage(
    settings: Settings, state_dir: Path, *, ports: bool, sky: dict[str, str] | None = None
) -> AsyncIterator[Stage]:
    """Start a broker, stop it in order at the end. `sky` is what a `cloud:` header says."""
    loop = asyncio.get_running_loop()
    clock = cast(Clock, SystemClock() if ports else LoopClock(loop))
    cloud = FakeCloud(settings.broker.id, tuple(settings.pool), clock=clock)
    for key, value in (sky or {}).items():
        _arrange(cloud, key, value)
    numbers = itertools.count(1)
    daemon = Daemon(
        settings,
        state_dir=state_dir,
        clock=clock,
        log=silent_log(),
        environ={},
        providers=lambda *_: dict.fromkeys(settings.pool, (cloud,)),
        connect=cloud.connect,
        store_threaded=ports,
        ports=ports,
        new_id=lambda: str(next(numbers)),
    )
    here = Stage(daemon, cloud, ports)
    running = asyncio.create_task(daemon.run(here.stop))
    try:
        await here.until(lambda: here.open or running.done())
        if not running.done():  # otherwise it has failed, and says so below
            yield here
    finally:
        here.stop.set()
        await running
        for wire in here.wires:
            wire.close()


def _arrange(cloud: FakeCloud, key: str, value: str) -> None:
    """`boots=no`: machines stay pending until told. `launch=NoCapacity`: that call fails so, every time;
    `listing=never`: it has no answer at all."""
    if key == "boots":
        cloud.boots = value == "yes"
        return
    if value == "never":
        cloud.hold[key] = asyncio.Event()
        return
    kind = getattr(errors, value, None)
    if key not in ("launch", "listing") or not isinstance(kind, type) or not issubclass(kind, BrokerError):
        raise Faulty(f"cloud: {key}={value} is nothing a cloud can do")
    cloud.fail[key] = deque(kind() for _ in range(FAILURES))


# --- connections -----------------------------------------------------------------------------------------


class Wire(Protocol):
    """One client's connection, in bytes and lines."""

    async def send(self, data: bytes) -> None: ...
    async def say_no_more(self) -> None: ...
    async def vanish(self) -> None: ...
    async def line(self) -> str | None:
        """The next line, None when the broker has closed the connection."""


class MemoryWire:
    """A connection without a socket."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def send(self, data: bytes) -> None:
        self._client.send(data)

    async def say_no_more(self) -> None:
        if not self._client.closed:
            self._client.half_close()

    async def vanish(self) -> None:
        self._client.vanish()

    async def line(self) -> str | None:
        return await self._client.reply()


class SocketWire:
    """A connection over loopback, on a plain socket: what has arrived can be read whatever came after it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""

    @classmethod
    async def to(cls, port: int) -> SocketWire:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (PEER, port))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    async def send(self, data: bytes) -> None:
        with suppress(ConnectionError):  # the broker has closed; what it said before can still be read
            await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def say_no_more(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def vanish(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # with a reset
        self._sock.close()

    def close(self) -> None:
        self._sock.close()

    async def line(self) -> str | None:
        async with asyncio.timeout(SECONDS_MAX):
            while b"\n" not in self._buffer:
                try:
                    data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
                except ConnectionError:
                    data = b""
                if not data:
                    self._sock.close()
                    assert not self._buffer, f"the connection was closed in the middle of {self._buffer!r}"
                    return None
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("ascii")


# --- performances ----------------------------------------------------------------------------------------


def together(texts: list[str]) -> list[str]:
    """Everything that is said in a row leaves in one piece."""
    return ["".join(texts)]


def line_by_line(texts: list[str]) -> list[str]:
    """Every line is a piece of its own."""
    return texts


def byte_by_byte(texts: list[str]) -> list[str]:
    """Every byte is a piece of its own."""
    return list("".join(texts))


Cut = Callable[[list[str]], list[str]]


class Performance:
    """One transcript, played over connections of its own."""

    def __init__(self, transcript: Transcript, on: Stage, *, cut: Cut) -> None:
        self._transcript = transcript
        self._stage = on
        self._cut = cut
        self._memory = Memory()
        self._wires: dict[int, Wire] = {}
        self._over: set[int] = set()

    async def play(self) -> None:
        """Raises AssertionError where the broker does not say what the transcript has."""
        saying: list[str] = []
        for line, following in itertools.zip_longest(self._transcript.lines, self._transcript.lines[1:]):
            if isinstance(line, Says):
                saying.append(self._memory.to_send(line))
                if not isinstance(following, Says) or following.client != line.client:
                    await self._send(line.client, saying)
                    saying = []
            elif isinstance(line, Direction):
                await self._stage.carry_out(line)
            elif isinstance(line, Hears):
                self._check(line, await (await self._wire(line.client)).line())
            else:
                await self._end(line)
        for client, wire in self._wires.items():
            if client not in self._over:
                await wire.say_no_more()
                more = await wire.line()
                assert more is None, f"after the end of the dialogue, to client {client}: {more!r}"

    async def _send(self, client: int, texts: list[str]) -> None:
        wire = await self._wire(client)
        for piece in self._cut(texts):
            await wire.send(piece.encode("latin-1"))
            await asyncio.sleep(0)

    def _check(self, expected: Hears, reply: str | None) -> None:
        assert reply is not None, f"the broker closed instead of saying {expected.text!r}"
        check(self._memory, expected, reply)

    async def _end(self, line: Ends) -> None:
        wire = await self._wire(line.client)
        if line.how == SAYS_NO_MORE:
            await wire.say_no_more()
            return
        self._over.add(line.client)
        if line.how == VANISHES:
            await wire.vanish()
        else:
            assert line.how == CLOSES
            more = await wire.line()
            assert more is None, f"instead of closing, the broker said {more!r}"

    async def _wire(self, client: int) -> Wire:
        if client not in self._wires:
            server = self._stage.daemon.server
            over_sockets = bool(server.addresses)
            self._wires[client] = (
                await self._stage.connect() if over_sockets else MemoryWire(Client(server, PEER))
            )
        return self._wires[client]


def check(memory: Memory, expected: Hears, reply: str) -> None:
    """One reply against its line. JSON must also be JSON."""
    assert memory.agrees(expected.text, reply), f"{reply!r} is not {expected.text!r} with {memory.known}"
    if reply.startswith(("[", "{")):
        json.loads(reply)
