"""The simulated EC2's end of the wire: takes a call that has arrived, answers it or refuses it.

In EC2's order: who you are, how often you ask, what you may do, whether this token has been here before,
and only then whether there is a machine to be had.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, cast

from broker.core import tags
from broker.core.model import InstanceState
from broker.providers import sim_shapes
from broker.providers.ec2_errors import client_error
from broker.providers.sim_limits import Limits, throttled
from broker.providers.sim_listing import Lister, not_found, refuse_malformed
from broker.providers.sim_machine import Machine
from broker.providers.sim_market import NO_CAPACITY, REFUSALS, Wish, vcpus_of
from broker.providers.sim_sky import Refused
from broker.providers.sim_spells import Spells
from broker.providers.sim_tokens import Tokens, token_of
from broker.providers.sim_weather import Fault
from broker.providers.sim_world import Purchase, World

Answer = dict[str, Any]
Parameters = Mapping[str, Any]

TAGS_MAX = 50  # (AWS: EC2 user guide, "Tag restrictions")
TAG_KEY_CHARS_MAX, TAG_VALUE_CHARS_MAX = 128, 256
TERMINATED_MAX = 1000  # ids in one call
USER_INITIATED = "Client.UserInitiatedShutdown"
VPC_ID = "vpc-00000000"


@dataclass(slots=True)
class Call:
    """One call under way. `mishap` is what befalls it at EC2's end; `code` the error of a scripted refusal."""

    api: str
    parameters: Parameters
    caller: str
    mishap: Fault | None = None
    code: str = ""
    status: int = 400
    carried_out: bool = False
    answer: Answer | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Violation:
    """Somebody asked for a change of a machine that is not theirs."""

    at: float
    caller: str
    api: str
    instance_id: str


class Server:
    """See the module. `adoptable_names`: Name tags by which a machine without a broker may be claimed."""

    def __init__(self, world: World, spells: Spells) -> None:
        self.world, self._sky, self._spells = world, world.sky, spells
        self.lister = Lister(world)
        self.tokens = Tokens()
        self.calls: Counter[str] = Counter()  # api → calls that have arrived
        self.violations: list[Violation] = []
        self.adoptable_names: tuple[str, ...] = ()
        self._limits = Limits()
        self._handlers: dict[str, Callable[[Call], Answer]] = {
            "CreateTags": self._create_tags,
            "DescribeInstances": lambda call: self.lister.describe_instances(call.parameters),
            "DescribeInstanceTypes": self._describe_instance_types,
            "DescribeSecurityGroups": self._describe_security_groups,
            "DescribeSubnets": self._describe_subnets,
            "DescribeVpcs": lambda call: {"Vpcs": [{"VpcId": VPC_ID, "IsDefault": True}]},
            "RunInstances": self._run_instances,
            "TerminateInstances": self._terminate_instances,
        }

    def offer(self, api: str, handler: Callable[[Call], Answer]) -> None:
        """One more API."""
        self._handlers[api] = handler

    def receive(self, call: Call) -> None:
        """The call has arrived: answer it, or say what is wrong with it."""
        self.calls[call.api] += 1
        self._watch(call)
        try:
            call.answer = self._serve(call)
            call.carried_out = True
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

    # --- before it is looked at ----------------------------------------------------------------------

    def _check_credentials(self) -> None:
        if self._spells.stands(Fault.CREDENTIALS_EXPIRED):
            self._sky.met(Fault.CREDENTIALS_EXPIRED)
            raise Refused("RequestExpired", "Request has expired.")
        if self._spells.stands(Fault.CLOCK_SKEWED):
            self._sky.met(Fault.CLOCK_SKEWED)
            words = "AWS was not able to validate the provided access credentials"
            raise Refused("AuthFailure", words, 401)

    def _check_mishap(self, call: Call) -> None:
        """What befalls a call before EC2 has looked at it. (It was counted when it was drawn.)"""
        if call.mishap is Fault.THROTTLED:
            raise throttled()
        if call.mishap is Fault.REFUSED:
            known = REFUSALS.get(call.code)
            self._sky.faults[f"{Fault.REFUSED} {call.code}"] += 1
            if known is not None:
                raise Refused(call.code, known.message, known.status)
            raise Refused(call.code, "refused by the script", call.status)
        if call.mishap is Fault.PAGE_FAILED:
            raise self.lister.failed_page()
        if call.mishap is Fault.SERVER_ERROR and not self._sky.roads.chance(0.5):
            raise _server_error()

    def _check_limits(self, call: Call) -> None:
        instances = len(call.parameters.get("InstanceIds") or ()) or int(call.parameters.get("MaxCount") or 1)
        try:
            self._limits.take(call.api, instances, self._sky.at)
        except Refused:
            self._sky.met(Fault.BUCKET_EMPTY, call.api)
            raise
        launches = call.api in ("RunInstances", "CreateFleet")
        if launches and self._spells.stands(Fault.LAUNCH_OUTAGE) and self._sky.roads.chance(0.5):
            self._sky.met(Fault.LAUNCH_OUTAGE, "throttled")
            raise throttled()

    def _watch(self, call: Call) -> None:
        """Note an attempt to change a machine that is not the caller's, whatever becomes of the call."""
        if call.api not in ("TerminateInstances", "CreateTags"):
            return
        for one in _ids_of(call):
            machine = self.world.machines.get(one)
            if machine is not None and machine.owner != call.caller and not self._adopts(call, machine):
                self.violations.append(Violation(self._sky.at, call.caller, call.api, one))
                self._sky.tell("VIOLATION", f"{call.caller}: {call.api} of {one}")

    def _adopts(self, call: Call, machine: Machine) -> bool:
        claimable = not machine.owner and tags.BROKER not in machine.tags
        named = machine.tags.get(tags.NAME) in self.adoptable_names
        return call.api == "CreateTags" and claimable and named

    def _error(self, api: str, refused: Refused) -> Exception:
        error = client_error(api, refused.code, refused.message, refused.status)
        metadata = cast(Any, error).response["ResponseMetadata"]
        metadata["HTTPHeaders"] = {"date": formatdate(self._sky.unix(self._sky.at), usegmt=True)}
        return error

    # --- launching -------------------------------------------------------------------------------------

    def _run_instances(self, call: Call) -> Answer:
        parameters = call.parameters
        wish, its_tags = self.wish_of(parameters), launch_tags(parameters)
        token = token_of(parameters)
        self.world.market.look_early(wish)
        carried = self.tokens.find("RunInstances", wish.zone, parameters, self._sky.at) if token else None
        if carried is not None:
            return self._replayed(carried.machines)
        self.check_launch_outage()
        machines = [
            self.buy(call.caller, token, wish, zone, its_tags, parameters)
            for zone in self.world.market.sell(wish)
        ]
        if token:
            self.tokens.keep("RunInstances", wish.zone, parameters, machines)
        return sim_shapes.reservation(machines[0], [sim_shapes.instance(one) for one in machines])

    def check_launch_outage(self) -> None:
        """Raises Refused when nothing can be had anywhere for hours."""
        if self._spells.stands(Fault.LAUNCH_OUTAGE):
            self._sky.met(Fault.LAUNCH_OUTAGE, "no capacity")
            raise Refused(NO_CAPACITY, REFUSALS[NO_CAPACITY].message, REFUSALS[NO_CAPACITY].status)

    def wish_of(self, parameters: Parameters) -> Wish:
        """Raises Refused for a launch that makes no sense."""
        kind = str(parameters.get("InstanceType") or "")
        if not parameters.get("ImageId"):
            raise Refused("MissingParameter", "The request must contain the parameter ImageId")
        if vcpus_of(kind) is None:
            raise Refused("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
        count_min, count_max = int(parameters["MinCount"]), int(parameters["MaxCount"])
        if not 1 <= count_min <= count_max:
            raise Refused("InvalidParameterValue", "MinCount must be at least 1 and at most MaxCount")
        options = parameters.get("InstanceMarketOptions") or {}
        price = (options.get("SpotOptions") or {}).get("MaxPrice")
        return Wish(
            kind,
            options.get("MarketType") == "spot",
            self.zone_of(parameters),
            count_min,
            count_max,
            None if price is None else float(price) * 1_000_000,
        )

    def zone_of(self, parameters: Parameters) -> str:
        """The zone that the call names, by itself or by its subnet; empty when EC2 may choose."""
        zone = str((parameters.get("Placement") or {}).get("AvailabilityZone") or "")
        if zone and zone not in self.world.market.zones:
            raise Refused("InvalidParameterValue", f"Invalid availability zone: [{zone}]")
        subnet = _subnet_of(parameters)
        return zone or (self._zone_of_subnet(subnet) if subnet else "")

    def _zone_of_subnet(self, subnet_id: str) -> str:
        zones = self.world.market.zones
        return zones[zlib.crc32(subnet_id.encode()) % len(zones)]

    def buy(
        self,
        caller: str,
        token: str,
        wish: Wish,
        zone: str,
        its_tags: Mapping[str, str],
        parameters: Parameters,
    ) -> Machine:
        """One machine of a sale."""
        spot = wish.spot
        if spot and self._sky.goods.chance(self._sky.weather.bought_on_demand):
            spot = False
            self._sky.met(Fault.BOUGHT_ON_DEMAND)
        interfaces = parameters.get("NetworkInterfaces") or ({},)
        return self.world.launch(
            Purchase(
                owner=caller,
                token=token,
                instance_type=wish.instance_type,
                zone=zone,
                spot=spot,
                image=str(parameters.get("ImageId") or ""),
                tags=its_tags,
                details={key: parameters[key] for key in ("KeyName",) if key in parameters},
                public=interfaces[0].get("AssociatePublicIpAddress", True),
            )
        )

    def _replayed(self, machines: Sequence[Machine]) -> Answer:
        dead = [one for one in machines if one.state is InstanceState.TERMINATED]
        if dead:
            self._sky.met(Fault.DEAD_TOKEN, dead[0].id)
            shown = all(one.id in self.world.listed for one in dead)
            if not (shown and self._sky.views.chance(self._sky.weather.dead_token_returned)):
                raise Refused(
                    "IdempotentInstanceTerminated",
                    "The client token refers to an instance that has been terminated.",
                )
        return sim_shapes.reservation(machines[0], [sim_shapes.instance(one) for one in machines])

    # --- changing --------------------------------------------------------------------------------------

    def _terminate_instances(self, call: Call) -> Answer:
        """All of them or none; a protected machine saves only those beside it in its zone."""
        ids = list(dict.fromkeys(_ids_of(call)))
        if len(ids) > TERMINATED_MAX:
            raise Refused("InvalidParameterValue", f"At most {TERMINATED_MAX} instances can be terminated")
        machines = self._known(ids)
        protected = {one.zone: one.id for one in machines if one.protected and one.alive}
        answers = [self._terminate(one, call.caller) for one in machines if one.zone not in protected]
        if protected:
            names = ", ".join(protected.values())
            raise Refused(
                "OperationNotPermitted",
                f"The instance '{names}' may not be terminated. Modify its 'disableApiTermination' "
                "instance attribute and try again.",
            )
        return {"TerminatingInstances": answers}

    def _terminate(self, machine: Machine, caller: str) -> Answer:
        before, after = machine.state, machine.state
        if machine.alive:
            after = InstanceState.SHUTTING_DOWN
            if self._sky.fates.chance(self._sky.weather.terminate_ignored):
                self._sky.met(Fault.TERMINATE_IGNORED, machine.id)
            else:
                self.world.end(machine, caller, USER_INITIATED, f"{USER_INITIATED}: User initiated shutdown")
        return {
            "InstanceId": machine.id,
            "PreviousState": sim_shapes.state(before),
            "CurrentState": sim_shapes.state(after),
        }

    def _create_tags(self, call: Call) -> Answer:
        new = tags_of(call.parameters.get("Tags") or ())
        machines = self._known(_ids_of(call))
        for machine in machines:
            _refuse_too_many({**machine.tags, **new})
        for machine in machines:
            if self._adopts(call, machine) and tags.BROKER in new:
                machine.owner = call.caller
            machine.retag(new, self._sky.at)
        return {}

    def _known(self, ids: Sequence[str]) -> list[Machine]:
        """The machines of these ids. Raises Refused when EC2 does not know one of them, or not yet."""
        refuse_malformed(ids)
        listed = self.world.listed
        young = [one for one in ids if one in listed and self._is_hidden(listed[one])]
        for one in young:
            self._sky.met(Fault.NOT_FOUND, one)
        unknown = [one for one in ids if one not in listed or one in young]
        if unknown:
            raise not_found(unknown)
        return [listed[one] for one in ids]

    def _is_hidden(self, machine: Machine) -> bool:
        return machine.hidden_from_writes and self._sky.at < machine.visible_at

    # --- describing what does not change -------------------------------------------------------------

    def _describe_instance_types(self, call: Call) -> Answer:
        types = [(kind, vcpus_of(kind)) for kind in _values(call, "instance-type")]
        return {
            "InstanceTypes": [
                {"InstanceType": kind, "VCpuInfo": {"DefaultVCpus": vcpus}} for kind, vcpus in types if vcpus
            ]
        }

    def _describe_subnets(self, call: Call) -> Answer:
        return {
            "Subnets": [
                {"SubnetId": one, "VpcId": VPC_ID, "AvailabilityZone": self._zone_of_subnet(one)}
                for one in _values(call, "subnet-id")
            ]
        }

    def _describe_security_groups(self, call: Call) -> Answer:
        return {
            "SecurityGroups": [
                {"GroupId": f"sg-{zlib.crc32(one.encode()):017x}", "GroupName": one, "VpcId": VPC_ID}
                for one in _values(call, "group-name")
            ]
        }


def launch_tags(parameters: Parameters) -> dict[str, str]:
    """The tags of the machines of a launch; they are there from the first moment. Raises Refused."""
    found: dict[str, str] = {}
    for one in parameters.get("TagSpecifications") or ():
        its_tags = tags_of(one.get("Tags") or ())
        _refuse_too_many(its_tags)
        if one.get("ResourceType") == "instance":
            found |= its_tags
    return found


def tags_of(pairs: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Raises Refused for tags that EC2 does not take."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, value = pair["Key"], pair.get("Value", "")
        if key.lower().startswith("aws:"):
            raise Refused("InvalidParameterValue", "Tag keys starting with 'aws:' are reserved for internal use")
        if key in found:
            raise Refused("InvalidParameterValue", f"Duplicate tag key '{key}' specified.")
        if not 1 <= len(key) <= TAG_KEY_CHARS_MAX or len(value) > TAG_VALUE_CHARS_MAX:
            raise Refused("InvalidParameterValue", f"Tag '{key[:20]}…' exceeds the maximum length")
        found[key] = value
    return found


def _refuse_too_many(its_tags: Mapping[str, str]) -> None:
    if len(its_tags) > TAGS_MAX:
        raise Refused("TagLimitExceeded", f"More than {TAGS_MAX} tags specified")


def _server_error() -> Refused:
    return Refused("InternalError", "An internal error has occurred", 500)


def _ids_of(call: Call) -> Sequence[str]:
    return call.parameters.get("InstanceIds") or call.parameters.get("Resources") or ()


def _subnet_of(parameters: Parameters) -> str:
    interfaces = parameters.get("NetworkInterfaces") or ({},)
    return str(parameters.get("SubnetId") or interfaces[0].get("SubnetId") or "")


def _values(call: Call, name: str) -> list[str]:
    """The values of one filter, taken literally."""
    filters = [one for one in call.parameters.get("Filters") or () if one["Name"] == name]
    return [re_unescaped(value) for one in filters for value in one["Values"]]


def re_unescaped(value: str) -> str:
    return sim_shapes.WILD.sub(lambda match: match[0][1:] or match[0], value)
