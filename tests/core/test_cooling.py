"""The memory of refusals and reclaims."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.cooling import (
    COOL_DOWN_SECONDS,
    COOL_DOWN_SECONDS_MAX,
    HOPE_SECONDS,
    MENDING_SECONDS,
    RECLAIM_SECONDS,
    STREAK_SECONDS_MAX,
    Cooling,
    quota_family,
)
from broker.core.errors import Code, OfferingRefused, PermanentRefusal, QuotaReached
from broker.core.model import Market, Offering
from tests.core.generated import FEW

BIG_A = Offering("us", "c7i.16xlarge", Market.SPOT, "us-a")
BIG_B, BIG = replace(BIG_A, zone="us-b"), replace(BIG_A, zone="")
SMALL_A = replace(BIG_A, instance_type="c7i.large")
BIG_A_ON_DEMAND = replace(BIG_A, market=Market.ON_DEMAND)
GPU_A = replace(BIG_A, instance_type="g5.xlarge")
ELSEWHERE = replace(BIG_A, region="eu", zone="eu-a")
EVERYTHING = (BIG_A, BIG_B, SMALL_A, BIG_A_ON_DEMAND, GPU_A, ELSEWHERE)
NONE_LEFT = OfferingRefused("no capacity")
NO_QUOTA = QuotaReached("quota")
WRONG_IMAGE = PermanentRefusal("wrong image")


def usable(cooling: Cooling, now: float, *offerings: Offering) -> tuple[Offering, ...]:
    return cooling.usable(offerings or EVERYTHING, now)[0]


def seconds_left(cooling: Cooling, offering: Offering, now: float) -> float:
    _, cool_downs = cooling.usable([offering], now)
    return cool_downs[0].seconds_left if cool_downs else 0.0


# --- refusals ------------------------------------------------------------------------------------------


def test_what_nobody_has_refused_is_usable_in_the_order_of_preference() -> None:
    assert Cooling().usable(EVERYTHING, 0.0) == (EVERYTHING, ())


def test_a_refused_offering_cools_down_for_three_minutes_and_no_other_does() -> None:
    cooling = Cooling()
    cooling.refused(BIG_A, NONE_LEFT, 100.0)
    assert cooling.usable(EVERYTHING, 160.0) == (EVERYTHING[1:], ((BIG_A, NONE_LEFT, 120.0),))
    assert usable(cooling, 279.9) == EVERYTHING[1:]
    assert usable(cooling, 280.0) == EVERYTHING


def test_each_refusal_in_a_row_doubles_the_cool_down_up_to_half_an_hour() -> None:
    cooling, now, lasted = Cooling(), 0.0, []
    for _ in range(7):
        cooling.refused(BIG_A, NONE_LEFT, now)
        lasted.append(seconds_left(cooling, BIG_A, now))
        now += lasted[-1]
    assert lasted == [180.0, 360.0, 720.0, 1440.0, 1800.0, 1800.0, 1800.0]


def test_a_purchase_ends_the_row() -> None:
    cooling = Cooling()
    cooling.refused(BIG_A, NONE_LEFT, 0.0)
    cooling.refused(BIG_A, NONE_LEFT, 180.0)
    cooling.bought(BIG_A, 200.0)
    assert usable(cooling, 200.0) == EVERYTHING
    cooling.refused(BIG_A, NONE_LEFT, 300.0)
    assert seconds_left(cooling, BIG_A, 300.0) == COOL_DOWN_SECONDS


def test_the_refusals_of_a_burst_are_one() -> None:
    cooling = Cooling()
    for number in range(20):
        cooling.refused(BIG_A, NONE_LEFT, number * 0.1)
    assert seconds_left(cooling, BIG_A, 2.0) == COOL_DOWN_SECONDS - 2.0


def test_a_refusal_of_yesterday_is_not_in_a_row_with_one_of_today() -> None:
    cooling = Cooling()
    cooling.refused(BIG_A, NONE_LEFT, 0.0)
    later = COOL_DOWN_SECONDS + STREAK_SECONDS_MAX
    cooling.refused(BIG_A, NONE_LEFT, later)
    assert seconds_left(cooling, BIG_A, later) == COOL_DOWN_SECONDS


def test_a_refusal_without_a_zone_cools_the_type_down_in_all_zones_of_its_market() -> None:
    cooling = Cooling()
    cooling.refused(BIG, NONE_LEFT, 0.0)
    assert usable(cooling, 1.0, BIG, *EVERYTHING) == (SMALL_A, BIG_A_ON_DEMAND, GPU_A, ELSEWHERE)


def test_a_refusal_in_one_zone_leaves_the_choice_of_another_to_the_cloud() -> None:
    cooling = Cooling()
    cooling.refused(BIG_A, NONE_LEFT, 0.0)
    assert usable(cooling, 1.0, BIG_A, BIG) == (BIG,)


def test_a_purchase_in_one_zone_proves_that_the_type_is_not_out_of_stock_everywhere() -> None:
    cooling = Cooling()
    cooling.refused(BIG, NONE_LEFT, 0.0)
    cooling.refused(BIG_B, NONE_LEFT, 0.0)
    cooling.bought(BIG_A, 10.0)
    assert usable(cooling, 10.0, BIG, BIG_A, BIG_B) == (BIG, BIG_A)


# --- quotas --------------------------------------------------------------------------------------------


def test_a_quota_pauses_its_market_in_its_region_for_every_type_that_draws_on_it() -> None:
    cooling = Cooling()
    cooling.refused(BIG_A, NO_QUOTA, 0.0)
    free, cool_downs = cooling.usable(EVERYTHING, 1.0)
    assert free == (BIG_A_ON_DEMAND, GPU_A, ELSEWHERE)
    assert {(one.offering, one.error.code) for one in cool_downs} == {
        (BIG_A, Code.LIMIT),
        (BIG_B, Code.LIMIT),
        (SMALL_A, Code.LIMIT),
    }


def test_a_pause_for_a_quota_grows_and_ends_with_a_purchase_on_it() -> None:
    cooling = Cooling()
    cooling.refused(BIG_A, NO_QUOTA, 0.0)
    cooling.refused(SMALL_A, NO_QUOTA, 180.0)
    assert seconds_left(cooling, BIG_B, 180.0) == 360.0
    cooling.bought(SMALL_A, 200.0)
    assert usable(cooling, 200.0) == EVERYTHING


@pytest.mark.parametrize(
    ("instance_type", "family"),
    [
        ("c7i.16xlarge", "standard"),
        ("im4gn.large", "standard"),
        ("t3.micro", "standard"),
        ("g5.xlarge", "g and vt"),
        ("vt1.3xlarge", "g and vt"),
        ("p4d.24xlarge", "p"),
        ("u-6tb1.metal", "u"),
        ("dl1.24xlarge", "dl"),
        ("inf2.xlarge", "inf"),
        ("local", "standard"),
    ],
)
def test_the_quota_of_a_machine_type_is_told_by_its_name(instance_type: str, family: str) -> None:
    assert quota_family(instance_type) == family


# --- permanent refusals --------------------------------------------------------------------------------


def test_a_permanent_refusal_is_heard_again_for_a_minute_by_its_own_pool() -> None:
    cooling = Cooling()
    cooling.refused(BIG_A, WRONG_IMAGE, 0.0, pool="wrong")
    _, cool_downs = cooling.usable([BIG_A], 1.0, pool="wrong")
    assert cool_downs == ((BIG_A, WRONG_IMAGE, MENDING_SECONDS - 1.0),)
    assert cooling.usable([BIG_A], 1.0, pool="right") == ((BIG_A,), ())
    assert cooling.usable([BIG_A], MENDING_SECONDS, pool="wrong") == ((BIG_A,), ())


def test_a_permanent_refusal_grows_to_minutes_and_a_reload_ends_it() -> None:
    cooling, now, pauses = Cooling(), 0.0, []
    for _ in range(5):
        cooling.refused(BIG_A, WRONG_IMAGE, now, pool="wrong")
        pauses.append(cooling.usable([BIG_A], now, pool="wrong")[1][0].seconds_left)
        now += pauses[-1]
    assert pauses == [60.0, 120.0, 240.0, 300.0, 300.0]
    assert cooling.refusal([BIG_A], now + 1.0, pool="wrong") is WRONG_IMAGE, (
        "an operator sees it all the time"
    )
    assert cooling.refusal([BIG_A], now + 1.0, pool="right") is None
    cooling.mended("wrong")
    assert cooling.refusal([BIG_A], now + 1.0, pool="wrong") is None


def test_after_a_start_nobody_knows_what_was_refused_before() -> None:
    cooling = Cooling()
    assert cooling.is_back(BIG_A, 0.0, 1.0)
    assert not cooling.is_back(BIG_A, 0.0, 101.0, known_at=100.0)
    assert cooling.is_back(BIG_A, 0.0, 100.0 + HOPE_SECONDS, known_at=100.0)
    assert not cooling.is_back(BIG_A, 0.0, 1e6, refused=False), "where it was not refused it must be bought"


def test_a_quota_that_has_no_room_for_a_large_machine_may_have_room_for_a_small_one() -> None:
    large, small = replace(BIG_A, cores=64), replace(BIG_A, instance_type="c7i.large", cores=2)
    cooling = Cooling()
    cooling.refused(large, NO_QUOTA, 0.0)
    assert cooling.usable([large, small], 1.0)[0] == (small,)
    cooling.bought(small, 1.0)
    assert cooling.usable([large, small], 1.0)[0] == (small,), "what is left of it is no more than before"
    cooling.refused(small, NO_QUOTA, 2.0)
    assert cooling.usable([large, small], 2.0)[0] == ()


def test_of_two_reasons_the_one_that_lasts_longer_is_told() -> None:
    cooling = Cooling()
    cooling.refused(BIG_A, NONE_LEFT, 0.0)
    cooling.refused(BIG_A, NO_QUOTA, 10.0)
    cooling.refused(BIG_A, WRONG_IMAGE, 20.0)
    assert cooling.usable([BIG_A], 20.0)[1] == ((BIG_A, NO_QUOTA, COOL_DOWN_SECONDS - 10.0),)


# --- reclaims ------------------------------------------------------------------------------------------


def test_one_reclaim_in_an_hour_only_moves_the_place_to_the_end() -> None:
    cooling = Cooling()
    cooling.reclaimed(BIG_A, 0.0)
    assert usable(cooling, 1.0) == (*EVERYTHING[1:], BIG_A)
    assert usable(cooling, RECLAIM_SECONDS) == EVERYTHING


def test_two_reclaims_within_an_hour_cool_the_place_down_and_more_do_so_for_longer() -> None:
    cooling, lasted = Cooling(), []
    for number in range(8):
        cooling.reclaimed(BIG_A, number)
        lasted.append(seconds_left(cooling, BIG_A, number))
    assert lasted == [0.0, 180.0, 360.0, 720.0, 1440.0, 1800.0, 1800.0, 1800.0]
    assert usable(cooling, 7.0) == EVERYTHING[1:]


def test_who_waits_behind_a_reclaim_hears_what_it_is() -> None:
    cooling = Cooling()
    cooling.reclaimed(BIG_A, 0.0)
    cooling.reclaimed(BIG_A, 1.0)
    ((_, error, _),) = cooling.usable([BIG_A], 2.0)[1]
    assert (error.code, type(error)) == (Code.NO_CAPACITY, OfferingRefused)
    assert "2 spot machines of type c7i.16xlarge were taken back within an hour in us-a" in error.message


def test_a_purchase_does_not_make_a_reclaim_untrue() -> None:
    cooling = Cooling()
    cooling.reclaimed(BIG_A, 0.0)
    cooling.bought(BIG_A, 1.0)
    assert usable(cooling, 2.0) == (*EVERYTHING[1:], BIG_A)


def test_where_the_cloud_chooses_the_zone_a_reclaim_moves_the_type_to_the_end_and_never_cools_it() -> None:
    cooling = Cooling()
    for number in range(5):
        cooling.reclaimed(BIG_A, number)
    assert usable(cooling, 5.0, BIG, SMALL_A) == (SMALL_A, BIG)


def test_on_demand_machines_are_not_reclaimed() -> None:
    cooling = Cooling()
    cooling.reclaimed(BIG_A_ON_DEMAND, 0.0)
    cooling.reclaimed(BIG_A_ON_DEMAND, 0.0)
    assert usable(cooling, 1.0) == EVERYTHING


# --- all of it -----------------------------------------------------------------------------------------

Step = tuple[float, str, Offering, OfferingRefused | PermanentRefusal]
ERRORS = st.sampled_from([NONE_LEFT, NO_QUOTA, WRONG_IMAGE])
OFFERINGS = st.sampled_from([BIG, *EVERYTHING])
STEPS = st.lists(
    st.tuples(st.floats(0, 900), st.sampled_from(["refused", "reclaimed", "bought"]), OFFERINGS, ERRORS),
    max_size=40,
)


def lived(steps: list[Step]) -> tuple[Cooling, float]:
    cooling, now = Cooling(), 0.0
    for pause_seconds, what, offering, error in steps:
        now += pause_seconds
        match what:
            case "refused":
                cooling.refused(offering, error, now)
            case "reclaimed":
                cooling.reclaimed(offering, now)
            case _:
                cooling.bought(offering, now)
    return cooling, now


@FEW
@given(STEPS)
def test_every_offering_is_either_usable_or_told_why_not_and_for_how_long(steps: list[Step]) -> None:
    cooling, now = lived(steps)
    free, cool_downs = cooling.usable(EVERYTHING, now)
    assert sorted(map(repr, [*free, *(one.offering for one in cool_downs)])) == sorted(map(repr, EVERYTHING))
    assert all(0.0 < one.seconds_left <= COOL_DOWN_SECONDS_MAX for one in cool_downs)
    for one in cool_downs:
        assert usable(cooling, now + one.seconds_left + 1e-6, one.offering) == (one.offering,)


@FEW
@given(STEPS)
def test_half_an_hour_of_silence_makes_everything_usable_and_an_hour_restores_the_order(
    steps: list[Step],
) -> None:
    cooling, now = lived(steps)
    assert set(usable(cooling, now + COOL_DOWN_SECONDS_MAX + 1.0)) == set(EVERYTHING)
    assert usable(cooling, now + RECLAIM_SECONDS + 1.0) == EVERYTHING


@FEW
@given(STEPS)
def test_a_purchase_makes_an_offering_usable_unless_machines_are_taken_back_or_a_person_is_needed(
    steps: list[Step],
) -> None:
    cooling, now = lived([step for step in steps if step[1] != "reclaimed" and step[3] is not WRONG_IMAGE])
    cooling.bought(BIG_A, now)
    assert usable(cooling, now, BIG_A) == (BIG_A,)


@FEW
@given(STEPS)
def test_what_is_long_past_takes_no_memory(steps: list[Step]) -> None:
    cooling, now = lived(steps)
    long_after, new = now + COOL_DOWN_SECONDS_MAX + STREAK_SECONDS_MAX, Cooling()
    for one in (cooling, new):
        one.bought(ELSEWHERE, long_after)
    assert cooling == new
