"""The cloud's clock, as far as its answers tell it: bills are written by that clock, not by ours.

An HTTP answer carries a Date in whole seconds, cut off, and it was written somewhere between the moment in
which the question left and the one in which the answer came in. So each answer says of the offset between the
cloud's clock and our monotonic one no more than that it lies within a second and the time of the journey;
where the answers of a while overlap, it lies in what all of them allow. The wall clock of this machine has
no part in it: it may jump by a day, and nobody is billed for that day.
"""

from __future__ import annotations

from dataclasses import dataclass

DATE_SECONDS = 1.0  # what a Date leaves open (RFC 9110, "Date/Time Formats")
DRIFT = 500e-6  # seconds a second: as fast as NTP may steer a clock (ntpd's limit), faster than quartz drifts


@dataclass(frozen=True, slots=True)
class Span:
    """A moment of which this much is known: seconds since 1970 on the cloud's clock, both ends included."""

    earliest_unix: float
    latest_unix: float


@dataclass(frozen=True, slots=True)
class CloudClock:
    """Cloud's clock minus monotonic clock, in seconds, as it was known at `at`."""

    offset_min: float
    offset_max: float
    at: float

    def unix(self, at: float) -> Span:
        """What the cloud's clock shows at a monotonic moment."""
        slack = abs(at - self.at) * DRIFT
        return Span(at + self.offset_min - slack, at + self.offset_max + slack)


def hear(clock: CloudClock | None, sent_at: float, received_at: float, date_unix: float) -> CloudClock:
    """The clock after one more answer. Where it contradicts the earlier ones, it counts and they do not:
    this machine was suspended, or somebody has set the cloud's clock."""
    heard = CloudClock(date_unix - received_at, date_unix + DATE_SECONDS - sent_at, received_at)
    if clock is None:
        return heard
    slack = abs(received_at - clock.at) * DRIFT
    low, high = (
        max(heard.offset_min, clock.offset_min - slack),
        min(heard.offset_max, clock.offset_max + slack),
    )
    return CloudClock(low, high, received_at) if low <= high else heard
