"""Moments by key: the last word counts, and what was dropped is never named."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.core.deadlines import Deadlines
from tests.core.generated import MANY

KEYS = st.sampled_from("abc")
MOMENTS = st.integers(0, 9).map(float)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("set"), KEYS, MOMENTS),
            st.tuples(st.just("no later"), KEYS, MOMENTS),
            st.tuples(st.just("drop"), KEYS, st.just(0.0)),
            st.tuples(st.just("due"), st.just(""), MOMENTS),
        )
    )
)
@MANY
def test_a_plain_table_does_the_same(acts: list[tuple[str, str, float]]) -> None:
    real, table = Deadlines(), dict[str, float]()
    for act, key, at in acts:
        if act == "set":
            real.set(key, at)
            table[key] = at
        elif act == "no later":
            real.no_later(key, at)
            table[key] = min(table.get(key, at), at)
        elif act == "drop":
            real.drop(key)
            table.pop(key, None)
        else:
            come = {one for one, moment in table.items() if moment <= at}
            assert sorted(real.due(at)) == sorted(come)
            table = {one: moment for one, moment in table.items() if one not in come}
        assert real.next_at() == min(table.values(), default=None)
