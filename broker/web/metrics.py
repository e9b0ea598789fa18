"""`/metrics`: names that dashboards and alerts hold on to.

Gauges are read from the books at scrape time; counters are fed by events. Commands are counted in plain
integers, because the busiest of them arrive a hundred thousand times a second. No label takes a value that a
client chooses.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from broker.context import Context
from broker.core.model import Event, WorkerChanged, WorkerState
from broker.core.registry import BOOKED
from broker.metering import Meter

COMMAND_BUCKETS = (0.00001, 0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
LAUNCH_BUCKETS = (1.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0)
USD_MICROS = 1_000_000


disable_created_metrics()  # type: ignore[no-untyped-call]  # a `_created` series for each counter doubles the page and helps nobody here


class CommandStats:
    """How often each command was answered, how, and how fast."""

    __slots__ = ("_buckets", "_sums", "outcomes")

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, bool], int] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def record(self, command: str, failed: bool, seconds: float) -> None:
        """`command` is a word of the protocol, or "unknown"."""
        key = (command, failed)
        buckets = self._buckets.get(command)
        if buckets is None:
            buckets = self._buckets[command] = [0] * (len(COMMAND_BUCKETS) + 1)
            self._sums[command] = 0.0
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        buckets[bisect_left(COMMAND_BUCKETS, seconds)] += 1
        self._sums[command] += seconds

    def histogram(self, command: str) -> tuple[list[tuple[str, float]], float]:
        """Cumulative buckets and the sum, as Prometheus wants them."""
        cumulative, total = [], 0
        for bound, count in zip([*COMMAND_BUCKETS, "+Inf"], self._buckets[command], strict=True):
            total += count
            cumulative.append((str(bound), float(total)))
        return cumulative, self._sums[command]

    def commands(self) -> list[str]:
        return sorted(self._buckets)


class Metrics(Collector):
    """Everything that is measured. `registry` is what /metrics serves."""

    def __init__(
        self, context: Context, meter: Meter, commands: CommandStats, connections: Callable[[], int]
    ) -> None:
        self._context = context
        self._meter = meter
        self._connections = connections
        self.commands = commands
        self.registry = CollectorRegistry()
        self._launches = Counter(
            "compute_broker_launches",
            "Launch attempts by outcome.",
            ["pool", "outcome"],
            registry=self.registry,
        )
        self._launch_seconds = Histogram(
            "compute_broker_launch_seconds",
            "From the order to a worker that answers.",
            ["pool"],
            buckets=LAUNCH_BUCKETS,
            registry=self.registry,
        )
        self._terminations = Counter(
            "compute_broker_terminations",
            "Workers drained, by reason.",
            ["pool", "reason"],
            registry=self.registry,
        )
        self._cloud_calls = Counter(
            "compute_broker_cloud_calls",
            "Calls to the cloud's API.",
            ["api", "outcome"],
            registry=self.registry,
        )
        self._loop_failures = Counter(
            "compute_broker_loop_failures",
            "Ticks of background loops that failed.",
            ["loop"],
            registry=self.registry,
        )
        self.registry.register(self)

    def heard(self, event: Event) -> None:
        if not isinstance(event, WorkerChanged):
            return
        worker, before = event.worker, event.before
        match before, worker.state:
            case WorkerState.ORDERED, WorkerState.BOOTING:
                self._launches.labels(worker.pool, "launched").inc()
            case WorkerState.ORDERED, WorkerState.GONE:
                self._launches.labels(worker.pool, worker.reason).inc()
            case WorkerState.BOOTING, WorkerState.READY if worker.id == worker.order_id:
                self._launch_seconds.labels(worker.pool).observe(event.at - worker.born_at)
            case _, WorkerState.DRAINING:
                self._terminations.labels(worker.pool, worker.reason).inc()
            case WorkerState.BOOTING | WorkerState.READY | WorkerState.SUSPECT, WorkerState.GONE:
                self._terminations.labels(worker.pool, "lost").inc()
            case _:
                pass

    def cloud_call(self, api: str, outcome: str) -> None:
        self._cloud_calls.labels(api, outcome).inc()

    def loop_failed(self, loop: str) -> None:
        self._loop_failures.labels(loop).inc()

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._pool_gauges()
        yield from self._command_metrics()
        yield _gauge("compute_broker_connections", "Client connections.", self._connections())
        scans = [cloud.scanned_unix for cloud in self._context.clouds.all]
        yield _gauge(
            "compute_broker_last_scan_timestamp_seconds",
            "When the cloud whose last complete scan is oldest was scanned; 0 before the first scan.",
            min(scans, default=0.0),
        )

    def _pool_gauges(self) -> Iterator[Metric]:
        registry, now = self._context.registry, self._context.now()
        workers = GaugeMetricFamily("compute_broker_workers", "Workers by state.", labels=["pool", "state"])
        leases = GaugeMetricFamily("compute_broker_leases", "Live leases.", labels=["pool"])
        utilization = GaugeMetricFamily(
            "compute_broker_utilization_ratio",
            "Busy worker-seconds over running worker-seconds since the broker started.",
            labels=["pool"],
        )
        cost = CounterMetricFamily(
            "compute_broker_cost_usd",
            "Cost since the broker started, at the configured price.",
            labels=["pool"],
        )
        per_hour = GaugeMetricFamily(
            "compute_broker_cost_usd_per_hour", "What the running workers cost an hour.", labels=["pool"]
        )
        breaker = GaugeMetricFamily(
            "compute_broker_launch_breaker_open",
            "1 while launches pause after failed boots.",
            labels=["pool"],
        )
        for pool in self._context.settings.pool:
            for state in sorted(BOOKED):
                workers.add_metric([pool, str(state)], registry.count(pool, state))
            leases.add_metric([pool], registry.lease_count(pool))
            totals = self._meter.totals(pool, now)
            utilization.add_metric([pool], totals.utilization_ratio)
            cost.add_metric([pool], totals.cost_usd_micros / USD_MICROS)
            per_hour.add_metric([pool], totals.cost_usd_micros_per_hour / USD_MICROS)
            breaker.add_metric([pool], float(now < self._context.guard(pool).closed_until_at))
        yield from (workers, leases, utilization, cost, per_hour, breaker)

    def _command_metrics(self) -> Iterator[Metric]:
        total = CounterMetricFamily(
            "compute_broker_commands", "Commands answered.", labels=["command", "outcome"]
        )
        for (command, failed), count in sorted(self.commands.outcomes.items()):
            total.add_metric([command, "error" if failed else "ok"], count)
        seconds = HistogramMetricFamily(
            "compute_broker_command_seconds", "From a command to its reply.", labels=["command"]
        )
        for command in self.commands.commands():
            buckets, total_seconds = self.commands.histogram(command)
            seconds.add_metric([command], buckets, total_seconds)
        yield from (total, seconds)


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family
