"""The two clocks, behind one name, so that tests and simulations can bring their own.

Idle times and deadlines run on the monotonic clock, tags on the wall clock: a wall clock that jumps an hour
ends nobody and makes nobody immortal. Money runs on the cloud's clock: core/cloudtime.py.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # (Linux: random(4)) anew with every start of the machine


@dataclass(frozen=True, slots=True)
class Moment:
    """Now, by every clock there is. `boot` names the run of the monotonic clock that `at` belongs to."""

    boot: str
    at: float
    unix: float


class Clock(Protocol):
    """Where time comes from."""

    @property
    def boot(self) -> str:
        """Which run of the monotonic clock this is: it begins anew when the machine starts."""

    def monotonic(self) -> float:
        """Seconds since some moment in the past; never goes back."""

    def wall(self) -> float:
        """Seconds since 1970, as far as this machine knows."""


class SystemClock:
    """The machine's own clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    @cached_property
    def boot(self) -> str:
        """Where nothing tells, each process has a clock of its own."""
        try:
            return BOOT_ID.read_text().strip()
        except OSError:
            return secrets.token_hex(8)


def moment(clock: Clock) -> Moment:
    return Moment(clock.boot, clock.monotonic(), clock.wall())
