"""A start that finds 10,000 machines: the daemon's first scan, with everything that listens to it.

The daemon is the real one, wired as `serve` wires it, with its log, metrics and store; only its cloud is
ours, and that cloud's listing costs nothing. So the time is what the broker does beyond the listing. Half of
the machines have clients from before the restart, whose leases are taken up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.machines import POOL, lease, machine
from broker.clock import SystemClock
from broker.core import tags
from broker.core.model import Instance
from broker.core.settings import parse
from broker.daemon import Daemon
from broker.logs import Log, configure, get_logger
from broker.store import StoredLease
from broker.testing import FakeCloud

MACHINES = 10_000
BROKER = "bench"


def seconds() -> tuple[float, float]:
    """By the clock and of the processor: from the listing in hand to every lease on disk."""
    with tempfile.TemporaryDirectory(prefix="compute-broker-bench-") as folder, _log(Path(folder)) as log:
        return asyncio.run(_first_scan(Path(folder), log))


async def _first_scan(folder: Path, log: Log) -> tuple[float, float]:
    listing = [_tagged(number) for number in range(MACHINES)]
    provider = Cloud(listing)
    settings = parse({"broker": {"id": BROKER}}, {})
    daemon = Daemon(
        settings,
        state_dir=folder / "state",
        clock=SystemClock(),
        log=log,
        environ={},
        providers=lambda *_: {POOL: (provider,)},
    )
    context = daemon.context
    context.known_orders |= {_order(number): 1 for number in range(MACHINES)}  # as the store tells them
    for one in listing[::2]:
        held = StoredLease(lease(one.id, f"client-{one.id}"), one.id, POOL, one.address or "")
        context.stored_leases[one.id] = [held]
    context.store.open()
    try:
        began, cpu_began = time.perf_counter(), time.process_time()
        await daemon.reconcile.scan()
        await context.store.settle()
        taken = time.perf_counter() - began, time.process_time() - cpu_began
    finally:
        context.store.close()
    assert len(context.registry) == MACHINES
    assert context.registry.lease_count(POOL) == MACHINES // 2
    return taken


class Cloud(FakeCloud):
    """A cloud whose listing is ready before it is asked for."""

    name = "benchmark"

    def __init__(self, listing: list[Instance]) -> None:
        super().__init__(BROKER, (POOL,), clock=SystemClock())
        self._listing = listing

    async def listing(self) -> list[Instance]:
        return self._listing


def _tagged(number: int) -> Instance:
    ours = {tags.NAME: "worker", tags.BROKER: BROKER, tags.POOL: POOL, tags.ORDER: _order(number)}
    return replace(machine(number), tags=ours)


def _order(number: int) -> str:
    return f"cb-{number:024d}"


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[Log]:
    """The broker's own log, as JSON, into a file instead of standard error."""
    handlers = logging.getLogger().handlers[:]
    with (folder / "log").open("w") as file, contextlib.redirect_stderr(file):
        configure("info", "json")
        try:
            yield get_logger(broker=BROKER)
        finally:
            logging.getLogger().handlers[:] = handlers
    assert (folder / "log").stat().st_size > MACHINES  # it was written, and there
