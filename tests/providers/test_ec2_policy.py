"""The IAM policy that the documentation hands out: enough for every call, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from broker.core import tags
from broker.providers.ec2_api import METHODS
from broker.providers.ec2_wire import Recipe, launch_parameters
from tests.providers.ec2_support import pool
from tests.providers.test_ec2_wire import SPOT

POLICY = Path(__file__).parents[2] / "deploy" / "iam-policy.json"


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def statements(action: str) -> list[dict[str, Any]]:
    policy: list[dict[str, Any]] = json.loads(POLICY.read_text(encoding="utf-8"))["Statement"]
    return [one for one in policy if action in as_list(one["Action"])]


def test_every_call_of_the_provider_is_allowed_and_no_other_ec2_call() -> None:
    policy = json.loads(POLICY.read_text(encoding="utf-8"))["Statement"]
    allowed = {action for one in policy for action in as_list(one["Action"]) if action.startswith("ec2:")}
    assert allowed == {f"ec2:{api}" for api in METHODS}


@pytest.mark.parametrize("api", ["StartInstances", "StopInstances", "TerminateInstances"])
def test_a_machine_can_only_be_stopped_started_and_ended_when_it_carries_the_brokers_tag(api: str) -> None:
    (changing,) = statements(f"ec2:{api}")
    assert changing["Condition"] == {"StringEquals": {f"aws:ResourceTag/{tags.BROKER}": "lab"}}


def test_whatever_a_launch_tags_may_only_be_launched_with_the_brokers_tag() -> None:
    tagged = {
        one["ResourceType"] for one in launch_parameters(pool(), Recipe(), SPOT, {})["TagSpecifications"]
    }
    (bound,) = [one for one in statements("ec2:RunInstances") if "Condition" in one]
    assert bound["Condition"] == {"StringEquals": {f"aws:RequestTag/{tags.BROKER}": "lab"}}
    assert {resource.rsplit(":")[-1].removesuffix("/*") for resource in bound["Resource"]} == tagged


def test_no_later_tagging_can_change_whose_a_machine_is() -> None:
    later = [one for one in statements("ec2:CreateTags") if "ec2:CreateAction" not in str(one["Condition"])]
    for one in later:
        assert f"aws:ResourceTag/{tags.BROKER}" in one["Condition"]["StringEquals"]
        keys = one["Condition"]["ForAllValues:StringEquals"]["aws:TagKeys"]
        assert {tags.LAST_USED, tags.EPOCH} <= set(keys)
        assert tags.BROKER not in keys


def test_a_role_can_only_be_given_to_machines() -> None:
    (passing,) = statements("iam:PassRole")
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    assert passing["Resource"] != "*"
