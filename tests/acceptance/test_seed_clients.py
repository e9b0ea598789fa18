"""The clients of the published setup guide, as their readers have typed them, against the embedded default.

The programs are the guide's, character for character. What a reader must replace is replaced (the broker's
host and port), and where the guide leaves a comment for the reader's own work, there is some: a script for
the worker's port 2560, in dserv's framing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.broker_process import BrokerProcess, BrokerProcesses, bare_environment, eventually

SECONDS_MAX = 60.0

TCL_REQUEST = """\
set sock [socket $broker_host 9000]
puts $sock "GET_WORKER"
flush $sock
gets $sock worker_ip
close $sock

puts "Got worker at: $worker_ip"

# Now connect to worker for actual compute
set worker_sock [socket $worker_ip 2560]
# ... your dserv protocol ...
close $worker_sock
"""

TCL_RELEASE = """\
set sock [socket $broker_host 9000]
puts $sock "RELEASE $worker_ip"
flush $sock
gets $sock response  ;# Should get "OK"
close $sock
"""

PYTHON_CLIENT = """\
import socket

# Get worker
sock = socket.socket()
sock.connect(('broker_host', 9000))
sock.send(b'GET_WORKER\\n')
worker_ip = sock.recv(1024).decode().strip()
sock.close()

print(f"Worker IP: {worker_ip}")

# ... do work on worker_ip:2560 ...

# Release worker
sock = socket.socket()
sock.connect(('broker_host', 9000))
sock.send(f'RELEASE {worker_ip}\\n'.encode())
sock.close()
"""

# What a reader writes where the guide has a comment.
TCL_COMMENT = "# ... your dserv protocol ...\n"
TCL_WORK = """\
fconfigure $worker_sock -translation binary
set script [encoding convertto utf-8 {join [list [expr {6 * 7}] "naïve"] /}]
puts -nonewline $worker_sock [binary format Ia* [string length $script] $script]
flush $worker_sock
binary scan [read $worker_sock 4] I length
fconfigure stdout -encoding utf-8
puts "Worker says: [encoding convertfrom utf-8 [read $worker_sock $length]]"
"""
PYTHON_COMMENT = "# ... do work on worker_ip:2560 ...\n"
PYTHON_WORK = """\
script = 'join [list [expr {6 * 7}] "naïve"] /'.encode()
worker = socket.create_connection((worker_ip, 2560))
worker.sendall(len(script).to_bytes(4, 'big') + script)
answer = worker.makefile('rb')
print('Worker says:', answer.read(int.from_bytes(answer.read(4), 'big')).decode())
worker.close()
"""
ANSWER = "Worker says: 42/naïve"


@pytest.fixture
def broker(brokers: BrokerProcesses) -> BrokerProcess:
    """The embedded default, on ports of its own."""
    return brokers.start({})


def run(program: list[str], text: str, directory: Path) -> str:
    """What a program prints; it must end well and say nothing on stderr."""
    script = directory / "client"
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [*program, str(script)],
        env=bare_environment(directory),
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS_MAX,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def run_tcl(text: str, broker: BrokerProcess, directory: Path) -> str:
    program = shutil.which("tclsh") or shutil.which("tclsh8.6")
    assert program, "tclsh is needed: apt install tcl"
    typed = text.replace(" 9000]", f" {broker.port}]")
    return run([program, "-encoding", "utf-8"], f"set broker_host {broker.host}\n{typed}", directory)


def run_python(text: str, broker: BrokerProcess, directory: Path) -> str:
    typed = text.replace("('broker_host', 9000)", f"('{broker.host}', {broker.port})")
    return run([sys.executable], typed, directory)


def assert_released(broker: BrokerProcess, address: str) -> None:
    eventually(lambda: not broker.local_workers(), what="the worker's process has ended")
    assert broker.ask(f"PING {address}") == "ERROR: Worker not found"


def test_the_tcl_client_of_the_guide_works_as_it_is(broker: BrokerProcess, tmp_path: Path) -> None:
    said = run_tcl(f"{TCL_REQUEST}\n{TCL_RELEASE}", broker, tmp_path)
    address = said.removeprefix("Got worker at: ").strip()
    assert address.startswith("127.")
    assert_released(broker, address)


def test_the_tcl_client_of_the_guide_computes_on_its_worker(broker: BrokerProcess, tmp_path: Path) -> None:
    assert TCL_COMMENT in TCL_REQUEST
    request = TCL_REQUEST.replace(TCL_COMMENT, TCL_WORK)
    said = run_tcl(f'{request}\n{TCL_RELEASE}\nputs "Released: $response"', broker, tmp_path).splitlines()
    assert said[1:] == [ANSWER, "Released: OK"]
    assert_released(broker, said[0].removeprefix("Got worker at: "))


def test_the_python_client_of_the_guide_works_as_it_is(broker: BrokerProcess, tmp_path: Path) -> None:
    address = run_python(PYTHON_CLIENT, broker, tmp_path).removeprefix("Worker IP: ").strip()
    assert address.startswith("127.")
    assert_released(broker, address)


def test_the_python_client_of_the_guide_computes_on_its_worker(broker: BrokerProcess, tmp_path: Path) -> None:
    assert PYTHON_COMMENT in PYTHON_CLIENT
    text = PYTHON_CLIENT.replace(PYTHON_COMMENT, PYTHON_WORK)
    said = run_python(text, broker, tmp_path).splitlines()
    assert said[1:] == [ANSWER]
    assert_released(broker, said[0].removeprefix("Worker IP: "))


def test_both_clients_share_one_worker_as_the_guide_says(broker: BrokerProcess, tmp_path: Path) -> None:
    request = PYTHON_CLIENT.partition("# Release worker")[0]
    first = run_tcl(TCL_REQUEST, broker, tmp_path).removeprefix("Got worker at: ").strip()
    second = run_python(request, broker, tmp_path).removeprefix("Worker IP: ").strip()
    assert first == second
    assert len(broker.local_workers()) == 1
