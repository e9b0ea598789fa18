"""What is measured: seconds that machines ran, seconds that they were used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.model import InstanceState, Worker
from broker.core.registry import Registry
from broker.metering import Meter, PoolTotals
from tests.core.generated import FEW
from tests.core.make import PORT, instance, lease, order

PENDING, DYING = InstanceState.PENDING, InstanceState.SHUTTING_DOWN


class Books(Registry):
    """A registry with a meter on it."""

    def __init__(self) -> None:
        self.meter = Meter()
        super().__init__(self.meter.heard)

    def launch(
        self, number: int, now: float, *, state: InstanceState = InstanceState.RUNNING, pool: str = "default"
    ) -> Worker:
        self.order(order(f"o-{number}", pool), PORT, now)
        return self.launched(f"o-{number}", instance(f"i-{number}", f"10.0.0.{number}", state=state), now)

    def see(self, number: int, state: InstanceState, now: float) -> None:
        self.observed(f"o-{number}", instance(f"i-{number}", f"10.0.0.{number}", state=state), now)

    def end(self, number: int, now: float) -> None:
        self.drain(f"o-{number}", "idle", now)
        self.gone(f"o-{number}", "terminated", now)

    def totals(self, now: float, pool: str = "default") -> PoolTotals:
        return self.meter.totals(pool, now)


# --- running --------------------------------------------------------------------------------------------


def test_where_nothing_ran_there_is_nothing() -> None:
    assert Books().totals(1e6) == PoolTotals(0.0, 0.0)


def test_a_machine_runs_from_when_the_cloud_says_so_until_it_stops() -> None:
    books = Books()
    books.launch(1, 0.0, state=PENDING)
    assert books.totals(100.0) == PoolTotals(0.0, 0.0), "pending is not running"
    books.see(1, InstanceState.RUNNING, 100.0)
    assert books.totals(1900.0) == PoolTotals(1800.0, 0.0)
    books.see(1, DYING, 3700.0)
    assert books.totals(3700.0) == books.totals(1e6) == PoolTotals(3600.0, 0.0)
    books.end(1, 4000.0)
    assert books.totals(1e6) == PoolTotals(3600.0, 0.0)


def test_a_machine_that_is_drained_runs_until_the_cloud_says_that_it_ended() -> None:
    books = Books()
    books.launch(1, 0.0)
    books.drain("o-1", "idle", 600.0)
    books.terminating("o-1", 601.0)
    assert books.totals(3600.0).running_seconds == 3600.0
    books.gone("o-1", "terminated", 3600.0)
    assert books.totals(7200.0).running_seconds == 3600.0


def test_a_machine_that_was_taken_over_runs_from_now_on() -> None:
    books = Books()
    books.adopt(instance("i-9"), "default", PORT, 500.0)
    assert books.totals(536.0).running_seconds == 36.0


def test_each_pool_is_measured_by_itself() -> None:
    books = Books()
    books.launch(1, 0.0)
    books.launch(2, 0.0)
    books.launch(3, 0.0, pool="gpu")
    assert books.totals(3600.0) == PoolTotals(7200.0, 0.0)
    assert books.totals(3600.0, "gpu") == PoolTotals(3600.0, 0.0)
    assert books.totals(3600.0, "other") == PoolTotals(0.0, 0.0)


# --- use ------------------------------------------------------------------------------------------------


def test_a_worker_is_in_use_from_the_first_hold_to_the_end_of_the_last() -> None:
    books = Books()
    books.launch(1, 0.0)
    books.grant(lease("o-1", "ann"), 100.0)
    books.grant(lease("o-1", "bob"), 150.0)
    books.end_lease("o-1", "ann", "released", 200.0)
    assert books.totals(250.0).busy_seconds == 150.0
    books.end_lease("o-1", "bob", "released", 300.0)
    assert books.totals(400.0).busy_seconds == 200.0
    assert books.totals(400.0).utilization_ratio == 0.5


def test_a_hold_that_ran_out_counts_until_it_ran_out() -> None:
    books = Books()
    books.launch(1, 0.0)
    books.grant(lease("o-1", ttl_seconds=60.0), 0.0)
    books.expire_leases("o-1", 500.0)
    assert books.totals(500.0).busy_seconds == 60.0


def test_the_shortest_use_counts_as_long_as_it_was() -> None:
    books = Books()
    books.launch(1, 0.0)
    books.grant(lease("o-1"), 0.0)
    assert books.totals(0.25).busy_seconds == 0.25
    books.end_lease("o-1", "ann", "released", 0.5)
    assert books.totals(9.0).busy_seconds == 0.5


def test_nothing_is_kept_of_workers_that_are_gone() -> None:
    books = Books()
    books.order(order("o-1"), PORT, 0.0)
    books.refused("o-1", "no-capacity", 1.0)
    books.launch(2, 0.0)
    books.grant(lease("o-2"), 1.0)
    assert "o-2" in repr(vars(books.meter))
    books.gone("o-2", "reclaimed", 2.0)
    assert "o-" not in repr(vars(books.meter))


@pytest.mark.parametrize("how", ["drain", "gone"])
def test_a_worker_that_leaves_is_no_longer_in_use(how: str) -> None:
    books = Books()
    books.launch(1, 0.0)
    books.grant(lease("o-1"), 0.0)
    getattr(books, how)("o-1", "reclaimed", 50.0)
    assert books.totals(500.0).busy_seconds == 50.0


def test_a_client_that_wants_the_worker_alone_does_not_count_twice() -> None:
    books = Books()
    books.launch(1, 0.0)
    books.grant(lease("o-1"), 0.0)
    books.grant(lease("o-1", exclusive=True), 50.0)
    assert books.totals(100.0).busy_seconds == 100.0


def test_use_is_a_share_of_what_ran_and_never_more_than_all() -> None:
    assert PoolTotals(0.0, 0.0).utilization_ratio == 0.0
    assert PoolTotals(0.0, 5.0).utilization_ratio == 0.0
    assert PoolTotals(100.0, 25.0).utilization_ratio == 0.25
    assert PoolTotals(0.5, 0.25).utilization_ratio == 0.5
    assert PoolTotals(100.0, 125.0).utilization_ratio == 1.0, "held, but not running yet"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["run", "stop", "hold", "drop", "end"]), st.integers(1, 3), st.floats(0, 5000)
        ),
        max_size=20,
    )
)
@FEW
def test_what_has_been_counted_is_never_taken_back(steps: list[tuple[str, int, float]]) -> None:
    books, now = Books(), 0.0
    for number in (1, 2, 3):
        books.launch(number, now, state=PENDING)
    for what, number, seconds in steps:
        now += seconds
        worker = books.get(f"o-{number}")
        before = books.totals(now)
        if worker is None:
            continue
        match what:
            case "run" | "stop":
                books.see(number, InstanceState.RUNNING if what == "run" else PENDING, now)
            case "hold":
                books.grant(lease(worker.id), now)
            case "drop":
                books.end_lease(worker.id, "ann", "released", now)
            case "end":
                books.end(number, now)
        after = books.totals(now)
        assert after.running_seconds >= before.running_seconds
        assert after.busy_seconds >= before.busy_seconds
