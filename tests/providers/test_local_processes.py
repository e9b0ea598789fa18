"""Processes: known again, never mistaken, ended with what they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from broker.providers import local_processes as processes

WAIT_SECONDS_MAX = 10.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def a_pid_that_was() -> int:
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    child.wait()
    return child.pid


def test_a_spawned_program_leads_a_session_and_appends_to_its_log(tmp_path: Path) -> None:
    log_file = tmp_path / "log"
    log_file.write_text("before\n")
    argv = ["/bin/sh", "-c", 'cat; echo "$WORD"; echo trouble >&2; exit 3']
    pid = processes.spawn(argv, {"WORD": "out", "PATH": os.defpath}, log_file)
    assert os.getsid(pid) == pid

    until(lambda: not processes.running(pid))
    assert log_file.read_text() == "before\nout\ntrouble\n"
    assert processes.reap(pid) == "exit status 3"
    assert processes.reap(pid) == ""  # it is nobody's child any more


def test_a_process_is_known_by_when_it_started(tmp_path: Path) -> None:
    pid = processes.spawn(["sleep", "600"], os.environ, tmp_path / "log")
    started = processes.started_seconds(pid)
    assert started is not None
    assert processes.started_at(pid, started)
    assert not processes.started_at(pid, started - 0.01)
    assert pid in set(processes.session_leaders())
    assert processes.reap(pid) == ""

    processes.signal_group(pid, signal.SIGTERM)
    until(lambda: not processes.running(pid))
    assert processes.started_at(pid, started), "a zombie keeps its identity"
    assert processes.reap(pid) == "killed by SIGTERM"
    assert not processes.started_at(pid, started)


def test_the_start_of_a_process_is_told_from_the_boot_of_the_machine() -> None:
    started = processes.started_seconds(os.getpid())
    assert started is not None
    assert abs(started + psutil.boot_time() - psutil.Process().create_time()) < 0.001
    assert 0 <= started < time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_process_that_is_gone_is_nobody() -> None:
    pid = a_pid_that_was()
    assert not processes.running(pid)
    assert processes.started_seconds(pid) is None
    assert processes.environ_of(pid) == {}
    processes.signal_group(pid, signal.SIGKILL)
    processes.kill_remains(pid, "local-1", Path("/nonexistent"))


def test_a_process_belongs_by_its_instance_and_its_leash_together() -> None:
    environ = {processes.INSTANCE: "local-1", processes.LEASH_FILE: "/state/local-1.json"}
    assert processes.belongs(environ, "local-1", Path("/state/local-1.json"))
    assert not processes.belongs(environ, "local-1", Path("/other/local-1.json"))
    assert not processes.belongs(environ, "local-2", Path("/state/local-1.json"))
    assert not processes.belongs({}, "local-1", Path("/state/local-1.json"))


def test_a_worker_without_a_path_in_the_brokers_environment_has_the_usual_one() -> None:
    assert processes.plain_environ({"LC_ALL": "C", "AWS_PROFILE": "x"}) == {
        "PATH": os.defpath,
        "LC_ALL": "C",
    }
