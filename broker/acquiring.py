"""ACQUIRE: leases of their own, as many as asked for at once, and honest words while they are waited for.

A client holds nothing while it waits. What it is told at last is true in that instant, of every worker; when
that cannot be had, everything is given back and it has its old place in the queue.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from broker.admission import HAND_OUT_ATTEMPTS_MAX, Admission
from broker.clouds import is_known
from broker.context import Context
from broker.core.errors import BrokerError, CloudError, Draining, WaitTimedOut
from broker.core.model import Lease, Worker
from broker.core.money import USD_MICROS
from broker.core.policy import lease_room
from broker.core.protocol import Acquire
from broker.core.replies import Granted
from broker.core.settings import PoolSettings
from broker.core.wish import Wish
from broker.granting import NOT_HANDED_OUT, PROOF_GRACE_SECONDS, Granting
from broker.prospects import Prospects
from broker.waiting import Terms, Waiter

STARTING_SECONDS = 10.0  # between two lines while the first scan is waited for

Say = Callable[[bytes], None]


def timed_out(waiter: Waiter, prospects: Prospects, now: float) -> WaitTimedOut:
    """What a client hears when its wait is over: how long it was, and why."""
    sentence, why = _too_late(waiter, now), prospects.why(waiter)
    return WaitTimedOut(f"{sentence}: {why}" if why else sentence)


def not_proved(waiter: Waiter, deadline_at: float) -> WaitTimedOut:
    """What a client hears that was to have a worker, when its wait is over before the worker has answered."""
    return WaitTimedOut(
        f"{_too_late(waiter, deadline_at)}: what was free could not be shown to be ready in time; ask again"
    )


def _too_late(waiter: Waiter, at: float) -> str:
    who = "no worker" if waiter.count == 1 else f"fewer than {waiter.least} workers"
    return f"{who} became ready within {at - waiter.asked_at:.0f} s"


def granted(lease: Lease, worker: Worker, expires_unix: float, of: int) -> Granted:
    """What one of `of` lines that answer an ACQUIRE says. The worker was confirmed: it has an address."""
    assert worker.address is not None
    offering = worker.offering
    price = offering.price_usd_micros_per_hour
    return Granted(
        lease.id,
        worker.address,
        worker.port,
        worker.pool,
        offering.instance_type or None,
        worker.cores,
        offering.market,
        price / USD_MICROS if price else None,
        expires_unix,
        of,
    )


class Acquiring:
    """See the module. `demand` tells that somebody waits for a launch, and how many seconds at most;
    `pending` that it wants to hear how it stands."""

    def __init__(
        self,
        context: Context,
        admission: Admission,
        granting: Granting,
        prospects: Prospects,
        *,
        demand: Callable[[float], None],
        pending: Callable[[], None],
    ) -> None:
        self._context = context
        self._admission = admission
        self._granting = granting
        self._prospects = prospects
        self._demand = demand
        self._pending = pending
        self._now = context.clock.monotonic
        self._numbers = itertools.count(1)

    async def acquire(self, command: Acquire, client: str, say: Say) -> list[Lease]:
        """Leases whose workers are ready and proved in this instant. Raises BrokerError; then nothing is
        held, and so it is when this is cancelled."""
        name, pool = self._admission.pool(command.pool)
        asked_at, wish = self._now(), Wish.of(command)
        deadline_at = asked_at + (pool.wait if command.wait is None else command.wait)
        name, pool = await self._started(command, name, deadline_at, say)
        deadline_at = asked_at + (pool.wait if command.wait is None else command.wait)
        exclusive = command.exclusive or pool.exclusive
        terms = self._terms(command, pool, exclusive)
        waiter = Waiter(name, client, exclusive, wish, asked_at, _future(), terms, say)
        leases: list[Lease] = []
        try:
            for _ in range(HAND_OUT_ATTEMPTS_MAX):
                _, pool = self._admission.pool(name)  # a reload may have removed it meanwhile
                self._context.require_charge_somewhere(name)
                leases, last = await self._served(waiter, deadline_at)
                until_at = deadline_at + PROOF_GRACE_SECONDS
                good = await self._granting.all_confirmed(leases, pool, until_at)
                over = self._now() >= deadline_at
                if len(good) == len(leases) or (len(good) >= waiter.least and (last or over)):
                    self._granting.give_back([one for one in leases if one not in good], NOT_HANDED_OUT)
                    return good
                if over:
                    raise not_proved(waiter, deadline_at)
                waiter = self._again(waiter, leases)
            raise CloudError("workers are lost as fast as they become ready")
        except BaseException:  # it may stand in the queue, or have been served there in this instant
            self._leave(waiter)
            self._granting.give_back([*leases, *waiter.leases()], NOT_HANDED_OUT)
            raise

    async def _served(self, waiter: Waiter, deadline_at: float) -> tuple[list[Lease], bool]:
        """Its leases: it was served already, or is now, or in the queue, which it has left by then. And
        whether waiting longer brings no more."""
        leases = waiter.leases() or self._granting.take(waiter)
        if not leases:
            return await self._wait(waiter, deadline_at)
        self._leave(waiter)
        return leases, False

    def _terms(self, command: Acquire, pool: PoolSettings, exclusive: bool) -> Terms:
        """What is asked for, at most as much as the pool may ever have. Raises LimitReached."""
        room = lease_room(pool, self._context.settings.broker.max_workers, exclusive=exclusive)
        least = command.count if command.min is None else command.min
        refusal = room.refusal(least)
        if refusal is not None:
            raise refusal
        count = max(least, room.at_most(command.count))
        return Terms(next(self._numbers), command.ttl, count, least, command.hold is not None)

    async def _started(
        self, command: Acquire, pool: str, deadline_at: float, say: Say
    ) -> tuple[str, PoolSettings]:
        """Wait for the first complete scan of the pool's cloud. The pool for the wish: that one, or another
        when none was named. Raises what Admission.admit raises."""
        wish = Wish.of(command)
        while not is_known(clouds := self._context.clouds.of(pool)) and self._now() < deadline_at:
            if any(cloud.refusal(pool) is None for cloud in clouds):
                say(self._prospects.starting(pool).line())
            again_at = self._now() + STARTING_SECONDS
            try:
                await self._admission.recovered(pool, min(again_at, deadline_at))
            except WaitTimedOut:
                if again_at >= deadline_at:
                    raise
            except CloudError:
                break  # another pool may have what is asked for
        return await self._admission.admit(command.pool, wish, deadline_at)

    async def _wait(self, waiter: Waiter, deadline_at: float) -> tuple[list[Lease], bool]:
        """Served in the queue, or (True) with what there is when that is over and it is enough."""
        if self._admission.closing:
            raise Draining
        self._join(waiter, deadline_at)
        try:
            async with asyncio.timeout(max(0.0, deadline_at - self._now())):
                # whoever waits is in the queue until it leaves
                return await asyncio.shield(waiter.served), False
        except TimeoutError:
            leases = waiter.leases() or self._granting.take(waiter, waiter.least)
            if leases:
                return leases, True
            raise timed_out(waiter, self._prospects, self._now()) from None
        except BrokerError:  # waiting does not help
            leases = self._granting.take(waiter, waiter.least)
            if leases:
                return leases, True
            raise
        finally:
            self._leave(waiter)

    def _join(self, waiter: Waiter, deadline_at: float) -> None:
        if not waiter.served.done():
            self._context.waiting.join(waiter)
            self._granting.serve_groups(waiter.pool)
            self._demand(max(0.0, deadline_at - self._now()))
            self._pending()

    def _leave(self, waiter: Waiter) -> None:
        self._context.waiting.leave(waiter)
        self._granting.serve_after(waiter)

    def _again(self, waiter: Waiter, leases: list[Lease]) -> Waiter:
        """The same client, back in its old place before what it held becomes free to those behind it."""
        after = Waiter(
            waiter.pool,
            waiter.client,
            waiter.exclusive,
            waiter.wish,
            waiter.asked_at,
            _future(),
            waiter.terms,
            waiter.say,
            waiter.told,
            waiter.told_at,
        )
        self._context.waiting.join(after)
        self._granting.give_back(leases, NOT_HANDED_OUT)
        return after


def _future() -> asyncio.Future[list[Lease]]:
    return asyncio.get_running_loop().create_future()
