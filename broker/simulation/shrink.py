"""Makes a history that broke a promise as short as it gets, so that a person can read it.

Entries are left out, in halves, quarters and so on, as long as the same promise is still broken (delta
debugging: A. Zeller, R. Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002).
"""

from __future__ import annotations

from collections.abc import Callable

from broker.simulation.history import History

PLAYS_MAX = 300  # a history of 24 hours plays in a fraction of a second


def shrink(history: History, breaks: Callable[[History], bool]) -> History:
    """The shortest history found that still breaks. `breaks` is true of `history` itself."""
    plays, size = 0, max(1, len(history.entries) // 2)
    while plays < PLAYS_MAX:
        for start in range(0, len(history.entries), size):
            shorter = history.without(frozenset(range(start, start + size)))
            plays += 1
            if breaks(shorter):
                history = shorter
                break
            if plays >= PLAYS_MAX:
                break
        else:
            if size == 1:
                break
            size = max(1, size // 2)
    return history
