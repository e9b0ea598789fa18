"""Many histories, on every core, and what they came to together."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from broker.core.settings import Settings
from broker.simulation.drawing import draw
from broker.simulation.stage import Outcome, play

Plant = Callable[[], AbstractContextManager[None]]


@dataclass(slots=True)
class Totals:
    """Sums over all histories played so far."""

    seeds: int = 0
    hours: float = 0.0
    launches: int = 0
    crashes: int = 0
    cost_usd_micros: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    stood_at: Counter[str] = field(default_factory=Counter)
    waited: list[float] = field(default_factory=list)
    broken: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.hours += outcome.hours
        self.launches += outcome.launches
        self.crashes += outcome.crashes
        self.cost_usd_micros += outcome.cost_usd_micros
        self.faults += outcome.faults
        self.seen += outcome.seen
        self.stood_at += outcome.stood_at
        self.waited += outcome.waited
        if outcome.violations:
            self.broken.append(outcome)

    @property
    def violations(self) -> int:
        return sum(len(outcome.violations) for outcome in self.broken)

    def summary(self) -> str:
        """The line that scripts read."""
        hours = f"{self.hours / self.seeds:g}" if self.seeds else "0"
        return (
            f"seeds={self.seeds} hours={hours} launches={self.launches} faults={self.faults.total()} "
            f"crashes={self.crashes} violations={self.violations}"
        )


def run(
    seeds: Iterator[int],
    hours: float,
    settings: Settings | None,
    plant: Plant = nullcontext,
    cores: int | None = None,
) -> Iterator[Outcome]:
    """The outcomes, in the order of the seeds."""
    one = partial(_one, hours=hours, settings=settings, plant=plant)
    cores = cores or os.cpu_count() or 1
    if cores == 1:
        yield from map(one, seeds)
        return
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        yield from pool.imap(one, seeds, chunksize=1)


def _one(seed: int, hours: float, settings: Settings | None, plant: Plant) -> Outcome:
    with plant():
        return play(draw(seed, hours, settings))


def timed(totals: Totals, outcomes: Iterator[Outcome], heard: Callable[[Totals], None]) -> Totals:
    """Add up outcomes, telling after each."""
    started = time.monotonic()
    for outcome in outcomes:
        totals.add(outcome)
        totals.seconds = time.monotonic() - started
        heard(totals)
    return totals
