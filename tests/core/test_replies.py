"""The lines that have parts, written and read without a socket."""

from __future__ import annotations

import string
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core import keys
from broker.core.errors import BrokerError
from broker.core.money import USD_MICROS
from broker.core.replies import (
    LINE_CHARS_MAX,
    Granted,
    Notice,
    Pending,
    Versions,
    parse_granted,
    parse_notice,
    parse_pending,
    parse_versions,
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


# --- LEASE, PENDING, NOTICE, VERSION ------------------------------------------------------------------------


def test_a_lease_line_is_read_in_full() -> None:
    assert parse_granted(LEASE) == GRANTED


def test_what_the_broker_does_not_know_is_none() -> None:
    line = LEASE.replace("cores=64", "cores=-").replace("price=1.2", "price=-").replace("c7i.16xlarge", "-")
    unknown = parse_granted(line)
    assert (unknown.type, unknown.cores, unknown.price_usd_per_hour) == (None, None, None)
    assert parse_notice(NOTICE.replace("ip=10.0.0.7", "ip=-")).address is None
    assert parse_pending(PENDING.replace("eta=42", "eta=unknown")).eta_seconds is None


NAMES = st.from_regex(keys.WORD, fullmatch=True)
ADDRESSES = st.ip_addresses().map(str) | st.just("ec2-203-0-113-25.compute-1.amazonaws.com")
REASONS = st.text(string.ascii_letters + " =-", max_size=60).map(lambda text: " ".join(text.split()))
WHOLE = st.integers(0, 10**9)


@given(
    st.builds(
        Granted,
        id=NAMES,
        address=ADDRESSES,
        port=st.integers(1, 65_535),
        pool=NAMES,
        type=st.none() | NAMES.filter("-".__ne__),
        cores=st.none() | st.integers(1, keys.CORES_MAX),
        market=st.sampled_from(["spot", "on-demand"]),
        price_usd_per_hour=st.none() | st.integers(1, 10**12).map(lambda micros: micros / USD_MICROS),
        expires_unix=st.integers(0, 2**32).map(float),
        of=st.integers(1, keys.COUNT_MAX),
    )
)
def test_what_the_broker_says_of_a_lease_is_what_the_client_hears(granted: Granted) -> None:
    assert parse_granted(heard(granted.line())) == granted


@given(
    st.builds(
        Pending,
        eta_seconds=st.none() | WHOLE,
        position=st.integers(1, 10**9),
        code=st.sampled_from(["BOOTING", "NO_CAPACITY"]),
        reason=REASONS,
    )
)
def test_what_the_broker_says_of_waiting_is_what_the_client_hears(pending: Pending) -> None:
    assert parse_pending(heard(pending.line())) == pending


@given(
    st.builds(
        Notice,
        what=st.sampled_from(["interrupt", "retire", "drain", "lost"]),
        address=st.none() | ADDRESSES,
        lease=NAMES,
        in_seconds=WHOLE,
        replacement=st.none() | ADDRESSES,
        reason=REASONS,
    )
)
def test_what_the_broker_says_of_a_worker_is_what_the_client_hears(notice: Notice) -> None:
    assert parse_notice(heard(notice.line())) == notice


def heard(line: bytes) -> str:
    assert line.endswith(b"\n")
    return line[:-1].decode("ascii")


def test_a_reason_is_cut_off_before_a_line_is_too_long() -> None:
    line = heard(Pending(None, 1, "CLOUD", "the cloud says: " + "no " * 1000).line())
    assert len(line) == LINE_CHARS_MAX
    assert parse_pending(line).reason.endswith("...")


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
    assert parse_versions("compute-broker 0.1.0 protocol 1") == Versions("0.1.0", 1)
    assert Versions("0.1.0", 1).line() == b"compute-broker 0.1.0 protocol 1\n"


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
        parse_versions(line)


@given(
    st.lists(
        st.sampled_from(
            [*LEASE.split(), *PENDING.split(), *NOTICE.split(), "ERROR:", "=", "ip==", "of=9" * 9]
        )
        | st.text(string.printable, max_size=12),
        max_size=14,
    ),
    st.sampled_from([parse_granted, parse_pending, parse_notice, parse_versions]),
)
def test_no_line_whatever_breaks_a_reader(words: list[str], parse: Callable[[str], object]) -> None:
    with suppress(BrokerError):
        assert isinstance(parse(" ".join(words)), Granted | Pending | Notice | Versions)
