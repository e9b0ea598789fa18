"""The tables of the store, how an older file becomes one of today's, and what is dropped at a start."""

from __future__ import annotations

from typing import Any

CLOSED_ORDERS_MAX = 1000  # history for a person who asks what happened; older ones are dropped
ENDED_MAX = 10_000  # ended machines that are remembered: EC2 shows each for about an hour
NOTES_MAX = 10_000  # machines of which uses and protection are remembered: more than a broker ever has
RUNS_MAX = 10_000  # machines whose cost is remembered: weeks of a busy broker. Older ones are dropped,
RUNS_KEPT_SECONDS = 2 * 86_400.0  # but none whose cost may count for today's budget

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

# Carried out at each start, in this order: statement, values.
TRIMS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (
        "DELETE FROM orders WHERE state = 'closed' AND rowid <= (SELECT max(rowid) FROM orders) - ? "
        "AND id NOT IN (SELECT order_id FROM machines)",
        (CLOSED_ORDERS_MAX,),
    ),
    ("DELETE FROM attempts WHERE order_id NOT IN (SELECT id FROM orders)", ()),
    ("DELETE FROM ended WHERE rowid <= (SELECT max(rowid) FROM ended) - ?", (ENDED_MAX,)),
    (
        "DELETE FROM machine_notes WHERE rowid <= (SELECT max(rowid) FROM machine_notes) - ?",
        (NOTES_MAX,),
    ),
    (
        "DELETE FROM runs WHERE rowid <= (SELECT max(rowid) FROM runs) - ? AND ended_by_unix < ? + (SELECT "
        "max(coalesce(ended_by_unix, running_until_unix, not_running_until_unix)) FROM runs)",
        (RUNS_MAX, -RUNS_KEPT_SECONDS),
    ),
)
