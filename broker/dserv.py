"""The call to a worker's own port: a Tcl script goes out, its result comes back.

A frame is a 4-byte big-endian length and that many bytes of UTF-8; the answer is framed alike; an answer
that starts with `!TCL_ERROR ` is an error; an empty frame gets no answer. `Call` knows this and no socket.
Length and script leave in one write, since dserv reads the four bytes with a single recv(); and dserv reads a
script only up to its first zero byte, so NUL travels as C0 80, as Tcl writes it (dserv: src/TclServer.cpp).
"""

from __future__ import annotations

from broker import wire
from broker.core.errors import BadRequest, BrokerError

WORKER_PORT = 2560
EVAL_SECONDS = 3600.0  # when the caller does not say; a worker that vanishes is noticed by wire.KEEP_ALIVE
FRAME_BYTES_MAX = 64 * 1024 * 1024  # dserv has no limit; "HTTP", read as a length, is more than a gigabyte
ERROR_PREFIX = "!TCL_ERROR "

_LENGTH_BYTES = 4
_NUL, _TCL_NUL = b"\x00", b"\xc0\x80"


class RemoteError(BrokerError):
    """the worker could not be asked"""


class RemoteTclError(RemoteError):
    """the script failed on the worker"""


def remote_eval(address: str, script: str, port: int = WORKER_PORT, timeout: float = EVAL_SECONDS) -> str:
    """The result of the Tcl script on that worker; `timeout` is in seconds.

    Raises RemoteTclError when the script fails, RemoteError when there is no whole answer, BadRequest for a
    script that is empty or too long.
    """
    call = Call(script)
    try:
        wire.ask(address, port, call, timeout)
    except wire.TROUBLE as error:
        raise _unanswered(address, port, call, timeout, error) from error
    return call.result()


async def aremote_eval(
    address: str, script: str, port: int = WORKER_PORT, timeout: float = EVAL_SECONDS
) -> str:
    """`remote_eval` for an event loop."""
    call = Call(script)
    try:
        await wire.ask_async(address, port, call, timeout)
    except wire.TROUBLE as error:
        raise _unanswered(address, port, call, timeout, error) from error
    return call.result()


class Call:
    """One script and its answer, as frames."""

    def __init__(self, script: str) -> None:
        self.begun = False
        self._script = encode(script)
        self._answer = bytearray()

    def begin(self) -> bytes:
        self.begun = True
        return self._script

    def receive(self, data: bytes) -> bool:
        if not data:
            raise ConnectionResetError(f"it closed the connection {self._heard()}")
        self._answer += data
        length = self._length()
        if length is not None and length > FRAME_BYTES_MAX:
            raise RemoteError(
                f"the worker announces an answer of {length} bytes, and a frame has at most "
                f"{FRAME_BYTES_MAX}: is that dserv's port?"
            )
        return length is not None and len(self._answer) >= _LENGTH_BYTES + length

    def result(self) -> str:
        """The answer's text. Raises RemoteTclError when it is an error."""
        end = _LENGTH_BYTES + (self._length() or 0)
        text = decode(bytes(memoryview(self._answer)[_LENGTH_BYTES:end]))
        if text.startswith(ERROR_PREFIX):
            raise RemoteTclError(text.removeprefix(ERROR_PREFIX))
        return text

    def _length(self) -> int | None:
        """The number of bytes that the answer announces, once that is known."""
        if len(self._answer) < _LENGTH_BYTES:
            return None
        return int.from_bytes(self._answer[:_LENGTH_BYTES], "big")

    def _heard(self) -> str:
        length = self._length()
        if length is None:
            return "without an answer"
        return f"after {len(self._answer) - _LENGTH_BYTES} of the {length} bytes of its answer"


def encode(text: str) -> bytes:
    """A frame. Raises BadRequest for text that no frame can carry."""
    try:
        body = text.encode().replace(_NUL, _TCL_NUL)
    except UnicodeEncodeError as error:
        raise BadRequest(f"the script is no text: {error.reason}") from error
    if not 1 <= len(body) <= FRAME_BYTES_MAX:
        raise BadRequest(f"a script has 1 to {FRAME_BYTES_MAX} bytes, and this one has {len(body)}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def decode(body: bytes) -> str:
    """A frame's text. What is no UTF-8 (Tcl lets half a surrogate pair out) reads as U+FFFD: one odd
    character must not cost the whole result."""
    return body.replace(_TCL_NUL, _NUL).decode(errors="replace")


def _unanswered(address: str, port: int, call: Call, seconds: float, error: Exception) -> RemoteError:
    where = wire.place(address, port)
    if not call.begun:
        why = f"cannot be reached: {wire.reason(error)}. It may be gone: ask the broker for another"
    elif isinstance(error, TimeoutError) and not error.errno:
        why = f"gave no answer within {seconds:g} s; timeout= says how long it may take"
    else:
        why = f"gave no whole answer: {wire.reason(error)}"
    return RemoteError(f"the worker at {where} {why}")
