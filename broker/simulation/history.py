"""What happens in one simulated life of the broker: drawn from a seed, a plain list that can be shortened.

Each entry stands alone: leaving one out leaves the others as they are. What the cloud does by itself (its
weather, the fate of each machine) is drawn by the cloud from the same seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Literal

from broker.core.settings import Settings, parse
from broker.providers.sim_weather import STORM, Weather, swarm

BROKER_ID = "lab"
HOUR_SECONDS = 3600.0
TYPES = ("c7i.16xlarge", "c6i.16xlarge", "c7a.16xlarge")
VISITS_PER_HOUR = (0.3, 3.0)
BURSTS_PER_DAY = 2.0
BURST_CLIENTS = (3, 40)
CROWD_CLIENTS = 1000  # once in a while the whole cluster starts at the same moment
CROWD_PROBABILITY = 0.002

Ending = Literal["release", "force", "vanish", "linger"]


@dataclass(frozen=True, slots=True)
class Visit:
    """A client comes, asks, works, and leaves in its own way."""

    at: float
    name: str
    work_seconds: float
    ping_seconds: float
    ending: Ending
    exclusive: bool = False
    wait: float | None = None
    patience_seconds: float | None = None  # hangs up when it has no answer by then
    again: int = 0  # so many times more, each the moment its worker is due to be reaped


@dataclass(frozen=True, slots=True)
class Crash:
    """SIGKILL, so many steps of the loop after a moment; then a new broker on the same state and cloud."""

    at: float
    steps: int
    down_seconds: float


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGTERM, and a new broker later."""

    at: float
    down_seconds: float


@dataclass(frozen=True, slots=True)
class WallJump:
    """Somebody sets the broker's wall clock."""

    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class DiskFull:
    """Every write of the store fails for a while."""

    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody types a command, or ends a machine behind the broker's back."""

    at: float
    command: Literal[
        "STATUS", "LIST_ALL", "TERMINATE_ALL", "terminate outside", "second broker", "unclassified"
    ]


@dataclass(frozen=True, slots=True)
class Noise:
    """Connections that are nobody's client: port scans, health checks, half a line."""

    at: float
    count: int


Entry = Visit | Crash | Stop | WallJump | DiskFull | Operator | Noise


@dataclass(frozen=True, slots=True)
class History:
    """One life: what the broker is told, what the cloud is like, and what happens, in order of time."""

    seed: int
    hours: float
    settings: Settings
    weather: Weather
    entries: tuple[Entry, ...]

    def without(self, entries: frozenset[int]) -> History:
        """The same life without some of its entries, by position."""
        return replace(self, entries=tuple(e for i, e in enumerate(self.entries) if i not in entries))


def draw(seed: int, hours: float, settings: Settings | None = None) -> History:
    """The history that this seed stands for. With `settings` those of an operator are tried."""
    rng = random.Random(seed)  # noqa: S311 (a simulation, no secret)
    chosen = settings or _settings(rng)
    weather = replace(swarm(rng, STORM), stranger_answers=0.0, address_rest_seconds=90.0)
    seconds = hours * HOUR_SECONDS
    entries: list[Entry] = [*_visits(rng, seconds, chosen), *_bursts(rng, seconds, chosen)]
    entries += _crashes(rng, seconds, entries)
    entries += _rest(rng, seconds)
    return History(seed, hours, chosen, weather, tuple(sorted(entries, key=lambda entry: entry.at)))


def _settings(rng: random.Random) -> Settings:
    pool: dict[str, Any] = {
        "provider": "ec2",
        "region": "us-east-1",
        "image": "ami-0123456789abcdef0",
        "instance_types": list(rng.sample(TYPES, rng.randint(1, 3))),
        "market": rng.choice(["spot", "spot", "on-demand"]),
        "sharing": rng.choice(["shared", "exclusive"]),
        "idle_timeout": rng.choice([300, 900, 1800]),
        "max_lifetime": rng.choice([7200, 28800]),
        "boot_deadline": rng.choice([300, 600]),
        "wait": rng.choice([300, 900]),
        "max_workers": rng.randint(1, 6),
        "launches_per_hour": rng.choice([5, 20, 40]),
        "price_usd_per_hour": 1.2,
    }
    return parse({"broker": {"id": BROKER_ID}, "pool": {"default": pool}}, {})


def _visit(rng: random.Random, at: float, number: int, settings: Settings) -> Visit:
    idle = settings.pool["default"].idle_timeout
    return Visit(
        at=at,
        name=f"client-{number}" if rng.random() < 0.8 else f"client-{rng.randint(0, 5)}",
        work_seconds=rng.choice([5.0, 60.0, 600.0, 3600.0, 9000.0]) * rng.uniform(0.5, 1.5),
        ping_seconds=min(rng.choice([30.0, 60.0, 240.0]), idle * 0.8),
        ending=rng.choice(["release", "release", "release", "vanish", "linger", "force"]),
        exclusive=rng.random() < 0.1,
        wait=rng.choice([None, None, 0.0, 30.0, 120.0]),
        patience_seconds=rng.choice([None, None, None, rng.uniform(0.0, 90.0)]),
        again=rng.choice([0, 0, 0, 1, 2]),
    )


def _visits(rng: random.Random, seconds: float, settings: Settings) -> list[Entry]:
    visits: list[Entry] = []
    per_hour = rng.uniform(*VISITS_PER_HOUR)
    at = rng.expovariate(per_hour / HOUR_SECONDS)
    while at < seconds:
        visits.append(_visit(rng, at, len(visits), settings))
        at += rng.expovariate(per_hour / HOUR_SECONDS)
    return visits


def _bursts(rng: random.Random, seconds: float, settings: Settings) -> list[Entry]:
    """Many clients in the same instant; asking, not working long."""
    visits: list[Entry] = []
    count = sum(
        rng.random() < BURSTS_PER_DAY * HOUR_SECONDS / 86400 for _ in range(int(seconds // HOUR_SECONDS))
    )
    for burst in range(count):
        at = rng.uniform(0, seconds)
        size = CROWD_CLIENTS if rng.random() < CROWD_PROBABILITY else rng.randint(*BURST_CLIENTS)
        for number in range(size):
            visit = _visit(rng, at, number, settings)
            name = f"burst-{burst}-{number}"
            work_seconds = min(visit.work_seconds, 600.0)
            visits.append(replace(visit, name=name, work_seconds=work_seconds, again=0))
    return visits


def _crashes(rng: random.Random, seconds: float, entries: list[Entry]) -> list[Entry]:
    """Mostly where something is going on: shortly after somebody came, a few steps of the loop further."""
    found: list[Entry] = []
    for _ in range(rng.choice([0, 1, 2, 4, 8])):
        near = rng.random() < 0.8 and entries
        at = (
            rng.choice(entries).at + rng.choice([0.0, rng.uniform(0, 5), rng.uniform(0, 90)])
            if near
            else None
        )
        found.append(
            Crash(
                rng.uniform(0, seconds) if at is None else at,
                rng.randint(0, 60),
                rng.choice([1, 20, 300, 4000]),
            )
        )
    found += [
        Stop(rng.uniform(0, seconds), rng.choice([1.0, 60.0, 600.0])) for _ in range(rng.choice([0, 0, 1, 2]))
    ]
    return found


def _rest(rng: random.Random, seconds: float) -> list[Entry]:
    def moments(choices: list[int]) -> list[float]:
        return [rng.uniform(0, seconds) for _ in range(rng.choice(choices))]

    rest: list[Entry] = [
        WallJump(at, rng.choice([-86400.0, -3600.0, 3600.0, 86400.0])) for at in moments([0, 0, 1, 3])
    ]
    rest += [DiskFull(at, rng.uniform(1, 3600)) for at in moments([0, 0, 0, 1])]
    rest += [Noise(at, rng.randint(1, 30)) for at in moments([0, 1, 2])]
    rest += [Operator(at, "STATUS") for at in moments([0, 2])]
    rest += [Operator(at, "LIST_ALL") for at in moments([0, 2])]
    rest += [Operator(at, "TERMINATE_ALL") for at in moments([0, 0, 0, 1])]
    rest += [Operator(at, "terminate outside") for at in moments([0, 0, 1, 2])]
    rest += [Operator(at, "second broker") for at in moments([0, 0, 0, 1])]
    rest += [Operator(at, "unclassified") for at in moments([0, 0, 0, 1])]
    return rest
