"""How hypothesis runs here: the same examples every time, few enough for every commit, never by the clock."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

FEW = settings(
    derandomize=True, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
MANY = settings(FEW, max_examples=250)
