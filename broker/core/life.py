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
    DRAIN = "reap, release, boot failed"
    TERMINATE = "Terminate sent"
    GO = "the cloud says terminated"


# A booting worker may be drained for any reason, not only for a failed boot: an operator who says
# TERMINATE_ALL means the machine that is still starting as well.
LIFE: dict[tuple[WorkerState | None, Step], WorkerState] = {
    (None, Step.ORDER): S.ORDERED,
    (None, Step.ADOPT): S.BOOTING,
    (S.ORDERED, Step.LAUNCH): S.BOOTING,
    (S.ORDERED, Step.REFUSE): S.GONE,
    (S.BOOTING, Step.SHOW_READY): S.READY,
    (S.BOOTING, Step.DRAIN): S.DRAINING,
    (S.BOOTING, Step.GO): S.GONE,
    (S.READY, Step.DOUBT): S.SUSPECT,
    (S.READY, Step.DRAIN): S.DRAINING,
    (S.READY, Step.GO): S.GONE,
    (S.SUSPECT, Step.SHOW_READY): S.READY,
    (S.SUSPECT, Step.DRAIN): S.DRAINING,
    (S.SUSPECT, Step.GO): S.GONE,
    (S.DRAINING, Step.TERMINATE): S.TERMINATING,
    (S.DRAINING, Step.GO): S.GONE,
    (S.TERMINATING, Step.GO): S.GONE,
}

USABLE = frozenset({S.BOOTING, S.READY, S.SUSPECT})  # states in which a client's hold on a worker counts
BOOKED = frozenset(S) - {S.GONE}
