"""What the cloud does to a broker, one fault after the other, and what its clients notice of it.

All tests share one broker; each has a pool of its own, so that cool-downs and counts are its own as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.acceptance.lab import TYPES, Delays, Lab, is_capable_error, laboratory
from tests.support.broker_process import BrokerProcess, eventually
from tests.support.cloud import MotoServer
from tests.support.fault_proxy import EVERY_ACTION, FOREVER

MANY = 1_000  # more calls than any test makes
STAGES: dict[str, Delays] = {
    "hidden": {"hidden": FOREVER},
    "pending": {"pending": FOREVER},
    "unaddressed": {"unaddressed": FOREVER},
}
AT_ONCE_SECONDS_MAX = 5.0  # far below every pause and time limit that something might be waiting for

RARE = ["m7i.large"]
POOLS = (
    "lost-by-close", "lost-by-reset", "lost-twice", "listed", "reset", "throttled", "second-type", "no-type",
    "forbidden", "wrong-image", "hidden", "pending", "unaddressed", "stalled", "reclaimed", "unasked",
    "dead-port", "reused-address", "omitted", "stubborn", "warm", "slow", "reading", "cold",
)  # fmt: skip


@pytest.fixture(scope="module")
def shared_lab(moto_server: MotoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(moto_server, tmp_path_factory.mktemp("faults")) as lab:
        yield lab


@pytest.fixture(scope="module")
def shared_broker(shared_lab: Lab) -> BrokerProcess:
    pools: dict[str, dict[str, object]] = {name: {} for name in POOLS}
    pools["late-port"] = {"worker_port": shared_lab.late_fleet.port}
    pools["no-type"] = {"instance_types": RARE}  # what is refused to one pool is not asked for by another
    pools["two-types"] = {"instance_types": TYPES}
    pools["default"] = {}
    return shared_lab.broker_to_be(pools=pools).start()


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """The shared lab; every fault of a test ends with it."""
    yield shared_lab
    shared_lab.proxy.heal()


@pytest.fixture
def broker(shared_broker: BrokerProcess, lab: Lab) -> BrokerProcess:
    """The shared broker, in good terms with its cloud."""
    eventually(lambda: json.loads(shared_broker.ask("LIST_ALL")) is not None)
    return shared_broker


# ---------------------------------------------------------------- answers that are lost


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_lost_answer_is_asked_for_again_with_the_same_order(
    lab: Lab, broker: BrokerProcess, how: str
) -> None:
    pool = f"lost-by-{how}"
    lab.proxy.lose_answer("RunInstances", by_reset=how == "reset")
    lab.proxy.after_launch(hidden=FOREVER)  # no listing helps
    asker = broker.asking(f"GET_WORKER pool={pool}")
    eventually(lambda: [call.outcome for call in lab.launch_calls(pool)] == ["answer lost (ok)", "replayed"])
    lab.proxy.settle()
    assert asker.line() == lab.address(lab.only(pool))
    first, second = lab.launch_calls(pool)
    assert first.params == second.params


def test_an_answer_that_is_lost_twice_still_means_one_machine(lab: Lab, broker: BrokerProcess) -> None:
    lab.proxy.lose_answer("RunInstances", times=2)
    lab.proxy.after_launch(hidden=FOREVER)
    asker = broker.asking("GET_WORKER pool=lost-twice")
    eventually(lambda: len(lab.launch_calls("lost-twice")) == 3)
    lab.proxy.settle()
    assert asker.line() == lab.address(lab.only("lost-twice"))
    assert len(set(lab.tokens("lost-twice"))) == 1


def test_a_machine_whose_answer_was_lost_is_also_found_by_the_next_listing(
    lab: Lab, broker: BrokerProcess
) -> None:
    lab.proxy.lose_answer("RunInstances", times=MANY)  # no call helps
    assert broker.ask("GET_WORKER pool=listed") == lab.address(lab.only("listed"))
    assert len(set(lab.tokens("listed"))) == 1


def test_a_connection_that_is_reset_before_anything_happened_costs_only_time(
    lab: Lab, broker: BrokerProcess
) -> None:
    lab.proxy.reset("RunInstances")
    assert lab.works(broker.ask("GET_WORKER pool=reset"))
    first, second = lab.launch_calls("reset")
    assert first.params == second.params
    assert (first.outcome, second.outcome) == ("reset", "ok")


# ---------------------------------------------------------------- refusals


def test_a_throttled_launch_is_sent_again_as_it_was(lab: Lab, broker: BrokerProcess) -> None:
    lab.proxy.refuse("RunInstances", "RequestLimitExceeded")
    assert broker.ask("GET_WORKER pool=throttled") == lab.address(lab.only("throttled"))
    first, second = lab.launch_calls("throttled")
    assert first.params == second.params


def test_a_pool_of_several_types_is_bought_with_one_call(lab: Lab, broker: BrokerProcess) -> None:
    address = broker.ask("GET_WORKER pool=two-types")
    assert lab.works(address)
    (call,) = lab.proxy.calls_of("CreateFleet")
    overrides = re.compile(r"LaunchTemplateConfigs\.1\.Overrides\.(\d+)\.InstanceType")
    numbered = {
        int(match[1]): kind for key, kind in call.params.items() if (match := overrides.fullmatch(key))
    }
    asked = [numbered[number] for number in sorted(numbered)]
    assert list(dict.fromkeys(asked)) == list(TYPES), "each in every zone, the preferred type first"
    assert len(asked) > len(TYPES)
    assert address == lab.address(lab.only("two-types"))
    assert broker.ask(f"RELEASE {address}") == "OK"
    lab.wait_until_terminated("two-types")


def test_when_no_type_has_capacity_the_client_hears_why_and_the_cloud_is_left_alone(
    lab: Lab, broker: BrokerProcess
) -> None:
    lab.proxy.refuse("RunInstances", "InsufficientInstanceCapacity", times=MANY)
    refusal = broker.ask("GET_WORKER pool=no-type")
    assert is_capable_error(refusal, "NO_CAPACITY")
    assert "no capacity" in refusal
    assert "InsufficientInstanceCapacity" in refusal
    for _ in range(20):
        assert broker.ask("GET_WORKER pool=no-type") == refusal
    assert [call.params["InstanceType"] for call in lab.launch_calls("no-type")] == RARE
    assert lab.machines("no-type") == []
    assert broker.metric("compute_broker_launches_total", pool="no-type", outcome="no-capacity") == 1


def test_a_missing_permission_is_named_and_not_asked_for_again_and_again(
    lab: Lab, broker: BrokerProcess
) -> None:
    lab.proxy.refuse("RunInstances", "UnauthorizedOperation", times=MANY)
    refusals = {broker.ask("GET_WORKER pool=forbidden") for _ in range(20)}
    assert len(refusals) == 1
    (refusal,) = refusals
    assert is_capable_error(refusal, "CLOUD")
    assert "may not perform ec2:RunInstances" in refusal
    assert "IAM policy" in refusal
    assert [call.params["InstanceType"] for call in lab.launch_calls("forbidden")] == [TYPES[0]]


def test_a_wrong_image_is_named_with_the_setting_to_correct(lab: Lab, broker: BrokerProcess) -> None:
    lab.proxy.refuse("RunInstances", "InvalidAMIID.NotFound", times=MANY)
    refusals = {broker.ask("GET_WORKER pool=wrong-image") for _ in range(20)}
    assert len(refusals) == 1
    (refusal,) = refusals
    assert is_capable_error(refusal, "CLOUD")
    assert "correct the pool's `image`" in refusal
    assert [call.params["InstanceType"] for call in lab.launch_calls("wrong-image")] == [TYPES[0]]


# ---------------------------------------------------------------- machines that are not ready yet


@pytest.mark.parametrize("stage", STAGES)
def test_a_machine_that_is_not_there_yet_is_waited_for_and_not_bought_twice(
    lab: Lab, broker: BrokerProcess, stage: str
) -> None:
    lab.proxy.after_launch(**STAGES[stage])
    askers = [broker.asking(f"GET_WORKER pool={stage} client=ada")]
    eventually(lambda: lab.machines(stage))
    lab.wait_for_scans(3)
    askers.append(broker.asking(f"GET_WORKER pool={stage} client=bob"))
    lab.wait_for_scans(3)
    assert not any(asker.answered() for asker in askers)
    lab.proxy.settle()
    address = lab.address(lab.only(stage))
    assert [asker.line() for asker in askers] == [address, address]
    assert len(lab.launch_calls(stage)) == 1


def test_a_running_machine_is_handed_out_only_when_its_worker_port_answers(
    lab: Lab, broker: BrokerProcess
) -> None:
    asker = broker.asking("GET_WORKER pool=late-port")
    eventually(lambda: lab.machines("late-port"))
    lab.wait_for_scans(5)
    assert not asker.answered()
    lab.late_fleet.open(lab.only("late-port").instance_id)
    assert asker.line() == lab.address(lab.only("late-port"))
    assert len(lab.launch_calls("late-port")) == 1


def test_a_client_that_will_not_wait_so_long_hears_how_far_the_machine_is(
    lab: Lab, broker: BrokerProcess
) -> None:
    lab.proxy.after_launch(pending=FOREVER)
    refusal = broker.ask("GET_WORKER pool=slow wait=0.5")
    assert is_capable_error(refusal, "TIMEOUT")
    assert "one has been booting for" in refusal
    lab.proxy.settle()
    assert broker.ask("GET_WORKER pool=slow") == lab.address(lab.only("slow"))


# ---------------------------------------------------------------- a cloud that is slow


def test_while_a_launch_hangs_everything_else_is_answered_and_nobody_launches_twice(
    lab: Lab, broker: BrokerProcess
) -> None:
    warm = broker.ask("GET_WORKER pool=warm")
    launch = lab.proxy.stall("RunInstances")
    askers = [broker.asking(f"GET_WORKER pool=stalled client={name}") for name in ("ada", "bob")]
    launch.wait_hit()
    assert broker.ask(f"PING {warm}", AT_ONCE_SECONDS_MAX) == "OK"
    assert broker.ask("GET_WORKER pool=warm", AT_ONCE_SECONDS_MAX) == warm
    assert "ordered" in {worker["state"] for worker in broker.status()}
    assert not any(asker.answered() for asker in askers)
    launch.release()
    address = askers[0].line()
    assert askers[1].line() == address == lab.address(lab.only("stalled"))
    assert len(lab.launch_calls("stalled")) == 1


def test_while_listings_hang_commands_are_answered(lab: Lab, broker: BrokerProcess) -> None:
    warm = broker.ask("GET_WORKER pool=reading")
    listing = lab.proxy.stall("DescribeInstances", times=MANY)
    listing.wait_hit()
    assert broker.ask(f"PING {warm}", AT_ONCE_SECONDS_MAX) == "OK"
    assert broker.ask("GET_WORKER pool=reading", AT_ONCE_SECONDS_MAX) == warm
    assert broker.status()


# ---------------------------------------------------------------- machines that go away


def test_a_reclaimed_workers_address_is_never_handed_out_again(lab: Lab, broker: BrokerProcess) -> None:
    address = broker.ask("GET_WORKER pool=reclaimed")
    lab.proxy.reclaim(lab.only("reclaimed").instance_id)
    later = {broker.ask(f"GET_WORKER pool=reclaimed client=c{n}") for n in range(20)}
    assert later == {lab.address(one) for one in lab.running("reclaimed")}
    assert address not in later
    assert len(lab.launch_calls("reclaimed")) == 2
    eventually(lambda: broker.ask(f"PING {address}") == "ERROR: Worker not found")


def test_a_reclaim_is_noticed_when_nobody_asks_and_nothing_is_bought_in_its_place(
    lab: Lab, broker: BrokerProcess
) -> None:
    address = broker.ask("GET_WORKER pool=unasked")
    lab.proxy.reclaim(lab.only("unasked").instance_id)
    eventually(lambda: address not in [worker["ip"] for worker in broker.status()])
    assert broker.metric("compute_broker_terminations_total", pool="unasked") == 1
    assert len(lab.launch_calls("unasked")) == 1


def test_a_worker_that_somebody_terminated_and_whose_port_is_dead_is_not_handed_out(
    lab: Lab, broker: BrokerProcess
) -> None:
    address = broker.ask("GET_WORKER pool=dead-port")
    listing = lab.proxy.stall("DescribeInstances", times=MANY)  # the broker learns nothing from the cloud
    listing.wait_hit()
    machine = lab.only("dead-port").instance_id
    lab.moto.call("TerminateInstances", {"InstanceId.1": machine})
    lab.fleet.close(machine)
    asker = broker.asking("GET_WORKER pool=dead-port")
    eventually(lambda: len(lab.launch_calls("dead-port")) == 2)
    lab.proxy.heal()
    another = asker.line()
    assert another != address
    assert lab.state(lab.machine_at(another).instance_id) == "running"


def test_a_worker_that_somebody_terminated_is_not_handed_out_although_its_address_answers(
    lab: Lab, broker: BrokerProcess
) -> None:
    address = broker.ask("GET_WORKER pool=reused-address")
    lab.moto.call("TerminateInstances", {"InstanceId.1": lab.only("reused-address").instance_id})
    lab.wait_for_scans(2)  # the first may have been under way already
    assert lab.works(address), "another customer's machine has the address now"
    assert broker.ask(f"PING {address}") == "ERROR: Worker not found"
    assert broker.ask("GET_WORKER pool=reused-address") != address


def test_a_busy_worker_that_listings_miss_is_neither_killed_nor_replaced(
    lab: Lab, broker: BrokerProcess
) -> None:
    address = broker.ask("GET_WORKER pool=omitted")
    lab.proxy.omit(lab.only("omitted").instance_id, times=MANY)
    lab.wait_for_scans(5)
    assert broker.ask(f"PING {address}") == "OK"
    assert broker.ask("GET_WORKER pool=omitted client=bob") == address
    lab.proxy.settle()
    lab.wait_for_scans(2)
    assert broker.ask(f"PING {address}") == "OK"
    assert len(lab.launch_calls("omitted")) == 1
    assert lab.only("omitted").state == "running"


def test_a_terminate_that_the_cloud_fails_is_sent_until_it_is_done(lab: Lab, broker: BrokerProcess) -> None:
    address = broker.ask("GET_WORKER pool=stubborn")
    refused = lab.proxy.refuse("TerminateInstances", "InternalError", times=3)  # as often as the SDK tries
    assert broker.ask(f"RELEASE {address}") == "OK"
    assert broker.ask("GET_WORKER pool=stubborn client=bob") != address
    eventually(lambda: lab.state(lab.machines("stubborn")[0].instance_id) == "terminated")
    assert refused.hits == 3
    assert broker.events("terminate failed")


# ---------------------------------------------------------------- a cloud that is gone


def test_with_refused_credentials_warm_workers_are_handed_out_and_launches_fail_at_once(
    lab: Lab, broker: BrokerProcess
) -> None:
    warm = broker.ask("GET_WORKER pool=warm")
    failed_before = len(broker.events("scan failed"))
    lab.proxy.refuse(EVERY_ACTION, "AuthFailure", times=MANY)
    broker.wait_for_event("scan failed", failed_before + 1)
    refusals = {broker.ask("GET_WORKER pool=cold", AT_ONCE_SECONDS_MAX) for _ in range(20)}
    assert len(refusals) == 1
    refusal = refusals.pop()
    assert is_capable_error(refusal, "CLOUD")
    assert "credentials" in refusal
    assert broker.ask(f"PING {warm}", AT_ONCE_SECONDS_MAX) == "OK"
    assert broker.ask("GET_WORKER pool=warm", AT_ONCE_SECONDS_MAX) == warm
    assert lab.launch_calls("cold") == []
    lab.proxy.heal()
    address = eventually(lambda: not (reply := broker.ask("GET_WORKER pool=cold")).startswith("E") and reply)
    assert lab.works(str(address))
    assert lab.state(lab.machine_at(warm).instance_id) == "running"


def test_while_the_cloud_is_away_warm_workers_are_handed_out_and_nothing_is_inferred(
    lab: Lab, broker: BrokerProcess
) -> None:
    warm = broker.ask("GET_WORKER pool=warm client=ada")
    failed_before = len(broker.events("scan failed"))
    lab.proxy.reset(EVERY_ACTION, times=MANY)
    broker.wait_for_event("scan failed", failed_before + 1)
    assert broker.ask(f"PING {warm} client=ada", AT_ONCE_SECONDS_MAX) == "OK"
    assert broker.ask("GET_WORKER pool=warm client=bob", AT_ONCE_SECONDS_MAX) == warm
    assert broker.http("/readyz")[0] == 200
    assert {"warm"} <= {worker["pool"] for worker in broker.status()}
