"""Plays one history: the real broker in virtual time, its clients, its operator, its accidents.

When the hours are over all faults stop and nobody comes any more. Then the system must come to rest: within
REST_SECONDS nothing runs, the books and the store are empty, and a last client is served as on the first day.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.core import tags
from broker.core.model import Event, WorkerChanged
from broker.core.protocol import ERROR_LINE
from broker.providers.ec2_api import LAUNCHING
from broker.providers.sim_machine import Machine
from broker.providers.simulated import BROKER, SimEC2
from broker.simulation.history import (
    BROKER_ID,
    HOUR_SECONDS,
    Crash,
    DiskFull,
    Entry,
    History,
    Noise,
    Operator,
    Stop,
    Visit,
    WallJump,
)
from broker.simulation.host import Host, Incarnation
from broker.simulation.referee import Referee, Violation
from broker.testing import EPOCH_UNIX, Client, LoopClock, run_virtual

REST_SECONDS = 4 * HOUR_SECONDS  # idle timeout, stuck machines, breaker and the launches of the hour included
ANSWER_SLACK_SECONDS = 20.0  # beyond its wait: two tries of a silent worker port, and a disk
PATIENCE_SECONDS = 120.0  # how long clients try to reach a broker that is down
TRY_AGAIN_SECONDS = 5.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (scratch space that no disk slows down, where there is any)


@dataclass(slots=True)
class Outcome:
    """What one history came to."""

    seed: int
    hours: float
    violations: list[Violation]
    launches: int
    crashes: int
    faults: Counter[str]
    happened: Counter[str]
    stood_at: Counter[str]  # where tasks waited when the broker was killed
    waited: list[float]
    cost_usd_micros: int
    trace: list[str] = field(default_factory=list)


def play(history: History, *, trace: bool = False) -> Outcome:
    """The whole history, from an empty state directory. The same history gives the same outcome and trace."""
    directory = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    try:
        return run_virtual(_play(history, directory, trace))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _play(history: History, directory: Path, trace: bool) -> Outcome:
    return await Stage(history, directory, trace).play()


class Stage:
    """See the module."""

    def __init__(self, history: History, directory: Path, trace: bool) -> None:
        self._history = history
        self._directory = directory
        self._loop = asyncio.get_running_loop()
        self._clock = LoopClock(self._loop)
        self._pool = history.settings.pool["default"]
        self._sky = SimEC2(
            random.Random(history.seed),  # noqa: S311
            self._loop.time,
            lambda: EPOCH_UNIX + self._loop.time(),
            history.weather,
        )
        self._sky.listen(self._cloud_reports)
        self._referee = Referee(self._pool)
        self._happened: Counter[str] = Counter()
        self._stood: Counter[str] = Counter()
        self._trace: list[str] | None = [] if trace else None
        self._numbers = itertools.count(1)
        self._crashes = 0
        self._strays = 0
        self._disk_full_until = 0.0
        self._restarts: list[asyncio.Task[None]] = []
        self._host = Host(
            history.settings,
            directory,
            self._clock,
            self._sky.client_factory,
            self._connect,
            new_id=lambda: f"{next(self._numbers):06d}",
            heard=self._heard,
            asked=self._asked,
            ended=self._broker_ended,
        )

    async def play(self) -> Outcome:
        self._host.start()
        self._break_disk_on_demand()
        acts = [asyncio.create_task(self._act(entry)) for entry in self._history.entries]
        await self._until(self._history.hours * HOUR_SECONDS)
        self._say("everything is healed")
        self._sky.heal()
        self._disk_full_until = 0.0
        await asyncio.wait(acts) if acts else None
        for restart in self._restarts:
            await restart
        await self._come_to_rest()
        if self._host.running:
            await self._host.terminate()
        return self._outcome()

    # --- what happens --------------------------------------------------------------------------------

    async def _act(self, entry: Entry) -> None:
        await self._until(entry.at)
        match entry:
            case Visit():
                await self._visit(entry)
            case Crash():
                for _ in range(entry.steps):
                    await asyncio.sleep(0)
                await self._crash(entry.down_seconds)
            case Stop():
                await self._stop(entry.down_seconds)
            case WallJump():
                self._say(f"the wall clock is set by {entry.seconds:+.0f} s")
                self._happened["wall clock jumped"] += 1
                self._clock.jump(entry.seconds)
            case DiskFull():
                self._say(f"the disk is full for {entry.seconds:.0f} s")
                self._happened["disk full"] += 1
                self._disk_full_until = self._loop.time() + entry.seconds
            case Operator():
                await self._operate(entry)
            case Noise():
                await self._make_noise(entry.count)

    async def _crash(self, down_seconds: float) -> None:
        if not self._host.running:
            return
        self._note_crash()
        stood = self._host.kill()
        self._stood.update(stood)
        self._crashes += 1
        self._say(f"kill -9; {len(stood)} places: {', '.join(stood)}")
        await self._start_again(down_seconds)

    def _note_crash(self) -> None:
        self._happened["killed"] += 1
        incarnation = self._host.now
        assert incarnation is not None
        assert incarnation.daemon is not None
        unresolved = {entry.order.id for entry in incarnation.daemon.orders.unresolved()}
        if unresolved:
            self._happened["killed in mid-launch"] += 1
        if any(machine.token in unresolved for machine in self._ours()):
            self._happened["killed right after a launch"] += 1
        if incarnation.daemon.context.registry.lease_count("default"):
            self._happened["killed with leases"] += 1

    async def _stop(self, down_seconds: float) -> None:
        if not self._host.running:
            return
        daemon = self._host.now.daemon if self._host.now else None
        if daemon is not None and daemon.launch.in_flight:
            self._happened["stopped in mid-launch"] += 1
        self._happened["stopped"] += 1
        self._say("SIGTERM")
        await self._host.terminate()
        await self._start_again(down_seconds)

    async def _start_again(self, down_seconds: float) -> None:
        await asyncio.sleep(down_seconds)
        if not self._host.running:
            self._say("a new broker starts")
            self._host.start()
            self._break_disk_on_demand()

    def _broker_ended(self, incarnation: Incarnation, error: BaseException | None) -> None:
        """The process has ended by itself, in order or not: the service manager starts it again."""
        self._say(f"the broker has ended: {error!r}" if error else "the broker has ended")
        if error is not None:
            self._happened["ended with an error"] += 1
            self._restarts.append(asyncio.create_task(self._start_again(5.0)))

    async def _operate(self, entry: Operator) -> None:
        self._say(f"operator: {entry.command}")
        match entry.command:
            case "TERMINATE_ALL":
                for machine in self._ours():
                    self._referee.end_wanted(self._loop.time(), machine)
                reply = await self._ask("operator", "TERMINATE_ALL", 180.0)
                for machine in self._ours() if reply else []:
                    self._referee.end_wanted(self._loop.time(), machine)
            case "terminate outside":
                running = [machine for machine in self._ours() if machine.runs]
                if running:
                    self._happened["terminated outside"] += 1
                    self._sky.end_by_operator(running[0].id)
            case "second broker":
                await self._second_broker()
            case "unclassified":
                await self._launch_unclassified()
            case command:
                await self._ask("operator", command, 180.0)

    async def _second_broker(self) -> None:
        """Another process on the same state directory: it must refuse, and change nothing."""
        if not self._host.running:
            return
        from broker.core.errors import StoreError
        from broker.store import Store

        second = Store(self._directory, threaded=False)
        try:
            second.open()
        except StoreError:
            self._happened["second broker refused"] += 1
        else:
            second.close()
            self._referee.broken(
                self._loop.time(), "one broker on a state directory", "the second one started"
            )

    async def _launch_unclassified(self) -> None:
        """A machine with our tag and nothing else that would explain it: an old broker's, or a person's."""
        self._strays += 1
        its_tags = [{"Key": tags.BROKER, "Value": BROKER_ID}]
        try:
            await self._sky.client(LAUNCHING).run_instances(
                ImageId="ami-0123456789abcdef0",
                InstanceType="c7i.16xlarge",
                MinCount=1,
                MaxCount=1,
                ClientToken=f"stray-{self._strays}",
                TagSpecifications=[{"ResourceType": "instance", "Tags": its_tags}],
            )
        except Exception as error:  # the weather is everybody's
            self._say(f"no unclassified machine: {error}")
        else:
            self._happened["unclassified machine"] += 1

    async def _make_noise(self, count: int) -> None:
        for number in range(count):
            client = self._host.open("203.0.113.9")
            if client is None:
                return
            with self._host.inside():
                client.send(
                    [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\n", b"GET_WOR"][
                        number % 4
                    ]
                )
            await asyncio.sleep(0.1)
            with self._host.inside():
                client.vanish()
        self._happened["noise"] += 1

    # --- clients -------------------------------------------------------------------------------------

    async def _visit(self, visit: Visit) -> None:
        for turn in range(visit.again + 1):
            address = await self._get(visit)
            if address is None:
                return
            await self._work(visit, address)
            if visit.ending in ("release", "force"):
                await self._release(visit, address)
            if visit.ending == "linger" and turn < visit.again:
                self._happened["asked as the reaper decides"] += 1
                await asyncio.sleep(max(0.0, self._pool.idle_timeout - 0.5))

    async def _get(self, visit: Visit) -> str | None:
        exclusive = visit.exclusive or self._pool.exclusive
        words = ["GET_WORKER", f"client={visit.name}"]
        words += ["exclusive=yes"] if visit.exclusive else []
        words += [f"wait={visit.wait:g}"] if visit.wait is not None else []
        asked_at = self._loop.time()
        wait_seconds = self._pool.wait if visit.wait is None else visit.wait
        reply = await self._ask(visit.name, " ".join(words), wait_seconds, visit.patience_seconds)
        if reply is None or ERROR_LINE.fullmatch(reply):
            return None
        at = self._loop.time()
        self._referee.waited.append(at - asked_at)
        machine = self._whose(reply)
        self._referee.handed_out(at, visit.name, reply, machine, BROKER, exclusive=exclusive)
        return reply

    async def _work(self, visit: Visit, address: str) -> None:
        ends_at = self._loop.time() + visit.work_seconds
        while self._loop.time() < ends_at:
            await asyncio.sleep(min(visit.ping_seconds, ends_at - self._loop.time()))
            reply = await self._ask(visit.name, f"PING {address} client={visit.name}", 60.0)
            at = self._loop.time()
            if reply == "OK":
                self._referee.used(at, visit.name, address)
            elif reply is not None and not reply.endswith(("[CLOUD]", "[DRAINING]", "[LIMIT]")):
                self._referee.unknown(at, visit.name, address, reply)
                return

    async def _release(self, visit: Visit, address: str) -> None:
        if visit.ending == "force":
            self._referee.end_wanted(self._loop.time(), self._sky.holder(address))
        force = " force" if visit.ending == "force" else ""
        self._referee.released(self._loop.time(), visit.name, address)
        await self._ask(visit.name, f"RELEASE {address}{force} client={visit.name}", 60.0)

    async def _ask(
        self, name: str, line: str, wait_seconds: float, patience_seconds: float | None = None
    ) -> str | None:
        """One command on a connection of its own; again while the broker is down or dies over it."""
        give_up_at = self._loop.time() + PATIENCE_SECONDS
        while True:
            asked_at = self._loop.time()
            client = self._host.open(f"10.0.{len(name)}.1")
            if client is not None:
                reply = await self._exchange(client, name, line, wait_seconds, patience_seconds)
                if reply is not None:
                    self._say(f"{name}: {line} -> {reply}")
                    return reply
                if patience_seconds is not None and self._loop.time() - asked_at >= patience_seconds:
                    self._happened["client hung up"] += 1
                    self._say(f"{name}: {line} -> hung up")
                    return None
            if self._loop.time() >= give_up_at:
                return None
            await asyncio.sleep(TRY_AGAIN_SECONDS)

    async def _exchange(
        self, client: Client, name: str, line: str, wait_seconds: float, patience_seconds: float | None
    ) -> str | None:
        with self._host.inside():
            client.send(line.encode() + b"\n")
        limit = wait_seconds + ANSWER_SLACK_SECONDS
        seconds = limit if patience_seconds is None else min(limit, patience_seconds)
        try:
            return await client.reply(seconds)
        except TimeoutError:
            if patience_seconds is None or seconds < patience_seconds:
                self._referee.broken(
                    self._loop.time(), "every client is answered in time", f"{name}: {line}: {seconds:.0f} s"
                )
            return None
        finally:
            with self._host.inside():
                client.vanish()

    # --- the end -------------------------------------------------------------------------------------

    async def _come_to_rest(self) -> None:
        await self._start_again(0.0)
        rested_at = self._loop.time() + REST_SECONDS
        await self._until(rested_at)
        at = self._loop.time()
        for machine in self._ours():
            self._referee.broken(
                at, "no machine is orphaned", f"{machine.id} still {machine.state}: {machine.tags}"
            )
        if not self._host.running or self._host.now is None or self._host.now.daemon is None:
            self._referee.broken(at, "the broker recovers", "it does not run")
            return
        context = self._host.now.daemon.context
        for worker in context.registry:
            self._referee.broken(at, "the books are empty at rest", f"{worker.id} is {worker.state}")
        for order in context.store.open_orders():
            self._referee.broken(at, "no order stays open", order.id)
        # What a full disk did not let the broker write is cleaned up at its next start.
        for lease in context.store.leases() if not self._happened["disk full"] else []:
            self._referee.broken(at, "no lease stays for ever", f"{lease.lease.id} of {lease.instance_id}")
        last = Visit(at, "the-last", 5.0, 60.0, "release")
        address = await self._get(last)
        if address is None:
            self._referee.broken(self._loop.time(), "the broker recovers", "the last client was not served")
        else:
            await self._release(last, address)

    def _outcome(self) -> Outcome:
        at = self._loop.time()
        ours = [machine for machine in self._sky.truth() if machine.owner == BROKER]
        self._referee.tokens(at, ours)
        for violation in self._sky.violations:
            self._referee.broken(violation.at, "what is not ours is never touched", str(violation))
        cost = sum(m.price_usd_micros_per_hour * m.billed_seconds(at) for m in ours) / HOUR_SECONDS
        return Outcome(
            self._history.seed,
            self._history.hours,
            self._referee.violations,
            launches=len(ours),
            crashes=self._crashes,
            faults=self._sky.faults,
            happened=self._happened,
            stood_at=self._stood,
            waited=self._referee.waited,
            cost_usd_micros=round(cost),
            trace=self._trace or [],
        )

    # --- inside --------------------------------------------------------------------------------------

    def _whose(self, address: str) -> Machine | None:
        """Whose an address is, or was until a moment ago: the proof of readiness may be that old."""
        at = self._loop.time()
        recent = [t for t in self._sky.tenures(address) if at - t.until_at <= self._referee.proof_seconds]
        return recent[-1].machine if recent else None

    def _ours(self) -> list[Machine]:
        return self._sky.alive()

    async def _connect(self, address: str, port: int) -> bool:
        return await self._sky.connect(address, port)

    def _asked(self, method: str, parameters: Any) -> None:
        """A call leaves the broker."""
        if method != "run_instances":
            return
        token = parameters["ClientToken"]
        on_disk = self._on_disk(token)
        self._referee.launched(self._loop.time(), token, on_disk)

    def _on_disk(self, order_id: str) -> bool:
        connection = sqlite3.connect(self._directory / "broker.db")
        try:
            return connection.execute("SELECT 1 FROM orders WHERE id = ?", (order_id,)).fetchone() is not None
        finally:
            connection.close()

    def _cloud_reports(self, at: float, what: str, details: str) -> None:
        self._say(f"cloud: {what} {details}".rstrip(), at)
        if what == "shutting down":
            machine = self._sky.machine(details.partition(" ")[0])
            if machine.ended_by == BROKER:
                self._referee.terminated(at, machine)
        elif what == "launched":
            ordered = [machine for machine in self._ours() if not machine.token.startswith("stray-")]
            self._referee.counted(at, ordered)

    def _heard(self, event: Event) -> None:
        if isinstance(event, WorkerChanged):
            worker = event.worker
            reason = f" ({worker.reason})" if worker.reason else ""
            self._say(f"broker: {worker.id} {worker.instance_id or ''} {worker.state}{reason}")

    def _break_disk_on_demand(self) -> None:
        """The disk is full while `_disk_full_until` says so."""
        daemon = self._host.now.daemon if self._host.now else None
        assert daemon is not None
        store, commit = daemon.context.store, daemon.context.store._commit

        def perhaps_commit(durable: bool, batch: Any) -> None:
            if self._loop.time() < self._disk_full_until:
                raise sqlite3.OperationalError("database or disk is full")
            commit(durable, batch)

        store._commit = perhaps_commit  # type: ignore[method-assign]

    async def _until(self, at: float) -> None:
        await asyncio.sleep(max(0.0, at - self._loop.time()))

    def _say(self, text: str, at: float | None = None) -> None:
        if self._trace is not None:
            moment = self._loop.time() if at is None else at
            self._trace.append(f"{moment:12.3f}  {text}")
