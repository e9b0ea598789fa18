"""A machine of the simulated EC2 as it truly is: what ran when, for whom, under which token, at what cost.

The record is complete: every state with its moment, so that an outdated listing can show what was, and the
bill can be read off afterwards. Only the simulated cloud changes it; everybody may read it, and reads what
was true when somebody last looked at the cloud.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from broker.core.model import InstanceState

BILLED_SECONDS_MIN = 60.0  # (AWS: EC2 on-demand pricing, "Per second billing")
FREE_SECONDS = 3600.0  # (AWS: EC2 user guide, "Billing for interrupted Spot Instances")

RECLAIMED = "Server.SpotInstanceTermination"
ENDING = (InstanceState.SHUTTING_DOWN, InstanceState.TERMINATED)


@dataclass(frozen=True, slots=True)
class Step:
    """From this moment on the machine was in this state."""

    at: float
    state: InstanceState


@dataclass(frozen=True, slots=True)
class Appearance:
    """What Describe showed of an earlier run of a machine, up to `until_at`."""

    until_at: float
    launched_unix: float
    public_address: str
    address_shown_at: float


@dataclass(slots=True, eq=False)
class Machine:
    """See the module. Moments are seconds of the loop's clock; `launched_unix` is AWS's clock."""

    id: str
    number: int
    owner: str  # the caller that launched or adopted it; "": somebody else's machine
    token: str
    instance_type: str
    vcpus: int
    zone: str
    spot: bool
    price_usd_micros_per_hour: int
    image: str
    tags: dict[str, str]
    launched_at: float
    launched_unix: float
    details: Mapping[str, Any]  # what of the launch call Describe shows again
    public: bool  # whether it gets a public address, each time it starts
    ends_when_shut_down: bool  # from within; otherwise that only stops it

    steps: list[Step] = field(default_factory=list)
    state: InstanceState = InstanceState.PENDING
    running_at: float | None = None
    stopped_running_at: float | None = None
    runs_before: list[tuple[float, float]] = field(default_factory=list)  # (running, not running any more)
    looks_before: list[Appearance] = field(default_factory=list)
    ended_at: float | None = None  # shutting-down began: nothing brings it back
    terminated_at: float | None = None
    ended_by: str = ""  # a caller's name, "aws", "itself", "operator"
    reason_code: str = ""
    reason: str = ""
    transition_reason: str = ""  # as EC2 writes it: only what a caller did has a time

    private_address: str = ""
    public_address: str = ""
    address_shown_at: float = math.inf  # from when on Describe shows the public address
    port_opens_at: float = math.inf
    deaf: list[tuple[float, float]] = field(default_factory=list)  # when its port does not answer
    protected: bool = False

    visible_at: float = 0.0  # from when on Describe may show it
    steady_at: float = 0.0  # and from when on it always does
    hidden_from_writes: bool = False
    tags_before: dict[str, str] = field(default_factory=dict)
    tagged_at: float = -math.inf
    changed_at: float = 0.0
    shape: dict[str, Any] | None = None  # what Describe shows now, until something changes

    def enter(self, state: InstanceState, at: float) -> None:
        self.state = state
        self.steps.append(Step(at, state))
        if state is InstanceState.RUNNING:
            self.running_at = at
        elif self.running_at is not None and self.stopped_running_at is None:
            self.stopped_running_at = at
        if state is InstanceState.TERMINATED:
            self.terminated_at = at
        self.changed(at)

    def begin_anew(self, at: float, launched_unix: float) -> None:
        """It was stopped, and is started: it may come up at another address."""
        self.looks_before.append(replace(self.appearance(at), until_at=at))
        if self.running_at is not None and self.stopped_running_at is not None:
            self.runs_before.append((self.running_at, self.stopped_running_at))
        self.running_at = self.stopped_running_at = None
        self.launched_unix, self.public_address = launched_unix, ""
        self.address_shown_at = self.port_opens_at = math.inf
        self.deaf = []
        self.enter(InstanceState.PENDING, at)

    def appearance(self, at: float) -> Appearance:
        """What Describe shows of it at that moment."""
        before = (one for one in self.looks_before if at < one.until_at)
        return next(
            before, Appearance(math.inf, self.launched_unix, self.public_address, self.address_shown_at)
        )

    def changed(self, at: float) -> None:
        self.changed_at, self.shape = at, None

    def retag(self, new: Mapping[str, str | None], at: float) -> None:
        """None takes a tag away."""
        self.tags_before, self.tagged_at = self.tags, at
        self.tags = {key: value for key, value in {**self.tags, **new}.items() if value is not None}
        self.changed(at)

    @property
    def alive(self) -> bool:
        """Pending, running or stopped: somebody has to end it."""
        return self.ended_at is None

    @property
    def runs(self) -> bool:
        """Pending or running: it is billed, or will be in a moment."""
        return self.state in (InstanceState.PENDING, InstanceState.RUNNING)

    @property
    def reclaimed(self) -> bool:
        return self.reason_code == RECLAIMED

    def state_at(self, at: float) -> InstanceState:
        return next((step.state for step in reversed(self.steps) if step.at <= at), self.steps[0].state)

    def tags_at(self, at: float) -> dict[str, str]:
        """As far back as the last change of tags goes."""
        return self.tags if at >= self.tagged_at else self.tags_before

    def accepts(self, at: float) -> bool:
        """Whether its worker port takes a connection at this moment (not before the last step)."""
        if self.state is not InstanceState.RUNNING or at < self.port_opens_at:
            return False
        return not any(since <= at < until for since, until in self.deaf)

    def runs_until(self, now: float) -> list[tuple[float, float]]:
        """From when to when it has been running, each time."""
        if self.running_at is None:
            return self.runs_before
        until_at = now if self.stopped_running_at is None else self.stopped_running_at
        return [*self.runs_before, (self.running_at, until_at)]

    def running_seconds(self, now: float) -> float:
        return sum(until_at - since_at for since_at, until_at in self.runs_until(now))

    def billed_seconds(self, now: float) -> float:
        """Per second in `running`, at least a minute each time; nothing for a machine that never ran."""
        return sum(
            max(BILLED_SECONDS_MIN, until_at - since_at) for since_at, until_at in self.runs_until(now)
        )

    def charged_seconds(self, now: float) -> float:
        """Billed, unless EC2 itself took it back within its first hour."""
        free = self.reclaimed and self.running_seconds(now) < FREE_SECONDS
        return 0.0 if free else self.billed_seconds(now)

    def cost_usd_micros(self, now: float) -> int:
        return round(self.price_usd_micros_per_hour * self.charged_seconds(now) / 3600)


@dataclass(slots=True)
class Tenure:
    """Whose an address was, and when."""

    machine: Machine
    since_at: float
    until_at: float = math.inf


class Addresses:
    """One network's addresses, and who had them. A returned address may be given to the next machine."""

    def __init__(self, first: tuple[int, int, int, int], count: int) -> None:
        self._first = int.from_bytes(bytes(first), "big")
        self._count, self._given = count, 0
        self._free: deque[tuple[float, str]] = deque()  # in the order in which they were returned
        self._holders: dict[str, Machine] = {}
        self.tenures: dict[str, list[Tenure]] = {}

    def give(self, machine: Machine, at: float, *, reuse: bool, rest_seconds: float) -> tuple[str, bool]:
        """(address, whether somebody else had it before)."""
        used = self._returned(at - rest_seconds) if reuse or self._given == self._count else None
        address = used or self._new()
        self._holders[address] = machine
        self.tenures.setdefault(address, []).append(Tenure(machine, at))
        return address, used is not None

    def take_back(self, address: str, machine: Machine, at: float) -> None:
        """Nothing happens to an address that is somebody else's by now."""
        if self._holders.get(address) is machine:
            del self._holders[address]
            self.tenures[address][-1].until_at = at
            self._free.append((at, address))

    def holder(self, address: str) -> Machine | None:
        return self._holders.get(address)

    def _returned(self, before_at: float) -> str | None:
        """The one returned last: its old owner's clients are still about."""
        for index in range(len(self._free) - 1, -1, -1):
            if self._free[index][0] <= before_at:
                address = self._free[index][1]
                del self._free[index]
                return address
        return None

    def _new(self) -> str:
        assert self._given < self._count, "the network has no free address left"
        self._given += 1
        return ".".join(str(part) for part in (self._first + self._given).to_bytes(4, "big"))
