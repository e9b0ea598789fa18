"""Deliberate bugs, one at a time: a simulator that does not find them proves nothing.

Each is a context manager that breaks the broker in one way which brokers of this kind really were broken in,
and mends it again. They live in the tests: no code path of the product leads here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from broker import acquiring, context, granting, orders, service, store, supply, waiting
from broker.clock import Clock
from broker.clouds import Cloud
from broker.core import buying, claim, ledger, planning, policy, schedule, wish
from broker.core.claim import Claim, Ruling
from broker.core.model import Instance, Lease, Worker, WorkerState
from broker.core.policy import LaunchGuard, Room
from broker.core.protocol import OK, Release
from broker.core.registry import Registry
from broker.core.settings import PoolSettings
from broker.loops import launch, probe, reap, reconcile, setbacks, top_up
from broker.providers import ec2_api
from broker.testing import LoopClock

Plant = Callable[[], AbstractContextManager[None]]
PLANTS: dict[str, Plant] = {}


def planted(break_it: Callable[[], Iterator[Any]]) -> Plant:
    """Enter a generator of patches as the plant of its name."""

    @contextmanager
    def plant() -> Iterator[None]:
        patches = list(break_it())
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in reversed(patches):
                one.stop()

    PLANTS[break_it.__name__.replace("_", "-")] = plant
    return plant


# --- launches ----------------------------------------------------------------------------------------------


@planted
def no_token_reuse() -> Iterator[Any]:
    """After a lost answer the call is sent with a new token."""

    async def call(self: launch.LaunchLoop, entry: orders.OpenOrder) -> None:
        for _ in range(launch.CALLS_MAX):
            try:
                cloud = self._context.cloud_of_order(entry.order)
                assert cloud is not None
                fresh = replace(entry.order, id=self._new_order_id())
                bought = await cloud.provider.launch(fresh)
                self._orders.answered(entry.order, bought, "failed")
                return
            except Exception:
                await asyncio.sleep(1)
        self._orders.close(entry.order, "failed")

    yield patch.object(launch.LaunchLoop, "_call", call)


@planted
def order_written_after_the_call() -> Iterator[Any]:
    """The order reaches the disk when the answer is there."""

    async def place(self: orders.Orders, entry: orders.OpenOrder) -> None:
        async def later() -> None:
            await asyncio.sleep(30)
            await self._context.store.order_placed(entry.order)

        self._context.store.soon(later())

    yield patch.object(orders.Orders, "place", place)


@planted
def cap_ignores_machines_on_order() -> Iterator[Any]:
    """Only machines that are ready count against the cap and as supply."""

    def room(
        registry: Registry, name: str, pool: PoolSettings, guard: LaunchGuard, now: float, **_: object
    ) -> Room:
        return Room(max(0, pool.max_workers - registry.count(name, WorkerState.READY)))

    yield patch.object(launch, "launch_room", room)
    yield patch.object(supply.Supply, "coming", lambda self, name, without=None: {})


@planted
def launches_of_the_hour_are_not_counted() -> Iterator[Any]:
    yield patch.object(policy.LaunchGuard, "attempted", lambda self, now: None)


@planted
def launches_of_the_hour_are_forgotten_at_a_restart() -> Iterator[Any]:
    yield patch.object(store.Store, "attempts", lambda self, moment, within_seconds: [])


@planted
def spares_ignore_machines_on_their_way() -> Iterator[Any]:
    """Until a spare is ready, it is ordered again and again."""

    def plan(needs: Any, coming: Any, *others: Any, spare: int, **more: Any) -> planning.Plan:
        again = spare + sum(coming.values()) * bool(spare)
        return planning.plan(needs, coming, *others, spare=again, **more)

    yield patch.object(launch, "plan", plan)


@planted
def spares_by_the_wall_clock() -> Iterator[Any]:
    """The clock that somebody may have set says what the schedule wants."""

    def warm_target(self: context.Context, name: str, now: float) -> int:
        return schedule.target(self.pool(name).warm_targets, self.clock.wall())

    yield patch.object(context.Context, "_warm_target", warm_target)


# --- what listings mean ------------------------------------------------------------------------------------


@planted
def no_grace() -> Iterator[Any]:
    """Whatever one listing does not show is gone."""
    yield patch.object(reconcile, "LISTING_GRACE_SECONDS", -1e9)
    yield patch.object(reconcile, "MISSING_SECONDS_MAX", 0.0)
    yield patch.object(reconcile, "MISSING_SCANS_MAX", 1)
    yield patch.object(reconcile.ReconcileLoop, "_answers", lambda self, worker: False)


@planted
def half_a_listing_is_a_listing() -> Iterator[Any]:
    """When a later page fails, the first ones stand for the whole, and what they miss is gone."""

    async def every(self: ec2_api.Ec2Api, api: str, key: str, **parameters: Any) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        while True:
            try:
                answer = await self.call(api, **parameters)
            except Exception:
                if api != "DescribeInstances":
                    raise
                return items
            items += answer.get(key) or ()
            if not answer.get("NextToken"):
                return items
            parameters["NextToken"] = answer["NextToken"]

    yield patch.object(ec2_api.Ec2Api, "every", every)
    yield patch.object(reconcile, "MISSING_SECONDS_MAX", 0.0)
    yield patch.object(reconcile, "MISSING_SCANS_MAX", 1)
    yield patch.object(reconcile.ReconcileLoop, "_answers", lambda self, worker: False)


@planted
def machines_without_an_address_are_not_taken_in() -> Iterator[Any]:
    """The published broker's discovery: pending machines are passed over, and nobody looks again."""
    take_in = reconcile.ReconcileLoop._matched

    def matched(self: reconcile.ReconcileLoop, cloud: Cloud, instance: Instance) -> Worker | None:
        if self._context.clouds.recovered() or instance.address is None:
            return None
        return take_in(self, cloud, instance)

    yield patch.object(reconcile.ReconcileLoop, "_matched", matched)
    yield patch.object(store.Store, "open_orders", lambda self: [])
    yield patch.object(store.Store, "launched_orders", lambda self, moment: [])


# --- ending machines ---------------------------------------------------------------------------------------


@planted
def no_draining_fence() -> Iterator[Any]:
    """Terminate is sent first, and the worker is set aside when that was answered."""

    def judge(self: reap.ReapLoop, worker: Worker, now: float) -> None:
        self._registry.expire_leases(worker.id, now)
        verdict = policy.judge(self._registry, worker, self._context.pool(worker.pool), now)
        if verdict.next_look_at is not None:
            self._registry.look_again(worker.id, verdict.next_look_at)
        cloud = self._context.cloud_of(worker)
        if verdict.drain is None or cloud is None or worker.instance_id is None:
            return
        reason, instance_id = verdict.drain, worker.instance_id

        async def end() -> None:
            assert cloud is not None
            try:
                await cloud.provider.terminate([instance_id])
                self._registry.drain(worker.id, reason, self._context.now())
            except Exception:
                self._registry.look_again(worker.id, self._context.now() + 5)

        self._task = asyncio.ensure_future(end())  # type: ignore[attr-defined]

    yield patch.object(reap.ReapLoop, "_judge", judge)


@planted
def forgotten_when_terminate_is_answered() -> Iterator[Any]:
    """The worker leaves the books with Terminate's answer, and its machine is not taken in again."""

    def sent(self: reap.ReapLoop, worker: Worker, now: float) -> None:
        if self._registry.get(worker.id) is not None:
            self._registry.gone(worker.id, "terminated", now)

    original = reconcile.ReconcileLoop._matched

    def only_at_the_start(self: reconcile.ReconcileLoop, cloud: Cloud, instance: Instance) -> Worker | None:
        if (
            self._context.now() - self._recovery._began_at > 60
            and self._orders.get(_order_of(instance)) is None
        ):
            return None
        return original(self, cloud, instance)

    yield patch.object(reap.ReapLoop, "_sent", sent)
    yield patch.object(reconcile.ReconcileLoop, "_matched", only_at_the_start)


def _order_of(instance: Instance) -> str:
    return instance.tags.get("compute-broker:order", "")


@planted
def wall_clock_for_idle_times() -> Iterator[Any]:
    class WallClock:
        def __init__(self, clock: Clock) -> None:
            self._clock = clock
            self.jump = clock.jump  # type: ignore[attr-defined]
            self.boot = clock.boot

        def monotonic(self) -> float:
            return self._clock.wall()

        def wall(self) -> float:
            return self._clock.wall()

    yield patch("broker.simulation.world.LoopClock", lambda loop: WallClock(LoopClock(loop)))


@planted
def release_kills_under_other_clients() -> Iterator[Any]:
    def release(self: service.Service, command: Release, client: str) -> bytes:
        worker = self._registry.by_address(command.address)
        if worker is not None:
            self._registry.drain(worker.id, policy.Reason.RELEASED, self._now())
            self._reap()
        return OK

    yield patch.object(service.Service, "_release", release)


@planted
def one_error_ends_a_loop_for_good() -> Iterator[Any]:
    """The published broker's cleanup thread."""
    terminate = reap.ReapLoop._terminate

    async def dies(self: reap.ReapLoop, cloud: Any, workers: list[Worker]) -> None:
        before = dict(self._failures)
        await terminate(self, cloud, workers)
        if self._failures != before and any(self._failures.values()):
            await asyncio.Event().wait()

    yield patch.object(reap.ReapLoop, "_terminate", dies)


@planted
def idle_without_looking_at_leases() -> Iterator[Any]:
    """Idle is what has been used long ago, whoever holds it: a PING renews the lease and nothing else."""

    def renew(self: Registry, lease: Lease, now: float) -> None:
        self._lease_ends_at[lease.id] = now + lease.ttl_seconds

    yield patch.object(Registry, "renew", renew)
    yield patch.object(Registry, "busy", lambda self, worker_id: False)


@planted
def the_protect_tag_is_ignored() -> Iterator[Any]:
    """It is read and shown, and whoever ends machines does not ask for it."""
    judge = policy.judge

    def blind(registry: Registry, worker: Worker, pool: PoolSettings, now: float) -> policy.Verdict:
        return judge(registry, replace(worker, protected=False), pool, now)

    yield patch.object(reap, "judge", blind)
    yield patch.object(reap, "may_end", lambda worker: True)
    yield patch.object(service.Service, "_is_protected", lambda self, worker: False)


@planted
def the_protect_tag_is_not_read() -> Iterator[Any]:
    yield patch.object(Registry, "_tagged", lambda self, worker, instance, now: worker)


@planted
def max_lifetime_ends_busy_workers() -> Iterator[Any]:
    """As if every pool had a hard lifetime of that length."""
    yield patch.object(policy, "_hard_at", lambda worker, pool: worker.born_at + pool.max_lifetime)


# --- hand-outs and leases ----------------------------------------------------------------------------------


@planted
def leases_are_lost_at_a_restart() -> Iterator[Any]:
    yield patch.object(store.Store, "leases", lambda self: [])


@planted
def uses_are_not_counted() -> Iterator[Any]:
    yield patch.object(Registry, "uses", lambda self, worker_id: 0)


@planted
def uses_are_forgotten_at_a_restart() -> Iterator[Any]:
    yield patch.object(store.Store, "notes", lambda self: [])


@planted
def exclusive_is_a_word() -> Iterator[Any]:
    """An exclusive lease keeps nobody out."""
    grant = Registry.grant

    def shared(self: Registry, lease: Lease, now: float) -> Lease:
        return grant(self, replace(lease, exclusive=False), now)

    available = Registry.available

    def anybodys(
        self: Registry, pool: str, client: str, *, exclusive: bool, wish: Any = None
    ) -> Worker | None:
        return available(self, pool, client, exclusive=False, wish=wish)

    yield patch.object(Registry, "grant", shared)
    yield patch.object(Registry, "available", anybodys)


@planted
def handed_out_without_a_proof() -> Iterator[Any]:
    """A worker that was ready once is ready for ever."""
    yield patch.object(granting.Granting, "_proof_is_old", lambda self, worker, pool, began_at: False)


@planted
def handed_out_when_it_runs() -> Iterator[Any]:
    """The cloud's word and an address are taken for readiness, and nobody looks again."""

    async def answers(self: probe.ProbeLoop, worker: Worker, tries: int) -> bool:
        return True

    yield patch.object(probe.ProbeLoop, "_answers", answers)


@planted
def waits_never_end() -> Iterator[Any]:
    async def patient(self: service.Service, waiter: Any, deadline_at: float) -> list[Lease]:
        self._context.waiting.join(waiter)
        self._demand(0.0)
        try:
            leases: list[Lease] = await waiter.served
            return leases
        finally:
            self._context.waiting.leave(waiter)

    yield patch.object(service.Service, "_wait", patient)


@planted
def strangers_are_claimed() -> Iterator[Any]:
    """Terminate goes to everything the account runs."""
    listing = ec2_api.Ec2Api.every

    async def everything(self: ec2_api.Ec2Api, api: str, key: str, **parameters: Any) -> list[dict[str, Any]]:
        if api != "DescribeInstances":
            return await listing(self, api, key, **parameters)
        parameters.pop("Filters", None)
        reservations = await listing(self, api, key, **parameters)
        for reservation in reservations:
            for machine in reservation["Instances"]:
                has = {tag["Key"] for tag in machine.get("Tags", ())}
                if "compute-broker:broker" not in has:
                    ours = {"Key": "compute-broker:broker", "Value": "lab"}
                    machine["Tags"] = [*machine.get("Tags", ()), ours]
        return reservations

    yield patch.object(ec2_api.Ec2Api, "every", everything)


# --- a second broker ---------------------------------------------------------------------------------------


@planted
def everybody_is_in_charge() -> Iterator[Any]:
    """The claims of other brokers on the machines are read, and nobody gives way to them."""

    def look(
        self: claim.Watch, listed: Collection[Claim], now: float, now_unix: float, *, looks_after: bool
    ) -> Ruling:
        self._note(listed, now)
        return Ruling(None, self._number_above(listed))

    yield patch.object(claim.Watch, "look", look)


@planted
def a_claim_is_good_for_two_minutes() -> Iterator[Any]:
    """Another broker takes over although the one in charge has one more beat to write."""
    yield patch.object(claim, "STALE_SECONDS", 120.0)


# --- buying ------------------------------------------------------------------------------------------------


def _choosing(**known: Any) -> Iterator[Any]:
    """`choose` as it is, with something else taken for true."""
    choose = buying.choose

    def chosen(offerings: Any, name: str, pool: PoolSettings, shortfall: Any, **others: Any) -> Any:
        changed = pool.model_copy(update=known.get("pool", {}))
        return choose(offerings, name, changed, shortfall, **{**others, **known.get("others", {})})

    yield patch.object(launch, "choose", chosen)


@planted
def on_demand_whatever_the_pool_says() -> Iterator[Any]:
    """Where spot has none, a pool that buys on spot buys on-demand."""

    def markets(self: PoolSettings) -> tuple[str, ...]:
        return ("on-demand",) if self.market == "on-demand" else ("spot", "on-demand")

    yield patch.object(PoolSettings, "markets", property(markets))


@planted
def on_demand_at_the_first_refusal() -> Iterator[Any]:
    """`on_demand_after` is not waited for."""
    yield from _choosing(pool={"on_demand_after": 0.0})


@planted
def on_demand_without_a_maximum() -> Iterator[Any]:
    yield from _choosing(pool={"on_demand_max": None})


@planted
def a_drought_never_ends() -> Iterator[Any]:
    """Spot was refused once, long ago, and has been bought since; or those who waited for it have left."""
    since_at = lambda self, pool, wish: self._droughts.get((pool, wish))  # noqa: E731
    no_end = lambda self, pool, what: None  # noqa: E731
    yield patch.multiple(setbacks.Setbacks, waits_for=no_end, spot_bought=no_end)
    yield patch.object(setbacks.Setbacks, "drought_since_at", since_at)


@planted
def spot_at_any_price() -> Iterator[Any]:
    """What spot costs is known, and nobody looks at it."""
    yield from _choosing(others={"spot_prices": {}})


@planted
def a_fleet_counts_as_one_machine() -> Iterator[Any]:
    """While a fleet is on its way, all but one of its machines are ordered once more."""
    coming = orders.Orders.coming

    def fewer(self: orders.Orders, pool: str, without: orders.OpenOrder | None = None) -> Any:
        return {offerings: min(count, 1) for offerings, count in coming(self, pool, without).items()}

    yield patch.object(orders.Orders, "coming", fewer)


# --- the queue ---------------------------------------------------------------------------------------------


@planted
def served_twice() -> Iterator[Any]:
    """Who was served in the queue takes once more and stays there: nobody knows of the first leases."""

    async def served(self: Any, waiter: Any, deadline_at: float) -> Any:
        leases = self._granting.take(waiter)
        return (leases, False) if leases else await self._wait(waiter, deadline_at)

    yield patch.object(acquiring.Acquiring, "_served", served)


@planted
def any_machine_will_do() -> Iterator[Any]:
    """What a client wishes for is bought, and the first worker that is free handed out."""
    yield patch.object(wish.Wish, "test", lambda self: None)


@planted
def last_come_first_served() -> Iterator[Any]:
    """What becomes free goes to whoever has waited for the shortest time."""
    queue = waiting.Waiting.of
    yield patch.object(waiting.Waiting, "of", lambda self, pool: list(reversed(queue(self, pool))))


@planted
def one_who_comes_back_goes_to_the_end() -> Iterator[Any]:
    """A client whose worker fell silent at the hand-out loses its place."""

    def join(self: waiting.Waiting, waiter: waiting.Waiter) -> None:
        self._queues.setdefault(waiter.pool, {})[waiter] = None

    yield patch.object(waiting.Waiting, "join", join)


# --- the stock ---------------------------------------------------------------------------------------------


@planted
def what_is_stopped_does_not_count() -> Iterator[Any]:
    """The stock is launched again and again, because only what runs is there."""

    def shortage(registry: Registry, name: str, pool: PoolSettings, warm_target: int, now: float) -> int:
        return pool.warm_stopped

    yield patch.object(top_up, "stock_shortage", shortage)


@planted
def stopped_under_its_client() -> Iterator[Any]:
    """A worker is stopped when it is due, whoever holds it."""
    judge = policy.judge

    def hasty(
        registry: Registry, worker: Worker, pool: PoolSettings, now: float, *rest: Any, **more: Any
    ) -> Any:
        if worker.state is WorkerState.READY and pool.warm_stopped:
            for lease in registry.leases(worker.id):
                registry.end_lease(worker.id, lease.key, "stopped", now)
            return policy.Verdict(stop=True)
        return judge(registry, worker, pool, now, *rest, **more)

    yield patch.object(reap, "judge", hasty)


@planted
def starts_know_no_cap() -> Iterator[Any]:
    """What is stopped is started for who waits, however many run."""

    def start(self: launch.LaunchLoop, name: str, sellers: Any, needs: Any) -> None:
        for worker in self._startable(name, sellers):
            self._context.registry.start(worker.id, self._context.now())

    yield patch.object(launch.LaunchLoop, "_start_stopped", start)


@planted
def one_bill_for_all_its_runs() -> Iterator[Any]:
    """A machine that was started again is billed as if it had gone on running, or as if it had not."""
    yield patch.object(ledger, "runs_anew", lambda run, instance, look: False)
