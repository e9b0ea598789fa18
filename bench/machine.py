"""What the numbers were measured on, and which core does what.

A number without its machine says nothing, so every result carries this. Server and load generator each get a
core of their own when there are two, the same ones for every peer, so that the scheduler cannot favour one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    measured_at: str
    cpu: str
    cores: int
    kernel: str
    python: str
    uvloop: str
    redis: str
    beanstalkd: str
    load_average: float

    @classmethod
    def now(cls) -> Machine:
        return cls(
            measured_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            cpu=_cpu_name(),
            cores=len(os.sched_getaffinity(0)),
            kernel=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            uvloop=metadata.version("uvloop"),
            redis=_version("redis-server", "--version"),
            beanstalkd=_version("beanstalkd", "-v"),
            load_average=os.getloadavg()[0],
        )


@dataclass(frozen=True)
class Cores:
    """The core of every server and the core of the load generator; None where there is nothing to choose."""

    server: int | None
    generator: int | None

    @classmethod
    def choose(cls) -> Cores:
        available = sorted(os.sched_getaffinity(0))
        return cls(available[0], available[1]) if len(available) >= 2 else cls(None, None)

    def describe(self) -> str:
        if self.server is None:
            return "One core only: servers and load generator share it, so ratios lean towards 1."
        return f"Every server is pinned to core {self.server}, the load generator to core {self.generator}."


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Processes started inside inherit the core, with every thread they make later."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def raise_file_limit() -> int:
    """Raises our own limit on open files, and so that of every server we start; returns it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(command: str, flag: str) -> str:
    """The first number with a dot that the program says about itself."""
    if shutil.which(command) is None:
        return "missing"
    said = subprocess.run([command, flag], capture_output=True, text=True, timeout=10, check=False)
    words = (said.stdout + said.stderr).replace("=", " ").split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
