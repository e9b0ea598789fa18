"""Opens a provider, with what an earlier run has learnt about machine types and what the next one shall know.

How many cores a machine type has is asked once, at the opening. It is kept on disk, so that a broker that
starts while the cloud's API is down, or that may not ask, still knows what `cores=64` means.
"""

from __future__ import annotations

import json
from contextlib import suppress

from broker.clouds import Cloud
from broker.context import Context
from broker.core.errors import SettingsError, StoreError

CORES = "cores"  # the key in the store
TYPES_MAX = 1000  # machine types that are remembered, the latest: far more than any file names


async def open_provider(context: Context, cloud: Cloud) -> None:
    """Raises what Provider.open does. A disk that does not take the cores costs nothing but the memory."""
    kept = kept_cores(context)
    cloud.provider.recall_cores(kept)
    try:
        await cloud.provider.open()
    except SettingsError:  # of one pool, perhaps: what was learnt of the others is true
        await keep_cores(context, cloud)
        raise
    await keep_cores(context, cloud)


def kept_cores(context: Context) -> dict[str, int]:
    """Machine type → cores, as the store has them; whatever else is there is left out."""
    try:
        found = json.loads(context.store.kept(CORES) or "{}")
    except ValueError:
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {kind: cores for kind, cores in pairs if isinstance(cores, int) and cores > 0}


async def keep_cores(context: Context, cloud: Cloud) -> None:
    """Write what the provider knows more than the store, or otherwise."""
    kept, known = kept_cores(context), cloud.provider.cores
    if all(kept.get(kind) == cores for kind, cores in known.items()):
        return
    merged = {kind: cores for kind, cores in kept.items() if kind not in known} | dict(known)
    latest = dict(list(merged.items())[-TYPES_MAX:])
    with suppress(StoreError):  # the cloud will say it again
        await context.store.keep(CORES, json.dumps(latest))
