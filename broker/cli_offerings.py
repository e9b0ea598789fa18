"""The command that asks the cloud what the pools of a file can buy, before a broker is started with it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from broker.cli_base import (
    EXIT_REFUSED,
    EXIT_USAGE,
    ConfigOption,
    JsonOption,
    errors,
    fail,
    fail_settings,
    load_settings,
    table_console,
)
from broker.core.errors import SettingsError

OFFERINGS_EPILOG = "Exit codes: 0 done, 1 something could not be asked, 2 wrong usage or configuration."


def offerings(
    config: ConfigOption = None,
    pool: Annotated[str | None, typer.Option(help="Only this pool.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the cloud what the pools can buy, and for how much now. Needs no broker, and changes nothing."""
    from broker.clock import SystemClock  # the daemon's libraries take half a second
    from broker.places import make_providers
    from broker.survey import survey

    settings = load_settings(config).settings
    if pool is not None and pool not in settings.pool:
        fail(f"there is no pool '{pool}'; there is {', '.join(sorted(settings.pool))}", EXIT_USAGE)
    wanted = {n: one for n, one in settings.pool.items() if one.provider == "ec2" and pool in (None, n)}
    if not wanted:
        which = "there is none" if pool is None else f"pool '{pool}' is none of them"
        fail(f'only pools with provider = "ec2" buy anything, and {which}', EXIT_USAGE)
    settings = settings.model_copy(update={"pool": wanted})
    with errors.status("asking the cloud ..."):
        providers = make_providers(settings, Path(), SystemClock(), lambda api, outcome: None)
        found = asyncio.run(survey(providers))
    if as_json:
        print(json.dumps([asdict(offer) for offer in found.offers], indent=2))
    elif found.offers:
        table = _table()
        for one in found.offers:
            spot = "-" if one.spot_usd_per_hour is None else f"{one.spot_usd_per_hour:.4f}"
            counted = f"{one.counted_usd_per_hour:.4f}{' (assumed)' if one.assumed else ''}"
            cores = str(one.cores or "?")
            zone = one.zone or "any"
            table.add_row(one.pool, one.region, zone, one.instance_type, cores, one.market, spot, counted)
        table_console().print(table)
    for sentence in found.unknown:
        errors.print(f"compute-broker: {sentence}")
    if found.problems:
        fail_settings(SettingsError(found.problems))
    if found.unknown:
        raise typer.Exit(EXIT_REFUSED)


def _table() -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("POOL", "REGION", "ZONE", "TYPE"):
        table.add_column(column, no_wrap=True)
    table.add_column("CORES", justify="right")
    table.add_column("MARKET", no_wrap=True)
    table.add_column("SPOT NOW, $/H", justify="right")
    table.add_column("COUNTED, $/H", justify="right")
    return table
