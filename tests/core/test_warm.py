"""Warm workers: how many are missing, which ones stay, and from when the others are idle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.model import UNKNOWN_CLIENT, Worker
from broker.core.planning import Need, plan
from broker.core.policy import Reason, Verdict, judge
from broker.core.registry import Registry
from broker.core.warm import LOOK_SECONDS, Warmth, expiring, idle_since_at, spare, warm_shortage
from broker.core.wish import ANYTHING
from tests.core.generated import FEW
from tests.core.make import MOON, PORT, instance, lease, order, pool

POOL = pool(idle_timeout="15m", max_lifetime="8h", boot_deadline="10m", max_workers=40)
IDLE, LIFETIME, BOOT = 900.0, 28_800.0, 600.0


def ordered(registry: Registry, number: int, now: float = 0.0) -> None:
    registry.order(order(f"o-{number}"), PORT, now)


def booting(registry: Registry, number: int, now: float = 0.0) -> Worker:
    ordered(registry, number, now)
    return registry.launched(f"o-{number}", instance(f"i-{number}", f"10.0.0.{number}"), now)


def ready(registry: Registry, number: int, now: float = 0.0) -> Worker:
    return registry.ready(booting(registry, number, now).id, now)


def shortage(registry: Registry, target: int, *, now: float = 1.0) -> int:
    return warm_shortage(registry, "default", POOL, target, now)


def bought(registry: Registry, target: int, coming: int, clients: int = 0) -> int:
    """As the launch loop asks the planner, with room for all."""
    needs = [Need(ANYTHING, clients, exclusive=True)] if clients else []
    planned = plan(needs, {(MOON,): coming}, [MOON], 100, spare=shortage(registry, target))
    return sum(purchase.machines for purchase in planned.purchases)


def warmth(target: int, now: float = 0.0) -> Warmth:
    looked = Warmth()
    looked.seen(target, now)
    return looked


# --- what is missing ------------------------------------------------------------------------------------


def test_where_nothing_is_all_is_missing_and_without_a_target_nothing_is() -> None:
    assert shortage(Registry(), 3) == 3
    assert shortage(Registry(), 0) == 0


def test_what_is_ready_or_coming_is_not_ordered_again() -> None:
    registry = Registry()
    ready(registry, 1)
    assert bought(registry, 3, coming=2) == 0
    assert bought(registry, 5, coming=2) == 2


def test_a_worker_that_somebody_holds_is_none_that_is_ready_for_the_next() -> None:
    registry = Registry()
    worker = ready(registry, 1)
    registry.grant(lease(worker.id), 0.0)
    assert shortage(registry, 1) == 1


def test_machines_that_waiting_clients_need_are_no_spares() -> None:
    registry = Registry()
    assert bought(registry, 2, coming=3, clients=2) == 1
    assert bought(registry, 2, coming=3, clients=3) == 2
    assert bought(registry, 2, coming=3, clients=7) == 4 + 2


def test_a_silent_worker_and_one_on_its_way_out_are_replaced() -> None:
    registry = Registry()
    registry.suspect(ready(registry, 1).id, "no answer", 0.0)
    registry.drain(ready(registry, 2).id, "released", 0.0)
    assert shortage(registry, 2) == 2


def test_a_machine_that_perhaps_somebody_holds_is_not_doubled() -> None:
    registry = Registry()
    worker = ready(registry, 1)
    registry.grant(lease(worker.id, UNKNOWN_CLIENT), 0.0)
    assert shortage(registry, 1) == 0


def test_one_that_is_soon_too_old_is_replaced_a_boot_ahead() -> None:
    registry = Registry()
    worker = ready(registry, 1)
    assert shortage(registry, 1, now=LIFETIME - BOOT - 1.0) == 0
    assert shortage(registry, 1, now=LIFETIME - BOOT) == 1
    assert expiring(worker, POOL, LIFETIME - BOOT)


def test_a_pool_of_short_lives_does_not_replace_for_most_of_them() -> None:
    registry = Registry()
    worker = ready(registry, 1)
    short = pool(max_lifetime="8m", boot_deadline="10m")
    assert not expiring(worker, short, 359.0)
    assert expiring(worker, short, 360.0)


@given(st.lists(st.sampled_from(["ready", "held"]), max_size=8), *[st.integers(0, 5)] * 3)
@FEW
def test_what_is_ordered_never_exceeds_demand_and_target(
    states: list[str], coming: int, target: int, clients: int
) -> None:
    registry = Registry()
    for number, state in enumerate(states, start=1):
        ready(registry, number)
        if state == "held":
            registry.grant(lease(f"o-{number}"), 0.0)
    unheld, orders = states.count("ready"), bought(registry, target, coming, clients)
    assert orders == 0 or min(unheld, target) + coming + orders <= clients + target
    assert unheld + coming + orders >= target, "and the target is met"


# --- who stays ------------------------------------------------------------------------------------------


def test_of_several_unheld_workers_the_longest_unheld_ones_are_the_spares() -> None:
    registry = Registry()
    first, second, third = (ready(registry, number) for number in (1, 2, 3))
    registry.grant(lease(first.id), 10.0)
    registry.end_lease(first.id, "ann", "done", 20.0)
    assert [spare(registry, one, POOL, 2, 20.0) for one in (first, second, third)] == [False, True, True]
    assert not any(spare(registry, one, POOL, 0, 20.0) for one in (first, second, third))


def test_a_held_or_silent_worker_is_no_spare() -> None:
    registry = Registry()
    held, silent = ready(registry, 1), ready(registry, 2)
    registry.grant(lease(held.id), 0.0)
    silent = registry.suspect(silent.id, "no answer", 0.0)
    assert not spare(registry, held, POOL, 5, 0.0)
    assert not spare(registry, silent, POOL, 5, 0.0)


def test_a_spare_is_not_idle_and_is_looked_at_again_within_a_minute() -> None:
    registry = Registry()
    worker, later = ready(registry, 1), 5 * IDLE
    assert judge(registry, worker, POOL, later, warmth(1)) == Verdict(next_look_at=later + LOOK_SECONDS)
    assert judge(registry, worker, POOL, later, warmth(0)) == Verdict(drain=Reason.IDLE)


def test_one_too_many_is_idle_from_its_last_use() -> None:
    registry = Registry()
    ready(registry, 1)
    used = ready(registry, 2)
    registry.grant(lease(used.id), 1000.0)
    registry.end_lease(used.id, "ann", "done", 1001.0)
    assert judge(registry, used, POOL, 1001.0, warmth(1)) == Verdict(next_look_at=1000.0 + IDLE)
    assert judge(registry, used, POOL, 1000.0 + IDLE, warmth(1)) == Verdict(drain=Reason.IDLE)


def test_when_the_target_falls_the_idle_time_of_the_surplus_begins() -> None:
    registry = Registry()
    first, second, third = (ready(registry, number) for number in (1, 2, 3))
    looked = warmth(3)
    looked.seen(2, 5000.0)
    looked.seen(1, 5600.0)
    assert idle_since_at(registry, first, POOL, looked, 5700.0) is None
    assert idle_since_at(registry, second, POOL, looked, 5700.0) == 5600.0
    assert idle_since_at(registry, third, POOL, looked, 5700.0) == 5000.0
    assert judge(registry, third, POOL, 5000.0 + IDLE, looked) == Verdict(drain=Reason.IDLE)
    assert judge(registry, second, POOL, 5000.0 + IDLE, looked) == Verdict(next_look_at=5600.0 + IDLE)


def test_a_target_that_rises_again_keeps_who_is_still_there() -> None:
    registry = Registry()
    worker, looked = ready(registry, 1), warmth(1)
    looked.seen(0, 5000.0)
    looked.seen(1, 5800.0)
    assert idle_since_at(registry, worker, POOL, looked, 9000.0) is None
    looked.seen(0, 9000.0)
    assert idle_since_at(registry, worker, POOL, looked, 9001.0) == 9000.0


def test_a_spare_that_falls_silent_has_the_time_of_every_silent_worker_to_come_back() -> None:
    registry = Registry()
    worker = registry.suspect(ready(registry, 1).id, "no answer", 5000.0)
    assert judge(registry, worker, POOL, 5001.0, warmth(1)) == Verdict(next_look_at=5300.0)
    assert judge(registry, worker, POOL, 5300.0, warmth(1)) == Verdict(drain=Reason.UNRESPONSIVE)
    assert judge(registry, worker, POOL, 5001.0, warmth(0)) == Verdict(drain=Reason.IDLE)


def test_an_old_spare_goes_when_its_replacement_is_ready_and_at_its_max_lifetime_in_any_case() -> None:
    registry, late = Registry(), LIFETIME - 100.0
    old = ready(registry, 1)
    booting(registry, 2, late)
    assert judge(registry, old, POOL, late, warmth(1)) == Verdict(next_look_at=late + LOOK_SECONDS)
    assert judge(registry, old, POOL, LIFETIME, warmth(1)) == Verdict(drain=Reason.MAX_LIFETIME)
    registry.ready("o-2", late + 1.0)
    assert judge(registry, old, POOL, late + 1.0, warmth(1)) == Verdict(drain=Reason.IDLE)


# --- patience -------------------------------------------------------------------------------------------


def test_failures_pause_launches_for_a_minute_doubling_to_a_quarter_of_an_hour() -> None:
    looked, now, pauses = Warmth(), 0.0, []
    for _ in range(6):
        looked.failed(now)
        pauses.append(looked.not_before_at - now)
        now = looked.not_before_at
    assert pauses == [60.0, 120.0, 240.0, 480.0, 900.0, 900.0]
    looked.succeeded()
    looked.failed(now)
    assert looked.not_before_at - now == 60.0


def test_failures_of_one_moment_count_once_and_ten_thousand_of_them_break_nothing() -> None:
    looked = Warmth()
    for _ in range(30):
        looked.failed(0.0)
    assert looked.not_before_at == 60.0
    for _ in range(10_000):
        looked.failed(looked.not_before_at)
    assert looked.failures == 10


@pytest.mark.parametrize(("before", "asked", "until"), [(0.0, 900.0, 900.0), (2000.0, 900.0, 2000.0)])
def test_a_pause_is_never_made_shorter(before: float, asked: float, until: float) -> None:
    looked = Warmth(not_before_at=before)
    looked.pause(asked, 0.0)
    assert looked.not_before_at == until
