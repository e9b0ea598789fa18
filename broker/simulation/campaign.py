"""Many histories, on every core, and what they came to together."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from broker.core.settings import Settings
from broker.simulation.drawing import draw, ordinary
from broker.simulation.history import History
from broker.simulation.shrink import shrink
from broker.simulation.stage import Outcome, play

GC_OBJECTS = 50_000  # new ones before a collection looks: a history is over, with all it made, in a second
Plant = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be played: how long each history is, under whose settings, with which bug in the broker."""

    hours: float
    settings: Settings | None = None  # None: each history has its own, and everything may go wrong
    plant: Plant = nullcontext
    only: tuple[int, ...] | None = None  # of each history's entries, these alone happen

    def history(self, seed: int) -> History:
        settings = self.settings
        whole = draw(seed, self.hours) if settings is None else ordinary(seed, self.hours, settings)
        if self.only is None:
            return whole
        return whole.without(frozenset(range(len(whole.entries))) - frozenset(self.only))

    def play(self, history: History, *, trace: bool = False) -> Outcome:
        with self.plant():
            return play(history, trace=trace)


@dataclass(slots=True)
class Totals:
    """Sums over all histories played so far."""

    seeds: int = 0
    hours: float = 0.0
    launches: int = 0
    crashes: int = 0
    unserved: int = 0
    cost_usd_micros: int = 0
    idle_usd_micros: int = 0
    rest_seconds_max: float = 0.0
    seconds: float = 0.0  # on the wall
    core_seconds: float = 0.0  # of all cores together
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
        self.unserved += outcome.unserved
        self.cost_usd_micros += outcome.cost_usd_micros
        self.idle_usd_micros += outcome.idle_usd_micros
        self.rest_seconds_max = max(self.rest_seconds_max, outcome.rest_seconds)
        self.core_seconds += outcome.core_seconds
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


def run(seeds: Iterable[int], plan: Plan, cores: int | None = None) -> Iterator[Outcome]:
    """The outcomes, in the order of the seeds, on so many cores: all of them by default."""
    one = partial(_one, plan)
    cores = cores or os.cpu_count() or 1
    if cores == 1:
        yield from map(one, seeds)
        return
    _CURRENT.append(plan)  # a plant cannot be sent to another process; what is there before the fork is there
    try:
        with multiprocessing.get_context("fork").Pool(cores, _settle_in) as pool:
            yield from pool.imap(_one_of_current, seeds, chunksize=1)
    finally:
        _CURRENT.pop()


_CURRENT: list[Plan] = []


def _settle_in() -> None:
    """What the parent had loaded stays for good: no collection walks it again, no page of it is copied."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS, 20, 20)


def _one_of_current(seed: int) -> Outcome:
    return _one(_CURRENT[-1], seed)


def _one(plan: Plan, seed: int) -> Outcome:
    started = time.process_time()
    outcome = plan.play(plan.history(seed))
    outcome.core_seconds = time.process_time() - started
    return outcome


def timed(outcomes: Iterable[Outcome], heard: Callable[[Totals, Outcome], None]) -> Totals:
    """Add up outcomes, telling after each."""
    totals, started = Totals(), time.monotonic()
    for outcome in outcomes:
        totals.add(outcome)
        totals.seconds = time.monotonic() - started
        heard(totals, outcome)
    return totals


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken promise, made short: which entries of its history it needs, and what happened then."""

    outcome: Outcome
    kept: tuple[int, ...]
    history: History


def examine(plan: Plan, broken: Outcome) -> Finding:
    """Shorten a history that broke a promise, and play what is left with a transcript."""
    promise = broken.violations[0].promise
    whole = plan.history(broken.seed)

    def breaks(history: History) -> bool:
        return any(one.promise == promise for one in plan.play(history).violations)

    short = shrink(whole, breaks)
    left = list(short.entries)
    kept = tuple(i for i, entry in enumerate(whole.entries) if left and entry is left[0] and left.pop(0))
    return Finding(plan.play(short, trace=True), kept, short)
