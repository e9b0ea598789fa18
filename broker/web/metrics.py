"""`/metrics`: names that dashboards and alerts hold on to.

Gauges are read from the books at scrape time; counters are fed by events. Commands are counted in plain
integers, because the busiest of them arrive a hundred thousand times a second. No label takes a value that a
client chooses.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from broker.context import Context
from broker.core.life import BOOKED, LIVING
from broker.core.model import Event, Worker, WorkerChanged, WorkerState
from broker.core.money import USD_MICROS
from broker.core.settings import Settings
from broker.ledger import Ledger
from broker.metering import Meter
from broker.orders import YIELDED
from broker.web.buying_metrics import buying_gauges

COMMAND_BUCKETS = (0.00001, 0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
LAUNCH_BUCKETS = (1.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0)


# A `_created` series for each counter would double the page and help nobody.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Answers:
    """The answers to one command: how many, how many of them errors, how fast."""

    __slots__ = ("buckets", "errors", "seconds", "total")

    def __init__(self) -> None:
        self.total = self.errors = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(COMMAND_BUCKETS) + 1)

    def histogram(self) -> list[tuple[str, float]]:
        """Cumulative buckets, as Prometheus wants them."""
        bounds = [*map(str, COMMAND_BUCKETS), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.buckets)), strict=True))


class CommandStats:
    """What was answered, by command. The command is a word of the protocol, or "unknown"."""

    def __init__(self) -> None:
        self.by_command: dict[str, Answers] = {}

    def record(self, command: str, failed: bool, seconds: float, count: int = 1) -> None:
        """`count` answers that took so many seconds each."""
        answers = self.by_command.get(command)
        if answers is None:
            answers = self.by_command[command] = Answers()
        answers.total += count
        if failed:
            answers.errors += count
        answers.seconds += seconds * count
        answers.buckets[bisect_left(COMMAND_BUCKETS, seconds)] += count


class Metrics(Collector):
    """Everything that is measured. `registry` is what /metrics serves."""

    def __init__(
        self,
        context: Context,
        meter: Meter,
        ledger: Ledger,
        commands: CommandStats,
        connections: Callable[[], int],
    ) -> None:
        self._context = context
        self._meter = meter
        self._ledger = ledger
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
        self._starts = Counter(
            "compute_broker_starts",
            "Stopped workers that were started.",
            ["pool"],
            registry=self.registry,
        )
        self._start_seconds = Histogram(
            "compute_broker_start_seconds",
            "From the start of a stopped worker to one that answers.",
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
            case WorkerState.BOOTING, WorkerState.READY:
                self._came_up(worker, event.at - worker.boot_began_at)
            case WorkerState.STOPPED, WorkerState.BOOTING:
                self._starts.labels(worker.pool).inc()
            case _, WorkerState.DRAINING:
                self._terminations.labels(worker.pool, worker.reason).inc()
            case _, WorkerState.GONE if worker.reason == YIELDED:
                pass  # another broker looks after it
            case state, WorkerState.GONE if state in LIVING:
                self._terminations.labels(worker.pool, "lost").inc()
            case _:
                pass

    def _came_up(self, worker: Worker, took_seconds: float) -> None:
        """One that was found after a restart may have been on its way for any time."""
        if worker.started_at is not None:
            self._start_seconds.labels(worker.pool).observe(took_seconds)
        elif worker.id != worker.instance_id:
            self._launch_seconds.labels(worker.pool).observe(took_seconds)

    def cloud_call(self, api: str, outcome: str) -> None:
        self._cloud_calls.labels(api, outcome).inc()

    def loop_failed(self, loop: str) -> None:
        self._loop_failures.labels(loop).inc()

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._pool_gauges()
        yield from self._money()
        yield from buying_gauges(self._context)
        yield from self._command_metrics()
        yield from self._settings_gauges()
        yield _gauge("compute_broker_connections", "Client connections.", self._connections())
        read_only = GaugeMetricFamily(
            "compute_broker_read_only",
            "1 while another broker with this id is in charge of the cloud.",
            labels=["cloud"],
        )
        for cloud in self._context.clouds.all:
            read_only.add_metric([cloud.provider.name], float(cloud.rival is not None))
        yield read_only
        scans = [cloud.scanned_unix for cloud in self._context.clouds.all]
        yield _gauge(
            "compute_broker_last_scan_timestamp_seconds",
            "When the cloud whose last complete scan is oldest was scanned; 0 before the first scan.",
            min(scans, default=0.0),
        )

    def _settings_gauges(self) -> Iterator[Metric]:
        yield _gauge(
            "compute_broker_settings_outdated",
            "1 while the settings in force are not those of the file as it was read last: see /healthz.",
            float(bool(self._context.outdated)),
        )
        yield _gauge(
            "compute_broker_settings_loaded_timestamp_seconds",
            "When the settings in force were read.",
            self._context.loaded_unix,
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
        breaker = GaugeMetricFamily(
            "compute_broker_launch_breaker_open",
            "1 while launches pause after failed boots.",
            labels=["pool"],
        )
        warm = GaugeMetricFamily(
            "compute_broker_warm_target", "Workers to keep ready beyond the held ones, now.", labels=["pool"]
        )
        for pool in self._pools():
            warm.add_metric([pool], self._context.warmth(pool).target)
            for state in sorted(BOOKED):
                workers.add_metric([pool, str(state)], registry.count(pool, state))
            leases.add_metric([pool], registry.lease_count(pool))
            utilization.add_metric([pool], self._meter.totals(pool, now).utilization_ratio)
            breaker.add_metric([pool], float(now < self._context.guard(pool).closed_until_at))
        yield from (workers, leases, utilization, breaker, warm)
        yield from self._limits()

    def _limits(self) -> Iterator[Metric]:
        """What keeps workers alive, and what keeps launches from being made."""
        registry, now = self._context.registry, self._context.now()
        protected = GaugeMetricFamily(
            "compute_broker_protected_workers",
            "Workers that a compute-broker:protect tag keeps alive.",
            labels=["pool"],
        )
        seconds_left = GaugeMetricFamily(
            "compute_broker_launch_breaker_seconds_left",
            "How long launches pause yet after failed boots.",
            labels=["pool"],
        )
        openings = GaugeMetricFamily(
            "compute_broker_launch_breaker_openings",
            "How often the breaker has opened since a machine last came up.",
            labels=["pool"],
        )
        failures = GaugeMetricFamily(
            "compute_broker_launch_breaker_boot_failures",
            "Failed boots in a row since the breaker last opened or a machine came up.",
            labels=["pool"],
        )
        for pool in self._pools():
            breaker = self._context.guard(pool).breaker(now)
            protected.add_metric([pool], sum(one.protected for one in registry.in_state(*BOOKED, pool=pool)))
            seconds_left.add_metric([pool], breaker.seconds_left)
            openings.add_metric([pool], breaker.openings)
            failures.add_metric([pool], breaker.failures)
        yield from (protected, seconds_left, openings, failures)

    def _money(self) -> Iterator[Metric]:
        ledger, settings = self._ledger, self._context.settings
        cost = CounterMetricFamily(
            "compute_broker_cost_usd",
            "What machines have cost since the broker started, at most.",
            labels=["pool"],
        )
        today = GaugeMetricFamily(
            "compute_broker_cost_usd_today",
            "What they have cost since midnight UTC, at most.",
            labels=["pool"],
        )
        per_hour = GaugeMetricFamily(
            "compute_broker_cost_usd_per_hour", "What the running workers cost an hour.", labels=["pool"]
        )
        assumed = GaugeMetricFamily(
            "compute_broker_price_assumed",
            "1 where no price is set and the on-demand list price stands in.",
            labels=["pool"],
        )
        for pool in self._pools():
            cost.add_metric([pool], ledger.cost_usd_micros(pool) / USD_MICROS)
            today.add_metric([pool], ledger.cost_usd_micros_today(pool) / USD_MICROS)
            per_hour.add_metric([pool], ledger.cost_usd_micros_per_hour(pool) / USD_MICROS)
            assumed.add_metric([pool], float(self._price_is_assumed(pool)))
        yield from (cost, today, per_hour, assumed)
        yield from _budgets(settings)

    def _price_is_assumed(self, pool: str) -> bool:
        return any(one.price_assumed for one in self._context.offerings(pool))

    def _pools(self) -> list[str]:
        return sorted({*self._context.settings.pool, *(worker.pool for worker in self._context.registry)})

    def _command_metrics(self) -> Iterator[Metric]:
        total = CounterMetricFamily(
            "compute_broker_commands", "Commands answered.", labels=["command", "outcome"]
        )
        seconds = HistogramMetricFamily(
            "compute_broker_command_seconds", "From a command to its reply.", labels=["command"]
        )
        for command, answers in sorted(self.commands.by_command.items()):
            total.add_metric([command, "ok"], answers.total - answers.errors)
            total.add_metric([command, "error"], answers.errors)
            seconds.add_metric([command], answers.histogram(), answers.seconds)
        yield from (total, seconds)


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family


def _budgets(settings: Settings) -> Iterator[Metric]:
    """No sample where there is no budget: a budget of 0 is something else."""
    of_pools = GaugeMetricFamily(
        "compute_broker_budget_usd_per_day", "The pool's budget for a day (UTC).", labels=["pool"]
    )
    for name, pool in settings.pool.items():
        if pool.budget_usd_per_day is not None:
            of_pools.add_metric([name], pool.budget_usd_per_day)
    of_all = GaugeMetricFamily(
        "compute_broker_budget_of_all_usd_per_day", "The budget of all pools together for a day (UTC)."
    )
    if settings.broker.budget_usd_per_day is not None:
        of_all.add_metric([], settings.broker.budget_usd_per_day)
    yield from (of_pools, of_all)
