"""The broker is killed once at every place where it waits, and no promise is broken.

A place is an `await` in the broker's source. What no life here reaches is named in UNREACHED, with a reason.
A new place has to be reached, or excused.
"""

from __future__ import annotations

from functools import cache

import pytest

from broker.core.settings import parse
from broker.providers.sim_weather import CLEAR
from broker.simulation.awaits import Point, points, struck
from broker.simulation.drawing import draw
from broker.simulation.history import (
    BROKER_ID,
    BrokenImage,
    Crowd,
    History,
    Operator,
    Reload,
    Stop,
    Visit,
)
from broker.simulation.stage import play
from broker.simulation.strikes import first_rounds, play_with_kill

PLACES_MIN = 95  # that are struck: as many as there are, less those of UNREACHED
DRAWN = (6, 1, 55, 118)  # seeds of days on which more goes wrong than in a life that is written down
DRAWN_HOURS = 6.0

REAL = "it is reached with real sockets, threads and credentials only (tests/acceptance kills there)"
AT_ONCE = "what it waits for is there at once in these lives, so no task ever stands there"
ONE_PLACE = "every pool here buys at one place, and a pool is never removed (tests/loops/test_reload.py)"
RARE = "it takes an accident within an accident"
PACED = "it takes more calls than EC2 lets through in a burst (tests/providers/test_ec2_pace.py waits there)"
UNREACHED = {
    "acquiring.py": {"_started": AT_ONCE},  # the last look; the wait before it is reached
    "admission.py": {"admit": ONE_PLACE},  # the look at another pool; the wait before it is reached
    "granting.py": {"confirm": AT_ONCE},
    "daemon.py": {
        "run": REAL,
        "_find_owner": REAL,
        "_shut_down": REAL,
        "_open": RARE,
        "_accept_mistake": RARE,
    },
    "opening.py": {"open_provider": AT_ONCE},
    "loops/reload.py": {
        "tick": AT_ONCE,
        "_reload": ONE_PLACE,
        "_open": ONE_PLACE,
        "_let_go": ONE_PLACE,
        "_remember_left": ONE_PLACE,
    },
    "loops/charge.py": {"_raise_number": AT_ONCE},
    "loops/launch.py": {"_launch": AT_ONCE},
    "loops/probe.py": {"connects": REAL, "_look": AT_ONCE},
    "loops/reconcile.py": {
        "between_scans": ONE_PLACE,
        "scan": AT_ONCE,
        "_take_in": AT_ONCE,
        "take_in": AT_ONCE,
        "_matched": AT_ONCE,
        "_watch_cloud": AT_ONCE,
    },
    "loops/runner.py": {"run": RARE, "_pause": RARE},
    "loops/stock.py": {"settle": RARE},
    "providers/ec2.py": {
        "open": REAL,
        "_reach_account": REAL,
        "study": AT_ONCE,
        "_ask": AT_ONCE,
        "close": REAL,
        "_for_all": RARE,
        "_for_each": RARE,
    },
    "providers/ec2_api.py": {
        "check": REAL,
        "_credential_problems": REAL,
        "connect": REAL,
        "close": REAL,
        "call": AT_ONCE,
        "_keep_pace": PACED,
    },
    "providers/ec2_pace.py": {"wait": PACED},
    "providers/ec2_check.py": {
        "user_data": REAL,
        "_user_data": REAL,
        "_groups_by_name": RARE,
        "places": RARE,
    },
    "server.py": {"_next_turn": RARE},
    "service.py": {"_answer": RARE, "_ping": RARE},  # a client pings a worker that it has lost
    "store.py": {"end_revoked": RARE},
    "database.py": {"_write_all": REAL, "loss_is_over": RARE},
}


def written() -> History:
    """Twenty minutes in which a lab does everything once."""
    pool = {
        "provider": "ec2",
        "region": "us-east-1",
        "image": "ami-0123456789abcdef0",
        "instance_types": ["c7i.16xlarge"],
        "sharing": "shared",
        "idle_timeout": 300,
        "max_workers": 60,
        "launches_per_hour": 100,
        "adopt_name_tag": True,
        "security_groups": ["lab"],
        "subnet": "subnet-0123456789abcdef0",
    }
    entries = (
        Operator(5.0, "by hand"),
        Visit(10.0, "ann", 30.0, 10.0, "release"),
        Visit(40.0, "ben", 60.0, 10.0, "vanish", exclusive=True),
        Reload(110.0, (("instance_types", ("c7i.16xlarge", "c6i.16xlarge")),)),
        Visit(45.0, "dan", 30.0, 10.0, "release", exclusive=True, acquire=2),
        Operator(60.0, "STATUS"),
        Operator(61.0, "LIST_ALL"),
        Stop(120.0, 5.0),
        Visit(121.0, "cat", 30.0, 5.0, "linger"),
        Visit(121.0, "eve", 30.0, 5.0, "release", acquire=1, bound=True),
        Operator(130.0, "unclassified"),
        Crowd(400.0, "crowd", 60, 20.0),
        Operator(500.0, "TERMINATE_ALL"),
        BrokenImage(600.0, 300.0),
        Visit(610.0, "dan", 30.0, 10.0, "release", wait=60.0),
    )
    return History(
        1, 0.3, parse({"broker": {"id": BROKER_ID}, "pool": {"default": pool}}, {}), CLEAR, entries
    )


@cache
def lives() -> tuple[History, ...]:
    return written(), *(_without_reloads(draw(seed, DRAWN_HOURS)) for seed in DRAWN)


def _without_reloads(life: History) -> History:
    """The seeds were chosen for places that they reach; the life that is written down has a reload."""
    return life.without(frozenset(i for i, entry in enumerate(life.entries) if isinstance(entry, Reload)))


@cache
def places() -> dict[Point, tuple[int, int]]:
    """Each place, the first life that reaches it, and the round in which it does."""
    found: dict[Point, tuple[int, int]] = {}
    for number, life in enumerate(lives()):
        for point, in_round in first_rounds(life).items():
            found.setdefault(point, (number, in_round))
    return found


def test_every_place_is_reached_or_excused() -> None:
    unreached = [point for point in points() if point not in places()]
    assert [str(one) for one in unreached if one.function not in UNREACHED.get(one.path, {})] == []
    assert len(places()) >= PLACES_MIN


@pytest.mark.parametrize("number", range(1 + len(DRAWN)))
def test_a_kill_at_any_place_breaks_no_promise(number: int) -> None:
    life = lives()[number]
    assert play(life).violations == []
    here = [(point, in_round) for point, (where, in_round) in places().items() if where == number]
    assert here
    for point, in_round in here:
        outcome = play_with_kill(life, in_round)
        assert [str(violation) for violation in outcome.violations] == [], point
        assert struck(outcome.stood_at)[point], point
