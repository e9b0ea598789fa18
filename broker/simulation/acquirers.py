"""Clients of a history that ACQUIRE: several workers at once, renewed by id or held by their connection.

What each of them believes to hold is told to the referee lease by lease, so that two leases of one client on
one exclusive worker are found out as well.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from broker.core.model import WorkerState
from broker.core.protocol import ERROR_LINE
from broker.providers.simulated import BROKER
from broker.simulation.asking import ANSWER_SLACK_SECONDS
from broker.simulation.history import Visit
from broker.simulation.world import World
from broker.testing import Client

PATIENCE_SECONDS = 120.0  # how long clients try to reach a broker that is down
TRY_AGAIN_SECONDS = 5.0
REPLY_SECONDS_MAX = 60.0
LEASE = re.compile(r"LEASE id=(?P<id>\S+) ip=(?P<ip>\S+) .* of=(?P<of>\d+)")
ENDED = "ERROR: that lease has ended [DENIED]"
EXCUSES = ("store torn", "write failed on a full disk", "second host took over")  # a lease may be forgotten


@dataclass(frozen=True, slots=True)
class Held:
    """One lease as its client knows it."""

    id: str
    address: str


class Acquirers:
    """See the module. `waited` takes in how long each served ACQUIRE took."""

    def __init__(self, world: World, waited: list[float]) -> None:
        self._world = world
        self._waited = waited
        self.unserved = 0

    async def visit(self, visit: Visit) -> None:
        """From coming to leaving."""
        world = self._world
        client, held = await self._acquire(visit)
        if client is None:
            return
        if held:
            await self._work(visit, client, held)
        if not visit.bound and visit.ending in ("release", "force"):
            for one in held:
                world.referee.released(world.now, one.id, one.address)
                await self._ask(visit, f"DONE {one.id}")
        if visit.bound:
            for one in held:
                world.referee.released(world.now, one.id, one.address)
        with world.host.inside():
            client.vanish()

    # --- inside ----------------------------------------------------------------------------------------

    async def _acquire(self, visit: Visit) -> tuple[Client | None, list[Held]]:
        """The connection and what was acquired on it; nothing of both when there is no answer."""
        world = self._world
        words = ["ACQUIRE", f"client={visit.name}", f"count={visit.acquire}"]
        words += ["min=1"] if visit.some else []
        words += ["hold=connection"] if visit.bound else []
        words += ["exclusive=yes"] if visit.exclusive else []
        words += [f"type={visit.kind}"] if visit.kind else []
        words += [f"wait={visit.wait:g}"] if visit.wait is not None else []
        line, asked_at = " ".join(words), world.now
        give_up_at = asked_at + PATIENCE_SECONDS
        world.witness.asked(asked_at)
        world.witness.asking += 1
        alone = visit.exclusive or world.pool.exclusive
        waiting = world.asking.comes(
            visit.name, alone=alone, count=visit.acquire, acquiring=True, kind=visit.kind
        )
        try:
            while True:
                client = world.host.open(f"10.0.{len(visit.name)}.1")
                if client is not None:
                    waiting.sent_at = world.now
                    lines = await self._answer(visit, client, line)
                    waiting.sent_at = None
                    if lines is not None:
                        return client, self._told(visit, lines, asked_at)
                    with world.host.inside():
                        client.vanish()
                if world.now >= give_up_at or self._hung_up(visit, asked_at):
                    self._given_up(visit)
                    return None, []
                await asyncio.sleep(TRY_AGAIN_SECONDS)
        finally:
            world.witness.asking -= 1
            world.asking.leaves(waiting)

    def _given_up(self, visit: Visit) -> None:
        if visit.acquire > 1:
            self._world.witness.saw("several given up")

    def _hung_up(self, visit: Visit, asked_at: float) -> bool:
        return visit.patience_seconds is not None and self._world.now - asked_at >= visit.patience_seconds

    async def _answer(self, visit: Visit, client: Client, line: str) -> list[str] | None:
        """The lines of the answer; None when the connection broke or the client has hung up."""
        world = self._world
        wait_seconds = world.pool.wait if visit.wait is None else visit.wait
        limit_at = world.now + wait_seconds + ANSWER_SLACK_SECONDS
        patience_seconds = visit.patience_seconds
        hang_up_at = limit_at if patience_seconds is None else world.now + patience_seconds
        with world.host.inside():
            client.send(line.encode() + b"\n")
        lines: list[str] = []
        while True:
            try:
                reply = await client.reply(max(0.0, min(limit_at, hang_up_at) - world.now))
            except TimeoutError:
                if hang_up_at >= limit_at:
                    facts = f"{visit.name}: {line}: {wait_seconds:.0f} s"
                    world.referee.broken(world.now, "every client is answered in time", facts)
                return None
            if reply is None:
                return None
            if reply.startswith("PENDING "):
                world.witness.saw("told while it waited")
                continue
            lines.append(reply)
            lease = LEASE.fullmatch(reply)
            if lease is None or len(lines) == int(lease["of"]):
                if world.tracing:
                    world.say(f"{visit.name}: {line} -> {'; '.join(lines)}")
                return lines

    def _told(self, visit: Visit, lines: list[str], asked_at: float) -> list[Held]:
        world = self._world
        if ERROR_LINE.fullmatch(lines[0]):
            self.unserved += 1
            self._given_up(visit)
            return []
        self._waited.append(world.now - asked_at)
        world.witness.saw("several workers at once" if len(lines) > 1 else "a lease acquired")
        least = 1 if visit.some else visit.acquire
        if not least <= len(lines) <= visit.acquire:
            facts = f"{visit.name} wanted {least} to {visit.acquire} and got {len(lines)}"
            world.referee.broken(world.now, "as many as were asked for", facts)
        matches = [LEASE.fullmatch(line) for line in lines]
        held = [Held(one["id"], one["ip"]) for one in matches if one]
        for one in held:
            world.fairness.answered(world.now, visit.name, one.id)
            world.referee.acquired(visit.name, one.id)
            self._handed_out(visit, one)
        return held

    def _handed_out(self, visit: Visit, held: Held) -> None:
        world, daemon = self._world, self._world.daemon()
        machine = world.whose(held.address)
        exclusive = visit.exclusive or world.pool.exclusive
        world.referee.handed_out(world.now, held.id, held.address, machine, BROKER, exclusive=exclusive)
        world.is_as_wished(visit, machine)
        worker = daemon.context.registry.by_instance(machine.id) if daemon and machine else None
        if worker is not None and worker.state in (WorkerState.DRAINING, WorkerState.TERMINATING):
            world.referee.leaving(world.now, held.id, held.address, machine, str(worker.state))

    async def _work(self, visit: Visit, client: Client, held: list[Held]) -> None:
        world = self._world
        ends_at = min(world.now + visit.work_seconds, max(world.closing_at, world.now))
        while world.now < ends_at and held:
            await asyncio.sleep(min(visit.ping_seconds, ends_at - world.now))
            if visit.bound and not client.closed:
                for one in held:
                    self._used_if_running(one)
                continue
            for one in list(held):
                if not await self._renew(visit, one):
                    held.remove(one)

    def _used_if_running(self, held: Held) -> None:
        """The connection is open, and so the lease lives, unless its machine is gone."""
        world, daemon = self._world, self._world.daemon()
        if daemon is not None and daemon.context.registry.lease(held.id) is not None:
            world.referee.used(world.now, held.id, held.address)
        else:
            world.referee.unknown(world.now, held.id, held.address, "nothing, on an open connection")

    async def _renew(self, visit: Visit, held: Held) -> bool:
        """Whether the client may go on counting on it."""
        world = self._world
        reply = await self._ask(visit, f"RENEW {held.id}")
        if reply == ENDED and any(world.witness.seen[excuse] for excuse in EXCUSES):
            with world.fairness.pinging(visit.name, held.address):
                reply = await self._ask(visit, f"PING {held.address} client={visit.name}")
            if reply == "OK":
                world.referee.held_by_name(world.now, held.id, visit.name, held.address)
                return True
        if reply == "OK":
            world.referee.used(world.now, held.id, held.address)
        elif reply == ENDED or reply == "ERROR: Worker not found":
            world.referee.unknown(world.now, held.id, held.address, reply)
            return False
        return True

    async def _ask(self, visit: Visit, line: str) -> str | None:
        """One command on a connection of its own; None when nobody answers."""
        world = self._world
        client = world.host.open(f"10.0.{len(visit.name)}.1")
        if client is None:
            return None
        with world.host.inside():
            client.send(line.encode() + b"\n")
        try:
            reply = await client.reply(REPLY_SECONDS_MAX)
        except TimeoutError:
            reply = None
        with world.host.inside():
            client.vanish()
        if world.tracing:
            world.say(f"{visit.name}: {line} -> {reply}")
        return reply
