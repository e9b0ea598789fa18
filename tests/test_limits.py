"""Limits of how many may use a worker, and of how many workers one may use."""

from __future__ import annotations

import asyncio
from pathlib import Path

from broker.core.model import WorkerState
from broker.testing import RunningBroker, run_virtual, running_broker
from tests.support.brokers import live, settings


def test_a_used_up_worker_is_closed_before_the_next_in_the_queue_is_served(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        asked = [asyncio.create_task(broker.ask(f"GET_WORKER client=c{number}")) for number in range(4)]
        addresses = [await one for one in asked]
        assert len({*addresses}) == 2
        assert [addresses.count(one) for one in {*addresses}] == [2, 2]

    live(tmp_path, story, chosen=settings(uses_max=2))


def test_who_holds_a_used_up_worker_may_ask_for_it_again(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        await asyncio.sleep(600)
        assert await broker.ask("GET_WORKER client=a") == address
        await asyncio.sleep(600)
        assert await broker.ask(f"PING {address} client=a") == "OK"
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, chosen=settings(uses_max=1))


def test_a_used_up_worker_ends_at_once_when_its_last_lease_does(tmp_path: Path) -> None:
    """By whatever way the lease ends: here it is ended in the books, and nobody calls the reaper."""

    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        (worker,) = broker.registry
        broker.registry.end_lease(worker.id, "a", "done", broker.clock.monotonic())
        await broker.until(lambda: not broker.cloud.running(), seconds_max=5)

    live(tmp_path, story, chosen=settings(uses_max=1))


def test_a_restart_does_not_forget_how_often_a_worker_was_used(tmp_path: Path) -> None:
    async def main() -> None:
        chosen = settings(uses_max=3)
        async with running_broker(chosen, tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            await broker.ask("GET_WORKER client=b")
            await asyncio.sleep(60)
        async with running_broker(chosen, tmp_path, cloud=broker.cloud) as again:
            await again.until(lambda: again.registry.count("default", WorkerState.READY) == 1)
            (worker,) = again.registry
            assert again.registry.uses(worker.id) == 2, "holds from before are not counted twice"
            assert await again.ask("GET_WORKER client=a") == address
            assert await again.ask("GET_WORKER client=c") == address
            assert await again.ask("GET_WORKER client=d") != address
        async with running_broker(chosen, tmp_path, cloud=broker.cloud) as third:
            await third.until(lambda: third.registry.count("default", WorkerState.READY) == 2)
            assert await third.ask("GET_WORKER client=e") != address, "it was closed before the restart"

    run_virtual(main())


def test_a_client_at_its_limit_is_refused_a_second_worker_and_keeps_its_own(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        await broker.ask("GET_WORKER client=b")
        refused = await broker.ask("GET_WORKER client=a exclusive=yes")
        assert refused.endswith("release one first [LIMIT]")
        assert await broker.ask("GET_WORKER client=a") == address
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, chosen=settings(workers_per_client_max=1))


def test_a_ping_takes_no_second_worker_for_a_client_at_its_limit(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a exclusive=yes")
        other = await broker.ask("GET_WORKER client=b")
        assert (await broker.ask(f"PING {other} client=a")).endswith("[LIMIT]")

    live(tmp_path, story, chosen=settings(workers_per_client_max=1))


def test_one_client_that_waits_for_two_kinds_of_workers_is_given_one(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        asked = [
            asyncio.create_task(broker.ask(f"GET_WORKER client=a exclusive=yes wait=60 {wish}"))
            for wish in ("cores=64", "type=big")
        ]
        await broker.until(lambda: len(broker.daemon.context.waiting) == 2)
        await broker.until(lambda: broker.cloud.running())
        broker.cloud.boot(broker.cloud.running()[0])
        replies = sorted([await one for one in asked])
        assert replies[0] == replies[1], "its own worker suits both wishes"

    live(tmp_path, story, boots=False, chosen=settings(workers_per_client_max=1, sharing="exclusive"))


def test_after_a_restart_a_client_at_its_limit_waits_for_its_own_worker(tmp_path: Path) -> None:
    async def main() -> None:
        chosen = settings(workers_per_client_max=1)
        async with running_broker(chosen, tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
        async with running_broker(chosen, tmp_path, cloud=broker.cloud) as again:
            assert await again.ask("GET_WORKER client=a") == address

    run_virtual(main())
