"""The Tcl side of the house: the client package's own suite, and the stand-in worker over a raw socket.

The worker is driven with bytes, not with our client, so that both are held to dserv's framing and not to each
other. Every worker of these tests has a leash of its own: a test that dies takes its worker with it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest

from broker.core.protocol import GetWorker, Malformed, Release, parse_line

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "clients" / "tcl"
WORKER = ROOT / "broker" / "providers" / "local_worker.tcl"
PATIENCE_SECONDS_MAX = 20.0  # for what takes milliseconds on a free machine
FRAME_BYTES_MAX = 16 * 1024 * 1024


@pytest.fixture(scope="module")
def tclsh() -> str:
    path = shutil.which("tclsh")
    assert path is not None, "these tests need Tcl 8.6: install the system package `tcl`"
    return path


# --- the package ---------------------------------------------------------------------------------------


def test_the_packages_own_suite_passes(tclsh: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [tclsh, str(PACKAGE / "compute_broker.test"), "-tmpdir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    counts = re.search(r"Total\s+(\d+)\s+Passed\s+(\d+)\s+Skipped\s+(\d+)\s+Failed\s+(\d+)", run.stdout)
    assert counts is not None, run.stdout + run.stderr
    total, passed, skipped, failed = map(int, counts.groups())
    assert failed == 0, run.stdout + run.stderr
    assert total > 0
    assert (passed, skipped) == (total, 0), run.stdout
    assert run.returncode == 0, run.stderr


def test_the_package_has_the_version_of_the_broker() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in ("pkgIndex.tcl", "compute_broker.tcl"):
        assert re.findall(
            r"package (?:ifneeded|provide) compute_broker (\S+)",
            (PACKAGE / name).read_text(),
        ) == [version]


def test_the_examples_of_the_packages_readme_run(tclsh: str, tmp_path: Path, worker: StartWorker) -> None:
    address = f"127.77.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"
    worker(address=address, port=2560)
    blocks = re.findall(
        r"^```tcl\n(.*?)^```",
        (PACKAGE / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert blocks
    script = tmp_path / "examples.tcl"
    script.write_text("\n".join(blocks))
    with LineBroker(address) as broker:
        run = run_client(tclsh, script, broker)
    assert run.returncode == 0, run.stderr
    verbs = [line.split()[0] for line in broker.heard]
    assert verbs.count("GET_WORKER") == verbs.count("RELEASE") > 0
    assert verbs.count("ACQUIRE") == verbs.count("DONE") > 0


def test_the_broker_understands_every_line_the_package_sends(tclsh: str, tmp_path: Path) -> None:
    script = tmp_path / "lines.tcl"
    script.write_text(
        "package require compute_broker\n"
        "compute_broker::get_worker\n"
        "compute_broker::get_worker -pool gpu-2 -cores 64 -type c7i.16xlarge -region us-east-1 -wait 12.5"
        " -exclusive yes -client lab/rig@host:1+2\n"
        "compute_broker::get_worker -exclusive no -wait 0\n"
        "compute_broker::ping 10.0.0.1\n"
        "compute_broker::release 10.0.0.1\n"
        "compute_broker::release 10.0.0.1 -force yes -client lab\n"
        "compute_broker::status\n"
        "compute_broker::with_worker {-pool gpu-2} w {}\n"
    )
    with LineBroker("10.0.0.1") as broker:
        run = run_client(tclsh, script, broker)
    assert run.returncode == 0, run.stderr
    commands = [parse_line(line.encode()) for line in broker.heard]
    assert not [command for command in commands if isinstance(command, Malformed)]
    assert commands[1] == GetWorker("gpu-2", 64, "c7i.16xlarge", "us-east-1", 12.5, True, "lab/rig@host:1+2")
    assert commands[5] == Release("10.0.0.1", True, "lab")
    assert all(getattr(command, "client", "has none") for command in commands)


def run_client(tclsh: str, script: Path, broker: LineBroker) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TCLLIBPATH": str(PACKAGE),
        "COMPUTE_BROKER_HOST": "127.0.0.1",
        "COMPUTE_BROKER_PORT": str(broker.port),
    }
    return subprocess.run(
        [tclsh, str(script)], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


class LineBroker:
    """The smallest broker: one address for whoever asks for a worker, OK otherwise, one line a connection."""

    def __init__(self, address: str) -> None:
        lease = (
            f"LEASE id=lease-1 ip={address} port=2560 pool=default type=big cores=64 market=spot price=- "
            "expires=2026-01-31T08:00:00Z of=1"
        )
        self._replies = {"GET_WORKER": address, "STATUS": "[]", "ACQUIRE": lease}
        self.heard: list[str] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_SECONDS_MAX)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rw", newline="\n") as stream:
                line = stream.readline().strip()
                self.heard.append(line)
                stream.write(self._replies.get(line.split()[0], "OK") + "\n")


# --- the stand-in worker -------------------------------------------------------------------------------


@dataclass
class Worker:
    process: subprocess.Popen[str]
    address: str
    port: int
    leash: Path
    clients: list[Client] = field(default_factory=list)

    def connect(self) -> Client:
        self.clients.append(Client(self.address, self.port))
        return self.clients[-1]

    def ends(self) -> tuple[int, str]:
        """The exit code and what was said on stderr. Fails when the worker goes on living."""
        _, said = self.process.communicate(timeout=PATIENCE_SECONDS_MAX)
        return self.process.returncode, said


class Client:
    """A raw socket that knows how to write and read one frame."""

    def __init__(self, address: str, port: int) -> None:
        self.socket = socket.create_connection((address, port), timeout=PATIENCE_SECONDS_MAX)

    def send(self, script: str) -> None:
        self.socket.sendall(frame(script))

    def receive(self) -> str:
        (length,) = struct.unpack(">I", self._exactly(4))
        return self._exactly(length).decode()

    def ask(self, script: str) -> str:
        self.send(script)
        return self.receive()

    def at_end(self) -> bool:
        return self.socket.recv(1) == b""

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.socket.recv(min(count - len(parts), 1 << 20))
            assert part, f"the worker closed after {len(parts)} of {count} bytes"
            parts += part
        return bytes(parts)


def frame(script: str) -> bytes:
    encoded = script.encode()
    return struct.pack(">I", len(encoded)) + encoded


StartWorker = Callable[..., Worker]


@pytest.fixture
def worker(tclsh: str, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts workers, on a free port of 127.0.0.1 unless told otherwise, and ends them after the test."""
    workers: list[Worker] = []

    def start(
        address: str = "127.0.0.1",
        port: int = 0,
        leash_seconds: int = 60,
        leash_mtime: float | None = None,
        program: Path = WORKER,
    ) -> Worker:
        leash = tmp_path / f"leash-{len(workers)}"
        leash.touch()
        if leash_mtime is not None:
            os.utime(leash, (leash_mtime, leash_mtime))
        environment = os.environ | {
            "COMPUTE_BROKER_ADDRESS": address,
            "COMPUTE_BROKER_PORT": str(port),
            "COMPUTE_BROKER_LEASH_FILE": str(leash),
            "COMPUTE_BROKER_LEASH_SECONDS": str(leash_seconds),
            "COMPUTE_BROKER_LEASH_CHECK_MS": "20",
        }
        process = subprocess.Popen(
            [tclsh, str(program)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        announced = re.fullmatch(
            r"local_worker: listening on (\S+):(\d+)\n", process.stdout.readline()
        ) or pytest.fail(f"the worker did not start: {process.communicate()[1]}")
        workers.append(Worker(process, announced[1], int(announced[2]), leash))
        return workers[-1]

    yield start
    for started in workers:
        for client in started.clients:
            client.socket.close()
        started.process.kill()
        started.process.communicate()


def test_a_worker_evaluates_the_tcl_it_is_sent(worker: StartWorker) -> None:
    client = worker().connect()
    assert client.ask("expr {6 * 7}") == "42"
    assert client.ask("set total 0; foreach n {1 2 3} {incr total $n}; return $total") == "6"
    assert client.ask("set nothing {}") == ""


def test_a_frame_may_come_in_any_pieces(worker: StartWorker) -> None:
    client = worker().connect()
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in frame("string length äö日本"):
        client.socket.sendall(bytes([byte]))
    assert client.receive() == "4"


def test_two_requests_in_one_segment_are_answered_in_order(worker: StartWorker) -> None:
    client = worker().connect()
    client.socket.sendall(frame("set n 1") + frame("") + frame("incr n") + frame("error third"))
    assert [client.receive() for _ in range(3)] == ["1", "2", "!TCL_ERROR third"]


def test_a_zero_length_frame_gets_no_answer(worker: StartWorker) -> None:
    client = worker().connect()
    client.send("")
    assert client.ask("set answered 1") == "1"


def test_a_client_that_half_closes_still_gets_its_answers(worker: StartWorker) -> None:
    client = worker().connect()
    client.socket.sendall(frame("set a 1") + frame("set b 2"))
    client.socket.shutdown(socket.SHUT_WR)
    assert [client.receive(), client.receive()] == ["1", "2"]
    assert client.at_end()


def test_lengths_count_bytes_and_not_characters(worker: StartWorker) -> None:
    client = worker().connect()
    text = "grüße 日本 😀"
    assert client.ask(f"set text {{{text}}}") == text
    assert client.ask("string range $text 0 4") == "grüße"


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("error {no such thing}", "!TCL_ERROR no such thing"),
        ("nosuchcommand", '!TCL_ERROR invalid command name "nosuchcommand"'),
        ("set x {", "!TCL_ERROR missing close-brace"),
        ("break", '!TCL_ERROR invoked "break" outside of a loop'),
        ("continue", '!TCL_ERROR invoked "continue" outside of a loop'),
        ("return -level 0 -code 7 x", "!TCL_ERROR command returned bad code: 7"),
        ("return early; error never", "early"),
    ],
)
def test_an_error_is_an_ordinary_frame_that_says_so(worker: StartWorker, script: str, answer: str) -> None:
    assert worker().connect().ask(script) == answer


def test_the_trace_of_an_error_can_be_asked_for_afterwards(worker: StartWorker) -> None:
    client = worker().connect()
    client.ask("proc outer {} {error deep}; outer")
    assert '(procedure "outer" line 1)' in client.ask("set errorInfo")


def test_all_clients_share_one_interpreter(worker: StartWorker) -> None:
    started = worker()
    started.connect().ask("set shared 17; proc twice n {expr {2 * $n}}")
    assert started.connect().ask("twice $shared") == "34"


def test_no_script_reaches_the_servers_own_variables(worker: StartWorker) -> None:
    client = worker().connect()
    assert client.ask("namespace exists ::local_worker") == "0"
    assert client.ask("lsort [array names env COMPUTE_BROKER_*]") == ""
    client.ask("foreach name [info commands] {if {$name ni {foreach rename if}} {rename $name {}}}")
    assert client.ask("foreach x {1} {}") == ""


def test_exit_ends_the_script_and_not_the_worker(worker: StartWorker) -> None:
    client = worker().connect()
    assert client.ask("set step 1; catch {exit 3}; set step 2") == ""
    assert client.ask("exit") == ""
    assert client.ask("set step") == "1"


def test_scripts_wait_for_each_other_even_in_the_event_loop(worker: StartWorker, tmp_path: Path) -> None:
    started = worker()
    entered = tmp_path / "entered"
    waiting, asking, third = started.connect(), started.connect(), started.connect()
    waiting.send(
        f"close [open {{{entered}}} w]; set log first;"
        " proc look {} {if {[file exists "
        + f"{{{tmp_path / 'go'}}}"
        + "]} {set ::go 1} else {after 5 look}};"
        " look; vwait go; lappend log done"
    )
    until(entered.exists)
    asking.send("lappend log second")
    third.send("lappend log third")
    (tmp_path / "go").touch()
    assert waiting.receive() == "first done"
    assert {asking.receive(), third.receive()} <= {
        "first done second",
        "first done third",
        "first done second third",
        "first done third second",
    }


def test_a_client_that_goes_away_in_mid_script_harms_nobody(worker: StartWorker, tmp_path: Path) -> None:
    started = worker()
    leaving = started.connect()
    leaving.socket.sendall(frame("set kept 1; after 20; string repeat x 5000000") + b"\0\0")
    leaving.socket.close()
    assert started.connect().ask("set kept") == "1"


def test_a_frame_of_many_megabytes_passes_both_ways(worker: StartWorker) -> None:
    client = worker().connect()
    text = "ä" * (FRAME_BYTES_MAX // 2 - 100)
    assert client.ask(f"set text {{{text}}}") == text


def test_a_client_that_asks_without_reading_is_not_served_on_credit(worker: StartWorker) -> None:
    started = worker()
    asking, watching = started.connect(), started.connect()
    watching.ask("set served 0")
    beyond_any_socket_buffer = 16_000_000
    for _ in range(4):
        asking.send(f"incr served; string repeat x {beyond_any_socket_buffer}")
    until(lambda: watching.ask("set served") == "1")
    assert {watching.ask("set served") for _ in range(50)} == {"1"}
    assert [len(asking.receive()) for _ in range(4)] == [beyond_any_socket_buffer] * 4


def test_a_frame_beyond_the_cap_is_refused_and_the_connection_closed(
    worker: StartWorker,
) -> None:
    client = worker().connect()
    client.socket.sendall(struct.pack(">I", FRAME_BYTES_MAX + 1) + b"x" * 1_000_000)
    assert client.receive() == (
        f"!TCL_ERROR a frame of {FRAME_BYTES_MAX + 1} bytes"
        f" is more than the {FRAME_BYTES_MAX} bytes a worker reads"
    )
    assert client.at_end()


def test_a_web_browser_is_refused_like_any_nonsense(worker: StartWorker) -> None:
    client = worker().connect()
    client.socket.sendall(b"GET / HTTP/1.0\r\n\r\n")
    assert client.receive().startswith("!TCL_ERROR a frame of 1195725856 bytes")


def test_a_result_beyond_the_cap_is_an_error_and_the_connection_goes_on(
    worker: StartWorker,
) -> None:
    client = worker().connect()
    assert client.ask(f"string repeat x {FRAME_BYTES_MAX + 1}").startswith(
        "!TCL_ERROR the result has 16777217 bytes"
    )
    assert client.ask("set still here") == "here"


def test_the_worker_serves_a_hundred_and_twenty_eight_connections_and_no_more(
    worker: StartWorker,
) -> None:
    started = worker()
    clients = [started.connect() for _ in range(128)]
    assert [client.ask("set n 1") for client in clients] == ["1"] * 128
    assert started.connect().at_end()
    clients[0].socket.close()
    until(lambda: _is_served(started))


def _is_served(started: Worker) -> bool:
    try:
        return started.connect().ask("set n 1") == "1"
    except (AssertionError, ConnectionError):
        return False


def test_an_address_that_is_taken_is_one_clear_line_and_exit_code_98(tclsh: str, worker: StartWorker) -> None:
    started = worker()
    environment = os.environ | {
        "COMPUTE_BROKER_ADDRESS": started.address,
        "COMPUTE_BROKER_PORT": str(started.port),
    }
    second = subprocess.run(
        [tclsh, str(WORKER)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode == 98
    assert second.stderr == (
        f"local_worker: cannot listen on {started.address}:{started.port}: address already in use\n"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("COMPUTE_BROKER_PORT", "65536"),
        ("COMPUTE_BROKER_PORT", "http"),
        ("COMPUTE_BROKER_LEASH_SECONDS", "0"),
        ("COMPUTE_BROKER_LEASH_CHECK_MS", "-1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(tclsh: str, key: str, value: str) -> None:
    refused = subprocess.run(
        [tclsh, str(WORKER)],
        env=os.environ | {key: value},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert refused.returncode == 64
    assert f'{key} is "{value}"' in refused.stderr


# --- the leash -----------------------------------------------------------------------------------------


def test_a_worker_whose_leash_file_is_removed_ends_itself(worker: StartWorker) -> None:
    started = worker()
    client = started.connect()
    assert client.ask("set n 1") == "1"
    started.leash.unlink()
    assert started.ends() == (
        0,
        "local_worker: the leash file is gone; nobody can release this worker any more, so it ends\n",
    )


def test_a_worker_whose_leash_file_is_not_touched_ends_itself(
    worker: StartWorker,
) -> None:
    code, said = worker(leash_seconds=1).ends()
    assert code == 0
    assert "was not touched for 1 s" in said


def test_a_worker_that_finds_a_leash_too_old_at_its_start_ends_itself(
    worker: StartWorker,
) -> None:
    assert worker(leash_seconds=300, leash_mtime=time.time() - 301).ends()[0] == 0


def test_a_worker_whose_leash_file_is_set_back_into_the_past_ends_itself(
    worker: StartWorker,
) -> None:
    started = worker(leash_seconds=300)
    started.connect().ask("set n 1")
    os.utime(started.leash, (0, 0))
    assert started.ends()[0] == 0


def test_a_worker_lives_as_long_as_its_leash_is_touched(worker: StartWorker) -> None:
    started = worker(leash_seconds=1)
    client = started.connect()
    before = int(client.ask("clock milliseconds"))
    touches = 0
    while int(client.ask("clock milliseconds")) < before + 2000:
        touches += 1
        touched = time.time() + touches  # whole seconds apart, as far as the worker can see
        os.utime(started.leash, (touched, touched))
    assert started.process.poll() is None


def test_a_wall_clock_that_jumps_an_hour_ahead_ends_no_worker(worker: StartWorker, tmp_path: Path) -> None:
    jump = tmp_path / "jump"
    with_a_clock_that_jumps = tmp_path / "worker.tcl"
    with_a_clock_that_jumps.write_text(
        "rename clock wall_clock\n"
        f"proc clock {{unit}} {{expr {{[wall_clock $unit] + ([file exists {{{jump}}}] ? 3600000 : 0)}}}}\n"
        f"source {{{WORKER}}}\n"
    )
    started = worker(leash_seconds=300, program=with_a_clock_that_jumps)
    client = started.connect()
    before = int(client.ask("clock milliseconds"))
    jump.touch()
    until(lambda: int(client.ask("clock milliseconds")) > before + 200)  # several looks later
    assert started.process.poll() is None
    touched_just_before_the_jump = started.leash.stat().st_mtime + 1
    os.utime(started.leash, (touched_just_before_the_jump, touched_just_before_the_jump))
    until(lambda: int(client.ask("clock milliseconds")) > before + 400)
    assert started.process.poll() is None


def test_a_script_may_compute_through_many_looks_at_the_leash(worker: StartWorker) -> None:
    script = "set end [expr {[clock milliseconds] + 200}]; while {[clock milliseconds] < $end} {}; set done 1"
    assert worker().connect().ask(script) == "1"


def test_the_leash_holds_a_script_that_computes_for_ever(worker: StartWorker) -> None:
    started = worker()
    started.connect().send("while 1 {incr n}")
    started.leash.unlink()
    assert started.ends()[0] == 0


def test_the_leash_holds_a_script_that_waits_for_ever(worker: StartWorker) -> None:
    started = worker()
    started.connect().send("catch {vwait never}; while 1 {catch {after 100000}}")
    started.leash.unlink()
    assert started.ends()[0] == 0


def test_a_worker_without_a_leash_file_has_no_leash(tclsh: str) -> None:
    environment = os.environ | {
        "COMPUTE_BROKER_PORT": "0",
        "COMPUTE_BROKER_LEASH_CHECK_MS": "1",
    }
    process = subprocess.Popen(
        [tclsh, str(WORKER)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        client = Client("127.0.0.1", port)
        before = client.ask("clock milliseconds")
        until(lambda: int(client.ask("clock milliseconds")) > int(before) + 50)
        client.socket.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_SECONDS_MAX)
    assert process.returncode == -signal.SIGTERM


def until(condition: Callable[[], bool]) -> None:
    """Returns when `condition` holds. Fails when it does not within PATIENCE_SECONDS_MAX."""
    deadline = time.monotonic() + PATIENCE_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
