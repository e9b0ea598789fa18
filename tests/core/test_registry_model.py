"""The real registry and the naive one live through the same days, and never differ.

Every step is taken by both: the legal ones tell the same events, the illegal ones raise the same and change
nothing. After every step every question is asked of both. The universe is small (a few orders, machines,
addresses, clients), so that names are used again and steps collide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.core import tags
from broker.core.errors import Denied, IllegalStep, WorkerNotFound
from broker.core.life import BOOKED, USABLE, Step
from broker.core.model import Event, InstanceState, Lease, LeaseEnded, LeaseGranted, Worker, WorkerState
from broker.core.registry import Registry
from tests.core.generated import FEW
from tests.core.make import PORT, instance, order
from tests.core.naive_registry import HOLDABLE, SEATS, NaiveRegistry, told

ORDERS = ("o-1", "o-2", "o-3", "o-4")
MACHINES = ("i-1", "i-2", "i-3", "i-4")
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
POOLS = ("default", "gpu")
CLIENTS = ("ann", "bob", "cleo")
REFUSALS = (IllegalStep, Denied, WorkerNotFound, KeyError)
TAKEN = {
    Step.REFUSE: Registry.refused,
    Step.DRAIN: Registry.drain,
    Step.TERMINATE: lambda real, worker_id, reason, now: real.terminating(worker_id, now),
    Step.GO: Registry.gone,
}

known = st.runner().flatmap(lambda machine: st.sampled_from([*machine.naive.entries, "nobody"]))
maybe_address = st.none() | st.sampled_from(ADDRESSES)
reasons = st.sampled_from(["idle", "released", ""])


class Listener:
    """Knows nothing but the events, and from them who is where and who holds what."""

    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.states: dict[str, WorkerState] = {}
        self.holds: dict[tuple[str, str], Lease] = {}

    def __call__(self, event: Event) -> None:
        self.heard.append(event)
        match event:
            case LeaseGranted(lease=lease, worker=worker, first=first):
                assert worker.state in USABLE
                assert first is not any(worker_id == worker.id for worker_id, _ in self.holds)
                self.holds[worker.id, lease.key] = lease
            case LeaseEnded(lease=lease, worker=worker, last=last):
                assert self.holds.pop((worker.id, lease.key)) == lease
                assert last is not any(worker_id == worker.id for worker_id, _ in self.holds)
            case _:
                self.states[event.worker.id] = event.worker.state


class TwoRegistries(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.listener = Listener()
        self.real = Registry(self.listener, seats=SEATS.get)
        self.naive = NaiveRegistry()
        self.now = 1000.0
        self.leases = 0
        self.seen: set[str] = set()

    def both(self, naively: Callable[[], Any], really: Callable[[], Any]) -> Any:
        """Take a step twice. Returns what the real one returned, None when both refused."""
        self.listener.heard.clear()
        self.naive.told.clear()
        generation = self.real.generation
        expected, refusal = outcome(naively)
        result, refused = outcome(really)
        assert refused is refusal
        assert [told(event) for event in self.listener.heard] == self.naive.told
        assert self.real.generation == generation + len(self.naive.told)
        assert refusal is None or not self.naive.told
        if isinstance(expected, Lease):
            assert result == expected
        return result

    # --- the life of a worker -----------------------------------------------------------------------

    @rule(worker_id=st.sampled_from(ORDERS), pool=st.sampled_from(POOLS))
    def order(self, worker_id: str, pool: str) -> None:
        self.both(
            lambda: self.naive.order(worker_id, pool, self.now),
            lambda: self.real.order(order(worker_id, pool), PORT, self.now),
        )

    @rule(
        machine=st.sampled_from(MACHINES),
        pool=st.sampled_from(POOLS),
        address=maybe_address,
        running=st.booleans(),
    )
    def adopt(self, machine: str, pool: str, address: str | None, running: bool) -> None:
        self.both(
            lambda: self.naive.adopt(machine, pool, address, running, self.now),
            lambda: self.real.adopt(described(machine, address, running), pool, PORT, self.now),
        )

    @rule(worker_id=known, machine=st.sampled_from(MACHINES), address=maybe_address, running=st.booleans())
    def launch(self, worker_id: str, machine: str, address: str | None, running: bool) -> None:
        self.both(
            lambda: self.naive.launched(worker_id, machine, address, running, self.now),
            lambda: self.real.launched(worker_id, described(machine, address, running), self.now),
        )

    @rule(
        worker_id=known,
        address=maybe_address,
        running=st.booleans(),
        other=st.sampled_from([*MACHINES, None]),
    )
    def observe(self, worker_id: str, address: str | None, running: bool, other: str | None) -> None:
        entry = self.naive.entries.get(worker_id)
        machine = (entry and entry.instance_id) or other or "i-9"
        self.both(
            lambda: self.naive.observed(worker_id, machine, address, running, self.now),
            lambda: self.real.observed(worker_id, described(machine, address, running), self.now),
        )

    @rule(worker_id=known, protects=st.booleans())
    def look_at_tags(self, worker_id: str, protects: bool) -> None:
        entry = self.naive.entries.get(worker_id)
        if entry is None or entry.instance_id is None:
            return
        its_tags = {tags.BROKER: "lab", **({tags.PROTECT: "yes"} if protects else {})}
        shown = replace(described(entry.instance_id, entry.address, entry.running), tags=its_tags)
        self.both(
            lambda: self.naive.tagged(worker_id, protects, self.now),
            lambda: self.real.observed(worker_id, shown, self.now),
        )

    @rule(worker_id=known, reason=st.sampled_from(["used-up", "too old"]))
    def close(self, worker_id: str, reason: str) -> None:
        self.both(
            lambda: self.naive.close(worker_id, reason, self.now),
            lambda: self.real.close(worker_id, reason, self.now),
        )

    @rule(worker_id=known)
    def show_ready(self, worker_id: str) -> None:
        self.both(lambda: self.naive.ready(worker_id, self.now), lambda: self.real.ready(worker_id, self.now))

    @rule(machine=st.sampled_from(MACHINES), pool=st.sampled_from(POOLS), address=st.sampled_from(ADDRESSES))
    def adopt_a_ready_one(self, machine: str, pool: str, address: str) -> None:
        """Two steps in one, so that much of the time there is somebody to hand out."""
        self.adopt(machine, pool, address, True)
        self.agree()
        self.show_ready(machine)

    @rule(worker_id=known, reason=reasons, standing=st.integers(0, 3).map(lambda number: number == 0))
    def doubt(self, worker_id: str, reason: str, standing: bool) -> None:
        self.both(
            lambda: self.naive.suspect(worker_id, reason, self.now, standing=standing),
            lambda: self.real.suspect(worker_id, reason, self.now, standing=standing),
        )

    @rule(worker_id=known, step=st.sampled_from(list(TAKEN)), reason=reasons)
    def take(self, worker_id: str, step: Step, reason: str) -> None:
        self.both(
            lambda: self.naive.take(worker_id, str(step), reason, self.now),
            lambda: TAKEN[step](self.real, worker_id, reason, self.now),
        )

    @rule(machine=st.sampled_from(MACHINES), pool=st.sampled_from(POOLS), stopped=st.booleans())
    def adopt_a_stopped_one(self, machine: str, pool: str, stopped: bool) -> None:
        state = InstanceState.STOPPED if stopped else InstanceState.STOPPING
        shown = replace(described(machine, ADDRESSES[0], False), state=state)
        self.both(
            lambda: self.naive.adopt_stopped(machine, pool, str(state), self.now),
            lambda: self.real.adopt(shown, pool, PORT, self.now, kept=True),
        )

    @rule(worker_id=known, reason=reasons)
    def stop(self, worker_id: str, reason: str) -> None:
        self.both(
            lambda: self.naive.stop(worker_id, reason, self.now),
            lambda: self.real.stop(worker_id, reason, self.now),
        )

    @rule(worker_id=known)
    def halt(self, worker_id: str) -> None:
        self.both(
            lambda: self.naive.stopped(worker_id, self.now), lambda: self.real.stopped(worker_id, self.now)
        )

    @rule(worker_id=known)
    def start(self, worker_id: str) -> None:
        self.both(lambda: self.naive.start(worker_id, self.now), lambda: self.real.start(worker_id, self.now))

    def granted(self, lease: Lease) -> Any:
        return self.both(lambda: self.naive.grant(lease, self.now), lambda: self.real.grant(lease, self.now))

    # --- leases -------------------------------------------------------------------------------------

    def new_lease(self, worker_id: str, client: str, ttl_seconds: float, exclusive: bool) -> Lease:
        self.leases += 1
        return Lease(f"lease-{self.leases}", worker_id, client, ttl_seconds, exclusive)

    @rule(
        worker_id=known,
        client=st.sampled_from(CLIENTS),
        ttl_seconds=st.sampled_from([10.0, 30.0]),
        exclusive=st.booleans(),
    )
    def grant(self, worker_id: str, client: str, ttl_seconds: float, exclusive: bool) -> None:
        lease = self.new_lease(worker_id, client, ttl_seconds, exclusive)
        self.granted(lease)

    @rule(
        pool=st.sampled_from(POOLS),
        client=st.sampled_from(CLIENTS),
        exclusive=st.booleans(),
        wished=st.none() | st.sets(st.sampled_from([*ORDERS, *MACHINES])),
    )
    def hand_out(self, pool: str, client: str, exclusive: bool, wished: set[str] | None) -> None:
        """As the service does it: ask who is available, and take him in the same breath."""
        wish = None if wished is None else lambda worker: worker.id in wished
        worker = self.real.available(pool, client, exclusive=exclusive, wish=wish)
        naive_wish = (lambda _: True) if wished is None else (lambda worker_id: worker_id in wished)
        expected = self.naive.available(pool, client, exclusive=exclusive, wish=naive_wish)
        assert (worker and worker.id) == expected
        if worker is not None:
            lease = self.new_lease(worker.id, client, 20.0, exclusive)
            granted = self.both(
                lambda: self.naive.grant(lease, self.now), lambda: self.real.grant(lease, self.now)
            )
            assert granted is not None, "whoever is available can be had"

    @rule(
        pool=st.sampled_from(POOLS),
        client=st.sampled_from(CLIENTS),
        count=st.integers(1, 4),
        exclusive=st.booleans(),
        bound=st.booleans(),
        wished=st.none() | st.sets(st.sampled_from([*ORDERS, *MACHINES])),
    )
    def acquire(
        self, pool: str, client: str, count: int, exclusive: bool, bound: bool, wished: set[str] | None
    ) -> None:
        """So many at once, each of them new."""
        wish = None if wished is None else lambda worker: worker.id in wished
        places = self.real.places(pool, count, exclusive=exclusive, wish=wish)
        naive_wish = (lambda _: True) if wished is None else (lambda worker_id: worker_id in wished)
        seats = SEATS.get(pool)
        assert places == self.naive.places(pool, count, exclusive=exclusive, seats=seats, wish=naive_wish)
        for worker_id in places:
            plain = self.new_lease(worker_id, client, 20.0, exclusive)
            lease = replace(plain, acquired=True, bound=bound)
            granted = self.granted(lease)
            assert granted == lease, "it is a lease of its own"

    @rule(worker_id=known, client=st.sampled_from(CLIENTS))
    def end(self, worker_id: str, client: str) -> None:
        self.both(
            lambda: self.naive.end_lease(worker_id, client, "released", self.now),
            lambda: self.real.end_lease(worker_id, client, "released", self.now),
        )

    @precondition(lambda self: self.naive.grants)
    @rule(number=st.integers(0, 20))
    def renew(self, number: int) -> None:
        worker_id, key = self.naive.grants[number % len(self.naive.grants)]
        (lease,) = [one for one in self.real.leases(worker_id) if one.key == key]
        self.both(
            lambda: self.naive.renew(worker_id, key, self.now), lambda: self.real.renew(lease, self.now)
        )

    @precondition(lambda self: self.naive.grants)
    @rule(number=st.integers(0, 20))
    def keep_by_name(self, number: int) -> None:
        worker_id, key = self.naive.grants[number % len(self.naive.grants)]
        (lease,) = [one for one in self.real.leases(worker_id) if one.key == key]
        self.both(
            lambda: self.naive.keep_by_name(worker_id, key, 15.0, self.now),
            lambda: self.real.keep_by_name(lease.id, 15.0, self.now),
        )

    @rule(worker_id=known)
    def expire(self, worker_id: str) -> None:
        self.both(
            lambda: self.naive.expire_leases(worker_id, self.now),
            lambda: self.real.expire_leases(worker_id, self.now),
        )

    # --- time ---------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 5.0, 15.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.naive.entries)
    @rule(number=st.integers(0, 20), seconds=st.sampled_from([-1.0, 0.0, 3.0, 20.0]))
    def look_again(self, number: int, seconds: float) -> None:
        ids = list(self.naive.entries)
        entry = self.naive.entries[ids[number % len(ids)]]
        entry.look_at = self.now + seconds
        self.real.look_again(entry.id, entry.look_at)

    @rule()
    def due(self) -> None:
        assert [worker.id for worker in self.real.due(self.now)] == self.naive.due(self.now)
        assert self.real.due(self.now) == []

    # --- what must hold at every moment -------------------------------------------------------------

    @invariant()
    def agree(self) -> None:
        entries = self.naive.entries
        self.seen.update(entries)
        assert len(self.real) == len(entries)
        assert {worker.id for worker in self.real} == set(entries)
        for worker_id, entry in entries.items():
            worker = self.real.get(worker_id)
            assert worker is not None
            assert (
                worker.pool, str(worker.state), worker.instance_id, worker.address, worker.running,
                worker.reason, worker.standing_notice, worker.since_at, worker.closed, worker.protected,
                worker.started_at, worker.born_at,
            ) == (
                entry.pool, entry.state, entry.instance_id, entry.address, entry.running,
                entry.reason, entry.notice, entry.since_at, entry.closed, entry.protected,
                entry.started_at, entry.born_at,
            )  # fmt: skip
            assert self.real.uses(worker_id) == entry.uses
            assert self.real.used_at(worker_id) == entry.used_at
            assert self.real.proved_at(worker_id) == entry.proved_at
            assert self.real.leases(worker_id) == [lease for lease, _ in entry.holds.values()]
            assert self.real.busy(worker_id) is bool(entry.holds)
            for lease, ends_at in entry.holds.values():
                assert self.real.lease(lease.id) == lease
                assert lease in self.real.leases_of(worker_id, lease.client)
                assert lease.acquired or self.real.lease_of(worker_id, lease.client) == lease
                assert self.real.lease_ends_at(lease.id) == ends_at

    @invariant()
    def agree_on_who_is_where(self) -> None:
        for machine in MACHINES:
            assert id_of(self.real.by_instance(machine)) == id_of(self.naive.by_instance(machine))
        for address in ADDRESSES:
            found = self.real.by_address(address)
            assert id_of(found) == id_of(self.naive.by_address(address))
            assert found is None or (found.state in USABLE and found.address == address)
        for state in BOOKED:
            for pool in POOLS:
                ids = {e.id for e in self.naive.entries.values() if (e.pool, e.state) == (pool, str(state))}
                assert {worker.id for worker in self.real.in_state(state, pool=pool)} == ids
                assert self.real.count(pool, state) == len(ids)
        assert {worker.id for worker in self.real.in_state(*BOOKED)} == set(self.naive.entries)
        assert self.real.next_look_at() == self.naive.next_look_at()

    @invariant()
    def agree_on_who_gets_whom(self) -> None:
        for pool in POOLS:
            inside = [entry for entry in self.naive.entries.values() if entry.pool == pool]
            assert self.real.lease_count(pool) == sum(len(entry.holds) for entry in inside)
            for client in CLIENTS:
                held = {e.id for e in inside if any(one.client == client for one, _ in e.holds.values())}
                assert {worker.id for worker in self.real.workers_held(pool, client)} == held
                ids = {entry.holds[client][0].id for entry in inside if client in entry.holds}
                assert self.real.held_leases(pool, client) == ids
            for exclusive in (False, True):
                queue = self.naive.candidates(pool, exclusive=exclusive)
                assert candidates(self.real, pool, exclusive=exclusive) == queue
                for client in CLIENTS:
                    worker = self.real.available(pool, client, exclusive=exclusive)
                    assert id_of(worker) == self.naive.available(pool, client, exclusive=exclusive)
                    assert worker is None or worker.state is WorkerState.READY

    @invariant()
    def no_exclusive_hold_is_shared(self) -> None:
        for worker in self.real:
            leases = self.real.leases(worker.id)
            assert len(leases) <= 1 or not any(lease.exclusive for lease in leases)
            assert not leases or str(worker.state) in HOLDABLE, "nobody holds a worker on its way out"

    @invariant()
    def whoever_only_listens_knows_the_same(self) -> None:
        alive = {id_: s for id_, s in self.listener.states.items() if s is not WorkerState.GONE}
        assert alive == {worker.id: worker.state for worker in self.real}
        holds = {(lease.worker_id, lease.key): lease for w in self.real for lease in self.real.leases(w.id)}
        assert self.listener.holds == holds

    @invariant()
    def nothing_is_kept_of_those_who_are_gone(self) -> None:
        machines = {entry.instance_id for entry in self.naive.entries.values()}
        gone = {*self.seen, *MACHINES} - set(self.naive.entries) - machines
        holds = [lease for entry in self.naive.entries.values() for lease, _ in entry.holds.values()]
        gone |= set(CLIENTS) - {lease.client for lease in holds}
        live = {lease.id for worker in self.real for lease in self.real.leases(worker.id)}
        for name, index in {**vars(self.real), **vars(self.real._deadlines)}.items():
            if isinstance(index, dict):
                words = set(words_of(index))
                assert not words & gone, f"{name} still knows of {words & gone}"
                assert {word for word in words if word.startswith("lease-")} <= live, name


def outcome(step: Callable[[], Any]) -> tuple[Any, type[Exception] | None]:
    """What the step returned, or the kind of error that it raised."""
    try:
        return step(), None
    except REFUSALS as error:
        return None, type(error)


def described(machine: str, address: str | None, running: bool) -> Any:
    return instance(machine, address, state=InstanceState.RUNNING if running else InstanceState.PENDING)


def id_of(found: Any) -> str | None:
    return None if found is None else str(found.id)


def candidates(registry: Registry, pool: str, *, exclusive: bool) -> list[str]:
    """Everybody who could be handed out to a newcomer, in order: a wish that nobody fulfils sees them all."""
    seen: list[str] = []

    def looked_at(worker: Worker) -> bool:
        seen.append(worker.id)
        return False

    assert registry.available(pool, "newcomer", exclusive=exclusive, wish=looked_at) is None
    return seen


def words_of(value: object) -> list[str]:
    """Every string in nested keys and values."""
    if isinstance(value, dict):
        return [word for item in value.items() for word in words_of(item)]
    if isinstance(value, tuple):
        return [word for part in value for word in words_of(part)]
    if isinstance(value, Lease):
        return [value.id, value.worker_id]
    return [value] if isinstance(value, str) else []


TestTwoRegistries = TwoRegistries.TestCase
TestTwoRegistries.settings = settings(FEW, max_examples=100, stateful_step_count=50)
