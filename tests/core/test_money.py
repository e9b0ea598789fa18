"""Micro-dollars: whole numbers, per second, a minute at least."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.money import billed_seconds, cost_usd_micros
from tests.core.generated import FEW

PRICES = st.integers(0, 100_000_000)  # to 100 dollars an hour
SPANS = st.floats(0, 31_536_000.0)


@pytest.mark.parametrize(
    ("running_seconds", "billed"), [(-1.0, 0.0), (0.0, 0.0), (0.5, 60.0), (60.0, 60.0), (61.5, 61.5)]
)
def test_a_machine_that_ran_is_billed_for_a_minute_at_least(running_seconds: float, billed: float) -> None:
    assert billed_seconds(running_seconds) == billed


@pytest.mark.parametrize(
    ("price", "running_seconds", "cost"),
    [
        (3_600_000, 3600.0, 3_600_000),
        (3_600_000, 1.0, 60_000),
        (3_600_000, 90.0, 90_000),
        (3_600_000, 0.0, 0),
        (0, 3600.0, 0),
        (1, 3600.0, 1),
    ],
)
def test_an_hour_costs_the_hourly_price(price: int, running_seconds: float, cost: int) -> None:
    assert cost_usd_micros(price, running_seconds) == cost


@given(price=PRICES, earlier=SPANS, later=SPANS)
@FEW
def test_a_bill_never_shrinks(price: int, earlier: float, later: float) -> None:
    earlier, later = sorted((earlier, later))
    assert cost_usd_micros(price, earlier) <= cost_usd_micros(price, later)


@given(price=PRICES, seconds=st.integers(60, 31_536_000))
@FEW
def test_a_bill_is_right_to_the_micro_dollar(price: int, seconds: int) -> None:
    cost = cost_usd_micros(price, float(seconds))
    assert isinstance(cost, int)
    assert abs(cost * 3600 - price * seconds) <= 1800 + 1
