"""Terminate-, Stop-, StartInstances and CreateTags of the simulated EC2, and who asked for them.

Whoever asks for a change of a machine that is not theirs is written down, whatever becomes of the call:
that is the one thing a broker must never do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from broker.core import tags
from broker.core.model import InstanceState
from broker.providers import sim_shapes
from broker.providers.sim_calls import CHANGES, Answer, Call, refuse_too_many, tags_of
from broker.providers.sim_listing import not_found, refuse_malformed
from broker.providers.sim_machine import Machine
from broker.providers.sim_market import Wish
from broker.providers.sim_sky import Refused
from broker.providers.sim_weather import Fault
from broker.providers.sim_world import USER_INITIATED, World


@dataclass(frozen=True, slots=True)
class Violation:
    """Somebody asked for a change of a machine that is not theirs."""

    at: float
    caller: str
    api: str
    instance_id: str


class Changer:
    """See the module. `sell` refuses what is not to be had, a start too; `adoptable_names`: Name tags by
    which a machine without a broker may be claimed."""

    def __init__(self, world: World, sell: Callable[[Wish], object]) -> None:
        self._sell = sell
        self.violations: list[Violation] = []
        self.adoptable_names: tuple[str, ...] = ()
        self._world, self._sky = world, world.sky

    def watch(self, call: Call) -> None:
        """A call has arrived: does it touch what is somebody else's?"""
        if call.api not in CHANGES:
            return
        for one in call.instance_ids:
            machine = self._world.machines.get(one)
            if machine is not None and machine.owner != call.caller and not self._adopts(call, machine):
                self.violations.append(Violation(self._sky.at, call.caller, call.api, one))
                self._sky.tell("VIOLATION", f"{call.caller}: {call.api} of {one}")

    def terminate_instances(self, call: Call) -> Answer:
        """All of them or none; a protected machine saves only those beside it in its zone. Raises Refused."""
        ids = list(dict.fromkeys(call.instance_ids))
        if not ids:
            raise Refused("MissingParameter", "The request must contain the parameter InstanceId")
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

    def stop_instances(self, call: Call) -> Answer:
        """All of them or none. Raises Refused."""
        machines = self._known(list(dict.fromkeys(call.instance_ids)))
        for one in machines:
            if one.spot:
                raise Refused("UnsupportedOperation", f"You can't stop the Spot Instance '{one.id}'")
            if one.state is InstanceState.PENDING or not one.alive:
                raise _wrong_state(one, "stopped")
        before = [one.state for one in machines]
        for one in machines:
            self._world.stop(one, call.caller)
        return {"StoppingInstances": _changes(machines, before)}

    def start_instances(self, call: Call) -> Answer:
        """All of them or none; what is started needs room like what is bought. Raises Refused."""
        machines = self._known(list(dict.fromkeys(call.instance_ids)))
        for one in machines:
            if one.state is InstanceState.STOPPING or not one.alive:
                raise _wrong_state(one, "started")
        before = [one.state for one in machines]
        for one in machines:
            if one.state is InstanceState.STOPPED:
                self._sell(Wish(one.instance_type, one.spot, one.zone, 1, 1))
                self._world.start(one)
        return {"StartingInstances": _changes(machines, before)}

    def create_tags(self, call: Call) -> Answer:
        """Raises Refused."""
        new = tags_of(call.parameters.get("Tags") or ())
        machines = self._known(call.instance_ids)
        for machine in machines:
            refuse_too_many({**machine.tags, **new})
        for machine in machines:
            if self._adopts(call, machine) and tags.BROKER in new:
                machine.owner = call.caller
            machine.retag(new, self._sky.at)
        return {}

    def _terminate(self, machine: Machine, caller: str) -> Answer:
        before = after = machine.state
        if machine.alive:
            after = InstanceState.SHUTTING_DOWN
            if self._sky.fates.chance(self._sky.weather.terminate_ignored):
                self._sky.met(Fault.TERMINATE_IGNORED, machine.id)
            else:
                self._world.end(machine, caller, *USER_INITIATED)
        return {
            "InstanceId": machine.id,
            "PreviousState": sim_shapes.state(before),
            "CurrentState": sim_shapes.state(after),
        }

    def _adopts(self, call: Call, machine: Machine) -> bool:
        claimable = not machine.owner and tags.BROKER not in machine.tags
        named = machine.tags.get(tags.NAME) in self.adoptable_names
        return call.api == "CreateTags" and claimable and named

    def _known(self, ids: Sequence[str]) -> list[Machine]:
        """The machines of these ids. Raises Refused when EC2 does not know one of them, or not yet."""
        refuse_malformed(ids)
        listed = self._world.listed
        young = [one for one in ids if one in listed and self._is_hidden(listed[one])]
        for one in young:
            self._sky.met(Fault.NOT_FOUND, one)
        unknown = [one for one in ids if one not in listed or one in young]
        if unknown:
            raise not_found(unknown)
        return [listed[one] for one in ids]

    def _is_hidden(self, machine: Machine) -> bool:
        return machine.hidden_from_writes and self._sky.at < machine.visible_at


def _wrong_state(machine: Machine, to_be: str) -> Refused:
    words = f"The instance '{machine.id}' is not in a state from which it can be {to_be}."
    return Refused("IncorrectInstanceState", words)


def _changes(machines: Sequence[Machine], before: Sequence[InstanceState]) -> list[dict[str, object]]:
    return [
        {
            "InstanceId": one.id,
            "PreviousState": sim_shapes.state(state),
            "CurrentState": sim_shapes.state(one.state),
        }
        for one, state in zip(machines, before, strict=True)
    ]
