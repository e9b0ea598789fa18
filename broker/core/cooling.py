"""What could not be bought of late, and for how long nobody shall ask again.

Three kinds of memory, shared by all pools that buy at one place in a cloud. A *refused* offering cools down,
longer with each refusal in a row, until one is bought. A *quota* refusal speaks of the account: it pauses a
market in a region for all machine types that draw on the quota and are no smaller. A *reclaim* says that a
place is getting scarce: one alone moves it to the end of the order, several within an hour cool it down.

A permanent refusal (a wrong image, a missing permission) is a person's to mend, and one pool's own: it pauses
the offering for that pool only, longer each time as well, and not beyond a reload. Nothing in here is worth a
disk: after a restart it costs one call to learn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple, TypeVar

from broker.core.backoff import doubled
from broker.core.errors import CloudError, OfferingRefused, PermanentRefusal, QuotaReached
from broker.core.model import Market, Offering

COOL_DOWN_SECONDS = 180.0  # after the first refusal (Karpenter's cache of unavailable offerings: 3 minutes)
COOL_DOWN_SECONDS_MAX = 1800.0  # doubled up to here: stock comes back within hours, and asking costs one call
MENDING_SECONDS = 60.0  # a permanent refusal, doubled likewise: until then clients hear it without a new call
MENDING_SECONDS_MAX = 300.0  # no longer: it may be mended in the cloud, and nobody tells us
STREAK_SECONDS_MAX = 3600.0  # a refusal so long after a cool-down is not "in a row" any more
HOPE_SECONDS = 1800.0  # after so long without a refusal, stock may well have come back
RECLAIM_SECONDS = 3600.0  # for so long a reclaim counts
RECLAIMS_MAX = 6  # remembered for each place: more would not make it cool for longer

# Machine types by the first letters of their name share a vCPU quota, for spot and on-demand each; all other
# families are "standard" (AWS: EC2 user guide, "On-Demand Instance quotas", "Spot Instance quotas").
QUOTA_FAMILIES = {
    "dl": "dl",
    "f": "f",
    "g": "g and vt",
    "gr": "g and vt",
    "hpc": "hpc",
    "inf": "inf",
    "mac": "mac",
    "p": "p",
    "trn": "trn",
    "u": "u",
    "vt": "g and vt",
    "x": "x",
}
STANDARD = "standard"

Key = TypeVar("Key")


class CoolDown(NamedTuple):
    """An offering that is not to be asked for now: why, and for how many seconds more."""

    offering: Offering
    error: CloudError
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is sold: an offering without what it costs. An empty zone stands for all of them."""

    region: str
    zone: str
    instance_type: str
    market: Market


@dataclass(frozen=True, slots=True)
class QuotaScope:
    """The machines that a vCPU quota counts together."""

    region: str
    market: Market
    family: str


@dataclass(frozen=True, slots=True)
class Pause:
    """One cool-down: the last refusal and its moment, which it was in a row, and until when it stands; of a
    quota, the cores of the smallest machine that was refused for it."""

    error: CloudError
    times: int
    until_at: float
    refused_at: float
    cores: int | None = None


@dataclass(slots=True)
class Cooling:
    """See the module. All moments are monotonic seconds."""

    _refused: dict[Place, Pause] = field(default_factory=dict)
    _quotas: dict[QuotaScope, Pause] = field(default_factory=dict)
    _mending: dict[tuple[str, Place], Pause] = field(default_factory=dict)
    _reclaims: dict[Place, deque[float]] = field(default_factory=dict)
    _bought_at: dict[Place, float] = field(default_factory=dict)

    # --- what has happened ---------------------------------------------------------------------------

    def refused(
        self, offering: Offering, error: OfferingRefused | PermanentRefusal, now: float, *, pool: str = ""
    ) -> None:
        """The cloud has not sold this offering (to this pool).

        Where one answer brings machines and refusals of one offering, tell `bought` first: it sells no more.
        """
        self._forget(now)
        place, scope = _place(offering), _quota_scope(offering)
        match error:
            case PermanentRefusal():
                pause = self._mending.get((pool, place))
                self._mending[pool, place] = _once_more(pause, error, now, _mending_seconds)
            case QuotaReached():
                pause = self._quotas.get(scope)
                cores = [n for n in (offering.cores, pause and pause.cores) if n]
                self._quotas[scope] = replace(_once_more(pause, error, now), cores=min(cores, default=None))
            case _:
                self._refused[place] = _once_more(self._refused.get(place), error, now)

    def reclaimed(self, offering: Offering, now: float) -> None:
        """The cloud has taken a running spot machine of this offering back; others it leaves alone."""
        self._forget(now)
        if offering.market is Market.SPOT:
            self._reclaims.setdefault(_place(offering), deque(maxlen=RECLAIMS_MAX)).append(now)

    def bought(self, offering: Offering, now: float, *, pool: str = "") -> None:
        """It can be had (by this pool): its refusals, and those of its quota for what is no larger, are over.
        A reclaim is as true as before, and so is what a person must mend for another pool."""
        self._forget(now)
        place = _place(offering)
        self._bought_at[place] = now
        self._refused.pop(place, None)
        self._refused.pop(_anywhere(place), None)  # "in no zone" has proved wrong
        for one in (place, _anywhere(place)):
            self._mending.pop((pool, one), None)
        scope = _quota_scope(offering)
        if _counts(self._quotas.get(scope), offering):
            del self._quotas[scope]

    def mended(self, pool: str) -> None:
        """The operator has read the settings in again: what a person was to mend is asked for again."""
        self._mending = {key: pause for key, pause in self._mending.items() if key[0] != pool}

    # --- what follows --------------------------------------------------------------------------------

    def usable(
        self, offerings: Iterable[Offering], now: float, *, pool: str = ""
    ) -> tuple[tuple[Offering, ...], tuple[CoolDown, ...]]:
        """Which of a pool's offerings to ask for now, in its order, reclaimed ones last; and the others."""
        steady: list[Offering] = []
        shaky: list[Offering] = []
        cooling: list[CoolDown] = []
        for offering in offerings:
            pause = self._pause(offering, now, pool)
            if pause is not None:
                cooling.append(CoolDown(offering, pause.error, pause.until_at - now))
            elif self._reclaimed_of_late(offering, now):
                shaky.append(offering)
            else:
                steady.append(offering)
        return (*steady, *shaky), tuple(cooling)

    def refusal(self, offerings: Iterable[Offering], now: float, *, pool: str) -> CloudError | None:
        """Why none of a pool's offerings can be had, as far as is known, or None. What a person must mend is
        told until something is bought or the settings are read in again."""
        error: CloudError | None = None
        for offering in offerings:
            pause = self._mending.get((pool, _place(offering))) or self._pause(offering, now, pool)
            if pause is None:
                return None
            error = error or pause.error
        return error

    def is_back(
        self, offering: Offering, since_at: float, now: float, *, refused: bool = True, known_at: float = -inf
    ) -> bool:
        """Whether an offering can be had again, as far as is known: it was bought since then, or, when it was
        `refused` then, has not been for HOPE_SECONDS. What was before `known_at` nobody knows. To be asked of
        usable offerings."""
        place = _place(offering)
        bought = [at for other, at in self._bought_at.items() if place in (other, _anywhere(other))]
        if any(at >= since_at for at in bought):
            return True
        if not refused:
            return False
        pauses = (
            self._quota_pause(offering),
            self._refused.get(place),
            self._refused.get(_anywhere(place)),
        )
        refused_at = [pause.refused_at for pause in pauses if pause is not None]
        return now - max([known_at, *refused_at]) >= HOPE_SECONDS

    def _pause(self, offering: Offering, now: float, pool: str) -> Pause | None:
        """Of all that stands against the offering what lasts longest."""
        place = _place(offering)
        pauses = (
            self._mending.get((pool, place)),
            self._quota_pause(offering),
            self._refused.get(place),
            self._refused.get(_anywhere(place)),
            self._reclaim_pause(place, now),
        )
        standing = [pause for pause in pauses if pause is not None and now < pause.until_at]
        return max(standing, key=lambda pause: pause.until_at, default=None)

    def _quota_pause(self, offering: Offering) -> Pause | None:
        """A smaller machine may fit into what is left of the quota."""
        pause = self._quotas.get(_quota_scope(offering))
        return pause if _counts(pause, offering) else None

    def _reclaim_pause(self, place: Place, now: float) -> Pause | None:
        """One reclaim is an accident, two within an hour cool the place down, more do so for longer."""
        moments = self._recent_reclaims(place, now)
        if len(moments) < 2:
            return None
        error = OfferingRefused(
            f"{len(moments)} spot machines of type {place.instance_type} were taken back within an hour"
            + (f" in {place.zone}" if place.zone else "")
            + "; another type or zone may last longer"
        )
        until_at = moments[-1] + _cool_down_seconds(len(moments) - 1)
        return Pause(error, len(moments), until_at, moments[-1])

    def _reclaimed_of_late(self, offering: Offering, now: float) -> bool:
        """Where the cloud may choose the zone, a reclaim in any of them counts."""
        place = _place(offering)
        if place.zone:
            return bool(self._recent_reclaims(place, now))
        return any(_anywhere(one) == place and self._recent_reclaims(one, now) for one in self._reclaims)

    def _recent_reclaims(self, place: Place, now: float) -> list[float]:
        return [at for at in self._reclaims.get(place, ()) if now - at < RECLAIM_SECONDS]

    def _forget(self, now: float) -> None:
        """What cannot matter any more is not kept: a life of years takes no more memory than a day."""
        self._refused = _fresh(self._refused, now)
        self._quotas = _fresh(self._quotas, now)
        self._mending = _fresh(self._mending, now)
        self._bought_at = {
            place: at for place, at in self._bought_at.items() if now - at < STREAK_SECONDS_MAX
        }
        self._reclaims = {
            place: moments for place, moments in self._reclaims.items() if now - moments[-1] < RECLAIM_SECONDS
        }


def quota_family(instance_type: str) -> str:
    """Which vCPU quota a machine type draws on: "standard", "p", "g and vt", …"""
    family = instance_type.partition(".")[0]
    letters = family[: next((n for n, char in enumerate(family) if not char.isalpha()), len(family))]
    return QUOTA_FAMILIES.get(letters, STANDARD)


def _place(offering: Offering) -> Place:
    return Place(offering.region, offering.zone, offering.instance_type, offering.market)


def _anywhere(place: Place) -> Place:
    return replace(place, zone="")


def _quota_scope(offering: Offering) -> QuotaScope:
    return QuotaScope(offering.region, offering.market, quota_family(offering.instance_type))


def _counts(pause: Pause | None, offering: Offering) -> bool:
    """Whether what the quota refused speaks of this offering."""
    if pause is None:
        return False
    return pause.cores is None or offering.cores is None or offering.cores >= pause.cores


def _once_more(
    pause: Pause | None, error: CloudError, now: float, seconds: Callable[[int], float] | None = None
) -> Pause:
    """A refusal during a cool-down answers a call of before it: the same shortage, not one more."""
    if pause is not None and now < pause.until_at:
        return replace(pause, error=error, refused_at=now)
    times = 1 if pause is None or now - pause.until_at >= STREAK_SECONDS_MAX else pause.times + 1
    return Pause(error, times, now + (seconds or _cool_down_seconds)(times), now)


def _cool_down_seconds(times: int) -> float:
    return doubled(COOL_DOWN_SECONDS, times, COOL_DOWN_SECONDS_MAX)


def _mending_seconds(times: int) -> float:
    return doubled(MENDING_SECONDS, times, MENDING_SECONDS_MAX)


def _fresh(pauses: dict[Key, Pause], now: float) -> dict[Key, Pause]:
    return {key: pause for key, pause in pauses.items() if now - pause.until_at < STREAK_SECONDS_MAX}
