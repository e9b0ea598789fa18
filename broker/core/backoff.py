"""How long to pause after failures in a row: doubling, up to a longest pause."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

DOUBLINGS_MAX = 32  # more would pause no longer than any maximum here, and far more would exceed a float


def doubled(first_seconds: float, times: int, longest_seconds: float) -> float:
    """The pause in seconds after the `times`-th failure in a row, of which the first counts as 1."""
    return min(first_seconds * 2.0 ** min(times - 1, DOUBLINGS_MAX), longest_seconds)


@dataclass(slots=True)
class Backoff:
    """What is not tried again at once after it has failed: later each time, until it succeeds."""

    first_seconds: float
    longest_seconds: float
    failures: int = 0  # in a row
    not_before_at: float = -inf

    def failed(self, now: float) -> None:
        """It has failed. Failures of one moment count once."""
        if not self.pauses(now):
            self.failures += 1
            self.not_before_at = now + doubled(self.first_seconds, self.failures, self.longest_seconds)

    def succeeded(self) -> None:
        """It has worked: the next failure is the first one."""
        self.failures = 0

    def pauses(self, now: float) -> bool:
        """Whether it is not to be tried yet."""
        return now < self.not_before_at
