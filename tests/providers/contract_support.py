"""The three stands on which the contract of the provider port is tried.

A stand is one place in a cloud and all that a test of the port needs around it: provider objects that come
and go there, the truth about the machines, and the mishaps that the place can bring about until it is healed.
What a place cannot bring about is a Power that its stand lacks; LACKS is the whole list, with the reasons.

    simulated   the EC2 provider on SimEC2, in virtual time
    ec2         the EC2 provider and the real SDK, over HTTP to moto behind the fault proxy
    local       the local provider and real processes on loopback addresses
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from functools import wraps
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from broker.core.model import Order
from broker.core.settings import PoolSettings, parse
from broker.core.tags import Identity
from broker.providers.base import OUTCOMES, Provider
from broker.providers.ec2 import Ec2Provider
from broker.providers.ec2_api import ClientFactory
from broker.providers.local import LocalProvider
from broker.providers.local_processes import running
from broker.providers.local_records import Records
from broker.providers.simulated import EVERY_API, Ending, Fault, SimEC2
from broker.testing import EPOCH_UNIX, run_virtual
from tests.providers.ec2_support import pool as ec2_pool
from tests.providers.simulated_support import steady
from tests.support import ec2_wire
from tests.support.buying import launch_one
from tests.support.cloud import MotoServer
from tests.support.fault_proxy import EVERY_ACTION, FaultProxy

BROKER_ID = "lab"
POOL = "default"
NAME_TAG = "dserv-worker"
PRICE_USD_PER_HOUR = 0.5
LIFETIME_SECONDS = 3600.0
HEARD = frozenset({"ok", "cancelled", *OUTCOMES.values()})  # what `on_call` may say

LASTING = 1_000  # calls that meet a mishap: more than a test makes before it heals the cloud
MACHINES_PER_PAGE = 2  # a listing of three is two pages
EC2_KINDS = ("c7i.large", "c6i.large")
UNKNOWN_EC2_ID = "i-0123456789abcdef0"
REAL_SECONDS_MAX = 20.0  # for what takes milliseconds on an idle machine
VIRTUAL_SECONDS_MAX = 600.0
TERMINATE_GRACE_SECONDS = 0.3  # what a local worker gets that does not end when it is told to


class Power(Enum):
    """What not every place can do to a broker."""

    ADOPT = "show machines that somebody started by hand"
    CHECK = "say before a launch that it cannot work"
    COUNT_QUOTA = "reach a quota"
    FORBID = "withhold a permission"
    LOSE_ANSWERS = "carry out a call and lose its answer"
    PAGE = "list in pages"
    REFUSE_CREDENTIALS = "refuse credentials"
    STOP = "stop a machine and start it again"
    THROTTLE = "ask for fewer calls"


LACKS: Mapping[str, Mapping[Power, str]] = {
    "simulated": {},
    "ec2": {},
    "local": {
        Power.ADOPT: "nobody but a broker starts a local worker",
        Power.CHECK: "a worker's command is looked for when it is started, and may be installed until then",
        Power.COUNT_QUOTA: "this host has no quota but its ports and its disk, which are capacity",
        Power.FORBID: "whoever may start a process may also look after it",
        Power.LOSE_ANSWERS: "a call stays within this process: its answer is lost with the broker only",
        Power.PAGE: "a listing is one look into one directory",
        Power.REFUSE_CREDENTIALS: "nobody asks who the broker is",
        Power.STOP: "a process that has ended is gone, and another one is made in no time",
        Power.THROTTLE: "nobody counts calls",
    },
}


class Stand(ABC):
    """See the module. One stand lives through one story."""

    name: ClassVar[str]
    place: ClassVar[str]  # what a provider's name must tell
    kinds: ClassVar[tuple[str, ...]]  # what the pool can buy, in order of preference
    unknown_id: ClassVar[str]
    look_seconds: ClassVar[float]  # between two looks at a condition
    looking_seconds_max: ClassVar[float]

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.heard: list[tuple[str, str]] = []  # what `on_call` of every provider has said
        self.complaints: list[Any] = []  # what went wrong behind every caller's back
        self._providers: list[Provider] = []

    # --- a story -----------------------------------------------------------------------------------

    @abstractmethod
    def play(self, story: Story) -> None:
        """Live through a story, on the kind of loop that the place needs."""

    async def live(self, story: Story) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.complaints.append(context))
        try:
            await story(self)
        finally:
            self.heal()
            for provider in self._providers:
                await provider.close()
        assert {outcome for _, outcome in self.heard} <= HEARD
        assert self.complaints == []

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Returns once it holds. Raises TimeoutError."""
        now = asyncio.get_running_loop().time
        ends_at = now() + self.looking_seconds_max
        while not await condition():
            if now() > ends_at:
                raise TimeoutError(f"{self.name}: {condition.__qualname__} does not come to hold")
            await asyncio.sleep(self.look_seconds)

    # --- providers ---------------------------------------------------------------------------------

    async def provider(self, broker_id: str = BROKER_ID, **settings: Any) -> Provider:
        """One more provider object of this broker, open; earlier ones may live on or have crashed."""
        provider = self.unopened(broker_id, **settings)
        await provider.open()
        return provider

    def unopened(self, broker_id: str = BROKER_ID, *, pool: str = POOL, **settings: Any) -> Provider:
        """The same, not opened yet. Its only pool has these settings."""
        common = {
            "name_tag": NAME_TAG,
            "price_usd_per_hour": PRICE_USD_PER_HOUR,
            "max_lifetime": f"{LIFETIME_SECONDS:.0f}s",
        }
        provider = self._make(broker_id, {pool: self._pool(**{**common, **settings})})
        self._providers.append(provider)
        return provider

    def mistaken(self) -> Provider:
        """One whose pool asks for what is not to be had, not opened yet."""
        return self.unopened(**self._mistake())

    @abstractmethod
    def _make(self, broker_id: str, pools: Mapping[str, PoolSettings]) -> Provider: ...

    @abstractmethod
    def _pool(self, **settings: Any) -> PoolSettings: ...

    @abstractmethod
    def _mistake(self) -> dict[str, Any]: ...

    def _hear(self, api: str, outcome: str) -> None:
        self.heard.append((api, outcome))

    # --- the truth ---------------------------------------------------------------------------------

    @abstractmethod
    def living(self) -> set[str]:
        """The machines that somebody pays for at this moment, whoever launched them."""

    @abstractmethod
    async def kill(self, instance_id: str) -> None:
        """The machine ends without this broker's doing."""

    @abstractmethod
    async def delay_end(self, instance_id: str) -> None:
        """When the machine is terminated, it will shut down for a while first."""

    @abstractmethod
    async def launch_untagged(self, **its_tags: str) -> str:
        """A machine that no broker has launched. Its id."""

    # --- what happens, until `heal` ----------------------------------------------------------------

    @abstractmethod
    def heal(self) -> None:
        """Every mishap is over; calls that are held go on."""

    @abstractmethod
    def cut_off(self) -> None:
        """Nothing can be asked of the cloud."""

    @abstractmethod
    def refuse_capacity(self) -> None:
        """No new machine is to be had. What was launched before is not new."""

    @abstractmethod
    def forbid_launches(self) -> None:
        """A launch is refused for good."""

    @abstractmethod
    def hold_launches(self) -> None:
        """The next launch call stays under way until `heal`, whatever becomes of its caller."""

    @abstractmethod
    async def launch_is_held(self) -> None:
        """Returns when that call is under way."""

    def reach_quota(self) -> None:
        raise AssertionError(f"{self.name} cannot {Power.COUNT_QUOTA.value}")

    def forbid_all(self) -> None:
        raise AssertionError(f"{self.name} cannot {Power.FORBID.value}")

    def lose_answers_to_launches(self) -> None:
        raise AssertionError(f"{self.name} cannot {Power.LOSE_ANSWERS.value}")

    def lose_answers_to_terminates(self) -> None:
        raise AssertionError(f"{self.name} cannot {Power.LOSE_ANSWERS.value}")

    def lose_answers_to_stops(self) -> None:
        raise AssertionError(f"{self.name} cannot {Power.LOSE_ANSWERS.value}")

    def refuse_starts(self) -> None:
        raise AssertionError(f"{self.name} cannot {Power.STOP.value}")

    def stops_sent(self) -> int:
        raise AssertionError(f"{self.name} cannot {Power.STOP.value}")

    def fail_second_pages(self) -> None:
        raise AssertionError(f"{self.name} cannot {Power.PAGE.value}")

    def refuse_credentials(self) -> None:
        raise AssertionError(f"{self.name} cannot {Power.REFUSE_CREDENTIALS.value}")

    def throttle(self) -> None:
        raise AssertionError(f"{self.name} cannot {Power.THROTTLE.value}")


Story = Callable[[Stand], Coroutine[Any, Any, None]]


class Ec2Stand(Stand):
    """What the two stands of the EC2 provider share: the words in which EC2 refuses."""

    place = "us-east-1"
    kinds = EC2_KINDS
    unknown_id = UNKNOWN_EC2_ID

    def _make(self, broker_id: str, pools: Mapping[str, PoolSettings]) -> Ec2Provider:
        return Ec2Provider(
            broker_id,
            pools,
            region="us-east-1",
            profile=None,
            clock_wall=self._wall_unix,
            client_factory=self._client_factory(broker_id),
            on_call=self._hear,
        )

    def _pool(self, **settings: Any) -> PoolSettings:
        return ec2_pool(**{"instance_types": list(EC2_KINDS), **settings})

    def _mistake(self) -> dict[str, Any]:
        return {"instance_types": ["c7i.enormous"]}

    def forbid_launches(self) -> None:
        self._refuse("RunInstances", "UnauthorizedOperation")

    def reach_quota(self) -> None:
        self._refuse("RunInstances", "MaxSpotInstanceCountExceeded")

    def refuse_starts(self) -> None:
        self._refuse("StartInstances", "InsufficientInstanceCapacity")

    def forbid_all(self) -> None:
        self._refuse(EVERY_API, "UnauthorizedOperation")

    def refuse_credentials(self) -> None:
        self._refuse(EVERY_API, "RequestExpired")

    def throttle(self) -> None:
        self._refuse(EVERY_API, "RequestLimitExceeded")

    async def delay_end(self, instance_id: str) -> None:
        """EC2's machines do so anyway."""

    @abstractmethod
    def _wall_unix(self) -> float: ...

    @abstractmethod
    def _client_factory(self, broker_id: str) -> ClientFactory | None: ...

    @abstractmethod
    def _refuse(self, api: str, code: str) -> None: ...


class SimulatedStand(Ec2Stand):
    """The EC2 provider on a cloud in memory."""

    name = "simulated"
    look_seconds = 1.0
    looking_seconds_max = VIRTUAL_SECONDS_MAX
    sim: SimEC2

    def play(self, story: Story) -> None:
        run_virtual(self._on_its_loop(story))

    async def _on_its_loop(self, story: Story) -> None:
        now, weather = asyncio.get_running_loop().time, steady(page_items_max=MACHINES_PER_PAGE)
        self.sim = SimEC2(random.Random(1), now, self._wall_unix, weather)
        self.sim.allow_adoption(NAME_TAG)
        await self.live(story)
        assert not self.sim.violations

    def _wall_unix(self) -> float:
        return EPOCH_UNIX + asyncio.get_running_loop().time()

    def _client_factory(self, broker_id: str) -> ClientFactory:
        return self.sim.factory_of(broker_id)

    def living(self) -> set[str]:
        return {one.id for one in self.sim.alive(owner=None)}

    async def kill(self, instance_id: str) -> None:
        self.sim.end_by_operator(instance_id)

    async def launch_untagged(self, **its_tags: str) -> str:
        return self.sim.launch_stranger(its_tags).id

    def heal(self) -> None:
        self.sim.heal(self.sim.weather)

    def cut_off(self) -> None:
        self.sim.befall(EVERY_API, Fault.REQUEST_LOST, times=LASTING, ending=Ending.UNREACHABLE)

    def refuse_capacity(self) -> None:
        for kind in EC2_KINDS:
            self.sim.run_dry(kind, seconds=inf)

    def hold_launches(self) -> None:
        self.sim.befall("RunInstances", Fault.REQUEST_LATE, seconds=10.0)

    async def launch_is_held(self) -> None:
        await asyncio.sleep(1.0)

    def lose_answers_to_launches(self) -> None:
        self.sim.befall("RunInstances", Fault.ANSWER_LOST, ending=Ending.RESET)

    def lose_answers_to_terminates(self) -> None:
        self.sim.befall("TerminateInstances", Fault.ANSWER_LOST, times=LASTING, ending=Ending.RESET)

    def lose_answers_to_stops(self) -> None:
        self.sim.befall("StopInstances", Fault.ANSWER_LOST, times=LASTING, ending=Ending.RESET)

    def stops_sent(self) -> int:
        return self.sim.calls["StopInstances"]

    def fail_second_pages(self) -> None:
        self.sim.befall("DescribeInstances", Fault.PAGE_FAILED, times=LASTING)

    def _refuse(self, api: str, code: str) -> None:
        self.sim.refuse(api, code, times=LASTING)


class MotoStand(Ec2Stand):
    """The EC2 provider with the real SDK. The environment leads to the proxy and nowhere else."""

    name = "ec2"
    look_seconds = 0.01
    looking_seconds_max = REAL_SECONDS_MAX

    def __init__(self, directory: Path, server: MotoServer, proxy: FaultProxy) -> None:
        super().__init__(directory)
        self._server, self._proxy = server, proxy
        proxy.limit_page_size(MACHINES_PER_PAGE)
        self._behave()

    def _behave(self) -> None:
        """As EC2 does on a good day, and moto does not: a machine is pending first and shuts down before it
        is terminated, and what does not exist cannot be tagged."""
        self._proxy.after_launch(pending=1)
        self._proxy.after_terminate(shutting_down=2)
        unknown = {"ResourceId.1": self.unknown_id}
        self._proxy.refuse("CreateTags", "InvalidInstanceID.NotFound", LASTING, match=unknown)

    def play(self, story: Story) -> None:
        asyncio.run(self.live(story))

    def _wall_unix(self) -> float:
        return EPOCH_UNIX

    def _client_factory(self, broker_id: str) -> None:
        return None  # the SDK's own

    def living(self) -> set[str]:
        return {one.instance_id for one in self._proxy.truth() if one.state == "running"}

    async def kill(self, instance_id: str) -> None:
        self._proxy.reclaim(instance_id)

    async def launch_untagged(self, **its_tags: str) -> str:
        parameters = {"ImageId": "ami-1", "InstanceType": "c7i.large", "MinCount": "1", "MaxCount": "1"}
        for number, (key, value) in enumerate(its_tags.items(), 1):
            tag = f"TagSpecification.1.Tag.{number}"
            parameters |= {"TagSpecification.1.ResourceType": "instance"}
            parameters |= {f"{tag}.Key": key, f"{tag}.Value": value}
        root = self._server.call("RunInstances", parameters)
        return ec2_wire.text_of(root, "instancesSet", "item", "instanceId")

    def heal(self) -> None:
        self._proxy.heal()
        self._behave()

    def cut_off(self) -> None:
        self._proxy.reset(EVERY_ACTION, LASTING)

    def refuse_capacity(self) -> None:
        """EC2 looks at the token before it looks for capacity."""
        known = {one.client_token for one in self._proxy.truth()}
        self._proxy.refuse(
            "RunInstances",
            "InsufficientInstanceCapacity",
            LASTING,
            match=lambda call: call.params["ClientToken"] not in known,
        )

    def hold_launches(self) -> None:
        self._stall = self._proxy.stall("RunInstances")

    async def launch_is_held(self) -> None:
        await asyncio.to_thread(self._stall.wait_hit)

    def lose_answers_to_launches(self) -> None:
        self._proxy.lose_answer("RunInstances")

    def lose_answers_to_terminates(self) -> None:
        self._proxy.lose_answer("TerminateInstances", LASTING)

    def lose_answers_to_stops(self) -> None:
        self._proxy.lose_answer("StopInstances", LASTING)

    def stops_sent(self) -> int:
        return len(self._proxy.calls_of("StopInstances"))

    def fail_second_pages(self) -> None:
        self._proxy.fail_page(2, times=LASTING)

    def _refuse(self, api: str, code: str) -> None:
        self._proxy.refuse(api, code, LASTING)


class LocalStand(Stand):
    """The local provider and the processes that it starts, all of them children of this one."""

    name = place = "local"
    kinds = ("local",)
    unknown_id = "local-0123456789abcdef0"
    look_seconds = 0.01
    looking_seconds_max = REAL_SECONDS_MAX

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._children_before = self._children()
        self._folder = directory / "local"
        self._folder_away = directory / "local.away"
        self._records = Records(self._folder.resolve())
        self._worker = directory / "worker"
        self._worker.write_text("#!/bin/sh\nexec sleep 600\n")
        self._port_taken: socket.socket | None = None
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._port: int = server.getsockname()[1]
        self._clock_reached, self._clock_free = threading.Event(), threading.Event()
        self.heal()

    def play(self, story: Story) -> None:
        asyncio.run(self.live(story))

    def end(self) -> None:
        """Nothing that was started here outlives the test."""
        for pid in self._children() - self._children_before:
            os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _make(self, broker_id: str, pools: Mapping[str, PoolSettings]) -> LocalProvider:
        return LocalProvider(
            broker_id,
            pools,
            self.directory,
            self._wall_unix,
            self._hear,
            terminate_grace_seconds=TERMINATE_GRACE_SECONDS,
        )

    def _pool(self, **settings: Any) -> PoolSettings:
        recipe = {"command": [str(self._worker)], "worker_port": self._port, **settings}
        return parse({"pool": {POOL: recipe}}, {}).pool[POOL]

    def _mistake(self) -> dict[str, Any]:
        return {"command": ["no-such-program"]}

    def _wall_unix(self) -> float:
        """A launch looks at the clock when it writes its record: there it can be held."""
        self._clock_reached.set()
        assert self._clock_free.wait(REAL_SECONDS_MAX), "the test has forgotten to heal"
        return EPOCH_UNIX

    def living(self) -> set[str]:
        """By the process table; a process without a record would show, too."""
        records = [self._records.read(instance_id) for instance_id in self._records.ids()]
        named = {record.pid: record.id for record in records if record is not None}
        pids = {pid for pid in self._children() - self._children_before if running(pid)}
        return {named.get(pid, f"process {pid}") for pid in pids}

    async def kill(self, instance_id: str) -> None:
        os.kill(self._pid_of(instance_id), signal.SIGKILL)

        async def dead() -> bool:
            return instance_id not in self.living()

        await self.until(dead)

    async def delay_end(self, instance_id: str) -> None:
        """A stopped process keeps SIGTERM waiting, and not SIGKILL."""
        process = psutil.Process(self._pid_of(instance_id))
        process.suspend()

        async def stopped() -> bool:
            return process.status() == psutil.STATUS_STOPPED

        await self.until(stopped)

    async def launch_untagged(self, **its_tags: str) -> str:
        provider = await self.provider()
        order = an_order(provider, "untagged")
        recipe = {**json.loads(order.parameters), "tags": its_tags}
        return (await launch_one(provider, replace(order, parameters=json.dumps(recipe)))).id

    def heal(self) -> None:
        self._clock_free.set()
        self._worker.chmod(0o755)
        if self._port_taken is not None:
            self._port_taken.close()
            self._port_taken = None
        if self._folder_away.exists():
            self._folder.unlink()
            self._folder_away.rename(self._folder)

    def cut_off(self) -> None:
        """In place of the folder there is something that cannot be read as one, not even by root."""
        self._folder.mkdir(exist_ok=True)
        self._folder.rename(self._folder_away)
        self._folder.touch()

    def refuse_capacity(self) -> None:
        self._port_taken = socket.create_server(("0.0.0.0", self._port))

    def forbid_launches(self) -> None:
        self._worker.chmod(0o644)

    def hold_launches(self) -> None:
        self._clock_reached.clear()
        self._clock_free.clear()

    async def launch_is_held(self) -> None:
        assert await asyncio.to_thread(self._clock_reached.wait, REAL_SECONDS_MAX)

    def _pid_of(self, instance_id: str) -> int:
        record = self._records.read(instance_id)
        assert record is not None
        assert record.pid is not None
        return record.pid

    @staticmethod
    def _children() -> set[int]:
        return {child.pid for child in psutil.Process().children()}


# --- what tests say ----------------------------------------------------------------------------------------


def holds_where(*powers: Power) -> Callable[[Story], Callable[..., None]]:
    """A promise of the port, tried on every stand with these powers; elsewhere skipped, with the reason."""

    def tried(story: Story) -> Callable[..., None]:
        @pytest.mark.parametrize("stand", [_stand(name, powers) for name in LACKS], indirect=True)
        @wraps(story)
        def test(stand: Stand) -> None:
            stand.play(story)

        return test

    return tried


holds_everywhere = holds_where()


def _stand(name: str, powers: Sequence[Power]) -> Any:
    reasons = [f"{name} cannot {one.value}: {LACKS[name][one]}" for one in powers if one in LACKS[name]]
    return pytest.param(name, marks=[pytest.mark.skip(reason="; ".join(reasons))] if reasons else [])


def an_order(provider: Provider, order_id: str = "order-1", *, created_unix: float = EPOCH_UNIX) -> Order:
    return provider.prepare(POOL, order_id, [provider.offerings(POOL)[0]], created_unix)


def identity_of(order: Order) -> Identity:
    """What the tags of this order's machine must say."""
    return Identity(BROKER_ID, order.pool, order.id, order.created_unix + LIFETIME_SECONDS)
