"""A background loop goes on whatever its ticks do: fail, hang, or ask to run again in the past."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import pytest

from broker.loops.runner import PAUSE_SECONDS_MAX, STUCK_SECONDS, LoopRunner
from broker.testing import LoopClock, run_virtual

Tick = Callable[[float], Awaitable[float | None]]


class Scripted:
    """A loop whose ticks do as told; remembers when they began."""

    name = "scripted"

    def __init__(self, tick: Tick) -> None:
        self._tick = tick
        self.ticked_at: list[float] = []

    async def tick(self) -> float | None:
        now = asyncio.get_running_loop().time()
        self.ticked_at.append(now)
        return await self._tick(now)


class Stage:
    """A runner under way in virtual time."""

    def __init__(self, tick: Tick) -> None:
        self.loop = Scripted(tick)
        self.told: list[tuple[str, str, float]] = []
        clock = LoopClock(asyncio.get_running_loop())
        self.runner = LoopRunner(self.loop, clock, self._failed)
        self.task = asyncio.create_task(self.runner.run())

    def _failed(self, name: str, error: Exception, pause_seconds: float) -> None:
        self.told.append((name, str(error), pause_seconds))

    async def end(self) -> None:
        assert not self.task.done(), "a loop never ends by itself"
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.task.cancelled()


def played(tick: Tick, story: Callable[[Stage], Awaitable[None]]) -> None:
    async def main() -> None:
        stage = Stage(tick)
        await story(stage)
        await stage.end()

    run_virtual(main())


async def when_woken(now: float) -> None:
    return None


async def always_failing(now: float) -> NoReturn:
    raise ZeroDivisionError("a bug")


def test_a_loop_runs_at_its_start_and_again_when_it_has_said() -> None:
    async def every_ten(now: float) -> float:
        return now + 10

    async def story(stage: Stage) -> None:
        await asyncio.sleep(35)
        assert stage.loop.ticked_at == [0, 10, 20, 30]

    played(every_ten, story)


def test_a_loop_without_a_next_time_sleeps_until_it_is_woken() -> None:
    async def story(stage: Stage) -> None:
        await asyncio.sleep(100_000)
        stage.runner.wake()
        await asyncio.sleep(1)
        assert stage.loop.ticked_at == [0, 100_000]

    played(when_woken, story)


def test_a_wake_in_the_middle_of_a_tick_is_not_lost() -> None:
    async def slow(now: float) -> None:
        await asyncio.sleep(5)

    async def story(stage: Stage) -> None:
        await asyncio.sleep(2)
        stage.runner.wake()
        await asyncio.sleep(100)
        assert stage.loop.ticked_at == [0, 5]

    played(slow, story)


def test_many_wakes_are_one_tick() -> None:
    async def story(stage: Stage) -> None:
        await asyncio.sleep(1)
        for _ in range(1000):
            stage.runner.wake()
        await asyncio.sleep(1)
        assert len(stage.loop.ticked_at) == 2

    played(when_woken, story)


def test_a_failing_tick_is_told_counted_and_tried_again_after_a_growing_pause() -> None:
    async def story(stage: Stage) -> None:
        await asyncio.sleep(600)
        pauses = [pause for _, _, pause in stage.told]
        assert pauses[:7] == [1, 2, 4, 8, 16, 32, PAUSE_SECONDS_MAX]
        assert set(pauses[6:]) == {PAUSE_SECONDS_MAX}
        assert {(name, error) for name, error, _ in stage.told} == {("scripted", "a bug")}
        assert stage.runner.failures == stage.runner.failures_total == len(stage.told)

    played(always_failing, story)


def test_a_failing_loop_cannot_be_woken_into_a_hot_one() -> None:
    async def story(stage: Stage) -> None:
        for _ in range(600):
            stage.runner.wake()
            await asyncio.sleep(0.1)
        assert len(stage.loop.ticked_at) <= 7

    played(always_failing, story)


def test_a_loop_that_works_again_has_no_failures_in_a_row_and_remembers_all() -> None:
    failures_left = 3

    async def twice(now: float) -> float:
        nonlocal failures_left
        if failures_left:
            failures_left -= 1
            raise ZeroDivisionError("a bug")
        return now + 100

    async def story(stage: Stage) -> None:
        await asyncio.sleep(1)
        assert stage.runner.failures == 1
        await asyncio.sleep(20)
        assert stage.runner.failures == 0
        assert stage.runner.failures_total == 3

    played(twice, story)


def test_a_part_of_a_tick_that_was_cancelled_does_not_end_the_loop() -> None:
    async def cancelled_within(now: float) -> float:
        part = asyncio.create_task(asyncio.sleep(1000))
        asyncio.get_running_loop().call_later(1, part.cancel)
        await part
        return now

    async def story(stage: Stage) -> None:
        await asyncio.sleep(10)
        assert len(stage.told) >= 2, "it is told, like any failure, and tried again"

    played(cancelled_within, story)


@pytest.mark.parametrize("where", ["tick", "pause", "wait"])
def test_a_loop_that_is_cancelled_ends_wherever_it_is(where: str) -> None:
    async def tick(now: float) -> float:
        if where == "tick":
            await asyncio.sleep(1000)
        if where == "pause":
            raise ZeroDivisionError
        return now + 1000

    async def story(stage: Stage) -> None:
        await asyncio.sleep(0.5)

    played(tick, story)


def test_a_tick_that_hangs_counts_as_stuck_after_a_while_and_not_before() -> None:
    async def hanging(now: float) -> None:
        await asyncio.sleep(1000)

    async def story(stage: Stage) -> None:
        await asyncio.sleep(STUCK_SECONDS - 1)
        assert not stage.runner.stuck()
        await asyncio.sleep(2)
        assert stage.runner.stuck()
        await asyncio.sleep(1000)
        assert not stage.runner.stuck(), "the tick has ended after all"

    played(hanging, story)


@pytest.mark.parametrize("tick", [when_woken, always_failing])
def test_a_loop_that_sleeps_or_pauses_is_not_stuck(tick: Tick) -> None:
    async def story(stage: Stage) -> None:
        for _ in range(100):
            await asyncio.sleep(60.5)
            assert not stage.runner.stuck()

    played(tick, story)


def test_a_next_time_in_the_past_still_lets_others_have_their_turn() -> None:
    async def at_once(now: float) -> float:
        return now - 10

    async def story(stage: Stage) -> None:
        for _ in range(1000):
            await asyncio.sleep(0)
        assert 1 < len(stage.loop.ticked_at) <= 1000

    played(at_once, story)
