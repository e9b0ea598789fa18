"""What machines carry about their last use."""

from __future__ import annotations

import asyncio
from pathlib import Path

from broker.core import tags
from broker.core.errors import Throttled
from broker.testing import EPOCH_UNIX, RunningBroker
from tests.support.brokers import live


def test_the_last_use_is_written_at_most_once_a_minute_and_only_when_it_changed(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER")
        for _ in range(600):
            await asyncio.sleep(1)
            await broker.ask(f"PING {address}")
        assert 9 <= broker.cloud.count("tag") <= 11
        written = tags.read(next(iter(broker.cloud.machines.values())).instance.tags).last_used_unix
        assert written is not None
        assert abs(written - EPOCH_UNIX - broker.clock.monotonic()) < 62  # a minute, a PING, whole seconds
        before = broker.cloud.count("tag")
        await asyncio.sleep(300)
        assert broker.cloud.count("tag") - before <= 1

    live(tmp_path, story)


def test_a_tag_that_cannot_be_written_is_written_later(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER")
        await asyncio.sleep(30)
        await broker.ask("GET_WORKER")
        broker.cloud.fail["tag"].append(Throttled())
        await asyncio.sleep(130)
        assert tags.read(next(iter(broker.cloud.machines.values())).instance.tags).last_used_unix is not None

    live(tmp_path, story)
