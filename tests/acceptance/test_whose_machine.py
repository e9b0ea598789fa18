"""Which machines the broker ends, and which it never touches."""

from __future__ import annotations

import json
import time
from datetime import datetime

from broker.core import tags
from tests.acceptance.lab import BROKER_ID, Lab
from tests.support.broker_process import eventually

IDLE_SECONDS = 3.0
PING_SECONDS = 0.2  # so much more often than needed that a busy machine does not end a worker


def test_an_idle_worker_is_terminated_in_time_and_pings_keep_a_worker_until_they_stop(lab: Lab) -> None:
    idle = {"idle_timeout": f"{IDLE_SECONDS:g}s"}
    broker = lab.broker_to_be(pools={"default": idle, "pinged": idle}).start()
    unused, kept = broker.ask("GET_WORKER client=ada"), broker.ask("GET_WORKER pool=pinged client=ada")
    asked_at = time.monotonic()
    while time.monotonic() < asked_at + 1.6 * IDLE_SECONDS:
        assert broker.ask(f"PING {kept} client=ada") == "OK"
        time.sleep(PING_SECONDS)
    lab.wait_until_terminated()
    used_at = broker.wait_for_event("lease granted")["timestamp"]
    drained_at = broker.wait_for_event("worker draining")["timestamp"]
    lived = datetime.fromisoformat(drained_at) - datetime.fromisoformat(used_at)
    assert lived.total_seconds() > 0.99 * IDLE_SECONDS
    assert broker.ask(f"PING {unused} client=ada") == "ERROR: Worker not found"
    assert broker.metric("compute_broker_terminations_total", pool="default", reason="idle") == 1
    assert lab.only("pinged").state == "running"
    assert broker.ask("GET_WORKER pool=pinged client=bob") == kept
    lab.wait_until_terminated("pinged")
    assert broker.ask("GET_WORKER client=bob") != unused


def test_terminate_all_ends_what_is_ours_and_nothing_else(lab: Lab) -> None:
    nobodys = lab.launch_by_hand("dserv-worker")
    anothers = lab.launch_by_hand("dserv-worker", **{tags.BROKER: "another-lab"})
    broker = lab.broker(sharing="exclusive")
    for name in ("ada", "bob"):
        broker.ask(f"GET_WORKER client={name}")
    ours = {one.instance_id for one in lab.running()}
    listed = {worker["instance_id"] for worker in json.loads(broker.ask("LIST_ALL"))}
    assert listed == ours
    assert set(json.loads(broker.ask("TERMINATE_ALL"))["terminated"]) == ours
    lab.wait_until_terminated()
    lab.wait_for_scans(2)
    assert (lab.state(nobodys), lab.state(anothers)) == ("running", "running")
    asked_for = {v for call in lab.proxy.calls_of("TerminateInstances") for v in call.params.values()}
    assert not {nobodys, anothers} & asked_for
    assert json.loads(broker.ask("LIST_ALL")) == []


def test_terminate_all_ends_a_machine_of_ours_that_the_books_do_not_know(lab: Lab) -> None:
    broker = lab.broker(broker={"reconcile_interval": "5m"})  # the last scan was before the machine was there
    orphan = lab.launch_by_hand("dserv-worker", **{tags.BROKER: BROKER_ID, tags.POOL: "default"})
    assert json.loads(broker.ask("TERMINATE_ALL")) == {"terminated": [orphan]}
    eventually(lambda: lab.state(orphan) == "terminated")


def test_a_machine_with_our_tag_that_nobody_ordered_is_taken_in_and_ends_when_idle(lab: Lab) -> None:
    orphan = lab.launch_by_hand("dserv-worker", **{tags.BROKER: BROKER_ID, tags.POOL: "default"})
    broker = lab.broker(idle_timeout=f"{IDLE_SECONDS:g}s")
    eventually(lambda: [worker["instance_id"] for worker in broker.status()] == [orphan])
    eventually(lambda: lab.state(orphan) == "terminated")
    assert lab.launch_calls() == []


def test_without_adopt_name_tag_a_machine_with_our_name_is_left_alone(lab: Lab) -> None:
    older = lab.launch_by_hand("dserv-worker")
    broker = lab.broker()
    assert broker.ask("GET_WORKER") != lab.address(older)
    assert json.loads(broker.ask("TERMINATE_ALL"))["terminated"] == [lab.only().instance_id]
    lab.wait_until_terminated()
    assert lab.state(older) == "running"


def test_adopt_name_tag_takes_over_the_machine_of_an_older_broker_and_no_other(lab: Lab) -> None:
    older = lab.launch_by_hand("dserv-worker")
    anothers = lab.launch_by_hand("dserv-worker", **{tags.BROKER: "another-lab"})
    unrelated = lab.launch_by_hand("database")
    broker = lab.broker(adopt_name_tag=True)
    eventually(lambda: [worker["state"] for worker in broker.status()] == ["ready"])
    address = broker.ask("GET_WORKER")
    assert address == lab.address(older)
    assert lab.machine_at(address).tags[tags.BROKER] == BROKER_ID, "whoever finds it later knows whose it is"
    assert lab.works(address)
    assert lab.launch_calls() == []
    assert broker.ask(f"RELEASE {address}") == "OK"
    assert lab.state(older) == "running", "the older broker's clients may use it still"
    assert broker.ask(f"RELEASE {address} force") == "OK"
    eventually(lambda: lab.state(older) == "terminated")
    assert (lab.state(anothers), lab.state(unrelated)) == ("running", "running")
