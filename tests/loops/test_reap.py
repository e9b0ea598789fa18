"""Who is terminated, when, and how a Terminate is seen through."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from broker.core.errors import Throttled
from broker.core.model import Event, LeaseEnded, WorkerChanged, WorkerState
from broker.testing import RunningBroker, run_virtual, running_broker
from tests.support.brokers import live, settings


def test_a_throttled_terminate_is_sent_again_until_it_is_answered(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER")
        broker.cloud.fail["terminate"].extend(Throttled() for _ in range(5))
        await broker.ask(f"RELEASE {address}")
        await broker.until(lambda: not broker.cloud.running(), seconds_max=120)
        assert broker.cloud.count("terminate") == 6

    live(tmp_path, story)


def test_a_terminate_that_is_not_obeyed_is_sent_again(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.ends_at_once = False
        address = await broker.ask("GET_WORKER")
        await broker.ask(f"RELEASE {address}")
        await asyncio.sleep(3600)
        assert 20 <= broker.cloud.count("terminate") <= 35
        assert await broker.ask("GET_WORKER") != address

    live(tmp_path, story)


def test_a_busy_worker_outlives_its_max_lifetime_and_takes_no_new_clients(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        old = await broker.ask("GET_WORKER client=a")
        for _ in range(20):
            await asyncio.sleep(300)
            assert await broker.ask(f"PING {old} client=a") == "OK"
        young = await broker.ask("GET_WORKER client=b")
        assert young != old
        assert await broker.ask(f"PING {old} client=a") == "OK"
        await broker.ask(f"RELEASE {old} client=a")
        await asyncio.sleep(5)
        assert len(broker.cloud.running()) == 1

    live(tmp_path, story, chosen=settings(max_lifetime="1h"))


def test_an_idle_worker_past_its_max_lifetime_ends(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        await asyncio.sleep(3700)
        assert broker.cloud.running() == []

    live(tmp_path, story, chosen=settings(max_lifetime="1h", idle_timeout="50m"))


def test_a_machine_that_stays_pending_ends_at_the_boot_deadline_and_another_is_tried(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        ask = asyncio.create_task(broker.ask("GET_WORKER wait=3600"))
        await broker.until(lambda: broker.cloud.count("launch") == 2 and broker.cloud.running())
        assert broker.cloud.count("terminate") == 1
        broker.cloud.boot(broker.cloud.running()[0])
        assert "ERROR" not in await ask

    live(tmp_path, story, boots=False, chosen=settings(boot_deadline="2m"))


def test_a_machine_that_runs_but_never_answers_is_never_handed_out(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        ask = asyncio.create_task(broker.ask("GET_WORKER wait=100"))
        await broker.until(lambda: broker.cloud.machines)
        next(iter(broker.cloud.machines.values())).answers = False
        broker.cloud.boot(broker.cloud.running()[0])
        assert "[TIMEOUT]" in await ask

    live(tmp_path, story, boots=False)


def test_a_wall_clock_that_jumps_ends_nobody_and_makes_nobody_immortal(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        broker.clock.jump(3600 * 24)
        await asyncio.sleep(60)
        assert await broker.ask(f"PING {address} client=a") == "OK"
        broker.clock.jump(-3600 * 48)
        await asyncio.sleep(890)
        assert len(broker.cloud.running()) == 1
        await asyncio.sleep(15)
        assert broker.cloud.running() == []

    live(tmp_path, story)


def test_an_unheld_worker_that_stops_answering_ends_after_five_minutes(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        await asyncio.sleep(10)
        address = next(iter(broker.registry)).address
        next(iter(broker.cloud.machines.values())).answers = False
        await broker.until(lambda: broker.registry.in_state(WorkerState.SUSPECT))
        assert await broker.ask(f"PING {address} client=a") == "OK", "it is held: it keeps its client"
        await asyncio.sleep(600)
        assert len(broker.cloud.running()) == 1
        await asyncio.sleep(600)
        assert broker.cloud.running() == []

    live(tmp_path, story)


def test_a_fault_over_one_worker_does_not_make_the_others_immortal(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        faults = 0

        def stumble(event: Event) -> None:
            nonlocal faults
            if isinstance(event, WorkerChanged) and event.worker.state is WorkerState.DRAINING and not faults:
                faults += 1
                raise ValueError("an observer stumbles")

        for name in ("a", "b", "c"):
            await broker.ask(f"GET_WORKER client={name}")
        broker.daemon.observe(stumble)
        await asyncio.sleep(1200)
        assert faults == 1
        assert broker.cloud.running() == []

    live(tmp_path, story, chosen=settings(sharing="exclusive"))


def test_that_a_worker_ends_is_on_disk_before_the_cloud_is_told(tmp_path: Path) -> None:
    """A Terminate that is still on its way when the broker dies must not meet a worker that its successor
    has handed out."""

    async def story(broker: RunningBroker) -> None:
        broker.cloud.hold["terminate"] = asyncio.Event()
        address = await broker.ask("GET_WORKER")
        (instance,) = broker.cloud.running()
        await broker.ask(f"RELEASE {address}")
        on_disk: list[set[str]] = []
        while not broker.cloud.count("terminate"):
            on_disk.append(broker.daemon.context.store.ended())
            await asyncio.sleep(0)
        assert on_disk[-1] == {instance}
        broker.cloud.hold["terminate"].set()

    live(tmp_path, story)


def test_a_full_disk_does_not_keep_an_idle_worker_alive(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER")
        broker.daemon.context.store.die()
        await broker.ask(f"RELEASE {address}")
        await broker.until(lambda: not broker.cloud.running(), seconds_max=10)

    live(tmp_path, story)


# --- protected machines, hard lifetimes -------------------------------------------------------------------


async def protected(broker: RunningBroker, instance_id: str) -> None:
    """A person tags the machine, and a listing shows it."""
    broker.cloud.retag(instance_id, protect="yes")
    await asyncio.sleep(31)


def test_a_protected_worker_outlives_every_reason_to_end_it(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER")
        (instance_id,) = broker.cloud.running()
        await protected(broker, instance_id)
        assert await broker.ask(f"RELEASE {address} force") == "OK"
        assert json.loads(await broker.ask("TERMINATE_ALL")) == {"terminated": [], "protected": [instance_id]}
        await asyncio.sleep(12 * 3600)
        assert broker.cloud.running() == [instance_id]
        assert broker.cloud.count("terminate") == 0

    live(tmp_path, story)


def test_release_with_force_ends_only_the_callers_lease_on_a_protected_worker(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        await broker.ask("GET_WORKER client=b")
        await protected(broker, *broker.cloud.running())
        assert await broker.ask(f"RELEASE {address} force client=a") == "OK"
        (worker,) = broker.registry
        assert [lease.client for lease in broker.registry.leases(worker.id)] == ["b"]

    live(tmp_path, story)


def test_a_worker_whose_tag_is_taken_away_ends_when_its_time_has_long_come(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER")
        (instance_id,) = broker.cloud.running()
        await protected(broker, instance_id)
        await asyncio.sleep(3600)
        broker.cloud.retag(instance_id, protect="no")
        await asyncio.sleep(180)
        assert broker.cloud.running() == []

    live(tmp_path, story)


def test_a_protected_machine_that_does_not_come_up_is_kept_and_never_handed_out(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        asked = asyncio.create_task(broker.ask("GET_WORKER wait=600"))
        await broker.until(lambda: broker.cloud.running())
        (instance_id,) = broker.cloud.running()
        await protected(broker, instance_id)
        assert (await asked).startswith("ERROR")
        broker.cloud.boot(instance_id)
        await asyncio.sleep(3600)
        assert broker.cloud.running() == [instance_id]
        assert broker.registry.count("default", WorkerState.DRAINING) == 1
        reply = await broker.ask("GET_WORKER wait=1")
        assert "max_workers = 1" in reply, "it counts against the cap"
        broker.cloud.retag(instance_id, protect="")
        await asyncio.sleep(180)
        assert broker.cloud.running() == []

    live(tmp_path, story, boots=False, chosen=settings(boot_deadline="5m", max_workers=1))


def test_a_machine_that_is_protected_before_its_terminate_is_sent_lives_on(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER")
        (instance_id,) = broker.cloud.running()
        broker.cloud.fail["terminate"].append(Throttled())
        await broker.ask(f"RELEASE {address}")
        await broker.until(lambda: broker.cloud.count("terminate") == 1)
        broker.cloud.retag(instance_id, protect="yes")
        await broker.daemon.reconcile.scan()
        await asyncio.sleep(3600)
        assert broker.cloud.running() == [instance_id]
        assert broker.cloud.count("terminate") == 1

    live(tmp_path, story)


def test_the_reaper_rests_while_all_it_has_to_end_is_protected(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER")
        (instance_id,) = broker.cloud.running()
        broker.cloud.fail["terminate"].append(Throttled())
        await broker.ask(f"RELEASE {address}")
        await broker.until(lambda: broker.cloud.count("terminate") == 1)
        broker.cloud.retag(instance_id, protect="yes")
        await broker.daemon.reconcile.scan()
        await asyncio.sleep(60)
        next_at = await broker.daemon.reap.tick()
        assert next_at is None or next_at > broker.clock.monotonic() + 10.0

    live(tmp_path, story)


def test_a_restart_does_not_forget_protection_although_a_listing_does_not_show_the_machine(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            (instance_id,) = broker.cloud.running()
            await protected(broker, instance_id)
        broker.cloud.machines[instance_id].hidden = True
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            assert await again.ask(f"RELEASE {address} force client=a") == "OK"
            await asyncio.sleep(10)
            assert again.cloud.running() == [instance_id]

    run_virtual(main())


def test_a_leased_worker_ends_at_the_hard_lifetime_and_its_client_hears_of_it(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        reasons: list[str] = []
        broker.daemon.observe(lambda e: reasons.append(e.reason) if isinstance(e, LeaseEnded) else None)
        address = await broker.ask("GET_WORKER client=a")
        for _ in range(11):
            await asyncio.sleep(600)
            assert await broker.ask(f"PING {address} client=a") == "OK"
        await asyncio.sleep(601)
        assert await broker.ask(f"PING {address} client=a") == "ERROR: Worker not found"
        assert reasons == ["hard-lifetime"]
        await broker.until(lambda: not broker.cloud.running(), seconds_max=5)

    live(tmp_path, story, chosen=settings(max_lifetime="1h", hard_lifetime="2h"))


def test_restarts_do_not_lengthen_a_hard_lifetime(tmp_path: Path) -> None:
    async def main() -> None:
        chosen, cloud, address = settings(max_lifetime="1h", hard_lifetime="2h"), None, ""
        for _ in range(4):
            async with running_broker(chosen, tmp_path, cloud=cloud) as broker:
                cloud, address = broker.cloud, address or await broker.ask("GET_WORKER client=a")
                for _ in range(4):
                    await asyncio.sleep(440)
                    assert await broker.ask(f"PING {address} client=a") == "OK"
        async with running_broker(chosen, tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(250)
            assert await broker.ask(f"PING {address} client=a") == "ERROR: Worker not found"

    run_virtual(main())
