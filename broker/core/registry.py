"""What every worker is doing right now, and who holds it.

The life of a worker is the table in life.py: an illegal step raises IllegalStep and changes nothing.
A worker is handed out only from READY, and DRAINING has no way back; both are decided here, in one table
that one thread uses, so no client is ever given a worker that is being killed.

The clocks that every hand-out moves (when a lease ends, when a worker was last used) live in plain
dictionaries beside the frozen values, so that renewing is O(1); a use only postpones a deadline, so it does
not touch deadlines.py either. Whoever looks at a due worker says when to look next. Every operation is
O(log n) or better; only `available` with a wish walks the candidates of one pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from broker.core import tags
from broker.core.deadlines import Deadlines
from broker.core.errors import Denied, IllegalStep, WorkerNotFound
from broker.core.life import BOOKED, LIFE, USABLE, Step
from broker.core.model import (
    UNKNOWN_CLIENT,
    Event,
    Instance,
    InstanceState,
    Lease,
    LeaseEnded,
    LeaseGranted,
    Offering,
    Order,
    ProtectionChanged,
    Worker,
    WorkerChanged,
    WorkerSeen,
    WorkerState,
)
from broker.core.money import Price

FREE = Price()
FOUND_STOPPED = {
    InstanceState.STOPPING: Step.ADOPT_STOPPING,
    InstanceState.STOPPED: Step.ADOPT_STOPPED,
}
S = WorkerState

# Listings may be a minute old (ledger.STALE_SECONDS_MAX) and take a minute (reconcile.SCAN_SECONDS_MAX): one
# without the tag proves that somebody has taken it away only so long after the last one that showed it.
UNPROTECTED_SECONDS = 120.0


class Registry:
    """The books. `emit` hears every event at the moment it happens, so that no caller can forget to tell.

    An event is the last thing a change does: whoever hears it finds the books in order and may change them.
    `seats` says how many leases a shared worker of a pool may have, `uses_max` how many it may have ever had;
    None: any number. Who closes a worker that is used up is somebody else.
    """

    def __init__(
        self,
        emit: Callable[[Event], None] = lambda event: None,
        *,
        seats: Callable[[str], int | None] = lambda pool: None,
        uses_max: Callable[[str], int | None] = lambda pool: None,
    ) -> None:
        self._emit = emit
        self._seats = seats
        self._uses_max = uses_max
        self.generation = 0  # moves with every step and every change of a hold: a cache may compare it
        self._workers: dict[str, Worker] = {}
        self._by_instance: dict[str, str] = {}
        self._by_address: dict[str, dict[str, None]] = {}  # the one that claimed it last comes last
        self._by_order: dict[str, dict[str, None]] = {}
        self._by_state: dict[tuple[str, WorkerState], dict[str, None]] = {}
        self._leases: dict[str, dict[str, Lease]] = {}  # worker id → key of the lease → lease
        self._by_lease: dict[str, Lease] = {}
        self._held: dict[tuple[str, str], dict[str, None]] = {}  # (pool, key) → worker ids
        self._of_client: dict[tuple[str, str], dict[str, int]] = {}  # (pool, client) → worker → leases
        self._lease_ends_at: dict[str, float] = {}
        self._used_at: dict[str, float] = {}
        self._proved_at: dict[str, float] = {}
        self._protected_at: dict[str, float] = {}  # when the protect tag was seen last
        self._uses: dict[str, int] = {}
        self._free: dict[str, dict[str, None]] = {}  # pool → READY and held by nobody, last freed last
        self._open: dict[str, dict[str, None]] = {}  # pool → READY workers that one more client may share
        self._deadlines = Deadlines()

    # --- looking things up -------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(tuple(self._workers.values()))

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def by_instance(self, instance_id: str) -> Worker | None:
        return self._workers.get(self._by_instance.get(instance_id, ""))

    def by_address(self, address: str) -> Worker | None:
        """The worker that clients reach at `address`: never one on its way out."""
        for worker_id in reversed(self._by_address.get(address, {})):
            if self._workers[worker_id].state in USABLE:
                return self._workers[worker_id]
        return None

    def of_order(self, order_id: str) -> list[Worker]:
        """The workers of an order, with a machine or without."""
        return [self._workers[worker_id] for worker_id in self._by_order.get(order_id, ())]

    def in_state(self, *states: WorkerState, pool: str | None = None) -> list[Worker]:
        return [
            self._workers[worker_id]
            for (name, state), ids in self._by_state.items()
            if ids and state in states and pool in (None, name)
            for worker_id in ids
        ]

    def count(self, pool: str, *states: WorkerState) -> int:
        return sum(len(self._by_state.get((pool, state), ())) for state in states)

    def leases(self, worker_id: str) -> list[Lease]:
        return list(self._leases.get(worker_id, {}).values())

    def lease(self, lease_id: str) -> Lease | None:
        """The lease of that id while it lives: an id is never used again."""
        return self._by_lease.get(lease_id)

    def lease_of(self, worker_id: str, client: str) -> Lease | None:
        """The client's lease by GET_WORKER or PING."""
        return self._leases.get(worker_id, {}).get(client)

    def leases_of(self, worker_id: str, client: str) -> list[Lease]:
        """All of the client's leases on the worker, acquired ones too."""
        return [lease for lease in self._leases.get(worker_id, {}).values() if lease.client == client]

    def full(self, worker_id: str) -> bool:
        """Whether a shared worker has as many clients as it may have."""
        seats = self._seats(self._workers[worker_id].pool)
        return seats is not None and self._seated(worker_id) >= seats

    def held_leases(self, pool: str, client: str) -> frozenset[str]:
        """The ids of the leases that the client has in the pool by GET_WORKER and PING."""
        return frozenset(self._leases[id_][client].id for id_ in self._held.get((pool, client), ()))

    def lease_ends_at(self, lease_id: str) -> float | None:
        return self._lease_ends_at.get(lease_id)

    def lease_count(self, pool: str) -> int:
        return sum(len(self._leases.get(w.id, ())) for w in self.in_state(*BOOKED, pool=pool))

    def unheld(self, pool: str) -> Iterator[Worker]:
        """READY and held by nobody; the one freed last comes last."""
        return (self._workers[id_] for id_ in self._free.get(pool, ()))

    def busy(self, worker_id: str) -> bool:
        return bool(self._leases.get(worker_id))

    def used_at(self, worker_id: str) -> float:
        return self._used_at[worker_id]

    def proved_at(self, worker_id: str) -> float:
        """When the worker last showed that it is ready: long ago when it never did."""
        return self._proved_at.get(worker_id, float("-inf"))

    def uses(self, worker_id: str) -> int:
        """To how many holders it has been given, over restarts: leases granted, renewals not counted."""
        return self._uses.get(worker_id, 0)

    def workers_held(self, pool: str, client: str) -> list[Worker]:
        """The workers of the pool that the client holds, by whichever command."""
        return [self._workers[worker_id] for worker_id in self._of_client.get((pool, client), ())]

    # --- the life of a worker ----------------------------------------------------------------------

    def order(self, order: Order, port: int, now: float, *, place: str | None = None) -> Worker:
        """ORDERED: the order is on disk, the launch call may follow. One call for each of `order.places`."""
        worker = Worker(
            place or order.places[0],
            order.pool,
            LIFE[None, Step.ORDER],
            order.offerings[0],
            port,
            since_at=now,
            born_at=now,
            order_id=order.id,
        )
        return self._enter(worker, now)

    def adopt(
        self,
        instance: Instance,
        pool: str,
        port: int,
        now: float,
        *,
        order_id: str | None = None,
        born_at: float | None = None,
        price: Price = FREE,
        kept: bool = False,
    ) -> Worker:
        """BOOTING: a machine of ours that the books do not know, found in a listing. It counts as just used.

        `born_at` is when it shall count as born, for its age cap; now by default. With `kept` it is one that
        stops or has been stopped, and is kept so.
        """
        offering = Offering(
            instance.region,
            instance.instance_type,
            instance.market,
            instance.zone,
            instance.cores,
            price.usd_micros_per_hour,
            price.assumed,
        )
        worker = Worker(
            instance.id,
            pool,
            LIFE[None, FOUND_STOPPED[instance.state] if kept else Step.ADOPT],
            offering,
            port,
            since_at=now,
            born_at=now if born_at is None else born_at,
            order_id=order_id,
        )
        worker = _with_instance(worker, instance)
        worker = self._enter(replace(worker, address=None) if kept else worker, now)
        return self._tagged(worker, instance, now)

    def launched(
        self, worker_id: str, instance: Instance, now: float, *, price: Price | None = None
    ) -> Worker:
        """BOOTING: the order has its machine. `price` when it is not the one of the offering on order."""
        if instance.id in self._by_instance:
            raise IllegalStep(f"{instance.id} is in the books already")
        worker = self._step(worker_id, Step.LAUNCH, now, instance=instance, price=price)
        return self._tagged(worker, instance, now)

    def refused(self, worker_id: str, reason: str, now: float) -> Worker:
        return self._step(worker_id, Step.REFUSE, now, reason)

    def observed(self, worker_id: str, instance: Instance, now: float) -> Worker:
        """Take in what the cloud says of a worker; its state is not moved by it."""
        worker = self._workers[worker_id]
        if worker.instance_id != instance.id:
            raise IllegalStep(f"{worker_id} is not {instance.id}")
        if worker.state is not S.STOPPED:  # what a listing shows of one may be how it was before
            worker = self._seen(worker, instance, now)
        return self._tagged(worker, instance, now)

    def recall(self, worker_id: str, *, uses: int, protected: bool, now: float) -> Worker:
        """What was known of the machine before a restart, before anything is decided about it."""
        self._uses[worker_id] = max(uses, self.uses(worker_id))
        return self._protect(self._workers[worker_id], protected or self._workers[worker_id].protected, now)

    def outdate(self, worker_id: str) -> None:
        """It was made by settings that count no more. Whoever holds it keeps it, and it is handed out."""
        self._workers[worker_id] = replace(self._workers[worker_id], outdated=True)

    def close(self, worker_id: str, reason: str, now: float) -> Worker:
        """No new clients; whoever holds it keeps it, also by asking again. There is no way back."""
        worker = self._workers[worker_id]
        if not worker.closed:
            worker = self._workers[worker_id] = replace(worker, closed=reason)
            self._reindex_holds(worker)
            self._tell(WorkerSeen(worker, now))
        return worker

    def ready(self, worker_id: str, now: float) -> Worker:
        """READY: readiness was just shown. Also renews the proof of a worker that is READY already."""
        worker = self._workers[worker_id]
        if worker.standing_notice or worker.address is None:
            raise IllegalStep(
                f"{worker_id} cannot become ready: {worker.standing_notice or 'it has no address'}"
            )
        if worker.state is not S.READY:
            self._require(worker, Step.SHOW_READY)
        self._proved_at[worker_id] = now
        if worker.state is not S.READY:
            worker = self._step(worker_id, Step.SHOW_READY, now)
        return worker

    def suspect(self, worker_id: str, reason: str, now: float, *, standing: bool = False) -> Worker:
        """SUSPECT: keeps its leases, is not handed out. A standing notice cannot be lifted by a probe."""
        worker = self._workers[worker_id]
        self._proved_at.pop(worker_id, None)
        if standing:
            worker = self._workers[worker_id] = replace(worker, standing_notice=reason)
        return self._step(worker_id, Step.DOUBT, now, reason) if worker.state is S.READY else worker

    def lift_notice(self, worker_id: str, notice: str, now: float) -> None:
        """That standing notice does not hold any more; a probe shows whether the worker is ready."""
        worker = self._workers[worker_id]
        if worker.standing_notice == notice:
            worker = self._workers[worker_id] = replace(worker, standing_notice="")
            self.look_again(worker_id, now)
            self._tell(WorkerSeen(worker, now))

    def stop(self, worker_id: str, reason: str, now: float) -> Worker:
        """STOPPING: out of every client's reach, before Stop is sent. Raises IllegalStep while it is held."""
        self._require(self._workers[worker_id], Step.STOP)
        if self.busy(worker_id):
            raise IllegalStep(f"{worker_id} is held: it is not stopped")
        self._proved_at.pop(worker_id, None)
        return self._step(worker_id, Step.STOP, now, reason)

    def stopped(self, worker_id: str, now: float) -> Worker:
        """STOPPED: the cloud says so, or a Start has come to nothing. It has no address any more."""
        if self.busy(worker_id):
            raise IllegalStep(f"{worker_id} is held: it is not kept stopped")
        self._require(self._workers[worker_id], Step.HALT)
        self._drop_address(self._workers[worker_id])
        halted = replace(self._workers[worker_id], address=None, running=False, started_at=None)
        self._workers[worker_id] = halted
        return self._step(worker_id, Step.HALT, now, halted.reason)

    def start(self, worker_id: str, now: float) -> Worker:
        """BOOTING: Start follows, or somebody else has sent it. It counts as just used, and has not aged
        while it was stopped."""
        worker = self._workers[worker_id]
        self._require(worker, Step.START)
        born_at = worker.born_at + (now - worker.since_at)
        self._workers[worker_id] = replace(
            worker, born_at=born_at, started_at=now, launched_before_unix=worker.launched_unix
        )
        self._used_at[worker_id] = now
        return self._step(worker_id, Step.START, now)

    def drain(self, worker_id: str, reason: str, now: float) -> Worker:
        """DRAINING: never handed out again. Ends every lease on it, after the fence is up."""
        worker = self._step(worker_id, Step.DRAIN, now, reason)
        self._end_leases(worker_id, reason, now)
        return worker

    def terminating(self, worker_id: str, now: float) -> Worker:
        return self._step(worker_id, Step.TERMINATE, now, self._workers[worker_id].reason)

    def gone(self, worker_id: str, reason: str, now: float) -> Worker:
        """GONE: the cloud says so. The worker leaves the books."""
        return self._step(worker_id, Step.GO, now, reason)

    # --- leases ------------------------------------------------------------------------------------

    def available(
        self, pool: str, client: str, *, exclusive: bool, wish: Callable[[Worker], bool] | None = None
    ) -> Worker | None:
        """The worker that `client` would get: the one it holds, else an unheld or shareable READY one.

        Shared pools fill the oldest worker first, so that the others can become idle and go; an exclusive
        wish takes the one freed last, for the same reason.
        """
        for worker_id in self._held.get((pool, client), ()):
            worker = self._workers[worker_id]
            fits = wish is None or wish(worker)
            if worker.state is S.READY and fits and (not exclusive or self._only_holder(worker_id, client)):
                return worker
        candidates: Iterable[str] = (
            reversed(self._free.get(pool, {})) if exclusive else self._open.get(pool, {})
        )
        for worker_id in candidates:
            if wish is None or wish(self._workers[worker_id]):
                return self._workers[worker_id]
        return None

    def places(
        self, pool: str, count: int, *, exclusive: bool, wish: Callable[[Worker], bool] | None = None
    ) -> list[str]:
        """The ids of the workers that `count` new holds would go to, one each; fewer when there is no room.

        In the order of `available`, without what anybody holds already; a shared worker is named once for
        each of the holds.
        """
        found: list[str] = []
        candidates: Iterable[str] = (
            reversed(self._free.get(pool, {})) if exclusive else self._open.get(pool, {})
        )
        seats, uses_max = 1 if exclusive else self._seats(pool), self._uses_max(pool)
        for worker_id in candidates:
            if len(found) >= count:
                break
            if wish is None or wish(self._workers[worker_id]):
                room = count - len(found)
                if seats is not None:
                    room = min(room, seats - self._seated(worker_id))
                if uses_max is not None:
                    room = min(room, uses_max - self.uses(worker_id))
                found += [worker_id] * room  # none where it is negative
        return found

    def grant(self, lease: Lease, now: float, *, counts: bool = True) -> Lease:
        """Give `lease.client` its hold, or renew the hold it has. Raises Denied, WorkerNotFound.

        `counts`: a new hold is one more use of the worker; one from before a restart has been counted.
        """
        worker = self._workers.get(lease.worker_id)
        if worker is None or worker.state not in USABLE:
            raise WorkerNotFound
        holders = self._leases.setdefault(worker.id, {})
        held = holders.get(lease.key)
        if held is None or held.exclusive < lease.exclusive:
            self._require_no_conflict(holders, lease)
        if held is None and counts and worker.closed:
            _require_place(holders, lease)
        if held is not None:
            upgrade = held.exclusive < lease.exclusive
            if upgrade:
                held = holders[lease.key] = self._by_lease[held.id] = replace(held, exclusive=True)
                self._reindex_holds(worker)
            self.renew(held, now)
            if upgrade:
                self._tell(LeaseGranted(held, worker, False, now))  # or a restart would share it again
            return held
        holders[lease.key] = self._by_lease[lease.id] = lease
        if counts and lease.client != UNKNOWN_CLIENT:
            self._uses[worker.id] = self.uses(worker.id) + 1
        self._held.setdefault((worker.pool, lease.key), {})[worker.id] = None
        theirs = self._of_client.setdefault((worker.pool, lease.client), {})
        theirs[worker.id] = theirs.get(worker.id, 0) + 1
        self.renew(lease, now)
        self._deadlines.no_later(worker.id, now + lease.ttl_seconds)
        self._reindex_holds(worker)
        first = len(holders) == 1
        if lease.exclusive and lease.client != UNKNOWN_CLIENT and UNKNOWN_CLIENT in holders:
            self.end_lease(worker.id, UNKNOWN_CLIENT, "its client is known", now)
        self._tell(LeaseGranted(lease, worker, first, now))
        return lease

    def keep_by_name(self, lease_id: str, ttl_seconds: float, now: float) -> Lease:
        """A lease of its own is replaced by one by the client's name, if the client has none; nobody else can
        come in between. Returns the one by name, renewed."""
        lease = self._by_lease[lease_id]
        holders, worker = self._leases[lease.worker_id], self._workers[lease.worker_id]
        named = holders.get(lease.client)
        if named is not None:
            self.renew(named, now)
            if named is not lease:
                self.end_lease(worker.id, lease.key, "held by name", now)
            return named
        named_id = f"{lease_id}-by-name"
        named = replace(lease, id=named_id, acquired=False, bound=False, ttl_seconds=ttl_seconds)
        del holders[lease.key], self._by_lease[lease_id], self._lease_ends_at[lease_id]
        holders[named.key] = self._by_lease[named_id] = named
        held = self._held[(worker.pool, lease.key)]
        del held[worker.id]
        if not held:
            del self._held[(worker.pool, lease.key)]
        self._held.setdefault((worker.pool, named.key), {})[worker.id] = None
        self.renew(named, now)
        self._deadlines.no_later(worker.id, now + ttl_seconds)
        self._tell(LeaseGranted(named, worker, False, now))
        self._tell(LeaseEnded(lease, worker, False, "held by name", now))
        return named

    def share(self, lease_id: str, now: float) -> Lease:
        """The hold is not exclusive any more: its client has asked for that in vain."""
        lease = self._by_lease[lease_id]
        holders, worker = self._leases[lease.worker_id], self._workers[lease.worker_id]
        if lease.exclusive:
            lease = holders[lease.key] = self._by_lease[lease_id] = replace(lease, exclusive=False)
            self._reindex_holds(worker)
            self._tell(LeaseGranted(lease, worker, False, now))  # or after a restart nobody would share it
        return lease

    def renew(self, lease: Lease, now: float) -> None:
        """The client used its worker: O(1), the busiest line of the broker."""
        self._lease_ends_at[lease.id] = now + lease.ttl_seconds
        self._used_at[lease.worker_id] = now

    def end_lease(self, worker_id: str, key: str, reason: str, now: float) -> Lease | None:
        """End the hold of that key (`Lease.key`), if there is one. Returns the lease that ended."""
        holders = self._leases.get(worker_id, {})
        lease = holders.pop(key, None)
        if lease is None:
            return None
        worker = self._workers[worker_id]
        del self._lease_ends_at[lease.id], self._by_lease[lease.id]
        held = self._held[(worker.pool, key)]
        held.pop(worker_id)
        if not held:
            del self._held[(worker.pool, key)]
        self._count_off(worker, lease.client)
        if not holders:
            del self._leases[worker_id]
        self._reindex_holds(worker)
        self._tell(LeaseEnded(lease, worker, not holders, reason, now))
        return lease

    def _count_off(self, worker: Worker, client: str) -> None:
        theirs = self._of_client[(worker.pool, client)]
        theirs[worker.id] -= 1
        if not theirs[worker.id]:
            del theirs[worker.id]
        if not theirs:
            del self._of_client[(worker.pool, client)]

    def expire_leases(self, worker_id: str, now: float) -> None:
        """End the leases whose time is over, as of the moment it was over; bound ones begin anew instead."""
        for lease in self.leases(worker_id):
            ends_at = self._lease_ends_at.get(lease.id)
            if ends_at is None or ends_at > now:
                continue
            if lease.bound:
                self.renew(lease, now)
            else:
                self.end_lease(worker_id, lease.key, "expired", ends_at)

    def seats_changed(self) -> None:
        """`seats` says something else from now on."""
        for worker in self._workers.values():
            self._reindex_holds(worker)
        self.generation += 1

    # --- deadlines ---------------------------------------------------------------------------------

    def look_again(self, worker_id: str, at: float) -> None:
        """Have `due` name this worker at `at`; replaces what was asked before."""
        self._deadlines.set(worker_id, at)

    def due(self, now: float) -> list[Worker]:
        """The workers whose deadline has come. Each must be asked for again with `look_again`."""
        return [self._workers[worker_id] for worker_id in self._deadlines.due(now)]

    def next_look_at(self) -> float | None:
        """When `due` will have something, or None."""
        return self._deadlines.next_at()

    # --- inside ------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self.generation += 1
        self._emit(event)

    def _require(self, worker: Worker, step: Step) -> WorkerState:
        after = LIFE.get((worker.state, step))
        if after is None:
            raise IllegalStep(f"{worker.id} is {worker.state}: no step for {step!r}")
        return after

    def _enter(self, worker: Worker, now: float) -> Worker:
        if worker.id in self._workers or worker.instance_id in self._by_instance:
            raise IllegalStep(f"{worker.id} is in the books already")
        self._workers[worker.id] = worker
        self._used_at[worker.id] = now
        if worker.order_id is not None:
            self._by_order.setdefault(worker.order_id, {})[worker.id] = None
        self._index(worker)
        self._by_state.setdefault((worker.pool, worker.state), {})[worker.id] = None
        self.look_again(worker.id, now)
        self._tell(WorkerChanged(worker, None, now))
        return self._workers[worker.id]

    def _step(
        self,
        worker_id: str,
        step: Step,
        now: float,
        reason: str = "",
        instance: Instance | None = None,
        price: Price | None = None,
    ) -> Worker:
        before = self._workers[worker_id]
        after = replace(before, state=self._require(before, step), since_at=now, reason=reason)
        if instance is not None:
            after = _with_instance(after, instance)
            self._index(after)
        if price is not None:
            micros, assumed = price.usd_micros_per_hour, price.assumed
            offering = replace(after.offering, price_usd_micros_per_hour=micros, price_assumed=assumed)
            after = replace(after, offering=offering)
        self._workers[worker_id] = after
        del self._by_state[(before.pool, before.state)][worker_id]
        self._reindex_holds(after)  # before anyone hears of it: a listener may hand out workers at once
        if after.state is S.GONE:
            self._end_leases(worker_id, reason, now)
            self._forget(after)
        else:
            self._by_state.setdefault((after.pool, after.state), {})[worker_id] = None
            self.look_again(worker_id, now)
        self._tell(WorkerChanged(after, before.state, now))
        return self._workers.get(worker_id, after)

    def _seen(self, worker: Worker, instance: Instance, now: float) -> Worker:
        after = _with_instance(worker, instance)
        if after != worker:
            self._workers[worker.id] = after
            if after.address != worker.address:  # else it may be another's by now: the later claim counts
                self._drop_address(worker)
                self._index(after)
            self._tell(WorkerSeen(after, now))
        return self._workers[worker.id]

    def _tagged(self, worker: Worker, instance: Instance, now: float) -> Worker:
        """Take in its tags. A machine of ours has some: where there are none, nobody has looked at them."""
        return self._protect(worker, tags.protects(instance.tags), now) if instance.tags else worker

    def _protect(self, worker: Worker, tagged: bool, now: float) -> Worker:
        """Protection begins at the first sight of the tag, and ends when its absence is certain."""
        if tagged:
            self._protected_at[worker.id] = now
        elif not worker.protected or now - self._protected_at[worker.id] < UNPROTECTED_SECONDS:
            return worker
        if tagged is not worker.protected:
            worker = self._workers[worker.id] = replace(worker, protected=tagged)
            self.look_again(worker.id, now)
            self._tell(ProtectionChanged(worker, now))
        return worker

    def _index(self, worker: Worker) -> None:
        if worker.instance_id:
            self._by_instance[worker.instance_id] = worker.id
        if worker.address and worker.state in USABLE:  # a dying worker must not claim a reused address back
            claims = self._by_address.setdefault(worker.address, {})
            claims.pop(worker.id, None)
            claims[worker.id] = None

    def _drop_address(self, worker: Worker) -> None:
        """One that has the same address as well is found by it again."""
        claims = self._by_address.get(worker.address or "", {})
        claims.pop(worker.id, None)
        if worker.address and not claims:
            self._by_address.pop(worker.address, None)

    def _forget(self, worker: Worker) -> None:
        del self._workers[worker.id]
        del self._used_at[worker.id]
        self._proved_at.pop(worker.id, None)
        self._protected_at.pop(worker.id, None)
        self._uses.pop(worker.id, None)
        self._deadlines.drop(worker.id)
        if worker.order_id is not None:
            del self._by_order[worker.order_id][worker.id]
            if not self._by_order[worker.order_id]:
                del self._by_order[worker.order_id]
        if worker.instance_id:
            self._by_instance.pop(worker.instance_id, None)
        self._drop_address(worker)

    def _end_leases(self, worker_id: str, reason: str, now: float) -> None:
        for lease in self.leases(worker_id):
            self.end_lease(worker_id, lease.key, reason, now)

    def _only_holder(self, worker_id: str, client: str) -> bool:
        return self._leases.get(worker_id, {}).keys() <= {client}

    def _require_no_conflict(self, holders: dict[str, Lease], lease: Lease) -> None:
        # The unknown client of a machine that was found is the first who comes: who else knows its address?
        others = [held for key, held in holders.items() if key not in (lease.key, UNKNOWN_CLIENT)]
        if others and (lease.exclusive or any(held.exclusive for held in others)):
            raise Denied

    def _reindex_holds(self, worker: Worker) -> None:
        """Keep `_free` and `_open` true after a step or a change of holds."""
        free, shareable = self._free.setdefault(worker.pool, {}), self._open.setdefault(worker.pool, {})
        holders = self._leases.get(worker.id, {})
        offered = worker.state is S.READY and not worker.closed
        _put(free, worker.id, offered and not holders)
        exclusive = len(holders) == 1 and next(iter(holders.values())).exclusive
        _put(shareable, worker.id, offered and not exclusive and not self.full(worker.id))

    def _seated(self, worker_id: str) -> int:
        """How many leases fill places. Who may hold a machine that was found takes none from who does."""
        holders = self._leases.get(worker_id, {})
        return len(holders) - (UNKNOWN_CLIENT in holders)


def _require_place(holders: dict[str, Lease], lease: Lease) -> None:
    """A closed worker takes nobody new, except the client whose hold is known and whose name is not."""
    if UNKNOWN_CLIENT not in {lease.client, *holders}:
        raise Denied("the worker gets no new clients any more; ask for another one")


def _put(index: dict[str, None], key: str, wanted: bool) -> None:
    if not wanted:
        index.pop(key, None)
    elif key not in index:
        index[key] = None


def _with_instance(worker: Worker, instance: Instance) -> Worker:
    """What the cloud says of a machine, written over what the books say; silence erases nothing."""
    return replace(
        worker,
        instance_id=instance.id,
        address=instance.address or worker.address,
        running=instance.state == "running",
        launched_unix=max(instance.launched_unix, worker.launched_unix),  # that of its last start
        offering=replace(
            worker.offering,
            zone=instance.zone or worker.offering.zone,
            instance_type=instance.instance_type or worker.offering.instance_type,
            cores=instance.cores or worker.offering.cores,
            market=instance.market,
        ),
    )
