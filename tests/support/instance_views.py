"""What the cloud shows of each instance, which on EC2 is not always what is so.

An emulator tells the plain truth at once. EC2 is eventually consistent: a new instance may be missing
from a Describe, is pending for a while, gets its public address late, and a terminated one shuts down
first. A `View` counts those delays down for one instance; every delay is so many Describe calls (which
makes a test deterministic) or `Seconds`. Time is an argument.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from typing import Final

from tests.support import ec2_wire
from tests.support.ec2_wire import Element

FOREVER: Final = 1_000_000_000  # describes: no test makes as many; `settle` ends it

# (AWS: EC2 API reference, StateReason)
RECLAIM_CODE = "Server.SpotInstanceTermination"
RECLAIM_MESSAGE = "Server.SpotInstanceTermination: Spot instance termination"


@dataclass(frozen=True, slots=True)
class Seconds:
    """A delay in seconds instead of in Describe calls."""

    seconds: float


Delay = int | Seconds


@dataclass(frozen=True, slots=True)
class Programme:
    """The delays that launches and, for `shutting_down`, terminations from now on will show."""

    hidden: Delay = 0
    pending: Delay = 0
    unaddressed: Delay = 0
    shutting_down: Delay = 0
    hidden_from_terminate: bool = False


class Countdown:
    """One delay running for one instance, from `now` on."""

    def __init__(self, delay: Delay, now: float) -> None:
        self._describes_left = delay if isinstance(delay, int) else 0
        self._ends_at = now + delay.seconds if isinstance(delay, Seconds) else now

    def holds(self, now: float) -> bool:
        return self._describes_left > 0 or now < self._ends_at

    def count_describe(self) -> None:
        self._describes_left = max(0, self._describes_left - 1)


@dataclass(slots=True)
class View:
    """What one instance shows, and what still delays it."""

    instance_id: str
    hidden: Countdown
    pending: Countdown
    unaddressed: Countdown
    hidden_from_terminate: bool
    shutting_down: Countdown | None = None  # runs from the moment it was terminated
    omissions_left: int = 0
    forgotten: bool = False
    reclaimed: bool = False
    seen_running: bool = False

    def is_hidden(self, now: float) -> bool:
        return self.forgotten or self.hidden.holds(now)

    def is_hidden_from_terminate(self, now: float) -> bool:
        return self.forgotten or (self.hidden_from_terminate and self.hidden.holds(now))

    def terminated(self, shutting_down: Delay, now: float) -> None:
        """Says that it was terminated; a second time changes nothing."""
        if self.shutting_down is None:
            self.shutting_down = Countdown(shutting_down, now)

    def state(self, true_state: str, now: float) -> str:
        if self.shutting_down is not None and true_state == "terminated":
            return "shutting-down" if self.shutting_down.holds(now) else "terminated"
        return "pending" if true_state == "running" and self.pending.holds(now) else true_state

    def count_describe(self, now: float) -> None:
        """One Describe has shown (or, while hidden, has missed) this instance."""
        if self.hidden.holds(now):
            self.hidden.count_describe()
        elif self.shutting_down is not None:
            self.shutting_down.count_describe()
        else:
            self.pending.count_describe()
            self.unaddressed.count_describe()

    def settle(self, now: float) -> None:
        """Ends every delay that runs now: it shows the plain truth until something new befalls it."""
        self.hidden = self.pending = self.unaddressed = Countdown(0, now)
        self.omissions_left = 0
        self.shutting_down = None if self.shutting_down is None else Countdown(0, now)


@dataclass(slots=True)
class Views:
    """Every instance's view, made at first sight (its launch, as a rule) under the programme of then."""

    programme: Programme = field(default_factory=Programme)
    _by_id: dict[str, View] = field(default_factory=dict)

    def of(self, instance_id: str, now: float) -> View:
        view = self._by_id.get(instance_id)
        if view is None:
            view = self._by_id[instance_id] = self._new(instance_id, now)
        return view

    def known(self, instance_id: str) -> View | None:
        return self._by_id.get(instance_id)

    def ids_shown_running(self) -> tuple[str, ...]:
        return tuple(
            v.instance_id for v in self._by_id.values() if v.seen_running and v.shutting_down is None
        )

    def settle_all(self, now: float) -> None:
        for view in self._by_id.values():
            view.settle(now)

    def _new(self, instance_id: str, now: float) -> View:
        return View(
            instance_id=instance_id,
            hidden=Countdown(self.programme.hidden, now),
            pending=Countdown(self.programme.pending, now),
            unaddressed=Countdown(self.programme.unaddressed, now),
            hidden_from_terminate=self.programme.hidden_from_terminate,
        )


# ---------------------------------------------------------------- an instance's element


def as_launched(item: Element, view: View) -> Element:
    """As RunInstances answers: pending, and no public address yet."""
    shown = copy.deepcopy(item)
    _complete(shown, view)
    ec2_wire.set_state(shown, "pending")
    ec2_wire.strip_public_address(shown)
    ec2_wire.rewrite_addresses(shown, view.instance_id)
    return shown


def as_described(item: Element, view: View, now: float) -> Element:
    """As DescribeInstances lists it at this moment; counting the call is the caller's."""
    shown = copy.deepcopy(item)
    _complete(shown, view)
    state = view.state(ec2_wire.text_of(item, "instanceState", "name"), now)
    ec2_wire.set_state(shown, state)
    if state == "terminated":
        ec2_wire.strip_every_address(shown)
    elif view.unaddressed.holds(now):
        ec2_wire.strip_public_address(shown)
    ec2_wire.rewrite_addresses(shown, view.instance_id)
    return shown


def _complete(item: Element, view: View) -> None:
    """Adds what moto leaves out: the spot request's id, and why a reclaimed instance ended."""
    if ec2_wire.text_of(item, "instanceLifecycle") == "spot":
        ec2_wire.set_text(item, "spotInstanceRequestId", spot_request_id(view.instance_id))
    if view.reclaimed:
        ec2_wire.set_text(item, "reason", RECLAIM_MESSAGE)
        reason = item.find(ec2_wire.tag("stateReason"))
        if reason is not None:
            ec2_wire.set_text(reason, "code", RECLAIM_CODE)
            ec2_wire.set_text(reason, "message", RECLAIM_MESSAGE)


def spot_request_id(instance_id: str) -> str:
    return "sir-" + hashlib.sha256(instance_id.encode()).hexdigest()[:8]
