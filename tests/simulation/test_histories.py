"""Histories of a broker under a lying cloud: no promise is broken, and the referee sees it when one is."""

from __future__ import annotations

import pytest

from broker.simulation.drawing import draw
from broker.simulation.shrink import shrink
from broker.simulation.stage import play
from tests.simulation.plants import PLANTS

HOURS = 24.0
SEEDS = 24  # the short run; `make simulate` is the long one
# A referee that grows blind fails here. README.md has all of them, and how many histories each took; these
# are mostly found within ten. Whatever changes the broker changes the histories, so the bound is wide.
FOUND_SOON = (
    "cap-ignores-machines-on-order",
    "exclusive-is-a-word",
    "half-a-listing-is-a-listing",
    "handed-out-when-it-runs",
    "idle-without-looking-at-leases",
    "last-come-first-served",
    "launches-of-the-hour-are-not-counted",
    "leases-are-lost-at-a-restart",
    "machines-without-an-address-are-not-taken-in",
    "no-grace",
    "no-token-reuse",
    "order-written-after-the-call",
    "spares-ignore-machines-on-their-way",
    "starts-know-no-cap",
    "stopped-under-its-client",
    "strangers-are-claimed",
    "the-protect-tag-is-ignored",
    "waits-never-end",
)
FOUND_WITHIN = 40


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_promise_is_broken(seed: int) -> None:
    outcome = play(draw(seed, HOURS))
    assert [str(violation) for violation in outcome.violations] == []


def test_the_same_seed_gives_the_same_trace() -> None:
    first, second = (play(draw(4, HOURS), trace=True) for _ in range(2))
    assert len(first.trace) > 1000
    assert first.trace == second.trace


@pytest.mark.parametrize("bug", FOUND_SOON)
def test_a_planted_bug_is_found(bug: str) -> None:
    with PLANTS[bug]():
        assert any(play(draw(seed, HOURS)).violations for seed in range(FOUND_WITHIN)), bug


def test_a_history_that_breaks_a_promise_is_made_short() -> None:
    long = draw(0, 2.0)
    needed = next(entry for entry in long.entries if type(entry).__name__ == "Visit")
    short = shrink(long, lambda history: needed in history.entries)
    assert short.entries == (needed,)
