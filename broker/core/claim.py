"""Which of several brokers with one id is in charge, read off the machines they would all look after.

On one host a lock settles it (database.py, daemon.py). Brokers on two hosts share nothing but the machines,
so each machine carries the claim of the broker that looks after it: a number, the broker's owner (one
installation on one host, see installation.py) and the time of its last beat. The rule:

    The owner of the highest fresh claim on a living machine is in charge, everybody else is read-only.
    While no claim is fresh, whoever looks is in charge, with a number above every one it sees.

Rank is (number, owner) as it stands on the machines, not as a state directory remembers it. So brokers that
see the same listings name the same one; somebody who comes back after a year with a high number displaces
nobody; and one that loses a race of two writers finds that in its next listing. Only without any fresh claim
may two be in charge, until one sees the other's machine.

An owner is alive until nothing new was seen of it for STALE_SECONDS on the observer's monotonic clock, which
nobody can set. A beat is written by the cloud's clock, as its answers tell it, and read by the same: the wall
clock of neither host matters. It is asked only of a claim that was not seen to change yet, and only for what
no error explains (a cloud whose answers carry no date leaves both to their wall clocks): one that looks older
than STALE_SECONDS and two hours is dead, so that a host which failed yesterday is replaced at once. A younger
one is watched first. Taking over from a living broker would let its clients' machines end under them; waiting
costs STALE_SECONDS at most. A beat from the future is new once, like any other.

A broker that acts only on listings younger than ACT_SECONDS_MAX acts alone: whoever takes over has watched
STALE_SECONDS go by without a beat, and the listing's own beat was at most BEAT_SECONDS old.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from broker.core.tags import rfc3339, unix

BEAT_SECONDS = 300.0  # how often a claim is renewed: one call for 500 machines, which no rate limit feels
STALE_SECONDS = 3 * BEAT_SECONDS  # one beat may be lost, and the next one be late
ACT_SECONDS_MAX = STALE_SECONDS - BEAT_SECONDS
CLOCK_ERROR_SECONDS_MAX = 7200.0  # two wall clocks, each an hour off; with the cloud's clock, seconds
FORGET_SECONDS = 3600.0  # a claim not listed for so long is new when it comes back; listings gap for minutes
NUMBER_MAX = 999_999_999  # nobody counts so far; a tag edited by hand must not grow out of its own format
BEAT_UNIX_MAX = 250_000_000_000  # the year 9892: what lies beyond cannot be written with every offset
WRITTEN = re.compile(r"(?P<number>[0-9]{1,9})\.(?P<owner>[A-Za-z0-9-]{1,64})@(?P<beat>\S+)")


@dataclass(frozen=True, slots=True)
class Claim:
    """What an owner wrote onto a machine. `beat_unix` is by the cloud's clock, in whole seconds."""

    number: int
    owner: str
    beat_unix: float

    @property
    def rank(self) -> tuple[int, str]:
        return self.number, self.owner

    def __str__(self) -> str:
        return f"{self.number}.{self.owner}@{rfc3339(self.beat_unix)}"


def read(text: str) -> Claim | None:
    """The inverse of str(claim); None for anything else. Never raises: anyone may edit tags.

    A machine without a claim (an older version launched it) belongs to whoever is in charge.
    """
    match = WRITTEN.fullmatch(text)
    beat_unix = unix(match["beat"]) if match else None
    if match is None or beat_unix is None or not 0 <= beat_unix < BEAT_UNIX_MAX:
        return None
    return Claim(int(match["number"]), match["owner"], beat_unix)


@dataclass(frozen=True, slots=True)
class Ruling:
    """Who is in charge. `rival` is the claim of the one who is, None when it is the broker that looks; then
    `number` is the least that it must claim with."""

    rival: Claim | None
    number: int


@dataclass(slots=True)
class Sighting:
    """When a claim was seen, on the observer's monotonic clock."""

    first_at: float
    last_at: float
    beats: bool  # its owner had been seen with other claims before this one came: somebody writes them


class Watch:
    """One broker's memory of the claims on the machines of one cloud. `me` is its owner."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._seen: dict[Claim, Sighting] = {}

    def look(
        self, listed: Collection[Claim], now: float, now_unix: float, *, looks_after: bool = True
    ) -> Ruling:
        """Rule on the claims that a complete listing shows on living machines.

        `looks_after`: whether the observer has machines to look after. Its own claims on machines that have
        ended stand for nothing: somebody who has come back meanwhile, and has launched, keeps what he has.
        """
        self._note(listed, now)
        fresh = [
            claim
            for claim, seen in self._seen.items()
            if _fresh(claim, seen, now, now_unix) and (looks_after or claim.owner != self._me)
        ]
        alive = {self._me, *(claim.owner for claim in fresh)}
        # Also what this listing does not show: missing the only machine must not make a second leader.
        standing = [*fresh, *(claim for claim in listed if claim.owner in alive)]
        top = max(standing, key=lambda claim: claim.rank, default=None)
        if top is not None and top.owner != self._me:
            return Ruling(top, top.number)
        return Ruling(None, self._number_above(listed))

    def _note(self, listed: Collection[Claim], now: float) -> None:
        known = {claim.owner for claim in self._seen}
        for claim in listed:
            seen = self._seen.get(claim)
            if seen is None:
                self._seen[claim] = Sighting(now, now, claim.owner in known)
            else:
                seen.last_at = now
        self._seen = {c: seen for c, seen in self._seen.items() if now - seen.last_at < FORGET_SECONDS}

    def _number_above(self, listed: Collection[Claim]) -> int:
        top = max(listed, key=lambda c: c.rank, default=None)
        if top is None:
            return 1
        return top.number if top.owner == self._me else min(top.number + 1, NUMBER_MAX)


def _fresh(claim: Claim, seen: Sighting, now: float, now_unix: float) -> bool:
    if now - seen.first_at >= STALE_SECONDS:
        return False
    return seen.beats or now_unix - claim.beat_unix <= STALE_SECONDS + CLOCK_ERROR_SECONDS_MAX
