"""A pool in two regions of a real HTTP API: what one has not the other sells, and both are looked after."""

from __future__ import annotations

from pathlib import Path

from tests.acceptance.lab import BROKER, BROKER_ID, POOL, laboratory
from tests.support.broker_process import eventually
from tests.support.cloud import MotoServer

REGIONS = ["us-east-1", "eu-central-1"]


def test_what_one_region_has_not_is_bought_in_the_other_and_ends_there(
    moto_server: MotoServer, tmp_path: Path
) -> None:
    recipe = {key: value for key, value in POOL.items() if key not in ("region", "image")}
    with laboratory(moto_server, tmp_path) as lab:
        tables = {
            "broker": BROKER,
            "pool.default": {**recipe, "worker_port": lab.fleet.port, "regions": REGIONS},
            **{f"pool.default.in.{region}": {"image": POOL["image"]} for region in REGIONS},
        }
        broker = lab.brokers.start(tables, lab.environ)
        lab.proxy.refuse("RunInstances", "InsufficientInstanceCapacity", times=1)
        address = broker.ask("GET_WORKER client=a")
        assert lab.works(address)
        assert [call.region for call in lab.launch_calls()] == REGIONS
        machine = lab.machine_at(address)
        assert machine.region == "eu-central-1"
        assert broker.ask(f"RELEASE {address} client=a") == "OK"
        eventually(lambda: lab.proxy.running_ours(BROKER_ID) == [], 20.0, "the worker is terminated there")
