"""NOTICE lines: whoever watches hears when a worker that it holds is about to go, or has gone."""

from __future__ import annotations

from broker.core.model import Event, Lease, LeaseEnded, Worker, WorkerChanged, WorkerState
from broker.core.policy import POOL_REMOVED, RETIRED
from broker.core.registry import Registry
from broker.core.replies import Notice
from broker.sessions import Session

RECLAIM_SECONDS = 120.0  # AWS: EC2 User Guide, "Spot Instance interruption notices": two minutes before


class Notices:
    """See the module. An observer of events."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._sessions: dict[str, dict[Session, None]] = {}  # by client

    def watch(self, client: str, session: Session) -> None:
        """Tell this connection about that client's workers; what it watched before is over."""
        self.forget(session)
        session.watching = client
        self._sessions.setdefault(client, {})[session] = None
        session.lasts()

    def forget(self, session: Session) -> None:
        """Tell this connection nothing more."""
        if session.watching is None:
            return
        sessions = self._sessions[session.watching]
        del sessions[session]
        if not sessions:
            del self._sessions[session.watching]
        session.watching = None

    def heard(self, event: Event) -> None:
        match event:
            case WorkerChanged(worker=worker) if worker.state is WorkerState.SUSPECT and self._sessions:
                for lease in self._registry.leases(worker.id):
                    self._tell(lease.client, _doubt(worker, lease))
            case LeaseEnded(lease=lease, worker=worker) if worker.state is WorkerState.DRAINING:
                self._tell(lease.client, _notice("drain", worker, lease, reason=worker.reason))
            case LeaseEnded(lease=lease, worker=worker) if worker.state is WorkerState.GONE:
                self._tell(lease.client, _notice("lost", worker, lease))

    def _tell(self, client: str, notice: Notice) -> None:
        for session in tuple(self._sessions.get(client, ())):
            session.say(notice.line())


def _doubt(worker: Worker, lease: Lease) -> Notice:
    """A worker that is not handed out any more: for its age or its pool's end, on the cloud's notice, or for
    its silence."""
    if worker.standing_notice in (RETIRED, POOL_REMOVED):
        return _notice("retire", worker, lease)
    if worker.standing_notice:
        return _notice("interrupt", worker, lease, RECLAIM_SECONDS)
    return _notice("lost", worker, lease)


def _notice(what: str, worker: Worker, lease: Lease, in_seconds: float = 0.0, reason: str = "") -> Notice:
    return Notice(what, worker.address, lease.id, in_seconds, reason=reason)
