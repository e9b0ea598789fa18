"""`compute-broker offerings` against a real HTTP API: what can be bought, and what a person has to mend."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.lab import Lab, laboratory
from tests.support.broker_process import bare_environment
from tests.support.cloud import MotoServer

FILE = """
[pool.default]
provider = "ec2"
region = "us-east-1"
image = "ami-12c6146b"
instance_types = ["c7i.large", "{second}"]
zones = ["us-east-1a"]
market = "spot-then-on-demand"
"""


@pytest.fixture(scope="module")
def lab(moto_server: MotoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(moto_server, tmp_path_factory.mktemp("offerings")) as one:
        yield one


def run(
    lab: Lab, directory: Path, *words: str, second: str = "c6i.large"
) -> subprocess.CompletedProcess[str]:
    file = directory / "broker.toml"
    file.write_text(FILE.format(second=second))
    command = [sys.executable, "-m", "broker", "offerings", "--config", str(file), *words]
    environ = {**bare_environment(directory / "home"), **lab.environ}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_every_offering_is_shown_with_cores_and_prices_and_nothing_is_launched(
    lab: Lab, tmp_path: Path
) -> None:
    told = run(lab, tmp_path, "--json")
    assert (told.returncode, told.stderr) == (0, "")
    rows = json.loads(told.stdout)
    assert [(row["instance_type"], row["market"]) for row in rows] == [
        ("c7i.large", "spot"), ("c6i.large", "spot"), ("c7i.large", "on-demand"), ("c6i.large", "on-demand"),
    ]  # fmt: skip
    assert {row["zone"] for row in rows} == {"us-east-1a"}
    assert {row["cores"] for row in rows} == {2}
    assert all(row["counted_usd_per_hour"] > 0 and row["assumed"] for row in rows)
    assert all((row["spot_usd_per_hour"] is not None) == (row["market"] == "spot") for row in rows)
    assert lab.launch_calls() == []
    table = run(lab, tmp_path).stdout.splitlines()
    assert table[0].split()[:5] == ["POOL", "REGION", "ZONE", "TYPE", "CORES"]
    assert len(table) == 1 + len(rows)


def test_what_the_cloud_does_not_have_is_a_mistake_with_its_key(lab: Lab, tmp_path: Path) -> None:
    told = run(lab, tmp_path, second="c6i.enormous")
    assert told.returncode == 2
    assert 'pool.default.instance_types: us-east-1 has no machine type "c6i.enormous"' in told.stderr


def test_a_cloud_that_refuses_to_be_asked_is_no_mistake_of_the_file(lab: Lab, tmp_path: Path) -> None:
    with_fault = lab.proxy.refuse("DescribeInstanceTypes", "InternalError", times=100)
    told = run(lab, tmp_path)
    lab.proxy.heal()
    assert with_fault is not None
    assert told.returncode == 1
    assert "compute-broker: ec2 us-east-1: " in told.stderr


def test_pools_that_buy_nothing_are_said_to(lab: Lab, tmp_path: Path) -> None:
    told = run(lab, tmp_path, "--pool", "gpu")
    assert (told.returncode, told.stderr) == (2, "compute-broker: there is no pool 'gpu'; there is default\n")
