"""Who answers on the worker port, and what that says."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import LimitReached
from broker.core.model import WorkerState
from broker.loops.probe import connects
from broker.testing import RunningBroker
from tests.support.brokers import live, settings


async def test_a_listening_port_connects_and_a_closed_one_does_not() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await connects("127.0.0.1", port)
    server.close()
    await server.wait_closed()
    assert not await connects("127.0.0.1", port)


async def test_no_file_descriptors_left_says_nothing_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "open_connection", refuse)
    with pytest.raises(LimitReached, match="LimitNOFILE"):
        await connects("127.0.0.1", 9)


def test_a_silent_worker_holds_up_nobody_elses_readiness(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        connect = broker.cloud.connect

        async def slow_for_the_dead(address: str, port: int) -> bool:
            answers = await connect(address, port)
            if not answers:
                await asyncio.sleep(3)
            return answers

        broker.daemon.probe._connect = slow_for_the_dead
        first = asyncio.create_task(broker.ask("GET_WORKER client=a wait=60"))
        await broker.until(lambda: broker.cloud.machines)
        dead = broker.cloud.running()[0]
        broker.cloud.machines[dead].answers = False
        broker.cloud.boot(dead)
        second = asyncio.create_task(broker.ask("GET_WORKER client=b wait=60"))
        await broker.until(lambda: len(broker.cloud.machines) == 2)
        broker.cloud.boot(broker.cloud.running()[1])
        booted_at = broker.clock.monotonic()
        done, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
        assert "ERROR" not in done.pop().result()
        assert broker.clock.monotonic() - booted_at < 2.5
        assert broker.registry.count("default", WorkerState.READY) == 1
        await asyncio.wait({first, second})

    live(tmp_path, story, boots=False, chosen=settings(sharing="exclusive"))
