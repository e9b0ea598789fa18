"""The nouns: frozen, with units in their names."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any, get_args

import pytest

from broker.core import model
from broker.core.model import (
    NO_TAGS,
    Event,
    InstanceState,
    Market,
    Worker,
    WorkerState,
)
from tests.core.make import MOON, PORT, instance, lease, order

NOUNS: list[Any] = [kind for kind in vars(model).values() if isinstance(kind, type) and is_dataclass(kind)]
UNITS = ("_at", "_unix", "_seconds", "at")


def worker(**changes: object) -> Worker:
    value = Worker("w-1", "default", WorkerState.READY, MOON, PORT, since_at=2.0, born_at=1.0)
    return replace(value, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [MOON, order(), instance(), lease("w-1"), worker()], ids=repr)
def test_a_noun_cannot_be_changed(value: Any) -> None:
    for field in fields(value):
        with pytest.raises((FrozenInstanceError, TypeError)):
            setattr(value, field.name, None)
    with pytest.raises((FrozenInstanceError, TypeError, AttributeError)):
        value.something_new = 1


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: str(noun.__name__))
def test_every_time_says_its_clock_and_every_span_its_unit(noun: Any) -> None:
    for field in fields(noun):
        if "float" in str(field.type):
            assert field.name.endswith(UNITS), field.name


def test_every_event_tells_when_it_happened() -> None:
    for kind in get_args(Event):
        assert "at" in {field.name for field in fields(kind)}


def test_a_worker_has_the_cores_of_its_offering() -> None:
    assert worker().cores == 64
    assert worker(offering=replace(MOON, cores=None)).cores is None


def test_a_machine_starts_with_no_tags_that_anybody_could_write_to() -> None:
    bare = instance()
    assert bare.tags is NO_TAGS
    assert dict(bare.tags) == {}
    with pytest.raises(TypeError):
        bare.tags["x"] = "y"  # type: ignore[index]


def test_a_machine_with_tags_can_be_a_key_and_differs_by_its_tags() -> None:
    one, two = instance(tags={"a": "1"}), instance(tags={"a": "2"})
    assert one != two
    assert len({one, two, instance(tags={"a": "1"})}) == 2


def test_the_clouds_own_words_are_kept() -> None:
    """EC2 API reference, InstanceState."""
    assert [str(state) for state in InstanceState] == [
        "pending", "running", "stopping", "stopped", "shutting-down", "terminated",
    ]  # fmt: skip
    assert [str(market) for market in Market] == ["spot", "on-demand"]
