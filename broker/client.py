"""The Python client, blocking and async: the single commands of the protocol.

The two clients only carry errands, a connection for each: one waits in its thread, one in an event loop. An
`ERROR` reply is raised as the broker's own typed error, and nothing but an address is ever returned as one.
Every `Client` has a name of its own, because a hold belongs to a name. Blocks that hold a worker are in
held_worker.py and held_lease.py.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar, Unpack

from broker import wire
from broker.core import protocol
from broker.core.errors import BadRequest
from broker.core.protocol import GetWorker, ListAll, Ping, Release, Status, TerminateAll
from broker.errand import (
    Errand,
    Retry,
    Sendable,
    Wish,
    endpoint,
    next_number,
    own_name,
    read_ok,
    read_terminated,
    read_workers,
)

ANSWER_SECONDS = 10.0  # for an answer, beyond the wait that the command itself asks for
WAIT_SECONDS = 900.0  # how long the broker lets GET_WORKER wait when nobody says: its setting `wait`
RETRY = Retry()

T = TypeVar("T")


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

    def _get_worker(self, wish: Wish) -> Errand[str]:
        command = GetWorker(**wish, client=self.name)
        wait = WAIT_SECONDS if command.wait is None else command.wait
        return self._errand(command, protocol.read_address, wait + self.timeout)

    def _ping(self, address: str) -> Errand[None]:
        return self._errand(Ping(address, self.name), read_ok)

    def _release(self, address: str, force: bool) -> Errand[None]:
        return self._errand(Release(address, force, self.name), read_ok)

    def _errand(
        self, command: Sendable | str, read: Callable[[str], T], seconds: float | None = None
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

    def list_all(self) -> list[dict[str, Any]]:
        """The machines that the cloud lists under the broker's tag."""
        return self._run(self._errand(ListAll(), read_workers))

    def terminate_all(self) -> list[str]:
        """End every machine of the broker: their ids. Never sent twice."""
        return self._run(self._errand(TerminateAll(), read_terminated))

    def request(self, line: str, *, timeout: float | None = None) -> str:
        """The first line of the reply to any command, which is sent once and as it is."""
        return self._run(self._errand(line, protocol.read_reply, timeout))

    def _run(self, errand: Errand[T]) -> T:
        while True:  # Retry.attempts_max ends it
            seconds = errand.attempt(time.monotonic())
            try:
                wire.ask(self.broker.host, self.broker.port, errand, seconds)
            except wire.TROUBLE as trouble:
                pause = errand.pause_after(trouble, time.monotonic())
            else:
                return errand.result()
            time.sleep(pause)


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

    async def list_all(self) -> list[dict[str, Any]]:
        """The machines that the cloud lists under the broker's tag."""
        return await self._run(self._errand(ListAll(), read_workers))

    async def terminate_all(self) -> list[str]:
        """End every machine of the broker: their ids. Never sent twice."""
        return await self._run(self._errand(TerminateAll(), read_terminated))

    async def request(self, line: str, *, timeout: float | None = None) -> str:
        """The first line of the reply to any command, which is sent once and as it is."""
        return await self._run(self._errand(line, protocol.read_reply, timeout))

    async def _run(self, errand: Errand[T]) -> T:
        while True:  # Retry.attempts_max ends it
            seconds = errand.attempt(time.monotonic())
            try:
                await wire.ask_async(self.broker.host, self.broker.port, errand, seconds)
            except wire.TROUBLE as trouble:
                pause = errand.pause_after(trouble, time.monotonic())
            else:
                return errand.result()
            await asyncio.sleep(pause)
