"""kill -9 at random moments: no orphan, no double, no lost lease.

Several histories (see `deaths`), each with a broker, a seed and a region of its own, run side by side.
KILLS says how many kills there are in all, KILLS_SEED where the draws begin. Every kill costs a start of the
real command, a good second of work: the suite has as many as it can afford, `make kills` more than 200.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.acceptance.deaths import PHASES, History
from tests.support.cloud import MotoServer

KILLS = int(os.environ.get("KILLS", "72"))
SEED = int(os.environ.get("KILLS_SEED", "1"))
KILLS_A_HISTORY = 20  # moto's listings grow with every machine that ever ran: short histories are quick ones
AT_ONCE = 4  # a life is one second of work and one of waiting, and a machine has two cores at least
REGIONS = ("us-east-1", "us-east-2", "us-west-1", "us-west-2", "eu-west-1", "eu-west-2", "eu-west-3",
           "eu-central-1", "eu-north-1", "ca-central-1", "sa-east-1", "ap-south-1")  # fmt: skip


def test_a_broker_that_is_killed_at_random_moments_orphans_doubles_and_loses_nothing(
    moto_server: MotoServer, tmp_path: Path
) -> None:
    moto_server.reset()
    count = math.ceil(KILLS / KILLS_A_HISTORY)
    shares = [KILLS // count + (n < KILLS % count) for n in range(count)]
    histories = [
        History(SEED * 1000 + n, moto_server, REGIONS[n % len(REGIONS)], tmp_path / f"{n}")
        for n in range(count)
    ]
    failed = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        runs = [
            threads.submit(_run, history, kills, failed)
            for history, kills in zip(histories, shares, strict=True)
        ]
    failures = [str(error) for run in runs if (error := run.exception()) is not None]
    if failures:
        pytest.fail(f"KILLS={KILLS} KILLS_SEED={SEED}\n" + "\n\n".join(failures), pytrace=False)
    _require_enough(histories)


def _require_enough(histories: list[History]) -> None:
    """A run that met too little has proved too little."""
    kills = sum((history.kills for history in histories), Counter[tuple[str, str]]())
    phases = {phase: sum(n for (of, _), n in kills.items() if of == phase) for phase in PHASES}
    judged, machines = sum(h.judged for h in histories), sum(h.machines for h in histories)
    lines = [
        f"KILLS_SEED={SEED}: {kills.total()} kills, {machines} machines launched, "
        f"{judged} leases asked for after a kill",
        *(f"{count:5}  {phase}" for phase, count in phases.items()),
        *(f"{count:5}  {phase}: {moment}" for (phase, moment), count in sorted(kills.items())),
    ]
    report = "\n".join(lines)
    print(f"\n{report}")
    assert kills.total() == KILLS, report
    assert min(phases.values()) >= KILLS // 24, report
    assert judged >= KILLS // 2, report


def _run(history: History, kills: int, failed: threading.Event) -> None:
    try:
        history.run(kills, lambda: not failed.is_set())
    except BaseException:
        failed.set()
        raise
