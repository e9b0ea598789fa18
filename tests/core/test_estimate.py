"""How long machines take: by the last ones of the pool, and honest when nothing tells."""

from __future__ import annotations

from broker.core.estimate import BOOTS_MAX, BootTimes, quantile
from broker.core.registry import Registry
from tests.core.make import PORT, instance, order


def booted(times: BootTimes, seconds: list[float], pool: str = "default") -> None:
    """Machines that took so long, one after the other."""
    books, now = Registry(times.heard), 0.0
    for number, took in enumerate(seconds):
        books.order(order(f"o-{number}", pool), PORT, now)
        books.launched(f"o-{number}", instance(f"i-{number}", f"10.0.{number}.1"), now + took / 2)
        now += took
        books.ready(f"o-{number}", now)


def test_nobody_knows_before_the_first_machine_is_ready() -> None:
    assert BootTimes().eta_seconds("default", 0.0) is None


def test_the_median_is_told_then_the_time_of_nine_in_ten_then_nothing() -> None:
    times = BootTimes()
    booted(times, [30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0, 110.0, 200.0])
    assert times.eta_seconds("default", 0.0) == 70.0
    assert times.eta_seconds("default", 31.0) == 39.0
    assert times.eta_seconds("default", 70.0) == 40.0
    assert times.eta_seconds("default", 110.0) is None
    assert times.eta_seconds("gpu", 0.0) is None


def test_only_the_last_machines_count() -> None:
    times = BootTimes()
    booted(times, [500.0] * BOOTS_MAX + [60.0] * BOOTS_MAX)
    assert times.eta_seconds("default", 0.0) == 60.0


def test_a_machine_that_was_found_or_came_back_to_its_senses_tells_nothing() -> None:
    times = BootTimes()
    books = Registry(times.heard)
    books.adopt(instance("i-old"), "default", PORT, 0.0)
    books.ready("i-old", 1.0)
    booted(times, [60.0])
    books.suspect("i-old", "no answer", 2.0)
    books.ready("i-old", 3.0)
    assert times.eta_seconds("default", 0.0) == 60.0


def test_a_machine_that_never_became_ready_tells_nothing_and_is_forgotten() -> None:
    times = BootTimes()
    books = Registry(times.heard)
    books.order(order("o-1"), PORT, 0.0)
    books.refused("o-1", "no capacity", 5.0)
    assert times.eta_seconds("default", 0.0) is None
    assert times == BootTimes()


def test_a_quantile_is_one_of_the_values() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert [quantile(values, share) for share in (0.0, 0.25, 0.5, 0.9, 1.0)] == [1.0, 1.0, 2.0, 4.0, 4.0]
