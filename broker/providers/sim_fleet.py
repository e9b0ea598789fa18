"""CreateFleet of the simulated EC2, type `instant`: several offerings at once, some of which may fail.

The answer lists machines and, beside them, an error for every offering that was tried in vain; it may hold
fewer machines than were asked for, or more. (AWS: EC2 API reference, "CreateFleet", "CreateFleetError".)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from broker.providers.sim_calls import Answer, Call, Parameters, launch_tags
from broker.providers.sim_launch import Launcher, kind_of
from broker.providers.sim_machine import Machine
from broker.providers.sim_market import Wish
from broker.providers.sim_sky import Refused, Sky
from broker.providers.sim_tokens import token_of
from broker.providers.sim_weather import Fault

IMAGE_DEFAULT = "ami-00000000"  # of a launch template that was made elsewhere
UNKNOWN_TEMPLATE = "InvalidLaunchTemplateName.NotFoundException"


@dataclass(frozen=True, slots=True)
class Offer:
    """One override of one launch template: a thing that may be bought."""

    template: Mapping[str, Any]
    override: Mapping[str, Any]
    wish: Wish
    data: Mapping[str, Any]  # what the template says of its machines

    def said(self) -> Answer:
        return {
            "LaunchTemplateAndOverrides": {
                "LaunchTemplateSpecification": dict(self.template),
                "Overrides": dict(self.override),
            },
            "Lifecycle": "spot" if self.wish.spot else "on-demand",
        }


@dataclass(slots=True)
class Basket:
    """What has been bought, and what could not be."""

    machines: list[Machine] = field(default_factory=list)
    instances: list[Answer] = field(default_factory=list)
    errors: list[Answer] = field(default_factory=list)


class Fleets:
    """See the module."""

    def __init__(self, sky: Sky, launcher: Launcher) -> None:
        self._sky, self._launcher = sky, launcher
        self._numbers = itertools.count(1)
        self._templates: dict[str, Mapping[str, Any]] = {}

    def create_launch_template(self, call: Call) -> Answer:
        """Raises Refused for a name that is taken."""
        name = str(call.parameters["LaunchTemplateName"])
        if name in self._templates:
            raise Refused(
                "InvalidLaunchTemplateName.AlreadyExistsException", "Launch template name already in use."
            )
        self._templates[name] = dict(call.parameters["LaunchTemplateData"])
        return {"LaunchTemplate": {"LaunchTemplateName": name, "LatestVersionNumber": 1}}

    def create_fleet(self, call: Call) -> Answer:
        """Raises Refused."""
        parameters = call.parameters
        if parameters.get("Type") != "instant":
            raise Refused("InvalidParameterValue", "Only fleets of type instant are offered here")
        token = token_of(parameters)
        carried = self._launcher.tokens.find("CreateFleet", "", parameters, self._sky.at)
        if carried is not None:
            return dict(carried.answer)
        basket = self._shop(call, token, self._count(parameters))
        answer = {
            "FleetId": f"fleet-{next(self._numbers):08x}",
            "Instances": basket.instances,
            "Errors": basket.errors,
        }
        self._launcher.tokens.keep("CreateFleet", "", parameters, basket.machines, answer)
        return answer

    def _count(self, parameters: Parameters) -> int:
        count = int(parameters["TargetCapacitySpecification"]["TotalTargetCapacity"])
        weather, goods = self._sky.weather, self._sky.goods
        if count > 1 and goods.chance(weather.fleet_partial):
            self._sky.met(Fault.FLEET_PARTIAL)
            return count - 1
        if goods.chance(weather.fleet_surplus):
            self._sky.met(Fault.FLEET_SURPLUS, token_of(parameters))
            return count + 1
        return count

    def _shop(self, call: Call, token: str, count: int) -> Basket:
        """Offer by offer, until there is enough; what fails is noted and the next one tried."""
        basket, its_tags = Basket(), launch_tags(call.parameters)
        for offer in self._offers(call.parameters):
            wanted = count - len(basket.machines)
            if wanted <= 0:
                break
            wish = Wish(offer.wish.instance_type, offer.wish.spot, offer.wish.zone, 1, wanted)
            try:
                zones = self._launcher.sell(wish)
            except Refused as refused:
                basket.errors.append(
                    {**offer.said(), "ErrorCode": refused.code, "ErrorMessage": refused.message}
                )
                continue
            image = str(offer.override.get("ImageId") or offer.data.get("ImageId") or IMAGE_DEFAULT)
            said = replace(call, parameters={**offer.data, **call.parameters})
            bought = [self._launcher.buy(said, token, wish, zone, its_tags, image) for zone in zones]
            basket.machines += bought
            basket.instances.append(
                {
                    **offer.said(),
                    "Lifecycle": "spot" if bought[0].spot else "on-demand",
                    "InstanceIds": [one.id for one in bought],
                    "InstanceType": wish.instance_type,
                    "AvailabilityZone": zones[0],
                }
            )
        return basket

    def _offers(self, parameters: Parameters) -> Iterator[Offer]:
        target = parameters["TargetCapacitySpecification"]
        spot = target.get("DefaultTargetCapacityType", "on-demand") == "spot"
        for config in parameters["LaunchTemplateConfigs"]:
            template = config.get("LaunchTemplateSpecification") or {}
            data = self._data(template)
            for override in config.get("Overrides") or ():
                zone = self._launcher.zone_of(override)
                yield Offer(template, override, Wish(kind_of(override), spot, zone), data)

    def _data(self, template: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises Refused for a template that nobody has made. Those named by id were made elsewhere."""
        name = template.get("LaunchTemplateName")
        if name is None:
            return {}
        if name not in self._templates:
            raise Refused(UNKNOWN_TEMPLATE, f"The specified launch template, {name}, does not exist.")
        return self._templates[str(name)]
