"""Two regions, each a cloud in memory, and brokers whose pool buys in both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from broker.core.errors import CloudUnreachable
from broker.core.model import Market, Offering
from broker.core.settings import Settings
from broker.testing import FakeCloud, LoopClock, RunningBroker, run_virtual, running_broker
from tests.support.brokers import settings

EC2: dict[str, Any] = {"provider": "ec2", "image": "/lab/image", "instance_types": ["big"]}
TWO = ["earth", "mars"]
DOWN = CloudUnreachable("no answer")


def region(name: str, first: int) -> FakeCloud:
    """A region as a cloud of its own, to be called on the running loop."""
    cloud = FakeCloud("lab", clock=LoopClock(asyncio.get_running_loop()), first=first)
    cloud.name, cloud.place = f"ec2 {name}", ("ec2", name, None)
    cloud.catalogue["default"] = cloud._usual = offerings(name, Market.SPOT)
    return cloud


def offerings(name: str, *markets: Market) -> tuple[Offering, ...]:
    return tuple(Offering(name, "big", one, cores=64, price_usd_micros_per_hour=10**6) for one in markets)


def pool(**keys: Any) -> Settings:
    return settings(**{**EC2, "regions": TWO, **keys})


class Regions:
    """Two regions, and brokers that buy there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.earth, self.mars = region("earth", 1000), region("mars", 2000)
        self.spare = FakeCloud("lab", ("default",), clock=LoopClock(asyncio.get_running_loop()))

    def broker(self, chosen: Settings, owner: str = "host") -> AbstractAsyncContextManager[RunningBroker]:
        others = {"earth": self.earth, "mars": self.mars}
        state = self.directory / owner
        return running_broker(chosen, state, cloud=self.spare, others=others, owner=owner)

    def running(self) -> tuple[int, int]:
        return len(self.earth.running()), len(self.mars.running())

    def launches(self) -> tuple[int, int]:
        return self.earth.count("launch"), self.mars.count("launch")


def down(cloud: FakeCloud, apis: Iterable[str] = ("open", "listing", "launch", "describe")) -> None:
    """Until `up`, nothing that it is asked is answered."""
    for api in apis:
        cloud.fail[api].extend([DOWN] * 10_000)


def up(cloud: FakeCloud) -> None:
    cloud.fail.clear()


def live_in_two_regions(
    directory: Path,
    story: Callable[[Regions, RunningBroker], Awaitable[None]],
    chosen: Settings | None = None,
) -> None:
    async def main() -> None:
        regions = Regions(directory)
        async with regions.broker(chosen or pool()) as broker:
            await broker.until(broker.daemon.context.clouds.recovered)
            await story(regions, broker)

    run_virtual(main())
