"""10,000 connections that say nothing: what each costs in memory, and what they cost everyone else.

Measured on a server of its own, fresh: after a throughput run, freed memory would take in the connections
and hide their price. Latency is measured under a modest fixed load, without and with the idle connections,
in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from bench import load, turns
from bench.load import Slice
from bench.machine import Cores
from bench.peers import Peer
from bench.verdict import Verdict, at_most

CONNECTIONS = 10_000
KIB_EACH_MAX = 10.0
P99_GROWTH_MAX = 2.0
LOAD_CONNECTIONS = 8
LOAD_PER_SECOND = 1000.0
Pair = tuple[Slice, Slice]  # the same load, without and with the idle connections
SETTLE_SECONDS_MAX = 30.0
QUIET_SHARE_MAX = 0.03  # of one core: a 99th percentile is made by whatever runs one hundredth of the time
FILES_SLACK = 16  # files the server opens and closes for itself meanwhile


@dataclass(frozen=True)
class IdleResult:
    peer: str
    connections: int
    kib_each: float
    p99_us_without: float  # median of the turns
    p99_us_with: float
    p99_growth: float  # median of the turns' ratios
    still_open: int  # the fewest that were still open at the end of a turn
    others_cpu_share: float  # the largest share of a core that other programs took in what counts

    def verdicts(self) -> list[Verdict]:
        held = f"{self.still_open:,} of {self.connections:,} still open at the end"
        return [
            Verdict(f"{self.connections:,} idle connections held", "all", held,
                    self.still_open == self.connections),
            at_most("memory of one idle connection", KIB_EACH_MAX, self.kib_each, "KiB"),
            at_most("GET_WORKER p99 beside them, against without", P99_GROWTH_MAX, self.p99_growth, "x"),
        ]  # fmt: skip


def measure(peer: Peer, cores: Cores, rounds: int, seconds: float, say: Callable[[str], None]) -> IdleResult:
    """Raises load.IdleFailed when the connections cannot be opened or the server does not take them."""
    server = psutil.Process(peer.pid)
    files_fresh = server.num_fds()
    _paced(peer, cores, seconds)  # warms the code, so that its memory is not charged to the connections
    kib_each: list[float] = []  # of every turn; the first is the honest one, later ones find freed memory
    still_open: list[int] = []

    def turn() -> Pair:
        without = _paced(peer, cores, seconds)
        rss_before = server.memory_info().rss
        with load.idle(peer.port, CONNECTIONS, cores) as held:
            _wait_for_files(server, at_least=files_fresh + CONNECTIONS - FILES_SLACK)
            beside = _paced(peer, cores, seconds)
            kib_each.append((server.memory_info().rss - rss_before) / 1024 / CONNECTIONS)
        still_open.append(held.still_open)
        _wait_for_files(server, at_most=files_fresh + FILES_SLACK)
        say(f"idle, {peer.name}: p99 {without.p99_us:.0f} µs without, {beside.p99_us:.0f} µs with")
        return without, beside

    pairs, _ = turns.play(rounds, turn, lambda pair: pair, QUIET_SHARE_MAX)
    return IdleResult(
        peer=peer.name,
        connections=CONNECTIONS,
        kib_each=kib_each[0],
        p99_us_without=statistics.median(without.p99_us for without, _ in pairs),
        p99_us_with=statistics.median(beside.p99_us for _, beside in pairs),
        p99_growth=statistics.median(beside.p99_us / without.p99_us for without, beside in pairs),
        still_open=min(still_open),
        others_cpu_share=max(turns.disturbance(pair) for pair in pairs),
    )


def _paced(peer: Peer, cores: Cores, seconds: float) -> Slice:
    one = load.run(peer, "paced", cores, connections=LOAD_CONNECTIONS, rate_per_second=LOAD_PER_SECOND,
                   seconds=seconds, warmup_seconds=0.2)  # fmt: skip
    if not one.sound:
        raise load.IdleFailed(f"{one.errors} errors under the fixed load, the first: {one.first_error}")
    return one


def _wait_for_files(server: psutil.Process, at_least: int = 0, at_most: int = 1 << 30) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    while not at_least <= server.num_fds() <= at_most:
        if time.monotonic() > deadline:
            raise load.IdleFailed(
                f"the server has {server.num_fds():,} open files, not {at_least:,} to {at_most:,}, "
                f"after {SETTLE_SECONDS_MAX:.0f} s"
            )
        time.sleep(0.05)
