"""The queue of those who wait: fair, left at once by who gives up, and told when waiting does not help."""

from __future__ import annotations

import asyncio

import pytest

from broker.core.errors import LimitReached, NoCapacity
from broker.core.model import Lease, Market, Offering
from broker.core.planning import Need
from broker.core.protocol import GetWorker
from broker.core.registry import Registry
from broker.core.wish import ANYTHING, Wish
from broker.waiting import Caps, Terms, Waiter, Waiting
from tests.core.make import MOON, PORT, instance, order

BIG = Wish(cores=64)


def waiter(
    asked_at: float = 0.0,
    *,
    pool: str = "default",
    client: str = "ann",
    exclusive: bool = False,
    wish: Wish = ANYTHING,
) -> Waiter:
    served: asyncio.Future[list[Lease]] = asyncio.get_running_loop().create_future()
    return Waiter(pool, client, exclusive, wish, asked_at, served)


def several(number: int, count: int, *, exclusive: bool = True) -> Waiter:
    """An ACQUIRE for so many."""
    one = waiter(float(number), exclusive=exclusive)
    one.terms = Terms(number, 900.0, count, count)
    return one


def queue(*waiters: Waiter) -> Waiting:
    waiting = Waiting()
    for one in waiters:
        waiting.join(one)
    return waiting


def failed(*waiters: Waiter) -> list[bool]:
    return [one.served.done() and one.served.exception() is not None for one in waiters]


# --- wishes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "fits"),
    [
        (ANYTHING, True),
        (Wish(cores=64), True),
        (Wish(cores=65), False),
        (Wish(type="big"), True),
        (Wish(type="small"), False),
        (Wish(region="moon"), True),
        (Wish(region="mars"), False),
        (Wish(cores=8, type="big", region="moon"), True),
        (Wish(cores=8, type="big", region="mars"), False),
    ],
)
def test_an_offering_fits_when_it_is_all_that_was_asked_for(wish: Wish, fits: bool) -> None:
    assert wish.fits(MOON) is fits


def test_who_asks_for_cores_gets_no_machine_whose_cores_nobody_knows() -> None:
    unknown = Offering("moon", "odd", Market.SPOT)
    assert not Wish(cores=1).fits(unknown)
    assert Wish(type="odd").fits(unknown)


def test_a_wish_is_what_the_command_says() -> None:
    assert Wish.of(GetWorker(pool="gpu", cores=8, client="ann", wait=5.0)) == Wish(cores=8)
    assert Wish.of(GetWorker(type="big", region="moon")) == Wish(type="big", region="moon")
    assert Wish.of(GetWorker()) == ANYTHING


def test_a_wish_is_said_as_it_was_written() -> None:
    assert str(Wish(cores=8, region="moon")) == "cores=8 region=moon"
    assert str(ANYTHING) == ""


def test_a_worker_is_measured_by_its_offering() -> None:
    registry = Registry()
    registry.order(order(), PORT, 0.0)
    worker = registry.launched("o-1", instance(cores=32), 1.0)
    test = BIG.test()
    assert test is not None
    assert not test(worker)
    assert ANYTHING.test() is None, "nobody looks through all workers for nothing"


# --- places ---------------------------------------------------------------------------------------------


async def test_whoever_came_first_stands_first() -> None:
    early, late = waiter(1.0), waiter(2.0)
    assert queue(early, late).of("default") == [early, late]


async def test_one_who_comes_back_has_his_old_place() -> None:
    first, second, third = waiter(1.0), waiter(2.0), waiter(3.0)
    waiting = queue(first, third)
    waiting.join(second)
    assert waiting.of("default") == [first, second, third]
    waiting.leave(first)
    waiting.join(first)
    assert waiting.of("default") == [first, second, third]


async def test_who_gives_up_leaves_at_once_and_may_do_so_twice() -> None:
    early, late = waiter(1.0), waiter(2.0)
    waiting = queue(early, late)
    waiting.leave(early)
    waiting.leave(early)
    waiting.leave(waiter(pool="nowhere"))
    assert waiting.of("default") == [late]
    assert len(waiting) == 1


async def test_it_is_known_since_when_somebody_has_always_waited() -> None:
    waiting = Waiting()
    assert waiting.since_at("default") is None
    first, second, third = waiter(10.0), waiter(20.0), waiter(30.0)
    waiting.join(first)
    waiting.join(second)
    waiting.leave(first)
    assert waiting.since_at("default") == 10.0
    second.served.set_result([])
    assert waiting.since_at("default") is None
    waiting.join(third)
    assert waiting.since_at("default") == 30.0


async def test_two_clients_alike_are_two() -> None:
    assert len(queue(waiter(1.0), waiter(1.0))) == 2


async def test_every_pool_has_its_own_queue() -> None:
    here, there = waiter(), waiter(pool="gpu")
    waiting = queue(here, there)
    assert (waiting.of("default"), waiting.of("gpu"), waiting.of("nowhere")) == ([here], [there], [])
    assert len(waiting) == 2


async def test_who_is_served_is_no_longer_waiting_although_he_has_not_left() -> None:
    served, other = waiter(1.0), waiter(2.0, exclusive=True)
    waiting = queue(served, other)
    served.served.set_result([Lease("l", "w", "ann", 1.0)])
    assert waiting.of("default") == [other]
    assert waiting.needs("default") == [Need(ANYTHING, 1, exclusive=True)]


async def test_those_who_want_the_same_are_one_need_in_the_order_of_the_queue() -> None:
    waiting = queue(
        waiter(1.0, client="ann", wish=BIG),
        waiter(2.0, client="bob"),
        waiter(3.0, client="eve", exclusive=True),
        waiter(4.0, client="dan"),
        waiter(5.0, client="joe", wish=BIG),
    )
    assert waiting.needs("default") == [
        Need(BIG, 2, exclusive=False),
        Need(ANYTHING, 2, exclusive=False),
        Need(ANYTHING, 1, exclusive=True),
    ]
    assert waiting.needs("gpu") == []


async def test_a_client_on_many_connections_needs_one_machine() -> None:
    waiting = queue(waiter(exclusive=True), waiter(exclusive=True), waiter(exclusive=True, wish=BIG))
    assert [need.clients for need in waiting.needs("default")] == [1, 1]


async def test_who_wants_several_counts_for_so_many_and_each_of_its_requests_for_itself() -> None:
    first, second = several(1, 3), several(2, 2)
    shared = several(3, 4, exclusive=False)
    assert queue(first, second, shared).needs("default") == [
        Need(ANYTHING, 5, True),
        Need(ANYTHING, 4, False),
    ]
    first.found = 2
    assert queue(first, second).needs("default") == [Need(ANYTHING, 3, True)], "what is free is not ordered"
    alike = [waiter(exclusive=True), waiter(exclusive=True)]
    assert queue(*alike).needs("default") == [Need(ANYTHING, 1, True)], "one client on two connections"


# --- bad news -------------------------------------------------------------------------------------------


async def test_when_waiting_does_not_help_everybody_hears_why() -> None:
    waiters = [waiter(), waiter(exclusive=True)]
    waiting = queue(*waiters)
    waiting.fail("default", LimitReached("full"))
    for one in waiters:
        with pytest.raises(LimitReached, match="full"):
            await one.served
    assert waiting.of("default") == []


async def test_bad_news_of_one_pool_is_no_news_of_another() -> None:
    here, there = waiter(), waiter(pool="gpu")
    queue(here, there).fail("default", LimitReached())
    assert failed(here, there) == [True, False]


async def test_only_those_whom_it_concerns_hear_it() -> None:
    plain, big = waiter(), waiter(wish=BIG)
    assert queue(plain, big).fail("default", NoCapacity(), lambda one: one is big), "one goes on"
    assert failed(plain, big) == [False, True]
    assert not queue(plain, big).fail("default", NoCapacity())


async def test_one_by_one_they_come_in_the_order_of_the_queue_and_one_client_once() -> None:
    first, again = waiter(1.0, client="ann", exclusive=True), waiter(2.0, client="ann", exclusive=True)
    second, third = waiter(3.0, client="ben", wish=BIG), waiter(4.0, client="cat", exclusive=True)
    assert list(queue(first, again, second, third).one_by_one("default")) == [
        Need(ANYTHING, 1, exclusive=True),
        Need(BIG, 1, exclusive=False),
        Need(ANYTHING, 1, exclusive=True),
    ]


async def test_a_client_needs_no_more_than_it_may_have_on_however_many_connections() -> None:
    """The third connection had got back what the caps had left to the first two."""
    asks = [waiter(1.0, exclusive=True), waiter(2.0, exclusive=True, wish=BIG)]
    asks += [waiter(3.0, exclusive=True, wish=BIG)]
    found = queue(*asks).needs("default", Caps(lambda client: 1, 1))
    assert found == [Need(ANYTHING, 1, True), Need(BIG, 0, True)]
    sharing = [waiter(1.0), waiter(2.0, wish=BIG)]
    assert queue(*sharing).needs("default", Caps(lambda client: 1, 4)) == [
        Need(ANYTHING, 1, False),
        Need(BIG, 0, False),
    ]


async def test_who_is_served_already_hears_no_bad_news() -> None:
    served = waiter()
    waiting = queue(served)
    lease = Lease("l", "w", "ann", 1.0)
    served.served.set_result([lease])
    waiting.fail("default", LimitReached())
    assert await served.served == [lease]


async def test_bad_news_for_a_client_that_has_gone_away_disturbs_nobody() -> None:
    """Nobody awaits the future any more; an exception that nobody retrieves would be logged as a fault."""
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
    waiting = queue(waiter())
    waiting.fail("default", LimitReached())
    del waiting
    await asyncio.sleep(0)
    assert heard == []
