"""How the store's file is kept: one broker at a time, written on one thread, set aside when it is damaged.

Two connections with two promises: what must not be lost with the power (`synchronous=FULL`), and what need
only survive the death of the process (`synchronous=NORMAL`). Writes that wait together are committed
together: two hundred clients that are served at once cost one commit.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.core.errors import StoreError
from broker.store_schema import MIGRATIONS, SCHEMA, SCHEMA_VERSION, TRIMS

GAP_FILE = "leases-missing"  # "1": the disk did not take every lease
LOST = "lost"  # the key of the fact that this file stands in for one that was damaged, until that is over
BUSY_TIMEOUT_SECONDS = 5.0  # another process looking into the file must not fail a write


@dataclass(slots=True)
class _Write:
    sql: str
    values: tuple[Any, ...]
    done: asyncio.Future[None]


class Database:
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
        self.lost = False  # a damaged file was set aside: what was ordered shortly before is not known
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
                self._connections[True].execute("INSERT OR REPLACE INTO meta VALUES (?, '1')", (LOST,))
            self._read_gap()
            found = (
                self._connections[True].execute("SELECT value FROM meta WHERE key = ?", (LOST,)).fetchone()
            )
            self.lost = found is not None
        except (OSError, sqlite3.Error) as error:
            self.release_lock()
            raise StoreError(f"cannot use the state directory {self._directory}: {error}") from error

    async def loss_is_over(self) -> None:
        """What may have been ordered before the file was lost has been seen, or will never be."""
        if self.lost:
            self.lost = False
            await self._write(True, "DELETE FROM meta WHERE key = ?", (LOST,))

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

    # --- writing -----------------------------------------------------------------------------------

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
        connection = self._connections.get(durable)
        if connection is None:
            raise sqlite3.ProgrammingError("it has been closed")
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
        for statement, values in TRIMS:
            connection.execute(statement, values)
        for (finding,) in connection.execute("PRAGMA quick_check"):
            if finding != "ok":
                raise sqlite3.DatabaseError(finding)

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
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


def _migrate(connection: sqlite3.Connection, version: int) -> int:
    """Bring a file of an older version up to date, all or nothing. Returns its new version."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for older in range(version, SCHEMA_VERSION):
            for statement in MIGRATIONS.get(older, ()):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return SCHEMA_VERSION
