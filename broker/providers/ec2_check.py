"""What `open` finds out before anything is spent: user data, subnets, security groups, machine types.

Everything that a person must mend comes back as problems, all of them at once, by pool, each naming its
setting; what passes by itself (no answer, throttling, expired credentials) is raised, and whoever opens tries
again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.core.errors import PermanentRefusal
from broker.core.settings import PoolSettings
from broker.providers.ec2_api import Ec2Api
from broker.providers.ec2_wire import OVERRIDES_MAX, USER_DATA_BYTES_MAX, batches, filters

TYPES_ASKED_MAX = 100  # in one filter; 200 are allowed (AWS: EC2 user guide, "Filtering considerations")
ARM = "arm64"  # AWS: EC2 API reference, "ProcessorInfo", supportedArchitectures
TYPES_PAGE_SIZE = 100  # the largest that DescribeInstanceTypes allows

Pools = Mapping[str, PoolSettings]
Problems = defaultdict[str, list[str]]  # by pool
Places = tuple[tuple[str, str], ...]  # (zone, the subnet in it), as preferred


async def user_data(pools: Pools, problems: Problems) -> dict[str, str]:
    """Each pool's user data, from its setting or its file."""
    return {name: await _user_data(f"pool.{name}", pool, problems[name]) for name, pool in pools.items()}


async def _user_data(key: str, pool: PoolSettings, problems: list[str]) -> str:
    if pool.user_data_file is None:
        raw, setting = (pool.user_data or "").encode(), f"{key}.user_data"
    else:
        setting = f"{key}.user_data_file"
        try:
            raw = await asyncio.to_thread(_head, pool.user_data_file)
        except OSError as error:
            problems.append(f"{setting}: {pool.user_data_file} cannot be read: {error.strerror}")
            return ""
    if len(raw) > USER_DATA_BYTES_MAX:
        problems.append(f"{setting}: is larger than {USER_DATA_BYTES_MAX} bytes, which is all that EC2 takes")
        return ""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        problems.append(f"{setting}: is no UTF-8 text; put what is binary into the image")
        return ""


def _head(path: str) -> bytes:
    """One byte more than is allowed tells that there is too much; the rest is left unread."""
    with Path(path).expanduser().open("rb") as file:
        return file.read(USER_DATA_BYTES_MAX + 1)


async def places(api: Ec2Api, region: str, pools: Pools, problems: Problems) -> dict[str, Places]:
    """Where each pool with subnets can buy; nothing for the others, which need not ask."""
    found: dict[str, Places] = {}
    for name, pool in pools.items():
        strange = [zone for zone in pool.zones if not zone.startswith(region)]
        problems[name] += [f'pool.{name}.zones: "{zone}" is no zone of {region}' for zone in strange]
        if not pool.own_subnets:
            continue
        try:
            wanted = filters(subnet_id=pool.own_subnets)
            shapes = await api.every("DescribeSubnets", "Subnets", Filters=wanted)
        except PermanentRefusal as error:
            problems[name].append(f"{_subnets_key(name, pool)}: cannot be looked up: {error.message}")
        else:
            more = _places(name, region, pool, shapes)
            found[name] = more.places
            problems[name] += [problem for problem in more.problems if problem not in problems[name]]
    return found


async def default_zones(api: Ec2Api, pools: Pools) -> dict[str, tuple[str, ...]]:
    """The zones of each pool that has a choice and names none: those of the default VPC's subnets.

    EC2 would choose among the same ones. But its refusals name a zone only where the call did, and what one
    zone refuses is to be had in another. Nothing where the credentials may not ask, or where types × zones
    would be more than one call takes; nor for a pool of one machine type, which is a single offering.
    """
    asking = {
        name: len(set(pool.instance_types))
        for name, pool in pools.items()
        if len(set(pool.instance_types)) > 1 and not pool.zones and not pool.own_subnets
    }
    if not asking:
        return {}
    try:
        shapes = await api.every("DescribeSubnets", "Subnets", Filters=filters(default_for_az=["true"]))
    except PermanentRefusal:
        return {}
    zones = tuple(sorted({str(shape["AvailabilityZone"]) for shape in shapes}))
    return {name: zones for name, types in asking.items() if types * len(zones) <= OVERRIDES_MAX}


@dataclass(frozen=True, slots=True)
class _Found:
    places: Places
    problems: list[str]


def _subnets_key(name: str, pool: PoolSettings) -> str:
    return f"pool.{name}.{'subnet' if pool.subnet else 'subnets'}"


def _places(name: str, region: str, pool: PoolSettings, shapes: Iterable[Mapping[str, str]]) -> _Found:
    by_id = {shape["SubnetId"]: shape for shape in shapes}
    own, key = pool.own_subnets, _subnets_key(name, pool)
    problems = [f'{key}: {region} has no subnet "{one}"' for one in own if one not in by_id]
    known = [one for one in own if one in by_id]
    vpcs = sorted({by_id[one]["VpcId"] for one in known})
    if len(vpcs) > 1:
        problems.append(f"{key}: lie in several VPCs ({', '.join(vpcs)}); a pool has one")
    by_zone: dict[str, str] = {}
    for one in known:
        zone = by_id[one]["AvailabilityZone"]
        if zone in by_zone:
            problems.append(f"{key}: {by_zone[zone]} and {one} lie in {zone} both; name one a zone")
        by_zone.setdefault(zone, one)
    problems += [
        f'pool.{name}.zones: none of the subnets lies in "{zone}"'
        for zone in pool.zones
        if zone not in by_zone
    ]
    usual = pool.zones or by_zone
    return _Found(tuple((zone, by_zone[zone]) for zone in usual if zone in by_zone), problems)


async def group_ids(api: Ec2Api, region: str, pools: Pools, problems: Problems) -> dict[str, tuple[str, ...]]:
    """Each pool's security groups by id, those given by name looked up in its VPC."""
    found: dict[str, tuple[str, ...]] = {}
    for name, pool in pools.items():
        found[name] = tuple(dict.fromkeys(pool.security_group_ids))
        if not pool.security_groups:
            continue
        try:
            named = await _groups_by_name(api, region, name, pool, problems[name])
        except PermanentRefusal as error:
            problems[name].append(f"pool.{name}.security_groups: cannot be looked up: {error.message}")
        else:
            found[name] = tuple(dict.fromkeys((*pool.security_group_ids, *named)))
    return found


async def _groups_by_name(
    api: Ec2Api, region: str, pool_name: str, pool: PoolSettings, problems: list[str]
) -> tuple[str, ...]:
    key = f"pool.{pool_name}"
    subnet = next(iter(pool.own_subnets), None)  # all of `subnets` lie in one VPC
    if subnet:
        subnets = await api.every("DescribeSubnets", "Subnets", Filters=filters(subnet_id=[subnet]))
        vpcs = [shape["VpcId"] for shape in subnets]
        missing = f'{_subnets_key(pool_name, pool)}: {region} has no subnet "{subnet}"'
    else:
        defaults = await api.every("DescribeVpcs", "Vpcs", Filters=filters(is_default=["true"]))
        vpcs = [vpc["VpcId"] for vpc in defaults]
        missing = f"{key}.subnet: {region} has no default VPC; name a subnet"
    if not vpcs:
        problems.append(missing)
        return ()
    groups = await api.every(
        "DescribeSecurityGroups",
        "SecurityGroups",
        Filters=filters(vpc_id=vpcs[:1], group_name=pool.security_groups),
    )
    ids: list[str] = []
    for name in pool.security_groups:
        matching = [group["GroupId"] for group in groups if group["GroupName"] == name]
        if len(matching) == 1:
            ids.append(matching[0])
        elif matching:
            which = ", ".join(sorted(matching))
            problems.append(
                f'{key}.security_groups: "{name}" is several groups ({which}); use security_group_ids'
            )
        else:
            problems.append(
                f'{key}.security_groups: {vpcs[0]} in {region} has no security group named "{name}"'
            )
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a machine type is."""

    cores: int
    arm: bool


async def kinds_of_types(api: Ec2Api, region: str, pools: Pools, problems: Problems) -> dict[str, Kind]:
    """What each machine type is; empty when the credentials may not ask, which is no problem."""
    wanted = {kind for pool in pools.values() for kind in pool.instance_types}
    try:
        kinds = await _describe_types(api, sorted(wanted))
    except PermanentRefusal:
        return {}
    for name, pool in pools.items():
        types = dict.fromkeys(pool.instance_types)
        problems[name] += [
            f'pool.{name}.instance_types: {region} has no machine type "{one}"'
            for one in types
            if one not in kinds
        ]
        problems[name] += _without_image(name, pool, {one: kinds[one] for one in types if one in kinds})
    return kinds


def _without_image(name: str, pool: PoolSettings, kinds: Mapping[str, Kind]) -> list[str]:
    """One image cannot be for both sorts of processors."""
    arm = [one for one, kind in kinds.items() if kind.arm]
    others = [one for one, kind in kinds.items() if not kind.arm]
    if not arm or not others or pool.image_arm64:
        return []
    return [
        f"pool.{name}.image_arm64: {arm[0]} has Arm processors, {others[0]} has not: name an image for it"
    ]


async def _describe_types(api: Ec2Api, names: Iterable[str]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for batch in batches(names, TYPES_ASKED_MAX):
        types = await api.every(
            "DescribeInstanceTypes",
            "InstanceTypes",
            Filters=filters(instance_type=batch),
            MaxResults=TYPES_PAGE_SIZE,
        )
        kinds |= {one["InstanceType"]: _kind(one) for one in types}
    return kinds


def _kind(shape: Mapping[str, Any]) -> Kind:
    processor = shape.get("ProcessorInfo") or {}
    return Kind(shape["VCpuInfo"]["DefaultVCpus"], ARM in (processor.get("SupportedArchitectures") or ()))
