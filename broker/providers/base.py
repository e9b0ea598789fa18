"""The port to a cloud: its calls, the time there, and what each may raise.

Providers hide their cloud completely: they take and return the values of core.model and raise only the
CloudError family (a few raise SettingsError from `open`, when the pool cannot work as configured). They do
not retry launches: whether a failed launch may have happened is the caller's most important question, and
`CloudError.sent` answers it.

| call        | idempotent                      | raises beyond Unreachable, Throttled, CredentialsRefused  |
| ----------- | ------------------------------- | --------------------------------------------------------- |
| open        | yes                             | SettingsError                                             |
| study       | yes, changes nothing            | nothing: what could not be found out is in its answer     |
| offerings   | yes, no cloud involved          | nothing                                                   |
| prepare     | yes, no cloud involved          | nothing                                                   |
| launch      | yes, by `order.id`, when resent | OfferingRefused, QuotaReached, PermanentRefusal,          |
|             | with the same parameters        | OrderMismatch, OrderSpent                                 |
| listing     | yes                             | PermanentRefusal. Returns a *complete* listing or raises  |
| describe    | yes                             | PermanentRefusal. Leaves unknown ids out: no proof        |
| terminate   | yes, unknown ids are fine       | PermanentRefusal                                          |
| stop        | yes, but a late one stops what  | PermanentRefusal, InstanceNotFound                        |
|             | was started meanwhile           |                                                           |
| start       | yes                             | OfferingRefused, QuotaReached, PermanentRefusal,          |
|             |                                 | InstanceNotFound                                          |
| tag         | yes                             | PermanentRefusal, InstanceNotFound                        |
| tag_all     | yes, unknown ids are fine       | PermanentRefusal                                          |
| spot_prices | yes                             | PermanentRefusal                                          |
| clock, trip | yes, no cloud involved          | nothing                                                   |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from broker.core.cloudtime import Span
from broker.core.errors import (
    CloudError,
    CloudUnreachable,
    CredentialsRefused,
    InstanceNotFound,
    OfferingRefused,
    OrderMismatch,
    OrderSpent,
    PermanentRefusal,
    QuotaReached,
    SettingsError,
    Throttled,
)
from broker.core.model import Bought, Instance, Offering, Order
from broker.core.settings import PoolSettings

# What `on_call` hears of a failed call; with "ok" and "cancelled" the closed list, safe as a metric label.
OUTCOMES: Mapping[type[CloudError], str] = {
    OfferingRefused: "refused",
    QuotaReached: "refused",
    Throttled: "throttled",
    PermanentRefusal: "denied",
    CredentialsRefused: "credentials",
    CloudUnreachable: "unreachable",
    OrderMismatch: "conflict",
    OrderSpent: "conflict",
    InstanceNotFound: "not-found",
}


Place = tuple[str, str | None, str | None]  # provider, region, profile, as the settings say them


@dataclass(frozen=True, slots=True)
class Change:
    """What a provider has found out about new settings of its pools. Nothing has changed until `apply`.

    `problems` are the settings that a person has to mend, by pool; `later` has the pools about which the
    cloud could not be asked, and why. From neither can anything be bought until an `open` has succeeded.
    """

    apply: Callable[[], None]
    problems: Mapping[str, Sequence[str]] = field(default_factory=dict)
    later: Mapping[str, CloudError] = field(default_factory=dict)

    def mistake(self) -> SettingsError | None:
        """The problems as one error that knows its pools, or None."""
        found = [problem for some in self.problems.values() for problem in some]
        return SettingsError(found, [name for name, some in self.problems.items() if some]) if found else None


class Provider(Protocol):
    """The way to one place in a cloud (a region under one account), for every pool that buys there.

    One place, one provider: a listing then holds every machine of ours there, also those of pools that the
    configuration has forgotten.
    """

    name: str  # where, for logs: "ec2 us-east-1"
    offerings_max: int  # in one order
    machines_max: int  # in one order
    place: Place  # what tells it from the others: pools that say the same share one provider
    contested: bool  # brokers on several hosts can reach the same machines: each machine carries a claim
    cores: dict[str, int]  # of machine types, as far as known: worth keeping over a restart

    async def open(self) -> None:
        """Check what can be checked without spending anything; before every other call, until it succeeds.

        After a SettingsError about what is to be *bought*, machines can still be listed and terminated: a
        mistake in the settings must not keep a restarted broker from ending what it has running.
        """

    async def study(self, pools: Mapping[str, PoolSettings]) -> Change:
        """Find out what `open` would find out if these were its pools. What is on order or runs keeps what it
        was launched with."""

    def recall_cores(self, cores: Mapping[str, int]) -> None:
        """Cores of machine types that an earlier run has learnt, until the cloud tells them again."""

    async def close(self) -> None:
        """Let go of connections. Machines live on."""

    def offerings(self, pool: str) -> Sequence[Offering]:
        """What the pool can buy, in order of preference; `cores` as far as the cloud has told."""

    def prepare(
        self,
        pool: str,
        order_id: str,
        offerings: Sequence[Offering],
        created_unix: float,
        epoch: str = "",
        count: int = 1,
    ) -> Order:
        """The order with the exact parameters of its launch call, ready to be written to disk.

        `count` machines, each of any of these offerings: `machines_max` and `offerings_max` at most. `epoch`
        is the claim that a machine of a contested cloud carries from the launch call on.
        """

    async def launch(self, order: Order) -> Bought:
        """Machines for this order, as many as can be had. Sent again with the same order it returns the same
        machines; an order for one raises OrderSpent from the moment at which that machine begins to end, one
        for several may do so when any of them has: of the others that says nothing."""

    async def listing(self) -> list[Instance]:
        """Every machine here that carries this broker's tag, terminated ones as long as the cloud shows them,
        and the untagged ones that a pool's `adopt_name_tag` asks for."""

    async def describe(self, instance_ids: Iterable[str]) -> list[Instance]:
        """The named machines, as far as the cloud knows them at the moment."""

    async def terminate(self, instance_ids: Iterable[str]) -> None:
        """Ask the cloud to end these machines. Returning means asked, not done."""

    async def stop(self, instance_id: str) -> None:
        """Ask the cloud to stop a machine, once: an attempt without an answer may still arrive minutes later.
        Returning means asked, not done."""

    async def start(self, instance_id: str) -> None:
        """Ask the cloud to start a machine that is stopped. It comes up with another public address."""

    async def tag(self, instance_id: str, tags: Mapping[str, str]) -> None:
        """Write tags onto one machine."""

    async def tag_all(self, instance_ids: Iterable[str], tags: Mapping[str, str]) -> None:
        """Write the same tags onto many machines. An unknown one keeps no other from its own."""

    async def spot_prices(self, pool: str) -> Mapping[tuple[str, str], int]:
        """What spot machines of the pool's types cost now: (zone, instance type) → micro-dollars an hour.

        What is missing is not known. Empty where nothing is sold on spot.
        """

    def round_trip_seconds(self) -> float | None:
        """How long the way there and back takes, by the calls that have been made; None: not known."""

    def clock_unix(self, at: float) -> Span:
        """What the cloud's own clock shows at a monotonic moment, as far as its answers have told: bills
        go by it. Until the first answer, and where the cloud is this machine, this machine's wall clock."""
