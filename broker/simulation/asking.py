"""Who asks for workers at the moment, by the clients' own account: for how many, alone or not, since when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LEAVING_SECONDS = 1.0  # the broker may hear of a client that has left a moment after the client knows

ANSWER_SLACK_SECONDS = 2.0  # beyond a wait: the proof of a worker that came in its last moment


@dataclass(eq=False, slots=True)
class Ask:
    """One client that wants workers. `sent_at`: when it sent the command that is unanswered; None: it is
    about to connect again, or has gone."""

    client: str
    alone: bool
    count: int
    acquiring: bool
    kind: str = ""  # a machine type; empty: any will do
    sent_at: float | None = None


class Asking:
    """See the module. `later` runs something after so many seconds."""

    def __init__(
        self, now: Callable[[], float], later: Callable[[float, Callable[[Ask], None], Ask], object]
    ) -> None:
        self._now, self._later = now, later
        self._asks: dict[Ask, None] = {}  # in the order in which they came
        self.since_at: float | None = None  # since when there has always been somebody; None: there is nobody

    def __iter__(self) -> Iterator[Ask]:
        return iter(self._asks)

    def comes(
        self, client: str, *, alone: bool, count: int = 1, acquiring: bool = False, kind: str = ""
    ) -> Ask:
        """A client wants so many workers, for itself alone or not."""
        ask = Ask(client, alone, count, acquiring, kind)
        if not self._asks:
            self.since_at = self._now()
        self._asks[ask] = None
        return ask

    def leaves(self, ask: Ask) -> None:
        """It has its answer, or has given up."""
        ask.sent_at = None
        self._later(LEAVING_SECONDS, self._left, ask)

    def machines(self, seats: int, kind: str = "") -> int:
        """How many machines would serve them all, or those for whom this type would do, when so many share
        one at most."""
        asks = [ask for ask in self._asks if not kind or ask.kind in ("", kind)]
        alone = sum(ask.count for ask in asks if ask.alone)
        sharing: Counter[str] = Counter()
        for ask in asks:
            if not ask.alone:
                sharing[ask.kind] += ask.count
        return alone + sum(-(-count // seats) for count in sharing.values())

    @property
    def particular(self) -> bool:
        """Whether somebody asks for a type of its own."""
        return any(ask.kind for ask in self._asks)

    def _left(self, ask: Ask) -> None:
        self._asks.pop(ask, None)
        if not self._asks:
            self.since_at = None
