"""The real command as a process of its own: `python -m broker serve --config …`, as an operator starts it.

It runs in a directory of the test's, with an environment that holds nothing of the developer's, on loopback
ports that stay reserved while it is down, so that a restart finds them free. However a test ends, `close`
ends the process and the local workers it left behind, each by its own id.

    with BrokerProcess(tmp_path, {"broker": {"id": "lab"}, "pool.default": {"max_workers": 1}}) as broker:
        address = broker.ask("GET_WORKER")
        broker.kill()       # SIGKILL
        broker.start()      # the same configuration, state and ports
        assert broker.ask("GET_WORKER") == address
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
from prometheus_client.parser import text_string_to_metric_families

SECONDS_MAX = (
    20.0  # what takes longer has failed: most things take a few milliseconds, on a busy machine more
)
START_SECONDS_MAX = 60.0  # the SDK reads its description of EC2; a loaded machine may take its time
STOP_SECONDS_MAX = 30.0  # the broker waits up to 20 s for launch calls that are under way
LOOK_SECONDS = 0.02
LEASH_FILE = "COMPUTE_BROKER_LEASH_FILE"  # in every local worker's environment, below its broker's state_dir

T = TypeVar("T")


def eventually(condition: Callable[[], T], seconds_max: float = SECONDS_MAX, what: str = "") -> T:
    """What `condition` returns as soon as that is true. Fails, with the last value seen, when it never is."""
    deadline_at = time.monotonic() + seconds_max
    while not (value := condition()):
        if time.monotonic() > deadline_at:
            raise AssertionError(
                f"not within {seconds_max:g} s: {what or 'a condition'}; last seen: {value!r}"
            )
        time.sleep(LOOK_SECONDS)
    return value


class Conversation:
    """One client connection: bytes out, lines in. Ends by `with`, or by its broker's `hang_up` or `close`."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), SECONDS_MAX)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # each send is a packet of its own
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def send(self, data: bytes | str) -> Self:
        self._socket.sendall(data.encode() if isinstance(data, str) else data)
        return self

    def say(self, line: str) -> Self:
        return self.send(f"{line}\n")

    def half_close(self) -> Self:
        """Says that nothing more will be said; still listens."""
        self._socket.shutdown(socket.SHUT_WR)
        return self

    def line(self, seconds_max: float = SECONDS_MAX) -> str:
        """The next reply. Fails when none comes, or when the broker has hung up without one."""
        line = self._next_line(seconds_max)
        assert line is not None, f"the connection ended without a reply; before that: {self._heard!r}"
        return line

    def answered(self, seconds_max: float = 0.0) -> bool:
        """Whether a reply, or the end of the connection, can be read within so long."""
        return b"\n" in self._heard or bool(select.select([self._socket], [], [], seconds_max)[0])

    def rest(self, seconds_max: float = SECONDS_MAX) -> list[str]:
        """Every further reply until the broker hangs up; fails when it does not."""
        lines: list[str] = []
        while (line := self._next_line(seconds_max)) is not None:
            lines.append(line)
        return lines

    def close(self) -> None:
        self._socket.close()

    def _next_line(self, seconds_max: float) -> str | None:
        deadline_at = time.monotonic() + seconds_max
        while b"\n" not in self._heard:
            self._socket.settimeout(max(0.001, deadline_at - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise AssertionError(f"no reply within {seconds_max:g} s, only {self._heard!r}") from None
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode("ascii")


class BrokerProcess:
    """See the module. `tables` is the configuration: {"broker": {…}, "pool.default": {…}}.

    `listen`, `http` and `state_dir` are filled in unless given. `environ` comes on top of a bare environment.
    """

    def __init__(
        self,
        directory: Path,
        tables: Mapping[str, Mapping[str, object]],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._reservations = [_reserved_port(), _reserved_port()]
        self.host = "127.0.0.1"
        self.port, self.http_port = (one.getsockname()[1] for one in self._reservations)
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.config_file = directory / "broker.toml"
        broker = {
            "listen": f"{self.host}:{self.port}",
            "http": f"{self.host}:{self.http_port}",
            "state_dir": str(directory / "state"),
            **tables.get("broker", {}),
        }
        self.state_dir = Path(str(broker["state_dir"]))
        self._broker_table = broker
        self.write(tables)
        self.environ = bare_environment(directory / "home") | dict(environ or {})
        self.prefix: tuple[str, ...] = ()  # a command that runs the broker in its own place, as nice(1) does
        self._process: subprocess.Popen[bytes] | None = None
        self._runs = 0
        self._conversations: list[Conversation] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # --- its life --------------------------------------------------------------------------------------

    def start(self, *, until: str = "ready") -> Self:
        """Starts it and returns when it is "ready" (/readyz says so), "listening", or "started" at all."""
        self.spawn()
        if until == "started":
            return self
        eventually(lambda: self._heard_of("listening"), START_SECONDS_MAX, "the broker listens")
        if until == "ready":
            eventually(lambda: self.http("/readyz")[0] == 200, START_SECONDS_MAX, "the broker is ready")
        return self

    def spawn(self) -> None:
        """Starts the process and returns at once."""
        assert not self.running, "it runs already"
        self._runs += 1
        with self._stderr_file.open("wb") as stderr, self._stdout_file.open("wb") as stdout:
            self._process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "broker", "serve", "--config", str(self.config_file)],
                cwd=self.directory,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C on a terminal ends the test, and the test ends the broker
            )

    @property
    def pid(self) -> int:
        assert self._process is not None, "the broker was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL: the broker gets no chance to say or write anything."""
        assert self.running, f"the broker has ended by itself: {self.stderr}"
        self._signal(signal.SIGKILL)
        assert self.exit_code() == -signal.SIGKILL

    def terminate(self, seconds_max: float = STOP_SECONDS_MAX) -> None:
        """SIGTERM; fails unless the broker ends in time and in order."""
        self.ask_to_end()
        assert self.exit_code(seconds_max) == 0, self.stderr

    def ask_to_end(self) -> None:
        """SIGTERM, and returns at once."""
        assert self.running, f"the broker has ended by itself: {self.stderr}"
        self._signal(signal.SIGTERM)

    def exit_code(self, seconds_max: float = STOP_SECONDS_MAX) -> int:
        """The exit code, once it has ended. Fails when it does not."""
        assert self._process is not None, "the broker was not started"
        try:
            return self._process.wait(seconds_max)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the broker has not ended within {seconds_max:g} s") from None

    def write(self, tables: Mapping[str, Mapping[str, object]]) -> None:
        """The configuration file; a key of [broker] that is not named stays as it was."""
        broker = {**self._broker_table, **tables.get("broker", {})}
        self.config_file.write_text(_toml({**tables, "broker": broker}), encoding="utf-8")

    def reload(self, tables: Mapping[str, Mapping[str, object]] | str) -> None:
        """A new file (text that may hold mistakes, or tables), and SIGHUP. Returns at once."""
        if isinstance(tables, str):
            self.config_file.write_text(tables, encoding="utf-8")
        else:
            self.write(tables)
        self._signal(signal.SIGHUP)

    def close(self) -> None:
        """Ends everything that was started, whatever state it is in."""
        self.hang_up()
        if self.running:
            self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        for worker in self.local_workers():
            worker.kill()
        for reservation in self._reservations:
            reservation.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def local_workers(self) -> list[psutil.Process]:
        """The processes of this broker's local workers, found by their own environment, as it finds them."""
        records = str((self.state_dir / "local").resolve()) + os.sep
        return [p for p in psutil.process_iter() if _environ_of(p).get(LEASH_FILE, "").startswith(records)]

    # --- talking to it ---------------------------------------------------------------------------------

    def connect(self) -> Conversation:
        conversation = Conversation(self.host, self.port)
        self._conversations.append(conversation)
        return conversation

    def hang_up(self) -> None:
        """Closes every connection that `connect` and `asking` have made."""
        for conversation in self._conversations:
            conversation.close()
        self._conversations.clear()

    def asking(self, line: str) -> Conversation:
        """A connection that has asked; its reply is read when the test wants it."""
        return self.connect().say(line)

    def ask(self, line: str, seconds_max: float = SECONDS_MAX) -> str:
        """The reply to one command on a connection of its own."""
        with Conversation(self.host, self.port) as conversation:
            return conversation.say(line).line(seconds_max)

    def status(self) -> list[dict[str, Any]]:
        """What STATUS tells."""
        rows: list[dict[str, Any]] = json.loads(self.ask("STATUS"))
        return rows

    def http(self, path: str) -> tuple[int, str]:
        """(status, body) of a page of the HTTP side. Raises OSError."""
        connection = HTTPConnection(self.host, self.http_port, timeout=SECONDS_MAX)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample of /metrics by name and labels."""
        families = text_string_to_metric_families(self.http("/metrics")[1])
        return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have this name and these labels; 0 when there is none."""
        wanted = labels.items()
        return sum(v for (n, have), v in self.metrics().items() if n == name and wanted <= dict(have).items())

    # --- what it says ----------------------------------------------------------------------------------

    @property
    def stderr(self) -> str:
        """What this run has written to stderr so far."""
        return self._stderr_file.read_text(encoding="utf-8", errors="replace")

    @property
    def log(self) -> list[dict[str, Any]]:
        """This run's log, one dictionary a line; other lines on stderr are left out."""
        return _parsed(self.stderr)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log if entry.get("event") == name]

    def wait_for_event(self, name: str, count: int = 1, seconds_max: float = SECONDS_MAX) -> dict[str, Any]:
        """The `count`th entry of this name, once it is in the log."""
        found = eventually(
            lambda: self.events(name)[count - 1 :], seconds_max, f'{count} × "{name}" in the log'
        )
        return found[0]

    def faults(self) -> list[str]:
        """What no run of a healthy broker logs, whatever the cloud and the clients do: errors, tracebacks."""
        runs = [path.read_text("utf-8", "replace") for path in sorted(self.directory.glob("stderr-*.log"))]
        errors = [
            json.dumps(entry) for run in runs for entry in _parsed(run) if entry.get("level") == "error"
        ]
        return errors + [line for run in runs for line in run.splitlines() if line.startswith("Traceback")]

    def _heard_of(self, event: str) -> bool:
        assert self.running, f"the broker has ended by itself: {self.stderr}"
        return bool(self.events(event))

    @property
    def _stderr_file(self) -> Path:
        return self.directory / f"stderr-{self._runs}.log"

    @property
    def _stdout_file(self) -> Path:
        return self.directory / f"stdout-{self._runs}.log"


class BrokerProcesses:
    """The brokers of one test: each in a directory of its own, all ended with it.

    Leaving checks what holds for every test: whatever the cloud and the clients did, no broker logged
    a fault.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: list[BrokerProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        for broker in self._made:
            broker.close()
        if e is None:
            faults = [fault for broker in self._made for fault in broker.faults()]
            assert not faults, faults

    def make(
        self, tables: Mapping[str, Mapping[str, object]], environ: Mapping[str, str] | None = None
    ) -> BrokerProcess:
        """A broker that has not been started."""
        directory = self._directory / f"broker-{len(self._made) + 1}"
        self._made.append(BrokerProcess(directory, tables, environ))
        return self._made[-1]

    def start(
        self, tables: Mapping[str, Mapping[str, object]], environ: Mapping[str, str] | None = None
    ) -> BrokerProcess:
        """A broker that is ready."""
        return self.make(tables, environ).start()


def bare_environment(home: Path) -> dict[str, str]:
    """What any program needs, and nothing that a developer or a CI machine has set for AWS or for us."""
    home.mkdir(parents=True, exist_ok=True)
    return {"HOME": str(home), "PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}


def _reserved_port() -> socket.socket:
    """A free loopback port that stays ours: bound, but not listening, so that the broker can bind it too.

    (Linux: socket(7), SO_REUSEADDR. Servers of asyncio and uvloop set it as well.)
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    return reservation


def _toml(tables: Mapping[str, Mapping[str, object]]) -> str:
    sections = [
        (name, [f"{key} = {_value(v)}" for key, v in table.items()]) for name, table in tables.items()
    ]
    return "\n".join("\n".join([f"[{name}]", *lines, ""]) for name, lines in sections)


def _value(value: object) -> str:
    """TOML shares JSON's strings, numbers, booleans and lists, not its objects."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def _parsed(text: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the last line, not written to its end yet
    return entries


def _environ_of(process: psutil.Process) -> Mapping[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def run_command(arguments: Sequence[str], directory: Path, environ: Mapping[str, str] | None = None) -> Any:
    """`python -m broker …` run to its end, in a bare environment: its CompletedProcess, output as text."""
    return subprocess.run(
        [sys.executable, "-m", "broker", *arguments],
        cwd=directory,
        env=bare_environment(directory / "home") | dict(environ or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS_MAX,
        check=False,
    )
