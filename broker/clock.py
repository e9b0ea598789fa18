"""The two clocks, behind one name, so that tests and simulations can bring their own.

Idle times and deadlines run on the monotonic clock, tags on the wall clock: a wall clock that jumps an hour
ends nobody and makes nobody immortal. Money runs on the cloud's clock: core/cloudtime.py.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def monotonic(self) -> float:
        """Seconds since some moment in the past; never goes back."""

    def wall(self) -> float:
        """Seconds since 1970, as far as this machine knows."""


class SystemClock:
    """The machine's own clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)
