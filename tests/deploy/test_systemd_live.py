"""The real command as systemd would run it: told where to notify, given its socket, under its rules."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.manager import READY_SECONDS_MAX, Service, own_loopback_address
from tests.deploy.sandbox import seccomp_library
from tests.deploy.unit_file import SERVICE, environment, need

COMMAND = str(Path(sys.executable).with_name("compute-broker"))
REPLY_SECONDS_MAX = 30.0
WORKER_PORT = 2560
BROKER_PORT = 9000

LOCAL = 'provider = "local"'
UNREACHABLE_CLOUD = """\
provider = "ec2"
region = "us-east-1"
image = "ami-0123456789abcdef0"
instance_types = ["c7i.large"]
"""


def broker_command(folder: Path, pool: str) -> list[str]:
    config = folder / "broker.toml"
    config.write_text(
        f"""\
[broker]
id = "systemd-test-{os.getpid()}"
state_dir = "{folder / "state"}"
listen = "127.0.0.1:0"
http = "127.0.0.1:0"
reconcile_interval = "200ms"

[pool.default]
{pool}
"""
    )
    return [COMMAND, "serve", "--config", str(config)]


def broker_environment(folder: Path) -> dict[str, str]:
    """What the unit sets, and a home; credentials that lead nowhere keep every AWS call on this machine."""
    nowhere = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",  # the discard port: nothing listens there
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return {**environment(SERVICE), "HOME": str(folder), **nowhere}


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        yield listening


def service_of(folder: Path, pool: str = LOCAL, **environ: str) -> Service:
    return Service(broker_command(folder, pool), {**broker_environment(folder), **environ}, folder)


def ask(address: tuple[str, int], command: str) -> str:
    """One command, one reply line."""
    with socket.create_connection(address, REPLY_SECONDS_MAX) as connection:
        connection.settimeout(REPLY_SECONDS_MAX)
        connection.sendall(f"{command}\n".encode())
        with connection.makefile() as replies:
            return replies.readline().rstrip("\n")


def evaluate(worker: str, script: str) -> str:
    """One frame to a worker's port, one back: a 4-byte big-endian length and that many bytes."""
    with socket.create_connection((worker, WORKER_PORT), REPLY_SECONDS_MAX) as connection:
        connection.settimeout(REPLY_SECONDS_MAX)
        connection.sendall(struct.pack(">I", len(script.encode())) + script.encode())
        with connection.makefile("rb") as frames:
            (length,) = struct.unpack(">I", frames.read(4))
            return frames.read(length).decode()


def test_ready_is_said_when_clients_are_answered(tmp_path: Path, listening: socket.socket) -> None:
    with service_of(tmp_path) as broker:
        broker.start(listening)
        said = broker.expect("READY=1")
        assert "WATCHDOG=1" not in said
        assert json.loads(ask(listening.getsockname(), "STATUS")) == []


def test_sigterm_is_announced_and_is_no_failure(tmp_path: Path, listening: socket.socket) -> None:
    with service_of(tmp_path) as broker:
        broker.start(listening)
        broker.expect("READY=1")
        assert broker.stop() == 0
        broker.expect("STOPPING=1")


def test_the_watchdog_is_fed(tmp_path: Path, listening: socket.socket) -> None:
    with service_of(tmp_path, WATCHDOG_USEC="180000000") as broker:
        broker.start(listening)
        broker.expect("READY=1")
        broker.expect("WATCHDOG=1")
        broker.expect("WATCHDOG=1")


def test_a_cloud_that_is_down_at_boot_is_waited_for(tmp_path: Path, listening: socket.socket) -> None:
    with service_of(tmp_path, UNREACHABLE_CLOUD, WATCHDOG_USEC="180000000") as broker:
        broker.start(listening)
        said = [
            *broker.expect("EXTEND_TIMEOUT_USEC=180000000"),
            *broker.expect("EXTEND_TIMEOUT_USEC=180000000"),
        ]
        assert "READY=1" not in said
        assert "WATCHDOG=1" not in said
        assert broker.running
        assert broker.stop() == 0


def test_a_hang_leaves_a_traceback_of_every_thread(tmp_path: Path, listening: socket.socket) -> None:
    with service_of(tmp_path) as broker:
        broker.start(listening)
        broker.expect("READY=1")
        assert broker.signal(signal.SIGABRT) == -signal.SIGABRT  # what the watchdog sends
        assert "Fatal Python error: Aborted" in broker.journal


def test_clients_that_come_while_the_broker_restarts_are_answered_later(
    tmp_path: Path, listening: socket.socket
) -> None:
    with service_of(tmp_path) as broker:
        broker.start(listening)
        broker.expect("READY=1")
        broker.stop()
        with socket.create_connection(listening.getsockname(), REPLY_SECONDS_MAX) as early:
            early.sendall(b"STATUS\n")
            broker.start(listening)
            early.settimeout(READY_SECONDS_MAX)
            assert json.loads(early.makefile().readline()) == []


def test_a_connection_starts_the_broker_on_demand(tmp_path: Path) -> None:
    activate = need("systemd-socket-activate", "systemd")
    address = (own_loopback_address(), BROKER_PORT)
    setenv = [f"--setenv={name}={value}" for name, value in broker_environment(tmp_path).items()]
    command = [activate, f"--listen={address[0]}:{address[1]}", "--fdname=broker", *setenv]
    activated = subprocess.Popen([*command, *broker_command(tmp_path, LOCAL)])
    try:
        wait_for_listener(address)
        assert json.loads(ask(address, "STATUS")) == []
    finally:
        activated.terminate()
        assert activated.wait(REPLY_SECONDS_MAX) == 0


def wait_for_listener(address: tuple[str, int]) -> None:
    """Until the kernel lists it: a trial connection would be the one that starts the broker."""
    packed = struct.unpack("=I", socket.inet_aton(address[0]))[0]
    wanted = f"{packed:08X}:{address[1]:04X} 00000000:0000 0A"  # proc(5): local, remote, state LISTEN
    deadline = time.monotonic() + REPLY_SECONDS_MAX
    while wanted not in Path("/proc/net/tcp").read_text():
        assert time.monotonic() < deadline, f"nothing listens on {address}"
        time.sleep(0.02)


@pytest.mark.skipif(
    seccomp_library() is None, reason="the unit's kernel rules are NOT tried: apt-get install libseccomp2"
)
def test_a_worker_is_had_used_and_kept_over_a_restart_under_the_units_kernel_rules(
    tmp_path: Path, listening: socket.socket
) -> None:
    need("systemd-analyze", "systemd")
    address = listening.getsockname()
    with service_of(tmp_path) as broker:
        broker.start(listening, under_rules=True)
        broker.expect("READY=1")
        worker = ask(address, "GET_WORKER client=systemd-test")
        try:
            assert evaluate(worker, "expr {6 * 7}") == "42"
            assert broker.stop() == 0
            broker.start(listening, under_rules=True)
            broker.expect("READY=1")
            assert [known["ip"] for known in json.loads(ask(address, "STATUS"))] == [worker]
            assert evaluate(worker, "expr {6 * 7}") == "42"
        finally:
            assert ask(address, f"RELEASE {worker} force") == "OK"
            wait_until_nothing_runs(address)


def wait_until_nothing_runs(address: tuple[str, int]) -> None:
    """RELEASE is answered before the worker has ended."""
    deadline = time.monotonic() + REPLY_SECONDS_MAX
    while (running := ask(address, "LIST_ALL")) != "[]":
        assert time.monotonic() < deadline, running
        time.sleep(0.05)
