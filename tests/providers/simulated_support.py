"""A simulated EC2 in virtual time, and the real provider on top of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import ClientError

from broker.core.model import Order
from broker.core.tags import BROKER
from broker.providers.ec2 import Ec2Provider
from broker.providers.ec2_api import LAUNCHING, OTHERWISE
from broker.providers.sim_client import SimClient
from broker.providers.sim_weather import Road
from broker.providers.simulated import Machine, SimEC2, Weather
from broker.testing import EPOCH_UNIX, run_virtual
from tests.providers.ec2_support import pool

KIND = "c7i.large"
AT_ONCE = Road(answer_seconds=(0.2, 0.2))
STEADY = {  # everything takes its time, and always the same time
    "launches": AT_ONCE,
    "changes": AT_ONCE,
    "reads": AT_ONCE,
    "pending_seconds": (10.0, 10.0),
    "address_seconds": (2.0, 2.0),
    "port_seconds": (20.0, 20.0),
    "shutting_down_seconds": (30.0, 30.0),
    "stopping_seconds": (30.0, 30.0),
    "notice_seconds": (1.0, 1.0),
}


def steady(**knobs: Any) -> Weather:
    return Weather(**{**STEADY, **knobs})


@dataclass
class Lab:
    """The cloud of one story. `client` reads, changes and tries twice, `launcher` launches and tries once."""

    sim: SimEC2
    provider: Ec2Provider
    client: SimClient
    launcher: SimClient
    lines: list[str] = field(default_factory=list)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self, token: str = "t-1", **more: Any) -> dict[str, Any]:
        """RunInstances: the machine of the answer."""
        answer = await self.launcher.run_instances(**launch_of(**more), ClientToken=token)
        instance: dict[str, Any] = answer["Instances"][0]
        return instance

    async def machine(self, token: str = "t-1", **more: Any) -> Machine:
        """The same, as it truly is, once it runs and accepts connections."""
        instance_id = (await self.run(token, **more))["InstanceId"]
        await self.sleep(60)
        return self.sim.machine(instance_id)

    async def sleep(self, seconds: float) -> None:
        """And look: what a story holds in its hands is as the cloud was when somebody last looked."""
        await asyncio.sleep(seconds)
        self.sim.truth()

    async def ids(self, **filters: list[str]) -> list[str]:
        """What DescribeInstances shows."""
        return [one["InstanceId"] for one in await self.shown(**filters)]

    async def shown(self, **filters: list[str]) -> list[dict[str, Any]]:
        asked = [{"Name": name.replace("_", "-"), "Values": values} for name, values in filters.items()]
        answer = await self.client.describe_instances(Filters=asked)
        return [one for some in answer["Reservations"] for one in some["Instances"]]

    async def one(self) -> dict[str, Any]:
        """The only machine that DescribeInstances shows."""
        (shown,) = await self.shown()
        return shown

    def order(self, order_id: str = "order-1", name: str = "default") -> Order:
        offering = self.provider.offerings(name)[0]
        return self.provider.prepare(name, order_id, [offering], EPOCH_UNIX + self.now)


Story = Callable[[Lab], Awaitable[None]]


def play(story: Story, weather: Weather | None = None, *, seed: int = 1, **more: Any) -> Lab:
    """Live through a story in virtual time. `pools` are the provider's, the rest goes to SimEC2."""
    pools = more.pop("pools", None) or {"default": pool(instance_types=[KIND])}

    async def main() -> Lab:
        loop = asyncio.get_running_loop()

        def unix() -> float:
            return EPOCH_UNIX + loop.time()

        sim = SimEC2(random.Random(seed), loop.time, unix, weather or steady(), **more)
        provider = Ec2Provider(
            "lab",
            pools,
            region="us-east-1",
            profile=None,
            clock_wall=more.get("caller_unix") or unix,
            client_factory=sim.client_factory,
        )
        lab = Lab(sim, provider, sim.client(OTHERWISE), sim.client(LAUNCHING))
        sim.listen(lambda at, what, details: lab.lines.append(f"{at:.6f} {what} {details}"))
        await story(lab)
        await provider.close()
        return lab

    return run_virtual(main())


def launch_of(*, spot: bool = True, tags: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """The parameters of a plain launch, with some of them replaced."""
    market = {"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {}
    its_tags = [{"Key": key, "Value": value} for key, value in (tags or {BROKER: "lab"}).items()]
    return {
        "ImageId": "ami-1",
        "InstanceType": KIND,
        "MinCount": 1,
        "MaxCount": 1,
        "InstanceInitiatedShutdownBehavior": "terminate",
        "TagSpecifications": [{"ResourceType": "instance", "Tags": its_tags}],
        **market,
        **more,
    }


async def code_of(call: Awaitable[Any]) -> str:
    """EC2's error code. A call that succeeds has none, which is a fault of the test."""
    try:
        answer = await call
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    raise AssertionError(f"answered: {answer}")


async def words_of(call: Awaitable[Any]) -> str:
    """EC2's error message."""
    try:
        answer = await call
    except ClientError as error:
        return str(error.response["Error"]["Message"])
    raise AssertionError(f"answered: {answer}")
