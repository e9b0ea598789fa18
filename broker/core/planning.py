"""Waiting clients and machines on their way → what to order now. Pure.

The queue comes as needs: groups of clients that want the same. Machines that are on order or booting are
supply for every need they fit; the most particular need takes its share first, so that what fits anybody is
left for those who take anything. What is still missing is ordered in the order of the queue, as far as the
caps leave room. The work grows with the number of different wishes and offerings, not with that of clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.core.model import Market, Offering, Worker
from broker.core.wish import ANYTHING, Wish

SEATS_MAX = 1_000_000  # of a shared worker whose pool sets no limit: more than there are clients


@dataclass(frozen=True, slots=True)
class Need:
    """So many waiting clients that want the same: each a worker to itself, or a seat on a shared one."""

    wish: Wish
    clients: int
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Purchase:
    """So many machines for a wish."""

    wish: Wish
    machines: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to order, the client that has waited longest first. `missing` machines find no room."""

    purchases: tuple[Purchase, ...] = ()
    missing: int = 0


@dataclass(slots=True)
class _Seats:
    """What is left on a machine to be shared: whoever fits all of these may have it."""

    offerings: tuple[Offering, ...]
    left: int


@dataclass(slots=True)
class _Supply:
    """Machines on their way, by what they may turn out to be, and what has been given away of them."""

    coming: dict[tuple[Offering, ...], int]
    shared: list[_Seats] = field(default_factory=list)

    def take(self, wish: Wish) -> tuple[Offering, ...] | None:
        """One machine that fits in any case; None when there is none."""
        for offerings, count in self.coming.items():
            if count > 0 and all(wish.fits(one) for one in offerings):
                self.coming[offerings] = count - 1
                return offerings
        return None

    def take_all(self, wish: Wish, wanted: int) -> int:
        """At most so many machines that fit. Returns how many there were."""
        taken = 0
        for offerings, count in self.coming.items():
            if taken < wanted and count > 0 and all(wish.fits(one) for one in offerings):
                here = min(count, wanted - taken)
                self.coming[offerings] = count - here
                taken += here
        return taken

    def seat(self, wish: Wish, clients: int) -> int:
        """Seat clients on machines that are shared already. Returns how many find none."""
        for seats in self.shared:
            if clients and seats.left and all(wish.fits(one) for one in seats.offerings):
                here = min(seats.left, clients)
                seats.left -= here
                clients -= here
        return clients

    def share(self, offerings: tuple[Offering, ...], seats: int, clients: int) -> int:
        """Have a machine be shared. Returns how many of the clients find no seat on it."""
        self.shared.append(_Seats(offerings, max(0, seats - clients)))
        return max(0, clients - seats)


def by_offering(workers: Iterable[Worker]) -> dict[tuple[Offering, ...], int]:
    """How many workers there are of each offering."""
    found: dict[tuple[str, str, str, int | None, Market], list[Any]] = {}
    for (
        worker
    ) in workers:  # each holds an offering of its own: comparing thousands of them costs more than this
        one = worker.offering
        kind = (one.instance_type, one.zone, one.region, one.cores, one.market)
        entry = found.get(kind)
        if entry is None:
            found[kind] = [one, 1]
        else:
            entry[1] += 1
    return {(offering,): count for offering, count in found.values()}


def plan(
    needs: Sequence[Need],
    coming: Mapping[tuple[Offering, ...], int],
    offerings: Sequence[Offering],
    room: int,
    *,
    seats: int = SEATS_MAX,
    spare: int = 0,
) -> Plan:
    """What to order now.

    `needs` in the order of the queue; `coming`: machines on their way, by the offerings that each may turn
    out to be; `offerings`: what the pool can buy; `room`: so many machines may be ordered; `seats`: clients
    that share one worker, at most; `spare`: machines wanted beyond what clients wait for, already without
    those that are ready.
    """
    supply, short = _Supply(dict(coming)), dict.fromkeys(range(len(needs)), 0)
    choices = {need.wish: sum(need.wish.fits(one) for one in offerings) for need in needs}
    for number in sorted(short, key=lambda one: choices[needs[one].wish]):  # stable: the queue's order counts
        need = needs[number]
        if need.exclusive:
            short[number] = need.clients - supply.take_all(need.wish, need.clients)
        else:
            short[number] = _share(supply, need, offerings, seats)
    wanted = {need.wish: 0 for need in needs}
    for number, machines in short.items():
        wanted[needs[number].wish] += machines
    left_over = sum(supply.coming.values())
    wanted[ANYTHING] = wanted.get(ANYTHING, 0) + max(0, spare - left_over)
    return _within(wanted, room)


def _within(wanted: Mapping[Wish, int], room: int) -> Plan:
    purchases, missing = [], 0
    for wish, machines in wanted.items():
        here = min(machines, max(0, room))
        room, missing = room - here, missing + machines - here
        if here:
            purchases.append(Purchase(wish, here))
    return Plan(tuple(purchases), missing)


def _share(supply: _Supply, need: Need, offerings: Sequence[Offering], seats: int) -> int:
    """How many machines these sharers lack, after all seats on what comes anyway."""
    clients, lacking = supply.seat(need.wish, need.clients), 0
    while clients > 0 and (machine := supply.take(need.wish)) is not None:
        clients = supply.share(machine, seats, clients)
    if clients > 0:
        bought = tuple(one for one in offerings if need.wish.fits(one))
        lacking = -(-clients // seats)
        supply.share(bought, lacking * seats, clients)
    return lacking
