"""`compute-broker …`: the daemon, and a person's way to talk to it.

What a script wants goes to stdout, everything else to stderr. Exit codes: 0 done, 1 the broker refused (its
sentence is on stderr), 2 the command line or the configuration is wrong, 3 the broker cannot be reached.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from broker.cli_base import (
    EPILOG,
    EXIT_USAGE,
    BrokerOption,
    ClientOption,
    ConfigOption,
    JsonOption,
    answers,
    client_of,
    errors,
    fail,
    fail_settings,
    load_settings,
    table_console,
)
from broker.cli_leases import ACQUIRE_CONTEXT, acquire, done, renew, watch
from broker.cli_offerings import OFFERINGS_EPILOG, offerings
from broker.client import Client
from broker.configuration import load, to_toml
from broker.core.errors import BrokerError, SettingsError
from broker.core.settings import PoolSettings
from broker.core.settings import schema as settings_schema
from broker.errand import BrokerUnreachable
from broker.pool_table import pool_table

WATCH_SECONDS = 2.0
GC_OBJECTS = (
    20_000  # new ones before a collection looks: a connection is a cycle of a dozen, short-lived by nature
)
PATIENCE_SECONDS = 1.0  # what takes longer shows that it is under way

app = typer.Typer(
    help="Ask for a worker, get a machine that is really ready, never pay for an idle one.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=EPILOG, context_settings=ACQUIRE_CONTEXT)(acquire)
for command in (renew, done, watch):
    app.command(epilog=EPILOG)(command)
app.command(epilog=OFFERINGS_EPILOG)(offerings)
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")
AddressArgument = Annotated[
    str, typer.Argument(metavar="ADDRESS", help="A worker's address, as `get` printed it.")
]


def main() -> None:
    """The console script."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is tried at the exit
        if not isinstance(error, BrokenPipeError):
            print(f"compute-broker: cannot write the output: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


# --- the daemon ------------------------------------------------------------------------------------------


@app.command(epilog=EPILOG)
def serve(config: ConfigOption = None) -> None:
    """Run the broker until SIGTERM or Ctrl-C. Workers live on; the next broker finds them again."""
    from broker.clock import (
        SystemClock,
    )  # the daemon's libraries take half a second: only `serve` pays for them
    from broker.daemon import Daemon, state_directory
    from broker.logs import configure, get_logger, set_level

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the loop takes it: a reload must not end a start
    configuration = load_settings(config)
    settings = configuration.settings
    configure(settings.broker.log_level, settings.broker.log_format)
    log = get_logger(broker=settings.broker.id)
    log.info("starting", version=version("compute-broker"), settings=configuration.source)
    try:
        state_dir = state_directory(settings, os.environ)
        _run(
            lambda: Daemon(
                settings,
                state_dir=state_dir,
                clock=SystemClock(),
                log=log,
                environ=os.environ,
                load=lambda: load(config, os.environ).settings,
                log_at=set_level,
            )
        )
    except SettingsError as error:
        fail_settings(error)
    except BrokerError as error:
        fail(error.message)
    except OSError as error:
        listen, http = settings.broker.listen, settings.broker.http
        fail(f"cannot listen on {listen} (clients) and {http} (http): {error.strerror or error}")


def _run(make: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            runner.run(_serve(make))
        except BaseExceptionGroup as group:  # the task group's wrapping of what is one error
            raise group.exceptions[0] from None


async def _serve(make: Callable[[], Any]) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    daemon = make()
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    gc.collect()
    gc.freeze()  # what is there now, the SDK's tables above all, stays for good: no collection walks it again
    gc.set_threshold(GC_OBJECTS, 10, 10)
    await daemon.run(stop)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it imports, asyncio's own loop elsewhere."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


# --- a person's way to the daemon ------------------------------------------------------------------------


@app.command(epilog=EPILOG)
def get(
    config: ConfigOption = None,
    broker: BrokerOption = None,
    pool: Annotated[str | None, typer.Option(help="The pool to take it from.")] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="At least so many cores.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="This machine type.")] = None,
    region: Annotated[str | None, typer.Option(help="In this region.")] = None,
    wait: Annotated[float | None, typer.Option(min=0, help="Wait so many seconds at most.")] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="A worker that nobody else uses.")] = False,
    client: ClientOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the address of a ready worker; one is launched when none is there."""
    asker = client_of(config, broker, client)
    with answers(), _progress("waiting for a worker", asker):
        address = asker.get_worker(
            pool=pool, cores=cores, type=type_, region=region, wait=wait, exclusive=exclusive
        )
    print(json.dumps({"ip": address, "client": asker.name}) if as_json else address)


@app.command(epilog=EPILOG)
def ping(
    address: AddressArgument,
    config: ConfigOption = None,
    broker: BrokerOption = None,
    client: ClientOption = None,
) -> None:
    """Keep a worker: its idle timer starts again."""
    with answers():
        client_of(config, broker, client).ping(address)
    print("OK")


@app.command(epilog=EPILOG)
def release(
    address: AddressArgument,
    config: ConfigOption = None,
    broker: BrokerOption = None,
    client: ClientOption = None,
    force: Annotated[bool, typer.Option("--force", help="Terminate it even when others use it.")] = False,
) -> None:
    """Give a worker back; it is terminated unless somebody else uses it."""
    with answers():
        client_of(config, broker, client).release(address, force=force)
    print("OK")


@app.command(epilog=EPILOG)
def workers(
    config: ConfigOption = None,
    broker: BrokerOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the workers in the broker's books."""
    asker = client_of(config, broker, None)
    console = table_console()
    with answers():
        if as_json and watch:
            raise typer.BadParameter("--json prints once; leave out --watch")
        if as_json:
            print(json.dumps(asker.status(), indent=2))
        elif not watch:
            console.print(_table(asker.status()))
        else:
            _watch(asker, console)


@app.command(epilog=EPILOG)
def pools(config: ConfigOption = None, broker: BrokerOption = None, as_json: JsonOption = False) -> None:
    """Show the pools: workers, caps, breaker, budget, and why clients wait."""
    asker = client_of(config, broker, None)
    console = table_console()
    with answers():
        rows = asker.pools()
        if as_json:
            print(json.dumps(rows, indent=2))
        else:
            console.print(pool_table(rows))


@app.command("terminate-all", epilog=EPILOG)
def terminate_all(
    config: ConfigOption = None,
    broker: BrokerOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """End every machine of this broker, busy or not; protected ones are left running, and named on stderr."""
    asker = client_of(config, broker, None)
    with answers():
        if not yes:
            running = len(asker.status())
            typer.confirm(
                f"End {running} workers at {asker.broker}, whoever uses them?", abort=True, err=True
            )
        ended = asker.terminate_all()
        spared = [worker["instance_id"] for worker in asker.status() if worker.get("protected")]
    if spared:
        errors.print(f"protected by a tag and left running: {', '.join(spared)}")
    nothing = "nothing else was running" if spared else "nothing was running"
    print(json.dumps(ended) if as_json else "\n".join(ended) or nothing)


# --- the simulator ---------------------------------------------------------------------------------------


@app.command(epilog="Exit codes: 0 no promise was broken, 1 some were, 2 wrong usage or configuration.")
def simulate(
    seeds: Annotated[int, typer.Option(min=1, help="How many histories.")] = 100,
    hours: Annotated[float, typer.Option(min=0.1, help="How long each is, in simulated hours.")] = 24.0,
    seed: Annotated[int, typer.Option(min=0, help="The first one.")] = 0,
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ordinary days under these settings: launches, cost, waiting. Without: all goes wrong.",
        ),
    ] = None,
    pool: Annotated[str, typer.Option(help="Which pool of --settings.")] = "default",
    plant: Annotated[
        str | None, typer.Option(metavar="BUG", help="Break the broker first: is it found? In a clone only.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all figures: Markdown, or JSON for a .json name."),
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="How many to use; all by default.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Of each history, let only these entries happen.")
    ] = None,
) -> None:
    """Run the real broker against a lying cloud in virtual time, and say what it broke."""
    from broker.simulation.command import Wanted  # the daemon's libraries take half a second
    from broker.simulation.command import simulate as run

    chosen = None if settings is None else load_settings(settings).settings
    kept = None if only is None else tuple(int(number) for number in only.split(",") if number)
    wanted = Wanted(seeds, hours, seed, chosen, str(settings or ""), pool, plant, report, cores, kept)
    try:
        broken = run(wanted, errors)
    except SettingsError as error:
        fail_settings(error)
    except OSError as error:
        fail(f"cannot write the report: {error}", EXIT_USAGE)
    raise typer.Exit(1 if broken else 0)


# --- the configuration -----------------------------------------------------------------------------------


@config_app.command(epilog=EPILOG)
def check(config: ConfigOption = None) -> None:
    """Say whether the settings are sound; every problem at once."""
    configuration = load_settings(config)
    pools = (f"{name} -> {_where(p)}" for name, p in configuration.settings.pool.items())
    print(f"{configuration.source}: ok ({', '.join(pools)})")
    for name, pool in configuration.settings.pool.items():
        for remark in _remarks(pool):
            errors.print(f"note: pool.{name}: {remark}", highlight=False, soft_wrap=True)


def _remarks(pool: PoolSettings) -> Iterator[str]:
    """What is sound and perhaps not meant."""
    if idle := _of_another_provider(pool):
        yield f'{", ".join(idle)}: only of use with provider = "ec2", and this one is "{pool.provider}"'
    if pool.warm_stopped and (pool.user_data or pool.user_data_file):
        yield (
            "warm_stopped: user data runs at a machine's first boot only; does the image start the worker at "
            "every boot?"
        )


def _of_another_provider(pool: PoolSettings) -> list[str]:
    """What is said of EC2 in a pool that does not buy there."""
    fields = type(pool).model_fields
    said = [key for key in fields if key in pool.model_fields_set]
    return [
        key for key in said if pool.provider != "ec2" and (fields[key].description or "").startswith("ec2:")
    ]


def _where(pool: PoolSettings) -> str:
    """Where the pool buys, in words."""
    regions = (" then " if pool.region_order == "listed" else " or ").join(pool.regions)
    return " ".join(filter(None, (pool.provider, pool.region, regions)))


@config_app.command(epilog=EPILOG)
def show(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Print the settings in effect: file, environment and defaults together. Durations are in seconds."""
    configuration = load_settings(config)
    if as_json:
        print(configuration.settings.model_dump_json(indent=2))
    else:
        print(f"# {configuration.source}\n{to_toml(configuration.settings)}", end="")


@config_app.command(epilog=EPILOG)
def schema(config: ConfigOption = None) -> None:
    """Print the JSON schema of the settings. It is the same for every FILE."""
    print(json.dumps(settings_schema(), indent=2))


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if show_version:
        print(version("compute-broker"))
        raise typer.Exit


# --- inside ------------------------------------------------------------------------------------------------


@contextmanager
def _progress(what: str, asker: Client) -> Iterator[None]:
    """Show on stderr, after a moment, that something is under way, and for how long."""
    done, started = threading.Event(), time.monotonic()

    def tell() -> None:
        if done.wait(PATIENCE_SECONDS):
            return
        if not errors.is_terminal:
            errors.print(f"{what} ...")
            return
        with errors.status(what) as status:
            while not done.wait(0.5):
                status.update(f"{what}, {time.monotonic() - started:.0f} s{_booting(asker)}")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _booting(asker: Client) -> str:
    try:
        booting = [worker for worker in asker.status() if worker["state"] in ("ordered", "booting")]
    except BrokerError:
        return ""
    if not booting:
        return ""
    longest_seconds = max(worker.get("state_seconds", worker["age_seconds"]) for worker in booting)
    return f" ({len(booting)} booting, the oldest for {longest_seconds} s)"


def _watch(asker: Client, console: Console) -> NoReturn:
    """For ever: in place on a terminal, else one table after the other. A restarting broker is waited for."""
    with Live(_view(asker), console=console, auto_refresh=False, transient=False) as live:
        while True:
            if not console.is_terminal:
                console.print(live.renderable)
            time.sleep(WATCH_SECONDS)
            live.update(_view(asker), refresh=console.is_terminal)


def _view(asker: Client) -> Table | str:
    try:
        return _table(asker.status())
    except BrokerUnreachable as error:
        return error.message


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("STATE", "ADDRESS", "INSTANCE"):
        table.add_column(column, no_wrap=True)
    for column in ("POOL", "TYPE"):
        table.add_column(column, overflow="fold")
    for column in ("CORES", "LEASES", "IDLE", "ENDS IN", "AGE"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            _state(row), row["ip"] or "-", row["instance_id"] or "-", row["pool"], row["instance_type"],
            str(row["cores"] or "?"), str(row["leases"]), _duration(row["idle_seconds"]),
            _duration(row["will_terminate_in"]), _duration(row["age_seconds"]),
        )  # fmt: skip
    if not rows:
        table.caption = "no workers: nothing is running, nothing is billed"
    return table


def _state(row: dict[str, Any]) -> str:
    return f"{row['state']} (protected)" if row.get("protected") else str(row["state"])


def _duration(seconds: int | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
