"""Spot in the simulated EC2: machines that are taken back, and the notices of it, as EventBridge sends them.

Two minutes' warning is best effort: it may be lost, doubled or late. A rebalance recommendation may come
before it, or alone. (AWS: EC2 user guide, "Spot Instance interruption notices", "EC2 instance rebalance
recommendations"; EventBridge delivers at least once and in no order.)
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from broker.providers.sim_machine import RECLAIMED, Machine
from broker.providers.sim_shapes import ACCOUNT
from broker.providers.sim_sky import Sky
from broker.providers.sim_weather import Fault

NOTICE_SECONDS = 120.0
NOTICES_KEPT_MAX = 10_000  # whoever does not fetch them loses the oldest

INTERRUPTION = "EC2 Spot Instance Interruption Warning"
REBALANCE = "EC2 Instance Rebalance Recommendation"

End = Callable[[Machine, str, str, str], None]
Notice = dict[str, Any]


class Spot:
    """See the module. `notices` holds what has been delivered and not yet been fetched."""

    def __init__(self, sky: Sky, region: str, end: End) -> None:
        self.notices: deque[Notice] = deque(maxlen=NOTICES_KEPT_MAX)
        self._sky, self._region, self._end = sky, region, end
        self._numbers = itertools.count(1)

    def running(self, machine: Machine) -> None:
        """A spot machine has begun to run: draw when it is taken back."""
        seconds = self._sky.fates.wait_seconds(self._sky.weather.reclaims_per_hour)
        self._sky.misfortune(seconds, self._draw, machine)

    def reclaim(
        self, machine: Machine, *, notice_seconds: float | None, rebalance_seconds: float | None = None
    ) -> None:
        """Take it back: a recommendation now and the notice `rebalance_seconds` later, or the notice now,
        and the end `notice_seconds` after it. None leaves the one or the other out."""
        ahead_seconds = 0.0
        if rebalance_seconds is not None:
            self.recommend(machine)
            ahead_seconds = rebalance_seconds
        if notice_seconds is not None:
            self._sky.misfortune(ahead_seconds, self._warn, machine, notice_seconds)
        self._sky.misfortune(ahead_seconds + (notice_seconds or 0.0), self._take, machine, notice_seconds)

    def _draw(self, machine: Machine) -> None:
        if not machine.alive:
            return
        fates, weather = self._sky.fates, self._sky.weather
        rebalance_seconds = None
        if fates.chance(weather.reclaim_rebalance):
            rebalance_seconds = fates.within(weather.rebalance_ahead_seconds)
            if fates.chance(weather.reclaim_called_off):
                self._sky.met(Fault.REBALANCE_ONLY, machine.id)
                self.recommend(machine)
                return
        notice_seconds = None if fates.chance(weather.reclaim_unannounced) else NOTICE_SECONDS
        self.reclaim(machine, notice_seconds=notice_seconds, rebalance_seconds=rebalance_seconds)

    def recommend(self, machine: Machine) -> None:
        """A rebalance recommendation: the machine is at a higher risk."""
        self._sky.met(Fault.REBALANCE, machine.id)
        self._send(machine, REBALANCE, {"instance-id": machine.id})

    def _warn(self, machine: Machine, notice_seconds: float) -> None:
        if machine.alive:
            self._sky.tell("interruption notice", f"{machine.id} in {notice_seconds:.0f} s")
            self._send(machine, INTERRUPTION, {"instance-id": machine.id, "instance-action": "terminate"})

    def _take(self, machine: Machine, notice_seconds: float | None) -> None:
        if not machine.alive:
            return
        self._sky.met(Fault.RECLAIMED, machine.id)
        if notice_seconds is None:
            self._sky.met(Fault.RECLAIMED_UNANNOUNCED, machine.id)
        self._end(machine, "aws", RECLAIMED, f"{RECLAIMED}: Spot instance termination")

    # --- delivering --------------------------------------------------------------------------------

    def _send(self, machine: Machine, kind: str, detail: dict[str, str]) -> None:
        sky, weather = self._sky, self._sky.weather
        notice = self._notice(machine, kind, detail)
        if sky.fates.chance(weather.notice_lost):
            sky.met(Fault.NOTICE_LOST, machine.id)
            return
        self._deliver(notice)
        if sky.fates.chance(weather.notice_duplicated):
            sky.met(Fault.NOTICE_DUPLICATED, machine.id)
            self._deliver(notice)

    def _deliver(self, notice: Notice) -> None:
        sky, weather = self._sky, self._sky.weather
        seconds = sky.fates.within(weather.notice_seconds)
        if sky.fates.chance(weather.notice_late):
            sky.met(Fault.NOTICE_LATE, notice["detail"]["instance-id"])
            seconds += sky.fates.within(weather.notice_late_seconds)
        sky.agenda.plan(sky.at + seconds, self.notices.append, dict(notice))

    def _notice(self, machine: Machine, kind: str, detail: dict[str, str]) -> Notice:
        sent = datetime.fromtimestamp(self._sky.unix(self._sky.at), UTC)
        return {
            "version": "0",
            "id": f"00000000-0000-4000-8000-{next(self._numbers):012x}",
            "detail-type": kind,
            "source": "aws.ec2",
            "account": ACCOUNT,
            "time": sent.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "region": self._region,
            "resources": [f"arn:aws:ec2:{machine.zone}:instance/{machine.id}"],
            "detail": detail,
        }
