"""compute-broker: ask for a worker over a socket, get the address of a machine that is really ready.

What a client needs is here: `with broker.worker("host", cores=64) as w: …`. A name is imported when it is
first used, so that whoever imports a part of this package does not load all of it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.client import AsyncClient, Client
    from broker.core.errors import (
        BadRequest,
        BrokerError,
        ClientFault,
        CloudError,
        Denied,
        Draining,
        LeaseHasEnded,
        LimitReached,
        NoCapacity,
        Refusal,
        UnknownCommand,
        WaitTimedOut,
        WorkerNotFound,
    )
    from broker.core.replies import Granted, Notice, Pending
    from broker.dserv import RemoteError, RemoteTclError, aremote_eval, remote_eval
    from broker.errand import BrokerUnreachable, Retry, Wish
    from broker.held_lease import aacquire, acquire
    from broker.held_worker import AsyncHeldWorker, HeldWorker, aworker, worker
    from broker.lease_keeper import AsyncHeldLease, HeldLease

__all__ = [
    "AsyncClient",
    "AsyncHeldLease",
    "AsyncHeldWorker",
    "BadRequest",
    "BrokerError",
    "BrokerUnreachable",
    "Client",
    "ClientFault",
    "CloudError",
    "Denied",
    "Draining",
    "Granted",
    "HeldLease",
    "HeldWorker",
    "LeaseHasEnded",
    "LimitReached",
    "NoCapacity",
    "Notice",
    "Pending",
    "Refusal",
    "RemoteError",
    "RemoteTclError",
    "Retry",
    "UnknownCommand",
    "WaitTimedOut",
    "Wish",
    "WorkerNotFound",
    "aacquire",
    "acquire",
    "aremote_eval",
    "aworker",
    "remote_eval",
    "worker",
]

_HOMES = (  # the lightest first
    "broker.core.errors",
    "broker.core.replies",
    "broker.errand",
    "broker.dserv",
    "broker.client",
    "broker.held_worker",
    "broker.lease_keeper",
    "broker.held_lease",
)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in __all__:
            for home in _HOMES:
                value = getattr(import_module(home), name, None)
                if value is not None:
                    globals()[name] = value
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
