"""Two brokers with one id on two hosts, played in one history: one acts at a time, whatever becomes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from broker.core.claim import STALE_SECONDS
from broker.core.settings import parse
from broker.providers.sim_weather import CLEAR
from broker.simulation.history import BROKER_ID, Crash, Entry, History, SecondHost, Visit
from broker.simulation.stage import Outcome, play
from tests.simulation.plants import PLANTS

HOURS = 4.0
WORK_SECONDS = 9000.0
STARTS_AT = 600.0


def life(second: SecondHost, *others: Entry) -> History:
    """A client works for long when the second host starts."""
    pool = {
        "provider": "ec2",
        "region": "us-east-1",
        "image": "ami-0123456789abcdef0",
        "instance_types": ["c7i.16xlarge"],
        "idle_timeout": 900,
    }
    settings = parse({"broker": {"id": BROKER_ID}, "pool": {"default": pool}}, {})
    return History(
        1, HOURS, settings, CLEAR, (Visit(10.0, "client", WORK_SECONDS, 60.0, "release"), second, *others)
    )


def lives() -> Iterator[tuple[SecondHost, tuple[Entry, ...], bool]]:
    """With what the first host suffers, and whether the second one has to take over."""
    for wall_seconds in (-86400.0, 0.0, 86400.0):
        for killed in (False, True):
            second = SecondHost(STARTS_AT, 7200.0, wall_seconds, killed)
            yield second, (), False
            yield second, (Crash(STARTS_AT + 700.0, 3, STALE_SECONDS - 400.0),), False
            yield second, (Crash(STARTS_AT + 700.0, 3, STALE_SECONDS + 600.0),), True


@pytest.mark.parametrize(("second", "accidents", "takes_over"), list(lives()))
def test_one_acts_at_a_time(second: SecondHost, accidents: tuple[Entry, ...], takes_over: bool) -> None:
    outcome = play(life(second, *accidents))
    assert _broken(outcome) == []
    assert outcome.seen["second host stood by"] == 1
    assert (outcome.seen["second host took over"] == 1) == takes_over


@pytest.mark.parametrize("bug", ["everybody-is-in-charge", "a-claim-is-good-for-two-minutes"])
def test_a_broker_that_does_not_give_way_is_found(bug: str) -> None:
    with PLANTS[bug]():
        assert "one broker acts at a time" in _broken(play(life(SecondHost(STARTS_AT, 7200.0, 0.0, False))))


def _broken(outcome: Outcome) -> list[str]:
    return [violation.promise for violation in outcome.violations]
