"""Histories of a broker under a lying cloud: no promise is broken, and the referee sees it when one is."""

from __future__ import annotations

import pytest

from broker.simulation.drawing import draw
from broker.simulation.shrink import shrink
from broker.simulation.stage import play
from tests.simulation.plants import PLANTS

HOURS = 24.0
SEEDS = 24  # the short run; `make simulate` is the long one
# Found within so many histories: README.md has all of them, here are the quick ones. A referee that grows
# blind fails here.
FOUND_WITHIN = {
    "cap-ignores-machines-on-order": 1,
    "exclusive-is-a-word": 1,
    "half-a-listing-is-a-listing": 7,
    "handed-out-when-it-runs": 1,
    "handed-out-without-a-proof": 7,
    "idle-without-looking-at-leases": 1,
    "launches-of-the-hour-are-not-counted": 1,
    "max-lifetime-ends-busy-workers": 10,
    "no-grace": 3,
    "no-token-reuse": 1,
    "order-written-after-the-call": 1,
    "spares-ignore-machines-on-their-way": 10,
    "strangers-are-claimed": 1,
    "the-protect-tag-is-ignored": 1,
    "uses-are-not-counted": 3,
    "waits-never-end": 1,
}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_promise_is_broken(seed: int) -> None:
    outcome = play(draw(seed, HOURS))
    assert [str(violation) for violation in outcome.violations] == []


def test_the_same_seed_gives_the_same_trace() -> None:
    first, second = (play(draw(4, HOURS), trace=True) for _ in range(2))
    assert len(first.trace) > 1000
    assert first.trace == second.trace


@pytest.mark.parametrize(("bug", "seeds"), FOUND_WITHIN.items())
def test_a_planted_bug_is_found(bug: str, seeds: int) -> None:
    with PLANTS[bug]():
        assert any(play(draw(seed, HOURS)).violations for seed in range(seeds)), bug


def test_a_history_that_breaks_a_promise_is_made_short() -> None:
    long = draw(0, 2.0)
    needed = next(entry for entry in long.entries if type(entry).__name__ == "Visit")
    short = shrink(long, lambda history: needed in history.entries)
    assert short.entries == (needed,)
