"""A kill at every place where the broker waits, at one after the other.

Random kills hit the places where it waits for long. Here a history is played once to note in which round of
the loop a task first stands at each place; and as a history takes the same course every time, the broker can
then be killed in just that round.
"""

from __future__ import annotations

from broker.simulation.awaits import Point, points_at
from broker.simulation.history import History
from broker.simulation.stage import Outcome, Stage, play

DOWN_SECONDS = 1.0


def first_rounds(history: History) -> dict[Point, int]:
    """Each place at which some task of the broker waits in this history, and the round when it first does."""
    found: dict[Point, int] = {}
    known: set[str] = set()

    def look(stage: Stage, number: int) -> None:
        for place in stage.stands():
            if place not in known:
                known.add(place)
                for point in points_at(place):
                    found.setdefault(point, number)

    play(history, after_round=look)
    return found


def play_with_kill(history: History, in_round: int) -> Outcome:
    """The history, with the broker killed right after that round, and a new one a second later."""

    def strike(stage: Stage, number: int) -> None:
        if number == in_round:
            stage.accidents.strike(DOWN_SECONDS)

    return play(history, after_round=strike)
