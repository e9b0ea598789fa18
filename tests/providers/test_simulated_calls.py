"""What befalls a call on its way to the simulated EC2 and back, by script and by chance."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from botocore import exceptions as sdk

from broker.core.errors import CloudUnreachable, CredentialsRefused, Throttled
from broker.providers.ec2_api import CONNECT_SECONDS_MAX, LAUNCHING, OTHERWISE
from broker.providers.sim_weather import Road
from broker.providers.simulated import EVERY_API, Ending, Fault
from broker.testing import EPOCH_UNIX
from tests.providers.simulated_support import Lab, code_of, play, steady
from tests.support.buying import launch_one

SILENCES = (sdk.HTTPClientError, sdk.ConnectionError)


async def seconds_of(lab: Lab, call: Any, error: type[Exception]) -> float:
    """How long the caller waited for this error."""
    began_at = lab.now
    with pytest.raises(error):
        await call
    return lab.now - began_at


# --- lost and late -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "error", "seconds"),
    [
        (Ending.UNREACHABLE, sdk.EndpointConnectionError, 0.2),
        (Ending.CONNECT_TIMEOUT, sdk.ConnectTimeoutError, CONNECT_SECONDS_MAX),
        (Ending.RESET, sdk.ConnectionClosedError, 0.2),
        (Ending.SILENCE, sdk.ReadTimeoutError, LAUNCHING.answer_seconds_max),
    ],
)
def test_a_request_that_never_arrives_launches_nothing(
    ending: Ending, error: type[Exception], seconds: float
) -> None:
    async def story(lab: Lab) -> None:
        lab.sim.befall("RunInstances", Fault.REQUEST_LOST, ending=ending)
        assert await seconds_of(lab, lab.run(), error) == pytest.approx(seconds)
        assert lab.sim.truth() == []
        assert lab.sim.faults["request lost"] == 1

    play(story)


@pytest.mark.parametrize(
    ("ending", "error", "seconds"),
    [
        (Ending.RESET, sdk.ConnectionClosedError, 0.2),
        (Ending.SILENCE, sdk.ReadTimeoutError, LAUNCHING.answer_seconds_max),
    ],
)
def test_a_launch_whose_answer_is_lost_was_carried_out(
    ending: Ending, error: type[Exception], seconds: float
) -> None:
    async def story(lab: Lab) -> None:
        lab.sim.befall("RunInstances", Fault.ANSWER_LOST, ending=ending)
        assert await seconds_of(lab, lab.run(), error) == pytest.approx(seconds)
        (machine,) = lab.sim.truth()
        assert (await lab.run())["InstanceId"] == machine.id
        assert len(lab.sim.truth()) == 1

    play(story)


def test_a_late_answer_still_names_the_machine() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.befall("RunInstances", Fault.ANSWER_LATE, seconds=50)
        instance = await lab.run()
        assert lab.now == pytest.approx(50.2)
        assert instance["State"]["Name"] == "pending"  # as it was when EC2 answered

    play(story)


def test_an_answer_that_comes_too_late_is_no_answer() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.befall("RunInstances", Fault.ANSWER_LATE, seconds=90)
        seconds = await seconds_of(lab, lab.run(), sdk.ReadTimeoutError)
        assert seconds == pytest.approx(LAUNCHING.answer_seconds_max)
        assert len(lab.sim.truth()) == 1

    play(story)


def test_a_request_may_arrive_long_after_its_sender_gave_up() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.befall("RunInstances", Fault.REQUEST_LATE, seconds=200)
        await seconds_of(lab, lab.run(), sdk.ReadTimeoutError)
        await asyncio.sleep(100)
        assert lab.sim.truth() == []
        await asyncio.sleep(100)
        (machine,) = lab.sim.truth()
        assert machine.launched_at == pytest.approx(200.1)

    play(story)


def test_a_late_request_meets_what_was_launched_with_its_token_meanwhile() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.befall("RunInstances", Fault.REQUEST_LATE, seconds=100)
        await seconds_of(lab, lab.run(), sdk.ReadTimeoutError)
        await lab.run()
        await asyncio.sleep(100)
        assert len(lab.sim.truth()) == 1

    play(story)


def test_a_caller_that_is_cancelled_has_asked_all_the_same() -> None:
    async def story(lab: Lab) -> None:
        task = asyncio.create_task(lab.run())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        assert lab.sim.truth() == []
        await asyncio.sleep(0.1)
        assert len(lab.sim.truth()) == 1

    play(story)


def test_a_server_error_leaves_open_whether_the_call_was_carried_out() -> None:
    async def story(lab: Lab) -> None:
        for n in range(20):
            lab.sim.befall("RunInstances", Fault.SERVER_ERROR)
            assert await code_of(lab.run(f"t-{n}")) == "InternalError"
            await asyncio.sleep(10)
        assert 0 < len(lab.sim.truth()) < 20

    play(story)


# --- the SDK's manners ---------------------------------------------------------------------------------


def test_a_launch_is_tried_once_and_everything_else_twice() -> None:
    async def story(lab: Lab) -> None:
        met = lab.sim.befall(EVERY_API, Fault.REQUEST_LOST, times=9, ending=Ending.UNREACHABLE)
        await seconds_of(lab, lab.run(), sdk.EndpointConnectionError)
        assert met.hits == 1
        await seconds_of(lab, lab.ids(), sdk.EndpointConnectionError)
        assert met.hits == 3

    play(story)


@pytest.mark.parametrize(
    "fault", [Fault.REQUEST_LOST, Fault.ANSWER_LOST, Fault.THROTTLED, Fault.SERVER_ERROR]
)
def test_one_bad_moment_does_not_cost_a_listing(fault: Fault) -> None:
    async def story(lab: Lab) -> None:
        await lab.run()
        lab.sim.befall("DescribeInstances", fault)
        assert len(await lab.ids()) == 1

    play(story)


def test_what_ec2_refuses_for_good_is_not_tried_again() -> None:
    async def story(lab: Lab) -> None:
        met = lab.sim.refuse("DescribeInstances", "UnauthorizedOperation", times=9)
        assert await code_of(lab.ids()) == "UnauthorizedOperation"
        assert met.hits == 1

    play(story)


def test_a_script_may_let_the_first_calls_pass() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.befall("RunInstances", Fault.THROTTLED, skip=1)
        await lab.run("t-1")
        assert await code_of(lab.run("t-2")) == "RequestLimitExceeded"
        await lab.run("t-2")

    play(story)


# --- for hours -----------------------------------------------------------------------------------------


def test_in_an_outage_every_call_fails_or_hangs_and_machines_run_on() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        lab.sim.begin_outage(8 * 3600)
        errors = await asyncio.gather(
            *(lab.run(f"t-{n}") for n in range(20)), *(lab.ids() for _ in range(20)), return_exceptions=True
        )
        assert all(isinstance(one, (*SILENCES, sdk.ClientError)) for one in errors)
        assert len({type(one) for one in errors}) >= 4
        assert lab.now < 60.2 + LAUNCHING.answer_seconds_max + 1
        assert await lab.sim.connect(machine.public_address, 2560)
        await asyncio.sleep(8 * 3600)
        assert machine.id in await lab.ids()

    play(story)


def test_an_outage_now_and_then_carries_out_a_call_without_saying_so() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.begin_outage(8 * 3600)
        for n in range(100):
            with pytest.raises(Exception):  # noqa: B017, PT011
                await lab.run(f"t-{n}")
        assert 1 <= len(lab.sim.truth()) <= 30

    play(story)


def test_in_a_launch_outage_nothing_can_be_had_and_everything_else_works() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        lab.sim.begin(Fault.LAUNCH_OUTAGE, 3600)
        codes = []
        for n in range(20):
            codes.append(await code_of(lab.run(f"t-{n}")))
            await asyncio.sleep(60)
        assert set(codes) == {"InsufficientInstanceCapacity", "RequestLimitExceeded"}
        assert await lab.ids() == [machine.id]

    play(story)


@pytest.mark.parametrize(
    ("spell", "code"),
    [(Fault.CREDENTIALS_EXPIRED, "RequestExpired"), (Fault.CLOCK_SKEWED, "AuthFailure")],
)
def test_credentials_are_not_accepted_for_a_while(spell: Fault, code: str) -> None:
    async def story(lab: Lab) -> None:
        lab.sim.begin(spell, 600)
        assert await code_of(lab.run()) == code
        assert await code_of(lab.ids()) == code
        with pytest.raises(CredentialsRefused):
            await lab.provider.open()
        await asyncio.sleep(600)
        assert (await lab.run())["State"]["Name"] == "pending"

    play(story)


def test_a_caller_whose_clock_is_off_is_told_by_how_much() -> None:
    ahead_seconds = [0.0]

    def caller_unix() -> float:
        return EPOCH_UNIX + ahead_seconds[0]  # a story of a few seconds

    async def story(lab: Lab) -> None:
        await lab.provider.open()
        ahead_seconds[0] = 3600.0
        with pytest.raises(CredentialsRefused, match=r"this machine's clock is 3[56].. s ahead of AWS's"):
            await lab.provider.listing()
        ahead_seconds[0] = 0.0
        assert await lab.provider.listing() == []

    play(story, caller_unix=caller_unix)


# --- through the provider ------------------------------------------------------------------------------


def test_the_provider_understands_every_ending() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        order = lab.order()
        for fault in (Fault.REQUEST_LOST, Fault.ANSWER_LOST):
            for ending in (Ending.RESET, Ending.SILENCE):
                lab.sim.befall("RunInstances", fault, ending=ending)
                with pytest.raises(CloudUnreachable) as raised:
                    await launch_one(lab.provider, order)
                assert raised.value.sent
        lab.sim.befall("RunInstances", Fault.THROTTLED)
        with pytest.raises(Throttled):
            await launch_one(lab.provider, order)
        (machine,) = lab.sim.truth()
        assert (await launch_one(lab.provider, order)).id == machine.id
        assert machine.token == order.id

    play(story)


# --- by chance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knob", "fault"),
    [
        ("request_lost", Fault.REQUEST_LOST),
        ("request_late", Fault.REQUEST_LATE),
        ("answer_lost", Fault.ANSWER_LOST),
        ("answer_late", Fault.ANSWER_LATE),
        ("server_error", Fault.SERVER_ERROR),
        ("throttled", Fault.THROTTLED),
    ],
)
def test_each_mishap_of_the_way_comes_as_often_as_the_weather_says(knob: str, fault: Fault) -> None:
    async def story(lab: Lab) -> None:
        for _ in range(1000):
            await asyncio.gather(lab.ids(), return_exceptions=True)
        attempts = lab.sim.calls["DescribeInstances"] + lab.sim.faults[str(Fault.REQUEST_LOST)]
        assert 0.15 < lab.sim.faults[str(fault)] / attempts < 0.25
        assert list(lab.sim.faults) == [str(fault)]

    reads = Road(**{"answer_seconds": (0.1, 0.2), knob: 0.2})  # type: ignore[arg-type]
    play(story, steady(reads=reads))


def test_launches_changes_and_reads_travel_on_roads_of_their_own() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        assert (
            await code_of(lab.client.terminate_instances(InstanceIds=[machine.id])) == "RequestLimitExceeded"
        )
        assert await lab.ids() == [machine.id]

    play(story, steady(changes=Road(throttled=1.0)))


@pytest.mark.parametrize(
    ("knobs", "fault"),
    [
        ({"outages_per_hour": 1.0, "outage_seconds": (600, 600)}, Fault.OUTAGE),
        ({"launch_outages_per_hour": 1.0}, Fault.LAUNCH_OUTAGE),
        ({"credentials_expire_per_hour": 1.0}, Fault.CREDENTIALS_EXPIRED),
        ({"clock_skews_per_hour": 1.0}, Fault.CLOCK_SKEWED),
    ],
)
def test_spells_come_and_go_by_themselves(knobs: dict[str, Any], fault: Fault) -> None:
    async def story(lab: Lab) -> None:
        good = 0
        for n in range(500):
            results = await asyncio.gather(lab.run(f"t-{n}"), return_exceptions=True)
            good += isinstance(results[0], dict)
            await asyncio.sleep(120)
        assert lab.sim.faults[str(fault)] > 5
        assert good > 5

    play(story, steady(**knobs))


def test_healing_ends_spells_and_scripts() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.begin_outage(1e6)
        lab.sim.begin(Fault.CREDENTIALS_EXPIRED, 1e6)
        lab.sim.begin(Fault.LAUNCH_OUTAGE, 1e6)
        lab.sim.befall(EVERY_API, Fault.ANSWER_LOST, times=100)
        lab.sim.run_dry("c7i.large")
        lab.sim.refuse_launches("UnauthorizedOperation", 1e6)
        lab.sim.heal()
        await lab.run()
        assert len(await lab.ids()) == 1
        assert OTHERWISE.attempts_max == 2
        assert lab.sim.calls["DescribeInstances"] == 1

    play(story)
