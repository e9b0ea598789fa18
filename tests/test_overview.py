"""POOLS: what an operator sees of each pool."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from broker.core.errors import CloudUnreachable, PermanentRefusal
from broker.testing import RunningBroker
from tests.support.brokers import live, settings


async def pools(broker: RunningBroker) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(await broker.ask("POOLS"))}


def test_a_pool_shows_its_workers_by_state_and_why_its_clients_wait(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        waits = asyncio.create_task(broker.ask("GET_WORKER client=b wait=60"))
        await asyncio.sleep(1)
        row = (await pools(broker))["default"]
        assert row["workers"] == {"ready": 1}
        assert (row["leases"], row["waiting"], row["launches_last_hour"]) == (1, 1, 1)
        assert row["obstacle"] == "the pool's max_workers = 1 is reached"
        assert (await waits).endswith("[TIMEOUT]")

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


def test_a_pool_shows_what_has_been_spent_of_its_budget_today(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        await asyncio.sleep(600)
        budget = (await pools(broker))["default"]["budget"]
        assert budget["limit_usd"] == 20.0
        assert 0.15 < budget["spent_usd"] < 0.25

    live(tmp_path, story, chosen=settings(price_usd_per_hour=1.2, budget_usd_per_day=20.0))


def test_while_the_cloud_does_not_answer_the_pools_say_so(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["listing"].extend(CloudUnreachable("no route") for _ in range(1000))
        await asyncio.sleep(600)
        assert "no route" in (await pools(broker))["default"]["obstacle"]

    live(tmp_path, story)


def test_a_pool_that_only_its_machines_remember_is_shown_too(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.add("gone-pool")
        await broker.until(lambda: len(broker.registry))
        row = (await pools(broker))["gone-pool"]
        assert row["provider"] is None
        assert row["obstacle"] == "the pool is not configured any more"

    live(tmp_path, story)


def test_protected_workers_are_counted(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        broker.cloud.retag(*broker.cloud.running(), protect="yes")
        await asyncio.sleep(31)
        assert (await pools(broker))["default"]["protected"] == 1

    live(tmp_path, story)


def test_what_would_refuse_a_client_is_shown_before_one_asks(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("STATUS")
        assert (await pools(broker))["none"]["obstacle"] == "the pool's max_workers = 0 is reached"
        broker.cloud.refuses["big"] = PermanentRefusal("there is no such image")
        await broker.ask("GET_WORKER client=a")
        assert (await pools(broker))["default"]["obstacle"] == "there is no such image"
        guard = broker.daemon.context.guard("default")
        broker.cloud.refuses.clear()
        await broker.reload(settings({"none": {"max_workers": 0}}))
        for _ in range(3):
            guard.boot_failed(broker.daemon.settings.pool["default"], broker.clock.monotonic())
        assert "3 machines in a row" in (await pools(broker))["default"]["obstacle"]

    live(tmp_path, story, chosen=settings({"none": {"max_workers": 0}}))


def test_a_row_of_status_says_whether_its_pools_breaker_is_open(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        context = broker.daemon.context
        (row,) = json.loads(await broker.ask("STATUS"))
        assert row["breaker"] == "closed"
        for _ in range(context.pool("default").boot_failures_max):
            context.guard("default").boot_failed(context.pool("default"), context.now())
        (row,) = json.loads(await broker.ask("STATUS"))
        assert row["breaker"] == "open"

    live(tmp_path, story)
