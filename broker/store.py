"""What the cloud cannot tell back, in SQLite under the state directory: open orders, leases, costs.

Losing this file loses history, never a machine. Two connections with two promises: an order is on the disk
itself before its launch call (`synchronous=FULL`), because a forgotten order is a forgotten machine; a lease
survives the death of the process but perhaps not of the power (`synchronous=NORMAL`), because a machine
found without its lease counts as busy anyway.

All writing happens on one thread, and writes that wait together are committed together: two hundred clients
that are served at once cost one commit.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from broker.clock import Moment
from broker.core.errors import StoreError
from broker.core.ledger import Run
from broker.core.model import Lease, Market, Offering, Order, Worker
from broker.core.policy import Breaker, BreakerState

CLOSED_ORDERS_MAX = 1000  # history for a person who asks what happened; older ones are dropped
ENDED_MAX = 10_000  # ended machines that are remembered: EC2 shows each for about an hour
NOTES_MAX = 10_000  # machines of which uses and protection are remembered: more than a broker ever has
GAP_FILE = "leases-missing"  # "1": the disk did not take every lease
RUNS_MAX = 10_000  # machines whose cost is remembered: weeks of a busy broker. Older ones are dropped,
RUNS_KEPT_SECONDS = 2 * 86_400.0  # but none whose cost may count for today's budget
BUSY_TIMEOUT_SECONDS = 5.0  # another process looking into the file must not fail a write

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE IF NOT EXISTS orders (
    id TEXT PRIMARY KEY, pool TEXT NOT NULL, offerings TEXT NOT NULL, parameters TEXT NOT NULL,
    created_unix REAL NOT NULL, count INTEGER NOT NULL DEFAULT 1, state TEXT NOT NULL DEFAULT 'open',
    outcome TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS machines (instance_id TEXT PRIMARY KEY, order_id TEXT NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS machines_order ON machines (order_id);
CREATE TABLE IF NOT EXISTS ended (instance_id TEXT PRIMARY KEY, ended_unix REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS attempts (
    order_id TEXT PRIMARY KEY, boot TEXT NOT NULL, placed_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS orders_state ON orders (state);
CREATE TABLE IF NOT EXISTS leases (
    id TEXT PRIMARY KEY, instance_id TEXT NOT NULL, pool TEXT NOT NULL, address TEXT NOT NULL,
    client TEXT NOT NULL, ttl_seconds REAL NOT NULL, exclusive INTEGER NOT NULL,
    acquired INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS machine_notes (
    instance_id TEXT PRIMARY KEY, ready INTEGER NOT NULL, uses INTEGER NOT NULL, protected INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS breakers (
    pool TEXT PRIMARY KEY, failures INTEGER NOT NULL, openings INTEGER NOT NULL,
    boot TEXT NOT NULL, closes_at REAL NOT NULL, closes_unix REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS runs (
    instance_id TEXT PRIMARY KEY, pool TEXT NOT NULL, market TEXT NOT NULL,
    price_usd_micros_per_hour INTEGER NOT NULL, price_assumed INTEGER NOT NULL,
    not_running_until_unix REAL NOT NULL, running_from_unix REAL, running_until_unix REAL,
    ended_by_unix REAL, reclaimed INTEGER
) STRICT;
"""
# From a version to the next, in one commit with the number of the version.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "CREATE TABLE machines (instance_id TEXT PRIMARY KEY, order_id TEXT NOT NULL) STRICT",
        "INSERT OR IGNORE INTO machines SELECT instance_id, id FROM orders WHERE state = 'launched' "
        "AND instance_id IS NOT NULL",
        "UPDATE orders SET state = 'closed', outcome = 'launched' WHERE state = 'launched'",
        "ALTER TABLE orders RENAME COLUMN offering TO offerings",
        "UPDATE orders SET offerings = '[' || offerings || ']'",
        "ALTER TABLE orders ADD COLUMN count INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE orders DROP COLUMN instance_id",
        "ALTER TABLE leases ADD COLUMN acquired INTEGER NOT NULL DEFAULT 0",
    ),
}
DROP_OLD_RUNS = """
DELETE FROM runs WHERE rowid <= (SELECT max(rowid) FROM runs) - ? AND ended_by_unix < ? + (
    SELECT max(coalesce(ended_by_unix, running_until_unix, not_running_until_unix)) FROM runs)
"""


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


@dataclass(slots=True)
class _Write:
    sql: str
    values: tuple[Any, ...]
    done: asyncio.Future[None]


class Store:
    """Open with `open`, end with `close`. Every failed write raises StoreError."""

    def __init__(
        self, directory: Path, *, threaded: bool = True, report: Callable[[str], None] = print
    ) -> None:
        self._directory = directory
        self._report = report  # hears of trouble that no caller waits for
        self._thread = ThreadPoolExecutor(1, "store") if threaded else None
        self._waiting: dict[bool, list[_Write]] = {True: [], False: []}
        self._writers: dict[bool, asyncio.Task[None] | None] = {True: None, False: None}
        self._soon: set[asyncio.Task[None]] = set()
        self._connections: dict[bool, sqlite3.Connection] = {}
        self._lock: int | None = None
        self._leases_refused = 0  # writes that failed since the start
        self.lost = False  # a damaged file was set aside: what was ordered a moment ago is not known
        self.leases_missing = False  # an earlier broker could not write every lease

    @property
    def path(self) -> Path:
        return self._directory / "broker.db"

    def open(self) -> None:
        """Create or open the file, one broker at a time. Raises StoreError. A torn file is set aside."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._connect()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._set_aside(error)
                self._connect()
            self._read_gap()
        except (OSError, sqlite3.Error) as error:
            self.release_lock()
            raise StoreError(f"cannot use the state directory {self._directory}: {error}") from error

    async def settle(self) -> None:
        """Returns when nothing waits to be written any more."""
        while tasks := [t for t in (*self._soon, *self._writers.values()) if t is not None and not t.done()]:
            await asyncio.wait(tasks)

    def close(self) -> None:
        """Write what waits, close the file, give back the lock."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self.release_lock()

    def die(self) -> None:
        """What a kill does to this object, for simulations: nothing is written any more, the lock is free."""
        for connection in self._connections.values():
            connection.close()
        self.release_lock()

    def release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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
        await self._write(
            True, "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(run)
        )

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

    # --- inside ------------------------------------------------------------------------------------

    def soon(self, write: Any) -> None:
        """Have a write done without waiting for it; a failure is reported, not raised."""
        task = asyncio.ensure_future(write)
        self._soon.add(task)
        task.add_done_callback(self._reported)

    def _reported(self, task: asyncio.Task[None]) -> None:
        self._soon.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._report(str(task.exception()))

    async def _write(self, durable: bool, sql: str, values: tuple[Any, ...]) -> None:
        await asyncio.shield(self._queue(durable, sql, values))

    def _queue(self, durable: bool, sql: str, values: tuple[Any, ...]) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting[durable].append(_Write(sql, values, done))
        writer = self._writers[durable]
        if writer is None or writer.done():
            self._writers[durable] = loop.create_task(self._write_all(durable))
        return done

    async def _write_all(self, durable: bool) -> None:
        while self._waiting[durable]:
            batch, self._waiting[durable] = self._waiting[durable], []
            try:
                if self._thread is None:
                    self._commit(durable, batch)
                else:
                    await asyncio.get_running_loop().run_in_executor(
                        self._thread, self._commit, durable, batch
                    )
            except (sqlite3.Error, RuntimeError) as error:  # RuntimeError: the thread has been shut down
                if not durable:
                    self._leases_refused += 1
                    self._mark_gap(b"1")
                problem = StoreError(f"cannot write {self.path}: {error}; is the disk full?")
                for write in batch:
                    write.done.set_exception(problem)
                    write.done.exception()  # retrieved: the one who waits may have been cancelled
            else:
                for write in batch:
                    write.done.set_result(None)

    def _mark_gap(self, mark: bytes) -> None:
        """Whether leases are missing: one byte that is there from the start, so a full disk takes it too."""
        try:
            with (self._directory / GAP_FILE).open("r+b") as file:
                file.write(mark)
        except OSError as error:
            self._report(f"{self._directory / GAP_FILE} cannot be written: {error}")

    def _read_gap(self) -> None:
        path = self._directory / GAP_FILE
        if not path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            path.write_bytes(b"0")
        self.leases_missing = path.read_bytes() != b"0"

    def _commit(self, durable: bool, batch: list[_Write]) -> None:
        connection = self._connections[durable]
        with connection:  # commits, or rolls back on an error
            connection.execute("BEGIN IMMEDIATE")
            for write in batch:
                connection.execute(write.sql, write.values)

    def _connect(self) -> None:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.chmod(self.path, 0o600)  # before SQLite makes its log, which gets the mode of the file
        for durable in (True, False):
            connection = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connections[durable] = connection
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version and version < SCHEMA_VERSION:  # 0: a new file
                version = _migrate(connection, version)
            if version not in (0, SCHEMA_VERSION):
                raise OSError(
                    f"{self.path.name} was written by another version of compute-broker ({version})"
                )
            connection.executescript(f"{SCHEMA} PRAGMA user_version = {SCHEMA_VERSION};")
        connection = self._connections[True]
        connection.execute(
            "DELETE FROM orders WHERE state = 'closed' AND rowid <= (SELECT max(rowid) FROM orders) - ? "
            "AND id NOT IN (SELECT order_id FROM machines)",
            (CLOSED_ORDERS_MAX,),
        )
        connection.execute("DELETE FROM attempts WHERE order_id NOT IN (SELECT id FROM orders)")
        connection.execute(
            "DELETE FROM ended WHERE rowid <= (SELECT max(rowid) FROM ended) - ?", (ENDED_MAX,)
        )
        connection.execute(
            "DELETE FROM machine_notes WHERE rowid <= (SELECT max(rowid) FROM machine_notes) - ?",
            (NOTES_MAX,),
        )
        connection.execute(DROP_OLD_RUNS, (RUNS_MAX, -RUNS_KEPT_SECONDS))
        for (finding,) in connection.execute("PRAGMA quick_check"):
            if finding != "ok":
                raise sqlite3.DatabaseError(finding)

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        self.lost = True
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        names = (self.path.with_name(f"broker.db.broken-{number}") for number in itertools.count(1))
        broken = next(name for name in names if not name.exists())
        for suffix in ("", "-wal", "-shm"):
            part = Path(f"{self.path}{suffix}")
            if part.exists():
                part.rename(f"{broken}{suffix}")
        self._report(
            f"{self.path} is damaged ({error}): it was set aside as {broken.name}; machines are found by tag"
        )

    def _take_lock(self) -> None:
        """The broker-id lock: the second broker on one state directory refuses to start."""
        lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise StoreError(
                f"another broker (process {holder}) runs on the state directory {self._directory}: "
                "stop it first, or give this one its own state_dir and id"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock


def _seconds_ago(moment: Moment, unix: float, boot: str | None, at: float) -> float:
    """By the monotonic clock, if the machine has not been started anew; a wall clock may have been set."""
    return max(0.0, moment.at - at if boot == moment.boot else moment.unix - unix)


def _migrate(connection: sqlite3.Connection, version: int) -> int:
    """Bring a file of an older version up to date, all or nothing. Returns its new version."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for older in range(version, SCHEMA_VERSION):
            for statement in MIGRATIONS.get(older, ()):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return SCHEMA_VERSION


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
