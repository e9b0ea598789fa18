"""Who goes on waiting and who hears that it is in vain; and what is ordered, and kept, for those who wait."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import OfferingRefused
from broker.core.model import InstanceState, Market, Offering, WorkerState
from broker.core.settings import Settings, parse
from broker.testing import RunningBroker, lost_answer, run_virtual, running_broker
from tests.support.acquiring import acquire, refusal, reply_of
from tests.support.brokers import live, settings

TIMEOUT = "[TIMEOUT]"
BOOTED = (WorkerState.READY,)


def exclusive(**pool: Any) -> Settings:
    return settings(sharing="exclusive", **pool)


def two_sizes(broker: RunningBroker) -> tuple[Offering, Offering]:
    """The pool sells big and small machines, in one order where that is asked for."""
    (big,) = broker.cloud.catalogue["default"]
    small = replace(big, instance_type="small", cores=8)
    broker.cloud.catalogue["default"] = (big, small)
    broker.cloud.offerings_max = 5
    return big, small


# --- who hears that nothing can be bought ----------------------------------------------------------------


def test_when_nothing_can_be_bought_those_whom_a_worker_in_use_would_serve_go_on_waiting(
    tmp_path: Path,
) -> None:
    """One reclaimed machine that could not be replaced had turned everybody away, although three were to
    come back."""

    async def story(broker: RunningBroker) -> None:
        held = await asyncio.gather(*(broker.ask(f"GET_WORKER client=c{number}") for number in range(3)))
        waiting = [
            asyncio.create_task(broker.ask(f"GET_WORKER client=w{number} wait=600")) for number in (0, 1)
        ]
        await asyncio.sleep(30)
        broker.cloud.refuses["big"] = OfferingRefused("none left")
        lost = next(iter(broker.cloud.machines))
        broker.cloud.set_state(lost, InstanceState.TERMINATED, "Server.SpotInstanceTermination")
        await asyncio.sleep(60)
        assert not any(task.done() for task in waiting)
        kept = [address for address in held if broker.registry.by_address(address)]
        assert await broker.ask(f"RELEASE {kept[0]} client=c{held.index(kept[0])}") == "OK"
        assert await waiting[0] == kept[0]
        answer = await waiting[1]
        assert "none left" in answer, "it learns why none was bought"
        assert answer.endswith(TIMEOUT)

    live(tmp_path, story, chosen=exclusive(max_workers=3))


def test_a_cloud_that_does_not_answer_is_told_at_once_whoever_holds_a_worker(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=ann")
        broker.cloud.fail["launch"].extend(lost_answer() for _ in range(100))
        begun_at = broker.clock.monotonic()
        assert await broker.ask("GET_WORKER client=ben wait=600") == "ERROR: connection reset [CLOUD]"
        assert broker.clock.monotonic() - begun_at < 60

    live(tmp_path, story, chosen=exclusive())


def test_a_machine_on_its_way_is_no_reason_to_wait_for_one_who_wants_another(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        two_sizes(broker)
        broker.cloud.refuses["small"] = OfferingRefused("no small ones")
        first = broker.client()
        first.send(b"ACQUIRE type=big client=ann wait=900\n")
        await asyncio.sleep(1)
        answer = await refusal(broker.client(), "type=small client=ben wait=300")
        assert answer == "ERROR: no small ones [NO_CAPACITY]"
        assert broker.clock.monotonic() < 10

    live(tmp_path, story, chosen=exclusive(), boots=False)


def test_on_demand_comes_for_the_wish_that_spot_refuses_although_others_are_served(tmp_path: Path) -> None:
    """Whoever was served in the same pool had begun the wait for spot anew."""

    async def story(broker: RunningBroker) -> None:
        big, small = two_sizes(broker)
        on_demand = [replace(one, market=Market.ON_DEMAND) for one in (big, small)]
        broker.cloud.catalogue["default"] = (big, small, *on_demand)
        broker.cloud.dry = {("big", Market.SPOT)}

        async def others() -> None:
            for number in range(10):
                await asyncio.sleep(50)
                await acquire(broker.client(), f"type=small client=o{number}")

        others_come = asyncio.create_task(others())
        client = broker.client()
        client.send(b"ACQUIRE type=big wait=1800 client=ann\n")
        reply = await client.reply()
        while reply is not None and reply.startswith("PENDING"):
            reply = await client.reply()
        assert reply is not None
        assert "market=on-demand" in reply
        assert broker.clock.monotonic() < 150
        others_come.cancel()

    chosen = exclusive(market="spot-then-on-demand", on_demand_after="2m", max_workers=20)
    live(tmp_path, story, chosen=chosen)


def test_who_came_first_gets_what_is_on_its_way_and_the_other_hears_it(tmp_path: Path) -> None:
    """The one who takes anything had been turned away, and the later one had got its machine."""

    async def story(broker: RunningBroker) -> None:
        two_sizes(broker)
        broker.cloud.refuses["small"] = OfferingRefused("no small ones")
        first = asyncio.create_task(broker.ask("GET_WORKER client=ann cores=1 wait=600"))
        await asyncio.sleep(30)
        broker.cloud.refuses["big"] = OfferingRefused("no big ones")
        answer = await broker.ask("GET_WORKER client=ben type=big wait=600")
        assert answer.startswith("ERROR: no big ones")
        assert answer.endswith("[NO_CAPACITY]")
        broker.cloud.boot(broker.cloud.running()[0])
        assert not (await first).startswith("ERROR")

    live(tmp_path, story, chosen=settings(leases_per_worker_max=1), boots=False)


def test_a_machine_that_a_restart_found_held_and_silent_is_for_nobody_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(exclusive(), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=ann")
            (machine,) = broker.cloud.machines.values()
            machine.answers = False
        async with running_broker(exclusive(), tmp_path, cloud=broker.cloud) as again:
            assert await again.ask(f"PING {address} client=ann") == "OK"
            begun_at = again.clock.monotonic()
            assert not (await again.ask("GET_WORKER client=ben wait=600")).startswith("ERROR")
            assert again.clock.monotonic() - begun_at < 5

    run_virtual(main())


# --- what is bought, and for whom ------------------------------------------------------------------------


def test_what_clients_wait_for_is_bought_before_spares(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        two_sizes(broker)
        await broker.until(lambda: broker.registry.count("default", *BOOTED) == 1)
        broker.cloud.boots = False
        for words in ("", "", "type=small"):
            broker.client().send(f"ACQUIRE {words} client=ann\n".encode())
        await asyncio.sleep(30)
        ordered = sorted(worker.offering.instance_type for worker in broker.registry)
        assert ordered == ["big", "big", "small"], "of three places none is for a spare"

    live(tmp_path, story, chosen=exclusive(warm=1, max_workers=3))


def test_a_refusal_that_concerns_a_client_does_not_hold_up_the_spares(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        two_sizes(broker)
        broker.cloud.refuses["small"] = OfferingRefused("no small ones")
        await broker.until(lambda: broker.registry.count("default", *BOOTED) == 1)
        assert "NO_CAPACITY" in await broker.ask("GET_WORKER type=small client=ben")
        await broker.ask("GET_WORKER client=ann")
        begun_at = broker.clock.monotonic()
        await broker.until(lambda: broker.registry.count("default", *BOOTED) == 2)
        assert broker.clock.monotonic() - begun_at < 5

    live(tmp_path, story, chosen=exclusive(warm=1))


def test_a_place_under_the_cap_is_not_kept_for_what_cannot_be_bought(tmp_path: Path) -> None:
    """And whoever waits hears its own reason, not that of another wish."""

    async def story(broker: RunningBroker) -> None:
        two_sizes(broker)
        await broker.ask("GET_WORKER client=ann type=big")
        broker.cloud.refuses["big"] = OfferingRefused("no big ones")
        big = asyncio.create_task(broker.ask("GET_WORKER client=ben type=big wait=60"))
        await asyncio.sleep(1)
        assert not (await broker.ask("GET_WORKER client=cat type=small wait=60")).startswith("ERROR")
        answer = await broker.ask("GET_WORKER client=dan type=small wait=10")
        assert "max_workers = 2" in answer
        big.cancel()

    live(tmp_path, story, chosen=exclusive(max_workers=2))


def test_where_there_is_room_for_two_the_first_two_are_bought_for(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        two_sizes(broker)
        for words in ("client=a", "client=b type=small", *(f"client=c{number}" for number in range(5))):
            broker.client().send(f"ACQUIRE {words} wait=600\n".encode())
        await asyncio.sleep(1)
        assert sorted(worker.offering.instance_type for worker in broker.registry) == ["big", "small"]

    live(tmp_path, story, chosen=exclusive(max_workers=2), boots=False)


def test_spares_of_one_pool_do_not_take_the_place_of_anothers_clients_for_ever(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: broker.registry.count("other", *BOOTED) == 2)
        await broker.ask("GET_WORKER client=ann")
        assert not (await broker.ask("GET_WORKER client=ben wait=900")).startswith("ERROR")

    pools = {"default": {"sharing": "exclusive"}, "other": {"warm": 2, "idle_timeout": "5m"}}
    live(tmp_path, story, chosen=parse({"broker": {"id": "lab", "max_workers": 3}, "pool": pools}, {}))


def test_nothing_is_ordered_that_its_client_may_not_have(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        clients = [broker.client() for _ in range(4)]
        for client in clients:
            client.send(b"ACQUIRE client=ann wait=30\n")
        await asyncio.sleep(60)
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, chosen=exclusive(workers_per_client_max=1))


def test_with_min_a_client_gets_as_many_as_it_may_have(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert len(await acquire(broker.client(), "count=3 min=1 client=ann")) == 2
        assert broker.cloud.count("launch") == 2

    live(tmp_path, story, chosen=exclusive(workers_per_client_max=2))


@pytest.mark.parametrize(
    ("words", "cap", "chosen"),
    [
        ("", "its workers_per_client_max", {"leases_per_worker_max": 1, "workers_per_client_max": 2}),
        ("", "its workers_per_client_max", {"sharing": "exclusive", "workers_per_client_max": 2}),
        ("exclusive=yes", "its max_workers", {"max_workers": 2}),
    ],
)
def test_what_a_cap_will_never_allow_is_refused_at_once(
    tmp_path: Path, words: str, cap: str, chosen: dict[str, Any]
) -> None:
    async def story(broker: RunningBroker) -> None:
        answer = await refusal(broker.client(), f"count=3 client=ann {words}")
        assert answer == f"ERROR: the pool has room for 2 such leases at most, by {cap} [LIMIT]"
        assert broker.cloud.count("launch") == 0

    live(tmp_path, story, chosen=settings(**chosen))


def test_who_wants_more_than_all_pools_may_have_does_not_stand_in_the_way_of_others(tmp_path: Path) -> None:
    """It had bought what the broker's cap allows, kept it, and nobody else was served for ten minutes."""

    async def story(broker: RunningBroker) -> None:
        answer = await refusal(broker.client(), "count=5 wait=900 client=ann")
        assert (
            answer
            == "ERROR: the pool has room for 3 such leases at most, by the broker's max_workers [LIMIT]"
        )
        assert await broker.ask("GET_WORKER client=ben wait=60") == "10.0.0.1"

    pools = {"default": {"sharing": "exclusive", "max_workers": 10}}
    live(tmp_path, story, chosen=parse({"broker": {"id": "lab", "max_workers": 3}, "pool": pools}, {}))


def test_who_waits_for_more_than_new_settings_allow_hears_it_when_they_are_read(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=ann")
        asked = asyncio.create_task(refusal(broker.client(), "count=4 wait=900 client=ben"))
        await asyncio.sleep(5)
        await broker.reload(exclusive(max_workers=2))
        answer = await asyncio.wait_for(asked, 1)
        assert answer == "ERROR: the pool has room for 2 such leases at most, by its max_workers [LIMIT]"

    live(tmp_path, story, chosen=exclusive(max_workers=4))


# --- what is kept for them -------------------------------------------------------------------------------


def test_what_is_given_back_while_several_are_waited_for_is_kept_and_not_ended(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        first, second = [await broker.ask(f"GET_WORKER client={name}") for name in ("ann", "ben")]
        asked = asyncio.create_task(acquire(broker.client(), "count=2 client=dan"))
        await asyncio.sleep(1)
        assert await broker.ask(f"RELEASE {first} client=ann") == "OK"
        await asyncio.sleep(60)
        assert await broker.ask(f"RELEASE {second} client=ben") == "OK"
        assert {address for _, address in await asked} == {first, second}
        assert broker.cloud.count("launch") == 2

    live(tmp_path, story, chosen=exclusive(max_workers=2))


def test_machines_that_boot_one_after_another_are_not_idle_while_the_last_is_waited_for(
    tmp_path: Path,
) -> None:
    """The first had been ended as idle each time before the second was ready, for an hour."""

    async def story(broker: RunningBroker) -> None:
        async def boot(after_seconds: float, number: int) -> None:
            await asyncio.sleep(after_seconds)
            broker.cloud.boot(list(broker.cloud.machines)[number])

        boots = [asyncio.create_task(boot(20.0, 0)), asyncio.create_task(boot(200.0, 1))]
        assert len(await acquire(broker.client(), "count=2 wait=3600 client=dan")) == 2
        await asyncio.gather(*boots)
        assert broker.cloud.count("launch") == 2

    live(tmp_path, story, chosen=exclusive(max_workers=2, idle_timeout="60s"), boots=False)


def test_the_second_group_keeps_what_it_has_found_too(tmp_path: Path) -> None:
    """Its first machine had been ended as idle and bought again for an hour."""

    async def story(broker: RunningBroker) -> None:
        two_sizes(broker)
        first = asyncio.create_task(acquire(broker.client(), "count=2 type=big wait=3600 client=ann"))
        await asyncio.sleep(1)
        client = broker.client()
        client.send(b"ACQUIRE count=2 type=small wait=1800 client=ben\n")
        second = asyncio.create_task(reply_of(client))
        await broker.until(lambda: len(broker.cloud.machines) == 4)
        small = [one for one, made in broker.cloud.machines.items() if made.instance.instance_type == "small"]
        for machine in small:
            await asyncio.sleep(200)
            broker.cloud.boot(machine)
        assert (await asyncio.wait_for(second, 60))[0].startswith("LEASE ")
        assert broker.cloud.count("launch") == 4
        first.cancel()

    chosen = exclusive(max_workers=4, idle_timeout="60s", boot_deadline="2h")
    live(tmp_path, story, chosen=chosen, boots=False)


def test_a_worker_that_is_given_back_after_long_work_stays_warm(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        ((lease, address),) = await acquire(broker.client(), "client=ann ttl=7200")
        await asyncio.sleep(3600)
        await broker.ask(f"DONE {lease}")
        await asyncio.sleep(600)
        client = broker.client()
        ((_, again),) = await acquire(client, "client=ann hold=connection")
        await asyncio.sleep(3600)
        client.vanish()
        await asyncio.sleep(600)
        assert address == again == await broker.ask("GET_WORKER client=ben")

    live(tmp_path, story, chosen=exclusive())


def test_a_group_that_has_found_some_is_ordered_for_the_rest_of_what_it_may_have(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await acquire(broker.client(), "client=ann")
        ((lease, _),) = await acquire(broker.client(), "client=zoe")
        await broker.ask(f"DONE {lease}")
        assert len(await acquire(broker.client(), "count=3 min=1 client=ann wait=600")) == 2
        assert broker.cloud.count("launch") == 3

    live(tmp_path, story, chosen=exclusive(workers_per_client_max=3, max_workers=10))


def test_who_hears_that_nothing_comes_is_who_may_not_have_it_anyway(tmp_path: Path) -> None:
    """Another client's second request had counted before one whose machine was booting."""

    async def story(broker: RunningBroker) -> None:
        asks = [asyncio.create_task(acquire(broker.client(), "client=ann wait=600"))]
        asks.append(asyncio.create_task(refusal(broker.client(), "client=ann wait=600")))  # type: ignore[arg-type]
        await asyncio.sleep(1)
        asks.append(asyncio.create_task(acquire(broker.client(), "client=dan wait=600")))
        await asyncio.sleep(1)
        broker.cloud.refuses["big"] = OfferingRefused("none left")
        assert "none left" in await refusal(broker.client(), "client=eve wait=600")
        for machine in broker.cloud.running():
            broker.cloud.boot(machine)
        assert len(await asks[0]) == len(await asks[2]) == 1
        await asks[1]

    live(tmp_path, story, chosen=exclusive(workers_per_client_max=1), boots=False)


def test_a_client_that_is_served_on_one_connection_is_not_forgotten_on_the_other(tmp_path: Path) -> None:
    """Its own worker answers again: both who wait under its name have it, and the next in the queue waits."""

    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=ben")
        (machine,) = broker.cloud.machines.values()
        machine.answers = False
        await asyncio.sleep(40)
        other = asyncio.create_task(broker.ask("GET_WORKER client=ann wait=600"))
        await asyncio.sleep(1)
        again = asyncio.create_task(broker.ask("GET_WORKER client=ben wait=500"))
        await asyncio.sleep(1)
        machine.answers = True
        assert await asyncio.wait_for(again, 60) == address
        assert not other.done()
        other.cancel()

    live(tmp_path, story, chosen=exclusive(max_workers=1))
