"""Stands in for systemd as PID 1, for one service: starts it, hears it, hands it a socket, ends it.

Only what sd_notify(3) and sd_listen_fds(3) promise a service. Every wait has a deadline, and a service that
ends while something is expected of it fails the test with what it wrote.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.deploy.unit_file import REPOSITORY, SERVICE, one, seconds

READY_SECONDS_MAX = 60.0  # imports on a slow, busy machine
STOP_SECONDS_MAX = seconds(one(SERVICE, "Service.TimeoutStopSec"))
POLL_SECONDS = 0.2  # how often a silent service is looked at

# What the exec'd program finds: its own pid in LISTEN_PID, and the socket as descriptor 3.
_WITH_SOCKET = 'export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=broker; exec 3<&"$0"; exec "$@"'
_UNDER_RULES = (sys.executable, "-m", "tests.deploy.sandbox", str(SERVICE))
_numbers = itertools.count()


def own_loopback_address() -> str:
    """An address no other test process uses, for a program that cannot be told to take any free port."""
    pid = os.getpid()
    return f"127.{200 + (pid >> 16) % 50}.{pid >> 8 & 255}.{pid & 255 or 1}"


class Service:
    """One service process and its notification socket."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], folder: Path) -> None:
        self._command = list(command)
        self._environ = dict(environ)
        self._journal = folder / f"journal.{next(_numbers)}"
        self._notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notifications.bind("")  # the kernel finds a free abstract address (unix(7), autobind)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.kill()
        self._notifications.close()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def journal(self) -> str:
        """What the service wrote, since the first start."""
        return self._journal.read_text() if self._journal.exists() else ""

    def start(self, listening: socket.socket | None = None, under_rules: bool = False) -> None:
        """Starts it, `listening` being its socket named "broker"; `under_rules`: the unit's kernel rules."""
        assert not self.running
        command = [*_UNDER_RULES, *self._command] if under_rules else self._command
        fds = () if listening is None else (listening.fileno(),)
        if listening is not None:
            command = ["bash", "-c", _WITH_SOCKET, str(listening.fileno()), *command]
        address = self._notifications.getsockname().decode().replace("\0", "@", 1)
        with self._journal.open("ab") as journal:
            self._process = subprocess.Popen(
                command,
                env={"PATH": os.environ["PATH"], **self._environ, "NOTIFY_SOCKET": address},
                cwd=REPOSITORY,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=journal,
                stderr=journal,
            )

    def expect(self, assignment: str, within_seconds: float = READY_SECONDS_MAX) -> list[str]:
        """Everything said up to and with the first message that has this assignment (or begins it)."""
        said: list[str] = []
        deadline = time.monotonic() + within_seconds
        while time.monotonic() < deadline:
            lines = self._hear()
            said += lines
            if any(line.startswith(assignment) for line in lines):
                return said
            assert lines or self.running, f"ended before it said {assignment}:\n{self.journal}"
        raise AssertionError(f"{assignment} was not said, only {said}:\n{self.journal}")

    def _hear(self) -> list[str]:
        self._notifications.settimeout(POLL_SECONDS)
        try:
            return self._notifications.recv(4096).decode().split("\n")
        except TimeoutError:
            return []

    def ended(self) -> int:
        """Waits for the end; the exit code, negative for a signal."""
        assert self._process is not None
        return self._process.wait(STOP_SECONDS_MAX)

    def stop(self) -> int:
        """What `systemctl stop` does with KillMode=process."""
        return self.signal(signal.SIGTERM)

    def kill(self) -> int:
        return self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> int:
        """Sends it and waits for the end."""
        assert self._process is not None
        self._process.send_signal(number)
        return self.ended()
