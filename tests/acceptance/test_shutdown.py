"""SIGTERM: everybody is answered, workers live on, orders are kept, and it does not take for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.acceptance.lab import Lab, is_capable_error, laboratory
from tests.support.broker_process import STOP_SECONDS_MAX, BrokerProcess, Conversation
from tests.support.cloud import MotoServer
from tests.support.fault_proxy import FOREVER

IN_ORDER_SECONDS_MAX = 10.0  # when nothing is under way


@dataclass(frozen=True)
class Unanswered:
    """A broker that was told to end while the cloud does not answer its launch."""

    lab: Lab
    broker: BrokerProcess
    waiting: Conversation
    asked_to_end_at: float


@pytest.fixture(scope="module", autouse=True)
def unanswered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unanswered]:
    """Begun first and looked at last, in a cloud of its own: it takes 20 s and needs nobody meanwhile."""
    with MotoServer(images=False) as moto, laboratory(moto, tmp_path_factory.mktemp("unanswered")) as lab:
        broker = lab.broker()
        lab.proxy.after_launch(hidden=FOREVER)  # no listing tells of the machine either
        launch = lab.proxy.stall("RunInstances", after_carrying_out=True)
        waiting = broker.asking("GET_WORKER")
        launch.wait_hit()
        broker.ask_to_end()
        yield Unanswered(lab, broker, waiting, time.monotonic())


def stopped(broker: BrokerProcess) -> dict[str, object]:
    """What the broker says with its last line."""
    assert broker.log[-1]["event"] == "stopped"
    return broker.log[-1]


def test_a_broker_that_is_told_to_end_leaves_its_workers_running_for_the_next(lab: Lab) -> None:
    broker = lab.broker()
    address = broker.ask("GET_WORKER client=ada")
    idle = broker.connect()
    broker.terminate(IN_ORDER_SECONDS_MAX)
    assert idle.rest() == []
    assert stopped(broker)["workers_left_running"] == [lab.only().instance_id]
    assert lab.works(address)
    broker.start()
    assert broker.ask("GET_WORKER client=ada") == address
    assert len(lab.launch_calls()) == 1


def test_a_client_that_waits_for_a_boot_is_told_and_the_machine_is_there_for_the_next_broker(
    lab: Lab,
) -> None:
    broker = lab.broker()
    lab.proxy.after_launch(pending=FOREVER)
    waiting = [broker.asking(f"GET_WORKER client={name}") for name in ("ada", "bob")]
    broker.wait_for_event("worker booting")
    broker.terminate(IN_ORDER_SECONDS_MAX)
    for client in waiting:
        (reply,) = client.rest()
        assert is_capable_error(reply, "DRAINING")
    lab.proxy.settle()
    broker.start()
    assert broker.ask("GET_WORKER client=ada") == lab.address(lab.only())


def test_a_launch_under_way_is_waited_for_and_its_machine_known(lab: Lab) -> None:
    broker = lab.broker()
    launch = lab.proxy.stall("RunInstances", after_carrying_out=True)
    waiting = broker.asking("GET_WORKER")
    launch.wait_hit()
    broker.ask_to_end()
    (reply,) = waiting.rest()
    assert is_capable_error(reply, "DRAINING")
    assert broker.running
    launch.release()
    assert broker.exit_code(IN_ORDER_SECONDS_MAX) == 0
    last = stopped(broker)
    assert (last["workers_left_running"], last["open_orders"]) == ([lab.only().instance_id], [])
    assert lab.only().state == "running"


def test_a_launch_whose_machine_a_listing_has_shown_holds_up_nobody(lab: Lab) -> None:
    broker = lab.broker()
    lab.proxy.stall("RunInstances", after_carrying_out=True)
    assert broker.ask("GET_WORKER") == lab.address(lab.only())
    broker.terminate(IN_ORDER_SECONDS_MAX)
    assert stopped(broker)["workers_left_running"] == [lab.only().instance_id]


def test_what_was_asked_before_the_end_is_answered_before_the_end(lab: Lab) -> None:
    broker = lab.broker()
    address = broker.ask("GET_WORKER client=ada")
    terminate = lab.proxy.stall("TerminateInstances", times=FOREVER)
    releasing = broker.asking(f"RELEASE {address} client=ada")
    terminate.wait_hit()
    broker.terminate(IN_ORDER_SECONDS_MAX)
    assert releasing.rest() == ["OK"]


def test_a_launch_that_is_never_answered_is_left_to_the_next_broker_as_an_open_order(
    unanswered: Unanswered,
) -> None:
    lab, broker = unanswered.lab, unanswered.broker
    assert is_capable_error(unanswered.waiting.line(), "DRAINING")
    seconds_left = unanswered.asked_to_end_at + STOP_SECONDS_MAX - time.monotonic()
    assert broker.exit_code(max(0.1, seconds_left)) == 0
    assert stopped(broker)["open_orders"] == lab.tokens()
    assert lab.only().state == "running"
    lab.proxy.settle()
    broker.start()
    assert broker.ask("GET_WORKER") == lab.address(lab.only())
    assert len(set(lab.tokens())) == 1
