"""Leases in the Python client against a broker that does as each test tells it: blocking and async alike."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import broker
from broker import BrokerUnreachable, Client, Notice, Pending, Retry
from broker.core import errors
from broker.core.protocol import Acquire
from broker.core.replies import Versions, parse_granted
from broker.errand import Endpoint
from broker.lease_errands import AcquireErrand
from broker.lease_keeper import often_enough
from tests.support.fake_broker import SECONDS_MAX, FakeBroker, Looped, Scene, answer, line_from, reset

AT_ONCE = Retry(pause_seconds=0.0, pause_seconds_max=0.0)
ENDED = "ERROR: that lease has ended [DENIED]"
READ_ONLY = errors.ReadOnly().wire()
BOOTING = "PENDING eta=42 position=3 code=BOOTING reason=a machine has been booting for 31 s"

Open = Callable[..., FakeBroker]
ClientOf = Callable[..., Any]
Use = Callable[[Any], object]
Hold = Callable[..., None]


def lease_line(lease_id: str, of: int = 1) -> str:
    return (
        f"LEASE id={lease_id} ip=127.0.0.1 port=2560 pool=default type=big cores=64 market=spot price=1.2 "
        f"expires=2026-01-31T08:00:00Z of={of}"
    )


def lines(*texts: str) -> Scene:
    """Hears a line and answers with these."""
    return answer("".join(f"{text}\n" for text in texts))


def each(fake: FakeBroker, connection: socket.socket) -> None:
    """Answers every line that has come, as `replies` says."""
    data = b""
    while not data.endswith(b"\n"):
        data += connection.recv(4096)
    for line in data.decode().splitlines():
        fake.hear(line)
        reply = fake.replies.get(line) or fake.replies.get(line.partition(" ")[0], "OK")
        connection.sendall(f"{reply}\n".encode())


class Held:
    """The connection that leases are tied to: grants them, then does what the test says."""

    def __init__(self, *answers: str) -> None:
        self._answers = answers
        self._connection: socket.socket | None = None
        self.watched, self.closed = threading.Event(), threading.Event()

    def __call__(self, fake: FakeBroker, connection: socket.socket) -> None:
        self._connection = connection
        try:
            line_from(fake, connection)
            connection.sendall("".join(f"{text}\n" for text in self._answers).encode())
            line_from(fake, connection)
            connection.sendall(b"OK\n")
            self.watched.set()
            while connection.recv(1024):
                pass
        finally:
            self.closed.set()

    def say(self, text: str) -> None:
        assert self.watched.wait(SECONDS_MAX)
        assert self._connection is not None
        self._connection.sendall(f"{text}\n".encode())

    def break_off(self) -> None:
        assert self.watched.wait(SECONDS_MAX)
        assert self._connection is not None
        self._connection.shutdown(socket.SHUT_RDWR)


class Watched(Held):
    """A connection on which nothing is said but WATCH."""

    def __call__(self, fake: FakeBroker, connection: socket.socket) -> None:
        self._connection = connection
        line_from(fake, connection)
        connection.sendall(b"OK\n")
        self.watched.set()
        while connection.recv(1024):
            pass


@pytest.fixture
def opened() -> Iterator[Open]:
    fakes: list[FakeBroker] = []

    def open_one(*scenes: Scene, **replies: str) -> FakeBroker:
        fakes.append(FakeBroker((*scenes, *[each] * 50), replies))
        return fakes[-1]

    yield open_one
    for fake in fakes:
        fake.close()


@pytest.fixture(params=[Client, Looped], ids=["blocking", "async"])
def client_of(request: pytest.FixtureRequest) -> ClientOf:
    def make(port: int, **options: Any) -> Any:
        return request.param("127.0.0.1", port, **{"timeout": SECONDS_MAX, "retry": AT_ONCE, **options})

    return make


@pytest.fixture(params=["blocking", "async"])
def hold(request: pytest.FixtureRequest) -> Hold:
    """Runs `use` with what the block gives, in the block."""

    def blocking(fake: FakeBroker, use: Use, **how: Any) -> None:
        how = {"timeout": SECONDS_MAX, "retry": AT_ONCE, **how}
        with broker.acquire("127.0.0.1", fake.port, **how) as lease:
            use(lease)

    def in_a_loop(fake: FakeBroker, use: Use, **how: Any) -> None:
        how = {"timeout": SECONDS_MAX, "retry": AT_ONCE, **how}

        async def main() -> None:
            async with broker.aacquire("127.0.0.1", fake.port, **how) as lease:
                await asyncio.to_thread(use, lease)

        asyncio.run(main())

    return blocking if request.param == "blocking" else in_a_loop


def lost_within(lease: Any, seconds: float = SECONDS_MAX) -> bool:
    """Whether the lease is lost in that time, whichever kind of event says so."""
    if isinstance(lease.lost, threading.Event):
        return lease.lost.wait(seconds)
    over = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if lease.lost.is_set() or over.wait(0.01):
            break
    return bool(lease.lost)


# --- single commands --------------------------------------------------------------------------------------


def test_acquire_says_its_wishes_and_returns_every_lease(client_of: ClientOf, opened: Open) -> None:
    fake = opened(lines(lease_line("lease-1", 2), lease_line("lease-2", 2)))
    leases = client_of(fake.port).acquire(
        pool="gpu", cores=64, count=3, min=2, ttl=60, wait=1.5, exclusive=True
    )
    assert [(lease.id, lease.address, lease.port) for lease in leases] == [
        ("lease-1", "127.0.0.1", 2560),
        ("lease-2", "127.0.0.1", 2560),
    ]
    assert fake.heard == ["ACQUIRE pool=gpu cores=64 wait=1.5 exclusive=yes count=3 min=2 ttl=60"]


def test_while_it_waits_each_pending_line_is_told_as_it_comes(client_of: ClientOf, opened: Open) -> None:
    heard_first = threading.Event()

    def slow(fake: FakeBroker, connection: socket.socket) -> None:
        line_from(fake, connection)
        connection.sendall(f"{BOOTING}\nPENDING eta=unk".encode())
        assert heard_first.wait(SECONDS_MAX)
        connection.sendall(f"nown position=1 code=QUEUED\n{lease_line('lease-1')}\n".encode())

    told: list[Pending] = []

    def on_pending(pending: Pending) -> None:
        told.append(pending)
        heard_first.set()

    (lease,) = client_of(opened(slow).port).acquire(on_pending=on_pending)
    assert lease.id == "lease-1"
    assert told == [
        Pending(42, 3, "BOOTING", "a machine has been booting for 31 s"),
        Pending(None, 1, "QUEUED", ""),
    ]


@pytest.mark.parametrize("trouble", [ValueError("enough"), TimeoutError("enough"), BrokenPipeError("enough")])
def test_what_the_callback_raises_comes_out_and_gives_the_place_up(
    client_of: ClientOf, opened: Open, trouble: Exception
) -> None:
    gone: list[type] = []
    over = threading.Event()

    def waiting(fake: FakeBroker, connection: socket.socket) -> None:
        line_from(fake, connection)
        connection.sendall(f"{BOOTING}\n".encode())
        try:
            connection.recv(1)
        except ConnectionError as error:
            gone.append(type(error))
        over.set()

    def refuse(pending: Pending) -> None:
        raise trouble

    fake = opened(waiting)
    with pytest.raises(type(trouble), match="enough") as caught:
        client_of(fake.port).acquire(on_pending=refuse)
    assert caught.value is trouble
    assert over.wait(SECONDS_MAX)
    assert gone == [ConnectionResetError], "an orderly end would leave the place taken"
    assert fake.heard == ["ACQUIRE"]


def test_an_error_behind_pending_lines_is_raised_as_its_type(client_of: ClientOf, opened: Open) -> None:
    fake = opened(lines(BOOTING, "ERROR: no worker became ready within 5 s [TIMEOUT]"))
    with pytest.raises(errors.WaitTimedOut, match="no worker became ready"):
        client_of(fake.port).acquire(wait=5)
    assert fake.heard == ["ACQUIRE wait=5"]


@pytest.mark.parametrize(
    "reply",
    [
        ("OK",),
        ("10.0.0.1",),
        ("LEASE id=lease-1",),
        ("PENDING soon", lease_line("lease-1")),
        (lease_line("lease-1", 2), lease_line("lease-1", 2)),
        (lease_line("lease-1", 2), lease_line("lease-2", 2)),
    ],
    ids=["ok", "address", "half", "pending", "the same twice", "more than asked"],
)
def test_an_answer_that_is_no_lease_is_an_error(
    client_of: ClientOf, opened: Open, reply: tuple[str, ...]
) -> None:
    fake = opened(lines(*reply))
    with pytest.raises(errors.BrokerError, match="answered"):
        client_of(fake.port).acquire()
    assert fake.heard == ["ACQUIRE"]


@pytest.mark.parametrize(
    "trouble", [reset, answer(""), lines(BOOTING), answer(lease_line("lease-1", 2) + "\nLEASE id=")]
)
def test_an_acquire_whose_answer_is_lost_is_not_sent_again(
    client_of: ClientOf, opened: Open, trouble: Scene
) -> None:
    fake = opened(trouble)
    with pytest.raises(BrokerUnreachable, match="it may have been carried out all the same"):
        client_of(fake.port).acquire(count=2)
    assert fake.heard == ["ACQUIRE count=2"]


@pytest.mark.parametrize("trouble", [reset, lines(BOOTING), answer(lease_line("lease-1", 2) + "\nLEASE id=")])
def test_one_that_is_tied_to_its_connection_is_sent_again_because_the_broken_one_ended_it(
    client_of: ClientOf, opened: Open, trouble: Scene
) -> None:
    fake = opened(trouble, lines(lease_line("lease-7", 2), lease_line("lease-8", 2)))
    leases, sock = client_of(fake.port).acquire_and_stay(count=2)
    sock.close()
    assert [lease.id for lease in leases] == ["lease-7", "lease-8"]
    assert fake.heard == ["ACQUIRE count=2 hold=connection"] * 2


def acquire_errand(**wish: Any) -> AcquireErrand:
    return AcquireErrand(Acquire(**wish), None, Endpoint("127.0.0.1", 9000), 910.0, Retry())


def test_an_acquire_that_nobody_took_is_sent_again_and_only_then() -> None:
    errand = acquire_errand()
    errand.attempt(0.0)
    assert errand.pause_after(ConnectionRefusedError(), 0.0) == 0.1
    errand.attempt(0.1)
    assert errand.begin() == b"ACQUIRE\n"
    with pytest.raises(BrokerUnreachable):
        errand.pause_after(ConnectionResetError(), 0.2)


def test_a_second_try_waits_only_as_long_as_the_first_one_has_left() -> None:
    errand = acquire_errand(wait=10.0, hold="connection")
    errand.attempt(0.0)
    assert errand.begin() == b"ACQUIRE wait=10 hold=connection\n"
    assert errand.pause_after(ConnectionResetError(), 4.0) == 0.1
    errand.attempt(4.0)
    assert errand.begin() == b"ACQUIRE wait=6 hold=connection\n"


def test_renew_and_done_name_the_lease_and_an_ended_one_is_denied(client_of: ClientOf, opened: Open) -> None:
    fake = opened(**{"DONE lease-2": ENDED, "RENEW lease-2": ENDED})
    client = client_of(fake.port)
    client.renew("lease-1")
    client.done("lease-1")
    for command in (client.renew, client.done):
        with pytest.raises(errors.LeaseHasEnded, match="that lease has ended"):
            command("lease-2")
    assert fake.heard == ["RENEW lease-1", "DONE lease-1", "RENEW lease-2", "DONE lease-2"]


def test_many_leases_are_renewed_on_one_connection_and_each_has_its_answer(
    client_of: ClientOf, opened: Open
) -> None:
    fake = opened(**{"RENEW lease-2": ENDED})
    outcomes = client_of(fake.port).renew_all(["lease-1", "lease-2", "lease-3"])
    assert [type(outcome) for outcome in outcomes] == [type(None), errors.LeaseHasEnded, type(None)]
    assert client_of(fake.port).renew_all([]) == []


def test_a_done_whose_answer_was_lost_has_ended_the_lease(client_of: ClientOf, opened: Open) -> None:
    fake = opened(reset, DONE=ENDED)
    client_of(fake.port).done("lease-1")
    assert fake.heard == ["DONE lease-1", "DONE lease-1"]


def test_the_version_of_the_broker_is_told(client_of: ClientOf, opened: Open) -> None:
    fake = opened(VERSION="compute-broker 0.1.0 protocol 1")
    assert client_of(fake.port).version() == Versions("0.1.0", 1)


# --- watching ---------------------------------------------------------------------------------------------

NOTICE = "NOTICE interrupt ip=127.0.0.1 lease=lease-1 in=118 replacement=-"
TOLD = Notice("interrupt", "127.0.0.1", "lease-1", 118, None, "")


def first_notices(kind: type, port: int, count: int) -> list[Notice]:
    """The first notices that a client of that kind is told, which then leaves."""
    if kind is Client:
        watching = Client("127.0.0.1", port, timeout=SECONDS_MAX, retry=AT_ONCE).watch()
        return [next(watching) for _ in range(count)]

    async def main() -> list[Notice]:
        told: list[Notice] = []
        async for notice in broker.AsyncClient("127.0.0.1", port, retry=AT_ONCE).watch():
            told.append(notice)
            if len(told) == count:
                break
        return told

    return asyncio.run(main())


@pytest.mark.parametrize("kind", [Client, Looped], ids=["blocking", "async"])
def test_watch_tells_each_notice_and_finds_a_restarted_broker_again(kind: type, opened: Open) -> None:
    fake = opened(lines("OK", NOTICE, NOTICE), lines("OK", NOTICE.replace("interrupt", "retire")))
    told = first_notices(kind, fake.port, 3)
    assert [notice.what for notice in told] == ["interrupt", "interrupt", "retire"]
    assert told[0] == TOLD
    assert fake.heard == ["WATCH", "WATCH"]


@pytest.mark.parametrize("kind", [Client, Looped], ids=["blocking", "async"])
def test_a_broker_that_cannot_be_watched_says_so(kind: type, opened: Open) -> None:
    with pytest.raises(errors.UnknownCommand):
        first_notices(kind, opened(lines("ERROR: Unknown command")).port, 1)


# --- a lease for the time of a block ------------------------------------------------------------------------


def test_a_block_holds_its_lease_by_its_connection_and_gives_it_back(hold: Hold, opened: Open) -> None:
    held = Held(BOOTING, lease_line("lease-1"))
    fake = opened(held)
    told: list[Pending] = []

    def use(lease: Any) -> None:
        assert held.watched.wait(SECONDS_MAX)
        assert (lease.id, lease.address, lease.port) == ("lease-1", "127.0.0.1", 2560)
        assert lease.granted.cores == 64
        assert not lease.lost
        assert not held.closed.is_set()

    hold(fake, use, on_pending=told.append, cores=64)
    assert held.closed.wait(SECONDS_MAX)
    assert fake.heard == ["ACQUIRE cores=64 hold=connection", "WATCH", "DONE lease-1"]
    assert [pending.position for pending in told] == [3]
    assert len(set(fake.names) - {""}) == 1


def test_with_a_count_the_block_has_a_list_and_gives_all_back(hold: Hold, opened: Open) -> None:
    fake = opened(Held(lease_line("lease-1", 2), lease_line("lease-2", 2)))
    ids: list[str] = []
    hold(fake, lambda leases: ids.extend(lease.id for lease in leases), count=2)
    assert ids == ["lease-1", "lease-2"]
    assert [line for line in fake.heard if line.startswith("DONE")] == ["DONE lease-1", "DONE lease-2"]


def test_a_block_that_fails_gives_its_lease_back_too(hold: Hold, opened: Open) -> None:
    held = Held(lease_line("lease-1"))
    fake = opened(held)

    def fail(lease: Any) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        hold(fake, fail)
    assert fake.heard_within(1, "DONE lease-1")
    assert held.closed.wait(SECONDS_MAX)


def test_a_lease_that_has_ended_by_itself_is_no_fault_of_the_block(hold: Hold, opened: Open) -> None:
    fake = opened(Held(lease_line("lease-1")), DONE=ENDED)
    hold(fake, lambda lease: None)
    assert fake.heard_within(1, "DONE lease-1")


def test_a_broker_that_cannot_be_told_of_the_end_is_an_error_and_the_connection_ends_the_lease(
    hold: Hold, opened: Open
) -> None:
    held = Held(lease_line("lease-1"))
    with pytest.raises(errors.BrokerError, match="not now"):
        hold(opened(held, DONE="ERROR: not now [CLOUD]"), lambda lease: None)
    assert held.closed.wait(SECONDS_MAX)


def test_after_a_restart_of_the_broker_the_lease_is_renewed_without_the_connection(
    hold: Hold, opened: Open
) -> None:
    held = Held(lease_line("lease-1"))
    fake = opened(held)

    def use(lease: Any) -> None:
        held.break_off()
        assert fake.heard_within(3, "RENEW lease-1"), "at once, and then again and again"
        assert not lease.lost

    hold(fake, use, renew_seconds=0.05)
    assert "DONE lease-1" in fake.heard
    assert fake.heard.count("WATCH") == 2, "the second connection was closed at once: the third is later"


def test_when_the_connection_has_broken_notices_come_on_another_one(hold: Hold, opened: Open) -> None:
    held, watched = Held(lease_line("lease-1")), Watched()
    fake = opened(held, watched)
    told = threading.Event()

    def use(lease: Any) -> None:
        held.break_off()
        watched.say(NOTICE)
        assert told.wait(SECONDS_MAX)
        assert fake.heard_within(1, "RENEW lease-1")
        assert not lease.lost

    hold(fake, use, on_notice=lambda notice: told.set())
    assert fake.heard[1:] == ["WATCH", "WATCH", "RENEW lease-1", "DONE lease-1"]


def test_a_broker_that_is_read_only_has_not_ended_the_lease(hold: Hold, opened: Open) -> None:
    held = Held(lease_line("lease-1"))
    fake = opened(held, RENEW=READ_ONLY, DONE=READ_ONLY)

    def use(lease: Any) -> None:
        held.break_off()
        assert fake.heard_within(2, "RENEW lease-1")
        assert not lease.lost
        assert lease.renew_error is not None

    with pytest.raises(errors.Denied, match="another broker"):
        hold(fake, use, renew_seconds=0.05)


def test_a_lease_that_did_not_outlive_its_connection_is_lost(hold: Hold, opened: Open) -> None:
    held = Held(lease_line("lease-1"))
    fake = opened(held, RENEW=ENDED)
    told: list[Any] = []

    def use(lease: Any) -> None:
        held.break_off()
        assert lost_within(lease)
        assert lease.renew_error is not None

    hold(fake, use, on_lost=told.append)
    assert [lease.id for lease in told] == ["lease-1"]
    assert "DONE lease-1" not in fake.heard, "it is somebody else's business now"


def test_a_notice_is_told_and_one_that_may_end_the_lease_is_checked(hold: Hold, opened: Open) -> None:
    held = Held(lease_line("lease-1", 2), lease_line("lease-2", 2))
    fake = opened(held, **{"RENEW lease-2": ENDED})
    notices: list[Notice] = []

    def use(leases: Any) -> None:
        held.say(NOTICE)
        held.say(NOTICE.replace("lease-1", "lease-9"))
        held.say("NOTICE drain ip=127.0.0.1 lease=lease-2 in=0 replacement=- reason=it is too old")
        assert lost_within(leases[1])
        assert not leases[0].lost

    hold(fake, use, count=2, on_notice=notices.append)
    assert [(notice.what, notice.lease) for notice in notices] == [
        ("interrupt", "lease-1"),
        ("drain", "lease-2"),
    ]
    assert "DONE lease-1" in fake.heard
    assert "DONE lease-2" not in fake.heard


@pytest.mark.parametrize(
    ("asked", "expires_unix", "seconds"),
    [
        (60.0, 1900.0, 60.0),
        (60.0, 1060.0, 20.0),
        (0.5, 1060.0, 0.5),
        (60.0, 1001.0, 1.0),
        (60.0, 900.0, 60.0),
    ],
    ids=["long", "short", "short, but asked for more often", "the shortest", "a clock that is off"],
)
def test_a_lease_is_renewed_at_least_thrice_in_its_time(
    asked: float, expires_unix: float, seconds: float
) -> None:
    granted = replace(parse_granted(lease_line("lease-1")), expires_unix=expires_unix)
    assert often_enough(asked, granted, now_unix=1000.0) == seconds


def test_a_lease_may_be_kept_by_renewals_alone(hold: Hold, opened: Open) -> None:
    fake = opened(lines(lease_line("lease-1")))

    def use(lease: Any) -> None:
        assert fake.heard_within(2, "RENEW lease-1")

    hold(fake, use, hold="renew", ttl=30, renew_seconds=0.02)
    assert fake.heard[0] == "ACQUIRE ttl=30"
    assert "DONE lease-1" in fake.heard


def test_a_callback_that_fails_does_not_end_the_keeping(opened: Open) -> None:
    held = Held(lease_line("lease-1"))
    fake = opened(held)
    shown = threading.Event()
    before, threading.excepthook = threading.excepthook, lambda _: shown.set()
    try:
        with broker.acquire(
            "127.0.0.1", fake.port, renew_seconds=0.05, on_notice=lambda notice: 1 // 0, retry=AT_ONCE
        ):
            held.say(NOTICE)
            assert shown.wait(SECONDS_MAX)
            assert fake.heard_within(2, "RENEW lease-1")
    finally:
        threading.excepthook = before


def test_a_forked_child_leaves_the_block_and_the_lease_to_its_parent(opened: Open) -> None:
    fake = opened(Held(lease_line("lease-1")))
    script = (
        "import os, broker\n"
        f"with broker.acquire('127.0.0.1', {fake.port}) as lease:\n"
        "    child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=20, check=True
    )
    assert run.stdout == "7\n"
    assert fake.heard.count("DONE lease-1") == 1


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"hold": "hands"}, "hold is 'connection' or 'renew', not 'hands'"),
        ({"renew_seconds": 0}, "renew_seconds is a number of seconds above 0"),
        ({"hold": "renew", "on_notice": print}, "on_notice needs hold='connection'"),
        ({"count": 0}, "count= is a whole number from 1 to 1000"),
        ({"min": 2}, "min= is at most count="),
    ],
)
def test_a_block_that_makes_no_sense_asks_nothing(
    hold: Hold, opened: Open, how: dict[str, Any], sentence: str
) -> None:
    fake = opened()
    with pytest.raises(errors.BadRequest, match=sentence):
        hold(fake, lambda lease: None, **how)
    assert fake.heard == []
