"""The clients of a history: they ask, work, ping, die, come back; the referee hears what they were told."""

from __future__ import annotations

import asyncio

from broker.core.model import WorkerState
from broker.core.planning import SEATS_MAX
from broker.core.protocol import ERROR_LINE
from broker.providers.simulated import BROKER
from broker.simulation.acquirers import Acquirers
from broker.simulation.asking import ANSWER_SLACK_SECONDS, Ask
from broker.simulation.history import Crowd, Visit
from broker.simulation.world import World
from broker.testing import Client

PATIENCE_SECONDS = 120.0  # how long clients try to reach a broker that is down
TRY_AGAIN_SECONDS = 5.0
DYING_STEP_SECONDS, DYING_SECONDS_MAX = 37.0, 600.0  # members of a crowd die one after the other, in no order
PING_SECONDS_MAX = 1.0  # once the first scan is in, whatever the cloud does
# A PING that was not answered, and may be sent again: to another broker, if one is in charge.
UNDECIDED = ("[CLOUD]", "[DENIED]", "[DRAINING]", "[LIMIT]")


class Clients:
    """See the module. `waited` holds how long each served request took."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.waited: list[float] = []
        self._acquirers = Acquirers(world, self.waited)
        self._unserved = 0

    @property
    def unserved(self) -> int:
        """How many heard an error, or nothing."""
        return self._unserved + self._acquirers.unserved

    async def visit(self, visit: Visit) -> None:
        """From coming to leaving, as often as the visit says."""
        world = self._world
        if visit.acquire:
            await self._acquirers.visit(visit)
            return
        for turn in range(visit.again + 1):
            address = await self.get(visit)
            if address is None:
                return
            await self._work(visit, address)
            if visit.ending in ("release", "force"):
                await self.release(visit, address)
            if visit.ending == "linger" and turn < visit.again and world.now < world.closing_at:
                await asyncio.sleep(max(0.0, world.pool.idle_timeout + visit.late_seconds))

    async def crowd(self, crowd: Crowd) -> None:
        """A thousand at once; how they fare is what the referee is told."""
        world = self._world
        self._world.witness.saw("crowd in a queue" if crowd.dies_each else f"crowd, {world.pool.sharing}")
        members = [
            Visit(
                world.now,
                f"{crowd.name}-{number}",
                crowd.work_seconds,
                60.0,
                "release",
                patience_seconds=_dies_after_seconds(number, crowd.dies_each),
            )
            for number in range(crowd.count)
        ]
        await asyncio.gather(*(self.visit(member) for member in members))

    async def get(self, visit: Visit) -> str | None:
        """GET_WORKER: the address, or None."""
        world = self._world
        words = ["GET_WORKER", f"client={visit.name}"]
        words += ["exclusive=yes"] if visit.exclusive else []
        words += [f"type={visit.kind}"] if visit.kind else []
        words += [f"wait={visit.wait:g}"] if visit.wait is not None else []
        asked_at = world.now
        wait_seconds = world.pool.wait if visit.wait is None else visit.wait
        world.witness.asked(asked_at)
        world.witness.asking += 1
        alone = visit.exclusive or world.pool.exclusive
        waiting = world.asking.comes(visit.name, alone=alone, kind=visit.kind)
        try:
            line, patience_seconds = " ".join(words), visit.patience_seconds
            reply = await self.ask(visit.name, line, wait_seconds, patience_seconds, waiting)
        finally:
            world.witness.asking -= 1
            world.asking.leaves(waiting)
        seats = world.pool.seats or SEATS_MAX
        if reply is None and world.asking.machines(seats) > world.pool.max_workers:
            world.witness.saw("gave up in a queue")
        if reply is None or ERROR_LINE.fullmatch(reply):
            self._unserved += 1
            if reply is not None and reply.endswith("[BUDGET]"):
                world.witness.saw("budget reached")
            return None
        self.waited.append(world.now - asked_at)
        world.fairness.answered(world.now, visit.name)
        self._handed_out(visit, reply)
        return reply

    async def release(self, visit: Visit, address: str) -> None:
        world = self._world
        if visit.ending == "force":
            world.referee.end_wanted(world.now, world.sky.holder(address))
        force = " force" if visit.ending == "force" else ""
        world.referee.released(world.now, visit.name, address)
        await self.ask(visit.name, f"RELEASE {address}{force} client={visit.name}", 60.0)

    async def ask(
        self,
        name: str,
        line: str,
        wait_seconds: float,
        patience_seconds: float | None = None,
        waiting: Ask | None = None,
    ) -> str | None:
        """One command on a connection of its own; again while the broker is down or dies over it.

        `waiting` is told when it asks for a worker.
        """
        world = self._world
        give_up_at = world.now + PATIENCE_SECONDS
        while True:
            asked_at = world.now
            client = world.host.open(f"10.0.{len(name)}.1")
            if client is not None:
                if waiting is not None:
                    waiting.sent_at = world.now
                reply = await self._exchange(client, name, line, wait_seconds, patience_seconds)
                if waiting is not None:
                    waiting.sent_at = None
                if reply is not None:
                    if world.tracing:
                        world.say(f"{name}: {line} -> {reply}")
                    return reply
                if patience_seconds is not None and world.now - asked_at >= patience_seconds:
                    world.witness.saw("client hung up")
                    world.say(f"{name}: {line} -> hung up")
                    return None
            if world.now >= give_up_at:
                return None
            await asyncio.sleep(TRY_AGAIN_SECONDS)

    # --- inside ----------------------------------------------------------------------------------------

    def _handed_out(self, visit: Visit, address: str) -> None:
        world, daemon = self._world, self._world.daemon()
        machine = world.whose(address)
        exclusive = visit.exclusive or world.pool.exclusive
        world.referee.handed_out(world.now, visit.name, address, machine, BROKER, exclusive=exclusive)
        world.is_as_wished(visit, machine)
        worker = daemon.context.registry.by_instance(machine.id) if daemon and machine else None
        if worker is not None and worker.state in (WorkerState.DRAINING, WorkerState.TERMINATING):
            world.referee.leaving(world.now, visit.name, address, machine, str(worker.state))

    async def _work(self, visit: Visit, address: str) -> None:
        world = self._world
        ends_at = min(world.now + visit.work_seconds, max(world.closing_at, world.now))
        while world.now < ends_at:
            await asyncio.sleep(min(visit.ping_seconds, ends_at - world.now))
            with world.fairness.pinging(visit.name, address):
                reply = await self.ask(visit.name, f"PING {address} client={visit.name}", 60.0)
            if reply == "OK":
                world.referee.used(world.now, visit.name, address)
            elif reply is not None and not reply.endswith(UNDECIDED):
                world.referee.unknown(world.now, visit.name, address, reply)
                return

    async def _exchange(
        self, client: Client, name: str, line: str, wait_seconds: float, patience_seconds: float | None
    ) -> str | None:
        world, started_at = self._world, self._world.now
        daemon = world.daemon()
        at_once = line.startswith("PING ") and daemon is not None and daemon.context.clouds.recovered()
        with world.host.inside():
            client.send(line.encode() + b"\n")
        limit = wait_seconds + ANSWER_SLACK_SECONDS
        seconds = limit if patience_seconds is None else min(limit, patience_seconds)
        try:
            reply = await client.reply(seconds)
        except TimeoutError:
            if patience_seconds is None or seconds < patience_seconds:
                facts = f"{name}: {line}: {seconds:.0f} s"
                world.referee.broken(world.now, "every client is answered in time", facts)
            return None
        finally:
            with world.host.inside():
                client.vanish()
        if at_once and reply is not None and world.now - started_at > PING_SECONDS_MAX:
            facts = f"{name}: {line}: {world.now - started_at:.1f} s"
            world.referee.broken(world.now, "a PING is answered at once", facts)
        return reply


def _dies_after_seconds(number: int, dies_each: int) -> float | None:
    """How long such a member of a crowd waits for its answer before it dies: some die soon, some late."""
    if not dies_each or number % dies_each:
        return None
    return 1.0 + number * DYING_STEP_SECONDS % DYING_SECONDS_MAX
