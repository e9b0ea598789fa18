"""When spot prices are asked for, and how long they count."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker.core.errors import CloudUnreachable, PermanentRefusal
from broker.core.model import InstanceState, Market, Offering
from broker.core.quotes import QUOTE_SECONDS_MAX
from broker.core.settings import parse
from broker.loops.launch import PRICES_SECONDS_MAX
from broker.loops.prices import CALL_SECONDS_MAX, REFRESH_SECONDS, RETRY_SECONDS
from broker.testing import RunningBroker, run_virtual, running_broker

HERE = ("moon-a", "big")
HOUR_SECONDS = 3600.0


def settings(**pool: Any) -> Any:
    return parse({"pool": {"default": {"idle_timeout": "10h", "max_lifetime": "1d", **pool}}}, {})


def known(broker: RunningBroker) -> Mapping[tuple[str, str], int]:
    return broker.daemon.context.clouds.all[0].quotes.known(broker.clock.monotonic())


def asked(broker: RunningBroker) -> int:
    return broker.cloud.count("spot_prices")


def test_an_idle_broker_without_machines_asks_for_no_price(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            await asyncio.sleep(5 * HOUR_SECONDS)
            assert asked(broker) == 0

    run_virtual(story())


def test_prices_are_asked_for_when_a_client_waits_and_every_ten_minutes_while_there_is_a_machine(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            broker.cloud.prices = {HERE: 300_000}
            await broker.ask("GET_WORKER")
            assert (asked(broker), known(broker)) == (1, {HERE: 300_000})
            broker.cloud.prices = {HERE: 400_000}
            await asyncio.sleep(REFRESH_SECONDS - 10.0)
            assert known(broker) == {HERE: 300_000}
            await asyncio.sleep(20.0)
            assert known(broker) == {HERE: 400_000}
            await asyncio.sleep(HOUR_SECONDS)
            assert asked(broker) == 2 + HOUR_SECONDS / REFRESH_SECONDS

    run_virtual(story())


def test_once_the_last_machine_has_ended_no_price_is_asked_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            await broker.ask("GET_WORKER")
            await broker.ask("TERMINATE_ALL")
            await asyncio.sleep(REFRESH_SECONDS)
            before = asked(broker)
            await asyncio.sleep(5 * HOUR_SECONDS)
            assert asked(broker) == before

    run_virtual(story())


def test_a_restarted_broker_that_finds_machines_asks_for_their_prices(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as first:
            await first.ask("GET_WORKER")
            cloud = first.cloud
        before = cloud.count("spot_prices")
        async with running_broker(settings(), tmp_path, cloud=cloud) as second:
            await asyncio.sleep(60.0)
            assert asked(second) == before + 1

    run_virtual(story())


def test_a_failed_refresh_keeps_the_old_prices_for_an_hour_and_is_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            broker.cloud.prices = {HERE: 300_000}
            await broker.ask("GET_WORKER")
            told_at = broker.clock.monotonic()
            broker.cloud.fail["spot_prices"].extend([CloudUnreachable()] * 1_000)
            await asyncio.sleep(told_at + QUOTE_SECONDS_MAX - 5.0 - broker.clock.monotonic())
            assert known(broker) == {HERE: 300_000}
            await asyncio.sleep(10.0)
            assert known(broker) == {}
            tries = (QUOTE_SECONDS_MAX - REFRESH_SECONDS) / RETRY_SECONDS
            assert tries - 2 <= asked(broker) - 1 <= tries + 2
            broker.cloud.fail["spot_prices"].clear()
            await asyncio.sleep(RETRY_SECONDS + 1.0)
            assert known(broker) == {HERE: 300_000}

    run_virtual(story())


def test_a_missing_permission_is_not_asked_for_every_minute(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            broker.cloud.fail["spot_prices"].extend([PermanentRefusal()] * 1_000)
            await broker.ask("GET_WORKER")
            await asyncio.sleep(HOUR_SECONDS)
            assert asked(broker) == 1 + HOUR_SECONDS / REFRESH_SECONDS

    run_virtual(story())


def test_a_cloud_that_keeps_silent_about_prices_holds_nobody_up(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            broker.cloud.hold["spot_prices"] = asyncio.Event()
            assert not (await broker.ask("GET_WORKER")).startswith("ERROR")
            assert broker.clock.monotonic() < PRICES_SECONDS_MAX + 0.1
            await asyncio.sleep(CALL_SECONDS_MAX + RETRY_SECONDS + 1.0)
            assert asked(broker) == 2

    run_virtual(story())


def test_the_first_purchase_waits_for_prices_so_that_no_dear_machine_is_bought(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(sharing="exclusive"), tmp_path) as broker:
            broker.cloud.prices = {HERE: 99_000_000}
            answers = broker.cloud.hold["spot_prices"] = asyncio.Event()
            asyncio.get_running_loop().call_later(0.3, answers.set)
            answer = await broker.ask("GET_WORKER client=ann")
            assert answer.startswith("ERROR: big costs $99.00 an hour on spot, more than the")
            assert broker.cloud.count("launch") == 0

    run_virtual(story())


def test_who_has_no_time_is_bought_for_without_prices(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            broker.cloud.hold["spot_prices"] = asyncio.Event()
            await broker.ask("GET_WORKER client=ann wait=0.5")
            assert broker.cloud.count("launch") == 1

    run_virtual(story())


def test_prices_of_long_ago_are_asked_for_anew_before_the_next_purchase(tmp_path: Path) -> None:
    async def story() -> None:
        chosen = settings(sharing="exclusive", idle_timeout="5m")
        async with running_broker(chosen, tmp_path) as broker:
            await broker.ask("GET_WORKER client=ann")
            await asyncio.sleep(QUOTE_SECONDS_MAX + REFRESH_SECONDS + HOUR_SECONDS)
            assert broker.cloud.running() == []
            broker.cloud.prices = {HERE: 99_000_000}
            assert "NO_CAPACITY" in await broker.ask("GET_WORKER client=ann")

    run_virtual(story())


def test_a_pool_that_buys_nothing_on_spot_asks_for_no_price(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            broker.cloud.catalogue["default"] = (Offering("moon", "big", Market.ON_DEMAND, cores=64),)
            await broker.ask("GET_WORKER")
            await asyncio.sleep(HOUR_SECONDS)
            assert asked(broker) == 0

    run_virtual(story())


def test_a_machine_that_the_cloud_takes_back_is_remembered_against_its_place(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            cooling = broker.daemon.context.clouds.all[0].cooling
            offering = broker.cloud.catalogue["default"][0]
            for _ in range(2):
                assert cooling.usable([offering], broker.clock.monotonic())[0] == (offering,)
                await broker.ask("GET_WORKER")
                (machine,) = broker.cloud.running()
                reason = "Server.SpotInstanceTermination: Spot instance termination"
                broker.cloud.set_state(machine, InstanceState.TERMINATED, reason)
                await asyncio.sleep(60.0)
            (cool_down,) = cooling.usable([offering], broker.clock.monotonic())[1]
            assert "taken back" in cool_down.error.message

    run_virtual(story())


def test_a_machine_that_ends_otherwise_is_not_held_against_its_place(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            cooling = broker.daemon.context.clouds.all[0].cooling
            offering = broker.cloud.catalogue["default"][0]
            for _ in range(3):
                await broker.ask("GET_WORKER")
                (machine,) = broker.cloud.running()
                broker.cloud.set_state(machine, InstanceState.TERMINATED, "Client.UserInitiatedShutdown")
                await asyncio.sleep(60.0)
            assert cooling.usable([offering], broker.clock.monotonic()) == ((offering,), ())

    run_virtual(story())
