"""What the cloud cannot tell back, in SQLite under the state directory: open orders, leases, costs.

Losing this file loses history, never a machine. An order is on the disk itself before its launch call,
because a forgotten order is a forgotten machine; a lease survives the death of the process but perhaps not
of the power, because a machine found without its lease counts as busy anyway.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from broker.clock import Moment
from broker.core.ledger import Run
from broker.core.model import Lease, Market, Offering, Order, Worker
from broker.core.policy import Breaker, BreakerState
from broker.database import Database

RUN_FIELDS = tuple(field.name for field in fields(Run))  # as the columns of `runs`


@dataclass(frozen=True, slots=True)
class StoredLease:
    """A lease as it outlives the process: tied to the machine, not to an entry of the books."""

    lease: Lease
    instance_id: str
    pool: str
    address: str  # what the client was given, and will ask for


@dataclass(frozen=True, slots=True)
class LaunchedOrder:
    """A machine and the order that it was launched for."""

    order: Order
    instance_id: str
    placed_at: float  # on the monotonic clock; below 0 for one of long ago


@dataclass(frozen=True, slots=True)
class MachineNote:
    """What listings do not tell of a machine, or may not tell in time after a restart."""

    instance_id: str
    ready: bool = False  # it has come up once: that it answers again says nothing of its image
    uses: int = 0
    protected: bool = False


class Store(Database):
    """See the module; how the file is kept is database.py's matter. Every failed write raises StoreError."""

    # --- orders ------------------------------------------------------------------------------------

    async def order_placed(self, order: Order, placed: Moment | None = None) -> None:
        """Returns when the order is on disk. Without `placed`, its age is told by the wall clock alone."""
        values = (
            order.id,
            order.pool,
            json.dumps([asdict(one) for one in order.offerings]),
            order.parameters,
            order.created_unix,
            order.count,
        )
        if placed is not None:  # queued in one go with the order, so it is in the same commit
            self._queue(True, "INSERT INTO attempts VALUES (?, ?, ?)", (order.id, placed.boot, placed.at))
        await self._write(
            True,
            "INSERT INTO orders (id, pool, offerings, parameters, created_unix, count) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            values,
        )

    async def order_launched(self, order_id: str, instance_id: str) -> None:
        """The order has this machine; perhaps it awaits more."""
        await self._write(True, "INSERT OR REPLACE INTO machines VALUES (?, ?)", (instance_id, order_id))

    async def machine_gone(self, instance_id: str) -> None:
        await self._write(True, "DELETE FROM machines WHERE instance_id = ?", (instance_id,))

    async def order_closed(self, order_id: str, outcome: str) -> None:
        """The order awaits nothing any more."""
        await self._write(
            True, "UPDATE orders SET state = 'closed', outcome = ? WHERE id = ?", (outcome, order_id)
        )

    def open_orders(self) -> list[Order]:
        """Orders whose outcome nobody knows."""
        rows = self._connections[True].execute(
            "SELECT id, pool, offerings, parameters, created_unix, count FROM orders "
            "WHERE state = 'open' ORDER BY rowid"
        )
        return [_order(*row) for row in rows]

    def order_counts(self) -> dict[str, int]:
        """Every order that is remembered, whatever came of it → for how many machines it was."""
        return dict(self._connections[True].execute("SELECT id, count FROM orders ORDER BY rowid").fetchall())

    def attempts(self, moment: Moment, within_seconds: float) -> list[tuple[str, float]]:
        """(pool, seconds ago) of every machine ordered of late, whatever came of it.

        By the machine's own uptime as long as it has not been started anew, because a wall clock may be set.
        """
        since_at, since_unix = moment.at - within_seconds, moment.unix - within_seconds
        rows = self._connections[True].execute(
            "SELECT pool, created_unix, boot, placed_at, count FROM orders "
            "LEFT JOIN attempts ON order_id = id "
            "WHERE CASE WHEN boot = ? THEN placed_at >= ? ELSE created_unix >= ? END ORDER BY orders.rowid",
            (moment.boot, since_at, since_unix),
        )
        return [
            (pool, _seconds_ago(moment, unix, boot, at))
            for pool, unix, boot, at, count in rows
            for _ in range(count)
        ]

    def launched_orders(self, moment: Moment) -> list[LaunchedOrder]:
        """Machines that had not been seen to end when the last broker stopped, with their orders."""
        rows = self._connections[True].execute(
            "SELECT instance_id, boot, placed_at, id, pool, offerings, parameters, created_unix, count "
            "FROM machines JOIN orders ON orders.id = machines.order_id "
            "LEFT JOIN attempts ON attempts.order_id = orders.id ORDER BY machines.rowid"
        )
        return [
            LaunchedOrder(
                order := _order(*values),
                instance_id,
                moment.at - _seconds_ago(moment, order.created_unix, boot, at),
            )
            for instance_id, boot, at, *values in rows
        ]

    async def end_decided(self, instance_id: str, unix: float) -> None:
        """The machine is on its way out: no later listing brings it back."""
        await self._write(True, "INSERT OR IGNORE INTO ended VALUES (?, ?)", (instance_id, unix))

    async def end_revoked(self, instance_id: str) -> None:
        """Another broker has taken the machine over: that its end was decided here means nothing any more."""
        await self._write(True, "DELETE FROM ended WHERE instance_id = ?", (instance_id,))

    def ended(self) -> set[str]:
        """Instances whose end has been decided."""
        return {row[0] for row in self._connections[True].execute("SELECT instance_id FROM ended")}

    # --- who this broker is ------------------------------------------------------------------------

    async def keep(self, key: str, value: str) -> None:
        """Returns when the fact is on disk."""
        await self._write(True, "INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def kept(self, key: str) -> str | None:
        """The fact that `keep` wrote last."""
        query = "SELECT value FROM meta WHERE key = ?"
        row = self._connections[True].execute(query, (key,)).fetchone()
        return None if row is None else str(row[0])

    # --- runs --------------------------------------------------------------------------------------

    async def run_changed(self, run: Run) -> None:
        """Returns when the run is on disk as it is now."""
        values = tuple(getattr(run, field) for field in RUN_FIELDS)  # dataclasses.astuple copies deeply
        await self._write(True, "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def runs(self) -> list[Run]:
        """Every machine that is remembered, the one that was written last at the end."""
        rows = self._connections[True].execute("SELECT * FROM runs ORDER BY rowid")
        return [_run(*row) for row in rows]

    # --- machines and breakers ---------------------------------------------------------------------

    async def note_changed(self, machine: MachineNote) -> None:
        """Returns when a broker that is killed now would find it again; with a lease, before the lease."""
        values = (machine.instance_id, int(machine.ready), machine.uses, int(machine.protected))
        await self._write(False, "INSERT OR REPLACE INTO machine_notes VALUES (?, ?, ?, ?)", values)

    async def note_dropped(self, instance_id: str) -> None:
        await self._write(False, "DELETE FROM machine_notes WHERE instance_id = ?", (instance_id,))

    def notes(self) -> list[MachineNote]:
        """Every machine that had not gone when the last broker stopped."""
        rows = self._connections[False].execute(
            "SELECT instance_id, ready, uses, protected FROM machine_notes ORDER BY rowid"
        )
        return [MachineNote(id_, bool(ready), uses, bool(kept)) for id_, ready, uses, kept in rows]

    async def breaker_changed(self, pool: str, breaker: Breaker, moment: Moment) -> None:
        """Returns when the pool's breaker is on disk as it is now."""
        closes_at, closes_unix = moment.at + breaker.seconds_left, moment.unix + breaker.seconds_left
        values = (pool, breaker.failures, breaker.openings, moment.boot, closes_at, closes_unix)
        await self._write(True, "INSERT OR REPLACE INTO breakers VALUES (?, ?, ?, ?, ?, ?)", values)

    def breakers(self, moment: Moment) -> dict[str, Breaker]:
        """Pool → its breaker, as it would be by now. Time is counted as for `attempts`."""
        rows = self._connections[True].execute("SELECT * FROM breakers ORDER BY rowid")
        found = {}
        for pool, failures, openings, boot, closes_at, closes_unix in rows:
            left = closes_at - moment.at if boot == moment.boot else closes_unix - moment.unix
            state = BreakerState.OPEN if left > 0 else BreakerState.CLOSED
            found[pool] = Breaker(state, max(0.0, left), failures, openings)
        return found

    # --- leases ------------------------------------------------------------------------------------

    async def lease_granted(self, lease: Lease, worker: Worker) -> None:
        """Returns when a broker that is killed now would find the lease again."""
        await self._write(
            False,
            "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                lease.id,
                worker.instance_id,
                worker.pool,
                worker.address or "",
                lease.client,
                lease.ttl_seconds,
                int(lease.exclusive),
                int(lease.acquired),
            ),
        )

    async def leases_are_whole(self) -> None:
        """What was missing has been made up for, and the disk takes it: the next start may rely on it."""
        await self._write(False, "DELETE FROM leases WHERE id = ''", ())
        if not self._leases_refused:
            self._mark_gap(b"0")

    async def lease_ended(self, lease_id: str) -> None:
        await self._write(False, "DELETE FROM leases WHERE id = ?", (lease_id,))

    def leases(self) -> list[StoredLease]:
        """Every lease that had not ended when the last broker stopped. `worker_id` is the instance's.

        None is bound to a connection any more: those have ended with the last broker.
        """
        rows = self._connections[False].execute(
            "SELECT id, instance_id, pool, address, client, ttl_seconds, exclusive, acquired FROM leases "
            "ORDER BY rowid"
        )
        return [
            StoredLease(
                Lease(id_, instance_id, client, ttl, bool(exclusive), bool(acquired)),
                instance_id,
                pool,
                address,
            )
            for id_, instance_id, pool, address, client, ttl, exclusive, acquired in rows
        ]


def _seconds_ago(moment: Moment, unix: float, boot: str | None, at: float) -> float:
    """By the monotonic clock, if the machine has not been started anew; a wall clock may have been set."""
    return max(0.0, moment.at - at if boot == moment.boot else moment.unix - unix)


def _order(id_: str, pool: str, offerings: str, parameters: str, created_unix: float, count: int) -> Order:
    read = tuple(Offering(**{**one, "market": Market(one["market"])}) for one in json.loads(offerings))
    return Order(id_, pool, read, parameters, created_unix, count)


def _run(
    id_: str, pool: str, market: str, price: int, assumed: int, not_until: float, *rest: float | None
) -> Run:
    begun, until, ended, reclaimed = rest
    reclaimed_or_not = None if reclaimed is None else bool(reclaimed)
    return Run(
        id_, pool, Market(market), price, bool(assumed), not_until, begun, until, ended, reclaimed_or_not
    )
