"""Every error the broker raises on purpose, as one tree.

    BrokerError
    ├── ClientFault            the client asked for something it cannot have
    │   ├── UnknownCommand
    │   ├── WorkerNotFound
    │   ├── BadRequest
    │   ├── Denied
    │   │   └── LeaseHasEnded
    │   ├── AuthRequired
    │   └── WaitTimedOut
    ├── Refusal                the house says no, whoever asks
    │   ├── LimitReached
    │   ├── BudgetReached
    │   ├── NoCapacity
    │   ├── Draining
    │   └── ReadOnly           another broker with this id is in charge
    ├── CloudError             the cloud, or the way to it; `sent` tells whether a machine may exist
    │   ├── OfferingRefused    this offering cannot be had now: try another, remember for a while
    │   │   └── QuotaReached
    │   ├── Throttled          too many calls: the same call may be sent again later
    │   ├── PermanentRefusal   wrong image, missing permission: retrying is a hot loop
    │   ├── CredentialsRefused expired, wrong, or the clock is off: looks like an outage
    │   ├── CloudUnreachable   no answer: whether the call was carried out is unknown
    │   ├── OrderMismatch      the token was used with other parameters: something was launched under it
    │   ├── OrderSpent         the token's machine was launched and is gone
    │   └── InstanceNotFound   the id is not known *here and now*; that does not mean it is gone
    ├── SettingsError          every problem of the configuration at once
    └── StoreError             the state directory cannot be written

Outside the tree stands IllegalStep: a bug of ours, which nobody must take for an answer and which loops and
server log as such.

An error's docstring is its default sentence. `wire()` is what a client reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from inspect import getdoc
from typing import ClassVar

WIRE_MESSAGE_CHARS_MAX = 400  # a reply stays one short line even when the cloud answers with an essay


def sentence(text: str, chars_max: int = WIRE_MESSAGE_CHARS_MAX) -> str:
    """Words as they may stand in a reply: printable ASCII on one line, not too long."""
    words = "".join(char if " " <= char <= "~" else "?" for char in " ".join(text.split()))
    return words if len(words) <= chars_max else words[: chars_max - 3] + "..."


class Code(StrEnum):
    """The closed list of codes that end an `ERROR:` line."""

    NO_CAPACITY = "NO_CAPACITY"
    BUDGET = "BUDGET"
    LIMIT = "LIMIT"
    TIMEOUT = "TIMEOUT"
    AUTH = "AUTH"
    DENIED = "DENIED"
    DRAINING = "DRAINING"
    CLOUD = "CLOUD"
    BAD_REQUEST = "BAD_REQUEST"


class BrokerError(Exception):
    """the broker could not do this"""

    code: ClassVar[Code | None] = None

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or getdoc(type(self)) or type(self).__name__)

    @property
    def message(self) -> str:
        return str(self.args[0])

    def wire(self) -> str:
        """The line a client reads: printable ASCII, one line, never something that looks like an address."""
        words = sentence(self.message)
        return f"ERROR: {words} [{self.code}]" if self.code else f"ERROR: {words}"


class ClientFault(BrokerError):
    """the request cannot be met as it stands"""

    code: ClassVar[Code | None] = Code.BAD_REQUEST


class UnknownCommand(ClientFault):
    """Unknown command"""

    code = None  # the published protocol fixes this line, without a code


class WorkerNotFound(ClientFault):
    """Worker not found"""

    code = None  # the published protocol fixes this line, without a code


class BadRequest(ClientFault):
    """the request is not understood"""


class Denied(ClientFault):
    """the worker is held by another client"""

    code = Code.DENIED


class LeaseHasEnded(Denied):
    """that lease has ended"""

    # The sentence is fixed: by it clients tell this from the word of a broker that is read-only.


class AuthRequired(ClientFault):
    """the broker does not know this client"""

    code = Code.AUTH


class WaitTimedOut(ClientFault):
    """no worker became ready within the wait"""

    code = Code.TIMEOUT


class Refusal(BrokerError):
    """the broker refuses"""

    code = Code.LIMIT


class LimitReached(Refusal):
    """a limit is reached"""


class BudgetReached(Refusal):
    """the budget is spent"""

    code = Code.BUDGET


class NoCapacity(Refusal):
    """no offering of the pool can be had at the moment"""

    code = Code.NO_CAPACITY


class Draining(Refusal):
    """the broker is shutting down: ask again in a moment"""

    code = Code.DRAINING


class ReadOnly(Refusal):
    """another broker with this id looks after the machines"""

    code = Code.DENIED


class CloudError(BrokerError):
    """the cloud could not do this"""

    code = Code.CLOUD
    sent: ClassVar[bool] = False  # True: the call may have been carried out although it failed


class OfferingRefused(CloudError):
    """this offering cannot be had now"""

    code = Code.NO_CAPACITY


class QuotaReached(OfferingRefused):
    """a quota of the cloud account is reached"""

    code = Code.LIMIT


class Throttled(CloudError):
    """the cloud asks for fewer calls"""


class PermanentRefusal(CloudError):
    """the cloud will never accept this call as it stands"""


class CredentialsRefused(CloudError):
    """the cloud does not accept the credentials (expired or wrong, or this machine's clock is off)"""


class CloudUnreachable(CloudError):
    """the cloud does not answer"""

    sent = True


class OrderMismatch(CloudError):
    """the cloud saw this order with other parameters"""

    sent = True


class OrderSpent(CloudError):
    """the machine of this order was launched and is gone already"""


class InstanceNotFound(CloudError):
    """the cloud does not know this machine at the moment"""


class SettingsError(BrokerError):
    """the configuration has problems"""

    code = Code.BAD_REQUEST

    def __init__(self, problems: Iterable[str], pools: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        self.pools = frozenset(pools)  # those that cannot work; empty: everything that was asked for
        super().__init__("; ".join(self.problems))


class StoreError(BrokerError):
    """the state directory cannot be written"""

    code = Code.LIMIT


class IllegalStep(RuntimeError):
    """the life of a worker has no such step"""
