"""The event that a block's worker is not its own any more: `if w.lost:` is the question that programs ask."""

from __future__ import annotations

import asyncio
import threading


class Lost(threading.Event):
    """Set when a worker is not held any more; true when it is set."""

    def __bool__(self) -> bool:
        return self.is_set()


class AsyncLost(asyncio.Event):
    """`Lost` for an event loop."""

    def __bool__(self) -> bool:
        return self.is_set()
