"""Which providers serve which pool, and what is known of each provider's health.

While a cloud does not answer nothing is inferred from its silence and nothing new is bought from it: the
books are frozen, warm workers are still handed out, and whoever would need a launch hears why at once.

While another broker with our id is in charge of a cloud (core/claim.py), this one is read-only there. That is
a matter of each cloud: two brokers with one id that buy in different regions do not meet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from broker.core.claim import ACT_SECONDS_MAX, Claim
from broker.core.cooling import Cooling
from broker.core.errors import BrokerError, CloudError, CredentialsRefused, ReadOnly, SettingsError
from broker.core.quotes import Quotes
from broker.providers.base import Provider

SCAN_FAILURES_MAX = 3  # so many failed scans in a row and the cloud counts as unreachable


@dataclass(slots=True)
class Cloud:
    """One provider and its scans."""

    provider: Provider
    opened: bool = False
    instance_ids: frozenset[str] = frozenset()  # what the last complete listing showed
    scanned_at: float | None = None  # when the last complete listing was asked for
    scanned_unix: float = 0.0
    failures: int = 0  # scans failed in a row
    error: BrokerError | None = None
    mistake: SettingsError | None = None  # nothing can be bought here until a person has mended the settings
    study_again: bool = (
        False  # new settings could not be checked with the cloud yet: the next scan opens anew
    )
    was_there: bool = True  # at the start: an earlier run may have left machines. False: a reload brought it
    added_at: float = 0.0  # when that reload was, on the monotonic clock
    rival: Claim | None = None  # another broker's claim, by which it is in charge here and we are not
    cooling: Cooling = field(default_factory=Cooling)  # what could not be bought here of late
    quotes: Quotes = field(default_factory=Quotes)  # what spot costs here
    claims: dict[str, Claim | None] = field(default_factory=dict)  # by living machine, as last listed

    @property
    def recovered(self) -> bool:
        """Whether a complete listing has come in since the start: before that, nothing may be launched."""
        return self.scanned_at is not None

    @property
    def awaited(self) -> bool:
        """Whether an earlier run may have left machines here that the first listing is about to show. Those
        who can do without wait for SCAN_FAILURES_MAX scans, and not for ever."""
        return not self.recovered and self.was_there and self.failures < SCAN_FAILURES_MAX

    def acts(self, now: float) -> bool:
        """Whether machines may be launched and terminated: we are in charge, and looked at it of late.

        A broker that was frozen or cut off looks first: another may have taken over meanwhile.
        """
        scanned_at = self.scanned_at
        return self.rival is None and scanned_at is not None and now - scanned_at <= ACT_SECONDS_MAX

    def read_only(self) -> ReadOnly | None:
        """What clients hear while another broker is in charge here, or None."""
        if self.rival is None:
            return None
        return ReadOnly(
            f"another broker with this id ({self.rival.owner}, claim {self.rival.number}) is in charge of "
            f"{self.provider.name}, and this one is read-only: ask that one; or stop it for good, and within "
            "a quarter of an hour this one takes over"
        )

    def scan_succeeded(self, started_at: float, wall_unix: float) -> None:
        self.scanned_at, self.scanned_unix = started_at, wall_unix
        self.failures, self.error = 0, None

    def scan_failed(self, error: BrokerError) -> None:
        self.failures += 1
        self.error = error

    def refusal(self, pool: str | None = None) -> CloudError | None:
        """Why nothing can be launched there at the moment (for that pool), or None."""
        if self.mistake is not None and (not self.mistake.pools or pool in self.mistake.pools):
            return CloudError(f"the broker's settings do not work: {self.mistake.message}")
        if self.error is None:
            return None
        if (
            self.recovered
            and self.failures < SCAN_FAILURES_MAX
            and not isinstance(self.error, CredentialsRefused)
        ):
            return None
        return CloudError(f"{self.provider.name} cannot be used at the moment: {self.error.message}")


class Clouds:
    """The providers, by pool and one by one: first those that serve pools, then those that did."""

    def __init__(self, by_pool: Mapping[str, Sequence[Provider]]) -> None:
        self._by_pool: dict[str, tuple[Cloud, ...]] = {}
        self.all: tuple[Cloud, ...] = ()
        self._dropped: list[Cloud] = []  # kept, because who knew a cloud knows it by its identity
        for cloud in self.assign(by_pool):
            cloud.was_there = True

    def assign(self, by_pool: Mapping[str, Sequence[Provider]], now: float = 0.0) -> list[Cloud]:
        """Which providers serve which pool from now on. Returns the clouds that are new.

        A cloud that serves none any more stays, until `drop`.
        """
        known = {id(cloud.provider): cloud for cloud in self.all}
        new = {
            id(one): Cloud(one, was_there=False, added_at=now)
            for some in by_pool.values()
            for one in some
            if id(one) not in known
        }
        clouds = known | new
        self._by_pool = {pool: tuple(clouds[id(one)] for one in some) for pool, some in by_pool.items()}
        serving = {id(cloud): cloud for some in self._by_pool.values() for cloud in some}
        self.all = tuple((serving | {id(cloud): cloud for cloud in clouds.values()}).values())
        return list(new.values())

    def join(self, provider: Provider) -> None:
        """A place that serves no pool any more, where an earlier run may have left machines."""
        if all(cloud.provider is not provider for cloud in self.all):
            self.all = (*self.all, Cloud(provider))

    def idle(self) -> list[Cloud]:
        """Those that serve no pool any more."""
        serving = {id(cloud) for some in self._by_pool.values() for cloud in some}
        return [cloud for cloud in self.all if id(cloud) not in serving]

    def drop(self, cloud: Cloud) -> None:
        """Nothing of ours is there any more."""
        self.all = tuple(one for one in self.all if one is not cloud)
        self._dropped.append(cloud)

    def of(self, pool: str) -> tuple[Cloud, ...]:
        """The clouds of a configured pool, as its regions are listed; none for a pool that only tags
        remember."""
        return self._by_pool.get(pool, ())

    def having(self, pool: str, region: str) -> Cloud | None:
        """Where a machine of the pool is that was ordered in that region, also when the pool has left it."""
        clouds = self.of(pool)
        in_it = [cloud for cloud in (*clouds, *self.all) if cloud.provider.place[1] == region]
        unnamed = [cloud for cloud in clouds if cloud.provider.place[1] is None]  # the AWS settings say
        return next(iter((*unnamed, *in_it, *clouds)), None)

    def serving(self) -> bool:
        """Whether every pool can be served: in one of its regions, where the others have been waited for."""
        served = all(is_known(some) for some in self._by_pool.values())
        return self.recovered() or (served and not any(cloud in self.awaited() for cloud in self.idle()))

    def recovered(self) -> bool:
        return all(cloud.recovered for cloud in self.all) or not self.awaited()

    def awaited(self) -> list[Cloud]:
        """Those that have to be scanned before the broker can be sure of what it says.

        One that serves no pool and cannot be reached (its profile was deleted, say) must not keep the others
        from serving for ever.
        """
        idle = {id(cloud) for cloud in self.idle()}
        return [
            cloud
            for cloud in self.all
            if not cloud.recovered and not (id(cloud) in idle and cloud.failures >= SCAN_FAILURES_MAX)
        ]

    def read_only(self) -> list[ReadOnly]:
        """One for each cloud of which another broker is in charge."""
        return [error for cloud in self.all if (error := cloud.read_only()) is not None]


def is_known(clouds: Collection[Cloud]) -> bool:
    """Whether it is known well enough which machines a pool has in its clouds: one has been listed, and the
    others either, or in vain for long enough."""
    return not clouds or (
        any(cloud.recovered for cloud in clouds) and not any(cloud.awaited for cloud in clouds)
    )
