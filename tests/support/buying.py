"""One machine bought from a provider: most tests want no more."""

from __future__ import annotations

from typing import Protocol

from broker.core.model import Bought, Instance, Order


class Seller(Protocol):
    """The part of a provider that sells."""

    async def launch(self, order: Order) -> Bought: ...


async def launch_one(provider: Seller, order: Order) -> Instance:
    """The only machine of an order. Raises what the provider raises."""
    (instance,) = (await provider.launch(order)).instances
    return instance
