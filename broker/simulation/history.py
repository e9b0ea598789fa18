"""What happens in one simulated life of the broker: a plain list of entries that can be shortened.

Each entry stands alone: leaving one out leaves the others as they are. What the cloud does by itself (its
weather, the fate of each machine) is drawn by the cloud from the same seed. `drawing` makes histories.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from broker.core.settings import Settings
from broker.providers.sim_weather import Weather
from broker.testing import EPOCH_UNIX

BROKER_ID = "lab"
HOUR_SECONDS = 3600.0

Ending = Literal["release", "force", "vanish", "linger"]


@dataclass(frozen=True, slots=True)
class Visit:
    """A client comes, asks, works, and leaves in its own way."""

    at: float
    name: str
    work_seconds: float
    ping_seconds: float
    ending: Ending
    exclusive: bool = False
    wait: float | None = None
    patience_seconds: float | None = None  # hangs up when it has no answer by then
    again: int = 0  # so many times more, each about the moment its worker is due to be reaped
    late_seconds: float = 0.0  # after that moment; negative: before
    acquire: int = 0  # so many leases by ACQUIRE, each of its own; 0: GET_WORKER
    some: bool = False  # fewer will do
    bound: bool = False  # they live as long as the connection
    kind: str = ""  # only on machines of this type will its program run


@dataclass(frozen=True, slots=True)
class Crowd:
    """So many clients, each under a name of its own, in the same instant: a whole cluster starts.

    Every `dies_each`-th of them dies while it waits, if it waits for long; 0: none does.
    """

    at: float
    name: str
    count: int
    work_seconds: float
    dies_each: int = 0


@dataclass(frozen=True, slots=True)
class Crash:
    """SIGKILL, so many steps of the loop after a moment; then a new broker on the same state and cloud."""

    at: float
    steps: int
    down_seconds: float
    torn: bool = False  # and the store's file is damaged meanwhile


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGTERM, and a new broker later."""

    at: float
    down_seconds: float


@dataclass(frozen=True, slots=True)
class WallJump:
    """Somebody sets the broker's wall clock."""

    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class DiskFull:
    """Every write of the store fails for a while."""

    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Reload:
    """Somebody changes settings of the pool and sends SIGHUP. None: the file has a mistake, mended later."""

    at: float
    changes: tuple[tuple[str, object], ...] | None


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody types a command, or does something behind the broker's back."""

    at: float
    command: Literal[
        "STATUS",
        "LIST_ALL",
        "TERMINATE_ALL",
        "terminate outside",
        "start outside",
        "second broker",
        "unclassified",
        "by hand",
    ]


@dataclass(frozen=True, slots=True)
class Outage:
    """The region's API is down for so long."""

    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Scarcity:
    """For so long these machine types are to be had nowhere on spot."""

    at: float
    seconds: float
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BrokenImage:
    """For a while no machine that is launched comes up."""

    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SilentPort:
    """The worker program on every running machine stops answering for so long; the machines run on.

    `first`: only on the one that the broker would hand out first.
    """

    at: float
    seconds: float
    first: bool = False


@dataclass(frozen=True, slots=True)
class Protect:
    """An operator puts the protect tag on a machine that runs, and takes it away again after so long.

    `word`: to which value it is set then; empty: the key itself goes.
    """

    at: float
    seconds: float
    word: str = ""


@dataclass(frozen=True, slots=True)
class Noise:
    """Connections that are nobody's client: port scans, health checks, half a line."""

    at: float
    count: int


@dataclass(frozen=True, slots=True)
class SecondHost:
    """A broker with the same id starts on another host, with a wall clock of its own, and runs for so long.

    No client knows it: it stands by, and takes over when the first is silent.
    """

    at: float
    seconds: float
    wall_seconds: float  # how far its clock is off
    killed: bool  # how it ends


@dataclass(frozen=True, slots=True)
class Idlers:
    """So many connections that are opened and left alone, half a command on every other one."""

    at: float
    count: int
    seconds: float


Entry = (
    Visit
    | Crowd
    | Crash
    | Stop
    | WallJump
    | DiskFull
    | Reload
    | Operator
    | Outage
    | Scarcity
    | BrokenImage
    | SilentPort
    | Protect
    | Noise
    | Idlers
    | SecondHost
)


@dataclass(frozen=True, slots=True)
class History:
    """One life: what the broker is told, what the cloud is like, and what happens, in order of time."""

    seed: int
    hours: float
    settings: Settings
    weather: Weather
    entries: tuple[Entry, ...]
    begins_unix: float = EPOCH_UNIX  # what all clocks show at its beginning

    def without(self, entries: frozenset[int]) -> History:
        """The same life without some of its entries, by position."""
        return replace(self, entries=tuple(e for i, e in enumerate(self.entries) if i not in entries))
