"""Many clients at once: one launch for all who share, one machine for each who does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.acceptance.lab import Lab, is_capable_error, laboratory, ordered_by
from tests.support.broker_process import BrokerProcess
from tests.support.cloud import MotoServer
from tests.support.fault_proxy import FOREVER

CROWD = 200
ALONE = 8


@pytest.fixture(scope="module")
def lab(moto_server: MotoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(moto_server, tmp_path_factory.mktemp("crowds")) as lab:
        yield lab


@pytest.fixture(scope="module")
def broker(lab: Lab) -> BrokerProcess:
    alone = {"sharing": "exclusive", "max_workers": ALONE}
    pools = {"default": {}, "named": {}, "late": {}, "alone": alone, "mixed": {}}
    return lab.broker_to_be(pools=pools).start()


def all_at_once(broker: BrokerProcess, lines: list[str]) -> list[str]:
    """The replies to these commands, each on a connection of its own, all asked before any is answered."""
    crowd = [broker.connect() for _ in lines]
    for client, line in zip(crowd, lines, strict=True):
        client.say(line)
    return [client.line() for client in crowd]


@pytest.mark.parametrize(("pool", "name"), [("default", ""), ("named", " client=student-{}")])
def test_two_hundred_first_requests_cause_one_launch_and_get_one_address(
    lab: Lab, broker: BrokerProcess, pool: str, name: str
) -> None:
    lines = [f"GET_WORKER pool={pool}{name.format(n)}" for n in range(CROWD)]
    replies = all_at_once(broker, lines)
    assert set(replies) == {lab.address(lab.only(pool))}
    assert len(replies) == CROWD
    assert len(lab.launch_calls(pool)) == 1
    assert lab.works(replies[0])


def test_those_who_come_during_the_boot_share_the_machine_of_those_who_came_before(
    lab: Lab, broker: BrokerProcess
) -> None:
    lab.proxy.after_launch(pending=FOREVER)
    crowd = [broker.asking(f"GET_WORKER pool=late client=early-{n}") for n in range(20)]
    lab.wait_for_scans(2)
    crowd += [broker.asking(f"GET_WORKER pool=late client=late-{n}") for n in range(20)]
    lab.wait_for_scans(2)
    assert not any(client.answered() for client in crowd)
    lab.proxy.heal()
    assert {client.line() for client in crowd} == {lab.address(lab.only("late"))}


def test_in_an_exclusive_pool_nobody_shares_and_who_finds_none_free_is_told_so(
    lab: Lab, broker: BrokerProcess
) -> None:
    names = [f"ada-{n}" for n in range(ALONE)]
    lines = [f"GET_WORKER pool=alone client={name}" for name in names]
    addresses = dict(zip(names, all_at_once(broker, lines), strict=True))
    assert set(addresses.values()) == {lab.address(one) for one in lab.running("alone")}
    assert len(set(addresses.values())) == ALONE
    assert sum(ordered_by(call) for call in lab.launch_calls("alone")) == ALONE
    assert all_at_once(broker, lines) == list(addresses.values()), "asking again changes nothing"
    refusal = broker.ask("GET_WORKER pool=alone client=late wait=0.5")
    assert is_capable_error(refusal, "TIMEOUT")
    assert f"max_workers = {ALONE}" in refusal
    assert [worker["leases"] for worker in broker.status() if worker["pool"] == "alone"] == [1] * ALONE
    waiting = broker.asking("GET_WORKER pool=alone client=late")
    assert broker.ask(f"RELEASE {addresses['ada-0']} client=ada-0") == "OK"
    assert waiting.line() == addresses["ada-0"], "who waits gets what becomes free"
    assert broker.ask(f"PING {addresses['ada-0']} client=ada-0").endswith("[DENIED]")
    assert sum(ordered_by(call) for call in lab.launch_calls("alone")) == ALONE


def test_a_shared_pool_gives_a_worker_of_its_own_to_who_asks_for_it(lab: Lab, broker: BrokerProcess) -> None:
    alone = [f"GET_WORKER pool=mixed exclusive=yes client=alone-{n}" for n in range(3)]
    shared = [f"GET_WORKER pool=mixed client=shared-{n}" for n in range(20)]
    replies = all_at_once(broker, [*shared[:10], *alone, *shared[10:]])
    mine, ours = replies[10:13], {*replies[:10], *replies[13:]}
    assert len(set(mine)) == 3
    assert len(ours) == 1
    assert not ours & set(mine)
    assert len(lab.running("mixed")) == 4
