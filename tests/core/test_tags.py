"""Tags: what a broker that has lost everything reads off its machines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core import tags
from broker.core.settings import DURATION_SECONDS_MAX
from broker.core.tags import Identity
from tests.core.generated import FEW

MOMENT_UNIX = 1_769_846_400.0  # 2026-01-31T08:00:00Z


def test_a_launch_carries_who_it_belongs_to_and_when_it_must_be_dead() -> None:
    written = tags.launch_tags(
        Identity("lab", "gpu", "cb-1"), "dserv-worker", {"owner": "ann"}, expires_unix=MOMENT_UNIX
    )
    assert written == {
        "owner": "ann",
        "Name": "dserv-worker",
        "compute-broker:broker": "lab",
        "compute-broker:pool": "gpu",
        "compute-broker:order": "cb-1",
        "compute-broker:expires": "2026-01-31T08:00:00Z",
    }


def test_no_extra_tag_takes_the_place_of_ours() -> None:
    forged = {tags.BROKER: "other", tags.NAME: "other", tags.EXPIRES: "never"}
    written = tags.launch_tags(Identity("lab", "gpu", "cb-1"), "n", forged, expires_unix=MOMENT_UNIX)
    assert (written[tags.BROKER], written[tags.NAME]) == ("lab", "n")
    assert tags.read(written).expires_unix == MOMENT_UNIX


@given(
    broker=st.text(min_size=1),
    pool=st.text(),
    order=st.text(),
    expires_unix=st.integers(0, int(MOMENT_UNIX) + DURATION_SECONDS_MAX),
)
@FEW
def test_what_is_written_is_read_back(broker: str, pool: str, order: str, expires_unix: int) -> None:
    identity = Identity(broker, pool, order)
    written = tags.launch_tags(identity, "name", {}, expires_unix=float(expires_unix))
    assert tags.read(written) == Identity(broker, pool, order, float(expires_unix))


@given(st.floats(0, 32_000_000_000.0))
@FEW
def test_a_time_on_a_tag_is_right_to_the_second(unix_seconds: float) -> None:
    back = tags.unix(tags.rfc3339(unix_seconds))
    assert back is not None
    assert -0.001 <= unix_seconds - back < 1.0


def test_a_last_use_is_read_with_whatever_zone_somebody_wrote() -> None:
    written = {tags.LAST_USED: "2026-01-31T09:00:00+01:00"}
    assert tags.read(written) == Identity(last_used_unix=MOMENT_UNIX)


def test_a_stranger_says_nothing() -> None:
    assert tags.read({"Name": "dserv-worker", "owner": "bob"}) == Identity()


@pytest.mark.parametrize(
    "text", ["", "soon", "2026-01-31", "2026-01-31T08:00:00", "2026-13-31T08:00:00Z", "1769846400", "12:00Z"]
)
def test_what_is_no_time_with_a_zone_is_no_time(text: str) -> None:
    assert tags.unix(text) is None


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59"])
def test_the_ends_of_the_calendar_do_no_harm(text: str) -> None:
    assert isinstance(tags.unix(text), float)


@given(st.dictionaries(st.sampled_from([tags.BROKER, tags.POOL, tags.EXPIRES, tags.LAST_USED]), st.text()))
@FEW
def test_tags_that_anybody_edited_never_raise(written: dict[str, str]) -> None:
    identity = tags.read(written)
    assert identity.broker == written.get(tags.BROKER, "")


@pytest.mark.parametrize(
    ("value", "kept"),
    [("yes", True), ("until Friday, ann", True), ("1", True), ("", False), ("no", False), ("False", False)],
)
def test_the_protect_tag_protects_unless_it_says_no(value: str, kept: bool) -> None:
    assert tags.protects({tags.PROTECT: value}) is kept
    assert not tags.protects({})
