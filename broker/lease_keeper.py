"""What keeps the leases of a block while it runs: from a thread, or from a task.

On the connection that leases are tied to, a keeper watches, and so hears what happens to them. Every minute,
at once when the connection breaks, and when a notice says that a worker goes, RENEW asks what is still held:
a broker that was started again knows its leases but not the connection, and then RENEW alone keeps them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from broker import dserv, wire
from broker.client import Asker, AsyncClient, Client
from broker.core.errors import BrokerError, Denied
from broker.core.lease_lines import Granted, Notice
from broker.lease_errands import NoticeReader
from broker.lost import AsyncLost, Lost

RENEW_AGAIN_SECONDS = 10.0  # after a renewal that failed
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


# --- what keeps them ----------------------------------------------------------------------

L = TypeVar("L", bound=_Held)


class _Keeping(Generic[L]):
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
        self._renew_seconds = renew_seconds
        self._on_lost = on_lost
        self._on_notice = on_notice
        self._reader = NoticeReader()
        self._pid = os.getpid()

    def _held(self) -> list[L]:
        return [lease for lease in self.leases if not lease.lost]

    def _heard(self, data: bytes) -> tuple[list[Notice], bool]:
        """The notices about these leases in `data`, and whether one of them may have ended.

        Raises OSError and BrokerError when the connection is of no more use.
        """
        ids = {lease.id for lease in self.leases}
        notices = [notice for notice in self._reader.receive(data) if notice.lease in ids]
        return notices, any(notice.what in ENDING for notice in notices)

    def _renewed(self, held: list[L], outcomes: list[BrokerError | None]) -> list[L]:
        """Take in how a renewal went. Returns the leases that are lost."""
        lost = []
        for lease, error in zip(held, outcomes, strict=True):
            lease.renew_error = error
            if isinstance(error, Denied):
                lease.lost.set()
                lost.append(lease)
        return lost

    def _pause(self) -> float:
        """Seconds until the next renewal."""
        failed = any(lease.renew_error for lease in self._held())
        return min(self._renew_seconds, RENEW_AGAIN_SECONDS) if failed else self._renew_seconds

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
        if self._sock is not None:
            with suppress(OSError):  # the thread hears of it too
                self._sock.sendall(self._asker.watch_line())
        self._thread.start()

    def _keep(self) -> None:
        seconds = self._renew_seconds
        while self._held() and not self._over.is_set():
            self._listen(seconds)
            if not self._over.is_set():
                self._renew()
                seconds = self._pause()

    def _listen(self, seconds: float) -> None:
        """Hear notices for so many seconds, or until the block is over or it is time for a renewal."""
        ends_at = time.monotonic() + seconds
        while self._sock is not None and (left := ends_at - time.monotonic()) > 0:
            try:
                self._sock.settimeout(left)
                notices, ending = self._heard(self._sock.recv(wire.CHUNK_BYTES_MAX))
            except (OSError, BrokerError) as trouble:
                if not wire.is_over(trouble) and not self._over.is_set():
                    self._drop()
                return
            for notice in notices:
                self._call(self._on_notice, notice)
            if ending:
                return
        if self._sock is None and seconds > 0:
            self._over.wait(max(0.0, ends_at - time.monotonic()))

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
            _tell(error, failure)
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

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.leases[0].id}")

    async def _keep(self) -> None:
        if self._sock is not None:
            with suppress(OSError):  # `_listen` hears of it too
                await asyncio.get_running_loop().sock_sendall(self._sock, self._asker.watch_line())
        seconds = self._renew_seconds
        while self._held():  # `leave` cancels it
            await self._listen(seconds)
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
                    data = await loop.sock_recv(self._sock, wire.CHUNK_BYTES_MAX)
                    notices, ending = self._heard(data)
                    for notice in notices:
                        self._call(self._on_notice, notice)
        except (OSError, BrokerError) as trouble:
            if not wire.is_over(trouble):
                self._drop()

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
            _tell(error, failure)

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
        if error is not None and not isinstance(error, Denied):
            raise error


def _tell(error: BrokerError, failure: BaseException | None) -> None:
    """Raise the error of a DONE; if the block itself failed, note it there instead."""
    if failure is None:
        raise error
    failure.add_note(f"Nor could the leases be given back: {error}")
