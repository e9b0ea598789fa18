"""Keeps a loop alive: runs its tick when it is due or woken, and survives whatever the tick raises.

A tick that fails is reported, counted and tried again after a growing pause; it never ends the loop. A tick
that hangs is what `stuck` is for: /healthz asks it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from broker.clock import Clock
from broker.core.backoff import doubled

PAUSE_SECONDS_MIN = 1.0
PAUSE_SECONDS_MAX = 60.0
STUCK_SECONDS = 180.0  # no tick takes this long: every call in one has a shorter timeout of its own


class Loop(Protocol):
    """What `LoopRunner` runs."""

    name: str

    async def tick(self) -> float | None:
        """Do what is due. Returns the monotonic time at which to run again, None for "when woken"."""


class LoopRunner:
    """One loop and its pulse."""

    def __init__(self, loop: Loop, clock: Clock, failed: Callable[[str, Exception, float], None]) -> None:
        self.name = loop.name
        self.failures = 0  # in a row
        self.failures_total = 0
        self._loop = loop
        self._clock = clock
        self._failed = failed
        self._woken = False
        self._pulse: asyncio.Future[None] | None = None  # what it waits for between two ticks
        self._ticking_since: float | None = None

    def wake(self) -> None:
        """Have the loop tick as soon as it can."""
        self._woken = True
        _release(self._pulse)

    def stuck(self) -> bool:
        """Whether a tick has been running for impossibly long."""
        since = self._ticking_since
        return since is not None and self._clock.monotonic() - since > STUCK_SECONDS

    async def run(self) -> None:
        """For ever, until cancelled."""
        while True:
            self._woken = False
            self._ticking_since = self._clock.monotonic()
            try:
                next_at = await self._loop.tick()
            except Exception as error:
                await self._pause(error)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise  # it is this loop that shall end, not something that its tick waited for
                await self._pause(RuntimeError("something that the tick waited for was cancelled"))
            else:
                self.failures = 0
                self._ticking_since = None
                await self._wait_until(next_at)

    async def _pause(self, error: Exception) -> None:
        """Not even a wake shortens this: what fails at every call must not fail in a hot loop."""
        self.failures += 1
        self.failures_total += 1
        self._ticking_since = None
        pause_seconds = doubled(PAUSE_SECONDS_MIN, self.failures, PAUSE_SECONDS_MAX)
        self._failed(self.name, error, pause_seconds)
        await asyncio.sleep(pause_seconds)

    async def _wait_until(self, at: float | None) -> None:
        if self._woken:
            return
        loop = asyncio.get_running_loop()
        self._pulse = pulse = loop.create_future()
        timer = None if at is None else loop.call_later(at - self._clock.monotonic(), _release, pulse)
        try:
            await pulse
        finally:
            self._pulse = None
            if timer is not None:
                timer.cancel()


def _release(pulse: asyncio.Future[None] | None) -> None:
    if pulse is not None and not pulse.done():
        pulse.set_result(None)
