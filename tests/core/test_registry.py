"""The books: the life of a worker, who may be handed out, who holds whom, and when to look again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from broker.core.errors import Denied, IllegalStep, WorkerNotFound
from broker.core.life import BOOKED, LIFE, USABLE, Step
from broker.core.model import (
    UNKNOWN_CLIENT,
    Event,
    InstanceState,
    LeaseEnded,
    LeaseGranted,
    Market,
    Worker,
    WorkerChanged,
    WorkerSeen,
    WorkerState,
)
from broker.core.money import Price
from broker.core.registry import Registry
from tests.core import naive_registry
from tests.core.make import MOON, PORT, instance, lease, order

S = WorkerState
NOW = 100.0
WORKER, MACHINE, ADDRESS = "o-1", "i-1", "10.0.0.1"


class Books(Registry):
    """A registry that remembers its events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        super().__init__(self.events.append)

    def what(self) -> object:
        """Everything that can be asked, to be compared before and after."""
        workers = list(self)
        leases = [held for worker in workers for held in self.leases(worker.id)]
        return (
            workers,
            leases,
            [(self.used_at(w.id), self.proved_at(w.id), self.busy(w.id)) for w in workers],
            [self.lease_ends_at(held.id) for held in leases],
            {state: self.in_state(state) for state in S},
            self.by_address(ADDRESS),
            self.by_instance(MACHINE),
            [self.available("default", "newcomer", exclusive=alone) for alone in (False, True)],
            self.next_look_at(),
            self.generation,
            list(self.events),
        )


def books_with(state: WorkerState | None, now: float = NOW) -> Books:
    """One worker in that state (none in the books for None and GONE), held by ann as long as that goes."""
    books = Books()
    if state in (S.STOPPING, S.STOPPED):
        books = books_with(S.READY, now)
        books.end_lease(WORKER, lease(WORKER).key, "released", now)
        books.stop(WORKER, "idle", now)
        if state is S.STOPPED:
            books.stopped(WORKER, now)
        return books
    path: dict[WorkerState, Callable[[], object]] = {
        S.ORDERED: lambda: books.order(order(), PORT, now),
        S.BOOTING: lambda: books.launched(WORKER, instance(), now),
        S.READY: lambda: (books.ready(WORKER, now), books.grant(lease(WORKER), now)),
        S.SUSPECT: lambda: books.suspect(WORKER, "no answer", now),
        S.DRAINING: lambda: books.drain(WORKER, "idle", now),
        S.TERMINATING: lambda: books.terminating(WORKER, now),
        S.GONE: lambda: books.gone(WORKER, "terminated", now),
    }
    for reached, step in path.items() if state is not None else ():
        step()
        if reached is state:
            break
    return books


def ready(books: Registry, number: int, now: float = NOW, pool: str = "default") -> Worker:
    books.order(order(f"o-{number}", pool), PORT, now)
    books.launched(f"o-{number}", instance(f"i-{number}", f"10.0.0.{number}"), now)
    return books.ready(f"o-{number}", now)


# --- the life of a worker -------------------------------------------------------------------------------

STEPS: dict[Step, Callable[[Registry, float], Worker]] = {
    Step.ORDER: lambda books, now: books.order(order(WORKER), PORT, now),
    Step.ADOPT: lambda books, now: books.adopt(instance(), "default", PORT, now),
    Step.LAUNCH: lambda books, now: books.launched(WORKER, instance("i-2", "10.0.0.2"), now),
    Step.REFUSE: lambda books, now: books.refused(WORKER, "no-capacity", now),
    Step.SHOW_READY: lambda books, now: books.ready(WORKER, now),
    Step.DOUBT: lambda books, now: books.suspect(WORKER, "no answer", now),
    Step.ADOPT_STOPPING: lambda books, now: books.adopt(
        instance(state=InstanceState.STOPPING), "default", PORT, now, kept=True
    ),
    Step.ADOPT_STOPPED: lambda books, now: books.adopt(
        instance(state=InstanceState.STOPPED), "default", PORT, now, kept=True
    ),
    Step.STOP: lambda books, now: books.stop(WORKER, "idle", now),
    Step.HALT: lambda books, now: books.stopped(WORKER, now),
    Step.START: lambda books, now: books.start(WORKER, now),
    Step.DRAIN: lambda books, now: books.drain(WORKER, "idle", now),
    Step.TERMINATE: lambda books, now: books.terminating(WORKER, now),
    Step.GO: lambda books, now: books.gone(WORKER, "terminated", now),
}
STATES = [None, *S]
PAIRS = [(state, step) for state in STATES for step in Step]
# What is shown or doubted a second time is no step, and no fault: probes and notices come as they like.
QUIET = {(S.READY, Step.SHOW_READY)} | {(state, Step.DOUBT) for state in BOOKED - {S.READY}}
# The order of a machine that is known is a fault only when it brings the same machine again.
ENTERS_BESIDE = {
    (S.ORDERED, Step.ADOPT): S.BOOTING,
    (S.ORDERED, Step.ADOPT_STOPPING): S.STOPPING,
    (S.ORDERED, Step.ADOPT_STOPPED): S.STOPPED,
}
HELD = {(S.READY, Step.STOP)}  # legal, but not while somebody holds the worker


def test_the_table_in_the_code_is_the_table_of_the_design() -> None:
    coded = {(str(before or "(nothing)"), str(step)): str(after) for (before, step), after in LIFE.items()}
    assert coded == naive_registry.LIFE


@pytest.mark.parametrize(("state", "step"), PAIRS, ids=str)
def test_each_step_is_in_the_table_or_raises_and_changes_nothing(
    state: WorkerState | None, step: Step
) -> None:
    books = books_with(state)
    before = books.what()
    known = None if state is S.GONE else state
    beside = None if known is None else ENTERS_BESIDE.get((known, step))
    after = None if (state, step) in HELD else LIFE.get((known, step))
    if after is not None or beside is not None:
        worker = STEPS[step](books, NOW + 1)
        assert worker.state is (after or beside)
        assert worker.since_at == NOW + 1
        assert (books.get(worker.id) is None) is (after is S.GONE)
        held = state in (S.READY, S.SUSPECT)
        change = books.events[-2] if after is S.DRAINING and held else books.events[-1]
        assert change == WorkerChanged(worker, None if beside is not None else known, NOW + 1)
    elif (state, step) in QUIET:
        worker = STEPS[step](books, NOW)
        assert worker.state is state
        assert books.events == before[-1]  # type: ignore[index]
    else:
        with pytest.raises((IllegalStep, KeyError)) as caught:
            STEPS[step](books, NOW + 1)
        assert caught.type is (KeyError if known is None else IllegalStep)
        assert books.what() == before


def test_there_is_no_way_back_from_draining() -> None:
    reachable, found = {S.DRAINING}, {S.DRAINING}
    while found:
        found = {after for (before, _), after in LIFE.items() if before in found} - reachable
        reachable |= found
    assert reachable == {S.DRAINING, S.TERMINATING, S.GONE}
    assert not reachable & USABLE


def test_only_an_answer_shown_makes_a_worker_ready() -> None:
    assert {step for (_, step), after in LIFE.items() if after is S.READY} == {Step.SHOW_READY}


def test_an_order_becomes_a_machine_with_what_the_cloud_says() -> None:
    books = Books()
    ordered = books.order(order(), PORT, NOW)
    assert (ordered.id, ordered.order_id, ordered.instance_id, ordered.born_at) == (WORKER, WORKER, None, NOW)
    launched = books.launched(
        WORKER, instance(state=InstanceState.PENDING, address=None, zone="moon-a", launched_unix=7.0), NOW + 3
    )
    assert (launched.instance_id, launched.running, launched.launched_unix) == (MACHINE, False, 7.0)
    assert launched.offering == replace(MOON, zone="moon-a")
    assert (launched.born_at, launched.since_at) == (NOW, NOW + 3)
    assert books.by_instance(MACHINE) == launched


def test_a_machine_found_in_a_listing_is_taken_in_with_its_age_and_its_price() -> None:
    books = Books()
    found = books.adopt(
        instance(instance_type="big", zone="moon-b", cores=8),
        "gpu",
        PORT,
        NOW,
        order_id="lost",
        born_at=NOW - 50,
        price=Price(5, assumed=True),
    )
    assert (found.id, found.order_id, found.state, found.born_at) == (MACHINE, "lost", S.BOOTING, NOW - 50)
    assert (found.offering.zone, found.cores, found.offering.market) == ("moon-b", 8, Market.SPOT)
    assert (found.offering.price_usd_micros_per_hour, found.offering.price_assumed) == (5, True)
    assert books.used_at(MACHINE) == NOW, "it counts as just used"
    other = books.adopt(instance("i-2"), "gpu", PORT, NOW)
    assert (other.born_at, other.order_id, other.offering.price_usd_micros_per_hour) == (NOW, None, 0)


def test_one_machine_has_one_entry() -> None:
    books = books_with(S.READY)
    before = books.what()
    with pytest.raises(IllegalStep, match="i-1 is in the books already"):
        books.adopt(instance(), "default", PORT, NOW)
    with pytest.raises(IllegalStep, match="o-1 is in the books already"):
        books.order(order(), PORT, NOW)
    assert books.what() == before
    books.order(order("o-2"), PORT, NOW)
    with pytest.raises(IllegalStep, match="i-1 is in the books already"):
        books.launched("o-2", instance(), NOW)


def test_a_worker_without_an_address_cannot_be_ready() -> None:
    books = Books()
    books.adopt(instance(address=None), "default", PORT, NOW)
    with pytest.raises(IllegalStep, match="i-1 cannot become ready: it has no address"):
        books.ready(MACHINE, NOW)
    assert books.proved_at(MACHINE) == float("-inf")


def test_a_proof_is_as_old_as_the_last_answer_and_ends_with_a_doubt() -> None:
    books = books_with(S.READY)
    assert books.proved_at(WORKER) == NOW
    books.ready(WORKER, NOW + 5)
    assert books.proved_at(WORKER) == NOW + 5
    books.suspect(WORKER, "no answer", NOW + 6)
    assert books.proved_at(WORKER) == float("-inf")
    books.ready(WORKER, NOW + 7)
    assert books.proved_at(WORKER) == NOW + 7


def test_an_answer_that_comes_too_late_proves_nothing() -> None:
    books = books_with(S.READY)
    books.drain(WORKER, "idle", NOW + 1)
    with pytest.raises(IllegalStep, match="o-1 is draining"):
        books.ready(WORKER, NOW + 9)
    assert books.proved_at(WORKER) == NOW


def test_a_standing_notice_is_not_lifted_by_a_probe() -> None:
    books = books_with(S.READY)
    books.suspect(WORKER, "interruption", NOW, standing=True)
    with pytest.raises(IllegalStep, match="o-1 cannot become ready: interruption"):
        books.ready(WORKER, NOW + 1)
    assert books.in_state(S.SUSPECT)[0].standing_notice == "interruption"


@pytest.mark.parametrize("state", [S.BOOTING, S.SUSPECT])
def test_a_notice_stands_whatever_the_worker_was_doing(state: WorkerState) -> None:
    books = books_with(state)
    assert books.suspect(WORKER, "interruption", NOW, standing=True).state is state
    with pytest.raises(IllegalStep, match="interruption"):
        books.ready(WORKER, NOW)


def test_a_suspect_keeps_its_clients_and_gets_no_new_ones() -> None:
    books = books_with(S.SUSPECT)
    assert books.busy(WORKER)
    assert books.available("default", "ann", exclusive=False) is None
    books.ready(WORKER, NOW)
    assert books.available("default", "ann", exclusive=False) == books.get(WORKER)


def test_a_draining_worker_has_lost_its_clients_and_its_address() -> None:
    books = books_with(S.READY)
    drained = books.drain(WORKER, "released", NOW + 1)
    assert drained.reason == "released"
    assert not books.busy(WORKER)
    assert books.by_address(ADDRESS) is None
    assert books.by_instance(MACHINE) == drained
    assert books.terminating(WORKER, NOW + 2).reason == "released", "why it goes is not forgotten"


# --- what the cloud says --------------------------------------------------------------------------------


def test_what_the_cloud_says_of_a_worker_is_written_down_and_told_once() -> None:
    books = Books()
    books.adopt(instance(state=InstanceState.PENDING, address=None), "default", PORT, NOW)
    seen = books.observed(MACHINE, instance(), NOW + 1)
    assert (seen.address, seen.running, seen.state) == (ADDRESS, True, S.BOOTING)
    assert books.events[-1] == WorkerSeen(seen, NOW + 1)
    told = len(books.events)
    assert books.observed(MACHINE, instance(), NOW + 2) == seen
    assert len(books.events) == told, "nothing new, nothing told"


def test_silence_of_the_cloud_erases_nothing() -> None:
    books = books_with(S.BOOTING)
    books.observed(WORKER, instance(zone="moon-a", instance_type="big", cores=64, launched_unix=5.0), NOW)
    quiet = books.observed(WORKER, instance(address=None), NOW)
    assert (quiet.address, quiet.launched_unix, quiet.cores) == (ADDRESS, 5.0, 64)
    assert (quiet.offering.zone, quiet.offering.instance_type) == ("moon-a", "big")


def test_what_is_said_of_another_machine_is_not_taken_for_this_one() -> None:
    books = books_with(S.READY)
    before = books.what()
    with pytest.raises(IllegalStep, match="o-1 is not i-7"):
        books.observed(WORKER, instance("i-7"), NOW)
    assert books.what() == before


def test_a_worker_is_found_at_the_address_it_has_now() -> None:
    books = books_with(S.READY)
    moved = books.observed(WORKER, instance(address="10.0.0.9"), NOW)
    assert books.by_address(ADDRESS) is None
    assert books.by_address("10.0.0.9") == moved
    assert books.by_address("10.9.9.9") is None


def test_an_address_that_the_cloud_gave_to_another_machine_is_that_ones() -> None:
    """The old machine is gone but the broker has not heard of it; then it does. The new one must stay found:
    its client's PING would be refused otherwise, and its RELEASE would end nothing."""
    books = books_with(S.READY)
    new = books.adopt(instance("i-2", ADDRESS), "default", PORT, NOW)
    assert books.by_address(ADDRESS) == new
    books.observed(WORKER, instance(state=InstanceState.SHUTTING_DOWN), NOW)
    assert books.by_address(ADDRESS) == new
    books.drain(WORKER, "reclaimed", NOW)
    books.observed(WORKER, instance(state=InstanceState.SHUTTING_DOWN, launched_unix=3.0), NOW)
    books.gone(WORKER, "terminated", NOW)
    assert books.by_address(ADDRESS) == new


def test_when_the_last_to_claim_an_address_is_gone_the_one_before_is_found_by_it() -> None:
    """Simulated history, seed 2301: what had never come back took the address of a living one with it."""
    books = books_with(S.READY)
    ghost = books.adopt(instance("i-2", ADDRESS), "default", PORT, NOW)
    assert books.by_address(ADDRESS) == ghost
    books.gone(ghost.id, "vanished", NOW)
    assert books.by_address(ADDRESS) == books.get(WORKER)


def test_a_dying_worker_claims_no_address() -> None:
    books = books_with(S.READY)
    dying = ready(books, 2)
    books.drain(dying.id, "idle", NOW)
    books.observed(dying.id, instance("i-2", ADDRESS), NOW)
    assert books.by_address(ADDRESS) == books.get(WORKER)


# --- who is handed out ----------------------------------------------------------------------------------


def available(
    books: Registry,
    client: str = "newcomer",
    *,
    exclusive: bool = False,
    cores: int = 0,
    pool: str = "default",
) -> str | None:
    wish = (lambda worker: worker.cores >= cores) if cores else None
    worker = books.available(pool, client, exclusive=exclusive, wish=wish)
    return worker.id if worker else None


@pytest.mark.parametrize("state", [None, *(state for state in S if state is not S.READY)])
def test_only_a_ready_worker_is_handed_out(state: WorkerState | None) -> None:
    books = books_with(state)
    for client in ("ann", "newcomer"):
        assert available(books, client) is None
        assert available(books, client, exclusive=True) is None


def test_everybody_who_shares_gets_the_worker_that_came_first() -> None:
    books = Books()
    for number in (1, 2, 3):
        ready(books, number)
    for client in ("ann", "bob"):
        assert available(books, client) == "o-1"
        books.grant(lease("o-1", client), NOW)
    assert available(books) == "o-1", "so that the others become idle and can go"


def test_who_wants_to_be_alone_gets_the_worker_that_became_free_last() -> None:
    books = Books()
    for number in (1, 2, 3):
        ready(books, number)
    books.grant(lease("o-3", "ann"), NOW)
    assert available(books, exclusive=True) == "o-2"
    books.end_lease("o-3", "ann", "released", NOW)
    assert available(books, exclusive=True) == "o-3"


def test_whoever_asks_again_gets_the_worker_he_holds() -> None:
    books = Books()
    for number in (1, 2):
        ready(books, number)
    books.grant(lease("o-2", "ann"), NOW)
    assert available(books, "ann") == "o-2"
    assert available(books, "ann", exclusive=True) == "o-2", "he is alone on it already"
    books.grant(lease("o-2", "bob"), NOW)
    assert available(books, "ann", exclusive=True) == "o-1"


def test_a_worker_that_somebody_has_alone_is_nobody_elses() -> None:
    books = Books()
    ready(books, 1)
    books.grant(lease("o-1", "ann", exclusive=True), NOW)
    assert available(books, "ann") == available(books, "ann", exclusive=True) == "o-1"
    assert available(books, "bob") is None
    with pytest.raises(Denied):
        books.grant(lease("o-1", "bob"), NOW)
    assert [held.client for held in books.leases("o-1")] == ["ann"]


def test_a_wish_is_heard_everywhere() -> None:
    books = Books()
    small, big = ready(books, 1), ready(books, 2)
    books.observed(small.id, instance("i-1", cores=8), NOW)
    books.grant(lease(small.id, "ann"), NOW)
    assert available(books, "ann", cores=64) == big.id
    assert available(books, "bob", exclusive=True, cores=64) == big.id
    assert available(books, "bob", cores=128) is None


def test_a_pool_hands_out_its_own() -> None:
    books = Books()
    ready(books, 1, pool="gpu")
    books.grant(lease("o-1", "ann"), NOW)
    assert available(books, "ann") is None
    assert available(books, "ann", pool="gpu") == "o-1"


# --- leases ---------------------------------------------------------------------------------------------


def test_a_hold_is_granted_once_and_then_renewed() -> None:
    books = books_with(S.BOOTING)
    first = books.grant(lease(WORKER, ttl_seconds=60.0, id="a"), NOW)
    again = books.grant(lease(WORKER, ttl_seconds=60.0, id="b"), NOW + 30)
    assert again == first
    assert books.lease_ends_at("a") == NOW + 90
    assert books.lease_ends_at("b") is None
    assert books.used_at(WORKER) == NOW + 30
    assert books.lease_of(WORKER, "ann") == first
    assert books.held_leases("default", "ann") == {"a"}
    assert [type(event) for event in books.events].count(LeaseGranted) == 1


def test_a_client_that_is_alone_may_have_the_worker_alone_from_now_on() -> None:
    """And that is told: it must be on disk too, or a restart would let others in again."""
    books = books_with(S.READY)
    granted = books.grant(lease(WORKER, exclusive=True), NOW + 1)
    assert granted.exclusive
    assert available(books, "bob") is None
    worker = books.get(WORKER)
    assert worker is not None
    assert books.events[-1] == LeaseGranted(granted, worker, False, NOW + 1)
    told = len(books.events)
    assert books.grant(lease(WORKER), NOW + 2) == granted, "asking for less takes nothing away"
    assert len(books.events) == told


def test_a_client_that_shares_cannot_push_the_others_out() -> None:
    books = books_with(S.READY)
    books.grant(lease(WORKER, "bob"), NOW)
    before = books.what()
    for client in ("ann", "cleo"):
        with pytest.raises(Denied):
            books.grant(lease(WORKER, client, exclusive=True), NOW + 1)
    assert books.what() == before


@pytest.mark.parametrize("state", [None, S.ORDERED, S.DRAINING, S.TERMINATING, S.GONE])
def test_nobody_gets_a_hold_on_a_worker_that_is_not_there(state: WorkerState | None) -> None:
    books = books_with(state)
    before = books.what()
    with pytest.raises(WorkerNotFound):
        books.grant(lease(WORKER, "bob"), NOW)
    assert books.what() == before


def test_a_hold_that_nobody_has_cannot_end() -> None:
    books = books_with(S.READY)
    before = books.what()
    assert books.end_lease(WORKER, "bob", "released", NOW) is None
    assert books.end_lease("nobody", "ann", "released", NOW) is None
    assert books.what() == before


def test_a_client_may_hold_two_workers_and_give_back_one() -> None:
    books = Books()
    for number in (1, 2):
        ready(books, number)
        books.grant(lease(f"o-{number}"), NOW)
    assert books.held_leases("default", "ann") == {"lease-o-1-ann", "lease-o-2-ann"}
    books.end_lease("o-1", "ann", "released", NOW)
    assert books.held_leases("default", "ann") == {"lease-o-2-ann"}
    assert available(books, "ann") == "o-2"


def test_the_first_hold_and_the_last_are_told_as_such() -> None:
    books = Books()
    ready(books, 1)
    for client in ("ann", "bob"):
        books.grant(lease("o-1", client), NOW)
    for client in ("ann", "bob"):
        books.end_lease("o-1", client, "released", NOW + 1)
    granted = [event.first for event in books.events if isinstance(event, LeaseGranted)]
    ended = [event.last for event in books.events if isinstance(event, LeaseEnded)]
    assert (granted, ended) == ([True, False], [False, True])
    assert books.held_leases("default", "ann") == frozenset()
    assert books.lease_count("default") == 0


def test_a_hold_whose_time_is_over_ended_when_it_was_over() -> None:
    books = books_with(S.READY)
    books.grant(lease(WORKER, "bob", ttl_seconds=10.0), NOW)
    books.expire_leases(WORKER, NOW + 9.9)
    assert books.lease_count("default") == 2
    books.expire_leases(WORKER, NOW + 10)
    assert [held.client for held in books.leases(WORKER)] == ["ann"]
    ended = books.events[-1]
    assert isinstance(ended, LeaseEnded)
    assert (ended.at, ended.reason, ended.last) == (NOW + 10, "expired", False)
    books.expire_leases(WORKER, NOW + 5000)
    assert books.events[-1].at == NOW + 900, "however late somebody looked"


@pytest.mark.parametrize("end", ["drain", "gone"])
def test_every_hold_ends_with_its_worker(end: str) -> None:
    books = books_with(S.READY)
    books.grant(lease(WORKER, "bob"), NOW)
    getattr(books, end)(WORKER, "reclaimed", NOW + 1)
    ended = [(e.lease.client, e.reason, e.last) for e in books.events if isinstance(e, LeaseEnded)]
    assert ended == [("ann", "reclaimed", False), ("bob", "reclaimed", True)]
    assert books.lease_ends_at("lease-o-1-ann") is None


# --- acquired leases ------------------------------------------------------------------------------------


def test_an_acquired_lease_is_one_of_its_own_and_conflicts_even_with_its_clients_other_holds() -> None:
    books = Books()
    ready(books, 1)
    alone = books.grant(lease("o-1", "ann", exclusive=True, acquired=True, id="a"), NOW)
    assert books.lease("a") == alone
    assert (books.lease_of("o-1", "ann"), books.leases_of("o-1", "ann")) == (None, [alone])
    assert books.available("default", "ann", exclusive=True) is None
    for more in (lease("o-1", "ann"), lease("o-1", "ann", exclusive=True, acquired=True, id="b")):
        with pytest.raises(Denied):
            books.grant(more, NOW)
    books.end_lease("o-1", alone.key, "done", NOW)
    assert books.lease("a") is None
    assert books.places("default", 2, exclusive=True) == ["o-1"]


def test_a_full_worker_is_passed_over_until_somebody_leaves() -> None:
    books = Registry(seats=lambda pool: 2)
    ready(books, 1)
    ready(books, 2)
    assert books.places("default", 9, exclusive=False) == ["o-1", "o-1", "o-2", "o-2"]
    for number in (1, 2):
        books.grant(lease("o-1", f"c{number}"), NOW)
    assert books.full("o-1")
    assert books.available("default", "newcomer", exclusive=False) == books.get("o-2")
    assert books.available("default", "c1", exclusive=False) == books.get("o-1"), "what it holds already"
    books.end_lease("o-1", "c1", "released", NOW)
    assert not books.full("o-1")
    assert books.places("default", 9, exclusive=False) == ["o-2", "o-2", "o-1"]


def test_no_more_places_are_named_than_uses_are_left() -> None:
    books = Registry(seats=lambda pool: 3, uses_max=lambda pool: 2)
    ready(books, 1)
    ready(books, 2)
    books.grant(lease("o-1", "ann"), NOW)
    assert books.places("default", 9, exclusive=False) == ["o-1", "o-2", "o-2"]
    assert books.places("default", 2, exclusive=False) == ["o-1", "o-2"]


def test_when_a_pool_allows_more_leases_a_full_worker_takes_clients_again() -> None:
    most = {"default": 1}
    books = Registry(seats=most.get)
    ready(books, 1)
    books.grant(lease("o-1", "ann"), NOW)
    assert books.places("default", 9, exclusive=False) == []
    most["default"] = 3
    books.seats_changed()
    assert books.places("default", 9, exclusive=False) == ["o-1", "o-1"]


def test_who_may_hold_a_machine_that_was_found_takes_no_place_from_who_does() -> None:
    books = Registry(seats=lambda pool: 1)
    ready(books, 1)
    books.grant(lease("o-1", UNKNOWN_CLIENT), NOW)
    assert not books.full("o-1")
    books.grant(lease("o-1", "ann"), NOW)
    assert books.full("o-1")


def test_a_bound_lease_begins_anew_when_its_time_is_over_and_its_worker_counts_as_used() -> None:
    books = Books()
    ready(books, 1)
    books.grant(lease("o-1", "ann", 60.0, acquired=True, bound=True, id="a"), NOW)
    books.expire_leases("o-1", NOW + 61)
    assert books.lease_ends_at("a") == NOW + 121
    assert books.used_at("o-1") == NOW + 61


# --- when to look again ---------------------------------------------------------------------------------


def due(books: Registry, now: float) -> list[str]:
    return [worker.id for worker in books.due(now)]


def test_every_step_asks_for_a_look_at_once() -> None:
    books = books_with(S.READY)
    assert books.next_look_at() == NOW
    assert due(books, NOW) == [WORKER]
    assert due(books, NOW) == []
    assert books.next_look_at() is None
    books.suspect(WORKER, "no answer", NOW + 1)
    assert due(books, NOW + 1) == [WORKER]


def test_the_latest_wish_for_a_look_counts() -> None:
    books = books_with(S.READY)
    books.due(NOW)
    for at in (NOW + 10, NOW + 50, NOW + 50, NOW + 30):
        books.look_again(WORKER, at)
    assert books.next_look_at() == NOW + 30
    assert due(books, NOW + 29) == []
    assert due(books, NOW + 100) == [WORKER], "once, however often somebody asked"
    assert books.next_look_at() is None


def test_those_who_are_due_come_in_the_order_of_their_deadlines() -> None:
    books = Books()
    for number in (1, 2, 3):
        ready(books, number)
    books.due(NOW)
    for number, at in ((1, NOW + 30), (2, NOW + 10), (3, NOW + 20)):
        books.look_again(f"o-{number}", at)
    assert due(books, NOW + 25) == ["o-2", "o-3"]
    assert books.next_look_at() == NOW + 30


def test_a_use_moves_no_deadline() -> None:
    books = books_with(S.READY)
    books.due(NOW)
    books.look_again(WORKER, NOW + 900)
    books.grant(lease(WORKER), NOW + 500)
    assert books.next_look_at() == NOW + 900


def test_nobody_looks_at_a_worker_that_is_gone() -> None:
    books = books_with(S.READY)
    books.look_again(WORKER, NOW + 10)
    books.gone(WORKER, "terminated", NOW + 1)
    assert books.next_look_at() is None
    assert due(books, NOW + 1000) == []
    assert len(books) == 0


# --- those who listen may act ---------------------------------------------------------------------------


class Acting(Registry):
    """A registry whose listener does something the first time it hears what it waits for."""

    def __init__(self, when: Callable[[Event], bool], act: Callable[[Registry, Event], object]) -> None:
        self._when, self._act = when, act
        self.acted = False
        super().__init__(self._hear)

    def _hear(self, event: Event) -> None:
        if not self.acted and self._when(event):
            self.acted = True
            self._act(self, event)


def entered(state: WorkerState) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, WorkerChanged) and event.worker.state is state


def test_a_waiting_client_may_take_a_worker_the_moment_it_is_ready() -> None:
    books = Acting(entered(S.READY), lambda it, e: it.grant(lease(e.worker.id, exclusive=True), NOW))
    ready(books, 1)
    assert books.acted
    assert books.busy("o-1")
    assert available(books, "bob") is None


def test_a_waiting_client_may_take_a_worker_the_moment_it_is_given_back() -> None:
    books = Acting(
        lambda event: isinstance(event, LeaseEnded),
        lambda it, e: it.grant(lease(e.worker.id, "bob", exclusive=True), NOW),
    )
    ready(books, 1)
    books.grant(lease("o-1", exclusive=True), NOW)
    books.end_lease("o-1", "ann", "released", NOW)
    assert [held.client for held in books.leases("o-1")] == ["bob"]


def test_no_waiting_client_gets_a_worker_that_is_just_being_drained() -> None:
    refused = []

    def take(it: Registry, event: Event) -> None:
        refused.append(available(it, "bob") or available(it, "bob", exclusive=True))
        with pytest.raises(WorkerNotFound):
            it.grant(lease(event.worker.id, "bob"), NOW)

    for leave in (Registry.drain, Registry.gone):
        books = Acting(lambda event: isinstance(event, LeaseEnded), take)
        ready(books, 1)
        books.grant(lease("o-1"), NOW)
        leave(books, "o-1", "reclaimed", NOW)
        assert books.acted
    assert refused == [None, None]


def test_a_machine_that_is_taken_in_can_be_found_by_whoever_hears_of_it() -> None:
    found = []
    books = Acting(
        entered(S.BOOTING), lambda it, e: found.extend([it.by_instance(MACHINE), it.by_address(ADDRESS)])
    )
    adopted = books.adopt(instance(), "default", PORT, NOW)
    assert found == [adopted, adopted]


def test_a_notice_that_is_lifted_lets_a_probe_show_readiness_again() -> None:
    books = books_with(S.READY)
    books.suspect(WORKER, "its pool was removed", NOW, standing=True)
    books.lift_notice(WORKER, "another notice", NOW)
    assert books.in_state(S.SUSPECT)[0].standing_notice == "its pool was removed"
    books.lift_notice(WORKER, "its pool was removed", NOW)
    assert isinstance(books.events[-1], WorkerSeen)
    assert books.ready(WORKER, NOW + 1).state is S.READY
    assert books.leases(WORKER)


def test_a_notice_is_heard_as_standing_and_a_worker_drained_for_it_stays_drained() -> None:
    heard = []

    def drain(it: Registry, event: Event) -> None:
        heard.append(event.worker.standing_notice)
        it.drain(event.worker.id, "reclaimed", NOW)

    books = Acting(entered(S.SUSPECT), drain)
    ready(books, 1)
    books.suspect("o-1", "interruption", NOW, standing=True)
    assert heard == ["interruption"]
    assert [worker.state for worker in books] == [S.DRAINING]


def test_every_event_moves_the_generation_and_a_renewal_does_not() -> None:
    books = books_with(S.READY)
    generation = books.generation
    assert generation == len(books.events)
    held = books.lease_of(WORKER, "ann")
    assert held is not None
    books.renew(held, NOW + 1)
    books.ready(WORKER, NOW + 1)
    assert books.generation == generation
    books.end_lease(WORKER, "ann", "released", NOW + 1)
    assert books.generation == generation + 1


def test_books_that_nobody_listens_to_work_as_well() -> None:
    books = Registry()
    assert available(books) is None
    ready(books, 1)
    assert available(books) == "o-1"
    assert [worker.id for worker in books.in_state(S.READY, S.SUSPECT)] == ["o-1"]
    assert books.count("default", S.READY, S.BOOTING) == 1
    assert books.count("gpu", S.READY) == 0
