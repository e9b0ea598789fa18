"""The lines about leases, as the client's side reads and writes them: ACQUIRE and what is answered to it.

An ACQUIRE is answered by any number of PENDING lines, then by as many LEASE lines as each of them says in
`of=`, or by one error. A WATCH brings NOTICE lines. A key that is not known here is passed over, so that a
newer broker may say more; a key that is missing, or a value that makes no sense, raises BrokerError: half
understood, a lease would be a worker that nobody gives back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from broker.core import keys, protocol
from broker.core.errors import BadRequest, BrokerError

COUNT_MAX = 1000  # leases in one ACQUIRE
TTL_SECONDS_MAX = 86_400
PORT_MAX = 65_535
LINE_SHOWN_CHARS_MAX = 120  # of a line that makes no sense, in the error about it
LEASE_ID = re.compile(r"[A-Za-z0-9._:-]{1,255}")
CODE = re.compile(r"[A-Z_]{1,32}")
VERSION_LINE = re.compile(r"compute-broker (?P<version>\S+) protocol (?P<protocol>[0-9]{1,9})")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Acquire:
    """`ACQUIRE [key=value …]`: `count` new leases, `min` at least. `wait` and `ttl` are in seconds."""

    pool: str | None = None
    cores: int | None = None
    type: str | None = None
    region: str | None = None
    wait: float | None = None
    exclusive: bool = False
    count: int | None = None
    min: int | None = None
    hold: str | None = None
    ttl: int | None = None
    client: str | None = None

    @property
    def ends_with_connection(self) -> bool:
        """Whether the leases end when the connection does."""
        return self.hold == "connection"


@dataclass(frozen=True, slots=True)
class Granted:
    """`LEASE …`: one lease, and the worker it is on. `of` is how many lines the answer has in all.

    `price_usd_per_hour` and `cores` are None where the broker does not know; `expires_unix` is by its clock.
    """

    id: str
    address: str
    port: int
    pool: str
    type: str
    cores: int | None
    market: str
    price_usd_per_hour: float | None
    expires_unix: float
    of: int


@dataclass(frozen=True, slots=True)
class Pending:
    """`PENDING …`: why there is no worker yet. `position` 1 is next; `eta_seconds` is None when nobody knows.

    `code` is BOOTING, QUEUED, STARTING, NO_CAPACITY, LIMIT, BUDGET or CLOUD; `reason` is for people.
    """

    eta_seconds: int | None
    position: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Notice:
    """`NOTICE …`: what happens to a worker of this client, `in_seconds` from now (0: it has happened).

    `what` is interrupt, retire, drain or lost; `replacement` an address, None when there is none.
    """

    what: str
    address: str
    lease: str
    in_seconds: int
    replacement: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Version:
    """`VERSION`: which broker this is, and which protocol it speaks."""

    broker: str
    protocol: int


# --- what the client says ----------------------------------------------------------------------------------


def encode_acquire(wanted: Acquire) -> bytes:
    """The line for the wire. Raises BadRequest for a value that it cannot carry."""
    _require_sense(wanted)
    worker = protocol.GetWorker(
        wanted.pool, wanted.cores, wanted.type, wanted.region, wanted.wait, wanted.exclusive, wanted.client
    )
    wish, before_client, client = protocol.encode(worker).decode("ascii").partition(" client=")
    more = {"count": wanted.count, "min": wanted.min, "hold": wanted.hold, "ttl": wanted.ttl}
    words = [f"{key}={value}" for key, value in more.items() if value is not None]
    line = " ".join(["ACQUIRE", *wish.split()[1:], *words]) + before_client + client
    return line.rstrip().encode("ascii") + b"\n"


def encode_about(verb: str, lease_id: str) -> bytes:
    """`RENEW` or `DONE` and the lease. Raises BadRequest for what can be no lease's id."""
    if not LEASE_ID.fullmatch(lease_id):
        raise BadRequest(f"{lease_id[:40]!r} is no lease: {verb} needs the id that ACQUIRE answered")
    return f"{verb} {lease_id}\n".encode("ascii")


def _require_sense(wanted: Acquire) -> None:
    count = 1 if wanted.count is None else wanted.count
    if not 1 <= count <= COUNT_MAX:
        raise BadRequest(f"count= is a whole number from 1 to {COUNT_MAX}")
    if wanted.min is not None and not 1 <= wanted.min <= count:
        raise BadRequest(f"min= is a whole number from 1 to count=, which is {count}")
    if wanted.ttl is not None and not 1 <= wanted.ttl <= TTL_SECONDS_MAX:
        raise BadRequest(f"ttl= is a whole number of seconds from 1 to {TTL_SECONDS_MAX}")
    if wanted.hold not in (None, "connection"):
        raise BadRequest("hold= is connection, or not given")


# --- what the broker answers -------------------------------------------------------------------------------


def parse_granted(line: str) -> Granted:
    """A LEASE line. Raises BrokerError for nonsense."""
    said = _pairs(_after("LEASE", line))
    return Granted(
        id=_read(line, said, "id", _word),
        address=_read(line, said, "ip", protocol.read_address),
        port=_read(line, said, "port", _whole(1, PORT_MAX)),
        pool=_read(line, said, "pool", _word),
        type=_read(line, said, "type", str),
        cores=_read(line, said, "cores", _unless("-", _whole(1, keys.CORES_MAX))),
        market=_read(line, said, "market", str),
        price_usd_per_hour=_read(line, said, "price", _unless("-", _amount)),
        expires_unix=_read(line, said, "expires", _moment),
        of=_read(line, said, "of", _whole(1, COUNT_MAX)),
    )


def parse_pending(line: str) -> Pending:
    """A PENDING line. Raises BrokerError for nonsense."""
    said = _pairs(_after("PENDING", line))
    return Pending(
        eta_seconds=_read(line, said, "eta", _unless("unknown", _whole(0))),
        position=_read(line, said, "position", _whole(1)),
        code=_read(line, said, "code", _code),
        reason=said.get("reason", ""),
    )


def parse_notice(line: str) -> Notice:
    """A NOTICE line. Raises BrokerError for nonsense."""
    what, _, rest = _after("NOTICE", line).partition(" ")
    if not what or "=" in what:
        raise _nonsense(line, "it does not say what happens")
    said = _pairs(rest)
    return Notice(
        what=what,
        address=_read(line, said, "ip", protocol.read_address),
        lease=_read(line, said, "lease", _word),
        in_seconds=_read(line, said, "in", _whole(0)),
        replacement=_read(line, said, "replacement", _unless("-", protocol.read_address)),
        reason=said.get("reason", ""),
    )


def parse_version(line: str) -> Version:
    """The answer to VERSION. Raises BrokerError for nonsense."""
    match = VERSION_LINE.fullmatch(line)
    if match is None:
        raise _nonsense(line, "`compute-broker <version> protocol <number>` was expected")
    return Version(match["version"], int(match["protocol"]))


def _after(verb: str, line: str) -> str:
    first, _, rest = line.partition(" ")
    if first != verb:
        raise _nonsense(line, f"{verb} was expected")
    return rest


def _pairs(text: str) -> dict[str, str]:
    """The `key=value` words of a line; `reason=` runs to its end."""
    words, _, reason = f" {text}".partition(" reason=")
    said = {key: value for key, _, value in (word.partition("=") for word in words.split())}
    return {**said, "reason": reason.strip()} if reason else said


def _read(line: str, said: Mapping[str, str], key: str, read: Callable[[str], T]) -> T:
    if key not in said:
        raise _nonsense(line, f"it has no {key}=")
    try:
        return read(said[key])
    except (ValueError, OverflowError, BrokerError):
        raise _nonsense(line, f"{key}= makes no sense") from None


def _nonsense(line: str, why: str) -> BrokerError:
    return BrokerError(f"the broker answered {line[:LINE_SHOWN_CHARS_MAX]!r}: {why}")


def _unless(unknown: str, read: Callable[[str], T]) -> Callable[[str], T | None]:
    return lambda value: None if value == unknown else read(value)


def _word(value: str) -> str:
    if not LEASE_ID.fullmatch(value):
        raise ValueError
    return value


def _code(value: str) -> str:
    if not CODE.fullmatch(value):
        raise ValueError
    return value


def _whole(low: int, high: int = 10**9) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not (value.isascii() and value.isdecimal() and low <= int(value) <= high):
            raise ValueError
        return int(value)

    return read


def _amount(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        raise ValueError
    return float(value)


def _moment(value: str) -> float:
    """RFC 3339, UTC."""
    moment = datetime.fromisoformat(value)
    if moment.utcoffset() != UTC.utcoffset(None):
        raise ValueError
    return moment.timestamp()
