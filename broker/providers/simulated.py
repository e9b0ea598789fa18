"""An EC2 in memory that keeps EC2's promises and breaks the ones EC2 breaks, on any clock.

A model at the level of the SDK's client, so that the real ec2.py runs above it. The same seed gives the same
answers. It is asked in three ways: by the broker, through `client_factory`; by the network, through
`accepts` and `connect`; and by whoever tests the broker, who reads the truth and brings about what happens.

    sim = SimEC2(random.Random(seed), loop.time, lambda: EPOCH_UNIX + loop.time(), STORM)
    provider = Ec2Provider("lab", pools, client_factory=sim.client_factory, …)
    sim.reclaim(instance_id)
    sim.heal()
    assert not sim.violations
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from math import inf

from broker.core.model import InstanceState
from broker.providers.ec2_api import ClientFactory, Ec2Client, Manners
from broker.providers.sim_change import Violation
from broker.providers.sim_client import SimClient
from broker.providers.sim_machine import Machine, Tenure
from broker.providers.sim_roads import EVERY_API, Ending, Roads, Scripted
from broker.providers.sim_server import Server
from broker.providers.sim_shapes import address_of
from broker.providers.sim_sky import Report, Sky, Spells
from broker.providers.sim_spot import NOTICE_SECONDS, Notice
from broker.providers.sim_weather import CLEAR, Fault, Weather
from broker.providers.sim_world import World

__all__ = ["CLEAR", "EVERY_API", "Ending", "Fault", "Machine", "SimEC2", "Violation", "Weather"]

BROKER = "broker"  # the caller behind `client_factory`
SILENT_SECONDS = 3.0  # a connection to an address that nobody has is given up after so long


class SimEC2:
    """See the module. One region of one account. `now` is the loop's clock, `wall_unix` AWS's own.

    With `caller_unix`, the broker's wall clock, calls are refused while it is more than five minutes off.
    """

    def __init__(
        self,
        rng: random.Random,
        now: Callable[[], float],
        wall_unix: Callable[[], float],
        weather: Weather = CLEAR,
        *,
        region: str = "us-east-1",
        zones: Sequence[str] = ("a", "b", "c"),
        ports: Sequence[int] = (2560,),
        caller_unix: Callable[[], float] | None = None,
    ) -> None:
        self._sky = Sky(rng, now, wall_unix, weather)
        self._world = World(self._sky, region, tuple(region + zone for zone in zones))
        self._spells = Spells(self._sky, caller_unix)
        self._roads = Roads(self._sky, self._spells)
        self._server = Server(self._world, self._spells)
        self._ports = frozenset(ports)

    # --- for the broker ----------------------------------------------------------------------------

    def client_factory(self, manners: Manners) -> AbstractAsyncContextManager[Ec2Client]:
        """What Ec2Provider takes."""
        return self._client(manners, BROKER)

    def factory_of(self, caller: str) -> ClientFactory:
        """The same for another caller: what it launches is not the broker's to touch, and the reverse."""
        return lambda manners: self._client(manners, caller)

    def client(self, manners: Manners, caller: str = BROKER) -> SimClient:
        return SimClient(self._sky, self._roads, self._server, manners, caller)

    @asynccontextmanager
    async def _client(self, manners: Manners, caller: str) -> AsyncIterator[Ec2Client]:
        yield self.client(manners, caller)

    # --- for the network ---------------------------------------------------------------------------

    def accepts(self, address: str, port: int) -> bool:
        """Whether somebody takes a connection there now, whoever it is."""
        machine = self.holder(address)
        return machine is not None and port in self._ports and machine.accepts(self._sky.at)

    async def connect(self, address: str, port: int) -> bool:
        """For a ProbeLoop: the same, in its time. A machine refuses at once, nobody keeps silent."""
        dice, weather = self._sky.roads, self._sky.weather
        await asyncio.sleep(dice.within(weather.connect_seconds))
        lost = dice.chance(weather.connection_lost)
        if lost:
            self._sky.met(Fault.CONNECTION_LOST, address)
        if lost or self.holder(address) is None:
            await asyncio.sleep(SILENT_SECONDS)
            return False
        return self.accepts(address, port)

    # --- the truth ---------------------------------------------------------------------------------

    def truth(self) -> list[Machine]:
        """Every machine that ever was, in the order of their launches."""
        self._sky.agenda.catch_up()
        return list(self._world.machines.values())

    def alive(self, owner: str | None = BROKER) -> list[Machine]:
        """The machines that have not begun to end: this owner's, or everybody's for None."""
        self._sky.agenda.catch_up()
        return [one for one in self._world.alive.values() if owner is None or one.owner == owner]

    def machine(self, instance_id: str) -> Machine:
        self._sky.agenda.catch_up()
        return self._world.machines[instance_id]

    def holder(self, address: str) -> Machine | None:
        """Whose a public or private address, or a public DNS name, is at the moment."""
        self._sky.agenda.catch_up()
        plain = address_of(address)
        return self._world.public.holder(plain) or self._world.private.holder(plain)

    def tenures(self, address: str) -> list[Tenure]:
        """Whose it was, and when."""
        self._sky.agenda.catch_up()
        found = self._world.public.tenures.get(address) or self._world.private.tenures.get(address)
        return list(found or ())

    def billed_seconds(self, instance_id: str) -> float:
        """Up to now: per second in `running`, at least a minute."""
        return self.machine(instance_id).billed_seconds(self._sky.at)

    def charged_seconds(self, instance_id: str) -> float:
        """Billed, unless EC2 took the machine back within its first hour."""
        return self.machine(instance_id).charged_seconds(self._sky.at)

    def cost_usd_micros(self, owner: str = BROKER) -> int:
        """What this owner's machines have cost so far, at SimEC2's own prices."""
        return sum(one.cost_usd_micros(self._sky.at) for one in self.truth() if one.owner == owner)

    @property
    def violations(self) -> Sequence[Violation]:
        """Attempts to change machines that are not the caller's."""
        self._sky.agenda.catch_up()
        return self._server.changer.violations

    @property
    def faults(self) -> Counter[str]:
        """How often each fault was really injected, by its name; refusals by their code besides."""
        self._sky.agenda.catch_up()
        return self._sky.faults

    @property
    def calls(self) -> Counter[str]:
        """How many calls have arrived, by API."""
        self._sky.agenda.catch_up()
        return self._server.calls

    @property
    def notices(self) -> deque[Notice]:
        """What EventBridge has delivered and nobody has fetched: the reader takes it out."""
        self._sky.agenda.catch_up()
        return self._world.spot.notices

    # --- what happens ------------------------------------------------------------------------------

    @property
    def weather(self) -> Weather:
        return self._sky.weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        self._sky.agenda.catch_up()
        self._sky.change(weather)

    def listen(self, report: Report | None) -> None:
        """Tell of everything that happens: (moment, what, details)."""
        self._sky.report = report

    def allow_adoption(self, *names: str) -> None:
        """Machines without a broker that carry one of these Name tags may be claimed by tagging them."""
        self._server.changer.adoptable_names = names

    def heal(self, weather: Weather = CLEAR) -> None:
        """Faults stop: clear weather, spells and scripts over, what was stuck goes on. A request that is
        under way still arrives, and a machine whose worker port is dead stays so."""
        self.weather = weather
        self._sky.era += 1
        self._spells.heal()
        self._roads.heal()
        self._world.market.heal()
        self._server.lister.heal()
        self._world.heal()

    def begin(self, kind: Fault, seconds: float) -> None:
        """Begin a spell: OUTAGE, LAUNCH_OUTAGE, CREDENTIALS_EXPIRED or CLOCK_SKEWED."""
        self._sky.agenda.catch_up()
        self._spells.begin(kind, seconds)

    def begin_outage(self, seconds: float) -> None:
        """Every call fails or hangs; machines run on."""
        self.begin(Fault.OUTAGE, seconds)

    def befall(
        self,
        api: str,
        fault: Fault,
        *,
        times: int = 1,
        skip: int = 0,
        seconds: float | None = None,
        ending: Ending | None = None,
    ) -> Scripted:
        """The next `times` attempts of this API (EVERY_API for any), after `skip`, meet this mishap of the
        way: REQUEST_LOST, REQUEST_LATE, ANSWER_LOST, ANSWER_LATE, SERVER_ERROR, THROTTLED, PAGE_FAILED."""
        return self._roads.befall(Scripted(api, fault, times, skip, seconds=seconds, ending=ending))

    def refuse(self, api: str, code: str, *, times: int = 1, skip: int = 0, status: int = 400) -> Scripted:
        """The next attempts of this API are refused with this code; nothing is done."""
        return self._roads.befall(Scripted(api, Fault.REFUSED, times, skip, code=code, status=status))

    def refuse_launches(self, code: str, seconds: float) -> None:
        """Launches are refused for a while, with one of sim_market.REFUSALS."""
        self._sky.agenda.catch_up()
        self._world.market.refuse(code, seconds)

    def run_dry(self, kind: str, *, spot: bool = True, zone: str | None = None, seconds: float = inf) -> None:
        """A machine type is out of stock: in one zone, or in all."""
        self._sky.agenda.catch_up()
        for one in self._world.market.zones if zone is None else (zone,):
            self._world.market.run_dry(kind, spot, one, seconds)

    def hide(self, instance_id: str, seconds: float, *, from_writes: bool = False) -> None:
        """Describe does not show the machine for a while, as if it had only just been launched."""
        machine = self.machine(instance_id)
        machine.visible_at = machine.steady_at = self._sky.at + seconds
        machine.hidden_from_writes = from_writes

    def omit(self, instance_id: str, listings: int = 1) -> None:
        """The next listings miss the machine."""
        self._server.lister.omit[instance_id] = listings

    def lag(self, seconds: float, listings: int = 1) -> None:
        """The next listings show what was so long ago."""
        self._server.lister.lags += [seconds] * listings

    def reclaim(
        self,
        instance_id: str,
        *,
        notice_seconds: float | None = NOTICE_SECONDS,
        rebalance_seconds: float | None = None,
    ) -> None:
        """EC2 takes a spot machine back: see sim_spot.Spot.reclaim."""
        machine = self.machine(instance_id)
        assert machine.spot, f"{instance_id} is no spot machine"
        self._world.spot.reclaim(machine, notice_seconds=notice_seconds, rebalance_seconds=rebalance_seconds)
        self._sky.agenda.catch_up()

    def recommend_rebalance(self, instance_id: str) -> None:
        """A rebalance recommendation after which nothing happens."""
        self._world.spot.recommend(self.machine(instance_id))

    def shut_port(self, instance_id: str, seconds: float = inf) -> None:
        """The machine runs on, its worker port does not answer."""
        self._world.deafen(self.machine(instance_id), seconds)

    def end_by_operator(self, instance_id: str) -> None:
        """Somebody terminates the machine in the console."""
        self._world.end_by_operator(self.machine(instance_id))

    def tag_by_operator(self, instance_id: str, new: Mapping[str, str | None]) -> None:
        """Somebody edits its tags there; None takes one away."""
        self.machine(instance_id).retag(new, self._world.sky.at)

    def stop_by_operator(self, instance_id: str) -> None:
        """Somebody stops it there."""
        self._world.stop(self.machine(instance_id), "operator")

    def start_by_operator(self, instance_id: str) -> None:
        """Somebody starts a machine that is stopped."""
        machine = self.machine(instance_id)
        assert machine.state is InstanceState.STOPPED, f"{instance_id} is {machine.state}"
        self._world.start(machine)

    def shut_down(self, instance_id: str) -> None:
        """The machine shuts itself down from within."""
        self._world.shut_down(self.machine(instance_id))

    def protect(self, instance_id: str) -> None:
        """Somebody switches termination protection on."""
        self.machine(instance_id).protected = True

    def launch_stranger(
        self, its_tags: Mapping[str, str] | None = None, *, kind: str = "m7i.large", answers: bool = True
    ) -> Machine:
        """Somebody else's machine; with `answers`, something listens on its worker port."""
        self._sky.agenda.catch_up()
        return self._world.launch_stranger(kind, its_tags or {}, answers)
