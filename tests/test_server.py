"""The TCP server: order, limits and deadlines. What replies say is the business of the transcripts.

Deadlines run in virtual time, on connections in memory; what depends on real buffers runs over loopback, on
asyncio's own loop and on uvloop.
"""

from __future__ import annotations

import asyncio
import random
import resource
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import uvloop

from broker.core.errors import WorkerNotFound
from broker.core.protocol import Command, Ping, Status
from broker.server import QUEUED_MAX, REPLIES_BYTES_MAX, SWEEP_SECONDS, Connection
from broker.sessions import Session
from broker.testing import RunningBroker
from tests.support.broker_process import BrokerProcess, BrokerProcesses, eventually
from tests.support.brokers import live, settings
from tests.transcripts.stage import PEER, SECONDS_MAX, SocketWire, Stage, stage

FAULT = "ERROR: the broker met a fault of its own; its log has the details [CLOUD]"
NOT_FOUND = "ERROR: Worker not found"
LINE_TIMEOUT = 30
BOTH_LOOPS = pytest.mark.parametrize(
    "loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)

MakeLoop = Callable[[], asyncio.AbstractEventLoop]


def on_loopback(
    loop: MakeLoop, state_dir: Path, story: Callable[[Stage], Awaitable[None]], **sky: str
) -> None:
    """Run a story against a server on a real socket."""

    async def main() -> None:
        chosen = settings()
        listening = {"listen": f"{PEER}:0", "http": f"{PEER}:0"}
        chosen = chosen.model_copy(update={"broker": chosen.broker.model_copy(update=listening)})
        async with stage(chosen, state_dir, ports=True, sky=sky) as on:
            await story(on)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


async def lines(wire: SocketWire, count: int) -> list[str | None]:
    return [await wire.line() for _ in range(count)]


def only_connection(on: Stage) -> Connection:
    (connection,) = on.daemon.server.connections
    return connection


# --- order ----


@BOTH_LOOPS
def test_replies_keep_their_order_behind_a_command_that_waits(loop: MakeLoop, tmp_path: Path) -> None:
    async def story(on: Stage) -> None:
        wire = await on.connect()
        await wire.send(b"GET_WORKER client=a\n")
        await wire.send(b"".join(b"NONSENSE\n" if i % 3 else b"PING 192.0.2.1\n" for i in range(500)))
        await on.until(lambda: len(on.daemon.context.waiting) == 1)
        await on.boot()
        first, *others = await lines(wire, 501)
        assert first == on.cloud.machines[on.cloud.running()[0]].instance.address
        assert others == ["ERROR: Unknown command" if i % 3 else NOT_FOUND for i in range(500)]

    on_loopback(loop, tmp_path, story, boots="no")


def test_however_the_bytes_of_many_commands_are_cut_the_replies_are_the_same(tmp_path: Path) -> None:
    said = (
        b"GET_WORKER client=a\nPING 192.0.2.1\r\n\nNONSENSE\n\nGET_WORKER\nGET_WORKER\nGET_WORKER x=1\n"
        b"RELEASE 192.0.2.1\n \t\nPING\nGET_WORKER client=b exclusive=no\nLIST_ALL x\nSTATUS x\n"
    )
    dice = random.Random(9000)

    async def replies(broker: RunningBroker, pieces: list[bytes]) -> list[str | None]:
        client = broker.client()
        for piece in pieces:
            client.send(piece)
            if dice.random() < 0.3:
                await asyncio.sleep(0.01)
        client.half_close()
        heard = [await client.reply()]
        while heard[-1] is not None:
            heard.append(await client.reply())
        return heard

    async def story(broker: RunningBroker) -> None:
        whole = await replies(broker, [said])
        assert len(whole) == said.count(b"\n") + 1
        for _ in range(300):
            cuts = sorted(dice.sample(range(1, len(said)), dice.randrange(1, 40)))
            pieces = [said[a:b] for a, b in zip([0, *cuts], [*cuts, len(said)], strict=True)]
            assert await replies(broker, pieces) == whole

    live(tmp_path, story)


def test_a_run_of_plain_get_worker_is_answered_one_by_one(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        address = await client.ask("GET_WORKER")
        client.send(b"GET_WORKER\n" * 1000)
        assert [await client.reply() for _ in range(1000)] == [address] * 1000
        client.send(b"GET_WORKER\nGET_WORKER")
        assert await client.reply() == address
        client.send(b"\n")
        assert await client.reply() == address
        answers = broker.daemon.metrics.commands.by_command["GET_WORKER"]
        assert (answers.total, answers.errors) == (1003, 0)

    live(tmp_path, story)


# --- a client that is gone ----


def test_a_client_that_releases_and_leaves_without_listening_has_released(tmp_path: Path) -> None:
    async def story(on: Stage) -> None:
        asking = await on.connect()
        await asking.send(b"GET_WORKER\n")
        address = await asking.line()
        hasty = socket.create_connection((PEER, on.port))
        hasty.sendall(f"RELEASE {address}\n".encode())
        hasty.close()
        await on.until(lambda: not on.cloud.running())
        await asking.say_no_more()
        assert await asking.line() is None

    on_loopback(asyncio.new_event_loop, tmp_path, story)


@BOTH_LOOPS
def test_a_client_that_closed_while_it_waited_is_served_and_its_lease_runs_out(
    loop: MakeLoop, tmp_path: Path
) -> None:
    """TCP cannot tell it from a client that only has nothing more to ask."""

    async def story(on: Stage) -> None:
        client = socket.create_connection((PEER, on.port))
        client.sendall(b"GET_WORKER client=gone\n")
        client.close()
        await on.until(lambda: len(on.daemon.context.waiting) == 1)
        await on.boot()
        await on.until(lambda: not on.daemon.server.connections)
        (worker,) = on.daemon.context.registry
        (lease,) = on.daemon.context.registry.leases(worker.id)
        assert lease.client == "gone"
        assert lease.ttl_seconds == on.daemon.settings.pool["default"].idle_timeout

    on_loopback(loop, tmp_path, story, boots="no")


# --- limits ----


@BOTH_LOOPS
def test_a_client_that_sends_without_end_behind_a_slow_command_is_not_read_any_more(
    loop: MakeLoop, tmp_path: Path
) -> None:
    async def story(on: Stage) -> None:
        wire = await on.connect()
        await wire.send(b"GET_WORKER client=a\n")
        await on.until(lambda: len(on.daemon.context.waiting) == 1)
        pings = 3 * QUEUED_MAX
        for _ in range(pings // 100):
            await wire.send(b"PING 192.0.2.1\n" * 100)
            await asyncio.sleep(0)
        transport, queue = only_connection(on)._transport, only_connection(on)._queue
        await on.until(lambda: not transport.is_reading())
        assert queue is not None
        assert QUEUED_MAX <= len(queue) <= pings
        await on.boot()
        replies = await lines(wire, 1 + pings)
        assert replies[1:] == [NOT_FOUND] * pings, "nothing is lost by the pause"
        assert transport.is_reading()

    on_loopback(loop, tmp_path, story, boots="no")


@BOTH_LOOPS
def test_a_client_that_does_not_read_its_replies_is_answered_a_bounded_amount(
    loop: MakeLoop, tmp_path: Path
) -> None:
    async def story(on: Stage) -> None:
        for number in range(10):
            on.cloud.add(instance_type=f"type-{number}")
        await on.daemon.reconcile.scan()
        wire, asked = await on.connect(), 8000  # of 3 kB each: no system buffers as much
        await wire.send(b"STATUS\n" * asked)
        await on.until(lambda: any(connection._paused for connection in on.daemon.server.connections))
        transport = only_connection(on)._transport
        pending_bytes = [transport.get_write_buffer_size()]
        for _ in range(20):
            await asyncio.sleep(0)
            pending_bytes.append(transport.get_write_buffer_size())
        assert max(pending_bytes) < 2 * REPLIES_BYTES_MAX
        assert not transport.is_reading()
        replies = await lines(wire, asked)  # now it reads, and misses nothing
        assert all(reply is not None and reply.count("instance_id") == 10 for reply in replies)
        await on.until(transport.is_reading)

    on_loopback(loop, tmp_path, story)


def test_one_chunk_of_commands_does_not_become_an_answer_of_a_gigabyte(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        for number in range(30):
            broker.cloud.add(instance_type=f"type-{number}")
        await broker.until(lambda: len(broker.registry) == 30)
        client = broker.client()
        written: list[int] = []
        transport = client.connection._transport
        write = transport.write

        def pausing(data: bytes | bytearray | memoryview) -> None:
            written.append(len(data))
            write(data)
            client.connection.pause_writing()

        transport.write = pausing  # type: ignore[method-assign]
        client.send(b"STATUS\n" * 30_000)
        await asyncio.sleep(1)
        one_reply_bytes = 30 * 400
        assert sum(written) < REPLIES_BYTES_MAX + 2 * one_reply_bytes
        for _ in range(3):
            before = len(written)
            client.connection.resume_writing()
            await asyncio.sleep(1)
            assert len(written) == before + 1, "one more for each time that it has read"

    live(tmp_path, story)


def test_a_place_that_becomes_free_is_there_for_the_next_client(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.daemon.server.connections_max = 2
        first, second, third = broker.client(), broker.client(), broker.client()
        assert await third.reply() == (
            "ERROR: too many connections; close some, or try again in a moment [LIMIT]"
        )
        assert await third.reply() is None
        first.vanish()
        await asyncio.sleep(0.01)
        assert await broker.ask("PING 192.0.2.1") == NOT_FOUND
        assert await second.ask("PING 192.0.2.1") == NOT_FOUND

    live(tmp_path, story)


def test_hundreds_of_clients_that_connect_while_the_broker_is_busy_are_all_taken(tmp_path: Path) -> None:
    async def story(on: Stage) -> None:
        clients = []
        for _ in range(400):  # the loop does not run meanwhile: the system holds them
            client = socket.create_connection((PEER, on.port), SECONDS_MAX)
            client.sendall(b"PING 192.0.2.1\n")
            clients.append(client)
        await on.until(lambda: len(on.daemon.server.connections) == 400)
        for client in clients:
            client.setblocking(False)  # a connection that is taken need not have been read from yet
            async with asyncio.timeout(SECONDS_MAX):
                reply = await asyncio.get_running_loop().sock_recv(client, 100)
            assert reply.decode() == NOT_FOUND + "\n"
            client.close()

    on_loopback(uvloop.new_event_loop, tmp_path, story)


def test_a_broker_that_runs_out_of_files_goes_on_and_recovers(brokers: BrokerProcesses) -> None:
    broker = brokers.start({"broker": {"id": "files"}})
    early = broker.connect()
    process = psutil.Process(broker.pid)
    eventually(lambda: process.num_fds() > 0)
    soft, hard = resource.prlimit(broker.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (process.num_fds() + 3, hard))
    late = [broker.connect().say("PING 192.0.2.1") for _ in range(20)]
    assert early.say("PING 192.0.2.1").line() == NOT_FOUND
    eventually(lambda: any(one.answered() for one in late))
    resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (soft, hard))
    eventually(lambda: answers(broker))  # the first may still be caught in the shortage
    assert early.say("PING 192.0.2.1").line() == NOT_FOUND


def answers(broker: BrokerProcess) -> bool:
    with broker.connect().say("PING 192.0.2.1").half_close() as client:
        return client.rest() == [NOT_FOUND]


# --- deadlines ----


def test_more_of_an_unfinished_command_is_no_excuse(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        for letter in b"GET_WORKER client=slow-loris":
            client.send(bytes([letter]))
            await asyncio.sleep(2)
        assert await client.reply() == (
            "ERROR: the command was not finished within 30 s; end it with a newline [TIMEOUT]"
        )
        assert client.closed
        assert not broker.cloud.machines

    live(tmp_path, story)


def test_each_command_has_the_whole_time_for_itself(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        client.send(b"PI")
        for _ in range(10):
            await asyncio.sleep(LINE_TIMEOUT - 2)
            client.send(b"NG 192.0.2.1\nPI")
            assert await client.reply() == NOT_FOUND
        await asyncio.sleep(LINE_TIMEOUT + 2)
        assert client.closed

    live(tmp_path, story)


def test_an_unfinished_command_behind_one_that_waits_does_not_end_the_wait(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        client.send(b"GET_WORKER client=a\nPING 192.0")
        await asyncio.sleep(10 * LINE_TIMEOUT)
        assert not client.closed
        broker.cloud.boot(broker.cloud.running()[0])
        assert (await client.reply() or "").startswith("10.")
        client.send(b".2.1\n")
        assert await client.reply() == NOT_FOUND

    live(tmp_path, story, boots=False)


def test_a_client_that_waits_is_not_silent_and_one_that_pings_is_not_either(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        waiting, pinging, silent = broker.client(), broker.client(), broker.client()
        waiting.send(b"GET_WORKER wait=80000 client=a\n")
        for _ in range(3):
            await asyncio.sleep(3000)
            assert await pinging.ask("PING 192.0.2.1") == NOT_FOUND
        assert silent.closed
        assert not waiting.closed
        assert not pinging.closed

    live(tmp_path, story, boots=False, chosen=settings(boot_deadline="2d", max_lifetime="3d"))


def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        slow, paused_once = broker.client(), broker.client()
        slow.connection.pause_writing()
        paused_once.connection.pause_writing()
        await asyncio.sleep(LINE_TIMEOUT / 2)
        paused_once.connection.resume_writing()
        await asyncio.sleep(LINE_TIMEOUT / 2 + 2 * SWEEP_SECONDS)
        assert slow.closed
        assert await paused_once.ask("PING 192.0.2.1") == NOT_FOUND

    live(tmp_path, story)


def test_a_client_that_does_not_read_its_last_reply_is_cut_off_too(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        transport = client.connection._transport
        close, aborted = transport.close, asyncio.Event()
        closing: list[bool] = []
        transport.close = lambda: closing.append(True)  # type: ignore[method-assign]
        transport.is_closing = lambda: bool(closing)  # type: ignore[method-assign]
        transport.abort = aborted.set  # type: ignore[method-assign]
        client.send(b"PI")
        await asyncio.sleep(LINE_TIMEOUT + 2 * SWEEP_SECONDS)
        assert closing, "it was told, but what it was told is still under way"
        said = client._lines.qsize()
        await asyncio.sleep(LINE_TIMEOUT)
        async with asyncio.timeout(2 * SWEEP_SECONDS):
            await aborted.wait()
        assert client._lines.qsize() == said == 1, "once, and not at every look"
        close()

    live(tmp_path, story)


def test_without_connections_nothing_looks_at_deadlines(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        server = broker.daemon.server
        assert await server.tick() is None
        client = broker.client()
        first_deadline_at = broker.clock.monotonic() + LINE_TIMEOUT
        assert await server.tick() == pytest.approx(first_deadline_at), "nothing can be due before"
        client.vanish()
        await asyncio.sleep(0.01)
        assert await server.tick() is None
        again = broker.client()
        again.send(b"GET_")
        await asyncio.sleep(LINE_TIMEOUT + 2 * SWEEP_SECONDS)
        assert again.closed, "the look has begun again with the next client"

    live(tmp_path, story)


# --- faults of our own ----


@BOTH_LOOPS
def test_a_fault_costs_one_command_and_not_the_connection(loop: MakeLoop, tmp_path: Path) -> None:
    async def story(on: Stage) -> None:
        service = on.daemon.service
        answer_now = service.answer_now

        def failing(command: Command, peer: str) -> bytes | None:
            if command == Status():
                raise ZeroDivisionError("a bug, in what needs no waiting")
            return answer_now(command, peer)

        async def failing_later(command: Command, peer: str, session: Session) -> bytes:
            raise ZeroDivisionError("a bug, in what waits")

        service.answer_now = failing  # type: ignore[method-assign]
        service.answer = failing_later  # type: ignore[method-assign]
        wire = await on.connect()
        await wire.send(b"PING 192.0.2.1\nSTATUS\nPING 192.0.2.1\nLIST_ALL\nSTATUS\n")
        assert await lines(wire, 5) == [NOT_FOUND, FAULT, NOT_FOUND, FAULT, FAULT]
        await wire.send(b"PING 192.0.2.1\n")
        assert await wire.line() == NOT_FOUND
        failures = {n: a.errors for n, a in on.daemon.metrics.commands.by_command.items()}
        assert failures == {"PING": 3, "STATUS": 2, "LIST_ALL": 1}

    on_loopback(loop, tmp_path, story)


def test_an_error_of_ours_that_a_client_may_hear_is_no_fault(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        faults: list[str] = []
        session = Session(lambda data: None)
        broker.daemon.server._failed = lambda command, error: faults.append(command)
        assert await broker.ask("PING 192.0.2.1") == WorkerNotFound().wire()
        assert await broker.daemon.server.answer(Ping("192.0.2.1"), "x", session) == f"{NOT_FOUND}\n".encode()
        assert faults == []

    live(tmp_path, story)


# --- the end ----


@BOTH_LOOPS
def test_a_broker_that_stops_answers_what_it_can_and_closes_every_connection(
    loop: MakeLoop, tmp_path: Path
) -> None:
    async def story(on: Stage) -> None:
        waiting, idle, half = [await on.connect() for _ in range(3)]
        port = on.port
        await waiting.send(b"GET_WORKER\nPING 192.0.2.1\n")
        await half.send(b"GET_WOR")
        await on.until(lambda: len(on.daemon.context.waiting) == 1 and len(on.daemon.server.connections) == 3)
        on.stop.set()
        assert await waiting.line() == "ERROR: the broker is restarting; ask again in a moment [DRAINING]"
        assert await waiting.line() == NOT_FOUND
        for wire in (waiting, idle, half):
            assert await wire.line() is None
        with pytest.raises(ConnectionRefusedError):
            await SocketWire.to(port)

    on_loopback(loop, tmp_path, story, boots="no")


# --- lines between the replies --------------------------------------------------------------------------


@BOTH_LOOPS
def test_a_watcher_that_does_not_read_is_cut_off_before_lines_pile_up(loop: MakeLoop, tmp_path: Path) -> None:
    async def story(on: Stage) -> None:
        wire = await on.connect()
        await wire.send(b"WATCH client=ann\n")
        assert await wire.line() == "OK"
        connection = only_connection(on)
        line = b"NOTICE lost ip=10.0.0.1 lease=lease-1 in=0 replacement=-\n" * 1000
        said = 0
        while connection in on.daemon.server.connections:
            connection.session.say(line)
            said += len(line)
            assert said < 100 * 1024 * 1024, "the system's buffers are not that large"
            await asyncio.sleep(0)
        assert connection.session.watching is None
        assert said > REPLIES_BYTES_MAX

    on_loopback(loop, tmp_path, story)


@BOTH_LOOPS
def test_the_system_is_asked_to_notice_when_the_machine_of_a_holding_client_is_gone(
    loop: MakeLoop, tmp_path: Path
) -> None:
    async def story(on: Stage) -> None:
        wire = await on.connect()
        await wire.send(b"GET_WORKER\n")
        await wire.line()
        sock = only_connection(on)._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        await wire.send(b"ACQUIRE hold=connection\n")
        assert (await wire.line() or "").startswith("LEASE ")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        seconds = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        assert 0 < seconds <= 120

    on_loopback(loop, tmp_path, story)
