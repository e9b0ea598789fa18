"""The cloud's clock, pieced together from whole seconds that travel."""

from __future__ import annotations

from itertools import pairwise
from math import floor

from hypothesis import given
from hypothesis import strategies as st

from broker.core.cloudtime import DRIFT, CloudClock, hear
from tests.core.generated import FEW, MANY

OFFSET = 1_800_000_000.25  # the cloud's clock minus ours


def answers(*journeys: tuple[float, float, float]) -> list[CloudClock]:
    """The clock after each answer: (pause before it, way there, way back)."""
    found: list[CloudClock] = []
    at = 0.0
    for pause, there, back in journeys:
        sent, written = at + pause, at + pause + there
        at = written + back
        found.append(hear(found[-1] if found else None, sent, at, float(floor(OFFSET + written))))
    return found


SECONDS = st.floats(0, 30)


@given(st.lists(st.tuples(st.floats(0, 4000), SECONDS, SECONDS), min_size=1, max_size=20))
@MANY
def test_the_true_time_is_in_the_span(journeys: list[tuple[float, float, float]]) -> None:
    for clock in answers(*journeys):
        for at in (clock.at - 100.0, clock.at, clock.at + 1e5):
            span = clock.unix(at)
            assert span.earliest_unix - 1e-3 <= OFFSET + at <= span.latest_unix + 1e-3


def test_one_answer_leaves_a_second_and_its_journey_open() -> None:
    (clock,) = answers((5.0, 0.1, 0.3))
    span = clock.unix(clock.at)
    assert abs(span.latest_unix - span.earliest_unix - 1.4) < 1e-3


def test_many_answers_leave_little_more_than_a_journey_open() -> None:
    clock = answers(*[(1.07, 0.05, 0.05)] * 40)[-1]
    assert clock.offset_max - clock.offset_min < 0.25


@given(st.lists(st.tuples(st.floats(0, 60), SECONDS, SECONDS), min_size=2, max_size=20))
@FEW
def test_an_answer_widens_the_span_by_no_more_than_the_clocks_may_drift(
    journeys: list[tuple[float, float, float]],
) -> None:
    for before, after in pairwise(answers(*journeys)):
        drifted = 2 * DRIFT * (after.at - before.at)
        width = before.offset_max - before.offset_min
        assert after.offset_max - after.offset_min <= width + drifted + 1e-3


def test_after_a_suspension_the_newest_answer_counts() -> None:
    before = answers((0.0, 0.1, 0.1), (30.0, 0.1, 0.1))[-1]
    slept = 7200.0
    after = hear(before, 60.0, 60.2, floor(OFFSET + slept + 60.1))
    assert after.unix(60.1).earliest_unix - 1e-3 <= OFFSET + slept + 60.1 <= after.unix(60.1).latest_unix
