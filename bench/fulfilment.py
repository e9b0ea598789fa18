"""From waiting clients to machines: the planner's time, launch calls of a burst, calls of a broker at rest.

The planner is timed in seconds of the processor. The bursts are played by the real daemon on the simulated
EC2 in virtual time, so calls are counted exactly. What a client waits after its worker has become ready is
the broker's own work, in real time, and whatever it waits for meanwhile, in virtual time: both together.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.machines import POOL, machine
from bench.registry_ops import collector_off
from bench.verdict import Verdict, at_most
from broker.core.model import Event, Lease, Market, Offering, WorkerChanged, WorkerState
from broker.core.planning import by_offering, plan
from broker.core.registry import Registry
from broker.core.settings import parse
from broker.core.wish import ANYTHING, Wish
from broker.daemon import Daemon
from broker.providers.ec2 import Ec2Provider
from broker.providers.simulated import SimEC2, Weather
from broker.testing import EPOCH_UNIX, Client, LoopClock, run_virtual, silent_log
from broker.waiting import Waiter, Waiting

SIZES = (1_000, 10_000, 100_000)
TARGET_SIZE, PLAN_MS_MAX = 10_000, 20.0
WORKERS_SHARE = 0.5  # of the clients: 10,000 wait and 5,000 machines are on their way
ROUNDS = 7
GROWTH_MAX = 1.5  # of the time for one client, from the smallest size to the largest: linear, and caches
TYPES = ("c7i.16xlarge", "c6i.16xlarge", "c7a.16xlarge", "c6a.16xlarge")
SHARERS, SHARED_LAUNCHES_MAX = 1_000, 1
ALONE, ALONE_CALLS_MAX = 500, 5
ANSWER_MS_MAX = 100.0
IDLE_WORKERS, CALLS_PER_MINUTE_MAX = 1_000, 4.0
REST_MINUTES = 30
LAUNCHES = ("RunInstances", "CreateFleet")
SEED = 2560


@dataclass
class FulfilmentResult:
    """`plan_ms` by the number of clients, in the order of SIZES."""

    plan_ms: list[float] = field(default_factory=list)
    shared_launches: int = 0
    alone_calls: int = 0
    alone_machines: int = 0
    answer_ms_worst: float = 0.0
    notice_ms: tuple[float, float] = (0.0, 0.0)  # from an open port to READY: the median, the worst
    calls_per_minute: dict[str, float] = field(default_factory=dict)

    def verdicts(self) -> list[Verdict]:
        at_target = self.plan_ms[SIZES.index(TARGET_SIZE)]
        growth = (self.plan_ms[-1] / SIZES[-1]) / (self.plan_ms[0] / SIZES[0])
        few, many = self.calls_per_minute["10 clients"], self.calls_per_minute["1,000 clients"]
        alone_few, alone_many = self.calls_per_minute["10 alone"], self.calls_per_minute["500 alone"]
        idle = f"{IDLE_WORKERS:,} idle workers"
        return [
            at_most(f"a plan for {TARGET_SIZE:,} clients and {round(TARGET_SIZE * WORKERS_SHARE):,} machines",
                    PLAN_MS_MAX, at_target, "ms"),
            at_most(f"growth of a plan's time for each client, {SIZES[0]:,} → {SIZES[-1]:,}", GROWTH_MAX,
                    growth, "x"),
            Verdict(f"machines launched for {SHARERS:,} cold askers of a shared pool",
                    f"≤ {SHARED_LAUNCHES_MAX}", str(self.shared_launches),
                    self.shared_launches <= SHARED_LAUNCHES_MAX),
            Verdict(f"launch calls for {ALONE} cold askers of an exclusive pool", f"≤ {ALONE_CALLS_MAX}",
                    f"{self.alone_calls} for {self.alone_machines} machines",
                    self.alone_calls <= ALONE_CALLS_MAX and self.alone_machines == ALONE),
            at_most("from a worker's readiness to its client's answer, the worst of them", ANSWER_MS_MAX,
                    self.answer_ms_worst, "ms"),
            at_most(f"cloud calls a minute with {idle}", CALLS_PER_MINUTE_MAX, self.calls_per_minute[idle],
                    "a minute"),
            Verdict("cloud calls a minute with 10 clients that PING, and with 1,000", "the same",
                    f"{few:.2f} and {many:.2f}", abs(few - many) < 0.1),
            Verdict("the same, each with a worker of its own, and with 500", "the same",
                    f"{alone_few:.2f} and {alone_many:.2f}", abs(alone_few - alone_many) < 0.1),
        ]  # fmt: skip

    def notice(self) -> str:
        """What comes before the broker knows that a worker is ready, in words."""
        median_ms, worst_ms = self.notice_ms
        return (
            f"Of {ALONE} machines that boot at once, from the moment at which the port is open to the try "
            f"that finds it open: {median_ms:,.0f} ms (median), {worst_ms:,.0f} ms (worst). No target: the "
            "port of a booting machine is tried once a second, and the answer counts from that try."
        )

    def table(self) -> tuple[Sequence[str], Iterable[Sequence[str]]]:
        head = ("clients", "machines on their way", "a plan, ms", "µs for each client")
        return head, (
            (f"{size:,}", f"{round(size * WORKERS_SHARE):,}", f"{ms:.2f}", f"{ms * 1e3 / size:.2f}")
            for size, ms in zip(SIZES, self.plan_ms, strict=True)
        )


def measure(say: Callable[[str], None]) -> FulfilmentResult:
    result = FulfilmentResult()
    for size in SIZES:
        result.plan_ms.append(asyncio.run(plan_ms(size)))
        say(f"a plan for {size:,} clients: done")
    sky, _, _ = _burst(SHARERS, "shared")
    result.shared_launches = len(sky.truth())
    sky, answers_ms, notices_ms = _burst(ALONE, "exclusive")
    result.answer_ms_worst = max(answers_ms)
    result.notice_ms = statistics.median(notices_ms), max(notices_ms)
    result.alone_calls = sum(sky.calls[api] for api in LAUNCHES)
    result.alone_machines = len(sky.truth())
    say("bursts on the simulated EC2: done")
    result.calls_per_minute = {
        "10 clients": _at_rest(clients=10, workers=1),
        "1,000 clients": _at_rest(clients=1_000, workers=1),
        "10 alone": _at_rest(clients=10, workers=10),
        "500 alone": _at_rest(clients=500, workers=500),
        f"{IDLE_WORKERS:,} idle workers": _at_rest(clients=0, workers=IDLE_WORKERS),
    }
    say("calls of a broker at rest: done")
    return result


# --- the planner ---------------------------------------------------------------------------------------


async def plan_ms(clients: int) -> float:
    """From the queue and the books to purchases, the best of some rounds; half of them share nothing."""
    offerings = [Offering("us-east-1", kind, Market.SPOT, cores=64) for kind in TYPES]
    registry, waiting, dice = Registry(), Waiting(), random.Random(SEED)
    for number in range(round(clients * WORKERS_SHARE)):
        registry.adopt(machine(number), POOL, 2560, 0.0)
    wishes = (ANYTHING, Wish(cores=64), Wish(type=TYPES[0]), Wish(region="us-east-1"))
    loop = asyncio.get_running_loop()
    for number in range(clients):
        served: asyncio.Future[list[Lease]] = loop.create_future()
        waiting.join(Waiter(POOL, f"client-{number}", number % 2 == 0, dice.choice(wishes), number, served))

    def once() -> float:
        began_ns = time.thread_time_ns()  # nothing here waits: other programs shall not count
        coming = by_offering(registry.in_state(WorkerState.BOOTING, pool=POOL))
        plan(waiting.needs(POOL), coming, offerings, clients)
        return (time.thread_time_ns() - began_ns) / 1e6

    with collector_off():
        return min(once() for _ in range(ROUNDS))


# --- the real daemon on the simulated EC2 ----------------------------------------------------------------


@contextlib.asynccontextmanager
async def _broker(
    folder: Path, sharing: str, heard: Callable[[Event], None]
) -> AsyncIterator[tuple[SimEC2, Daemon]]:
    recipe = {
        "provider": "ec2",
        "image": "ami-1",
        "region": "us-east-1",
        "instance_types": list(TYPES),
        "sharing": sharing,
        "max_workers": 2 * IDLE_WORKERS,
        "launches_per_hour": 2 * IDLE_WORKERS,
        "idle_timeout": "10h",
        "max_lifetime": "24h",
    }
    settings = parse({"broker": {"id": "bench"}, "pool": {POOL: recipe}}, {})
    loop = asyncio.get_running_loop()
    clock = LoopClock(loop)
    sky = SimEC2(random.Random(SEED), loop.time, lambda: EPOCH_UNIX + loop.time(), Weather())
    provider = Ec2Provider(
        "bench",
        settings.pool,
        region="us-east-1",
        profile=None,
        clock_wall=clock.wall,
        client_factory=sky.client_factory,
    )
    numbers = itertools.count(1)
    daemon = Daemon(
        settings,
        state_dir=folder,
        clock=clock,
        log=silent_log(),
        environ={},
        providers=lambda *_: {POOL: (provider,)},
        connect=sky.connect,
        store_threaded=False,
        ports=False,
        new_id=lambda: f"bench-{next(numbers)}",
        owner_of=lambda directory: "host",
    )
    daemon.observe(heard)
    stop = asyncio.Event()
    running = asyncio.create_task(daemon.run(stop))
    try:
        yield sky, daemon
    finally:
        stop.set()
        await running


def _play(
    sharing: str, story: Callable[[SimEC2, Daemon], Awaitable[None]], heard: Callable[[Event], None]
) -> SimEC2:
    async def main(folder: Path) -> SimEC2:
        async with _broker(folder, sharing, heard) as (sky, daemon):
            await story(sky, daemon)
            sky.truth()
            return sky

    with tempfile.TemporaryDirectory(prefix="compute-broker-bench-") as folder:
        return run_virtual(main(Path(folder)))


def _burst(clients: int, sharing: str) -> tuple[SimEC2, list[float], list[float]]:
    """So many ask at once and nothing is there. Also the milliseconds from each READY to the answer, and
    from each open port to READY."""
    ready: dict[str, tuple[int, float]] = {}
    waits_ms: list[float] = []

    def heard(event: Event) -> None:
        if isinstance(event, WorkerChanged) and event.worker.state is WorkerState.READY:
            now = time.perf_counter_ns(), asyncio.get_running_loop().time()
            ready.setdefault(event.worker.address or "", now)

    async def story(sky: SimEC2, daemon: Daemon) -> None:
        async def ask(number: int) -> None:
            client = Client(daemon.server)
            address = await client.ask(f"GET_WORKER client=c{number}")
            real_ns, virtual_at = ready[address]
            virtual_seconds = asyncio.get_running_loop().time() - virtual_at
            waits_ms.append((time.perf_counter_ns() - real_ns) / 1e6 + virtual_seconds * 1e3)

        await asyncio.gather(*(ask(number) for number in range(clients)))

    sky = _play(sharing, story, heard)
    assert len(waits_ms) == clients
    opened_at = {one.public_address: one.port_opens_at for one in sky.truth()}
    return sky, waits_ms, [(at - opened_at[address]) * 1e3 for address, (_, at) in ready.items()]


def _at_rest(*, clients: int, workers: int) -> float:
    """Cloud calls a minute with so many workers; so many clients PING theirs every minute."""
    counted: Counter[str] = Counter()

    async def story(sky: SimEC2, daemon: Daemon) -> None:
        askers = [Client(daemon.server) for _ in range(max(clients, workers))]
        names = [f"client=c{number}" for number in range(len(askers))]
        addresses = await asyncio.gather(
            *(one.ask(f"GET_WORKER {name}") for one, name in zip(askers, names, strict=True))
        )
        assert len(set(addresses)) == workers
        await asyncio.sleep(600)
        before = sum(sky.calls.values())
        for _ in range(REST_MINUTES):
            await asyncio.sleep(60)
            for one, name, address in zip(askers[:clients], names, addresses, strict=False):
                assert await one.ask(f"PING {address} {name}") == "OK"
        counted["calls"] = sum(sky.calls.values()) - before

    _play("shared" if workers == 1 else "exclusive", story, lambda event: None)
    return counted["calls"] / REST_MINUTES
