"""Our own token buckets, which throttle us before the cloud does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.core.bucket import Bucket, Limit

LAUNCHES = Limit(tokens_max=5, tokens_per_second=2)
PATIENCE_SECONDS = 30.0


def taken(bucket: Bucket, count: int, now: float) -> list[float | None]:
    return [bucket.take(now, PATIENCE_SECONDS) for _ in range(count)]


def test_a_full_bucket_lets_a_burst_through_and_then_so_many_a_second() -> None:
    bucket = Bucket(LAUNCHES, 100.0)
    assert taken(bucket, 8, 100.0) == [100.0] * 5 + [100.5, 101.0, 101.5]


def test_a_call_that_would_wait_too_long_takes_no_token() -> None:
    bucket = Bucket(LAUNCHES, 0.0)
    assert taken(bucket, 66, 0.0)[-2:] == [30.0, None]
    assert bucket.take(0.5, PATIENCE_SECONDS) == 30.5


def test_a_bucket_that_nobody_draws_from_fills_up_and_no_further() -> None:
    bucket = Bucket(LAUNCHES, 0.0)
    taken(bucket, 5, 0.0)
    assert taken(bucket, 6, 1_000.0) == [1_000.0] * 5 + [1_000.5]


def test_a_token_that_is_given_back_is_the_next_ones() -> None:
    bucket = Bucket(LAUNCHES, 0.0)
    assert taken(bucket, 6, 0.0)[-1] == 0.5
    bucket.give_back(0.0)
    assert bucket.take(0.0, PATIENCE_SECONDS) == 0.5


def test_giving_back_does_not_fill_a_bucket_beyond_its_size() -> None:
    bucket = Bucket(LAUNCHES, 0.0)
    bucket.take(0.0, PATIENCE_SECONDS)
    bucket.give_back(10.0)
    assert taken(bucket, 6, 10.0) == [10.0] * 5 + [10.5]


def test_a_throttle_empties_the_bucket_and_halves_its_refill_for_a_minute() -> None:
    bucket = Bucket(LAUNCHES, 0.0)
    bucket.throttled(0.0)
    assert taken(bucket, 3, 0.0) == [1.0, 2.0, 3.0]


def test_the_throttles_of_one_burst_slow_it_down_once() -> None:
    once, often = Bucket(LAUNCHES, 0.0), Bucket(LAUNCHES, 0.0)
    once.throttled(0.0)
    for _ in range(20):
        often.throttled(0.0)
    assert taken(once, 40, 0.0) == taken(often, 40, 0.0)


def test_after_the_slow_minute_it_refills_as_before() -> None:
    bucket = Bucket(LAUNCHES, 0.0)
    bucket.throttled(0.0)
    taken(bucket, 30, 0.0)  # owed until 30 s
    taken(bucket, 28, 30.0)  # until 58 s
    assert taken(bucket, 4, 58.0) == [59.0, 60.0, 60.5, 61.0]


@given(
    limit=st.builds(Limit, st.integers(1, 20), st.integers(1, 20)),
    steps=st.lists(
        st.tuples(st.floats(0, 5), st.sampled_from(["take", "take", "take", "give back", "throttled"])),
        max_size=80,
    ),
)
def test_never_more_calls_leave_in_a_span_than_burst_and_refill_allow(
    limit: Limit, steps: list[tuple[float, str]]
) -> None:
    bucket, now, left = Bucket(limit, 0.0), 0.0, list[float]()
    for pause_seconds, step in steps:
        now += pause_seconds
        if step == "take":
            leaves_at = bucket.take(now, PATIENCE_SECONDS)
            assert leaves_at is None or now <= leaves_at <= now + PATIENCE_SECONDS
            left += [leaves_at] if leaves_at is not None else []
        elif step == "give back" and left and left[-1] > now:
            bucket.give_back(now)
            left.pop()
        elif step == "throttled":
            bucket.throttled(now)
    left.sort()
    for first in range(len(left)):
        for last in range(first, len(left)):
            allowed = limit.tokens_max + (left[last] - left[first]) * limit.tokens_per_second
            assert last - first + 1 <= allowed + 1e-6
