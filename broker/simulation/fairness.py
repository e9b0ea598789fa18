"""Is nobody overtaken by somebody equal who came later? By the clients' own times of asking and of answers.

Equal are clients that each want one worker of the same type, or of any, alone or not. The books say only when
a lease was granted, which is when the choice between those who wait is made; whether it was the wrong one is
seen at the answer, if the one who came first still waits and has not been granted anything either. A worker
that falls silent between grant and hand-out costs its client some time, and that is nobody's unfairness. Nor
is a hold that a PING takes: whoever sends it works there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from broker.core.model import Lease
from broker.simulation.asking import Ask, Asking

SAME_MOMENT_SECONDS = 0.5  # whoever asks so shortly after another one may arrive before it
PROMISE = "no client is overtaken by a later equal one"

Waiting = list[tuple[Ask, float]]  # those who were passed over, and when each had asked


class Fairness:
    """See the module. `broken` takes the moment, the promise, the facts."""

    def __init__(self, asking: Asking, broken: Callable[[float, str, str], None]) -> None:
        self._asking, self._broken = asking, broken
        self._known: set[str] = set()  # ids of leases: after a restart they are granted again
        self._granted: dict[tuple[str, bool], dict[str, float]] = {}  # client, acquiring → lease → when
        self._passed_over: dict[str, Waiting] = {}  # by lease that was granted and is not answered yet
        self._pinging: Counter[tuple[str, str]] = Counter()  # client, address: on their way

    def restarted(self) -> None:
        """Another broker runs: what the last one had granted and not answered is over."""
        self._granted.clear()
        self._passed_over.clear()

    @contextmanager
    def pinging(self, client: str, address: str) -> Iterator[None]:
        """The client says that it works there, from here on until it has its answer."""
        self._pinging[client, address] += 1
        try:
            yield
        finally:
            self._pinging[client, address] -= 1

    def granted(self, lease: Lease, at: float, address: str | None) -> None:
        """The books give a client a hold: who was there before it?"""
        if lease.id in self._known:
            return
        self._known.add(lease.id)
        self._granted.setdefault((lease.client, lease.acquired), {})[lease.id] = at
        served = self._first_of(lease)
        by_ping = address is not None and self._pinging[lease.client, address] > 0
        if by_ping or served is None or served.sent_at is None:
            return
        before_at = served.sent_at - SAME_MOMENT_SECONDS
        passed_over = [
            (ask, ask.sent_at)
            for ask in self._asking
            if ask.sent_at is not None
            and ask.sent_at < before_at
            and ask.client != lease.client
            and (ask.alone, ask.kind, ask.count) == (served.alone, served.kind, 1)
            and not self._has_grant(ask, ask.sent_at)
        ]
        if passed_over:
            self._passed_over[lease.id] = passed_over

    def ended(self, lease: Lease) -> None:
        """A hold is over, handed out or not."""
        self._passed_over.pop(lease.id, None)
        self._granted.get((lease.client, lease.acquired), {}).pop(lease.id, None)

    def answered(self, at: float, client: str, lease_id: str | None = None) -> None:
        """A client has been told of a worker, by an ACQUIRE of this lease."""
        ids = [lease_id] if lease_id is not None else list(self._granted.get((client, False), ()))
        for id_ in ids:
            for ask, sent_at in self._passed_over.pop(id_, ()):
                if ask.sent_at == sent_at and not self._has_grant(ask, sent_at):
                    facts = f"{client} was served, and {ask.client} has waited for {at - sent_at:.1f} s"
                    self._broken(at, PROMISE, facts)

    def _first_of(self, lease: Lease) -> Ask | None:
        """For which of the client's questions the lease is, at the latest: several of one name share it."""
        asks = [
            ask
            for ask in self._asking
            if ask.sent_at is not None and (ask.client, ask.acquiring) == (lease.client, lease.acquired)
        ]
        if any(ask.count > 1 for ask in asks):
            return None
        return min(asks, key=lambda ask: ask.sent_at or 0.0, default=None)

    def _has_grant(self, ask: Ask, sent_at: float) -> bool:
        return any(at >= sent_at for at in self._granted.get((ask.client, ask.acquiring), {}).values())
