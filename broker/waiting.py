"""The clients that wait for a worker: one fair queue for each pool.

Whoever came first is served first among those who could use what has become free. A waiter that gives up
leaves its place at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from broker.core.errors import BrokerError
from broker.core.model import Lease
from broker.core.planning import Need
from broker.core.wish import Wish


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

    def needs(self, pool: str) -> list[Need]:
        """What they wait for, the one who came first at the front; those who want the same are one need."""
        groups: dict[tuple[Wish, bool], dict[tuple[str, Wish], None]] = {}
        for waiter in self.of(pool):
            group = groups.setdefault((waiter.wish, waiter.exclusive), {})
            group[waiter.need] = None
        return [Need(wish, len(clients), exclusive) for (wish, exclusive), clients in groups.items()]

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
