"""One command → registry, waiting queue → reply.

`answer_now` answers what needs no waiting, straight from the books; `answer` does the rest. The address of a
worker leaves this module only from READY, with a fresh proof that its port answers, and with the client's
lease on disk; after every await each of the three is looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version

from broker.acquiring import Acquiring, granted, not_proved, timed_out
from broker.admission import HAND_OUT_ATTEMPTS_MAX, Admission
from broker.context import Context
from broker.core import protocol
from broker.core.errors import (
    BrokerError,
    CloudError,
    Denied,
    Draining,
    LeaseHasEnded,
    WorkerNotFound,
)
from broker.core.model import (
    Event,
    Lease,
    LeaseEnded,
    LeaseGranted,
    Worker,
)
from broker.core.policy import Reason, client_refusal
from broker.core.protocol import (
    Acquire,
    Command,
    Done,
    GetWorker,
    Help,
    ListAll,
    Malformed,
    Ping,
    Pools,
    Quit,
    Release,
    Renew,
    Status,
    Version,
    Watch,
)
from broker.core.replies import Versions
from broker.core.settings import PoolSettings
from broker.core.wish import ANYTHING, Wish
from broker.granting import NOT_HANDED_OUT, PROOF_GRACE_SECONDS, Granting, Prove
from broker.notices import Notices
from broker.operations import Operations
from broker.prospects import Prospects
from broker.sessions import Session
from broker.waiting import Waiter

HELP = protocol.line(f"commands: {', '.join(protocol.PARSERS)}; docs/protocol.md has what they say")
VERSION = Versions(version("compute-broker"), protocol.VERSION).line()
WARM_REPLIES_MAX = 10_000  # remembered replies; for a client beyond them the answer only takes the longer way


@dataclass(slots=True)
class Hold:
    """A lease by name: all connections of a client share it. `told`: one of them has been told of it,
    `told_alone`: as a worker of its own; `asking`: so many GET_WORKERs are about to be."""

    told: bool = False
    told_alone: bool = False
    asking: int = 0


@dataclass(frozen=True, slots=True)
class WarmReply:
    """The last answer a client got, good while the books and the proof have not moved."""

    generation: int
    lease: Lease
    proved_until: float
    reply: bytes


class Service:
    """Answers commands. `prove` tries a worker's port now, `scan` lists the clouds now, `demand` tells that
    somebody waits for a launch, and how many seconds at most, `pending` that it wants to hear how it stands,
    `reap` that somebody is to be terminated, `pools` answers POOLS."""

    def __init__(
        self,
        context: Context,
        *,
        prove: Prove,
        scan: Callable[[], Awaitable[None]],
        demand: Callable[[float], None],
        reap: Callable[[], None],
        pending: Callable[[], None],
        prospects: Prospects,
        new_id: Callable[[], str],
        pools: Callable[[], list[dict[str, object]]],
    ) -> None:
        self._context = context
        self._registry = context.registry
        self._granting = Granting(context, prove=prove, reap=reap, new_id=new_id)
        self._admission = Admission(context)
        self._acquiring = Acquiring(
            context, self._admission, self._granting, prospects, demand=demand, pending=pending
        )
        self._notices = Notices(context.registry)
        self._bound: dict[str, Session] = {}  # lease id → the connection it lives as long as
        self._prospects = prospects
        self._operations = Operations(context, scan=scan, reap=reap)
        self._demand = demand
        self._reap = reap
        self._new_id = new_id
        self._pools = pools
        self._now = context.clock.monotonic
        self._warm: dict[str, WarmReply] = {}
        self._holds: dict[str, Hold] = {}  # of GET_WORKER and PING, by lease id

    # --- commands ----------------------------------------------------------------------------------

    def warm(self, client: str, now: float) -> bytes | None:
        """The reply to a plain GET_WORKER of a client that was served a moment ago, or None."""
        hit = self._warm.get(client)
        if hit is None or hit.generation != self._registry.generation or now > hit.proved_until:
            return None
        self._registry.renew(hit.lease, now)
        return hit.reply

    def answer_now(self, command: Command, peer: str) -> bytes | None:
        """The reply, when it can be given without waiting; otherwise None, and nothing has changed."""
        try:
            match command:
                case GetWorker(pool=None, cores=None, type=None, region=None, exclusive=False):
                    return self.warm(command.client or peer, self._now())
                case Malformed():
                    return protocol.error_line(command.error)
                case Ping() if self._certain_of(command.address):
                    return self._ping_now(command, command.client or peer)
                case Release() if self._certain_of(command.address):
                    return self._release(command, command.client or peer)
                case Renew() | Done() if self._certain_of_lease(command.lease):
                    return self._renew(command) if isinstance(command, Renew) else self._done(command)
                case Help():
                    return HELP
                case Version():
                    return VERSION
                case Quit():
                    return protocol.OK
                case Status() if any(cloud.recovered for cloud in self._context.clouds.all):
                    return self._operations.status()
                case Pools():
                    return protocol.json_line(self._pools())
                case _:
                    return None
        except BrokerError as error:
            return protocol.error_line(error)

    async def answer(self, command: Command, peer: str, session: Session) -> bytes:
        """The reply to any command, of one line or of several; what is to be said before it is said in the
        session. Raises nothing of ours: an error is a reply too."""
        try:
            now = self.answer_now(command, peer)
            return now if now is not None else await self._answer(command, peer, session)
        except BrokerError as error:
            return protocol.error_line(error)

    async def _answer(self, command: Command, peer: str, session: Session) -> bytes:
        match command:
            case Acquire():
                leases = await self._acquiring.acquire(command, command.client or peer, session.say)
                return self._acquired(leases, session)
            case Watch():
                self._notices.watch(command.client or peer, session)
                return protocol.OK
            case GetWorker():
                return await self._get_worker(command, command.client or peer)
            case Ping():
                if not self._certain_of(command.address):
                    await self._admission.recovered()
                return await self._ping(command, command.client or peer)
            case ListAll():
                return await self._operations.list_all()
            case protocol.TerminateAll():
                return await self._operations.terminate_all()
            case _:
                await self._admission.recovered()
                return self.answer_now(command, peer) or protocol.error_line(
                    CloudError("no answer; ask again")
                )

    def close(self) -> None:
        """The broker is going down: whoever waits hears it now, and nobody else starts to wait."""
        self._admission.closing = True
        for name in self._context.settings.pool:
            self._context.waiting.fail(name, Draining("the broker is restarting; ask again in a moment"))
        self._context.scanned.notify()  # whoever waits for the first scan hears it too

    def reloaded(self) -> None:
        """The settings have changed: no reply is given by the old ones."""
        self._warm.clear()
        self._registry.seats_changed()
        for name in self._context.settings.pool:
            self._granting.serve(name)

    def closed(self, session: Session) -> None:
        """The connection is over, and with it the leases that live as long as it does; but not when it is the
        broker that goes: its successor finds them on disk, and their clients may renew them."""
        session.closed = True
        self._notices.forget(session)
        bound = [lease for one in session.leases if (lease := self._registry.lease(one)) is not None]
        for one in session.leases:
            self._bound.pop(one, None)
        if bound and not self._admission.closing:
            for lease in bound:
                self._registry.renew(lease, self._now())  # it was in use until now
            self._granting.give_back(bound, "connection closed")

    def serve_groups(self, pool: str) -> None:
        """See Granting."""
        self._granting.serve_groups(pool)

    def heard(self, event: Event) -> None:
        """Keep the store, the queue and those who watch up with the books."""
        self._notices.heard(event)
        if isinstance(event, LeaseGranted) and not event.lease.acquired:
            told = event.lease.id in self._context.restored or event.lease.id in self._granting.pinged
            self._holds.setdefault(event.lease.id, Hold(told, told_alone=told and event.lease.exclusive))
        if isinstance(event, LeaseEnded):
            self._holds.pop(event.lease.id, None)
        if isinstance(event, LeaseEnded) and (session := self._bound.pop(event.lease.id, None)) is not None:
            session.leases.pop(event.lease.id, None)
        self._granting.heard(event)

    # --- GET_WORKER --------------------------------------------------------------------------------

    async def _get_worker(self, command: GetWorker, client: str) -> bytes:
        _, pool = self._admission.pool(command.pool)
        asked_at, wish = self._now(), Wish.of(command)
        deadline_at = asked_at + (pool.wait if command.wait is None else command.wait)
        name, pool = await self._admission.admit(command.pool, wish, deadline_at)
        deadline_at = asked_at + (pool.wait if command.wait is None else command.wait)
        exclusive = command.exclusive or pool.exclusive
        for _ in range(HAND_OUT_ATTEMPTS_MAX):
            _, pool = self._admission.pool(name)  # a reload may have removed it meanwhile
            self._context.require_charge_somewhere(name)
            waiter = Waiter(name, client, exclusive, wish, asked_at, _future())
            (lease,) = self._granting.take(waiter) or await self._wait(waiter, deadline_at)
            hold = self._holds.get(lease.id, Hold())
            hold.asking += 1
            worker: Worker | None = None
            try:
                worker = await self._granting.confirmed(lease, pool, deadline_at + PROOF_GRACE_SECONDS)
            finally:  # whatever went wrong, also when the client went away
                hold.asking -= 1
                hold.told |= worker is not None
                hold.told_alone |= worker is not None and exclusive
                self._let_go([lease])
            if worker is not None and worker.address is not None:
                reply = protocol.line(worker.address)
                if name == "default" and wish == ANYTHING and not command.exclusive:
                    self._remember(client, lease, pool, reply)
                return reply
            if self._now() >= deadline_at:
                raise not_proved(waiter, deadline_at)
        raise CloudError("workers are lost as fast as they become ready")

    async def _wait(self, waiter: Waiter, deadline_at: float) -> list[Lease]:
        if self._admission.closing:
            raise Draining
        waiting = self._context.waiting
        waiting.join(waiter)
        self._demand(max(0.0, deadline_at - self._now()))
        try:
            async with asyncio.timeout(max(0.0, deadline_at - self._now())):
                return await asyncio.shield(waiter.served)  # whoever waits is in the queue until it leaves
        except TimeoutError:
            leases = waiter.leases()  # served in the instant in which the time was over
            if leases:
                return leases
            raise timed_out(waiter, self._prospects, self._now()) from None
        except asyncio.CancelledError:
            waiting.leave(waiter)
            self._let_go(waiter.leases())  # served in the instant in which the client went away
            raise
        finally:
            waiting.leave(waiter)

    def _let_go(self, leases: Iterable[Lease]) -> None:
        """What was granted and not handed out ends. What somebody of that name has been told of stays, as it
        was told, and so does what a GET_WORKER on another connection is about to be told of."""
        for lease in leases:
            hold = self._holds.get(lease.id)
            if hold is None or hold.asking or self._context.waiting.is_served(lease.id):
                continue
            if not (hold.told or lease.id in self._granting.pinged):
                self._registry.end_lease(lease.worker_id, lease.key, NOT_HANDED_OUT, self._now())
            elif not hold.told_alone:
                self._share(lease)

    def _share(self, lease: Lease) -> None:
        """The client has asked for a worker of its own, in vain: others may share the one that it has."""
        current, worker = self._registry.lease(lease.id), self._registry.get(lease.worker_id)
        if current is None or worker is None or not current.exclusive:
            return
        if not self._context.pool_of(worker).exclusive:
            self._registry.share(lease.id, self._now())
            self._granting.serve(worker.pool)

    def _remember(self, client: str, lease: Lease, pool: PoolSettings, reply: bytes) -> None:
        if len(self._warm) >= WARM_REPLIES_MAX and client not in self._warm:
            del self._warm[next(iter(self._warm))]
        proved_until = self._registry.proved_at(lease.worker_id) + pool.readiness_max_age
        if pool.readiness != "tcp":
            proved_until = float("inf")
        self._warm[client] = WarmReply(self._registry.generation, lease, proved_until, reply)

    def _certain_of(self, address: str) -> bool:
        """Whether the books know what this address is. One dead region must not silence the others' PING."""
        return self._registry.by_address(address) is not None or self._context.clouds.recovered()

    # --- PING, RELEASE ---------------------------------------------------------------------

    def _ping_now(self, command: Ping, client: str) -> bytes | None:
        worker = self._held_worker(command.address)
        if worker is None:
            raise self._not_found()
        leases = self._registry.leases_of(worker.id, client)
        if not leases:
            return None
        for lease in leases:
            self._registry.renew(lease, self._now())
            self._tell(lease)
            self._granting.pinged.add(lease.id)
        return protocol.OK

    def _tell(self, lease: Lease) -> None:
        """The client has been told that the worker is its."""
        if (hold := self._holds.get(lease.id)) is not None:
            hold.told = True

    async def _ping(self, command: Ping, client: str) -> bytes:
        """A client without a lease uses the worker, so it gets one, unless somebody else has it alone."""
        if (
            own := self._ping_now(command, client)
        ) is not None:  # its own was not known before the first scan
            return own
        worker = self._held_worker(command.address)
        if worker is None:
            raise self._not_found()
        pool = self._context.pool_of(worker)
        if self._registry.full(worker.id):
            raise Denied(f"the worker has its leases_per_worker_max = {pool.leases_per_worker_max} clients")
        refusal = client_refusal(self._registry, worker.pool, pool, client)
        if refusal is not None:
            raise refusal
        lease = Lease(self._new_id(), worker.id, client, pool.idle_timeout, pool.exclusive)
        lease = self._registry.grant(lease, self._now())
        await self._granting.written(lease)
        self._tell(lease)
        self._context.require_charge(self._context.cloud_of(worker))
        return protocol.OK

    def _not_found(self) -> BrokerError:
        """There is no such worker; or nobody knows, and its client shall not let go of it."""
        unseen = self._context.unseen(self._context.clouds.all)
        return CloudError(unseen) if unseen else WorkerNotFound()

    def _release(self, command: Release, client: str) -> bytes:
        worker = self._held_worker(command.address)
        if worker is None:
            return protocol.OK
        now = self._now()
        self._registry.expire_leases(worker.id, now)
        if not command.force or self._is_protected(worker):
            for lease in self._registry.leases_of(worker.id, client):
                self._registry.end_lease(worker.id, lease.key, "released", now)
        # It is busy when a waiting client just got it. A protected one stays, whoever says what.
        wanted = self._registry.busy(worker.id) or self._granting.is_kept(worker)
        ends = command.force or not wanted
        if ends and not self._is_protected(worker):
            self._registry.drain(worker.id, Reason.RELEASED, now)
            self._reap()
        return protocol.OK

    def _is_protected(self, worker: Worker) -> bool:
        current = self._registry.get(worker.id)
        return current is not None and current.protected

    # --- RENEW, DONE, what ACQUIRE leaves behind -----------------------------------------------------

    def _renew(self, command: Renew) -> bytes:
        self._registry.renew(self._living(command.lease), self._now())
        return protocol.OK

    def _done(self, command: Done) -> bytes:
        lease = self._living(command.lease)
        self._registry.renew(lease, self._now())  # it was in use until now
        self._granting.give_back([lease], "done")
        return protocol.OK

    def _living(self, lease_id: str) -> Lease:
        """The lease of that id. An id that has ended, or never was, touches nobody's worker. Raises
        LeaseHasEnded, ReadOnly."""
        lease = self._registry.lease(lease_id)
        worker = None if lease is None else self._registry.get(lease.worker_id)
        for cloud in self._context.clouds.all if worker is None else (self._context.cloud_of(worker),):
            self._context.require_charge(cloud)
        if lease is None:
            raise LeaseHasEnded
        return lease

    def _certain_of_lease(self, lease_id: str) -> bool:
        """Whether the books know what became of it."""
        return self._registry.lease(lease_id) is not None or self._context.clouds.recovered()

    def _acquired(self, leases: list[Lease], session: Session) -> bytes:
        """The reply of an ACQUIRE, in the same step in which its leases were found to be good."""
        now, now_unix = self._now(), self._context.clock.wall()
        lines = []
        for lease in leases:
            worker = self._registry.get(lease.worker_id)
            assert worker is not None, "confirmed in this instant"
            self._registry.renew(lease, now)  # it begins when the client hears of it
            lines.append(granted(lease, worker, now_unix + lease.ttl_seconds, len(leases)).line())
            if lease.bound:
                session.leases[lease.id], self._bound[lease.id] = None, session
        if session.leases:
            session.lasts()
        return b"".join(lines)

    # --- inside ------------------------------------------------------------------------------------

    def _held_worker(self, address: str) -> Worker | None:
        """The worker at an address. Raises ReadOnly when it is another broker's, or may be."""
        worker = self._registry.by_address(address)
        for cloud in self._context.clouds.all if worker is None else (self._context.cloud_of(worker),):
            self._context.require_charge(cloud)
        return worker


def _future() -> asyncio.Future[list[Lease]]:
    return asyncio.get_running_loop().create_future()
