"""What was promised, held against what the simulated cloud and the clients know to be true.

The cloud knows what ran and who ended it, each client knows what it was told and when. The broker's own books
are asked only where the promise is about the books. What the referee finds is a `Violation`: the moment, the
promise, the facts.
"""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

from broker.core.ledger import Run
from broker.core.model import InstanceState
from broker.core.settings import PoolSettings
from broker.providers.sim_machine import Machine
from broker.simulation.rules import Rules

CLOCK_SLACK_SECONDS = 1.0  # between the broker's decision and the client's reading of it
PROOF_SLACK_SECONDS = 0.5
GRANT_SECONDS = 60.0  # from a lease's grant to the client's reading of it: a silent port, a slow disk
SENT_SECONDS_MAX = 31.0  # a Terminate that was decided may wait so long for our own pace before it leaves
AGE_SLACK_SECONDS = 2.0  # the cloud names the whole second of a launch
USES_KEPT = 16  # of a hold: the cloud tells what it did a moment later, and was it in use *then*?
SHOWN_SECONDS = 3500.0  # EC2 lists a terminated machine for an hour
LOOKS_ENOUGH = 5
STRAY = "stray-"  # how the tokens of machines begin that no order of the broker's explains


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken."""

    at: float
    promise: str
    facts: str

    def __str__(self) -> str:
        return f"{self.promise}: {self.facts}"


@dataclass(slots=True)
class Hold:
    """One client's belief that it holds one machine, founded on the broker's replies."""

    client: str
    machine: Machine
    address: str
    since_at: float
    exclusive: bool
    ttl_seconds: float  # the least that its lease may have been granted for
    used_at: deque[float] = field(default_factory=lambda: deque(maxlen=USES_KEPT))
    ended_at: float | None = None  # it released, or was told that the broker does not know the worker

    def live_at(self, at: float) -> bool:
        """Whether the client may still count on it at that moment, by the clock of whoever is slower."""
        if at < self.since_at or (self.ended_at is not None and at >= self.ended_at):
            return False
        last_at = max((used for used in self.used_at if used <= at), default=self.since_at)
        return at < last_at + self.ttl_seconds - CLOCK_SLACK_SECONDS

    @property
    def last_used_at(self) -> float:
        return self.used_at[-1] if self.used_at else self.since_at


class Referee:
    """Collects facts while a history is played; `violations` grows as promises break."""

    def __init__(
        self, pool: PoolSettings, told: Callable[[Violation], None] = lambda violation: None
    ) -> None:
        self.rules = Rules(pool)
        self._told = told
        self.violations: list[Violation] = []
        self._current: dict[tuple[str, str], Hold] = {}  # (client, address)
        self._by_machine: dict[str, list[Hold]] = defaultdict(list)
        self._acquired: dict[str, list[str]] = defaultdict(list)  # client → ids of its leases by ACQUIRE
        self._forced: dict[str, list[float]] = defaultdict(list)  # machine → when somebody asked for its end
        self._orders_at: list[float] = []
        self._orders: dict[str, int] = {}  # token → for how many machines
        self.given_more_for: set[str] = set()  # tokens for which the cloud gave one more than was asked
        self._placed_at: dict[str, float] = {}
        self._looked_at: list[float] = []
        self._started_outside: dict[str, int] = {}  # machine → its how-manieth start that was
        self._forgiven: frozenset[str] = frozenset()  # tokens that a damaged store has made the broker forget
        self._tagged: dict[str, None] = {}  # machines that a person protects
        self._protected: dict[str, float] = {}  # of these, when the broker knew it
        self._uses_known = True
        self._accused: set[tuple[str, str]] = set()

    @property
    def _pool(self) -> PoolSettings:
        return self.rules.pool

    def _ttl_seconds(self, at: float) -> float:
        """The least that a lease may have been granted for of which a client hears now."""
        return min(pool.idle_timeout for pool in self.rules.since(at - GRANT_SECONDS))

    def broken(self, at: float, promise: str, facts: str) -> None:
        violation = Violation(at, promise, facts)
        self.violations.append(violation)
        self._told(violation)

    def broken_once(self, at: float, promise: str, about: str, facts: str) -> None:
        """For what is looked at again and again."""
        if (promise, about) not in self._accused:
            self._accused.add((promise, about))
            self.broken(at, promise, facts)

    # --- what clients are told -----------------------------------------------------------------------

    def handed_out(
        self, at: float, client: str, address: str, machine: Machine | None, broker: str, *, exclusive: bool
    ) -> None:
        """A GET_WORKER was answered with this address; `machine` has it now, None: nobody has."""
        why = self._why_dead(at, machine, broker)
        if machine is None or why:
            self.broken(at, "no dead address is handed out", f"{client} got {address}: {why}")
        else:
            self._hold(at, client, address, machine, exclusive)

    def _why_dead(self, at: float, machine: Machine | None, broker: str) -> str:
        if machine is None:
            return "nobody has it"
        if machine.owner != broker:
            return f"it is a stranger's machine, {machine.id}"
        ended_at = machine.stopped_running_at
        if machine.running_at is None or (ended_at is not None and at - ended_at > self.proof_seconds):
            return f"{machine.id} is {machine.state}"
        if not self._was_reachable(machine, at):
            return f"the worker port of {machine.id} does not answer"
        return ""

    def _was_reachable(self, machine: Machine, at: float) -> bool:
        """Whether its worker port took connections at any moment of a proof that is still good."""
        since_at = at - self.proof_seconds
        deaf = any(from_at <= since_at and at < until_at for from_at, until_at in machine.deaf)
        return self._pool.readiness != "tcp" or (machine.port_opens_at <= at and not deaf)

    def leaving(self, at: float, client: str, address: str, machine: Machine | None, state: str) -> None:
        """The broker had already begun to end the worker whose address it gave away."""
        if machine is None or not self.excused(machine, at):
            facts = f"{client} got {address}, which is {state}"
            self.broken(at, "no worker that is being ended is handed out", facts)

    def used(self, at: float, client: str, address: str) -> None:
        """A PING was answered with OK."""
        hold = self._current.get((client, address))
        if hold is not None:
            hold.used_at.append(at)
            hold.ttl_seconds = min(hold.ttl_seconds, self._ttl_seconds(at))

    def acquired(self, client: str, lease_id: str) -> None:
        """This client holds what is handed out under that id."""
        self._acquired[client].append(lease_id)

    def held_by_name(self, at: float, lease_id: str, client: str, address: str) -> None:
        """The lease has ended, and a PING of its client was answered with OK: it holds the worker by name."""
        hold = self._current.pop((lease_id, address), None)
        if hold is not None and (client, address) in self._current:
            hold.ended_at = at
        elif hold is not None:
            hold.client = client
            self._current[client, address] = hold
        self.used(at, client, address)

    def released(self, at: float, client: str, address: str) -> None:
        """A client, or a lease of its own, ends its hold. RELEASE ends all of a client's leases there."""
        for holder in (client, *self._acquired.get(client, ())):
            hold = self._current.pop((holder, address), None)
            if hold is not None:
                hold.ended_at = at

    def unknown(self, at: float, client: str, address: str, why: str) -> None:
        """A PING was answered with an error: the lease is lost, and that needs a reason."""
        hold = self._current.pop((client, address), None)
        if hold is None:
            return
        live = hold.live_at(at)
        hold.ended_at = at
        if live and hold.machine.runs and not self.excused(hold.machine, at):
            facts = f"{client} was told '{why}' of {hold.machine.id}, which it holds"
            self.broken(at, "no lease is lost", facts)

    def held(self, machine: Machine, at: float) -> bool:
        """Whether some client may count on the machine."""
        return any(hold.live_at(at) for hold in self._by_machine[machine.id])

    def in_use(self, machine: Machine) -> Iterable[tuple[float, float]]:
        """From when to when each client used it: the truth about its idleness."""
        return ((hold.since_at, hold.last_used_at) for hold in self._by_machine[machine.id])

    def _hold(self, at: float, client: str, address: str, machine: Machine, exclusive: bool) -> None:
        hold = self._current.get((client, address))
        if hold is not None and hold.machine is machine:
            hold.used_at.append(at)
            hold.exclusive |= exclusive
            hold.ttl_seconds = min(hold.ttl_seconds, self._ttl_seconds(at))
        else:
            hold = Hold(client, machine, address, at, exclusive, self._ttl_seconds(at))
            hold.used_at.append(at)
            self._current[client, address] = hold
            self._by_machine[machine.id].append(hold)
            self._check_uses(at, machine)
        for other in self._by_machine[machine.id]:
            both = other is not hold and (other.exclusive or hold.exclusive)
            if both and other.client != client and other.live_at(at):
                facts = f"{machine.id} is held by {other.client} and was given to {client}"
                self.broken(at, "never two leases on an exclusive worker", facts)

    def _check_uses(self, at: float, machine: Machine) -> None:
        """One who comes again may have its old hold still, as the broker sees it: after a restart, say."""
        holders = len({hold.client for hold in self._by_machine[machine.id]})
        uses_max = self._pool.uses_max
        if uses_max is not None and holders > uses_max and self._uses_known:
            facts = f"{machine.id} has had {holders} holders, uses_max is {uses_max}"
            self.broken(at, "no worker is given to more clients than it may be", facts)

    @property
    def proof_seconds(self) -> float:
        """How old the proof of a worker's readiness may be when its address reaches the client."""
        return self._pool.readiness_max_age + PROOF_SLACK_SECONDS

    # --- money -----------------------------------------------------------------------------------------

    def billed(self, at: float, at_unix: float, machine: Machine, runs: Sequence[Run]) -> None:
        """What the broker says a machine cost contains what the cloud bills and charges for it.

        A bracket, because EC2 does not tell when a machine began to run. A run that began, ended and was
        forgotten while nobody looked, or could look, is one that the broker cannot know.
        """
        unseen = len(runs) < len(machine.runs_until(at)) and self._runs_seen(machine, at) <= len(runs)
        for word, brackets, truth in (
            ("billed", [run.billed_seconds(at_unix) for run in runs], machine.billed_seconds(at)),
            ("charged", [run.charged_seconds(at_unix) for run in runs], machine.charged_seconds(at)),
        ):
            low, high = sum(one.low for one in brackets), sum(one.high for one in brackets)
            slack_seconds = CLOCK_SLACK_SECONDS * len(runs)
            if not low - slack_seconds <= truth <= (inf if unseen else high + slack_seconds):
                facts = f"{machine.id} is {word} {truth:.1f} s, the broker says {low:.1f} to {high:.1f} s"
                self.broken(at, "the broker's bill holds the cloud's", facts)

    def looked(self, at: float) -> None:
        """The last complete listing that the broker has had was asked for at this moment."""
        if at > (self._looked_at[-1] if self._looked_at else 0.0):
            self._looked_at.append(at)

    def _runs_seen(self, machine: Machine, at: float) -> int:
        """How many of its runs listings must have shown: one may miss it, or be outdated."""
        runs = machine.runs_until(at)
        shown_until = [since_at for since_at, _ in runs[1:]] + [runs[-1][1] + SHOWN_SECONDS]
        spans = [(since_at, until_at) for (since_at, _), until_at in zip(runs, shown_until, strict=True)]
        looks = [bisect(self._looked_at, end) - bisect(self._looked_at, begin) for begin, end in spans]
        return sum(count >= LOOKS_ENOUGH for count in looks)

    # --- what happens to machines --------------------------------------------------------------------

    def end_wanted(self, at: float, machine: Machine | None) -> None:
        """Somebody with the right to has asked for this machine's end: RELEASE force, TERMINATE_ALL."""
        if machine is not None:
            self._forced[machine.id].append(at)

    def excused(self, machine: Machine, at: float) -> bool:
        """Whether somebody has asked for its end, or it is so old that it ends although it is held."""
        return any(asked_at <= at for asked_at in self._forced[machine.id]) or self._too_old(machine, at)

    def _too_old(self, machine: Machine, at: float) -> bool:
        hard_lifetime = self._pool.hard_lifetime
        born_at = min(machine.launched_at, self._placed_at.get(machine.token, machine.launched_at))
        return hard_lifetime is not None and at - born_at >= hard_lifetime - AGE_SLACK_SECONDS

    def tagged(self, machine: Machine) -> None:
        """A person protects this machine."""
        self._tagged[machine.id] = None

    def untagged(self, machine: Machine) -> None:
        """And now not any more."""
        self._tagged.pop(machine.id, None)
        self._protected.pop(machine.id, None)

    def protected(self, at: float, machine: Machine) -> None:
        """The broker knows that a person protects it."""
        if machine.id in self._tagged:
            self._protected.setdefault(machine.id, at)

    def protected_is_ended(self, at: float, machine: Machine) -> None:
        """The broker sends a Terminate for a machine that carries the tag at this moment."""
        known_at = self._protected.get(machine.id)
        if known_at is not None and at - known_at > SENT_SECONDS_MAX:
            facts = f"{machine.id}, known to be protected for {at - known_at:.0f} s"
            self.broken(at, "no protected machine is ended", facts)

    def uses_lost(self) -> None:
        """The disk has lost or not taken how often each worker was given to somebody."""
        self._uses_known = False

    def stopped(self, at: float, machine: Machine) -> None:
        """The broker's Stop was carried out on a machine that was running."""
        if not self.excused(machine, at):
            self._killed(at, machine, "stopped")

    def terminated(self, at: float, machine: Machine) -> None:
        """The broker's Terminate was carried out on a machine that was running."""
        stopped_before = machine.stopped_running_at is not None and machine.stopped_running_at < at
        if machine.running_at is None or stopped_before or self.excused(machine, at):
            return  # one that had stopped by itself served nobody any more
        self._killed(at, machine, "terminated")

    def _killed(self, at: float, machine: Machine, how: str) -> None:
        for hold in self._by_machine[machine.id]:
            if hold.live_at(at):
                ago_seconds = at - hold.last_used_at
                facts = f"{machine.id} was {how}; {hold.client} used it {ago_seconds:.1f} s before"
                self.broken(at, "no busy worker is killed", facts)

    def known(self, at: float, machines: Iterable[Machine], explains: Callable[[Machine], bool]) -> None:
        """Every machine of ours has an entry in the books or an open order, at any moment.

        Only machines from nowhere are found by a listing; so are those whose order a damaged store has lost,
        and the one that the cloud gave beyond an order, when the answer that names it was lost.
        """
        beyond = set(self.given_more_for)
        for machine in machines:
            found_later = machine.token.startswith(STRAY) or machine.token in self._forgiven
            if not found_later and not explains(machine):
                if machine.token in beyond:
                    beyond.remove(machine.token)  # one of them
                    continue
                facts = f"{machine.id} ({machine.state}, token {machine.token}) is in no book"
                self.broken_once(at, "every machine has an entry or an open order", machine.id, facts)

    def placed(self, at: float, token: str) -> None:
        """An order has entered the books, for the first time or again after a restart."""
        self._placed_at.setdefault(token, at)

    def ordered(self, at: float, unheld: int, demand: int, target: int) -> None:
        """A new order: with it, so many machines that nobody holds are there or on their way."""
        if unheld > demand + target:
            facts = f"{unheld} machines unheld, {demand} wanted by clients, {target} to be kept warm"
            self.broken(at, "no launch beyond demand and warm target", facts)

    def given_more(self, token: str) -> None:
        """The cloud answers a call with a machine more than it was asked for."""
        self.given_more_for.add(token)

    def launched(self, at: float, token: str, on_disk: bool, count: int) -> None:
        """A launch call for so many machines leaves the broker. It counts from when its order was placed."""
        if not on_disk:
            self.broken(at, "an order is on disk before its call", token)
        if token in self._orders:
            return
        self._orders[token] = count
        placed_at = self._placed_at.get(token, at)
        self._orders_at += [placed_at] * count
        within = sum(placed_at - 3600.0 < other_at <= placed_at for other_at in self._orders_at)
        if within > self._pool.launches_per_hour:
            facts = f"{within} launches within an hour, {self._pool.launches_per_hour} are allowed"
            self.broken(at, "launches never exceed the caps", facts)

    def store_lost(self) -> None:
        """Somebody has damaged the store: what only it could tell is forgiven, the rest is not.

        That is which orders there were, how many, and who wanted a worker of a shared pool for himself alone.
        """
        for hold in self._current.values():
            hold.exclusive = self._pool.exclusive
        self._forgiven = frozenset(self._orders)
        self._orders_at.clear()

    def started_outside(self, machine: Machine) -> None:
        """A person is about to start it: for that the broker does not answer."""
        self._started_outside[machine.id] = len(machine.looks_before) + 1

    def counted(self, at: float, machines: list[Machine]) -> None:
        """So many machines of ours exist after a launch or a start. What the cloud gave beyond an order is
        not ours to answer for, as long as it ends; what is stopped does not count."""
        ordered = [one for one in machines if not one.token.startswith(STRAY)]
        ordered = [one for one in ordered if one.state is not InstanceState.STOPPED]
        ordered = [one for one in ordered if self._started_outside.get(one.id) != len(one.looks_before)]
        surplus = len({one.token for one in ordered} & self.given_more_for)
        placed_at = max((self._placed_at.get(machine.token, at) for machine in ordered), default=at)
        if len(ordered) - surplus > max(pool.max_workers for pool in self.rules.since(placed_at)):
            ids = ", ".join(machine.id for machine in ordered)
            self.broken(at, "launches never exceed the caps", f"{len(ordered)} machines: {ids}")

    def bought(self, at: float, token: str, kind: str) -> None:
        """A launch call asks for this type: one that was allowed when its order was placed, or is now."""
        allowed = {
            one for pool in self.rules.since(self._placed_at.get(token, at)) for one in pool.instance_types
        }
        if kind not in allowed:
            facts = f"{kind} for {token}; allowed: {', '.join(sorted(allowed))}"
            self.broken(at, "only what the settings in force allow is bought", facts)

    def tokens(self, at: float, machines: list[Machine]) -> None:
        """No more instances than the order was for, over the whole history."""
        by_token: dict[str, list[str]] = defaultdict(list)
        for machine in machines:
            by_token[machine.token].append(machine.id)
        for token, ids in by_token.items():
            ordered = self._orders.get(token, 1) + (token in self.given_more_for)
            if token and len(ids) > ordered:
                self.broken(at, "no more machines than an order asks for", f"{token}: {', '.join(ids)}")
