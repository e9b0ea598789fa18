"""What can go wrong in the simulated EC2, how often and for how long: one frozen object with a knob for each.

`float` fields are probabilities (fields ending in `_per_hour` are rates), pairs are ranges of seconds from
which a moment is drawn. `Weather()` is CLEAR: a cloud at its ordinary pace that keeps every promise. STORM
has every fault. `swarm` switches half of them off by seed: histories in which only few faults happen reach
corners that a cloud in which everything breaks at once never lets anybody reach.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from math import inf
from typing import Any

Range = tuple[float, float]  # seconds, from and to


class Fault(StrEnum):
    """The closed list of what SimEC2 counts as injected; a refusal is counted as `refused <code>` as well."""

    # On the way: what becomes of one call.
    REQUEST_LOST = "request lost"  # never arrives
    REQUEST_LATE = "request late"  # arrives, often after the caller has given up
    ANSWER_LOST = "answer lost"  # carried out, and the caller does not learn it
    ANSWER_LATE = "answer late"
    SERVER_ERROR = "server error"  # 500 or 503; now and then carried out all the same
    THROTTLED = "throttled"  # although the bucket holds tokens
    BUCKET_EMPTY = "bucket empty"
    REFUSED = "refused"
    # For a while: spells.
    OUTAGE = "outage"  # a call that met it
    LAUNCH_OUTAGE = "launch outage"  # "no capacity" and "request limit exceeded" for hours
    CREDENTIALS_EXPIRED = "credentials expired"
    CLOCK_SKEWED = "clock skewed"
    # What Describe shows.
    HIDDEN = "hidden after launch"
    FLICKER = "flickers after launch"
    NOT_FOUND = "not found after launch"  # by Terminate or CreateTags
    STALE = "stale listing"
    LISTING_SHORT = "listing misses a machine"
    PAGE_FAILED = "page failed"
    DEAD_TOKEN = "token of a terminated machine"  # noqa: S105
    # What becomes of a machine.
    BOUGHT_ON_DEMAND = "spot became on-demand"
    BOOT_FAILED = "boot failed"
    STUCK_PENDING = "stuck pending"
    STUCK_STOPPING = "stuck stopping"
    STUCK_SHUTTING_DOWN = "stuck shutting-down"
    TERMINATE_IGNORED = "terminate ignored"
    ADDRESS_LATE = "address late"
    ADDRESS_NEVER = "no address"
    ADDRESS_REUSED = "address reused"
    ADDRESS_REUSED_BY_STRANGER = "address reused by a stranger"
    PORT_LATE = "port late"
    PORT_NEVER = "port never opens"
    PORT_DIED = "port died"
    PORT_PAUSED = "port paused"
    CONNECTION_LOST = "connection lost"
    SHUT_ITSELF_DOWN = "shut itself down"
    STRANGER = "stranger"
    # Spot.
    RECLAIMED = "reclaimed"
    RECLAIMED_UNANNOUNCED = "reclaimed without notice"
    REBALANCE = "rebalance recommended"
    REBALANCE_ONLY = "rebalance without reclaim"
    NOTICE_LOST = "notice lost"
    NOTICE_DUPLICATED = "notice duplicated"
    NOTICE_LATE = "notice late"
    # CreateFleet.
    FLEET_PARTIAL = "fleet partial"
    FLEET_SURPLUS = "fleet surplus"


def _check(knobs: Road | Weather) -> None:
    for name, value in _knobs(knobs):
        if isinstance(value, tuple) and name.endswith("_seconds"):
            assert 0 <= value[0] <= value[1], f"{name} is no range of seconds: {value}"
        elif isinstance(value, float) and not name.endswith(("_per_hour", "_seconds", "_max")):
            assert 0 <= value <= 1, f"{name} is no probability: {value}"


def _knobs(knobs: Road | Weather) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(knobs, field.name)) for field in fields(knobs))


@dataclass(frozen=True, slots=True)
class Road:
    """How calls of one sort travel; at most one of the mishaps befalls a call."""

    answer_seconds: Range = (0.05, 0.25)
    request_lost: float = 0.0
    request_late: float = 0.0
    request_late_seconds: Range = (5.0, 240.0)  # a signature is good for five minutes
    answer_lost: float = 0.0
    answer_late: float = 0.0
    answer_late_seconds: Range = (5.0, 90.0)
    server_error: float = 0.0
    throttled: float = 0.0

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Weather:
    """See the module. Durations without a probability beside them are the cloud's ordinary pace."""

    launches: Road = Road(answer_seconds=(0.5, 2.5))  # RunInstances, CreateFleet
    changes: Road = Road()  # TerminateInstances, CreateTags
    reads: Road = Road()

    outages_per_hour: float = 0.0
    outage_seconds: Range = (300.0, 28_800.0)
    launch_outages_per_hour: float = 0.0
    launch_outage_seconds: Range = (600.0, 28_800.0)
    credentials_expire_per_hour: float = 0.0
    credentials_expired_seconds: Range = (60.0, 3600.0)
    clock_skews_per_hour: float = 0.0
    clock_skewed_seconds: Range = (60.0, 3600.0)

    hidden: float = 0.0  # of the machines launched
    hidden_seconds: Range = (1.0, 100.0)
    hidden_from_writes: float = 0.0  # of the hidden ones: Terminate and CreateTags do not find them either
    flicker: float = 0.0  # of the looks at a machine that has only just become visible
    flicker_seconds: Range = (10.0, 60.0)
    stale: float = 0.0  # of the listings
    stale_seconds: Range = (1.0, 60.0)
    listing_short: float = 0.0  # of the listings
    page_failed: float = 0.0  # of the pages after the first
    page_items_max: int = 1000  # EC2 may stop a page earlier than it was asked to
    dead_token_returned: float = 0.0  # a dead machine instead of IdempotentInstanceTerminated

    refusals: tuple[tuple[str, float], ...] = ()  # (code, probability a launch), see sim_market.REFUSALS
    refusal_seconds: Range = (30.0, 600.0)
    stockout: float = 0.0  # of the launches, in each zone that is tried
    stockout_everywhere: float = 0.0
    stockout_seconds: Range = (180.0, 7200.0)
    unsupported: float = 0.0  # of the offerings, for good
    spot_price_step_max: float = 0.0  # of itself, what a spot price moves in ten minutes; 0: it stands still
    spot_share_max: float = 0.6  # of the on-demand price: where a price that moves turns back
    spot_vcpus_max: float = inf
    on_demand_vcpus_max: float = inf
    bought_on_demand: float = 0.0
    fleet_partial: float = 0.0
    fleet_surplus: float = 0.0

    pending_seconds: Range = (5.0, 20.0)
    boot_failed: float = 0.0
    stuck_pending: float = 0.0
    stuck_pending_seconds: Range = (900.0, 14_400.0)
    address_seconds: Range = (1.0, 3.0)  # from the launch until Describe shows it
    address_late: float = 0.0
    address_late_seconds: Range = (30.0, 300.0)
    address_never: float = 0.0
    address_reused: float = 0.0
    address_rest_seconds: float = 0.0  # between two owners, at least
    port_seconds: Range = (10.0, 40.0)  # from `running` until the worker port accepts
    port_again_seconds: Range = (5.0, 20.0)  # the same for a machine that was stopped: its first boot is over
    port_late: float = 0.0
    port_late_seconds: Range = (60.0, 900.0)
    port_never: float = 0.0
    port_dies: float = 0.0
    port_dies_after_seconds: Range = (60.0, 14_400.0)
    port_pauses: float = 0.0
    port_pauses_after_seconds: Range = (60.0, 14_400.0)
    port_pause_seconds: Range = (5.0, 600.0)
    connect_seconds: Range = (0.001, 0.01)
    connection_lost: float = 0.0
    shutdowns_per_hour: float = 0.0  # of each running machine, from within
    stopping_seconds: Range = (5.0, 30.0)
    stuck_stopping: float = 0.0
    stuck_stopping_seconds: Range = (300.0, 3600.0)
    shutting_down_seconds: Range = (5.0, 40.0)
    stuck_shutting_down: float = 0.0
    stuck_shutting_down_seconds: Range = (900.0, 14_400.0)
    terminate_ignored: float = 0.0
    terminated_shown_seconds: Range = (3600.0, 3600.0)

    reclaims_per_hour: float = 0.0  # of each running spot machine
    reclaim_unannounced: float = 0.0
    reclaim_rebalance: float = 0.0  # a rebalance recommendation first
    rebalance_ahead_seconds: Range = (0.0, 900.0)
    reclaim_called_off: float = 0.0  # of those: nothing follows
    notice_seconds: Range = (0.5, 3.0)
    notice_lost: float = 0.0
    notice_duplicated: float = 0.0
    notice_late: float = 0.0
    notice_late_seconds: Range = (5.0, 180.0)

    strangers_per_hour: float = 0.0  # machines of other people in the same account
    stranger_seconds: Range = (60.0, 14_400.0)
    stranger_answers: float = 0.0  # of these: something listens on our worker port

    def __post_init__(self) -> None:
        _check(self)


CLEAR = Weather()

ROUGH_ROAD = Road(
    request_lost=0.01,
    request_late=0.004,
    answer_lost=0.01,
    answer_late=0.02,
    server_error=0.01,
    throttled=0.02,
)
STORM = Weather(
    launches=Road(
        answer_seconds=(0.5, 2.5),
        request_lost=0.05,
        request_late=0.05,
        answer_lost=0.1,
        answer_late=0.1,
        server_error=0.05,
        throttled=0.05,
    ),
    changes=ROUGH_ROAD,
    reads=ROUGH_ROAD,
    outages_per_hour=0.02,
    launch_outages_per_hour=0.02,
    credentials_expire_per_hour=0.02,
    clock_skews_per_hour=0.02,
    hidden=0.3,
    hidden_from_writes=0.5,
    flicker=0.2,
    stale=0.02,
    listing_short=0.01,
    page_failed=0.02,
    page_items_max=5,
    dead_token_returned=0.5,
    refusals=(
        ("UnfulfillableCapacity", 0.01),
        ("InsufficientFreeAddressesInSubnet", 0.01),
        ("SpotMaxPriceTooLow", 0.01),
        ("MaxSpotInstanceCountExceeded", 0.02),
        ("VcpuLimitExceeded", 0.01),
        ("UnauthorizedOperation", 0.01),
        ("InvalidAMIID.NotFound", 0.01),
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", 0.005),
    ),
    stockout=0.1,
    stockout_everywhere=0.02,
    unsupported=0.05,
    bought_on_demand=0.02,
    fleet_partial=0.1,
    fleet_surplus=0.05,
    boot_failed=0.03,
    stuck_pending=0.02,
    address_late=0.05,
    address_never=0.02,
    address_reused=0.5,
    port_late=0.05,
    port_never=0.03,
    port_dies=0.1,
    port_dies_after_seconds=(5.0, 3600.0),
    port_pauses=0.1,
    port_pauses_after_seconds=(5.0, 3600.0),
    connection_lost=0.01,
    shutdowns_per_hour=0.1,
    stuck_shutting_down=0.05,
    terminate_ignored=0.05,
    reclaims_per_hour=0.5,
    reclaim_unannounced=0.3,
    reclaim_rebalance=0.5,
    reclaim_called_off=0.2,
    notice_lost=0.2,
    notice_duplicated=0.2,
    notice_late=0.2,
    strangers_per_hour=0.5,
    stranger_answers=0.5,
)


def swarm(rng: random.Random, weather: Weather = STORM) -> Weather:
    """The weather with each fault left in or out by the toss of a coin."""
    roads: dict[str, Any] = {
        name: _some(rng, getattr(weather, name)) for name in ("launches", "changes", "reads")
    }
    calm = _some(rng, replace(weather, **roads))
    assert isinstance(calm, Weather)
    return calm


def _some(rng: random.Random, knobs: Road | Weather) -> Road | Weather:
    plain = type(knobs)()
    off: dict[str, Any] = {}
    for name, value in _knobs(knobs):
        ordinary = getattr(plain, name)
        pace = isinstance(value, Road) or name.endswith("_seconds")
        if name == "refusals":
            off[name] = tuple(one for one in value if rng.random() < 0.5)
        elif not pace and value != ordinary and rng.random() < 0.5:
            off[name] = ordinary
    return replace(knobs, **off)
