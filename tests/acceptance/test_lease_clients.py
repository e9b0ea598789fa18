"""Every shipped client and a real broker: leases over real sockets, on local workers.

Four kinds of clients do the same: the blocking and the async Python client, the command line, the Tcl
package. `Asking` is one that asks and goes; a `Holder` is a process of its own that holds a lease by its
connection, says on stdout what it is told, and gives the lease back when it is told to.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from broker import BrokerError, Client, LeaseHasEnded
from tests.support.broker_process import BrokerProcess, bare_environment, eventually, run_command
from tests.support.fake_broker import Looped
from tests.support.programs import tclsh

TCL_PACKAGE = Path(__file__).resolve().parents[2] / "clients" / "tcl"
KINDS = ["blocking", "async", "cli", "tcl"]
SECONDS_MAX = 20.0
FAIRLY_LONG = "60s"  # no lease of these tests ends by its time, however slow the machine
EXCLUSIVE = {"sharing": "exclusive", "idle_timeout": FAIRLY_LONG}
TABLES: dict[str, dict[str, object]] = {
    "pool.default": {"max_workers": 1, "idle_timeout": FAIRLY_LONG},
    "pool.one": {**EXCLUSIVE, "max_workers": 1},
    "pool.three": {**EXCLUSIVE, "max_workers": 3},
}

Leases = list[tuple[str, str]]  # id, address


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    with BrokerProcess(tmp_path_factory.mktemp("leases"), TABLES) as process:
        yield process
        assert process.faults() == []


@pytest.fixture(params=KINDS)
def asking(request: pytest.FixtureRequest, broker: BrokerProcess) -> Asking:
    kinds: dict[str, type[Asking]] = {"blocking": Blocking, "async": InALoop, "cli": CommandLine, "tcl": Tcl}
    return kinds[request.param](broker)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def leases_of(broker: BrokerProcess, pool: str) -> int:
    return sum(row["leases"] for row in broker.status() if row["pool"] == pool)


# --- clients that ask and go --------------------------------------------------------------------------------


class Asking:
    """What each kind can do. An error is returned as its line on the wire."""

    def __init__(self, broker: BrokerProcess) -> None:
        self.broker = broker

    def acquire(self, pool: str, count: int, least: int, wait: float) -> Leases | str:
        raise NotImplementedError

    def about(self, verb: str, lease_id: str) -> str:
        """The reply to RENEW or DONE."""
        raise NotImplementedError


class Blocking(Asking):
    client_type: Any = Client

    def acquire(self, pool: str, count: int, least: int, wait: float) -> Leases | str:
        client = self.client_type(self.broker.host, self.broker.port)
        try:
            leases = client.acquire(pool=pool, count=count, min=least, wait=wait)
        except BrokerError as error:
            return error.wire()
        return [(lease.id, lease.address) for lease in leases]

    def about(self, verb: str, lease_id: str) -> str:
        client = self.client_type(self.broker.host, self.broker.port)
        try:
            getattr(client, verb.lower())(lease_id)
        except LeaseHasEnded as error:
            return error.wire()
        return "OK"


class InALoop(Blocking):
    client_type = Looped


class CommandLine(Asking):
    def acquire(self, pool: str, count: int, least: int, wait: float) -> Leases | str:
        options = ["--pool", pool, "--count", count, "--min", least, "--wait", wait, "--json"]
        done = self._run("acquire", *map(str, options))
        if done.returncode:
            return self._error(done)
        return [(lease["id"], lease["address"]) for lease in json.loads(done.stdout)]

    def about(self, verb: str, lease_id: str) -> str:
        done = self._run(verb.lower(), lease_id)
        return self._error(done) if done.returncode else str(done.stdout).strip()

    def _run(self, command: str, *arguments: str) -> Any:
        place = f"{self.broker.host}:{self.broker.port}"
        return run_command([command, "--broker", place, *arguments], self.broker.directory)

    def _error(self, done: Any) -> str:
        assert done.returncode == 1, done.stderr
        return str(done.stderr).strip().splitlines()[-1].replace("compute-broker: ", "ERROR: ", 1)


class Tcl(Asking):
    def acquire(self, pool: str, count: int, least: int, wait: float) -> Leases | str:
        said = self._run(f"acquire -pool {pool} -count {count} -min {least} -wait {wait}")
        if said.startswith("ERROR"):
            return said
        words = self._run(
            f"lmap lease {{{said}}} {{list [dict get $lease id] [dict get $lease ip]}}", package=""
        )
        return [(one, two) for one, two in (pair.split() for pair in words.strip("{}").split("} {"))]

    def about(self, verb: str, lease_id: str) -> str:
        return self._run(f"{verb.lower()} {lease_id}")

    def _run(self, command: str, package: str = "compute_broker::") -> str:
        script = (
            "package require compute_broker\n"
            f"if {{[catch {{{package}{command}}} result how]}} {{\n"
            '    puts "ERROR: $result \\[[lindex [dict get $how -errorcode] 1]\\]"\n'
            "} else {puts $result}\n"
        )
        done = subprocess.run(
            [tclsh()], input=script, env=environment(self.broker), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def environment(broker: BrokerProcess) -> dict[str, str]:
    return bare_environment(broker.directory / "home") | {
        "TCLLIBPATH": str(TCL_PACKAGE),
        "COMPUTE_BROKER_HOST": broker.host,
        "COMPUTE_BROKER_PORT": str(broker.port),
    }


def test_leases_are_acquired_renewed_and_given_back_each_once(asking: Asking) -> None:
    leases = asking.acquire("three", 2, 2, 20)
    assert isinstance(leases, list), leases
    (first, one), (second, two) = leases
    assert (first != second, one != two) == (True, True), "held alone: on different workers"
    assert leases_of(asking.broker, "three") == 2
    assert [asking.about("RENEW", first), asking.about("DONE", first)] == ["OK", "OK"]
    ended = "ERROR: that lease has ended [DENIED]"
    assert [asking.about("RENEW", first), asking.about("DONE", first)] == [ended, ended]
    assert leases_of(asking.broker, "three") == 1
    assert asking.about("DONE", second) == "OK"


def test_as_many_as_can_be_had_when_the_wait_is_over_or_else_none(asking: Asking) -> None:
    taken = asking.broker.ask("ACQUIRE pool=three client=ada").split()[1].removeprefix("id=")
    refused = asking.acquire("three", 3, 3, 0.3)
    assert isinstance(refused, str)
    assert refused.endswith("[TIMEOUT]")
    assert leases_of(asking.broker, "three") == 1
    leases = asking.acquire("three", 3, 2, 1.5)
    assert isinstance(leases, list), leases
    assert len({address for _, address in leases}) == 2
    for lease_id in (taken, *(lease_id for lease_id, _ in leases)):
        assert asking.about("DONE", lease_id) == "OK"


# --- clients that hold ------------------------------------------------------------------------------------

BLOCKING_SCRIPT = """
import sys, broker
say = lambda *words: print(*words, flush=True)
with broker.acquire(
    pool=sys.argv[1], renew_seconds=0.3,
    on_pending=lambda pending: say("waiting", pending.position, pending.code),
    on_notice=lambda notice: say(notice.what, notice.lease, notice.reason),
    on_lost=lambda lease: say("ended", lease.id),
) as lease:
    say("holds", lease.address)
    sys.stdin.readline()
"""
ASYNC_SCRIPT = """
import asyncio, sys, broker
say = lambda *words: print(*words, flush=True)
async def main():
    async with broker.aacquire(
        pool=sys.argv[1], renew_seconds=0.3,
        on_pending=lambda pending: say("waiting", pending.position, pending.code),
        on_notice=lambda notice: say(notice.what, notice.lease, notice.reason),
        on_lost=lambda lease: say("ended", lease.id),
    ) as lease:
        say("holds", lease.address)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
asyncio.run(main())
"""
TCL_SCRIPT = """
package require compute_broker
proc say {args} {puts [join $args]; flush stdout}
proc waiting {pending} {say waiting [dict get $pending position] [dict get $pending code]}
proc noticed {notice} {dict with notice {say $what $lease $reason}}
compute_broker configure -keep_alive 0.3 -log ""
set ::compute_broker::watch_again_ms 100
set watch [compute_broker watch -command noticed]
set lease [compute_broker acquire -pool [lindex $argv 0] -hold connection -on_pending waiting \\
    -on_lost {say ended}]
say holds [dict get $lease ip]
fileevent stdin readable {gets stdin ::over}
vwait ::over
catch {compute_broker done [dict get $lease id]}
compute_broker unwatch $watch
"""
SHELL = 'echo "holds ${COMPUTE_BROKER_WORKER%:*}"; read over'


class Program:
    """A client in a process of its own, ended with the test. What it says comes line by line."""

    def __init__(self, command: list[str], broker: BrokerProcess) -> None:
        self._heard = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(broker),
            cwd=broker.directory,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def hears(self, *words: str) -> str:
        """The next line with all these words in it; lines before it are passed over."""
        ends_at = time.monotonic() + SECONDS_MAX
        while True:  # time, or the end of the process, ends it
            line, newline, rest = self._heard.partition(b"\n")
            if newline:
                self._heard = rest
                if all(word in line.decode() for word in words):
                    return line.decode()
                continue
            assert self._process.stdout is not None
            left = ends_at - time.monotonic()
            data = b""
            if left > 0 and select.select([self._process.stdout], [], [], left)[0]:
                data = os.read(self._process.stdout.fileno(), 4096)
            assert data, f"no {words} within {SECONDS_MAX:g} s, only {self._heard!r}"
            self._heard += data


class Holder(Program):
    """It holds a lease by its connection until `give_back`, or until it is killed."""

    def __init__(self, kind: str, broker: BrokerProcess, pool: str) -> None:
        super().__init__(
            {
                "blocking": [sys.executable, "-c", BLOCKING_SCRIPT, pool],
                "async": [sys.executable, "-c", ASYNC_SCRIPT, pool],
                "cli": [sys.executable, "-m", "broker", "acquire", "--pool", pool, "--", "sh", "-c", SHELL],
                "tcl": [tclsh(), script(broker, "holder.tcl", TCL_SCRIPT), pool],
            }[kind],
            broker,
        )

    def holds(self) -> str:
        """The address of its worker, once it has one."""
        return self.hears("holds").split()[1]

    def give_back(self) -> None:
        """Leaves its block, and has ended in order."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        assert self._process.wait(SECONDS_MAX) == 0

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def script(broker: BrokerProcess, name: str, text: str) -> str:
    """A file with that text: not every interpreter takes it as an argument."""
    path = broker.directory / name
    path.write_text(text)
    return str(path)


def test_a_client_that_is_killed_has_given_its_worker_to_who_waits(kind: str, broker: BrokerProcess) -> None:
    with Holder(kind, broker, "one") as first:
        address = first.holds()
        with Holder(kind, broker, "one") as second:
            second.hears("waiting", "1", "LIMIT")
            first.kill()
            assert second.holds() == address
            second.give_back()
    assert leases_of(broker, "one") == 0


def test_a_client_hears_that_its_worker_is_taken_from_it(kind: str, broker: BrokerProcess) -> None:
    with Holder(kind, broker, "one") as holder:
        assert broker.ask(f"RELEASE {holder.holds()} force client=root") == "OK"
        holder.hears("drain", "released")
        holder.hears("ended")
        holder.give_back()


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_every_client_keeps_its_lease_over_a_restart_of_the_broker(broker: BrokerProcess, end: str) -> None:
    holders = [Holder(kind, broker, "default") for kind in KINDS]
    try:
        (address,) = {holder.holds() for holder in holders}
        assert leases_of(broker, "default") == len(KINDS)
        getattr(broker, end)()
        broker.start()
        assert leases_of(broker, "default") == len(KINDS)
        for holder in holders:
            holder.give_back()
        assert leases_of(broker, "default") == 0
        assert broker.ask("GET_WORKER client=ada") == address, "given back warm"
        assert broker.ask(f"RELEASE {address} client=ada") == "OK"
    finally:
        for holder in holders:
            holder.__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["blocking", "async", "tcl"])
def test_notices_come_after_a_restart_of_the_broker_too(kind: str, broker: BrokerProcess) -> None:
    with Holder(kind, broker, "one") as holder:
        address = holder.holds()
        broker.kill()
        broker.start()
        eventually(lambda: broker.metric("compute_broker_commands_total", command="WATCH") == 1)
        assert broker.ask(f"RELEASE {address} force client=root") == "OK"
        holder.hears("drain", "released")
        holder.hears("ended")
        holder.give_back()


# --- clients that watch -------------------------------------------------------------------------------------

WATCH_SCRIPT = """
import broker
for notice in broker.Client(client="ada").watch():
    print(notice.what, notice.address, notice.reason, flush=True)
"""
ASYNC_WATCH_SCRIPT = """
import asyncio, broker
async def main():
    async for notice in broker.AsyncClient(client="ada").watch():
        print(notice.what, notice.address, notice.reason, flush=True)
asyncio.run(main())
"""
WATCHERS = {
    "blocking": [sys.executable, "-c", WATCH_SCRIPT],
    "async": [sys.executable, "-c", ASYNC_WATCH_SCRIPT],
    "cli": [sys.executable, "-m", "broker", "watch", "--client", "ada"],
}


@pytest.mark.parametrize("kind", WATCHERS)
def test_who_watches_is_told_before_and_after_a_restart_of_the_broker(
    kind: str, broker: BrokerProcess
) -> None:
    def is_told(watching: Program, watches_before: float) -> None:
        eventually(lambda: watches() > watches_before)
        address = broker.ask("GET_WORKER pool=one client=ada")
        assert broker.ask(f"RELEASE {address} force client=root") == "OK"
        watching.hears("drain", address, "released")

    def watches() -> float:
        return broker.metric("compute_broker_commands_total", command="WATCH")

    before = watches()
    with Program(WATCHERS[kind], broker) as watching:
        is_told(watching, before)
        broker.kill()
        broker.start()
        is_told(watching, 0.0)


# --- one connection, many lines ---------------------------------------------------------------------------


def ids_of(lines: list[str]) -> list[str]:
    return [line.split()[1].removeprefix("id=") for line in lines]


def test_a_thousand_leases_are_given_back_in_one_breath(broker: BrokerProcess) -> None:
    client = Client(broker.host, broker.port)
    leases = client.acquire(count=1000)
    assert len({lease.id for lease in leases}) == 1000
    ids = [lease.id for lease in leases]
    assert client.renew_all(ids) == [None] * 1000
    assert client.done_all(ids) == [None] * 1000
    assert [type(error) for error in client.done_all(ids)] == [LeaseHasEnded] * 1000
    assert leases_of(broker, "default") == 0


def test_a_held_lease_is_renewed_and_given_back_from_any_connection(broker: BrokerProcess) -> None:
    with broker.connect() as holding:
        (lease,) = ids_of([holding.say("ACQUIRE hold=connection client=ada").line()])
        assert broker.ask(f"RENEW {lease}") == "OK"
        assert broker.ask(f"DONE {lease}") == "OK"
        assert holding.say(f"RENEW {lease}").line() == "ERROR: that lease has ended [DENIED]"
        assert leases_of(broker, "default") == 0


def test_the_end_of_what_a_client_says_is_the_end_of_what_it_holds(broker: BrokerProcess) -> None:
    with broker.connect() as holding:
        holding.say("ACQUIRE hold=connection count=3 client=ada")
        assert len(ids_of([holding.line() for _ in range(3)])) == 3
        assert leases_of(broker, "default") == 3
        assert holding.half_close().rest() == []
        eventually(lambda: leases_of(broker, "default") == 0)


def test_a_connection_that_holds_may_watch(broker: BrokerProcess) -> None:
    with broker.connect() as holding:
        granted = holding.say("ACQUIRE hold=connection pool=one client=ada").line()
        while granted.startswith("PENDING"):
            granted = holding.line()
        (lease,), address = ids_of([granted]), granted.split()[2].removeprefix("ip=")
        assert holding.say("WATCH client=ada").line() == "OK"
        assert broker.ask(f"RELEASE {address} force client=root") == "OK"
        assert holding.line() == (
            f"NOTICE drain ip={address} lease={lease} in=0 replacement=- reason=released"
        )
        assert holding.say(f"RENEW {lease}").line() == "ERROR: that lease has ended [DENIED]"
