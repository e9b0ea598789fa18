"""Who is in charge: what claims on machines mean to the brokers that see them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.claim import (
    ACT_SECONDS_MAX,
    BEAT_SECONDS,
    CLOCK_ERROR_SECONDS_MAX,
    NUMBER_MAX,
    STALE_SECONDS,
    Claim,
    Ruling,
    Watch,
    read,
)
from tests.core.generated import FEW, MANY

NOW_UNIX = 1_769_846_400.0  # 2026-01-31T08:00:00Z
HOUR_SECONDS = 3600.0
SCAN_SECONDS = 30.0


def claim(number: int, owner: str, age_seconds: float = 0.0) -> Claim:
    return Claim(number, owner, NOW_UNIX - age_seconds)


def rival(ruling: Ruling) -> str | None:
    return ruling.rival.owner if ruling.rival else None


# --- what is written ---------------------------------------------------------------------------------------


def test_a_claim_is_a_number_an_owner_and_a_time() -> None:
    assert str(claim(7, "3f2a")) == "7.3f2a@2026-01-31T08:00:00Z"
    assert read("7.3f2a@2026-01-31T08:00:00Z") == claim(7, "3f2a")


@given(st.integers(0, NUMBER_MAX), st.from_regex(r"[A-Za-z0-9-]{1,64}", fullmatch=True))
@FEW
def test_what_is_written_is_read_back(number: int, owner: str) -> None:
    assert read(str(claim(number, owner))) == claim(number, owner)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "7.a",
        "7.a@",
        "7.a@soon",
        "7.a@2026-01-31",
        "-1.a@2026-01-31T08:00:00Z",
        "x.a@2026-01-31T08:00:00Z",
        "1000000000.a@2026-01-31T08:00:00Z",
        "7.a b@2026-01-31T08:00:00Z",
        "٧.a@2026-01-31T08:00:00Z",
        "7.a@0001-01-01T00:00:00+23:59",
        "7.a@9999-12-31T23:59:59-23:59",
    ],
)
def test_what_is_no_claim_is_none(text: str) -> None:
    assert read(text) is None


@given(st.text())
@FEW
def test_a_tag_that_anybody_edited_never_raises(text: str) -> None:
    found = read(text)
    assert found is None or read(str(found)) is not None


# --- the rule ----------------------------------------------------------------------------------------------


def test_with_no_claim_anywhere_whoever_looks_is_in_charge() -> None:
    assert Watch("a").look([], 0.0, NOW_UNIX) == Ruling(None, 1)


def test_a_newcomer_is_read_only_beside_a_fresh_claim_of_whatever_rank() -> None:
    for other in ("0", "z"):
        assert rival(Watch("a").look([claim(0, other)], 0.0, NOW_UNIX)) == other


def test_the_same_owner_goes_on_with_its_number_however_old_its_claim_is() -> None:
    for age_seconds in (0.0, 1e6, -1e6):
        assert Watch("a").look([claim(4, "a", age_seconds), claim(2, "a")], 0.0, NOW_UNIX) == Ruling(None, 4)


@pytest.mark.parametrize(("mine", "others", "leader"), [(5, 6, "b"), (6, 5, None), (5, 5, "b")])
def test_of_two_fresh_claims_the_higher_one_is_in_charge(mine: int, others: int, leader: str | None) -> None:
    assert rival(Watch("a").look([claim(mine, "a"), claim(others, "b")], 0.0, NOW_UNIX)) == leader


def test_with_equal_numbers_the_owner_decides() -> None:
    assert rival(Watch("b").look([claim(5, "a"), claim(5, "b")], 0.0, NOW_UNIX)) is None


@pytest.mark.parametrize(("looks_after", "leader"), [(True, None), (False, "b")])
def test_claims_on_machines_that_have_ended_give_no_charge_over_those_of_others(
    looks_after: bool, leader: str | None
) -> None:
    """Simulated history, seed 1996: a standby took the new machine of a broker that had come back."""
    watch, seconds = Watch("a"), SCAN_SECONDS
    assert rival(watch.look([claim(2, "a")], 0.0, NOW_UNIX)) is None
    ruling = watch.look([claim(1, "b")], seconds, NOW_UNIX + seconds, looks_after=looks_after)
    assert rival(ruling) == leader


def test_whoever_takes_over_counts_one_higher_than_all_it_sees() -> None:
    watch, dead = Watch("a"), [claim(6, "b"), claim(9, "c"), claim(2, "a")]
    assert rival(watch.look(dead, 0.0, NOW_UNIX)) == "c"
    assert watch.look(dead, STALE_SECONDS, NOW_UNIX) == Ruling(None, 10)


def test_numbers_do_not_grow_out_of_their_format() -> None:
    watch, dead = Watch("z"), [claim(NUMBER_MAX, "a", 1e6)]
    ruling = watch.look(dead, 0.0, NOW_UNIX)
    assert ruling == Ruling(None, NUMBER_MAX)
    assert read(str(claim(ruling.number, "z"))) is not None


def test_numbers_rest_while_the_claim_cannot_be_written() -> None:
    watch, dead = Watch("a"), [claim(6, "b", 1e6)]
    assert {watch.look(dead, float(at), NOW_UNIX).number for at in range(0, 3600, 30)} == {7}


# --- who is alive ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error_seconds", [-2 * HOUR_SECONDS, -HOUR_SECONDS, 0.0, HOUR_SECONDS, 2 * HOUR_SECONDS]
)
def test_a_broker_that_beats_is_never_taken_for_dead_whatever_the_clocks_say(error_seconds: float) -> None:
    watch = Watch("a")
    for at in range(0, int(4 * HOUR_SECONDS), int(SCAN_SECONDS)):
        beat_unix = NOW_UNIX + error_seconds + at - at % BEAT_SECONDS
        assert rival(watch.look([Claim(1, "b", beat_unix)], float(at), NOW_UNIX + at)) == "b"


@pytest.mark.parametrize("age_seconds", [-1e9, -HOUR_SECONDS, 0.0, STALE_SECONDS, HOUR_SECONDS])
def test_a_beat_that_does_not_change_is_waited_for_so_long_and_no_longer(age_seconds: float) -> None:
    watch, still = Watch("a"), [claim(1, "b", age_seconds)]
    assert rival(watch.look(still, 100.0, NOW_UNIX)) == "b"
    assert rival(watch.look(still, 99.0 + STALE_SECONDS, NOW_UNIX)) == "b"
    assert rival(watch.look(still, 100.0 + STALE_SECONDS, NOW_UNIX)) is None


def test_what_no_wrong_clock_explains_is_dead_at_once() -> None:
    old = claim(3, "b", STALE_SECONDS + CLOCK_ERROR_SECONDS_MAX + 1)
    assert Watch("a").look([old], 0.0, NOW_UNIX) == Ruling(None, 4)


def test_a_dead_owner_that_beats_again_is_alive_whatever_the_clocks_say() -> None:
    watch = Watch("a")
    watch.look([claim(3, "b", 1e6)], 0.0, NOW_UNIX)
    assert rival(watch.look([claim(3, "b", 1e6 - 300)], 30.0, NOW_UNIX)) == "b"


def test_setting_ones_own_clock_changes_nothing_for_one_that_was_seen_to_beat() -> None:
    watch = Watch("a")
    watch.look([claim(1, "b")], 0.0, NOW_UNIX)
    watch.look([claim(1, "b", -300)], 300.0, NOW_UNIX)
    assert rival(watch.look([claim(1, "b", -300)], 330.0, NOW_UNIX + 1e6)) == "b"


def test_a_machine_that_flickers_in_the_listings_is_no_sign_of_life() -> None:
    watch, machines = Watch("a"), [claim(1, "b"), claim(1, "b", 60)]
    for at in range(0, int(STALE_SECONDS), int(SCAN_SECONDS)):
        assert rival(watch.look(machines[at // 30 % 2 :], float(at), NOW_UNIX)) == "b"
    assert rival(watch.look(machines, STALE_SECONDS, NOW_UNIX)) is None


def test_a_listing_that_misses_the_only_machine_makes_no_second_leader() -> None:
    watch = Watch("a")
    watch.look([claim(1, "b")], 0.0, NOW_UNIX)
    assert rival(watch.look([], 30.0, NOW_UNIX)) == "b"
    assert rival(watch.look([], STALE_SECONDS, NOW_UNIX)) is None


def test_the_leader_whose_last_machine_has_just_ended_leads_on() -> None:
    watch = Watch("b")
    watch.look([claim(6, "b"), claim(5, "a")], 0.0, NOW_UNIX)
    assert rival(watch.look([claim(5, "a")], 30.0, NOW_UNIX)) is None


def test_one_who_could_not_look_for_long_looks_before_it_judges() -> None:
    watch = Watch("a")
    watch.look([claim(1, "b")], 0.0, NOW_UNIX)
    assert rival(watch.look([claim(1, "b", -STALE_SECONDS)], 5 * STALE_SECONDS, NOW_UNIX)) == "b"


def test_old_beats_are_forgotten() -> None:
    watch = Watch("a")
    for at in range(0, int(48 * HOUR_SECONDS), int(BEAT_SECONDS)):
        watch.look([claim(1, "b", -at)], float(at), NOW_UNIX)
    assert len(watch._seen) <= 13


def test_whoever_acts_on_a_young_listing_acts_before_anybody_takes_over() -> None:
    assert ACT_SECONDS_MAX + BEAT_SECONDS <= STALE_SECONDS


# --- several brokers ---------------------------------------------------------------------------------------

OWNERS = st.sampled_from("abcd")


@given(
    listed=st.lists(
        st.builds(claim, st.integers(0, 5), OWNERS, st.floats(-HOUR_SECONDS, HOUR_SECONDS)), min_size=1
    ),
    errors_seconds=st.lists(st.floats(-HOUR_SECONDS, HOUR_SECONDS), min_size=6, max_size=6),
)
@MANY
def test_of_brokers_that_see_one_listing_with_claims_of_the_living_at_most_one_is_in_charge(
    listed: list[Claim], errors_seconds: list[float]
) -> None:
    rulings = {
        me: Watch(me).look(listed, 0.0, NOW_UNIX + error_seconds)
        for me, error_seconds in zip("abcdef", errors_seconds, strict=True)
    }
    in_charge = [me for me, ruling in rulings.items() if ruling.rival is None]
    assert in_charge == [max(listed, key=lambda one: one.rank).owner]


@dataclass
class Host:
    """A broker on a host whose wall clock is wrong."""

    owner: str
    error_seconds: float
    number: int = 0
    in_charge: bool = False
    beaten_at: float = float("-inf")
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.watch, self.in_charge, self.beaten_at = Watch(self.owner), False, float("-inf")

    def claim(self, now: float) -> Claim:
        return Claim(self.number, self.owner, float(int(NOW_UNIX + now + self.error_seconds)))

    def look(self, machines: list[Claim], now: float) -> None:
        ruling = self.watch.look(machines, now, NOW_UNIX + now + self.error_seconds)
        self.in_charge = ruling.rival is None
        if self.in_charge:
            self.number = max(self.number, ruling.number)

    def mark(self, machines: list[Claim], now: float) -> None:
        """What BeatLoop does, perhaps long after the look."""
        due = now >= self.beaten_at + BEAT_SECONDS - SCAN_SECONDS
        for place, on_it in enumerate(machines if self.in_charge else []):
            if due or on_it.rank != (self.number, self.owner):
                machines[place] = self.claim(now)
        self.beaten_at = now if due and self.in_charge else self.beaten_at


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["look", "mark", "launch", "end", "restart", "lose", "pass"]), st.integers(0, 2)
    ),
    max_size=60,
)


@given(
    steps=STEPS,
    errors_seconds=st.lists(st.floats(-HOUR_SECONDS, HOUR_SECONDS), min_size=3, max_size=3),
    ghosts=st.lists(
        st.builds(claim, st.integers(0, 9), st.sampled_from("0g~"), st.floats(-1e4, 1e4)), max_size=3
    ),
)
@MANY
def test_whatever_happened_living_brokers_soon_agree_on_one_of_them(
    steps: list[tuple[str, int]], errors_seconds: list[float], ghosts: list[Claim]
) -> None:
    """Looks and writes in any order, machines that come and go, restarts, lost states, claims of the dead."""
    hosts = [Host(owner, error) for owner, error in zip("abc", errors_seconds, strict=True)]
    machines, now = list(ghosts), 0.0
    for what, number in steps:
        host = hosts[number]
        now += SCAN_SECONDS
        match what:
            case "look":
                host.look(machines, now)
            case "mark":
                host.mark(machines, now)
            case "launch" if host.in_charge:
                machines.append(host.claim(now))
            case "end" if machines:
                machines.pop(number % len(machines))
            case "restart":
                host.restart()
            case "lose":
                host.restart()
                host.number = 0
            case "pass":
                now += 300.0 * number
    machines = machines or [claim(1, "a")]
    for _ in range(int(STALE_SECONDS / SCAN_SECONDS) + 4):
        now += SCAN_SECONDS
        for host in hosts:
            host.look(machines, now)
            host.mark(machines, now)
    for host in hosts:
        host.look(machines, now)
    (leader,) = [host for host in hosts if host.in_charge]
    assert {one.rank for one in machines} == {(leader.number, leader.owner)}
