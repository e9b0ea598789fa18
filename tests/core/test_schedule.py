"""When how many warm workers are wanted: weeks, nights, and days on which the clocks are set."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.schedule import HORIZON_DAYS, Schedule, next_change_unix, target, window
from tests.core.generated import FEW

DAY_NAMES = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
# Zone → a moment near which its clocks are set: forward and back, north and south, by an hour and by half.
SHIFTS = {
    "Europe/Berlin": ("2027-03-28T01:00", "2027-10-31T01:00"),
    "America/New_York": ("2027-03-14T07:00", "2027-11-07T06:00"),
    "Australia/Lord_Howe": ("2027-04-03T15:00", "2027-10-02T15:30"),
    "Australia/Sydney": ("2027-04-03T16:00", "2027-10-02T16:00"),
    "America/Santiago": ("2027-04-04T03:00", "2027-09-05T04:00"),
    "Asia/Kathmandu": ("2027-06-01T00:00",),  # never set, and three quarters of an hour off
}


def unix(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def schedule(*windows: tuple[str, int], otherwise: int = 0) -> Schedule:
    return Schedule(tuple((window(text), number) for text, number in windows), otherwise)


def opening_hours(text: str, begin: str, end: str) -> list[str]:
    """The UTC times, to the minute, at which a window opens and closes."""
    plan, at, found = schedule((text, 1)), unix(begin), []
    while (change := next_change_unix(plan, at)) is not None and change < unix(end):
        found.append(f"{datetime.fromtimestamp(change, UTC):%d %H:%M}")
        at = change
    return found


# --- ordinary weeks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "moment", "is_open"),
    [
        ("Mon-Fri 08:00-19:00", "2027-01-15T08:00", True),  # a Friday
        ("Mon-Fri 08:00-19:00", "2027-01-15T07:59:59", False),
        ("Mon-Fri 08:00-19:00", "2027-01-15T19:00", False),
        ("mon-fri 08:00-19:00", "2027-01-16T12:00", False),
        ("Sat,Sun 08:00-19:00", "2027-01-16T12:00", True),
        ("Fri-Mon 08:00-19:00", "2027-01-18T12:00", True),
        ("Fri-Mon 08:00-19:00", "2027-01-19T12:00", False),
        ("Mon,Thu-Sat 08:00-19:00", "2027-01-15T12:00", True),
        ("daily 00:00-24:00", "2027-01-15T23:59:59", True),
        ("Fri 22:00-06:00", "2027-01-16T05:59", True),
        ("Fri 22:00-06:00", "2027-01-15T05:59", False),
        ("Sun 22:00-06:00", "2027-01-18T00:00", True),
        ("Fri 22:00-00:00", "2027-01-16T00:00", False),
        ("Fri 08:00-19:00 Europe/Berlin", "2027-01-15T07:00", True),
        ("Fri 08:00-19:00 Asia/Kathmandu", "2027-01-15T02:15", True),
        ("Fri 08:00-19:00 Asia/Kathmandu", "2027-01-15T02:14", False),
    ],
)
def test_a_window_is_open_on_its_days_between_its_times(text: str, moment: str, is_open: bool) -> None:
    assert target(schedule((text, 1)), unix(moment)) == is_open


def test_the_largest_of_several_counts_and_at_other_times_the_number_without_a_schedule() -> None:
    plan = schedule(("daily 08:00-20:00", 2), ("daily 10:00-12:00", 5), ("daily 11:00-13:00", 3), otherwise=1)
    wanted = [target(plan, unix(f"2027-01-15T{hour}:30")) for hour in ("07", "08", "10", "11", "12", "13")]
    assert wanted == [1, 2, 5, 5, 3, 2]


def test_a_window_may_ask_for_fewer_than_at_other_times() -> None:
    plan = schedule(("Sat,Sun 00:00-24:00", 0), otherwise=2)
    assert target(plan, unix("2027-01-16T12:00")) == 0
    assert target(plan, unix("2027-01-15T12:00")) == 2
    assert next_change_unix(plan, unix("2027-01-15T12:00")) == unix("2027-01-16T00:00")
    assert next_change_unix(plan, unix("2027-01-16T12:00")) == unix("2027-01-18T00:00")


def test_where_nothing_ever_changes_there_is_no_next_change() -> None:
    assert next_change_unix(schedule(otherwise=3), 0.0) is None
    assert (
        next_change_unix(schedule(("daily 00:00-24:00 Europe/Berlin", 2)), unix("2027-03-27T12:00")) is None
    )
    assert next_change_unix(schedule(("Mon 08:00-09:00", 2), otherwise=2), 0.0) is None


# --- clocks that are set --------------------------------------------------------------------------------


def test_a_time_that_does_not_exist_begins_with_the_first_moment_after_the_gap() -> None:
    text = "daily 02:30-05:00 Europe/Berlin"  # on the 28th of March 02:00 is followed by 03:00
    assert opening_hours(text, "2027-03-27T00:00", "2027-03-30T00:00") == [
        "27 01:30", "27 04:00", "28 01:00", "28 03:00", "29 00:30", "29 03:00",
    ]  # fmt: skip


def test_a_window_within_the_gap_does_not_open_on_that_day() -> None:
    text = "daily 02:15-02:45 Europe/Berlin"
    assert opening_hours(text, "2027-03-27T00:00", "2027-03-30T00:00") == [
        "27 01:15", "27 01:45", "29 00:15", "29 00:45",
    ]  # fmt: skip


def test_a_time_that_exists_twice_counts_both_times() -> None:
    text = "daily 02:15-02:45 Europe/Berlin"  # on the 31st of October 03:00 is followed by 02:00
    assert opening_hours(text, "2027-10-31T00:00", "2027-10-31T23:00") == [
        "31 00:15", "31 00:45", "31 01:15", "31 01:45",
    ]  # fmt: skip


def test_a_night_on_which_the_clocks_are_set_is_an_hour_shorter_or_longer() -> None:
    text = "Sat 22:00-06:00 Europe/Berlin"
    assert opening_hours(text, "2027-03-27T00:00", "2027-03-29T00:00") == ["27 21:00", "28 04:00"]
    assert opening_hours(text, "2027-10-30T00:00", "2027-11-01T00:00") == ["30 20:00", "31 05:00"]


@st.composite
def windows(draw: st.DrawFn, zones: st.SearchStrategy[str]) -> str:
    days = draw(st.lists(st.sampled_from(DAY_NAMES), min_size=1, max_size=4, unique=True))
    begin, end = draw(
        st.tuples(st.integers(0, 1439), st.integers(1, 1440)).filter(lambda pair: pair[0] != pair[1])
    )
    if draw(st.booleans()):  # a range that has to do with the hours at which clocks are set
        begin, end = draw(st.integers(60, 200)), draw(st.integers(201, 300))
    times = f"{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
    return f"{','.join(days)} {times} {draw(zones)}"


@st.composite
def plans(draw: st.DrawFn) -> tuple[dict[str, int], int, float]:
    """A schedule and a moment within two days of one at which the clocks of one of its zones are set."""
    zones = draw(st.lists(st.sampled_from(sorted(SHIFTS)), min_size=1, max_size=2))
    numbers = draw(
        st.dictionaries(windows(st.sampled_from(zones)), st.integers(0, 4), min_size=1, max_size=3)
    )
    near = unix(draw(st.sampled_from(SHIFTS[zones[0]])))
    return numbers, draw(st.integers(0, 2)), near + draw(st.integers(-172_800, 172_800))


def naive_target(numbers: dict[str, int], otherwise: int, at: float) -> int:
    """By the words, with nothing in common with the code: what do the clocks there show?"""
    found = []
    for text, number in numbers.items():
        days, times, zone = text.split()
        shown = datetime.fromtimestamp(at, ZoneInfo(zone))
        begin, end = times.split("-")
        time = f"{shown:%H:%M}"
        today = DAY_NAMES[shown.weekday()] in days.split(",")
        yesterday = DAY_NAMES[(shown.weekday() + 6) % 7] in days.split(",")
        if begin < end:
            is_open = today and begin <= time < end
        else:
            is_open = (today and time >= begin) or (yesterday and time < end)
        found += [number] if is_open else []
    return max(found) if found else otherwise


@given(plans())
@FEW
def test_a_walk_from_minute_to_minute_finds_the_same_target_and_the_same_next_change(
    plan: tuple[dict[str, int], int, float],
) -> None:
    numbers, otherwise, start = plan
    chosen = schedule(*numbers.items(), otherwise=otherwise)
    now = naive_target(numbers, otherwise, start)
    assert target(chosen, start) == now
    walked = (start - start % 60) + 60.0
    until = start + HORIZON_DAYS * 86_400
    while walked < until and naive_target(numbers, otherwise, walked) == now:
        walked += 60.0
    assert next_change_unix(chosen, start) == (walked if walked < until else None)


@given(plans(), st.floats(0, 59.9))
@FEW
def test_up_to_the_next_change_the_target_stays_and_at_it_it_is_another(
    plan: tuple[dict[str, int], int, float], seconds: float
) -> None:
    numbers, otherwise, start = plan
    chosen = schedule(*numbers.items(), otherwise=otherwise)
    change = next_change_unix(chosen, start + seconds)
    if change is not None:
        assert change > start + seconds
        assert target(chosen, change - 0.01) == target(chosen, start + seconds) != target(chosen, change)


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not days, times and perhaps a time zone"),
        ("Mon-Fri", "is not days, times and perhaps a time zone"),
        ("Mon-Fri 08:00-19:00 Europe/Berlin summer", "is not days, times and perhaps a time zone"),
        ("Mo-Fr 08:00-19:00", "'mo-fr' is no day: write Mon, Mon-Fri, Sat,Sun or daily"),
        ("Mon, 08:00-19:00", "'' is no day"),
        ("Mon-Fri-Sat 08:00-19:00", "'mon-fri-sat' is no day"),
        ("Mon-Fri 8-19", "'8-19' is no range of times: write 08:00-19:00"),
        ("Mon-Fri 08:00-25:00", "'08:00-25:00' names a time that no day has"),
        ("Mon-Fri 08:60-19:00", "'08:60-19:00' names a time that no day has"),
        ("Mon-Fri 24:00-06:00", "'24:00-06:00' names a time that no day has"),
        ("Mon-Fri 08:00-24:01", "'08:00-24:01' names a time that no day has"),
        ("Mon-Fri 08:00-08:00", "'08:00-08:00' ends when it begins: for the whole day write 00:00-24:00"),
        ("Mon-Fri 08:00-19:00 Europe/Berlim", "no time zone: did you mean Europe/Berlin?"),
        ("Mon-Fri 08:00-19:00 Europe", "'Europe' is no time zone"),
        ("Mon-Fri 08:00-19:00 ../../etc/passwd", "'../../etc/passwd' is no time zone"),
        ("Mon-Fri 08:00-19:00 Mars/Olympus_Mons", "'Mars/Olympus_Mons' is no time zone"),
    ],
)
def test_a_mistake_is_said_with_what_is_wrong_and_how_to_write_it(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r"write|did you mean") as caught:
        window(text)
    assert problem in str(caught.value)


def test_the_example_in_the_messages_is_right() -> None:
    text = "Mon-Fri 08:00-19:00 Europe/Berlin"
    monday_eight = unix("2027-07-05T08:00", "Europe/Berlin")
    assert not window(text).open(monday_eight - 1)
    assert window(text).open(monday_eight)
    assert window(text).open(monday_eight + timedelta(days=4, hours=10).total_seconds())
