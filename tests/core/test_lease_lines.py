"""The lines about leases, read and written without a socket."""

from __future__ import annotations

import string
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.errors import BadRequest, BrokerError
from broker.core.lease_lines import (
    Acquire,
    Granted,
    Notice,
    Pending,
    Version,
    encode_about,
    encode_acquire,
    parse_granted,
    parse_notice,
    parse_pending,
    parse_version,
)

LEASE = (
    "LEASE id=lease-0a ip=10.0.0.7 port=2560 pool=default type=c7i.16xlarge cores=64 market=spot price=1.2 "
    "expires=2026-01-31T08:00:00Z of=2"
)
GRANTED = Granted(
    "lease-0a", "10.0.0.7", 2560, "default", "c7i.16xlarge", 64, "spot", 1.2, 1_769_846_400.0, 2
)  # fmt: skip
PENDING = "PENDING eta=42 position=3 code=BOOTING reason=a machine has been booting for 31 s"
NOTICE = "NOTICE interrupt ip=10.0.0.7 lease=lease-0a in=118 replacement=-"


# --- ACQUIRE, RENEW, DONE ---------------------------------------------------------------------------------


def test_an_acquire_says_every_wish_and_nothing_else() -> None:
    everything = Acquire("gpu", 64, "c7i.16xlarge", "us-east-1", 2.5, True, 4, 2, "connection", 60, "anna")
    assert encode_acquire(everything) == (
        b"ACQUIRE pool=gpu cores=64 type=c7i.16xlarge region=us-east-1 wait=2.5 exclusive=yes count=4 "
        b"min=2 hold=connection ttl=60 client=anna\n"
    )
    assert encode_acquire(Acquire()) == b"ACQUIRE\n"
    assert encode_acquire(Acquire(client="anna")) == b"ACQUIRE client=anna\n"
    assert everything.ends_with_connection
    assert not Acquire().ends_with_connection


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (Acquire(count=0), "count= is a whole number from 1 to 1000"),
        (Acquire(count=1001), "count= is a whole number from 1 to 1000"),
        (Acquire(min=2), "min= is a whole number from 1 to count=, which is 1"),
        (Acquire(count=3, min=0), "min= is a whole number from 1 to count=, which is 3"),
        (Acquire(ttl=0), "ttl= is a whole number of seconds from 1 to 86400"),
        (Acquire(ttl=86_401), "ttl= is a whole number of seconds from 1 to 86400"),
        (Acquire(hold="hands"), "hold= is connection, or not given"),
        (Acquire(cores=0), "cores= is a whole number from 1 to 100000"),
        (Acquire(pool="a b"), "pool is one word"),
        (Acquire(wait=-1.0), "wait= is a number of seconds"),
    ],
)
def test_a_wish_that_makes_no_sense_is_never_sent(wanted: Acquire, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        encode_acquire(wanted)


def test_a_lease_is_named_by_its_id_and_by_nothing_that_could_add_a_command() -> None:
    assert encode_about("RENEW", "lease-0a") == b"RENEW lease-0a\n"
    for bad in ("", "a b", "lease-0a\nTERMINATE_ALL", "ä", "x" * 256):
        with pytest.raises(BadRequest, match="is no lease: DONE needs the id that ACQUIRE answered"):
            encode_about("DONE", bad)


# --- LEASE, PENDING, NOTICE, VERSION ------------------------------------------------------------------------


def test_a_lease_line_is_read_in_full() -> None:
    assert parse_granted(LEASE) == GRANTED


def test_what_the_broker_does_not_know_is_none() -> None:
    unknown = parse_granted(LEASE.replace("cores=64", "cores=-").replace("price=1.2", "price=-"))
    assert (unknown.cores, unknown.price_usd_per_hour) == (None, None)
    assert parse_pending(PENDING.replace("eta=42", "eta=unknown")).eta_seconds is None


def test_a_newer_broker_may_say_more() -> None:
    assert parse_granted(f"{LEASE} colour=red new") == GRANTED
    assert parse_pending(PENDING.replace(" code=", " colour=red code=")) == parse_pending(PENDING)


def test_the_reason_runs_to_the_end_of_the_line() -> None:
    assert parse_pending(PENDING) == Pending(42, 3, "BOOTING", "a machine has been booting for 31 s")
    assert parse_pending(f"{PENDING}, eta=1 reason=x").reason.endswith("31 s, eta=1 reason=x")
    assert parse_pending("PENDING eta=0 position=1 code=QUEUED").reason == ""


def test_a_notice_says_what_happens_to_which_lease() -> None:
    assert parse_notice(NOTICE) == Notice("interrupt", "10.0.0.7", "lease-0a", 118, None, "")
    assert parse_notice(
        "NOTICE drain ip=10.0.0.7 lease=lease-0a in=0 replacement=10.0.0.8 reason=it is too old"
    ) == Notice("drain", "10.0.0.7", "lease-0a", 0, "10.0.0.8", "it is too old")


def test_the_version_is_that_of_the_broker_and_that_of_the_protocol() -> None:
    assert parse_version("compute-broker 0.1.0 protocol 1") == Version("0.1.0", 1)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "OK",
        "10.0.0.7",
        "LEASE",
        LEASE.lower(),
        LEASE.replace(" ip=10.0.0.7", ""),
        LEASE.replace("ip=10.0.0.7", "ip=OK"),
        LEASE.replace("port=2560", "port=0"),
        LEASE.replace("port=2560", "port=65536"),
        LEASE.replace("cores=64", "cores=many"),
        LEASE.replace("price=1.2", "price=nan"),
        LEASE.replace("price=1.2", "price=-1"),
        LEASE.replace("T08:00:00Z", "T08:00:00"),
        LEASE.replace("T08:00:00Z", "T08:00:00+01:00"),
        LEASE.replace("2026-01-31T08:00:00Z", "tomorrow"),
        LEASE.replace("of=2", "of=0"),
        LEASE.replace("of=2", "of=²"),
        LEASE.replace("id=lease-0a", "id="),
    ],
)
def test_half_a_lease_is_none(line: str) -> None:
    with pytest.raises(BrokerError, match="the broker answered"):
        parse_granted(line)


@pytest.mark.parametrize(
    "line",
    [
        "PENDING",
        PENDING.replace("eta=42", "eta=soon"),
        PENDING.replace("position=3", "position=0"),
        PENDING.replace("code=BOOTING", "code=booting"),
        PENDING.replace("code=BOOTING ", ""),
        PENDING.replace("eta=42 ", ""),
    ],
)
def test_a_pending_line_that_makes_no_sense_is_an_error(line: str) -> None:
    with pytest.raises(BrokerError, match="the broker answered"):
        parse_pending(line)


@pytest.mark.parametrize(
    "line",
    [
        "NOTICE",
        "OK",
        NOTICE.replace("interrupt ", ""),
        NOTICE.replace("in=118", "in=-1"),
        NOTICE.replace("ip=10.0.0.7", "ip=ERROR"),
        NOTICE.replace(" lease=lease-0a", ""),
        NOTICE.replace(" replacement=-", ""),
    ],
)
def test_a_notice_that_makes_no_sense_is_an_error(line: str) -> None:
    with pytest.raises(BrokerError, match="the broker answered"):
        parse_notice(line)


@pytest.mark.parametrize("line", ["", "OK", "compute-broker 0.1.0", "compute-broker 0.1.0 protocol one"])
def test_a_version_that_is_none_is_an_error(line: str) -> None:
    with pytest.raises(BrokerError, match="protocol <number>` was expected"):
        parse_version(line)


@given(
    st.lists(
        st.sampled_from(
            [*LEASE.split(), *PENDING.split(), *NOTICE.split(), "ERROR:", "=", "ip==", "of=9" * 9]
        )
        | st.text(string.printable, max_size=12),
        max_size=14,
    ),
    st.sampled_from([parse_granted, parse_pending, parse_notice, parse_version]),
)
def test_no_line_whatever_breaks_a_reader(words: list[str], parse: Callable[[str], object]) -> None:
    with suppress(BrokerError):
        assert isinstance(parse(" ".join(words)), Granted | Pending | Notice | Version)
