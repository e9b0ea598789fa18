"""How long a spot price can be believed."""

from __future__ import annotations

from broker.core.quotes import QUOTE_SECONDS_MAX, Quotes

HERE, THERE = ("us-a", "c7i.large"), ("us-b", "c7i.large")


def test_a_price_is_known_until_it_is_an_hour_old() -> None:
    quotes = Quotes()
    quotes.told({HERE: 30_000}, 100.0)
    assert quotes.known(99.0 + QUOTE_SECONDS_MAX) == {HERE: 30_000}
    assert quotes.known(100.0 + QUOTE_SECONDS_MAX) == {}


def test_a_new_price_takes_the_place_of_the_old_one_and_leaves_the_others() -> None:
    quotes = Quotes()
    quotes.told({THERE: 40_000, HERE: 30_000}, 0.0)
    quotes.told({HERE: 35_000}, 600.0)
    assert list(quotes.known(600.0).items()) == [(HERE, 35_000), (THERE, 40_000)]
    assert quotes.known(QUOTE_SECONDS_MAX) == {HERE: 35_000}


def test_what_nobody_believes_any_more_is_not_kept() -> None:
    quotes = Quotes()
    quotes.told({HERE: 30_000}, 0.0)
    quotes.told({}, QUOTE_SECONDS_MAX)
    assert quotes == Quotes()
