"""The 2560 call: frames without a socket, then both ways of calling against a worker that does as it is told,
and against the shipped stand-in, which really evaluates Tcl.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import broker
from broker import dserv
from broker.core.errors import BadRequest
from broker.dserv import FRAME_BYTES_MAX, Call, RemoteError, RemoteTclError, aremote_eval, remote_eval

SECONDS_MAX = 5.0  # no test waits longer for what must come
LOCAL_WORKER = Path(broker.__file__).parent / "providers" / "local_worker.tcl"

Evaluate = Callable[..., str]


def frame(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


def blocking(address: str, script: str, port: int, timeout: float = SECONDS_MAX) -> str:
    return remote_eval(address, script, port, timeout)


def in_a_loop(address: str, script: str, port: int, timeout: float = SECONDS_MAX) -> str:
    return asyncio.run(aremote_eval(address, script, port, timeout))


@pytest.fixture(params=[blocking, in_a_loop])
def evaluate(request: pytest.FixtureRequest) -> Evaluate:
    chosen: Evaluate = request.param
    return chosen


class FakeWorker:
    """Takes one connection, reads one whole frame, sends `answer` and closes; with None it says nothing."""

    def __init__(self, answer: bytes | None) -> None:
        self.heard = b""
        self._answer = answer
        self._done = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SECONDS_MAX)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join(SECONDS_MAX)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(SECONDS_MAX)
            while len(self.heard) < 4 or len(self.heard) < 4 + int.from_bytes(self.heard[:4], "big"):
                self.heard += connection.recv(65_536)
            if self._answer is None:
                self._done.wait(SECONDS_MAX)
            else:
                connection.sendall(self._answer)


Hire = Callable[[bytes | None], FakeWorker]


@pytest.fixture
def hire() -> Iterator[Hire]:
    hired: list[FakeWorker] = []

    def one(answer: bytes | None) -> FakeWorker:
        hired.append(FakeWorker(answer))
        return hired[-1]

    yield one
    for worker in hired:
        worker.close()


@pytest.fixture(scope="module")
def stand_in() -> Iterator[int]:
    """The port of the shipped worker stand-in, a process of its own."""
    tclsh = shutil.which("tclsh")
    if tclsh is None:
        pytest.skip("no tclsh here: install the package tcl")
    environ = {**os.environ, "COMPUTE_BROKER_PORT": "0"}
    process = subprocess.Popen([tclsh, str(LOCAL_WORKER)], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def test_a_script_leaves_as_one_frame_that_counts_its_utf_8_bytes() -> None:
    call = Call("set x ä€")
    assert not call.begun
    assert call.begin() == b"\x00\x00\x00\x0b" + "set x ä€".encode()
    assert call.begun


def test_an_answer_is_the_same_however_it_is_cut() -> None:
    whole = frame("zwölf €".encode())
    for size in range(1, len(whole) + 1):
        call = Call("x")
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        assert [call.receive(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert call.result() == "zwölf €"


def test_what_follows_the_answer_is_not_part_of_it() -> None:
    call = Call("x")
    assert call.receive(frame(b"12") + frame(b"34"))
    assert call.result() == "12"


def test_a_nul_travels_as_tcl_writes_it() -> None:
    assert Call("a\0b").begin() == frame(b"a\xc0\x80b")
    call = Call("x")
    assert call.receive(frame(b"a\xc0\x80b"))
    assert call.result() == "a\0b"


def test_bytes_that_are_no_utf_8_do_not_cost_the_result() -> None:
    call = Call("x")
    assert call.receive(frame(b"12 \xed\xa0\xbd 34"))
    assert call.result().startswith("12 �")
    assert call.result().endswith(" 34")


@pytest.mark.parametrize("script", ["", "x" * (FRAME_BYTES_MAX + 1)], ids=["empty", "too long"])
def test_a_script_that_no_frame_carries_is_refused_before_anything_is_sent(script: str) -> None:
    with pytest.raises(BadRequest, match=r"1 to \d+ bytes"):
        remote_eval("127.0.0.1", script)


def test_half_a_surrogate_pair_is_refused_as_no_text() -> None:
    with pytest.raises(BadRequest, match="no text"):
        remote_eval("127.0.0.1", "set x \ud83d")


def test_a_result_comes_back_as_text(evaluate: Evaluate, hire: Hire) -> None:
    worker = hire(frame("größer €".encode()))
    assert evaluate("127.0.0.1", "größe", worker.port) == "größer €"
    assert worker.heard == frame("größe".encode())


def test_an_empty_result_is_an_empty_string(evaluate: Evaluate, hire: Hire) -> None:
    assert evaluate("127.0.0.1", "set x {}", hire(frame(b"")).port) == ""


def test_a_script_that_fails_raises_what_tcl_said(evaluate: Evaluate, hire: Hire) -> None:
    worker = hire(frame('!TCL_ERROR can\'t read "ä": no such variable'.encode()))
    with pytest.raises(RemoteTclError) as caught:
        evaluate("127.0.0.1", "set ä", worker.port)
    assert caught.value.message == 'can\'t read "ä": no such variable'


def test_an_error_mark_inside_a_result_is_no_error(evaluate: Evaluate, hire: Hire) -> None:
    assert evaluate("127.0.0.1", "x", hire(frame(b"see !TCL_ERROR x")).port) == "see !TCL_ERROR x"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"", "closed the connection without an answer"),
        (b"\x00\x00", "closed the connection without an answer"),
        (frame(b"0123456789")[:7], "after 3 of the 10 bytes of its answer"),
    ],
    ids=["none", "half a length", "half a body"],
)
def test_a_truncated_answer_is_an_error_and_never_a_result(
    evaluate: Evaluate, hire: Hire, answer: bytes, sentence: str
) -> None:
    worker = hire(answer)
    with pytest.raises(RemoteError, match=sentence) as caught:
        evaluate("127.0.0.1", "x", worker.port)
    assert f"127.0.0.1:{worker.port}" in caught.value.message


def test_an_answer_in_another_protocol_is_not_taken_for_a_gigabyte(evaluate: Evaluate, hire: Hire) -> None:
    with pytest.raises(RemoteError, match="is that dserv's port"):
        evaluate("127.0.0.1", "x", hire(b"HTTP/1.1 400 Bad Request\r\n").port)


def test_a_worker_that_says_nothing_is_given_up(evaluate: Evaluate, hire: Hire) -> None:
    worker = hire(None)
    with pytest.raises(RemoteError, match=r"no answer within 0\.05 s"):
        evaluate("127.0.0.1", "vwait forever", worker.port, timeout=0.05)


def test_a_worker_that_is_gone_is_named_with_what_to_do(evaluate: Evaluate) -> None:
    with socket.socket() as bound:  # bound and not listening: whoever connects is refused
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(RemoteError, match=rf"127\.0\.0\.1:{port} cannot be reached: Connection refused"):
            evaluate("127.0.0.1", "x", port)


@pytest.mark.parametrize("name", ["a..b", "x" * 64 + ".invalid"])
def test_a_name_that_is_no_host_name_is_an_error_of_ours(evaluate: Evaluate, name: str) -> None:
    with pytest.raises(RemoteError, match="cannot be reached"):
        evaluate(name, "x", 2560)


def test_the_stand_in_really_evaluates(evaluate: Evaluate, stand_in: int) -> None:
    assert evaluate("127.0.0.1", "expr 1+1", stand_in) == "2"


def test_every_character_survives_the_way_there_and_back(evaluate: Evaluate, stand_in: int) -> None:
    text = "plain ä€ \0 中文 😀"
    assert evaluate("127.0.0.1", f"return {{{text}}}", stand_in) == text
    assert evaluate("127.0.0.1", "string length {ä€\0}", stand_in) == "3"


def test_an_error_on_the_stand_in_is_raised(evaluate: Evaluate, stand_in: int) -> None:
    with pytest.raises(RemoteTclError, match=r"^größer$"):
        evaluate("127.0.0.1", "error größer", stand_in)


def test_frames_of_megabytes_pass_both_ways(evaluate: Evaluate, stand_in: int) -> None:
    text = "ä" * 2_000_000
    assert evaluate("127.0.0.1", f"return {{{text}}}", stand_in) == text


def test_the_shipped_default_is_dservs_port() -> None:
    assert dserv.WORKER_PORT == 2560
