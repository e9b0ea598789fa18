"""A broker that starts while its cloud is away: alive, honest about it, and well again by itself."""

from __future__ import annotations

import pytest

from tests.acceptance.lab import Lab, is_capable_error
from tests.support.broker_process import BrokerProcess, eventually
from tests.support.fault_proxy import EVERY_ACTION, FaultProxy

MANY = 1_000
AT_ONCE_SECONDS_MAX = 5.0
TOLD_SECONDS_MAX = 30.0  # a scan of its own time limit may have to fail first; a client must not hang longer


def go_away(proxy: FaultProxy, how: str) -> None:
    if how == "reset":
        proxy.reset(EVERY_ACTION, times=MANY)
    else:
        proxy.refuse(EVERY_ACTION, how, times=MANY)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("reset", "does not answer"),
        ("AuthFailure", "does not accept the credentials"),
    ],
)
def test_a_broker_whose_cloud_is_away_says_so_and_serves_when_it_is_back(
    lab: Lab, how: str, words: str
) -> None:
    go_away(lab.proxy, how)
    broker = lab.broker_to_be().start(until="listening")
    assert_not_ready(broker, "ec2 us-east-1 has not been scanned yet")
    for command in (
        "PING 127.1.2.3",
        "GET_WORKER",
        "STATUS",
        "RELEASE 127.1.2.3",
        "LIST_ALL",
        "TERMINATE_ALL",
    ):
        looks_itself = command in ("LIST_ALL", "TERMINATE_ALL")
        refusal = broker.ask(command, TOLD_SECONDS_MAX if looks_itself else AT_ONCE_SECONDS_MAX)
        assert is_capable_error(refusal, "CLOUD"), (command, refusal)
        assert words in refusal
    assert_not_ready(broker, words)
    assert broker.http("/healthz") == (200, "ok\n")
    assert lab.proxy.calls_of("RunInstances") == []
    lab.proxy.heal()
    eventually(lambda: broker.http("/readyz")[0] == 200)
    assert lab.works(broker.ask("GET_WORKER"))


def assert_not_ready(broker: BrokerProcess, words: str) -> None:
    status, body = broker.http("/readyz")
    assert status == 503
    assert words in body


def test_a_cloud_that_says_nothing_at_all_keeps_neither_the_broker_nor_its_clients_waiting(lab: Lab) -> None:
    silence = lab.proxy.stall(EVERY_ACTION, times=MANY)
    broker, unwanted = lab.broker_to_be(), lab.broker_to_be(broker={"id": "unwanted"})
    for one in (broker, unwanted):
        one.spawn()
    silence.wait_hit(2)
    unwanted.ask_to_end()
    eventually(lambda: broker.events("listening"), TOLD_SECONDS_MAX, "the broker listens")
    assert_not_ready(broker, "no answer")
    for command in ("PING 127.1.2.3", "GET_WORKER"):
        assert is_capable_error(broker.ask(command, AT_ONCE_SECONDS_MAX), "CLOUD")
    assert unwanted.exit_code(TOLD_SECONDS_MAX) == 0
    lab.proxy.heal()
    eventually(lambda: broker.http("/readyz")[0] == 200)
    assert broker.ask("GET_WORKER") == lab.address(lab.only())


def test_a_client_that_comes_before_the_first_listing_waits_for_it_and_nothing_is_launched_before(
    lab: Lab,
) -> None:
    listing = lab.proxy.stall("DescribeInstances")
    broker = lab.broker_to_be().start(until="listening")
    listing.wait_hit()
    asker, impatient = broker.asking("GET_WORKER"), broker.asking("GET_WORKER wait=0.3 client=bob")
    assert impatient.line() == (
        "ERROR: the broker has just started and is still looking for its workers [TIMEOUT]"
    )
    assert not asker.answered()
    assert lab.proxy.calls_of("RunInstances") == []
    listing.release()
    assert asker.line() == lab.address(lab.only())


def test_after_a_restart_into_an_outage_the_machine_is_found_when_it_ends(lab: Lab) -> None:
    broker = lab.broker()
    address = broker.ask("GET_WORKER client=ada")
    broker.kill()
    go_away(lab.proxy, "reset")
    broker.start(until="listening")
    assert is_capable_error(broker.ask("GET_WORKER client=ada", TOLD_SECONDS_MAX), "CLOUD")
    lab.proxy.heal()
    eventually(lambda: broker.http("/readyz")[0] == 200)
    assert broker.ask("GET_WORKER client=ada") == address
    assert len(lab.launch_calls()) == 1
