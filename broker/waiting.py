"""The clients that wait for a worker: one fair queue for each pool.

Whoever came first is served first among those who could use what has become free. A waiter that gives up
leaves its place at once. One that wants several workers at once holds none of them before it gets them all,
so that no two can wait for what the other has (granting.py has the rule).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from broker.core.errors import BrokerError
from broker.core.model import Lease
from broker.core.planning import Need
from broker.core.replies import Pending
from broker.core.wish import Wish


@dataclass(frozen=True, slots=True)
class Terms:
    """What an ACQUIRE asks for beyond a worker: `count` leases, or `least` of them when the wait is over."""

    number: int  # no two are alike: each wants machines of its own
    ttl_seconds: float | None  # None: what the pool says when they are granted
    count: int = 1
    least: int = 1
    bound: bool = False  # the leases live as long as the connection


@dataclass(eq=False, slots=True)
class Waiter:
    """One client in the queue; `served` becomes its leases, or the error it shall hear.

    `terms` are those of an ACQUIRE, None for GET_WORKER. `say` writes a PENDING line to the client.
    """

    pool: str
    client: str
    exclusive: bool
    wish: Wish
    asked_at: float
    served: asyncio.Future[list[Lease]]
    terms: Terms | None = None
    say: Callable[[bytes], None] | None = None
    told: Pending | None = None  # the last PENDING line
    told_at: float = 0.0
    found: int = 0  # of what it wants, so much is free already: it waits for the rest

    def leases(self) -> list[Lease]:
        """What it was served with: nothing, when it was not."""
        done = self.served.done() and not self.served.cancelled() and self.served.exception() is None
        return self.served.result() if done else []

    @property
    def count(self) -> int:
        """How many leases it wants at once."""
        return self.terms.count if self.terms else 1

    @property
    def lacking(self) -> int:
        """For how many it waits."""
        return self.count - self.found

    @property
    def least(self) -> int:
        """How many will do when the wait is over."""
        return self.terms.least if self.terms else 1

    @property
    def need(self) -> tuple[str, Wish]:
        """One client with one wish needs one machine, on however many connections it asks; an ACQUIRE needs
        machines of its own (no client's name has a blank)."""
        return self.who, self.wish

    @property
    def who(self) -> str:
        """Whoever needs a machine: the client, or an ACQUIRE of its."""
        return self.client if self.terms is None else f"{self.client} {self.terms.number}"


class Waiting:
    """The queues."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[Waiter, None]] = {}
        self._since_at: dict[str, float] = {}  # by pool: when the queue was last joined with nobody in it

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def join(self, waiter: Waiter) -> None:
        """Take a place: by the time of asking, so that one who comes back is not sent to the end."""
        queue = self._queues.setdefault(waiter.pool, {})
        if all(other.served.done() for other in queue):
            self._since_at[waiter.pool] = waiter.asked_at
        last = next(reversed(queue), None)
        queue[waiter] = None
        if last is not None and last.asked_at > waiter.asked_at:
            self._queues[waiter.pool] = dict.fromkeys(sorted(queue, key=lambda other: other.asked_at))

    def leave(self, waiter: Waiter) -> None:
        self._queues.get(waiter.pool, {}).pop(waiter, None)

    def since_at(self, pool: str) -> float | None:
        """Since when there has always been somebody in the queue; None when there is nobody."""
        waits = any(not waiter.served.done() for waiter in self._queues.get(pool, ()))
        return self._since_at[pool] if waits else None

    def of(self, pool: str) -> list[Waiter]:
        return [waiter for waiter in self._queues.get(pool, ()) if not waiter.served.done()]

    def needs(
        self, pool: str, caps: Caps | None = None, has_own: Callable[[Waiter], object] | None = None
    ) -> list[Need]:
        """What they wait for, the one who came first at the front; those who want the same are one need. One
        that `has_own` needs nothing."""
        groups: dict[tuple[Wish, bool], dict[str, int]] = {}
        known: dict[int, tuple[Wish, dict[str, int]]] = {}  # by wish: telling thousands apart costs more
        for waiter in self._queues.get(pool, ()):
            if waiter.served.done() or (has_own is not None and has_own(waiter)):
                continue
            number = 2 * id(waiter.wish) + waiter.exclusive
            found = known.get(number)
            if found is None:
                group = groups.setdefault((waiter.wish, waiter.exclusive), {})
                found = known[number] = (waiter.wish, group)
            if waiter.who not in found[1]:
                found[1][waiter.who] = waiter.lacking if caps is None else caps.within(waiter)
        return [Need(wish, sum(each.values()), exclusive) for (wish, exclusive), each in groups.items()]

    def one_by_one(
        self, pool: str, caps: Caps | None = None, has_own: Callable[[Waiter], object] | None = None
    ) -> Iterator[Need]:
        """The same, each for itself, in the order of the queue."""
        return (need for _, need in self.walk(pool, caps, has_own))

    def walk(
        self, pool: str, caps: Caps | None = None, has_own: Callable[[Waiter], object] | None = None
    ) -> Iterator[tuple[Waiter, Need]]:
        """Who needs what, in the order of the queue; of those who ask twice for the same the first."""
        known: set[tuple[str, Wish, bool]] = set()
        for waiter in self.of(pool):
            key = (*waiter.need, waiter.exclusive)
            if key not in known and not (has_own is not None and has_own(waiter)):
                known.add(key)
                lacking = waiter.lacking if caps is None else caps.within(waiter)
                yield waiter, Need(waiter.wish, lacking, waiter.exclusive)

    def is_served(self, lease_id: str) -> bool:
        """Whether somebody was served with a lease in this instant, and has not woken yet."""
        waiters = (waiter for queue in self._queues.values() for waiter in queue)
        return any(lease.id == lease_id for waiter in waiters for lease in waiter.leases())

    def fail(
        self, pool: str, error: BrokerError, concerns: Callable[[Waiter], bool] = lambda waiter: True
    ) -> bool:
        """Tell those who wait in the pool, as far as it concerns them, that waiting does not help. Returns
        whether anybody goes on."""
        going_on = False
        for waiter in self.of(pool):
            if concerns(waiter):
                waiter.served.set_exception(error)
                waiter.served.exception()  # retrieved: the client may be gone before it hears it
            else:
                going_on = True
        return going_on


class Caps:
    """How many workers more each client may have, as far as those who came before leave it any. For one walk
    through the queue. `room_of` tells it of a client, `seats` how many leases one worker takes."""

    def __init__(self, room_of: Callable[[str], int | None], seats: int) -> None:
        self._room_of = room_of
        self._seats = seats
        self._left: dict[str, int | None] = {}

    def within(self, waiter: Waiter) -> int:
        """What it lacks, as far as it may have it."""
        if waiter.client not in self._left:
            self._left[waiter.client] = self._room_of(waiter.client)
        left = self._left[waiter.client]
        if left is None:
            return waiter.lacking
        seats = 1 if waiter.exclusive else self._seats
        most = min(waiter.count, left * seats)
        self._left[waiter.client] = left + -most // seats
        return max(0, most - waiter.found)
