"""The corpus through the client libraries: commands by `request`, each error back into its sentence."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from broker.client import AsyncClient, Client
from broker.core.errors import BrokerError
from broker.errand import Retry
from tests.transcripts.stage import PEER, SECONDS_MAX, check, settings_of, stage
from tests.transcripts.transcript import Hears, Memory, Says, Transcript, corpus

TCL_PACKAGE = Path(__file__).resolve().parents[2] / "clients" / "tcl"
PLAYER = Path(__file__).with_name("player.tcl")
ONCE = Retry(attempts_max=1)
PLAYABLE = [t for t in corpus() if t.one_by_one]

Ask = Callable[[str], Awaitable[str]]


async def played(transcript: Transcript, state_dir: Path, ask_of: Callable[[int], Ask]) -> None:
    """Every command on a connection of its own, as the libraries do it."""
    memory, sky = Memory(), transcript.headers.get("cloud")
    async with stage(settings_of(transcript), state_dir, ports=True, sky=sky) as on:
        ask = ask_of(on.port)
        for says, hears in zip(transcript.lines[::2], transcript.lines[1::2], strict=True):
            assert isinstance(says, Says)
            assert isinstance(hears, Hears)
            check(memory, hears, await ask(memory.to_send(says).removesuffix("\n")))


@pytest.mark.parametrize("transcript", PLAYABLE, ids=str)
def test_with_the_blocking_python_client(transcript: Transcript, state_dir: Path) -> None:
    def ask_of(port: int) -> Ask:
        client = Client(PEER, port, retry=ONCE)

        def ask(line: str) -> str:
            try:
                return client.request(line)
            except BrokerError as error:
                return error.wire()

        return lambda line: asyncio.to_thread(ask, line)

    asyncio.run(played(transcript, state_dir, ask_of))


@pytest.mark.parametrize("transcript", PLAYABLE, ids=str)
def test_with_the_async_python_client(transcript: Transcript, state_dir: Path) -> None:
    def ask_of(port: int) -> Ask:
        client = AsyncClient(PEER, port, retry=ONCE)

        async def ask(line: str) -> str:
            try:
                return await client.request(line)
            except BrokerError as error:
                return error.wire()

        return ask

    asyncio.run(played(transcript, state_dir, ask_of))


@pytest.mark.parametrize("transcript", PLAYABLE, ids=str)
def test_with_the_tcl_client(transcript: Transcript, state_dir: Path) -> None:
    tclsh = shutil.which("tclsh")
    assert tclsh is not None, "these tests need Tcl 8.6: install the system package `tcl`"
    program = tclsh

    async def main() -> None:
        players: list[TclPlayer] = []

        def ask_of(port: int) -> Ask:
            players.append(TclPlayer(program, port))
            return players[0].ask

        try:
            await played(transcript, state_dir, ask_of)
        finally:
            for player in players:
                await player.end()

    asyncio.run(main())


class TclPlayer:
    """One Tcl interpreter that plays the client's part."""

    def __init__(self, tclsh: str, port: int) -> None:
        self._tclsh, self._port = tclsh, port
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, line: str) -> str:
        async with asyncio.timeout(SECONDS_MAX):
            if self._process is None:
                self._process = await self._started()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(f"{line}\n".encode("ascii"))
            reply = await self._process.stdout.readline()
        assert reply.endswith(b"\n"), "the Tcl interpreter has ended"
        return reply[:-1].decode()

    async def end(self) -> None:
        """End of input ends it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            async with asyncio.timeout(SECONDS_MAX):
                await self._process.wait()

    async def _started(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            self._tclsh,
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
