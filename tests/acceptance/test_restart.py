"""kill -9 at every stage of a worker's life, a new broker on the same state: nothing is lost or doubled."""

from __future__ import annotations

import pytest

from broker import remote_eval
from tests.acceptance.lab import Delays, Lab, is_capable_error
from tests.support.broker_process import BrokerProcess, BrokerProcesses, eventually
from tests.support.fault_proxy import FOREVER

BOOT_STAGES: dict[str, Delays] = {
    "pending": {"pending": FOREVER},
    "without an address": {"unaddressed": FOREVER},
}


def restart(broker: BrokerProcess) -> None:
    broker.kill()
    broker.start()


def booting_order(lab: Lab, broker: BrokerProcess) -> str:
    """Asks for a worker that does not become ready; returns its order once the machine is known."""
    broker.asking("GET_WORKER client=ada")
    return str(broker.wait_for_event("worker booting")["worker"])


# ---------------------------------------------------------------- with a machine that runs


def test_a_killed_brokers_running_worker_is_handed_out_again_by_the_next_and_ends_with_its_release(
    lab: Lab,
) -> None:
    broker = lab.broker()
    address = broker.ask("GET_WORKER client=ada")
    restart(broker)
    assert broker.ask(f"PING {address} client=ada") == "OK"
    assert broker.ask("GET_WORKER client=bob") == address
    assert broker.ask(f"RELEASE {address} client=bob") == "OK"
    assert broker.ask("GET_WORKER client=ada") == address
    assert lab.works(address)
    assert lab.only().state == "running"
    assert broker.ask(f"RELEASE {address} client=ada") == "OK"
    lab.wait_until_terminated()
    assert len(lab.launch_calls()) == 1


def test_a_lease_outlives_the_broker_so_nobody_else_gets_an_exclusive_worker(lab: Lab) -> None:
    alone = {"sharing": "exclusive"}
    broker = lab.broker_to_be(pools={"default": alone, "full": {**alone, "max_workers": 1}}).start()
    address, only = broker.ask("GET_WORKER client=ada"), broker.ask("GET_WORKER pool=full client=ada")
    restart(broker)
    refusal = broker.ask("GET_WORKER pool=full client=bob wait=0.5")
    assert is_capable_error(refusal, "TIMEOUT")
    assert "max_workers = 1" in refusal
    assert broker.ask(f"PING {only} client=bob") == "ERROR: the worker is held by another client [DENIED]"
    assert broker.ask(f"RELEASE {only} client=bob") == "OK"
    assert broker.ask("GET_WORKER pool=full client=ada") == only
    another = broker.ask("GET_WORKER client=bob")
    assert another != address
    assert broker.ask("GET_WORKER client=ada") == address
    assert {lab.address(one) for one in lab.running()} == {address, another}
    assert [worker["leases"] for worker in broker.status()] == [1, 1, 1]
    assert lab.only("full").state == "running"


def test_a_release_that_was_answered_but_not_carried_out_leaves_no_machine_behind(lab: Lab) -> None:
    broker = lab.broker(idle_timeout="2s")
    address = broker.ask("GET_WORKER")
    terminate = lab.proxy.stall("TerminateInstances")
    assert broker.ask(f"RELEASE {address}") == "OK"
    terminate.wait_hit()
    broker.kill()
    assert lab.only().state == "running"
    broker.start()
    lab.wait_until_terminated()


def test_a_machine_reclaimed_while_no_broker_ran_is_not_handed_out(lab: Lab) -> None:
    broker = lab.broker()
    address = broker.ask("GET_WORKER")
    broker.kill()
    lab.proxy.reclaim(lab.only().instance_id)
    broker.start()
    assert broker.ask(f"PING {address}") == "ERROR: Worker not found"
    another = broker.ask("GET_WORKER")
    assert another != address
    assert [lab.address(one) for one in lab.running()] == [another]


# ---------------------------------------------------------------- with a machine that boots


@pytest.mark.parametrize("stage", BOOT_STAGES)
def test_a_worker_that_was_booting_is_handed_out_once_it_is_ready(lab: Lab, stage: str) -> None:
    broker = lab.broker()
    lab.proxy.after_launch(**BOOT_STAGES[stage])
    order = booting_order(lab, broker)
    restart(broker)
    assert [worker["state"] for worker in broker.status()] == ["booting"]
    askers = [broker.asking("GET_WORKER client=ada"), broker.asking("GET_WORKER client=bob")]
    lab.wait_for_scans(3)
    assert not any(asker.answered() for asker in askers)
    lab.proxy.settle()
    address = lab.address(lab.only())
    assert [asker.line() for asker in askers] == [address, address]
    assert lab.works(address)
    assert lab.tokens() == [order]


# ---------------------------------------------------------------- in the middle of a launch


def test_a_machine_whose_launch_was_never_answered_is_found_by_its_tag(lab: Lab) -> None:
    broker = lab.broker()
    launch = lab.proxy.stall("RunInstances", after_carrying_out=True)
    broker.asking("GET_WORKER")
    launch.wait_hit()
    assert len(lab.running()) == 1
    restart(broker)
    assert [worker["instance_id"] for worker in broker.status()] == [lab.only().instance_id]
    assert broker.ask("GET_WORKER") == lab.address(lab.only())
    assert len(lab.launch_calls()) == 1


def test_a_machine_that_no_listing_shows_yet_is_had_by_sending_the_same_order_again(lab: Lab) -> None:
    broker = lab.broker()
    lab.proxy.after_launch(hidden=FOREVER)
    launch = lab.proxy.stall("RunInstances", after_carrying_out=True)
    broker.asking("GET_WORKER")
    launch.wait_hit()
    restart(broker)
    asker = broker.asking("GET_WORKER")
    eventually(lambda: lab.launch_calls()[-1].outcome == "replayed", what="the order was sent again")
    assert not asker.answered()
    lab.proxy.settle()
    assert asker.line() == lab.address(lab.only())
    assert len(set(lab.tokens())) == 1


def test_an_order_on_disk_whose_call_was_never_carried_out_is_sent_again_when_somebody_asks(
    lab: Lab,
) -> None:
    broker = lab.broker()
    lab.proxy.reset("RunInstances")  # the broker pauses for a second now, before it calls again
    broker.asking("GET_WORKER")
    lab.proxy.wait_for_calls("RunInstances")
    restart(broker)
    lab.wait_for_scans(4)
    assert [worker["state"] for worker in broker.status()] == ["ordered"]
    assert (len(lab.launch_calls()), lab.machines()) == (1, []), "a restart by itself launches nothing"
    assert broker.ask("GET_WORKER") == lab.address(lab.only())
    first, second = lab.launch_calls()
    assert first.params == second.params


def test_a_call_that_arrives_after_its_broker_has_died_launches_no_second_machine(lab: Lab) -> None:
    broker = lab.broker()
    late = lab.proxy.stall("RunInstances")
    broker.asking("GET_WORKER")
    late.wait_hit()
    restart(broker)
    address = broker.ask("GET_WORKER")
    late.release()
    first, second = lab.proxy.wait_for_calls("RunInstances", 2)
    assert (first.outcome, second.outcome) == ("replayed", "ok")
    assert address == lab.address(lab.only())


def test_a_broker_killed_again_and_again_during_one_launch_still_has_one_machine(lab: Lab) -> None:
    broker = lab.broker()
    lab.proxy.after_launch(hidden=FOREVER)
    for _ in range(2):
        launch = lab.proxy.stall("RunInstances", after_carrying_out=True)
        broker.asking("GET_WORKER")
        launch.wait_hit()
        launch.cancel()
        restart(broker)
    lab.proxy.settle()
    assert broker.ask("GET_WORKER") == lab.address(lab.only())
    assert len(set(lab.tokens())) == 1


# ---------------------------------------------------------------- with local workers


def test_a_local_worker_outlives_its_broker_and_is_found_again(brokers: BrokerProcesses) -> None:
    broker = brokers.start({"pool.default": {"provider": "local"}})
    address = broker.ask("GET_WORKER")
    assert remote_eval(address, "set kept 42; pid", timeout=20.0)
    (process,) = broker.local_workers()
    restart(broker)
    assert broker.ask("GET_WORKER") == address
    assert remote_eval(address, "set kept", timeout=20.0) == "42"
    assert broker.ask(f"RELEASE {address}") == "OK"
    eventually(lambda: not process.is_running(), what="the worker's process has ended")
