"""Two brokers with one id on two hosts: one of them acts, the other one is read-only and takes over."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from broker.core import claim, tags
from broker.core.claim import BEAT_SECONDS, STALE_SECONDS, Claim
from broker.core.errors import CloudUnreachable, PermanentRefusal, Throttled
from broker.core.model import InstanceState, WorkerState
from broker.testing import EPOCH_UNIX, FakeCloud, RunningBroker, run_virtual, running_broker
from tests.support.brokers import live, settings

SCAN_SECONDS = 30.0
TAKE_OVER_SECONDS = STALE_SECONDS + 2 * SCAN_SECONDS
CHANGES = ("launch", "terminate", "tag", "tag_all")


def changes(cloud: FakeCloud) -> int:
    """How often the cloud was asked to change something."""
    return sum(cloud.count(api) for api in CHANGES)


def on_machine(cloud: FakeCloud, instance_id: str) -> Claim | None:
    return claim.read(tags.read(cloud.machines[instance_id].instance.tags).epoch)


def write(cloud: FakeCloud, instance_id: str, text: str) -> None:
    machine = cloud.machines[instance_id]
    machine.instance = replace(machine.instance, tags={**machine.instance.tags, tags.EPOCH: text})


def reads_only(broker: RunningBroker) -> bool:
    return bool(broker.daemon.context.clouds.read_only())


@asynccontextmanager
async def on_host(
    owner: str, directory: Path, like: RunningBroker | None = None
) -> AsyncIterator[RunningBroker]:
    """A broker with the id that all have, on the cloud that all have, in a state directory of its own."""
    cloud = like.cloud if like else None
    async with running_broker(settings(), directory / owner, cloud=cloud, owner=owner) as broker:
        await broker.until(broker.daemon.context.clouds.recovered)
        yield broker


def two(
    directory: Path,
    story: Callable[[RunningBroker, RunningBroker, str], Awaitable[None]],
    owners: tuple[str, str] = ("a", "b"),
) -> None:
    """The first has a worker, held by ann, when the second one starts."""

    async def main() -> None:
        async with on_host(owners[0], directory) as first:
            address = await first.ask("GET_WORKER client=ann")
            async with on_host(owners[1], directory, first) as second:
                await story(first, second, address)

    run_virtual(main())


# --- the second one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("owners", [("a", "b"), ("b", "a")])
def test_the_second_one_answers_but_does_not_act(tmp_path: Path, owners: tuple[str, str]) -> None:
    async def story(first: RunningBroker, second: RunningBroker, address: str) -> None:
        for _ in range(100):
            before = changes(first.cloud)
            for line in ("GET_WORKER", f"PING {address}", f"RELEASE {address}", "TERMINATE_ALL"):
                reply = await second.ask(f"{line}")
                assert reply.startswith(
                    f"ERROR: another broker with this id ({owners[0]}, claim 1) is in charge"
                )
                assert reply.endswith("[DENIED]")
            assert changes(first.cloud) == before
            assert json.loads(await second.ask("STATUS")) == []
            assert [one["ip"] for one in json.loads(await second.ask("LIST_ALL"))] == [address]
            assert await first.ask(f"PING {address} client=ann") == "OK"
            await asyncio.sleep(60)

    two(tmp_path, story, owners)


def test_the_second_one_changes_nothing_by_itself_either(tmp_path: Path) -> None:
    async def main() -> None:
        async with on_host("a", tmp_path) as first:
            await first.ask("GET_WORKER client=ann")
            first.cloud.set_state(first.cloud.add(), InstanceState.STOPPED)
            first.cloud.add(tags={tags.NAME: "dserv-worker"})
            await asyncio.sleep(800)
        before = changes(first.cloud)
        adopting = settings(adopt_name_tag=True)
        async with running_broker(adopting, tmp_path / "b", cloud=first.cloud, owner="b") as second:
            await asyncio.sleep(600)
            assert reads_only(second)
            assert len(second.registry) == 0
            assert changes(first.cloud) == before
            await asyncio.sleep(400)
            assert changes(first.cloud) > before

    run_virtual(main())


def test_a_broker_that_is_read_only_says_so_where_operators_look(tmp_path: Path) -> None:
    async def story(first: RunningBroker, second: RunningBroker, address: str) -> None:
        health = second.daemon.health
        assert health.problems() == []
        (reason,) = health.not_ready()
        assert "another broker with this id (a, claim 1)" in reason
        value = second.daemon.metrics.registry.get_sample_value
        assert value("compute_broker_read_only", {"cloud": "fake"}) == 1.0
        assert (
            first.daemon.metrics.registry.get_sample_value("compute_broker_read_only", {"cloud": "fake"})
            == 0.0
        )
        assert first.daemon.health.not_ready() == []

    two(tmp_path, story)


@pytest.mark.parametrize("hours", [-1.0, 1.0])
def test_a_clock_that_is_an_hour_off_takes_nothing_over(tmp_path: Path, hours: float) -> None:
    async def main() -> None:
        async with on_host("a", tmp_path) as first:
            first.clock.jump(hours * 3600)
            address = await first.ask("GET_WORKER client=ann")
            await asyncio.sleep(240)
            async with on_host("b", tmp_path, first) as second:
                second.clock.jump(-hours * 3600)
                for _ in range(200):
                    assert await first.ask(f"PING {address} client=ann") == "OK"
                    assert reads_only(second)
                    await asyncio.sleep(60)

    run_virtual(main())


# --- taking over -------------------------------------------------------------------------------------------


def test_the_second_one_takes_over_when_the_first_has_been_silent_and_spares_its_clients(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with on_host("a", tmp_path) as first:
            address = await first.ask("GET_WORKER client=ann")
            (machine,) = first.cloud.running()
            second_host = on_host("b", tmp_path, first)
            second = await second_host.__aenter__()
        await asyncio.sleep(STALE_SECONDS - 60)
        assert reads_only(second)
        await second.until(lambda: not reads_only(second), seconds_max=BEAT_SECONDS + TAKE_OVER_SECONDS)
        taken_at = second.clock.monotonic()
        assert await second.ask("GET_WORKER client=ben") == address
        await asyncio.sleep(2 * SCAN_SECONDS)
        assert on_machine(second.cloud, machine) == Claim(2, "b", EPOCH_UNIX + int(taken_at))
        await asyncio.sleep(800 - 60)
        assert second.cloud.running() == [machine]
        await asyncio.sleep(200)
        assert second.cloud.running() == []
        await second_host.__aexit__(None, None, None)

    run_virtual(main())


def test_the_first_one_finds_out_when_it_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with on_host("a", tmp_path) as first:
            await first.ask("GET_WORKER client=ann")
        async with on_host("b", tmp_path, first) as second:
            await second.until(lambda: not reads_only(second), seconds_max=TAKE_OVER_SECONDS)
            address = await second.ask("GET_WORKER client=ben")
            await asyncio.sleep(60)
            async with on_host("a", tmp_path, first) as back:
                assert reads_only(back)
                assert back.daemon.context.stored_leases == {}
                assert await second.ask(f"PING {address} client=ben") == "OK"

    run_virtual(main())


def test_a_host_that_failed_yesterday_is_replaced_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with on_host("a", tmp_path) as first:
            address = await first.ask("GET_WORKER client=ann")
        await asyncio.sleep(86_400)
        async with on_host("b", tmp_path, first) as second:
            assert await second.ask("GET_WORKER client=ben") == address

    run_virtual(main())


@pytest.mark.parametrize("state", ["a", "lost"])
def test_the_same_installation_never_waits(tmp_path: Path, state: str) -> None:
    async def main() -> None:
        async with on_host("a", tmp_path) as first:
            address = await first.ask("GET_WORKER client=ann")
        async with running_broker(settings(), tmp_path / state, cloud=first.cloud, owner="a") as again:
            asked_at = again.clock.monotonic()
            assert await again.ask("GET_WORKER client=ann") == address
            assert again.clock.monotonic() - asked_at < 1.0
            assert again.daemon.context.epoch == 1

    run_virtual(main())


def test_a_claim_that_cannot_be_put_on_disk_is_not_made(tmp_path: Path) -> None:
    async def main() -> None:
        async with on_host("a", tmp_path) as first:
            await first.ask("GET_WORKER client=ann")
            (machine,) = first.cloud.running()
        async with on_host("b", tmp_path, first) as second:
            connection = second.daemon.context.store._connections[True]
            connection.execute("PRAGMA query_only = 1")  # a disk that takes nothing
            await asyncio.sleep(TAKE_OVER_SECONDS + 600)
            assert reads_only(second)
            connection.execute("PRAGMA query_only = 0")
            await second.until(lambda: not reads_only(second), seconds_max=SCAN_SECONDS)
            await asyncio.sleep(SCAN_SECONDS)
            found = on_machine(first.cloud, machine)
            assert found is not None
            assert found.rank == (2, "b")
            assert second.daemon.context.store.kept("epoch") == "2"

    run_virtual(main())


def test_without_a_machine_id_the_owner_is_drawn_once_and_kept(tmp_path: Path) -> None:
    async def main() -> None:
        owners = []
        for directory in ("one", "one", "two"):
            async with running_broker(settings(), tmp_path / directory, owner=None) as broker:
                await broker.ask("STATUS")
                owners.append(broker.daemon.context.owner)
        assert owners[0] == owners[1] != owners[2]
        assert all(re.fullmatch(r"[0-9a-f]{12}", owner) for owner in owners)

    run_virtual(main())


# --- yielding ----------------------------------------------------------------------------------------------


def test_a_higher_claim_makes_a_broker_yield_at_once_and_everybody_who_waits_hears_it(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=ann")
        (machine,) = broker.cloud.running()
        broker.cloud.boots = False
        waiting = asyncio.create_task(broker.ask("GET_WORKER client=ben exclusive=yes"))
        await broker.until(lambda: len(broker.cloud.machines) == 2)
        write(broker.cloud, machine, f"7.z@{tags.rfc3339(broker.clock.wall())}")
        broker.cloud.machines[broker.cloud.running()[1]].hidden = True
        before = changes(broker.cloud)
        await broker.daemon.reconcile.scan()
        assert (await asyncio.wait_for(waiting, 0.1)).endswith("[DENIED]")
        assert (await broker.ask(f"PING {address} client=ann")).endswith("[DENIED]")
        assert len(broker.registry) == 0
        assert broker.daemon.context.ended == set()
        assert changes(broker.cloud) == before

    live(tmp_path, story, chosen=settings(sharing="exclusive"))


def test_what_was_decided_before_yielding_is_not_carried_out_after_coming_back(tmp_path: Path) -> None:
    """The other broker may have given the machine to somebody meanwhile."""

    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=ann")
        (machine,) = broker.cloud.running()
        broker.cloud.fail["terminate"].extend(CloudUnreachable("lost") for _ in range(1000))
        await broker.ask(f"RELEASE {address} client=ann")
        await broker.until(lambda: broker.cloud.count("terminate"))
        write(broker.cloud, machine, f"7.z@{tags.rfc3339(broker.clock.wall())}")
        await broker.until(lambda: reads_only(broker), seconds_max=SCAN_SECONDS + 1)
        broker.cloud.fail.clear()
        await asyncio.sleep(60)
        assert broker.daemon.context.store.ended() == set()
        await broker.until(lambda: not reads_only(broker), seconds_max=TAKE_OVER_SECONDS)
        assert await broker.ask("GET_WORKER client=ben") == address
        assert broker.daemon.context.epoch == 8

    live(tmp_path, story)


def test_a_launch_under_way_is_collected_and_left_to_the_other_one(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        other = broker.cloud.add()
        broker.cloud.hold["launch"] = asyncio.Event()
        ask = asyncio.create_task(broker.ask("GET_WORKER exclusive=yes client=ann"))
        await broker.ask("GET_WORKER client=ben")
        await broker.until(lambda: broker.cloud.count("launch"))
        write(broker.cloud, other, f"7.z@{tags.rfc3339(broker.clock.wall())}")
        await broker.until(lambda: reads_only(broker), seconds_max=SCAN_SECONDS + 1)
        broker.cloud.hold.pop("launch").set()
        assert (await ask).endswith("[DENIED]")
        await broker.until(lambda: broker.registry.count("default", WorkerState.READY), seconds_max=1)
        (worker,) = broker.registry
        for line in ("GET_WORKER wait=0", f"PING {worker.address}", f"RELEASE {worker.address}"):
            assert (await broker.ask(line)).endswith("[DENIED]")
        await asyncio.sleep(2 * SCAN_SECONDS)
        assert broker.daemon.context.store.open_orders() == []
        assert broker.daemon.launch.in_flight == 0
        assert len(broker.registry) == 0
        assert len(broker.cloud.running()) == 2

    live(tmp_path, story)


def test_an_order_whose_answer_is_lost_is_not_sent_again_by_one_who_has_yielded(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        other = broker.cloud.add(state=InstanceState.PENDING, address=None)
        await broker.until(lambda: len(broker.registry))
        broker.cloud.fail["launch"].extend(CloudUnreachable("lost") for _ in range(9))
        broker.cloud.lose = True  # but not before it was carried out
        ask = asyncio.create_task(broker.ask("GET_WORKER exclusive=yes client=ann"))
        ben = asyncio.create_task(broker.ask("GET_WORKER exclusive=yes client=ben"))
        await broker.until(lambda: broker.cloud.count("launch"))
        write(broker.cloud, other, f"7.z@{tags.rfc3339(broker.clock.wall())}")
        await broker.daemon.reconcile.scan()
        await asyncio.sleep(0)
        assert broker.daemon.orders.unresolved() == []
        assert {(await ask)[-8:], (await ben)[-8:]} == {"[DENIED]"}
        await asyncio.sleep(600)
        assert broker.cloud.count("launch") == 1
        assert broker.daemon.context.store.open_orders() == []

    live(tmp_path, story)


def test_two_that_started_on_an_empty_cloud_find_each_other_by_their_machines(tmp_path: Path) -> None:
    async def main() -> None:
        async with on_host("a", tmp_path) as first, on_host("b", tmp_path, first) as second:
            assert not reads_only(first)
            assert not reads_only(second)
            await asyncio.gather(first.ask("GET_WORKER client=ann"), second.ask("GET_WORKER client=ben"))
            await asyncio.sleep(3 * SCAN_SECONDS)
            assert reads_only(first)
            assert not reads_only(second)
            assert second.registry.count("default", WorkerState.READY) == 2
            found = {on_machine(first.cloud, one) for one in first.cloud.running()}
            assert {one.rank for one in found if one} == {(1, "b")}

    run_virtual(main())


# --- the claim on the machines -----------------------------------------------------------------------------


def test_a_machine_carries_its_claim_from_the_launch_call_on_and_is_marked_every_five_minutes(
    tmp_path: Path,
) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=ann")
        (machine,) = broker.cloud.running()
        assert on_machine(broker.cloud, machine) == Claim(1, "host", EPOCH_UNIX)
        for minute in range(1, 121):
            await asyncio.sleep(60)
            await broker.ask(f"PING {address} client=ann")
            found = on_machine(broker.cloud, machine)
            assert found is not None
            age_seconds = EPOCH_UNIX + broker.clock.monotonic() - found.beat_unix
            assert age_seconds <= BEAT_SECONDS + SCAN_SECONDS, minute
        assert broker.cloud.tagged(tags.EPOCH) == pytest.approx(24, abs=3)

    live(tmp_path, story)


def test_machines_of_an_older_version_are_taken_in_and_marked_in_one_call(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER")
        await asyncio.sleep(60)
        old = [broker.cloud.add() for _ in range(3)]
        write(broker.cloud, old[0], "nonsense")
        before = broker.cloud.tagged(tags.EPOCH)
        await broker.until(
            lambda: all(on_machine(broker.cloud, one) for one in old), seconds_max=SCAN_SECONDS + 1
        )
        assert broker.cloud.tagged(tags.EPOCH) == before + 1
        assert broker.registry.count("default", WorkerState.BOOTING, WorkerState.READY) == 4

    live(tmp_path, story)


def test_a_claim_that_may_not_be_written_is_not_tried_at_every_scan(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("STATUS")
        broker.cloud.fail["tag_all"].extend(PermanentRefusal("not authorized") for _ in range(1000))
        broker.cloud.add()
        await asyncio.sleep(600)
        assert 5 <= broker.cloud.tagged(tags.EPOCH) <= 11

    live(tmp_path, story)


def test_a_broker_that_could_not_look_for_long_looks_before_it_ends_a_machine(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=ann")
        (machine,) = broker.cloud.running()
        broker.cloud.fail["listing"].extend(Throttled() for _ in range(5000))
        assert await broker.ask(f"PING {address} client=ann") == "OK"
        await asyncio.sleep(800)
        assert await broker.ask(f"PING {address} client=ann") == "OK"
        await asyncio.sleep(3600)
        assert broker.cloud.count("terminate") == 0
        write(broker.cloud, machine, f"7.z@{tags.rfc3339(broker.clock.wall())}")
        broker.cloud.fail.clear()
        await asyncio.sleep(120)
        assert reads_only(broker)
        assert broker.cloud.running() == [machine]

    live(tmp_path, story)


def test_a_cloud_that_another_broker_has_does_not_silence_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        chosen = settings(pools={"mars": {}})
        async with running_broker(settings(), tmp_path / "a", owner="a") as first:
            await first.ask("GET_WORKER client=ann")
            mars = FakeCloud("lab", ("default", "mars"), clock=first.clock)
            mars.name = "mars"
            both = running_broker(chosen, tmp_path / "b", cloud=first.cloud, others={"mars": mars}, owner="b")
            async with both as second:
                second.daemon.probe._connect = mars.connect
                assert (await second.ask("GET_WORKER")).endswith("[DENIED]")
                address = await second.ask("GET_WORKER pool=mars client=ben")
                assert await second.ask(f"PING {address} client=ben") == "OK"
                assert (await second.ask("TERMINATE_ALL")).endswith("[DENIED]")
                assert len(mars.running()) == 1

    run_virtual(main())
