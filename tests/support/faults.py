"""What goes wrong and what went by: faults programmed per action with counts, and the journal of calls.

A fault is taken by the first calls that match it, in the order the faults were programmed, so the same
calls always meet the same faults. Tests hold on to the `Fault` they get back: to wait until it was met,
to let a stalled call go, to end it. Everything here is safe to use from any thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

EVERY_ACTION = "*"
WAIT_SECONDS_DEFAULT = 20.0
UNDER_WAY = "under way"


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it came in. `page` counts the pages of one listing from 1."""

    action: str
    params: Mapping[str, str]
    region: str
    page: int = 1


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One line of the journal. `at` is the monotonic clock's seconds when the call came in.

    `outcome` is "ok", "replayed", "refused <code>" (by a fault), "error <code>" (by the cloud), "reset",
    "answer lost (<outcome>)", "broken" (the proxy was stopped) or "under way".
    """

    action: str
    params: dict[str, str]
    outcome: str
    at: float
    region: str
    page: int


class Kind(Enum):
    STALL = "stall"
    STALL_ANSWER = "stall answer"
    REFUSE = "refuse"
    RESET = "reset"
    LOSE_ANSWER = "lose answer"
    LOSE_ANSWER_BY_RESET = "lose answer by reset"


Match = Callable[[Call], bool] | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Aim:
    """Which calls a fault is for: the first `times` calls of `action` that match, after `skip` of them."""

    action: str
    times: int = 1
    skip: int = 0
    match: Match | None = None

    def fits(self, call: Call) -> bool:
        if self.action not in (EVERY_ACTION, call.action):
            return False
        if isinstance(self.match, Mapping):
            return self.match.items() <= dict(call.params).items()
        return self.match is None or self.match(call)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An EC2 error, as the client will see it."""

    code: str
    message: str
    status: int


class Fault:
    """One programmed fault, and the test's hold on it."""

    def __init__(
        self, kind: Kind, aim: Aim, *, refusal: Refusal | None = None, seconds: float | None = None
    ) -> None:
        self.kind, self.aim, self.refusal, self.seconds = kind, aim, refusal, seconds
        self._left, self._skips_left = aim.times, aim.skip
        self._hits = 0
        self._released = False
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._changed = threading.Condition()

    @property
    def hits(self) -> int:
        with self._changed:
            return self._hits

    def wait_hit(self, count: int = 1, timeout_seconds: float = WAIT_SECONDS_DEFAULT) -> None:
        """Returns once `count` calls have met this fault. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._hits >= count, timeout_seconds):
                raise TimeoutError(f"{self.kind.value} {self.aim.action}: met {self._hits} of {count} times")

    def cancel(self) -> None:
        """No further call meets it; a call it holds goes on."""
        with self._changed:
            self._left = 0
        self.release()

    def release(self) -> None:
        """Lets every stalled call go, those to come as well."""
        with self._changed:
            self._released = True
            waiters, self._waiters = self._waiters, []
        for loop, event in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def take(self, call: Call) -> bool:
        """True when this call meets this fault; counts it."""
        with self._changed:
            if self._left <= 0 or not self.aim.fits(call):
                return False
            if self._skips_left > 0:
                self._skips_left -= 1
                return False
            self._left -= 1
            self._hits += 1
            self._changed.notify_all()
            return True

    async def held(self) -> None:
        """Returns when a stalled call may go on."""
        event = asyncio.Event()
        with self._changed:
            if self._released:
                return
            self._waiters.append((asyncio.get_running_loop(), event))
        try:
            await asyncio.wait_for(event.wait(), self.seconds)
        except TimeoutError:
            return


class FaultPlan:
    """The faults in the order they were programmed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def take(self, call: Call, *kinds: Kind) -> Fault | None:
        with self._lock:
            candidates = [fault for fault in self._faults if fault.kind in kinds]
        return next((fault for fault in candidates if fault.take(call)), None)

    def clear(self) -> None:
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.cancel()


class Journal:
    """Every call in the order of arrival, its outcome filled in when it is decided."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._records: list[CallRecord] = []

    def begin(self, call: Call) -> int:
        record = CallRecord(
            call.action, dict(call.params), UNDER_WAY, time.monotonic(), call.region, call.page
        )
        with self._changed:
            self._records.append(record)
            self._changed.notify_all()
            return len(self._records) - 1

    def finish(self, ticket: int, outcome: str) -> None:
        with self._changed:
            self._records[ticket] = replace(self._records[ticket], outcome=outcome)
            self._changed.notify_all()

    def records(self, action: str | None = None) -> tuple[CallRecord, ...]:
        with self._changed:
            return tuple(self._of(action))

    def wait(self, action: str, count: int, timeout_seconds: float) -> tuple[CallRecord, ...]:
        """The calls of an action once `count` of them are decided. Raises TimeoutError."""

        def decided() -> bool:
            return sum(record.outcome != UNDER_WAY for record in self._of(action)) >= count

        with self._changed:
            if not self._changed.wait_for(decided, timeout_seconds):
                raise TimeoutError(f"{action}: not {count} calls within {timeout_seconds} s")
            return tuple(self._of(action))

    def _of(self, action: str | None) -> Iterable[CallRecord]:
        return (record for record in self._records if action is None or record.action == action)
