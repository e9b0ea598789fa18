"""What clients were told in one history, and what follows from it: pure, so that the judge itself is tested.

A client that was told an address holds its worker until it gives it back, as long as it says so within the
idle timeout. The time is counted from the moment before the client spoke, so a promise here never lasts
longer than the broker's own; while no broker runs it stands still, because a lease that outlived its broker
begins anew. Whatever is said after that moment, by whatever broker, must agree with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Hold:
    """One client's hold on one machine. Moments are the monotonic clock's seconds."""

    client: str
    pool: str
    address: str
    instance_id: str
    idle_seconds: float
    until: float  # certain up to here
    given_back: bool = False

    def certain(self, now: float) -> bool:
        return not self.given_back and now < self.until

    def used(self, asked_at: float) -> None:
        """The broker said OK to something that was asked at that moment."""
        self.until = max(self.until, asked_at + self.idle_seconds)

    def give_back(self, now: float) -> None:
        """From here on the broker may end it: the client is about to say that it needs it no longer."""
        self.until = min(self.until, now)
        self.given_back = True


@dataclass(slots=True)
class Promises:
    """Every hold of a history. `exclusive` names the pools in which a worker has one client at a time."""

    exclusive: frozenset[str]
    holds: list[Hold] = field(default_factory=list)
    ended_at: dict[str, float] = field(default_factory=dict)  # instance id → when its termination was done

    def certain(self, now: float, pool: str | None = None) -> list[Hold]:
        return [one for one in self.holds if one.certain(now) and pool in (None, one.pool)]

    def told(self, hold: Hold, now: float) -> None:
        """A client has just been told an address. Raises AssertionError when that breaks a promise."""
        dead = hold.instance_id in self.ended_at and hold.certain(now)
        assert not dead, f"{hold.client} was told {hold.address} of {hold.instance_id}, which is terminated"
        for other in self.certain(now, hold.pool):
            shared = other.address != hold.address or hold.pool not in self.exclusive
            assert shared or other.client == hold.client, (
                f"{hold.client} was told {hold.address}, which {other.client} holds alone"
            )
        self.holds.append(hold)

    def restored(self, killed_at: float, looked_at: float) -> None:
        """A new broker took over leases no earlier than `looked_at`: those that were alive begin anew."""
        for hold in self.certain(killed_at):
            hold.until = looked_at + hold.idle_seconds

    def broken(self) -> Iterable[str]:
        """The machines that were terminated while somebody held them."""
        for hold in self.holds:
            ended_at = self.ended_at.get(hold.instance_id)
            if ended_at is not None and ended_at < hold.until:
                yield (
                    f"{hold.instance_id} was terminated {hold.until - ended_at:.3f} s before {hold.client} "
                    "could lose it"
                )
