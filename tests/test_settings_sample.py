"""deploy/broker.toml holds every setting, its true default, and examples that work."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from broker.core.settings import BrokerSettings, PoolSettings, Section, Settings, parse

SAMPLE = Path(__file__).resolve().parents[1] / "deploy" / "broker.toml"
SETTING = re.compile(r"#(?P<key>[a-z_]+) = (?P<value>.*)")
SECTIONS: dict[str, type[Section]] = {"broker": BrokerSettings, "pool.default": PoolSettings}
EC2_BEGINS, POOLS_BEGIN = "# --- EC2 only: what a launch needs", "# --- More pools"
EXCLUDES = {"user_data": "user_data_file", "subnet": "subnets"}  # one of the two
SEVERAL_REGIONS = ("regions", "in")  # exclude `region`, and ids that lie in one region


def text() -> str:
    return SAMPLE.read_text(encoding="utf-8")


def uncommented(part: str) -> str:
    """The part with every setting in effect: a "#" is taken away where no blank follows it."""
    return re.sub(r'^#(?=[a-z["#])', "", part, flags=re.MULTILINE)


def shown() -> dict[str, dict[str, Any]]:
    """Section → key → value, of every setting that the sample shows."""
    whole: dict[str, Any] = tomllib.loads(uncommented(text()))
    return {"broker": whole["broker"], "pool.default": whole["pool"]["default"]}


def defaults(section: str) -> dict[str, Any]:
    return {field.alias or key: field.default for key, field in SECTIONS[section].model_fields.items()}


def test_as_it_is_the_sample_is_the_embedded_default() -> None:
    assert parse(tomllib.loads(text()), {}) == parse({}, {}) == Settings()


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_in_the_sample_once(section: str) -> None:
    assert shown()[section].keys() == defaults(section).keys()


@pytest.mark.parametrize("section", SECTIONS)
def test_every_default_that_is_shown_is_the_true_one(section: str) -> None:
    for key, value in shown()[section].items():
        default = defaults(section)[key]
        assert default is not PydanticUndefined
        if default in (None, (), {}) and value not in ([], {}):
            continue  # there is none: what is shown is an example
        document: dict[str, Any] = {key: value}
        assert parsed(section, document) == parsed(section, {}), key


def parsed(section: str, document: dict[str, Any]) -> Any:
    if section == "broker":
        return parse({"broker": document}, {}).broker
    return parse({"pool": {"default": document}}, {}).pool["default"]


def test_what_is_no_default_says_that_it_is_an_example() -> None:
    for key, default in defaults("pool.default").items():
        if default in (None, ()) and key != "command":
            before = text()[: text().index(f"\n#{key} = ")]
            heading = before[before.rindex("# --- ") :]
            comment = before[before.rindex("\n\n") :]
            assert "example" in heading or "example" in comment, key


def test_every_setting_has_its_reason_above_it() -> None:
    lines = text().splitlines()
    for number, line in enumerate(lines[: lines.index(next(x for x in lines if x.startswith(POOLS_BEGIN)))]):
        if SETTING.fullmatch(line):
            above = lines[number - 1]
            assert above.startswith("# ") or SETTING.fullmatch(above), line


@pytest.mark.parametrize("left_out", ["user_data", "user_data_file"])
def test_with_the_part_about_ec2_in_effect_it_is_an_ec2_pool(left_out: str) -> None:
    whole = text()
    begin, end = whole.index(EC2_BEGINS), whole.index(POOLS_BEGIN)
    document = tomllib.loads(whole[:begin] + uncommented(whole[begin:end]) + whole[end:])
    pool = document["pool"]["default"]
    for one in (left_out, "subnet", *SEVERAL_REGIONS):
        del pool[one]
    pool["provider"] = "ec2"
    settings = parse(document, {}).pool["default"]
    assert settings.provider == "ec2"
    assert len(settings.instance_types) == 3
    assert settings.image is not None
    assert settings.user_data is None or settings.user_data.startswith("#!/bin/sh\nshutdown")


def test_with_its_regions_in_effect_it_buys_in_two() -> None:
    pool = tomllib.loads(uncommented(text()))["pool"]["default"]
    for one in (*EXCLUDES, "region", "subnets", "zones", "security_group_ids"):
        del pool[one]
    here, there = parse({"pool": {"default": {**pool, "provider": "ec2"}}}, {}).pool["default"].by_region
    assert (here.region, there.region) == ("us-east-1", "eu-central-1")
    assert here.image != there.image


def test_with_only_what_a_launch_needs_it_is_an_ec2_pool() -> None:
    whole = text()
    begin, end = whole.index(EC2_BEGINS), whole.index("# --- EC2 only: what a launch may have")
    needed = uncommented(whole[begin:end])
    document = tomllib.loads(whole[:begin].replace('#provider = "local"', 'provider = "ec2"') + needed)
    assert parse(document, {}).pool["default"].provider == "ec2"


def test_with_the_second_pool_in_effect_there_are_two() -> None:
    whole = text()
    at = whole.index(POOLS_BEGIN)
    settings = parse(tomllib.loads(whole[:at] + uncommented(whole[at:])), {})
    assert settings.pool.keys() == {"default", "small"}
    assert settings.pool["small"].exclusive


def test_everything_at_once_is_sound_but_for_what_excludes_each_other() -> None:
    document = tomllib.loads(uncommented(text()))
    for one in (*EXCLUDES, *SEVERAL_REGIONS):
        del document["pool"]["default"][one]
    document["pool"]["default"]["provider"] = "ec2"
    assert parse(document, {})


def test_it_is_read_on_a_narrow_screen() -> None:
    assert max(map(len, text().splitlines())) <= 110
    assert text().isascii()
