"""Which region is bought in, what is said when none sells, and which is near."""

from __future__ import annotations

import pytest

from broker.core.buying import Choice
from broker.core.errors import (
    BrokerError,
    CloudError,
    CloudUnreachable,
    NoCapacity,
    PermanentRefusal,
    QuotaReached,
)
from broker.core.latency import SAMPLES_MAX, RoundTrip, nearest_first
from broker.core.model import Market, Offering
from broker.core.regional import first_good, sum_up

SPOT, ON_DEMAND = (Choice((Offering("moon", "big", market),), 3) for market in Market)
FALLBACK = Choice(ON_DEMAND.offerings, 3, spot_refused=True)
LATER = Choice(obstacle="on-demand in 20 s", look_at=20.0, spot_refused=True)


def refused(error: BrokerError, look_at: float | None = None) -> Choice:
    return Choice(refusal=error, look_at=look_at, spot_refused=True)


NONE_LEFT = refused(NoCapacity("none left"), 180.0)


@pytest.mark.parametrize(
    ("choices", "number"),
    [
        ([SPOT, SPOT], 0),
        ([NONE_LEFT, SPOT], 1),
        ([FALLBACK, SPOT], 1),
        ([NONE_LEFT, FALLBACK], 1),
        ([LATER, SPOT], 1),
        ([ON_DEMAND, SPOT], 0),
    ],
)
def test_the_first_that_sells_as_the_pool_prefers_is_bought_in(choices: list[Choice], number: int) -> None:
    found, choice = first_good((f"region {n}", one) for n, one in enumerate(choices))
    assert (found, choice) == (number, choices[number])


def test_no_region_is_looked_at_that_is_not_needed() -> None:
    choices = iter([("earth", SPOT), ("mars", SPOT)])
    first_good(choices)
    assert next(choices)[0] == "mars"


def test_one_region_says_what_it_says() -> None:
    assert first_good([("earth", NONE_LEFT)]) == (None, NONE_LEFT)
    assert first_good([("earth", LATER)]) == (None, LATER)


def test_waiting_helps_when_it_helps_in_one_of_them() -> None:
    number, choice = first_good([("earth", NONE_LEFT), ("mars", LATER)])
    assert number is None
    assert (choice.obstacle, choice.look_at, choice.refusal) == ("mars: on-demand in 20 s", 20.0, None)
    assert choice.spot_refused


def test_spot_is_refused_when_every_region_refuses_it() -> None:
    permanent = Choice(refusal=PermanentRefusal("wrong image"))
    assert not first_good([("earth", NONE_LEFT), ("mars", permanent)])[1].spot_refused


@pytest.mark.parametrize(
    ("errors", "sort"),
    [
        ([NoCapacity("a"), QuotaReached("b")], NoCapacity),
        ([QuotaReached("a"), QuotaReached("b")], QuotaReached),
        ([PermanentRefusal("a"), PermanentRefusal("b")], PermanentRefusal),
        ([PermanentRefusal("a"), NoCapacity("b")], NoCapacity),
        ([CloudUnreachable("a"), PermanentRefusal("b")], CloudError),
    ],
)
def test_the_error_of_all_is_of_their_sort_and_names_each(
    errors: list[BrokerError], sort: type[BrokerError]
) -> None:
    error = sum_up(list(zip(("earth", "mars"), errors, strict=True)))
    assert type(error) is sort
    assert error.message == "earth: a; mars: b"


def test_the_round_trip_is_the_least_of_the_last_calls() -> None:
    trip = RoundTrip()
    assert trip.seconds is None
    for seconds in (0.4, 0.1, 0.9, -1.0):
        trip.took(seconds)
    assert trip.seconds == 0.1
    for _ in range(SAMPLES_MAX):
        trip.took(0.3)
    assert trip.seconds == 0.3, "the way has become longer"


def test_the_nearest_comes_first_and_who_never_answered_last() -> None:
    assert nearest_first([0.180, None, 0.020]) == [2, 0, 1]
    assert nearest_first([0.0201, 0.0199]) == [0, 1], "as near as each other: as they are listed"


def test_regions_that_are_passed_over_are_told_of_only_when_none_sells() -> None:
    down = [("venus", CloudError("venus cannot be used"))]
    assert first_good([("earth", SPOT)], down)[1] == SPOT
    number, choice = first_good([("earth", NONE_LEFT)], down)
    assert number is None
    assert isinstance(choice.refusal, NoCapacity)
    assert choice.refusal.message == "earth: none left; venus cannot be used"
    assert choice.look_at == 180.0


def test_nothing_but_regions_that_are_passed_over_is_no_want_of_spot() -> None:
    error = CloudError("venus cannot be used")
    number, choice = first_good([], [("venus", error)])
    assert (number, choice.refusal, choice.spot_refused) == (None, error, False)


def test_it_is_worth_waiting_for_a_region_that_soon_sells_again() -> None:
    down = [("venus", CloudError("not listed for a while"))]
    choice = first_good([("earth", NONE_LEFT)], down, worth_waiting=True)[1]
    assert (choice.refusal, choice.obstacle) == (None, "earth: none left; venus: not listed for a while")
