"""ACQUIRE and what belongs to it, against a whole broker in virtual time: leases of one's own, several at
once, ended with the connection, kept over a restart; and what is said to those who wait."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import OfferingRefused
from broker.core.model import WorkerState
from broker.core.settings import Settings
from broker.granting import TURN_SECONDS
from broker.testing import RunningBroker, run_virtual, running_broker
from tests.support.acquiring import LEASE, acquire, refusal, reply_of
from tests.support.brokers import live, settings

ENDED = "ERROR: that lease has ended [DENIED]"


def exclusive(**pool: Any) -> Settings:
    return settings(sharing="exclusive", **pool)


def leases(broker: RunningBroker) -> list[str]:
    return [lease.id for worker in broker.registry for lease in broker.registry.leases(worker.id)]


# --- leases of one's own ----------------------------------------------------------------------------------


def test_who_acquires_several_gets_no_more_of_a_worker_than_uses_are_left(tmp_path: Path) -> None:
    """Seed 282: the second lease was refused after the first had closed the worker, and nobody got either."""

    async def story(broker: RunningBroker) -> None:
        (_, here), (_, there) = await acquire(broker.client(), "client=ann count=2")
        assert here != there
        assert len({worker.born_at for worker in broker.registry}) == 1, "both were ordered at once"

    live(tmp_path, story, chosen=settings(uses_max=1, leases_per_worker_max=2))


def test_who_acquires_twice_has_two_workers_of_an_exclusive_pool(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        ((first, here),) = await acquire(client, "client=ann")
        ((second, there),) = await acquire(client, "client=ann")
        assert first != second
        assert here != there
        third = await broker.ask("GET_WORKER client=ann")
        assert third not in (here, there), "what is acquired is nobody's by name"
        assert await broker.ask("GET_WORKER client=ann") == third

    live(tmp_path, story, chosen=exclusive())


def test_who_acquires_twice_in_a_shared_pool_has_two_leases_on_one_worker(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        ((first, here),) = await acquire(client)
        ((second, there),) = await acquire(client)
        assert (first != second, here == there) == (True, True)
        assert await client.ask(f"DONE {first}") == "OK"
        assert leases(broker) == [second]
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story)


def test_done_gives_the_worker_back_warm_and_the_old_id_touches_nobody(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        ((old, address),) = await acquire(client, "client=ann")
        assert await client.ask(f"DONE {old}") == "OK"
        ((new, same),) = await acquire(client, "client=ben")
        assert same == address
        assert broker.cloud.count("launch") == 1
        for command in ("RENEW", "DONE"):
            assert await client.ask(f"{command} {old}") == ENDED
            assert await client.ask(f"{command} lease-of-nobody") == ENDED
        assert leases(broker) == [new]

    live(tmp_path, story, chosen=exclusive())


def test_a_worker_given_back_is_idle_from_its_last_use_however_long_the_lease_was(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        ((lease, _),) = await acquire(client, "ttl=86400")
        await asyncio.sleep(5000)
        assert len(broker.cloud.running()) == 1
        assert await broker.ask(f"RENEW {lease}") == "OK"
        assert await broker.ask(f"DONE {lease}") == "OK"
        await asyncio.sleep(890)
        assert len(broker.cloud.running()) == 1
        await asyncio.sleep(20)
        assert broker.cloud.running() == []

    live(tmp_path, story)


def test_a_lease_lasts_its_own_time_to_live_and_renew_begins_it_anew(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        ((lease, _),) = await acquire(client, "ttl=60")
        await asyncio.sleep(50)
        assert await client.ask(f"RENEW {lease}") == "OK"
        await asyncio.sleep(50)
        assert leases(broker) == [lease]
        await asyncio.sleep(15)
        assert await client.ask(f"RENEW {lease}") == ENDED

    live(tmp_path, story)


def test_a_short_lease_ends_on_time_although_its_worker_was_warm(tmp_path: Path) -> None:
    """The next look at the worker had been the end of its idle time, and whoever waited waited for that."""

    async def story(broker: RunningBroker) -> None:
        ((lease, _),) = await acquire(broker.client(), "client=ann")
        await broker.ask(f"DONE {lease}")
        await asyncio.sleep(5)
        ((lease, address),) = await acquire(broker.client(), "client=ann ttl=1")
        granted_at = broker.clock.monotonic()
        assert await broker.ask("GET_WORKER client=ben wait=60") == address
        assert broker.clock.monotonic() - granted_at < 3
        assert await broker.ask(f"RENEW {lease}") == ENDED

    live(tmp_path, story, chosen=exclusive(max_workers=1))


def test_ping_renews_and_release_ends_all_leases_of_the_client_on_the_worker(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        ((_, address),) = await acquire(client, "client=ann ttl=60")
        await acquire(client, "client=ann ttl=60")
        ((bens, _),) = await acquire(client, "client=ben")
        assert await client.ask("GET_WORKER client=ann") == address
        await asyncio.sleep(50)
        assert await client.ask(f"PING {address} client=ann") == "OK"
        await asyncio.sleep(50)
        assert len(leases(broker)) == 4
        assert await client.ask(f"RELEASE {address} client=ann") == "OK"
        assert leases(broker) == [bens]
        assert len(broker.cloud.running()) == 1

    live(tmp_path, story)


# --- the connection ---------------------------------------------------------------------------------------


def test_a_lease_that_is_held_by_its_connection_needs_no_renewal_and_ends_with_it(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        ((held, address),) = await acquire(client, "hold=connection ttl=60")
        ((ordinary, elsewhere),) = await acquire(client, "ttl=10000")
        await asyncio.sleep(7200)
        assert not client.closed, "longer than a silent connection lives"
        assert leases(broker) == [held, ordinary]
        client.vanish()
        await asyncio.sleep(0.1)
        assert leases(broker) == [ordinary]
        ((_, again),) = await acquire(broker.client())
        assert again == address != elsewhere, "the worker has stayed warm"

    live(tmp_path, story, chosen=exclusive())


def test_a_client_that_goes_away_as_its_lease_is_made_leaves_none_behind(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        for wait_seconds in [step / 1000 for step in range(8)]:
            client = broker.client()
            client.send(b"ACQUIRE hold=connection count=2\n")
            await asyncio.sleep(wait_seconds)
            client.vanish()
            await asyncio.sleep(30)
            assert leases(broker) == []

    live(tmp_path, story, chosen=exclusive())


def test_after_a_restart_what_the_connection_held_is_an_ordinary_lease(tmp_path: Path) -> None:
    async def lives() -> None:
        async with running_broker(exclusive(), tmp_path) as first:
            ((held, address),) = await acquire(first.client(), "client=ann hold=connection ttl=600")
            ((other, _),) = await acquire(first.client(), "client=ann ttl=600")
        async with running_broker(exclusive(), tmp_path, cloud=first.cloud) as again:
            client = again.client()
            assert await client.ask(f"RENEW {held}") == "OK"
            assert await client.ask(f"RENEW {other}") == "OK"
            ((_, new),) = await acquire(client, "client=ben")
            assert new != address
            await asyncio.sleep(601)
            assert await client.ask(f"RENEW {held}") == ENDED

    run_virtual(lives())


def test_a_renewal_right_after_a_restart_waits_for_the_first_look_at_the_cloud(tmp_path: Path) -> None:
    async def lives() -> None:
        async with running_broker(exclusive(), tmp_path) as first:
            ((held, _),) = await acquire(first.client(), "ttl=600")
        first.cloud.hold["listing"] = asyncio.Event()
        async with running_broker(exclusive(), tmp_path, cloud=first.cloud) as again:
            asking = asyncio.create_task(again.client().ask(f"RENEW {held}"))
            await asyncio.sleep(1)
            assert not asking.done()
            again.cloud.hold.pop("listing").set()
            assert await asking == "OK"

    run_virtual(lives())


# --- several at once --------------------------------------------------------------------------------------


def test_so_many_different_workers_at_once(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        held = await acquire(broker.client(), "count=4")
        assert len({id_ for id_, _ in held}) == len({ip for _, ip in held}) == 4
        assert broker.cloud.count("launch") == 4

    live(tmp_path, story, chosen=exclusive())


def test_so_many_leases_at_once_fill_shared_workers_as_far_as_they_may_be(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        held = await acquire(broker.client(), "count=5")
        addresses = [ip for _, ip in held]
        assert sorted(addresses.count(ip) for ip in set(addresses)) == [1, 2, 2]
        assert broker.cloud.count("launch") == 3

    live(tmp_path, story, chosen=settings(leases_per_worker_max=2))


def test_all_or_nothing_is_nothing_when_the_wait_is_over(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        await acquire(client, "client=ann")
        reply = await refusal(client, "client=ben count=4 wait=30")
        assert re.fullmatch(r"ERROR: fewer than 4 workers became ready within 30 s: .* \[TIMEOUT\]", reply)
        assert len(leases(broker)) == 1, "nothing stays held"

    live(tmp_path, story, chosen=exclusive(max_workers=4, launches_per_hour=2))


def test_with_min_the_client_gets_what_there_is_when_the_wait_is_over(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        started = broker.clock.monotonic()
        held = await acquire(client, "count=4 min=2 wait=30")
        assert broker.clock.monotonic() - started == pytest.approx(30, abs=0.1)
        assert len(held) == 3

    live(tmp_path, story, chosen=exclusive(max_workers=4, launches_per_hour=3))


def test_more_than_the_pool_may_ever_have_is_refused_at_once_or_not_waited_for(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        reply = await refusal(client, "count=5")
        assert reply == ("ERROR: the pool has room for 4 such leases at most, by its max_workers [LIMIT]")
        assert len(await acquire(client, "count=1000 min=1 wait=900")) == 4
        assert broker.clock.monotonic() < 60

    live(tmp_path, story, chosen=exclusive(max_workers=4))


def test_two_that_want_more_than_half_each_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        one, two = broker.client(), broker.client()
        one.send(b"ACQUIRE client=ann count=3\n")
        two.send(b"ACQUIRE client=ben count=3\n")
        held = await reply_of(one)
        assert len(held) == 3
        for line in held:
            match = LEASE.fullmatch(line)
            assert match is not None
            assert await one.ask(f"DONE {match['id']}") == "OK"
        assert len(await reply_of(two)) == 3

    live(tmp_path, story, chosen=exclusive(max_workers=4))


def test_workers_are_kept_for_the_first_who_wants_several_but_not_for_ever(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        holder, many, single = broker.client(), broker.client(), broker.client()
        ((first, _), (second, _)) = await acquire(holder, "client=holder count=2 ttl=86400")
        many.send(b"ACQUIRE client=many count=2 wait=86400\n")
        await asyncio.sleep(1)
        began_at = broker.clock.monotonic()
        single.send(b"GET_WORKER client=single wait=86400\n")
        assert await holder.ask(f"DONE {first}") == "OK"
        served = asyncio.create_task(single.reply())
        await asyncio.sleep(TURN_SECONDS - 10)
        assert not served.done(), "what is free is kept for the one who wants two"
        address = await served
        assert broker.clock.monotonic() - began_at == pytest.approx(TURN_SECONDS, abs=2)
        await single.ask(f"PING {address} client=single")
        assert await holder.ask(f"DONE {second}") == "OK"
        assert (await broker.ask("GET_WORKER client=late wait=0")) not in ("", address)

    live(tmp_path, story, chosen=exclusive(max_workers=2))


def test_who_comes_later_is_not_given_what_is_kept(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        holder, many = broker.client(), broker.client()
        ((first, _), (second, _)) = await acquire(holder, "client=holder count=2 ttl=86400")
        many.send(b"ACQUIRE client=many count=2\n")
        await asyncio.sleep(1)
        assert await holder.ask(f"DONE {first}") == "OK"
        assert "[TIMEOUT]" in await broker.ask("GET_WORKER client=late wait=0")
        assert "[TIMEOUT]" in await refusal(broker.client(), "client=later wait=0")
        assert await holder.ask(f"DONE {second}") == "OK"
        assert len(await reply_of(many)) == 2

    live(tmp_path, story, chosen=exclusive(max_workers=2))


def test_what_was_kept_for_one_who_gives_up_is_for_the_next(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        holder, many = broker.client(), broker.client()
        ((first, address), _) = await acquire(holder, "client=holder count=2 ttl=86400")
        many.send(b"ACQUIRE client=many count=2\n")
        await asyncio.sleep(1)
        next_one = asyncio.create_task(broker.ask("GET_WORKER client=next"))
        assert await holder.ask(f"DONE {first}") == "OK"
        await asyncio.sleep(1)
        assert not next_one.done()
        many.vanish()
        assert await next_one == address

    live(tmp_path, story, chosen=exclusive(max_workers=2))


def test_several_are_handed_out_only_when_every_one_of_them_answers(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        held = await acquire(client, "count=2")
        for lease, _ in held:
            await client.ask(f"DONE {lease}")
        await asyncio.sleep(5)
        silent = next(m for m in broker.cloud.machines.values() if m.instance.address == held[0][1])
        silent.answers = False
        again = await acquire(client, "count=2")
        assert held[0][1] not in [ip for _, ip in again]
        assert len(leases(broker)) == 2
        assert broker.registry.count("default", WorkerState.SUSPECT) == 1

    live(tmp_path, story, chosen=exclusive())


# --- shared workers with a maximum of leases --------------------------------------------------------------


def test_a_full_worker_is_not_handed_out_and_another_is_launched_for_who_waits(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        addresses = [await broker.ask(f"GET_WORKER client=c{number}") for number in range(5)]
        assert sorted(addresses.count(ip) for ip in set(addresses)) == [1, 2, 2]
        assert await broker.ask("GET_WORKER client=c0") == addresses[0], "its own is its own"
        reply = await broker.ask(f"PING {addresses[0]} client=newcomer")
        assert reply == "ERROR: the worker has its leases_per_worker_max = 2 clients [DENIED]"
        assert await broker.ask(f"PING {addresses[0]} client=c1") == "OK"

    live(tmp_path, story, chosen=settings(leases_per_worker_max=2))


def test_a_thousand_who_share_by_tens_launch_no_more_than_that_takes(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        asks = [broker.ask(f"GET_WORKER client=c{number}") for number in range(100)]
        addresses = await asyncio.gather(*asks)
        assert all(addresses.count(ip) == 10 for ip in set(addresses))
        assert broker.cloud.count("launch") == 10

    live(tmp_path, story, chosen=settings(leases_per_worker_max=10, max_workers=20))


# --- what is said to those who wait -----------------------------------------------------------------------


def test_who_waits_hears_at_once_why_and_then_what_is_new(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        said: list[re.Match[str]] = []
        await broker.until(broker.daemon.context.clouds.recovered)
        waiting = asyncio.create_task(acquire(broker.client(), "", said))
        await asyncio.sleep(0.05)
        assert [(one["eta"], one["position"], one["code"]) for one in said] == [("unknown", "1", "BOOTING")]
        await asyncio.sleep(25)
        assert [one["reason"] for one in said] == [
            f"one has been booting for {seconds} s" for seconds in (0, 10, 20)
        ]
        broker.cloud.boot(broker.cloud.running()[0])
        assert len(await waiting) == 1

    live(tmp_path, story, boots=False)


def test_the_time_to_wait_is_told_by_what_the_pools_last_machines_took(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        first = asyncio.create_task(acquire(broker.client(), "client=ann"))
        await asyncio.sleep(60)
        broker.cloud.boot(broker.cloud.running()[0])
        await first
        took = broker.clock.monotonic()
        said: list[re.Match[str]] = []
        second = asyncio.create_task(acquire(broker.client(), "client=ben", said))
        await asyncio.sleep(took + 15)
        etas = [one["eta"] for one in said]
        assert int(etas[0]) == pytest.approx(took, abs=2)
        assert int(etas[0]) - int(etas[1]) == 10
        assert etas[-1] == "unknown", "it takes longer than any before it"
        second.cancel()

    live(tmp_path, story, chosen=exclusive(), boots=False)


def test_places_in_the_queue_are_told_as_they_move_and_the_cap_is_named(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        ((held, _),) = await acquire(broker.client(), "client=holder ttl=86400")
        said: list[re.Match[str]] = []
        ahead = broker.client()
        ahead.send(b"GET_WORKER client=ahead\n")
        await asyncio.sleep(0.5)
        waiting = asyncio.create_task(acquire(broker.client(), "client=ben", said))
        await asyncio.sleep(5)
        ahead.vanish()
        await asyncio.sleep(5)
        assert [(one["position"], one["code"]) for one in said] == [("2", "LIMIT"), ("1", "LIMIT")]
        assert said[0]["reason"] == "the pool's max_workers = 1 is reached"
        assert await broker.ask(f"DONE {held}") == "OK"
        await waiting

    live(tmp_path, story, chosen=exclusive(max_workers=1))


def test_who_comes_before_the_first_look_at_the_cloud_hears_that(tmp_path: Path) -> None:
    async def lives() -> None:
        async with running_broker(settings(), tmp_path) as first:
            first.cloud.hold["listing"] = asyncio.Event()
        async with running_broker(settings(), tmp_path, cloud=first.cloud) as again:
            said: list[re.Match[str]] = []
            waiting = asyncio.create_task(acquire(again.client(), "", said))
            await asyncio.sleep(12)
            assert [one["code"] for one in said] == ["STARTING", "STARTING"]
            again.cloud.hold.pop("listing").set()
            await waiting

    run_virtual(lives())


def test_a_wait_ends_on_the_second_and_gives_the_same_reason(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        said: list[re.Match[str]] = []
        started = broker.clock.monotonic()
        reply = await refusal(broker.client(), "wait=30", said)
        assert broker.clock.monotonic() - started == pytest.approx(30, abs=0.05)
        assert reply.startswith("ERROR: no worker became ready within 30 s: one has been booting for 30 s")
        assert said[-1]["reason"].startswith("one has been booting for")

    live(tmp_path, story, boots=False)


# --- notices ----------------------------------------------------------------------------------------------


def test_who_watches_hears_when_its_worker_does_not_answer_and_when_it_is_ended(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        watcher = broker.client()
        assert await watcher.ask("WATCH client=ann") == "OK"
        ((lease, address),) = await acquire(watcher, "client=ann ttl=86400")
        worker = broker.registry.by_address(address)
        assert worker is not None
        broker.registry.suspect(worker.id, "the worker port does not answer", broker.clock.monotonic())
        assert await watcher.reply() == f"NOTICE lost ip={address} lease={lease} in=0 replacement=-"
        assert await watcher.ask(f"PING {address} client=ann") == "OK"
        assert '"terminated"' in await broker.ask("TERMINATE_ALL")
        assert await watcher.reply() == (
            f"NOTICE drain ip={address} lease={lease} in=0 replacement=- reason=terminate-all"
        )

    live(tmp_path, story)


def test_who_watches_hears_when_its_worker_grows_too_old_and_when_it_vanishes(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        watcher = broker.client()
        await watcher.ask("WATCH client=ann")
        ((lease, address),) = await acquire(watcher, "client=ann ttl=86400")
        await acquire(watcher, "client=ben")
        assert await watcher.reply() == f"NOTICE retire ip={address} lease={lease} in=0 replacement=-"
        worker = broker.registry.by_address(address)
        assert worker is not None
        broker.registry.gone(worker.id, "vanished", broker.clock.monotonic())
        assert await watcher.reply() == f"NOTICE lost ip={address} lease={lease} in=0 replacement=-"

    live(tmp_path, story, chosen=settings(max_lifetime=3600))


def test_what_a_client_ends_itself_is_no_news_to_it_nor_is_what_others_lose(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        watcher = broker.client()
        await watcher.ask("WATCH client=ann")
        ((_, address),) = await acquire(watcher, "client=ann")
        await acquire(watcher, "client=ben")
        assert await watcher.ask(f"RELEASE {address} client=ann") == "OK"
        await watcher.ask("WATCH client=nobody")
        assert '"terminated"' in await watcher.ask("TERMINATE_ALL")
        await asyncio.sleep(7200)
        assert not watcher.closed, "who watches may be silent"
        assert await watcher.ask("VERSION") == "compute-broker 0.1.0 protocol 1"

    live(tmp_path, story)


# --- the rest ---------------------------------------------------------------------------------------------


def test_help_names_every_command_and_quit_is_the_last_one(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        help_line = await client.ask("HELP")
        assert "ACQUIRE, RENEW, DONE" in help_line
        client.send(b"QUIT\nGET_WORKER\n")
        assert [await client.reply(), await client.reply()] == ["OK", None]
        await asyncio.sleep(1)
        assert broker.cloud.count("launch") == 0

    live(tmp_path, story)


def test_only_what_is_missing_is_ordered_for_who_wants_several(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        for lease, _ in await acquire(client, "client=ann count=2"):
            assert await client.ask(f"DONE {lease}") == "OK"
        assert len(await acquire(client, "client=ben count=3")) == 3
        assert len(broker.cloud.machines) == 3

    live(tmp_path, story, chosen=exclusive(max_workers=9))


def test_two_hundred_who_acquire_at_once_are_all_served(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        clients = [broker.client() for _ in range(200)]
        held = await asyncio.gather(
            *(acquire(one, f"client=c{number}") for number, one in enumerate(clients))
        )
        assert len({ip for ((_, ip),) in held}) == 200

    live(tmp_path, story, chosen=exclusive(max_workers=200, launches_per_hour=200))


def test_when_waiting_cannot_help_min_will_do_at_once(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        ((lease, _),) = await acquire(broker.client(), "client=ann")
        await broker.ask(f"DONE {lease}")
        broker.cloud.refuses["big"] = OfferingRefused("none left")
        assert len(await acquire(broker.client(), "client=ben count=3 min=1 wait=600")) == 1
        assert broker.clock.monotonic() < 60

    live(tmp_path, story, chosen=exclusive())


def test_what_is_not_handed_out_at_the_end_of_the_wait_is_given_back(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        pairs = [await acquire(broker.client(), f"client=c{number}") for number in range(3)]
        for ((lease, _),) in pairs[:2]:
            await broker.ask(f"DONE {lease}")
        client = broker.client()
        client.send(b"ACQUIRE count=3 min=1 wait=10 hold=connection client=dan\n")
        await asyncio.sleep(5)
        next(iter(broker.cloud.machines.values())).answers = False
        told = [line for line in await reply_of(client) if LEASE.fullmatch(line)]
        assert len(told) == 1
        assert sum(broker.registry.lease_count(name) for name in ("default",)) == 2, "his and c2's"

    live(tmp_path, story, chosen=exclusive(max_workers=3))
