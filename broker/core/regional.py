"""In which of a pool's regions to buy: the first that has what is asked for.

Spot in any of them comes before on-demand in any, for pools that buy on-demand only where spot has none. A
region that cannot sell is passed over in silence; only when none is left its reason is told, with its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from broker.core.buying import Choice
from broker.core.errors import (
    BrokerError,
    CloudError,
    Code,
    NoCapacity,
    PermanentRefusal,
    QuotaReached,
    ReadOnly,
)


def first_good(choices: Iterable[tuple[str, Choice]]) -> tuple[int | None, Choice]:
    """(region, what could be bought there) in order of preference → the number of the region, and what to buy
    there; or none, and what there is to say of all of them. No more are looked at than needed."""
    seen: list[tuple[str, Choice]] = []
    for number, (region, choice) in enumerate(choices):
        if choice.machines and not choice.spot_refused:
            return number, choice
        seen.append((region, choice))
    for number, (_, choice) in enumerate(seen):
        if choice.machines:
            return number, choice
    return None, _none_of(seen)


def sum_up(errors: Sequence[tuple[str, BrokerError]]) -> BrokerError:
    """One error for all regions: of a sort that all of them are of, or want of capacity."""
    if len(errors) == 1:
        return errors[0][1]
    words = "; ".join(f"{region}: {error.message}" for region, error in errors)
    for sort in (QuotaReached, PermanentRefusal, ReadOnly):
        if all(isinstance(error, sort) for _, error in errors):
            return sort(words)
    scarce = any(error.code is Code.NO_CAPACITY for _, error in errors)
    return NoCapacity(words) if scarce else CloudError(words)


def _none_of(choices: Sequence[tuple[str, Choice]]) -> Choice:
    """Waiting helps when it helps in one of them."""
    if len(choices) == 1:
        return choices[0][1]
    moments = [choice.look_at for _, choice in choices if choice.look_at is not None]
    refused = all(choice.spot_refused for _, choice in choices)
    look_at = min(moments, default=None)
    for region, choice in choices:
        if choice.obstacle:
            return Choice(obstacle=f"{region}: {choice.obstacle}", look_at=look_at, spot_refused=refused)
    errors = [(region, choice.refusal) for region, choice in choices if choice.refusal is not None]
    return Choice(refusal=sum_up(errors), look_at=look_at, spot_refused=refused)
