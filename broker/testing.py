"""For tests, ours and yours: clocks without waiting, a cloud in memory, a whole broker in one process.

`VirtualTimeLoop` is an asyncio loop whose clock jumps to the next timer instead of sleeping: a day of idle
timeouts passes in milliseconds, in the same order every time. `FakeCloud` is a provider that does what it is
told. `RunningBroker` wires a real Daemon to both, with connections in memory instead of sockets.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import structlog

from broker.clock import Clock
from broker.core import tags
from broker.core.cloudtime import Span
from broker.core.errors import CloudError, CloudUnreachable, OfferingRefused, OrderSpent, SettingsError
from broker.core.model import Bought, Instance, InstanceState, Market, Offering, Order
from broker.core.settings import PoolSettings, Settings
from broker.daemon import Daemon
from broker.providers.base import Change, Place
from broker.server import Connection, Server

T = TypeVar("T")
EPOCH_UNIX = 1_800_000_000.0  # where a virtual wall clock starts: any fixed moment will do
REPLY_SECONDS_MAX = 86_400.0  # virtual seconds that `Client.ask` waits: a test that hangs says where


class ManualClock:
    """Stands still until told otherwise."""

    boot = "manual"

    def __init__(self, monotonic: float = 0.0, wall: float = EPOCH_UNIX) -> None:
        self._monotonic, self._wall = monotonic, wall

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Both clocks go on."""
        self._monotonic += seconds
        self._wall += seconds

    def jump(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self._wall += seconds


# --- time --------------------------------------------------------------------------------------------------


class _Handle:
    """What `call_soon` returns: asyncio's Handle without what only a debugger asks it for."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Any) -> None:
        self._callback, self._args, self._cancelled = callback, args, False
        self._context = context or copy_context()

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled


class _Timer(_Handle):
    """What `call_at` returns."""

    __slots__ = ("_when",)

    def __init__(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Any
    ) -> None:
        super().__init__(callback, args, context)
        self._when = when

    def when(self) -> float:
        return self._when


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop on a clock that jumps. No threads, no sockets, no subprocesses in it.

    The order of events is asyncio's: what is ready runs before time passes, timers fire by their moment and,
    at one moment, in the order in which they were set. Nothing is ever waited for, so the selector is not
    asked at all, which makes a simulated hour several times cheaper than on the stock loop.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._timers: list[tuple[float, int, _Timer]] = []
        self._timers_set = 0
        self._ready: deque[Any]  # asyncio's own queue: call_soon_threadsafe knows it too

    def time(self) -> float:
        return self._now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Timer:
        timer = _Timer(when, callback, args, context)
        self._timers_set += 1
        heappush(self._timers, (when, self._timers_set, timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Timer:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Handle:
        handle = _Handle(callback, args, context)
        self._ready.append(handle)
        return handle

    def _run_once(self) -> None:
        """One round: every timer that is due, then what was ready when the round began."""
        ready, timers = self._ready, self._timers
        while timers and timers[0][2]._cancelled:
            heappop(timers)
        if not ready:
            if not timers:
                raise RuntimeError("the virtual-time loop waits for something that no timer will bring about")
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            timer = heappop(timers)[2]
            if not timer._cancelled:
                ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # asyncio's rule: a callback that fails does not end the loop
                message = f"exception in callback {handle._callback!r}"
                self.call_exception_handler({"message": message, "exception": error})


class LoopClock:
    """The clock of the running loop; `jump` sets the wall clock without touching the monotonic one."""

    boot = "virtual"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jumped = 0.0

    def monotonic(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return EPOCH_UNIX + self._loop.time() + self._jumped

    def jump(self, seconds: float) -> None:
        self._jumped += seconds


def run_virtual(main: Coroutine[Any, Any, T], loop: Callable[[], VirtualTimeLoop] = VirtualTimeLoop) -> T:
    """Run a coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)


# --- a cloud -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Machine:
    """What the fake cloud knows of a machine."""

    instance: Instance
    order_id: str
    hidden: bool = False  # exists, but listings do not show it
    answers: bool = True  # its worker port accepts connections


class FakeCloud:
    """A provider in memory that does what it is told and remembers what it was asked.

    `boots` decides whether a launch answers with a running machine or a pending one that `boot` finishes.
    Errors put into `fail[api]` are raised by the next calls, one each; `lose` marks that a launch is carried
    out although its answer is an error. `hold[api]` is awaited by every call while it is set. Machine types
    in `refuses` are not to be had; `gives` says how many machines the next orders get, whatever they ask for.
    The ids and addresses of its machines begin with number `first`: no two clouds have the same machines.
    """

    name = "fake"
    contested = True
    offerings_max = 1  # in one order; more when a test says so
    machines_max = 1

    def __init__(
        self,
        broker_id: str,
        pools: Sequence[str] = ("default",),
        *,
        clock: Clock,
        boots: bool = True,
        first: int = 1,
    ) -> None:
        self._broker_id = broker_id
        self._clock = clock
        self.boots = boots
        self.fail: dict[str, deque[Exception]] = defaultdict(deque)
        self.lose = False
        self.hold: dict[str, asyncio.Event] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.machines: dict[str, Machine] = {}
        self._usual: tuple[Offering, ...] = (
            Offering("moon", "big", Market.SPOT, cores=64, price_usd_micros_per_hour=1_000_000),
        )
        self.catalogue: dict[str, tuple[Offering, ...]] = dict.fromkeys(pools, self._usual)
        self.prices: dict[tuple[str, str], int] = {}  # (zone, type) → micro-dollars an hour, on spot
        self.study_problems: dict[str, list[str]] = {}  # what `study` answers
        self.study_later: dict[str, CloudError] = {}
        self.cores: dict[str, int] = {}
        self.place: Place = ("fake", None, None)
        self.round_trip: float | None = None  # seconds, as measured
        self.ends_at_once = self.stops_at_once = True
        self.refuses: dict[str, CloudError] = {}
        self.sells_otherwise: set[str] = set()  # machine types that come on demand, whatever was ordered
        self.dry: set[Market | tuple[str, Market]] = set()  # markets without machines (of a type)
        self.gives: deque[int] = deque()
        self.slow: dict[str, float] = {}  # addresses, and how many seconds a connection there takes
        self._numbers = itertools.count(first)

    # what tests do to it

    def boot(self, instance_id: str) -> None:
        self.set_state(instance_id, InstanceState.RUNNING)

    def set_state(self, instance_id: str, state: InstanceState, reason: str = "") -> None:
        machine = self.machines[instance_id]
        address = machine.instance.address or _address(instance_id)
        machine.instance = replace(machine.instance, state=state, reason=reason, address=address)

    def retag(self, instance_id: str, **new: str) -> None:
        """Somebody edits its tags in the console: `retag(id, protect="yes")` sets compute-broker:protect."""
        machine = self.machines[instance_id]
        named = {f"compute-broker:{key}": value for key, value in new.items()}
        machine.instance = replace(machine.instance, tags={**machine.instance.tags, **named})

    def running(self) -> list[str]:
        """The truth: ids of machines that are billed."""
        states = (InstanceState.PENDING, InstanceState.RUNNING)
        return [id_ for id_, machine in self.machines.items() if machine.instance.state in states]

    def add(self, pool: str = "default", **changes: Any) -> str:
        """A machine with our tag that no order of this broker's life explains."""
        order_id = f"old-{next(self._numbers)}"
        instance = self._make(pool, order_id, self.catalogue["default"][0])
        self.machines[instance.id] = Machine(replace(instance, **changes), order_id)
        return instance.id

    def count(self, api: str) -> int:
        return sum(name == api for name, _ in self.calls)

    def tagged(self, key: str) -> int:
        """How many calls for many machines have written, or tried to write, a tag of that name."""
        return sum(api == "tag_all" and key in what[1] for api, what in self.calls)

    def has(self, address: str) -> bool:
        """Whether a machine here has, or had, that address."""
        return any(machine.instance.address == address for machine in self.machines.values())

    async def connect(self, address: str, port: int) -> bool:
        """The network, for a ProbeLoop."""
        await asyncio.sleep(0.001)
        if self.fail["connect"]:
            raise self.fail["connect"].popleft()
        if "connect" in self.hold:
            await self.hold["connect"].wait()
        await asyncio.sleep(self.slow.get(address, 0.0))
        machines = [m for m in self.machines.values() if m.instance.address == address]
        return any(m.answers and m.instance.state is InstanceState.RUNNING for m in machines)

    # the port

    async def open(self) -> None:
        await self._call("open")

    async def study(self, pools: Mapping[str, PoolSettings]) -> Change:
        self.calls.append(("study", (dict(pools),)))
        await asyncio.sleep(0.001)
        if "study" in self.hold:
            await self.hold["study"].wait()
        later = {name: error for name, error in self.study_later.items() if name in pools}
        return Change(lambda: self._swap(pools), dict(self.study_problems), later)

    def _swap(self, pools: Mapping[str, PoolSettings]) -> None:
        self.catalogue = {name: self.catalogue.get(name, self._usual) for name in pools}

    def recall_cores(self, cores: Mapping[str, int]) -> None:
        self.cores = {**cores, **self.cores}

    async def close(self) -> None:
        self.calls.append(("close", ()))

    def offerings(self, pool: str) -> Sequence[Offering]:
        return self.catalogue.get(pool, ())

    def prepare(
        self,
        pool: str,
        order_id: str,
        offerings: Sequence[Offering],
        created_unix: float,
        epoch: str = "",
        count: int = 1,
    ) -> Order:
        return Order(order_id, pool, tuple(offerings), json.dumps({"epoch": epoch}), created_unix, count)

    async def launch(self, order: Order) -> Bought:
        error = await self._call("launch", order, quiet=self.lose)
        if error is not None and not self.lose:
            raise error
        machines = [m for m in self.machines.values() if m.order_id == order.id]
        refusals = [(one, why) for one in order.offerings if (why := self._refuses(one)) is not None]
        if not machines:
            epoch = json.loads(order.parameters).get("epoch", "")
            sold = next((one for one in order.offerings if self._refuses(one) is None), None)
            count = self.gives.popleft() if self.gives else order.count
            for _ in range(count if sold is not None else 0):
                instance = self._make(order.pool, order.id, sold or order.offerings[0], epoch)
                if instance.instance_type in self.sells_otherwise:
                    instance = replace(instance, market=Market.ON_DEMAND)
                machines.append(Machine(instance, order.id))
                self.machines[instance.id] = machines[-1]
        if error is not None:
            raise error
        dead = (InstanceState.SHUTTING_DOWN, InstanceState.TERMINATED)
        if order.count == 1 and any(machine.instance.state in dead for machine in machines):
            raise OrderSpent
        return Bought(tuple(machine.instance for machine in machines), tuple(refusals))

    async def listing(self) -> list[Instance]:
        await self._call("listing")
        return [machine.instance for machine in self.machines.values() if not machine.hidden]

    async def describe(self, instance_ids: Iterable[str]) -> list[Instance]:
        ids = tuple(instance_ids)
        await self._call("describe", ids)
        return [m.instance for id_ in ids if (m := self.machines.get(id_)) is not None and not m.hidden]

    async def terminate(self, instance_ids: Iterable[str]) -> None:
        ids = tuple(instance_ids)
        await self._call("terminate", ids)
        state = InstanceState.TERMINATED if self.ends_at_once else InstanceState.SHUTTING_DOWN
        for instance_id in ids:
            machine = self.machines.get(instance_id)
            if machine is not None and machine.instance.state is not InstanceState.TERMINATED:
                self.set_state(instance_id, state, "terminated by the broker")

    async def stop(self, instance_id: str) -> None:
        await self._call("stop", instance_id)
        machine = self.machines[instance_id]
        if machine.instance.state in (InstanceState.PENDING, InstanceState.RUNNING):
            state = InstanceState.STOPPED if self.stops_at_once else InstanceState.STOPPING
            machine.instance = replace(machine.instance, state=state, address=None)

    async def start(self, instance_id: str) -> None:
        await self._call("start", instance_id)
        machine = self.machines[instance_id]
        if refusal := self.refuses.get(machine.instance.instance_type):
            raise refusal
        if machine.instance.state is InstanceState.STOPPED:
            machine.instance = replace(
                machine.instance,
                state=InstanceState.RUNNING if self.boots else InstanceState.PENDING,
                address=_address(f"i-{next(self._numbers):017d}") if self.boots else None,
                launched_unix=self._clock.wall(),
            )

    async def tag(self, instance_id: str, new: Mapping[str, str]) -> None:
        await self._call("tag", instance_id, dict(new))
        machine = self.machines[instance_id]
        machine.instance = replace(machine.instance, tags={**machine.instance.tags, **new})

    async def tag_all(self, instance_ids: Iterable[str], new: Mapping[str, str]) -> None:
        ids = tuple(instance_ids)
        await self._call("tag_all", ids, dict(new))
        for machine in [self.machines[one] for one in ids if one in self.machines]:
            machine.instance = replace(machine.instance, tags={**machine.instance.tags, **new})

    async def spot_prices(self, pool: str) -> Mapping[tuple[str, str], int]:
        await self._call("spot_prices", pool)
        return dict(self.prices)

    def round_trip_seconds(self) -> float | None:
        return self.round_trip

    def clock_unix(self, at: float) -> Span:
        wall_unix = self._clock.wall() - (self._clock.monotonic() - at)
        return Span(wall_unix, wall_unix)

    def _refuses(self, offering: Offering) -> CloudError | None:
        if not self.dry.isdisjoint((offering.market, (offering.instance_type, offering.market))):
            return OfferingRefused(f"no {offering.instance_type} on {offering.market}")
        return self.refuses.get(offering.instance_type)

    async def _call(self, api: str, *arguments: Any, quiet: bool = False) -> Exception | None:
        self.calls.append((api, arguments))
        await asyncio.sleep(0.001)
        if api in self.hold:
            await self.hold[api].wait()
        error = self.fail[api].popleft() if self.fail[api] else None
        if error is not None and not quiet:
            raise error
        return error

    def _make(self, pool: str, order_id: str, offering: Offering, epoch: str = "") -> Instance:
        now_unix = self._clock.wall()
        identity = tags.Identity(self._broker_id, pool, order_id, epoch=epoch)
        instance_id = f"i-{next(self._numbers):017d}"
        return Instance(
            instance_id,
            InstanceState.RUNNING if self.boots else InstanceState.PENDING,
            address=_address(instance_id) if self.boots else None,
            instance_type=offering.instance_type,
            region=offering.region,
            market=offering.market,
            cores=offering.cores,
            launched_unix=now_unix,
            tags=tags.launch_tags(identity, "dserv-worker", {}, expires_unix=now_unix + 28800),
        )


def _address(instance_id: str) -> str:
    number = int(instance_id[2:])
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def lost_answer() -> CloudUnreachable:
    """What a provider raises when the connection breaks before the answer."""
    return CloudUnreachable("connection reset")


# --- a broker ----------------------------------------------------------------------------------------------


class _MemoryTransport(asyncio.Transport):
    """A connection's far end: collects what is written."""

    def __init__(self, client: Client, peer: str) -> None:
        super().__init__({"peername": (peer, 50_000)})
        self._client = client
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            self._client._hear(bytes(data))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._client._closed)

    def abort(self) -> None:
        self.close()

    def pause_reading(self) -> None:
        """Nothing is read from memory; what has been sent has arrived."""

    def resume_reading(self) -> None:
        """See pause_reading."""


class Client:
    """A client in memory, speaking bytes to a real Connection."""

    def __init__(self, server: Server, peer: str = "10.0.0.1") -> None:
        self.connection: Connection = server.connect()
        self.closed = False
        self._buffer = b""
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        self.connection.connection_made(_MemoryTransport(self, peer))

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)

    def half_close(self) -> None:
        if not self.connection.eof_received():
            self.connection._transport.close()

    def vanish(self) -> None:
        """The connection breaks."""
        self.connection._transport.close()

    async def reply(self, seconds_max: float = REPLY_SECONDS_MAX) -> str | None:
        """The next line, None when the broker has closed the connection."""
        if not self._lines.empty():  # mostly it is here already, and no timer is needed
            return self._lines.get_nowait()
        async with asyncio.timeout(seconds_max):
            return await self._lines.get()

    async def ask(self, line: str, seconds_max: float = REPLY_SECONDS_MAX) -> str:
        """One command, its reply."""
        self.send(line.encode() + b"\n")
        reply = await self.reply(seconds_max)
        if reply is None:
            raise ConnectionError(f"the broker closed the connection instead of answering {line!r}")
        return reply

    def _hear(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._lines.put_nowait(line.decode())

    def _closed(self) -> None:
        if not self.closed:
            self.closed = True
            self._lines.put_nowait(None)
            self.connection.connection_lost(None)


class SettingsFile:
    """What stands in a broker's file: settings, or a mistake."""

    def __init__(self, content: Settings | SettingsError) -> None:
        self.content = content
        self.read = 0  # so many times

    def load(self) -> Settings:
        self.read += 1
        if isinstance(self.content, SettingsError):
            raise self.content
        return self.content


class RunningBroker:
    """A real Daemon on the running loop, a FakeCloud behind it, clients in memory before it."""

    def __init__(self, daemon: Daemon, cloud: FakeCloud, clock: LoopClock, file: SettingsFile) -> None:
        self.daemon = daemon
        self.file = file
        self.cloud = cloud
        self.clock = clock
        self.registry = daemon.context.registry

    def client(self, peer: str = "10.0.0.1") -> Client:
        return Client(self.daemon.server, peer)

    async def ask(self, line: str, peer: str = "10.0.0.1") -> str:
        """One command on a connection of its own."""
        client = self.client(peer)
        try:
            return await client.ask(line)
        finally:
            client.vanish()

    async def reload(self, content: Settings | SettingsError) -> None:
        """Change the file, send SIGHUP, and return when it has been read and is in force, or refused."""
        self.file.content, read = content, self.file.read
        self.daemon.reload()
        await self.until(lambda: self.file.read > read and not self.daemon.reloading)

    async def until(self, condition: Callable[[], object], seconds_max: float = 3600.0) -> None:
        """Let virtual time pass until something holds. Raises TimeoutError."""
        async with asyncio.timeout(seconds_max):
            while not condition():  # noqa: ASYNC110 (any condition: there is no event to wait for)
                await asyncio.sleep(0.01)


def silent_log() -> Any:
    """A structlog logger that writes nowhere."""
    return structlog.wrap_logger(
        None, processors=[_drop], wrapper_class=structlog.make_filtering_bound_logger(0)
    )


def _drop(logger: Any, method: str, event: Any) -> Any:
    raise structlog.DropEvent


@asynccontextmanager
async def running_broker(
    settings: Settings,
    state_dir: Path,
    *,
    cloud: FakeCloud | None = None,
    boots: bool = True,
    others: Mapping[str, FakeCloud] = MappingProxyType({}),
    owner: str | None = "host",
) -> AsyncIterator[RunningBroker]:
    """Start a broker, stop it in order at the end. With the `cloud` of an earlier one it plays a restart.

    `others` are clouds of their own: for pools of that name, or those whose `region` names one. A broker of
    another `owner` on the same cloud is one on another host; with a clock of its own, whose wall somebody
    may set wrong.
    """
    clock = LoopClock(asyncio.get_running_loop())
    sky = cloud or FakeCloud(settings.broker.id, tuple(settings.pool), clock=cast(Clock, clock), boots=boots)
    numbers, file = itertools.count(1), SettingsFile(settings)

    async def connect(address: str, port: int) -> bool:
        somewhere = [await one.connect(address, port) for one in (sky, *others.values()) if one.has(address)]
        return any(somewhere) if somewhere else await sky.connect(address, port)

    prefix = f"{owner}-{clock.monotonic():.6f}"
    daemon = Daemon(
        settings,
        state_dir=state_dir,
        clock=clock,
        log=silent_log(),
        environ={},
        providers=lambda wanted, *_: {
            name: [others.get(name) or others.get(one.region or "", sky) for one in pool.by_region]
            for name, pool in wanted.pool.items()
        },
        connect=connect,
        store_threaded=False,
        ports=False,
        new_id=lambda: f"{prefix}-{next(numbers)}",
        owner_of=lambda directory: owner,
        load=file.load,
    )
    stop = asyncio.Event()
    running = asyncio.create_task(daemon.run(stop))
    try:
        yield RunningBroker(daemon, sky, clock, file)
    finally:
        stop.set()
        await running
