"""A broker that cannot work says why in a sentence, with an exit code, instead of starting."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.acceptance.lab import POOL, Lab
from tests.support.broker_process import BrokerProcess, BrokerProcesses, eventually

REFUSED, USAGE = 1, 2
SECONDS_MAX = 30.0

# Everything that is wrong with it, and what the operator must read about it.
BAD_TABLES: dict[str, dict[str, object]] = {
    "broker": {"id": "a b", "listen": "9000", "reconcile_intervall": "30s", "log_level": "loud"},
    "pool.default": {"max_workers": -1, "idle_timeout": "soon", "sharing": "maybe"},
    "pool.gpu": {"provider": "ec2"},
}
BAD_KEYS = (
    "broker.id", "broker.listen", "broker.reconcile_intervall", "did you mean reconcile_interval",
    "broker.log_level", "pool.default.max_workers", "pool.default.idle_timeout", "pool.default.sharing",
    "pool.gpu", "image",
)  # fmt: skip


def refusal(broker: BrokerProcess, code: int) -> str:
    """Starts a broker that must refuse; what it says, without its log."""
    broker.spawn()
    assert broker.exit_code(SECONDS_MAX) == code, broker.stderr
    said = [line for line in broker.stderr.splitlines() if not line.startswith("{")]
    assert said
    assert all(line.startswith("compute-broker: ") for line in said), broker.stderr
    return "\n".join(said)


def test_a_second_broker_on_the_same_state_directory_refuses_to_start(brokers: BrokerProcesses) -> None:
    first = brokers.start({})
    second = brokers.make({"broker": {"state_dir": str(first.state_dir)}})
    said = refusal(second, REFUSED)
    assert f"another broker (process {first.pid}) runs on the state directory {first.state_dir}" in said
    assert first.ask("STATUS") == "[]"
    first.terminate()
    second.start()
    assert second.ask("STATUS") == "[]"


@pytest.mark.parametrize("door", ["listen", "http"])
def test_a_port_that_is_taken_is_named(brokers: BrokerProcesses, door: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        said = refusal(brokers.make({"broker": {door: taken}}), REFUSED)
    assert "cannot listen on" in said
    assert taken in said
    assert "in use" in said


def test_every_mistake_in_the_file_is_told_at_once_with_its_key(brokers: BrokerProcesses) -> None:
    broker = brokers.make(BAD_TABLES)
    said = refusal(broker, USAGE)
    assert [key for key in BAD_KEYS if key not in said] == []
    assert not broker.state_dir.exists(), "nothing was begun"


def test_a_file_that_is_no_toml_is_told_with_its_line(brokers: BrokerProcesses) -> None:
    broker = brokers.make({})
    broker.config_file.write_text("[broker]\nid = lab\n")
    assert "line 2" in refusal(broker, USAGE)


def test_a_file_that_is_not_there_is_named(brokers: BrokerProcesses) -> None:
    broker = brokers.make({})
    broker.config_file.unlink()
    assert f"{broker.config_file}: there is no such file" in refusal(broker, USAGE)


def test_a_state_directory_that_cannot_be_made_is_named(brokers: BrokerProcesses, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("not a directory")
    state_dir = tmp_path / "a-file" / "state"
    said = refusal(brokers.make({"broker": {"state_dir": str(state_dir)}}), REFUSED)
    assert f"cannot use the state directory {state_dir}" in said


def test_listening_beyond_loopback_is_refused_until_somebody_says_that_he_means_it(
    brokers: BrokerProcesses,
) -> None:
    port = brokers.make({}).port
    said = refusal(brokers.make({"broker": {"listen": f"0.0.0.0:{port}"}}), USAGE)
    assert "insecure_listen" in said


def test_a_missing_region_is_one_sentence(brokers: BrokerProcesses, lab: Lab) -> None:
    pool = {key: value for key, value in POOL.items() if key != "region"}
    said = refusal(brokers.make({"pool.default": pool}, lab.environ), USAGE)
    assert said.startswith("compute-broker: pool.default.region: no AWS region is set")


def test_missing_credentials_are_one_sentence(brokers: BrokerProcesses, lab: Lab) -> None:
    environ = {key: value for key, value in lab.environ.items() if "KEY" not in key}
    said = refusal(brokers.make({"pool.default": POOL}, environ), USAGE)
    assert said.startswith("compute-broker: pool.default.profile: no AWS credentials were found")
    assert "\n" not in said


def test_an_unknown_machine_type_and_security_group_are_told_together(lab: Lab) -> None:
    pool = {"instance_types": ["c7i.huge"], "security_groups": ["dserv-workers"]}
    said = refusal(lab.broker_to_be(pools={"default": pool}), USAGE)
    assert 'has no machine type "c7i.huge"' in said
    assert 'has no security group named "dserv-workers"' in said


def test_a_broker_that_was_killed_leaves_nothing_that_keeps_the_next_from_starting(
    brokers: BrokerProcesses,
) -> None:
    broker = brokers.start({})
    busy = broker.connect()  # the port has connections of the dead
    broker.kill()
    broker.start()
    busy.close()
    assert eventually(lambda: broker.ask("STATUS")) == "[]"
