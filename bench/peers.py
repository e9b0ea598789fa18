"""Starting and stopping what is measured: the real broker, and the peers it is held against.

Each peer is a process of its own on a free loopback port, ended by its own pid. A peer that is not installed
raises PeerMissing with a sentence; the caller says it and goes on without that peer: nothing is ever made up.
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.machine import pinned

HERE = Path(__file__).parent
HOST = "127.0.0.1"
START_SECONDS_MAX = 20.0
FIRST_WORKER_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 15.0
REPLY_BYTES_MAX = 65536
LOG_TAIL_MAX = 3000

BROKER_CONFIG = """\
[broker]
id = "bench"
state_dir = "{state_dir}"
listen = "127.0.0.1:{port}"
http = "127.0.0.1:{http_port}"

[pool.default]
provider = "local"
"""


class PeerMissing(Exception):
    """This peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A running server, and the exchange it is measured by, escaped as the load generator reads it."""

    name: str
    port: int
    pid: int
    request: str
    reply: str


Starter = Callable[[int | None], AbstractContextManager[Peer]]


@contextlib.contextmanager
def echo(core: int | None) -> Iterator[Peer]:
    command = [sys.executable, str(HERE / "echo_server.py")]
    with pinned(core):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
    with _ended(process):
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield Peer("echo", port, process.pid, r"GET_WORKER\n", r"127.0.0.5\n")


@contextlib.contextmanager
def beanstalkd(core: int | None) -> Iterator[Peer]:
    port = free_port()
    with _server("beanstalkd", ["-l", HOST, "-p", str(port)], port, core) as process:
        yield Peer("beanstalkd", port, process.pid, r"list-tube-used\r\n", r"USING default\r\n")


@contextlib.contextmanager
def redis(core: int | None) -> Iterator[Peer]:
    """On loopback only, and without protected mode, which would refuse every source but 127.0.0.1."""
    port = free_port()
    arguments = f"--bind {HOST} --port {port} --appendonly no --protected-mode no --save".split()
    with _server("redis-server", [*arguments, ""], port, core) as process:
        yield Peer("redis", port, process.pid, r"PING\r\n", r"+PONG\r\n")


@contextlib.contextmanager
def broker(core: int | None) -> Iterator[Peer]:
    """The real command on its embedded provider, with one warm worker; its workers are ended with it."""
    command = _broker_command()
    with tempfile.TemporaryDirectory(prefix="compute-broker-bench-") as folder:
        config, log_path, port = Path(folder, "broker.toml"), Path(folder, "log"), free_port()
        state_dir = Path(folder, "state")
        config.write_text(BROKER_CONFIG.format(state_dir=state_dir, port=port, http_port=free_port()))
        with log_path.open("wb") as log, pinned(core):
            process = subprocess.Popen([*command, "serve", "--config", str(config)], stdout=log, stderr=log)
        with _ended(process):
            try:
                _wait_until_accepting(process, port)
                address = _warm_address(port)
            except (PeerMissing, OSError) as problem:
                print(log_path.read_text()[-LOG_TAIL_MAX:], file=sys.stderr)
                raise PeerMissing(f"{problem} (the end of its log is on standard error)") from problem
            try:
                yield Peer("broker", port, process.pid, r"GET_WORKER\n", address + r"\n")
            finally:
                _end_workers(process, port)


STARTERS: dict[str, Starter] = {"broker": broker, "echo": echo, "beanstalkd": beanstalkd, "redis": redis}


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def ask(port: int, line: str, seconds_max: float) -> str:
    """One command on a connection of its own; returns its one-line reply."""
    with socket.create_connection((HOST, port), timeout=seconds_max) as connection:
        connection.sendall(line.encode() + b"\n")
        with connection.makefile("rb") as replies:
            return replies.readline(REPLY_BYTES_MAX).decode().rstrip("\r\n")


def _broker_command() -> list[str]:
    command = [str(Path(sys.executable).with_name("compute-broker"))]
    if not Path(command[0]).exists():
        raise PeerMissing("compute-broker is not installed beside this Python")
    tried = subprocess.run([*command, "serve", "--help"], capture_output=True, timeout=30, check=False)
    if tried.returncode != 0:
        last_lines = tried.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise PeerMissing(f"`compute-broker serve --help` fails: {' '.join(last_lines)}")
    return command


def _warm_address(port: int) -> str:
    reply = ask(port, "GET_WORKER", FIRST_WORKER_SECONDS_MAX)
    try:
        return str(ipaddress.IPv4Address(reply))
    except ValueError:
        raise PeerMissing(f"the first GET_WORKER was answered {reply!r}") from None


def _end_workers(process: subprocess.Popen[bytes], port: int) -> None:
    """SIGTERM leaves local workers running, by design; here they must go."""
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with contextlib.suppress(OSError):
        ask(port, "TERMINATE_ALL", STOP_SECONDS_MAX)
    _, left = psutil.wait_procs(workers, timeout=STOP_SECONDS_MAX)
    for worker in left:
        print(f"bench: worker process {worker.pid} outlived TERMINATE_ALL and was killed", file=sys.stderr)
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


@contextlib.contextmanager
def _server(
    name: str, arguments: list[str], port: int, core: int | None
) -> Iterator[subprocess.Popen[bytes]]:
    if shutil.which(name) is None:
        raise PeerMissing(f"{name} is not installed")
    with pinned(core):
        process = subprocess.Popen([name, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with _ended(process):
        _wait_until_accepting(process, port)
        yield process


def _wait_until_accepting(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerMissing(f"it ended at start with status {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1.0):
            return
        time.sleep(0.02)
    raise PeerMissing(f"it did not accept a connection within {START_SECONDS_MAX:.0f} s")


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            print(f"bench: process {process.pid} did not end on SIGTERM and was killed", file=sys.stderr)
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
