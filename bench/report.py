"""The result as Markdown: the same text for the terminal and for RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench import idle
from bench.fulfilment import FulfilmentResult
from bench.idle import IdleResult
from bench.load import Slice
from bench.machine import Machine
from bench.registry_ops import RegistryResult
from bench.throughput import SHAPES, Ratio, Shape, Throughput
from bench.turns import QUIET_SHARE_MAX
from bench.verdict import Verdict

PEERS = ("broker", "echo", "beanstalkd", "redis")


@dataclass
class Report:
    machine: Machine
    settings: str  # rounds, seconds and cores, in a sentence or two
    throughput: Throughput | None = None
    idle: Sequence[IdleResult] = ()
    idle_why_not: str = ""
    registry: RegistryResult | None = None
    fulfilment: FulfilmentResult | None = None

    def verdicts(self) -> list[Verdict]:
        verdicts = self.throughput.verdicts() if self.throughput else []
        verdicts += [verdict for one in self.idle if one.peer == "broker" for verdict in one.verdicts()]
        if self.idle_why_not:
            verdicts.append(Verdict("idle connections", "", self.idle_why_not, None))
        verdicts += self.registry.verdicts() if self.registry else []
        verdicts += self.fulfilment.verdicts() if self.fulfilment else []
        return verdicts

    def markdown(self) -> str:
        parts = [f"## {self.machine.measured_at}", self._machine_line(), self.settings, *self._warnings()]
        parts += [
            "### Targets",
            table(("target", "wanted", "measured", ""), map(_verdict_row, self.verdicts())),
        ]
        if self.throughput:
            parts += _throughput_parts(self.throughput)
        if self.idle:
            parts += ["### Idle connections", table(IDLE_HEAD, map(_idle_row, self.idle))]
        if self.registry:
            parts += [
                "### Registry",
                "Microseconds for one operation, by the number of workers in the books.",
            ]
            parts.append(table(*self.registry.table()))
        if self.fulfilment:
            parts += [
                "### Planner",
                "From the queue and the books to purchases, the best of some rounds.",
                table(*self.fulfilment.table()),
                self.fulfilment.notice(),
            ]
        return "\n\n".join(parts) + "\n"

    def _machine_line(self) -> str:
        m = self.machine
        return (
            f"{m.cpu}, {m.cores} cores, {m.kernel}; Python {m.python}, uvloop {m.uvloop}, redis {m.redis}, "
            f"beanstalkd {m.beanstalkd}; load average at start {m.load_average:.2f}."
        )

    def _warnings(self) -> list[str]:
        warnings = []
        warnings += [
            f"**The machine was not quiet** beside the idle connections of {one.peer}: other programs took "
            f"up to {one.others_cpu_share:.0%} of a core, and latencies show it."
            for one in self.idle
            if one.others_cpu_share > idle.QUIET_SHARE_MAX
        ]
        if self.throughput:
            warnings += _disturbance(self.throughput)
            warnings += [
                f"**{name} was not measured**: {why}." for name, why in self.throughput.missing.items()
            ]
            warnings += [f"**Errors**: {fault}." for fault in self.throughput.faults()]
            warnings += _bottlenecks(self.throughput)
        return warnings


IDLE_HEAD = ("server", "idle connections", "KiB each", "p99 without, µs", "p99 with, µs", "growth of p99")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is also readable as plain text. The first column leans left, the others right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, rule)
    return "\n".join(
        "| " + " | ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in columns) + " |"
        for columns in (enumerate(zip(line, widths, strict=True)) for line in lines)
    )


def _throughput_parts(throughput: Throughput) -> list[str]:
    rates = [(s.title, *(_rate(throughput, s, peer) for peer in PEERS)) for s in SHAPES]
    ratios = [(s.title, *(_ratio(throughput.ratio(s.key, peer)) for peer in PEERS[1:])) for s in SHAPES]
    by_cpu = [
        (s.title, *(_ratio(throughput.ratio(s.key, peer, _per_cpu_second)) for peer in PEERS[1:]))
        for s in SHAPES
    ]
    rows = [
        _detail_row(throughput, s, peer) for s in SHAPES for peer in PEERS if throughput.sound(s.key, peer)
    ]
    return [
        "### Warm GET_WORKER and its peers: requests per second, the median of the rounds",
        table(("", *PEERS), rates),
        "### Broker / peer: the median of the rounds' ratios (lowest-highest)",
        table(("", *(f"/ {peer}" for peer in PEERS[1:])), ratios),
        "### Broker / peer, answers for each second of the server's own CPU time",
        "No target, but steadier than the clock when other programs run.",
        table(("", *(f"/ {peer}" for peer in PEERS[1:])), by_cpu),
        "### Latency, and who was busy",
        "Medians of the rounds. Pipelined: the time until the last of 50 replies. CPU: share of one core.",
        table(("", "server", "p50, µs", "p99, µs", "server CPU", "generator CPU"), rows),
    ]


def _per_cpu_second(one: Slice) -> float:
    return one.per_cpu_second


def _rate(throughput: Throughput, shape: Shape, peer: str) -> str:
    slices = throughput.sound(shape.key, peer)
    return f"{median(one.rps for one in slices):,.0f}" if slices else "not measured"


def _ratio(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f} ({ratio.lowest:.2f}-{ratio.highest:.2f})" if ratio else "not measured"


def _detail_row(throughput: Throughput, shape: Shape, peer: str) -> tuple[str, ...]:
    slices = throughput.sound(shape.key, peer) or []
    p50_us, p99_us = median(one.p50_us for one in slices), median(one.p99_us for one in slices)
    server = median(one.server_cpu_share for one in slices)
    generator = median(one.generator_cpu_share for one in slices)
    return shape.title, peer, f"{p50_us:,.0f}", f"{p99_us:,.0f}", f"{server:.0%}", f"{generator:.0%}"


def _disturbance(throughput: Throughput) -> list[str]:
    """How much of the cores in use went to programs that are no part of this."""
    shares = [
        one.others_cpu_share
        for by_peer in throughput.slices.values()
        for slices in by_peer.values()
        for one in slices
    ]
    dropped, said = throughput.turns_dropped, []
    if dropped:
        said.append(f"{dropped} turns were played again because other programs disturbed them.")
    if max(shares, default=0.0) > QUIET_SHARE_MAX:
        took = f"{median(shares):.0%} of a core in the median slice and {max(shares):.0%} in the worst"
        said.append(
            f"**The machine was not quiet**: in what counts, other programs took {took}. Trust ratios only."
        )
    return said


def _bottlenecks(throughput: Throughput) -> list[str]:
    """Where the load generator, not the server, set the pace: such a number is a lower bound only."""
    return [
        f"**The load generator set the pace** for {peer}, {shape.title}: its number is a lower bound."
        for shape in SHAPES
        for peer in PEERS
        if (slices := throughput.sound(shape.key, peer))
        and median(one.server_cpu_share for one in slices) < 0.85
        and median(one.generator_cpu_share for one in slices) > 0.95
    ]


def _verdict_row(verdict: Verdict) -> tuple[str, ...]:
    return verdict.what, verdict.wanted, verdict.measured, verdict.word


def _idle_row(one: IdleResult) -> tuple[str, ...]:
    return (
        one.peer, f"{one.connections:,}", f"{one.kib_each:.2f}", f"{one.p99_us_without:,.0f}",
        f"{one.p99_us_with:,.0f}", f"{one.p99_growth:.2f} x",
    )  # fmt: skip
