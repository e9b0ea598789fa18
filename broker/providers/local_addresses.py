"""The addresses that local workers live on: 127.1.0.1 to 127.254.255.254, one for each worker.

An order always asks for the same ones in the same order, so a resend finds what the first try chose.
127.0.x.y stays free for everything else that listens on this host.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Container, Iterator
from hashlib import sha256

from broker.core.errors import CloudError, OfferingRefused, PermanentRefusal

CANDIDATES_MAX = 16  # of 16 million; so many in use in a row means that the port is taken everywhere


def candidates(order_id: str) -> Iterator[str]:
    """Where the order's worker may live, in order of preference."""
    for attempt in range(CANDIDATES_MAX):
        second, third, fourth = sha256(f"{order_id}/{attempt}".encode()).digest()[:3]
        yield f"127.{1 + second % 254}.{third}.{1 + fourth % 254}"


def free_address(order_id: str, port: int, taken: Container[str]) -> str:
    """The first candidate that is not taken and on whose port nobody listens. Raises CloudError."""
    for address in candidates(order_id):
        if address in taken:
            continue
        try:
            _try(address, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise refusal(error, address, port) from error
        else:
            return address
    raise OfferingRefused(
        f"port {port} is taken on every loopback address that was tried, probably by a program that listens "
        "on all of them: stop it, or set worker_port"
    )


def _try(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the dead do not count
        probe.bind((address, port))


def refusal(error: OSError, address: str, port: int) -> CloudError:
    """What to tell about an address that cannot be bound."""
    if error.errno == errno.EADDRNOTAVAIL:
        return PermanentRefusal(
            f"this system has no {address}: local workers live on addresses of their own in 127.0.0.0/8, "
            "which Linux has ready and macOS has not"
        )
    if error.errno == errno.EACCES:
        return PermanentRefusal(f"this user may not listen on port {port}: set worker_port to one above 1023")
    return OfferingRefused(f"nothing can listen on {address}:{port}: {error.strerror}")
