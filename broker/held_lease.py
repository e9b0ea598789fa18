"""Leases for the time of a `with` block, blocking and async.

    with broker.acquire("host", cores=64) as lease:
        print(lease.remote_eval("expr 1+1"))

By default the leases are tied to a connection of the block's own: when this program ends, however it ends,
the workers are free. Leaving the block is DONE, which gives the workers back warm, before the connection is
closed. What keeps the leases meanwhile is in lease_keeper.py.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Literal, Unpack, overload

from broker.client import ANSWER_SECONDS, RETRY, AsyncClient, Client
from broker.core.errors import BadRequest
from broker.errand import Retry
from broker.lease_errands import Wanted
from broker.lease_keeper import AsyncHeldLease, AsyncKeeper, HeldLease, Keeper, OnNotice

RENEW_SECONDS = 60.0  # a lease lives for minutes, so that several renewals may fail before it ends
RENEW_SECONDS_MAX = 86_400.0  # no lease lives longer
Hold = Literal["connection", "renew"]


class Holding(Wanted, total=False):
    """How `acquire` asks and holds, beside what it wants. Durations are in seconds.

    `hold`: "connection" ties the leases to a connection of the block's own; with "renew" they outlive a
    broken network, and this program by their `ttl` (without it, the pool's idle_timeout). RENEW goes every
    `renew_seconds`, more often where a lease does not last that long. `on_notice` is called with each
    `Notice` about these leases, with hold="connection" only. `client` replaces the block's own name;
    `timeout` and `retry` are those of `Client`.
    """

    client: str | None
    timeout: float
    retry: Retry
    hold: Hold
    renew_seconds: float
    on_notice: OnNotice | None


@overload
def acquire(
    host: str | None = None,
    port: int | None = None,
    *,
    count: None = None,
    on_lost: Callable[[HeldLease], object] | None = None,
    **how: Unpack[Holding],
) -> AbstractContextManager[HeldLease]: ...


@overload
def acquire(
    host: str | None = None,
    port: int | None = None,
    *,
    count: int,
    on_lost: Callable[[HeldLease], object] | None = None,
    **how: Unpack[Holding],
) -> AbstractContextManager[list[HeldLease]]: ...


def acquire(
    host: str | None = None,
    port: int | None = None,
    *,
    count: int | None = None,
    on_lost: Callable[[HeldLease], object] | None = None,
    **how: Unpack[Holding],
) -> AbstractContextManager[HeldLease] | AbstractContextManager[list[HeldLease]]:
    """A new lease of a ready worker, or a list of `count` of them, held while the block runs.

    `host`, which may be `host:port`, is the broker's; without it COMPUTE_BROKER_HOST and COMPUTE_BROKER_PORT
    say where, else it is this machine. `how` is what `Holding` has: cores, pool, wait, min, on_pending and
    more. When a lease ends before the block does, its `lost` is set and `on_lost` is called with it, in a
    thread of the block's.

    Raises what `Client.acquire` raises, and at the end BrokerUnreachable when the broker cannot be told,
    unless the block failed. A lease that had ended by then is none of the block's faults.
    """
    if count is None:
        return _one(_held(host, port, None, on_lost, **how))
    return _held(host, port, count, on_lost, **how)


@overload
def aacquire(
    host: str | None = None,
    port: int | None = None,
    *,
    count: None = None,
    on_lost: Callable[[AsyncHeldLease], object] | None = None,
    **how: Unpack[Holding],
) -> AbstractAsyncContextManager[AsyncHeldLease]: ...


@overload
def aacquire(
    host: str | None = None,
    port: int | None = None,
    *,
    count: int,
    on_lost: Callable[[AsyncHeldLease], object] | None = None,
    **how: Unpack[Holding],
) -> AbstractAsyncContextManager[list[AsyncHeldLease]]: ...


def aacquire(
    host: str | None = None,
    port: int | None = None,
    *,
    count: int | None = None,
    on_lost: Callable[[AsyncHeldLease], object] | None = None,
    **how: Unpack[Holding],
) -> AbstractAsyncContextManager[AsyncHeldLease] | AbstractAsyncContextManager[list[AsyncHeldLease]]:
    """`acquire` for an event loop: a task keeps the leases, and a block that is cancelled gives them back
    too.

    The callbacks are plain functions, called in the loop.
    """
    if count is None:
        return _aone(_aheld(host, port, None, on_lost, **how))
    return _aheld(host, port, count, on_lost, **how)


@contextmanager
def _one(held: AbstractContextManager[list[HeldLease]]) -> Iterator[HeldLease]:
    with held as leases:
        yield leases[0]


@asynccontextmanager
async def _aone(held: AbstractAsyncContextManager[list[AsyncHeldLease]]) -> AsyncIterator[AsyncHeldLease]:
    async with held as leases:
        yield leases[0]


@contextmanager
def _held(
    host: str | None,
    port: int | None,
    count: int | None,
    on_lost: Callable[[HeldLease], object] | None,
    *,
    client: str | None = None,
    timeout: float = ANSWER_SECONDS,
    retry: Retry = RETRY,
    hold: Hold = "connection",
    renew_seconds: float = RENEW_SECONDS,
    on_notice: OnNotice | None = None,
    **wanted: Unpack[Wanted],
) -> Iterator[list[HeldLease]]:
    _require_sense(hold, renew_seconds, on_notice)
    asker = Client(host, port, client=client, timeout=timeout, retry=retry)
    sock: socket.socket | None = None
    if hold == "connection":
        granted, sock = asker.acquire_and_stay(count=count, **wanted)
    else:
        granted = asker.acquire(count=count, **wanted)
    keeper = Keeper(asker, granted, sock, renew_seconds, on_lost, on_notice)
    try:
        keeper.start()
        yield keeper.leases
    except BaseException as failure:
        keeper.leave(failure)
        raise
    keeper.leave(None)


@asynccontextmanager
async def _aheld(
    host: str | None,
    port: int | None,
    count: int | None,
    on_lost: Callable[[AsyncHeldLease], object] | None,
    *,
    client: str | None = None,
    timeout: float = ANSWER_SECONDS,
    retry: Retry = RETRY,
    hold: Hold = "connection",
    renew_seconds: float = RENEW_SECONDS,
    on_notice: OnNotice | None = None,
    **wanted: Unpack[Wanted],
) -> AsyncIterator[list[AsyncHeldLease]]:
    _require_sense(hold, renew_seconds, on_notice)
    asker = AsyncClient(host, port, client=client, timeout=timeout, retry=retry)
    sock: socket.socket | None = None
    if hold == "connection":
        granted, sock = await asker.acquire_and_stay(count=count, **wanted)
    else:
        granted = await asker.acquire(count=count, **wanted)
    keeper = AsyncKeeper(asker, granted, sock, renew_seconds, on_lost, on_notice)
    try:
        await keeper.start()
        yield keeper.leases
    except BaseException as failure:
        await keeper.leave(failure)
        raise
    await keeper.leave(None)


def _require_sense(hold: str, renew_seconds: float, on_notice: OnNotice | None) -> None:
    if hold not in ("connection", "renew"):
        raise BadRequest(f"hold is 'connection' or 'renew', not {hold!r}")
    if not 0 < renew_seconds <= RENEW_SECONDS_MAX:
        raise BadRequest(f"renew_seconds is a number of seconds above 0, up to {RENEW_SECONDS_MAX:.0f}")
    if on_notice is not None and hold != "connection":
        raise BadRequest("on_notice needs hold='connection'; Client.watch tells notices without it")
