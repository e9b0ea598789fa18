"""The lines of the broker that have parts: LEASE, PENDING and NOTICE.

`word key=value …`, printable ASCII, a value is one word; only the last value of PENDING and NOTICE,
`reason=`, runs to the end of the line. What is not known is `-`, an unknown time to wait is `unknown`.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.core.errors import sentence
from broker.core.model import Lease, Worker
from broker.core.money import USD_MICROS
from broker.core.tags import rfc3339

UNKNOWN = "-"
LINE_CHARS_MAX = 1000  # three words of 255 and the rest; only a reason can be cut off by it


@dataclass(frozen=True, slots=True)
class Pending:
    """What a client that waits is told. `position` 1 is next; `eta_seconds` None is unknown."""

    eta_seconds: float | None
    position: int
    code: str
    reason: str

    def line(self) -> bytes:
        eta = "unknown" if self.eta_seconds is None else f"{max(0.0, self.eta_seconds):.0f}"
        return _line(f"PENDING eta={eta} position={self.position} code={self.code} reason={self.reason}")


@dataclass(frozen=True, slots=True)
class Notice:
    """A worker that somebody holds is about to go (in so many seconds), or has gone."""

    what: str
    worker: Worker
    lease: Lease
    in_seconds: float = 0.0
    reason: str = ""

    def line(self) -> bytes:
        words = (
            f"NOTICE {self.what} ip={self.worker.address or UNKNOWN} lease={self.lease.id} "
            f"in={self.in_seconds:.0f} replacement={UNKNOWN}"
        )
        return _line(f"{words} reason={self.reason}" if self.reason else words)


def lease_line(lease: Lease, worker: Worker, expires_unix: float, of: int) -> bytes:
    """One of `of` lines that answer an ACQUIRE. The price is in dollars an hour."""
    offering = worker.offering
    price = offering.price_usd_micros_per_hour / USD_MICROS
    return _line(
        f"LEASE id={lease.id} ip={worker.address} port={worker.port} pool={worker.pool} "
        f"type={offering.instance_type or UNKNOWN} cores={worker.cores or UNKNOWN} market={offering.market} "
        f"price={f'{price:g}' if price else UNKNOWN} expires={rfc3339(expires_unix)} of={of}"
    )


def _line(text: str) -> bytes:
    return sentence(text, LINE_CHARS_MAX).encode("ascii") + b"\n"
