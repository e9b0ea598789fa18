"""What systemd and the broker tell each other: readiness, liveness, and sockets that were opened for us.

The protocol is datagrams of `KEY=value` lines to the socket in NOTIFY_SOCKET, and some environment variables.
Without them (a terminal, a container, a test) everything here does nothing. Whatever happens to a datagram,
the broker goes on: a failed notification is reported once to `on_failure` and by the returned bool, never
raised. READY=1 is the one message that must not be lost, so it rides with every message until one is sent.

Sources: the manual pages sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress

STATUS_BYTES_MAX = 1024  # systemd ignores a datagram above 4096 bytes (NOTIFY_BUFFER_MAX in its manager.c)
START_EXTENSION_SECONDS = 180.0  # when no watchdog says how often the broker is to show that it lives
LISTEN_FD_FIRST = 3  # SD_LISTEN_FDS_START: systemd passes sockets from here on
LISTEN_FDS_MAX = 64  # far above any socket unit of ours: a bound for a number that comes from outside
UNNAMED = "unknown"  # what sd_listen_fds_with_names(3) calls a descriptor that came without a name

_USEC_PER_SECOND = 1_000_000


def _ignore(_problem: str) -> None:
    """The default `on_failure`."""


class Notifier:
    """The broker's voice to its service manager. Every method returns whether the manager was told.

    `on_failure` gets one sentence at the first failure, and again only after a message went through.
    """

    def __init__(self, environ: Mapping[str, str], on_failure: Callable[[str], None] = _ignore) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._extension_seconds = watchdog_seconds(environ) or START_EXTENSION_SECONDS
        self._on_failure = on_failure
        self._failing = False
        self._ready = False
        self._ready_owed = False

    @property
    def enabled(self) -> bool:
        """Whether a service manager asked to be told."""
        return bool(self._address)

    def ready(self, status: str = "") -> bool:
        """Start-up is over; units ordered after this one may start, and the watchdog begins to count."""
        self._ready = self._ready_owed = True
        return self._send(*_status(status))

    def status(self, text: str) -> bool:
        """One line for people, shown by `systemctl status`."""
        return self._send(*_status(text))

    def watchdog(self) -> bool:
        """The loops live. Before `ready` this asks for more time to start instead.

        The difference matters: systemd arms the watchdog at the first WATCHDOG=1, even of a service that is
        still starting, while a start that waits for the cloud runs out of TimeoutStartSec= unless extended.
        """
        if self._ready:
            return self._send("WATCHDOG=1")
        return self._send(f"EXTEND_TIMEOUT_USEC={int(self._extension_seconds * _USEC_PER_SECOND)}")

    def stopping(self, status: str = "") -> bool:
        """Shutdown has begun."""
        self._ready_owed = False
        return self._send("STOPPING=1", *_status(status))

    def _send(self, *assignments: str) -> bool:
        if not self.enabled:
            return False
        lines = ("READY=1", *assignments) if self._ready_owed else assignments
        if not lines:
            return True
        try:
            _send_datagram(self._address, "\n".join(lines).encode("utf-8", "replace"))
        except (OSError, ValueError) as error:
            self._report(error)
            return False
        self._ready_owed = self._failing = False
        return True

    def _report(self, error: Exception) -> None:
        if self._failing:
            return
        self._failing = True
        self._on_failure(f"the service manager at NOTIFY_SOCKET={self._address} cannot be told: {error}")


def watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """How long systemd waits between two `watchdog()` calls before it kills the broker; None: for ever.

    Ping at half of it or more often (sd_watchdog_enabled(3)). WATCHDOG_PID, if given, must name this process.
    """
    if not _meant_for_us(environ.get("WATCHDOG_PID", str(os.getpid()))):
        return None
    usec = _decimal(environ.get("WATCHDOG_USEC", ""))
    return usec / _USEC_PER_SECOND if usec else None


def listen_sockets(environ: Mapping[str, str]) -> dict[str, list[socket.socket]]:
    """The listening sockets systemd opened for us, by name (`FileDescriptorName=` of the socket unit).

    A socket without a name is under `UNNAMED`. Each is non-blocking and not inherited by child processes.
    `environ` is left as it is, and need not be cleaned: LISTEN_PID keeps children from taking it for theirs.
    So call this once, a second call would make two owners of one descriptor.

    Raises ValueError, with a sentence for the operator, when a descriptor is no listening stream socket.
    """
    if not _meant_for_us(environ.get("LISTEN_PID", "")):
        return {}
    count = _decimal(environ.get("LISTEN_FDS", "")) or 0
    if count > LISTEN_FDS_MAX:
        raise ValueError(f"LISTEN_FDS={count}: at most {LISTEN_FDS_MAX} sockets are accepted")
    names = [*environ.get("LISTEN_FDNAMES", "").split(":"), *[""] * count]
    sockets: dict[str, list[socket.socket]] = {}
    for fd, name in enumerate(names[:count], start=LISTEN_FD_FIRST):
        sockets.setdefault(name or UNNAMED, []).append(_listening_socket(fd))
    return sockets


def _listening_socket(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ValueError(f"descriptor {fd} from the service manager is no socket: {error}") from error
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        raise ValueError(f"descriptor {fd} from the service manager is no listening stream socket")
    sock.setblocking(False)
    return sock


def _send_datagram(address: str, payload: bytes) -> None:
    """Never waits: a manager too busy to read must not stop the event loop."""
    if address[0] not in "/@":
        raise ValueError("neither a path nor an abstract address (@…)")
    encoded = os.fsencode(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(payload, b"\0" + encoded[1:] if address[0] == "@" else encoded)


def _status(text: str) -> tuple[str, ...]:
    """One STATUS= assignment: a line break in it would begin another assignment."""
    line = " ".join(text.split()).encode("utf-8", "replace")[:STATUS_BYTES_MAX].decode("utf-8", "ignore")
    return (f"STATUS={line}",) if line else ()


def _meant_for_us(pid: str) -> bool:
    return _decimal(pid) == os.getpid()


def _decimal(text: str) -> int | None:
    """A plain unsigned number, or None: what comes from the environment is not trusted to be one."""
    with suppress(ValueError):
        return int(text) if text.isascii() and text.isdigit() else None
    return None
