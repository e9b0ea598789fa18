"""The errands about leases: an ACQUIRE that is answered in many lines, RENEW and DONE for many leases.

An ACQUIRE whose answer was lost may be sent again when its leases end with the connection: the broken one
ended them. Without that it is sent twice only when nobody took the first one, because each makes new leases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from broker.core import protocol
from broker.core.errors import BrokerError, LeaseHasEnded
from broker.core.protocol import Acquire, Done, Renew
from broker.core.replies import Granted, Notice, Pending, parse_granted, parse_notice, parse_pending
from broker.errand import Endpoint, Errand, Retry, Wish, read_ok

LINE_BYTES_MAX = 8192  # of a line that has no end yet; the longest there is, an error, is a tenth of it

OnPending = Callable[[Pending], object]


class Wanted(Wish, total=False):
    """What ACQUIRE asks for, beside how many leases. Durations are in seconds.

    `min`: so many are enough when the wait is over. `ttl`: how long a lease lasts without a renewal, the
    pool's idle_timeout if it is not given. `on_pending` is called with each `Pending` while there is nothing
    yet; what it raises gives up the request and comes out of it.
    """

    min: int | None
    ttl: int | None
    on_pending: OnPending | None


class CallerFailed(Exception):
    """The caller's own function raised `error`, which is no trouble of the connection's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class AcquireErrand(Errand[list[Granted]]):
    """An ACQUIRE. `on_pending` is called for each PENDING line, as it comes."""

    def __init__(
        self, wanted: Acquire, on_pending: OnPending | None, broker: Endpoint, seconds: float, retry: Retry
    ) -> None:
        super().__init__(wanted, self._granted, broker, seconds, retry)
        self._wanted = wanted
        self._on_pending = on_pending
        self._lines = LineReader()
        self._leases: list[Granted] = []
        self._last = ""

    def attempt(self, now: float) -> float:
        self._lines = LineReader()
        self._leases = []
        return super().attempt(now)

    def _is_complete(self, data: bytes) -> bool:
        return any(self._ends_with(line) for line in self._lines.receive(data))

    def _ends_with(self, line: str) -> bool:
        """Take in a line of the answer. Whether it is the last one."""
        if line.startswith("PENDING "):
            self._tell(parse_pending(line))
            return False
        if not line.startswith("LEASE "):
            self._last = line
            return True
        self._leases.append(parse_granted(line))
        return len(self._leases) >= self._leases[0].of

    def _tell(self, pending: Pending) -> None:
        if self._on_pending is None:
            return
        try:
            self._on_pending(pending)
        except Exception as error:
            raise CallerFailed(error) from error

    def _granted(self, _: str) -> list[Granted]:
        if self._last:
            reply = protocol.read_reply(self._last)
            raise BrokerError(f"{self._answered()} with {reply[:80]!r}: leases were expected")
        ids = {lease.id for lease in self._leases}
        if len(ids) < len(self._leases) or len(ids) > self._wanted.count:
            raise BrokerError(
                f"{self._answered()} with {len(self._leases)} leases, {len(ids)} different ones"
            )
        return self._leases

    def _may_repeat(self) -> bool:
        return self._wanted.hold is not None or not self._begun


class EachErrand(Errand[list[BrokerError | None]]):
    """RENEW or DONE for leases, all on one connection: for each of them None, or why not.

    A DONE that is sent again is answered that the lease has ended, when the first one ended it.
    """

    def __init__(
        self,
        verb: type[Renew | Done],
        lease_ids: Sequence[str],
        broker: Endpoint,
        seconds: float,
        retry: Retry,
    ) -> None:
        super().__init__(verb(lease_ids[0]), self._all, broker, seconds, retry)
        self._outgoing = b"".join(protocol.encode(verb(lease_id)) for lease_id in lease_ids)
        self._count = len(lease_ids)
        self._is_done = verb is Done
        self._may_have_ended = False

    def attempt(self, now: float) -> float:
        self._may_have_ended = self._is_done and (self._may_have_ended or self._begun)
        return super().attempt(now)

    def _is_complete(self, data: bytes) -> bool:
        return self._reply.count(b"\n") >= self._count

    def _all(self, _: str) -> list[BrokerError | None]:
        lines = bytes(self._reply).decode("ascii", "replace").split("\n")[: self._count]
        return [self._one(line.removesuffix("\r")) for line in lines]

    def _one(self, line: str) -> BrokerError | None:
        try:
            read_ok(line)
        except LeaseHasEnded as ended:
            return None if self._may_have_ended else ended
        except BrokerError as error:
            return error
        return None


class LineReader:
    """A connection's bytes → its lines, each without its end."""

    def __init__(self) -> None:
        self._partial = b""

    def receive(self, data: bytes) -> list[str]:
        """The lines that `data` completes. Raises ConnectionResetError at the end of the stream, and
        BrokerError for a line without an end."""
        if not data:
            raise ConnectionResetError("it closed the connection")
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > LINE_BYTES_MAX:
            raise BrokerError(f"the broker sent a line of more than {LINE_BYTES_MAX} bytes")
        return [line.removesuffix(b"\r").decode("ascii", "replace") for line in lines]


class NoticeReader:
    """The bytes of a connection that watches → its notices."""

    def __init__(self) -> None:
        self._lines = LineReader()

    def receive(self, data: bytes) -> list[Notice]:
        """The notices that `data` completes. What answers a command in between is passed over.

        Raises ConnectionResetError at the end of the stream, and BrokerError for a notice that is none.
        """
        return [parse_notice(line) for line in self._lines.receive(data) if line.startswith("NOTICE ")]
