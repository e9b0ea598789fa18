"""What the books cost at 1,000, 10,000 and 100,000 workers, without a socket or a cloud in sight.

Time is an argument of the registry, so nothing here waits. At each size the same number of workers is
touched, scattered over all of them, and the best of some rounds counts, with the collector off, as `timeit`
does it: what grows with the size is then the algorithm, and not the misses of the processor's caches or a
busy machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import intake
from bench.machines import IDLE_SECONDS, POOL, lease, machine
from bench.verdict import Verdict, at_most
from broker.clouds import Clouds
from broker.context import Context
from broker.core.model import Instance, Lease, WorkerState
from broker.core.registry import Registry
from broker.core.settings import parse
from broker.loops.reap import ReapLoop
from broker.store import Store

SIZES = (1_000, 10_000, 100_000)
IN_USE = 1_000  # workers that are touched, at each size
ROUNDS = 7
TICKS = 50
TICK_MS_MAX = 1.0
INTAKES = 5  # the best one counts: whatever else ran on the machine can only add
INTAKE_SECONDS_MAX = 1.0
# From 1,000 to 100,000 workers log n grows 1.7 times, and misses in the caches add theirs; n grows 100 times.
GROWTH_MAX = 4.0
NOW = 1_000_000.0
SEED = 2560


@dataclass
class RegistryResult:
    """`microseconds` of one operation, by its name, in the order of SIZES."""

    microseconds: dict[str, list[float]] = field(default_factory=dict)
    tick_ms_worst: float = 0.0
    intake_seconds: float = 0.0  # by the clock
    intake_cpu_seconds: float = 0.0  # of the processor, in the same intake

    def verdicts(self) -> list[Verdict]:
        worst = max(self.microseconds, key=self.growth)
        return [
            at_most(f"a reap tick over {SIZES[-1]:,} idle workers, the worst of {TICKS}", TICK_MS_MAX,
                    self.tick_ms_worst, "ms"),
            at_most(f"growth of the registry's operations, {SIZES[0]:,} → {SIZES[-1]:,} workers ({worst})",
                    GROWTH_MAX, self.growth(worst), "x"),
            Verdict(f"a start that finds {intake.MACHINES:,} machines, the best of {INTAKES}",
                    f"≤ {INTAKE_SECONDS_MAX:g} s",
                    f"{self.intake_seconds:.2f} s ({self.intake_cpu_seconds:.2f} s of CPU)",
                    self.intake_seconds <= INTAKE_SECONDS_MAX),
        ]  # fmt: skip

    def growth(self, operation: str) -> float:
        return self.microseconds[operation][-1] / self.microseconds[operation][0]

    def table(self) -> tuple[Sequence[str], Iterable[Sequence[str]]]:
        head = ("operation", *(f"{size:,}" for size in SIZES), "growth")
        return head, (
            (name, *(f"{us:.2f}" for us in by_size), f"{self.growth(name):.1f} x")
            for name, by_size in self.microseconds.items()
        )


def measure(say: Callable[[str], None]) -> RegistryResult:
    result = RegistryResult()
    for size in SIZES:
        registry = idle_workers(size)
        for name, microseconds in operations(registry).items():
            result.microseconds.setdefault(name, []).append(microseconds)
        say(f"registry operations with {size:,} workers: done")
    result.tick_ms_worst = asyncio.run(reap_tick_ms())
    result.intake_seconds, result.intake_cpu_seconds = min(intake.seconds() for _ in range(INTAKES))
    return result


def idle_workers(count: int) -> Registry:
    """READY workers that nobody holds, each with its idle deadline still to come."""
    registry = Registry()
    for number in range(count):
        _admit(registry, machine(number))
    registry.due(NOW)  # takes the "look at it at once" of every new worker off the heap
    for worker in registry:
        registry.look_again(worker.id, NOW + IDLE_SECONDS)
    return registry


def operations(registry: Registry) -> dict[str, float]:
    """Microseconds of each operation. Every round leaves the books as long as it found them."""
    workers = random.Random(SEED).sample(list(registry), IN_USE)
    leases = [lease(worker.id, f"client-{worker.id}") for worker in workers]
    newcomers = [machine(1_000_000 + number) for number in range(IN_USE)]

    def each_lease(use: Callable[[Lease], object]) -> float:
        return _timed(partial(use, lease) for lease in leases)

    def find_all() -> float:
        return _timed(partial(registry.by_address, worker.address or "") for worker in workers)

    def one_round() -> dict[str, float]:
        return {
            "find by address": min(find_all() for _ in range(5)),  # the first fills the caches
            "lend": each_lease(lambda lease: registry.grant(lease, NOW)),
            "warm hand-out": each_lease(lambda lease: _hand_out(registry, lease)),
            "end a lease": each_lease(lambda it: registry.end_lease(it.worker_id, it.client, "done", NOW)),
            "find a free one": each_lease(lambda it: registry.available(POOL, it.client, exclusive=True)),
            "first deadline, then due": _timed(partial(_come_due, registry, w.id) for w in workers),
            "a new worker, until ready": _timed(partial(_admit, registry, new) for new in newcomers),
            "a worker's end": _timed(partial(_dismiss, registry, new.id) for new in newcomers),
        }

    with collector_off():
        rounds = [one_round() for _ in range(ROUNDS)]
    return {name: min(one[name] for one in rounds) for name in rounds[0]}


async def reap_tick_ms() -> float:
    """The slowest of some ticks of the real loop over idle workers that are not due yet."""
    clock = ManualClock(NOW)
    context = _context(clock, idle_workers(SIZES[-1]))
    loop = ReapLoop(context, report=_unheard, terminated=lambda: None)
    worst_ms = 0.0
    with collector_off():
        for number in range(TICKS):
            clock.now = NOW + number
            began_ns = time.perf_counter_ns()
            await loop.tick()
            worst_ms = max(worst_ms, (time.perf_counter_ns() - began_ns) / 1e6)
    assert len(context.registry.in_state(WorkerState.READY)) == SIZES[-1]
    return worst_ms


@dataclass
class ManualClock:
    """Time that moves when told."""

    now: float
    boot: str = "bench"

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


def _context(clock: ManualClock, registry: Registry) -> Context:
    # No cloud: a tick that finds nothing due asks none.
    return Context(parse({}, {}), registry, Clouds({}), Store(Path("unused")), clock)


def _unheard(event: str, details: dict[str, object]) -> None:
    """Reports go nowhere here."""


def _admit(registry: Registry, instance: Instance) -> None:
    worker = registry.adopt(instance, POOL, 2560, NOW)
    registry.ready(worker.id, NOW)


def _dismiss(registry: Registry, worker_id: str) -> None:
    registry.drain(worker_id, "idle", NOW)
    registry.terminating(worker_id, NOW)
    registry.gone(worker_id, "terminated", NOW)


def _come_due(registry: Registry, worker_id: str) -> None:
    """The dearest case for a heap: in at its top, out again, and in at its end."""
    registry.look_again(worker_id, NOW)
    assert len(registry.due(NOW)) == 1
    registry.look_again(worker_id, NOW + IDLE_SECONDS)


def _hand_out(registry: Registry, lease: Lease) -> None:
    assert registry.available(POOL, lease.client, exclusive=False) is not None
    registry.renew(lease, NOW)


def _timed(calls: Iterable[Callable[[], object]]) -> float:
    """Microseconds for each call; what it takes to prepare them is not counted."""
    ready = list(calls)
    began_ns = time.perf_counter_ns()
    for call in ready:
        call()
    return (time.perf_counter_ns() - began_ns) / 1e3 / len(ready)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
