"""An asyncio loop in a thread of its own, driven from plain test code.

The fakes of a cloud must keep answering while a test blocks or while the loop under test is busy, so
they do not share a loop with either. `call` is the one way in: it carries a coroutine over, waits a
bounded time and hands back its result or its error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CANCEL_PASSES_MAX = 10  # a cancelled task may start another on its way out, hardly ten in a row
CALL_SECONDS_MAX = 30.0  # nothing carried over to a fake's loop may take longer: a test must not hang


class LoopThread:
    """Owns one event loop; `start` and `stop` are paired by whoever owns this."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancels what still runs on the loop, then ends the thread. A second stop does nothing."""
        if not self.is_running:
            return
        self.call(_cancel_all_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_SECONDS_MAX)
        self._loop.close()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_SECONDS_MAX)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


async def _cancel_all_others() -> None:
    for _ in range(CANCEL_PASSES_MAX):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # a transport that was closed lets go of its socket one turn later
        if not others:
            return
