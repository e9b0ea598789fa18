"""EC2's shapes ↔ ours: the parameters of a launch, the filters of a listing, an instance. Pure.

A launch carries everything that makes its machine safe to forget: it ends when it shuts itself down, it is
never bought again after a reclaim, and its tags say whose it is and when it must be gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import Any

from broker.core.model import Instance, InstanceState, Market, Offering
from broker.core.settings import PoolSettings

Shape = Mapping[str, Any]

# In one CreateFleet; 300 are allowed for other fleets (AWS: EC2 user guide, "EC2 Fleet quotas").
OVERRIDES_MAX = 100
USER_DATA_BYTES_MAX = 16 * 1024  # raw, before base64 (AWS: EC2 user guide, "Run commands at launch")
ONE_TIME_SPOT = {
    "MarketType": "spot",
    "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
}
ADDRESS_FIELD = {"public": "PublicIpAddress", "private": "PrivateIpAddress", "dns": "PublicDnsName"}
FILTER_SPECIAL = re.compile(
    r"([\\*?])"
)  # wildcards, and what makes them plain (AWS: EC2 user guide, "Filtering")
TRANSITION = re.compile(r"\((?P<moment>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")


# The settings about which the cloud is asked before anything is bought with them.
ASKED = (
    "security_group_ids",
    "security_groups",
    "subnet",
    "subnets",
    "zones",
    "instance_types",
    "image_arm64",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a pool's launch needs beside its settings, as `open` found it."""

    security_group_ids: tuple[str, ...] = ()
    user_data: str = ""
    places: tuple[tuple[str, str], ...] = ()  # (zone, its subnet), as preferred, of a pool with subnets
    zones: tuple[str, ...] = ()  # of a pool that names neither
    arm: frozenset[str] = frozenset()  # those of the machine types that have Arm processors, as far as known
    asked: PoolSettings | None = None  # the settings about which the cloud was asked

    def subnet(self, pool: PoolSettings, offering: Offering) -> str | None:
        """Where a machine of that offering is plugged in; None: in the default VPC."""
        return dict(self.places).get(offering.zone) or next(iter(pool.own_subnets), None)

    def image(self, pool: PoolSettings, instance_type: str) -> str | None:
        """The image for such a machine where it is not the pool's usual one."""
        return image_id(pool.image_arm64) if pool.image_arm64 and instance_type in self.arm else None

    def suits(self, pool: PoolSettings) -> bool:
        """Whether the cloud has nothing to add for these settings."""
        asked = self.asked
        return asked is not None and all(getattr(pool, key) == getattr(asked, key) for key in ASKED)


def launch_parameters(
    pool: PoolSettings, recipe: Recipe, offering: Offering, tags: Mapping[str, str], count: int = 1
) -> dict[str, Any]:
    """RunInstances for so many machines at most, without its ClientToken. The SDK encodes UserData, once."""
    spot = offering.market is Market.SPOT
    tagged = ("instance", "volume", "spot-instances-request") if spot else ("instance", "volume")
    parameters: dict[str, Any] = {
        "MinCount": 1,
        "MaxCount": count,
        "InstanceType": offering.instance_type,
        "TagSpecifications": [{"ResourceType": kind, "Tags": tag_list(tags)} for kind in tagged],
        **shared_parameters(pool),
    }
    if spot:
        parameters["InstanceMarketOptions"] = ONE_TIME_SPOT
    if recipe.user_data:
        parameters["UserData"] = recipe.user_data
    image = recipe.image(pool, offering.instance_type)
    if image is not None:
        parameters["ImageId"] = image
    subnet = recipe.subnet(pool, offering)
    if not subnet and offering.zone:
        parameters["Placement"] = {"AvailabilityZone": offering.zone}
    return parameters | network(pool, recipe.security_group_ids, subnet=subnet)


def shared_parameters(pool: PoolSettings) -> dict[str, Any]:
    """What all machines of a pool have in common, however they are launched."""
    parameters: dict[str, Any] = {
        "ImageId": image_id(pool.image or ""),
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required"},
    }
    if pool.key_name:
        parameters["KeyName"] = pool.key_name
    if pool.instance_profile:
        kind = "Arn" if pool.instance_profile.startswith("arn:") else "Name"
        parameters["IamInstanceProfile"] = {kind: pool.instance_profile}
    return parameters


def network(pool: PoolSettings, group_ids: Sequence[str], *, subnet: str | None) -> dict[str, Any]:
    """Where the machine is plugged in.

    A subnet that one made oneself gives no public address unless it was told to (AWS: EC2 user guide,
    "Assign a public IPv4 address at launch"), and a machine without the address its pool hands out never
    becomes ready. So a pool that hands out public addresses asks for one, which only an interface can be
    asked for. With private addresses, or in the default VPC, the subnet's own setting decides. `subnet` is
    None where the call names it elsewhere.
    """
    groups: dict[str, Any] = {"SecurityGroupIds": list(group_ids)} if group_ids else {}
    where: dict[str, Any] = {"SubnetId": subnet} if subnet else {}
    if not pool.own_subnets or pool.address == "private":
        return groups | where
    interface: dict[str, Any] = {
        "DeviceIndex": 0,
        "AssociatePublicIpAddress": True,
        "DeleteOnTermination": True,
        **where,
    }
    return {"NetworkInterfaces": [interface | ({"Groups": list(group_ids)} if group_ids else {})]}


def image_id(image: str) -> str:
    """An AMI id as it is; anything else names an SSM parameter, which EC2 looks up at the launch.

    (AWS: Systems Manager user guide, "Native parameter support for Amazon Machine Image IDs".)
    """
    return image if image.startswith(("ami-", "resolve:ssm:")) else f"resolve:ssm:{image}"


def instance_from(shape: Shape, region: str, address: str, tags: Mapping[str, str]) -> Instance:
    """EC2's instance as ours; `address` is the pool setting. Raises KeyError, ValueError for what is none."""
    cpu, placement = shape.get("CpuOptions") or {}, shape.get("Placement") or {}
    launched = shape.get("LaunchTime")
    return Instance(
        id=shape["InstanceId"],
        state=InstanceState(shape["State"]["Name"]),
        address=shape.get(ADDRESS_FIELD[address]) or None,
        instance_type=shape.get("InstanceType", ""),
        region=region,
        zone=placement.get("AvailabilityZone", ""),
        market=Market.SPOT if shape.get("InstanceLifecycle") == "spot" else Market.ON_DEMAND,
        cores=cpu.get("CoreCount", 0) * cpu.get("ThreadsPerCore", 0) or None,
        launched_unix=launched.timestamp() if launched else 0.0,
        tags=tags,
        reason=_reason(shape.get("StateReason") or {}),
        ended_unix=_named_second(shape),
    )


def _reason(state_reason: Shape) -> str:
    """`Client.UserInitiatedShutdown: User initiated shutdown`; mostly AWS's message begins with the code."""
    code, message = state_reason.get("Code", ""), state_reason.get("Message", "")
    return message if message.startswith(code) else f"{code}: {message}".removesuffix(": ")


def _named_second(shape: Shape) -> float | None:
    """When it left `running`, if EC2 says so: `User initiated (2026-01-31 08:00:00 GMT)`, whole seconds.

    Only an end through the API has a time; a reclaim, or a shutdown from within, has none.
    """
    words = shape.get("StateTransitionReason")
    running = shape["State"]["Name"] in (InstanceState.PENDING, InstanceState.RUNNING)
    return _second_in(words) if words and not running else None


@lru_cache(maxsize=1024)  # a dead machine is listed for an hour
def _second_in(words: str) -> float | None:
    match = TRANSITION.search(words)
    try:
        return datetime.fromisoformat(f"{match['moment']}+00:00").timestamp() if match else None
    except ValueError:
        return None


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in sorted(tags.items())]


def tags_from(shape: Shape) -> dict[str, str]:
    return {tag["Key"]: tag.get("Value", "") for tag in shape.get("Tags") or ()}


def filters(**values: Iterable[str]) -> list[dict[str, Any]]:
    """`filters(instance_id=[…])`: any of the values, taken literally; an underscore stands for a dash."""
    return [filter_of(name.replace("_", "-"), some) for name, some in values.items()]


def filter_of(name: str, values: Iterable[str]) -> dict[str, Any]:
    return {"Name": name, "Values": [FILTER_SPECIAL.sub(r"\\\1", value) for value in values]}


def batches(values: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    """Each value once, in order, so many at a time."""
    rest = iter(dict.fromkeys(values))
    while batch := tuple(islice(rest, size)):
        yield batch


def named_in(words: str, instance_ids: Iterable[str]) -> set[str]:
    """Those of the ids that a message names."""
    return {one for one in instance_ids if re.search(rf"(?<![\w-]){re.escape(one)}(?![\w-])", words)}
