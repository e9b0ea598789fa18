"""What a client asks of a worker beyond its pool, and whether something is that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from broker.core.model import Offering, Worker
from broker.core.protocol import Acquire, GetWorker


@dataclass(frozen=True, slots=True)
class Wish:
    """What a worker must be for a client; everything, when the client did not say."""

    cores: int | None = None
    type: str | None = None
    region: str | None = None

    @classmethod
    def of(cls, command: GetWorker | Acquire) -> Wish:
        return _known(command.cores, command.type, command.region)

    def fits(self, offering: Offering) -> bool:
        """Whether the offering is what the client asked for. Unknown cores never fit a wish for cores."""
        return (
            (self.type is None or offering.instance_type == self.type)
            and (self.region is None or offering.region == self.region)
            and (self.cores is None or (offering.cores is not None and offering.cores >= self.cores))
        )

    def test(self) -> Callable[[Worker], bool] | None:
        return None if self == ANYTHING else lambda worker: self.fits(worker.offering)

    def __str__(self) -> str:
        words = (("cores", self.cores), ("type", self.type), ("region", self.region))
        return " ".join(f"{key}={value}" for key, value in words if value is not None)


ANYTHING = Wish()
WISHES_KEPT = 1024  # clients want the same again and again: one object for all is told apart at once


@lru_cache(maxsize=WISHES_KEPT)
def _known(cores: int | None, kind: str | None, region: str | None) -> Wish:
    return Wish(cores, kind, region)
