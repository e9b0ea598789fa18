"""The simulated EC2's answers in the SDK's shapes, and what DescribeInstances' filters mean.

(AWS: EC2 API reference, "Instance", "DescribeInstances"; EC2 user guide, "Filter your resources": a value
may hold * and ?, a backslash makes them plain.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from broker.core.model import InstanceState
from broker.providers.sim_machine import Appearance, Machine
from broker.providers.sim_sky import Refused

Shape = dict[str, Any]
Test = Callable[[Machine, float | None], bool]  # (machine, moment that the listing shows; None: now)

ACCOUNT = "123456789012"
FILTER_VALUES_MAX = 200  # (AWS: EC2 user guide, "Filtering considerations")
WILD = re.compile(r"\\.|[*?]", re.DOTALL)
STATE_CODES = {
    InstanceState.PENDING: 0,
    InstanceState.RUNNING: 16,
    InstanceState.SHUTTING_DOWN: 32,
    InstanceState.TERMINATED: 48,
    InstanceState.STOPPING: 64,
    InstanceState.STOPPED: 80,
}


def instance(machine: Machine, view_at: float | None = None) -> Shape:
    """The machine as Describe shows it now, or as it was at an earlier moment."""
    if view_at is not None and view_at < machine.changed_at:
        return _instance(machine, machine.state_at(view_at), machine.tags_at(view_at), view_at)
    if machine.shape is None:
        machine.shape = _instance(machine, machine.state, machine.tags, machine.changed_at)
    return dict(machine.shape)  # the caller's own: what lies deeper is shared, and nobody's to change


def reservation(machine: Machine, shapes: Sequence[Shape]) -> Shape:
    return {
        "ReservationId": f"r-{machine.number:017x}",
        "OwnerId": ACCOUNT,
        "Groups": [],
        "Instances": list(shapes),
    }


def state(name: InstanceState) -> Shape:
    return {"Code": STATE_CODES[name], "Name": str(name)}


def dns_name(address: str) -> str:
    return f"ec2-{address.replace('.', '-')}.compute-1.amazonaws.com" if address else ""


def address_of(name: str) -> str:
    """The address behind a public DNS name; anything else as it is."""
    head, dot, _ = name.partition(".")
    return head.removeprefix("ec2-").replace("-", ".") if dot and head.startswith("ec2-") else name


def _instance(machine: Machine, current: InstanceState, tags: Mapping[str, str], at: float) -> Shape:
    look = machine.appearance(at)
    shape: Shape = {
        "InstanceId": machine.id,
        "ImageId": machine.image,
        "InstanceType": machine.instance_type,
        "State": state(current),
        "LaunchTime": datetime.fromtimestamp(int(look.launched_unix), UTC),  # EC2 gives whole seconds
        "Placement": {"AvailabilityZone": machine.zone, "GroupName": "", "Tenancy": "default"},
        "CpuOptions": _cpu_options(machine.vcpus),
        "ClientToken": machine.token,
        "AmiLaunchIndex": 0,
        "Architecture": "x86_64",
        "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
        "PublicDnsName": "",
        "PrivateDnsName": "",
        "StateTransitionReason": "",
        **machine.details,
    }
    if machine.spot:
        shape |= {"InstanceLifecycle": "spot", "SpotInstanceRequestId": f"sir-{machine.number:08x}"}
    if current is InstanceState.PENDING:
        shape["StateReason"] = {"Code": "pending", "Message": "pending"}
    elif machine.reason_code and current is not InstanceState.RUNNING:
        shape["StateReason"] = {"Code": machine.reason_code, "Message": machine.reason}
        shape["StateTransitionReason"] = machine.transition_reason
    return shape | _addresses(machine, look, current, at)


def _cpu_options(vcpus: int) -> Shape:
    threads = 2 if vcpus % 2 == 0 else 1
    return {"CoreCount": vcpus // threads, "ThreadsPerCore": threads}


def _addresses(machine: Machine, look: Appearance, current: InstanceState, at: float) -> Shape:
    """A terminated machine has no address left; one that shuts down still shows those it had."""
    if current is InstanceState.TERMINATED:
        return {}
    private = machine.private_address
    found: Shape = {
        "PrivateIpAddress": private,
        "PrivateDnsName": f"ip-{private.replace('.', '-')}.ec2.internal",
    }
    stopped = current in (InstanceState.STOPPING, InstanceState.STOPPED)
    if look.public_address and look.address_shown_at <= at and not stopped:
        public = look.public_address
        found |= {"PublicIpAddress": public, "PublicDnsName": dns_name(public)}
    return found


# --- filters -------------------------------------------------------------------------------------------


def _state_name(machine: Machine, view_at: float | None) -> str:
    return str(machine.state if view_at is None else machine.state_at(view_at))


GETTERS: Mapping[str, Callable[[Machine, float | None], str | None]] = {
    "availability-zone": lambda machine, view_at: machine.zone,
    "client-token": lambda machine, view_at: machine.token,
    "image-id": lambda machine, view_at: machine.image,
    "instance-id": lambda machine, view_at: machine.id,
    "instance-lifecycle": lambda machine, view_at: "spot" if machine.spot else None,
    "instance-state-name": _state_name,
    "instance-type": lambda machine, view_at: machine.instance_type,
    "ip-address": lambda machine, view_at: instance(machine, view_at).get("PublicIpAddress"),
    "private-ip-address": lambda machine, view_at: instance(machine, view_at).get("PrivateIpAddress"),
}


def tests_of(filters: Iterable[Mapping[str, Any]]) -> list[Test]:
    """What each filter asks of a machine: any of its values. Raises Refused."""
    return [_test(one["Name"], tuple(one.get("Values") or ())) for one in filters]


@lru_cache(maxsize=1024)
def _test(name: str, values: tuple[str, ...]) -> Test:
    if len(values) > FILTER_VALUES_MAX:
        raise Refused("FilterLimitExceeded", f"The maximum number of filter values is {FILTER_VALUES_MAX}")
    accepted = accepter(values)
    if name == "tag-key":
        return lambda machine, view_at: any(accepted(key) for key in _tags(machine, view_at))
    if name.startswith("tag:"):
        key = name.removeprefix("tag:")
        return lambda machine, view_at: (
            (value := _tags(machine, view_at).get(key)) is not None and accepted(value)
        )
    getter = GETTERS.get(name)
    if getter is None:
        raise Refused("InvalidParameterValue", f"The filter '{name}' is invalid")
    return lambda machine, view_at: (value := getter(machine, view_at)) is not None and accepted(value)


def _tags(machine: Machine, view_at: float | None) -> Mapping[str, str]:
    return machine.tags if view_at is None else machine.tags_at(view_at)


def accepter(values: Iterable[str]) -> Callable[[str], bool]:
    """Whether a text is one of these values, which may hold wildcards."""
    literal: set[str] = set()
    patterns: list[str] = []
    for value in values:
        if any(wild[0] in "*?" for wild in WILD.findall(value)):
            patterns.append(_pattern(value))
        else:
            literal.add(plain(value))
    if not patterns:
        return literal.__contains__
    wild = re.compile("|".join(patterns), re.DOTALL)
    return lambda text: text in literal or wild.fullmatch(text) is not None


def plain(value: str) -> str:
    """A value without wildcards, its backslashes resolved."""
    return WILD.sub(lambda match: match[0][1:] or match[0], value)


def _pattern(value: str) -> str:
    parts, end = [], 0
    for match in WILD.finditer(value):
        parts.append(re.escape(value[end : match.start()]))
        parts.append({"*": ".*", "?": "."}.get(match[0]) or re.escape(match[0][1:]))
        end = match.end()
    return "".join(parts) + re.escape(value[end:])
