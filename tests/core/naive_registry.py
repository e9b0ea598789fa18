"""The registry as one would write it without a thought for speed: every question is a full scan.

LIFE_ROWS is the table of the design, row by row; `registry.LIFE` and the real registry are held against it.
What happens is told as plain tuples, in the order in which the real one tells it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from broker.core.errors import Denied, IllegalStep, WorkerNotFound
from broker.core.model import (
    UNKNOWN_CLIENT,
    Event,
    Lease,
    LeaseEnded,
    LeaseGranted,
    ProtectionChanged,
    WorkerChanged,
    WorkerSeen,
)

LIFE_ROWS = """
    from         on                                         to
    (nothing)    order is on disk                           ordered
    (nothing)    a machine with our tag has no entry        booting
    (nothing)    a stopping machine with our tag has no entry  stopping
    (nothing)    a stopped machine with our tag has no entry   stopped
    ordered      instance id known                          booting
    ordered      refused, or never launched                 gone
    booting      address known and readiness shown          ready
    booting      reap, release, boot failed                 draining
    booting      the cloud says terminated                  gone
    booting      the cloud says stopped                     stopped
    ready        probe failed, or a notice                  suspect
    ready        to be kept stopped                         stopping
    ready        reap, release, boot failed                 draining
    ready        the cloud says terminated                  gone
    suspect      address known and readiness shown          ready
    suspect      reap, release, boot failed                 draining
    suspect      the cloud says terminated                  gone
    stopping     the cloud says stopped                     stopped
    stopping     reap, release, boot failed                 draining
    stopping     the cloud says terminated                  gone
    stopped      Start follows, or the cloud says running   booting
    stopped      reap, release, boot failed                 draining
    stopped      the cloud says terminated                  gone
    draining     Terminate sent                             terminating
    draining     the cloud says terminated                  gone
    terminating  the cloud says terminated                  gone
"""
LIFE = {
    (before, on): after
    for before, on, after in (re.split(" {2,}", row.strip()) for row in LIFE_ROWS.strip().splitlines()[1:])
}
HOLDABLE = ("booting", "ready", "suspect")
SEATS = {"gpu": 2}  # pool → so many leases a shared worker; any number elsewhere

Told = tuple[object, ...]


def told(event: Event) -> Told:
    """A real event as the naive registry tells it."""
    match event:
        case WorkerChanged(worker=worker, before=before, at=at):
            return ("changed", worker.id, before and str(before), str(worker.state), worker.reason, at)
        case WorkerSeen(worker=worker, at=at):
            return ("seen", worker.id, worker.address, worker.running, at)
        case ProtectionChanged(worker=worker, at=at):
            return ("protection", worker.id, worker.protected, at)
        case LeaseGranted(lease=lease, worker=worker, first=first, at=at):
            return ("granted", lease, worker.id, first, at)
        case LeaseEnded(lease=lease, worker=worker, last=last, reason=reason, at=at):
            return ("ended", lease, worker.id, last, reason, at)


@dataclass
class Entry:
    """One worker. `holds` is key → lease and when it ends, in the order in which they were granted."""

    id: str
    pool: str
    state: str
    since_at: float
    used_at: float
    look_at: float | None
    instance_id: str | None = None
    address: str | None = None
    running: bool = False
    started_at: float | None = None
    born_at: float = 0.0
    reason: str = ""
    notice: str = ""
    closed: str = ""
    uses: int = 0
    protected: bool = False
    tag_seen_at: float = float("-inf")
    proved_at: float = float("-inf")
    holds: dict[str, tuple[Lease, float]] = field(default_factory=dict)

    @property
    def free(self) -> bool:
        return self.state == "ready" and not self.closed and not self.holds

    @property
    def open(self) -> bool:
        full = self.pool in SEATS and len(self.holds) >= SEATS[self.pool]
        alone = any(lease.exclusive for lease, _ in self.holds.values())
        return self.state == "ready" and not self.closed and not alone and not full


class NaiveRegistry:
    """See the module."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.told: list[Told] = []
        self.claims: list[tuple[str, str]] = []  # (address, who said last that it is his)
        self.free: list[str] = []  # in the order in which they became so
        self.open: list[str] = []
        self.grants: list[tuple[str, str]] = []  # (worker, client) in the order of their grants

    # --- questions ----------------------------------------------------------------------------------

    def by_instance(self, instance_id: str) -> Entry | None:
        return next((e for e in self.entries.values() if e.instance_id == instance_id), None)

    def by_address(self, address: str) -> Entry | None:
        claimants = (self.entries.get(who) for what, who in reversed(self.claims) if what == address)
        return next((e for e in claimants if e and e.address == address and e.state in HOLDABLE), None)

    def candidates(self, pool: str, *, exclusive: bool) -> list[str]:
        ids = self.free[::-1] if exclusive else self.open
        return [id_ for id_ in ids if self.entries[id_].pool == pool]

    def available(
        self, pool: str, client: str, *, exclusive: bool, wish: Callable[[str], bool] = lambda _: True
    ) -> str | None:
        held = [self.entries[id_] for id_, who in self.grants if who == client]
        mine = [
            e.id
            for e in held
            if e.pool == pool and e.state == "ready" and (len(e.holds) == 1 or not exclusive)
        ]
        return next(filter(wish, [*mine, *self.candidates(pool, exclusive=exclusive)]), None)

    def places(
        self, pool: str, count: int, *, exclusive: bool, seats: int | None, wish: Callable[[str], bool]
    ) -> list[str]:
        found: list[str] = []
        for id_ in filter(wish, self.candidates(pool, exclusive=exclusive)):
            room = 1 if exclusive else count if seats is None else seats - len(self.entries[id_].holds)
            found += [id_] * room
        return found[:count]

    def due(self, now: float) -> list[str]:
        found = sorted(
            (e.look_at, e.id) for e in self.entries.values() if e.look_at is not None and e.look_at <= now
        )
        for _, worker_id in found:
            self.entries[worker_id].look_at = None
        return [worker_id for _, worker_id in found]

    def next_look_at(self) -> float | None:
        return min((e.look_at for e in self.entries.values() if e.look_at is not None), default=None)

    # --- steps --------------------------------------------------------------------------------------

    def order(self, worker_id: str, pool: str, now: float) -> None:
        self._enter(Entry(worker_id, pool, LIFE["(nothing)", "order is on disk"], now, now, now), now)

    def adopt(self, instance_id: str, pool: str, address: str | None, running: bool, now: float) -> None:
        if self.by_instance(instance_id):
            raise IllegalStep
        state = LIFE["(nothing)", "a machine with our tag has no entry"]
        self._enter(Entry(instance_id, pool, state, now, now, now, instance_id, address, running), now)

    def launched(
        self, worker_id: str, instance_id: str, address: str | None, running: bool, now: float
    ) -> None:
        if self.by_instance(instance_id):
            raise IllegalStep
        entry = self.entries[worker_id]
        self._require(entry, "instance id known")
        entry.instance_id, entry.address, entry.running = instance_id, address, running
        self._step(entry, "instance id known", "", now)

    def observed(
        self, worker_id: str, instance_id: str, address: str | None, running: bool, now: float
    ) -> None:
        entry = self.entries[worker_id]
        if entry.instance_id != instance_id:
            raise IllegalStep
        if entry.state == "stopped":
            return
        address = address or entry.address
        if (address, running) == (entry.address, entry.running):
            return
        moved, entry.address, entry.running = address != entry.address, address, running
        if moved:
            self._claim(entry)
        self.told.append(("seen", entry.id, address, running, now))

    def tagged(self, worker_id: str, protects: bool, now: float) -> None:
        """What a listing shows; one without the tag may be two minutes behind."""
        entry = self.entries[worker_id]
        if protects:
            entry.tag_seen_at = now
        protected = now - entry.tag_seen_at < 120.0 if entry.protected else protects
        if protected is not entry.protected:
            entry.protected, entry.look_at = protected, now
            self.told.append(("protection", entry.id, protected, now))

    def close(self, worker_id: str, reason: str, now: float) -> None:
        entry = self.entries[worker_id]
        if not entry.closed:
            entry.closed = reason
            self._line_up()
            self.told.append(("seen", entry.id, entry.address, entry.running, now))

    def ready(self, worker_id: str, now: float) -> None:
        entry = self.entries[worker_id]
        if entry.notice or entry.address is None:
            raise IllegalStep
        if entry.state != "ready":
            self._require(entry, "address known and readiness shown")
            entry.proved_at = now
            self._step(entry, "address known and readiness shown", "", now)
        entry.proved_at = now

    def suspect(self, worker_id: str, reason: str, now: float, *, standing: bool) -> None:
        entry = self.entries[worker_id]
        entry.proved_at = float("-inf")
        if standing:
            entry.notice = reason
        if entry.state == "ready":
            self._step(entry, "probe failed, or a notice", reason, now)

    def adopt_stopped(self, instance_id: str, pool: str, state: str, now: float) -> None:
        if self.by_instance(instance_id):
            raise IllegalStep
        after = LIFE["(nothing)", f"a {state} machine with our tag has no entry"]
        self._enter(Entry(instance_id, pool, after, now, now, now, instance_id), now)

    def stop(self, worker_id: str, reason: str, now: float) -> None:
        entry = self.entries[worker_id]
        self._require(entry, "to be kept stopped")
        if entry.holds:
            raise IllegalStep
        entry.proved_at = float("-inf")
        self._step(entry, "to be kept stopped", reason, now)

    def stopped(self, worker_id: str, now: float) -> None:
        entry = self.entries[worker_id]
        self._require(entry, "the cloud says stopped")
        if entry.holds:
            raise IllegalStep
        entry.address, entry.running, entry.started_at = None, False, None
        self._step(entry, "the cloud says stopped", entry.reason, now)

    def start(self, worker_id: str, now: float) -> None:
        entry = self.entries[worker_id]
        self._require(entry, "Start follows, or the cloud says running")
        entry.born_at += now - entry.since_at
        entry.used_at = entry.started_at = now
        self._step(entry, "Start follows, or the cloud says running", "", now)

    def take(self, worker_id: str, on: str, reason: str, now: float) -> None:
        """Any of the other steps."""
        entry = self.entries[worker_id]
        goes = self._require(entry, on) == "gone"
        if not goes:
            self._step(entry, on, entry.reason if on == "Terminate sent" else reason, now)
        for client in list(entry.holds):
            self.end_lease(worker_id, client, reason, now)
        if goes:
            del self.entries[worker_id]
            self._step(entry, on, reason, now)

    # --- leases -------------------------------------------------------------------------------------

    def grant(self, lease: Lease, now: float) -> Lease:
        entry = self.entries.get(lease.worker_id)
        if entry is None or entry.state not in HOLDABLE:
            raise WorkerNotFound
        mine = entry.holds.get(lease.key)
        others = [held for held, _ in entry.holds.values() if held.key != lease.key]
        if mine is None or (lease.exclusive and not mine[0].exclusive):
            if others and (lease.exclusive or any(held.exclusive for held in others)):
                raise Denied
            granted = lease
            if mine is None and entry.closed and UNKNOWN_CLIENT not in entry.holds:
                raise Denied
            if mine is None:
                entry.uses += 1
            if mine is not None:
                granted = Lease(mine[0].id, entry.id, lease.client, mine[0].ttl_seconds, exclusive=True)
            else:
                self.grants.append((entry.id, lease.key))
                ends_at = now + lease.ttl_seconds
                entry.look_at = ends_at if entry.look_at is None else min(entry.look_at, ends_at)
            self.told.append(("granted", granted, entry.id, mine is None and not others, now))
        else:
            granted = mine[0]
        entry.holds[lease.key] = (granted, now)
        self.renew(entry.id, lease.key, now)
        self._line_up()
        return granted

    def renew(self, worker_id: str, client: str, now: float) -> None:
        entry = self.entries[worker_id]
        lease, _ = entry.holds[client]
        entry.holds[client] = (lease, now + lease.ttl_seconds)
        entry.used_at = now

    def end_lease(self, worker_id: str, client: str, reason: str, now: float) -> Lease | None:
        entry = self.entries.get(worker_id)
        if entry is None or client not in entry.holds:
            return None
        lease, _ = entry.holds.pop(client)
        self.grants.remove((worker_id, client))
        self._line_up()
        self.told.append(("ended", lease, worker_id, not entry.holds, reason, now))
        return lease

    def keep_by_name(self, worker_id: str, key: str, ttl_seconds: float, now: float) -> Lease:
        entry = self.entries[worker_id]
        lease, _ = entry.holds[key]
        if lease.client in entry.holds:
            self.renew(worker_id, lease.client, now)
            if key != lease.client:
                self.end_lease(worker_id, key, "held by name", now)
            return entry.holds[lease.client][0]
        named = replace(lease, id=f"{lease.id}-by-name", acquired=False, bound=False, ttl_seconds=ttl_seconds)
        del entry.holds[key]
        entry.holds[named.key] = (named, now)
        self.grants.remove((worker_id, key))
        self.grants.append((worker_id, named.key))
        self.renew(worker_id, named.key, now)
        ends_at = now + ttl_seconds
        entry.look_at = ends_at if entry.look_at is None else min(entry.look_at, ends_at)
        self.told.append(("granted", named, worker_id, False, now))
        self.told.append(("ended", lease, worker_id, False, "held by name", now))
        return named

    def expire_leases(self, worker_id: str, now: float) -> None:
        entry = self.entries.get(worker_id)
        for key, (lease, ends_at) in list(entry.holds.items()) if entry else []:
            if ends_at <= now and lease.bound:
                self.renew(worker_id, key, now)
            elif ends_at <= now:
                self.end_lease(worker_id, key, "expired", ends_at)

    # --- inside -------------------------------------------------------------------------------------

    def _enter(self, entry: Entry, now: float) -> None:
        if entry.id in self.entries:
            raise IllegalStep
        self.entries[entry.id] = entry
        entry.born_at = now
        self._claim(entry)
        self.told.append(("changed", entry.id, None, entry.state, "", now))

    def _require(self, entry: Entry, on: str) -> str:
        if (entry.state, on) not in LIFE:
            raise IllegalStep
        return LIFE[entry.state, on]

    def _step(self, entry: Entry, on: str, reason: str, now: float) -> None:
        before, entry.state = entry.state, LIFE[entry.state, on]
        entry.since_at, entry.look_at, entry.reason = now, now, reason
        if on == "instance id known":
            self._claim(entry)
        self._line_up()
        self.told.append(("changed", entry.id, before, entry.state, reason, now))

    def _claim(self, entry: Entry) -> None:
        if entry.address and entry.state in HOLDABLE:
            self.claims.append((entry.address, entry.id))

    def _line_up(self) -> None:
        """Whoever has become free or open stands behind those who are."""
        free = [e.id for e in self.entries.values() if e.free]
        shareable = [e.id for e in self.entries.values() if e.open]
        self.free = [id_ for id_ in self.free if id_ in free] + [id_ for id_ in free if id_ not in self.free]
        self.open = [id_ for id_ in self.open if id_ in shareable] + [
            id_ for id_ in shareable if id_ not in self.open
        ]
