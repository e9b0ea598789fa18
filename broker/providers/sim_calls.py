"""A call to the simulated EC2: what is asked, by whom, what befalls it, how it ends; and the tags in it.

(AWS: EC2 user guide, "Tag restrictions".)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.providers.sim_sky import Refused
from broker.providers.sim_weather import Fault

Answer = dict[str, Any]
Parameters = Mapping[str, Any]

LAUNCHES = ("RunInstances", "CreateFleet")
CHANGES = ("TerminateInstances", "StopInstances", "StartInstances", "CreateTags")
TAGS_MAX = 50
TAG_KEY_CHARS_MAX, TAG_VALUE_CHARS_MAX = 128, 256


@dataclass(slots=True)
class Call:
    """One attempt. `mishap` befalls it at EC2's end; `code` and `status` are those of a scripted refusal.

    When it has arrived there is an answer or an error; whether the caller hears of it is another matter.
    """

    api: str
    parameters: Parameters
    caller: str
    mishap: Fault | None = None
    code: str = ""
    status: int = 400
    answer: Answer | None = None
    error: Exception | None = None

    @property
    def instance_ids(self) -> Sequence[str]:
        """The machines that it names."""
        return self.parameters.get("InstanceIds") or self.parameters.get("Resources") or ()


def launch_tags(parameters: Parameters) -> dict[str, str]:
    """The tags of a launch's machines; they are there from the first moment. Raises Refused."""
    found: dict[str, str] = {}
    for one in parameters.get("TagSpecifications") or ():
        its_tags = tags_of(one.get("Tags") or ())
        refuse_too_many(its_tags)
        if one.get("ResourceType") == "instance":
            found |= its_tags
    return found


def tags_of(pairs: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Raises Refused for tags that EC2 does not take."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, value = pair["Key"], pair.get("Value", "")
        if key.lower().startswith("aws:"):
            raise Refused(
                "InvalidParameterValue", "Tag keys starting with 'aws:' are reserved for internal use"
            )
        if key in found:
            raise Refused("InvalidParameterValue", f"Duplicate tag key '{key}' specified.")
        if not 1 <= len(key) <= TAG_KEY_CHARS_MAX or len(value) > TAG_VALUE_CHARS_MAX:
            raise Refused("InvalidParameterValue", f"Tag '{key[:20]}...' exceeds the maximum length")
        found[key] = value
    return found


def refuse_too_many(its_tags: Mapping[str, str]) -> None:
    if len(its_tags) > TAGS_MAX:
        raise Refused("TagLimitExceeded", f"More than {TAGS_MAX} tags specified")
