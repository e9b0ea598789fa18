"""What the keys of commands may say: one parser for each kind of value.

Each takes the text behind the equals sign and returns the value; a bad one raises BadRequest that names the
key and says what is allowed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from broker.core.errors import BadRequest

WAIT_SECONDS_MAX = 86_400.0
TTL_SECONDS_MIN = 1.0  # shorter ones would end while their RENEW is on its way
TTL_SECONDS_MAX = 86_400.0
CORES_MAX = 100_000
COUNT_MAX = 1000  # workers of one ACQUIRE: its answer is so many lines, written at once
CLIENT_NAME = re.compile(r"[A-Za-z0-9._@:/+-]{1,64}")
WORD = re.compile(r"[A-Za-z0-9._:-]{1,255}")


def word(key: str) -> Callable[[str], str]:
    """A name of something."""

    def parse(value: str) -> str:
        if not WORD.fullmatch(value):
            raise BadRequest(f"{key}= is a word of letters, digits and . _ : -")
        return value

    return parse


def whole(key: str, most: int) -> Callable[[str], int]:
    """A whole number from 1."""

    def parse(value: str) -> int:
        if not value.isdecimal() or len(value) > 6 or not 1 <= int(value) <= most:
            raise BadRequest(f"{key}= is a whole number from 1 to {most}")
        return int(value)

    return parse


def seconds(key: str, least: float, most: float) -> Callable[[str], float]:
    """A duration, fractions allowed."""

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not least <= number <= most:  # also refuses nan
            raise BadRequest(f"{key}= is a number of seconds from {least:.0f} to {most:.0f}")
        return number

    return parse


def exclusive(value: str) -> bool:
    if value not in {"yes", "no"}:
        raise BadRequest("exclusive= is yes or no")
    return value == "yes"


def hold(value: str) -> str:
    if value != "connection":
        raise BadRequest("hold= is connection, or left out")
    return value


def client(value: str) -> str:
    if not CLIENT_NAME.fullmatch(value):
        raise BadRequest("client= is 1 to 64 letters, digits and . _ @ : / + -")
    return value
