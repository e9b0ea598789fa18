"""A whole broker on the simulated EC2: the first thing that a simulation of it has to be able to do."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.core.claim import BEAT_SECONDS, STALE_SECONDS
from broker.core.settings import Settings, parse
from broker.daemon import Daemon
from broker.providers.ec2 import Ec2Provider
from broker.providers.sim_weather import STORM, swarm
from broker.providers.simulated import EVERY_API, Fault, SimEC2, Weather
from broker.testing import EPOCH_UNIX, Client, LoopClock, run_virtual, silent_log
from tests.providers.simulated_support import steady

LOOKS_MAX = 50_000  # at the clock, without time going on: somebody spins


class WatchedClock(LoopClock):
    """Notices when virtual time stands still because a loop of the broker's never waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._looks, self._at = 0, -1.0

    def monotonic(self) -> float:
        now = super().monotonic()
        self._looks = self._looks + 1 if now == self._at else 0
        self._at = now
        assert self._looks < LOOKS_MAX, f"the broker spins at {now}"
        return now


def settings(**more: Any) -> Settings:
    recipe = {"provider": "ec2", "image": "ami-1", "instance_types": ["c7i.large", "c6i.large"], **more}
    return parse({"broker": {"id": "lab"}, "pool": {"default": recipe}}, {})


@asynccontextmanager
async def a_broker(
    sim: SimEC2, chosen: Settings, state_dir: Path, owner: str = "host"
) -> AsyncIterator[Daemon]:
    """A real Daemon that buys from the simulated EC2."""
    clock = WatchedClock(asyncio.get_running_loop())
    provider = Ec2Provider(
        "lab",
        chosen.pool,
        region="us-east-1",
        profile=None,
        clock_wall=clock.wall,
        client_factory=sim.client_factory,
    )
    numbers = itertools.count(1)
    daemon = Daemon(
        chosen,
        state_dir=state_dir,
        clock=clock,
        log=silent_log(),
        environ={},
        providers=lambda *_: dict.fromkeys(chosen.pool, (provider,)),
        connect=sim.connect,
        store_threaded=False,
        ports=False,
        new_id=lambda: f"{owner}-{clock.monotonic():.6f}-{next(numbers)}",
        owner_of=lambda directory: owner,
    )
    stop = asyncio.Event()
    running = asyncio.create_task(daemon.run(stop))
    try:
        yield daemon
    finally:
        stop.set()
        await running


def live(
    state_dir: Path,
    story: Callable[[SimEC2, Daemon], Awaitable[None]],
    weather: Weather,
    *,
    seed: int = 1,
    **more: Any,
) -> SimEC2:
    async def main() -> SimEC2:
        loop = asyncio.get_running_loop()
        sim = SimEC2(random.Random(seed), loop.time, lambda: EPOCH_UNIX + loop.time(), weather)
        async with a_broker(sim, settings(**more), state_dir) as daemon:
            await story(sim, daemon)
        return sim

    return run_virtual(main())


async def ask(daemon: Daemon, line: str) -> str:
    client = Client(daemon.server)
    try:
        return await client.ask(line)
    finally:
        client.vanish()


def test_an_address_that_is_handed_out_is_a_running_machines_and_an_idle_one_ends(tmp_path: Path) -> None:
    async def story(sim: SimEC2, daemon: Daemon) -> None:
        address = await ask(daemon, "GET_WORKER client=a")
        machine = sim.holder(address)
        assert machine is not None
        assert machine.owner == "broker"
        assert sim.accepts(address, 2560)
        await asyncio.sleep(3600)
        assert sim.alive() == []
        assert machine.ended_by == "broker"
        assert 900 < sim.billed_seconds(machine.id) < 1000

    sim = live(tmp_path, story, steady())
    assert len(sim.truth()) == 1


def test_a_launch_whose_answer_is_lost_is_one_machine(tmp_path: Path) -> None:
    async def story(sim: SimEC2, daemon: Daemon) -> None:
        sim.befall("RunInstances", Fault.ANSWER_LOST, times=3)
        address = await ask(daemon, "GET_WORKER client=a")
        assert sim.holder(address) is sim.alive()[0]

    assert len(live(tmp_path, story, steady()).truth()) == 1


def test_a_terminate_that_fails_when_it_is_sent_again_keeps_no_loop_spinning(tmp_path: Path) -> None:
    async def story(sim: SimEC2, daemon: Daemon) -> None:
        address = await ask(daemon, "GET_WORKER client=a")
        await ask(daemon, f"RELEASE {address} client=a")
        await asyncio.sleep(60)
        assert sim.alive() == []  # and shutting down for hours, so Terminate is sent again
        for _ in range(5):
            sim.befall("TerminateInstances", Fault.THROTTLED, times=2)
            await asyncio.sleep(300)
        assert sim.calls["TerminateInstances"] > 10

    weather = steady(stuck_shutting_down=1.0, stuck_shutting_down_seconds=(7200, 7200))
    live(tmp_path, story, weather)


@pytest.mark.parametrize("seed", range(3))
def test_after_a_stormy_day_the_broker_comes_to_rest_and_has_touched_nobody_elses_machine(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)

    async def client(sim: SimEC2, daemon: Daemon, name: str) -> None:
        for _ in range(4):
            await asyncio.sleep(rng.uniform(60, 7200))
            address = await ask(daemon, f"GET_WORKER client={name}")
            if address.startswith("ERROR"):
                continue
            for _ in range(rng.randrange(10)):
                await asyncio.sleep(60)
                await ask(daemon, f"PING {address} client={name}")
            await ask(daemon, f"RELEASE {address} client={name}")

    async def story(sim: SimEC2, daemon: Daemon) -> None:
        await asyncio.gather(*(client(sim, daemon, f"c{n}") for n in range(4)))
        assert sim.faults
        sim.heal()
        await asyncio.sleep(7200)
        assert sim.alive() == []
        assert len(daemon.context.registry) == 0
        assert "ERROR" not in await ask(daemon, "GET_WORKER client=a")

    sim = live(tmp_path, story, swarm(rng, STORM), seed=seed)
    assert sim.violations == []
    assert sim.calls["RunInstances"] + sim.calls["CreateFleet"] > 0


def test_a_broker_waits_out_an_outage_and_finds_its_workers_again(tmp_path: Path) -> None:
    async def story(sim: SimEC2, daemon: Daemon) -> None:
        address = await ask(daemon, "GET_WORKER client=a")
        sim.begin_outage(8 * 3600)
        for _ in range(8 * 60):
            await asyncio.sleep(60)
            assert await ask(daemon, f"PING {address} client=a") == "OK"
        assert "[CLOUD]" in await ask(daemon, "GET_WORKER client=b wait=60")
        await asyncio.sleep(600)
        assert await ask(daemon, "GET_WORKER client=b") != address

    sim = live(tmp_path, story, steady(), sharing="exclusive", max_lifetime="24h")
    assert sim.faults[str(Fault.OUTAGE)] > 100
    assert EVERY_API not in sim.calls


# --- two brokers with one id, on two hosts ------------------------------------------------------------------


def read_only(daemon: Daemon) -> bool:
    return bool(daemon.context.clouds.read_only())


@pytest.mark.parametrize("weather", [steady(), STORM], ids=["steady", "storm"])
def test_a_second_broker_stands_by_takes_over_and_ends_what_the_first_one_left(
    weather: Weather, tmp_path: Path
) -> None:
    async def stand_by(first: Daemon, second: Daemon) -> None:
        """Two hours in which somebody uses the first one, and asks the second one in vain."""
        for _ in range(120):
            await ask(first, "GET_WORKER client=ann wait=300")
            assert read_only(second)
            assert not read_only(first)
            assert (await ask(second, "GET_WORKER client=ben")).endswith("[DENIED]")
            await asyncio.sleep(60)

    async def main() -> SimEC2:
        loop = asyncio.get_running_loop()
        sim = SimEC2(random.Random(7), loop.time, lambda: EPOCH_UNIX + loop.time(), steady())
        async with AsyncExitStack() as hosts:
            async with a_broker(sim, settings(), tmp_path / "a", "a") as first:
                await ask(first, "GET_WORKER client=ann")
                second = await hosts.enter_async_context(a_broker(sim, settings(), tmp_path / "b", "b"))
                await asyncio.sleep(60)
                sim.weather = weather
                await stand_by(first, second)
                sim.heal(steady())
                await ask(first, "GET_WORKER client=ann")
            died_at = loop.time()
            while read_only(second):
                await asyncio.sleep(10)
            assert STALE_SECONDS - BEAT_SECONDS - 60 < loop.time() - died_at < STALE_SECONDS + 60
            assert sim.alive() != []
            await asyncio.sleep(1200)
            assert sim.alive() == []
        return sim

    sim = run_virtual(main())
    assert sim.violations == []


@pytest.mark.parametrize("seed", range(3))
def test_two_brokers_that_start_at_once_in_a_storm_end_up_with_one_in_charge(
    seed: int, tmp_path: Path
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        weather = swarm(random.Random(seed), STORM)
        sim = SimEC2(random.Random(seed), loop.time, lambda: EPOCH_UNIX + loop.time(), weather)
        first, second = (a_broker(sim, settings(), tmp_path / name, name) for name in "ab")
        async with first as a, second as b:
            for _ in range(30):
                await asyncio.gather(ask(a, "GET_WORKER wait=60"), ask(b, "GET_WORKER wait=60"))
                await asyncio.sleep(60)
            sim.heal()
            for _ in range(40):
                await asyncio.gather(ask(a, "GET_WORKER wait=60"), ask(b, "GET_WORKER wait=60"))
                await asyncio.sleep(60)
            assert sorted(map(read_only, (a, b))) == [False, True]
            assert len(sim.alive()) == 1

    run_virtual(main())
