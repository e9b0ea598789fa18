"""SIGHUP to the real process: pools come, change and go, and nobody loses a connection or a machine."""

from __future__ import annotations

from pathlib import Path

from tests.acceptance.lab import POOL, TYPES, Lab
from tests.support.broker_process import BrokerProcess, eventually

RELOADED, REFUSED = "settings reloaded", "settings not reloaded: the old ones stay in force"


def test_a_reload_in_the_middle_of_a_launch_loses_neither_the_machine_nor_the_connection(lab: Lab) -> None:
    broker = lab.broker()
    launch = lab.proxy.stall("RunInstances")
    waiting, idle = broker.asking("GET_WORKER client=ada"), broker.connect()
    launch.wait_hit()
    changed = {**POOL, "worker_port": lab.fleet.port, "instance_types": TYPES[1:], "idle_timeout": "20m"}
    broker.reload({"pool.default": changed})
    assert broker.wait_for_event(RELOADED)["changed"] == ["default"]
    launch.release()
    assert waiting.line() == lab.address(lab.only())
    assert lab.launch_calls()[0].params["InstanceType"] == TYPES[0]
    assert idle.say("GET_WORKER client=ada").line() == lab.address(lab.only())
    broker.ask(f"RELEASE {lab.address(lab.only())} client=ada")
    lab.wait_until_terminated()
    assert broker.ask("GET_WORKER client=ada").startswith("127.")
    assert [call.params["InstanceType"] for call in lab.launch_calls()] == [*TYPES]
    assert broker.faults() == []


def test_a_pool_is_added_held_while_it_is_removed_and_ends_when_its_client_leaves(lab: Lab) -> None:
    broker, default = lab.broker(), {**POOL, "worker_port": lab.fleet.port}
    broker.reload({"pool.default": default, "pool.far": {**default, "region": "eu-west-1"}})
    broker.wait_for_event(RELOADED)
    address = broker.ask("GET_WORKER pool=far client=ada")
    assert address.startswith("127.")
    broker.reload({"pool.default": default})
    broker.wait_for_event(RELOADED, 2)
    assert broker.ask("GET_WORKER pool=far client=ben") == (
        "ERROR: there is no pool 'far' any more; there is default [BAD_REQUEST]"
    )
    assert broker.ask(f"PING {address} client=ada") == "OK"
    assert len(lab.running("far")) == 1
    broker.ask(f"RELEASE {address} client=ada")
    lab.wait_until_terminated("far")
    broker.wait_for_event("closed: no pool buys there and nothing is left", seconds_max=40)
    assert broker.faults() == []


def test_a_file_with_a_mistake_is_shown_and_the_local_broker_goes_on(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path, {"broker": {"id": "lab"}}) as broker:
        address = broker.ask("GET_WORKER client=ada")
        broker.reload("[broker]\nid = 7 7\n")
        assert "is not TOML" in str(broker.wait_for_event(REFUSED)["problems"])
        assert broker.metric("compute_broker_settings_outdated") == 1
        status, text = broker.http("/healthz")
        assert (status, text.splitlines()[0]) == (200, "ok")
        assert "is not TOML" in text
        assert broker.ask("GET_WORKER client=ben") == address
        broker.reload({"broker": {"id": "lab", "log_level": "warning"}})
        eventually(lambda: broker.metric("compute_broker_settings_outdated") == 0)
        broker.reload({"broker": {"id": "lab", "listen": "127.0.0.1:1"}})
        eventually(lambda: broker.metric("compute_broker_settings_outdated") == 1)
        assert broker.http("/healthz") == (200, "ok\nbroker.listen needs a restart\n")
