"""Processes of this machine: how a worker's is started, known again, and ended with all that it started.

A process is known by its pid and by when it started, counted from the machine's boot so that a jump of the
wall clock does not change it; or by its environment, which names its instance and its leash. A process that
neither of the two knows is a stranger, whatever its pid, and is never signalled.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

INSTANCE = "COMPUTE_BROKER_INSTANCE"
PARAMETERS = "COMPUTE_BROKER_PARAMETERS"
ADDRESS = "COMPUTE_BROKER_ADDRESS"
PORT = "COMPUTE_BROKER_PORT"
LEASH_FILE = "COMPUTE_BROKER_LEASH_FILE"
LEASH_SECONDS = "COMPUTE_BROKER_LEASH_SECONDS"

# What a program needs to run at all. Nothing else of the broker's environment: it may hold cloud credentials,
# and whoever reaches a worker may read the worker's.
ENVIRON_KEPT = frozenset({"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR"}) | {
    "LD_LIBRARY_PATH",
    "TCLLIBPATH",
}
STARTED_SECONDS_TOLERANCE = 0.005  # Linux counts in hundredths (proc(5), starttime)


def plain_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What of the broker's environment a worker inherits."""
    kept = {key: value for key, value in environ.items() if key in ENVIRON_KEPT or key.startswith("LC_")}
    return {"PATH": os.defpath, **kept}


def spawn(argv: Sequence[str], environ: Mapping[str, str], log_file: Path) -> int:
    """Start a program in a session of its own, so that it outlives this process. Raises OSError."""
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        child = subprocess.Popen(  # noqa: S603  # what runs is the operator's setting, and no shell reads it
            argv,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    child.returncode = (
        0  # Popen would complain about a child that outlives it; `reap` collects the real status
    )
    return child.pid


def reap(pid: int) -> str:
    """How a child of this process ended; empty when it still runs or is somebody else's child."""
    with suppress(ChildProcessError):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    return ""


def running(pid: int) -> bool:
    """Whether there is such a process, and it is more than an entry that waits to be reaped."""
    try:
        return psutil.Process(pid).status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.NoSuchProcess:
        return False


def started_seconds(pid: int) -> float | None:
    """Seconds from the machine's boot to the start of the process; None when there is none."""
    boot_unix = psutil.boot_time()  # asked first: older psutil count a start from the boot time asked last
    try:
        return psutil.Process(pid).create_time() - boot_unix
    except psutil.Error:
        return None


def started_at(pid: int, seconds: float) -> bool:
    """Whether the process started at that moment after the boot."""
    found = started_seconds(pid)
    return found is not None and abs(found - seconds) < STARTED_SECONDS_TOLERANCE


def environ_of(pid: int) -> Mapping[str, str]:
    """The environment that the process was started with; empty where it cannot be read."""
    try:
        return psutil.Process(pid).environ()
    except (psutil.Error, OSError):
        return {}


def belongs(environ: Mapping[str, str], instance_id: str, leash_file: Path) -> bool:
    """Whether a process with this environment was started as that machine, or by it."""
    return environ.get(INSTANCE) == instance_id and environ.get(LEASH_FILE) == str(leash_file)


def session_leaders() -> Iterator[int]:
    """Every process of this user that leads a session, as each worker's does."""
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(pid) == pid and psutil.Process(pid).uids().real == os.getuid():
                yield pid


def signal_group(pid: int, signum: signal.Signals) -> None:
    """Signal a worker and what it has started. The caller knows whose pid it is."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def kill_remains(pid: int, instance_id: str, leash_file: Path) -> None:
    """End what a worker that has ended left behind: its process group, and whoever else has its environment.

    A pid is not given to a new process while a group of that number exists; so, as long as no process runs
    under it, the group is the worker's.
    """
    if not running(pid):
        signal_group(pid, signal.SIGKILL)
    for other in psutil.pids():
        if other != os.getpid() and belongs(environ_of(other), instance_id, leash_file):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(other, signal.SIGKILL)
