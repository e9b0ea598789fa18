"""What the kill test holds a broker to: a judge that is never wrong, in either direction."""

from __future__ import annotations

import pytest

from tests.acceptance.promises import Hold, Promises


def hold(client: str, *, until: float, pool: str = "alone", address: str = "127.0.0.9") -> Hold:
    return Hold(client, pool, address, f"i-{address}", idle_seconds=10.0, until=until)


@pytest.fixture
def promises() -> Promises:
    return Promises(frozenset({"alone"}))


def test_an_exclusive_worker_is_not_given_to_a_second_client_while_the_first_is_certain_of_it(
    promises: Promises,
) -> None:
    promises.told(hold("a", until=20.0), 10.0)
    with pytest.raises(AssertionError, match=r"b was told 127\.0\.0\.9, which a holds alone"):
        promises.told(hold("b", until=25.0), 15.0)
    promises.told(hold("b", until=35.0), 25.0)


def test_a_worker_that_was_given_back_may_go_to_the_next(promises: Promises) -> None:
    first = hold("a", until=20.0)
    promises.told(first, 10.0)
    first.give_back(14.0)
    promises.told(hold("b", until=25.0), 15.0)


def test_a_shared_worker_has_many_clients(promises: Promises) -> None:
    promises.told(hold("a", until=20.0, pool="default"), 10.0)
    promises.told(hold("b", until=20.0, pool="default"), 10.0)
    assert len(promises.certain(15.0)) == 2


def test_the_address_of_a_terminated_machine_is_not_handed_out(promises: Promises) -> None:
    promises.ended_at["i-127.0.0.9"] = 9.0
    with pytest.raises(AssertionError, match="which is terminated"):
        promises.told(hold("a", until=20.0), 10.0)


def test_a_machine_that_ends_while_somebody_holds_it_is_a_broken_promise(promises: Promises) -> None:
    promises.told(hold("a", until=20.0), 10.0)
    promises.ended_at["i-127.0.0.9"] = 19.0
    assert list(promises.broken()) == ["i-127.0.0.9 was terminated 1.000 s before a could lose it"]
    promises.holds[0].give_back(18.0)
    assert list(promises.broken()) == []


def test_while_no_broker_runs_no_time_passes_for_those_who_were_certain(promises: Promises) -> None:
    kept, lapsed = hold("a", until=20.0), hold("b", until=14.0, address="127.0.0.8")
    promises.holds += [kept, lapsed]
    promises.restored(killed_at=15.0, looked_at=40.0)
    assert (kept.until, lapsed.until) == (50.0, 14.0)
