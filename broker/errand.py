"""One command of a client, from its first attempt to its answer, with no socket and no clock in sight.

An `Errand` holds what goes out, the reply as far as it has come, and whether a broken connection may be
tried again: `Retry` says how often, as plain data. A blocking and an async client carry the same errands.
Also here: where the broker is, and the name under which a client asks, since a lease belongs to a name.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
from binascii import crc32
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypedDict, TypeVar

from broker import wire
from broker.core import protocol
from broker.core.errors import BadRequest, BrokerError
from broker.core.protocol import (
    Acquire,
    Done,
    GetWorker,
    ListAll,
    Ping,
    Pools,
    Release,
    Renew,
    Sayable,
    Status,
    Version,
    Watch,
)

HOST = "127.0.0.1"
PORT = 9000
PORT_MAX = 65_535
PLACE = re.compile(r"\[(?P<v6>[^]]+)\](:(?P<v6_port>.*))?|(?P<name>[^:]+)(:(?P<port>[^:]*))?")
REPLY_BYTES_MAX = 16 * 1024 * 1024  # LIST_ALL of some 50,000 machines
NAME_CHARS_MAX = 64  # of client=
REMEDY = "Is the broker running? `compute-broker serve` starts one; host= or COMPUTE_BROKER_HOST says where"

T = TypeVar("T")
# For a client with a name, twice is as good as once; of a second DONE, EachErrand knows what to think.
REPEATABLE = (GetWorker, Ping, Release, Renew, Done, Watch, Status, Pools, ListAll, Version)


class BrokerUnreachable(BrokerError):
    """the broker does not answer"""


class Wish(TypedDict, total=False):
    """What a worker should be like: the keys of GET_WORKER and ACQUIRE. `wait` is in seconds."""

    pool: str | None
    cores: int | None
    type: str | None
    region: str | None
    wait: float | None
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a repeatable command is sent when the connection fails, and how long the pauses between are.

    By default a broker that restarts within 1.5 s is not noticed.
    """

    attempts_max: int = 5
    pause_seconds: float = 0.1
    pause_factor: float = 2.0
    pause_seconds_max: float = 2.0

    def pause_after(self, attempts: int) -> float | None:
        """Seconds to pause after so many attempts; None when that was the last one."""
        if attempts >= self.attempts_max:
            return None
        return min(self.pause_seconds * self.pause_factor ** (attempts - 1), self.pause_seconds_max)


# --- where the broker is, and who asks --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a broker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return wire.place(self.host, self.port)


def endpoint(host: str | None, port: int | None, environ: Mapping[str, str]) -> Endpoint:
    """From `host`, `host:port` or `[v6]:port`; without one from COMPUTE_BROKER_HOST and COMPUTE_BROKER_PORT.

    `port` beats a port in `host`, and that one COMPUTE_BROKER_PORT. Raises BadRequest.
    """
    fallback = str(PORT)
    if host is None:
        host = environ.get("COMPUTE_BROKER_HOST") or HOST
        fallback = environ.get("COMPUTE_BROKER_PORT") or fallback
    match = PLACE.fullmatch(host)
    name = (match["v6"] or match["name"]) if match else host  # a bare IPv6 address has no port
    written = (match["v6_port"] or match["port"]) if match else None
    number = str(port) if port is not None else written or fallback
    if not name or not number.isdecimal() or len(number) > 5 or not 1 <= int(number) <= PORT_MAX:
        raise BadRequest(f"{host!r}, port {number!r}, is no place of a broker: host or host:port is needed")
    return Endpoint(name, int(number))


_numbers = itertools.count(1)


def next_number() -> int:
    """A number that no other client of this process has."""
    return next(_numbers)


def own_name(number: int) -> str:
    """`<user>@<host>/<pid>.<number>`, computed at every use: a forked child is somebody else."""
    return name_ending(f"/{os.getpid()}.{number}")


def name_ending(tail: str) -> str:
    """`<user>@<host>` + `tail`."""
    return fit_name(f"{_user()}@{socket.gethostname()}", tail)


def fit_name(who: str, tail: str) -> str:
    """`who` + `tail` as the protocol allows it. A name that must be cut keeps a checksum of what it was, so
    that two machines whose long names begin alike remain two clients."""
    clean = re.sub(r"[^A-Za-z0-9._@:/+-]", "-", who)
    if len(clean) + len(tail) > NAME_CHARS_MAX:
        checksum = f".{crc32(who.encode(errors='replace')):08x}"
        clean = clean[: NAME_CHARS_MAX - len(tail) - len(checksum)] + checksum
    return clean + tail


def _user() -> str:
    from getpass import getuser  # only for a client that was given no name

    try:
        return getuser()
    except (ImportError, KeyError, OSError):  # a container often runs under a number without a name
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


# --- one command, without a socket ------------------------------------------------------------------------


class Errand(Generic[T]):
    """One command, from its first attempt to its answer.

    `attempt` says how long a try may take; the connection calls `begin` and `receive`; then either `result`
    is there, or `pause_after` takes in the trouble and returns the pause before the next try, or raises what
    the caller is to see. `now` is in seconds, of any clock that does not go back.
    """

    def __init__(
        self,
        command: Sayable | str,
        read: Callable[[str], T],
        broker: Endpoint,
        seconds: float,
        retry: Retry,
    ) -> None:
        self._command = command
        self._read = read
        self._broker = broker
        self._seconds = seconds
        self._retry = retry
        self._outgoing = _encode(command)
        self._wait = command.wait if isinstance(command, GetWorker | Acquire) else None
        self._started_at: float | None = None
        self._attempts = 0
        self._begun = False
        self._reply = bytearray()

    def attempt(self, now: float) -> float:
        """Start a try. Returns the seconds it may take; all tries share what the first one had."""
        if self._started_at is None:
            self._started_at = now
        elif isinstance(self._command, GetWorker | Acquire) and self._wait is not None:
            left = max(0.0, self._started_at + self._wait - now)
            self._outgoing = _encode(replace(self._command, wait=round(left, 3)))
        self._attempts += 1
        self._begun = False
        self._reply.clear()
        return self._started_at + self._seconds - now

    def begin(self) -> bytes:
        self._begun = True
        return self._outgoing

    def receive(self, data: bytes) -> bool:
        if not data:
            when = "in the middle of its answer" if self._reply else "without an answer"
            raise ConnectionResetError(f"it closed the connection {when}")
        self._reply += data
        if len(self._reply) > REPLY_BYTES_MAX:
            raise BrokerError(f"{self._answered()} with more than {REPLY_BYTES_MAX} bytes")
        return self._is_complete(data)

    def result(self) -> T:
        """The answer. Raises the error that an `ERROR` reply stands for, BrokerError for nonsense."""
        line = bytes(self._reply).partition(b"\n")[0].removesuffix(b"\r")
        try:
            return self._read(line.decode("ascii", "replace"))
        except _Nonsense as nonsense:
            told = line[:80].decode("ascii", "replace")
            raise BrokerError(f"{self._answered()} with {told!r}: {nonsense}") from None

    def surplus(self) -> bytes:
        """What came behind the first line of the answer."""
        return bytes(self._reply).partition(b"\n")[2]

    def pause_after(self, trouble: Exception, now: float) -> float:
        """Seconds until the next try. Raises BrokerUnreachable when there is none."""
        pause = self._retry.pause_after(self._attempts)
        repeatable = self._may_repeat() and isinstance(trouble, ConnectionError)
        if pause is None or not repeatable or now + pause >= self._patience_ends_at():
            raise BrokerUnreachable(self._sentence(trouble)) from trouble
        return pause

    def _is_complete(self, data: bytes) -> bool:
        """Whether the answer is complete, now that `data` has been added to it."""
        return b"\n" in data

    def _may_repeat(self) -> bool:
        return isinstance(self._command, REPEATABLE)

    def _patience_ends_at(self) -> float:
        """When no new try may begin: the caller's own wait counts, without the margin for the answer."""
        return (self._started_at or 0.0) + (self._seconds if self._wait is None else self._wait)

    def _verb(self) -> str:
        if isinstance(self._command, str):
            return self._command.partition(" ")[0][:40]
        return protocol.name_of(self._command)

    def _answered(self) -> str:
        return f"the broker at {self._broker} answered {self._verb()}"

    def _sentence(self, trouble: Exception) -> str:
        if not self._begun:
            return f"no broker can be reached at {self._broker}: {wire.reason(trouble)}. {REMEDY}"
        why = f"within {self._seconds:g} s" if wire.is_over(trouble) else f"({wire.reason(trouble)})"
        doubt = "" if self._may_repeat() else "; it may have been carried out all the same"
        what = f"the broker at {self._broker} did not answer {self._verb()} {why}{doubt}"
        return f"{what}. Is that a compute-broker, and what does its log say?"


class _Nonsense(Exception):
    """An answer that is none to this command; says what it should have been."""


def _encode(command: Sayable | str) -> bytes:
    if not isinstance(command, str):
        return protocol.encode(command)
    if not command.isascii() or not command.isprintable() or len(command) > protocol.LINE_BYTES_MAX:
        raise BadRequest(f"a command is one line of printable ASCII, {protocol.LINE_BYTES_MAX} bytes at most")
    return command.encode("ascii") + b"\n"


def read_ok(reply: str) -> None:
    if protocol.read_reply(reply) != "OK":
        raise _Nonsense("OK was expected")


def read_workers(reply: str) -> list[dict[str, Any]]:
    return _read_rows(reply, "workers")


def read_pools(reply: str) -> list[dict[str, Any]]:
    return _read_rows(reply, "pools")


def _read_rows(reply: str, what: str) -> list[dict[str, Any]]:
    rows = _read_json(reply)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _Nonsense(f"a list of {what} was expected")
    return rows


def read_terminated(reply: str) -> list[str]:
    answer = _read_json(reply)
    terminated = answer.get("terminated") if isinstance(answer, dict) else None
    if not isinstance(terminated, list):
        raise _Nonsense("the list of the terminated was expected")
    return [str(instance_id) for instance_id in terminated]


def _read_json(reply: str) -> Any:
    try:
        return json.loads(protocol.read_reply(reply))
    except ValueError as error:
        raise _Nonsense("JSON was expected") from error
