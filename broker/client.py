"""The Python client, blocking and async: the single commands of the protocol.

The two clients only carry errands, a connection for each: one waits in its thread, one in an event loop. An
`ERROR` reply is raised as the broker's own typed error, and nothing but an address is ever returned as one.
Every `Client` has a name of its own, because a hold belongs to a name. Blocks that hold a worker are in
held_worker.py and held_lease.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar, Unpack

from broker import wire
from broker.core import protocol
from broker.core.errors import BadRequest, BrokerError
from broker.core.protocol import (
    Acquire,
    Done,
    GetWorker,
    ListAll,
    Ping,
    Pools,
    Release,
    Renew,
    Sayable,
    Status,
    TerminateAll,
    Version,
    Watch,
)
from broker.core.replies import Granted, Notice, Versions, parse_versions
from broker.errand import (
    Errand,
    Retry,
    Wish,
    endpoint,
    next_number,
    own_name,
    read_ok,
    read_pools,
    read_terminated,
    read_workers,
)
from broker.lease_errands import AcquireErrand, CallerFailed, EachErrand, NoticeReader, Wanted

ANSWER_SECONDS = 10.0  # for an answer, beyond the wait that the command itself asks for
WAIT_SECONDS = 900.0  # how long the broker lets GET_WORKER wait when nobody says: its setting `wait`
RETRY = Retry()

T = TypeVar("T")
R = TypeVar("R")


class Asker:
    """What both clients know: where the broker is, who asks, and how the answer to each command reads."""

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        *,
        client: str | None = None,
        timeout: float = ANSWER_SECONDS,
        retry: Retry = RETRY,
    ) -> None:
        """`host` may be `host:port`. `client` is the name to ask under, instead of one of its own.
        `timeout` is the seconds an answer may take, for GET_WORKER beyond its wait."""
        if client is not None and not protocol.CLIENT_NAME.fullmatch(client):
            raise BadRequest(f"{client!r} is no name for client=: 1 to 64 letters, digits and . _ @ : / + -")
        self.broker = endpoint(host, port, os.environ)
        self.timeout = timeout
        self._retry = retry
        self._client = client
        self._number = next_number()

    @property
    def name(self) -> str:
        """What the broker knows this client as."""
        return self._client or own_name(self._number)

    def watch_line(self) -> bytes:
        """What makes a connection that is there tell what happens to this client's workers."""
        return protocol.encode(Watch(self.name))

    def _get_worker(self, wish: Wish) -> Errand[str]:
        command = GetWorker(**wish, client=self.name)
        wait = WAIT_SECONDS if command.wait is None else command.wait
        return self._errand(command, protocol.read_address, wait + self.timeout)

    def _ping(self, address: str) -> Errand[None]:
        return self._errand(Ping(address, self.name), read_ok)

    def _release(self, address: str, force: bool) -> Errand[None]:
        return self._errand(Release(address, force, self.name), read_ok)

    def _acquire(self, count: int | None, wanted: Wanted, hold: str | None = None) -> AcquireErrand:
        keys = {key: value for key, value in wanted.items() if key != "on_pending"}
        number = 1 if count is None else count
        command = Acquire(**keys, count=number, hold=hold, client=self.name)  # type: ignore[arg-type]
        wait = WAIT_SECONDS if command.wait is None else command.wait
        seconds = wait + self.timeout
        return AcquireErrand(command, wanted.get("on_pending"), self.broker, seconds, self._retry)

    def _each(self, verb: type[Renew | Done], lease_ids: Sequence[str]) -> EachErrand:
        return EachErrand(verb, lease_ids, self.broker, self.timeout, self._retry)

    def _watch(self) -> Errand[None]:
        return self._errand(Watch(self.name), read_ok)

    def _version(self) -> Errand[Versions]:
        return self._errand(Version(), parse_versions)

    def _errand(
        self, command: Sayable | str, read: Callable[[str], T], seconds: float | None = None
    ) -> Errand[T]:
        return Errand(command, read, self.broker, self.timeout if seconds is None else seconds, self._retry)


class Client(Asker):
    """Asks a broker and waits for the answers. Threads may share one.

    Every method raises the broker's own error for an `ERROR` reply, BrokerUnreachable when there is no
    answer, and BadRequest for values that no command can carry.
    """

    def get_worker(self, **wish: Unpack[Wish]) -> str:
        """The address of a ready worker, of which this client now holds a lease. `Wish` has the keys."""
        return self._run(self._get_worker(wish))

    def ping(self, address: str) -> None:
        """Renew the lease. Raises WorkerNotFound."""
        self._run(self._ping(address))

    def release(self, address: str, *, force: bool = False) -> None:
        """End the lease; the worker is terminated when nobody else holds it, with `force` in any case."""
        self._run(self._release(address, force))

    def status(self) -> list[dict[str, Any]]:
        """The workers in the broker's books."""
        return self._run(self._errand(Status(), read_workers))

    def pools(self) -> list[dict[str, Any]]:
        """Each pool's workers, caps, breaker and budget."""
        return self._run(self._errand(Pools(), read_pools))

    def list_all(self) -> list[dict[str, Any]]:
        """The machines that the cloud lists under the broker's tag."""
        return self._run(self._errand(ListAll(), read_workers))

    def terminate_all(self) -> list[str]:
        """End every machine of the broker: their ids. Never sent twice."""
        return self._run(self._errand(TerminateAll(), read_terminated))

    def acquire(
        self,
        *,
        count: int | None = None,
        **wanted: Unpack[Wanted],
    ) -> list[Granted]:
        """`count` new leases (one without it) of ready workers, each kept by `renew` or `ttl` seconds long.

        Every call makes new leases, also of a client that has some. `Wanted` has the
        keys. An answer that is lost is not asked for again, because that could
        acquire twice: the leases that nobody knows of end when their ttl is over.
        """
        return self._run(self._acquire(count, wanted))

    def acquire_and_stay(
        self,
        *,
        count: int | None = None,
        **wanted: Unpack[Wanted],
    ) -> tuple[list[Granted], socket.socket]:
        """`acquire`, with leases that end with their connection, which is returned for the caller to close.

        An answer that is lost is asked for again: the connection that broke has ended its leases.
        """
        return self._stay(self._acquire(count, wanted, "connection"))

    def renew(self, lease_id: str) -> None:
        """The lease lasts its ttl again, from now. Raises Denied when it has ended."""
        _raise_first(self.renew_all([lease_id]))

    def renew_all(self, lease_ids: Sequence[str]) -> list[BrokerError | None]:
        """`renew` for up to 1000 leases on one connection: for each None, or why not."""
        return self._run(self._each(Renew, lease_ids)) if lease_ids else []

    def done(self, lease_id: str) -> None:
        """End the lease; the worker stays warm for whoever comes next. Raises Denied when it has ended."""
        _raise_first(self.done_all([lease_id]))

    def done_all(self, lease_ids: Sequence[str]) -> list[BrokerError | None]:
        """`done` for up to 1000 leases on one connection: for each None, or why not."""
        return self._run(self._each(Done, lease_ids)) if lease_ids else []

    def watch(self) -> Iterator[Notice]:
        """What happens to the workers that this client's name holds, as it happens, for ever.

        A broker that restarts is waited for as every command waits; what happens meanwhile is not told.
        Raises BrokerUnreachable when it does not come back.
        """
        while True:  # the caller ends it
            data, sock = self.watch_and_stay()
            with sock, suppress(OSError):
                sock.settimeout(None)
                reader = NoticeReader()
                yield from reader.receive(data) if data else ()
                while True:  # the end of the connection ends it
                    yield from reader.receive(sock.recv(wire.CHUNK_BYTES_MAX))
            time.sleep(self._retry.pause_seconds_max)

    def watch_and_stay(self) -> tuple[bytes, socket.socket]:
        """A connection that tells notices from now on, for the caller to close, and its first bytes."""
        _, sock = self._stay(errand := self._watch())
        return errand.surplus(), sock

    def version(self) -> Versions:
        """Which broker this is, and which protocol it speaks."""
        return self._run(self._version())

    def request(self, line: str, *, timeout: float | None = None) -> str:
        """The first line of the reply to any command, which is sent once and as it is."""
        return self._run(self._errand(line, protocol.read_reply, timeout))

    def _run(self, errand: Errand[T]) -> T:
        self._carry(errand, wire.ask)
        return errand.result()

    def _stay(self, errand: Errand[T]) -> tuple[T, socket.socket]:
        sock = self._carry(errand, wire.ask_and_stay)
        try:
            return errand.result(), sock
        except BaseException:
            sock.close()
            raise

    def _carry(self, errand: Errand[T], ask: Callable[[str, int, wire.Question, float], R]) -> R:
        while True:  # Retry.attempts_max ends it
            seconds = errand.attempt(time.monotonic())
            try:
                return ask(self.broker.host, self.broker.port, errand, seconds)
            except wire.TROUBLE as trouble:
                pause = errand.pause_after(trouble, time.monotonic())
            except CallerFailed as failed:
                error = failed.error
                break
            time.sleep(pause)
        raise error


class AsyncClient(Asker):
    """`Client` for an event loop: the same methods, awaitable. A cancelled call closes its connection."""

    async def get_worker(self, **wish: Unpack[Wish]) -> str:
        """The address of a ready worker, of which this client now holds a lease. `Wish` has the keys."""
        return await self._run(self._get_worker(wish))

    async def ping(self, address: str) -> None:
        """Renew the lease. Raises WorkerNotFound."""
        await self._run(self._ping(address))

    async def release(self, address: str, *, force: bool = False) -> None:
        """End the lease; the worker is terminated when nobody else holds it, with `force` in any case."""
        await self._run(self._release(address, force))

    async def status(self) -> list[dict[str, Any]]:
        """The workers in the broker's books."""
        return await self._run(self._errand(Status(), read_workers))

    async def pools(self) -> list[dict[str, Any]]:
        """Each pool's workers, caps, breaker and budget."""
        return await self._run(self._errand(Pools(), read_pools))

    async def list_all(self) -> list[dict[str, Any]]:
        """The machines that the cloud lists under the broker's tag."""
        return await self._run(self._errand(ListAll(), read_workers))

    async def terminate_all(self) -> list[str]:
        """End every machine of the broker: their ids. Never sent twice."""
        return await self._run(self._errand(TerminateAll(), read_terminated))

    async def acquire(
        self,
        *,
        count: int | None = None,
        **wanted: Unpack[Wanted],
    ) -> list[Granted]:
        """`count` new leases (one without it) of ready workers, each kept by `renew` or `ttl` seconds long.

        Every call makes new leases, also of a client that has some. `Wanted` has the
        keys. An answer that is lost is not asked for again, because that could
        acquire twice: the leases that nobody knows of end when their ttl is over.
        """
        return await self._run(self._acquire(count, wanted))

    async def acquire_and_stay(
        self,
        *,
        count: int | None = None,
        **wanted: Unpack[Wanted],
    ) -> tuple[list[Granted], socket.socket]:
        """`acquire`, with leases that end with their connection, which is returned for the caller to close.

        An answer that is lost is asked for again: the connection that broke has ended its leases.
        """
        return await self._stay(self._acquire(count, wanted, "connection"))

    async def renew(self, lease_id: str) -> None:
        """The lease lasts its ttl again, from now. Raises Denied when it has ended."""
        _raise_first(await self.renew_all([lease_id]))

    async def renew_all(self, lease_ids: Sequence[str]) -> list[BrokerError | None]:
        """`renew` for up to 1000 leases on one connection: for each None, or why not."""
        return await self._run(self._each(Renew, lease_ids)) if lease_ids else []

    async def done(self, lease_id: str) -> None:
        """End the lease; the worker stays warm for whoever comes next. Raises Denied when it has ended."""
        _raise_first(await self.done_all([lease_id]))

    async def done_all(self, lease_ids: Sequence[str]) -> list[BrokerError | None]:
        """`done` for up to 1000 leases on one connection: for each None, or why not."""
        return await self._run(self._each(Done, lease_ids)) if lease_ids else []

    async def watch(self) -> AsyncIterator[Notice]:
        """What happens to the workers that this client's name holds, as it happens, for ever.

        A broker that restarts is waited for as every command waits; what happens meanwhile is not told.
        Raises BrokerUnreachable when it does not come back.
        """
        loop = asyncio.get_running_loop()
        while True:  # the caller ends it
            data, sock = await self.watch_and_stay()
            with sock, suppress(OSError):
                reader = NoticeReader()
                data = data or await loop.sock_recv(sock, wire.CHUNK_BYTES_MAX)
                while True:  # the end of the connection ends it
                    for notice in reader.receive(data):
                        yield notice
                    data = await loop.sock_recv(sock, wire.CHUNK_BYTES_MAX)
            await asyncio.sleep(self._retry.pause_seconds_max)

    async def watch_and_stay(self) -> tuple[bytes, socket.socket]:
        """A connection that tells notices from now on, for the caller to close, and its first bytes."""
        _, sock = await self._stay(errand := self._watch())
        return errand.surplus(), sock

    async def version(self) -> Versions:
        """Which broker this is, and which protocol it speaks."""
        return await self._run(self._version())

    async def request(self, line: str, *, timeout: float | None = None) -> str:
        """The first line of the reply to any command, which is sent once and as it is."""
        return await self._run(self._errand(line, protocol.read_reply, timeout))

    async def _run(self, errand: Errand[T]) -> T:
        await self._carry(errand, wire.ask_async)
        return errand.result()

    async def _stay(self, errand: Errand[T]) -> tuple[T, socket.socket]:
        sock = await self._carry(errand, wire.ask_and_stay_async)
        try:
            return errand.result(), sock
        except BaseException:
            sock.close()
            raise

    async def _carry(
        self, errand: Errand[T], ask: Callable[[str, int, wire.Question, float], Awaitable[R]]
    ) -> R:
        while True:  # Retry.attempts_max ends it
            seconds = errand.attempt(time.monotonic())
            try:
                return await ask(self.broker.host, self.broker.port, errand, seconds)
            except wire.TROUBLE as trouble:
                pause = errand.pause_after(trouble, time.monotonic())
            except CallerFailed as failed:
                error = failed.error
                break
            await asyncio.sleep(pause)
        raise error


def _raise_first(outcomes: list[BrokerError | None]) -> None:
    for error in filter(None, outcomes):
        raise error
