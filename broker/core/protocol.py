"""The line protocol, both roles, without a socket in sight.

Server: bytes in → commands, replies → bytes out. Client: command → bytes out, reply line → value or error.
One command a line, `\\n` or `\\r\\n`, at most LINE_BYTES_MAX bytes before it. However the bytes are cut into
chunks, the commands are the same; a line that is too long is one clear error, after which nothing more is
read. A line that is no command becomes a `Malformed` that carries its error, in its place in the order.

An empty line asks for a worker, as it always did, unless something that is no command came before it on
the connection. After the first line of an HTTP request nothing more is read either: a web page that sends one
from its reader's browser must not give commands in what follows, nor its blank line buy a machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from broker.core import keys
from broker.core.errors import (
    AuthRequired,
    BadRequest,
    BrokerError,
    BudgetReached,
    CloudError,
    Code,
    Denied,
    Draining,
    LeaseHasEnded,
    LimitReached,
    NoCapacity,
    UnknownCommand,
    WaitTimedOut,
    WorkerNotFound,
)

VERSION = 1  # of the protocol: moves when something that clients rely on changes
LINE_BYTES_MAX = 1024  # of a command; the longest sensible one is a third of it
PARSED_LINES_MAX = 1024  # clients repeat themselves: remember so many lines, at most 1 MiB of them
CLIENT_NAME = keys.CLIENT_NAME
ERROR_LINE = re.compile(r"ERROR(?:: (?P<message>.*?)(?: \[(?P<code>[A-Z_]+)\])?)?")


@dataclass(frozen=True, slots=True)
class GetWorker:
    """`GET_WORKER [key=value …]`: a worker, launched when none is there. `wait` is in seconds."""

    pool: str | None = None
    cores: int | None = None
    type: str | None = None
    region: str | None = None
    wait: float | None = None
    exclusive: bool = False
    client: str | None = None


@dataclass(frozen=True, slots=True)
class Acquire:
    """`ACQUIRE [key=value …]`: `count` leases of their own, or at least `min` when the wait is over.

    `ttl` is how long they last without a renewal, in seconds; `hold` is "connection" for leases that last as
    long as the connection does.
    """

    pool: str | None = None
    cores: int | None = None
    type: str | None = None
    region: str | None = None
    wait: float | None = None
    exclusive: bool = False
    count: int = 1
    min: int | None = None
    hold: str | None = None
    ttl: float | None = None
    client: str | None = None


@dataclass(frozen=True, slots=True)
class Renew:
    """`RENEW <lease>`: the lease lasts from now on as long as it did at first."""

    lease: str


@dataclass(frozen=True, slots=True)
class Done:
    """`DONE <lease>`: the lease ends, its worker stays warm."""

    lease: str


@dataclass(frozen=True, slots=True)
class Watch:
    """`WATCH [client=…]`: say on this connection when a worker of the client's is about to go."""

    client: str | None = None


@dataclass(frozen=True, slots=True)
class Ping:
    """`PING <ip> [client=…]`: the client still uses that worker."""

    address: str
    client: str | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """`RELEASE <ip> [force] [client=…]`: the client is done with that worker."""

    address: str
    force: bool = False
    client: str | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """`STATUS`: what the broker has in its books."""


@dataclass(frozen=True, slots=True)
class Pools:
    """`POOLS`: each pool's workers, caps, breaker and budget."""


@dataclass(frozen=True, slots=True)
class ListAll:
    """`LIST_ALL`: what the cloud lists under the broker's tag."""


@dataclass(frozen=True, slots=True)
class TerminateAll:
    """`TERMINATE_ALL`: end every machine of this broker."""


@dataclass(frozen=True, slots=True)
class Help:
    """`HELP`: the names of the commands."""


@dataclass(frozen=True, slots=True)
class Version:
    """`VERSION`: of the broker and of the protocol."""


@dataclass(frozen=True, slots=True)
class Quit:
    """`QUIT`: the client has said its last command."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """A line that is no command. After a `fatal` one the connection has nothing more to say."""

    error: BrokerError
    name: str = "unknown"
    fatal: bool = False


TOO_LONG = Malformed(BadRequest(f"a command is at most {LINE_BYTES_MAX} bytes"), fatal=True)

Sayable = (
    GetWorker
    | Acquire
    | Renew
    | Done
    | Ping
    | Release
    | Watch
    | Status
    | Pools
    | ListAll
    | TerminateAll
    | Help
    | Version
    | Quit
)
Command = Sayable | Malformed

NAMES: dict[type, str] = {
    GetWorker: "GET_WORKER",
    Acquire: "ACQUIRE",
    Renew: "RENEW",
    Done: "DONE",
    Ping: "PING",
    Release: "RELEASE",
    Watch: "WATCH",
    Status: "STATUS",
    Pools: "POOLS",
    ListAll: "LIST_ALL",
    TerminateAll: "TERMINATE_ALL",
    Help: "HELP",
    Version: "VERSION",
    Quit: "QUIT",
}


def is_last(command: Command) -> bool:
    """Whether the connection has nothing more to say after it."""
    return isinstance(command, Quit) or (isinstance(command, Malformed) and command.fatal)


def name_of(command: Command) -> str:
    """The command's word, from a closed list: safe as a metric label."""
    return command.name if isinstance(command, Malformed) else NAMES[type(command)]


class CommandReader:
    """One connection's bytes → its commands, in order. Never raises."""

    def __init__(self) -> None:
        self._buffer = b""
        self._heard_nonsense = False
        self._dead = False

    @property
    def partial(self) -> bool:
        """Whether a command has begun and not ended."""
        return bool(self._buffer)

    def receive(self, data: bytes) -> list[Command]:
        """The commands that `data` completes."""
        if self._dead:
            return []
        lines = (self._buffer + data).split(b"\n") if self._buffer else data.split(b"\n")
        self._buffer = lines.pop()
        commands: list[Command] = []
        for line in [*lines, self._buffer] if _too_long(self._buffer) else lines:
            commands.append(self._command(line))
            if self._dead:
                self._buffer = b""
                break
        return commands

    def receive_eof(self) -> list[Command]:
        """The command that the end of the stream completes: a last line without its newline."""
        line, self._buffer = self._buffer, b""
        return [self._command(line)] if line.strip(b" \t\r") and not self._dead else []

    def _command(self, line: bytes) -> Command:
        command = TOO_LONG if _too_long(line) else parse_line(line)
        self._dead = is_last(command)
        if isinstance(command, Malformed):
            self._heard_nonsense = True
        elif self._heard_nonsense and not line.strip(b" \t\r"):
            return Malformed(UnknownCommand())
        return command


def _too_long(line: bytes) -> bool:
    return len(line.removesuffix(b"\r")) > LINE_BYTES_MAX


@lru_cache(maxsize=PARSED_LINES_MAX)
def parse_line(line: bytes) -> Command:
    """One line without its newline → a command, `Malformed` when it is none."""
    words = line.decode("latin-1").replace("\t", " ").rstrip(" \r").split(" ")
    words = [word for word in words if word]
    verb = words[0] if words else "GET_WORKER"
    parse = PARSERS.get(verb)
    if parse is None:
        return Malformed(UnknownCommand(), fatal=words[-1].startswith("HTTP/"))
    if not all(word.isascii() and word.isprintable() for word in words):
        return Malformed(BadRequest("a command is printable ASCII"), verb)
    try:
        return parse(words[1:])
    except BadRequest as error:
        return Malformed(error.with_traceback(None), verb)  # or the cache would keep every frame of it


def _get_worker(words: list[str]) -> Command:
    return GetWorker(**_options("GET_WORKER", words, GET_WORKER_KEYS))


def _ping(words: list[str]) -> Command:
    address, rest = _address("PING", words)
    return Ping(address, **_options("PING", rest, CLIENT_KEYS))


def _release(words: list[str]) -> Command:
    address, rest = _address("RELEASE", words)
    force = "force" in rest
    return Release(address, force, **_options("RELEASE", [w for w in rest if w != "force"], CLIENT_KEYS))


def _acquire(words: list[str]) -> Command:
    command = Acquire(**_options("ACQUIRE", words, ACQUIRE_KEYS))
    if command.min is not None and command.min > command.count:
        raise BadRequest("min= is at most count=")
    return command


def _renew(words: list[str]) -> Command:
    return Renew(_lease("RENEW", words))


def _done(words: list[str]) -> Command:
    return Done(_lease("DONE", words))


def _watch(words: list[str]) -> Command:
    return Watch(**_options("WATCH", words, CLIENT_KEYS))


def _lease(verb: str, words: list[str]) -> str:
    if len(words) != 1 or not keys.WORD.fullmatch(words[0]):
        raise BadRequest(f"{verb} needs the id of a lease and nothing else: {verb} <lease>")
    return words[0]


def _bare(command: Command) -> Callable[[list[str]], Command]:
    def parse(words: list[str]) -> Command:
        if words:
            raise BadRequest(f"{name_of(command)} takes no arguments")
        return command

    return parse


def _address(verb: str, words: list[str]) -> tuple[str, list[str]]:
    if not words or "=" in words[0]:
        raise BadRequest(f"{verb} needs the worker's address: {verb} <ip>")
    if not keys.WORD.fullmatch(words[0]):
        raise BadRequest(f"{verb}: that is no address")
    return words[0], words[1:]


def _options(verb: str, words: list[str], known: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in known:
            raise BadRequest(f"{verb} has no key '{_printable(key)}'; it has {', '.join(known)}")
        if key in options:
            raise BadRequest(f"{key}= is given twice")
        if not equals or not value:
            raise BadRequest(f"{key}= needs a value")
        options[key] = known[key](value)
    return options


def _printable(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


CLIENT_KEYS: dict[str, Callable[[str], Any]] = {"client": keys.client}
GET_WORKER_KEYS: dict[str, Callable[[str], Any]] = {
    "pool": keys.word("pool"),
    "cores": keys.whole("cores", keys.CORES_MAX),
    "type": keys.word("type"),
    "region": keys.word("region"),
    "wait": keys.seconds("wait", 0.0, keys.WAIT_SECONDS_MAX),
    "exclusive": keys.exclusive,
    "client": keys.client,
}
ACQUIRE_KEYS: dict[str, Callable[[str], Any]] = {
    **GET_WORKER_KEYS,
    "count": keys.whole("count", keys.COUNT_MAX),
    "min": keys.whole("min", keys.COUNT_MAX),
    "hold": keys.hold,
    "ttl": keys.seconds("ttl", keys.TTL_SECONDS_MIN, keys.TTL_SECONDS_MAX),
}
PARSERS: dict[str, Callable[[list[str]], Command]] = {
    "GET_WORKER": _get_worker,
    "ACQUIRE": _acquire,
    "RENEW": _renew,
    "DONE": _done,
    "PING": _ping,
    "RELEASE": _release,
    "WATCH": _watch,
    "STATUS": _bare(Status()),
    "POOLS": _bare(Pools()),
    "LIST_ALL": _bare(ListAll()),
    "TERMINATE_ALL": _bare(TerminateAll()),
    "HELP": _bare(Help()),
    "VERSION": _bare(Version()),
    "QUIT": _bare(Quit()),
}

# --- replies, as the server writes them ----------------------------------------------------------------

OK = b"OK\n"


def line(text: str) -> bytes:
    """A reply line: an address, for instance."""
    return text.encode("ascii") + b"\n"


def json_line(value: object) -> bytes:
    """One line of JSON, ASCII only."""
    return line(json.dumps(value, separators=(", ", ": ")))


def error_line(error: BrokerError) -> bytes:
    return line(error.wire())


# --- the client's side ---------------------------------------------------------------------------------

ERRORS: dict[str, type[BrokerError]] = {
    Code.AUTH: AuthRequired,
    Code.BUDGET: BudgetReached,
    Code.NO_CAPACITY: NoCapacity,
    Code.LIMIT: LimitReached,
    Code.TIMEOUT: WaitTimedOut,
    Code.DENIED: Denied,
    Code.DRAINING: Draining,
    Code.CLOUD: CloudError,
    Code.BAD_REQUEST: BadRequest,
}
SENTENCES: dict[tuple[str, str | None], type[BrokerError]] = {  # the fixed ones, each with its code
    ("Unknown command", None): UnknownCommand,
    ("Worker not found", None): WorkerNotFound,
    ("that lease has ended", Code.DENIED): LeaseHasEnded,
}


def encode(command: Sayable) -> bytes:
    """A command as it goes over the wire; the inverse of `parse_line`. Raises BadRequest for a bad value."""
    words = [name_of(command)]
    for field in fields(command):
        value = getattr(command, field.name)
        if value == field.default:
            continue
        if len(str(value).split()) != 1:
            raise BadRequest(f"{field.name} is one word, not {str(value)[:40]!r}")
        if field.name in ("address", "lease"):
            words.append(value)
        elif field.name == "force":
            words.append("force")
        else:
            words.append(f"{field.name}={'yes' if value is True else _number(value)}")
    encoded = " ".join(words).encode("ascii", "replace")
    parsed = parse_line(encoded)
    if isinstance(parsed, Malformed):
        raise BadRequest(parsed.error.message)
    if parsed != command:
        raise BadRequest(f"{name_of(command)} cannot carry these values")
    return encoded + b"\n"


def _number(value: object) -> str:
    return (
        format(value, "g") if isinstance(value, float) and value == float(format(value, "g")) else str(value)
    )


def read_reply(reply: str) -> str:
    """A reply line → itself. Raises the error that an `ERROR` line stands for."""
    match = ERROR_LINE.fullmatch(reply)
    if match is None:
        return reply
    message, code = match["message"] or "the broker reports an error without a reason", match["code"]
    kind = SENTENCES.get((message, code)) or ERRORS.get(code or "")
    raise (kind or BrokerError)(message)


def read_address(reply: str) -> str:
    """The address in a reply to GET_WORKER. Raises what `read_reply` raises, and BrokerError for nonsense."""
    address = read_reply(reply).strip()
    if not _is_address(address):
        raise BrokerError(f"the broker answered {address[:80]!r}, which is no address")
    return address


def _is_address(text: str) -> bool:
    """An IP address, or a DNS name (a pool may hand out names): it has a dot and its last part a letter."""
    try:
        ip_address(text)
    except ValueError:
        labels = text.split(".")
        named = bool(keys.WORD.fullmatch(text)) and ":" not in text
        return named and len(labels) > 1 and all(labels) and labels[-1].isalpha()
    return True
