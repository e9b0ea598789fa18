"""The machines of the simulated EC2 and what becomes of them: launches, boots, addresses, ends.

A machine's fate is drawn when it enters a state and stands in the agenda from then on. A fault counts as
injected only in the moment in which the machine really is otherwise than it should be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from broker.core import tags
from broker.core.model import InstanceState
from broker.providers.sim_machine import Addresses, Machine
from broker.providers.sim_market import Market, vcpus_of
from broker.providers.sim_sky import Sky
from broker.providers.sim_spot import Spot
from broker.providers.sim_weather import Fault

USER_INITIATED = (
    "Client.UserInitiatedShutdown",
    "Client.UserInitiatedShutdown: User initiated shutdown",
)
SHUT_DOWN_FROM_WITHIN = "Client.InstanceInitiatedShutdown"
PUBLIC_FIRST, PUBLIC_COUNT = (198, 18, 0, 0), 131_070  # a network that is never routed (RFC 2544)
PRIVATE_FIRST, PRIVATE_COUNT = (10, 0, 0, 0), 16_777_214
STRANGERS_KINDS = ("t3.micro", "m7i.large", "c7i.4xlarge")
STRANGERS_TAGS: tuple[Mapping[str, str], ...] = (
    {},
    {tags.NAME: "somebody's web server"},
    {tags.NAME: "dserv-worker"},
    {tags.NAME: "dserv-worker", tags.BROKER: "somebody-elses", tags.POOL: "default", tags.ORDER: "theirs"},
    {"Compute-Broker:Broker": "lab"},  # keys and values are case-sensitive
)


@dataclass(frozen=True, slots=True)
class Purchase:
    """What has been bought."""

    owner: str
    token: str
    instance_type: str
    zone: str
    spot: bool
    image: str = "ami-00000000"
    tags: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    public: bool = True  # whether it gets a public address
    ends_when_shut_down: bool = True


class World:
    """See the module. `machines` ever were, `listed` are still shown, `alive` have not begun to end."""

    def __init__(self, sky: Sky, region: str, zones: tuple[str, ...]) -> None:
        self.sky = sky
        self.market = Market(sky, zones, lambda: self.alive.values())
        self.spot = Spot(sky, region, self.end)
        self.machines: dict[str, Machine] = {}
        self.listed: dict[str, Machine] = {}
        self.alive: dict[str, Machine] = {}
        self.public = Addresses(PUBLIC_FIRST, PUBLIC_COUNT)
        self.private = Addresses(PRIVATE_FIRST, PRIVATE_COUNT)
        self._numbers = itertools.count(1)
        sky.recur(lambda: sky.weather.strangers_per_hour, self._stranger_comes)

    # --- launching ---------------------------------------------------------------------------------

    def launch(self, bought: Purchase) -> Machine:
        at, number = self.sky.at, next(self._numbers)
        machine = Machine(
            id=f"i-{number:017x}",
            number=number,
            owner=bought.owner,
            token=bought.token,
            instance_type=bought.instance_type,
            vcpus=vcpus_of(bought.instance_type) or 1,
            zone=bought.zone,
            spot=bought.spot,
            price_usd_micros_per_hour=self.market.price_usd_micros_per_hour(
                bought.instance_type, bought.spot, bought.zone
            ),
            image=bought.image,
            tags=dict(bought.tags),
            launched_at=at,
            launched_unix=self.sky.unix(at),
            details=bought.details,
            public=bought.public,
            ends_when_shut_down=bought.ends_when_shut_down,
        )
        machine.enter(InstanceState.PENDING, at)
        self.machines[machine.id] = self.listed[machine.id] = self.alive[machine.id] = machine
        self.sky.tell("launched", f"{machine.id} {bought.instance_type} {bought.zone} token={bought.token}")
        self._give_addresses(machine)
        self._plan_visibility(machine)
        self._plan_boot(machine)
        return machine

    def start(self, machine: Machine) -> None:
        """A machine that is stopped comes up again."""
        machine.begin_anew(self.sky.at, self.sky.unix(self.sky.at))
        self.sky.tell("started", machine.id)
        self._give_addresses(machine)
        self._plan_boot(machine)

    def _give_addresses(self, machine: Machine) -> None:
        sky, weather = self.sky, self.sky.weather
        reuse = sky.fates.chance(weather.address_reused)
        rest_seconds = weather.address_rest_seconds
        if not machine.private_address:  # it is kept while the machine is stopped
            machine.private_address, _ = self.private.give(
                machine, sky.at, reuse=reuse, rest_seconds=rest_seconds
            )
        shown_seconds = sky.fates.within(weather.address_seconds)
        if not machine.public:
            return
        if sky.fates.chance(weather.address_never):
            sky.agenda.plan(sky.at + shown_seconds, self._fault_if_alive, machine, Fault.ADDRESS_NEVER)
            return
        machine.public_address, reused = self.public.give(
            machine, sky.at, reuse=reuse, rest_seconds=rest_seconds
        )
        if reused:
            stranger = not machine.owner
            sky.met(
                Fault.ADDRESS_REUSED_BY_STRANGER if stranger else Fault.ADDRESS_REUSED,
                f"{machine.public_address} to {machine.id}",
            )
        if sky.fates.chance(weather.address_late):
            sky.agenda.plan(sky.at + shown_seconds, self._fault_if_alive, machine, Fault.ADDRESS_LATE)
            shown_seconds += sky.fates.within(weather.address_late_seconds)
        self.show_address(machine, sky.at + shown_seconds)

    def show_address(self, machine: Machine, at: float) -> None:
        """Describe shows the public address from that moment on."""
        machine.address_shown_at = at
        machine.changed(self.sky.at)
        self.sky.agenda.plan(at, lambda: machine.changed(self.sky.at))

    def _plan_visibility(self, machine: Machine) -> None:
        views, weather = self.sky.views, self.sky.weather
        machine.visible_at = self.sky.at
        if views.chance(weather.hidden):
            machine.visible_at += views.within(weather.hidden_seconds)
            machine.hidden_from_writes = views.chance(weather.hidden_from_writes)
        flicker_seconds = views.within(weather.flicker_seconds) if weather.flicker > 0 else 0.0
        machine.steady_at = machine.visible_at + flicker_seconds

    # --- booting -----------------------------------------------------------------------------------

    def _plan_boot(self, machine: Machine) -> None:
        sky, weather = self.sky, self.sky.weather
        seconds = sky.fates.within(weather.pending_seconds)
        if sky.fates.chance(weather.boot_failed):
            sky.misfortune(seconds, self._fail_boot, machine)
        elif sky.fates.chance(weather.stuck_pending):
            sky.agenda.plan(sky.at + seconds, self._fault_if_pending, machine)
            seconds += sky.fates.within(weather.stuck_pending_seconds)
        sky.agenda.plan(sky.at + seconds, self.run, machine)

    def run(self, machine: Machine) -> None:
        """Pending is over; from here on it is billed."""
        if machine.state is not InstanceState.PENDING:
            return
        sky, weather = self.sky, self.sky.weather
        machine.enter(InstanceState.RUNNING, sky.at)
        sky.tell("running", machine.id)
        self._plan_port(machine)
        seconds = sky.fates.wait_seconds(weather.shutdowns_per_hour)
        sky.misfortune(seconds, self._shut_itself_down, machine)
        if machine.spot:
            self.spot.running(machine)

    def _fail_boot(self, machine: Machine) -> None:
        if machine.state is InstanceState.PENDING:
            self.sky.met(Fault.BOOT_FAILED, machine.id)
            self.end(machine, "aws", "Server.InternalError", "Server.InternalError: Internal error on launch")

    def _plan_port(self, machine: Machine) -> None:
        sky, weather = self.sky, self.sky.weather
        again = len(machine.looks_before) > 0
        seconds = sky.fates.within(weather.port_again_seconds if again else weather.port_seconds)
        if sky.fates.chance(weather.port_never):
            sky.agenda.plan(sky.at + seconds, self._fault_if_alive, machine, Fault.PORT_NEVER)
            return
        if sky.fates.chance(weather.port_late):
            sky.agenda.plan(sky.at + seconds, self._fault_if_alive, machine, Fault.PORT_LATE)
            seconds += sky.fates.within(weather.port_late_seconds)
        machine.port_opens_at = sky.at + seconds
        if sky.fates.chance(weather.port_dies):
            after_seconds = seconds + sky.fates.within(weather.port_dies_after_seconds)
            sky.misfortune(after_seconds, self.deafen, machine, math.inf)
        if sky.fates.chance(weather.port_pauses):
            after_seconds = seconds + sky.fates.within(weather.port_pauses_after_seconds)
            sky.misfortune(after_seconds, self.deafen, machine, sky.fates.within(weather.port_pause_seconds))

    def deafen(self, machine: Machine, seconds: float) -> None:
        """The machine runs on, its worker port does not answer."""
        if machine.alive:
            machine.deaf.append((self.sky.at, self.sky.at + seconds))
            self.sky.met(Fault.PORT_DIED if math.isinf(seconds) else Fault.PORT_PAUSED, machine.id)

    # --- ending ------------------------------------------------------------------------------------

    def end(self, machine: Machine, by: str, code: str, reason: str) -> None:
        """Shutting-down begins. A machine that is ending already goes on as it was."""
        if not machine.alive:
            return
        sky, weather = self.sky, self.sky.weather
        machine.ended_at, machine.ended_by = sky.at, by
        self._explain(machine, code, reason)
        machine.enter(InstanceState.SHUTTING_DOWN, sky.at)
        sky.tell("shutting down", f"{machine.id} by {by}: {reason}")
        del self.alive[machine.id]
        self._release(machine)
        seconds = sky.fates.within(weather.shutting_down_seconds)
        if sky.fates.chance(weather.stuck_shutting_down):
            sky.agenda.plan(sky.at + seconds, self._fault_if_shutting_down, machine)
            seconds += sky.fates.within(weather.stuck_shutting_down_seconds)
        sky.agenda.plan(sky.at + seconds, self.terminated, machine)

    def _explain(self, machine: Machine, code: str, reason: str) -> None:
        """Why it leaves its state, in both of EC2's ways to say so."""
        machine.reason_code, machine.reason = code, reason
        machine.transition_reason = "" if code == SHUT_DOWN_FROM_WITHIN else reason
        if (code, reason) == USER_INITIATED:
            moment = datetime.fromtimestamp(int(self.sky.unix(self.sky.at)), UTC)
            machine.transition_reason = f"User initiated ({moment:%Y-%m-%d %H:%M:%S} GMT)"

    def terminated(self, machine: Machine) -> None:
        if machine.state is not InstanceState.SHUTTING_DOWN:
            return
        machine.enter(InstanceState.TERMINATED, self.sky.at)
        self.sky.tell("terminated", machine.id)
        shown_seconds = self.sky.fates.within(self.sky.weather.terminated_shown_seconds)
        self.sky.agenda.plan(self.sky.at + shown_seconds, self._forget, machine)

    def stop(self, machine: Machine, by: str) -> None:
        """Somebody stops it: it keeps existing and is not billed."""
        if not machine.runs:
            return
        self._explain(machine, *USER_INITIATED)
        machine.enter(InstanceState.STOPPING, self.sky.at)
        self.sky.tell("stopping", f"{machine.id} by {by}")
        self._release(machine)
        sky, weather = self.sky, self.sky.weather
        seconds = sky.fates.within(weather.stopping_seconds)
        if sky.fates.chance(weather.stuck_stopping):
            sky.agenda.plan(sky.at + seconds, self._fault_if_stopping, machine)
            seconds += sky.fates.within(weather.stuck_stopping_seconds)
        sky.agenda.plan(sky.at + seconds, self._stopped, machine)

    def _stopped(self, machine: Machine) -> None:
        if machine.state is InstanceState.STOPPING:
            machine.enter(InstanceState.STOPPED, self.sky.at)
            self.sky.tell("stopped", machine.id)

    def _release(self, machine: Machine) -> None:
        self.public.take_back(machine.public_address, machine, self.sky.at)
        if not machine.alive:
            self.private.take_back(machine.private_address, machine, self.sky.at)

    def _shut_itself_down(self, machine: Machine) -> None:
        if machine.state is InstanceState.RUNNING:
            self.sky.met(Fault.SHUT_ITSELF_DOWN, machine.id)
            self.shut_down(machine)

    def shut_down(self, machine: Machine) -> None:
        """From within, as its user data or its owner may."""
        code = SHUT_DOWN_FROM_WITHIN
        if machine.ends_when_shut_down or machine.spot:
            self.end(machine, "itself", code, f"{code}: Instance initiated shutdown")
        else:
            self.stop(machine, "itself")

    def _forget(self, machine: Machine) -> None:
        self.listed.pop(machine.id, None)

    # --- others ------------------------------------------------------------------------------------

    def _stranger_comes(self) -> None:
        fates, weather = self.sky.fates, self.sky.weather
        self.sky.met(Fault.STRANGER)
        machine = self.launch_stranger(
            fates.pick(STRANGERS_KINDS), fates.pick(STRANGERS_TAGS), fates.chance(weather.stranger_answers)
        )
        self.sky.agenda.plan(
            self.sky.at + fates.within(weather.stranger_seconds), self.end_by_operator, machine
        )

    def launch_stranger(self, kind: str, its_tags: Mapping[str, str], answers: bool) -> Machine:
        """Somebody else's machine in the same account."""
        machine = self.launch(
            Purchase("", "", kind, self.sky.fates.pick(self.market.zones), spot=False, tags=its_tags)
        )
        if not answers:
            machine.deaf.append((self.sky.at, math.inf))
        return machine

    def end_by_operator(self, machine: Machine) -> None:
        self.end(machine, "operator", *USER_INITIATED)

    # --- counting ----------------------------------------------------------------------------------

    def _fault_if_alive(self, machine: Machine, fault: Fault) -> None:
        if machine.alive:
            self.sky.met(fault, machine.id)

    def _fault_if_pending(self, machine: Machine) -> None:
        if machine.state is InstanceState.PENDING:
            self.sky.met(Fault.STUCK_PENDING, machine.id)

    def _fault_if_stopping(self, machine: Machine) -> None:
        if machine.state is InstanceState.STOPPING:
            self.sky.met(Fault.STUCK_STOPPING, machine.id)

    def _fault_if_shutting_down(self, machine: Machine) -> None:
        if machine.state is InstanceState.SHUTTING_DOWN:
            self.sky.met(Fault.STUCK_SHUTTING_DOWN, machine.id)

    def heal(self) -> None:
        """What is stuck goes on, what is hidden shows. A port that never opened stays shut."""
        at, weather = self.sky.at, self.sky.weather
        for machine in self.listed.values():
            machine.visible_at = machine.steady_at = min(machine.visible_at, at)
            if machine.state is InstanceState.PENDING:
                self.sky.agenda.plan(at + weather.pending_seconds[1], self.run, machine)
            elif machine.state is InstanceState.STOPPING:
                self.sky.agenda.plan(at + weather.stopping_seconds[1], self._stopped, machine)
            elif machine.state is InstanceState.SHUTTING_DOWN:
                self.sky.agenda.plan(at + weather.shutting_down_seconds[1], self.terminated, machine)
            if machine.public_address and machine.address_shown_at > at:
                self.show_address(machine, at)
