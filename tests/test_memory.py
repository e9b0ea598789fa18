"""What a restart must not forget of machines and breakers."""

from __future__ import annotations

import asyncio
from pathlib import Path

from broker.core.model import WorkerState
from broker.core.policy import BreakerState
from broker.store import MachineNote
from broker.testing import RunningBroker, run_virtual, running_broker
from tests.support.brokers import live, settings

BROKEN = settings(boot_deadline="1m", boot_failures_max=2)


def test_a_restart_does_not_close_an_open_breaker(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(BROKEN, tmp_path, boots=False) as broker:
            assert "did not become ready" in await broker.ask("GET_WORKER wait=3600")
            launches = broker.cloud.count("launch")
            await asyncio.sleep(60)
        async with running_broker(BROKEN, tmp_path, cloud=broker.cloud) as again:
            assert "did not become ready" in await again.ask("GET_WORKER wait=10")
            breaker = again.daemon.context.guard("default").breaker(again.clock.monotonic())
            assert breaker.state is BreakerState.OPEN
            assert 500 < breaker.seconds_left < 560
            assert again.cloud.count("launch") == launches

    run_virtual(main())


def test_failed_boots_before_a_restart_count_with_those_after_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(BROKEN, tmp_path, boots=False) as broker:
            await broker.ask("GET_WORKER wait=1")
            await asyncio.sleep(70)
        async with running_broker(BROKEN, tmp_path, cloud=broker.cloud) as again:
            assert "2 machines in a row" in await again.ask("GET_WORKER wait=3600")

    run_virtual(main())


def test_a_machine_that_had_come_up_before_the_restart_does_not_close_the_breaker(tmp_path: Path) -> None:
    async def main() -> None:
        chosen = settings(boot_deadline="1m", boot_failures_max=1, idle_timeout="2h", sharing="exclusive")
        async with running_broker(chosen, tmp_path) as broker:
            await broker.ask("GET_WORKER client=a")
            broker.cloud.boots = False
            await broker.ask("GET_WORKER client=b wait=100")
            await asyncio.sleep(10)
        async with running_broker(chosen, tmp_path, cloud=broker.cloud) as again:
            await again.until(lambda: again.registry.count("default", WorkerState.READY) == 1)
            guard = again.daemon.context.guard("default")
            assert guard.breaker(again.clock.monotonic()).state is BreakerState.OPEN

    run_virtual(main())


def test_nothing_is_kept_of_a_machine_that_is_gone(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        (instance_id,) = broker.cloud.running()
        store = broker.daemon.context.store
        assert store.notes() == [MachineNote(instance_id, ready=True, uses=1)]
        await broker.ask(f"RELEASE {address} client=a")
        await broker.until(lambda: not len(broker.registry))
        await asyncio.sleep(1)
        assert store.notes() == []

    live(tmp_path, story)
