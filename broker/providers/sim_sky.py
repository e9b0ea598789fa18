"""What all parts of the simulated EC2 share: time, chance, the weather of the moment, the count of faults.

Nothing ticks. Whatever is going to happen stands in the agenda with its moment, and is carried out, in
order, when somebody looks at the cloud the next time: thirty quiet days cost nothing.

Chance comes in four streams, so that one call more or less on the way does not change what becomes of the
machines: a history that is being shortened stays nearly the same.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from broker.providers.sim_weather import Fault, Range, Weather

T = TypeVar("T")
Report = Callable[[float, str, str], None]  # (moment, what, details)

SKEW_SECONDS_MAX = 300.0  # (AWS: EC2 API reference, "Error codes": AuthFailure, RequestExpired)
SPELLS = (Fault.OUTAGE, Fault.LAUNCH_OUTAGE, Fault.CREDENTIALS_EXPIRED, Fault.CLOCK_SKEWED)


class Refused(Exception):
    """An error answer in the making: EC2's code, its words and the HTTP status."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


class Dice:
    """Chance. Built on `Random.random` alone, whose sequence no version of Python changes."""

    __slots__ = ("_roll",)

    def __init__(self, rng: random.Random) -> None:
        self._roll = random.Random(rng.getrandbits(64)).random  # noqa: S311 (a simulation, no secret)

    def roll(self) -> float:
        return self._roll()

    def fork(self) -> Dice:
        """A stream of its own, for what must not depend on how often this one is asked."""
        return Dice(random.Random(int(self._roll() * 2**53)))  # noqa: S311

    def chance(self, probability: float) -> bool:
        """No roll for what never happens: a fault that is switched off changes nothing else."""
        return probability > 0 and self._roll() < probability

    def within(self, span: Range) -> float:
        low, high = span
        return low if low == high else low + (high - low) * self._roll()

    def wait_seconds(self, per_hour: float) -> float:
        """Until the next of events that come so often and know nothing of each other; inf for never."""
        return -math.log(1.0 - self._roll()) * 3600 / per_hour if per_hour > 0 else math.inf

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._roll() * len(items))]


class Agenda:
    """What is going to happen. `at` is the moment that is being lived through."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.at = now()
        self._planned: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._busy = False

    def plan(self, at: float, action: Callable[..., None], *arguments: Any) -> None:
        """`action` at that moment; what never comes is not kept."""
        if at < math.inf:
            heapq.heappush(self._planned, (max(at, self.at), next(self._numbers), action, arguments))

    def catch_up(self, until: float = -math.inf) -> float:
        """Let everything happen that is due by now, or by `until` if that is later. Returns the moment."""
        if self._busy:  # somebody looks at the cloud from within an action, through a report
            return self.at
        until = max(until, self.now(), self.at)
        planned = self._planned
        self._busy = True
        try:
            while planned and planned[0][0] <= until:
                self.at, _, action, arguments = heapq.heappop(planned)
                action(*arguments)
        finally:
            self._busy = False
        self.at = until
        return until


class Sky:
    """See the module. `era` changes when all is healed: misfortunes planned before do not come any more."""

    def __init__(
        self,
        rng: random.Random,
        now: Callable[[], float],
        wall_unix: Callable[[], float],
        weather: Weather,
    ) -> None:
        self.weather = weather
        self.agenda = Agenda(now)
        self.roads, self.views, self.fates, self.goods = (Dice(rng) for _ in range(4))
        self.faults: Counter[str] = Counter()
        self.report: Report | None = None
        self.era = 0
        self.numbers = itertools.count(1)  # for names that nothing else gives
        self._wall_unix = wall_unix
        self._recurring: list[Recurring] = []

    @property
    def at(self) -> float:
        return self.agenda.at

    def unix(self, at: float) -> float:
        """AWS's own clock at a moment of the loop's."""
        return self._wall_unix() - (self.agenda.now() - at)

    def met(self, fault: Fault, details: str = "") -> None:
        """A fault has been injected."""
        self.faults[str(fault)] += 1
        self.tell(f"fault: {fault}", details)

    def tell(self, what: str, details: str = "") -> None:
        if self.report is not None:
            self.report(self.agenda.at, what, details)

    def misfortune(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """`action` so many seconds from now, unless all is healed before."""
        self.agenda.plan(self.agenda.at + seconds, self._strike, self.era, action, arguments)

    def recur(self, per_hour: Callable[[], float], action: Callable[[], None]) -> None:
        """`action` now and then, as often as the weather says."""
        self._recurring.append(Recurring(self, per_hour, action))

    def change(self, weather: Weather) -> None:
        self.weather = weather
        for one in self._recurring:
            one.plan()

    def _strike(self, era: int, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if era == self.era:
            action(*arguments)


class Recurring:
    """Something that comes again and again; the weather of the day decides how often."""

    def __init__(self, sky: Sky, per_hour: Callable[[], float], action: Callable[[], None]) -> None:
        self._sky, self._per_hour, self._action = sky, per_hour, action
        self._planned = False
        self.plan()

    def plan(self) -> None:
        if self._planned or self._per_hour() <= 0:
            return
        self._planned = True
        wait_seconds = self._sky.fates.wait_seconds(self._per_hour())
        self._sky.agenda.plan(self._sky.at + wait_seconds, self._come)

    def _come(self) -> None:
        self._planned = False
        if self._per_hour() > 0:
            self._action()
            self.plan()


class Spells:
    """What lasts: outages, expired credentials, a clock that is off. Begins by chance or by a script.

    `caller_unix` is the clock with which calls are signed; None: it is right.
    """

    def __init__(self, sky: Sky, caller_unix: Callable[[], float] | None) -> None:
        self._sky, self._caller_unix = sky, caller_unix
        self._until: dict[Fault, float] = {}
        for kind in SPELLS:
            sky.recur(partial(self._per_hour, kind), partial(self._begin_by_chance, kind))

    def stands(self, kind: Fault) -> bool:
        if kind is Fault.CLOCK_SKEWED and self._caller_unix is not None:
            off_seconds = abs(self._caller_unix() - self._sky.unix(self._sky.agenda.now()))
            if off_seconds > SKEW_SECONDS_MAX:
                return True
        return kind in self._until and self._sky.at < self._until[kind]

    def begin(self, kind: Fault, seconds: float) -> None:
        self._until[kind] = max(self._until.get(kind, -math.inf), self._sky.at + seconds)
        self._sky.tell(f"begins: {kind}", f"for {seconds:.0f} s")

    def heal(self) -> None:
        self._until.clear()

    def _begin_by_chance(self, kind: Fault) -> None:
        self.begin(kind, self._sky.fates.within(self._knobs(kind)[1]))

    def _per_hour(self, kind: Fault) -> float:
        return self._knobs(kind)[0]

    def _knobs(self, kind: Fault) -> tuple[float, Range]:
        weather = self._sky.weather
        match kind:
            case Fault.OUTAGE:
                return weather.outages_per_hour, weather.outage_seconds
            case Fault.LAUNCH_OUTAGE:
                return weather.launch_outages_per_hour, weather.launch_outage_seconds
            case Fault.CREDENTIALS_EXPIRED:
                return weather.credentials_expire_per_hour, weather.credentials_expired_seconds
            case _:
                return weather.clock_skews_per_hour, weather.clock_skewed_seconds
