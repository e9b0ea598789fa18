"""Settings and state directories for tests that run a broker in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

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
