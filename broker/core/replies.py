"""The lines of the broker that have parts, written and read: LEASE, PENDING, NOTICE, the answer to VERSION.

`word key=value …`, printable ASCII, a value is one word; only the last value of PENDING and NOTICE,
`reason=`, runs to the end of the line. What is not known is `-`, an unknown time to wait is `unknown`.

An ACQUIRE is answered by any number of PENDING lines, then by as many LEASE lines as each of them says in
`of=`, or by one error. Who reads passes over a key that is not known here, so that a newer broker may say
more; a key that is missing, or a value that makes no sense, raises BrokerError: half understood, a lease
would be a worker that nobody gives back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from broker.core import keys, protocol, tags
from broker.core.errors import BrokerError, sentence

UNKNOWN = "-"
UNKNOWN_ETA = "unknown"
LINE_CHARS_MAX = 1000  # three words of 255 and the rest; only a reason can be cut off by it
LINE_SHOWN_CHARS_MAX = 120  # of a line that makes no sense, in the error about it
PORT_MAX = 65_535
NUMBER_MAX = 10**9  # seconds, positions: more makes no sense
CODE = re.compile(r"[A-Z_]{1,32}")
AMOUNT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
VERSION_LINE = re.compile(r"compute-broker (?P<broker>\S+) protocol (?P<protocol>[0-9]{1,9})")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Granted:
    """`LEASE …`: one lease, and the worker it is on. `of` is how many lines the answer has in all.

    `type`, `cores` and `price_usd_per_hour` are None where the broker does not know; `expires_unix` is by its
    clock, in whole seconds.
    """

    id: str
    address: str
    port: int
    pool: str
    type: str | None
    cores: int | None
    market: str
    price_usd_per_hour: float | None
    expires_unix: float
    of: int

    def line(self) -> bytes:
        price = self.price_usd_per_hour
        # Down to micro-dollars, without an exponent.
        shown = None if price is None else f"{price:.6f}".rstrip("0").rstrip(".")
        return _line(
            f"LEASE id={self.id} ip={self.address} port={self.port} pool={self.pool} "
            f"type={_or_unknown(self.type)} cores={_or_unknown(self.cores)} market={self.market} "
            f"price={_or_unknown(shown)} expires={tags.rfc3339(self.expires_unix)} of={self.of}"
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """`PENDING …`: why there is no worker yet. `position` 1 is next; `eta_seconds` is None when nobody knows.

    `code` is BOOTING, QUEUED, STARTING, NO_CAPACITY, LIMIT, BUDGET or CLOUD; `reason` is for people.
    """

    eta_seconds: float | None
    position: int
    code: str
    reason: str

    def line(self) -> bytes:
        eta = UNKNOWN_ETA if self.eta_seconds is None else f"{max(0.0, self.eta_seconds):.0f}"
        return _line(f"PENDING eta={eta} position={self.position} code={self.code} reason={self.reason}")


@dataclass(frozen=True, slots=True)
class Notice:
    """`NOTICE …`: what happens to a worker of this client, `in_seconds` from now; 0: at once, or unknown.

    `what` is interrupt, retire, drain or lost; `replacement` the address of another worker. An address is
    None where there is none.
    """

    what: str
    address: str | None
    lease: str
    in_seconds: float = 0.0
    replacement: str | None = None
    reason: str = ""

    def line(self) -> bytes:
        words = (
            f"NOTICE {self.what} ip={_or_unknown(self.address)} lease={self.lease} in={self.in_seconds:.0f} "
            f"replacement={_or_unknown(self.replacement)}"
        )
        return _line(f"{words} reason={self.reason}" if self.reason else words)


@dataclass(frozen=True, slots=True)
class Versions:
    """What answers VERSION: which broker this is, and which protocol it speaks."""

    broker: str
    protocol: int

    def line(self) -> bytes:
        return _line(f"compute-broker {self.broker} protocol {self.protocol}")


def _line(text: str) -> bytes:
    return sentence(text, LINE_CHARS_MAX).encode("ascii") + b"\n"


def _or_unknown(value: object) -> str:
    return UNKNOWN if value is None else str(value)


# --- the client's side: lines → values ------------------------------------------------------------------


def parse_granted(line: str) -> Granted:
    """A LEASE line. Raises BrokerError for nonsense."""
    said = _pairs(_after("LEASE", line))
    return Granted(
        id=_read(line, said, "id", _word),
        address=_read(line, said, "ip", protocol.read_address),
        port=_read(line, said, "port", _whole(1, PORT_MAX)),
        pool=_read(line, said, "pool", _word),
        type=_read(line, said, "type", _unless(UNKNOWN, str)),
        cores=_read(line, said, "cores", _unless(UNKNOWN, _whole(1, keys.CORES_MAX))),
        market=_read(line, said, "market", str),
        price_usd_per_hour=_read(line, said, "price", _unless(UNKNOWN, _amount)),
        expires_unix=_read(line, said, "expires", _moment),
        of=_read(line, said, "of", _whole(1, keys.COUNT_MAX)),
    )


def parse_pending(line: str) -> Pending:
    """A PENDING line. Raises BrokerError for nonsense."""
    said = _pairs(_after("PENDING", line))
    return Pending(
        eta_seconds=_read(line, said, "eta", _unless(UNKNOWN_ETA, _whole(0))),
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
        address=_read(line, said, "ip", _unless(UNKNOWN, protocol.read_address)),
        lease=_read(line, said, "lease", _word),
        in_seconds=_read(line, said, "in", _whole(0)),
        replacement=_read(line, said, "replacement", _unless(UNKNOWN, protocol.read_address)),
        reason=said.get("reason", ""),
    )


def parse_versions(line: str) -> Versions:
    """The answer to VERSION. Raises BrokerError for nonsense."""
    match = VERSION_LINE.fullmatch(line)
    if match is None:
        raise _nonsense(line, "`compute-broker <version> protocol <number>` was expected")
    return Versions(match["broker"], int(match["protocol"]))


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
    if not keys.WORD.fullmatch(value):
        raise ValueError
    return value


def _code(value: str) -> str:
    if not CODE.fullmatch(value):
        raise ValueError
    return value


def _whole(low: int, high: int = NUMBER_MAX) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not (value.isascii() and value.isdecimal() and low <= int(value) <= high):
            raise ValueError
        return int(value)

    return read


def _amount(value: str) -> float:
    if not AMOUNT.fullmatch(value):
        raise ValueError
    return float(value)


def _moment(value: str) -> float:
    unix = tags.unix(value)
    if unix is None:
        raise ValueError
    return unix
