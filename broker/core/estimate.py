"""How long a machine takes from its order to being ready, by what the pool's last ones took. Pure.

The median is what a client is told; a machine that is past it is expected by the time nine in ten had taken,
and past that nobody knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

from broker.core.model import Event, WorkerChanged, WorkerState

BOOTS_MAX = 50  # of each pool: enough for a tenth, few enough that a new image soon tells
USUAL, LATE = 0.5, 0.9  # quantiles


Kind = tuple[str, bool]  # pool; whether the machine was stopped and has been started


@dataclass(slots=True)
class BootTimes:
    """Listens to events. Durations are seconds to READY, from the order or from the start of a stopped
    machine."""

    _ordered: dict[str, None] = field(default_factory=dict)  # workers on their way whose order was seen
    _took_seconds: dict[Kind, deque[float]] = field(default_factory=dict)  # the last ones of each

    def heard(self, event: Event) -> None:
        """Only a machine whose whole way was seen counts: one found after a restart may be of any age."""
        if not isinstance(event, WorkerChanged):
            return
        worker, state = event.worker, event.worker.state
        if state is WorkerState.ORDERED or event.before is WorkerState.STOPPED:
            self._ordered[worker.id] = None
        elif state is not WorkerState.BOOTING and worker.id in self._ordered:
            del self._ordered[worker.id]
            if state is WorkerState.READY:
                kind = worker.pool, worker.started_at is not None
                last = self._took_seconds.setdefault(kind, deque(maxlen=BOOTS_MAX))
                last.append(event.at - worker.boot_began_at)

    def eta_seconds(self, pool: str, age_seconds: float, *, started: bool = False) -> float | None:
        """How much longer a machine on its way for so long will take, None when nothing tells."""
        took = sorted(self._took_seconds.get((pool, started), ()))
        for share in (USUAL, LATE) if took else ():
            if age_seconds < quantile(took, share):
                return quantile(took, share) - age_seconds
        return None


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the values (in ascending order, at least one) that so large a share does not exceed."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)]
