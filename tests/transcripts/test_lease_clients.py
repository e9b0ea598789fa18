"""The corpus's dialogues about leases through what the client libraries have for them.

ACQUIRE is an `acquire`, WATCH a `watch`, each voice a client of its own; what the library makes of the
broker's lines is written down as the line that it was: what it understands is held to what the broker says.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

from broker.client import AsyncClient, Client
from broker.core.errors import BrokerError
from broker.core.protocol import Acquire, Done, Malformed, Renew, Watch, parse_line
from broker.core.replies import Granted
from broker.errand import Retry
from broker.lease_errands import NoticeReader
from tests.support.programs import tclsh
from tests.transcripts.stage import PEER, SECONDS_MAX, check, settings_of, stage
from tests.transcripts.transcript import (
    PLACEHOLDER,
    VANISHES,
    Direction,
    Ends,
    Hears,
    Memory,
    Says,
    Transcript,
    corpus,
)

TCL_PACKAGE = Path(__file__).resolve().parents[2] / "clients" / "tcl"
PLAYER = Path(__file__).with_name("lease_player.tcl")
ONCE = Retry(attempts_max=1)


def plays(transcript: Transcript) -> bool:
    """Whether it is about leases, and there is nothing in it that a library never says."""
    said = [line.text for line in transcript.lines if isinstance(line, Says)]
    commands = [parse_line(PLACEHOLDER.sub("known", text).encode()) for text in said]
    return (
        any(isinstance(command, Acquire | Watch) for command in commands)
        and not any(isinstance(command, Malformed) for command in commands)
        and not any(isinstance(line, Ends) and line.how != VANISHES for line in transcript.lines)
        and not transcript.takes_time
    )


PLAYABLE = [transcript for transcript in corpus() if plays(transcript)]


def test_there_is_a_dialogue_for_everything_that_is_new_with_leases() -> None:
    heard = {line.text.split()[0] for one in PLAYABLE for line in one.lines if isinstance(line, Says | Hears)}
    assert {"ACQUIRE", "RENEW", "DONE", "WATCH", "LEASE", "PENDING", "NOTICE"} <= heard


class Voices(Protocol):
    """The clients of one dialogue, by number."""

    async def say(self, voice: int, text: str) -> None: ...
    async def hear(self, voice: int) -> str: ...
    async def vanish(self, voice: int) -> None: ...
    async def end(self) -> None: ...


async def played(transcript: Transcript, state_dir: Path, voices_of: Callable[[int], Voices]) -> None:
    memory, sky = Memory(), transcript.headers.get("cloud")
    async with stage(settings_of(transcript), state_dir, ports=True, sky=sky) as on:
        voices = voices_of(on.port)
        try:
            for line in transcript.lines:
                match line:
                    case Says():
                        await voices.say(line.client, memory.to_send(line).removesuffix("\n"))
                    case Hears():
                        async with asyncio.timeout(SECONDS_MAX):
                            check(memory, line, await voices.hear(line.client))
                    case Direction():
                        await on.carry_out(line)
                    case Ends():
                        await voices.vanish(line.client)
        finally:
            await voices.end()


# --- the Python clients -------------------------------------------------------------------------------------


class PythonVoices:
    """Each command of a voice is a task; what it leaves open is closed at the end, or when it vanishes."""

    def __init__(self, port: int, kind: type[Client] | type[AsyncClient]) -> None:
        self._port = port
        self._kind = kind
        self._loop = asyncio.get_running_loop()
        self._lines: dict[int, asyncio.Queue[str]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: dict[int, list[socket.socket]] = {}

    async def say(self, voice: int, text: str) -> None:
        self._tasks.append(asyncio.create_task(self._play(voice, text)))

    async def hear(self, voice: int) -> str:
        return await self._lines_of(voice).get()

    async def vanish(self, voice: int) -> None:
        for sock in self._sockets.pop(voice):
            sock.close()

    async def end(self) -> None:
        for voice in tuple(self._sockets):
            await self.vanish(voice)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _lines_of(self, voice: int) -> asyncio.Queue[str]:
        return self._lines.setdefault(voice, asyncio.Queue())

    def _told(self, voice: int, line: bytes) -> None:
        """From whatever thread: in its place in the order."""
        self._loop.call_soon_threadsafe(self._lines_of(voice).put_nowait, line.decode("ascii").rstrip("\n"))

    async def _play(self, voice: int, text: str) -> None:
        command = parse_line(text.encode())
        client = self._kind(PEER, self._port, client=getattr(command, "client", None), retry=ONCE)
        try:
            match command:
                case Acquire():
                    for granted in await self._acquire(voice, client, command):
                        self._told(voice, granted.line())
                case Watch():
                    first, sock = await _awaited(client.watch_and_stay)
                    self._sockets.setdefault(voice, []).append(sock)
                    self._told(voice, b"OK")
                    await self._watch(voice, first, sock)
                case Renew() | Done():
                    call = client.renew if isinstance(command, Renew) else client.done
                    await _awaited(call, command.lease)
                    self._told(voice, b"OK")
                case _:
                    self._told(voice, (await _awaited(client.request, text)).encode())
        except BrokerError as error:
            self._told(voice, error.wire().encode())

    async def _acquire(self, voice: int, client: Any, command: Acquire) -> list[Granted]:
        wanted = {
            key: getattr(command, key)
            for key in ("pool", "cores", "type", "region", "wait", "exclusive", "count", "min", "ttl")
        }
        wanted["on_pending"] = lambda pending: self._told(voice, pending.line())
        if command.hold is None:
            granted: list[Granted] = await _awaited(client.acquire, **wanted)
            return granted
        granted, sock = await _awaited(client.acquire_and_stay, **wanted)
        self._sockets.setdefault(voice, []).append(sock)
        return granted

    async def _watch(self, voice: int, first: bytes, sock: socket.socket) -> None:
        reader, data = NoticeReader(), first
        sock.setblocking(False)
        with suppress(OSError):
            while True:  # the end of the dialogue ends it
                for notice in reader.receive(data) if data else ():
                    self._told(voice, notice.line())
                data = await self._loop.sock_recv(sock, 4096)


async def _awaited(call: Callable[..., Any], *arguments: Any, **wanted: Any) -> Any:
    """What either client answers."""
    if asyncio.iscoroutinefunction(call):
        return await call(*arguments, **wanted)
    return await asyncio.to_thread(call, *arguments, **wanted)


# --- the Tcl client -----------------------------------------------------------------------------------------


class TclVoices:
    """One Tcl interpreter that plays all voices."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._process: asyncio.subprocess.Process | None = None
        self._early: list[tuple[int, str]] = []  # what was said to others than the one that was listened to

    async def say(self, voice: int, text: str) -> None:
        await self._write(f"{voice} {text}\n")

    async def vanish(self, voice: int) -> None:
        await self._write(f"{voice} VANISH\n")

    async def hear(self, voice: int) -> str:
        for early in self._early:
            if early[0] == voice:
                self._early.remove(early)
                return early[1]
        assert self._process is not None
        assert self._process.stdout is not None
        while True:  # the caller's patience ends it
            line = await self._process.stdout.readline()
            assert line.endswith(b"\n"), "the Tcl interpreter has ended"
            other, _, text = line[:-1].decode().partition(" ")
            if int(other) == voice:
                return text
            self._early.append((int(other), text))

    async def end(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            async with asyncio.timeout(SECONDS_MAX):
                await self._process.wait()

    async def _write(self, line: str) -> None:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                tclsh(),
                str(PLAYER),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={
                    "PATH": os.environ.get("PATH", ""),
                    "TCLLIBPATH": str(TCL_PACKAGE),
                    "COMPUTE_BROKER_HOST": PEER,
                    "COMPUTE_BROKER_PORT": str(self._port),
                },
            )
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode("ascii"))
        await self._process.stdin.drain()


VOICES: dict[str, Callable[[int], Voices]] = {
    "blocking": lambda port: PythonVoices(port, Client),
    "async": lambda port: PythonVoices(port, AsyncClient),
    "tcl": TclVoices,
}


@pytest.mark.parametrize("kind", VOICES)
@pytest.mark.parametrize("transcript", PLAYABLE, ids=str)
def test_the_clients_understand_what_the_broker_says(
    transcript: Transcript, kind: str, state_dir: Path
) -> None:
    asyncio.run(played(transcript, state_dir, VOICES[kind]))
