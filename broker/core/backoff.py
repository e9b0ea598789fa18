"""How long to pause after failures in a row: doubling, up to a longest pause."""

from __future__ import annotations

DOUBLINGS_MAX = 32  # more would pause no longer than any maximum here, and far more would exceed a float


def doubled(first_seconds: float, times: int, longest_seconds: float) -> float:
    """The pause in seconds after the `times`-th failure in a row, of which the first counts as 1."""
    return min(first_seconds * 2.0 ** min(times - 1, DOUBLINGS_MAX), longest_seconds)
