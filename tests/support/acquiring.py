"""ACQUIRE as a client sees it: its lines, its leases, what it hears while it waits."""

from __future__ import annotations

import re

from broker.testing import Client

LEASE = re.compile(
    r"LEASE id=(?P<id>lease-\S+) ip=(?P<ip>\S+) port=2560 pool=\S+ type=big cores=64 market=spot price=1 "
    r"expires=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ of=(?P<of>\d+)"
)
PENDING = re.compile(
    r"PENDING eta=(?P<eta>\d+|unknown) position=(?P<position>\d+) code=(?P<code>[A-Z_]+) "
    r"reason=(?P<reason>.+)"
)
Held = tuple[str, str]  # id and address


async def reply_of(client: Client, said: list[re.Match[str]] | None = None) -> list[str]:
    """The answer to one ACQUIRE: its LEASE lines or its error. PENDING lines are put aside."""
    lines: list[str] = []
    while True:
        line = await client.reply()
        assert line is not None, "the broker has closed"
        pending = PENDING.fullmatch(line)
        if pending is not None:
            assert not lines, "what is told of waiting comes before the answer"
            if said is not None:
                said.append(pending)
            continue
        lines.append(line)
        lease = LEASE.fullmatch(line)
        if lease is None or len(lines) == int(lease["of"]):
            return lines


async def acquire(client: Client, words: str = "", said: list[re.Match[str]] | None = None) -> list[Held]:
    """The leases that it gets. `said` collects what it hears before."""
    client.send(f"ACQUIRE {words}\n".encode())
    lines = await reply_of(client, said)
    found = [LEASE.fullmatch(line) for line in lines]
    assert all(found), lines
    return [(one["id"], one["ip"]) for one in found if one]


async def refusal(client: Client, words: str = "", said: list[re.Match[str]] | None = None) -> str:
    """The error that it gets."""
    client.send(f"ACQUIRE {words}\n".encode())
    (line,) = await reply_of(client, said)
    return line
