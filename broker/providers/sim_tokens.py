"""Client tokens: a call sent again does nothing again.

A token is good in its scope, which is the region, or one zone when the call names a zone or a subnet: the
same token in another zone launches once more. It stands for the exact parameters of the call that succeeded;
a call that was refused leaves nothing behind. Forgotten a day after the last of its machines terminated.
(AWS: EC2 developer guide, "Ensuring idempotency in Amazon EC2 API requests".)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.providers.sim_machine import Machine
from broker.providers.sim_sky import Refused

TOKEN_CHARS_MAX = 64
KEPT_SECONDS = 86_400.0  # "at least 24 hours after the termination of the instance"


@dataclass(frozen=True, slots=True)
class Carried:
    """What a token stands for."""

    parameters: Mapping[str, Any]
    machines: tuple[Machine, ...]
    answer: Any = None

    def gone_at(self) -> float:
        moments = [math.inf if one.terminated_at is None else one.terminated_at for one in self.machines]
        return max(moments, default=math.inf)


class Tokens:
    """See the module."""

    def __init__(self) -> None:
        self._carried: dict[tuple[str, str, str], Carried] = {}

    def find(self, api: str, scope: str, parameters: Mapping[str, Any], at: float) -> Carried | None:
        """What this call has done already. Raises Refused when that was another call's token."""
        token = token_of(parameters)
        carried = self._carried.get((api, scope, token))
        if carried is None:
            return None
        if carried.gone_at() + KEPT_SECONDS <= at:
            del self._carried[api, scope, token]
            return None
        if carried.parameters != plain(parameters):
            raise Refused(
                "IdempotentParameterMismatch",
                "Arguments on this idempotent request are inconsistent with arguments used in previous "
                "request(s).",
            )
        return carried

    def keep(
        self,
        api: str,
        scope: str,
        parameters: Mapping[str, Any],
        machines: Sequence[Machine],
        answer: Any = None,
    ) -> None:
        self._carried[api, scope, token_of(parameters)] = Carried(plain(parameters), tuple(machines), answer)


def token_of(parameters: Mapping[str, Any]) -> str:
    """Raises Refused for what cannot be one."""
    token = str(parameters.get("ClientToken") or "")
    if len(token) > TOKEN_CHARS_MAX or not token.isascii():
        raise Refused(
            "InvalidParameterValue", f"ClientToken is longer than {TOKEN_CHARS_MAX} ASCII characters"
        )
    return token


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in ("ClientToken", "DryRun")}
