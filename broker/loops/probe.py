"""BOOTING → READY, READY → SUSPECT and back: who really answers on the worker port.

Also the proof at hand-out: `prove` tries a worker now, once for everybody who asks in the same moment.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress

from broker.context import Context
from broker.core.deadlines import Deadlines
from broker.core.errors import LimitReached
from broker.core.model import Event, Worker, WorkerChanged, WorkerSeen, WorkerState

CONNECT_SECONDS_MAX = 4.0  # a SYN lost twice still gets through (1 s + 2 s retransmission)
PROBES_AT_ONCE_MAX = 50  # sockets, not machines, are what runs out first
BOOTING_INTERVAL_SHARE = 0.05  # of its age: looking costs nobody more than a twentieth of the boot
BOOTING_INTERVAL_MIN, BOOTING_INTERVAL_MAX = 0.05, 1.0
SUSPECT_INTERVAL_SHARE = 0.05  # of its silence: one that has been silent for long is looked at less often
SUSPECT_INTERVAL_MIN, SUSPECT_INTERVAL_MAX = 2.0, 30.0
READY_INTERVAL = 30.0
TRIES = 2  # one lost packet must not cost a second machine

WATCHED = (WorkerState.BOOTING, WorkerState.READY, WorkerState.SUSPECT)

Connect = Callable[[str, int], Awaitable[bool]]


async def connects(address: str, port: int) -> bool:
    """Whether something accepts a TCP connection there within CONNECT_SECONDS_MAX. Raises LimitReached."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            _, writer = await asyncio.open_connection(address, port)
    except OSError as error:  # TimeoutError is one
        if error.errno in (errno.EMFILE, errno.ENFILE):  # our trouble: it says nothing of the worker
            raise LimitReached("the broker has no file descriptors left; raise its LimitNOFILE") from None
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


class ProbeLoop:
    """See the module. `connect` is the network: address, port → whether somebody accepts.

    Each look is a task of its own, and `wake` has the loop tick when one is over: a silent worker, which
    takes seconds to give up on, holds up nobody else's readiness.
    """

    name = "probe"

    def __init__(self, context: Context, wake: Callable[[], None], connect: Connect = connects) -> None:
        self._context = context
        self._registry = context.registry
        self._wake = wake
        self._connect = connect
        self._deadlines = Deadlines()  # of those that are not being looked at
        self._all_at = context.now()  # when to make sure that nobody was forgotten
        self._places = asyncio.Semaphore(PROBES_AT_ONCE_MAX)
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._proving: dict[str, asyncio.Task[bool]] = {}

    async def tick(self) -> float | None:
        now = self._context.now()
        if now >= self._all_at:
            self._all_at = now + READY_INTERVAL
            for worker in self._registry.in_state(*WATCHED):
                self._watch(worker)
        for worker_id in self._deadlines.due(now):
            due = self._registry.get(worker_id)
            if due is not None and _is_watched(due):
                task = self._looking[due.id] = asyncio.create_task(self._look(due))
                task.add_done_callback(lambda done: self._wake())
        next_at = self._deadlines.next_at()
        return next_at if next_at is None else min(next_at, self._all_at)

    def heard(self, event: Event) -> None:
        """A new state, a new pace; and whoever has just got an address can be looked at."""
        match event:
            case WorkerChanged(worker=worker):
                self._deadlines.drop(worker.id)
                self._watch(worker)
            case WorkerSeen(worker=worker):
                self._watch(worker)

    def _watch(self, worker: Worker) -> None:
        if _is_watched(worker) and worker.id not in self._looking and worker.id not in self._deadlines:
            self._deadlines.set(worker.id, self._first_look_at(worker))

    async def prove(self, worker: Worker) -> bool:
        """Try the worker now. A worker that fails becomes SUSPECT. Shared by everybody who asks meanwhile."""
        task = self._proving.get(worker.id)
        if task is None:
            task = self._proving[worker.id] = asyncio.create_task(self._try(worker, TRIES))
            task.add_done_callback(lambda done: self._proving.pop(worker.id, None))
        return await asyncio.shield(task)

    async def _look(self, worker: Worker) -> None:
        try:
            async with self._places:
                with suppress(LimitReached):
                    await self._try(worker, TRIES if worker.state is WorkerState.READY else 1)
        finally:
            del self._looking[worker.id]
            after = self._registry.get(worker.id)
            if after is not None and _is_watched(after):
                self._deadlines.set(after.id, self._context.now() + self._interval(after))

    def _first_look_at(self, worker: Worker) -> float:
        """A booting worker is looked at at once; the others were, when they came into their state."""
        booting = worker.state is WorkerState.BOOTING
        return self._context.now() if booting else worker.since_at + self._interval(worker)

    def _interval(self, worker: Worker) -> float:
        match worker.state:
            case WorkerState.BOOTING:
                share = BOOTING_INTERVAL_SHARE * (self._context.now() - worker.boot_began_at)
                return min(max(share, BOOTING_INTERVAL_MIN), BOOTING_INTERVAL_MAX)
            case WorkerState.SUSPECT:
                silent_seconds = self._context.now() - worker.since_at
                share = SUSPECT_INTERVAL_SHARE * silent_seconds
                return min(max(share, SUSPECT_INTERVAL_MIN), SUSPECT_INTERVAL_MAX)
            case _:
                return READY_INTERVAL

    async def _try(self, worker: Worker, tries: int) -> bool:
        answers = await self._answers(worker, tries)
        after = self._registry.get(worker.id)  # much can happen while a connection is tried
        if after is None or after.address != worker.address or not _can_be_ready(after):
            return False
        now = self._context.now()
        if answers and after.state in (WorkerState.BOOTING, WorkerState.READY, WorkerState.SUSPECT):
            self._registry.ready(after.id, now)
        elif not answers and after.state is WorkerState.READY:
            self._registry.suspect(after.id, "the worker port does not answer", now)
        return answers and after.state is not WorkerState.DRAINING

    async def _answers(self, worker: Worker, tries: int) -> bool:
        if self._context.pool_of(worker).readiness == "running":
            return True  # `_can_be_ready` has looked: the cloud says that it runs, and where
        for _ in range(tries):
            if worker.address is not None and await self._connect(worker.address, worker.port):
                return True
        return False


def _is_watched(worker: Worker) -> bool:
    return worker.state in WATCHED and _can_be_ready(worker)


def _can_be_ready(worker: Worker) -> bool:
    return bool(worker.address and worker.running and not worker.standing_notice)
