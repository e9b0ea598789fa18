"""The simulated EC2's end of the wire: takes a call that has arrived, answers it or refuses it.

First who you are, then how often you ask; a throttled or unsigned call has not been looked at.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from email.utils import formatdate
from functools import lru_cache
from typing import Any, cast

from broker.providers.ec2_errors import client_error
from broker.providers.sim_calls import LAUNCHES, Answer, Call
from broker.providers.sim_change import Changer
from broker.providers.sim_fleet import Fleets
from broker.providers.sim_launch import Launcher
from broker.providers.sim_limits import Limits, throttled
from broker.providers.sim_listing import Lister
from broker.providers.sim_market import REFUSALS, vcpus_of, zone_of_subnet
from broker.providers.sim_prices import PriceHistory
from broker.providers.sim_shapes import plain
from broker.providers.sim_sky import Refused, Spells
from broker.providers.sim_weather import Fault
from broker.providers.sim_world import World

VPC_ID = "vpc-00000000000000001"


class Server:
    """See the module. `calls` counts what has arrived, by API."""

    def __init__(self, world: World, spells: Spells) -> None:
        self.calls: Counter[str] = Counter()
        self._world, self._sky, self._spells = world, world.sky, spells
        self._limits = Limits()
        launcher = Launcher(world, spells)
        self.lister, self.changer = Lister(world), Changer(world, launcher.sell)
        fleets = Fleets(world.sky, launcher)
        self._handlers: dict[str, Callable[[Call], Answer]] = {
            "CreateFleet": fleets.create_fleet,
            "CreateLaunchTemplate": fleets.create_launch_template,
            "CreateTags": self.changer.create_tags,
            "DescribeInstances": lambda call: self.lister.describe_instances(call.parameters),
            "DescribeInstanceTypes": describe_instance_types,
            "DescribeSecurityGroups": describe_security_groups,
            "DescribeSpotPriceHistory": PriceHistory(world, self.lister).describe,
            "DescribeSubnets": lambda call: describe_subnets(call, world.market.zones),
            "DescribeVpcs": describe_vpcs,
            "RunInstances": launcher.run_instances,
            "StartInstances": self.changer.start_instances,
            "StopInstances": self.changer.stop_instances,
            "TerminateInstances": self.changer.terminate_instances,
        }

    def receive(self, call: Call) -> None:
        """The call has arrived."""
        self.calls[call.api] += 1
        self.changer.watch(call)
        try:
            answer = self._serve(call)
            call.answer = {
                **answer,
                "ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": self._headers()},
            }
        except Refused as refused:
            call.error = self._error(call.api, refused)
        if self._sky.report is not None:
            self._sky.tell(call.api, f"{call.caller}: {call.error or 'done'}")

    def _serve(self, call: Call) -> Answer:
        self._check_credentials()
        self._check_mishap(call)
        self._check_limits(call)
        answer = self._handlers[call.api](call)
        if call.mishap is Fault.SERVER_ERROR:  # carried out all the same
            raise _server_error()
        return answer

    def _check_credentials(self) -> None:
        if self._spells.stands(Fault.CREDENTIALS_EXPIRED):
            self._sky.met(Fault.CREDENTIALS_EXPIRED)
            raise Refused("RequestExpired", "Request has expired.")
        if self._spells.stands(Fault.CLOCK_SKEWED):
            self._sky.met(Fault.CLOCK_SKEWED)
            words = "AWS was not able to validate the provided access credentials"
            raise Refused("AuthFailure", words, 401)

    def _check_mishap(self, call: Call) -> None:
        """What befalls a call before EC2 has looked at it; it was counted when it set out."""
        match call.mishap:
            case Fault.OUTAGE:
                raise Refused("Unavailable", "The server is overloaded and can't handle the request.", 503)
            case Fault.THROTTLED:
                raise throttled()
            case Fault.REFUSED:
                self._sky.faults[f"{Fault.REFUSED} {call.code}"] += 1
                known = REFUSALS.get(call.code)
                message = known.message.replace("RunInstances", call.api) if known else ""
                raise Refused(call.code, message, known.status if known else call.status)
            case Fault.PAGE_FAILED:
                raise self.lister.failed_page()
            case Fault.SERVER_ERROR if self._sky.roads.chance(0.5):
                raise _server_error()

    def _check_limits(self, call: Call) -> None:
        target = call.parameters.get("TargetCapacitySpecification") or {}
        asked = call.parameters.get("MaxCount") or target.get("TotalTargetCapacity") or 1
        instances = len(call.instance_ids) or int(asked)
        try:
            self._limits.take(call.api, instances, self._sky.at)
        except Refused:
            self._sky.met(Fault.BUCKET_EMPTY, call.api)
            raise
        overrun = call.api in LAUNCHES and self._spells.stands(Fault.LAUNCH_OUTAGE)
        if overrun and self._sky.roads.chance(0.5):
            self._sky.met(Fault.LAUNCH_OUTAGE, "throttled")
            raise throttled()

    def _error(self, api: str, refused: Refused) -> Exception:
        error = client_error(api, refused.code, refused.message, refused.status)
        metadata = cast(Any, error).response["ResponseMetadata"]
        metadata["HTTPHeaders"] = self._headers()
        return error

    def _headers(self) -> dict[str, str]:
        return {"date": _date(int(self._sky.unix(self._sky.at)))}


def _date(unix: int) -> str:
    """Whole seconds, cut off, as HTTP has it. Every answer needs one, so the day is kept."""
    minutes, seconds = divmod(unix % 86_400, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{_day(unix // 86_400)} {hours:02d}:{minutes:02d}:{seconds:02d} GMT"


@lru_cache(maxsize=8)
def _day(number: int) -> str:
    return formatdate(number * 86_400, usegmt=True).removesuffix(" 00:00:00 GMT")


def _server_error() -> Refused:
    return Refused("InternalError", "An internal error has occurred", 500)


# --- what does not change: every subnet and every group exists that somebody names --------------------


def describe_instance_types(call: Call) -> Answer:
    types = [(kind, vcpus_of(kind)) for kind in _values(call, "instance-type")]
    return {
        "InstanceTypes": [
            {"InstanceType": kind, "VCpuInfo": {"DefaultVCpus": vcpus}} for kind, vcpus in types if vcpus
        ]
    }


def describe_vpcs(call: Call) -> Answer:
    return {"Vpcs": [{"VpcId": VPC_ID, "IsDefault": True}]}


def describe_subnets(call: Call, zones: Sequence[str]) -> Answer:
    if _values(call, "default-for-az"):
        defaults = [(f"subnet-{zlib.crc32(zone.encode()):017x}", zone) for zone in zones]
        return {
            "Subnets": [
                {"SubnetId": one, "VpcId": VPC_ID, "AvailabilityZone": zone} for one, zone in defaults
            ]
        }
    return {
        "Subnets": [
            {"SubnetId": one, "VpcId": VPC_ID, "AvailabilityZone": zone_of_subnet(one, zones)}
            for one in _values(call, "subnet-id")
        ]
    }


def describe_security_groups(call: Call) -> Answer:
    return {
        "SecurityGroups": [
            {"GroupId": f"sg-{zlib.crc32(one.encode()):017x}", "GroupName": one, "VpcId": VPC_ID}
            for one in _values(call, "group-name")
        ]
    }


def _values(call: Call, name: str) -> list[str]:
    filters = [one for one in call.parameters.get("Filters") or () if one["Name"] == name]
    return [plain(value) for one in filters for value in one["Values"]]
