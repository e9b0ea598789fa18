"""What the commands that talk to a broker share: where it is, who asks, and what exit code a failure has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from broker.client import Client
from broker.configuration import Configuration, load
from broker.core.errors import BadRequest, BrokerError, SettingsError
from broker.core.settings import split_address
from broker.errand import BrokerUnreachable, name_ending

EXIT_REFUSED, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 3

EPILOG = "Exit codes: 0 done, 1 the broker refused, 2 wrong usage or configuration, 3 broker not reachable."

# markup and emoji: "[::a:b]" is an address, and no letter in a box
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
# The same for a line that is shown in place: it must be wrapped, or its end is cut off.
terminal = Console(stderr=True, highlight=False, markup=False, emoji=False)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Settings. Without it: $COMPUTE_BROKER_CONFIG, /etc/compute-broker/broker.toml, built-in ones.",
    ),
]
BrokerOption = Annotated[
    str | None,
    typer.Option(
        "--broker", metavar="HOST:PORT", help="Where the broker is; otherwise what the settings say."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ClientOption = Annotated[
    str | None,
    typer.Option(
        "--client",
        help="The name to ask under; a lease belongs to a name. Default: you, in all your terminals.",
    ),
]


def table_console() -> Console:
    """For tables on stdout: as wide as the terminal, and wide enough where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)


def load_settings(config: Path | None) -> Configuration:
    try:
        return load(config, os.environ)
    except SettingsError as error:
        fail_settings(error)


def client_of(config: Path | None, broker: str | None, client: str | None) -> Client:
    """A client under one stable name for all of a person's commands: `release` must find what `get` took."""
    if broker is None and (config is not None or "COMPUTE_BROKER_HOST" not in os.environ):
        host, port = split_address(load_settings(config).settings.broker.listen)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (where it listens, seen from here)
        broker = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    name = client or name_ending("/cli")
    try:
        return Client(broker, client=name)
    except BadRequest as error:
        fail(error.message, EXIT_USAGE)


@contextmanager
def answers() -> Iterator[None]:
    """Turn what the broker says into an exit code and a sentence."""
    try:
        yield
    except BrokerUnreachable as error:
        fail(
            error.message.replace("host= or COMPUTE_BROKER_HOST", "--broker or COMPUTE_BROKER_HOST"),
            EXIT_UNREACHABLE,
        )
    except BrokerError as error:
        fail(error.wire().removeprefix("ERROR: "))


def fail_settings(error: SettingsError) -> NoReturn:
    for problem in error.problems:
        errors.print(f"compute-broker: {problem}")
    raise typer.Exit(EXIT_USAGE)


def fail(message: str, code: int = EXIT_REFUSED) -> NoReturn:
    errors.print(f"compute-broker: {message}")
    raise typer.Exit(code)
