"""Waiting clients and machines on their way → what to order now. Pure.

The queue comes as needs: groups of clients that want the same. Machines that are on order or booting are
supply for every need they fit; the most particular need takes its share first, so that what fits anybody is
left for those who take anything. What is still missing is ordered as far as the caps leave room; where they
do not leave enough, in the order of the queue, client by client. Otherwise the work grows with the number of
different wishes and offerings, not with that of clients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from broker.core.model import Market, Offering, Worker
from broker.core.wish import ANYTHING, Wish

Kind = tuple[Wish, bool]  # what clients wait for, and whether for a worker to themselves

SEATS_MAX = 1_000_000  # of a shared worker whose pool sets no limit: more than there are clients


@dataclass(frozen=True, slots=True)
class Need:
    """So many waiting clients that want the same: each a worker to itself, or a seat on a shared one."""

    wish: Wish
    clients: int
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Purchase:
    """So many machines for a wish; with `spare` no client waits for them."""

    wish: Wish
    machines: int
    spare: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What to order, the client that has waited longest first; spare ones last. `missing` machines, for which
    clients wait, find no room. `lacking`: the wishes for which machines are ordered, or find no room."""

    purchases: tuple[Purchase, ...] = ()
    missing: int = 0
    lacking: tuple[Wish, ...] = field(default=(), compare=False)


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
    queue: Iterable[Need] = (),
    unsold: Collection[Wish] = (),
) -> Plan:
    """What to order now.

    `needs` in the order in which the first of each came; `queue`: the same clients one by one, in their
    order, which counts where there is not room for all; `coming`: machines on their way, by the offerings
    that each may turn out to be; `offerings`: what the pool can buy; `room`: so many machines may be ordered;
    `seats`: clients that share one worker, at most; `spare`: machines wanted beyond what clients wait for,
    already without those that are ready. For `unsold` wishes nothing can be bought now: of what is on its
    way they have what they fit, whoever came first, and for the others more is ordered.
    """
    room, queue = max(0, room), list(queue) if unsold else queue
    turns = Turns(coming, {need.wish for need in needs}, seats=seats)
    for need in queue if unsold else ():
        if need.wish in unsold:
            turns.lacks(need)
    supply = turns.rest
    sold = [need for need in _most_particular_first(needs, offerings) if need.wish not in unsold]
    short = [replace(need, clients=_unserved(supply, need, seats)) for need in sold]
    ahead: dict[Kind, int] = {}
    for need, lack in zip(sold, short, strict=True):
        kind = need.wish, need.exclusive
        ahead[kind] = ahead.get(kind, 0) + need.clients - lack.clients
    wanted = {need.wish: 0 for need in needs if need.wish not in unsold}
    ordered = _Supply({})
    for lack in short:
        wanted[lack.wish] += _machines(ordered, lack, offerings, seats)
    lacking = tuple(wish for wish, machines in wanted.items() if machines)
    missing = max(0, sum(wanted.values()) - room)
    if missing:
        in_order = [need for need in (queue or needs) if need.wish not in unsold]
        wanted = _in_turn(in_order, ahead, offerings, room, seats)
    purchases = [Purchase(wish, machines) for wish, machines in wanted.items() if machines]
    room -= sum(wanted.values())
    spares = min(max(0, spare - sum(supply.coming.values())), room)
    if spares:
        purchases.append(Purchase(ANYTHING, spares, spare=True))
    return Plan(tuple(purchases), missing, lacking)


def _machines(
    ordered: _Supply, need: Need, offerings: Sequence[Offering], seats: int, room: int = SEATS_MAX
) -> int:
    """How many machines, of no more than there is room for, to order for clients that find no seat on those
    that are to be ordered already."""
    if need.exclusive:
        return min(need.clients, room)
    clients = ordered.seat(need.wish, need.clients)
    machines = min(-(-clients // seats), room)
    if machines:
        bought = tuple(one for one in offerings if need.wish.fits(one))
        ordered.share(bought, machines * seats, clients)
    return machines


def _in_turn(
    queue: Iterable[Need], ahead: dict[Kind, int], offerings: Sequence[Offering], room: int, seats: int
) -> dict[Wish, int]:
    """So many machines for each wish, for those who came first among the unserved. `ahead`: so many of each
    kind are served by what is on its way."""
    wanted: dict[Wish, int] = {}
    ordered = _Supply({})
    for need in queue:
        if not room:
            break
        kind = need.wish, need.exclusive
        served = min(need.clients, ahead.get(kind, 0))
        ahead[kind] = ahead.get(kind, 0) - served
        left = replace(need, clients=need.clients - served)
        machines = _machines(ordered, left, offerings, seats, room) if left.clients else 0
        if machines:
            room -= machines
            wanted[need.wish] = wanted.get(need.wish, 0) + machines
    return wanted


class Turns:
    """Who in a queue will be served by what is on its way, asked in the queue's order: whoever came first is
    served first, with what the fewest of the `wishes` could use."""

    def __init__(
        self, coming: Mapping[tuple[Offering, ...], int], wishes: Collection[Wish], *, seats: int
    ) -> None:
        def sought(offerings: tuple[Offering, ...]) -> int:
            return sum(all(wish.fits(one) for one in offerings) for wish in wishes)

        self.rest = _Supply({one: coming[one] for one in sorted(coming, key=sought)})
        self._seats = seats

    def lacks(self, need: Need) -> int:
        """How much of it there is not, for the next one in the queue; the rest is taken."""
        return _unserved(self.rest, need, self._seats)


def _most_particular_first(needs: Sequence[Need], offerings: Sequence[Offering]) -> list[Need]:
    """Among those that are as particular, the queue's order counts."""
    choices = {need.wish: sum(need.wish.fits(one) for one in offerings) for need in needs}
    return sorted(needs, key=lambda need: choices[need.wish])


def _unserved(supply: _Supply, need: Need, seats: int) -> int:
    """Give the need what is on its way. For how many of its clients there is nothing left."""
    if need.exclusive:
        return need.clients - supply.take_all(need.wish, need.clients)
    clients = supply.seat(need.wish, need.clients)
    while clients > 0 and (machine := supply.take(need.wish)) is not None:
        clients = supply.share(machine, seats, clients)
    return clients
