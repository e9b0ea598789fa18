"""What an operator wants to know of each pool, as the rows of POOLS. Reads the books; changes nothing."""

from __future__ import annotations

from broker.clouds import Cloud
from broker.context import Context
from broker.core.life import BOOKED
from broker.core.money import USD_MICROS
from broker.ledger import Ledger


class Overview:
    """See the module."""

    def __init__(self, context: Context, ledger: Ledger) -> None:
        self._context = context
        self._ledger = ledger

    def pools(self) -> list[dict[str, object]]:
        """One row for each pool: the configured ones, then those that only machines remember."""
        configured = self._context.settings.pool
        remembered = {worker.pool for worker in self._context.registry} - configured.keys()
        return [self._row(name) for name in (*configured, *sorted(remembered))]

    def _row(self, name: str) -> dict[str, object]:
        context, now = self._context, self._context.now()
        registry, guard = context.registry, context.guard(name)
        former = (
            context.leaving[w.id] for w in registry.in_state(*BOOKED, pool=name) if w.id in context.leaving
        )
        pool = context.settings.pool.get(name) or next(former, context.pool(name))
        breaker = guard.breaker(now)
        counts = {str(state): registry.count(name, state) for state in sorted(BOOKED)}
        row: dict[str, object] = {
            "name": name,
            "provider": pool.provider if name in context.settings.pool else None,
            "workers": {state: count for state, count in counts.items() if count},
            "protected": sum(worker.protected for worker in registry.in_state(*BOOKED, pool=name)),
            "leases": registry.lease_count(name),
            "waiting": len(context.waiting.of(name)),
            "max_workers": pool.max_workers,
            "launches_last_hour": guard.launches_last_hour(now),
            "launches_per_hour": pool.launches_per_hour,
            "breaker": {
                "state": str(breaker.state),
                "seconds_left": round(breaker.seconds_left),
                "failures": breaker.failures,
                "openings": breaker.openings,
            },
            "obstacle": self._obstacle(name),
            "budget": {
                "spent_usd": round(self._ledger.cost_usd_micros_today(name) / USD_MICROS, 2),
                "limit_usd": pool.budget_usd_per_day,
            },
        }
        if len(context.clouds.of(name)) > 1:
            row["regions"] = [self._region(name, cloud) for cloud in context.preferred(name)]
        return row

    def _region(self, name: str, cloud: Cloud) -> dict[str, object]:
        """One of several regions, in the order in which they are preferred now."""
        workers = self._context.registry.in_state(*BOOKED, pool=name)
        round_trip_seconds = cloud.provider.round_trip_seconds()
        return {
            "cloud": cloud.provider.name,
            "workers": sum(self._context.cloud_of(worker) is cloud for worker in workers),
            "round_trip_ms": None if round_trip_seconds is None else round(round_trip_seconds * 1000),
            "obstacle": _refusal(cloud, name, self._context.now()),
        }

    def _obstacle(self, name: str) -> str:
        """Why clients wait, or are refused: as far as it is known without one who asks."""
        clouds = self._context.clouds.of(name)
        if not clouds:
            return "the pool is not configured any more"
        reasons = [_refusal(cloud, name, self._context.now()) for cloud in clouds]
        if all(reasons):
            return "; ".join(reasons)
        pool, now = self._context.pool(name), self._context.now()
        obstacle = self._context.obstacles.any(name) or self._context.guard(name).refusal(pool, now)
        if obstacle is None and not pool.max_workers:
            return "the pool's max_workers = 0 is reached"
        return obstacle.message if obstacle is not None else ""


def _refusal(cloud: Cloud, pool: str, now: float) -> str:
    """Why nothing can be bought there, or nothing."""
    refusal = cloud.read_only() or cloud.refusal(pool)
    if refusal is None and not cloud.recovered:
        return f"{cloud.provider.name} has not been listed yet"
    if refusal is None:
        refusal = cloud.cooling.refusal(cloud.provider.offerings(pool), now, pool=pool)
    return "" if refusal is None else refusal.message
