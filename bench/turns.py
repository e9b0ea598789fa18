"""Playing turns on a machine that others use too.

A turn that other programs disturbed is played again, a bounded number of times; then the least disturbed ones
count. They are chosen by what the others used, never by what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from bench.load import Slice

QUIET_SHARE_MAX = 0.15  # of one core, for programs that are no part of this
TURNS_MAX_FACTOR = 3  # so many times the rounds asked for are played at most, in search of quiet ones

Turn = TypeVar("Turn")


def disturbance(slices: Iterable[Slice]) -> float:
    """The largest share of a core that other programs took in any of these slices."""
    return max((one.others_cpu_share for one in slices), default=0.0)


def play(
    rounds: int,
    turn: Callable[[], Turn],
    slices_of: Callable[[Turn], Iterable[Slice]],
    quiet_share_max: float = QUIET_SHARE_MAX,
) -> tuple[list[Turn], int]:
    """The `rounds` turns that count, and how many others were played."""
    played: list[tuple[float, int, Turn]] = []
    quiet = 0
    while len(played) < rounds * TURNS_MAX_FACTOR and quiet < rounds:
        one = turn()
        share = disturbance(slices_of(one))
        played.append((share, len(played), one))
        quiet += share <= quiet_share_max
    kept = sorted(played)[:rounds]
    return [one for _, _, one in kept], len(played) - len(kept)
