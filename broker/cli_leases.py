"""The commands about leases: acquire, renew, done, watch.

`acquire` alone prints leases that last for their ttl. With a command behind `--` it holds them by a
connection while the command runs, and gives them back: a `kill -9` of it frees the workers as well.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from broker import wire
from broker.child import Child, exit_code_of
from broker.cli_base import (
    BrokerOption,
    ClientOption,
    ConfigOption,
    JsonOption,
    answers,
    client_of,
    errors,
    fail,
    terminal,
)
from broker.client import Client
from broker.core.errors import BrokerError
from broker.core.replies import Granted, Notice, Pending
from broker.core.tags import rfc3339
from broker.held_lease import acquire as acquire_block
from broker.lease_errands import Wanted
from broker.lease_keeper import HeldLease

SAY_SECONDS = 10.0  # between two lines about waiting, where they cannot replace each other: a log stays short
ACQUIRE_CONTEXT = {"allow_interspersed_args": False}  # what follows the command is the command's

LeaseArgument = Annotated[str, typer.Argument(metavar="LEASE", help="A lease, as `acquire` printed it.")]


def acquire(
    config: ConfigOption = None,
    broker: BrokerOption = None,
    pool: Annotated[str | None, typer.Option(help="The pool to take it from.")] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="At least so many cores.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="This machine type.")] = None,
    region: Annotated[str | None, typer.Option(help="In this region.")] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Workers that nobody else uses.")] = False,
    count: Annotated[int, typer.Option(min=1, max=1000, help="So many leases.")] = 1,
    least: Annotated[int | None, typer.Option("--min", min=1, help="So many will do after --wait.")] = None,
    wait: Annotated[float | None, typer.Option(min=0, help="Wait so many seconds at most.")] = None,
    ttl: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds a lease lasts without `renew`; else the pool says."),
    ] = None,
    client: ClientOption = None,
    as_json: JsonOption = False,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND …]", help="Run it while the leases are held.")
    ] = None,
) -> None:
    """Lease workers: print the leases, or hold them while a command runs.

    compute-broker acquire --cores 64 -- sh -c 'my-program --worker "$COMPUTE_BROKER_WORKER"'

    The command finds the first worker in COMPUTE_BROKER_WORKER and all, with blanks between, in
    COMPUTE_BROKER_WORKERS, each as address:port. Its exit code is that of `acquire`. Without a command,
    `renew` and `done` take the first word of each line that is printed.
    """
    asker = client_of(config, broker, client)
    wanted: Wanted = {
        "pool": pool, "cores": cores, "type": type_, "region": region, "wait": wait, "exclusive": exclusive,
        "min": least, "ttl": ttl,
    }  # fmt: skip
    if command:
        raise typer.Exit(_run_with(asker, count, wanted, command))
    with answers(), _waiting() as on_pending:
        wanted["on_pending"] = on_pending
        leases = asker.acquire(count=count, **wanted)
    if as_json:
        print(json.dumps([_json_of(lease) for lease in leases]))
    else:
        print("\n".join(_line_of(lease) for lease in leases))


def renew(
    lease: LeaseArgument,
    config: ConfigOption = None,
    broker: BrokerOption = None,
) -> None:
    """Keep a lease: it lasts its ttl again, from now.

    compute-broker renew lease-5f1c2a
    """
    with answers():
        client_of(config, broker, None).renew(lease)
    print("OK")


def done(
    lease: LeaseArgument,
    config: ConfigOption = None,
    broker: BrokerOption = None,
) -> None:
    """Give a lease back. The worker stays warm for whoever comes next.

    compute-broker done lease-5f1c2a
    """
    with answers():
        client_of(config, broker, None).done(lease)
    print("OK")


def watch(
    config: ConfigOption = None,
    broker: BrokerOption = None,
    client: ClientOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a line whenever one of your workers is about to go or has gone, until Ctrl-C.

    compute-broker watch --json | while read -r notice; do save-my-work; done
    """
    with answers():
        for notice in client_of(config, broker, client).watch():
            print(json.dumps(asdict(notice)) if as_json else _sentence_of(notice), flush=True)


# --- a command that runs while leases are held -----------------------------------------------------------


def _run_with(asker: Client, count: int, wanted: Wanted, command: Sequence[str]) -> int:
    """The command's exit code, or that of the broker's refusal."""
    held = ExitStack()
    with answers(), _waiting() as on_pending:
        wanted["on_pending"] = on_pending
        leases = held.enter_context(_held(asker, count, wanted))
    try:
        with held:
            return Child(command, os.environ | _environment(leases)).run()
    except OSError as error:
        fail(f"cannot run {command[0]}: {error.strerror}", exit_code_of(error))


@contextmanager
def _held(asker: Client, count: int, wanted: Wanted) -> Iterator[list[HeldLease]]:
    """The leases. That they cannot be given back is said, and does not change how the command ended."""
    block: AbstractContextManager[list[HeldLease]] = acquire_block(
        asker.broker.host,
        asker.broker.port,
        client=asker.name,
        count=count,
        on_lost=_tell_lost,
        on_notice=_tell_notice,
        **wanted,
    )
    leases = block.__enter__()
    try:
        yield leases
    finally:
        try:
            block.__exit__(None, None, None)
        except BrokerError as error:
            errors.print(f"compute-broker: the leases end by themselves, the broker was not told: {error}")


def _environment(leases: Sequence[HeldLease]) -> dict[str, str]:
    places = [wire.place(lease.address, lease.port) for lease in leases]
    return {"COMPUTE_BROKER_WORKER": places[0], "COMPUTE_BROKER_WORKERS": " ".join(places)}


def _tell_lost(lease: HeldLease) -> None:
    errors.print(f"compute-broker: {lease.id} has ended: {lease.address} is not yours any more")


def _tell_notice(notice: Notice) -> None:
    errors.print(f"compute-broker: {_sentence_of(notice)}")


# --- what is shown ---------------------------------------------------------------------------------------


@contextmanager
def _waiting() -> Iterator[Callable[[Pending], None]]:
    """What tells a person, on stderr, what is waited for: in place on a terminal, else now and then a
    line."""
    if errors.is_terminal:
        with ExitStack() as stack:
            status: list[Any] = []

            def show(pending: Pending) -> None:
                if not status:
                    status.append(stack.enter_context(terminal.status("waiting for a worker")))
                status[0].update(waiting_line(pending))

            yield show
    else:
        yield Seldom(time.monotonic, errors.print)


class Seldom:
    """Says what is waited for, at most once in SAY_SECONDS."""

    def __init__(self, clock: Callable[[], float], say: Callable[[str], object]) -> None:
        self._clock = clock
        self._say = say
        self._said_at: float | None = None

    def __call__(self, pending: Pending) -> None:
        now = self._clock()
        if self._said_at is None or now - self._said_at >= SAY_SECONDS:
            self._said_at = now
            self._say(waiting_line(pending))


def waiting_line(pending: Pending) -> str:
    """One line for a person who waits."""
    eta = "" if pending.eta_seconds is None else f", about {pending.eta_seconds:.0f} s"
    why = f": {pending.reason}" if pending.reason else ""
    return f"waiting for a worker, number {pending.position} in the queue{eta}{why} [{pending.code}]"


def _line_of(lease: Granted) -> str:
    kind = "" if lease.type is None else f" {lease.type}"
    cores = "" if lease.cores is None else f" {lease.cores} cores"
    price = "" if lease.price_usd_per_hour is None else f" ${lease.price_usd_per_hour:g}/h"
    place = wire.place(lease.address, lease.port)
    return f"{lease.id} {place}{kind}{cores} {lease.market}{price} until {rfc3339(lease.expires_unix)}"


def _json_of(lease: Granted) -> dict[str, Any]:
    shown = asdict(lease)
    expires = rfc3339(shown.pop("expires_unix"))
    del shown["of"]
    return {**shown, "expires": expires}


def _sentence_of(notice: Notice) -> str:
    when = f" in {notice.in_seconds:.0f} s" if notice.in_seconds else ""
    why = f": {notice.reason}" if notice.reason else ""
    instead = f"; {notice.replacement} replaces it" if notice.replacement else ""
    return f"{notice.what} {notice.address or 'a worker'} ({notice.lease}){when}{why}{instead}"
