"""A worker for the time of a `with` block, blocking and async.

    with broker.worker("host", cores=64) as w:
        print(w.remote_eval("expr 1+1"))

A block pings in the background while it runs and releases at its end, whatever ends it. A ping that is still
under way is waited for before the release: one that arrived later would take the worker again. Every block
has a name of its own, so that two blocks which share a worker do not release each other's.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Unpack

from broker import dserv, wire
from broker.client import ANSWER_SECONDS, RETRY, Asker, AsyncClient, Client
from broker.core.errors import BadRequest, BrokerError, Denied, WorkerNotFound
from broker.errand import Retry, Wish
from broker.lost import AsyncLost, Lost

PING_SECONDS = 60.0  # a lease lives for minutes, so that several pings may fail before it ends
PING_SECONDS_MAX = 86_400.0  # more is no pinging
PING_AGAIN_SECONDS = 10.0  # after a ping that failed


@contextmanager
def worker(
    host: str | None = None,
    port: int | None = None,
    *,
    client: str | None = None,
    timeout: float = ANSWER_SECONDS,
    retry: Retry = RETRY,
    worker_port: int = dserv.WORKER_PORT,
    ping_seconds: float = PING_SECONDS,
    release: bool = True,
    on_lost: Callable[[HeldWorker], object] | None = None,
    **wish: Unpack[Wish],
) -> Iterator[HeldWorker]:
    """A worker, held while the block runs: pinged every `ping_seconds` by a thread, released at the end.

    `host`, which may be `host:port`, is the broker's; without it COMPUTE_BROKER_HOST and COMPUTE_BROKER_PORT
    say where, else it is this machine. `wish` is what `Client.get_worker` takes: cores, type, pool, region,
    wait, exclusive. `release=False` leaves the worker warm for whoever comes next. `client` replaces the
    block's own name; blocks that share a name share their hold on a worker. When the broker does not know the
    worker any more, its `lost` is set and `on_lost` is called with it, in the thread that pings.

    Raises what `Client.get_worker` raises, and at the end what `release` raises, unless the block failed.
    """
    _require_interval(ping_seconds)
    asker = Client(host, port, client=client, timeout=timeout, retry=retry)
    held = HeldWorker(asker, asker.get_worker(**wish), worker_port, ping_seconds, on_lost)
    try:
        held._enter()
        yield held
    except BaseException as failure:
        held._leave(release, failure)
        raise
    held._leave(release, None)


@asynccontextmanager
async def aworker(
    host: str | None = None,
    port: int | None = None,
    *,
    client: str | None = None,
    timeout: float = ANSWER_SECONDS,
    retry: Retry = RETRY,
    worker_port: int = dserv.WORKER_PORT,
    ping_seconds: float = PING_SECONDS,
    release: bool = True,
    on_lost: Callable[[AsyncHeldWorker], object] | None = None,
    **wish: Unpack[Wish],
) -> AsyncIterator[AsyncHeldWorker]:
    """`worker` for an event loop: a task pings, and a block that is cancelled releases too."""
    _require_interval(ping_seconds)
    asker = AsyncClient(host, port, client=client, timeout=timeout, retry=retry)
    held = AsyncHeldWorker(asker, await asker.get_worker(**wish), worker_port, ping_seconds, on_lost)
    try:
        held._enter()
        yield held
    except BaseException as failure:
        await held._leave(release, failure)
        raise
    await held._leave(release, None)


class _Held:
    """A worker in a block. `client` is the name it is held under, `ping_error` why the last ping failed."""

    def __init__(self, asker: Asker, address: str, port: int, ping_seconds: float) -> None:
        self.address = address
        self.port = port
        self.client = asker.name
        self.ping_error: BrokerError | None = None
        self._ping_seconds = ping_seconds
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<worker {wire.place(self.address, self.port)} held by {self.client}>"

    def _inherited(self) -> bool:
        """Whether this is a forked child, which leaves the block as well: the worker is its parent's."""
        return os.getpid() != self._pid

    def _heard(self, error: BrokerError | None) -> float | None:
        """Take in how a ping went. Returns the seconds until the next one, None when the worker is lost."""
        self.ping_error = error
        if isinstance(error, WorkerNotFound | Denied):  # Denied: somebody else has it, and alone
            return None
        return self._ping_seconds if error is None else min(self._ping_seconds, PING_AGAIN_SECONDS)


class HeldWorker(_Held):
    """A worker in a `with` block. `lost` is a threading.Event that is true when it is set."""

    def __init__(
        self,
        asker: Client,
        address: str,
        port: int,
        ping_seconds: float,
        on_lost: Callable[[HeldWorker], object] | None,
    ) -> None:
        super().__init__(asker, address, port, ping_seconds)
        self.lost = Lost()
        self._asker = asker
        self._on_lost = on_lost
        self._over = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name=f"ping {address}", daemon=True)

    def remote_eval(self, script: str, timeout: float = dserv.EVAL_SECONDS) -> str:
        """The result of a Tcl script on the worker: see `dserv.remote_eval`."""
        return dserv.remote_eval(self.address, script, self.port, timeout)

    def _enter(self) -> None:
        self._pulse.start()

    def _beat(self) -> None:
        seconds: float | None = self._ping_seconds
        while seconds is not None and not self._over.wait(seconds):
            try:
                self._asker.ping(self.address)
            except BrokerError as error:
                seconds = self._heard(error)
            else:
                seconds = self._heard(None)
        if seconds is None:
            self.lost.set()
            if self._on_lost:
                self._on_lost(self)

    def _leave(self, release: bool, failure: BaseException | None) -> None:
        if self._inherited():
            return
        self._over.set()
        if self._pulse.is_alive():
            self._pulse.join(self._asker.timeout)  # a ping takes no longer
        if release and not self.lost:
            try:
                self._asker.release(self.address)
            except BrokerError as error:
                _tell(error, failure)


class AsyncHeldWorker(_Held):
    """A worker in an `async with` block. `lost` is an asyncio.Event that is true when it is set."""

    def __init__(
        self,
        asker: AsyncClient,
        address: str,
        port: int,
        ping_seconds: float,
        on_lost: Callable[[AsyncHeldWorker], object] | None,
    ) -> None:
        super().__init__(asker, address, port, ping_seconds)
        self.lost = AsyncLost()
        self._asker = asker
        self._on_lost = on_lost
        self._over = asyncio.Event()
        self._pulse: asyncio.Task[None]

    async def remote_eval(self, script: str, timeout: float = dserv.EVAL_SECONDS) -> str:
        """The result of a Tcl script on the worker: see `dserv.remote_eval`."""
        return await dserv.aremote_eval(self.address, script, self.port, timeout)

    def _enter(self) -> None:
        self._pulse = asyncio.create_task(self._beat(), name=f"ping {self.address}")

    async def _beat(self) -> None:
        seconds: float | None = self._ping_seconds
        while seconds is not None and not await self._is_over_within(seconds):
            try:
                await self._asker.ping(self.address)
            except BrokerError as error:
                seconds = self._heard(error)
            else:
                seconds = self._heard(None)
        if seconds is None:
            self.lost.set()
            if self._on_lost:  # an error in it goes to the loop's exception handler
                asyncio.get_running_loop().call_soon(self._on_lost, self)

    async def _is_over_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        return self._over.is_set()

    async def _leave(self, release: bool, failure: BaseException | None) -> None:
        if self._inherited():
            return
        try:  # a second cancellation ends the waiting, not the release
            await asyncio.shield(asyncio.create_task(self._close(release)))
        except BrokerError as error:
            _tell(error, failure)

    async def _close(self, release: bool) -> None:
        self._over.set()
        await asyncio.wait({self._pulse}, timeout=self._asker.timeout)  # a ping takes no longer
        if release and not self.lost:
            await self._asker.release(self.address)


def _tell(error: BrokerError, failure: BaseException | None) -> None:
    """Raise the error of a release; if the block itself failed, note it there instead."""
    if failure is None:
        raise error
    failure.add_note(f"Nor could the worker be released: {error}")


def _require_interval(ping_seconds: float) -> None:
    if not 0 < ping_seconds <= PING_SECONDS_MAX:
        raise BadRequest(f"ping_seconds is a number of seconds above 0, up to {PING_SECONDS_MAX:.0f}")
