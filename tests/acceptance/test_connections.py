"""What arrives on port 9000 beside well-meant commands, and in how many pieces."""

from __future__ import annotations

import json
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from broker.daemon import FILES_SPARE
from tests.acceptance.lab import Lab, is_capable_error, laboratory
from tests.support.broker_process import BrokerProcess, BrokerProcesses, eventually
from tests.support.cloud import MotoServer

CONNECTIONS_MAX = 800
IDLE = 700
SCANS = 200
FILES_LEFT = 10
FILES_FEW = 300
AT_ONCE_SECONDS_MAX = 5.0


@pytest.fixture(scope="module")
def lab(moto_server: MotoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(moto_server, tmp_path_factory.mktemp("connections")) as lab:
        yield lab


@pytest.fixture(scope="module")
def shared_broker(lab: Lab) -> BrokerProcess:
    limits = {"connections_max": CONNECTIONS_MAX, "line_timeout": "1s"}
    return lab.broker_to_be(broker=limits, pools={"default": {}, "untouched": {}}).start()


@pytest.fixture
def broker(shared_broker: BrokerProcess) -> Iterator[BrokerProcess]:
    """The shared broker, to which nobody is connected."""
    eventually(lambda: connections(shared_broker) == 0)
    yield shared_broker
    shared_broker.hang_up()


def connections(broker: BrokerProcess) -> float:
    return broker.metric("compute_broker_connections")


@pytest.fixture
def launches_nothing(lab: Lab, broker: BrokerProcess) -> Iterator[None]:
    """The test that asks for this must not cause a launch."""
    calls = len(lab.proxy.calls_of("RunInstances"))
    yield
    broker.status()  # everything that was sent before this has been read
    lab.wait_for_scans(2)
    assert len(lab.proxy.calls_of("RunInstances")) == calls


# ---------------------------------------------------------------- who wants nothing, buys nothing


@pytest.mark.usefixtures("launches_nothing")
def test_a_port_scan_launches_nothing(broker: BrokerProcess) -> None:
    for _ in range(SCANS):
        broker.connect().close()


@pytest.mark.usefixtures("launches_nothing")
def test_a_client_that_ends_without_a_byte_launches_nothing(broker: BrokerProcess) -> None:
    for client in [broker.connect().half_close() for _ in range(20)]:
        assert client.rest() == []


@pytest.mark.usefixtures("launches_nothing")
@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: broker\r\nUser-Agent: probe\r\nAccept: */*\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n\r\n",
        b"OPTIONS / RTSP/1.0\r\n\r\n",
        b"SSH-2.0-scanner\r\n\n\n",
        b"\x16\x03\x01\x00\x06\x01\n\n\r\n\n",
        bytes(256) + b"\n\n",
    ],
)
def test_a_health_check_or_scanner_that_speaks_something_else_launches_nothing(
    broker: BrokerProcess, request_bytes: bytes
) -> None:
    replies = broker.connect().send(request_bytes).half_close().rest()
    assert set(replies) == {"ERROR: Unknown command"}


@pytest.mark.usefixtures("launches_nothing")
def test_a_tls_hello_launches_nothing(broker: BrokerProcess) -> None:
    context = ssl.create_default_context()
    with socket.create_connection((broker.host, broker.port), 5.0) as plain:
        plain.settimeout(5.0)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(plain, server_hostname="broker")


# ---------------------------------------------------------------- packets


def test_a_command_that_arrives_byte_by_byte_is_one_command(lab: Lab, broker: BrokerProcess) -> None:
    client = broker.connect()
    for byte in b"GET_WORKER client=slow\r\n":
        client.send(bytes([byte]))
    assert lab.works(client.line())


def test_two_commands_in_one_packet_are_answered_in_their_order(lab: Lab, broker: BrokerProcess) -> None:
    address = broker.ask("GET_WORKER")
    client = broker.connect().send(f"PING {address}\nGET_WORKER\nPING 127.9.9.9\nSTATUS\nNONSENSE\n")
    assert [client.line() for _ in range(3)] == ["OK", address, "ERROR: Worker not found"]
    assert address in [worker["ip"] for worker in json.loads(client.line())]
    assert client.line() == "ERROR: Unknown command"


def test_replies_keep_the_order_of_commands_although_the_first_has_to_wait(
    lab: Lab, broker: BrokerProcess
) -> None:
    launch = lab.proxy.stall("RunInstances")
    client = broker.connect().send("GET_WORKER pool=untouched wait=60\nPING 127.9.9.9\n")
    launch.wait_hit()
    assert not client.answered()
    launch.release()
    assert [client.line(), client.line()] == [
        lab.address(lab.only("untouched")),
        "ERROR: Worker not found",
    ]


def test_a_carriage_return_belongs_to_the_end_of_the_line(broker: BrokerProcess) -> None:
    address = broker.ask("GET_WORKER")
    client = broker.connect().send(f"GET_WORKER\r\nPING {address}\r\n")
    assert [client.line(), client.line()] == [address, "OK"]


def test_an_empty_line_asks_for_a_worker_as_it_always_did(broker: BrokerProcess) -> None:
    assert broker.ask("") == broker.ask("GET_WORKER")


def test_a_last_line_without_its_newline_is_answered_when_the_client_half_closes(
    broker: BrokerProcess,
) -> None:
    address = broker.ask("GET_WORKER")
    assert broker.connect().send(f"PING {address}").half_close().rest() == ["OK"]


def test_a_line_without_end_is_refused_and_hung_up(broker: BrokerProcess) -> None:
    replies = broker.connect().send(b"GET_WORKER client=" + b"x" * 2000).rest()
    assert replies == ["ERROR: a command is at most 1024 bytes [BAD_REQUEST]"]


def test_half_a_line_is_waited_for_so_long_and_then_told_and_hung_up(broker: BrokerProcess) -> None:
    (reply,) = broker.connect().send("GET_WOR").rest()
    assert is_capable_error(reply, "TIMEOUT")
    assert "not finished within 1 s" in reply


# ---------------------------------------------------------------- limits


def test_hundreds_of_idle_connections_do_not_keep_a_client_from_its_worker(
    lab: Lab, broker: BrokerProcess
) -> None:
    idle = [broker.connect() for _ in range(IDLE)]
    eventually(lambda: connections(broker) == IDLE)
    assert lab.works(broker.ask("GET_WORKER client=busy", AT_ONCE_SECONDS_MAX))
    assert not any(client.answered() for client in idle), "nobody was hung up on"


def test_who_comes_when_the_house_is_full_is_told_and_gets_in_when_somebody_leaves(
    broker: BrokerProcess,
) -> None:
    guests = [broker.connect() for _ in range(CONNECTIONS_MAX)]
    eventually(lambda: connections(broker) == CONNECTIONS_MAX)
    (reply,) = broker.connect().rest()
    assert is_capable_error(reply, "LIMIT")
    assert "too many connections" in reply
    guests.pop().close()
    eventually(lambda: connections(broker) < CONNECTIONS_MAX)
    assert broker.ask("PING 127.9.9.9") == "ERROR: Worker not found"


def test_a_broker_that_runs_out_of_file_descriptors_serves_again_when_there_are_some(
    lab: Lab, broker: BrokerProcess
) -> None:
    address = broker.ask("GET_WORKER")
    held = broker.connect()
    assert held.say(f"PING {address}").line() == "OK"
    limits = resource.prlimit(broker.pid, resource.RLIMIT_NOFILE)
    process = psutil.Process(broker.pid)
    files = process.num_fds() + FILES_LEFT
    resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (files, limits[1]))
    crowd = [broker.connect().say(f"PING {address}") for _ in range(5 * FILES_LEFT)]
    eventually(lambda: process.num_fds() >= files - 1, what="the last descriptor is taken")
    assert held.say(f"PING {address}").line() == "OK", "who is in stays in"
    for client in crowd:
        client.close()
    eventually(lambda: pinged(broker, address) == ["OK"])
    resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, limits)
    assert lab.works(broker.ask("GET_WORKER"))


def test_a_broker_that_may_open_few_files_takes_fewer_clients_and_says_so(brokers: BrokerProcesses) -> None:
    broker = brokers.make({})
    broker.prefix = ("/bin/sh", "-c", f'ulimit -n {FILES_FEW} && exec "$@"', "sh")
    broker.start()
    (warning,) = broker.events("fewer connections than connections_max are possible")
    assert warning["limit_nofile"] == FILES_FEW
    crowd = [broker.asking("PING 127.9.9.9") for _ in range(100)]
    said = Counter(client.line() for client in crowd)
    assert said.pop("ERROR: Worker not found") == FILES_FEW - FILES_SPARE
    assert all(is_capable_error(line, "LIMIT") for line in said), said
    broker.hang_up()
    eventually(lambda: connections(broker) == 0)
    assert broker.ask("GET_WORKER").startswith("127."), "there are files left for what a worker needs"


def pinged(broker: BrokerProcess, address: str) -> list[str]:
    """The reply to a PING, none when the connection ends without one."""
    with broker.connect() as client:
        return client.say(f"PING {address}").half_close().rest()
