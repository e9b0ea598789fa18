"""The clients that wait for a worker: one fair queue for each pool.

Whoever came first is served first among those who could use what has become free. A waiter that gives up
leaves its place at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from broker.core.errors import BrokerError
from broker.core.model import Lease, Offering, Worker
from broker.core.policy import Demand
from broker.core.protocol import GetWorker


@dataclass(frozen=True, slots=True)
class Wish:
    """What a worker must be for a client; everything, when the client did not say."""

    cores: int | None = None
    type: str | None = None
    region: str | None = None

    @classmethod
    def of(cls, command: GetWorker) -> Wish:
        return cls(command.cores, command.type, command.region)

    def fits(self, offering: Offering) -> bool:
        """Whether the offering is what the client asked for. Unknown cores never fit a wish for cores."""
        return (
            (self.type is None or offering.instance_type == self.type)
            and (self.region is None or offering.region == self.region)
            and (self.cores is None or (offering.cores is not None and offering.cores >= self.cores))
        )

    def test(self) -> Callable[[Worker], bool] | None:
        return None if self == ANYTHING else lambda worker: self.fits(worker.offering)

    def __str__(self) -> str:
        words = (("cores", self.cores), ("type", self.type), ("region", self.region))
        return " ".join(f"{key}={value}" for key, value in words if value is not None)


ANYTHING = Wish()


@dataclass(eq=False, slots=True)
class Waiter:
    """One client in the queue; `served` becomes its lease, or the error it shall hear."""

    pool: str
    client: str
    exclusive: bool
    wish: Wish
    asked_at: float
    served: asyncio.Future[Lease]

    def lease(self) -> Lease | None:
        """What it was served with, if it was."""
        done = self.served.done() and not self.served.cancelled() and self.served.exception() is None
        return self.served.result() if done else None

    @property
    def need(self) -> tuple[str, Wish]:
        """One client with one wish needs one machine, on however many connections it asks."""
        return self.client, self.wish


class Waiting:
    """The queues."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[Waiter, None]] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def join(self, waiter: Waiter) -> None:
        """Take a place: by the time of asking, so that one who comes back is not sent to the end."""
        queue = self._queues.setdefault(waiter.pool, {})
        last = next(reversed(queue), None)
        queue[waiter] = None
        if last is not None and last.asked_at > waiter.asked_at:
            self._queues[waiter.pool] = dict.fromkeys(sorted(queue, key=lambda other: other.asked_at))

    def leave(self, waiter: Waiter) -> None:
        self._queues.get(waiter.pool, {}).pop(waiter, None)

    def of(self, pool: str) -> list[Waiter]:
        return [waiter for waiter in self._queues.get(pool, ()) if not waiter.served.done()]

    def demand(self, pool: str) -> Demand:
        waiters = self.of(pool)
        alone = {waiter.need for waiter in waiters if waiter.exclusive}
        return Demand(sharing=sum(not waiter.exclusive for waiter in waiters), exclusive=len(alone))

    def fail(self, pool: str, error: BrokerError, *, wish: Wish | None = None, supply: int = 0) -> None:
        """Tell those who wait in the pool (for that wish) that waiting does not help.

        `supply` machines are on their way: they are enough for everybody who shares, and for as many others.
        """
        concerned = [w for w in self.of(pool) if wish is None or w.wish == wish]
        needs = list(dict.fromkeys(waiter.need for waiter in concerned if waiter.exclusive))
        hopeless = set(needs[supply:])
        alone = [waiter for waiter in concerned if waiter.exclusive and waiter.need in hopeless]
        sharing = [] if supply else [waiter for waiter in concerned if not waiter.exclusive]
        for waiter in [*alone, *sharing]:
            waiter.served.set_exception(error)
            waiter.served.exception()  # retrieved: the client may be gone before it hears it
