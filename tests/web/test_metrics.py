"""/metrics: the names and labels that dashboards hold on to, and that the values are right."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from broker.core.errors import OfferingRefused
from broker.core.model import InstanceState, Market, Offering, WorkerState
from broker.core.policy import Reason
from broker.core.protocol import NAMES
from broker.core.settings import parse
from broker.testing import RunningBroker, run_virtual, running_broker
from broker.web.metrics import COMMAND_BUCKETS, CommandStats
from tests.support.brokers import live, settings

PRICE = 2.5  # dollars an hour
NAMES_AND_LABELS = {  # fixed: dashboards and alerts hold on to them
    "compute_broker_workers": {"pool", "state"},
    "compute_broker_leases": {"pool"},
    "compute_broker_utilization_ratio": {"pool"},
    "compute_broker_launches_total": {"pool", "outcome"},
    "compute_broker_launch_seconds_bucket": {"pool", "le"},
    "compute_broker_launch_seconds_count": {"pool"},
    "compute_broker_launch_seconds_sum": {"pool"},
    "compute_broker_terminations_total": {"pool", "reason"},
    "compute_broker_commands_total": {"command", "outcome"},
    "compute_broker_command_seconds_bucket": {"command", "le"},
    "compute_broker_command_seconds_count": {"command"},
    "compute_broker_command_seconds_sum": {"command"},
    "compute_broker_cloud_calls_total": {"api", "outcome"},
    "compute_broker_connections": set[str](),
    "compute_broker_read_only": {"cloud"},
    "compute_broker_last_scan_timestamp_seconds": set[str](),
    "compute_broker_cost_usd_total": {"pool"},
    "compute_broker_cost_usd_per_hour": {"pool"},
    "compute_broker_cost_usd_today": {"pool"},
    "compute_broker_price_assumed": {"pool"},
    "compute_broker_protected_workers": {"pool"},
    "compute_broker_launch_breaker_open": {"pool"},
    "compute_broker_launch_breaker_seconds_left": {"pool"},
    "compute_broker_launch_breaker_openings": {"pool"},
    "compute_broker_launch_breaker_boot_failures": {"pool"},
}
TYPES = {
    "compute_broker_workers": "gauge",
    "compute_broker_leases": "gauge",
    "compute_broker_utilization_ratio": "gauge",
    "compute_broker_launches": "counter",
    "compute_broker_launch_seconds": "histogram",
    "compute_broker_terminations": "counter",
    "compute_broker_commands": "counter",
    "compute_broker_command_seconds": "histogram",
    "compute_broker_cloud_calls": "counter",
    "compute_broker_connections": "gauge",
    "compute_broker_read_only": "gauge",
    "compute_broker_last_scan_timestamp_seconds": "gauge",
    "compute_broker_cost_usd": "counter",
    "compute_broker_cost_usd_per_hour": "gauge",
    "compute_broker_cost_usd_today": "gauge",
    "compute_broker_price_assumed": "gauge",
    "compute_broker_protected_workers": "gauge",
    "compute_broker_launch_breaker_open": "gauge",
    "compute_broker_launch_breaker_seconds_left": "gauge",
    "compute_broker_launch_breaker_openings": "gauge",
    "compute_broker_launch_breaker_boot_failures": "gauge",
}


class Page:
    """What /metrics shows at a moment."""

    def __init__(self, broker: RunningBroker) -> None:
        text = generate_latest(broker.daemon.metrics.registry).decode()
        self.families = list(text_string_to_metric_families(text))

    def samples(self, name: str) -> list[tuple[Mapping[str, str], float]]:
        return [(s.labels, s.value) for f in self.families for s in f.samples if s.name == name]

    def value(self, name: str, **labels: str) -> float:
        """The one sample with exactly these labels; 0 when there is none."""
        values = [value for have, value in self.samples(name) if dict(have) == labels]
        assert len(values) <= 1, f"{name} {labels} is there twice"
        return values[0] if values else 0.0


def priced(broker: RunningBroker) -> None:
    """The fake's machines at the configured price, as a provider makes its offerings."""
    price = broker.daemon.settings.pool["default"].price_usd_micros_per_hour
    broker.cloud.catalogue["default"] = (Offering("moon", "big", Market.SPOT, "", 64, price),)


# --- names -----------------------------------------------------------------------------------------------


def test_every_promised_name_is_there_with_its_labels_after_a_short_life(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.daemon._cloud_called("RunInstances", "ok")
        address = await broker.ask("GET_WORKER")
        await broker.ask(f"RELEASE {address}")
        await broker.until(lambda: not broker.cloud.running())
        page = Page(broker)
        for name, labels in NAMES_AND_LABELS.items():
            samples = page.samples(name)
            assert samples, f"{name} is missing"
            assert {frozenset(have) for have, _ in samples} == {frozenset(labels)}, name
        assert {f.name: f.type for f in page.families if f.name in TYPES} == TYPES
        assert all(family.documentation for family in page.families)

    live(tmp_path, story)


def test_there_is_something_to_draw_before_anything_has_happened(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        page = Page(broker)
        states = {labels["state"] for labels, _ in page.samples("compute_broker_workers")}
        on_the_way_out = {"draining", "terminating"}
        assert states == {"ordered", "booting", "ready", "suspect", "stopping", "stopped"} | on_the_way_out
        for pool in ("default", "gpu"):
            assert page.value("compute_broker_workers", pool=pool, state="ready") == 0
            assert page.value("compute_broker_utilization_ratio", pool=pool) == 0
            assert [v for have, v in page.samples("compute_broker_leases") if have["pool"] == pool] == [0]
            assert [
                v for have, v in page.samples("compute_broker_cost_usd_total") if have["pool"] == pool
            ] == [0]

    live(tmp_path, story, chosen=settings({"gpu": {}}))


def test_no_label_takes_a_value_that_a_client_has_chosen(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        for line in (
            "GET_WORKER client=evil-1",
            "EVIL_2",
            "GET_WORKER pool=evil-3",
            "PING evil-4",
            "RELEASE evil-5",
        ):
            await broker.ask(line, "evil-6")
        await broker.ask("GET_WORKER type=evil-7")
        page = Page(broker)
        values = {v for family in page.families for sample in family.samples for v in sample.labels.values()}
        assert not [value for value in values if "evil" in value.lower()]
        commands = {labels["command"] for labels, _ in page.samples("compute_broker_commands_total")}
        assert commands <= {*NAMES.values(), "unknown"}

    live(tmp_path, story)


# --- values ----------------------------------------------------------------------------------------------


def test_workers_and_leases_are_read_from_the_books_at_the_moment_of_asking(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        asking = [asyncio.create_task(broker.ask(f"GET_WORKER client=c{i}")) for i in range(3)]
        await broker.until(lambda: broker.cloud.machines)
        assert Page(broker).value("compute_broker_workers", pool="default", state="booting") == 1
        broker.cloud.boot(broker.cloud.running()[0])
        await asyncio.gather(*asking)
        page = Page(broker)
        assert page.value("compute_broker_workers", pool="default", state="booting") == 0
        assert page.value("compute_broker_workers", pool="default", state="ready") == 1
        assert page.value("compute_broker_leases", pool="default") == 3
        await asyncio.sleep(1000)
        page = Page(broker)
        assert page.value("compute_broker_leases", pool="default") == 0
        assert sum(value for _, value in page.samples("compute_broker_workers")) == 0

    live(tmp_path, story, boots=False)


def test_utilization_is_busy_worker_seconds_over_running_worker_seconds(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert "[TIMEOUT]" in await broker.ask("GET_WORKER wait=1")
        broker.cloud.boot(broker.cloud.running()[0])
        await broker.until(lambda: broker.registry.in_state(WorkerState.READY))
        await asyncio.sleep(300)  # nobody waits for it any more
        await broker.ask("GET_WORKER client=anna")
        await asyncio.sleep(899)
        ratio = Page(broker).value("compute_broker_utilization_ratio", pool="default")
        assert ratio == pytest.approx(899 / (300 + 899), abs=0.01)

    live(tmp_path, story, boots=False)


def test_cost_is_the_configured_price_for_the_seconds_that_machines_ran(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        priced(broker)
        address = await broker.ask("GET_WORKER client=anna")
        assert Page(broker).value("compute_broker_cost_usd_per_hour", pool="default") == PRICE
        for _ in range(12):
            await asyncio.sleep(600)
            await broker.ask(f"PING {address} client=anna")
        assert Page(broker).value("compute_broker_cost_usd_total", pool="default") == pytest.approx(
            2 * PRICE, rel=0.001
        )
        await broker.ask(f"RELEASE {address} client=anna")
        await broker.until(lambda: not len(broker.registry))
        ended = Page(broker).value("compute_broker_cost_usd_total", pool="default")
        await asyncio.sleep(36_000)
        page = Page(broker)
        assert page.value("compute_broker_cost_usd_total", pool="default") == ended
        assert page.value("compute_broker_cost_usd_per_hour", pool="default") == 0

    live(tmp_path, story, chosen=settings(price_usd_per_hour=PRICE))


def test_a_restart_does_not_forget_what_was_spent_today(tmp_path: Path) -> None:
    chosen = parse(
        {
            "broker": {"budget_usd_per_day": 30.0},
            "pool": {"default": {"price_usd_per_hour": PRICE, "budget_usd_per_day": 10.0}, "gpu": {}},
        },
        {},
    )

    async def story() -> None:
        async with running_broker(chosen, tmp_path) as first:
            address = await first.ask("GET_WORKER")
            for _ in range(6):
                await asyncio.sleep(600)
                await first.ask(f"PING {address}")
            today = Page(first).value("compute_broker_cost_usd_today", pool="default")
            assert today == pytest.approx(PRICE, rel=0.01)
        async with running_broker(chosen, tmp_path, cloud=first.cloud) as second:
            await second.until(lambda: len(second.registry))
            page = Page(second)
            assert page.value("compute_broker_cost_usd_today", pool="default") >= today
            assert page.value("compute_broker_cost_usd_per_hour", pool="default") == PRICE
            assert page.value("compute_broker_cost_usd_total", pool="default") < 0.01, "since the start"
            assert page.value("compute_broker_budget_usd_per_day", pool="default") == 10.0
            assert page.value("compute_broker_budget_of_all_usd_per_day") == 30.0
            assert len(page.samples("compute_broker_budget_usd_per_day")) == 1, "the other pool has none"

    run_virtual(story())


def test_the_cost_since_the_start_never_goes_back(tmp_path: Path) -> None:
    """A step down would be read as a restart; here the machine turns out to have been free."""

    async def story(broker: RunningBroker) -> None:
        priced(broker)
        address = await broker.ask("GET_WORKER client=anna")
        for _ in range(2):
            await asyncio.sleep(600)
            await broker.ask(f"PING {address} client=anna")
        cost = Page(broker).value("compute_broker_cost_usd_total", pool="default")
        assert cost == pytest.approx(PRICE / 3, rel=0.01)
        reason = "Server.SpotInstanceTermination: taken back"
        broker.cloud.set_state(broker.cloud.running()[0], InstanceState.TERMINATED, reason)
        await broker.until(lambda: not len(broker.registry))
        page = Page(broker)
        assert page.value("compute_broker_cost_usd_today", pool="default") == 0
        assert page.value("compute_broker_cost_usd_total", pool="default") >= cost

    live(tmp_path, story, chosen=settings(price_usd_per_hour=PRICE))


def test_launches_are_counted_by_what_came_of_them(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["launch"].append(OfferingRefused("no"))
        await broker.ask("GET_WORKER")
        await asyncio.sleep(200)
        await broker.ask("GET_WORKER")
        page = Page(broker)
        assert page.value("compute_broker_launches_total", pool="default", outcome="no-capacity") == 1
        assert page.value("compute_broker_launches_total", pool="default", outcome="launched") == 1
        assert sum(value for _, value in page.samples("compute_broker_launches_total")) == 2

    live(tmp_path, story)


def test_launch_seconds_are_from_the_order_to_a_worker_that_answers(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        asking = asyncio.create_task(broker.ask("GET_WORKER"))
        await broker.until(lambda: broker.cloud.machines)
        await asyncio.sleep(33)
        broker.cloud.boot(broker.cloud.running()[0])
        await asking
        page = Page(broker)
        assert page.value("compute_broker_launch_seconds_count", pool="default") == 1
        assert 33 <= page.value("compute_broker_launch_seconds_sum", pool="default") <= 33 + 16
        assert page.value("compute_broker_launch_seconds_bucket", pool="default", le="30.0") == 0
        assert page.value("compute_broker_launch_seconds_bucket", pool="default", le="60.0") == 1

    live(tmp_path, story, boots=False)


def test_a_machine_that_was_found_and_not_launched_says_nothing_about_launches(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.add()
        await broker.until(lambda: broker.registry.in_state(WorkerState.READY))
        page = Page(broker)
        assert page.samples("compute_broker_launches_total") == []
        assert page.value("compute_broker_launch_seconds_count", pool="default") == 0

    live(tmp_path, story)


def test_terminations_are_counted_by_their_reason(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        released = await broker.ask("GET_WORKER")
        await broker.ask(f"RELEASE {released}")
        await broker.ask("GET_WORKER")
        await asyncio.sleep(1000)
        await broker.ask("GET_WORKER")
        await broker.ask("TERMINATE_ALL")
        await broker.ask("GET_WORKER")
        broker.cloud.set_state(broker.cloud.running()[0], InstanceState.SHUTTING_DOWN, "reclaimed")
        await asyncio.sleep(60)
        await broker.ask("GET_WORKER")
        broker.cloud.set_state(broker.cloud.running()[0], InstanceState.TERMINATED, "reclaimed")
        await asyncio.sleep(60)
        page = Page(broker)
        found = {
            labels["reason"]: value for labels, value in page.samples("compute_broker_terminations_total")
        }
        assert found == {"released": 1, "idle": 1, "terminate-all": 1, "reclaimed": 1, "lost": 1}
        assert set(found) <= {*map(str, Reason), "lost"}

    live(tmp_path, story)


def test_commands_are_counted_once_each_by_how_they_ended(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        address = await client.ask("GET_WORKER")
        client.send(
            f"PING {address}\nPING 192.0.2.1\nNONSENSE\nGET_WORKER x=1\nGET_WORKER\n\nSTATUS\n".encode()
        )
        for _ in range(7):
            await client.reply()
        page = Page(broker)
        found = {
            (labels["command"], labels["outcome"]): value
            for labels, value in page.samples("compute_broker_commands_total")
            if value
        }
        assert found == {
            ("GET_WORKER", "ok"): 2,
            ("GET_WORKER", "error"): 1,
            ("PING", "ok"): 1,
            ("PING", "error"): 1,
            ("STATUS", "ok"): 1,
            ("unknown", "error"): 2,
        }
        for command in ("GET_WORKER", "PING", "STATUS", "unknown"):
            total = sum(value for (name, _), value in found.items() if name == command)
            assert page.value("compute_broker_command_seconds_count", command=command) == total

    live(tmp_path, story)


def test_a_command_that_waited_is_as_slow_as_it_was(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER wait=42")
        page = Page(broker)
        assert page.value("compute_broker_command_seconds_sum", command="GET_WORKER") == pytest.approx(
            42, abs=0.1
        )
        assert page.value("compute_broker_command_seconds_bucket", command="GET_WORKER", le="30.0") == 0
        assert page.value("compute_broker_command_seconds_bucket", command="GET_WORKER", le="60.0") == 1

    live(tmp_path, story, boots=False)


def test_buckets_are_cumulative_and_end_with_everything() -> None:
    stats = CommandStats()
    for seconds in (0.0, 0.00001, 0.00002, 5.0, 1e9):
        stats.record("PING", False, seconds)
    stats.record("PING", True, 0.5, 10)
    answers = stats.by_command["PING"]
    histogram = dict(answers.histogram())
    assert histogram["1e-05"] == 2, "a bucket holds what is less or equal"
    assert histogram["10.0"] == 14
    assert histogram["+Inf"] == answers.total == 15
    assert answers.errors == 10
    assert list(histogram.values()) == sorted(histogram.values())
    assert len(histogram) == len(COMMAND_BUCKETS) + 1


def test_connections_and_the_last_scan_are_those_of_this_moment(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        clients = [broker.client() for _ in range(5)]
        assert Page(broker).value("compute_broker_connections") == 5
        clients[0].vanish()
        await asyncio.sleep(100)
        page = Page(broker)
        assert page.value("compute_broker_connections") == 4
        age_seconds = broker.clock.wall() - page.value("compute_broker_last_scan_timestamp_seconds")
        assert 0 <= age_seconds <= 30

    live(tmp_path, story)


def test_the_breaker_and_failing_loops_can_be_seen(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert Page(broker).value("compute_broker_launch_breaker_open", pool="default") == 0
        await broker.ask("GET_WORKER wait=3600")
        page = Page(broker)
        assert page.value("compute_broker_launch_breaker_open", pool="default") == 1
        assert 0 < page.value("compute_broker_launch_breaker_seconds_left", pool="default") <= 600
        assert page.value("compute_broker_launch_breaker_openings", pool="default") == 1
        assert page.value("compute_broker_launch_breaker_boot_failures", pool="default") == 0
        broker.daemon._loop_failed("reap", ZeroDivisionError(), 1.0)
        assert Page(broker).value("compute_broker_loop_failures_total", loop="reap") == 1

    live(tmp_path, story, boots=False, chosen=settings(boot_deadline="1m", boot_failures_max=1))


def test_the_warm_target_is_what_the_schedule_says_now(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert Page(broker).value("compute_broker_warm_target", pool="default") == 2
        await asyncio.sleep(4 * 3600)  # a virtual broker starts at 08:00 UTC
        assert Page(broker).value("compute_broker_warm_target", pool="default") == 1

    live(tmp_path, story, chosen=settings(warm=1, warm_schedule={"daily 06:00-12:00": 2}))


def test_protected_workers_can_be_seen(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER")
        assert Page(broker).value("compute_broker_protected_workers", pool="default") == 0
        broker.cloud.retag(*broker.cloud.running(), protect="yes")
        await asyncio.sleep(31)
        assert Page(broker).value("compute_broker_protected_workers", pool="default") == 1

    live(tmp_path, story)


def test_machines_of_a_pool_that_the_configuration_has_dropped_are_still_seen(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.add("gone-pool")
        await broker.until(lambda: len(broker.registry))
        workers = Page(broker).samples("compute_broker_workers")
        assert sum(value for labels, value in workers if labels["pool"] == "gone-pool") == 1

    live(tmp_path, story)
