"""CreateFleet, type `instant`: one call for many machines, each of whichever offering EC2 can give best.

A fleet is launched from a launch template, which holds what all its machines share; what differs (type, zone
or subnet, the image for other processors) are its overrides. A template's name tells its content, so it is
made once and never changed, and an order that is sent again by a later broker makes it again if it is gone.
Templates cost nothing; AWS allows 5,000 in a region (AWS: EC2 user guide, "Launch template restrictions").

The answer lists machines and, beside them, an error for each override that was tried in vain. It may hold
fewer machines than were asked for, or more. (AWS: EC2 API reference, "CreateFleet", "CreateFleetError".)
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from broker.core import tags
from broker.core.errors import CloudError, Throttled
from broker.core.model import Bought, Instance, InstanceState, Market, Offering, Order
from broker.core.settings import PoolSettings
from broker.providers.ec2_api import Ec2Api
from broker.providers.ec2_errors import TemplateExists, TemplateMissing, refusal
from broker.providers.ec2_wire import Recipe, Shape, network, shared_parameters, tag_list

MACHINES_MAX = 250  # in one call: a wrong figure anywhere buys no more than that
TEMPLATE_VERSION = "1"  # a template that never changes has no other


def fleet_parameters(
    broker_id: str,
    pool: PoolSettings,
    recipe: Recipe,
    offerings: Sequence[Offering],
    its_tags: Mapping[str, str],
    count: int,
) -> dict[str, Any]:
    """The order's exact parameters: the call without its ClientToken, and the template that it names.

    The offerings are of one market.
    """
    data = _template_data(pool, recipe)
    name = _template_name(broker_id, data)
    spot = offerings[0].market is Market.SPOT
    options = (
        {
            "SpotOptions": {
                "AllocationStrategy": "price-capacity-optimized",
                "InstanceInterruptionBehavior": "terminate",
            }
        }
        if spot
        else {"OnDemandOptions": {"AllocationStrategy": "prioritized"}}
    )
    fleet = {
        "Type": "instant",
        "LaunchTemplateConfigs": [
            {
                "LaunchTemplateSpecification": {"LaunchTemplateName": name, "Version": TEMPLATE_VERSION},
                "Overrides": [_override(pool, recipe, one, number) for number, one in enumerate(offerings)],
            }
        ],
        "TargetCapacitySpecification": {
            "TotalTargetCapacity": count,
            "DefaultTargetCapacityType": "spot" if spot else "on-demand",
        },
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": tag_list(its_tags)} for kind in ("instance", "volume")
        ],
        **options,
    }
    owner = tag_list({tags.BROKER: broker_id})
    template = {
        "LaunchTemplateName": name,
        "LaunchTemplateData": data,
        "TagSpecifications": [{"ResourceType": "launch-template", "Tags": owner}],
    }
    return {"fleet": fleet, "template": template}


def _template_data(pool: PoolSettings, recipe: Recipe) -> dict[str, Any]:
    data = {**shared_parameters(pool), **network(pool, recipe.security_group_ids, subnet=None)}
    if recipe.user_data:  # the SDK encodes it for RunInstances, and not here
        data["UserData"] = b64encode(recipe.user_data.encode()).decode()
    return data


def _template_name(broker_id: str, data: Mapping[str, Any]) -> str:
    exact = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return f"compute-broker-{broker_id}-{sha256(exact.encode()).hexdigest()[:16]}"


def _override(pool: PoolSettings, recipe: Recipe, offering: Offering, number: int) -> dict[str, Any]:
    """The zone is named where it is known, also beside its subnet: an error that names only a subnet would
    count against all zones. (Karpenter's AWS provider names both, for the same reason.)"""
    override: dict[str, Any] = {"InstanceType": offering.instance_type, "Priority": float(number)}
    subnet, image = recipe.subnet(pool, offering), recipe.image(pool, offering.instance_type)
    if image is not None:
        override["ImageId"] = image
    if subnet:
        override["SubnetId"] = subnet
    if offering.zone:
        override["AvailabilityZone"] = offering.zone
    return override


class Fleets:
    """Launches orders whose parameters are `fleet_parameters`."""

    def __init__(self, api: Ec2Api) -> None:
        self._api = api
        self._made: set[str] = set()  # templates that this broker has made or met

    async def launch(self, order: Order, sent: Mapping[str, Any], region: str) -> Bought:
        """Raises what Provider.launch raises; ValueError and the like for an answer that is none."""
        await self._ensure_template(sent["template"])
        try:
            answer = await self._api.call("CreateFleet", **sent["fleet"], ClientToken=order.id)
        except TemplateMissing as error:
            self._made.discard(sent["template"]["LaunchTemplateName"])
            raise Throttled(f"{error.message}; it is made anew") from error
        its_tags = _tags_of(sent["fleet"])
        instances = [
            Instance(
                id_,
                InstanceState.PENDING,
                instance_type=shape["InstanceType"],
                region=region,
                zone=_zone(shape),
                market=Market.SPOT if shape.get("Lifecycle") == "spot" else Market.ON_DEMAND,
                cores=_cores(order, shape["InstanceType"]),
                tags=its_tags,
            )
            for shape in answer.get("Instances") or ()
            for id_ in shape["InstanceIds"]
        ]
        return Bought(tuple(instances), tuple(_refusals(order, answer.get("Errors") or ())))

    async def _ensure_template(self, template: Mapping[str, Any]) -> None:
        name = template["LaunchTemplateName"]
        if name in self._made:
            return
        try:
            await self._api.call("CreateLaunchTemplate", **template, ClientToken=name)
        except TemplateExists:
            pass  # of the same content: its name says so
        self._made.add(name)


def _tags_of(fleet: Mapping[str, Any]) -> dict[str, str]:
    """What the machines carry, so that whoever hears of them first knows whose they are."""
    return {
        tag["Key"]: tag["Value"]
        for specification in fleet["TagSpecifications"]
        if specification["ResourceType"] == "instance"
        for tag in specification["Tags"]
    }


def _refusals(order: Order, errors: Sequence[Shape]) -> list[tuple[Offering, CloudError]]:
    found = []
    for shape in errors:
        error = refusal("CreateFleet", shape.get("ErrorCode") or "", shape.get("ErrorMessage") or "")
        about = shape.get("LaunchTemplateAndOverrides", {}).get("Overrides") or {}
        kind, zone = about.get("InstanceType"), about.get("AvailabilityZone") or ""
        concerned = [one for one in order.offerings if kind in (None, one.instance_type)]
        here = [one for one in concerned if not zone or one.zone in ("", zone)]
        found += [(one, error) for one in here or concerned]
    return found


def _zone(shape: Shape) -> str:
    about = shape.get("LaunchTemplateAndOverrides", {}).get("Overrides") or {}
    return str(shape.get("AvailabilityZone") or about.get("AvailabilityZone") or "")


def _cores(order: Order, instance_type: str) -> int | None:
    return next((one.cores for one in order.offerings if one.instance_type == instance_type), None)
