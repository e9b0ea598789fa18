"""What the provider port promises, asked of every provider that we have, and of EC2's in two ways.

Each test is one sentence of broker/providers/base.py and knows nothing of the provider it meets; where a
cloud cannot bring the sentence about, contract_support.LACKS says why, and the test's skip quotes it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from broker.core import tags
from broker.core.errors import (
    CloudError,
    CloudUnreachable,
    CredentialsRefused,
    InstanceNotFound,
    OfferingRefused,
    OrderMismatch,
    OrderSpent,
    PermanentRefusal,
    QuotaReached,
    SettingsError,
    Throttled,
)
from broker.core.model import Instance, InstanceState, Market, Order
from broker.providers.base import OUTCOMES, Provider
from broker.store import Store
from tests.providers.contract_support import (
    MACHINES_PER_PAGE,
    NAME_TAG,
    POOL,
    PRICE_USD_PER_HOUR,
    LocalStand,
    MotoStand,
    Power,
    SimulatedStand,
    Stand,
    an_order,
    holds_everywhere,
    holds_where,
    identity_of,
)
from tests.providers.ec2_support import forget_aws
from tests.support.buying import launch_one
from tests.support.cloud import MotoServer
from tests.support.fault_proxy import FaultProxy

ENDING = {InstanceState.SHUTTING_DOWN, InstanceState.TERMINATED}
LAST_USED = {tags.LAST_USED: "2027-01-15T08:10:00Z"}


@pytest.fixture
def stand(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    if request.param == SimulatedStand.name:
        yield SimulatedStand(tmp_path)
    elif request.param == LocalStand.name:
        local = LocalStand(tmp_path)
        yield local
        local.end()
    else:
        forget_aws(monkeypatch, tmp_path)
        server: MotoServer = request.getfixturevalue("moto_server")
        server.reset()
        with FaultProxy(server) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
            yield MotoStand(tmp_path, server, proxy)


async def listed(provider: Provider) -> dict[str, Instance]:
    """The listing, in which no machine may stand twice."""
    listing = await provider.listing()
    by_id = {one.id: one for one in listing}
    assert len(by_id) == len(listing)
    return by_id


async def until_shown(
    stand: Stand, provider: Provider, instance_id: str, fits: Callable[[Instance], bool]
) -> Instance:
    """The machine, once a listing shows it so."""
    found: list[Instance] = []

    async def shown() -> bool:
        instance = (await listed(provider)).get(instance_id)
        found[:] = [instance] if instance is not None and fits(instance) else []
        return bool(found)

    await stand.until(shown)
    return found[0]


async def until_dead(stand: Stand, *instance_ids: str) -> None:
    """Returns once nobody pays for these machines any more."""

    async def dead() -> bool:
        return not stand.living() & set(instance_ids)

    await stand.until(dead)


async def failures_of_every_call(provider: Provider, order: Order, instance_id: str) -> dict[str, CloudError]:
    """What each call of the port raises at this moment: all of them must, and only our errors."""
    answers = await asyncio.gather(
        launch_one(provider, order),
        provider.listing(),
        provider.describe([instance_id]),
        provider.terminate([instance_id]),
        provider.tag(instance_id, LAST_USED),
        return_exceptions=True,
    )
    calls = ("launch", "listing", "describe", "terminate", "tag")
    failures = dict(zip(calls, answers, strict=True))
    assert all(isinstance(one, CloudError) for one in failures.values()), failures
    return {call: one for call, one in failures.items() if isinstance(one, CloudError)}


# --- opening, closing --------------------------------------------------------------------------------------


@holds_everywhere
async def test_opening_twice_is_harmless(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    launched = await launch_one(provider, order)
    await provider.open()
    assert an_order(provider) == order
    assert set(await listed(provider)) == stand.living() == {launched.id}


@holds_everywhere
async def test_an_open_that_has_failed_is_tried_again_and_succeeds(stand: Stand) -> None:
    provider = stand.unopened()
    stand.cut_off()
    for _ in range(2):
        with pytest.raises((CloudUnreachable, SettingsError)):
            await provider.open()
    stand.heal()
    await provider.open()
    launched = await launch_one(provider, an_order(provider))
    assert set(await listed(provider)) == {launched.id}


@holds_where(Power.CHECK)
async def test_what_cannot_be_bought_is_said_by_open_before_anything_is_spent(stand: Stand) -> None:
    with pytest.raises(SettingsError) as raised:
        await stand.mistaken().open()
    assert [problem.partition(":")[0] for problem in raised.value.problems] == ["pool.default.instance_types"]
    assert stand.living() == set()


@holds_everywhere
async def test_a_mistake_in_what_is_to_be_bought_keeps_no_machine_from_being_listed_and_ended(
    stand: Stand,
) -> None:
    before = await stand.provider()
    launched = await launch_one(before, an_order(before))
    restarted = stand.mistaken()
    with suppress(SettingsError):
        await restarted.open()
    assert set(await listed(restarted)) == {launched.id}
    assert [one.id for one in await restarted.describe([launched.id])] == [launched.id]
    await restarted.terminate([launched.id])
    await until_dead(stand, launched.id)


@holds_everywhere
async def test_machines_outlive_the_close_of_their_provider_and_the_next_one_finds_them(stand: Stand) -> None:
    first = await stand.provider()
    launched = await launch_one(first, an_order(first))
    await first.close()
    assert stand.living() == {launched.id}
    second = await stand.provider()
    assert set(await listed(second)) == {launched.id}
    await second.terminate([launched.id])
    await until_dead(stand, launched.id)


@holds_everywhere
async def test_a_provider_says_where_it_is(stand: Stand) -> None:
    assert stand.place in (await stand.provider()).name


# --- offerings, orders -------------------------------------------------------------------------------------


@holds_everywhere
async def test_offerings_are_in_order_of_preference_at_the_pools_price(stand: Stand) -> None:
    provider = await stand.provider()
    offerings = provider.offerings(POOL)
    assert tuple(dict.fromkeys(one.instance_type for one in offerings)) == stand.kinds
    assert {one.price_usd_micros_per_hour for one in offerings} == {round(PRICE_USD_PER_HOUR * 1_000_000)}
    assert all(one.cores is not None and one.cores > 0 for one in offerings)
    assert list(provider.offerings(POOL)) == list(offerings)


@holds_everywhere
async def test_offerings_and_orders_need_no_cloud(stand: Stand) -> None:
    provider = await stand.provider()
    stand.cut_off()
    heard = list(stand.heard)
    assert an_order(provider).offerings[0] == provider.offerings(POOL)[0]
    assert stand.heard == heard


@holds_everywhere
async def test_the_same_wishes_are_the_same_order_to_the_byte_also_after_a_restart(stand: Stand) -> None:
    provider, restarted = await stand.provider(), await stand.provider()
    order = an_order(provider)
    assert an_order(provider) == an_order(restarted) == order
    assert isinstance(json.loads(order.parameters), dict)


@holds_everywhere
async def test_an_order_that_was_on_disk_is_the_order_that_was_launched(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    await _stored(stand, order)
    launched = await launch_one(provider, order)
    (read_back,) = await _stored(stand)
    assert read_back == order
    restarted = await stand.provider()
    assert (await launch_one(restarted, read_back)).id == launched.id
    assert stand.living() == {launched.id}


async def _stored(stand: Stand, *orders: Order) -> list[Order]:
    """The open orders on disk, with these added; the store lives no longer than this call."""
    store = Store(stand.directory / "store", threaded=False)
    store.open()
    try:
        for order in orders:
            await store.order_placed(order)
        return store.open_orders()
    finally:
        store.close()


@holds_everywhere
async def test_an_order_is_launched_as_it_was_prepared_whatever_the_settings_say_now(stand: Stand) -> None:
    order = an_order(await stand.provider(tags={"project": "then"}))
    restarted = await stand.provider(pool="other", tags={"project": "now"})
    launched = await launch_one(restarted, order)
    shown = (await listed(restarted))[launched.id]
    assert shown.tags["project"] == "then"
    assert tags.read(shown.tags) == identity_of(order)


@holds_everywhere
async def test_spot_prices_are_those_of_the_pools_types_by_zone_and_none_where_nothing_is_spot(
    stand: Stand,
) -> None:
    provider = await stand.provider()
    prices = await provider.spot_prices(POOL)
    sold_on_spot = any(one.market is Market.SPOT for one in provider.offerings(POOL))
    assert {kind for _, kind in prices} == (set(stand.kinds) if sold_on_spot else set())
    assert all(zone.startswith(stand.place) for zone, _ in prices)
    assert all(price > 0 for price in prices.values())
    assert await provider.spot_prices(POOL) == prices


# --- one order, one machine --------------------------------------------------------------------------------


@holds_everywhere
async def test_a_launched_machine_is_what_was_ordered_and_says_whose_it_is(stand: Stand) -> None:
    provider = await stand.provider(tags={"project": "x"})
    order = an_order(provider)
    launched = await launch_one(provider, order)
    for machine in (launched, (await listed(provider))[launched.id]):
        assert machine.state in {InstanceState.PENDING, InstanceState.RUNNING}
        assert tags.read(machine.tags) == identity_of(order)
        assert (machine.tags["project"], machine.tags[tags.NAME]) == ("x", NAME_TAG)
        assert machine.instance_type == order.offerings[0].instance_type
        assert (machine.region, machine.market) == (order.offerings[0].region, order.offerings[0].market)
        assert machine.launched_unix > 0


@holds_everywhere
async def test_a_machine_comes_to_run_and_to_have_an_address(stand: Stand) -> None:
    provider = await stand.provider()
    launched = await launch_one(provider, an_order(provider))
    await until_shown(
        stand, provider, launched.id, lambda one: one.state is InstanceState.RUNNING and bool(one.address)
    )


@holds_everywhere
async def test_an_order_sent_again_returns_the_same_machine(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    first = await launch_one(provider, order)
    assert [(await launch_one(provider, order)).id for _ in range(2)] == [first.id] * 2
    assert stand.living() == {first.id}


@holds_everywhere
async def test_an_order_sent_by_two_callers_at_once_returns_the_same_machine_to_both(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    one, other = await asyncio.gather(launch_one(provider, order), launch_one(provider, order))
    assert one.id == other.id
    assert stand.living() == {one.id}


@holds_everywhere
async def test_an_order_sent_again_after_a_crash_returns_the_same_machine(stand: Stand) -> None:
    crashed = await stand.provider()
    order = an_order(crashed)
    first = await launch_one(crashed, order)
    restarted = await stand.provider()
    assert (await launch_one(restarted, order)).id == first.id
    assert stand.living() == {first.id}


@holds_everywhere
async def test_two_orders_are_two_machines_even_at_once(stand: Stand) -> None:
    provider = await stand.provider()
    orders = [an_order(provider, f"order-{number}") for number in range(3)]
    launched = await asyncio.gather(*(launch_one(provider, order) for order in orders))
    assert stand.living() == {one.id for one in launched}
    assert len(stand.living()) == 3


@holds_everywhere
async def test_an_order_id_of_64_characters_is_launched_and_shown_whole(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider, "cb-".ljust(64, "0"))
    launched = await launch_one(provider, order)
    assert (await launch_one(provider, order)).id == launched.id
    assert tags.read((await listed(provider))[launched.id].tags).order == order.id


@holds_everywhere
async def test_a_changed_order_under_the_same_token_is_told_and_launches_nothing(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    first = await launch_one(provider, order)
    changed = an_order(provider, created_unix=order.created_unix + 60)
    assert changed.parameters != order.parameters
    with pytest.raises(OrderMismatch) as raised:
        await launch_one(provider, changed)
    assert raised.value.sent
    assert (await launch_one(provider, order)).id == first.id
    assert stand.living() == {first.id}


@holds_everywhere
async def test_the_order_of_a_machine_that_was_terminated_is_spent_from_then_on(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    first = await launch_one(provider, order)
    await stand.delay_end(first.id)
    await provider.terminate([first.id])
    with pytest.raises(OrderSpent) as raised:
        await launch_one(provider, order)
    assert not raised.value.sent
    await until_shown(stand, provider, first.id, lambda one: one.state is InstanceState.TERMINATED)
    with pytest.raises(OrderSpent):
        await launch_one(provider, order)
    assert stand.living() == set()


@holds_everywhere
async def test_the_order_of_a_machine_that_died_is_spent_also_after_a_crash(stand: Stand) -> None:
    crashed = await stand.provider()
    order = an_order(crashed)
    await stand.kill((await launch_one(crashed, order)).id)
    for provider in (crashed, await stand.provider()):
        with pytest.raises(OrderSpent):
            await launch_one(provider, order)
    assert stand.living() == set()


# --- launches that fail ------------------------------------------------------------------------------------


@holds_where(Power.LOSE_ANSWERS)
async def test_a_launch_whose_answer_is_lost_may_have_happened_and_is_the_same_machine_when_resent(
    stand: Stand,
) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    stand.lose_answers_to_launches()
    with pytest.raises(CloudUnreachable) as raised:
        await launch_one(provider, order)
    assert raised.value.sent
    (machine,) = stand.living()
    stand.heal()
    assert (await launch_one(provider, order)).id == machine
    assert stand.living() == {machine}


@holds_everywhere
async def test_a_launch_that_reached_nobody_is_sent_again_and_is_one_machine(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    stand.cut_off()
    with pytest.raises(CloudUnreachable) as raised:
        await launch_one(provider, order)
    assert raised.value.sent
    stand.heal()
    assert stand.living() == set()
    launched = await launch_one(provider, order)
    assert stand.living() == {launched.id}


@holds_everywhere
async def test_without_capacity_nothing_is_launched_and_the_order_is_as_good_as_new(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    stand.refuse_capacity()
    with pytest.raises(OfferingRefused) as raised:
        await launch_one(provider, order)
    assert not raised.value.sent
    assert await provider.listing() == []
    assert stand.living() == set()
    stand.heal()
    launched = await launch_one(provider, order)
    assert stand.living() == {launched.id}


@holds_everywhere
async def test_an_order_that_has_its_machine_needs_no_capacity(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    first = await launch_one(provider, order)
    stand.refuse_capacity()
    with pytest.raises(OfferingRefused):
        await launch_one(provider, an_order(provider, "order-2"))
    assert (await launch_one(provider, order)).id == first.id
    assert stand.living() == {first.id}


@holds_where(Power.COUNT_QUOTA)
async def test_a_quota_that_is_reached_is_a_refused_offering_and_launches_nothing(stand: Stand) -> None:
    provider = await stand.provider()
    stand.reach_quota()
    with pytest.raises(QuotaReached) as raised:
        await launch_one(provider, an_order(provider))
    assert isinstance(raised.value, OfferingRefused)
    assert not raised.value.sent
    assert stand.living() == set()


@holds_everywhere
async def test_a_launch_that_can_never_work_is_refused_for_good_and_launches_nothing(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    stand.forbid_launches()
    with pytest.raises(PermanentRefusal) as raised:
        await launch_one(provider, order)
    assert not raised.value.sent
    assert stand.living() == set()
    stand.heal()  # somebody has mended it
    launched = await launch_one(provider, order)
    assert stand.living() == {launched.id}


@holds_everywhere
async def test_a_launch_whose_caller_is_cancelled_does_not_lose_its_machine(stand: Stand) -> None:
    provider = await stand.provider()
    order = an_order(provider)
    stand.hold_launches()
    launching = asyncio.create_task(launch_one(provider, order))
    await stand.launch_is_held()
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    assert stand.living() == set()
    assert stand.heard[-1][1] == "cancelled"
    stand.heal()

    async def shown() -> bool:
        return bool(await provider.listing())

    await stand.until(shown)
    (machine,) = (await listed(provider)).values()
    assert tags.read(machine.tags) == identity_of(order)
    assert (await launch_one(provider, order)).id == machine.id
    assert stand.living() == {machine.id}


# --- clouds that fail --------------------------------------------------------------------------------------


async def fails_and_recovers(
    stand: Stand, fail: Callable[[], None], kind: type[CloudError], *, sent: bool
) -> None:
    """Every call of the port raises this, changes nothing, and works again when the cloud does."""
    provider = await stand.provider()
    machine = await launch_one(provider, an_order(provider))
    fail()
    heard_before = len(stand.heard)
    failures = await failures_of_every_call(provider, an_order(provider, "order-2"), machine.id)
    assert {call: type(error) for call, error in failures.items()} == dict.fromkeys(failures, kind)
    assert {error.sent for error in failures.values()} == {sent}
    assert {outcome for _, outcome in stand.heard[heard_before:]} == {OUTCOMES[kind]}
    stand.heal()
    assert set(await listed(provider)) == stand.living() == {machine.id}
    await provider.tag(machine.id, LAST_USED)
    assert [one.tags[tags.LAST_USED] for one in await provider.describe([machine.id])] == [
        *LAST_USED.values()
    ]
    await provider.terminate([machine.id])
    await until_dead(stand, machine.id)


@holds_everywhere
async def test_while_the_cloud_is_unreachable_every_call_says_so_and_no_machine_is_touched(
    stand: Stand,
) -> None:
    await fails_and_recovers(stand, stand.cut_off, CloudUnreachable, sent=True)


@holds_where(Power.THROTTLE)
async def test_throttled_calls_say_so_and_have_done_nothing(stand: Stand) -> None:
    await fails_and_recovers(stand, stand.throttle, Throttled, sent=False)


@holds_where(Power.REFUSE_CREDENTIALS)
async def test_expired_credentials_are_said_by_every_call_and_are_no_empty_listing(stand: Stand) -> None:
    await fails_and_recovers(stand, stand.refuse_credentials, CredentialsRefused, sent=False)


@holds_where(Power.FORBID)
async def test_a_missing_permission_is_said_by_every_call_that_lacks_it(stand: Stand) -> None:
    await fails_and_recovers(stand, stand.forbid_all, PermanentRefusal, sent=False)


# --- listings ----------------------------------------------------------------------------------------------


@holds_everywhere
async def test_where_nothing_was_launched_the_listing_is_empty(stand: Stand) -> None:
    assert await (await stand.provider()).listing() == []


@holds_everywhere
async def test_a_listing_has_every_machine_of_this_broker_and_nobody_elses(stand: Stand) -> None:
    ours, theirs = await stand.provider(), await stand.provider("other")
    orders = [an_order(ours, f"order-{number}") for number in range(2 * MACHINES_PER_PAGE + 1)]
    launched = {(await launch_one(ours, order)).id for order in orders}
    stranger = await launch_one(theirs, an_order(theirs, "their-order"))
    untagged = await stand.launch_untagged(Name=NAME_TAG)
    assert set(await listed(ours)) == launched
    assert set(await listed(theirs)) == {stranger.id}
    assert stand.living() == {*launched, stranger.id, untagged}


@holds_everywhere
async def test_a_listing_has_the_machines_of_a_pool_that_the_settings_have_forgotten(stand: Stand) -> None:
    before = await stand.provider()
    launched = await launch_one(before, an_order(before))
    now = await stand.provider(pool="other")
    assert set(await listed(now)) == {launched.id}


@holds_where(Power.ADOPT)
async def test_only_a_pool_that_adopts_sees_untagged_machines_of_its_name(stand: Stand) -> None:
    theirs = await stand.provider("other")
    await launch_one(theirs, an_order(theirs, "their-order"))
    older = await stand.launch_untagged(Name=NAME_TAG)
    await stand.launch_untagged(Name="something-else")
    assert await listed(await stand.provider()) == {}
    adopting = await stand.provider(adopt_name_tag=True)
    assert set(await listed(adopting)) == {older}
    await adopting.tag(older, {tags.BROKER: "lab"})
    assert set(await listed(await stand.provider())) == {older}


@holds_where(Power.PAGE)
async def test_a_listing_whose_page_fails_is_no_listing_instead_of_a_short_one(stand: Stand) -> None:
    provider = await stand.provider()
    orders = [an_order(provider, f"order-{number}") for number in range(MACHINES_PER_PAGE + 1)]
    launched = {(await launch_one(provider, order)).id for order in orders}
    stand.fail_second_pages()
    with pytest.raises(CloudUnreachable):
        await provider.listing()
    with pytest.raises(CloudUnreachable):
        await provider.describe(launched)
    stand.heal()
    assert set(await listed(provider)) == launched


@holds_everywhere
async def test_a_machine_that_died_is_still_listed_as_dead(stand: Stand) -> None:
    provider = await stand.provider()
    launched = await launch_one(provider, an_order(provider))
    await stand.kill(launched.id)
    dead = await until_shown(stand, provider, launched.id, lambda one: one.state is InstanceState.TERMINATED)
    assert dead.address is None
    assert dead.reason
    assert tags.read(dead.tags).order == "order-1"


# --- describing --------------------------------------------------------------------------------------------


@holds_everywhere
async def test_describe_leaves_out_what_the_cloud_does_not_know(stand: Stand) -> None:
    provider = await stand.provider()
    first, second = [await launch_one(provider, an_order(provider, name)) for name in ("order-1", "order-2")]
    found = await provider.describe([stand.unknown_id, first.id, "junk"])
    assert [one.id for one in found] == [first.id]
    assert {one.id for one in await provider.describe([second.id, first.id])} == {first.id, second.id}
    assert await provider.describe([stand.unknown_id]) == []
    assert await provider.describe([]) == []


@holds_everywhere
async def test_describe_shows_what_a_listing_shows(stand: Stand) -> None:
    provider = await stand.provider()
    launched = await launch_one(provider, an_order(provider))
    running = await until_shown(
        stand, provider, launched.id, lambda one: one.state is InstanceState.RUNNING and bool(one.address)
    )
    assert await provider.describe([launched.id]) == [running]


# --- terminating -------------------------------------------------------------------------------------------


@holds_everywhere
async def test_a_terminated_machine_is_never_shown_alive_again(stand: Stand) -> None:
    provider = await stand.provider()
    launched = await launch_one(provider, an_order(provider))
    await until_shown(stand, provider, launched.id, lambda one: one.state is InstanceState.RUNNING)
    await stand.delay_end(launched.id)
    await provider.terminate([launched.id])
    seen: list[InstanceState] = []

    async def terminated() -> bool:
        described = await provider.describe([launched.id])
        seen.extend(one.state for one in [*await provider.listing(), *described])
        return seen[-1:] == [InstanceState.TERMINATED]

    await stand.until(terminated)
    assert set(seen) == ENDING
    assert stand.living() == set()
    restarted = await stand.provider()
    assert {one.state for one in await restarted.listing()} <= {InstanceState.TERMINATED}


@holds_everywhere
async def test_an_unknown_id_keeps_no_machine_alive(stand: Stand) -> None:
    provider = await stand.provider()
    orders = [an_order(provider, f"order-{number}") for number in range(3)]
    ended, also_ended, spared = [(await launch_one(provider, order)).id for order in orders]
    await provider.terminate([stand.unknown_id, ended, "junk", also_ended])
    await until_dead(stand, ended, also_ended)
    assert stand.living() == {spared}
    await provider.terminate([stand.unknown_id])
    await provider.terminate([])
    assert stand.living() == {spared}


@holds_everywhere
async def test_terminating_again_is_harmless_while_a_machine_ends_and_when_it_has_ended(stand: Stand) -> None:
    provider = await stand.provider()
    launched = await launch_one(provider, an_order(provider))
    await stand.delay_end(launched.id)
    await provider.terminate([launched.id])
    await provider.terminate([launched.id, launched.id])
    await until_shown(stand, provider, launched.id, lambda one: one.state is InstanceState.TERMINATED)
    await provider.terminate([launched.id])
    assert (await listed(provider))[launched.id].state is InstanceState.TERMINATED
    assert stand.living() == set()


@holds_everywhere
async def test_a_machine_that_died_by_itself_can_be_terminated_beside_one_that_lives(stand: Stand) -> None:
    provider = await stand.provider()
    dead, alive = [(await launch_one(provider, an_order(provider, f"order-{n}"))).id for n in range(2)]
    await stand.kill(dead)
    await provider.terminate([dead, alive])
    await until_dead(stand, alive)
    assert stand.living() == set()


@holds_everywhere
async def test_a_machine_is_ended_by_another_provider_object_than_the_one_that_launched_it(
    stand: Stand,
) -> None:
    crashed = await stand.provider()
    launched = await launch_one(crashed, an_order(crashed))
    restarted = await stand.provider()
    await restarted.terminate([launched.id])
    ended = await until_shown(
        stand, restarted, launched.id, lambda one: one.state is InstanceState.TERMINATED
    )
    assert ended.reason
    assert stand.living() == set()


@holds_everywhere
async def test_a_machine_that_was_asked_to_end_does_so_although_the_cloud_is_gone_meanwhile(
    stand: Stand,
) -> None:
    provider = await stand.provider()
    launched = await launch_one(provider, an_order(provider))
    await stand.delay_end(launched.id)
    await provider.terminate([launched.id])
    stand.cut_off()
    for _ in range(2):
        with pytest.raises(CloudUnreachable):
            await provider.listing()
    stand.heal()
    await until_shown(stand, provider, launched.id, lambda one: one.state is InstanceState.TERMINATED)
    assert stand.living() == set()


@holds_where(Power.LOSE_ANSWERS)
async def test_a_terminate_whose_answer_is_lost_says_so_and_may_be_sent_again(stand: Stand) -> None:
    provider = await stand.provider()
    launched = await launch_one(provider, an_order(provider))
    stand.lose_answers_to_terminates()
    with pytest.raises(CloudUnreachable) as raised:
        await provider.terminate([launched.id])
    assert raised.value.sent
    assert stand.living() == set()
    stand.heal()
    await provider.terminate([launched.id])


# --- stopping and starting ---------------------------------------------------------------------------------


async def a_running_one(stand: Stand, provider: Provider) -> Instance:
    launched = await launch_one(provider, an_order(provider))
    return await until_shown(stand, provider, launched.id, lambda one: _runs(one) and bool(one.address))


async def until_stopped(stand: Stand, provider: Provider, instance_id: str) -> Instance:
    return await until_shown(stand, provider, instance_id, lambda one: one.state is InstanceState.STOPPED)


def _runs(instance: Instance) -> bool:
    return instance.state is InstanceState.RUNNING


@holds_where(Power.STOP)
async def test_a_stopped_machine_is_listed_without_its_address_and_starts_with_all_its_tags(
    stand: Stand,
) -> None:
    provider = await stand.provider(market="on-demand")
    running = await a_running_one(stand, provider)
    await provider.stop(running.id)
    stopped = await until_stopped(stand, provider, running.id)
    assert (stopped.address, stopped.tags) == (None, running.tags)
    await provider.start(running.id)
    again = await until_shown(stand, provider, running.id, lambda one: _runs(one) and bool(one.address))
    assert (again.tags, again.instance_type, again.zone) == (
        running.tags,
        running.instance_type,
        running.zone,
    )
    assert stand.living() == {running.id}


@holds_where(Power.STOP)
async def test_stopping_what_is_stopped_and_starting_what_runs_changes_nothing(stand: Stand) -> None:
    provider = await stand.provider(market="on-demand")
    running = await a_running_one(stand, provider)
    await provider.start(running.id)
    assert (await listed(provider))[running.id] == running
    await provider.stop(running.id)
    stopped = await until_stopped(stand, provider, running.id)
    await provider.stop(running.id)
    assert (await listed(provider))[running.id] == stopped


@holds_where(Power.STOP)
async def test_a_stopped_machine_can_be_terminated(stand: Stand) -> None:
    provider = await stand.provider(market="on-demand")
    running = await a_running_one(stand, provider)
    await provider.stop(running.id)
    await until_stopped(stand, provider, running.id)
    await provider.terminate([running.id])
    await until_dead(stand, running.id)


@holds_where(Power.STOP)
async def test_a_machine_that_cannot_be_started_for_want_of_capacity_stays_stopped(stand: Stand) -> None:
    provider = await stand.provider(market="on-demand")
    running = await a_running_one(stand, provider)
    await provider.stop(running.id)
    stopped = await until_stopped(stand, provider, running.id)
    stand.refuse_starts()
    with pytest.raises(OfferingRefused) as raised:
        await provider.start(running.id)
    assert not raised.value.sent
    assert (await listed(provider))[running.id] == stopped


@holds_where(Power.STOP)
async def test_stopping_or_starting_an_unknown_machine_says_that_it_is_not_known(stand: Stand) -> None:
    provider = await stand.provider(market="on-demand")
    for call in (provider.stop, provider.start):
        with pytest.raises(InstanceNotFound) as raised:
            await call(stand.unknown_id)
        assert not raised.value.sent


@holds_where(Power.STOP)
async def test_a_stop_whose_answer_is_lost_says_so_and_was_sent_once(stand: Stand) -> None:
    provider = await stand.provider(market="on-demand")
    running = await a_running_one(stand, provider)
    stand.lose_answers_to_stops()
    before = len(stand.heard)
    with pytest.raises(CloudUnreachable) as raised:
        await provider.stop(running.id)
    assert raised.value.sent
    assert stand.stops_sent() == 1
    assert stand.heard[before:] == [("StopInstances", "unreachable")]
    stand.heal()
    await until_stopped(stand, provider, running.id)


# --- tagging -----------------------------------------------------------------------------------------------


@holds_everywhere
async def test_a_tag_shows_up_in_the_listing_and_leaves_the_others_as_they_were(stand: Stand) -> None:
    provider, restarted = await stand.provider(), await stand.provider()
    order = an_order(provider)
    launched, other = (
        await launch_one(provider, order),
        await launch_one(provider, an_order(provider, "order-2")),
    )
    for words in ("first", "second", "second"):
        await provider.tag(launched.id, {**LAST_USED, "words": words})
        shown = (await listed(restarted))[launched.id]
        assert shown.tags == {**launched.tags, **LAST_USED, "words": words}
    assert replace(tags.read(shown.tags), last_used_unix=None) == identity_of(order)
    assert (await listed(provider))[other.id].tags == other.tags


@holds_everywhere
async def test_tagging_an_unknown_machine_says_that_it_is_not_known(stand: Stand) -> None:
    provider = await stand.provider()
    with pytest.raises(InstanceNotFound) as raised:
        await provider.tag(stand.unknown_id, LAST_USED)
    assert not raised.value.sent
    assert await provider.listing() == []


# --- what is counted ---------------------------------------------------------------------------------------


@holds_everywhere
async def test_every_call_is_heard_with_an_outcome_of_the_closed_list(stand: Stand) -> None:
    provider = await stand.provider()
    heard: dict[str, str] = {}

    async def hear(case: str, call: object) -> None:
        before = len(stand.heard)
        with suppress(CloudError):
            await call  # type: ignore[misc]
        ((_, heard[case]),) = stand.heard[before:]

    launched = await launch_one(provider, an_order(provider))
    await hear("launch again", launch_one(provider, an_order(provider)))
    await hear("changed", launch_one(provider, an_order(provider, created_unix=0.0)))
    await hear("list", provider.listing())
    await hear("describe", provider.describe([launched.id]))
    await hear("tag", provider.tag(launched.id, LAST_USED))
    await hear("tag unknown", provider.tag(stand.unknown_id, LAST_USED))
    stand.forbid_launches()
    await hear("forbidden", launch_one(provider, an_order(provider, "order-2")))
    stand.heal()
    stand.refuse_capacity()
    await hear("no capacity", launch_one(provider, an_order(provider, "order-2")))
    stand.heal()
    await hear("terminate", provider.terminate([launched.id]))
    await until_shown(stand, provider, launched.id, lambda one: one.state is InstanceState.TERMINATED)
    await hear("spent", launch_one(provider, an_order(provider)))
    stand.cut_off()
    await hear("cut off", provider.listing())
    assert heard == {
        "launch again": "ok",
        "changed": "conflict",
        "list": "ok",
        "describe": "ok",
        "tag": "ok",
        "tag unknown": "not-found",
        "forbidden": "denied",
        "no capacity": "refused",
        "terminate": "ok",
        "spent": "conflict",
        "cut off": "unreachable",
    }
