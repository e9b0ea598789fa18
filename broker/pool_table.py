"""POOLS as a table for people: a line for each pool, and below it why its clients wait, if they do."""

from __future__ import annotations

from typing import Any

from rich.table import Table

Row = dict[str, Any]


def pool_table(rows: list[Row]) -> Table:
    """The rows of POOLS, as the broker answered them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("POOL", "PROVIDER", "WORKERS"):
        table.add_column(column, overflow="fold")
    for column in ("LEASES", "WAITING", "LAUNCHES/H", "SPENT TODAY"):
        table.add_column(column, justify="right")
    for column in ("BREAKER", "WHY CLIENTS WAIT"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"], _provider(row), _workers(row), str(row["leases"]), str(row["waiting"]),
            f"{row['launches_last_hour']}/{row['launches_per_hour']}", _spent(row["budget"]),
            _breaker(row["breaker"]), _obstacle(row),
        )  # fmt: skip
    return table


def _provider(row: Row) -> str:
    """With its regions, when there are several: the preferred one first, each with its workers."""
    regions = [f"{one['cloud']}: {one['workers']}" for one in row.get("regions", ())]
    return "\n".join([row["provider"] or "-", *regions])


def _obstacle(row: Row) -> str:
    """Why clients wait; else why one of several regions is passed over."""
    passed_over = [one["obstacle"] for one in row.get("regions", ()) if one["obstacle"]]
    return row["obstacle"] or "; ".join(passed_over) or "-"


def _workers(row: Row) -> str:
    """Those that are stopped count against no cap."""
    counts = dict(row["workers"])
    stopped = [f"{counts.pop('stopped')} stopped"] if counts.get("stopped") else []
    states = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none"
    text = "; ".join([f"{states} of {row['max_workers']}", *stopped])
    return f"{text} ({row['protected']} protected)" if row["protected"] else text


def _spent(budget: Row) -> str:
    limit = "" if budget["limit_usd"] is None else f" of ${budget['limit_usd']:.2f}"
    return f"${budget['spent_usd']:.2f}{limit}"


def _breaker(breaker: Row) -> str:
    if breaker["state"] == "open":
        return f"open, {breaker['seconds_left']} s left"
    failures = breaker["failures"]
    return f"closed, {failures} failed in a row" if failures else "closed"
