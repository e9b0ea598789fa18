"""The local provider with real processes: the worker that comes with the broker, and small ones in Python."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from broker.core import tags
from broker.core.errors import (
    CloudError,
    CloudUnreachable,
    InstanceNotFound,
    OfferingRefused,
    OrderMismatch,
    OrderSpent,
    PermanentRefusal,
    SettingsError,
)
from broker.core.model import Instance, InstanceState, Market, Order
from broker.core.settings import PoolSettings, parse
from broker.providers.base import Provider
from broker.providers.local import LocalProvider
from broker.providers.local_machines import VISIBLE_SECONDS, instance_id_of
from broker.providers.local_processes import INSTANCE
from broker.providers.local_records import Record, Records
from tests.support.buying import launch_one

needs_tclsh = pytest.mark.skipif(
    shutil.which("tclsh") is None, reason="tclsh is not installed: apt install tcl"
)

WAIT_SECONDS_MAX = 20.0  # for what takes milliseconds on an idle machine
TERMINATE_GRACE_SECONDS = 0.3  # what a stubborn worker gets here
START_UNIX = 1_800_000_000.0
PYTHON = (sys.executable, "-I", "-S", "-c")

# Answers each connection with its environment, as JSON. {address} and {port} are the broker's to fill in.
ENVIRONMENT_TELLER = """
import json, os, socket
server = socket.create_server(("{address}", {port}))
while True:
    with server.accept()[0] as connection:
        connection.sendall(json.dumps({**os.environ, "leash": "{leash_file}"}).encode())
"""

# Ignores SIGTERM, and says so by listening.
STUBBORN = """
import signal, socket
signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = socket.create_server(("{address}", {port}))
signal.pause()
"""

# Starts one program in its own session and one in another, and tells their pids.
PARENT = """
import signal, socket, subprocess
children = [subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"], start_new_session=True)]
server = socket.create_server(("{address}", {port}))
while True:
    with server.accept()[0] as connection:
        connection.sendall(" ".join(str(child.pid) for child in children).encode())
"""

# A broker that launches one worker and tells its pid, then hangs until it is killed.
BROKER = """
import asyncio, json, sys, time
from pathlib import Path
from broker.core.settings import parse
from broker.providers.local import LocalProvider

async def main():
    pools = parse({"pool": {"default": json.loads(sys.argv[2])}}, {}).pool
    provider = LocalProvider("lab", pools, Path(sys.argv[1]), time.time)
    await provider.open()
    order = provider.prepare("default", "order-1", [provider.offerings("default")[0]], time.time())
    print((await provider.launch(order)).instances[0].id, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


class Host:
    """One state directory, the brokers that come and go on it, and a wall clock that stands still."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.now_unix = START_UNIX
        self.calls: Counter[tuple[str, str]] = Counter()
        self.records = Records((state_dir / "local").resolve())
        self.port = free_port()
        self._providers: list[LocalProvider] = []

    async def broker(
        self, *command: str, broker_id: str = "lab", environ: dict[str, str] | None = None, **pool: object
    ) -> LocalProvider:
        """A broker that was just started; `command` and `pool` are the default pool's settings."""
        provider = LocalProvider(
            broker_id,
            {"default": self.pool(*command, **pool)},
            self.state_dir,
            lambda: self.now_unix,
            lambda api, outcome: self.calls.update([(api, outcome)]),
            os.environ if environ is None else environ,
            TERMINATE_GRACE_SECONDS,
        )
        await provider.open()
        self._providers.append(provider)
        return provider

    def pool(self, *command: str, **pool: object) -> PoolSettings:
        return parse({"pool": {"default": {"worker_port": self.port, "command": command, **pool}}}, {}).pool[
            "default"
        ]

    def record(self, instance_id: str) -> Record:
        record = self.records.read(instance_id)
        assert record is not None
        return record

    def pid(self, instance_id: str) -> int:
        pid = self.record(instance_id).pid
        assert pid is not None
        return pid

    async def close(self) -> None:
        for provider in self._providers:
            await provider.close()
        for pid in processes_under(str(self.records.directory)):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path / "state")
    yield host
    await host.close()


@pytest.fixture
async def other_host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path / "other")
    yield host
    await host.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def processes_under(directory: str) -> list[int]:
    """The living processes that were started from that directory."""
    found = []
    for process in psutil.process_iter():
        try:
            leash_file = process.environ().get("COMPUTE_BROKER_LEASH_FILE", "")
        except psutil.Error:
            continue
        if leash_file.startswith(directory + "/"):
            found.append(process.pid)
    return found


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def order(provider: LocalProvider, order_id: str = "order-1") -> Order:
    return provider.prepare("default", order_id, [provider.offerings("default")[0]], START_UNIX)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not condition():
            await asyncio.sleep(0.01)


async def until_listed(provider: LocalProvider, state: InstanceState) -> Instance:
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            [instance] = await provider.listing()
            if instance.state is state:
                return instance
            await asyncio.sleep(0.01)


async def connect(instance: Instance, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Its worker port, as soon as it accepts."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            try:
                return await asyncio.open_connection(instance.address, port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)


async def told_by(instance: Instance, port: int) -> str:
    reader, writer = await connect(instance, port)
    text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return text


async def evaluated(instance: Instance, port: int, script: str) -> str:
    reader, writer = await connect(instance, port)
    writer.write(struct.pack(">I", len(script)) + script.encode())
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    answer = (await reader.readexactly(length)).decode()
    writer.close()
    await writer.wait_closed()
    return answer


# --- a worker's life ---------------------------------------------------------------------------------------


@needs_tclsh
async def test_the_stock_worker_evaluates_tcl_on_an_address_of_its_own(host: Host) -> None:
    provider: Provider = await host.broker()
    [offering] = provider.offerings("default")
    instance = await launch_one(provider, provider.prepare("default", "order-1", [offering], START_UNIX))

    assert await evaluated(instance, host.port, "expr {6 * 7}") == "42"
    assert (instance.state, instance.region, instance.zone) == (InstanceState.RUNNING, "local", "")
    assert (instance.instance_type, instance.market, instance.cores) == (
        "local",
        Market.ON_DEMAND,
        os.cpu_count(),
    )
    assert instance.launched_unix == START_UNIX
    assert await provider.listing() == [instance]
    assert await provider.describe([instance.id, "local-unknown"]) == [instance]
    assert host.calls == {("launch", "ok"): 1, ("listing", "ok"): 1, ("describe", "ok"): 1}


async def test_what_a_pool_offers_is_this_machine_at_the_pools_price(host: Host) -> None:
    [offering] = (await host.broker(price_usd_per_hour=0.25)).offerings("default")
    assert (offering.instance_type, offering.market, offering.price_usd_micros_per_hour) == (
        "local",
        Market.ON_DEMAND,
        250_000,
    )
    assert offering.cores == os.cpu_count()


async def test_a_machine_carries_the_tags_of_its_launch_and_those_written_later(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER, max_lifetime="1h", tags={"project": "x"})
    instance = await launch_one(provider, order(provider))
    await provider.tag(instance.id, {tags.LAST_USED: tags.rfc3339(START_UNIX)})

    [listed] = await provider.listing()
    identity = tags.read(listed.tags)
    assert (identity.broker, identity.pool, identity.order) == ("lab", "default", "order-1")
    assert (identity.expires_unix, identity.last_used_unix) == (START_UNIX + 3600, START_UNIX)
    assert (listed.tags["project"], listed.tags["Name"]) == ("x", "dserv-worker")
    with pytest.raises(InstanceNotFound):
        await provider.tag("local-unknown", {"a": "b"})


async def test_a_worker_dies_with_its_release(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    instance = await launch_one(provider, order(provider))
    pid = host.pid(instance.id)
    await told_by(instance, host.port)

    await provider.terminate([instance.id, "local-unknown"])
    await provider.terminate([instance.id])
    ended = await until_listed(provider, InstanceState.TERMINATED)
    assert (ended.address, ended.reason) == (None, "terminated by the broker")
    assert not psutil.pid_exists(pid), "the process is left as a zombie"
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(instance.address, host.port)
    await provider.terminate([instance.id])
    assert host.calls["terminate", "ok"] == 3


async def test_a_worker_that_ignores_the_request_is_made_to_end_without_anybody_waiting(host: Host) -> None:
    provider = await host.broker(*PYTHON, STUBBORN)
    instance = await launch_one(provider, order(provider))
    _, writer = await connect(instance, host.port)
    writer.close()

    await provider.terminate([instance.id])
    [listed] = await provider.listing()
    assert (listed.state, listed.address) == (InstanceState.SHUTTING_DOWN, instance.address)
    await provider.close()
    assert not alive(host.pid(instance.id))
    assert (await until_listed(provider, InstanceState.TERMINATED)).reason == "terminated by the broker"


async def test_the_next_broker_ends_what_the_last_one_had_asked_to_end(host: Host) -> None:
    first = await host.broker(*PYTHON, STUBBORN)
    instance = await launch_one(first, order(first))
    _, writer = await connect(instance, host.port)
    writer.close()
    host.records.write(replace(host.record(instance.id), terminate_asked=True))

    second = await host.broker(*PYTHON, STUBBORN)
    [listed] = await second.listing()
    assert listed.state is InstanceState.SHUTTING_DOWN
    await second.close()
    assert not alive(host.pid(instance.id))


@pytest.mark.parametrize("how", ["released", "killed", "killed while no broker ran"])
async def test_what_a_worker_has_started_ends_with_it(host: Host, how: str) -> None:
    provider = await host.broker(*PYTHON, PARENT)
    instance = await launch_one(provider, order(provider))
    children = [int(pid) for pid in (await told_by(instance, host.port)).split()]
    assert [alive(pid) for pid in children] == [True, True]

    if how == "released":
        await provider.terminate([instance.id])
    else:
        os.kill(host.pid(instance.id), signal.SIGKILL)
    if how == "killed while no broker ran":
        provider = await host.broker()
    await until_listed(provider, InstanceState.TERMINATED)
    await until(lambda: not any(alive(pid) for pid in children))


async def test_a_killed_worker_shows_as_terminated_and_says_how(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    instance = await launch_one(provider, order(provider))
    await told_by(instance, host.port)
    os.kill(host.pid(instance.id), signal.SIGKILL)

    ended = await until_listed(provider, InstanceState.TERMINATED)
    assert ended.reason == "killed by SIGKILL"
    assert not psutil.pid_exists(host.pid(instance.id))


async def test_a_worker_that_cannot_start_says_why_in_the_listing(host: Host) -> None:
    provider = await host.broker(*PYTHON, "import sys; print(); sys.exit('no\\tmodel file')")
    launched = await launch_one(provider, order(provider))
    assert launched.state is InstanceState.RUNNING

    ended = await until_listed(provider, InstanceState.TERMINATED)
    assert ended.reason == "exit status 1: no model file"


async def test_an_ended_machine_stays_visible_for_a_while_and_then_leaves_nothing(host: Host) -> None:
    provider = await host.broker(*PYTHON, "print('over')")
    await launch_one(provider, order(provider))
    ended = await until_listed(provider, InstanceState.TERMINATED)

    host.now_unix += VISIBLE_SECONDS - 1
    assert await provider.listing() == [ended]
    host.now_unix += 1
    assert await provider.listing() == []
    assert list(host.records.directory.iterdir()) == []


# --- orders -----------------------------------------------------------------------------------------------


async def test_a_resent_order_finds_its_machine_also_after_a_restart(host: Host) -> None:
    first = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    instance = await launch_one(first, order(first))
    assert await launch_one(first, order(first)) == instance
    await first.close()

    second = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    assert await launch_one(second, order(second)) == instance
    assert await second.listing() == [instance]
    # The kernel fills in a process's environment a moment after its start is reported.
    await until(lambda: len(processes_under(str(host.records.directory))) == 1)


async def test_an_order_resent_with_other_parameters_is_refused(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    await launch_one(provider, order(provider))
    changed = await host.broker(*PYTHON, ENVIRONMENT_TELLER, idle_timeout="1h")
    with pytest.raises(OrderMismatch):
        await launch_one(changed, order(changed))
    assert host.calls["launch", "conflict"] == 1


async def test_an_order_whose_machine_has_ended_is_spent(host: Host) -> None:
    provider = await host.broker(*PYTHON, "print('over')")
    await launch_one(provider, order(provider))
    await until_listed(provider, InstanceState.TERMINATED)
    with pytest.raises(OrderSpent, match="exit status 0: over"):
        await launch_one(provider, order(provider))


async def test_an_order_of_another_provider_is_refused(host: Host) -> None:
    provider = await host.broker()
    with pytest.raises(PermanentRefusal):
        await launch_one(provider, replace(order(provider), parameters='{"ImageId": "ami-1"}'))


async def test_a_launch_whose_caller_gives_up_leads_to_one_machine_all_the_same(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    launching = asyncio.create_task(launch_one(provider, order(provider)))
    await asyncio.sleep(0)
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    assert host.calls == {("launch", "cancelled"): 1}
    instance = await launch_one(provider, order(provider))
    assert await provider.listing() == [instance]
    # The kernel fills in a process's environment a moment after its start is reported.
    await until(lambda: len(processes_under(str(host.records.directory))) == 1)


async def test_orders_at_the_same_time_get_a_machine_and_an_address_each(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    orders = [order(provider, f"order-{number}") for number in range(6)]
    instances = await asyncio.gather(*(launch_one(provider, one) for one in orders + orders))
    assert instances[:6] == instances[6:]
    assert len({instance.address for instance in instances}) == 6
    assert {i.id for i in await provider.listing()} == {i.id for i in instances}


# --- brokers that end ---------------------------------------------------------------------------------------


async def test_a_worker_survives_the_kill_of_its_broker_and_is_found_again(host: Host) -> None:
    pool = {"worker_port": host.port, "command": [*PYTHON, ENVIRONMENT_TELLER]}
    argv = [sys.executable, "-c", BROKER, str(host.state_dir), json.dumps(pool)]
    killed = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
    assert killed.stdout is not None
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        instance_id = (await killed.stdout.readline()).decode().strip()
    killed.kill()
    await killed.wait()

    provider = await host.broker()
    [instance] = await provider.listing()
    assert (instance.id, instance.state) == (instance_id, InstanceState.RUNNING)
    assert json.loads(await told_by(instance, host.port))[INSTANCE] == instance_id
    await provider.terminate([instance.id])
    await until_listed(provider, InstanceState.TERMINATED)


async def test_a_broker_killed_before_it_started_the_process_leaves_no_machine(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    begun = _as_left_before_the_start(host, order(provider))

    [ended] = await provider.listing()
    assert (ended.id, ended.state) == (begun.id, InstanceState.TERMINATED)
    assert ended.reason == "the broker stopped before it was started"
    assert tags.read(ended.tags).order == "order-1"


async def test_an_order_resent_after_such_a_kill_starts_its_machine(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    begun = _as_left_before_the_start(host, order(provider))

    instance = await launch_one(provider, order(provider))
    assert (instance.id, instance.state) == (begun.id, InstanceState.RUNNING)
    assert await provider.listing() == [instance]


async def test_a_broker_killed_after_it_started_the_process_finds_it_again(host: Host) -> None:
    first = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    instance = await launch_one(first, order(first))
    pid = host.pid(instance.id)
    host.records.write(replace(host.record(instance.id), pid=None, started_seconds=0.0))

    second = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    assert await second.listing() == [instance]
    assert host.pid(instance.id) == pid


@pytest.mark.parametrize("damage", ["lost", "torn", "directory lost"])
async def test_a_worker_whose_record_is_lost_is_known_by_its_environment(host: Host, damage: str) -> None:
    first = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    launched = await launch_one(first, order(first))
    leash_file = host.records.leash_file(launched.id)
    if damage == "torn":
        leash_file.write_bytes(leash_file.read_bytes()[:40])
    elif damage == "lost":
        leash_file.unlink()
    else:
        shutil.rmtree(host.state_dir)

    second = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    [found] = await second.listing()
    assert replace(found, launched_unix=START_UNIX) == launched
    assert abs(found.launched_unix - psutil.Process(host.pid(found.id)).create_time()) < 1
    assert await launch_one(second, order(second)) == found


async def test_a_record_nobody_can_read_and_no_process_belongs_to_is_cleared_away(host: Host) -> None:
    provider = await host.broker()
    host.records.leash_file("local-torn").write_text("{")
    assert await provider.listing() == []
    assert list(host.records.directory.iterdir()) == []


async def test_a_reused_pid_is_never_signalled(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    instance = await launch_one(provider, order(provider))
    record = host.record(instance.id)
    stranger = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    try:
        host.records.write(replace(record, pid=stranger.pid, started_seconds=record.started_seconds - 60))
        await provider.terminate([instance.id])
        [ended] = await provider.listing()
        assert ended.state is InstanceState.TERMINATED
        assert stranger.returncode is None
        assert alive(stranger.pid)
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_jump_of_the_wall_clock_makes_no_worker_a_stranger(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    instance = await launch_one(provider, order(provider))
    record = host.record(instance.id)
    host.records.write(replace(record, started_seconds=record.started_seconds - 3600))
    host.now_unix += 3600
    assert await provider.listing() == [instance]


async def test_two_brokers_with_state_directories_of_their_own_do_not_meet(
    host: Host, other_host: Host
) -> None:
    other_host.port = host.port
    first = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    second = await other_host.broker(*PYTHON, ENVIRONMENT_TELLER)
    mine = await launch_one(first, order(first))
    _, writer = await connect(mine, host.port)  # the other order's first choice is taken now
    writer.close()
    theirs = await launch_one(second, order(second))

    assert mine.id == theirs.id
    assert mine.address != theirs.address
    await first.terminate([mine.id])
    await until_listed(first, InstanceState.TERMINATED)
    assert [i.state for i in await second.listing()] == [InstanceState.RUNNING]


async def test_a_machine_with_another_brokers_tag_is_not_touched(host: Host) -> None:
    first = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    instance = await launch_one(first, order(first))
    other = await host.broker(broker_id="other")

    assert await other.listing() == []
    assert await other.describe([instance.id]) == []
    await other.terminate([instance.id])
    with pytest.raises(InstanceNotFound):
        await other.tag(instance.id, {"a": "b"})
    assert await first.listing() == [instance]


# --- the leash, the log, the environment --------------------------------------------------------------------


async def test_each_listing_tells_running_workers_that_their_broker_lives(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER, idle_timeout="90s")
    instance = await launch_one(provider, order(provider))
    leash_file = host.records.leash_file(instance.id)
    os.utime(leash_file, (1, 1))

    await provider.listing()
    assert leash_file.stat().st_mtime > 1
    environment = json.loads(await told_by(instance, host.port))
    assert (environment["COMPUTE_BROKER_LEASH_SECONDS"], environment["leash"]) == ("390", str(leash_file))


@needs_tclsh
async def test_the_stock_worker_ends_itself_when_its_record_is_gone(host: Host) -> None:
    provider = await host.broker()
    instance = await launch_one(provider, order(provider))
    assert await evaluated(instance, host.port, "pid") == str(host.pid(instance.id))
    pid = host.pid(instance.id)
    host.records.leash_file(instance.id).unlink()
    await until(lambda: not alive(pid))


async def test_a_worker_inherits_no_secret_of_the_broker(host: Host) -> None:
    environ = {
        **os.environ,
        "LC_TIME": "C",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "COMPUTE_BROKER__POOL__DEFAULT__USER_DATA": "secret",
        "NOTIFY_SOCKET": "/run/notify",
    }
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER, environ=environ)
    instance = await launch_one(provider, order(provider))
    environment = json.loads(await told_by(instance, host.port))

    assert (environment["PATH"], environment["LC_TIME"]) == (os.environ["PATH"], "C")
    assert (environment["COMPUTE_BROKER_ADDRESS"], environment["COMPUTE_BROKER_PORT"]) == (
        instance.address,
        str(host.port),
    )
    assert not [key for key in environment if key.startswith(("AWS_", "COMPUTE_BROKER__", "NOTIFY"))]


async def test_a_talkative_worker_does_not_fill_the_disk(host: Host) -> None:
    provider = await host.broker(*PYTHON, "print('x' * 2**21, flush=True); import signal; signal.pause()")
    instance = await launch_one(provider, order(provider))
    log_file = host.records.log_file(instance.id)
    await until(lambda: log_file.stat().st_size > 2**21)
    await provider.listing()
    assert 0 < log_file.stat().st_size <= 2**16


async def test_what_is_kept_of_a_worker_is_for_its_user_alone(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    await launch_one(provider, order(provider))
    files = list(host.records.directory.iterdir())
    assert len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert host.records.directory.stat().st_mode & 0o777 == 0o700


# --- what can be wrong --------------------------------------------------------------------------------------


async def _launch_error(host: Host, provider: LocalProvider) -> CloudError:
    """The error of a launch, which has left nothing behind."""
    with pytest.raises(CloudError) as raised:
        await launch_one(provider, order(provider))
    assert await provider.listing() == []
    assert list(host.records.directory.iterdir()) == []
    return raised.value


async def test_without_tclsh_the_refusal_names_the_remedy(host: Host) -> None:
    error = await _launch_error(host, await host.broker(environ={"PATH": "/nonexistent"}))
    assert type(error) is PermanentRefusal
    assert error.message == "tclsh is not installed: apt install tcl, or set pool.default.command"


async def test_a_command_that_does_not_exist_is_named_with_its_setting(host: Host) -> None:
    error = await _launch_error(host, await host.broker("no-such-program", "--flag"))
    assert type(error) is PermanentRefusal
    assert error.message == "pool.default.command: there is no program no-such-program to start"


async def test_a_command_that_is_no_program_is_refused(host: Host, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("no interpreter line\n")
    script.chmod(0o755)
    error = await _launch_error(host, await host.broker(str(script)))
    assert type(error) is PermanentRefusal
    assert error.message == f"pool.default.command: {script} cannot be started: Exec format error"


async def test_a_worker_port_that_is_taken_everywhere_is_refused_for_now(host: Host) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        host.port = server.getsockname()[1]
        error = await _launch_error(host, await host.broker(*PYTHON, ENVIRONMENT_TELLER))
    assert type(error) is OfferingRefused
    assert f"port {host.port} is taken on every loopback address" in error.message


async def test_without_a_record_on_disk_nothing_is_started(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    instance_id = instance_id_of("order-1")
    (host.records.directory / f"{instance_id}.tmp").mkdir()  # whoever is root can write anywhere but here
    with pytest.raises(PermanentRefusal, match=r"no local worker can be recorded in .*: Is a directory"):
        await launch_one(provider, order(provider))
    assert await provider.listing() == []
    assert processes_under(str(host.records.directory)) == []


async def test_a_directory_that_cannot_be_read_is_not_an_empty_one(host: Host) -> None:
    provider = await host.broker(*PYTHON, ENVIRONMENT_TELLER)
    shutil.rmtree(host.records.directory)
    host.records.directory.write_text("in the way")
    for attempt in (launch_one(provider, order(provider)), provider.listing()):
        with pytest.raises(CloudUnreachable):
            await attempt
    assert host.calls == {("launch", "unreachable"): 1, ("listing", "unreachable"): 1}
    assert processes_under(str(host.records.directory)) == []


async def test_a_state_directory_that_cannot_be_used_is_a_problem_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    provider = LocalProvider("lab", {}, tmp_path / "file", lambda: START_UNIX)
    with pytest.raises(SettingsError, match=r"broker\.state_dir: .*file"):
        await provider.open()


def _as_left_before_the_start(host: Host, begun: Order) -> Record:
    """What is on disk when a broker was killed between its record and the start of the process."""
    record = Record(
        instance_id_of(begun.id),
        begun.id,
        begun.parameters,
        "127.1.2.3",
        host.port,
        START_UNIX,
        tags=json.loads(begun.parameters)["tags"],
    )
    host.records.write(record)
    return record
