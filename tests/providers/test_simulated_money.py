"""What the broker believes of its bill, held against what the simulated cloud really bills.

The bracket of every machine holds the truth, whatever breaks in between: kills, outages, stale listings, a
wall clock that jumps by a day.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from broker.core.ledger import Bracket
from broker.core.settings import Settings, parse
from broker.ledger import Ledger
from broker.providers.sim_weather import STORM, Weather, swarm
from broker.providers.simulated import Machine, SimEC2
from broker.simulation.host import Host
from broker.testing import EPOCH_UNIX, Client, LoopClock, run_virtual
from tests.providers.simulated_support import steady

DAY_SECONDS = 86_400.0
SLACK_SECONDS = 1e-3  # floating point, at moments near 1.8e9


def settings(**more: Any) -> Settings:
    broker = {"id": "lab", "budget_usd_per_day": more.pop("budget_of_all", None)}
    recipe = {"provider": "ec2", "image": "ami-1", "instance_types": ["c7i.large", "c6i.large"], **more}
    return parse({"broker": broker, "pool": {"default": recipe}}, {})


@dataclass
class Lab:
    """A broker that can be killed, on a cloud that knows the truth."""

    sim: SimEC2
    host: Host
    clock: LoopClock
    widths: list[float] = field(default_factory=list)

    async def ask(self, line: str) -> str | None:
        """None when the broker does not live, or dies over it."""
        client = self.host.open("10.0.0.9")
        if client is None:
            return None
        try:
            return await self._exchange(client, line)
        finally:
            client.vanish()

    async def _exchange(self, client: Client, line: str) -> str | None:
        with self.host.inside():
            client.send(line.encode() + b"\n")
        return await client.reply()

    @property
    def ledger(self) -> Ledger:
        assert self.host.now is not None
        assert self.host.now.daemon is not None
        return self.host.now.daemon.ledger

    async def restart(self, down_seconds: float = 0.0) -> None:
        self.host.kill()
        await asyncio.sleep(down_seconds)
        await self.start()

    async def start(self) -> None:
        self.host.start()
        await asyncio.sleep(5.0)  # time to look at the cloud

    def ours(self) -> list[Machine]:
        return [machine for machine in self.sim.truth() if machine.owner == "broker"]

    def billed(self) -> Bracket:
        """The bracket of the only machine."""
        (bracket,) = self.ledger.billed_seconds().values()
        return bracket

    def check(self) -> None:
        """Every machine that the broker has ever seen is billed and charged as it says."""
        now = asyncio.get_running_loop().time()
        runs = self.ledger.runs()
        for machine in self.ours():
            run = runs.get(machine.id)
            if run is None:
                continue  # launched a moment ago, and no answer or listing has said so
            at_unix = EPOCH_UNIX + now + SLACK_SECONDS
            facts = f"{run} {machine.steps} {machine.reason}"
            assert _holds(run.billed_seconds(at_unix), machine.billed_seconds(now)), facts
            assert _holds(run.charged_seconds(at_unix), machine.charged_seconds(now)), facts
            cost = run.price_usd_micros_per_hour * machine.charged_seconds(now) / 3600
            assert run.cost_usd_micros_max(at_unix) >= cost - 1, facts
            if run.ended_by_unix is not None:
                self.widths.append(run.billed_seconds(at_unix).width)


def _holds(bracket: Bracket, truth: float) -> bool:
    return bracket.low - SLACK_SECONDS <= truth <= bracket.high + SLACK_SECONDS


Story = Callable[[Lab], Awaitable[None]]


def play(story: Story, state_dir: Path, weather: Weather | None = None, *, seed: int = 1, **more: Any) -> Lab:
    async def main() -> Lab:
        loop = asyncio.get_running_loop()
        clock = LoopClock(loop)
        sim = SimEC2(random.Random(seed), loop.time, lambda: EPOCH_UNIX + loop.time(), weather or steady())
        host = Host(
            settings(**more),
            state_dir,
            clock,
            sim.client_factory,
            sim.connect,
            heard=lambda event: None,
            asked=lambda method, parameters: None,
        )
        lab = Lab(sim, host, clock)
        await lab.start()
        await story(lab)
        await host.terminate()
        return lab

    return run_virtual(main())


# --- the bracket ---------------------------------------------------------------------------------------


def test_the_bill_of_an_undisturbed_machine_is_known_to_its_boot_and_the_looks_at_it(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        address = await lab.ask("GET_WORKER client=a")
        await asyncio.sleep(600)
        lab.check()
        await lab.ask(f"RELEASE {address} client=a")
        await asyncio.sleep(60)
        lab.check()
        assert lab.billed().width < 10 + 6 + 3, (
            "the boot, a look, and the seconds that Date and reason cut off"
        )

    play(story, tmp_path)


def test_a_listing_that_is_a_minute_old_proves_nothing_of_that_minute(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        asking = asyncio.create_task(lab.ask("GET_WORKER client=a"))
        await asyncio.sleep(101.0)  # it has begun to run, and the listings show it pending for a while
        await _check_in_old_light(lab)
        assert not str(await asking).startswith("ERROR")
        await asyncio.sleep(200)
        lab.sim.shut_down(lab.ours()[0].id)  # and now they show it running
        await _check_in_old_light(lab)
        assert lab.sim.faults["stale listing"]
        assert lab.billed().width < 250

    play(story, tmp_path, steady(pending_seconds=(100.0, 100.0)))


async def _check_in_old_light(lab: Lab) -> None:
    lab.sim.lag(59.0, listings=1000)
    for _ in range(11):
        await asyncio.sleep(5)
        lab.check()
    lab.sim.heal()
    for _ in range(10):
        await asyncio.sleep(20)
        lab.check()


def test_a_crash_widens_nothing_for_a_machine_that_is_seen_again(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        address = await lab.ask("GET_WORKER client=a")
        await asyncio.sleep(100)
        await lab.restart(down_seconds=500)
        await lab.ask(f"RELEASE {address} client=a")
        await asyncio.sleep(60)
        lab.check()
        assert lab.billed().width < 19

    play(story, tmp_path)


def test_a_machine_that_ends_while_the_broker_is_down_costs_until_ec2_says_or_somebody_looks(
    tmp_path: Path,
) -> None:
    async def story(lab: Lab, how: Callable[[str], None], width_max: float) -> None:
        await lab.ask("GET_WORKER client=a")
        await asyncio.sleep(1000)
        lab.host.kill()
        await asyncio.sleep(100)
        how(lab.ours()[0].id)
        await asyncio.sleep(900)
        await lab.start()
        lab.check()
        assert lab.billed().width < width_max

    play(lambda lab: story(lab, lab.sim.end_by_operator, 19), tmp_path / "named")
    play(lambda lab: story(lab, lab.sim.shut_down, 1000 + 300 + 60 + 19), tmp_path / "silent")


def test_a_machine_that_ec2_has_forgotten_meanwhile_is_not_billed_for_ever(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        await lab.ask("GET_WORKER client=a")
        await asyncio.sleep(100)
        lab.host.kill()
        lab.sim.end_by_operator(lab.ours()[0].id)
        await asyncio.sleep(4 * 3600)
        await lab.start()
        assert lab.billed().high > 4 * 3600
        await asyncio.sleep(3600)
        lab.check()
        high = lab.billed().high
        await asyncio.sleep(3600)
        assert lab.billed().high == high < 4 * 3600 + 200

    play(story, tmp_path)


@pytest.mark.parametrize("days", [1, -1])
def test_a_wall_clock_that_jumps_by_a_day_bills_no_day_and_loses_none(days: int, tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        address = await lab.ask("GET_WORKER client=a")
        for jump in (days, 0, -days):
            lab.clock.jump(jump * DAY_SECONDS)
            await asyncio.sleep(300)
            lab.check()
            assert lab.billed().width < 100
            await lab.restart(20)
            lab.check()
            assert lab.billed().width < 100
            await lab.ask(f"PING {address} client=a")
        lab.clock.jump(days * DAY_SECONDS)
        await lab.ask(f"RELEASE {address} client=a")
        await asyncio.sleep(60)
        lab.check()
        assert lab.billed().width < 19

    play(story, tmp_path)


def test_a_reclaim_within_the_first_hour_is_free_and_a_later_one_is_not(tmp_path: Path) -> None:
    async def story(lab: Lab, after_seconds: float, free: bool) -> None:
        address = await lab.ask("GET_WORKER client=a")
        for _ in range(int(after_seconds / 300)):
            await asyncio.sleep(300)
            await lab.ask(f"PING {address} client=a")
        lab.sim.reclaim(lab.ours()[0].id, notice_seconds=None)
        await asyncio.sleep(60)
        lab.check()
        assert (lab.ledger.cost_usd_micros_today("default") == 0) is free
        await lab.restart()
        lab.check()
        assert (lab.ledger.cost_usd_micros_today("default") == 0) is free

    play(lambda lab: story(lab, 1800, True), tmp_path / "early")
    play(lambda lab: story(lab, 7200, False), tmp_path / "late")


@pytest.mark.parametrize("seed", range(12))
def test_in_any_weather_and_however_often_the_broker_dies_the_truth_is_in_the_bracket(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)

    async def client(lab: Lab, name: str) -> None:
        for _ in range(3):
            await asyncio.sleep(rng.uniform(1, 3600))
            try:
                async with asyncio.timeout(900):
                    address = await lab.ask(f"GET_WORKER client={name} exclusive=yes")
            except TimeoutError:
                continue
            await asyncio.sleep(rng.uniform(0, 1800))
            if address and not address.startswith("ERROR"):
                await lab.ask(f"RELEASE {address} client={name}")

    async def accidents(lab: Lab) -> None:
        while True:
            await asyncio.sleep(rng.uniform(5, 2400))
            lab.clock.jump(rng.choice((0, DAY_SECONDS, -DAY_SECONDS)))
            await lab.restart(rng.choice((0.0, 10.0, 600.0)))

    async def looks(lab: Lab) -> None:
        while True:
            await asyncio.sleep(rng.uniform(1, 300))
            if lab.host.running and lab.ledger._context.clouds.recovered():
                lab.check()

    async def story(lab: Lab) -> None:
        others = [asyncio.create_task(accidents(lab)), asyncio.create_task(looks(lab))]
        await asyncio.gather(*(client(lab, f"c{n}") for n in range(3)))
        for task in others:
            assert not task.done(), task.result()
            task.cancel()
        lab.sim.heal()
        if not lab.host.running:
            await lab.start()
        await asyncio.sleep(3600)
        lab.check()

    lab = play(story, tmp_path, swarm(rng, STORM), seed=seed)
    assert len(lab.ours()) > 0
    assert lab.widths


# --- budgets -------------------------------------------------------------------------------------------

DAY_ENDS_SECONDS = DAY_SECONDS - EPOCH_UNIX % DAY_SECONDS


async def work(lab: Lab, seconds: float) -> str:
    """A client that uses a worker for so long, and gives it back."""
    address = await lab.ask("GET_WORKER client=a")
    for _ in range(int(seconds // 100)):
        await asyncio.sleep(100)
        assert await lab.ask(f"PING {address} client=a") == "OK"
    return str(address)


def test_a_spent_budget_stays_spent_over_restarts_until_midnight(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        address = await work(lab, 1000)
        await lab.ask(f"RELEASE {address} client=a")
        await asyncio.sleep(120)
        for _ in range(3):
            refusal = str(await lab.ask("GET_WORKER client=a"))
            assert refusal.endswith("[BUDGET]")
            assert "the pool's budget_usd_per_day = $1.00 is reached: $1.1" in refusal
            await lab.restart(down_seconds=3 * 3600)
        assert len(lab.sim.truth()) == 1
        await asyncio.sleep(DAY_ENDS_SECONDS - asyncio.get_running_loop().time())
        assert not str(await lab.ask("GET_WORKER client=a")).startswith("ERROR")

    play(story, tmp_path, price_usd_per_hour=4.0, budget_usd_per_day=1.0)


def test_with_the_money_spent_busy_workers_live_and_warm_ones_are_handed_out(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        address = await work(lab, 2000)
        assert lab.ledger.cost_usd_micros_today("default") > 2_000_000
        assert await lab.ask("GET_WORKER client=b") == address
        assert len(lab.sim.alive()) == 1
        assert len(lab.sim.truth()) == 1

    play(story, tmp_path, price_usd_per_hour=4.0, budget_usd_per_day=1.0)


def test_who_waits_behind_a_spent_budget_hears_of_it(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        await work(lab, 1000)
        refusal = str(await lab.ask("GET_WORKER client=b wait=60"))
        assert "budget_usd_per_day" in refusal
        assert refusal.endswith("[TIMEOUT]"), "the busy worker might have become free"

    play(story, tmp_path, price_usd_per_hour=4.0, budget_usd_per_day=1.0, sharing="exclusive")


@pytest.mark.parametrize("whose", ["budget_usd_per_day", "budget_of_all"])
def test_machines_on_order_are_counted_before_they_cost_anything(whose: str, tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        asking = [asyncio.create_task(lab.ask(f"GET_WORKER client=c{n} wait=100")) for n in range(8)]
        await asyncio.sleep(50)
        late = str(await lab.ask("GET_WORKER client=late wait=10"))
        await asyncio.gather(*asking)
        assert len(lab.sim.truth()) == 3, "the third goes beyond the limit, so there is no fourth"
        assert "budget_usd_per_day = $2.50 is reached" in late, "more wait before it than machines come"

    more: dict[str, Any] = {whose: 2.5}
    boots = steady(pending_seconds=(200.0, 200.0))
    play(story, tmp_path, boots, price_usd_per_hour=1.0, sharing="exclusive", max_workers=8, **more)


@pytest.mark.parametrize("killed_after_seconds", [0.01, 0.15, 0.25, 1.0])
def test_an_order_under_way_is_counted_after_a_kill(killed_after_seconds: float, tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        asking = asyncio.create_task(lab.ask("GET_WORKER client=a"))
        await asyncio.sleep(killed_after_seconds)
        await lab.restart()
        await asking
        asking = asyncio.create_task(lab.ask("GET_WORKER client=b"))
        await asyncio.sleep(1)  # b is first in the queue
        assert "budget_usd_per_day" in str(await lab.ask("GET_WORKER client=c wait=100"))
        assert not str(await asking).startswith("ERROR"), "it gets the machine that was under way"
        assert len(lab.sim.truth()) == 1

    boots = steady(pending_seconds=(200.0, 200.0))
    play(story, tmp_path, boots, price_usd_per_hour=1.0, budget_usd_per_day=0.5, sharing="exclusive")


def test_without_a_price_the_budget_counts_with_the_list_price(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        await lab.ask("GET_WORKER client=a")
        status = str(await lab.ask("STATUS"))
        assert '"price_assumed": true' in status
        (run,) = lab.ledger.runs().values()
        assert (run.price_usd_micros_per_hour, run.price_assumed) == (89_250, True)

    play(story, tmp_path)
