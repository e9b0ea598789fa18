"""When how many warm workers are wanted: windows of the week, each in a time zone of its own.

A window is open while the wall clocks of its zone show one of its days and a time within its range, the end
not included. So daylight saving needs no rule of its own: a time that the clocks leave out begins with the
first moment after the gap, and one that they show twice counts both times. The zones are those of the IANA
time zone database, from the system or from the package tzdata.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from difflib import get_close_matches
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

EXAMPLE = '"Mon-Fri 08:00-19:00 Europe/Berlin" = 2'
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")  # as datetime.weekday counts them
EVERY_DAY = "daily"
RANGE = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")
MINUTES_OF_DAY = 24 * 60
DAY_SECONDS = 86_400
HORIZON_DAYS = (
    8  # a week in which nothing changes is like the next, and a window may reach into a day after it
)
WINDOWS_KEPT = 1024  # parsed ones, in memory: far more than anybody writes into one file


@dataclass(frozen=True, slots=True)
class Window:
    """One entry's times: on these days (0 is Monday), from minute to minute of the day, in one zone.

    A range whose end is not after its beginning reaches into the next day, and belongs to the day on which
    it begins.
    """

    days: frozenset[int]
    begin_minute: int
    end_minute: int
    zone: ZoneInfo

    def open(self, unix: float) -> bool:
        """Whether the moment is within the window."""
        local = datetime.fromtimestamp(unix, self.zone)
        minute, today = local.hour * 60 + local.minute, local.weekday()
        if self.begin_minute < self.end_minute:
            return today in self.days and self.begin_minute <= minute < self.end_minute
        begun_today = today in self.days and minute >= self.begin_minute
        return begun_today or ((today - 1) % 7 in self.days and minute < self.end_minute)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Windows with the number that each asks for, and the number at all other times."""

    windows: tuple[tuple[Window, int], ...]
    otherwise: int = 0


def target(schedule: Schedule, unix: float) -> int:
    """How many are wanted at a moment: of the windows that are open, the largest number."""
    wanted = [number for window, number in schedule.windows if window.open(unix)]
    return max(wanted, default=schedule.otherwise)


def next_change_unix(schedule: Schedule, unix: float) -> float | None:
    """The first moment after `unix` at which the target is another one, exactly; None when there is none
    within HORIZON_DAYS."""
    now = target(schedule, unix)
    for moment in sorted(set(_moments(schedule, unix))):
        if moment > unix and target(schedule, moment) != now:
            return moment
    return None


@lru_cache(WINDOWS_KEPT)
def window(text: str) -> Window:
    """`"Mon-Fri 08:00-19:00 Europe/Berlin"` → its window. Raises ValueError, which says what is wrong in it.

    Days: `Mon-Fri`, `Sat,Sun`, `daily`, in any mixture. Times: `08:00-19:00`, `22:00-06:00` over midnight,
    `00:00-24:00`. Zone: a name of the IANA database; UTC when there is none.
    """
    words = text.split()
    if len(words) not in (2, 3):
        raise ValueError(f"is not days, times and perhaps a time zone: write for example {EXAMPLE}")
    begin_minute, end_minute = _times(words[1])
    return Window(_days(words[0]), begin_minute, end_minute, _zone(words[2] if len(words) == 3 else "UTC"))


# --- reading -------------------------------------------------------------------------------------------


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.lower().split(","):
        first, _, last = part.partition("-")
        if part == EVERY_DAY:
            found.update(range(7))
        elif first in DAYS and "-" not in part:
            found.add(DAYS.index(first))
        elif first in DAYS and last in DAYS:
            begin, end = DAYS.index(first), DAYS.index(last)
            found.update(day % 7 for day in range(begin, end + (7 if end < begin else 0) + 1))
        else:
            raise ValueError(
                f"'{part}' is no day: write Mon, Mon-Fri, Sat,Sun or daily, for example {EXAMPLE}"
            )
    return frozenset(found)


def _times(text: str) -> tuple[int, int]:
    match = RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no range of times: write 08:00-19:00, for example {EXAMPLE}")
    hours, minutes = (int(match[1]), int(match[3])), (int(match[2]), int(match[4]))
    begin, end = (hour * 60 + minute for hour, minute in zip(hours, minutes, strict=True))
    if max(minutes) > 59 or begin >= MINUTES_OF_DAY or end > MINUTES_OF_DAY:
        raise ValueError(f"'{text}' names a time that no day has: write for example {EXAMPLE}")
    if begin == end:
        raise ValueError(f"'{text}' ends when it begins: for the whole day write 00:00-24:00")
    return begin, end


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: "Europe" is a directory of the database
        pass
    by_lower = {known.lower(): known for known in available_timezones()}
    close = get_close_matches(name.lower(), sorted(by_lower), n=1)
    hint = f"did you mean {by_lower[close[0]]}?" if close else f"write for example {EXAMPLE}"
    raise ValueError(f"'{name}' is no time zone: {hint}")


# --- moments at which something may change -------------------------------------------------------------


def _moments(schedule: Schedule, unix: float) -> Iterator[float]:
    """Between two of these, every window stays as it is."""
    zones = dict.fromkeys(window.zone for window, _ in schedule.windows)
    for zone in zones:
        yield from _shifts(zone, unix)
    for window, _ in schedule.windows:
        today = datetime.fromtimestamp(unix, window.zone).date()
        for ahead in range(-1, HORIZON_DAYS + 1):
            day = today + timedelta(days=ahead)
            for minute in (window.begin_minute, window.end_minute):
                yield from _shown_unix(day, minute, window.zone)


def _shown_unix(day: date, minute: int, zone: tzinfo) -> Iterator[float]:
    """When the zone's clocks show that minute of that day: once, or twice. (In a gap: moments that are
    harmless, because the gap's own end is among the shifts.)"""
    midnight = datetime(day.year, day.month, day.day)
    for fold in (0, 1):
        yield (midnight + timedelta(minutes=minute)).replace(tzinfo=zone, fold=fold).timestamp()


def _shifts(zone: tzinfo, unix: float) -> Iterator[float]:
    """The moments, to the second, at which the zone's clocks are set, from now to the horizon."""
    for day in range(HORIZON_DAYS):
        before = int(unix) + day * DAY_SECONDS
        after = before + DAY_SECONDS
        if _offset(zone, before) == _offset(zone, after):
            continue
        while after - before > 1:
            middle = (before + after) // 2
            if _offset(zone, middle) == _offset(zone, before):
                before = middle
            else:
                after = middle
        yield float(after)


def _offset(zone: tzinfo, unix: float) -> timedelta | None:
    return datetime.fromtimestamp(unix, UTC).astimezone(zone).utcoffset()
