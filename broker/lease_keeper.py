"""What keeps the leases of a block while it runs: from a thread, or from a task.

On the connection that leases are tied to, a keeper watches, and so hears what happens to them. Every minute,
at once when the connection breaks, and when a notice says that a worker goes, RENEW asks what is still held:
a broker that was started again knows its leases but not the connection, and then RENEW alone keeps them. The
keeper then watches on a connection that no lease is tied to. WATCH comes before RENEW: what happened before
the one shows in the answer to the other.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from broker import dserv, wire
from broker.client import Asker, AsyncClient, Client
from broker.core.errors import BrokerError, LeaseHasEnded
from broker.core.replies import Granted, Notice
from broker.lease_errands import NoticeReader
from broker.lost import AsyncLost, Lost

RENEW_AGAIN_SECONDS = 10.0  # after a renewal that failed
WATCH_AGAIN_SECONDS = 10.0  # after having watched again: something may close each connection at once
RENEWALS_PER_TTL = 3  # at least: one may fail and the next be late
RENEW_SECONDS_MIN = 1.0  # the shortest ttl there is; a clock that is off must not make it a hot loop
ENDING = ("drain", "lost")  # the notices after which a lease may have ended: RENEW tells

T = TypeVar("T")
OnNotice = Callable[[Notice], object]


# --- one lease in a block ----------------------------------------------------------------------------------


class _Held:
    """A lease in a block: `granted` is all that the broker said of it, `client` the name it is held under,
    and `renew_error` why the last renewal failed."""

    lost: Lost | AsyncLost

    def __init__(self, asker: Asker, granted: Granted) -> None:
        self.granted = granted
        self.id = granted.id
        self.address = granted.address
        self.port = granted.port
        self.client = asker.name
        self.renew_error: BrokerError | None = None

    def __repr__(self) -> str:
        return f"<lease {self.id} of worker {wire.place(self.address, self.port)} held by {self.client}>"


class HeldLease(_Held):
    """A lease in a `with` block. `lost` is a threading.Event that is true when it is set."""

    def __init__(self, asker: Client, granted: Granted) -> None:
        super().__init__(asker, granted)
        self.lost = Lost()

    def remote_eval(self, script: str, timeout: float = dserv.EVAL_SECONDS) -> str:
        """The result of a Tcl script on the worker: see `dserv.remote_eval`."""
        return dserv.remote_eval(self.address, script, self.port, timeout)


class AsyncHeldLease(_Held):
    """A lease in an `async with` block. `lost` is an asyncio.Event that is true when it is set."""

    def __init__(self, asker: AsyncClient, granted: Granted) -> None:
        super().__init__(asker, granted)
        self.lost = AsyncLost()

    async def remote_eval(self, script: str, timeout: float = dserv.EVAL_SECONDS) -> str:
        """The result of a Tcl script on the worker: see `dserv.remote_eval`."""
        return await dserv.aremote_eval(self.address, script, self.port, timeout)


def often_enough(renew_seconds: float, granted: Granted, now_unix: float) -> float:
    """Seconds between renewals: as asked for, or fewer where the lease does not last that long.

    How long it lasts is its broker's word and this machine's clock: one that is far off counts for nothing.
    """
    left_seconds = granted.expires_unix - now_unix
    if left_seconds <= 0:
        return renew_seconds
    return min(renew_seconds, max(left_seconds / RENEWALS_PER_TTL, RENEW_SECONDS_MIN))


# --- what keeps them ----------------------------------------------------------------------

L = TypeVar("L", bound=_Held)


class _Keeping(ABC, Generic[L]):
    """What both keepers know: which leases are still held, and what a notice or a renewal says of them."""

    def __init__(
        self,
        leases: list[L],
        sock: socket.socket | None,
        renew_seconds: float,
        on_lost: Callable[[L], object] | None,
        on_notice: OnNotice | None,
    ) -> None:
        self.leases = leases
        self._sock = sock
        self._renew_seconds = often_enough(renew_seconds, leases[0].granted, time.time())
        self._on_lost = on_lost
        self._on_notice = on_notice
        self._reader = NoticeReader()
        self._watches = sock is not None
        self._watch_again_at = float("-inf")
        self._ending = False
        self._pid = os.getpid()

    def _held(self) -> list[L]:
        return [lease for lease in self.leases if not lease.lost]

    def _tell(self, data: bytes) -> bool:
        """Tell the notices about these leases in `data`. Returns whether one of them may have ended.

        Raises OSError and BrokerError when the connection is of no more use.
        """
        ids = {lease.id for lease in self.leases}
        notices = [notice for notice in self._reader.receive(data) if notice.lease in ids]
        for notice in notices:
            self._call(self._on_notice, notice)
        return any(notice.what in ENDING for notice in notices)

    @abstractmethod
    def _call(self, function: Callable[[T], object] | None, argument: T) -> None:
        """Call a function of the caller's. What it raises is shown, and does not end the keeping."""

    def _renewed(self, held: list[L], outcomes: list[BrokerError | None]) -> list[L]:
        """Take in how a renewal went. Returns the leases that are lost."""
        lost = []
        for lease, error in zip(held, outcomes, strict=True):
            lease.renew_error = error
            if isinstance(error, LeaseHasEnded):
                lease.lost.set()
                lost.append(lease)
        return lost

    def _pause(self) -> float:
        """Seconds until the next renewal, and the next attempt to watch."""
        failed = any(lease.renew_error for lease in self._held())
        blind = self._watches and self._sock is None
        again_seconds = (
            RENEW_AGAIN_SECONDS if failed else WATCH_AGAIN_SECONDS if blind else self._renew_seconds
        )
        return min(self._renew_seconds, again_seconds)

    def _is_to_watch_again(self) -> bool:
        """Whether it is time for a new connection that tells notices."""
        return self._watches and self._sock is None and time.monotonic() >= self._watch_again_at

    def _watches_again(self, data: bytes, sock: socket.socket) -> None:
        """Take in such a connection, and its first bytes. A RENEW follows: what has ended shows there."""
        self._watch_again_at = time.monotonic() + WATCH_AGAIN_SECONDS
        self._reader, self._sock = NoticeReader(), sock
        if data:
            self._tell(data)

    def _drop(self) -> None:
        """The connection is of no more use; closed, it ends the leases that are tied to it."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _inherited(self) -> bool:
        """Whether this is a forked child, which leaves the block as well: the leases are its parent's."""
        return os.getpid() != self._pid


class Keeper(_Keeping[HeldLease]):
    """Keeps leases from a thread."""

    def __init__(
        self,
        asker: Client,
        granted: list[Granted],
        sock: socket.socket | None,
        renew_seconds: float,
        on_lost: Callable[[HeldLease], object] | None,
        on_notice: OnNotice | None,
    ) -> None:
        leases = [HeldLease(asker, lease) for lease in granted]
        super().__init__(leases, sock, renew_seconds, on_lost, on_notice)
        self._asker = asker
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"keep {leases[0].id}", daemon=True)

    def start(self) -> None:
        """Returns when notices are told: whatever happens to the leases in the block is heard."""
        if self._sock is not None:
            with suppress(OSError, BrokerError):  # the thread hears of it too
                self._sock.settimeout(self._asker.timeout)
                self._sock.sendall(self._asker.watch_line())
                self._ending = self._tell(self._sock.recv(wire.CHUNK_BYTES_MAX))
        self._thread.start()

    def _keep(self) -> None:
        seconds = 0.0 if self._ending else self._renew_seconds
        while self._held() and not self._over.is_set():
            self._listen(seconds)
            if not self._over.is_set():
                self._watch_again()
            if not self._over.is_set():
                self._renew()
                seconds = self._pause()

    def _listen(self, seconds: float) -> None:
        """Hear notices for so many seconds, or until the block is over or it is time for a renewal."""
        ends_at = time.monotonic() + seconds
        while self._sock is not None and (left := ends_at - time.monotonic()) > 0:
            try:
                self._sock.settimeout(left)
                if self._tell(self._sock.recv(wire.CHUNK_BYTES_MAX)):
                    return
            except (OSError, BrokerError) as trouble:
                if not wire.is_over(trouble) and not self._over.is_set():
                    self._drop()
                return
        if self._sock is None and seconds > 0:
            self._over.wait(max(0.0, ends_at - time.monotonic()))

    def _watch_again(self) -> None:
        if self._is_to_watch_again():
            with suppress(BrokerError):  # a renewal fails as well and says why; later is time enough
                self._watches_again(*self._asker.watch_and_stay())

    def _renew(self) -> None:
        held = self._held()
        outcomes: list[BrokerError | None]
        try:
            outcomes = self._asker.renew_all([lease.id for lease in held])
        except BrokerError as error:
            outcomes = [error] * len(held)
        if self._over.is_set():  # DONE may have come before RENEW: then they are given back, not lost
            return
        for lease in self._renewed(held, outcomes):
            self._call(self._on_lost, lease)

    def _call(self, function: Callable[[T], object] | None, argument: T) -> None:
        """Call a function of the caller's. What it raises is shown, and does not end the keeping."""
        try:
            if function is not None:
                function(argument)
        except Exception:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self._thread)))

    def leave(self, failure: BaseException | None) -> None:
        """Give the leases back. Raises BrokerUnreachable; notes it instead when the block itself failed."""
        if self._inherited():
            self._drop()
            return
        self._over.set()
        try:
            _raise_unless_ended(self._asker.done_all([lease.id for lease in self._held()]))
        except BrokerError as error:
            _raise_or_note(error, failure)
        finally:
            self._hang_up()

    def _hang_up(self) -> None:
        sock = self._sock
        if sock is not None:
            with suppress(OSError):  # wakes the thread
                sock.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(self._asker.timeout)  # a renewal takes no longer
        self._drop()


class AsyncKeeper(_Keeping[AsyncHeldLease]):
    """Keeps leases from a task."""

    def __init__(
        self,
        asker: AsyncClient,
        granted: list[Granted],
        sock: socket.socket | None,
        renew_seconds: float,
        on_lost: Callable[[AsyncHeldLease], object] | None,
        on_notice: OnNotice | None,
    ) -> None:
        leases = [AsyncHeldLease(asker, lease) for lease in granted]
        super().__init__(leases, sock, renew_seconds, on_lost, on_notice)
        self._asker = asker
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when notices are told: whatever happens to the leases in the block is heard."""
        if self._sock is not None:
            loop = asyncio.get_running_loop()
            with suppress(OSError, BrokerError):  # the task hears of it too; a TimeoutError is an OSError
                async with asyncio.timeout(self._asker.timeout):
                    await loop.sock_sendall(self._sock, self._asker.watch_line())
                    self._ending = self._tell(await loop.sock_recv(self._sock, wire.CHUNK_BYTES_MAX))
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.leases[0].id}")

    async def _keep(self) -> None:
        seconds = 0.0 if self._ending else self._renew_seconds
        while self._held():  # `leave` cancels it
            await self._listen(seconds)
            await self._watch_again()
            await self._renew()
            seconds = self._pause()

    async def _listen(self, seconds: float) -> None:
        """Hear notices for so many seconds, or until it is time for a renewal."""
        if self._sock is None:
            await asyncio.sleep(seconds)
            return
        loop = asyncio.get_running_loop()
        ending = False
        try:
            async with asyncio.timeout(seconds):
                while not ending:
                    ending = self._tell(await loop.sock_recv(self._sock, wire.CHUNK_BYTES_MAX))
        except (OSError, BrokerError) as trouble:
            if not wire.is_over(trouble):
                self._drop()

    async def _watch_again(self) -> None:
        if self._is_to_watch_again():
            with suppress(BrokerError):  # a renewal fails as well and says why; later is time enough
                self._watches_again(*await self._asker.watch_and_stay())

    async def _renew(self) -> None:
        held = self._held()
        outcomes: list[BrokerError | None]
        try:
            outcomes = await self._asker.renew_all([lease.id for lease in held])
        except BrokerError as error:
            outcomes = [error] * len(held)
        for lease in self._renewed(held, outcomes):
            self._call(self._on_lost, lease)

    def _call(self, function: Callable[[T], object] | None, argument: T) -> None:
        """Call a function of the caller's soon; what it raises goes to the loop's exception handler."""
        if function is not None:
            asyncio.get_running_loop().call_soon(function, argument)

    async def leave(self, failure: BaseException | None) -> None:
        """Give the leases back. Raises BrokerUnreachable; notes it instead when the block itself failed."""
        if self._inherited():
            self._drop()
            return
        try:  # a second cancellation ends the waiting, not the giving back
            await asyncio.shield(asyncio.create_task(self._close()))
        except BrokerError as error:
            _raise_or_note(error, failure)

    async def _close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        try:
            _raise_unless_ended(await self._asker.done_all([lease.id for lease in self._held()]))
        finally:
            self._drop()


def _raise_unless_ended(outcomes: list[BrokerError | None]) -> None:
    """Raise the first error, but for a lease that had ended before it was given back."""
    for error in outcomes:
        if error is not None and not isinstance(error, LeaseHasEnded):
            raise error


def _raise_or_note(error: BrokerError, failure: BaseException | None) -> None:
    """Raise the error of a DONE; if the block itself failed, note it there instead."""
    if failure is None:
        raise error
    failure.add_note(f"Nor could the leases be given back: {error}")
