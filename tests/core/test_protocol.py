"""The line protocol: any bytes in any pieces, commands there and back, replies that nobody can mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.core import errors, protocol
from broker.core.errors import (
    AuthRequired,
    BadRequest,
    BrokerError,
    BudgetReached,
    CloudError,
    Code,
    Denied,
    Draining,
    LimitReached,
    NoCapacity,
    SettingsError,
    UnknownCommand,
    WaitTimedOut,
    WorkerNotFound,
)
from broker.core.keys import CLIENT_NAME, COUNT_MAX, TTL_SECONDS_MAX, WAIT_SECONDS_MAX, WORD
from broker.core.protocol import (
    LINE_BYTES_MAX,
    NAMES,
    Acquire,
    Command,
    CommandReader,
    Done,
    GetWorker,
    Help,
    ListAll,
    Malformed,
    Ping,
    Pools,
    Quit,
    Release,
    Renew,
    Status,
    TerminateAll,
    Version,
    Watch,
    encode,
    name_of,
    parse_line,
    read_address,
    read_reply,
)
from tests.core.generated import FEW, MANY

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BrokerError)]
TOO_LONG = (Malformed, f"ERROR: a command is at most {LINE_BYTES_MAX} bytes [BAD_REQUEST]", "unknown", True)


def told(command: Command) -> object:
    """A command as something that can be compared: exceptions are equal to nothing but themselves."""
    if isinstance(command, Malformed):
        return (Malformed, command.error.wire(), command.name, command.fatal)
    return command


def heard(chunks: Sequence[bytes], *, eof: bool = True) -> list[object]:
    reader = CommandReader()
    commands = [command for chunk in chunks for command in reader.receive(chunk)]
    return [told(command) for command in [*commands, *(reader.receive_eof() if eof else [])]]


# --- one line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("GET_WORKER", GetWorker()),
        ("", GetWorker()),
        ("\r", GetWorker()),
        (" \t ", GetWorker()),
        ("  GET_WORKER  \r", GetWorker()),
        ("GET_WORKER\tcores=64", GetWorker(cores=64)),
        ("GET_WORKER pool=gpu type=c7i.large", GetWorker("gpu", type="c7i.large")),
        ("GET_WORKER region=us-east-1", GetWorker(region="us-east-1")),
        ("GET_WORKER wait=0", GetWorker(wait=0.0)),
        ("GET_WORKER wait=1.5", GetWorker(wait=1.5)),
        ("GET_WORKER wait=86400", GetWorker(wait=86_400.0)),
        ("GET_WORKER cores=1", GetWorker(cores=1)),
        ("GET_WORKER cores=100000", GetWorker(cores=100_000)),
        ("GET_WORKER exclusive=yes", GetWorker(exclusive=True)),
        ("GET_WORKER exclusive=no", GetWorker()),
        ("GET_WORKER client=ann@lab/7", GetWorker(client="ann@lab/7")),
        ("ACQUIRE", Acquire()),
        ("ACQUIRE count=3 min=2 ttl=60.5", Acquire(count=3, min=2, ttl=60.5)),
        ("ACQUIRE hold=connection exclusive=yes", Acquire(hold="connection", exclusive=True)),
        ("ACQUIRE pool=gpu cores=8 wait=5 client=ann", Acquire("gpu", 8, wait=5.0, client="ann")),
        ("ACQUIRE count=1000", Acquire(count=COUNT_MAX)),
        ("RENEW lease-1f", Renew("lease-1f")),
        ("DONE lease-1f", Done("lease-1f")),
        ("WATCH", Watch()),
        ("WATCH client=ann", Watch("ann")),
        ("HELP", Help()),
        ("VERSION", Version()),
        ("QUIT", Quit()),
        ("PING 10.0.0.1", Ping("10.0.0.1")),
        ("PING fe80::1 client=ann", Ping("fe80::1", "ann")),
        ("RELEASE 10.0.0.1", Release("10.0.0.1")),
        ("RELEASE 10.0.0.1 force", Release("10.0.0.1", force=True)),
        ("RELEASE 10.0.0.1 client=ann force", Release("10.0.0.1", True, "ann")),
        ("STATUS", Status()),
        ("POOLS", Pools()),
        ("LIST_ALL \r", ListAll()),
        ("TERMINATE_ALL", TerminateAll()),
    ],
)  # fmt: skip
def test_a_line_is_a_command(text: str, command: Command) -> None:
    assert parse_line(text.encode()) == command


UNKNOWN = ["get_worker", "GET_WORKERS", "GET / HTML", "\0", "\xff"]
CORES = "cores= is a whole number from 1 to 100000"
WAIT = "wait= is a number of seconds from 0 to 86400"
BAD = [
    ("STATUS now", "STATUS takes no arguments"),
    ("HELP me", "HELP takes no arguments"),
    ("ACQUIRE count=0", "count= is a whole number from 1 to 1000"),
    ("ACQUIRE count=1001", "count= is a whole number from 1 to 1000"),
    ("ACQUIRE min=2", "min= is at most count="),
    ("ACQUIRE count=3 min=4", "min= is at most count="),
    ("ACQUIRE hold=tight", "hold= is connection, or left out"),
    ("ACQUIRE ttl=0", "ttl= is a number of seconds from 1 to 86400"),
    ("ACQUIRE ttl=nan", "ttl= is a number of seconds from 1 to 86400"),
    ("RENEW", "RENEW needs the id of a lease and nothing else: RENEW <lease>"),
    ("DONE a b", "DONE needs the id of a lease and nothing else: DONE <lease>"),
    ("DONE lease=x", "DONE needs the id of a lease and nothing else: DONE <lease>"),
    ("WATCH ip=1", "WATCH has no key 'ip'; it has client"),
    ("PING", "PING needs the worker's address: PING <ip>"),
    ("PING client=ann", "PING needs the worker's address: PING <ip>"),
    ("PING 10.0.0.1/8", "PING: that is no address"),
    ("PING 10.0.0.1 now", "PING has no key 'now'; it has client"),
    ("RELEASE", "RELEASE needs the worker's address: RELEASE <ip>"),
    ("PING 10.0.0.1 client=a=b", "client= is 1 to 64 letters, digits and . _ @ : / + -"),
    ("PING 10.0.0.1 client=a client=b", "client= is given twice"),
    ("GET_WORKER client=", "client= needs a value"),
    ("GET_WORKER client", "client= needs a value"),
    ("GET_WORKER pool=a/b", "pool= is a word of letters, digits and . _ : -"),
    ("GET_WORKER cores=0", CORES),
    ("GET_WORKER cores=100001", CORES),
    ("GET_WORKER cores=9999999", CORES),
    ("GET_WORKER cores=many", CORES),
    ("GET_WORKER wait=soon", WAIT),
    ("GET_WORKER wait=-1", WAIT),
    ("GET_WORKER wait=86401", WAIT),
    ("GET_WORKER wait=nan", WAIT),
    ("GET_WORKER wait=inf", WAIT),
    ("GET_WORKER exclusive=1", "exclusive= is yes or no"),
    ("GET_WORKER pool=café", "a command is printable ASCII"),
    ("GET_WORKER pool=\x1b", "a command is printable ASCII"),
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_no_command_is_answered_with_the_published_line(text: str) -> None:
    assert told(parse_line(text.encode())) == (Malformed, "ERROR: Unknown command", "unknown", False)


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_command_that_is_not_understood_says_why(text: str, message: str) -> None:
    command, verb = parse_line(text.encode()), text.split()[0]
    assert told(command) == (Malformed, f"ERROR: {message} [BAD_REQUEST]", verb, False)
    assert name_of(command) == verb


def test_an_unknown_key_is_named_and_so_are_the_known_ones() -> None:
    command = parse_line(b"GET_WORKER core=64")
    assert isinstance(command, Malformed)
    assert command.error.message == (
        "GET_WORKER has no key 'core'; it has pool, cores, type, region, wait, exclusive, client"
    )


def test_a_key_as_long_as_a_line_does_not_come_back_whole() -> None:
    command = parse_line(b"GET_WORKER " + b"k" * 500 + b"=1")
    assert isinstance(command, Malformed)
    assert f"'{'k' * 37}...'" in command.error.message
    whole = parse_line(b"GET_WORKER " + b"k" * 40 + b"=1")
    assert isinstance(whole, Malformed)
    assert f"'{'k' * 40}'" in whole.error.message


def test_a_remembered_error_keeps_none_of_the_frames_that_found_it() -> None:
    """A thousand bad lines are remembered; with their frames they would hold 26 MiB instead of one."""
    command = parse_line(b"PING no/address")
    assert isinstance(command, Malformed)
    assert command.error.__traceback__ is None
    assert command.error.__context__ is None


@given(st.binary(max_size=200))
@MANY
def test_any_line_is_a_command_or_one_clear_error(line: bytes) -> None:
    command = parse_line(line)
    assert name_of(command) in {*NAMES.values(), "unknown"}
    if isinstance(command, Malformed):
        assert re.fullmatch(r"ERROR: [ -~]+", command.error.wire())


# --- a stream of bytes ----------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    [
        b"GET_WORKER", b"GET_WORKER cores=64", b"PING 10.0.0.1", b"RELEASE 10.0.0.1 force", b"STATUS",
        b"PING",
        b"GET / HTTP/1.1", b"x" * (LINE_BYTES_MAX - 1), b"x" * LINE_BYTES_MAX, b"x" * (LINE_BYTES_MAX + 1),
        b" " * LINE_BYTES_MAX, b"\n", b"\n\n", b"\r\n", b"\r\r\n", b"\r", b" ", b"\t", b"\0", b"\xff",
    ]
)  # fmt: skip
STREAMS = st.lists(FRAGMENTS | st.just(b"\n") | st.binary(max_size=20), max_size=12).map(b"".join)


def read_naively(stream: bytes) -> list[object]:
    """All the bytes at once, line by line, as the protocol's description reads."""
    lines = stream.split(b"\n")
    found: list[object] = []
    heard_nonsense = False
    for number, line in enumerate(lines, start=1):
        if len(line.removesuffix(b"\r")) > LINE_BYTES_MAX:
            return [*found, TOO_LONG]
        blank = not line.strip(b" \t\r")
        if blank and number == len(lines):
            break  # what the end of the stream ends is a command only if it says something
        command = Malformed(UnknownCommand()) if blank and heard_nonsense else parse_line(line)
        heard_nonsense = heard_nonsense or isinstance(command, Malformed)
        found.append(told(command))
        if isinstance(command, Malformed) and command.fatal:
            break
    return found


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 3000), max_size=8))
@example(stream=b"x" * LINE_BYTES_MAX + b"\r\n", cuts=[LINE_BYTES_MAX, LINE_BYTES_MAX + 1])
@example(stream=b"x" * LINE_BYTES_MAX + b"\r\r\n", cuts=[LINE_BYTES_MAX + 1])
@example(stream=b"STATUS\n" + b"x" * (LINE_BYTES_MAX + 1) + b"\nSTATUS\n", cuts=[7, 8])
@MANY
def test_however_bytes_are_cut_the_commands_are_the_same(stream: bytes, cuts: list[int]) -> None:
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [stream[start:end] for start, end in pairwise(places)]
    commands = heard(chunks)
    assert commands == read_naively(stream)
    assert commands == heard([stream])


@given(STREAMS)
@FEW
def test_byte_by_byte_the_commands_are_the_same(stream: bytes) -> None:
    assert heard([bytes([byte]) for byte in stream]) == read_naively(stream)


@given(st.lists(st.binary(max_size=300), max_size=20))
@FEW
def test_nothing_follows_a_line_that_is_too_long(chunks: list[bytes]) -> None:
    reader = CommandReader()
    assert [told(command) for command in reader.receive(b"x" * (LINE_BYTES_MAX + 1))] == [TOO_LONG]
    assert [reader.receive(chunk) for chunk in chunks] == [[] for _ in chunks]
    assert not reader.partial
    assert reader.receive_eof() == []


def test_the_longest_line_is_still_read() -> None:
    assert LINE_BYTES_MAX == 1024, "the published protocol fixes it"
    line = b"PING 10.0.0.1" + b" " * (LINE_BYTES_MAX - len(b"PING 10.0.0.1"))
    assert heard([line + b"\r\n"]) == [Ping("10.0.0.1")]
    assert heard([line + b" \r\n"]) == [TOO_LONG]


def test_commands_before_a_line_that_is_too_long_are_answered_first() -> None:
    assert heard([b"STATUS\nLIST_ALL\n" + b"x" * 2000]) == [Status(), ListAll(), TOO_LONG]


def test_a_command_that_has_begun_is_known_to_be_unfinished() -> None:
    reader = CommandReader()
    assert not reader.partial
    assert reader.receive(b"STA") == []
    assert reader.partial
    assert reader.receive(b"TUS\n") == [Status()]
    assert not reader.partial


def test_the_end_of_the_stream_ends_the_last_line() -> None:
    assert heard([b"STATUS\nPING 10.0.0.1"]) == [Status(), Ping("10.0.0.1")]
    assert heard([b"STATUS\nPING 10.0.0.1"], eof=False) == [Status()]


@pytest.mark.parametrize("nothing", [[], [b""], [b" "], [b"\r"], [b"\t \r"]])
def test_a_connection_that_says_nothing_asks_for_nothing(nothing: list[bytes]) -> None:
    assert heard(nothing) == []


HTTP_ENDS = (Malformed, "ERROR: Unknown command", "unknown", True)


def test_the_blank_line_that_ends_a_health_check_buys_no_machine() -> None:
    check = b"GET /healthz HTTP/1.1\r\nHost: broker\r\n\r\n"
    assert heard([check]) == [HTTP_ENDS]
    assert heard([b"\n" + check]) == [GetWorker(), HTTP_ENDS]


def test_a_blank_line_after_nonsense_is_nonsense_too() -> None:
    unknown = (Malformed, "ERROR: Unknown command", "unknown", False)
    assert heard([b"hello\n\n"]) == [unknown] * 2


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "CONNECT"])
def test_a_web_page_cannot_give_commands_through_its_readers_browser(method: str) -> None:
    request = f"{method} / HTTP/1.1\r\nContent-Type: text/plain\r\n\r\nTERMINATE_ALL\nGET_WORKER\n"
    assert heard([request.encode()]) == [HTTP_ENDS]


def test_after_quit_nothing_more_is_heard() -> None:
    assert heard([b"QUIT\nGET_WORKER\n", b"GET_WORKER\n"]) == [Quit()]


def test_after_a_slip_a_full_command_is_still_heard() -> None:
    assert heard([b"PING\nGET_WORKER\n"])[1] == GetWorker()


# --- commands, as clients write them --------------------------------------------------------------------

WORDS = st.from_regex(WORD, fullmatch=True)
CLIENTS = st.none() | st.from_regex(CLIENT_NAME, fullmatch=True)
SENDABLE = st.one_of(
    st.builds(
        GetWorker,
        pool=st.none() | WORDS,
        cores=st.none() | st.integers(1, 100_000),
        type=st.none() | WORDS,
        region=st.none() | WORDS,
        wait=st.none() | st.floats(0, WAIT_SECONDS_MAX),
        exclusive=st.booleans(),
        client=CLIENTS,
    ),
    st.builds(Ping, address=WORDS, client=CLIENTS),
    st.builds(Release, address=WORDS, force=st.booleans(), client=CLIENTS),
    st.builds(
        Acquire,
        pool=st.none() | WORDS,
        cores=st.none() | st.integers(1, 100_000),
        wait=st.none() | st.floats(0, WAIT_SECONDS_MAX),
        exclusive=st.booleans(),
        client=CLIENTS,
        count=st.integers(100, COUNT_MAX),
        min=st.none() | st.integers(1, 100),
        hold=st.sampled_from([None, "connection"]),
        ttl=st.none() | st.floats(1, TTL_SECONDS_MAX),
    ),
    st.builds(Renew, lease=WORDS),
    st.builds(Done, lease=WORDS),
    st.builds(Watch, client=CLIENTS),
    st.sampled_from([Status(), Pools(), ListAll(), TerminateAll(), Help(), Version(), Quit()]),
)
ANYTHING: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80)
)
DOUBTFUL = st.one_of(
    st.builds(
        GetWorker, pool=ANYTHING, cores=ANYTHING, type=ANYTHING, wait=ANYTHING, exclusive=ANYTHING,
        client=ANYTHING,
    ),
    st.builds(Ping, address=st.text(max_size=300), client=ANYTHING),
    st.builds(Release, address=st.text(max_size=300), force=st.booleans(), client=ANYTHING),
    st.builds(Acquire, count=ANYTHING, min=ANYTHING, hold=ANYTHING, ttl=ANYTHING, client=ANYTHING),
    st.builds(Renew, lease=st.text(max_size=300)),
)  # fmt: skip


@given(SENDABLE)
@MANY
def test_what_a_client_sends_is_what_the_broker_hears(command: Any) -> None:
    sent = encode(command)
    assert sent.isascii()
    assert sent.count(b"\n") == 1
    assert sent.endswith(b"\n")
    assert len(sent) <= LINE_BYTES_MAX
    assert heard([sent]) == [command]


@given(DOUBTFUL)
@example(Ping("10.0.0.1\nTERMINATE_ALL"))
@example(Ping("10.0.0.1 client=mallory"))
@example(Ping("10.0.0.1\r"))
@example(Release("10.0.0.1 force"))
@example(GetWorker(client="ann\n"))
@example(GetWorker(wait=float("nan")))
@example(GetWorker(cores=True))
@MANY
def test_a_value_that_cannot_be_sent_is_refused_and_never_becomes_another_command(command: Any) -> None:
    try:
        sent = encode(command)
    except BadRequest:
        return
    assert heard([sent]) == [command]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (Ping("10.0.0.1/8"), "PING: that is no address"),
        (GetWorker(cores=0), CORES),
        (GetWorker(client="ann&bob"), "client= is 1 to 64 letters, digits and . _ @ : / + -"),
        (GetWorker(pool="a b"), "pool is one word, not 'a b'"),
        (Ping(""), "address is one word, not ''"),
        (Acquire(count=1001), "count= is a whole number from 1 to 1000"),
        (Acquire(min=2), "min= is at most count="),
        (Acquire(count=3, min=0), "min= is a whole number from 1 to 1000"),
        (Acquire(ttl=0), "ttl= is a number of seconds from 1 to 86400"),
        (Acquire(hold="hands"), "hold= is connection, or left out"),
        (Renew("x" * 256), "RENEW needs the id of a lease and nothing else: RENEW <lease>"),
        (Done("lease-0a\nTERMINATE_ALL"), "lease is one word, not 'lease-0a\\nTERMINATE_ALL'"),
    ],
)
def test_a_refused_value_is_told_as_the_broker_would_tell_it(command: Any, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        encode(command)
    assert caught.value.message == message


def test_the_longest_possible_command_fits_into_a_line() -> None:
    word, name = "w" * 255, "c" * 64
    sent = encode(GetWorker(word, 100_000, word, word, 12345.000000000002, True, name))
    assert len(sent) <= LINE_BYTES_MAX


def test_a_command_is_written_as_a_person_would_write_it() -> None:
    wanted = GetWorker("gpu", 64, wait=30.0, exclusive=True)
    assert encode(wanted) == b"GET_WORKER pool=gpu cores=64 wait=30 exclusive=yes\n"
    assert encode(Release("10.0.0.1", True, "ann")) == b"RELEASE 10.0.0.1 force client=ann\n"
    assert encode(GetWorker(wait=0.1 + 0.2)) == b"GET_WORKER wait=0.30000000000000004\n"
    assert encode(Acquire(client="ann")) == b"ACQUIRE client=ann\n"
    assert encode(Acquire(count=4, min=2, hold="connection", ttl=60, client="ann")) == (
        b"ACQUIRE count=4 min=2 hold=connection ttl=60 client=ann\n"
    )


def test_every_command_has_a_word_and_a_key_for_each_of_its_fields() -> None:
    assert set(NAMES.values()) == set(protocol.PARSERS)
    assert all(is_dataclass(kind) for kind in NAMES)
    assert {field.name for field in fields(GetWorker)} == set(protocol.GET_WORKER_KEYS)


# --- replies --------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
ADDRESSES = st.ip_addresses().map(str) | st.sampled_from(
    [
        "127.0.0.7",
        "worker.lan",
        "ec2-203-0-113-25.compute-1.amazonaws.com",
        "ip-10-0-0-1.ec2.internal",
        "fe80::1",
    ]
)
MESSAGES = st.text(max_size=500) | ADDRESSES | st.sampled_from(["", "10.0.0.1 [LIMIT]", "ERROR: x [CLOUD]"])


def as_text(reply: bytes) -> str:
    """One reply, checked to be one line of ASCII."""
    assert reply.endswith(b"\n")
    text = reply[:-1].decode("ascii")
    assert text.isprintable()
    return text


def raised(kind: type[BrokerError], message: str) -> BrokerError:
    return kind([message]) if kind is SettingsError else kind(message)


@given(kind=st.sampled_from(KINDS), message=MESSAGES)
@MANY
def test_no_error_line_ever_looks_like_an_address(kind: type[BrokerError], message: str) -> None:
    reply = as_text(protocol.error_line(raised(kind, message)))
    assert reply.startswith("ERROR: ")
    with pytest.raises(BrokerError):
        read_address(reply)


@given(JSON)
@FEW
def test_json_is_one_line_that_is_no_address_and_says_what_it_said(value: object) -> None:
    reply = as_text(protocol.json_line([value]))
    assert json.loads(reply) == [value]
    with pytest.raises(BrokerError, match="is no address"):
        read_address(reply)


@given(ADDRESSES)
@FEW
def test_an_address_arrives(address: str) -> None:
    assert read_address(as_text(protocol.line(address))) == address
    assert read_address(f" {address}\r") == address


def test_ok_is_a_line_and_no_address() -> None:
    assert read_reply(as_text(protocol.OK)) == "OK"
    with pytest.raises(BrokerError, match="'OK', which is no address"):
        read_address("OK")


@pytest.mark.parametrize(
    "text",
    [
        "", "localhost", "256.1.1.1", "1.2.3", "1.2.3.4.5", "10.0.0.1:2560", "10.0.0.1 10.0.0.2", "a b.com",
        "broker.", ".com", "a..com", "[::1]", "ERROR:10.0.0.1", "ERRORS.com:80", "10.0.0.1\x00",
    ],
)  # fmt: skip
def test_what_is_no_address_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(BrokerError, match="is no address"):
        read_address(text)


def test_nonsense_is_quoted_but_not_all_of_it() -> None:
    with pytest.raises(BrokerError) as caught:
        read_address("x" * 5000)
    assert caught.value.message == f"the broker answered '{'x' * 80}', which is no address"


@given(st.text(max_size=200))
@FEW
def test_any_answer_is_an_address_or_an_error(reply: str) -> None:
    try:
        address = read_address(reply)
    except BrokerError:
        return
    assert address in reply


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        ("ERROR: Unknown command", UnknownCommand, "Unknown command"),
        ("ERROR: Worker not found", WorkerNotFound, "Worker not found"),
        ("ERROR: no room [NO_CAPACITY]", NoCapacity, "no room"),
        ("ERROR: full [LIMIT]", LimitReached, "full"),
        ("ERROR: late [TIMEOUT]", WaitTimedOut, "late"),
        ("ERROR: held [DENIED]", Denied, "held"),
        ("ERROR: later [DRAINING]", Draining, "later"),
        ("ERROR: no answer [CLOUD]", CloudError, "no answer"),
        ("ERROR: no key [BAD_REQUEST]", BadRequest, "no key"),
        ("ERROR: it said [LIMIT] [CLOUD]", CloudError, "it said [LIMIT]"),
        ("ERROR: who is that? [AUTH]", AuthRequired, "who is that?"),
        ("ERROR: spent [BUDGET]", BudgetReached, "spent"),
        ("ERROR: news [FROM_THE_FUTURE]", BrokerError, "news"),
        ("ERROR: a sentence", BrokerError, "a sentence"),
        ("ERROR: ", BrokerError, "the broker reports an error without a reason"),
        ("ERROR", BrokerError, "the broker reports an error without a reason"),
    ],
)  # fmt: skip
def test_an_error_line_is_raised_as_what_it_stands_for(
    reply: str, kind: type[BrokerError], message: str
) -> None:
    with pytest.raises(BrokerError) as caught:
        read_reply(reply)
    assert (type(caught.value), caught.value.message) == (kind, message)


@given(kind=st.sampled_from(KINDS), message=MESSAGES)
@FEW
def test_an_error_keeps_its_code_and_its_words_on_the_way(kind: type[BrokerError], message: str) -> None:
    error = raised(kind, message)
    with pytest.raises(BrokerError) as caught:
        read_reply(error.wire())
    if error.code in protocol.ERRORS and error.message.strip():
        assert caught.value.code == error.code
        assert caught.value.wire() == error.wire()


def test_every_code_of_the_closed_list_is_raised_as_an_error_with_that_code() -> None:
    assert set(protocol.ERRORS) == set(Code)
    assert all(kind.code == code for code, kind in protocol.ERRORS.items())
