"""What machines carry about their last use."""

from __future__ import annotations

import asyncio
from pathlib import Path

from broker.core import tags
from broker.core.errors import PermanentRefusal, Throttled
from broker.testing import EPOCH_UNIX, RunningBroker
from tests.support.brokers import live, settings


def test_the_last_use_is_written_at_most_once_a_minute_and_only_when_it_changed(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER")
        for _ in range(600):
            await asyncio.sleep(1)
            await broker.ask(f"PING {address}")
        assert 9 <= broker.cloud.tagged(tags.LAST_USED) <= 11
        written = tags.read(next(iter(broker.cloud.machines.values())).instance.tags).last_used_unix
        assert written is not None
        assert abs(written - EPOCH_UNIX - broker.clock.monotonic()) < 62  # a minute, a PING, whole seconds
        before = broker.cloud.tagged(tags.LAST_USED)
        await asyncio.sleep(300)
        assert broker.cloud.tagged(tags.LAST_USED) - before <= 1

    live(tmp_path, story)


def test_one_call_a_minute_tells_of_all_workers(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        names = [f"c{number}" for number in range(30)]
        addresses = await asyncio.gather(*(broker.ask(f"GET_WORKER client={name}") for name in names))
        await asyncio.sleep(130)
        before = broker.cloud.tagged(tags.LAST_USED)
        for _ in range(5):
            await asyncio.sleep(60)
            for name, address in zip(names, addresses, strict=True):
                await broker.ask(f"PING {address} client={name}")
        assert broker.cloud.tagged(tags.LAST_USED) - before <= 6
        for machine in broker.cloud.machines.values():
            written = tags.read(machine.instance.tags).last_used_unix
            assert written is not None
            assert abs(written - EPOCH_UNIX - broker.clock.monotonic()) < 122

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=30, launches_per_hour=30))


def test_a_tag_that_cannot_be_written_is_written_later(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER")
        await asyncio.sleep(30)
        await broker.ask("GET_WORKER")
        broker.cloud.fail["tag_all"].append(Throttled())
        await asyncio.sleep(130)
        assert tags.read(next(iter(broker.cloud.machines.values())).instance.tags).last_used_unix is not None

    live(tmp_path, story)


def test_what_may_not_be_written_is_not_tried_every_minute(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["tag_all"].extend(PermanentRefusal("not authorized") for _ in range(1000))
        address = await broker.ask("GET_WORKER")
        for _ in range(60):
            await asyncio.sleep(60)
            await broker.ask(f"PING {address}")
        assert 5 <= broker.cloud.tagged(tags.LAST_USED) <= 7

    live(tmp_path, story)
