"""One question and its answer over one TCP connection, blocking and async.

What is asked, and how its answer reads, is a `Question`, which never sees a socket; here are the sockets,
which never look at what they carry. A connection is for one question and is closed whatever happens. Trouble
comes out as the operating system tells it: who asked knows the sentence that a person needs.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from contextlib import suppress
from typing import Protocol

CONNECT_SECONDS_MAX = 10.0  # a host that drops packets must not look like a worker that boots
CHUNK_BYTES_MAX = 256 * 1024  # read at once: a long answer in few calls, a short one in little memory

# A connection that waits for a boot is silent for minutes, and NAT gateways forget a silent connection after
# 350 s (AWS networking blog, "Implementing long-running TCP connections within VPC networking"). Also how a
# peer whose machine is gone, and which therefore never says goodbye, is noticed: after 30 + 6 * 10 s.
KEEP_ALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))

TROUBLE = (OSError, UnicodeError)  # UnicodeError: a host name that cannot be one, such as "a..b"
REFUSED_UNREAD = (BrokenPipeError, ConnectionResetError)  # the peer hung up early: it may have said why


class Question(Protocol):
    """What is asked on one connection."""

    def begin(self) -> bytes:
        """The bytes to send, now that somebody listens."""

    def receive(self, data: bytes) -> bool:
        """Take in what came, `b""` for the end of the stream; True when the answer is complete.

        Raises ConnectionResetError when the stream ends before the answer does.
        """


def ask(host: str, port: int, question: Question, seconds: float) -> None:
    """Carry the question there and its answer back, in so many seconds. Raises TROUBLE."""
    with ask_and_stay(host, port, question, seconds) as sock:
        _reset_on_close(sock, False)


def ask_and_stay(host: str, port: int, question: Question, seconds: float) -> socket.socket:
    """`ask`, and the connection on which the answer came: still open, and reset when it is closed."""
    ends_at = time.monotonic() + seconds
    sock = socket.create_connection((host, port), min(_left(ends_at), CONNECT_SECONDS_MAX))
    try:
        _keep_alive(sock)
        _reset_on_close(sock, True)
        sock.settimeout(_left(ends_at))
        with suppress(*REFUSED_UNREAD):
            sock.sendall(question.begin())
        complete = False
        while not complete:
            sock.settimeout(_left(ends_at))
            complete = question.receive(sock.recv(CHUNK_BYTES_MAX))
    except BaseException:  # the caller's own too: nobody else knows this connection
        sock.close()
        raise
    return sock


async def ask_async(host: str, port: int, question: Question, seconds: float) -> None:
    """`ask` for an event loop. The end of the task is the end of the connection."""
    with await ask_and_stay_async(host, port, question, seconds) as sock:
        _reset_on_close(sock, False)


async def ask_and_stay_async(host: str, port: int, question: Question, seconds: float) -> socket.socket:
    """`ask_and_stay` for an event loop."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(seconds):
        sock = await _connected(host, port)
        try:
            _keep_alive(sock)
            _reset_on_close(sock, True)
            with suppress(*REFUSED_UNREAD):
                await loop.sock_sendall(sock, question.begin())
            complete = False
            while not complete:
                complete = question.receive(await loop.sock_recv(sock, CHUNK_BYTES_MAX))
        except BaseException:
            sock.close()
            raise
        return sock


def place(host: str, port: int) -> str:
    """`host:port` as a person writes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_over(error: Exception) -> bool:
    """Whether the time that was given is over: not so when the system has given a silent peer up."""
    return isinstance(error, TimeoutError) and not error.errno


def reason(error: Exception) -> str:
    """What went wrong, in the operating system's words, without numbers and without Python's."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, UnicodeError):
        return "that is no host name"
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)


async def _connected(host: str, port: int) -> socket.socket:
    """A connection to the first of the host's addresses that takes one."""
    loop = asyncio.get_running_loop()
    trouble = OSError(f"{host} has no address")
    async with asyncio.timeout(CONNECT_SECONDS_MAX):
        for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                await loop.sock_connect(sock, address)
                return sock
            except OSError as error:
                sock.close()
                trouble = error
            except BaseException:  # cancelled, or out of time
                sock.close()
                raise
    raise trouble


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE:
        if hasattr(socket, name):  # not every system has all three
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _reset_on_close(sock: socket.socket, wanted: bool) -> None:
    """While an answer is awaited, a client that ends, killed or not, leaves its place in the queue at once.

    An orderly end of its stream would only say that it has no more to ask (socket(7), SO_LINGER).
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", int(wanted), 0))


def _left(ends_at: float) -> float:
    """Seconds until then. Raises TimeoutError when it is over: a socket takes 0 for "do not wait at all"."""
    left = ends_at - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
