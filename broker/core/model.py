"""The nouns: frozen values that everything else passes around.

Two kinds of time, never mixed. Fields that end in `_at` are seconds on the monotonic clock, which only
this process understands; fields that end in `_unix` are seconds since 1970, fit for tags, the store and
money: of our wall clock, or of the cloud's where the cloud has said them. Leases and hand-outs move clocks
often, so those clocks live in the registry beside these values, not in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from broker.core.errors import BrokerError

UNKNOWN_CLIENT = "(unknown)"  # no client can call itself that: whoever may hold a machine that was found
NO_TAGS: Mapping[str, str] = MappingProxyType({})


class WorkerState(StrEnum):
    """Where a worker is in its life; registry.LIFE has the steps between."""

    ORDERED = "ordered"
    BOOTING = "booting"
    READY = "ready"
    SUSPECT = "suspect"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DRAINING = "draining"
    TERMINATING = "terminating"
    GONE = "gone"


class InstanceState(StrEnum):
    """A machine's state in the cloud's own words (EC2 API reference, InstanceState)."""

    PENDING = "pending"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    SHUTTING_DOWN = "shutting-down"
    TERMINATED = "terminated"


class Market(StrEnum):
    """How a machine is bought."""

    SPOT = "spot"
    ON_DEMAND = "on-demand"


@dataclass(frozen=True, slots=True)
class Offering:
    """What can be bought: a machine type at a place on a market.

    `cores` is None while the cloud has not told; `zone` is empty when the cloud may choose.
    """

    region: str
    instance_type: str
    market: Market
    zone: str = ""
    cores: int | None = None
    price_usd_micros_per_hour: int = 0
    price_assumed: bool = False  # nobody has said: the on-demand list price stands in


@dataclass(frozen=True, slots=True)
class Order:
    """One launch attempt, written to disk before the call is made: `count` machines, each of any offering.

    `id` is the idempotency token (64 ASCII characters at most: EC2 API reference, ClientToken).
    `parameters` is the provider's exact call as JSON: a resend must not differ in a byte.
    """

    id: str
    pool: str
    offerings: tuple[Offering, ...]  # in order of preference, at least one
    parameters: str
    created_unix: float
    count: int = 1

    @property
    def places(self) -> tuple[str, ...]:
        """The ids of its workers in the books, whichever machines they turn out to be."""
        if self.count == 1:
            return (self.id,)
        return tuple(f"{self.id}.{number}" for number in range(1, self.count + 1))


@dataclass(frozen=True, slots=True)
class Bought:
    """The answer to a launch call: the machines, and why some offerings could not be had.

    There may be fewer machines than were ordered, and none; now and then there are more.
    """

    instances: tuple[Instance, ...]
    refusals: tuple[tuple[Offering, BrokerError], ...] = ()


@dataclass(frozen=True, slots=True)
class Instance:
    """A machine as the cloud describes it at one moment."""

    id: str
    state: InstanceState
    address: str | None = None
    instance_type: str = ""
    region: str = ""
    zone: str = ""
    market: Market = Market.ON_DEMAND
    cores: int | None = None
    launched_unix: float = 0.0
    tags: Mapping[str, str] = field(default_factory=lambda: NO_TAGS, hash=False)
    reason: str = ""  # why it left `running`, in the cloud's words
    ended_unix: float | None = None  # the second in which that happened, where the cloud names it


@dataclass(frozen=True, slots=True)
class Worker:
    """One machine in the broker's books. `id`: its place in an order; its instance id when it was adopted."""

    id: str
    pool: str
    state: WorkerState
    offering: Offering
    port: int
    since_at: float  # when it entered its state
    born_at: float  # when it was ordered or adopted
    order_id: str | None = None
    instance_id: str | None = None
    address: str | None = None
    running: bool = False  # the cloud has said `running`: from here on it is billed
    launched_unix: float = 0.0
    started_at: float | None = None  # when it was last started after it had been stopped
    launched_before_unix: float = 0.0  # what `launched_unix` was then
    outdated: bool = False  # made by settings that count no more: it is not kept stopped
    reason: str = ""  # why it entered its state
    standing_notice: str = ""  # a notice that probes cannot lift: it will not become READY again
    protected: bool = False  # a person's tag keeps the broker from ending it
    closed: str = ""  # why it gets no new clients although it may be READY; whoever holds it keeps it

    @property
    def cores(self) -> int | None:
        return self.offering.cores

    def age_seconds(self, now: float) -> float:
        """Since it was ordered or adopted, without the time for which it was stopped."""
        return (self.since_at if self.state is WorkerState.STOPPED else now) - self.born_at

    @property
    def boot_began_at(self) -> float:
        """Since when it has been on its way up: its order, or its latest start."""
        return self.born_at if self.started_at is None else self.started_at


@dataclass(frozen=True, slots=True)
class Lease:
    """One client's hold on one worker. When it ends stands in the registry: `Registry.lease_ends_at`.

    A client has one lease on a worker by GET_WORKER and PING, and as many more as it has acquired, each of
    them independent. `bound` ones are renewed by themselves while their connection lives.
    """

    id: str
    worker_id: str
    client: str
    ttl_seconds: float
    exclusive: bool = False
    acquired: bool = False
    bound: bool = False

    @property
    def key(self) -> str:
        """What it is called among the holds on its worker. No client is called like a lease: of the blank."""
        return f"lease {self.id}" if self.acquired else self.client


@dataclass(frozen=True, slots=True)
class WorkerChanged:
    """A worker took a step of its life (`before` is None when it entered the books)."""

    worker: Worker
    before: WorkerState | None
    at: float


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """The cloud told something new of a worker (an address, that it runs) within the same state."""

    worker: Worker
    at: float


@dataclass(frozen=True, slots=True)
class ProtectionChanged:
    """The cloud's tags protect the worker from now on, or they do not any more."""

    worker: Worker
    at: float


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """A client got hold of a worker; `first` when nobody else held it."""

    lease: Lease
    worker: Worker
    first: bool
    at: float


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """A client's hold ended; `last` when nobody holds the worker any more."""

    lease: Lease
    worker: Worker
    last: bool
    reason: str
    at: float


Event = WorkerChanged | WorkerSeen | ProtectionChanged | LeaseGranted | LeaseEnded
