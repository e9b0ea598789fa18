"""Requests per second of a warm GET_WORKER, beside the peers.

Peers take turns in short slices (A B C D, B C D A, …) and are compared only with the slices of the same turn:
a machine that slows down for a while slows them all, and the median of those ratios forgets the odd turn.
A peer with one wrong reply anywhere in a shape has no number for that shape.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bench import load, turns
from bench.load import Slice
from bench.machine import Cores
from bench.peers import Peer
from bench.verdict import Verdict, at_least


@dataclass(frozen=True)
class Shape:
    key: str
    title: str
    mode: str
    connections: int
    depth: int = 1


SHAPES = (
    Shape("persistent", "persistent, 50 x 1", "persistent", 50),
    Shape("pipelined", "pipelined, 50 x 50", "persistent", 50, depth=50),
    Shape("connect", "a connection each, 8 at once", "connect", 8),
)

# (shape, peer, the ratio broker / peer to reach)
TARGETS = (
    ("persistent", "echo", 0.8),
    ("persistent", "beanstalkd", 0.9),
    ("pipelined", "beanstalkd", 3.0),
    ("connect", "beanstalkd", 0.8),
)


@dataclass(frozen=True)
class Ratio:
    median: float
    lowest: float
    highest: float


@dataclass
class Throughput:
    """Slices by shape and peer, one for each turn; `missing` says which peers have none, and why."""

    turns_dropped: int = 0  # because other programs disturbed them
    slices: dict[str, dict[str, list[Slice]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def sound(self, shape: str, peer: str) -> list[Slice] | None:
        slices = self.slices.get(shape, {}).get(peer, [])
        return slices if slices and all(one.sound for one in slices) else None

    def ratio(
        self, shape: str, peer: str, rate: Callable[[Slice], float] = lambda one: one.rps
    ) -> Ratio | None:
        ours, theirs = self.sound(shape, "broker"), self.sound(shape, peer)
        if ours is None or theirs is None or not all(map(rate, theirs)):
            return None
        ratios = [rate(a) / rate(b) for a, b in zip(ours, theirs, strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def why_not(self, shape: str, peer: str) -> str:
        for name in ("broker", peer):
            if name in self.missing:
                return f"no {name}"
            if self.sound(shape, name) is None:
                return f"errors on {name}"
        return ""

    def faults(self) -> list[str]:
        """One sentence for each shape and peer that answered wrongly."""
        return [
            f"{peer}, {shape}: {sum(one.errors for one in slices)} errors, the first: "
            f"{next((one.first_error for one in slices if one.first_error), 'no reply at all')}"
            for shape, by_peer in self.slices.items()
            for peer, slices in by_peer.items()
            if not all(one.sound for one in slices)
        ]

    def verdicts(self) -> list[Verdict]:
        titles = {shape.key: shape.title for shape in SHAPES}
        verdicts = []
        for shape, peer, wanted in TARGETS:
            ratio = self.ratio(shape, peer)
            what = f"{titles[shape]}: against {peer}"
            measured = ratio.median if ratio else None
            verdicts.append(at_least(what, wanted, measured, self.why_not(shape, peer)))
        return verdicts


def measure(running: list[Peer], cores: Cores, rounds: int, seconds: float, warmup_seconds: float,
            say: Callable[[str], None]) -> Throughput:  # fmt: skip
    result = Throughput()
    order = deque(running)
    for shape in SHAPES:

        def turn(shape: Shape = shape) -> dict[str, Slice]:
            order.rotate(-1)  # nobody is always the first
            played = {
                peer.name: load.run(peer, shape.mode, cores, connections=shape.connections,
                                    depth=shape.depth, seconds=seconds, warmup_seconds=warmup_seconds)
                for peer in order
            }  # fmt: skip
            rates = (f"{peer.name} {played[peer.name].rps:,.0f}/s" for peer in running)
            say(f"{shape.title}: {', '.join(rates)}")
            return played

        kept, dropped = turns.play(rounds, turn, lambda played: played.values())
        result.slices[shape.key] = {peer.name: [played[peer.name] for played in kept] for peer in running}
        result.turns_dropped += dropped
    return result
