"""How far away a region is: the round trip of the calls that are made anyway.

What a call takes beyond its way says nothing of the distance: a new connection, a long answer, a busy server,
a repetition by the SDK. So the least of the last few counts; a way that has become longer shows when they
have passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

SAMPLES_MAX = 16  # a quarter of an hour of scans, more or less
STEP_SECONDS = 0.005  # closer than that, two regions are as far: the order in which they are listed decides


@dataclass(slots=True)
class RoundTrip:
    """See the module. One for each region."""

    _samples: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))

    def took(self, seconds: float) -> None:
        """A call has been answered after so long."""
        if seconds >= 0:
            self._samples.append(seconds)

    @property
    def seconds(self) -> float | None:
        """The round trip, None before the first answer."""
        return min(self._samples, default=None)


def nearest_first(round_trips_seconds: Sequence[float | None]) -> list[int]:
    """The numbers of the regions, listed as here, the nearest first; those that never answered come last."""

    def distance(number: int) -> float:
        seconds = round_trips_seconds[number]
        return float("inf") if seconds is None else round(seconds / STEP_SECONDS)

    return sorted(range(len(round_trips_seconds)), key=distance)
