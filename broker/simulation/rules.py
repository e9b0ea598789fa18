"""Which settings of the pool are in force when: what the referee judges by, and what the broker was told."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from broker.core.settings import PoolSettings

RELOAD_SECONDS = 120.0  # from a read file to the last thing that goes by the settings of before


@dataclass(slots=True)
class _Span:
    pool: PoolSettings
    from_at: float
    until_at: float = inf


class Rules:
    """See the module. New settings count from the moment at which the broker has read them; those of before
    go on counting for RELOAD_SECONDS, because the cloud may have to be asked first."""

    def __init__(self, pool: PoolSettings) -> None:
        self._spans = [_Span(pool, 0.0)]

    @property
    def pool(self) -> PoolSettings:
        """The latest."""
        return self._spans[-1].pool

    def begin(self, at: float, pool: PoolSettings) -> None:
        """A broker has read these."""
        if pool != self.pool:
            self._spans[-1].until_at = at + RELOAD_SECONDS
            self._spans.append(_Span(pool, at))

    def since(self, at: float) -> list[PoolSettings]:
        """All that were in force at that moment or later."""
        return [span.pool for span in self._spans if span.until_at >= at]
