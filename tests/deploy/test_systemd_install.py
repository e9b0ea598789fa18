"""deploy/systemd/README.md, followed line by line on a machine made of a folder."""

from __future__ import annotations

import ipaddress
import json
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.machine import Machine, Refused
from tests.deploy.manager import own_loopback_address
from tests.deploy.unit_file import REPOSITORY, SYSTEMD, need

INSTRUCTIONS = SYSTEMD / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^## (.*)$", re.MULTILINE)


def sections() -> dict[str, list[str]]:
    """Heading → its bash blocks, in order."""
    _, *parts = HEADING.split(INSTRUCTIONS.read_text())
    return {
        heading: [text for language, text in FENCE.findall(body) if language == "bash"]
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    for tool, package in (("systemd-sysusers", "systemd"), ("systemctl", "systemd"), ("curl", "curl")):
        need(tool, package)
    with Machine(tmp_path, own_loopback_address()) as machine:
        yield machine


def mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


def test_the_instructions_lead_from_nothing_to_a_worker_and_back_to_nothing(machine: Machine) -> None:
    blocks = sections()

    for block in blocks.pop("Install"):
        machine.type(block)
    assert mode(machine.path("/etc/compute-broker")) == "0750"
    assert mode(machine.path("/etc/compute-broker/broker.toml")) == "0640"
    assert machine.path("/etc/systemd/system/multi-user.target.wants/compute-broker.service").is_symlink()
    assert "compute-broker:" in machine.path("/etc/passwd").read_text()

    *looks, ask = blocks.pop("Look at it")
    for block in looks:
        machine.type(block)
    address = machine.type(ask).strip()
    assert ipaddress.ip_address(address).is_loopback

    for block in blocks.pop("AWS"):
        machine.type(block)
    assert mode(machine.path("/etc/compute-broker/aws/credentials")) == "0640"
    assert machine.type(ask).strip() == address  # the restart cost nobody a worker

    for block in blocks.pop("Keep the socket open across restarts"):
        machine.type(block)
    assert machine.path("/etc/systemd/system/sockets.target.wants/compute-broker.socket").is_symlink()
    assert machine.type(ask).strip() == address

    for block in blocks.pop("Update"):
        machine.type(block)
    assert machine.type(ask).strip() == address

    stop, *removal = blocks.pop("Stop for good, and uninstall")
    assert len(json.loads(machine.type(stop))["terminated"]) == 1
    for block in removal:
        machine.type(block)
    left = {path.name for path in machine.root.rglob("*") if "compute-broker" in path.name}
    assert left == set()

    assert not any(blocks.values()), f"blocks that nobody followed: {blocks}"


def test_every_command_that_could_not_be_real_was_looked_at(machine: Machine) -> None:
    machine.type("sudo apt-get update")
    assert machine.commands == [["sudo", "apt-get", "update"], ["apt-get", "update"]]
    for wrong in (
        "sudo systemctl start compute-broker.service",  # not installed yet
        "sudo systemctl frobnicate",
        "sudo -u nobody true",
        "sudo python3 -m pip",
        "sudo userdel root",
    ):
        with pytest.raises(Refused):
            machine.type(wrong)


@pytest.mark.parametrize(
    "script",
    [
        "rm -rf /",
        "rm /etc/passwd",
        "cat '/root/x'",
        "ls ~/x",
        "ls ~",
        "rm -r ../x",
        "cd x/../..",
        'rm "$X"/y',
    ],
)
def test_the_machine_refuses_a_path_that_is_not_its_own(machine: Machine, script: str) -> None:
    with pytest.raises(Refused):
        machine.rewritten(script)


def test_the_lock_names_every_dependency_with_hashes_and_no_host() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    locked = {name.lower() for name in re.findall(r"(?m)^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==", lock)}
    wanted = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in wanted} <= locked
    assert lock.count("==") <= lock.count("--hash=sha256:")
    assert "://" not in re.sub(r"(?m)^\s*#.*$", "", lock)
    assert "index-url" not in lock
