"""One worker's whole life, and a kill at every step of it.

Random kills hit what takes long. Here a single client asks, works and releases under a clear sky, and the
broker is killed so many steps of the loop after each moment at which something happens, then at the next.
"""

from __future__ import annotations

from collections import Counter

import pytest

from broker.core.settings import parse
from broker.providers.sim_weather import CLEAR
from broker.simulation.awaits import struck
from broker.simulation.history import BROKER_ID, Crash, History, Operator, Visit
from broker.simulation.stage import play

ASKS_AT, WORK_SECONDS = 10.0, 30.0
STEPS_MAX = 40  # of the loop, after the client has asked: the order is on disk and the call under way by then
MOMENTS = [ASKS_AT + 1.0 * n for n in range(130)]  # launch, boot, probes, hand-out, work, release, the end
STRUCK_MIN = 15  # places at which a task of the broker waited when it was killed


def life(crash: Crash, sharing: str) -> History:
    pool = {
        "provider": "ec2",
        "region": "us-east-1",
        "image": "ami-0123456789abcdef0",
        "instance_types": ["c7i.16xlarge"],
        "sharing": sharing,
        "idle_timeout": 300,
        "max_workers": 1,
    }
    visit = Visit(ASKS_AT, "client", WORK_SECONDS, 10.0, "release")
    settings = parse({"broker": {"id": BROKER_ID}, "pool": {"default": pool}}, {})
    return History(1, 0.1, settings, CLEAR, (visit, Operator(ASKS_AT + 20.0, "STATUS"), crash))


@pytest.mark.parametrize("sharing", ["shared", "exclusive"])
def test_a_kill_at_any_step_of_a_workers_life_breaks_no_promise(sharing: str) -> None:
    crashes = [Crash(ASKS_AT, steps, 1.0) for steps in range(STEPS_MAX)]
    crashes += [Crash(at, 3, 1.0) for at in MOMENTS]
    stood_at: Counter[str] = Counter()
    for crash in crashes:
        outcome = play(life(crash, sharing))
        assert [str(violation) for violation in outcome.violations] == [], crash
        assert outcome.launches in (2, 3), (
            "the client's machine, and the last one's; one more if that was lost"
        )
        stood_at += outcome.stood_at
    assert sum(times > 0 for times in struck(stood_at).values()) >= STRUCK_MIN
