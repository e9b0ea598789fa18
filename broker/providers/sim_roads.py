"""The way to the simulated EC2 and back: how long it takes, and what befalls a call on it.

Either by chance, as the weather of the moment has it, or by a script: `befall` sets aside a mishap for the
next calls that fit it, in the order in which they come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from broker.providers.sim_calls import CHANGES, LAUNCHES, Parameters
from broker.providers.sim_sky import Sky, Spells
from broker.providers.sim_weather import Fault, Road

EVERY_API = "*"
MISHAPS = (
    (Fault.REQUEST_LOST, "request_lost"),
    (Fault.REQUEST_LATE, "request_late"),
    (Fault.ANSWER_LOST, "answer_lost"),
    (Fault.ANSWER_LATE, "answer_late"),
    (Fault.SERVER_ERROR, "server_error"),
    (Fault.THROTTLED, "throttled"),
)


Odds = tuple[
    tuple[Fault, float], ...
]  # (mishap, it happens when a roll is below this and above the one before)


class Ending(StrEnum):
    """How an attempt ends for the caller."""

    ANSWER = "answer"
    SILENCE = "silence"  # until the caller's patience ends
    RESET = "reset"
    UNREACHABLE = "unreachable"  # no connection, said at once
    CONNECT_TIMEOUT = "connect timeout"


LOST_REQUESTS = (Ending.SILENCE, Ending.RESET, Ending.UNREACHABLE, Ending.CONNECT_TIMEOUT)
LOST_ANSWERS = (Ending.RESET, Ending.SILENCE)
# What a call meets in an outage; one in ten is carried out although nobody hears of it.
OUTAGE_ENDINGS = (
    *(Ending.SILENCE,) * 3,
    *(Ending.CONNECT_TIMEOUT,) * 2,
    Ending.UNREACHABLE,
    *(Ending.ANSWER,) * 3,
    Ending.RESET,
)


@dataclass(slots=True)
class Trip:
    """How one attempt will go. Seconds from its start; `arrives_seconds` is inf when it never arrives."""

    arrives_seconds: float
    returns_seconds: float
    ending: Ending = Ending.ANSWER
    mishap: Fault | None = None  # what EC2 itself does to it
    code: str = ""
    status: int = 400


@dataclass(slots=True)
class Scripted:
    """A mishap that waits for its calls. `seconds`: how late; `ending`: how it ends, for what is lost."""

    api: str
    fault: Fault
    times: int = 1
    skip: int = 0
    code: str = ""
    status: int = 400
    seconds: float | None = None
    ending: Ending | None = None
    hits: int = 0

    def takes(self, api: str, parameters: Parameters) -> bool:
        if self.times <= 0 or self.api not in (EVERY_API, api):
            return False
        if self.fault is Fault.PAGE_FAILED and not parameters.get("NextToken"):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        self.hits += 1
        return True


class Roads:
    """See the module."""

    def __init__(self, sky: Sky, spells: Spells) -> None:
        self._sky, self._spells = sky, spells
        self._script: list[Scripted] = []
        self._odds: dict[
            int, tuple[Road | None, Odds]
        ] = {}  # by the road's identity: hashing it takes longer

    def befall(self, scripted: Scripted) -> Scripted:
        self._script.append(scripted)
        return scripted

    def heal(self) -> None:
        self._script.clear()

    def set_out(self, api: str, parameters: Parameters) -> Trip:
        """How this attempt will go."""
        road = self._road(api)
        seconds = self._sky.roads.within(road.answer_seconds)
        trip = Trip(seconds / 2, seconds)
        scripted = self._scripted(api, parameters) if self._script else None
        if scripted is not None:
            return self._mishap(trip, scripted.fault, road, scripted)
        if self._spells.stands(Fault.OUTAGE):
            return self._in_outage(trip)
        fault = self._drawn(road)
        return trip if fault is None else self._mishap(trip, fault, road, Scripted(api, fault))

    def _road(self, api: str) -> Road:
        weather = self._sky.weather
        return weather.launches if api in LAUNCHES else weather.changes if api in CHANGES else weather.reads

    def _scripted(self, api: str, parameters: Parameters) -> Scripted | None:
        found = next((one for one in self._script if one.takes(api, parameters)), None)
        if found is not None and found.times <= 0:
            self._script.remove(found)
        return found

    def _drawn(self, road: Road) -> Fault | None:
        known, odds = self._odds.get(id(road), (None, ()))
        if known is not road:
            odds = _odds(road)
            self._odds[id(road)] = (road, odds)
        if not odds:
            return None
        roll = self._sky.roads.roll()
        return next((fault for fault, below in odds if roll < below), None)

    def _mishap(self, trip: Trip, fault: Fault, road: Road, script: Scripted) -> Trip:
        dice = self._sky.roads
        if fault is not Fault.PAGE_FAILED:  # counted where it is carried out
            self._sky.met(fault, script.api)
        match fault:
            case Fault.REQUEST_LOST:
                ending = script.ending or dice.pick(LOST_REQUESTS)
                return replace(trip, arrives_seconds=math.inf, ending=ending)
            case Fault.ANSWER_LOST:
                return replace(trip, ending=script.ending or dice.pick(LOST_ANSWERS))
            case Fault.REQUEST_LATE:
                late = dice.within(road.request_late_seconds) if script.seconds is None else script.seconds
                return replace(
                    trip,
                    arrives_seconds=trip.arrives_seconds + late,
                    returns_seconds=trip.returns_seconds + late,
                )
            case Fault.ANSWER_LATE:
                late = dice.within(road.answer_late_seconds) if script.seconds is None else script.seconds
                return replace(trip, returns_seconds=trip.returns_seconds + late)
            case _:
                return replace(trip, mishap=fault, code=script.code, status=script.status)

    def _in_outage(self, trip: Trip) -> Trip:
        self._sky.met(Fault.OUTAGE)
        ending = self._sky.roads.pick(OUTAGE_ENDINGS)
        if ending is Ending.ANSWER:
            return replace(trip, mishap=Fault.OUTAGE)
        arrives = trip.arrives_seconds if ending is Ending.RESET else math.inf
        return replace(trip, arrives_seconds=arrives, ending=ending)


def _odds(road: Road) -> Odds:
    """Only what can happen, so that on a clear road nothing is rolled."""
    found: list[tuple[Fault, float]] = []
    below = 0.0
    for fault, name in MISHAPS:
        probability: float = getattr(road, name)
        below += probability
        if probability > 0:
            found.append((fault, below))
    return tuple(found)
