"""TCP: an asyncio.Protocol around core.protocol, with limits and deadlines.

Replies leave in the order of their commands. What the books can answer at once is answered in the very call
that received the bytes, and all replies to one chunk leave in one write. The first command that has to wait
starts a task for the connection; later commands queue behind it.

A connection is bounded in every direction: commands begun must be finished (`line_timeout`), silence ends
(`silence_timeout`), queued commands are at most QUEUED_MAX, and a client that does not read its
replies is not read from either.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from math import inf

from broker.clock import Clock
from broker.core import protocol
from broker.core.errors import LimitReached, WaitTimedOut
from broker.core.protocol import Command, CommandReader, is_last, name_of
from broker.core.settings import BrokerSettings, split_address
from broker.service import Service
from broker.sessions import Session

BACKLOG = 1024  # connections the kernel holds while we are busy: a lab's whole cluster may start at once
QUEUED_MAX = 1000  # commands of one connection that wait behind a slow one; beyond them its bytes wait too
REPLIES_BYTES_MAX = 64 * 1024  # written at once; what is asked beyond it waits until the client has read that
SWEEP_SECONDS = 1.0  # between two looks at the deadlines, at least: one look is cheaper than a timer for each
SWEPT_MAX = 500  # connections looked at in one go: nobody's reply waits longer than that takes
# Seconds, seconds, probes: a client whose machine is gone is noticed within two minutes (Linux: tcp(7)).
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
PLAIN_GET = b"GET_WORKER\n"

Observe = Callable[[str, bool, float, int], None]  # command, whether it failed, seconds each, how many


class Connection(asyncio.Protocol):
    """One client."""

    # Defaults stand in the class: most connections ask one thing and go, and each assignment costs them.
    _transport: asyncio.Transport
    _reader: CommandReader | None = None  # made when first needed, like everything below
    _peer = ""
    _queue: deque[Command] | None = None
    _task: asyncio.Task[None] | None = None
    _client_closed = False
    _paused = False
    _reading = True
    _session: Session | None = None  # what commands have left behind on it
    _unread_bytes = 0  # said while the client did not read, beside replies
    _resumed: asyncio.Future[None] | None = None  # what the work waits for while `_paused`
    partial_at: float | None = None  # since when a command is unfinished
    unread_at: float | None = None  # since when the client does not read what it was told

    def __init__(self, server: Server) -> None:
        self._server = server
        self.active_at = server.now()

    # --- what the transport calls --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # create_server makes no other kind
        if not self._server.admit(self):
            error = LimitReached("too many connections; close some, or try again in a moment")
            self._transport.write(protocol.error_line(error))
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        server = self._server
        started = self.active_at = server.now()
        if self._task is None and self.partial_at is None:
            if data == PLAIN_GET:  # the shortest way for what nearly everybody sends
                reply = server.warm(self._peer or self.peer, started)
                if reply is not None:
                    self._transport.write(reply)
                    server.observe("GET_WORKER", False, server.now() - started, 1)
                    return
            elif self._answer_plain_gets(data, started):
                return
        if self._reader is None:
            self._reader = CommandReader()
        commands = self._reader.receive(data)
        self._take(commands, started)
        if not self._reader.partial:
            self.partial_at = None
        elif commands or self.partial_at is None:  # a new command has begun; more of an old one is no excuse
            self.partial_at = started

    def eof_received(self) -> bool:
        """The client has said all it will say: answer what is left, then close."""
        self._client_closed = True
        if self._reader is not None:
            self._take(self._reader.receive_eof(), self._server.now())
            self.partial_at = None
        return self._task is not None  # False lets the transport close itself

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.pop(self, None)
        if self._task is not None:
            self._task.cancel()  # a client that gave up frees its place in the queue
        if self._session is not None:
            self._server.service.closed(self._session)

    def pause_writing(self) -> None:
        self._paused = True
        self.unread_at = self._server.now()
        self._read_or_pause()

    def resume_writing(self) -> None:
        self._paused = False
        self._unread_bytes = 0
        if not self._transport.is_closing():
            self.unread_at = None
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
        self._read_or_pause()

    # --- the work ------------------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """The client's source address: asked for once, because most connections never need it."""
        if not self._peer:
            name = self._transport.get_extra_info("peername")
            self._peer = str(name[0]) if name else "local"
        return self._peer

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = Session(self._say, self._stay_open)
        return self._session

    def _say(self, data: bytes) -> None:
        """A line between the replies. A client that does not read them is cut off before they pile up."""
        if self._transport.is_closing():
            return
        self._unread_bytes += len(data) if self._paused else 0
        if self._unread_bytes > REPLIES_BYTES_MAX:
            self._transport.abort()
        else:
            self._transport.write(data)

    def _stay_open(self) -> None:
        """Somebody counts on this connection, so it may be silent; the system finds out when its client's
        machine is gone."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                if hasattr(socket, option):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def _answer_plain_gets(self, data: bytes, started: float) -> bool:
        """The same for many of them in one chunk."""
        count, rest = divmod(len(data), len(PLAIN_GET))
        if rest or data != PLAIN_GET * count:
            return False
        server = self._server
        reply = server.warm(self._peer or self.peer, started)
        if reply is None:
            return False
        self._transport.write(reply * count)
        server.observe("GET_WORKER", False, (server.now() - started) / count, count)
        return True

    def _take(self, commands: Sequence[Command], started: float) -> None:
        replies: list[bytes] = []
        answered: list[Command] = []
        server, peer, size = self._server, self.peer if commands else "", 0
        for command in commands:
            at_once = self._task is None and size < REPLIES_BYTES_MAX
            reply = server.answer_now(command, peer) if at_once else None
            if reply is None:
                self._enqueue(command)
            else:
                replies.append(reply)
                answered.append(command)
                size += len(reply)
                if is_last(command):
                    self._client_closed = True
        if replies:
            self._transport.write(b"".join(replies))
            self._observe_all(answered, replies, started)
        if self._client_closed and self._task is None:
            self.close()

    def _observe_all(self, commands: list[Command], replies: list[bytes], started: float) -> None:
        each = (self._server.now() - started) / len(commands)
        for command, reply in zip(commands, replies, strict=True):
            self._server.observe(name_of(command), reply.startswith(b"ERROR"), each, 1)

    def _enqueue(self, command: Command) -> None:
        if self._queue is None:
            self._queue = deque()
        self._queue.append(command)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())
        self._read_or_pause()

    async def _work(self) -> None:
        """Answer the queue, in order, then hand back to `data_received`."""
        server, queue = self._server, self._queue
        while queue:
            command = queue[0]
            started = server.now()
            reply = await server.answer(command, self.peer, self.session)
            queue.popleft()
            self._transport.write(reply)
            self.active_at = server.now()
            server.observe(name_of(command), reply.startswith(b"ERROR"), self.active_at - started, 1)
            if is_last(command):
                self._client_closed = True
            self._read_or_pause()
            await self._next_turn()
        self._task = None
        if self._client_closed:
            self.close()

    async def _next_turn(self) -> None:
        """Between two commands: others have their turn, and the client is to read before it is told more."""
        await asyncio.sleep(0)
        if self._paused:
            self._resumed = asyncio.get_running_loop().create_future()
            await self._resumed

    def _read_or_pause(self) -> None:
        """Read on only while the client reads its replies and its commands find a place in the queue."""
        crowded = self._queue is not None and len(self._queue) >= QUEUED_MAX
        wanted = not self._paused and not crowded
        if wanted is self._reading or self._transport.is_closing():
            return
        self._reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def check(self, now: float, settings: BrokerSettings) -> float:
        """Close the connection when one of its deadlines has passed. Returns when to look again."""
        if self.unread_at is not None and now - self.unread_at > settings.line_timeout:
            self._transport.abort()  # it does not read: there is no telling it anything
            return inf
        if self.unread_at is not None:
            return self.unread_at + settings.line_timeout
        if self._task is not None:
            return inf
        line_at = inf if self.partial_at is None else self.partial_at + settings.line_timeout
        lasting = self._session is not None and self._session.lasting
        silent_at = inf if lasting else self.active_at + settings.silence_timeout
        if now > line_at:
            seconds = settings.line_timeout
            error = WaitTimedOut(f"the command was not finished within {seconds:g} s; end it with a newline")
            self._transport.write(protocol.error_line(error))
        if now > min(line_at, silent_at):
            self.close()
            return now + settings.line_timeout
        return min(line_at, silent_at)

    def close(self) -> None:
        """Say no more. What has been said is to be read in time, or the connection is cut off."""
        if self.unread_at is None:
            self.unread_at = self._server.now()
        self._transport.close()


class Server:
    """All connections, and the socket they come from. `wake` has the sweep run: there is one to look at."""

    name = "sweep"

    def __init__(
        self,
        service: Service,
        settings: BrokerSettings,
        clock: Clock,
        observe: Observe,
        failed: Callable[[str, Exception], None],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.service = service
        self.warm = service.warm
        self.settings = settings
        self.observe = observe
        self.now = clock.monotonic
        self.wake = wake
        self.connections: dict[Connection, None] = {}  # in the order they came: a history can be played again
        self.connections_max = settings.connections_max  # lowered when the system allows fewer open files
        self._failed = failed
        self._servers: list[asyncio.Server] = []
        self._sweeping = False
        self._to_check: list[Connection] = []  # of this round of the sweep
        self._look_at = inf  # the first deadline that this round has seen

    async def listen(self, sockets: Sequence[socket.socket] = ()) -> None:
        """Listen on the configured address, or on sockets that somebody else has opened. Raises OSError."""
        loop = asyncio.get_running_loop()
        if sockets:
            for sock in sockets:
                self._servers.append(await loop.create_server(self.connect, sock=sock, backlog=BACKLOG))
        else:
            host, port = split_address(self.settings.listen)
            self._servers.append(await loop.create_server(self.connect, host, port, backlog=BACKLOG))

    def connect(self) -> Connection:
        """A new connection, not yet with a transport."""
        return Connection(self)

    @property
    def addresses(self) -> list[str]:
        names = [sock.getsockname() for server in self._servers for sock in server.sockets]
        return [f"{name[0]}:{name[1]}" for name in names]

    def admit(self, connection: Connection) -> bool:
        if len(self.connections) >= self.connections_max:
            return False
        self.connections[connection] = None
        if not self._sweeping:
            self._sweeping = True
            self.wake()
        return True

    def answer_now(self, command: Command, peer: str) -> bytes | None:
        """The reply, if it needs no waiting. A fault of ours costs one command, not the connection."""
        try:
            return self.service.answer_now(command, peer)
        except Exception as error:
            return self._fault(command, error)

    async def answer(self, command: Command, peer: str, session: Session) -> bytes:
        """The reply, whatever happens: here too a fault costs one command."""
        try:
            return await self.service.answer(command, peer, session)
        except Exception as error:
            return self._fault(command, error)

    def _fault(self, command: Command, error: Exception) -> bytes:
        self._failed(name_of(command), error)
        return b"ERROR: the broker met a fault of its own; its log has the details [CLOUD]\n"

    async def tick(self) -> float | None:
        """The sweep, a loop for the runner: look at every connection's deadlines, some at a time.

        Whatever deadline begins after a look is at least the shorter timeout away, so until then, or until
        the first deadline that has been seen, nobody needs to look.
        """
        now = self.now()
        if not self._to_check:
            self._to_check = list(self.connections)
            self._look_at = now + min(self.settings.line_timeout, self.settings.silence_timeout)
        for connection in self._to_check[-SWEPT_MAX:]:
            self._look_at = min(self._look_at, connection.check(now, self.settings))
        del self._to_check[-SWEPT_MAX:]
        self._sweeping = bool(self.connections)
        if not self._sweeping:
            return None
        return now if self._to_check else max(self._look_at, now + SWEEP_SECONDS)

    def stop_listening(self) -> None:
        for server in self._servers:
            server.close()

    async def close(self, timeout_seconds: float) -> None:
        """Let commands under way be answered for a while, then close every connection."""
        tasks = [connection._task for connection in self.connections if connection._task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_seconds)
        for connection in tuple(self.connections):
            connection.close()
