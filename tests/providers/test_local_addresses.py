"""The addresses of local workers: who gets which, and what can be wrong."""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import ip_address

import pytest

from broker.core.errors import OfferingRefused, PermanentRefusal
from broker.providers.local_addresses import CANDIDATES_MAX, candidates, free_address, refusal


def test_an_order_always_asks_for_the_same_addresses() -> None:
    assert list(candidates("order-1")) == list(candidates("order-1"))
    assert len(set(candidates("order-1"))) == CANDIDATES_MAX
    assert set(candidates("order-1")).isdisjoint(candidates("order-2"))


def test_no_worker_lives_where_other_programs_listen_or_where_networks_end() -> None:
    for number in range(500):
        for address in candidates(f"order-{number}"):
            octets = ip_address(address).packed
            assert octets[0] == 127
            assert octets[1] not in {0, 255}
            assert octets[3] not in {0, 255}


def test_the_next_address_is_chosen_when_one_is_taken_or_listened_on() -> None:
    first, second, third, *_ = candidates("order-1")
    with socket.create_server((second, 0)) as server:
        port = server.getsockname()[1]
        assert free_address("order-1", port, taken=()) == first
        assert free_address("order-1", port, taken={first}) == third
        with pytest.raises(OfferingRefused, match="set worker_port"):
            free_address("order-1", port, taken=set(candidates("order-1")))


@pytest.mark.parametrize(
    ("number", "kind", "sentence"),
    [
        (errno.EADDRNOTAVAIL, PermanentRefusal, "macOS has not"),
        (errno.EACCES, PermanentRefusal, "set worker_port to one above 1023"),
        (errno.ENOBUFS, OfferingRefused, "nothing can listen on 127.1.2.3:80"),
    ],
)
def test_what_keeps_a_worker_from_its_address_is_said_plainly(
    number: int, kind: type[Exception], sentence: str
) -> None:
    error = refusal(OSError(number, os.strerror(number)), "127.1.2.3", 80)
    assert type(error) is kind
    assert sentence in error.message
