"""Histories in which more is bought than usual: on every market, in every zone, many machines at once.

Drawn on top of a history, from dice of their own, so that all the others stay as they are.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from broker.core.settings import PoolSettings
from broker.simulation.history import Crowd, Entry, History, Idlers, Operator, Scarcity, SecondHost, Visit

ZONES = ("us-east-1a", "us-east-1b", "us-east-1c")
SCARCE_SECONDS = (1800.0, 14_400.0)  # long enough for cool-downs to double, and for on-demand to be bought
FLEET_CLIENTS = (4, 16)
QUEUE_CLIENTS, QUEUE_WORKERS, DIES_EACH = 1000, 10, 10  # a thousand for ten, a tenth of them dying


def buying_in_every_way(rng: random.Random, history: History) -> History:
    """Another market, zones, a higher cap; spot that moves in price and is scarce for hours; many at once."""
    pool = history.settings.pool["default"]
    changes: dict[str, Any] = {
        "market": rng.choice(["spot-then-on-demand", "spot-then-on-demand", "spot-then-on-demand", "spot"]),
        "on_demand_after": rng.choice([0.0, 60.0, 120.0, 300.0]),
        "on_demand_max": rng.choice([None, None, 1, 3]),
        "zones": tuple(rng.sample(ZONES, rng.randint(0, len(ZONES)))),
    }
    cap = rng.choice([None, 10, 20])
    if cap is not None:
        changes |= {"max_workers": cap, "launches_per_hour": 4 * cap}
        changes |= rng.choice([{"sharing": "exclusive"}, {"leases_per_worker_max": 2}])
    entries = list(history.entries)
    came_at = [entry.at for entry in entries if isinstance(entry, Visit)]
    if came_at:
        entries += _scarcities(rng, came_at, pool.instance_types)
        entries += _fleets(rng, came_at) if cap is not None else []
    weather = history.weather
    if rng.random() < 0.5:
        weather = replace(weather, spot_price_step_max=0.2, spot_share_max=1.5)
    history = replace(history, weather=weather, entries=tuple(sorted(entries, key=lambda entry: entry.at)))
    return _under(history, changes)


def queueing(rng: random.Random, history: History) -> History:
    """A thousand clients queue for ten workers, and a tenth of them die while they wait."""
    came_at = [entry.at for entry in history.entries if isinstance(entry, Visit)] or [0.0]
    crowd = Crowd(rng.choice(came_at), "queue", QUEUE_CLIENTS, rng.uniform(5.0, 60.0), DIES_EACH)
    others = [entry for entry in history.entries if not isinstance(entry, Crowd | Idlers)]
    changes = {"sharing": "exclusive", "max_workers": QUEUE_WORKERS, "launches_per_hour": 4 * QUEUE_WORKERS}
    history = replace(history, entries=tuple(sorted([*others, crowd], key=lambda entry: entry.at)))
    return _under(history, {**changes, "wait": 900.0})


def wishing(rng: random.Random, history: History, kinds: tuple[str, ...]) -> History:
    """Half of the programs run on machines of one type only, and the pool has several."""
    pool = history.settings.pool["default"]
    types = pool.instance_types if len(pool.instance_types) > 1 else kinds[:2]
    entries = tuple(
        replace(entry, kind=rng.choice(types)) if isinstance(entry, Visit) and rng.random() < 0.5 else entry
        for entry in history.entries
    )
    return _under(replace(history, entries=entries), {"instance_types": types})


def keeping_stopped(rng: random.Random, history: History) -> History:
    """On demand, and some workers are kept stopped; now and then somebody starts one by hand.

    Not with a second host: where there is no machine yet, two brokers may both launch the first one.
    """
    entries = [entry for entry in history.entries if not isinstance(entry, SecondHost)]
    came_at = [entry.at for entry in entries if isinstance(entry, Visit)] or [0.0]
    entries += [
        Operator(rng.choice(came_at) + rng.uniform(0.0, 7200.0), "start outside")
        for _ in range(rng.choice([0, 0, 1, 3]))
    ]
    weather = history.weather
    if rng.random() < 0.5:
        weather = replace(weather, stuck_stopping=0.1)
    history = replace(history, weather=weather, entries=tuple(sorted(entries, key=lambda entry: entry.at)))
    return _under(history, {"market": "on-demand", "warm_stopped": rng.choice([1, 1, 2, 3])})


def _under(history: History, changes: dict[str, Any]) -> History:
    pool = history.settings.pool["default"]
    changed = PoolSettings.model_validate({**pool.model_dump(), **changes})
    return replace(history, settings=history.settings.model_copy(update={"pool": {"default": changed}}))


def _scarcities(rng: random.Random, came_at: list[float], kinds: tuple[str, ...]) -> list[Entry]:
    """A little before somebody comes; of all types, or not of all."""
    return [
        Scarcity(
            max(0.0, rng.choice(came_at) - rng.uniform(0.0, 600.0)),
            rng.uniform(*SCARCE_SECONDS),
            kinds if rng.random() < 0.7 else kinds[:1],
        )
        for _ in range(rng.choice([0, 1, 1, 2]))
    ]


def _fleets(rng: random.Random, came_at: list[float]) -> list[Entry]:
    """Clients that ask in one instant, each for itself, for several at once, or for what it may share."""
    found: list[Entry] = []
    for number in range(rng.choice([1, 2])):
        at = rng.choice(came_at) + rng.uniform(0.0, 60.0)
        found += [
            Visit(
                at + rng.choice([0.0, 0.0, rng.uniform(0.0, 2.0)]),
                f"fleet-{number}-{member}",
                rng.uniform(30.0, 900.0),
                60.0,
                rng.choice(["release", "release", "vanish"]),
                acquire=rng.choice([0, 0, 0, 1, 4]),
                some=rng.random() < 0.3,
                bound=rng.random() < 0.3,
            )
            for member in range(rng.randint(*FLEET_CLIENTS))
        ]
    return found
