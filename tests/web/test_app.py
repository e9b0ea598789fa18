"""The HTTP side: what /healthz and /readyz say, and when they turn red."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from broker.core.errors import CloudUnreachable
from broker.loops.runner import STUCK_SECONDS
from broker.testing import FakeCloud, LoopClock, RunningBroker, run_virtual, running_broker
from broker.web.app import SCAN_AGE_SECONDS_MIN, make_app
from tests.support.brokers import live, settings
from tests.transcripts.stage import Stage, stage

Page = Callable[[str], Awaitable[tuple[int, str]]]


@asynccontextmanager
async def served(on: Stage) -> AsyncIterator[Page]:
    """The pages of a broker, over HTTP."""
    async with TestClient(TestServer(make_app(on.daemon.metrics, on.daemon.health))) as client:

        async def page(path: str) -> tuple[int, str]:
            async with client.get(path) as response:
                return response.status, await response.text()

        yield page


def over_http(tmp_path: Path, story: Callable[[Stage, Page], Awaitable[None]], **sky: str) -> None:
    async def main() -> None:
        chosen = settings()
        listening = {"listen": "127.0.0.1:0", "http": "127.0.0.1:0"}
        chosen = chosen.model_copy(update={"broker": chosen.broker.model_copy(update=listening)})
        async with stage(chosen, tmp_path, ports=True, sky=sky) as on, served(on) as page:
            await story(on, page)

    asyncio.run(main())


def test_a_healthy_broker_says_ok(tmp_path: Path) -> None:
    async def story(on: Stage, page: Page) -> None:
        assert await page("/healthz") == (200, "ok\n")
        assert await page("/readyz") == (200, "ok\n")

    over_http(tmp_path, story)


def test_the_metrics_page_is_what_prometheus_reads(tmp_path: Path) -> None:
    async def story(on: Stage, page: Page) -> None:
        status, text = await page("/metrics")
        assert status == 200
        names = {family.name for family in text_string_to_metric_families(text)}
        assert {"compute_broker_workers", "compute_broker_connections"} <= names
        assert not [name for name in names if name.endswith("_created")]

    over_http(tmp_path, story)


def test_the_first_page_says_what_there_is_and_other_pages_do_not_exist(tmp_path: Path) -> None:
    async def story(on: Stage, page: Page) -> None:
        status, text = await page("/")
        assert status == 200
        for path in ("/metrics", "/healthz", "/readyz"):
            assert path in text
            assert (await page(path))[0] == 200
        assert (await page("/favicon.ico"))[0] == 404

    over_http(tmp_path, story)


def test_every_problem_is_a_line_and_the_page_is_red(tmp_path: Path) -> None:
    async def story(on: Stage, page: Page) -> None:
        on.daemon.runners["reap"]._ticking_since = on.daemon.clock.monotonic() - STUCK_SECONDS - 1
        on.daemon.runners["launch"].failures = 3
        status, text = await page("/healthz")
        assert status == 503
        assert text.splitlines() == ["the reap loop is stuck", "the launch loop failed 3 times in a row"]
        assert (await page("/readyz"))[0] == 200, "workers can still be handed out"

    over_http(tmp_path, story)


def test_before_the_first_scan_a_broker_is_not_ready_and_says_why(tmp_path: Path) -> None:
    async def story(on: Stage, page: Page) -> None:
        assert await page("/readyz") == (503, "fake has not been scanned yet: the cloud does not answer\n")

    over_http(tmp_path, story, listing="CloudUnreachable")


# --- when it turns red, in virtual time --------------------------------------------------------------------


def test_a_start_is_given_time_before_it_counts_as_unhealthy(tmp_path: Path) -> None:
    async def main() -> None:
        chosen = settings()
        loop = asyncio.get_running_loop()
        cloud = FakeCloud("lab", clock=LoopClock(loop))
        cloud.hold["listing"] = asyncio.Event()
        async with running_broker(chosen, tmp_path, cloud=cloud) as broker:
            health = broker.daemon.health
            assert health.not_ready() == ["fake has not been scanned yet"]
            await asyncio.sleep(SCAN_AGE_SECONDS_MIN - 5)
            assert health.problems() == []
            await asyncio.sleep(60)
            (problem,) = health.problems()
            assert problem.startswith("fake was last scanned 1")
            assert problem.endswith(": a scan took over 60 s"), "and why"
            cloud.hold.pop("listing").set()
            await broker.until(lambda: not health.not_ready())
            assert health.problems() == []

    run_virtual(main())


@pytest.mark.parametrize(("interval", "red_after"), [("30s", 150), ("5m", 1500), ("1s", 120)])
def test_scans_that_fail_turn_it_red_after_five_intervals_and_not_within_two_minutes(
    tmp_path: Path, interval: str, red_after: int
) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: not broker.daemon.health.not_ready())
        broker.cloud.fail["listing"].extend(CloudUnreachable() for _ in range(10_000))
        scanned_at = broker.daemon.context.clouds.all[0].scanned_at or 0.0
        await asyncio.sleep(scanned_at + red_after - 1 - broker.clock.monotonic())
        assert broker.daemon.health.problems() == []
        await asyncio.sleep(3)
        (problem,) = broker.daemon.health.problems()
        assert problem.endswith("the cloud does not answer")
        broker.cloud.fail["listing"].clear()
        await asyncio.sleep(30)
        assert broker.daemon.health.problems() == []

    chosen = settings()
    slow = chosen.broker.model_copy(update={"reconcile_interval": float(seconds(interval))})
    live(tmp_path, story, chosen=chosen.model_copy(update={"broker": slow}))


def seconds(text: str) -> int:
    return int(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def test_a_loop_that_hangs_turns_it_red(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        forever = asyncio.Event()
        tagging = broker.daemon.runners["tagging"]

        async def hang() -> None:
            await forever.wait()

        tagging._loop.tick = hang  # type: ignore[method-assign]
        tagging.wake()
        await asyncio.sleep(STUCK_SECONDS - 1)
        assert broker.daemon.health.problems() == []
        await asyncio.sleep(3)
        assert broker.daemon.health.problems() == ["the tagging loop is stuck"]
        forever.set()
        await asyncio.sleep(1)
        assert broker.daemon.health.problems() == []

    live(tmp_path, story)


def test_a_loop_that_fails_now_and_then_does_not_turn_it_red_and_one_that_goes_on_failing_does(
    tmp_path: Path,
) -> None:
    async def story(broker: RunningBroker) -> None:
        tagging = broker.daemon.runners["tagging"]

        async def fail() -> None:
            raise ZeroDivisionError

        tagging._loop.tick = fail  # type: ignore[method-assign]
        tagging.wake()
        await asyncio.sleep(2)
        assert broker.daemon.health.problems() == []
        await asyncio.sleep(10)
        (problem,) = broker.daemon.health.problems()
        assert problem.startswith("the tagging loop failed ")
        assert "ERROR" not in await broker.ask("GET_WORKER"), "the others go on"

    live(tmp_path, story)
