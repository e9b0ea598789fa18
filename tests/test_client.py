"""The Python client against a broker that does as each test tells it: blocking and async, one behaviour.

What needs no connection (retries, names, places) is tested on the pure parts, with time as an argument.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import broker
from broker import AsyncClient, BrokerUnreachable, Client, Retry, wire
from broker.core import errors, protocol
from broker.errand import REPLY_BYTES_MAX, Endpoint, Errand, endpoint, fit_name
from tests.support.fake_broker import (
    SECONDS_MAX,
    FakeBroker,
    Looped,
    Scene,
    answer,
    courteous,
    line_from,
    refuse_unread,
    reset,
    silent,
)

AT_ONCE = Retry(pause_seconds=0.0)

Open = Callable[..., FakeBroker]


@pytest.fixture
def opened() -> Iterator[Open]:
    fakes: list[FakeBroker] = []

    def open_one(*scenes: Scene, **replies: str) -> FakeBroker:
        fakes.append(FakeBroker(scenes, replies))
        return fakes[-1]

    yield open_one
    for fake in fakes:
        fake.close()


@pytest.fixture(params=[Client, Looped], ids=["blocking", "async"])
def client_of(request: pytest.FixtureRequest) -> Callable[..., Any]:
    def make(port: int, **options: Any) -> Any:
        return request.param("127.0.0.1", port, **{"timeout": SECONDS_MAX, "retry": AT_ONCE, **options})

    return make


ClientOf = Callable[..., Any]

# --- commands and replies ---------------------------------------------------------------------------------


def test_every_command_goes_out_as_the_protocol_has_it_and_its_answer_comes_back(
    client_of: ClientOf, opened: Open
) -> None:
    fake = opened(
        STATUS='[{"instance_id": "i-1", "ip": "10.0.0.1", "idle_seconds": 2}]',
        POOLS='[{"name": "default"}]',
        LIST_ALL="[]",
        TERMINATE_ALL='{"terminated": ["i-1", "i-2"]}',
        VERSION="0.1.0",
    )
    client = client_of(fake.port, client="me")
    assert client.get_worker(pool="big", cores=64, wait=2.5, exclusive=True) == "127.0.0.1"
    assert client.ping("127.0.0.1") is None
    assert client.release("127.0.0.1") is None
    assert client.release("127.0.0.1", force=True) is None
    assert client.status() == [{"instance_id": "i-1", "ip": "10.0.0.1", "idle_seconds": 2}]
    assert client.pools() == [{"name": "default"}]
    assert client.list_all() == []
    assert client.terminate_all() == ["i-1", "i-2"]
    assert client.request("VERSION") == "0.1.0"
    assert fake.heard == [
        "GET_WORKER pool=big cores=64 wait=2.5 exclusive=yes",
        "PING 127.0.0.1",
        "RELEASE 127.0.0.1",
        "RELEASE 127.0.0.1 force",
        "STATUS",
        "POOLS",
        "LIST_ALL",
        "TERMINATE_ALL",
        "VERSION",
    ]
    assert fake.names == ["me", ""]


@pytest.mark.parametrize(("code", "kind"), protocol.ERRORS.items())
def test_an_error_reply_is_raised_as_its_type_and_never_asked_again(
    client_of: ClientOf, opened: Open, code: str, kind: type[errors.BrokerError]
) -> None:
    fake = opened(GET_WORKER=f"ERROR: 10.0.0.1 is not for you [{code}]")
    with pytest.raises(kind) as caught:
        client_of(fake.port).get_worker()
    assert type(caught.value) is kind
    assert caught.value.message == "10.0.0.1 is not for you"
    assert fake.heard == ["GET_WORKER"]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("ERROR: Unknown command", errors.UnknownCommand),
        ("ERROR: Worker not found", errors.WorkerNotFound),
        ("ERROR: not today [BUDGET]", errors.BrokerError),
        ("ERROR: who are you [AUTH]", errors.BrokerError),
        ("ERROR", errors.BrokerError),
    ],
)
def test_an_error_without_a_type_of_its_own_is_raised_all_the_same(
    client_of: ClientOf, opened: Open, reply: str, kind: type[errors.BrokerError]
) -> None:
    with pytest.raises(kind):
        client_of(opened(PING=reply).port).ping("10.0.0.1")
    with pytest.raises(kind):
        client_of(opened(STATUS=reply).port).status()
    with pytest.raises(kind):
        client_of(opened(PING=reply).port).request("PING 10.0.0.1")


@pytest.mark.parametrize(
    ("method", "verb", "reply"),
    [
        ("get_worker", "GET_WORKER", "OK"),
        ("get_worker", "GET_WORKER", ""),
        ("get_worker", "GET_WORKER", "10.0.0.1 10.0.0.2"),
        ("status", "STATUS", "OK"),
        ("status", "STATUS", '{"ip": "10.0.0.1"}'),
        ("pools", "POOLS", "[1]"),
        ("list_all", "LIST_ALL", "[1]"),
        ("terminate_all", "TERMINATE_ALL", "[]"),
        ("terminate_all", "TERMINATE_ALL", '{"terminated": 3}'),
    ],
)
def test_an_answer_that_is_none_to_the_command_is_an_error(
    client_of: ClientOf, opened: Open, method: str, verb: str, reply: str
) -> None:
    fake = opened(**{verb: reply})
    with pytest.raises(errors.BrokerError, match="answered"):
        getattr(client_of(fake.port), method)()
    assert len(fake.heard) == 1


def test_a_ping_that_is_not_answered_with_ok_has_failed(client_of: ClientOf, opened: Open) -> None:
    fake = opened(PING="10.0.0.1")
    with pytest.raises(errors.BrokerError, match=f"127.0.0.1:{fake.port} answered PING with '10.0.0.1': OK"):
        client_of(fake.port).ping("10.0.0.1")


def test_a_listing_of_thousands_of_machines_is_one_answer(client_of: ClientOf, opened: Open) -> None:
    machines = ", ".join(f'{{"instance_id": "i-{n:017x}", "state": "running"}}' for n in range(20_000))
    assert len(client_of(opened(LIST_ALL=f"[{machines}]").port).list_all()) == 20_000


def test_an_answer_without_an_end_is_given_up() -> None:
    errand = errand_of(protocol.ListAll(), protocol.read_reply)
    errand.attempt(0.0)
    assert not errand.receive(b"x" * REPLY_BYTES_MAX)
    with pytest.raises(errors.BrokerError, match=f"answered LIST_ALL with more than {REPLY_BYTES_MAX} bytes"):
        errand.receive(b"x")


@pytest.mark.parametrize(
    "use",
    [
        lambda client: client.get_worker(cores=0),
        lambda client: client.get_worker(wait=-1),
        lambda client: client.get_worker(pool="a b"),
        lambda client: client.ping("10.0.0.1\nTERMINATE_ALL"),
        lambda client: client.release(""),
        lambda client: client.request("PING 10.0.0.1\nTERMINATE_ALL"),
        lambda client: client.request("x" * 1025),
        lambda client: client.request("PING ä"),
    ],
)
def test_values_that_no_command_can_carry_are_refused_before_anything_is_sent(
    client_of: ClientOf, opened: Open, use: Callable[[Any], object]
) -> None:
    fake = opened()
    with pytest.raises(errors.BadRequest):
        use(client_of(fake.port))
    assert fake.heard == []


@pytest.mark.parametrize("name", ["", "no spaces", "ä", "x" * 65])
def test_a_name_that_the_protocol_does_not_allow_is_refused(client_of: ClientOf, name: str) -> None:
    with pytest.raises(errors.BadRequest, match="is no name for client="):
        client_of(9000, client=name)


# --- when the connection fails ----------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [reset, answer(""), answer("10.0.0.")], ids=["reset", "closed", "cut"])
def test_a_repeatable_command_is_asked_again_until_it_has_a_whole_answer(
    client_of: ClientOf, opened: Open, trouble: Scene
) -> None:
    fake = opened(trouble, trouble, GET_WORKER="10.0.0.77")
    assert client_of(fake.port).get_worker() == "10.0.0.77"
    assert fake.heard == ["GET_WORKER"] * 3
    assert len(fake.names) == 1


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (reset, "did not answer GET_WORKER (Connection reset by peer)"),
        (answer(""), "did not answer GET_WORKER (it closed the connection without an answer)"),
        (
            answer("10.0.0.7"),
            "did not answer GET_WORKER (it closed the connection in the middle of its answer)",
        ),
    ],
    ids=["reset", "closed", "cut"],
)
def test_attempts_are_counted_and_half_an_answer_is_never_an_address(
    client_of: ClientOf, opened: Open, trouble: Scene, sentence: str
) -> None:
    fake = opened(trouble, trouble, trouble, trouble)
    with pytest.raises(BrokerUnreachable) as caught:
        client_of(fake.port, retry=Retry(attempts_max=3, pause_seconds=0.0)).get_worker()
    assert f"the broker at 127.0.0.1:{fake.port} {sentence}" in caught.value.message
    assert len(fake.heard) == 3


def test_a_broker_that_is_just_starting_is_waited_for(client_of: ClientOf) -> None:
    listening = threading.Event()

    class ListenFirst(Retry):
        """Tries again at once; before the third attempt somebody begins to listen."""

        def pause_after(self, attempts: int) -> float | None:
            if attempts == 2:
                bound.listen()
                listening.set()
            return 0.0

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.settimeout(SECONDS_MAX)
        client = client_of(bound.getsockname()[1], retry=ListenFirst())
        asking = threading.Thread(target=client.ping, args=("10.0.0.1",))
        asking.start()
        assert listening.wait(SECONDS_MAX)
        with bound.accept()[0] as connection:
            assert connection.recv(1024).startswith(b"PING 10.0.0.1 client=")
            connection.sendall(b"OK\n")
            asking.join(SECONDS_MAX)
            assert not asking.is_alive()


def test_without_a_broker_the_error_says_where_and_what_to_do(client_of: ClientOf) -> None:
    with socket.socket() as bound:  # bound and not listening: whoever connects is refused
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(BrokerUnreachable) as caught:
            client_of(port).get_worker()
    assert f"127.0.0.1:{port}: Connection refused" in caught.value.message
    assert "`compute-broker serve`" in caught.value.message


@pytest.mark.parametrize("method", ["ping", "release"])
def test_a_silent_broker_is_given_up_after_the_timeout_and_not_asked_again(
    client_of: ClientOf, opened: Open, method: str
) -> None:
    fake = opened(silent)
    with pytest.raises(BrokerUnreachable, match=rf"did not answer {method.upper()} within 0\.05 s"):
        getattr(client_of(fake.port, timeout=0.05), method)("10.0.0.1")
    assert fake.heard == [f"{method.upper()} 10.0.0.1"]


def test_the_wait_for_a_worker_is_added_to_the_timeout(client_of: ClientOf, opened: Open) -> None:
    fake = opened(silent)
    with pytest.raises(BrokerUnreachable, match=r"did not answer GET_WORKER within 0\.06 s"):
        client_of(fake.port, timeout=0.05).get_worker(wait=0.01)


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_a_host_that_drops_packets_is_given_up(client_of: ClientOf, seconds: float) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), pytest.raises(BrokerUnreachable) as caught:
            client_of(port, timeout=seconds).ping("10.0.0.1")
    assert f"127.0.0.1:{port}: timed out" in caught.value.message


def test_terminate_all_is_never_sent_twice_and_the_doubt_is_told(client_of: ClientOf, opened: Open) -> None:
    fake = opened(reset)
    with pytest.raises(BrokerUnreachable, match="may have been carried out all the same"):
        client_of(fake.port).terminate_all()
    assert fake.heard == ["TERMINATE_ALL"]


def test_a_line_of_the_callers_own_is_sent_once(client_of: ClientOf, opened: Open) -> None:
    fake = opened(answer(""))
    with pytest.raises(BrokerUnreachable, match="did not answer PING"):
        client_of(fake.port).request("PING 10.0.0.1")
    assert fake.heard == ["PING 10.0.0.1"]


def test_a_broker_that_refuses_before_it_reads_is_heard(client_of: ClientOf, opened: Open) -> None:
    with pytest.raises(errors.LimitReached, match="too many connections"):
        client_of(opened(refuse_unread).port).get_worker()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's list of connections")
def test_a_connection_that_waits_in_silence_is_kept_alive_by_the_system(
    client_of: ClientOf, opened: Open
) -> None:
    armed = threading.Event()

    def look_for_timer(fake: FakeBroker, connection: socket.socket) -> None:
        line_from(fake, connection)
        ends = f"0100007F:{connection.getpeername()[1]:04X} 0100007F:{fake.port:04X}"
        ends_at = time.monotonic() + SECONDS_MAX
        while not armed.is_set() and time.monotonic() < ends_at:
            lines = Path("/proc/net/tcp").read_text().splitlines()
            timers = [line.split()[5] for line in lines if ends in line]
            if timers and timers[0].startswith("02:"):  # Linux, proc_net_tcp: the keep-alive timer is pending
                armed.set()
        connection.sendall(b"127.0.0.1\n")

    client_of(opened(look_for_timer).port).get_worker()
    assert armed.is_set()


class LongQuestion:
    """A question that is sent only when the peer has hung up, and that is too long to go unnoticed."""

    def __init__(self, hung_up: threading.Event) -> None:
        self.answer = b""
        self._hung_up = hung_up

    def begin(self) -> bytes:
        assert self._hung_up.wait(SECONDS_MAX)
        return b"x" * 2**23

    def receive(self, data: bytes) -> bool:
        self.answer += data
        return not data or data.endswith(b"\n")


@pytest.mark.parametrize(
    "ask", [wire.ask, lambda *question: asyncio.run(wire.ask_async(*question))], ids=["blocking", "async"]
)
def test_what_a_peer_says_before_it_hangs_up_is_heard_although_nothing_can_be_sent(
    ask: Callable[..., None], opened: Open
) -> None:
    hung_up = threading.Event()

    def refuse_and_hang_up(fake: FakeBroker, connection: socket.socket) -> None:
        refuse_unread(fake, connection)
        connection.close()
        hung_up.set()

    question = LongQuestion(hung_up)
    ask("127.0.0.1", opened(refuse_and_hang_up).port, question, SECONDS_MAX)
    assert question.answer == b"ERROR: too many connections [LIMIT]\n"


def test_a_host_name_that_cannot_be_one_is_an_error_of_ours(client_of: ClientOf) -> None:
    client = client_of(9000)
    client.broker = Endpoint("a..b", 9000)
    with pytest.raises(BrokerUnreachable, match=r"a\.\.b:9000: that is no host name"):
        client.status()


def test_the_async_client_tries_every_address_of_a_host(opened: Open) -> None:
    assert asyncio.run(AsyncClient("localhost", opened().port, retry=AT_ONCE).get_worker()) == "127.0.0.1"


def test_the_async_client_runs_on_uvloop_too(opened: Open) -> None:
    uvloop = pytest.importorskip("uvloop")
    fake = opened(answer(""))

    async def use() -> None:
        async with broker.aworker("127.0.0.1", fake.port, retry=AT_ONCE, ping_seconds=0.01):
            assert await asyncio.to_thread(fake.heard_within, 1, "PING")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(use())
    assert fake.heard[:2] == ["GET_WORKER", "GET_WORKER"]
    assert fake.heard[-1] == "RELEASE 127.0.0.1"


def test_threads_may_share_a_client(opened: Open) -> None:
    fake = opened()
    client = Client("127.0.0.1", fake.port)
    threads = [threading.Thread(target=client.ping, args=(f"10.0.0.{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS_MAX)
    assert sorted(fake.heard) == [f"PING 10.0.0.{n}" for n in range(8)]


# --- retries, as plain data -------------------------------------------------------------------------------


def errand_of(
    command: Any, read: Callable[[str], Any], seconds: float = 10.0, retry: Retry = AT_ONCE
) -> Errand[Any]:
    return Errand(command, read, Endpoint("broker.example", 9000), seconds, retry)


def test_pauses_grow_to_a_maximum_and_end() -> None:
    retry = Retry(attempts_max=5, pause_seconds=0.5, pause_factor=2.0, pause_seconds_max=1.5)
    assert [retry.pause_after(attempts) for attempts in range(1, 7)] == [0.5, 1.0, 1.5, 1.5, None, None]


def test_all_attempts_share_the_time_of_the_first() -> None:
    errand = errand_of(protocol.Status(), protocol.read_reply, seconds=10.0)
    assert errand.attempt(100.0) == 10.0
    assert errand.pause_after(ConnectionRefusedError(), 103.0) == 0.0
    assert errand.attempt(104.0) == 6.0
    with pytest.raises(BrokerUnreachable):
        errand.pause_after(ConnectionRefusedError(), 110.0)


def test_a_later_attempt_asks_only_for_what_is_left_of_the_wait() -> None:
    errand = errand_of(protocol.GetWorker(wait=60.0, client="me"), protocol.read_address, seconds=70.0)
    errand.attempt(100.0)
    assert errand.begin() == b"GET_WORKER wait=60 client=me\n"
    assert errand.pause_after(ConnectionResetError(), 140.0) == 0.0
    assert errand.attempt(141.5) == 28.5
    assert errand.begin() == b"GET_WORKER wait=18.5 client=me\n"


def test_no_attempt_begins_after_the_callers_wait() -> None:
    errand = errand_of(
        protocol.GetWorker(wait=60.0), protocol.read_address, seconds=70.0, retry=Retry(pause_seconds=1.0)
    )
    errand.attempt(100.0)
    with pytest.raises(BrokerUnreachable):
        errand.pause_after(ConnectionResetError(), 159.0)


@pytest.mark.parametrize("trouble", [TimeoutError(), socket.gaierror(-2, "Name or service not known")])
def test_only_a_broken_connection_is_tried_again(trouble: OSError) -> None:
    errand = errand_of(protocol.Status(), protocol.read_reply)
    errand.attempt(0.0)
    with pytest.raises(
        BrokerUnreachable, match=r"broker\.example:9000: (timed out|Name or service not known)"
    ):
        errand.pause_after(trouble, 0.0)


def test_an_attempt_forgets_the_half_answer_of_the_one_before() -> None:
    errand = errand_of(protocol.GetWorker(), protocol.read_address)
    errand.attempt(0.0)
    assert not errand.receive(b"10.0.")
    errand.attempt(1.0)
    assert errand.receive(b"10.0.0.1\r\n")
    assert errand.result() == "10.0.0.1"


# --- where, and who ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "port", "environ", "place"),
    [
        (None, None, {}, "127.0.0.1:9000"),
        ("lab", None, {}, "lab:9000"),
        ("lab", 9001, {}, "lab:9001"),
        ("lab:9001", None, {}, "lab:9001"),
        ("lab:9001", 9002, {}, "lab:9002"),
        ("::1", None, {}, "[::1]:9000"),
        ("fe80::1", 9001, {}, "[fe80::1]:9001"),
        ("[::1]", None, {}, "[::1]:9000"),
        ("[::1]:9001", None, {}, "[::1]:9001"),
        (None, None, {"COMPUTE_BROKER_HOST": "lab"}, "lab:9000"),
        (None, None, {"COMPUTE_BROKER_HOST": "lab:9001"}, "lab:9001"),
        (None, None, {"COMPUTE_BROKER_HOST": "lab", "COMPUTE_BROKER_PORT": "9001"}, "lab:9001"),
        (None, None, {"COMPUTE_BROKER_PORT": "9001"}, "127.0.0.1:9001"),
        (None, 9002, {"COMPUTE_BROKER_HOST": "lab", "COMPUTE_BROKER_PORT": "9001"}, "lab:9002"),
        ("lab", None, {"COMPUTE_BROKER_HOST": "other", "COMPUTE_BROKER_PORT": "9001"}, "lab:9000"),
    ],
)
def test_the_broker_is_found_by_argument_then_environment_then_on_this_machine(
    host: str | None, port: int | None, environ: dict[str, str], place: str
) -> None:
    assert str(endpoint(host, port, environ)) == place


@pytest.mark.parametrize(("host", "port"), [("", None), ("lab:http", None), ("lab", 0), ("lab", 65_536)])
def test_a_place_that_is_none_is_refused_with_what_is_needed(host: str, port: int | None) -> None:
    with pytest.raises(errors.BadRequest, match="host or host:port is needed"):
        endpoint(host, port, {})


def test_a_client_names_itself_and_no_two_have_one_name() -> None:
    names = [Client().name, AsyncClient().name, Client().name]
    assert len(set(names)) == 3
    for name in names:
        assert re.fullmatch(rf".+@.+/{os.getpid()}\.\d+", name)
        assert protocol.CLIENT_NAME.fullmatch(name)


def test_a_user_without_a_name_goes_by_number() -> None:
    told = run_python(
        """
        import os, pwd, broker
        for key in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            os.environ.pop(key, None)
        pwd.getpwuid = lambda uid: {}[uid]  # as in a container that runs under a number
        print(broker.Client().name.startswith(f"{os.getuid()}@"))
        """
    )
    assert told == "True\n"


def test_a_name_keeps_to_what_the_protocol_allows() -> None:
    assert fit_name("jürgen müller@lab", "/12.3") == "j-rgen-m-ller@lab/12.3"
    for length in range(1, 200):
        assert protocol.CLIENT_NAME.fullmatch(fit_name("x" * length, "/4194304.1000000"))


def test_long_names_that_begin_alike_remain_two_clients() -> None:
    long = "deployment-" * 8
    assert fit_name(long + "a", "/1.1") != fit_name(long + "b", "/1.1")


def test_a_forked_child_is_another_client() -> None:
    told = run_python(
        """
        import os, broker
        client = broker.Client()
        before = client.name
        if os.fork() == 0:
            assert client.name != before and f"/{os.getpid()}." in client.name
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.wait()[1]), client.name == before)
        """
    )
    assert told == "7 True\n"


# --- a worker for the time of a block ---------------------------------------------------------------------


def test_a_block_gets_a_worker_and_releases_it(opened: Open) -> None:
    fake = opened()
    with broker.worker("127.0.0.1", fake.port, cores=64, wait=30) as w:
        assert (w.address, w.port) == ("127.0.0.1", 2560)
        assert not w.lost
        assert fake.heard == ["GET_WORKER cores=64 wait=30"]
    assert fake.heard == ["GET_WORKER cores=64 wait=30", "RELEASE 127.0.0.1"]
    assert fake.names == [w.client]


def test_an_async_block_gets_a_worker_and_releases_it(opened: Open) -> None:
    fake = opened()

    async def use() -> str:
        async with broker.aworker(f"127.0.0.1:{fake.port}", pool="big", type="c7i.large", region="x") as w:
            assert (w.address, w.port) == ("127.0.0.1", 2560)
            assert not w.lost
        return w.client

    assert [asyncio.run(use())] == fake.names
    assert fake.heard == ["GET_WORKER pool=big type=c7i.large region=x", "RELEASE 127.0.0.1"]


def evaluating(fake: FakeBroker, connection: socket.socket) -> None:
    """Not a broker for once, but a worker: one frame in, one frame out."""
    script = connection.recv(1024)
    connection.sendall(b"\x00\x00\x00\x02" + script[-2:])


def test_a_script_goes_to_the_port_of_the_worker(opened: Open) -> None:
    worker = opened(evaluating, evaluating)
    with broker.worker("127.0.0.1", opened().port, worker_port=worker.port) as w:
        assert w.remote_eval("expr 42") == "42"

    async def use() -> None:
        async with broker.aworker("127.0.0.1", opened().port, worker_port=worker.port) as w:
            assert await w.remote_eval("expr 42") == "42"

    asyncio.run(use())


def test_two_blocks_of_one_process_are_two_clients(opened: Open) -> None:
    fake = opened()
    with broker.worker("127.0.0.1", fake.port) as one, broker.worker("127.0.0.1", fake.port) as other:
        assert one.address == other.address
        assert one.client != other.client
    assert fake.names == [one.client, other.client]


def test_blocks_that_are_given_one_name_are_one_client(opened: Open) -> None:
    fake = opened()
    with broker.worker("127.0.0.1", fake.port, client="job-7"):
        pass
    assert fake.names == ["job-7"]


def test_a_block_may_leave_the_worker_warm(opened: Open) -> None:
    fake = opened()
    with broker.worker("127.0.0.1", fake.port, release=False):
        pass

    async def use() -> None:
        async with broker.aworker("127.0.0.1", fake.port, release=False):
            pass

    asyncio.run(use())
    assert fake.heard == ["GET_WORKER", "GET_WORKER"]


def test_a_block_without_a_worker_never_begins(opened: Open) -> None:
    fake = opened(GET_WORKER="ERROR: nothing to be had [NO_CAPACITY]")
    with pytest.raises(errors.NoCapacity), broker.worker("127.0.0.1", fake.port):
        raise AssertionError("the block began")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ping")]
    assert fake.heard == ["GET_WORKER"]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_an_interval_that_is_none_is_refused_before_a_worker_is_asked_for(
    opened: Open, seconds: float
) -> None:
    fake = opened()
    with pytest.raises(errors.BadRequest), broker.worker("127.0.0.1", fake.port, ping_seconds=seconds):
        raise AssertionError("the block began")
    assert fake.heard == []


def test_the_worker_is_pinged_in_the_background_under_the_name_of_the_block(opened: Open) -> None:
    fake = opened()
    with broker.worker("127.0.0.1", fake.port, ping_seconds=0.01) as w:
        assert fake.heard_within(3, "PING 127.0.0.1")
    assert fake.names == [w.client]
    assert fake.heard[-1] == "RELEASE 127.0.0.1"
    assert fake.heard.count("RELEASE 127.0.0.1") == 1


def test_the_worker_is_pinged_in_the_background_of_a_loop(opened: Open) -> None:
    fake = opened()

    async def use() -> str:
        async with broker.aworker("127.0.0.1", fake.port, ping_seconds=0.01) as w:
            assert await asyncio.to_thread(fake.heard_within, 3, "PING 127.0.0.1")
        return w.client

    assert [asyncio.run(use())] == fake.names
    assert fake.heard[-1] == "RELEASE 127.0.0.1"


def test_a_ping_that_failed_is_tried_again_and_loses_nothing(opened: Open) -> None:
    fake = opened(courteous, answer(""), answer("ERROR: one moment [CLOUD]\n"))
    once = Retry(attempts_max=1)
    with broker.worker("127.0.0.1", fake.port, ping_seconds=0.01, retry=once) as w:
        assert fake.heard_within(4, "PING")
        assert not w.lost
    assert w.ping_error is None
    assert fake.heard[-1] == "RELEASE 127.0.0.1"


def test_why_the_last_ping_failed_can_be_asked(opened: Open) -> None:
    fake = opened(PING="ERROR: one moment [CLOUD]")
    with broker.worker("127.0.0.1", fake.port, ping_seconds=0.01) as w:
        assert fake.heard_within(2, "PING")  # the second comes when the first was taken in
        assert isinstance(w.ping_error, errors.CloudError)


@pytest.mark.parametrize("reply", ["ERROR: Worker not found", "ERROR: held by another [DENIED]"])
def test_a_worker_that_is_lost_is_told_of_and_not_released(opened: Open, reply: str) -> None:
    fake = opened(PING=reply)
    told: list[broker.HeldWorker] = []
    called = threading.Event()

    def on_lost(lost: broker.HeldWorker) -> None:
        told.append(lost)
        called.set()

    with broker.worker("127.0.0.1", fake.port, ping_seconds=0.01, on_lost=on_lost) as w:
        assert w.lost.wait(SECONDS_MAX)
        assert called.wait(SECONDS_MAX)
        assert w.lost
    assert told == [w]
    assert fake.heard == ["GET_WORKER", "PING 127.0.0.1"]


def test_a_worker_that_is_lost_is_told_of_in_a_loop(opened: Open) -> None:
    fake = opened(PING="ERROR: Worker not found")
    told: list[broker.AsyncHeldWorker] = []

    async def use() -> broker.AsyncHeldWorker:
        called = asyncio.Event()

        def on_lost(lost: broker.AsyncHeldWorker) -> None:
            told.append(lost)
            called.set()

        async with (
            asyncio.timeout(SECONDS_MAX),
            broker.aworker("127.0.0.1", fake.port, ping_seconds=0.01, on_lost=on_lost) as w,
        ):
            await w.lost.wait()
            await called.wait()
            assert w.lost
        return w

    assert [asyncio.run(use())] == told
    assert fake.heard == ["GET_WORKER", "PING 127.0.0.1"]


def test_a_worker_may_be_lost_with_nobody_to_tell(opened: Open) -> None:
    fake = opened(PING="ERROR: Worker not found")
    with broker.worker("127.0.0.1", fake.port, ping_seconds=0.01) as w:
        assert w.lost.wait(SECONDS_MAX)

    async def use() -> None:
        async with broker.aworker("127.0.0.1", fake.port, ping_seconds=0.01) as w:
            await asyncio.wait_for(w.lost.wait(), SECONDS_MAX)

    asyncio.run(use())
    assert fake.heard == ["GET_WORKER", "PING 127.0.0.1"] * 2


def test_an_error_in_the_block_releases_too(opened: Open) -> None:
    fake = opened()
    with pytest.raises(ZeroDivisionError), broker.worker("127.0.0.1", fake.port):
        raise ZeroDivisionError
    assert fake.heard == ["GET_WORKER", "RELEASE 127.0.0.1"]


def test_an_error_in_the_block_is_not_hidden_by_a_release_that_fails(opened: Open) -> None:
    fake = opened(RELEASE="ERROR: not now [DRAINING]")
    with pytest.raises(ZeroDivisionError) as caught, broker.worker("127.0.0.1", fake.port):
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["Nor could the worker be released: not now"]

    async def use() -> None:
        async with broker.aworker("127.0.0.1", fake.port):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        asyncio.run(use())
    assert caught.value.__notes__ == ["Nor could the worker be released: not now"]


def test_a_release_that_fails_after_a_good_block_is_raised(opened: Open) -> None:
    fake = opened(RELEASE="ERROR: not now [DRAINING]")
    with pytest.raises(errors.Draining), broker.worker("127.0.0.1", fake.port):
        pass

    async def use() -> None:
        async with broker.aworker("127.0.0.1", fake.port):
            pass

    with pytest.raises(errors.Draining):
        asyncio.run(use())


def slow_ping(fake: FakeBroker, connection: socket.socket) -> None:
    """Answers a ping when nothing else has come for a moment: what came would have overtaken it."""
    line_from(fake, connection)
    fake.hear("overtaken" if fake.heard_within(1, "RELEASE", seconds=0.1) else "in order")
    connection.sendall(b"OK\n")


def test_a_release_never_overtakes_a_ping_that_would_take_the_worker_again(opened: Open) -> None:
    fake = opened(courteous, slow_ping)
    with broker.worker("127.0.0.1", fake.port, ping_seconds=0.01):
        assert fake.heard_within(1, "PING")
    assert fake.heard == ["GET_WORKER", "PING 127.0.0.1", "in order", "RELEASE 127.0.0.1"]


def test_a_release_never_overtakes_a_ping_in_a_loop(opened: Open) -> None:
    fake = opened(courteous, slow_ping)

    async def use() -> None:
        async with broker.aworker("127.0.0.1", fake.port, ping_seconds=0.01):
            assert await asyncio.to_thread(fake.heard_within, 1, "PING")

    asyncio.run(use())
    assert fake.heard == ["GET_WORKER", "PING 127.0.0.1", "in order", "RELEASE 127.0.0.1"]


def test_a_block_that_is_cancelled_releases(opened: Open) -> None:
    fake = opened()

    async def use() -> None:
        begun = asyncio.Event()

        async def block() -> None:
            async with broker.aworker("127.0.0.1", fake.port):
                begun.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(block())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(use())
    assert fake.heard == ["GET_WORKER", "RELEASE 127.0.0.1"]


def test_a_second_cancellation_ends_the_waiting_and_not_the_release(opened: Open) -> None:
    go_on = threading.Event()

    def slow_release(fake: FakeBroker, connection: socket.socket) -> None:
        line_from(fake, connection)
        assert go_on.wait(SECONDS_MAX)
        connection.setblocking(False)
        try:
            connection.recv(1)
        except BlockingIOError:
            fake.hear("still there")
        connection.sendall(b"OK\n")

    fake = opened(courteous, slow_release)

    async def use() -> None:
        begun = asyncio.Event()

        async def block() -> None:
            async with broker.aworker("127.0.0.1", fake.port):
                begun.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(block())
        await begun.wait()
        task.cancel()
        assert await asyncio.to_thread(fake.heard_within, 1, "RELEASE")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        assert await asyncio.to_thread(fake.heard_within, 1, "still there")

    asyncio.run(use())
    assert fake.heard == ["GET_WORKER", "RELEASE 127.0.0.1", "still there"]


def test_a_cancelled_request_resets_its_connection_so_that_its_place_is_free(opened: Open) -> None:
    def until_reset(fake: FakeBroker, connection: socket.socket) -> None:
        line_from(fake, connection)
        try:
            fake.hear(f"received {connection.recv(1)!r}")
        except ConnectionResetError:
            fake.hear("reset")

    fake = opened(until_reset)

    async def use() -> None:
        task = asyncio.create_task(AsyncClient("127.0.0.1", fake.port).get_worker())
        assert await asyncio.to_thread(fake.heard_within, 1, "GET_WORKER")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.heard_within, 1, "reset")

    asyncio.run(use())


def test_a_forked_child_that_leaves_the_block_releases_nothing(opened: Open) -> None:
    fake = opened()
    told = run_python(
        f"""
        import asyncio, os, warnings, broker
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork() in a process with threads

        def fork():
            child = os.fork()
            if child:
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            return child

        async def use():
            async with broker.aworker("127.0.0.1", {fake.port}):
                child = fork()
            if not child:
                os._exit(8)

        with broker.worker("127.0.0.1", {fake.port}):
            child = fork()
        if not child:
            os._exit(7)
        asyncio.run(use())
        """
    )
    assert told == "7\n8\n"
    assert fake.heard == ["GET_WORKER", "RELEASE 127.0.0.1"] * 2


# --- the package ------------------------------------------------------------------------------------------


def run_python(script: str) -> str:
    """What a Python of its own prints when every warning is an error."""
    lines = script.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    source = "\n".join(line[indent:] for line in lines)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_whole_use_leaves_no_warning_behind(opened: Open) -> None:
    fake = opened(courteous, reset, STATUS="[]")
    told = run_python(
        f"""
        import asyncio, broker
        where = "127.0.0.1:{fake.port}"
        with broker.worker(where, ping_seconds=0.01) as w:
            print(broker.Client(where).status())
        try:
            broker.Client("127.0.0.1:1", retry=broker.Retry(attempts_max=1)).status()
        except broker.BrokerUnreachable:
            print("unreachable")
        async def use():
            async with broker.aworker(where, ping_seconds=0.01) as w:
                print(await broker.AsyncClient(where).status())
        asyncio.run(use())
        """
    )
    assert told == "[]\nunreachable\n[]\n"


def test_importing_the_client_loads_neither_settings_nor_cloud_libraries() -> None:
    told = run_python(
        """
        import sys, broker
        print([name for name in sys.modules if name.startswith("broker.")])
        print(broker.worker.__name__, broker.NoCapacity.__name__)
        heavy = {"pydantic", "aiobotocore", "botocore", "aiohttp", "structlog", "typer", "uvloop"}
        print(heavy & set(sys.modules))
        """
    )
    assert told == "[]\nworker NoCapacity\nset()\n"


def test_every_name_of_the_package_is_there_and_no_other() -> None:
    assert set(broker.__all__) <= set(dir(broker))
    for name in broker.__all__:
        assert getattr(broker, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        broker.nonsense  # type: ignore[attr-defined]  # noqa: B018
