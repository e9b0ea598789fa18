"""SIGTERM: everybody is answered, workers live on, orders are kept, and it does not take for ever."""

from __future__ import annotations

from tests.acceptance.lab import Lab, is_capable_error
from tests.support.broker_process import BrokerProcess
from tests.support.fault_proxy import FOREVER

IN_ORDER_SECONDS_MAX = 10.0  # when nothing is under way


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


def test_a_launch_that_is_never_answered_is_left_to_the_next_broker_as_an_open_order(lab: Lab) -> None:
    broker = lab.broker()
    lab.proxy.after_launch(hidden=FOREVER)  # no listing tells of the machine either
    launch = lab.proxy.stall("RunInstances", after_carrying_out=True)
    waiting = broker.asking("GET_WORKER")
    launch.wait_hit()
    broker.terminate()  # bounded: an operator, and systemd, wait so long and no longer
    assert is_capable_error(waiting.line(), "DRAINING")
    assert stopped(broker)["open_orders"] == lab.tokens()
    assert lab.only().state == "running"
    lab.proxy.settle()
    broker.start()
    assert broker.ask("GET_WORKER") == lab.address(lab.only())
    assert len(set(lab.tokens())) == 1


def test_what_was_asked_before_the_end_is_answered_before_the_end(lab: Lab) -> None:
    broker = lab.broker()
    address = broker.ask("GET_WORKER client=ada")
    terminate = lab.proxy.stall("TerminateInstances", times=FOREVER)
    releasing = broker.asking(f"RELEASE {address} client=ada")
    terminate.wait_hit()
    broker.terminate(IN_ORDER_SECONDS_MAX)
    assert releasing.rest() == ["OK"]
