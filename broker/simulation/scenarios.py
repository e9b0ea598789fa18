"""The scenarios that have to be reached, and what shows that one was.

A scenario that never happened is not tested, so each is counted. `scene` names are counted by the Witness; a
scenario with two of them is reached when both are. The numbers are those of the list that the project started
from, up to STORMS_END; then come pools, leases and buying. What must hold in each is in
tests/simulation/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scenario:
    """One line of the list."""

    number: int
    title: str
    scenes: tuple[str, ...]

    def count(self, seen: Mapping[str, int]) -> int:
        """How often it was reached: what happens in several parts, as often as its rarest part."""
        return min(seen.get(scene, 0) for scene in self.scenes)


STORMS_END = 35
TWO_BROKERS = ("second broker refused", "second host stood by", "second host took over")
SCENARIOS = tuple(
    Scenario(number, title, tuple(scenes))
    for number, title, *scenes in (
        (1, "killed right after RunInstances", "killed right after a launch"),
        (2, "RunInstances answered, the answer lost", "launch answer lost"),
        (3, "tried again elsewhere after a failed launch", "launched elsewhere after a failure"),
        (4, "Describe does not show a new machine", "new machine not listed"),
        (5, "stale or short Describe at start-up", "outdated listing at the start"),
        (6, "Describe fails, or a later page of it", "listing failed", "later page failed"),
        (7, "1,000 clients at once, nothing warm", "crowd, shared", "crowd, exclusive"),
        (8, "client dies before it reads its answer", "client hung up"),
        (9, "a client asks as the reaper decides", "asked as the reaper decides"),
        (10, "one listing misses a busy worker", "busy worker not listed"),
        (11, "a worker nobody can classify", "unclassified machine"),
        (12, "the broker restarts under clients", "killed with leases"),
        (13, "worker dies between check and hand-out", "port silent as somebody asks"),
        (14, "rebalance and notice, or a notice twice", "rebalance recommended", "notice duplicated"),
        (15, "no notice, just gone", "reclaimed without notice"),
        (16, "running without an address", "running without an address"),
        (17, "pending for ever", "stuck pending"),
        (18, "shutting-down for ever", "stuck shutting-down"),
        (19, "throttled", "launch throttled", "terminate throttled"),
        (20, "no capacity", "no capacity"),
        (21, "image that dies at boot", "breaker opened"),
        (22, "two brokers with one id", *TWO_BROKERS),
        (23, "a terminate batch with a stale id", "terminate batch with an unknown id"),
        (24, "Terminate answered but not done", "terminate ignored"),
        (25, "an instance without our tag", "stranger"),
        (26, "credentials expire, the clock is off", "credentials expired", "clock skewed"),
        (27, "API down for 8 hours", "outage of 8 hours"),
        (28, "wall clock jumps", "wall clock jumped"),
        (29, "price missing", "price assumed"),
        (30, "reclaimed within the first hour", "reclaimed within the first hour"),
        (31, "budget reached", "budget reached"),
        (32, "disk full, store torn", "write failed on a full disk", "store torn"),
        (33, "SIGTERM or SIGKILL in mid-launch", "killed in mid-launch", "stopped in mid-launch"),
        (34, "10,000 idle connections", "10,000 idle connections"),
        (35, "flood without a command", "flood"),
        (36, "a warm schedule across daylight saving", "spare launched", "clocks were set under a schedule"),
        (37, "a fleet that is not complete", "fleet partial"),
        (38, "a machine more than was ordered", "fleet surplus"),
        (39, "refused again after a cool-down", "cool-down doubled"),
        (40, "a quota is reached", "quota refused"),
        (41, "spot fails, on-demand is bought", "fell back to on-demand"),
        (42, "and replaced when spot is back", "went back to spot"),
        (43, "spot is dearer than on-demand", "spot was dearer than on-demand"),
        (44, "a machine sold on the wrong market", "sold on the wrong market"),
        (45, "SIGHUP in mid-launch", "reloaded in mid-launch"),
        (46, "several workers acquired, or given up", "several workers at once", "several given up"),
        (47, "a lease ends with its connection", "lease ended with its connection"),
        (48, "1,000 clients queue for ten workers, some die", "crowd in a queue", "gave up in a queue"),
        (49, "a client that wants one machine type only", "served with a type of its own"),
        (50, "a worker is kept stopped, and started", "kept stopped", "started again"),
        (51, "a Stop, or a Start, that fails", "stop failed", "start came to nothing"),
        (52, "stopping for ever", "stuck stopping"),
        (53, "a restart finds stopped machines", "found stopped"),
        (54, "a person starts a stopped machine", "started outside"),
    )
)
