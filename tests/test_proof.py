"""What happens between the choice of a worker and its hand-out: it is silent, is ended, loses its pool, or
its client goes away. Nothing stays held by nobody, and nobody stays in a queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from broker.core.errors import LimitReached
from broker.core.model import Lease, Worker
from broker.testing import FakeCloud, LoopClock, RunningBroker, run_virtual, running_broker
from tests.support.acquiring import acquire
from tests.support.brokers import full_disk, live, settings

DAY_SECONDS = 86_400.0


async def idle_workers(broker: RunningBroker, count: int, pool: str = "default") -> list[Worker]:
    """So many workers that nobody holds; those that would be handed out first come first."""
    asks = [broker.ask(f"GET_WORKER pool={pool} exclusive=yes client=c{number}") for number in range(count)]
    await asyncio.gather(*asks)
    for worker in list(broker.registry):
        for lease in broker.registry.leases(worker.id):
            broker.registry.end_lease(worker.id, lease.key, "done", broker.clock.monotonic())
    await asyncio.sleep(5)
    return list(reversed(list(broker.registry.unheld(pool))))


async def all_is_over(broker: RunningBroker) -> None:
    """Days after everybody has gone nothing runs, and nobody is left in a queue."""
    await asyncio.sleep(3 * DAY_SECONDS)
    assert broker.cloud.running() == []
    assert len(broker.daemon.context.waiting) == 0


Happening = Callable[[RunningBroker, Worker], Awaitable[object]]


async def ended_by_force(broker: RunningBroker, worker: Worker) -> None:
    assert await broker.ask(f"RELEASE {worker.address} force client=operator") == "OK"


async def silent(broker: RunningBroker, worker: Worker) -> None:
    broker.cloud.machines[str(worker.instance_id)].answers = False


@pytest.mark.parametrize("happens", [ended_by_force, silent])
def test_who_is_given_a_second_worker_after_the_first_is_lost_holds_one(
    tmp_path: Path, happens: Happening
) -> None:
    """It had been served twice: the second lease was held by nobody, for ever with `hold=connection`."""

    async def story(broker: RunningBroker) -> None:
        first, _ = await idle_workers(broker, 2)
        broker.cloud.slow[str(first.address)] = 2.0
        client = broker.client()
        asked = asyncio.create_task(acquire(client, "hold=connection client=dan"))
        await asyncio.sleep(0.5)
        await happens(broker, first)
        ((_, address),) = await asked
        assert address != first.address
        held = [lease for worker in broker.registry for lease in broker.registry.leases(worker.id)]
        assert len(held) == 1
        client.vanish()
        await all_is_over(broker)
        assert broker.cloud.count("launch") == 2

    live(tmp_path, story, chosen=settings(sharing="exclusive"))


def test_a_pool_that_is_removed_during_the_proof_leaves_nobody_waiting_in_it(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        (worker,) = await idle_workers(broker, 1, pool="gpu")
        broker.cloud.slow[str(worker.address)] = 2.0
        client = broker.client()
        client.send(b"ACQUIRE pool=gpu hold=connection client=dan\n")
        await asyncio.sleep(0.5)
        await broker.reload(settings())
        reply = await client.reply(60)
        assert reply is not None
        assert "gpu" in reply
        client.vanish()
        await broker.reload(settings({"gpu": {"sharing": "exclusive"}}))
        await all_is_over(broker)
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, chosen=settings({"gpu": {"sharing": "exclusive"}}))


def test_a_client_that_goes_away_during_the_proof_leaves_its_worker_to_the_next(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        (worker,) = await idle_workers(broker, 1)
        broker.cloud.slow[str(worker.address)] = 2.0
        client = broker.client()
        client.send(b"GET_WORKER client=dan\n")
        await asyncio.sleep(0.5)
        client.vanish()
        begun_at = broker.clock.monotonic()
        assert await broker.ask("GET_WORKER client=eve wait=60") == worker.address
        assert broker.clock.monotonic() - begun_at < 10

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


@pytest.mark.parametrize("command", ["GET_WORKER", "ACQUIRE"])
@pytest.mark.parametrize("wait", [0, 2, 5])
def test_silent_workers_do_not_make_a_client_wait_longer_than_it_said(
    tmp_path: Path, command: str, wait: int
) -> None:
    """Each try of a silent port takes seconds, and there are four: together they took half a minute."""

    async def story(broker: RunningBroker) -> None:
        workers = await idle_workers(broker, 4)
        for worker in workers:
            broker.cloud.slow[str(worker.address)] = 4.0
            await silent(broker, worker)
        begun_at = broker.clock.monotonic()
        client = broker.client()
        client.send(f"{command} client=dan wait={wait}\n".encode())
        reply = await client.reply(60)
        while reply is not None and reply.startswith("PENDING"):
            reply = await client.reply(60)
        assert reply is not None
        assert "[TIMEOUT]" in reply
        assert broker.clock.monotonic() - begun_at <= wait + 1.1
        await asyncio.sleep(0.1)
        assert [broker.registry.leases(worker.id) for worker in broker.registry] == [[]] * 4

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=4))


# --- a lease that several connections of one client share ------------------------------------------------


def test_a_hand_out_that_fails_takes_nothing_from_who_was_told_meanwhile(tmp_path: Path) -> None:
    """Its lease ended, although a PING had been told OK, and the next client's RELEASE ended the machine."""

    async def story(broker: RunningBroker) -> None:
        (worker,) = await idle_workers(broker, 1)
        address = str(worker.address)
        broker.cloud.slow[address] = 5.0
        client = broker.client()
        client.send(b"GET_WORKER client=ann wait=0\n")
        await asyncio.sleep(0.5)
        assert await broker.ask(f"PING {address} client=ann") == "OK"
        assert "[TIMEOUT]" in str(await client.reply())
        broker.cloud.slow.clear()
        assert "max_workers" in await broker.ask("GET_WORKER client=ben wait=60")
        assert await broker.ask(f"RELEASE {address} client=ben") == "OK"
        await asyncio.sleep(5)
        assert await broker.ask(f"PING {address} client=ann") == "OK"

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


@pytest.mark.parametrize("goes_away", [True, False])
def test_of_two_connections_the_one_that_fails_takes_nothing_from_the_other(
    tmp_path: Path, goes_away: bool
) -> None:
    async def story(broker: RunningBroker) -> None:
        (worker,) = await idle_workers(broker, 1)
        broker.cloud.slow[str(worker.address)] = 0.8
        first, second = broker.client(), broker.client()
        first.send(b"GET_WORKER client=ann wait=0\n" if not goes_away else b"GET_WORKER client=ann\n")
        second.send(b"GET_WORKER client=ann wait=60\n")
        await asyncio.sleep(0.2)
        if goes_away:
            first.vanish()
        assert await second.reply() == worker.address
        assert "max_workers" in await broker.ask("GET_WORKER client=ben wait=60")

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


def test_a_proof_that_cannot_be_made_leaves_no_lease(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        (worker,) = await idle_workers(broker, 1)
        broker.cloud.fail["connect"].append(LimitReached("no file descriptors"))
        assert "no file descriptors" in await broker.ask("GET_WORKER client=ann")
        assert await broker.ask("GET_WORKER client=ben wait=60") == worker.address

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


def test_a_readiness_that_may_not_be_old_at_all_is_still_good_for_several_at_once(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert len(await acquire(broker.client(), "count=3 client=ann wait=60")) == 3

    live(tmp_path, story, chosen=settings(sharing="exclusive", readiness_max_age=0))


@pytest.mark.parametrize("count", [1, 2])
def test_an_acquire_that_fails_leaves_the_worker_to_who_was_told_ok_by_a_ping(
    tmp_path: Path, count: int
) -> None:
    """It was given back with the rest, and the next client's RELEASE ended the machine under its client."""

    async def story(broker: RunningBroker) -> None:
        first, *others = await idle_workers(broker, count)
        for worker in (first, *others):
            broker.cloud.slow[str(worker.address)] = 3.0
        for worker in others:
            await silent(broker, worker)
        client = broker.client()
        client.send(f"ACQUIRE client=ann count={count} wait=0\n".encode())
        await asyncio.sleep(0.5)
        assert await broker.ask(f"PING {first.address} client=ann") == "OK"
        assert "[TIMEOUT]" in str(await client.reply())
        broker.cloud.slow.clear()
        await asyncio.sleep(10)
        assert [lease.client for lease in broker.registry.leases(first.id)] == ["ann"]
        assert await broker.ask("GET_WORKER client=ben wait=5") != first.address
        assert await broker.ask(f"PING {first.address} client=ann") == "OK"
        await asyncio.sleep(3600)
        assert broker.registry.get(first.id) is None, "without another PING it is idle"

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=count))


def test_a_lease_that_was_kept_by_name_is_known_by_it_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        chosen = settings(sharing="exclusive", max_workers=1)
        async with running_broker(chosen, tmp_path) as broker:
            (worker,) = await idle_workers(broker, 1)
            broker.cloud.slow[str(worker.address)] = 3.0
            client = broker.client()
            client.send(b"ACQUIRE client=ann hold=connection wait=0\n")
            await asyncio.sleep(0.5)
            assert await broker.ask(f"PING {worker.address} client=ann") == "OK"
            assert "[TIMEOUT]" in str(await client.reply())
            await asyncio.sleep(1)
        async with running_broker(chosen, tmp_path, cloud=broker.cloud) as again:
            broker.cloud.slow.clear()
            assert await again.ask("GET_WORKER client=ann") == worker.address
            assert "max_workers" in await again.ask("GET_WORKER client=ben wait=5")

    run_virtual(main())


@pytest.mark.parametrize("command", ["GET_WORKER", "ACQUIRE"])
def test_a_worker_that_dies_while_the_disk_is_slow_is_not_handed_out(tmp_path: Path, command: str) -> None:
    async def story(broker: RunningBroker) -> None:
        first, _ = await idle_workers(broker, 2)
        await asyncio.sleep(31)
        store = broker.daemon.context.store
        written = store.lease_granted

        async def slowly(lease: Lease, worker: Worker) -> None:
            await asyncio.sleep(5)
            await written(lease, worker)

        with patch.object(store, "lease_granted", slowly):
            client = broker.client()
            client.send(f"{command} client=ann wait=60\n".encode())
            await asyncio.sleep(1)
            await silent(broker, first)
            reply = await client.reply(60)
            assert reply is not None
            assert str(first.address) not in reply.split()[-8:]
            assert not reply.startswith("ERROR")

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=3))


@pytest.mark.parametrize(
    "pool", [{"leases_per_worker_max": 1}, {"workers_per_client_max": 1}, {"sharing": "exclusive"}]
)
def test_a_holder_that_pings_before_the_first_scan_after_a_restart_holds_its_worker(
    tmp_path: Path, pool: dict[str, Any]
) -> None:
    async def main() -> None:
        async with running_broker(settings(**pool), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=ann")
        async with running_broker(settings(**pool), tmp_path, cloud=broker.cloud) as again:
            assert await again.ask(f"PING {address} client=ann") == "OK"

    run_virtual(main())


def test_of_two_connections_that_are_served_in_one_instant_the_living_one_keeps_it(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=zoe")
        clients = [broker.client() for _ in range(3)]
        for client, name in zip(clients, ("ann", "ann", "ben"), strict=True):
            client.send(f"GET_WORKER client={name} wait=100\n".encode())
            await asyncio.sleep(1)
        releasing = broker.client()
        releasing.send(f"RELEASE {address} client=zoe\n".encode())
        clients[0].vanish()
        assert await clients[1].reply(10) == address

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


@pytest.mark.parametrize("words", ["", "hold=connection", "ttl=86400"])
def test_one_that_was_served_in_the_queue_keeps_its_worker_by_a_ping_for_an_idle_timeout(
    tmp_path: Path, words: str
) -> None:
    """It stood twice in the list of what was to be given back, and the second time ended it."""

    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=zoe")
        client = broker.client()
        client.send(f"ACQUIRE client=ann wait=20 {words}\n".encode())
        await asyncio.sleep(15)
        broker.cloud.slow[address] = 10.0
        lease = next(iter(broker.registry.leases(next(iter(broker.registry)).id)))
        broker.registry.end_lease(lease.worker_id, lease.key, "done", broker.clock.monotonic())
        await asyncio.sleep(1)
        assert await broker.ask(f"PING {address} client=ann") == "OK"
        reply = await client.reply(60)
        while reply is not None and reply.startswith("PENDING"):
            reply = await client.reply(60)
        assert "[TIMEOUT]" in str(reply)
        broker.cloud.slow.clear()
        client.vanish()
        assert "max_workers" in await broker.ask("GET_WORKER client=ben wait=60")
        assert await broker.ask(f"PING {address} client=ann") == "OK"
        await asyncio.sleep(3600)
        assert broker.cloud.running() == []

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


def test_a_client_that_goes_away_as_it_is_served_leaves_its_worker_to_the_next(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=zoe")
        first, second, releasing = broker.client(), broker.client(), broker.client()
        first.send(b"GET_WORKER client=ann wait=100\n")
        await asyncio.sleep(1)
        second.send(b"GET_WORKER client=ben wait=100\n")
        await asyncio.sleep(1)
        releasing.send(f"RELEASE {address} client=zoe\n".encode())
        first.vanish()
        assert await second.reply(10) == address

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


def test_an_acquire_that_waits_for_the_first_look_hears_that_its_pool_was_removed(tmp_path: Path) -> None:
    """It had asked again and again whether a removed pool's clouds were known, without a pause: for ever."""

    async def main() -> None:
        old = FakeCloud("lab", ("old",), clock=LoopClock(asyncio.get_running_loop()), first=1000)
        old.hold["listing"] = asyncio.Event()
        chosen = settings({"old": {}})
        async with running_broker(chosen, tmp_path, others={"old": old}) as broker:
            await asyncio.sleep(2)
            client = broker.client()
            client.send(b"ACQUIRE pool=old wait=60\n")
            await asyncio.sleep(1)
            await broker.reload(settings())
            reply = await client.reply(5)
            while reply is not None and reply.startswith("PENDING"):
                reply = await client.reply(5)
            assert str(reply).startswith("ERROR: there is no pool 'old' any more")
            old.hold.pop("listing").set()

    run_virtual(main())


def test_a_worker_of_ones_own_that_cannot_be_had_leaves_the_shared_one_shared(tmp_path: Path) -> None:
    """The hold stayed exclusive until it ended, and nobody could share the worker meanwhile."""

    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        (worker,) = list(broker.registry)
        machine = broker.cloud.machines[str(worker.instance_id)]
        await asyncio.sleep(5)
        machine.answers = False
        assert (await broker.ask("GET_WORKER client=a exclusive=yes wait=0")).startswith("ERROR")
        machine.answers = True
        assert await broker.ask("GET_WORKER client=b wait=60") == address
        assert await broker.ask("PING " + address + " client=a") == "OK"

    live(tmp_path, story, chosen=settings(max_workers=1))


def test_a_worker_of_ones_own_that_the_disk_refuses_leaves_the_shared_one_shared(tmp_path: Path) -> None:
    """The hold had ended altogether: the client worked on without one."""

    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        with full_disk(broker):
            assert (await broker.ask("GET_WORKER client=a exclusive=yes wait=0")).startswith("ERROR")
        (worker,) = list(broker.registry)
        assert [one.exclusive for one in broker.registry.leases(worker.id)] == [False]
        assert await broker.ask("GET_WORKER client=b wait=60") == address

    live(tmp_path, story, chosen=settings(max_workers=1))


def test_a_worker_of_ones_own_stays_so_when_a_later_question_fails(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a exclusive=yes")
        (worker,) = list(broker.registry)
        machine = broker.cloud.machines[str(worker.instance_id)]
        await asyncio.sleep(5)
        machine.answers = False
        assert (await broker.ask("GET_WORKER client=a exclusive=yes wait=0")).startswith("ERROR")
        machine.answers = True
        assert "ERROR" in await broker.ask("GET_WORKER client=b wait=30")

    live(tmp_path, story, chosen=settings(max_workers=1))
