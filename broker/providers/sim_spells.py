"""What lasts: outages, expired credentials, a clock that is off. Begins by chance or by a script.

Besides, the caller's own clock may be shown to the cloud: more than five minutes off, and nothing that it
signs is accepted (AWS: EC2 API reference, "Error codes": AuthFailure, RequestExpired).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from broker.providers.sim_sky import Sky
from broker.providers.sim_weather import Fault, Range

SKEW_SECONDS_MAX = 300.0
KINDS = (Fault.OUTAGE, Fault.LAUNCH_OUTAGE, Fault.CREDENTIALS_EXPIRED, Fault.CLOCK_SKEWED)


class Spells:
    """See the module. `caller_unix` is the clock with which calls are signed; None: it is right."""

    def __init__(self, sky: Sky, caller_unix: Callable[[], float] | None) -> None:
        self._sky, self._caller_unix = sky, caller_unix
        self._until: dict[Fault, float] = dict.fromkeys(KINDS, -math.inf)
        for kind in KINDS:
            sky.recur(partial(self._per_hour, kind), partial(self._begin_by_chance, kind))

    def stands(self, kind: Fault) -> bool:
        if kind is Fault.CLOCK_SKEWED and self._caller_unix is not None:
            off_seconds = abs(self._caller_unix() - self._sky.unix(self._sky.agenda.now()))
            if off_seconds > SKEW_SECONDS_MAX:
                return True
        return self._sky.at < self._until[kind]

    def begin(self, kind: Fault, seconds: float) -> None:
        self._until[kind] = max(self._until[kind], self._sky.at + seconds)
        self._sky.tell(f"begins: {kind}", f"for {seconds:.0f} s")

    def end(self, kind: Fault) -> None:
        self._until[kind] = -math.inf

    def heal(self) -> None:
        for kind in KINDS:
            self.end(kind)

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
