"""The corpus against the broker itself: without sockets in virtual time, and over loopback on both loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from broker.testing import run_virtual
from tests.transcripts.stage import (
    Cut,
    Performance,
    byte_by_byte,
    line_by_line,
    settings_of,
    stage,
    together,
)
from tests.transcripts.transcript import Transcript, corpus

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


async def played(transcript: Transcript, state_dir: Path, *, ports: bool, cut: Cut) -> None:
    sky = transcript.headers.get("cloud")
    async with stage(settings_of(transcript), state_dir, ports=ports, sky=sky) as on:
        await Performance(transcript, on, cut=cut).play()


@pytest.mark.parametrize("cut", [together, line_by_line, byte_by_byte])
@pytest.mark.parametrize("transcript", corpus(), ids=str)
def test_without_sockets_however_the_bytes_are_cut(transcript: Transcript, cut: Cut, state_dir: Path) -> None:
    run_virtual(played(transcript, state_dir, ports=False, cut=cut))


@pytest.mark.parametrize(("loop", "cut"), [("asyncio", together), ("uvloop", line_by_line)])
@pytest.mark.parametrize("transcript", [t for t in corpus() if not t.takes_time], ids=str)
def test_over_loopback_on_either_event_loop(
    transcript: Transcript, loop: str, cut: Cut, state_dir: Path
) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(played(transcript, state_dir, ports=True, cut=cut))
