"""What commands leave behind on a connection: leases that live as long as it does, and who is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Session:
    """One connection. `say` writes lines to it between the replies; `lasts` is told once it is not to be
    closed for its silence."""

    say: Callable[[bytes], None]
    lasts: Callable[[], None] = lambda: None
    leases: dict[str, None] = field(default_factory=dict)  # ids of those bound to it
    watching: str | None = None  # the client whose workers' ends are told here
    closed: bool = False

    @property
    def lasting(self) -> bool:
        """Whether somebody counts on this connection although nothing is said on it."""
        return bool(self.leases) or self.watching is not None
