"""What the queue needs, held against what is on its way: as few machines as serve everybody, and no more."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.model import Market, Offering
from broker.core.planning import Need, Plan, Purchase, Turns, plan
from broker.core.wish import ANYTHING, Wish
from tests.core.generated import MANY

SMALL, BIG = (Offering("moon", kind, Market.SPOT, cores=n) for kind, n in (("small", 2), ("big", 64)))
OFFERINGS = (SMALL, BIG)
Coming = dict[tuple[Offering, ...], int]
TWO_CORES, MANY_CORES, SMALLEST = Wish(cores=2), Wish(cores=64), Wish(type="small")
ENOUGH = 1_000


def alone(clients: int, wish: Wish = ANYTHING) -> Need:
    return Need(wish, clients, exclusive=True)


def shared(clients: int, wish: Wish = ANYTHING) -> Need:
    return Need(wish, clients, exclusive=False)


def planned(
    *needs: Need,
    coming: Coming | None = None,
    room: int = ENOUGH,
    seats: int = ENOUGH,
    spare: int = 0,
) -> Plan:
    return plan(needs, coming or {}, OFFERINGS, room, seats=seats, spare=spare)


def machines(found: Plan) -> int:
    return sum(one.machines for one in found.purchases)


def test_nobody_waits_and_nothing_is_ordered() -> None:
    assert planned() == planned(coming={(BIG,): 3}) == Plan()


def test_a_thousand_clients_that_share_need_one_machine() -> None:
    assert planned(shared(1000)) == Plan((Purchase(ANYTHING, 1),))


def test_clients_that_share_nothing_need_one_machine_each() -> None:
    assert planned(alone(3)) == Plan((Purchase(ANYTHING, 3),))
    assert planned(shared(5), alone(2)) == Plan((Purchase(ANYTHING, 3),))


def test_sharers_need_as_many_machines_as_have_seats_for_them() -> None:
    assert machines(planned(shared(9), seats=4)) == 3
    assert machines(planned(shared(8), seats=4)) == 2
    assert machines(planned(shared(9), seats=4, coming={(BIG,): 1})) == 2


def test_machines_on_their_way_are_supply_for_whom_they_fit() -> None:
    coming: Coming = {(SMALL,): 1, (BIG,): 1}
    assert planned(alone(2), coming=coming) == Plan()
    assert planned(alone(2, MANY_CORES), coming=coming) == Plan((Purchase(MANY_CORES, 1),))
    assert planned(shared(5, SMALLEST), coming=coming) == Plan()


def test_a_machine_that_may_turn_out_too_small_is_no_supply_for_who_needs_a_big_one() -> None:
    either: Coming = {(SMALL, BIG): 1}
    assert planned(alone(1), coming=either) == Plan()
    assert machines(planned(alone(1, MANY_CORES), coming=either)) == 1


def test_who_takes_anything_leaves_the_particular_machine_to_who_needs_it() -> None:
    coming: Coming = {(BIG,): 1, (SMALL,): 1}
    assert planned(alone(1), alone(1, MANY_CORES), coming=coming) == Plan()


def test_sharers_with_different_wishes_share_a_machine_that_suits_all() -> None:
    assert planned(shared(1), shared(1, TWO_CORES), shared(1, MANY_CORES)) == Plan((Purchase(MANY_CORES, 1),))
    assert machines(planned(shared(1, SMALLEST), shared(1, MANY_CORES))) == 2


def test_the_room_goes_to_who_came_first() -> None:
    found = planned(alone(2, SMALLEST), alone(2, MANY_CORES), room=3)
    assert found == Plan((Purchase(SMALLEST, 2), Purchase(MANY_CORES, 1)), missing=1)
    assert planned(alone(2), room=0) == planned(alone(2), room=-1) == Plan(missing=2)


def test_spares_are_ordered_beyond_what_clients_wait_for() -> None:
    assert machines(planned(spare=2)) == 2
    assert machines(planned(alone(1), spare=2)) == 3
    assert machines(planned(alone(1), spare=2, coming={(BIG,): 2})) == 1
    assert planned(spare=1, coming={(BIG,): 2}) == Plan()


WISHES = st.sampled_from([ANYTHING, TWO_CORES, MANY_CORES, SMALLEST, Wish(type="big")])
NEEDS = st.lists(st.builds(Need, WISHES, st.integers(1, 5), st.booleans()), max_size=5)
COMING = st.dictionaries(st.sampled_from([(SMALL,), (BIG,), (SMALL, BIG)]), st.integers(0, 4))


def test_where_there_is_not_room_for_all_the_queue_decides() -> None:
    """All clients of the first wish had come before any of the next."""
    first, second, third = Need(ANYTHING, 1, True), Need(MANY_CORES, 1, True), Need(ANYTHING, 1, True)
    needs = [Need(ANYTHING, 2, True), second]
    found = plan(needs, {}, OFFERINGS, 2, queue=iter([first, second, third]))
    assert found == Plan((Purchase(ANYTHING, 1), Purchase(MANY_CORES, 1)), missing=1)


def test_a_seat_that_is_free_on_a_machine_to_be_ordered_takes_no_room() -> None:
    sharers = [Need(ANYTHING, 1, False) for _ in range(5)]
    needs = [Need(ANYTHING, 5, False), Need(MANY_CORES, 1, True)]
    found = plan(needs, {}, OFFERINGS, 2, seats=2, queue=iter([*sharers[:2], needs[1], *sharers[2:]]))
    assert found == Plan((Purchase(ANYTHING, 1), Purchase(MANY_CORES, 1)), missing=2)


def test_a_seat_on_a_machine_for_which_there_is_no_room_is_no_seat() -> None:
    """The second in the queue was to share the machine of the fourth, which was never ordered."""
    small, cores, big = shared(1, SMALLEST), shared(1, TWO_CORES), shared(1, MANY_CORES)
    queue = [small, cores, alone(1, MANY_CORES), big]
    found = plan(queue, {}, OFFERINGS, 2, seats=1, queue=iter(queue))
    assert found.purchases == (Purchase(SMALLEST, 1), Purchase(TWO_CORES, 1))


def test_what_is_on_its_way_is_first_for_those_for_whom_nothing_can_be_bought() -> None:
    needs = [alone(1), alone(1, MANY_CORES)]
    found = plan(needs, {(BIG,): 1}, OFFERINGS, 5, queue=iter(needs), unsold={ANYTHING})
    assert found == Plan((Purchase(MANY_CORES, 1),))
    assert plan(needs, {(BIG,): 1}, OFFERINGS, 5) == Plan((Purchase(ANYTHING, 1),))


def test_who_came_first_is_served_first_by_what_is_on_its_way() -> None:
    turns = Turns({(BIG,): 1}, {ANYTHING, MANY_CORES}, seats=ENOUGH)
    assert turns.lacks(Need(ANYTHING, 1, True)) == 0
    assert turns.lacks(Need(MANY_CORES, 1, True)) == 1


def test_who_takes_anything_takes_what_the_others_cannot_use() -> None:
    turns = Turns({(BIG,): 1, (SMALL,): 1}, {ANYTHING, MANY_CORES}, seats=ENOUGH)
    asks = [Need(ANYTHING, 1, True), Need(MANY_CORES, 1, True), Need(ANYTHING, 1, True)]
    assert [turns.lacks(need) for need in asks] == [0, 0, 1]


def test_sharers_sit_on_one_machine_until_it_is_full() -> None:
    turns = Turns({(BIG,): 1}, {ANYTHING}, seats=2)
    assert [turns.lacks(Need(ANYTHING, 1, False)) for _ in range(3)] == [0, 0, 1]


@given(needs=NEEDS, coming=COMING, room=st.integers(0, 12), seats=st.integers(1, 4), spare=st.integers(0, 3))
@MANY
def test_no_plan_orders_beyond_demand_or_room(
    needs: list[Need], coming: Coming, room: int, seats: int, spare: int
) -> None:
    found = planned(*needs, coming=coming, room=room, seats=seats, spare=spare)
    sharers = sum(need.clients for need in needs if not need.exclusive)
    alone_ones = sum(need.clients for need in needs if need.exclusive)
    assert machines(found) <= min(room, sharers + alone_ones + spare)
    assert found.missing == 0 or machines(found) == room
    assert all(one.machines > 0 for one in found.purchases)
    wanted = [(one.wish, one.spare) for one in found.purchases]
    assert len(set(wanted)) == len(wanted)


@given(needs=NEEDS, coming=COMING, seats=st.integers(1, 4))
@MANY
def test_with_what_is_ordered_everybody_is_served(needs: list[Need], coming: Coming, seats: int) -> None:
    """Whatever the machines turn out to be, as long as each is what it was ordered as."""
    found = planned(*needs, coming=coming, seats=seats)
    ordered = [
        tuple(one for one in OFFERINGS if purchase.wish.fits(one))
        for purchase in found.purchases
        for _ in range(purchase.machines)
    ]
    known = [kinds for kinds, count in coming.items() for _ in range(count)]
    assert planned(*needs, coming=_counted(known + ordered), seats=seats) == Plan()


def _counted(kinds: list[tuple[Offering, ...]]) -> Coming:
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize(("clients", "exclusive"), list(product([1, 10, 100_000], [True, False])))
def test_the_work_does_not_grow_with_the_number_of_clients(clients: int, exclusive: bool) -> None:
    looks = 0

    class Counting(Wish):
        def fits(self, offering: Offering) -> bool:
            nonlocal looks
            looks += 1
            return super().fits(offering)

    plan([Need(Counting(), clients, exclusive)], {(BIG,): clients}, OFFERINGS, ENOUGH)
    assert looks <= 12
