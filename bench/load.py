"""Runs the C load generator and reads its one line of JSON: the only place that knows its command line."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.machine import Cores, pinned
from bench.peers import Peer

SOURCE = Path(__file__).with_name("load.c")
BINARY = Path(__file__).with_name("load")
# Beyond the seconds asked for: starting, draining, a machine that is busy with other things.
GRACE_SECONDS = 20.0
# What a core does when it is not free. A process's own time includes the interrupts it works off.
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
# New connections in one slice. Each leaves a port in TIME_WAIT for a minute on one of eight source addresses.
CONNECTS_MAX = 60_000


@dataclass(frozen=True)
class Slice:
    """One short measurement of one peer. `seconds` and all counts are without the warm-up."""

    requests: int
    seconds: float
    rps: float
    p50_us: float
    p99_us: float
    max_us: float
    errors: int
    first_error: str
    generator_cpu_share: float
    server_cpu_share: float
    others_cpu_share: float  # what other programs took of the cores in use, as a share of one core

    @property
    def per_cpu_second(self) -> float:
        """Answers for each second that the server computed: what it would do if it alone set the pace."""
        return self.rps / self.server_cpu_share if self.server_cpu_share else 0.0

    @property
    def sound(self) -> bool:
        return self.errors == 0 and self.requests > 0


def build() -> None:
    """Compiles the generator when it is older than its source."""
    if not BINARY.exists() or BINARY.stat().st_mtime < SOURCE.stat().st_mtime:
        subprocess.run(
            ["cc", "-O2", "-Wall", "-Wextra", "-o", str(BINARY), str(SOURCE)], check=True, timeout=120
        )


def run(peer: Peer, mode: str, cores: Cores, *, connections: int, seconds: float, warmup_seconds: float,
        depth: int = 1, rate_per_second: float = 1000.0) -> Slice:  # fmt: skip
    command = [
        str(BINARY), mode, "--port", str(peer.port), "--request", peer.request, "--reply", peer.reply,
        "--connections", str(connections), "--depth", str(depth), "--rate", str(rate_per_second),
        "--seconds", str(seconds), "--warmup", str(warmup_seconds), "--connects-max", str(CONNECTS_MAX),
    ]  # fmt: skip
    before = _Cpu.now(peer, cores)
    with pinned(cores.generator):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=seconds + warmup_seconds + GRACE_SECONDS)
    finally:
        process.kill()  # harmless once it has ended by itself
    if process.returncode != 0:
        raise RuntimeError(f"the load generator failed on {peer.name} with status {process.returncode}")
    after = _Cpu.now(peer, cores)
    server, others = after.shares_since(before)
    return Slice(server_cpu_share=server, others_cpu_share=others, **json.loads(output))


class IdleFailed(Exception):
    """The idle connections could not all be opened; the message says how many and why."""


@dataclass
class Idle:
    """Idle connections that are being held. `still_open` is known once they have been let go."""

    opened: int
    still_open: int = -1


@contextlib.contextmanager
def idle(port: int, connections: int, cores: Cores) -> Iterator[Idle]:
    with pinned(cores.generator):
        process = subprocess.Popen(
            [str(BINARY), "idle", "--port", str(port), "--connections", str(connections)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        first_line = process.stdout.readline()
        if not first_line:
            raise IdleFailed(f"the load generator could not open {connections} idle connections")
        said = json.loads(first_line)
        if said["open"] != connections:
            raise IdleFailed(f"{said['open']} of {connections} opened: {said['first_error']}")
        held = Idle(opened=said["open"])
        yield held
        process.stdin.close()
        held.still_open = json.loads(process.stdout.readline())["still_open"]
        process.wait(GRACE_SECONDS)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class _Cpu:
    """Processor seconds spent so far: by the server, by load generators that have ended, by anyone."""

    at: float
    server: float
    generator: float
    anyone: float

    @classmethod
    def now(cls, peer: Peer, cores: Cores) -> _Cpu:
        server, children = psutil.Process(peer.pid).cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
        every_core = psutil.cpu_times(percpu=True)
        used = [core for core in (cores.server, cores.generator) if core is not None]
        anyone = sum(
            sum(getattr(every_core[core], kind) for kind in BUSY) for core in used or os.sched_getaffinity(0)
        )
        generator = children.ru_utime + children.ru_stime
        return cls(time.monotonic(), server.user + server.system, generator, anyone)

    def shares_since(self, before: _Cpu) -> tuple[float, float]:
        """The server's share of a core since then, and that of programs which are no part of this."""
        seconds = self.at - before.at
        server, generator = self.server - before.server, self.generator - before.generator
        others = max(0.0, self.anyone - before.anyone - server - generator)
        return round(server / seconds, 3), round(others / seconds, 3)
