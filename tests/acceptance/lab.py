"""A laboratory: an EC2 that behaves and misbehaves, worker ports that open with their machines, real brokers.

The way from GET_WORKER to the worker port is real: the fault proxy gives every machine an address in
127.0.0.0/8, and on it a stand-in listens from the moment the cloud calls the machine running until it is
terminated. What really was launched is asked of moto itself, never of the broker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from broker.core import tags
from tests.support import ec2_wire
from tests.support.broker_process import BrokerProcess, BrokerProcesses, eventually
from tests.support.cloud import CloudInstance, MotoServer
from tests.support.fault_proxy import CallRecord, FaultProxy, loopback_address
from tests.support.worker_stand_in import ANSWER_PREFIX, WorkerFleet, evaluate

BROKER_ID = "lab"
TYPES = ("c7i.large", "c6i.large")

# Quick, so that a test waits for the broker and not for its patience. A hand-out trusts no proof that is
# older than itself: what a test has just done to a machine counts for the very next client.
BROKER: Mapping[str, object] = {"id": BROKER_ID, "reconcile_interval": "300ms"}
POOL: Mapping[str, object] = {
    "provider": "ec2",
    "region": ec2_wire.REGION_DEFAULT,
    "image": "ami-12c6146b",
    "instance_types": TYPES[:1],  # RunInstances; with more of them it is a fleet
    "readiness_max_age": "0s",
}

Table = Mapping[str, object]


class Delays(TypedDict, total=False):
    """Arguments of `FaultProxy.after_launch`."""

    hidden: int
    pending: int
    unaddressed: int


@dataclass(frozen=True)
class Lab:
    """See the module. `fleet` is automatic; `late_fleet` opens a port only when a test says so."""

    moto: MotoServer
    proxy: FaultProxy
    fleet: WorkerFleet
    late_fleet: WorkerFleet
    brokers: BrokerProcesses

    # --- brokers ---------------------------------------------------------------------------------------

    def broker(self, *, broker: Table | None = None, **pool: object) -> BrokerProcess:
        """A broker with one pool, ready."""
        return self.broker_to_be(broker=broker, pools={"default": pool}).start()

    def broker_to_be(
        self, *, broker: Table | None = None, pools: Mapping[str, Table] | None = None
    ) -> BrokerProcess:
        """A broker that has not been started."""
        tables = {
            f"pool.{name}": {**POOL, "worker_port": self.fleet.port, **pool}
            for name, pool in (pools or {"default": {}}).items()
        }
        return self.brokers.make({"broker": {**BROKER, **(broker or {})}, **tables}, self.environ)

    @property
    def environ(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.proxy.endpoint_url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_EC2_METADATA_DISABLED": "true",  # never ask the link-local address of a real cloud
        }

    # --- the truth -------------------------------------------------------------------------------------

    def machines(self, pool: str = "default") -> list[CloudInstance]:
        """Every machine that any broker of ours ever launched for the pool."""
        return [one for one in self.proxy.truth() if one.tags.get(tags.POOL) == pool]

    def running(self, pool: str = "default") -> list[CloudInstance]:
        """What somebody pays for right now."""
        return [one for one in self.machines(pool) if one.state == "running"]

    def only(self, pool: str = "default") -> CloudInstance:
        """The one machine that was ever launched for the pool."""
        machines = self.machines(pool)
        assert len(machines) == 1, machines
        return machines[0]

    def launch_calls(self, pool: str = "default") -> list[CallRecord]:
        """The RunInstances calls for the pool, whatever became of them."""
        return [call for call in self.proxy.calls_of("RunInstances") if tag_of(call, tags.POOL) == pool]

    def tokens(self, pool: str = "default") -> list[str]:
        return [call.params["ClientToken"] for call in self.launch_calls(pool)]

    def wait_until_terminated(self, pool: str = "default", seconds_max: float = 20.0) -> None:
        eventually(lambda: not self.running(pool), seconds_max, f"no machine of pool {pool} runs any more")

    def wait_for_scans(self, count: int) -> None:
        """Returns when `count` listings that were asked for after this call have been answered."""
        seen = len(self.proxy.calls_of("DescribeInstances"))
        self.proxy.wait_for_calls("DescribeInstances", seen + count)

    def launch_by_hand(self, name: str, **more: str) -> str:
        """A machine that somebody launches past every broker; returns its id. `more` are further tags."""
        pairs = {tags.NAME: name, **{key.replace("__", ":").replace("_", "-"): v for key, v in more.items()}}
        tagging = {"TagSpecification.1.ResourceType": "instance"}
        for n, (key, value) in enumerate(pairs.items(), 1):
            tagging |= {f"TagSpecification.1.Tag.{n}.Key": key, f"TagSpecification.1.Tag.{n}.Value": value}
        parameters = {"ImageId": "ami-12c6146b", "InstanceType": TYPES[0], "MinCount": "1", "MaxCount": "1"}
        answer = self.moto.call("RunInstances", parameters | tagging)
        return ec2_wire.text_of(answer, "instancesSet", "item", "instanceId")

    def state(self, instance_id: str) -> str:
        return next(one.state for one in self.proxy.truth() if one.instance_id == instance_id)

    # --- workers ---------------------------------------------------------------------------------------

    def address(self, machine: CloudInstance | str) -> str:
        return loopback_address(machine if isinstance(machine, str) else machine.instance_id)

    def machine_at(self, address: str) -> CloudInstance:
        return next(one for one in self.proxy.truth() if loopback_address(one.instance_id) == address)

    def works(self, address: str) -> bool:
        """Whether the address really evaluates what is sent to its worker port."""
        return evaluate(address, self.fleet.port, "expr 6*7") == ANSWER_PREFIX.decode() + "expr 6*7"


@contextmanager
def laboratory(moto: MotoServer, directory: Path) -> Iterator[Lab]:
    """A fresh lab. Leaving checks what must hold after every test: no order brings more than it is for."""
    moto.reset()
    with (
        FaultProxy(moto) as proxy,
        WorkerFleet(proxy, automatic=True) as fleet,
        WorkerFleet(proxy, automatic=False) as late_fleet,
        BrokerProcesses(directory) as brokers,
    ):
        yield Lab(moto, proxy, fleet, late_fleet, brokers)
        orders = Counter(one.tags[tags.ORDER] for one in proxy.truth() if tags.ORDER in one.tags)
        asked = {call.params["ClientToken"]: ordered_by(call) for call in launches_of(proxy)}
        assert all(count <= asked.get(order, 1) for order, count in orders.items()), (orders, asked)


def launches_of(proxy: FaultProxy) -> list[CallRecord]:
    return [*proxy.calls_of("RunInstances"), *proxy.calls_of("CreateFleet")]


def ordered_by(call: CallRecord) -> int:
    """For how many machines a launch call is."""
    return int(call.params.get("MaxCount") or call.params["TargetCapacitySpecification.TotalTargetCapacity"])


def tag_of(call: CallRecord, key: str, specification: int = 1) -> str:
    """The value of a tag in a launch call, "" when it is not there."""
    prefix = f"TagSpecification.{specification}.Tag."
    for name, value in call.params.items():
        if name.startswith(prefix) and name.endswith(".Key") and value == key:
            return call.params.get(f"{name.removesuffix('.Key')}.Value", "")
    return ""


def is_capable_error(reply: str, code: str) -> bool:
    """Whether a reply is an error with this code and a sentence before it."""
    return reply.startswith("ERROR: ") and reply.endswith(f" [{code}]") and len(reply.split()) > 4
