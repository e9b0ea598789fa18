"""What befalls the broker from outside: kills, a bad disk, jumping clocks, an outage, operators, noise."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from typing import Any

from broker.core import tags
from broker.core.errors import SettingsError, StoreError
from broker.core.model import InstanceState, WorkerState
from broker.core.tags import protects
from broker.providers.ec2_api import LAUNCHING
from broker.providers.ec2_wire import tag_list
from broker.providers.sim_weather import Fault
from broker.simulation.clients import Clients
from broker.simulation.drawing import IMAGE
from broker.simulation.history import (
    BrokenImage,
    Crash,
    DiskFull,
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
    WallJump,
)
from broker.simulation.host import Incarnation
from broker.simulation.referee import STRAY
from broker.simulation.world import World
from broker.store import Store

LOOK_SECONDS = 60.0
COMMAND_SECONDS = 180.0  # how long an operator's command may take before its answer counts as missing
STARTS_SECONDS_MAX = 600.0  # one that still ends by itself then does so for ever
START_AGAIN_SECONDS = 5.0  # the service manager's pause before it starts a broker that has ended by itself
NOISE = (
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\n",
    b"GET_WOR",
    b"NONSENSE 1 2 3\n",
)
FLOOD = 1000  # so much noise at once is scenario 35
MANY = 10_000  # so many idle connections are scenario 34


class Accidents:
    """See the module. `stood_at` counts where tasks waited when the broker was killed."""

    def __init__(self, world: World, clients: Clients) -> None:
        self._world, self._clients = world, clients
        self.crashes = 0
        self.stood_at: dict[str, int] = {}
        self._strays = 0
        self._disk_full_until = 0.0
        self._restarts: list[asyncio.Task[None]] = []
        world.host.born = self._born
        world.host.ended = self._ended

    async def settle(self) -> None:
        """All accidents are over, and the broker runs."""
        self._disk_full_until = 0.0
        give_up_at = self._world.now + STARTS_SECONDS_MAX
        while self._restarts and self._world.now < give_up_at:
            await self._restarts.pop()
        await self.start_again(0.0)

    # --- kills -----------------------------------------------------------------------------------------

    async def crash(self, crash: Crash) -> None:
        for _ in range(crash.steps):
            await asyncio.sleep(0)
        if self.kill(torn=crash.torn):
            await self.start_again(crash.down_seconds)

    def kill(self, *, torn: bool = False) -> bool:
        """SIGKILL now; `torn` damages the store's file. Returns whether there was a broker to kill."""
        world, daemon = self._world, self._world.daemon()
        if daemon is None:
            return False
        world.witness.killed(daemon, world.ours())
        stood = world.host.kill()
        self.crashes += 1
        for place in stood:
            self.stood_at[place] = self.stood_at.get(place, 0) + 1
        world.say(f"kill -9; tasks stood at {', '.join(stood)}")
        if torn:
            self._tear_store()
        return True

    def strike(self, down_seconds: float) -> None:
        """SIGKILL now, whoever is running; a new broker later."""
        if self.kill():
            self._restarts.append(asyncio.create_task(self.start_again(down_seconds)))

    async def stop(self, stop: Stop) -> None:
        world, daemon = self._world, self._world.daemon()
        if daemon is None:
            return
        world.witness.stopping(daemon)
        world.say("SIGTERM")
        await world.host.terminate()
        await self.start_again(stop.down_seconds)

    async def start_again(self, down_seconds: float) -> None:
        await asyncio.sleep(down_seconds)
        if self._world.running is None:
            self._world.say("a new broker starts")
            self._world.host.start()

    def _ended(self, incarnation: Incarnation, error: BaseException | None) -> None:
        """The process has ended by itself, in order or not: the service manager starts it again."""
        self._world.say(f"the broker has ended: {error!r}" if error else "the broker has ended")
        if error is not None:
            self._world.witness.saw("ended with an error")
            self._restarts.append(asyncio.create_task(self.start_again(START_AGAIN_SECONDS)))

    # --- the disk --------------------------------------------------------------------------------------

    def disk_full(self, entry: DiskFull) -> None:
        self._world.say(f"the disk is full for {entry.seconds:.0f} s")
        self._disk_full_until = self._world.now + entry.seconds

    def _born(self, incarnation: Incarnation) -> None:
        """The disk is full while `_disk_full_until` says so."""
        assert incarnation.daemon is not None
        store, commit = incarnation.daemon.context.store, incarnation.daemon.context.store._commit

        def perhaps_commit(durable: bool, batch: Any) -> None:
            if self._world.now < self._disk_full_until:
                self._world.witness.saw("write failed on a full disk")
                self._world.referee.uses_lost()
                raise sqlite3.OperationalError("database or disk is full")
            commit(durable, batch)

        store._commit = perhaps_commit  # type: ignore[method-assign]

    def _tear_store(self) -> None:
        self._world.say("the store's file is damaged")
        self._world.witness.saw("store torn")
        path = self._world.directory / "broker.db"
        with path.open("r+b") as file:
            file.write(bytes(4096))
        self._world.referee.store_lost()
        self._world.referee.uses_lost()

    # --- the sky ---------------------------------------------------------------------------------------

    def wall_jump(self, jump: WallJump) -> None:
        self._world.say(f"the wall clock is set by {jump.seconds:+.0f} s")
        self._world.witness.saw("wall clock jumped")
        self._world.clock.jump(jump.seconds)

    def outage(self, outage: Outage) -> None:
        self._world.sky.begin(Fault.OUTAGE, outage.seconds)

    def scarcity(self, scarcity: Scarcity) -> None:
        """Once all is healed there is enough for everybody."""
        if self._world.now < self._world.closing_at:
            self._world.say(f"no {', '.join(scarcity.kinds)} on spot for {scarcity.seconds:.0f} s")
            for kind in scarcity.kinds:
                self._world.sky.run_dry(kind, spot=True, seconds=scarcity.seconds)

    def silent_port(self, silent: SilentPort) -> None:
        world, daemon = self._world, self._world.daemon()
        if not silent.first:
            world.say(f"worker ports are silent for {silent.seconds:.0f} s")
            for machine in world.ours():
                world.sky.shut_port(machine.id, silent.seconds)
            return
        books = None if daemon is None else daemon.context.registry
        exclusive = world.pool.exclusive
        worker = None if books is None else books.available("default", "nobody", exclusive=exclusive)
        if worker is not None and worker.instance_id is not None:
            world.say(f"the worker port of {worker.instance_id} is silent for {silent.seconds:.0f} s")
            world.sky.shut_port(worker.instance_id, silent.seconds)

    async def broken_image(self, broken: BrokenImage) -> None:
        """Whoever has made that image mends it later."""
        world = self._world
        world.say(f"the image is broken for {broken.seconds:.0f} s")
        good = world.sky.weather
        world.sky.weather = replace(good, boot_failed=0.9, port_never=1.0)
        await asyncio.sleep(broken.seconds)
        if world.now < world.closing_at:
            world.sky.weather = replace(
                world.sky.weather, boot_failed=good.boot_failed, port_never=good.port_never
            )

    # --- people ----------------------------------------------------------------------------------------

    async def operate(self, entry: Operator) -> None:
        world = self._world
        world.say(f"operator: {entry.command}")
        match entry.command:
            case "TERMINATE_ALL":
                await self._terminate_all()
            case "terminate outside":
                running = [machine for machine in world.ours() if machine.runs]
                if running:
                    world.witness.saw("terminated outside")
                    world.sky.end_by_operator(running[0].id)
            case "start outside":
                stopped = [one for one in world.ours() if one.state is InstanceState.STOPPED]
                if stopped:
                    world.witness.saw("started outside")
                    world.referee.started_outside(stopped[0])
                    world.sky.start_by_operator(stopped[0].id)
            case "second broker":
                self._start_second()
            case "unclassified":
                its_tags = {tags.BROKER: world.history.settings.broker.id}
                await self._launch_unclassified("unclassified machine", its_tags)
            case "by hand":
                await self._launch_unclassified("machine by hand", {tags.NAME: world.pool.name_tag})
            case command:
                await self._clients.ask("operator", command, COMMAND_SECONDS)

    def reload(self, entry: Reload) -> None:
        """A new file, and SIGHUP for the broker that runs; one that starts later reads it too."""
        world, daemon = self._world, self._world.daemon()
        if entry.changes is None:
            world.say("SIGHUP: the file has a mistake")
            world.witness.saw("settings refused")
            world.host.reload(SettingsError(["pool.default.wait: is no duration"]))
            return
        if daemon is not None and daemon.context.registry.in_state(WorkerState.ORDERED):
            world.witness.saw("reloaded in mid-launch")
        world.say(f"SIGHUP: {', '.join(f'{key} = {value}' for key, value in entry.changes)}")
        world.witness.saw("settings reloaded")
        settings = world.host.settings
        pool = settings.pool["default"].model_copy(update=dict(entry.changes))
        world.host.reload(settings.model_copy(update={"pool": {"default": pool}}))

    async def protect(self, entry: Protect) -> None:
        """It ends with the history at the latest: what is protected never rests."""
        world = self._world
        running = [one for one in world.ours() if one.runs and not protects(one.tags)]
        if not running:
            return
        machine = running[0]
        world.say(f"operator: protects {machine.id} for {entry.seconds:.0f} s")
        world.sky.tag_by_operator(machine.id, {tags.PROTECT: "yes"})
        world.referee.tagged(machine)
        tagged_at, until_at = world.now, min(world.now + entry.seconds, world.closing_at)
        while world.now < until_at:
            await asyncio.sleep(min(LOOK_SECONDS, max(0.0, until_at - world.now)))
            world.check_protection(machine, tagged_at)
        world.say(f"operator: protects {machine.id} no longer")
        world.sky.tag_by_operator(machine.id, {tags.PROTECT: entry.word or None})
        world.referee.untagged(machine)

    async def _terminate_all(self) -> None:
        world = self._world
        for machine in world.ours():
            world.referee.end_wanted(world.now, machine)
        reply = await self._clients.ask("operator", "TERMINATE_ALL", COMMAND_SECONDS)
        for machine in world.ours() if reply else []:
            world.referee.end_wanted(world.now, machine)

    def _start_second(self) -> None:
        """Another process on the same state directory: it must refuse, and change nothing."""
        world = self._world
        if world.running is None:
            return
        second = Store(world.directory, threaded=False)
        try:
            second.open()
        except StoreError:
            world.witness.saw("second broker refused")
        else:
            second.close()
            world.referee.broken(world.now, "one broker on a state directory", "the second one started")

    async def second_host(self, second: SecondHost) -> None:
        """It ends with the history at the latest, because two that are in charge by turns never rest."""
        world = self._world
        if world.other is not None:
            return
        world.say(f"a second host, clock {second.wall_seconds:+.0f} s off, for {second.seconds:.0f} s")
        world.witness.saw("second host started")
        host = world.add_host(second.wall_seconds)
        host.start()
        stood_by, until_at = False, min(world.now + second.seconds, world.closing_at)
        while world.now < until_at:
            await asyncio.sleep(min(LOOK_SECONDS, max(0.0, until_at - world.now)))
            daemon = world.other_daemon()
            stood_by |= daemon is not None and bool(daemon.context.clouds.read_only())
        if stood_by:
            world.witness.saw("second host stood by")
        world.say("the second host goes down" if second.killed else "the second host's broker is stopped")
        if second.killed:
            host.kill()
        else:
            await host.terminate()
        host.close()
        world.other = None

    async def _launch_unclassified(self, what: str, its_tags: dict[str, str]) -> None:
        """A machine that its tags alone explain: an old broker's, or a person's."""
        world = self._world
        self._strays += 1
        try:
            await world.sky.client(LAUNCHING).run_instances(
                ImageId=IMAGE,
                InstanceType="c7i.16xlarge",
                MinCount=1,
                MaxCount=1,
                ClientToken=f"{STRAY}{self._strays}",
                TagSpecifications=[{"ResourceType": "instance", "Tags": tag_list(its_tags)}],
            )
        except Exception as error:  # the weather is everybody's
            world.say(f"no {what}: {error}")
        else:
            world.witness.saw(what)

    # --- noise -----------------------------------------------------------------------------------------

    async def noise(self, noise: Noise) -> None:
        """Nobody's client asks for nothing, so nothing is launched: not one order more than before."""
        world = self._world
        connections = [world.host.open("203.0.113.9") for _ in range(noise.count)]
        with world.host.inside():
            for number, client in enumerate(connections):
                if client is not None:
                    client.send(NOISE[number % len(NOISE)])
        await asyncio.sleep(0.1)
        with world.host.inside():
            for client in connections:
                if client is not None:
                    client.vanish()
        if noise.count >= FLOOD and all(connections):
            world.witness.saw("flood")

    async def idlers(self, idlers: Idlers) -> None:
        world = self._world
        connections = [world.host.open("203.0.113.7") for _ in range(idlers.count)]
        with world.host.inside():
            for client in connections[::2]:
                if client is not None:
                    client.send(b"GET_WOR")
        if idlers.count >= MANY and all(connections):
            world.witness.saw("10,000 idle connections")
        await asyncio.sleep(idlers.seconds)
        with world.host.inside():
            for client in connections:
                if client is not None:
                    client.vanish()
