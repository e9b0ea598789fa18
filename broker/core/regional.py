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


def first_good(
    choices: Iterable[tuple[str, Choice]],
    passed_over: Sequence[tuple[str, BrokerError]] = (),
    *,
    worth_waiting: bool = False,
) -> tuple[int | None, Choice]:
    """(region, what could be bought there) in order of preference → the number of the region, and what to buy
    there; or none, and what there is to say of all of them. No more are looked at than needed.

    `passed_over`: regions that cannot be asked, and why; `worth_waiting` says that one of them soon can.
    """
    seen: list[tuple[str, Choice]] = []
    for number, (region, choice) in enumerate(choices):
        if choice.machines and not choice.spot_refused:
            return number, choice
        seen.append((region, choice))
    for number, (_, choice) in enumerate(seen):
        if choice.machines:
            return number, choice
    return None, _none_of(seen, passed_over, worth_waiting)


def sum_up(errors: Sequence[tuple[str, BrokerError]]) -> BrokerError:
    """One error for all regions: of a sort that all of them are of, or want of capacity."""
    if len(errors) == 1:
        return errors[0][1]
    words = "; ".join(_in_region(region, error.message) for region, error in errors)
    for sort in (QuotaReached, PermanentRefusal, ReadOnly):
        if all(isinstance(error, sort) for _, error in errors):
            return sort(words)
    scarce = any(error.code is Code.NO_CAPACITY for _, error in errors)
    return NoCapacity(words) if scarce else CloudError(words)


def _in_region(region: str, words: str) -> str:
    return words if region in words else f"{region}: {words}"


def _none_of(
    choices: Sequence[tuple[str, Choice]], passed_over: Sequence[tuple[str, BrokerError]], worth_waiting: bool
) -> Choice:
    """Waiting helps when it helps in one of them."""
    if len(choices) == 1 and not passed_over:
        return choices[0][1]
    moments = [choice.look_at for _, choice in choices if choice.look_at is not None]
    refused = bool(choices) and all(choice.spot_refused for _, choice in choices)
    look_at = min(moments, default=None)
    for region, choice in choices:
        if choice.obstacle:
            return Choice(obstacle=f"{region}: {choice.obstacle}", look_at=look_at, spot_refused=refused)
    errors = [(region, choice.refusal) for region, choice in choices if choice.refusal is not None]
    error = sum_up([*errors, *passed_over])
    if worth_waiting:
        return Choice(obstacle=error.message, look_at=look_at, spot_refused=refused)
    return Choice(refusal=error, look_at=look_at, spot_refused=refused)
