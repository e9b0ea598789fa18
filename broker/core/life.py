"""The life of a worker: which step leads from which state to which. A literal table, and nothing else."""

from __future__ import annotations

from enum import StrEnum

from broker.core.model import WorkerState

S = WorkerState


class Step(StrEnum):
    """What can happen to a worker."""

    ORDER = "order is on disk"
    ADOPT = "a machine with our tag has no entry"
    LAUNCH = "instance id known"
    REFUSE = "refused, or never launched"
    SHOW_READY = "address known and readiness shown"
    DOUBT = "probe failed, or a notice"
    STOP = "to be kept stopped"
    ADOPT_STOPPING = "a stopping machine with our tag has no entry"
    ADOPT_STOPPED = "a stopped machine with our tag has no entry"
    HALT = "the cloud says stopped"
    START = "Start follows, or the cloud says running"
    DRAIN = "reap, release, boot failed"
    TERMINATE = "Terminate sent"
    GO = "the cloud says terminated"


# A booting worker may be drained for any reason, not only for a failed boot: an operator who says
# TERMINATE_ALL means the machine that is still starting as well.
LIFE: dict[tuple[WorkerState | None, Step], WorkerState] = {
    (None, Step.ORDER): S.ORDERED,
    (None, Step.ADOPT): S.BOOTING,
    (None, Step.ADOPT_STOPPING): S.STOPPING,
    (None, Step.ADOPT_STOPPED): S.STOPPED,
    (S.ORDERED, Step.LAUNCH): S.BOOTING,
    (S.ORDERED, Step.REFUSE): S.GONE,
    (S.BOOTING, Step.SHOW_READY): S.READY,
    (S.BOOTING, Step.HALT): S.STOPPED,
    (S.BOOTING, Step.DRAIN): S.DRAINING,
    (S.BOOTING, Step.GO): S.GONE,
    (S.READY, Step.DOUBT): S.SUSPECT,
    (S.READY, Step.STOP): S.STOPPING,
    (S.READY, Step.DRAIN): S.DRAINING,
    (S.READY, Step.GO): S.GONE,
    (S.SUSPECT, Step.SHOW_READY): S.READY,
    (S.SUSPECT, Step.DRAIN): S.DRAINING,
    (S.SUSPECT, Step.GO): S.GONE,
    (S.STOPPING, Step.HALT): S.STOPPED,
    (S.STOPPING, Step.DRAIN): S.DRAINING,
    (S.STOPPING, Step.GO): S.GONE,
    (S.STOPPED, Step.START): S.BOOTING,
    (S.STOPPED, Step.DRAIN): S.DRAINING,
    (S.STOPPED, Step.GO): S.GONE,
    (S.DRAINING, Step.TERMINATE): S.TERMINATING,
    (S.DRAINING, Step.GO): S.GONE,
    (S.TERMINATING, Step.GO): S.GONE,
}

USABLE = frozenset({S.BOOTING, S.READY, S.SUSPECT})  # states in which a client's hold on a worker counts
LIVING = USABLE | {S.STOPPING, S.STOPPED}  # has a machine that is not on its way out
BOOKED = frozenset(S) - {S.GONE}
COUNTED = BOOKED - {S.STOPPED}  # what counts against the caps: a stopped machine costs its disk alone
