"""From a seed to a history.

A lab works in sessions, an hour or two at a time, and between them nothing runs: the broker goes to zero and
starts cold many times. Trouble comes mostly while something is going on, because that is where it hurts. Each
history leaves out half of the faults and has settings of its own, so that corners are reached which a world
where everything breaks at once never lets anybody reach (swarm testing: A. Groce et al., ISSTA 2012).
"""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from broker.core.errors import SettingsError
from broker.core.settings import PoolSettings, Settings, parse
from broker.providers.sim_weather import CLEAR, STORM, Weather, swarm
from broker.simulation.drawing_markets import buying_in_every_way, keeping_stopped, queueing, wishing
from broker.simulation.history import (
    BROKER_ID,
    HOUR_SECONDS,
    BrokenImage,
    Crash,
    Crowd,
    DiskFull,
    Ending,
    Entry,
    History,
    Idlers,
    Noise,
    Operator,
    Outage,
    Protect,
    Reload,
    SecondHost,
    SilentPort,
    Stop,
    Visit,
    WallJump,
)

IMAGE = "ami-0123456789abcdef0"
TYPES = ("c7i.16xlarge", "c6i.16xlarge", "c7a.16xlarge")
SESSIONS_PER_DAY = (1, 1, 2, 3)
SESSION_SECONDS = (900.0, 7200.0)
VISITS_PER_HOUR = (1.0, 8.0)  # within a session
BURST_PROBABILITY = 0.3  # of a session: many clients in one instant
BURST_CLIENTS = (3, 30)
ACQUIRING_SHARE = 0.33
CROWD_CLIENTS = 1000  # scenario 7
IDLE_CONNECTIONS = 10_000  # scenario 34
SECOND_HOST_PROBABILITY = 0.05
RELOAD_PROBABILITY = 0.2
WARM_PROBABILITY = 0.2
BUYING_PROBABILITY = 0.25
WISHING_PROBABILITY = 0.2
STOCK_PROBABILITY = 0.15
WARM_BEFORE_SHIFT_HOURS = (1.0, 20.0)  # such a history begins so long before its zone's clocks are set
# Where clocks are set, and when: north and south, to and fro, and by half an hour.
SHIFTS = (
    ("Europe/Berlin", datetime(2027, 3, 28, 1, tzinfo=UTC)),
    ("Europe/Berlin", datetime(2027, 10, 31, 1, tzinfo=UTC)),
    ("America/New_York", datetime(2027, 3, 14, 7, tzinfo=UTC)),
    ("America/Santiago", datetime(2027, 9, 5, 4, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2027, 4, 3, 15, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2027, 10, 2, 15, 30, tzinfo=UTC)),
)
SILENT_FIRST_PROBABILITY = 0.25
RARE = 0.01  # of the histories: what costs as much as a hundred others
OUTAGE_SECONDS = 8 * HOUR_SECONDS  # scenario 27

FAIR = replace(CLEAR, reclaims_per_hour=0.05, reclaim_rebalance=0.5)  # an ordinary week, for `--settings`

Session = tuple[float, float]


def draw(seed: int, hours: float) -> History:
    """The history that this seed stands for: everything may go wrong."""
    rng = random.Random(seed)  # noqa: S311 (a simulation, no secret)
    limits = random.Random(f"limits of {seed}")  # noqa: S311 (of its own: whoever adds a limit moves no seed)
    settings = _limited(limits, _settings(rng))
    weather = replace(swarm(rng, STORM), stranger_answers=0.0, address_rest_seconds=90.0)
    sessions = _sessions(rng, hours)
    entries = _work(rng, sessions, settings)
    silences = _silences(rng, entries)
    entries += _crashes(rng, hours, entries)
    entries += silences
    entries += _accidents(rng, hours, sessions)
    entries += _reloads(seed, entries)
    entries += _protections(limits, sessions)
    entries += _broken_promises(seed, entries, settings)
    history = _in_order(seed, hours, settings, weather, entries)
    warm = random.Random(f"warm {seed}")  # noqa: S311 (of its own: the other histories stay as they are)
    history = _keeping_warm(warm, history) if warm.random() < WARM_PROBABILITY else history
    buying = random.Random(f"buying {seed}")  # noqa: S311
    history = buying_in_every_way(buying, history) if buying.random() < BUYING_PROBABILITY else history
    wishes = random.Random(f"wish {seed}")  # noqa: S311
    history = wishing(wishes, history, TYPES) if wishes.random() < WISHING_PROBABILITY else history
    stock = random.Random(f"stock {seed}")  # noqa: S311
    history = keeping_stopped(stock, history) if stock.random() < STOCK_PROBABILITY else history
    crowd = random.Random(f"crowd {seed}")  # noqa: S311
    return queueing(crowd, history) if crowd.random() < RARE else history


def ordinary(seed: int, hours: float, settings: Settings) -> History:
    """Days as they mostly are, under an operator's own settings: clients, a fair cloud, no accidents."""
    rng = random.Random(seed)  # noqa: S311
    entries = _work(rng, _sessions(rng, hours), settings, polite=True)
    return _in_order(seed, hours, settings, FAIR, entries)


def on_stage(settings: Settings, pool: str = "default") -> Settings:
    """An operator's settings as the simulated cloud can serve them: this one pool, as `default`, on its EC2.

    What is about time, sharing and caps stays as it is; a pool of local workers is given an image and a type.
    Raises SettingsError when there is no such pool.
    """
    chosen = settings.pool.get(pool)
    if chosen is None:
        raise SettingsError([f"there is no pool '{pool}'; there is {', '.join(sorted(settings.pool))}"])
    placed = chosen.model_copy(
        update={
            "provider": "ec2",
            "region": "us-east-1",
            "profile": None,
            "image": chosen.image or IMAGE,
            "instance_types": chosen.instance_types or TYPES,
            "user_data_file": None,
        }
    )
    return settings.model_copy(update={"pool": {"default": placed}})


def without_warm(settings: Settings) -> Settings:
    """The same, and no worker is kept that nobody asked for."""
    pools = {
        name: pool.model_copy(update={"warm": 0, "warm_schedule": {}, "warm_stopped": 0})
        for name, pool in settings.pool.items()
    }
    return settings.model_copy(update={"pool": pools})


def _in_order(seed: int, hours: float, settings: Settings, weather: Weather, entries: list[Entry]) -> History:
    return History(seed, hours, settings, weather, tuple(sorted(entries, key=lambda entry: entry.at)))


def _settings(rng: random.Random) -> Settings:
    pool: dict[str, Any] = {
        "provider": "ec2",
        "region": "us-east-1",
        "image": IMAGE,
        "instance_types": list(rng.sample(TYPES, rng.randint(1, 3))),
        "market": rng.choice(["spot", "spot", "on-demand"]),
        "sharing": rng.choice(["shared", "exclusive"]),
        "idle_timeout": rng.choice([300, 900, 1800]),
        "max_lifetime": rng.choice([7200, 28800]),
        "boot_deadline": rng.choice([300, 600]),
        "wait": rng.choice([300, 900]),
        "max_workers": rng.randint(1, 6),
        "leases_per_worker_max": rng.choice([None, None, 1, 4]),
        "launches_per_hour": rng.choice([5, 20, 40]),
        "price_usd_per_hour": rng.choice([1.2, 1.2, 0.0]),
    }
    if rng.random() < 0.1:
        pool["budget_usd_per_day"] = rng.choice([2.0, 5.0])
    broker = {"id": BROKER_ID, "reconcile_interval": rng.choice([30, 60, 120, 120])}
    return parse({"broker": broker, "pool": {"default": pool}}, {})


def _keeping_warm(rng: random.Random, history: History) -> History:
    """The same with spares, at a time of the year at which the clocks of the schedule's zone are set.

    Not with a second host: where there is no machine yet, two brokers may both launch the first spare.
    """
    pool = history.settings.pool["default"]
    zone, shift = rng.choice(SHIFTS)
    most = min(3, pool.max_workers)
    windows = [_window(rng, zone) for _ in range(rng.randint(1, 2))]
    warm = {
        "warm": rng.choice([0, 0, 1, most]),
        "warm_schedule": {window: rng.randint(0, most) for window in windows},
    }
    begins_unix = shift.timestamp() - rng.uniform(*WARM_BEFORE_SHIFT_HOURS) * HOUR_SECONDS
    kept = PoolSettings.model_validate({**pool.model_dump(), **warm})
    return replace(
        history,
        settings=history.settings.model_copy(update={"pool": {"default": kept}}),
        entries=tuple(entry for entry in history.entries if not isinstance(entry, SecondHost)),
        begins_unix=begins_unix,
    )


def _window(rng: random.Random, zone: str) -> str:
    """A few hours of every day, or of the weekend on which clocks are set; over midnight, too."""
    begin = rng.randrange(24 * 4)
    end = (begin + rng.randint(1, 12 * 4)) % (24 * 4)
    days = rng.choice(["daily", "Fri-Sun", "Sun"])
    return f"{days} {begin // 4:02}:{begin % 4 * 15:02}-{end // 4:02}:{end % 4 * 15:02} {zone}"


def _limited(rng: random.Random, settings: Settings) -> Settings:
    """Each limit of a worker's life and of a client in about a fifth of the histories."""
    pool = settings.pool["default"]
    limits: dict[str, Any] = {}
    if rng.random() < 0.2:
        limits["uses_max"] = rng.choice([1, 2, 5, 20])
    if rng.random() < 0.2:
        limits["hard_lifetime"] = pool.max_lifetime + rng.choice([0.0, 600.0, 3600.0])
    if rng.random() < 0.2:
        limits["workers_per_client_max"] = rng.choice([1, 1, 2])
    return settings.model_copy(update={"pool": {"default": pool.model_copy(update=limits)}})


# --- work --------------------------------------------------------------------------------------------------


def _sessions(rng: random.Random, hours: float) -> list[Session]:
    count = max(1, round(rng.choice(SESSIONS_PER_DAY) * hours / 24))
    sessions = []
    for _ in range(count):
        seconds = min(rng.uniform(*SESSION_SECONDS), hours * HOUR_SECONDS)
        start = rng.uniform(0, hours * HOUR_SECONDS - seconds)
        sessions.append((start, start + seconds))
    return sorted(sessions)


def _work(
    rng: random.Random, sessions: list[Session], settings: Settings, *, polite: bool = False
) -> list[Entry]:
    """`polite` clients neither hang up nor kill under others; they may still die."""
    entries: list[Entry] = []
    for number, (start, end) in enumerate(sessions):
        per_hour = rng.uniform(*VISITS_PER_HOUR)
        at = start + rng.expovariate(per_hour / HOUR_SECONDS)
        while at < end:
            entries.append(_visit(rng, at, len(entries), settings, polite))
            at += rng.expovariate(per_hour / HOUR_SECONDS)
        if rng.random() < BURST_PROBABILITY:
            burst = _burst(rng, f"burst-{number}", (start, end), settings, polite)
            entries += burst
            if not polite and rng.random() < 0.2:  # somebody has started too much
                entries.append(Operator(burst[0].at + rng.uniform(2.0, 60.0), "TERMINATE_ALL"))
    if not polite and rng.random() < RARE:
        start, end = rng.choice(sessions)
        seconds = rng.uniform(5.0, 300.0)
        entries.append(Crowd(rng.uniform(start, end), "crowd", CROWD_CLIENTS, seconds))
    return entries


def _visit(rng: random.Random, at: float, number: int, settings: Settings, polite: bool) -> Visit:
    idle = settings.pool["default"].idle_timeout
    endings: list[Ending] = ["release", "release", "release", "vanish", "linger"]
    if not polite:
        endings.append("force")
    visit = Visit(
        at=at,
        name=f"client-{number}" if rng.random() < 0.8 else f"client-{rng.randint(0, 5)}",
        work_seconds=rng.choice([5.0, 60.0, 600.0, 3600.0, 9000.0]) * rng.uniform(0.5, 1.5),
        ping_seconds=min(rng.choice([60.0, 120.0, 240.0]), idle * 0.8),
        ending=rng.choice(endings),
        again=rng.choice([0, 0, 1, 2]),
        late_seconds=rng.uniform(-0.1, 0.3),  # Terminate's answer takes a fifth of a second
    )
    visit = _acquiring(rng, visit)
    if polite:
        return visit
    return replace(
        visit,
        exclusive=rng.random() < 0.1,
        wait=rng.choice([None, None, 0.0, 30.0, 120.0]),
        patience_seconds=rng.choice([None, None, None, rng.uniform(0.0, 90.0)]),
    )


def _acquiring(rng: random.Random, visit: Visit) -> Visit:
    """A third of the clients are programs that hold several workers, by their ids or by their connection."""
    if rng.random() >= ACQUIRING_SHARE:
        return visit
    count, some, bound = rng.choice([1, 1, 2, 3]), rng.random() < 0.3, rng.random() < 0.4
    return replace(visit, acquire=count, some=some, bound=bound, again=0)


def _burst(rng: random.Random, name: str, session: Session, settings: Settings, polite: bool) -> list[Entry]:
    """Asking in the same instant, not working long."""
    at, entries = rng.uniform(*session), []
    for number in range(rng.randint(*BURST_CLIENTS)):
        visit = _visit(rng, at, number, settings, polite)
        work_seconds = min(visit.work_seconds, 300.0)
        entries.append(replace(visit, name=f"{name}-{number}", work_seconds=work_seconds, again=0))
    return list[Entry](entries)


# --- trouble -----------------------------------------------------------------------------------------------


def _crashes(rng: random.Random, hours: float, entries: list[Entry]) -> list[Entry]:
    """Mostly where something is going on: shortly after somebody came, a few steps of the loop further."""
    found: list[Entry] = []
    for _ in range(rng.choice([0, 1, 2, 4, 8])):
        at = rng.uniform(0, hours * HOUR_SECONDS)
        if entries and rng.random() < 0.8:
            at = rng.choice(entries).at + rng.choice([0.0, rng.uniform(0, 5), rng.uniform(0, 90)])
        torn = rng.random() < 0.03
        found.append(Crash(at, rng.randint(0, 60), rng.choice([1, 20, 300, 4000]), torn))
    for _ in range(rng.choice([0, 0, 1, 2])):
        near = (
            rng.choice(entries).at + rng.uniform(0, 60) if entries else rng.uniform(0, hours * HOUR_SECONDS)
        )
        found.append(Stop(near, rng.choice([1.0, 60.0, 600.0])))
    return found


def _silences(rng: random.Random, entries: list[Entry]) -> list[Entry]:
    """Just before somebody asks: between the last look at a worker and its being handed out."""
    count = rng.choice([0, 0, 1, 2]) if entries else 0
    moments = [max(0.0, rng.choice(entries).at - rng.uniform(0.0, 20.0)) for _ in range(count)]
    return [SilentPort(at, rng.uniform(5.0, 300.0)) for at in moments]


def _broken_promises(seed: int, entries: list[Entry], settings: Settings) -> list[Entry]:
    """In a quarter of the histories: of the workers that are free after some work, the one that the next
    program would get has just fallen silent, when it comes. From dice of its own, as `_reloads` does."""
    rng = random.Random(f"silent {seed}")  # noqa: S311
    visits = [entry for entry in entries if isinstance(entry, Visit)]
    found: list[Entry] = []
    if rng.random() >= SILENT_FIRST_PROBABILITY or not visits:
        return found
    for number in range(rng.choice([2, 4, 8])):
        at = rng.choice(visits).at + rng.uniform(120.0, 900.0)
        visit = _visit(rng, at, 1000 + number, settings, polite=False)
        count, bound = rng.choice([1, 1, 2]), rng.random() < 0.7
        found.append(SilentPort(at - rng.uniform(0.1, 10.0), rng.uniform(5.0, 120.0), first=True))
        found.append(replace(visit, acquire=count, bound=bound, again=0, wait=rng.choice([None, 2.0, 30.0])))
    return found


def _accidents(rng: random.Random, hours: float, sessions: list[Session]) -> list[Entry]:
    def moment() -> float:
        start, end = rng.choice(sessions) if rng.random() < 0.7 else (0.0, hours * HOUR_SECONDS)
        return rng.uniform(start, end)

    def moments(choices: list[int]) -> list[float]:
        return [moment() for _ in range(rng.choice(choices))]

    found: list[Entry] = [
        WallJump(at, rng.choice([-86400.0, -3600.0, 3600.0, 86400.0])) for at in moments([0, 0, 1, 3])
    ]
    found += [DiskFull(at, rng.uniform(1, 3600)) for at in moments([0, 0, 0, 1])]
    found += [Noise(at, rng.randint(1, 30)) for at in moments([0, 1, 2])]
    found += [Operator(at, "STATUS") for at in moments([0, 2])]
    found += [Operator(at, "LIST_ALL") for at in moments([0, 2])]
    found += [Operator(at, "TERMINATE_ALL") for at in moments([0, 0, 0, 1])]
    found += [Operator(at, "terminate outside") for at in moments([0, 0, 1, 2])]
    found += [Operator(at, "second broker") for at in moments([0, 0, 0, 1])]
    found += [Operator(at, "unclassified") for at in moments([0, 0, 0, 1])]
    if rng.random() < 0.04:
        found.append(Outage(moment(), OUTAGE_SECONDS * rng.uniform(1.0, 1.2)))
    if rng.random() < 0.05:
        found.append(BrokenImage(moment(), rng.uniform(600.0, 7200.0)))
    if rng.random() < RARE:
        found.append(Idlers(moment(), IDLE_CONNECTIONS, rng.uniform(60.0, 1800.0)))
    if rng.random() < RARE:
        found.append(Noise(moment(), 1000))  # scenario 35: a flood
    if rng.random() < SECOND_HOST_PROBABILITY:
        found += _second_host(rng, moment())
    return found


def _reloads(seed: int, entries: list[Entry]) -> list[Entry]:
    """In a fifth of the histories, shortly after somebody came. From dice of its own: the rest of a history
    is the same with and without. Not beside a second host, whose file nobody changes."""
    rng = random.Random(f"reload {seed}")  # noqa: S311
    visits = [entry for entry in entries if isinstance(entry, Visit)]
    second_host = any(isinstance(entry, SecondHost) for entry in entries)
    if rng.random() >= RELOAD_PROBABILITY or not visits or second_host:
        return []
    moments = [rng.choice(visits).at + rng.uniform(0.0, 90.0) for _ in range(rng.choice([1, 2, 4]))]
    return [Reload(at, _changes(rng)) for at in sorted(moments)]


def _changes(rng: random.Random) -> tuple[tuple[str, object], ...] | None:
    """One setting; now and then a mistake."""
    return rng.choice(
        [
            (("idle_timeout", float(rng.choice([300, 900, 1800]))),),
            (("max_workers", rng.randint(1, 6)),),
            (("instance_types", tuple(rng.sample(TYPES, rng.randint(1, 3)))),),
            None,
        ]
    )


def _protections(rng: random.Random, sessions: list[Session]) -> list[Entry]:
    """While something runs, and mostly for longer than it would live."""
    moments = [rng.uniform(*rng.choice(sessions)) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
    return [
        Protect(at, rng.choice([60.0, 900.0, 7200.0, 36_000.0]), rng.choice(["", "no", "False"]))
        for at in moments
    ]


def _second_host(rng: random.Random, at: float) -> list[Entry]:
    """Scenario 22. Mostly the first one goes down meanwhile, for longer than its claim lasts or not."""
    second = SecondHost(
        at,
        seconds=rng.choice([600.0, 3600.0, 14_400.0]),
        wall_seconds=rng.choice([0.0, 0.0, -3600.0, 86_400.0]),
        killed=rng.random() < 0.5,
    )
    if rng.random() < 0.3:
        return [second]
    crash_at, down_seconds = at + rng.uniform(0.0, 1800.0), rng.choice([300.0, 1200.0, 4000.0])
    return [second, Crash(crash_at, rng.randint(0, 60), down_seconds)]
