"""Plays one history: the real broker in virtual time, its clients, its operator, its accidents.

When the hours are over all faults stop and everybody goes home. Then the system must come to rest: within
REST_SECONDS nothing runs, the books and the store are empty, and a last client is served as on the first day.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from broker.core.claim import STALE_SECONDS
from broker.core.ledger import Run, machine_of
from broker.providers.sim_machine import Machine
from broker.providers.simulated import BROKER
from broker.simulation.accidents import Accidents
from broker.simulation.clients import Clients
from broker.simulation.history import (
    HOUR_SECONDS,
    BrokenImage,
    Crash,
    Crowd,
    DiskFull,
    Entry,
    History,
    Idlers,
    Noise,
    Operator,
    Outage,
    Protect,
    Reload,
    Scarcity,
    SecondHost,
    SilentPort,
    Stop,
    Visit,
    WallJump,
)
from broker.simulation.host import TORN
from broker.simulation.referee import Violation
from broker.simulation.world import World
from broker.testing import VirtualTimeLoop, run_virtual

REST_SLACK_SECONDS = 900.0  # beyond idle timeout and boot deadline: shutting down, a Terminate sent again
# Until the last client is served: a breaker may pause launches for four hours, a budget for a day.
RECOVERY_SECONDS = 5 * HOUR_SECONDS
BUDGET_SECONDS = 25 * HOUR_SECONDS
LOOK_SECONDS = 30.0
AGAIN_SECONDS = 600.0  # between two tries of the last client
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (scratch space that no disk slows down, where there is any)


AfterRound = Callable[["Stage", int], None]


@dataclass(slots=True)
class Outcome:
    """What one history came to. Costs are the cloud's own; idle is what ran while no client used it."""

    seed: int
    hours: float
    violations: list[Violation]
    launches: int
    crashes: int
    unserved: int
    rest_seconds: float
    cost_usd_micros: int
    idle_usd_micros: int
    faults: Counter[str]
    seen: Counter[str]
    stood_at: Counter[str]  # where tasks waited when the broker was killed
    waited: list[float]
    trace: list[str] = field(default_factory=list)
    core_seconds: float = 0.0  # what it took to play


def play(history: History, *, trace: bool = False, after_round: AfterRound | None = None) -> Outcome:
    """The whole history, from an empty state directory. The same history gives the same outcome and trace.

    `after_round` is called after each round of the loop, with the stage and the number of the round.
    """
    directory = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    loop = VirtualTimeLoop if after_round is None else _RoundsLoop
    try:
        return run_virtual(_play(history, directory, trace, after_round), loop)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _play(history: History, directory: Path, trace: bool, after_round: AfterRound | None) -> Outcome:
    stage, loop = Stage(history, directory, trace), asyncio.get_running_loop()
    if after_round is not None and isinstance(loop, _RoundsLoop):
        loop.after_round = partial(after_round, stage)
    return await stage.play()


class _RoundsLoop(VirtualTimeLoop):
    """Counts its rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.after_round: Callable[[int], None] = lambda number: None
        self._rounds = 0

    def _run_once(self) -> None:
        super()._run_once()
        self._rounds += 1
        self.after_round(self._rounds)


class Stage:
    """See the module."""

    def __init__(self, history: History, directory: Path, trace: bool) -> None:
        self._world = World(history, directory, trace)
        self._clients = Clients(self._world)
        self.accidents = Accidents(self._world, self._clients)
        self._rest_seconds = 0.0

    async def play(self) -> Outcome:
        world = self._world
        asyncio.get_running_loop().set_exception_handler(self._unheard)
        world.host.start()
        acts = [asyncio.create_task(self._act(entry)) for entry in world.history.entries]
        await world.until(world.closing_at)
        world.say("everything is healed")
        world.sky.heal()
        world.end_warm()
        await self.accidents.settle()
        if acts:
            await asyncio.wait(acts)
            for act in acts:
                act.result()  # a fault of the stage itself is not to pass for a quiet history
        await self.accidents.settle()
        await self._come_to_rest()
        await self._serve_the_last()
        self._check_bill()
        self._note_set_clocks()
        if world.running is not None:
            await world.host.terminate()
        world.host.close()
        return self._outcome()

    async def _act(self, entry: Entry) -> None:
        await self._world.until(entry.at)
        match entry:
            case Visit():
                await self._clients.visit(entry)
            case Crowd():
                await self._clients.crowd(entry)
            case Crash():
                await self.accidents.crash(entry)
            case Stop():
                await self.accidents.stop(entry)
            case WallJump():
                self.accidents.wall_jump(entry)
            case DiskFull():
                self.accidents.disk_full(entry)
            case Outage():
                self.accidents.outage(entry)
            case Scarcity():
                self.accidents.scarcity(entry)
            case SilentPort():
                self.accidents.silent_port(entry)
            case BrokenImage():
                await self.accidents.broken_image(entry)
            case Reload():
                self.accidents.reload(entry)
            case Protect():
                await self.accidents.protect(entry)
            case Operator():
                await self.accidents.operate(entry)
            case Noise():
                await self.accidents.noise(entry)
            case SecondHost():
                await self.accidents.second_host(entry)
            case Idlers():
                await self.accidents.idlers(entry)

    def _unheard(self, loop: asyncio.AbstractEventLoop, about: dict[str, Any]) -> None:
        """A task has failed, nobody asked it how it went, and it was not its process that ended."""
        error, task = about.get("exception"), about.get("future")
        torn = isinstance(task, asyncio.Task) and task.get_name() == TORN
        if error is not None and not torn:
            self._world.referee.broken(self._world.now, "no failure goes unheard", repr(error))

    def stands(self) -> list[str]:
        """Where the broker's tasks wait, as file and line."""
        return self._world.host.stands()

    # --- the end -------------------------------------------------------------------------------------

    async def _come_to_rest(self) -> None:
        """Within the stated time nothing runs, and nothing is left in the books and on disk."""
        world = self._world
        began_at = world.now
        idle_timeout = max(
            pool.idle_timeout for pool in world.referee.rules.since(0.0)
        )  # of the oldest lease
        limit = idle_timeout + world.pool.boot_deadline + REST_SLACK_SECONDS
        if world.witness.seen["second host took over"]:
            limit += STALE_SECONDS  # a broker that was in charge may have ended a moment ago
        while (unrest := self._unrest()) and world.now < began_at + limit:  # noqa: ASYNC110 (no event tells)
            await asyncio.sleep(LOOK_SECONDS)
        self._rest_seconds = max(self._rest_seconds, world.now - began_at)
        for promise, facts in unrest:
            world.referee.broken(world.now, promise, facts)

    def _unrest(self) -> list[tuple[str, str]]:
        world, daemon = self._world, self._world.daemon()
        if daemon is None:
            return [("the broker recovers", "it does not run")]
        context = daemon.context
        found = [
            ("no machine is orphaned", f"{m.id}, launched at {m.launched_at:.0f} s, is still {m.state}")
            for m in world.ours()
        ]
        found += [("the books are empty at rest", f"{one.id} is {one.state}") for one in context.registry]
        found += [("nobody is left in a queue", one.client) for one in context.waiting.of("default")]
        if world.witness.seen["write failed on a full disk"]:
            return found  # what the disk did not take is cleaned up at the next start
        found += [("no order stays open", order.id) for order in context.store.open_orders()]
        found += [
            ("no lease stays for ever", f"{one.lease.id} of {one.instance_id}")
            for one in context.store.leases()
        ]
        return found

    async def _serve_the_last(self) -> None:
        world = self._world
        last = Visit(world.now, "the-last", 5.0, 60.0, "release", wait=900.0)
        budgeted = world.pool.budget_usd_per_day is not None
        give_up_at = world.now + (BUDGET_SECONDS if budgeted else RECOVERY_SECONDS)
        address = await self._clients.get(last)
        while address is None and world.now < give_up_at:
            await asyncio.sleep(AGAIN_SECONDS)
            address = await self._clients.get(last)
        if address is None:
            world.referee.broken(world.now, "the broker recovers", "the last client was not served")
            return
        await self._clients.release(last, address)
        await self._come_to_rest()

    def _check_bill(self) -> None:
        """Nothing runs any more, so every bracket is what it stays."""
        world, daemon, seen = self._world, self._world.daemon(), self._world.witness.seen
        if daemon is None or seen["store torn"] or seen["write failed on a full disk"]:
            return  # what the disk has lost or did not take is history that is lost
        runs: dict[str, list[Run]] = defaultdict(list)
        for run in daemon.ledger.runs().values():
            runs[machine_of(run)].append(run)
        for machine in world.sky.truth():
            known = runs[machine.id]
            if not known or machine.owner != BROKER:
                continue  # one that ended before any answer or listing told of it
            world.referee.billed(world.now, world.true_unix() + 1.0, machine, known)
            if known[0].price_assumed:
                world.witness.saw("price assumed")
            if len(known) > 1:
                world.witness.saw("billed for several runs")
            reclaimed = any(run.reclaimed for run in known)
            if reclaimed and machine.charged_seconds(world.now) < machine.billed_seconds(world.now):
                world.witness.saw("reclaimed within the first hour")

    def _note_set_clocks(self) -> None:
        """Whether daylight saving began or ended in one of the schedule's zones."""
        world = self._world
        begins_unix, ends_unix = world.history.begins_unix, world.history.begins_unix + world.closing_at
        zones = [window.zone for window, _ in world.history.settings.pool["default"].warm_targets.windows]
        offsets = [
            [datetime.fromtimestamp(unix, zone).utcoffset() for unix in (begins_unix, ends_unix)]
            for zone in zones
        ]
        if any(before != after for before, after in offsets):
            world.witness.saw("clocks were set under a schedule")

    # --- what it came to -----------------------------------------------------------------------------

    def _outcome(self) -> Outcome:
        world, accidents = self._world, self.accidents
        machines = [machine for machine in world.sky.truth() if machine.owner == BROKER]
        world.referee.tokens(world.now, machines)
        for touched in world.sky.violations:
            world.referee.broken(touched.at, "what is not ours is never touched", str(touched))
        return Outcome(
            world.history.seed,
            world.history.hours,
            world.referee.violations,
            launches=len(machines),
            crashes=accidents.crashes,
            unserved=self._clients.unserved,
            rest_seconds=self._rest_seconds,
            cost_usd_micros=round(sum(self._cost_usd_micros(machine) for machine in machines)),
            idle_usd_micros=round(sum(self._idle_usd_micros(machine) for machine in machines)),
            faults=world.sky.faults,
            seen=world.witness.seen,
            stood_at=Counter(accidents.stood_at),
            waited=self._clients.waited,
            trace=world.trace,
        )

    def _price(self, machine: Machine) -> int:
        """What the settings say that a machine costs; else what it costs in the simulated cloud."""
        return self._world.pool.price_usd_micros_per_hour or machine.price_usd_micros_per_hour

    def _cost_usd_micros(self, machine: Machine) -> float:
        return self._price(machine) * machine.charged_seconds(self._world.now) / HOUR_SECONDS

    def _idle_usd_micros(self, machine: Machine) -> float:
        """What it cost while it ran and nobody used it."""
        idle_seconds = 0.0
        for until_at, end_at in machine.runs_until(self._world.now):
            for since_at, last_at in sorted(self._world.referee.in_use(machine)):
                idle_seconds += max(0.0, min(since_at, end_at) - until_at)
                until_at = max(until_at, min(last_at, end_at))
            idle_seconds += max(0.0, end_at - until_at)
        return self._price(machine) * idle_seconds / HOUR_SECONDS
