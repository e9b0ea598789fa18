"""Worker ↔ tags: what a machine carries, so that a broker which lost everything finds it again.

Written in the launch call itself, so there is no moment at which a machine of ours exists without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

NAME = "Name"
BROKER = "compute-broker:broker"
POOL = "compute-broker:pool"
ORDER = "compute-broker:order"
EXPIRES = "compute-broker:expires"
LAST_USED = "compute-broker:last-used"
EPOCH = "compute-broker:epoch"
PROTECT = "compute-broker:protect"  # set by a person: the broker does not end this machine
NO_PROTECTION = frozenset({"", "no", "false"})


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a machine says it is; empty or None where it does not say."""

    broker: str = ""
    pool: str = ""
    order: str = ""
    expires_unix: float | None = None
    last_used_unix: float | None = None
    epoch: str = ""  # the claim of the broker that looks after it, as core.claim writes it


def launch_tags(
    identity: Identity, name: str, extra: Mapping[str, str], *, expires_unix: float
) -> dict[str, str]:
    """The tags of a launch call."""
    epoch = {EPOCH: identity.epoch} if identity.epoch else {}
    return {
        **extra,
        NAME: name,
        BROKER: identity.broker,
        POOL: identity.pool,
        ORDER: identity.order,
        EXPIRES: rfc3339(expires_unix),
        **epoch,
    }


def read(tags: Mapping[str, str]) -> Identity:
    """Whatever of ours these tags hold. Never raises: anyone may edit tags."""
    return Identity(
        tags.get(BROKER, ""),
        tags.get(POOL, ""),
        tags.get(ORDER, ""),
        unix(tags.get(EXPIRES, "")),
        unix(tags.get(LAST_USED, "")),
        tags.get(EPOCH, ""),
    )


def protects(tags: Mapping[str, str]) -> bool:
    """Whether a person has asked the broker not to end the machine: any value but "", "no" and "false"."""
    return tags.get(PROTECT, "").strip().lower() not in NO_PROTECTION


def rfc3339(unix_seconds: float) -> str:
    """UTC, whole seconds: `2026-01-31T08:00:00Z`."""
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix(text: str) -> float | None:
    """The inverse of `rfc3339`; None for anything that is no such time with a zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.timestamp() if moment.tzinfo else None
