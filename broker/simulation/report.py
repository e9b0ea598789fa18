"""What a campaign came to, in words and tables for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from broker.simulation.awaits import points, struck
from broker.simulation.campaign import Finding, Totals
from broker.simulation.drawing import FAIR
from broker.simulation.scenarios import SCENARIOS
from broker.testing import EPOCH_UNIX

PERCENTILES = (50, 90, 99)
TRANSCRIPT_LINES_MAX = 120  # on a terminal; a report file has them all
USD_MICROS = 1_000_000

COMPARED = ("what", "as set", "without warm workers", "difference")

Row = Sequence[object]


def facts(
    totals: Totals, title: str, *, ordinary: bool = False, cold: Totals | None = None
) -> dict[str, Any]:
    """Everything that was counted and measured, fit for JSON. `ordinary`: nothing was made to go wrong.

    `cold` is what the same histories came to without warm workers.
    """
    hits = struck(totals.stood_at)
    return {
        "title": title,
        "ordinary": ordinary,
        "summary": totals.summary(),
        "seeds": totals.seeds,
        "hours": totals.hours,
        "launches": totals.launches,
        "crashes": totals.crashes,
        "seconds": round(totals.seconds, 1),
        "hours_per_core_second": round(totals.hours / totals.core_seconds, 1)
        if totals.core_seconds
        else None,
        **_costs_and_waits(totals),
        "warm": None if cold is None else _comparison(totals, cold),
        "rest_seconds_max": totals.rest_seconds_max,
        "scenarios": {
            str(one.number): {"title": one.title, "count": one.count(totals.seen)} for one in SCENARIOS
        },
        "faults": dict(totals.faults.most_common()),
        "wait_points": {
            "of": len(points()),
            "struck": sum(times > 0 for times in hits.values()),
            "never": [str(point) for point, times in hits.items() if not times],
        },
        "violations": [
            {"seed": outcome.seed, "at": round(one.at, 3), "promise": one.promise, "facts": one.facts}
            for outcome in totals.broken
            for one in outcome.violations
        ],
    }


def _costs_and_waits(totals: Totals) -> dict[str, Any]:
    return {
        "waits": {
            "served": len(totals.waited),
            "not_served": totals.unserved,
            **{f"p{percent}_seconds": percentile(totals.waited, percent) for percent in PERCENTILES},
            "max_seconds": round(max(totals.waited, default=0.0), 1),
        },
        "cost_usd": round(totals.cost_usd_micros / USD_MICROS, 2),
        "idle_usd": round(totals.idle_usd_micros / USD_MICROS, 2),
    }


def _comparison(as_set: Totals, cold: Totals) -> dict[str, Any]:
    """What warm workers cost and save: the same histories with them and without."""
    begin = datetime.fromtimestamp(EPOCH_UNIX, UTC)
    return {
        "begins": f"{begin:%A %Y-%m-%d %H:%M} UTC",
        "as_set": {"launches": as_set.launches, **_costs_and_waits(as_set)},
        "without": {"launches": cold.launches, **_costs_and_waits(cold)},
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent do not exceed; 0 when there is none."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 1) if ordered else 0.0


def write(path: Path, found: dict[str, Any], transcripts: Sequence[str]) -> None:
    """JSON when the name says so, else Markdown. Raises OSError."""
    if path.suffix == ".json":
        text = json.dumps({**found, "transcripts": list(transcripts)}, indent=2) + "\n"
    else:
        text = markdown(found, transcripts)
    path.write_text(text, encoding="utf-8")


def markdown(found: dict[str, Any], transcripts: Sequence[str]) -> str:
    parts = [f"# {found['title']}\n\n`{found['summary']}`\n"]
    parts += [_table(("what", "figure"), _operators_rows(found))] if found["ordinary"] else _trials(found)
    if found["warm"]:
        table = _table(COMPARED, _compared_rows(found))
        parts += ["## What the warm workers cost and save\n", f"{_weekday(found)}\n", table]
    if found["violations"]:
        rows = [
            (one["seed"], f"{one['at']:.1f}", one["promise"], one["facts"]) for one in found["violations"]
        ]
        parts += ["## Broken promises\n", _table(("seed", "second", "promise", "facts"), rows)]
    parts += [f"```text\n{transcript}\n```\n" for transcript in transcripts]
    return "\n".join(parts)


def _trials(found: dict[str, Any]) -> list[str]:
    """What went wrong around the broker, and what was reached by it."""
    waits, wait_points = found["waits"], found["wait_points"]
    parts = [
        _table(
            ("what", "figure"),
            [
                ("simulated hours", f"{found['hours']:,.0f}"),
                ("simulated hours a second, one core", found["hours_per_core_second"]),
                ("launches", f"{found['launches']:,}"),
                ("broker killed", f"{found['crashes']:,}"),
                ("clients served, not served", f"{waits['served']:,}, {waits['not_served']:,}"),
                ("waited, p50 / p90 / p99 / max", _seconds(waits)),
                ("cost, of which while nobody used it", f"${found['cost_usd']:,}, ${found['idle_usd']:,}"),
                ("at rest after all is healed, within", f"{found['rest_seconds_max']:,.0f} s"),
                ("places where a kill met a task", f"{wait_points['struck']} of {wait_points['of']}"),
            ],
        ),
        "## Scenarios\n",
        _table(
            ("#", "scenario", "reached"),
            [(number, one["title"], f"{one['count']:,}") for number, one in found["scenarios"].items()],
        ),
        "## Faults\n",
        _table(("fault", "times"), [(name, f"{times:,}") for name, times in found["faults"].items()]),
    ]
    if wait_points["never"]:
        parts += ["## Never struck by a kill\n", "".join(f"- {place}\n" for place in wait_points["never"])]
    return parts


def operators_view(found: dict[str, Any]) -> str:
    """What an operator's own settings would do, for a terminal."""
    rows = _operators_rows(found)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def comparison_view(found: dict[str, Any]) -> str:
    """What warm workers cost and save, for a terminal."""
    rows = [COMPARED, *_compared_rows(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COMPARED))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, _weekday(found)])


def _weekday(found: dict[str, Any]) -> str:
    hours = found["hours"] / found["seeds"]
    boot, start = (
        f"{FAIR.pending_seconds[0] + port[0]:g} to {FAIR.pending_seconds[1] + port[1]:g} s"
        for port in (FAIR.port_seconds, FAIR.port_again_seconds)
    )
    return (
        f"Each history begins on {found['warm']['begins']} and lasts {hours:g} hours; "
        "clients come at any hour of it.\n"
        f"Assumed: a machine is ready {boot} after its launch, one that was stopped {start} after its start."
    )


def _compared_rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    warm, days = found["warm"], found["hours"] / 24
    as_set, without = warm["as_set"], warm["without"]

    def row(what: str, pair: tuple[float, float], pattern: str) -> tuple[str, str, str, str]:
        amounts = [pattern.format(amount) for amount in (*pair, abs(pair[0] - pair[1]))]
        sign = "-" if pair[0] < pair[1] else "+"
        return what, amounts[0], amounts[1], f"{sign}{amounts[2]}"

    def pair(key: str) -> tuple[float, float]:
        return as_set[key] / days, without[key] / days

    waits = [("p50", "p50_seconds"), ("p90", "p90_seconds"), ("p99", "p99_seconds"), ("max", "max_seconds")]
    return [
        row("cost a day", pair("cost_usd"), "${:.2f}"),
        row("of it while nobody used the machine", pair("idle_usd"), "${:.2f}"),
        row("launches a day", pair("launches"), "{:.1f}"),
        *(
            row(f"clients waited, {name}", (as_set["waits"][key], without["waits"][key]), "{:g} s")
            for name, key in waits
        ),
        row("clients not served", (as_set["waits"]["not_served"], without["waits"]["not_served"]), "{:g}"),
    ]


def _operators_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    waits, days = found["waits"], found["hours"] / 24
    share = found["idle_usd"] / found["cost_usd"] if found["cost_usd"] else 0.0
    return [
        ("launches a day", f"{found['launches'] / days:.1f}"),
        ("cost a day", f"${found['cost_usd'] / days:.2f}"),
        ("of it while nobody used the machine", f"${found['idle_usd'] / days:.2f} ({share:.0%})"),
        ("clients served, not served", f"{waits['served']}, {waits['not_served']}"),
        ("they waited, p50 / p90 / p99 / max", _seconds(waits)),
    ]


def transcript(finding: Finding, command: str) -> str:
    """A broken promise for a person: what was promised, what it takes, what happened, how to see it again."""
    outcome, history = finding.outcome, finding.history
    pool = history.settings.pool["default"].model_dump(exclude_defaults=True)
    lines = [
        f"seed {outcome.seed}: {outcome.violations[0]}" if outcome.violations else f"seed {outcome.seed}",
        f"again: {command}",
        f"pool: {', '.join(f'{key}={value}' for key, value in pool.items())}",
        *(f"entry: {entry}" for entry in history.entries),
        *outcome.trace,
    ]
    return "\n".join(lines)


def shortened(text: str) -> str:
    """The head, and the lines around the broken promise, for a terminal."""
    lines = text.splitlines()
    if len(lines) <= TRANSCRIPT_LINES_MAX:
        return text
    found = next((i for i, line in enumerate(lines) if "VIOLATION" in line), len(lines) - 1)
    start = max(10, found - TRANSCRIPT_LINES_MAX + 20)
    shown = [*lines[:10], f"… {start - 10} lines, --report has them all …", *lines[start : found + 10]]
    return "\n".join(shown)


def _seconds(waits: dict[str, Any]) -> str:
    values = [waits[f"p{percent}_seconds"] for percent in PERCENTILES]
    return " / ".join(f"{value:g}" for value in [*values, waits["max_seconds"]]) + " s"


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)
