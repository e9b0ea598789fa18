"""A spot price of the simulated EC2 that moves: up and down by chance, as a share of the on-demand price.

Real ones follow long-term trends in supply and demand and change over hours (AWS: EC2 user guide, "Spot
Instances"). This one takes a step every ten minutes, so that a day sees it cheap and dear.
"""

from __future__ import annotations

import math

from broker.providers.sim_sky import Dice

STEP_SECONDS = 600.0
STEPS_MAX = 10_000  # caught up with at once: two months in which nobody asked; the rest would tell no more


class PriceWalk:
    """See the module. `share` is where it begins; it stays between `low` and `high`."""

    def __init__(self, dice: Dice, share: float, low: float) -> None:
        self._dice, self._share, self._low = dice, share, low
        self._steps = 0

    def share(self, at: float, step_max: float, high: float) -> float:
        """At that moment, which is not before the last one asked for. `step_max`: by so much of itself it
        changes in one step at most."""
        steps = int(at / STEP_SECONDS)
        for _ in range(min(steps - self._steps, STEPS_MAX)):
            moved = self._share * math.exp(self._dice.within((-step_max, step_max)))
            self._share = min(high, max(self._low, moved))
        self._steps = steps
        return self._share
