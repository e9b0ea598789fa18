"""Machines and leases to fill the books with."""

from __future__ import annotations

from broker.core.model import Instance, InstanceState, Lease

POOL = "default"
IDLE_SECONDS = 900.0


def machine(number: int) -> Instance:
    """A running machine with an address of its own."""
    address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return Instance(f"i-{number:017x}", InstanceState.RUNNING, address, "c7i.16xlarge", "us-east-1", cores=64)


def lease(worker_id: str, client: str) -> Lease:
    return Lease(f"lease-{worker_id}", worker_id, client, IDLE_SECONDS)
