"""What `open` finds out before anything is spent: user data, security groups, machine types.

Everything that a person must mend comes back as problems, all of them at once and each naming its setting;
what passes by itself (no answer, throttling, expired credentials) is raised, and whoever opens tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path

from broker.core.errors import PermanentRefusal
from broker.core.settings import PoolSettings
from broker.providers.ec2_api import Ec2Api
from broker.providers.ec2_wire import USER_DATA_BYTES_MAX, batches, filters

TYPES_ASKED_MAX = 100  # in one filter; 200 are allowed (AWS: EC2 user guide, "Filtering considerations")
TYPES_PAGE_SIZE = 100  # the largest that DescribeInstanceTypes allows

Pools = Mapping[str, PoolSettings]


async def user_data(pools: Pools, problems: list[str]) -> dict[str, str]:
    """Each pool's user data, from its setting or its file."""
    return {name: await _user_data(f"pool.{name}", pool, problems) for name, pool in pools.items()}


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


async def group_ids(
    api: Ec2Api, region: str, pools: Pools, problems: list[str]
) -> dict[str, tuple[str, ...]]:
    """Each pool's security groups by id, those given by name looked up in its VPC."""
    found: dict[str, tuple[str, ...]] = {}
    for name, pool in pools.items():
        found[name] = tuple(dict.fromkeys(pool.security_group_ids))
        if not pool.security_groups:
            continue
        try:
            named = await _groups_by_name(api, region, f"pool.{name}", pool, problems)
        except PermanentRefusal as error:
            problems.append(f"pool.{name}.security_groups: cannot be looked up: {error.message}")
        else:
            found[name] = tuple(dict.fromkeys((*pool.security_group_ids, *named)))
    return found


async def _groups_by_name(
    api: Ec2Api, region: str, key: str, pool: PoolSettings, problems: list[str]
) -> tuple[str, ...]:
    if pool.subnet:
        subnets = await api.every("DescribeSubnets", "Subnets", Filters=filters(subnet_id=[pool.subnet]))
        vpcs = [subnet["VpcId"] for subnet in subnets]
        missing = f'{key}.subnet: {region} has no subnet "{pool.subnet}"'
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


async def cores_of_types(api: Ec2Api, region: str, pools: Pools, problems: list[str]) -> dict[str, int]:
    """How many cores each machine type has; empty when the credentials may not ask, which is no problem."""
    wanted = {kind for pool in pools.values() for kind in pool.instance_types}
    try:
        cores = await _describe_types(api, sorted(wanted))
    except PermanentRefusal:
        return {}
    for name, pool in pools.items():
        problems += [
            f'pool.{name}.instance_types: {region} has no machine type "{kind}"'
            for kind in dict.fromkeys(pool.instance_types)
            if kind not in cores
        ]
    return cores


async def _describe_types(api: Ec2Api, kinds: Iterable[str]) -> dict[str, int]:
    cores: dict[str, int] = {}
    for batch in batches(kinds, TYPES_ASKED_MAX):
        types = await api.every(
            "DescribeInstanceTypes",
            "InstanceTypes",
            Filters=filters(instance_type=batch),
            MaxResults=TYPES_PAGE_SIZE,
        )
        cores |= {one["InstanceType"]: one["VCpuInfo"]["DefaultVCpus"] for one in types}
    return cores
