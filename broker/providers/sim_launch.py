"""RunInstances of the simulated EC2.

In EC2's order: whether the call makes sense, what it names, whether this token has been here before, and
only then whether there is a machine to be had. (AWS: EC2 API reference, "RunInstances".)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broker.core.model import InstanceState
from broker.providers import sim_shapes
from broker.providers.sim_calls import Answer, Call, Parameters, launch_tags
from broker.providers.sim_machine import Machine
from broker.providers.sim_market import NO_CAPACITY, REFUSALS, Wish, vcpus_of, zone_of_subnet
from broker.providers.sim_sky import Refused, Spells
from broker.providers.sim_tokens import Tokens, token_of
from broker.providers.sim_weather import Fault
from broker.providers.sim_world import Purchase, World

SHOWN_AGAIN = ("KeyName",)  # of a launch's parameters, by Describe


class Launcher:
    """See the module."""

    def __init__(self, world: World, spells: Spells) -> None:
        self.tokens = Tokens()
        self._world, self._sky, self._spells = world, world.sky, spells

    def run_instances(self, call: Call) -> Answer:
        """Raises Refused."""
        parameters = call.parameters
        wish, its_tags = self.wish_of(parameters), launch_tags(parameters)
        token = token_of(parameters)
        self._world.market.look_early(wish)
        carried = self.tokens.find("RunInstances", wish.zone, parameters, self._sky.at)
        if carried is not None:
            return self._replayed(carried.machines)
        machines = [
            self.buy(call, token, wish, zone, its_tags, str(parameters["ImageId"]))
            for zone in self.sell(wish)
        ]
        self.tokens.keep("RunInstances", wish.zone, parameters, machines)
        return _answer(machines)

    def sell(self, wish: Wish) -> list[str]:
        """The zones of the machines that can be had. Raises Refused."""
        if self._spells.stands(Fault.LAUNCH_OUTAGE):
            self._sky.met(Fault.LAUNCH_OUTAGE, "no capacity")
            raise Refused(NO_CAPACITY, REFUSALS[NO_CAPACITY].message, REFUSALS[NO_CAPACITY].status)
        return self._world.market.sell(wish)

    def buy(
        self, call: Call, token: str, wish: Wish, zone: str, its_tags: Mapping[str, str], image: str
    ) -> Machine:
        """One machine of a sale."""
        spot = wish.spot
        if spot and self._sky.goods.chance(self._sky.weather.bought_on_demand):
            spot = False
            self._sky.met(Fault.BOUGHT_ON_DEMAND)
        return self._world.launch(
            Purchase(
                owner=call.caller,
                token=token,
                instance_type=wish.instance_type,
                zone=zone,
                spot=spot,
                image=image,
                tags=its_tags,
                details={key: call.parameters[key] for key in SHOWN_AGAIN if key in call.parameters},
                ends_when_shut_down=call.parameters.get("InstanceInitiatedShutdownBehavior") == "terminate",
                public=_interface(call.parameters).get("AssociatePublicIpAddress", True),
            )
        )

    def wish_of(self, parameters: Parameters) -> Wish:
        """Raises Refused for a launch that makes no sense."""
        if not parameters.get("ImageId"):
            raise Refused("MissingParameter", "The request must contain the parameter ImageId")
        count_min, count_max = int(parameters["MinCount"]), int(parameters["MaxCount"])
        if not 1 <= count_min <= count_max:
            raise Refused("InvalidParameterValue", "MinCount must be at least 1 and at most MaxCount")
        options = parameters.get("InstanceMarketOptions") or {}
        price = (options.get("SpotOptions") or {}).get("MaxPrice")
        return Wish(
            kind_of(parameters),
            options.get("MarketType") == "spot",
            self.zone_of(parameters),
            count_min,
            count_max,
            None if price is None else float(price) * 1_000_000,
        )

    def zone_of(self, parameters: Parameters) -> str:
        """The zone that is named, by itself or by its subnet; empty when EC2 may choose. Raises Refused."""
        placement = parameters.get("Placement") or {}
        zone = str(parameters.get("AvailabilityZone") or placement.get("AvailabilityZone") or "")
        zones = self._world.market.zones
        if zone and zone not in zones:
            raise Refused("InvalidParameterValue", f"Invalid availability zone: [{zone}]")
        subnet_id = str(parameters.get("SubnetId") or _interface(parameters).get("SubnetId") or "")
        return zone or (zone_of_subnet(subnet_id, zones) if subnet_id else "")

    def _replayed(self, machines: Sequence[Machine]) -> Answer:
        """The same machines as they are now. For dead ones EC2 has two answers."""
        dead = [one for one in machines if one.state is InstanceState.TERMINATED]
        if dead:
            self._sky.met(Fault.DEAD_TOKEN, dead[0].id)
            listed = all(one.id in self._world.listed for one in dead)
            if not (listed and self._sky.views.chance(self._sky.weather.dead_token_returned)):
                raise Refused(
                    "IdempotentInstanceTerminated",
                    "The client token refers to an instance that has been terminated.",
                )
        return _answer(machines)


def kind_of(parameters: Parameters) -> str:
    """Raises Refused for a machine type that EC2 does not have."""
    kind = str(parameters.get("InstanceType") or "")
    if vcpus_of(kind) is None:
        raise Refused("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
    return kind


def _interface(parameters: Parameters) -> Mapping[str, Any]:
    interfaces: Sequence[Mapping[str, Any]] = parameters.get("NetworkInterfaces") or ({},)
    return interfaces[0]


def _answer(machines: Sequence[Machine]) -> Answer:
    return sim_shapes.reservation(machines[0], [sim_shapes.instance(one) for one in machines])
