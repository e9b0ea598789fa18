"""Settings and state directories for tests that run a broker in virtual time."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from broker.core.settings import Settings, parse
from broker.testing import FakeCloud, RunningBroker, run_virtual, running_broker


def settings(pools: dict[str, dict[str, Any]] | None = None, **default_pool: Any) -> Settings:
    """`settings(sharing="exclusive")` for the default pool, `pools=` for more of them."""
    return parse({"broker": {"id": "lab"}, "pool": {"default": default_pool, **(pools or {})}}, {})


def live(
    directory: Path,
    story: Callable[[RunningBroker], Awaitable[None]],
    *,
    chosen: Settings | None = None,
    boots: bool = True,
    cloud: FakeCloud | None = None,
) -> None:
    """Run a story against a broker, in virtual time."""

    async def main() -> None:
        async with running_broker(chosen or settings(), directory, cloud=cloud, boots=boots) as broker:
            await story(broker)

    run_virtual(main())


def no_room(*_: object) -> None:
    """In place of a store's `_commit`."""
    raise sqlite3.OperationalError("database or disk is full")


@contextmanager
def full_disk(broker: RunningBroker) -> Iterator[None]:
    """Every write of its store fails meanwhile."""
    with patch.object(broker.daemon.context.store, "_commit", no_room):
        yield
