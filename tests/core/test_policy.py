"""Decisions: who must go and when to look again, what to order and what to say instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.errors import BudgetReached, LimitReached
from broker.core.ledger import Budget
from broker.core.model import Worker
from broker.core.policy import (
    Breaker,
    BreakerState,
    LaunchGuard,
    Reason,
    Room,
    Verdict,
    born_at,
    client_refusal,
    judge,
    launch_room,
    may_end,
    room_overall,
)
from broker.core.registry import Registry
from broker.core.settings import PoolSettings
from broker.core.tags import BROKER, PROTECT
from tests.core.generated import FEW
from tests.core.make import PORT, instance, lease, order, pool

POOL = pool(idle_timeout="15m", max_lifetime="8h", boot_deadline="10m", launches_per_hour=20, max_workers=4)
IDLE, LIFETIME, BOOT = 900.0, 28_800.0, 600.0
SILENCE = 300.0  # so long may an unheld worker not answer


def booting(registry: Registry, now: float, number: int = 1) -> Worker:
    registry.order(order(f"o-{number}"), PORT, now)
    return registry.launched(f"o-{number}", instance(f"i-{number}", f"10.0.0.{number}"), now)


def ready(registry: Registry, now: float, number: int = 1) -> Worker:
    return registry.ready(booting(registry, now, number).id, now)


def hold(registry: Registry, worker: Worker, now: float, client: str = "ann", ttl: float = IDLE) -> None:
    registry.grant(lease(worker.id, client, ttl), now)


def verdict(registry: Registry, worker: Worker, now: float, settings: PoolSettings = POOL) -> Verdict:
    """As the reap loop asks: what has expired has ended, and the worker is what it is now."""
    registry.expire_leases(worker.id, now)
    current = registry.get(worker.id)
    assert current is not None
    return judge(registry, current, settings, now)


# --- a pool that was removed -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [booting, ready])
def test_a_worker_of_a_removed_pool_goes_as_soon_as_nobody_holds_it(make: Callable[..., Worker]) -> None:
    registry = Registry()
    worker = make(registry, 100.0)
    assert judge(registry, worker, POOL, 100.0, leaving=True) == Verdict(drain=Reason.POOL_REMOVED)
    hold(registry, worker, 100.0)
    assert judge(registry, worker, POOL, 100.0, leaving=True).drain is None
    registry.end_lease(worker.id, "ann", "released", 101.0)
    assert judge(registry, worker, POOL, 101.0, leaving=True) == Verdict(drain=Reason.POOL_REMOVED)


# --- who must go ----------------------------------------------------------------------------------------


def test_a_worker_that_nobody_uses_goes_after_the_idle_timeout_and_not_before() -> None:
    registry = Registry()
    worker = ready(registry, 100.0)
    assert verdict(registry, worker, 100.0) == Verdict(next_look_at=100.0 + IDLE)
    assert verdict(registry, worker, 99.0 + IDLE) == Verdict(next_look_at=100.0 + IDLE)
    assert verdict(registry, worker, 100.0 + IDLE) == Verdict(drain=Reason.IDLE)


def test_every_use_starts_the_idle_time_again() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    hold(registry, worker, 500.0)
    registry.end_lease(worker.id, "ann", "released", 501.0)
    assert verdict(registry, worker, IDLE) == Verdict(next_look_at=500.0 + IDLE)


def test_a_busy_worker_stays_for_as_long_as_its_client_uses_it() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    for now in (0.0, 800.0, 1600.0, 2400.0):
        hold(registry, worker, now)
        assert verdict(registry, worker, now) == Verdict(next_look_at=now + IDLE)
    assert verdict(registry, worker, 2400.0 + IDLE) == Verdict(drain=Reason.IDLE), "its client went silent"


def test_the_next_look_at_a_busy_worker_is_when_the_first_of_its_leases_ends() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    hold(registry, worker, 0.0, "ann", ttl=300.0)
    hold(registry, worker, 0.0, "bob", ttl=200.0)
    assert verdict(registry, worker, 1.0) == Verdict(next_look_at=200.0)


def test_an_old_worker_goes_once_nobody_holds_it() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    hold(registry, worker, LIFETIME - 100.0)
    assert verdict(registry, worker, LIFETIME - 100.0) == Verdict(next_look_at=LIFETIME)
    hold(registry, worker, LIFETIME)
    assert verdict(registry, worker, LIFETIME) == Verdict(retire=True, next_look_at=LIFETIME + IDLE)
    registry.end_lease(worker.id, "ann", "released", LIFETIME + 1.0)
    assert verdict(registry, worker, LIFETIME + 1.0) == Verdict(drain=Reason.MAX_LIFETIME)


def test_a_worker_that_stopped_answering_goes_sooner_than_an_idle_one() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    registry.suspect(worker.id, "no answer", 50.0)
    silent_at = 50.0 + SILENCE
    assert verdict(registry, worker, 51.0) == Verdict(next_look_at=silent_at)
    assert verdict(registry, worker, silent_at) == Verdict(drain=Reason.UNRESPONSIVE)


def test_a_worker_that_stopped_answering_stays_while_somebody_holds_it() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    hold(registry, worker, 0.0)
    registry.suspect(worker.id, "no answer", 50.0)
    assert verdict(registry, worker, 60.0 + SILENCE) == Verdict(next_look_at=IDLE)


def test_a_machine_that_does_not_come_up_is_given_up() -> None:
    registry = Registry()
    worker = booting(registry, 100.0)
    assert verdict(registry, worker, 99.0 + BOOT) == Verdict(next_look_at=100.0 + BOOT)
    assert verdict(registry, worker, 100.0 + BOOT) == Verdict(drain=Reason.BOOT_TIMEOUT)


def test_a_machine_taken_over_with_its_clients_is_theirs_to_give_up() -> None:
    registry = Registry()
    worker = registry.adopt(instance(), "default", PORT, 0.0)
    hold(registry, worker, 0.0, "ann", ttl=BOOT + 100.0)
    hold(registry, worker, 0.0, "bob", ttl=10.0)
    assert verdict(registry, worker, BOOT) == Verdict(next_look_at=BOOT + 100.0)
    assert verdict(registry, worker, BOOT + 100.0) == Verdict(drain=Reason.BOOT_TIMEOUT)


def test_a_short_hold_does_not_shorten_the_boot() -> None:
    registry = Registry()
    worker = registry.adopt(instance(), "default", PORT, 0.0)
    hold(registry, worker, 0.0, ttl=10.0)
    assert verdict(registry, worker, 1.0) == Verdict(next_look_at=BOOT)


def test_a_worker_on_its_way_in_or_out_has_no_deadline_here() -> None:
    registry = Registry()
    ordered = registry.order(order("o-9"), PORT, 0.0)
    leaving = ready(registry, 0.0)
    assert verdict(registry, ordered, 1e9) == Verdict()
    registry.drain(leaving.id, "idle", 1.0)
    assert verdict(registry, leaving, 1e9) == Verdict()
    registry.terminating(leaving.id, 2.0)
    assert verdict(registry, leaving, 1e9) == Verdict()


@given(
    uses=st.lists(st.tuples(st.floats(0, 20_000), st.floats(1, 5_000)), max_size=6),
    suspect_at=st.none() | st.floats(0, 20_000),
    now=st.floats(0, 60_000),
)
@FEW
def test_no_busy_worker_is_drained_and_every_look_lies_ahead(
    uses: list[tuple[float, float]], suspect_at: float | None, now: float
) -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    for number, (at, ttl_seconds) in enumerate(sorted(uses)):
        hold(registry, worker, at, f"client-{number}", ttl_seconds)
    if suspect_at is not None:
        registry.suspect(worker.id, "no answer", suspect_at)
    decided = verdict(registry, worker, now)
    if registry.busy(worker.id):
        assert decided.drain is None
    assert (decided.drain is None) is (decided.next_look_at is not None)
    assert decided.next_look_at is None or decided.next_look_at > now, "or the loop would spin"


def test_a_machine_found_after_a_restart_is_as_old_as_the_cloud_says() -> None:
    assert born_at(POOL, age_seconds=3600.0, now=10_000.0) == 6_400.0
    assert born_at(POOL, age_seconds=0.0, now=10_000.0) == 10_000.0


def test_a_machine_found_after_a_restart_has_an_idle_timeout_of_life_left() -> None:
    found_at = 10_000.0
    assert born_at(POOL, age_seconds=1e9, now=found_at) + LIFETIME == found_at + IDLE


def test_a_wall_clock_that_is_behind_makes_no_machine_younger_than_now() -> None:
    assert born_at(POOL, age_seconds=-3600.0, now=10_000.0) == 10_000.0
    assert born_at(pool(max_lifetime="5m", idle_timeout="15m"), age_seconds=900.0, now=0.0) == 0.0


def test_with_a_hard_lifetime_a_restart_makes_no_machine_younger() -> None:
    settings = pool(max_lifetime="8h", hard_lifetime="10h", idle_timeout="15m")
    assert born_at(settings, age_seconds=9 * 3600.0, now=50_000.0) == 50_000.0 - 9 * 3600.0
    assert born_at(settings, age_seconds=-5.0, now=50_000.0) == 50_000.0


HARD = pool(idle_timeout="15m", max_lifetime="8h", hard_lifetime="9h", boot_deadline="10m")
HARD_SECONDS = 32_400.0


def test_at_the_hard_lifetime_a_worker_goes_although_somebody_holds_it() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    hold(registry, worker, HARD_SECONDS - 100.0)
    assert verdict(registry, worker, HARD_SECONDS - 1.0, HARD) == Verdict(
        retire=True, next_look_at=HARD_SECONDS
    )
    assert verdict(registry, worker, HARD_SECONDS, HARD) == Verdict(drain=Reason.HARD_LIFETIME)


def test_without_a_hard_lifetime_no_age_ends_a_worker_that_somebody_holds() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    hold(registry, worker, 1e9, ttl=100.0)
    assert verdict(registry, worker, 1e9) == Verdict(retire=True, next_look_at=1e9 + 100.0)


def test_a_machine_taken_over_that_never_comes_up_ends_at_the_hard_lifetime_under_its_clients() -> None:
    registry = Registry()
    worker = registry.adopt(instance(), "default", PORT, 0.0, born_at=-HARD_SECONDS + 1000.0)
    hold(registry, worker, 0.0, ttl=5000.0)
    assert verdict(registry, worker, 999.0, HARD) == Verdict(next_look_at=1000.0)
    assert verdict(registry, worker, 1000.0, HARD) == Verdict(drain=Reason.HARD_LIFETIME)


USED = pool(idle_timeout="15m", uses_max=2)


def test_a_worker_that_was_given_to_as_many_as_it_may_ends_with_the_last_of_them() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    hold(registry, worker, 0.0, "ann")
    registry.end_lease(worker.id, "ann", "released", 1.0)
    assert verdict(registry, worker, 1.0, USED).drain is None
    hold(registry, worker, 2.0, "ann")
    assert verdict(registry, worker, 3.0, USED).drain is None, "it is still held"
    registry.end_lease(worker.id, "ann", "released", 4.0)
    assert verdict(registry, worker, 4.0, USED) == Verdict(drain=Reason.USED_UP)


def test_renewing_is_no_use_and_an_exclusive_hold_is_not_counted_twice() -> None:
    registry = Registry()
    worker = ready(registry, 0.0)
    for number in range(5):
        registry.grant(lease(worker.id, "ann", exclusive=number == 4), float(number))
    assert registry.uses(worker.id) == 1


def protected(registry: Registry, worker: Worker, now: float, value: str = "yes") -> Worker:
    shown = instance(worker.instance_id or "", worker.address, tags={BROKER: "lab", PROTECT: value})
    return registry.observed(worker.id, shown, now)


def test_a_protected_worker_is_never_idle_never_too_old_and_never_used_up() -> None:
    registry = Registry()
    settings = pool(idle_timeout="15m", max_lifetime="8h", hard_lifetime="8h", uses_max=1)
    worker = ready(registry, 0.0)
    hold(registry, worker, 0.0)
    protected(registry, worker, 0.0)
    assert verdict(registry, worker, 5 * IDLE, settings) == Verdict(next_look_at=LIFETIME)
    assert verdict(registry, worker, LIFETIME, settings) == Verdict(retire=True), "but it gets no new clients"
    hold(registry, worker, LIFETIME + 1.0)
    assert verdict(registry, worker, LIFETIME + 2.0, settings).drain is None, "not under its client either"


def test_a_protected_worker_that_stopped_answering_is_kept() -> None:
    registry = Registry()
    worker = protected(registry, ready(registry, 0.0), 0.0)
    registry.suspect(worker.id, "no answer", 50.0)
    assert verdict(registry, worker, 51.0 + SILENCE).drain is None


def test_a_protected_machine_that_does_not_come_up_is_drained_and_may_not_end() -> None:
    registry = Registry()
    worker = protected(registry, booting(registry, 0.0), 0.0)
    assert verdict(registry, worker, BOOT) == Verdict(drain=Reason.BOOT_TIMEOUT)
    assert not may_end(registry.drain(worker.id, Reason.BOOT_TIMEOUT, BOOT))


@pytest.mark.parametrize("value", ["", "no", "No", "FALSE", " no "])
def test_a_tag_that_says_no_protects_nothing(value: str) -> None:
    registry = Registry()
    worker = protected(registry, ready(registry, 0.0), 0.0, value)
    assert may_end(worker)
    assert verdict(registry, worker, IDLE) == Verdict(drain=Reason.IDLE)


def test_one_listing_without_the_tag_is_no_proof_that_somebody_has_taken_it_away() -> None:
    registry = Registry()
    worker = protected(registry, ready(registry, 0.0), 100.0)
    assert not may_end(protected(registry, worker, 219.0, value="")), "it may be two minutes behind"
    assert may_end(protected(registry, worker, 220.0, value=""))


def test_a_look_that_shows_no_tags_at_all_says_nothing_about_protection() -> None:
    registry = Registry()
    worker = protected(registry, ready(registry, 0.0), 0.0)
    assert not may_end(registry.observed(worker.id, instance("i-1"), 1e6))


# --- caps of a client and of the broker -------------------------------------------------------------------


def test_a_client_may_hold_as_many_workers_as_its_pool_allows_and_no_more() -> None:
    registry, settings = Registry(), pool(workers_per_client_max=2)
    first, second = (ready(registry, 0.0, number) for number in (1, 2))
    hold(registry, first, 0.0)
    assert client_refusal(registry, "default", settings, "ann") is None
    hold(registry, second, 0.0)
    refusal = client_refusal(registry, "default", settings, "ann")
    assert isinstance(refusal, LimitReached)
    assert "workers_per_client_max = 2" in refusal.message
    assert client_refusal(registry, "default", settings, "bob") is None
    assert client_refusal(registry, "default", POOL, "ann") is None, "without the setting there is no limit"
    assert client_refusal(registry, "gpu", settings, "ann") is None, "other pools do not count"


def test_a_worker_that_does_not_answer_does_not_keep_its_client_from_another_one() -> None:
    registry, settings = Registry(), pool(workers_per_client_max=1)
    worker = ready(registry, 0.0)
    hold(registry, worker, 0.0)
    registry.suspect(worker.id, "no answer", 1.0)
    assert client_refusal(registry, "default", settings, "ann") is None


def test_the_brokers_cap_counts_the_machines_of_all_pools_in_every_state() -> None:
    registry = Registry()
    registry.order(order("o-1", pool="gpu"), PORT, 0.0)
    registry.drain(ready(registry, 0.0, 2).id, "idle", 0.0)
    assert room_overall(registry, 5) == 3
    assert room_overall(registry, 1) == 0
    assert room_overall(registry, None) is None


def test_no_more_is_ordered_than_all_pools_together_may_have() -> None:
    registry = Registry()
    for number in (1, 2):
        registry.order(order(f"o-{number}", pool="gpu"), PORT, 0.0)
    assert launch_room(registry, "default", POOL, LaunchGuard(), 0.0, max_workers=5) == Room(3)
    assert launch_room(registry, "default", POOL, LaunchGuard(), 0.0, max_workers=9) == Room(4)
    full = launch_room(registry, "default", POOL, LaunchGuard(), 0.0, max_workers=2)
    assert isinstance(full.why, LimitReached)
    assert (full.machines, full.why.message) == (0, "the broker's max_workers = 2 is reached")


# --- the guard against runaway launches -----------------------------------------------------------------


def failing(guard: LaunchGuard, times: int, now: float, settings: PoolSettings = POOL) -> None:
    for _ in range(times):
        guard.boot_failed(settings, now)


def test_attempts_of_the_last_hour_count_and_older_ones_do_not() -> None:
    guard, settings = LaunchGuard(), pool(launches_per_hour=2)
    guard.attempted(0.0)
    assert guard.refusal(settings, 1.0) is None
    guard.attempted(10.0)
    refusal = guard.refusal(settings, 3_599.0)
    assert isinstance(refusal, LimitReached)
    assert refusal.message == "the pool's launches_per_hour = 2 is reached"
    assert guard.refusal(settings, 3_600.0) is None
    assert list(guard.attempts) == [10.0]


def test_failed_boots_in_a_row_pause_launches_and_say_why() -> None:
    guard = LaunchGuard()
    failing(guard, POOL.boot_failures_max - 1, 0.0)
    assert guard.refusal(POOL, 0.0) is None
    failing(guard, 1, 100.0)
    refusal = guard.refusal(POOL, 100.0)
    assert isinstance(refusal, LimitReached)
    assert refusal.message == (
        "3 machines in a row did not become ready; launches pause for 600 s more. "
        "Is the image or its user data broken?"
    )
    assert guard.refusal(POOL, 99.0 + 600.0) is not None
    assert guard.refusal(POOL, 100.0 + 600.0) is None


def test_a_machine_that_comes_up_between_failures_keeps_the_breaker_closed() -> None:
    guard = LaunchGuard()
    for _ in range(10):
        failing(guard, POOL.boot_failures_max - 1, 0.0)
        guard.booted()
    assert guard.refusal(POOL, 0.0) is None


def test_each_further_pause_is_twice_as_long_up_to_a_maximum() -> None:
    guard, pauses = LaunchGuard(), []
    for _ in range(7):
        failing(guard, POOL.boot_failures_max, 0.0)
        pauses.append(guard.closed_until_at)
    assert pauses == [600.0, 1200.0, 2400.0, 4800.0, 9600.0, 14_400.0, 14_400.0]
    guard.booted()
    failing(guard, POOL.boot_failures_max, 0.0)
    assert guard.closed_until_at == 600.0


def test_a_breaker_says_whether_it_is_open_for_how_long_and_how_often() -> None:
    guard = LaunchGuard()
    assert guard.breaker(0.0) == Breaker()
    failing(guard, POOL.boot_failures_max + 1, 0.0)
    assert guard.breaker(100.0) == Breaker(BreakerState.OPEN, 500.0, failures=1, openings=1)
    assert guard.breaker(600.0) == Breaker(BreakerState.CLOSED, 0.0, failures=1, openings=1)


def test_a_breaker_that_is_remembered_goes_on_where_it_was() -> None:
    guard = LaunchGuard()
    guard.recall(Breaker(BreakerState.OPEN, 250.0, failures=1, openings=2), now=1000.0)
    assert guard.breaker(1000.0) == Breaker(BreakerState.OPEN, 250.0, failures=1, openings=2)
    failing(guard, 2, 1300.0)
    assert guard.breaker(1300.0).seconds_left == 2400.0, "the third pause in a row"


def test_no_clock_makes_a_remembered_pause_longer_than_a_pause_can_be() -> None:
    guard = LaunchGuard()
    guard.recall(Breaker(BreakerState.OPEN, 1e6, openings=1), now=0.0)
    assert guard.breaker(0.0).seconds_left == 14_400.0


def test_whoever_keeps_the_breaker_hears_of_every_change_and_of_nothing_else() -> None:
    heard: list[None] = []
    guard = LaunchGuard(changed=lambda: heard.append(None))
    guard.booted()
    guard.attempted(0.0)
    assert heard == []
    failing(guard, 2, 0.0)
    guard.booted()
    assert len(heard) == 3


def test_launches_of_the_last_hour_can_be_counted_at_any_moment() -> None:
    guard = LaunchGuard()
    for at in (0.0, 10.0, 20.0):
        guard.attempted(at)
    assert [guard.launches_last_hour(now) for now in (20.0, 3605.0, 3620.0)] == [3, 2, 0]


def test_an_image_that_stays_broken_for_a_year_does_not_break_the_broker() -> None:
    guard, settings = LaunchGuard(), pool(boot_failures_max=1)
    failing(guard, 5_000, 0.0, settings)
    assert guard.closed_until_at == 14_400.0


# --- how many may be ordered ----------------------------------------------------------------------------


def room(registry: Registry, settings: PoolSettings = POOL, guard: LaunchGuard | None = None) -> Room:
    return launch_room(registry, "default", settings, guard or LaunchGuard(), now=0.0)


def says(found: Room) -> str:
    assert found.machines == 0
    assert found.why is not None
    return found.why.message


def affordable(*budgets: Budget) -> Room:
    """A machine costs 10."""
    return launch_room(
        Registry(), "default", POOL, LaunchGuard(), 0.0, budgets=budgets, price_usd_micros_per_hour=10
    )


def test_no_more_is_ordered_than_every_budget_allows() -> None:
    pools, brokers = Budget("the pool's", 25, 0, 0), Budget("the broker's", 15, 0, 0)
    assert affordable() == Room(4)
    assert affordable(pools) == Room(3)
    assert affordable(pools, brokers) == affordable(brokers, pools) == Room(2)


def test_who_may_not_launch_hears_which_budget_is_spent() -> None:
    spent = Budget("the broker's", 20, 15, 5)
    found = affordable(Budget("the pool's", 25, 0, 0), spent)
    assert isinstance(found.why, BudgetReached)
    assert says(found) == spent.refusal().message


def test_the_cap_counts_every_machine_that_is_not_gone() -> None:
    registry = Registry()
    ready(registry, 0.0, 1)
    registry.suspect(ready(registry, 0.0, 2).id, "no answer", 0.0)
    registry.drain(ready(registry, 0.0, 3).id, "idle", 0.0)
    assert room(registry) == Room(1)
    registry.drain(ready(registry, 0.0, 4).id, "idle", 0.0)
    registry.terminating("o-4", 0.0)
    assert says(room(registry)) == "the pool's max_workers = 4 is reached"
    registry.gone("o-4", "terminated", 0.0)
    assert room(registry) == Room(1)


def test_every_place_of_an_order_counts_against_the_cap() -> None:
    registry, three = Registry(), order("o-1", count=3)
    for place in three.places:
        registry.order(three, PORT, 0.0, place=place)
    assert room(registry) == Room(1)


def test_another_pools_machines_do_not_count() -> None:
    registry = Registry()
    for number in range(9):
        registry.order(order(f"o-{number}", pool="other"), PORT, 0.0)
    assert room(registry) == Room(4)


def test_no_more_is_ordered_than_the_hour_allows() -> None:
    guard = LaunchGuard()
    for _ in range(2):
        guard.attempted(0.0)
    assert room(Registry(), pool(launches_per_hour=3), guard) == Room(1)
    assert says(room(Registry(), pool(launches_per_hour=2), guard)) == (
        "the pool's launches_per_hour = 2 is reached"
    )


def test_while_the_breaker_is_open_nothing_is_ordered() -> None:
    guard = LaunchGuard()
    failing(guard, POOL.boot_failures_max, 0.0)
    assert "did not become ready" in says(room(Registry(), POOL, guard))


COUNTS = st.integers(0, 8)


@given(ordered=COUNTS, warm=COUNTS, attempts=COUNTS, cap=COUNTS, hourly=COUNTS)
@FEW
def test_there_is_never_more_room_than_a_limit_leaves(
    ordered: int, warm: int, attempts: int, cap: int, hourly: int
) -> None:
    registry, guard = Registry(), LaunchGuard()
    for number in range(ordered):
        registry.order(order(f"on-order-{number}"), PORT, 0.0)
    for number in range(warm):
        ready(registry, 0.0, number)
    for _ in range(attempts):
        guard.attempted(0.0)
    found = room(registry, pool(max_workers=cap, launches_per_hour=hourly), guard)
    assert found.machines == max(0, min(cap - len(registry), hourly - attempts))
    assert (found.why is None) is bool(found.machines)


def test_why_a_worker_is_drained_is_a_closed_list_of_short_words() -> None:
    """They are values of a metric's label, which dashboards hold on to."""
    assert {str(reason) for reason in Reason} == {
        "idle", "released", "max-lifetime", "boot-timeout", "boot-failed", "unresponsive", "terminate-all",
        "reclaimed", "stopped", "surplus", "ended-before", "wrong-market", "replaced", "pool-removed",
        "hard-lifetime", "used-up", "not-stopped", "outdated",
    }  # fmt: skip
