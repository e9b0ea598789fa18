"""What the disk promises: an order before its launch call, a lease over a restart, one broker a directory."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from broker.clock import Moment
from broker.core.errors import StoreError
from broker.core.ledger import Run
from broker.core.model import Lease, Market, Offering, Order, Worker, WorkerState
from broker.core.policy import Breaker, BreakerState
from broker.store import MachineNote, Store
from broker.store_schema import CLOSED_ORDERS_MAX, RUNS_MAX

ROOT = Path(__file__).resolve().parents[1]
OFFERING = Offering("us-east-1", "c7i.16xlarge", Market.SPOT, "us-east-1a", 64, 1_200_000)
WORKER = Worker(
    "cb-1",
    "default",
    WorkerState.READY,
    OFFERING,
    2560,
    since_at=0.0,
    born_at=0.0,
    instance_id="i-1",
    address="10.0.0.1",
)
SECONDS_MAX = 20.0
OFFERING_OF_VERSION_1 = json.dumps(asdict(OFFERING))
VERSION_1 = f"""
CREATE TABLE orders (
    id TEXT PRIMARY KEY, pool TEXT NOT NULL, offering TEXT NOT NULL, parameters TEXT NOT NULL,
    created_unix REAL NOT NULL, state TEXT NOT NULL DEFAULT 'open', instance_id TEXT, outcome TEXT
) STRICT;
CREATE TABLE leases (
    id TEXT PRIMARY KEY, instance_id TEXT NOT NULL, pool TEXT NOT NULL, address TEXT NOT NULL,
    client TEXT NOT NULL, ttl_seconds REAL NOT NULL, exclusive INTEGER NOT NULL
) STRICT;
INSERT INTO orders VALUES
    ('cb-open', 'default', '{OFFERING_OF_VERSION_1}', '{{"a": 1}}', 1000.0, 'open', NULL, NULL),
    ('cb-launched', 'default', '{OFFERING_OF_VERSION_1}', '{{"a": 1}}', 1000.0, 'launched', 'i-1', NULL),
    ('cb-closed', 'default', '{OFFERING_OF_VERSION_1}', '{{"a": 1}}', 1000.0, 'closed', 'i-2', 'gone');
INSERT INTO leases VALUES ('lease-1', 'i-1', 'default', '10.0.0.1', 'ann', 900.0, 0);
PRAGMA user_version = 1;
"""


def order(name: str, **changes: object) -> Order:
    values = {"pool": "default", "offerings": (OFFERING,), "parameters": '{"a": 1}', "created_unix": 1.8e9}
    return Order(name, **{**values, **changes})  # type: ignore[arg-type]


def lease(name: str, client: str = "anna", *, exclusive: bool = False) -> Lease:
    return Lease(name, WORKER.id, client, 900.0, exclusive)


@contextmanager
def opened(directory: Path, *, threaded: bool = True) -> Iterator[Store]:
    said: list[str] = []
    store = Store(directory, threaded=threaded, report=said.append)
    store.open()
    try:
        yield store
    finally:
        store.close()


def within(directory: Path, story: Callable[[Store], Awaitable[None]], *, threaded: bool = True) -> None:
    """Open a store, tell a story about it, let it finish writing, close it."""

    async def main() -> None:
        with opened(directory, threaded=threaded) as store:
            await story(store)
            await store.settle()

    asyncio.run(main())


def rows(directory: Path, sql: str) -> list[tuple[object, ...]]:
    """What somebody else sees in the file."""
    connection = sqlite3.connect(f"file:{directory / 'broker.db'}?mode=ro", uri=True)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


BOTH_WAYS = pytest.mark.parametrize("threaded", [True, False], ids=["thread", "no-thread"])

# --- orders ----


@BOTH_WAYS
def test_an_order_can_be_seen_by_others_when_placing_it_returns(tmp_path: Path, threaded: bool) -> None:
    async def story(store: Store) -> None:
        await store.order_placed(order("cb-1"))
        assert rows(tmp_path, "SELECT id, state FROM orders") == [("cb-1", "open")]

    within(tmp_path, story, threaded=threaded)


def test_an_order_is_on_disk_even_when_the_next_thing_that_happens_is_a_kill(tmp_path: Path) -> None:
    script = """
        import asyncio, os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from tests.test_store import order
        from broker.store import Store
        async def main():
            store = Store(Path(sys.argv[1]))
            store.open()
            await store.order_placed(order("cb-1"))
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(ROOT)],
        capture_output=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert run.returncode == -9, run.stderr.decode()

    async def story(store: Store) -> None:
        assert store.open_orders() == [order("cb-1")]

    within(tmp_path, story)


# --- runs ---


def run(name: str, **changes: object) -> Run:
    values = {"pool": "default", "market": Market.SPOT, "price_usd_micros_per_hour": 1_200_000}
    more = {"price_assumed": False, "not_running_until_unix": 1.8e9, **changes}
    return Run(name, **{**values, **more})  # type: ignore[arg-type]


@BOTH_WAYS
def test_what_is_known_of_a_machines_cost_is_read_back_as_it_was_written(
    tmp_path: Path, threaded: bool
) -> None:
    whole = run(
        "i-2",
        price_assumed=True,
        running_from_unix=1.8e9 + 0.25,
        running_until_unix=1.8e9 + 1.5,
        ended_by_unix=1.8e9 + 2.75,
        reclaimed=False,
    )

    async def story(store: Store) -> None:
        for one in (run("i-1"), run("i-2"), whole):
            await store.run_changed(one)

    within(tmp_path, story, threaded=threaded)
    with opened(tmp_path) as store:
        assert store.runs() == [run("i-1"), whole]


def test_a_file_from_before_there_were_runs_is_taken_over(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await store.order_placed(order("cb-1"))

    within(tmp_path, story)
    connection = sqlite3.connect(tmp_path / "broker.db")
    connection.execute("DROP TABLE runs")
    connection.close()
    with opened(tmp_path) as store:
        assert store.runs() == []
        assert store.open_orders() == [order("cb-1")]


def test_only_old_runs_are_dropped_and_none_of_today(tmp_path: Path) -> None:
    def days_ago(number: int, days: float) -> Run:
        return run(f"i-{number}", ended_by_unix=1.8e9 - days * 86_400)

    old = [days_ago(number, 3) for number in range(5)]
    recent = [days_ago(number, 1) for number in range(5, 10)]
    open_one = run("i-open", not_running_until_unix=1.8e9 - 90 * 86_400)
    newest = [run(f"i-{number}", ended_by_unix=1.8e9) for number in range(10, 10 + RUNS_MAX)]

    async def story(store: Store) -> None:
        await asyncio.gather(*(store.run_changed(one) for one in [open_one, *old, *recent, *newest]))

    within(tmp_path, story, threaded=False)
    with opened(tmp_path) as store:
        assert store.runs() == [open_one, *recent, *newest]


def test_orders_are_synced_to_the_disk_itself_and_leases_to_the_system(tmp_path: Path) -> None:
    """SQLite: PRAGMA synchronous, 2 is FULL, 1 is NORMAL; PRAGMA journal_mode."""
    with opened(tmp_path) as store:
        modes = {durable: c.execute("PRAGMA synchronous").fetchone() for durable, c in connections(store)}
        assert modes == {True: (2,), False: (1,)}
        assert all(c.execute("PRAGMA journal_mode").fetchone() == ("wal",) for _, c in connections(store))


def connections(store: Store) -> list[tuple[bool, sqlite3.Connection]]:
    return list(store._connections.items())


def test_an_order_comes_back_exactly_as_it_was_placed(tmp_path: Path) -> None:
    exact = order("cb-ü", parameters='{"UserData": "\\u00e4\\n", "Tags": [{"Key": "a"}]}', created_unix=1.5)

    async def place(store: Store) -> None:
        await store.order_placed(exact)

    async def look(store: Store) -> None:
        assert store.open_orders() == [exact]

    within(tmp_path, place)
    within(tmp_path, look)


def test_only_orders_whose_outcome_nobody_knows_are_open(tmp_path: Path) -> None:
    async def place(store: Store) -> None:
        for name in ("cb-1", "cb-2", "cb-3"):
            await store.order_placed(order(name))
        await store.order_launched("cb-1", "i-1")
        await store.order_closed("cb-1", "launched")
        await store.order_closed("cb-2", "no-capacity")

    async def look(store: Store) -> None:
        assert [one.id for one in store.open_orders()] == ["cb-3"]
        (launched,) = store.launched_orders(Moment("this boot", at=5.0, unix=1002.0))
        assert (launched.order, launched.instance_id) == (order("cb-1"), "i-1")

    within(tmp_path, place)
    within(tmp_path, look)


def test_every_machine_of_an_order_is_an_attempt_and_is_expected_until_it_is_gone(tmp_path: Path) -> None:
    four = order("cb-1", count=4, created_unix=1000.0)
    now = Moment("this boot", at=5.0, unix=1002.0)

    async def place(store: Store) -> None:
        await store.order_placed(four)
        for number in (1, 2, 3):
            await store.order_launched("cb-1", f"i-{number}")
        await store.machine_gone("i-2")

    async def look(store: Store) -> None:
        assert store.open_orders() == [four]
        assert store.attempts(now, within_seconds=60.0) == [("default", 2.0)] * 4
        assert [one.instance_id for one in store.launched_orders(now)] == ["i-1", "i-3"]
        assert store.order_counts() == {"cb-1": 4}

    within(tmp_path, place)
    within(tmp_path, look)


def test_a_file_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "broker.db")) as file, file:
        file.executescript(VERSION_1)

    async def look(store: Store) -> None:
        assert [one.id for one in store.open_orders()] == ["cb-open"]
        (launched,) = store.launched_orders(Moment("this boot", at=5.0, unix=1002.0))
        assert (launched.order, launched.instance_id) == (order("cb-launched", created_unix=1000.0), "i-1")
        assert [one.lease.id for one in store.leases()] == ["lease-1"]

    within(tmp_path, look)
    within(tmp_path, look)


def test_attempts_are_remembered_whatever_came_of_them(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        for number, pool in enumerate(("default", "gpu", "default")):
            await store.order_placed(order(f"cb-{number}", pool=pool, created_unix=1000.0 + number))
        await store.order_closed("cb-2", "no-capacity")
        now = Moment("this boot", at=5.0, unix=1002.0)
        assert store.attempts(now, within_seconds=1.0) == [("gpu", 1.0), ("default", 0.0)]

    within(tmp_path, story)


def test_an_attempt_keeps_its_age_when_the_wall_clock_is_set(tmp_path: Path) -> None:
    """Simulated history, seed 141: a clock set an hour ahead made a restarted broker forget launches."""

    async def story(store: Store) -> None:
        await store.order_placed(order("cb-1", created_unix=1000.0), Moment("boot 1", at=100.0, unix=1000.0))
        ahead = Moment("boot 1", at=110.0, unix=1010.0 + 7200.0)
        assert store.attempts(ahead, within_seconds=3600.0) == [("default", 10.0)]
        assert store.attempts(replace(ahead, at=100.0 + 3601.0), within_seconds=3600.0) == []
        machine_started_anew = Moment("boot 2", at=1.0, unix=1500.0)
        assert store.attempts(machine_started_anew, within_seconds=3600.0) == [("default", 500.0)]

    within(tmp_path, story)


def test_the_history_of_closed_orders_has_an_end_and_others_are_never_dropped(tmp_path: Path) -> None:
    many = CLOSED_ORDERS_MAX + 200

    async def place(store: Store) -> None:
        await asyncio.gather(*(store.order_placed(order(f"cb-{i}")) for i in range(many)))
        await store.order_launched("cb-1", "i-1")
        await asyncio.gather(*(store.order_closed(f"cb-{i}", "spent") for i in range(1, many)))

    within(tmp_path, place)
    within(tmp_path, nothing)
    left = rows(tmp_path, "SELECT state, count(*) FROM orders GROUP BY state ORDER BY state")
    assert left == [("closed", CLOSED_ORDERS_MAX + 1), ("open", 1)], "one machine may still run"
    assert rows(tmp_path, "SELECT id FROM orders LIMIT 2") == [("cb-0",), ("cb-1",)]


async def nothing(store: Store) -> None:
    """Only opened and closed."""


# --- leases ----


@BOTH_WAYS
def test_leases_outlive_the_process_until_they_end(tmp_path: Path, threaded: bool) -> None:
    async def hold(store: Store) -> None:
        await store.lease_granted(lease("lease-1"), WORKER)
        await store.lease_granted(lease("lease-2", "ben"), WORKER)
        await store.lease_ended("lease-1")

    async def look(store: Store) -> None:
        (stored,) = store.leases()
        assert stored.instance_id == stored.lease.worker_id == "i-1"
        assert (stored.pool, stored.address) == ("default", "10.0.0.1")
        assert (stored.lease.client, stored.lease.ttl_seconds, stored.lease.exclusive) == (
            "ben",
            900.0,
            False,
        )

    within(tmp_path, hold, threaded=threaded)
    within(tmp_path, look, threaded=threaded)


def test_a_lease_that_became_exclusive_is_exclusive_after_a_restart(tmp_path: Path) -> None:
    async def hold(store: Store) -> None:
        await store.lease_granted(lease("lease-1"), WORKER)
        await store.lease_granted(lease("lease-1", exclusive=True), WORKER)

    async def look(store: Store) -> None:
        assert [stored.lease.exclusive for stored in store.leases()] == [True]

    within(tmp_path, hold)
    within(tmp_path, look)


# --- who it is ----


@BOTH_WAYS
def test_what_a_broker_keeps_about_itself_outlives_it_and_a_file_without_it_is_no_trouble(
    tmp_path: Path, threaded: bool
) -> None:
    async def story(store: Store) -> None:
        connections(store)[0][1].execute("DROP TABLE meta")  # a file of the version before

    async def later(store: Store) -> None:
        assert store.kept("epoch") is None
        await store.keep("epoch", "6")
        await store.keep("epoch", "7")

    async def at_last(store: Store) -> None:
        assert store.kept("epoch") == "7"

    for one in (story, later, at_last):
        within(tmp_path, one, threaded=threaded)


def test_an_end_that_was_decided_can_be_taken_back(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await store.end_decided("i-1", 1.8e9)
        await store.end_decided("i-2", 1.8e9)
        await store.end_revoked("i-1")
        assert store.ended() == {"i-2"}

    within(tmp_path, story)


# --- how it writes ----


@BOTH_WAYS
def test_two_hundred_clients_that_are_served_at_once_cost_few_commits(tmp_path: Path, threaded: bool) -> None:
    async def story(store: Store) -> None:
        statements: list[str] = []
        for _, connection in connections(store):
            connection.set_trace_callback(statements.append)
        await asyncio.gather(*(store.lease_granted(lease(f"lease-{i}", f"c{i}"), WORKER) for i in range(200)))
        assert statements.count("COMMIT") <= 3
        assert len(store.leases()) == 200

    within(tmp_path, story, threaded=threaded)


def test_what_is_written_in_passing_is_on_disk_when_the_store_has_settled(tmp_path: Path) -> None:
    async def hold(store: Store) -> None:
        await store.lease_granted(lease("lease-1"), WORKER)
        await store.order_placed(order("cb-1"))
        store.soon(store.lease_ended("lease-1"))
        store.soon(store.order_closed("cb-1", "spent"))

    async def look(store: Store) -> None:
        assert store.leases() == []
        assert store.open_orders() == []

    within(tmp_path, hold)
    within(tmp_path, look)


def test_a_client_that_does_not_wait_any_more_does_not_stop_the_write(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        writing = asyncio.create_task(store.order_placed(order("cb-1")))
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await store.settle()
        assert [one.id for one in store.open_orders()] == ["cb-1"]

    within(tmp_path, story)


def test_the_event_loop_goes_on_while_the_disk_is_slow(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        blocker = sqlite3.connect(tmp_path / "broker.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")  # somebody looks into the file, and holds the writer up
        writing = asyncio.create_task(store.order_placed(order("cb-1")))
        turns = 0
        while turns < 1000:
            await asyncio.sleep(0)
            turns += 1
        assert not writing.done()
        blocker.execute("COMMIT")
        blocker.close()
        await asyncio.wait_for(writing, SECONDS_MAX)

    within(tmp_path, story)


# --- a full disk ----


@BOTH_WAYS
def test_a_full_disk_is_said_with_its_remedy_and_over_when_there_is_room(
    tmp_path: Path, threaded: bool
) -> None:
    async def story(store: Store) -> None:
        big = "x" * 100_000
        connection = store._connections[True]
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StoreError, match=r"broker\.db: database or disk is full; is the disk full\?"):
            await store.order_placed(order("cb-1", parameters=big))
        assert store.open_orders() == [], "no order on disk, and so no launch"
        await store.lease_granted(lease("lease-1"), WORKER)
        connection.execute("PRAGMA max_page_count = 1000000")
        await store.order_placed(order("cb-1", parameters=big))
        assert [one.id for one in store.open_orders()] == ["cb-1"]

    within(tmp_path, story, threaded=threaded)


def test_a_file_that_may_not_grow_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    script = """
        import asyncio, resource, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from broker.core.errors import StoreError
        from broker.store import Store
        from tests.test_store import order
        async def main():
            store = Store(Path(sys.argv[1]))
            store.open()
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
            failed = 0
            for number in range(60):
                try:
                    await store.order_placed(order(f"cb-{number}", parameters="x" * 10_000))
                except StoreError as error:
                    failed += 1
                    last = error.message
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            await store.order_placed(order("cb-last"))
            print(failed > 0, len(store.open_orders()) + failed == 61, "is the disk full?" in last)
            await store.settle()
            store.close()
        asyncio.run(main())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert (run.stdout, run.returncode) == ("True True True\n", 0), run.stderr


def test_a_write_that_nobody_waits_for_is_reported_when_it_fails(tmp_path: Path) -> None:
    said: list[str] = []

    async def main() -> None:
        store = Store(tmp_path, report=said.append)
        store.open()
        store._connections[False].execute("PRAGMA query_only = ON")
        store.soon(store.lease_ended("lease-1"))
        await store.settle()
        store.close()

    asyncio.run(main())
    assert len(said) == 1
    assert "attempt to write a readonly database" in said[0]


def test_a_write_after_the_end_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    async def main() -> None:
        store = Store(tmp_path)
        store.open()
        store.close()
        with pytest.raises(StoreError):
            await asyncio.wait_for(store.order_placed(order("cb-1")), SECONDS_MAX)

    asyncio.run(main())


# --- one broker a directory ----


def test_a_second_broker_on_the_same_directory_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with opened(tmp_path):
        with pytest.raises(
            StoreError, match=rf"another broker \(process {os.getpid()}\) runs on .*state_dir"
        ):
            Store(tmp_path).open()
        with pytest.raises(StoreError):
            Store(tmp_path).open()
    with opened(tmp_path):
        pass


def test_the_lock_of_a_broker_that_was_killed_is_free(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from broker.store import Store\n"
        "store = Store(Path(sys.argv[1])); store.open(); print('open', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match=rf"process {holder.pid}\)"):
            Store(tmp_path).open()
    finally:
        holder.kill()
        holder.communicate(timeout=SECONDS_MAX)
    with opened(tmp_path):
        pass


def test_a_process_that_the_broker_starts_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with opened(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with opened(tmp_path):
            pass
    finally:
        child.communicate(b"\n", timeout=SECONDS_MAX)


# --- a directory that cannot be used ----


def test_only_the_broker_itself_may_read_its_state(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "by-the-broker"
    old = os.umask(0o022)
    try:
        within(directory, use)
        with opened(directory):
            files = {"": 0o700, "broker.db": 0o600, "leases-missing": 0o600, "lock": 0o600}
            assert modes(directory) == files | logs(directory, 0o600)
    finally:
        os.umask(old)


def test_in_a_directory_that_others_may_read_the_files_are_still_the_brokers_own(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        tmp_path.chmod(0o755)
        with opened(tmp_path) as store:
            asyncio.run(use(store))
            assert logs(tmp_path, 0o600), "there is a log now, and it holds what was written last"
            assert {m for name, m in modes(tmp_path).items() if name} == {0o600}
    finally:
        os.umask(old)


async def use(store: Store) -> None:
    await store.order_placed(order("cb-1"))
    await store.lease_granted(lease("lease-1"), WORKER)


def modes(directory: Path) -> dict[str, int]:
    paths = {"": directory} | {path.name: path for path in directory.iterdir()}
    return {name: stat.S_IMODE(path.stat().st_mode) for name, path in paths.items()}


def logs(directory: Path, mode: int) -> dict[str, int]:
    """SQLite's own files beside the database, which hold the same things."""
    return {path.name: mode for path in directory.iterdir() if path.name.startswith("broker.db-")}


def test_a_state_directory_that_cannot_be_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot use the state directory .*file/below"):
        Store(tmp_path / "file" / "below").open()


def test_a_database_that_is_a_directory_is_an_error_and_the_lock_is_given_back(tmp_path: Path) -> None:
    (tmp_path / "broker.db").mkdir()
    with pytest.raises(StoreError, match="cannot use the state directory"):
        Store(tmp_path).open()
    (tmp_path / "broker.db").rmdir()
    with opened(tmp_path):
        pass


# --- damage ----


def torn(path: Path) -> None:
    path.write_bytes(b"this is no database at all, but long enough to look like a page of one" * 100)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribbled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(4096, len(data)):  # the first page, with the schema in it, is whole
        data[at] = (at * 7919) % 256
    path.write_bytes(data)


def scribbled_at_the_end(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(len(data) - 3000, len(data) - 1000):
        data[at] = (at * 7919) % 256
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [torn, cut, scribbled, scribbled_at_the_end], ids=lambda damage: damage.__name__
)
def test_a_damaged_file_is_set_aside_and_the_broker_starts(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async def fill(store: Store) -> None:
        await asyncio.gather(
            *(store.order_placed(order(f"cb-{i}", parameters="x" * 500)) for i in range(200))
        )

    within(tmp_path, fill)
    damage(tmp_path / "broker.db")
    said: list[str] = []
    store = Store(tmp_path, report=said.append)
    store.open()
    try:
        assert store.open_orders() == []
        assert store.leases() == []
        asyncio.run(store.order_placed(order("cb-new")))
    finally:
        store.close()
    aside = list(tmp_path.glob("broker.db.broken-*"))
    assert len(aside) == 1
    assert len(said) == 1
    assert "is damaged" in said[0]
    assert aside[0].name in said[0]


def test_damage_twice_keeps_both_files(tmp_path: Path) -> None:
    for _ in range(2):
        torn(tmp_path / "broker.db")
        with opened(tmp_path):
            pass
    assert len(list(tmp_path.glob("broker.db.broken-*"))) == 2


def test_a_torn_log_of_a_crash_loses_what_was_not_committed_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()

    async def story(store: Store) -> None:
        await store.order_placed(order("cb-1"))
        for name in ("broker.db", "broker.db-wal"):
            (copy / name).write_bytes((tmp_path / "live" / name).read_bytes())

    within(tmp_path / "live", story)
    with (copy / "broker.db-wal").open("ab") as log:
        log.write(os.urandom(5000))

    async def look(store: Store) -> None:
        assert [one.id for one in store.open_orders()] == ["cb-1"]

    within(copy, look)
    assert list(copy.glob("*.broken-*")) == []


def test_what_is_known_of_a_machine_outlives_the_process_until_it_is_gone(tmp_path: Path) -> None:
    async def write(store: Store) -> None:
        await store.note_changed(MachineNote("i-1", ready=True, uses=1))
        await store.note_changed(MachineNote("i-2", protected=True))
        await store.note_changed(MachineNote("i-1", ready=True, uses=2))
        await store.note_changed(MachineNote("i-3"))
        await store.note_dropped("i-3")

    async def look(store: Store) -> None:
        assert store.notes() == [
            MachineNote("i-2", protected=True),
            MachineNote("i-1", ready=True, uses=2),
        ]

    within(tmp_path, write)
    within(tmp_path, look)


def test_a_breaker_keeps_its_time_when_the_wall_clock_is_set_and_when_the_machine_restarts(
    tmp_path: Path,
) -> None:
    async def story(store: Store) -> None:
        breaker = Breaker(BreakerState.OPEN, 600.0, failures=1, openings=2)
        await store.breaker_changed("gpu", breaker, Moment("boot 1", at=100.0, unix=1000.0))
        ahead = Moment("boot 1", at=110.0, unix=1010.0 + 7200.0)
        assert store.breakers(ahead) == {"gpu": replace(breaker, seconds_left=590.0)}
        machine_started_anew = Moment("boot 2", at=1.0, unix=1500.0)
        assert store.breakers(machine_started_anew) == {"gpu": replace(breaker, seconds_left=100.0)}
        (over,) = store.breakers(Moment("boot 1", at=701.0, unix=1601.0)).values()
        assert over == Breaker(BreakerState.CLOSED, 0.0, failures=1, openings=2)

    within(tmp_path, story)


# --- files of an older version --------------------------------------------------------------------------


async def test_a_file_of_the_first_version_is_brought_up_to_date_and_loses_nobody(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "broker.db")) as older:
        older.executescript(VERSION_1)
    for _ in range(2):  # the second start finds it as the first has left it
        with opened(tmp_path) as store:
            old, *_ = store.leases()
            assert old.lease == Lease("lease-1", "i-1", "ann", 900.0)
            acquired = Lease("new", WORKER.id, "anna", 60.0, acquired=True, bound=True)
            await store.lease_granted(acquired, WORKER)
    with opened(tmp_path) as store:
        _, new = store.leases()
        assert (new.lease.acquired, new.lease.bound) == (True, False), "no connection outlives its broker"


def test_a_file_of_a_later_version_is_refused_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "broker.db")) as newer:
        newer.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match=r"another version of compute-broker \(99\)"), opened(tmp_path):
        pass
