"""The pace at which the broker calls EC2, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from broker.core.errors import Throttled
from broker.core.model import Order
from broker.providers.ec2 import Ec2Provider
from broker.providers.ec2_api import METHODS
from broker.providers.ec2_errors import client_error
from broker.providers.ec2_pace import LIMITS, WAIT_SECONDS_MAX, Pace, family_of
from broker.testing import EPOCH_UNIX, run_virtual
from tests.providers.ec2_support import ScriptedClient, opened, shape

THROTTLE = client_error("RunInstances", "RequestLimitExceeded", "Request limit exceeded.", 503)


def order(provider: Ec2Provider, number: int) -> Order:
    return provider.prepare("default", f"order-{number}", provider.offerings("default")[:1], EPOCH_UNIX)


async def timed(call: Coroutine[Any, Any, Any]) -> tuple[float, object]:
    """When it ended, and how."""
    outcomes = await asyncio.gather(call, return_exceptions=True)
    return asyncio.get_running_loop().time(), outcomes[0]


def test_launches_leave_in_a_burst_and_then_two_a_second() -> None:
    async def story() -> None:
        client = ScriptedClient(RunInstances={"Instances": [shape()]})
        async with opened(client) as provider:
            ends = await asyncio.gather(*(timed(provider.launch(order(provider, n))) for n in range(8)))
        assert [at for at, _ in ends] == pytest.approx([0.0] * 5 + [0.5, 1.0, 1.5])
        assert [parameters["ClientToken"] for parameters in client.sent("RunInstances")] == [
            f"order-{n}" for n in range(8)
        ]

    run_virtual(story())


def test_launches_that_are_throttled_to_a_standstill_do_not_delay_a_terminate() -> None:
    async def story() -> None:
        client = ScriptedClient(RunInstances=THROTTLE)
        async with opened(client) as provider:
            launches = [asyncio.create_task(timed(provider.launch(order(provider, n)))) for n in range(300)]
            await asyncio.sleep(1.0)
            asked_at = asyncio.get_running_loop().time()
            ended_at, outcome = await timed(provider.terminate(["i-00000001"]))
            assert (ended_at, outcome) == (asked_at, None)
            assert sum(not launch.done() for launch in launches) > 20  # it overtook those that still wait
            assert all(isinstance(error, Throttled) for _, error in await asyncio.gather(*launches))
        assert len(client.sent("TerminateInstances")) == 1

    run_virtual(story())


def test_a_launch_that_would_wait_too_long_is_not_sent_and_says_so_at_once() -> None:
    async def story() -> None:
        heard: list[tuple[str, str]] = []
        client = ScriptedClient(RunInstances={"Instances": [shape()]})
        async with opened(client, on_call=lambda api, outcome: heard.append((api, outcome))) as provider:
            ends = await asyncio.gather(*(timed(provider.launch(order(provider, n))) for n in range(70)))
        refused = [(at, error) for at, error in ends if isinstance(error, Throttled)]
        assert len(client.sent("RunInstances")) == 5 + 2 * WAIT_SECONDS_MAX
        assert [at for at, _ in refused] == [0.0] * 5
        assert {error.sent for _, error in refused if isinstance(error, Throttled)} == {False}
        assert "was not sent" in str(refused[0][1])
        assert heard.count(("RunInstances", "throttled")) == 5
        assert heard.count(("RunInstances", "ok")) == 65

    run_virtual(story())


def test_a_throttle_of_awss_slows_this_sort_of_call_and_no_other() -> None:
    async def story() -> None:
        client = ScriptedClient(RunInstances=[THROTTLE, {"Instances": [shape()]}])
        async with opened(client) as provider:
            with pytest.raises(Throttled):
                await provider.launch(order(provider, 0))
            ends = await asyncio.gather(*(timed(provider.launch(order(provider, n))) for n in range(1, 4)))
            assert [at for at, _ in ends] == pytest.approx([1.0, 2.0, 3.0])
            assert (await timed(provider.listing()))[0] == pytest.approx(3.0)
            assert (await timed(provider.tag("i-00000001", {"a": "b"})))[0] == pytest.approx(3.0)

    run_virtual(story())


def test_who_is_cancelled_while_it_waits_leaves_its_token_to_the_next() -> None:
    async def story() -> None:
        pace = Pace(asyncio.get_running_loop().time)
        for _ in range(5):
            await pace.wait("RunInstances")
        waiting = [asyncio.create_task(pace.wait("CreateFleet")) for _ in range(3)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert (await timed(pace.wait("RunInstances")))[0] == pytest.approx(0.5)

    run_virtual(story())


def test_every_call_of_the_provider_has_a_bucket_and_launches_share_one_that_no_other_call_uses() -> None:
    families = {api: family_of(api) for api in METHODS}
    assert set(families.values()) <= LIMITS.keys()
    assert {api for api, family in families.items() if family == "TerminateInstances"} == {
        "TerminateInstances"
    }
    assert family_of("RunInstances") == family_of("CreateFleet")
    assert family_of("DescribeSpotPriceHistory") == family_of("DescribeInstances")
    assert family_of("CreateLaunchTemplate") == "others"
