"""What all who play in one history share: the clock, the cloud, the host, who watches, and the transcript."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from broker.core import schedule
from broker.core.ledger import STALE_SECONDS_MAX
from broker.core.model import (
    Event,
    LeaseEnded,
    LeaseGranted,
    ProtectionChanged,
    Worker,
    WorkerChanged,
    WorkerState,
)
from broker.core.planning import SEATS_MAX
from broker.core.settings import PoolSettings
from broker.core.stock import IN_STOCK
from broker.core.tags import protects
from broker.core.warm import expiring
from broker.daemon import Daemon
from broker.providers.sim_machine import Machine
from broker.providers.sim_weather import Fault
from broker.providers.simulated import BROKER, SimEC2
from broker.simulation.asking import Asking
from broker.simulation.buying import Buying
from broker.simulation.drawing import without_warm
from broker.simulation.fairness import Fairness
from broker.simulation.history import HOUR_SECONDS, History, Visit
from broker.simulation.host import OTHER_OWNER_ID, Host, Incarnation
from broker.simulation.referee import STRAY, Referee, Violation
from broker.simulation.witness import Witness
from broker.testing import EPOCH_UNIX, LoopClock

TOLD_SECONDS_MAX = (
    120.0  # from a grant to the answer that tells of it: rounds of tries of silent ports, a slow disk
)


class World:
    """See the module."""

    def __init__(self, history: History, directory: Path, tracing: bool) -> None:
        self.history = history
        self.directory = directory
        self.loop = asyncio.get_running_loop()
        self.clock = self._new_clock()
        self.closing_at = history.hours * HOUR_SECONDS  # then all is healed, and everybody goes home
        self.trace: list[str] = []
        self.tracing = tracing
        self.referee = Referee(history.settings.pool["default"], self._accused)
        self.sky = SimEC2(
            random.Random(history.seed),  # noqa: S311
            self.loop.time,
            self.true_unix,
            history.weather,
        )
        self.witness = Witness(self.sky, self.referee, self.daemon)
        self.host = Host(
            history.settings,
            directory,
            self.clock,
            self.sky.client_factory,
            self.sky.connect,
            heard=self._heard,
            asked=self._asked,
        )
        self.host.in_force = lambda read: self.referee.rules.begin(self.now, read.pool["default"])
        self.other: Host | None = None  # with a broker of the same id on it, for a while
        self._took_over: Host | None = None
        self.asking = Asking(self.loop.time, self.loop.call_later)
        self.fairness = Fairness(self.asking, self.referee.broken)
        self._buying = Buying(self.referee.rules, self.referee.broken, self.witness.saw)
        self.host.answered = lambda *call: self._buying.answered(self.now, *call)
        self._number = 0  # of the broker process whose events are heard
        self.sky.listen(self._cloud_reports)

    @property
    def pool(self) -> PoolSettings:
        """The settings in force, or about to be."""
        return self.referee.rules.pool

    @property
    def keeps_warm(self) -> bool:
        """Whether this history's pool ever has a warm target."""
        return self.history.settings.pool["default"].keeps_warm

    @property
    def now(self) -> float:
        return self.loop.time()

    def say(self, text: str, at: float | None = None) -> None:
        """A line of the transcript: the same at every replay, so without the scratch directory's name."""
        if self.tracing:
            text = text.replace(str(self.directory), "(state)")
            self.trace.append(f"{self.now if at is None else at:12.3f}  {text}")

    def true_unix(self) -> float:
        """What clocks that nobody has set wrong show now."""
        return self.history.begins_unix + self.loop.time()

    def _new_clock(self) -> LoopClock:
        clock = LoopClock(self.loop)
        clock.jump(self.history.begins_unix - EPOCH_UNIX)
        return clock

    async def until(self, at: float) -> None:
        await asyncio.sleep(max(0.0, at - self.now))

    # --- the broker that runs ------------------------------------------------------------------------

    @property
    def running(self) -> Incarnation | None:
        incarnation = self.host.now
        return incarnation if incarnation is not None and incarnation.alive else None

    def daemon(self) -> Daemon | None:
        incarnation = self.running
        return incarnation.daemon if incarnation is not None else None

    def other_daemon(self) -> Daemon | None:
        """The broker that runs on the other host."""
        incarnation = self.other.now if self.other is not None else None
        return incarnation.daemon if incarnation is not None and incarnation.alive else None

    def add_host(self, wall_seconds: float) -> Host:
        """Another host, whose wall clock is so far off."""
        clock = self._new_clock()
        clock.jump(wall_seconds)
        directory = self.directory / "other"
        directory.mkdir(exist_ok=True)
        self.other = Host(
            self.history.settings,
            directory,
            clock,
            self.sky.client_factory,
            self.sky.connect,
            heard=self._other_heard,
            asked=self._other_asked,
            owner=OTHER_OWNER_ID,
        )
        return self.other

    def end_warm(self) -> None:
        """An operator sets the warm targets to 0 and sends SIGHUP."""
        if self.keeps_warm:
            self.say("SIGHUP: no warm workers any more")
            self.host.reload(without_warm(self.host.settings))

    # --- the truth -----------------------------------------------------------------------------------

    def ours(self) -> list[Machine]:
        """The machines of this broker that have not begun to end."""
        return self.sky.alive()

    def whose(self, address: str) -> Machine | None:
        """Whose an address is, or was until a moment ago: the proof of readiness may be that old."""
        recent = [t for t in self.sky.tenures(address) if self.now - t.until_at <= self.referee.proof_seconds]
        return recent[-1].machine if recent else None

    def check_books(self) -> None:
        """Is every machine of ours explained? Asked whenever that may have changed."""
        if self.daemon() is None:
            return
        running = [daemon for daemon in (self.daemon(), self.other_daemon()) if daemon is not None]
        in_charge = [one for one in running if _is_in_charge(one)]
        if not in_charge or (self.other is not None and len(in_charge) < len(running)):
            return  # nobody is yet, or one of two that is about to learn of the other

        def explains(machine: Machine) -> bool:
            return any(
                one.context.registry.by_instance(machine.id) is not None
                or one.orders.get(machine.token) is not None
                for one in in_charge
            )

        self.referee.known(self.now, self.ours(), explains)

    def check_protection(self, machine: Machine, tagged_at: float) -> None:
        """Does the broker know the tag that a person has put on, as soon as a listing must have shown it?"""
        daemon = self.daemon()
        if daemon is None or not _is_in_charge(daemon):
            return
        worker = daemon.context.registry.by_instance(machine.id)
        shown = any(
            (cloud.scanned_at or 0.0) > tagged_at + STALE_SECONDS_MAX and machine.id in cloud.instance_ids
            for cloud in daemon.context.clouds.all
        )
        if worker is None or not shown:
            return
        if worker.protected:
            self.witness.saw("protected")
            self.referee.protected(self.now, machine)
        elif machine.alive:
            facts = f"{machine.id} was tagged {self.now - tagged_at:.0f} s ago, and the broker does not know"
            self.referee.broken_once(self.now, "a protect tag is seen in time", machine.id, facts)

    # --- who listens -----------------------------------------------------------------------------------

    def _cloud_reports(self, at: float, what: str, details: str) -> None:
        if self.tracing:
            self.say(f"cloud: {what} {details}".rstrip(), at)
        self.witness.cloud_reported(at, what, details)
        if what == "shutting down":
            machine = self.sky.machine(details.partition(" ")[0])
            if machine.ended_by == BROKER:
                self.referee.terminated(at, machine)
        elif what == "stopping" and details.endswith(f" by {BROKER}"):
            self.referee.stopped(at, self.sky.machine(details.partition(" ")[0]))
        elif what == "DescribeInstances" and details == f"{BROKER}: done":
            daemon = self.daemon()
            clouds = () if daemon is None else daemon.context.clouds.all
            self.referee.looked(max((cloud.scanned_at or 0.0 for cloud in clouds), default=0.0))
        elif what == f"fault: {Fault.FLEET_SURPLUS}":
            self.referee.given_more(details)
        elif what == f"fault: {Fault.RECLAIMED}":
            self._buying.reclaimed(at)
        elif what in ("launched", "started"):
            self.referee.counted(at, self.ours())
            self._buying.counted(at, self.ours(), self.referee.given_more_for)
            self.check_books()

    def _asked(self, method: str, parameters: Any) -> None:
        """A call leaves the broker."""
        self.witness.broker_called(self.now, method, parameters)
        if method in ("run_instances", "create_fleet"):
            token = parameters["ClientToken"]
            target = parameters.get("TargetCapacitySpecification", {}).get("TotalTargetCapacity")
            count = int(target or parameters["MaxCount"])
            self.referee.launched(self.now, token, self.host.on_disk(token), count)
            for kind in _kinds(parameters):
                self.referee.bought(self.now, token, kind)
            self._buying.asked(self.now, token, parameters)
        elif method == "terminate_instances":
            self._check_terminate(parameters)

    def _check_terminate(self, parameters: Any) -> None:
        """A Terminate leaves a broker: does it name a machine that the broker knows to be protected?"""
        named = frozenset(parameters["InstanceIds"])
        for machine in self.ours():
            if machine.id in named and protects(machine.tags):
                self.referee.protected_is_ended(self.now, machine)

    def _heard(self, event: Event) -> None:
        """The broker's books have changed."""
        self.witness.broker_told(event)
        self._is_fair(event)
        if isinstance(event, ProtectionChanged) and event.worker.protected:
            self.referee.protected(self.now, self.sky.machine(event.worker.instance_id or ""))
        if not isinstance(event, WorkerChanged):
            return
        if event.worker.state is WorkerState.ORDERED:
            self.referee.placed(self.now, event.worker.order_id or "")
            since_at = self.asking.since_at
            order_id, particular = event.worker.order_id or "", self.asking.particular
            self._buying.placed(self.now, self._number, order_id, since_at, particular=particular)
            kind = event.worker.offering.instance_type if particular else ""
            self._check_demand(event.worker.pool, kind)
        if self.tracing:
            worker = event.worker
            reason = f" ({worker.reason})" if worker.reason else ""
            self.say(f"broker: {worker.id} {worker.instance_id or ''} {worker.state}{reason}")
        if event.worker.state is WorkerState.GONE:
            # Not at once: books may be in the middle of a change of which this event is a part.
            self.loop.call_soon(self.check_books)

    def _is_fair(self, event: Event) -> None:
        number = self.host.now.number if self.host.now is not None else 0
        if number != self._number:
            self._number = number
            self.fairness.restarted()
        if isinstance(event, LeaseGranted):
            self.fairness.granted(event.lease, self.now, event.worker.address)
            if event.lease.bound:
                self.loop.call_later(TOLD_SECONDS_MAX, self._check_bound, event.lease.id)
        elif isinstance(event, LeaseEnded):
            self.fairness.ended(event.lease)

    def is_as_wished(self, visit: Visit, machine: Machine | None) -> None:
        """A client has been given this machine."""
        if not visit.kind or machine is None:
            return
        self.witness.saw("served with a type of its own")
        if machine.instance_type != visit.kind:
            facts = f"{visit.name} wanted {visit.kind}, and {machine.id} is {machine.instance_type}"
            self.referee.broken(self.now, "a client gets what it asked for", facts)

    def _check_bound(self, lease_id: str) -> None:
        """A lease that lives as long as a connection lives no longer: nobody else would ever end it."""
        daemon = self.daemon()
        lease = None if daemon is None else daemon.context.registry.lease(lease_id)
        if daemon is None or lease is None or not lease.bound:
            return
        if not any(lease_id in one.session.leases for one in daemon.server.connections):
            self.referee.broken(self.now, "no lease is held by nobody", f"{lease_id} of {lease.client}")

    def _check_demand(self, pool: str, kind: str) -> None:
        """A new order is in the books: is there somebody for it, or a place under the warm target?

        With a machine type only such machines count, and those for whom they would do; what an order brings
        that is for several types is not known yet.
        """
        daemon = self.daemon()
        if daemon is None or not all(cloud.recovered for cloud in daemon.context.clouds.of(pool)):
            return  # it has just started, and takes in the orders that were open
        registry = daemon.context.registry
        coming = registry.in_state(WorkerState.ORDERED, WorkerState.BOOTING, pool=pool)
        unheld = sum(not registry.busy(w.id) for w in coming if not kind or _kinds_of(daemon, w) == {kind})
        unheld -= daemon.orders.doubtful(pool)
        rules = self.referee.rules.since(self.now)
        ready = [w for w in registry.unheld(pool) if not any(expiring(w, r, self.now) for r in rules)]
        ready = [w for w in ready if kind in ("", w.offering.instance_type)]
        keeps_stock = max(r.warm_stopped for r in rules) > 0
        ready = [w for w in ready if not (keeps_stock and w.protected)]  # it fills no place there
        unheld += sum(not any(_nearly_used_up(registry.uses(w.id), r) for r in rules) for w in ready)
        demand = self.asking.machines(min(r.seats or SEATS_MAX for r in rules), kind)
        moments_unix = [self.true_unix() + seconds for seconds in (-1.0, 0.0, 1.0)]  # HTTP dates are coarse
        target = max(schedule.target(r.warm_targets, unix) for r in rules for unix in moments_unix)
        stock = [one for one in registry.in_state(*IN_STOCK, pool=pool) if not kind]
        unheld += len(stock)
        target += max(r.warm_stopped for r in rules)
        if not demand:
            self.witness.saw("spare launched")
        self.referee.ordered(self.now, unheld, demand, target)

    def _other_heard(self, event: Event) -> None:
        if self.tracing and isinstance(event, WorkerChanged):
            worker = event.worker
            self.say(f"other broker: {worker.id} {worker.instance_id or ''} {worker.state}")

    def _other_asked(self, method: str, parameters: Any) -> None:
        """A call leaves the broker on the other host, of which no client knows."""
        if method in ("run_instances", "create_fleet") and not self.keeps_warm:
            self.referee.broken(self.now, "nobody asked it for a worker", parameters["ClientToken"])
        if method == "terminate_instances":
            self._check_terminate(parameters)
        if method not in ("terminate_instances", "create_tags"):
            return
        if self.other is not self._took_over:
            self._took_over = self.other
            self.witness.saw("second host took over")
        first = self.daemon()
        placed = {machine.id for machine in self.ours() if not machine.token.startswith(STRAY)}
        named = placed.intersection(parameters.get("InstanceIds") or parameters.get("Resources") or ())
        if named and first is not None and all(c.acts(self.now) for c in first.context.clouds.all):
            facts = f"{method} for {', '.join(sorted(named))} while the first one is in charge"
            self.referee.broken(self.now, "one broker acts at a time", facts)

    def _accused(self, violation: Violation) -> None:
        self.say(f"VIOLATION: {violation}", violation.at)


def _kinds_of(daemon: Daemon, worker: Worker) -> set[str]:
    """What a worker may turn out to be."""
    entry = daemon.orders.get(worker.order_id or "") if worker.state is WorkerState.ORDERED else None
    offerings = (worker.offering,) if entry is None else entry.order.offerings
    return {one.instance_type for one in offerings}


def _nearly_used_up(uses: int, rules: PoolSettings) -> bool:
    """Whether a worker has not enough uses left for as many clients as may share one."""
    return rules.uses_max is not None and uses + (rules.seats or SEATS_MAX) > rules.uses_max


def _kinds(parameters: Any) -> list[str]:
    """The machine types that a launch call asks for."""
    if "InstanceType" in parameters:
        return [parameters["InstanceType"]]
    configs = parameters["LaunchTemplateConfigs"]
    return [override["InstanceType"] for config in configs for override in config["Overrides"]]


def _is_in_charge(daemon: Daemon) -> bool:
    """Whether it has looked, and looks after what it saw."""
    clouds = daemon.context.clouds
    return clouds.recovered() and not clouds.read_only()
