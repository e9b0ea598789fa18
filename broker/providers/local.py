"""The local provider, the embedded default: each worker is a process on a loopback address of its own.

Workers are sessions of their own and outlive the broker, however it ends; the next one finds them again. What
keeps them from outliving every broker is the leash: each listing touches the record of each running worker,
and a worker whose record has not been touched for its pool's idle timeout and LEASH_SECONDS_SPARE more ends
itself. A `pool.X.command` of one's own does well to do the same, with COMPUTE_BROKER_LEASH_FILE and
_LEASH_SECONDS, and it stays in the foreground: when it ends, so does everything it has started.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil

from broker.core.cloudtime import Span
from broker.core.errors import (
    CloudError,
    CloudUnreachable,
    InstanceNotFound,
    PermanentRefusal,
    SettingsError,
)
from broker.core.model import Bought, Instance, InstanceState, Market, Offering, Order
from broker.core.settings import PoolSettings
from broker.core.tags import Identity, launch_tags
from broker.providers.base import OUTCOMES, Change, Place
from broker.providers.local_machines import INSTANCE_TYPE, REGION, LocalMachines
from broker.providers.local_records import RECIPE, Recipe

LEASH_SECONDS_SPARE = 300.0  # beyond the idle timeout: a broker may be away for so long and find its workers
LEASH_SECONDS_MAX = 7 * 86_400  # what the stock worker accepts
TERMINATE_GRACE_SECONDS = 3.0  # from SIGTERM to SIGKILL: nothing on a worker is worth more than its end
KILL_SECONDS_MAX = 2.0  # who survives SIGKILL for longer sits in the kernel; the next listing tries again
FINISH_LOOK_SECONDS = 0.05

P = ParamSpec("P")
T = TypeVar("T")


class LocalProvider:
    """The provider port on this host.

    `on_call` hears each call's name and its outcome (see OUTCOMES). `environ` is the broker's own
    environment, of which workers inherit what any program needs and nothing more.
    """

    name = "local"
    offerings_max = 1
    machines_max = 1  # each is a process of its own
    place: Place = ("local", None, None)  # there is only one place called here
    contested = False  # one host: the locks see to it, and no machine of another state directory is listed

    def __init__(
        self,
        broker_id: str,
        pools: Mapping[str, PoolSettings],
        state_dir: Path,
        clock_wall: Callable[[], float],
        on_call: Callable[[str, str], None] = lambda _api, _outcome: None,
        environ: Mapping[str, str] = os.environ,
        terminate_grace_seconds: float = TERMINATE_GRACE_SECONDS,
    ) -> None:
        self._broker_id = broker_id
        self._pools = dict(pools)
        self.cores: dict[str, int] = {}  # this host's, which anybody can count
        self._clock_wall = clock_wall
        self._machines = LocalMachines(broker_id, state_dir / "local", clock_wall, environ)
        self._on_call = on_call
        self._terminate_grace_seconds = terminate_grace_seconds
        self._finishing: dict[str, asyncio.Task[None]] = {}  # instance id → its way from SIGTERM to its end

    async def open(self) -> None:
        try:
            await asyncio.to_thread(self._machines.open)
        except OSError as error:
            raise SettingsError([f"broker.state_dir: {error}"]) from error

    async def study(self, pools: Mapping[str, PoolSettings]) -> Change:
        return Change(lambda: self._swap(pools))

    def _swap(self, pools: Mapping[str, PoolSettings]) -> None:
        self._pools = dict(pools)

    def recall_cores(self, cores: Mapping[str, int]) -> None:
        """Nothing that this host could not say itself."""

    async def close(self) -> None:
        """Sees those that were told to end to their end, for a few seconds at most; the others live on."""
        if self._finishing:
            await asyncio.wait(self._finishing.values())

    def offerings(self, pool: str) -> Sequence[Offering]:
        return [
            Offering(
                REGION,
                INSTANCE_TYPE,
                Market.ON_DEMAND,
                cores=os.cpu_count(),
                price_usd_micros_per_hour=self._pools[pool].price_usd_micros_per_hour,
            )
        ]

    def prepare(
        self,
        pool: str,
        order_id: str,
        offerings: Sequence[Offering],
        created_unix: float,
        epoch: str = "",
        count: int = 1,
    ) -> Order:
        settings = self._pools[pool]
        identity = Identity(self._broker_id, pool, order_id, epoch=epoch)
        expires_unix = created_unix + settings.max_lifetime
        recipe = Recipe(
            settings.command,
            settings.worker_port,
            min(math.ceil(settings.idle_timeout + LEASH_SECONDS_SPARE), LEASH_SECONDS_MAX),
            launch_tags(identity, settings.name_tag, settings.tags, expires_unix=expires_unix),
        )
        return Order(order_id, pool, tuple(offerings), RECIPE.dump_json(recipe).decode(), created_unix, count)

    async def launch(self, order: Order) -> Bought:
        return Bought((await self._call("launch", self._machines.launch, order),))

    async def listing(self) -> list[Instance]:
        instances = await self._call("listing", self._machines.listing)
        self._finish(i.id for i in instances if i.state is InstanceState.SHUTTING_DOWN)
        return instances

    async def describe(self, instance_ids: Iterable[str]) -> list[Instance]:
        return await self._call("describe", self._machines.describe, tuple(instance_ids))

    async def terminate(self, instance_ids: Iterable[str]) -> None:
        self._finish(await self._call("terminate", self._machines.terminate, tuple(instance_ids)))

    async def stop(self, instance_id: str) -> None:
        raise PermanentRefusal("a local worker cannot be stopped and started again")

    async def start(self, instance_id: str) -> None:
        raise PermanentRefusal("a local worker cannot be stopped and started again")

    async def tag(self, instance_id: str, tags: Mapping[str, str]) -> None:
        await self._call("tag", self._machines.tag, instance_id, tags)

    async def tag_all(self, instance_ids: Iterable[str], tags: Mapping[str, str]) -> None:
        for instance_id in instance_ids:
            with suppress(InstanceNotFound):
                await self.tag(instance_id, tags)

    async def spot_prices(self, pool: str) -> Mapping[tuple[str, str], int]:
        return {}

    def round_trip_seconds(self) -> float | None:
        """There is no way to go."""
        return None

    def clock_unix(self, at: float) -> Span:
        wall_unix = self._clock_wall() - (asyncio.get_running_loop().time() - at)
        return Span(wall_unix, wall_unix)

    async def _call(self, api: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Carry out blocking work in a thread, count it, and turn what the system says into our errors."""
        try:
            result = await asyncio.to_thread(work, *args, **kwargs)
        except CloudError as error:
            self._on_call(api, OUTCOMES[type(error)])
            raise
        except asyncio.CancelledError:  # the thread goes on; what it does is on disk
            self._on_call(api, "cancelled")
            raise
        except (OSError, psutil.Error) as error:
            self._on_call(api, OUTCOMES[CloudUnreachable])
            raise CloudUnreachable(f"local workers cannot be looked after: {error}") from error
        self._on_call(api, "ok")
        return result

    def _finish(self, instance_ids: Iterable[str]) -> None:
        for instance_id in instance_ids:
            if instance_id not in self._finishing:
                self._finishing[instance_id] = asyncio.create_task(self._see_to_the_end(instance_id))

    async def _see_to_the_end(self, instance_id: str) -> None:
        now = asyncio.get_running_loop().time
        kill_at = now() + self._terminate_grace_seconds
        try:
            while now() < kill_at + KILL_SECONDS_MAX:
                # Whoever asked for the end is gone: what cannot be looked at now is looked at again, here or
                # after the next listing.
                with suppress(OSError, psutil.Error):
                    if await asyncio.to_thread(self._machines.finish, instance_id, kill=now() >= kill_at):
                        return
                await asyncio.sleep(FINISH_LOOK_SECONDS)
        finally:
            del self._finishing[instance_id]
