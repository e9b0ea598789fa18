"""Which offerings are asked for, on which market, for how many machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from broker.core.buying import (
    FALLBACK_IDLE_SECONDS,
    Choice,
    Shortfall,
    choose,
    is_fallback,
    on_demand_usd_micros_per_hour,
    to_replace,
)
from broker.core.cooling import HOPE_SECONDS, Cooling
from broker.core.errors import (
    Code,
    NoCapacity,
    OfferingRefused,
    PermanentRefusal,
    QuotaReached,
)
from broker.core.model import Market, Offering
from broker.core.registry import Registry
from tests.core.generated import FEW
from tests.core.make import PORT, instance, lease, order, pool

C7I = Offering("us-east-1", "c7i.16xlarge", Market.SPOT, cores=64)  # 2.856 $ on-demand
C6A = Offering("us-east-1", "c6a.16xlarge", Market.SPOT, cores=64)  # 2.448 $ on-demand
SPOT = (C7I, C6A)
ON_DEMAND = tuple(replace(one, market=Market.ON_DEMAND) for one in SPOT)
BOTH = (*SPOT, *ON_DEMAND)
MIXED = pool(market="spot-then-on-demand", on_demand_after="2m")
NONE_LEFT = OfferingRefused("no capacity")
DOLLAR = 1_000_000
OFFERINGS_MAX = 100


def asked(
    offerings: tuple[Offering, ...] = BOTH,
    settings: Any = MIXED,
    *,
    machines: int = 1,
    cooling: Cooling | None = None,
    prices: dict[tuple[str, str], int] | None = None,
    on_demand: int = 0,
    since_at: float | None = None,
    now: float = 0.0,
) -> Choice:
    return choose(
        offerings,
        "default",
        settings,
        Shortfall(machines, on_demand, since_at),
        cooling=cooling or Cooling(),
        spot_prices=prices or {},
        offerings_max=OFFERINGS_MAX,
        now=now,
    )


def without_spot(error: OfferingRefused | PermanentRefusal = NONE_LEFT, now: float = 0.0) -> Cooling:
    """Every spot offering has just been refused."""
    cooling = Cooling()
    for one in SPOT:
        cooling.refused(one, error, now, pool="default")
    return cooling


def refused(choice: Choice) -> NoCapacity | QuotaReached | PermanentRefusal:
    """The refusal of a choice that asks for nothing."""
    assert (choice.offerings, choice.machines, choice.obstacle) == ((), 0, "")
    assert isinstance(choice.refusal, NoCapacity | QuotaReached | PermanentRefusal)
    return choice.refusal


# --- one market ----------------------------------------------------------------------------------------


def test_all_offerings_that_can_be_had_are_asked_for_at_once_in_the_pools_order() -> None:
    assert asked(SPOT, pool(market="spot"), machines=7) == Choice(SPOT, 7)
    assert asked(ON_DEMAND, pool(market="on-demand"), machines=7) == Choice(ON_DEMAND, 7)


def test_what_cools_down_is_left_out_and_asked_for_again_when_that_is_over() -> None:
    cooling = Cooling()
    cooling.refused(C7I, NONE_LEFT, 0.0)
    assert asked(SPOT, pool(market="spot"), cooling=cooling, now=60.0) == Choice((C6A,), 1, look_at=180.0)
    assert asked(SPOT, pool(market="spot"), cooling=cooling, now=180.0) == Choice(SPOT, 1)


def test_one_call_names_no_more_places_than_it_may() -> None:
    many = tuple(replace(C7I, zone=f"z{number}") for number in range(OFFERINGS_MAX + 50))
    assert asked(many, pool(market="spot")).offerings == many[:OFFERINGS_MAX]


def test_a_spot_pool_never_buys_on_demand_however_long_it_waits() -> None:
    choice = asked(SPOT, pool(market="spot"), cooling=without_spot(), since_at=-86_400.0, now=1.0)
    assert refused(choice).code is Code.NO_CAPACITY
    assert choice.look_at == 180.0


def test_who_wants_what_the_pool_does_not_have_is_refused() -> None:
    choice = asked((), pool(market="on-demand"))
    assert refused(choice).code is Code.NO_CAPACITY
    assert choice.look_at is None


# --- what a client hears -------------------------------------------------------------------------------


def test_a_quota_is_told_as_a_limit_and_want_of_capacity_as_that() -> None:
    spot = pool(market="spot")
    quota = refused(asked(SPOT, spot, cooling=without_spot(QuotaReached("the quota is reached"))))
    assert (quota.code, quota.message) == (Code.LIMIT, "the quota is reached")
    capacity = refused(asked(SPOT, spot, cooling=without_spot()))
    assert (capacity.code, capacity.message) == (Code.NO_CAPACITY, "no capacity")
    both = without_spot(QuotaReached("the quota is reached"))
    both.refused(C7I, NONE_LEFT, 1.0)
    both.refused(C6A, NONE_LEFT, 1.0)
    assert refused(asked(SPOT, spot, cooling=both, now=1.0)).code is Code.NO_CAPACITY


def test_a_persons_mistake_is_told_before_everything_else() -> None:
    cooling = without_spot()
    wrong = PermanentRefusal("wrong image")
    late = 150.0  # it outlasts the cool-down of the same offering
    cooling.refused(C6A, wrong, late, pool="default")
    assert refused(asked(SPOT, pool(market="spot"), cooling=cooling, now=late)) is wrong


# --- prices --------------------------------------------------------------------------------------------


def test_a_place_that_has_no_markets_sells_what_it_has() -> None:
    """Local workers: the pool's market is left at its default, spot."""
    local = Offering("local", "local", Market.ON_DEMAND, cores=8)
    assert asked((local,), pool()) == Choice((local,), 1)
    assert asked((local,), MIXED) == Choice((local,), 1)


def test_spot_dearer_than_an_on_demand_machine_that_would_do_is_not_bought() -> None:
    prices = {("us-a", C7I.instance_type): 2_500_000, ("us-a", C6A.instance_type): 1 * DOLLAR}
    assert asked(SPOT, pool(market="spot"), prices=prices).offerings == (C6A,)
    assert asked(BOTH, prices=prices).offerings == (C6A,)


def test_when_all_spot_is_too_dear_a_client_hears_by_how_much() -> None:
    prices = {("us-a", one.instance_type): 2_500_000 for one in SPOT}
    error = refused(asked(SPOT, pool(market="spot"), prices=prices))
    assert error.code is Code.NO_CAPACITY
    assert "c7i.16xlarge costs $2.50 an hour on spot, more than the $2.45 of an on-demand" in error.message


def test_spot_whose_price_nobody_knows_may_be_bought() -> None:
    assert asked(SPOT, pool(market="spot"), prices={("us-a", "other"): 9 * DOLLAR}).offerings == SPOT


def test_a_smaller_on_demand_machine_does_not_forbid_a_larger_spot_machine_that_is_preferred() -> None:
    small = Offering("us-east-1", "c7i.large", Market.SPOT, cores=2)
    prices = {("us-a", C7I.instance_type): 1 * DOLLAR}
    assert asked((C7I, small), pool(market="spot"), prices=prices).offerings == (C7I, small)


def test_a_larger_on_demand_machine_that_costs_less_forbids_spot() -> None:
    dear = Offering("us-east-1", "p4d.24xlarge", Market.SPOT, cores=16)
    prices = {("us-a", dear.instance_type): 3 * DOLLAR}
    assert asked((dear, C7I), pool(market="spot"), prices=prices).offerings == (C7I,)


def test_a_type_of_unknown_size_is_only_compared_with_itself() -> None:
    unknown = replace(C7I, cores=None)
    prices = {("us-a", C7I.instance_type): 2_500_000}
    assert asked((unknown, C6A), pool(market="spot"), prices=prices).offerings == (unknown, C6A)


def test_where_the_cloud_may_choose_the_zone_and_one_is_too_dear_the_others_are_named() -> None:
    prices = {(f"us-{zone}", C7I.instance_type): price for zone, price in (("a", 1), ("b", 9), ("c", 2))}
    dollars = {key: price * DOLLAR for key, price in prices.items()}
    choice = asked((C7I,), pool(market="spot"), prices=dollars)
    assert [one.zone for one in choice.offerings] == ["us-a", "us-c"]


def test_the_price_of_another_zone_says_nothing() -> None:
    here = replace(C7I, zone="us-a")
    prices = {("us-b", C7I.instance_type): 9 * DOLLAR}
    assert asked((here,), pool(market="spot"), prices=prices).offerings == (here,)


def test_in_regions_whose_list_nobody_has_the_price_is_taken_for_higher() -> None:
    there = replace(C7I, region="eu-central-1")
    assert on_demand_usd_micros_per_hour(there) == 1.5 * on_demand_usd_micros_per_hour(C7I)
    prices = {("eu-central-1a", C7I.instance_type): 4 * DOLLAR}
    assert asked((there,), pool(market="spot"), prices=prices).offerings == (there,)


# --- spot, then on-demand ------------------------------------------------------------------------------


def test_spot_is_bought_as_long_as_there_is_any() -> None:
    cooling = Cooling()
    cooling.refused(C7I, NONE_LEFT, 0.0)
    choice = asked(cooling=cooling, machines=5, since_at=-86_400.0)
    assert (choice.offerings, choice.machines, choice.spot_refused) == ((C6A,), 5, False)


def test_on_demand_is_not_bought_before_spot_has_been_refused_for_a_while() -> None:
    choice = asked(cooling=without_spot(), since_at=0.0, now=119.0)
    assert choice == Choice(
        obstacle="no capacity; on-demand is bought in 1 s if that lasts", look_at=120.0, spot_refused=True
    )


def test_a_drought_that_has_just_begun_counts_from_now() -> None:
    choice = asked(cooling=without_spot(), since_at=None, now=50.0)
    assert (choice.offerings, choice.look_at, choice.spot_refused) == ((), 170.0, True)


def test_then_on_demand_is_bought_for_what_is_short() -> None:
    choice = asked(cooling=without_spot(), machines=3, since_at=0.0, now=120.0)
    assert (choice.offerings, choice.machines) == (ON_DEMAND, 3)
    assert choice.look_at == 180.0  # when spot is tried again


def test_as_soon_as_spot_can_be_asked_for_again_it_is() -> None:
    cooling = without_spot()
    assert asked(cooling=cooling, since_at=0.0, now=179.0).offerings == ON_DEMAND
    assert asked(cooling=cooling, since_at=0.0, now=180.0).offerings == SPOT


def test_never_more_on_demand_machines_than_the_pool_allows() -> None:
    two = pool(market="spot-then-on-demand", on_demand_max=2)
    cooling = without_spot()
    bought = [
        asked(settings=two, cooling=cooling, machines=5, on_demand=have, since_at=0.0, now=150.0).machines
        for have in range(4)
    ]
    assert bought == [2, 1, 0, 0]
    error = refused(asked(settings=two, cooling=cooling, on_demand=2, since_at=0.0, now=150.0))
    assert error.message == "no capacity; the pool's on_demand_max = 2 is reached"


def test_spot_that_is_too_dear_counts_as_refused() -> None:
    prices = {("us-a", one.instance_type): 9 * DOLLAR for one in SPOT}
    assert asked(prices=prices, since_at=0.0, now=119.0).spot_refused
    assert asked(prices=prices, since_at=0.0, now=120.0).offerings == ON_DEMAND


def test_when_on_demand_is_refused_too_there_is_nothing_to_wait_for() -> None:
    cooling = without_spot()
    for one in ON_DEMAND:
        cooling.refused(one, QuotaReached("the quota is reached"), 0.0)
    error = refused(asked(cooling=cooling, since_at=0.0, now=120.0))
    assert (error.code, error.message) == (Code.NO_CAPACITY, "no capacity; the quota is reached")


# --- fallback ------------------------------------------------------------------------------------------


def with_fallback(now: float = 0.0) -> Registry:
    """A ready on-demand worker and a ready spot worker in the pool."""
    registry = Registry()
    for number, offering in enumerate((ON_DEMAND[0], C7I), 1):
        registry.order(order(f"o-{number}", offering=offering), PORT, now)
        registry.launched(f"o-{number}", machine(number, offering), now)
        registry.ready(f"o-{number}", now)
    return registry


def machine(number: int, offering: Offering) -> Any:
    return instance(
        f"i-{number}",
        f"10.0.0.{number}",
        market=offering.market,
        region=offering.region,
        instance_type=offering.instance_type,
        cores=offering.cores,
    )


def replaced(
    registry: Registry, now: float, *, cooling: Cooling | None = None, **more: Any
) -> tuple[str, ...]:
    settings, offerings = more.get("settings", MIXED), more.get("offerings", BOTH)
    return to_replace(
        registry, "default", settings, offerings, cooling=cooling or Cooling(), spot_prices={}, now=now
    )


def test_only_an_on_demand_machine_of_a_pool_that_prefers_spot_is_a_fallback() -> None:
    assert is_fallback(ON_DEMAND[0], MIXED)
    assert not is_fallback(C7I, MIXED)
    assert not is_fallback(ON_DEMAND[0], pool(market="on-demand"))
    assert not is_fallback(ON_DEMAND[0], pool(market="spot"))  # EC2 has sold on-demand what was to be spot


def test_a_fallback_is_replaced_once_nobody_uses_it_and_spot_can_be_had() -> None:
    registry = with_fallback()
    assert replaced(registry, FALLBACK_IDLE_SECONDS - 1) == ()
    assert replaced(registry, FALLBACK_IDLE_SECONDS) == ("o-1",)


def test_a_fallback_that_somebody_holds_is_never_replaced() -> None:
    registry = with_fallback()
    registry.grant(lease("o-1", "ann", 100_000.0), 10.0)
    assert replaced(registry, 50_000.0) == ()


def test_a_fallback_stays_while_spot_cannot_be_had_or_is_smaller() -> None:
    registry = with_fallback()
    assert replaced(registry, 100.0, cooling=without_spot()) == ()
    assert replaced(registry, 180.0, cooling=without_spot()) == (), (
        "that nobody was refused it proves nothing"
    )
    cooling = without_spot()
    cooling.bought(C7I, 181.0)
    assert replaced(registry, 182.0, cooling=cooling) == ("o-1",)
    assert replaced(registry, HOPE_SECONDS, cooling=without_spot()) == ("o-1",)
    small = Offering("us-east-1", "c7i.large", Market.SPOT, cores=2)
    assert replaced(registry, 180.0, offerings=(small, *ON_DEMAND)) == ()


def test_workers_of_another_pool_or_another_market_setting_stay() -> None:
    registry = with_fallback()
    assert replaced(registry, 1_000.0, settings=pool(market="on-demand")) == ()
    assert to_replace(registry, "other", MIXED, BOTH, cooling=Cooling(), spot_prices={}, now=1_000.0) == ()


# --- always --------------------------------------------------------------------------------------------


@FEW
@given(
    market=st.sampled_from(["spot", "on-demand", "spot-then-on-demand"]),
    machines=st.integers(1, 20),
    on_demand_max=st.none() | st.integers(0, 5),
    on_demand=st.integers(0, 8),
    cooling_down=st.sets(st.integers(0, 3)),
    prices=st.dictionaries(
        st.tuples(st.sampled_from(["us-a", "us-b"]), st.sampled_from([one.instance_type for one in SPOT])),
        st.integers(1, 5 * DOLLAR),
    ),
    since_at=st.none() | st.floats(0, 300),
)
def test_no_purchase_breaks_a_rule(
    market: str,
    machines: int,
    on_demand_max: int | None,
    on_demand: int,
    cooling_down: set[int],
    prices: dict[tuple[str, str], int],
    since_at: float | None,
) -> None:
    settings, now, cooling = pool(market=market, on_demand_max=on_demand_max), 301.0, Cooling()
    offerings = tuple(one for one in BOTH if str(one.market) in settings.markets)
    for number in sorted(cooling_down):
        cooling.refused(BOTH[number], NONE_LEFT, 300.0)
    bought = asked(
        offerings,
        settings,
        machines=machines,
        cooling=cooling,
        prices=prices,
        on_demand=on_demand,
        since_at=since_at,
        now=now,
    )
    assert bool(bought.offerings) == bool(bought.machines) != bool(bought.refusal or bought.obstacle)
    assert bought.machines <= machines
    assert len({one.market for one in bought.offerings}) <= 1
    cheapest = min(map(on_demand_usd_micros_per_hour, SPOT))
    for one in bought.offerings:
        assert str(one.market) in settings.markets
        if one.market is Market.SPOT:
            its_prices = [p for (zone, kind), p in prices.items() if kind == one.instance_type]
            here = [prices[key] for key in [(one.zone, one.instance_type)] if key in prices]
            assert max(here if one.zone else its_prices, default=0) <= cheapest
        elif market == "spot-then-on-demand":
            assert since_at is not None
            assert now - since_at >= settings.on_demand_after
            assert on_demand_max is None or on_demand + bought.machines <= on_demand_max
