"""The VPS: starts brokers, one at a time, on one state directory and one cloud, and kills them.

A kill is what SIGKILL is: nothing of that broker runs on, nothing is written any more, its connections break.
Every task that it started, directly or through others, is known by a context variable that tasks inherit.
What such a task does while it is being torn down has no effect: its store is closed, its cloud is deaf.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import sqlite3
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

from broker.clock import Clock
from broker.core.errors import BrokerError, SettingsError
from broker.core.model import Event
from broker.core.settings import Settings
from broker.daemon import Daemon
from broker.loops.probe import Connect
from broker.providers.base import Provider
from broker.providers.ec2 import Ec2Provider
from broker.providers.ec2_api import Manners
from broker.testing import Client, silent_log

OWNER_ID = "0123456789abcdef"  # one installation, wherever the scratch space lies
OTHER_OWNER_ID = "fedcba9876543210"
OWNER: contextvars.ContextVar[Incarnation | None] = contextvars.ContextVar("owner", default=None)
TORN = "torn down"  # the name of every task that ended with its process or later: what it raised is no news
Asked = Callable[[str, Any], None]  # a call, and its parameters
Answered = Callable[[int, str, Any, Any], None]  # which process, its call, and the answer or the error
Factory = Callable[[Manners], AbstractAsyncContextManager[Any]]


class Dead(asyncio.CancelledError):
    """What a call of a killed broker meets."""


class Incarnation:
    """One broker process: from its start to its end."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.alive = True
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.clients: dict[Client, None] = {}
        self.daemon: Daemon | None = None
        self.main: asyncio.Task[None] | None = None
        self.stop = asyncio.Event()
        self.provider: Provider | None = None
        self.mistake: SettingsError | None = None  # in the file, when it is read next

    def ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)
        if not self.alive:
            task.set_name(TORN)

    @contextmanager
    def at_work(self) -> Generator[None, None, None]:
        """Whatever is started in here belongs to this process."""
        token = OWNER.set(self)
        try:
            yield
        finally:
            OWNER.reset(token)


class _Gate:
    """The way from one process to the cloud: closed when the process is dead."""

    def __init__(self, client: Any, incarnation: Incarnation, asked: Asked, answered: Answered) -> None:
        self._client, self._incarnation = client, incarnation
        self._asked, self._answered = asked, answered

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        call = getattr(self._client, method)

        async def through(**parameters: Any) -> Any:
            if not self._incarnation.alive:
                raise Dead
            self._asked(method, parameters)
            try:
                answer = await call(**parameters)
            except Exception as error:
                self._answered(self._incarnation.number, method, parameters, error)
                raise
            self._answered(self._incarnation.number, method, parameters, answer)
            return answer

        return through


class Host:
    """See the module. `factory` makes clients of the cloud's API, `connect` is the network to workers.

    `heard` is told the broker's events and `asked` its calls; `born` hears of every new process, `ended` of
    one that has ended by itself. `settings` are those of the next process.
    """

    def __init__(
        self,
        settings: Settings,
        state_dir: Path,
        clock: Clock,
        factory: Factory,
        connect: Connect,
        *,
        heard: Callable[[Event], None],
        asked: Asked,
        owner: str = OWNER_ID,
    ) -> None:
        self.settings, self._state_dir, self._clock = settings, state_dir, clock
        self._factory, self._connect = factory, connect
        self._heard, self._asked, self._owner = heard, asked, owner
        self.born: Callable[[Incarnation], None] = lambda incarnation: None
        self.ended: Callable[[Incarnation, BaseException | None], None] = lambda incarnation, error: None
        self.in_force: Callable[[Settings], None] = lambda settings: None  # hears what a broker has read
        self.answered: Answered = lambda number, method, parameters, answer: None
        self._numbers = 0
        self._ids = itertools.count(1)
        self._reader: sqlite3.Connection | None = None
        self.now: Incarnation | None = None
        asyncio.get_running_loop().set_task_factory(_owned_task)

    @property
    def running(self) -> bool:
        return self.now is not None and self.now.alive

    def start(self) -> Incarnation:
        """A new process. Whether its start succeeds is seen later."""
        self._numbers += 1
        incarnation = self.now = Incarnation(self._numbers)
        with incarnation.at_work():
            incarnation.daemon = self.make(incarnation)
            self.born(incarnation)
            incarnation.main = asyncio.create_task(self._live(incarnation), name="daemon")
        return incarnation

    def make(self, incarnation: Incarnation) -> Daemon:
        """A broker, wired and not started."""
        self.in_force(self.settings)
        daemon = Daemon(
            self.settings,
            state_dir=self._state_dir,
            clock=self._clock,
            log=silent_log(),
            environ={},
            providers=lambda wanted, *_: self._providers(incarnation, wanted),
            connect=self._connect,
            store_threaded=False,
            ports=False,
            owner_of=lambda directory: self._owner,
            load=lambda: self._load(incarnation),
            new_id=lambda: f"{'' if self._owner == OWNER_ID else 'other-'}{next(self._ids):06d}",
        )
        daemon.observe(lambda event: self._heard(event) if incarnation.alive else None)
        return daemon

    def open(self, peer: str) -> Client | None:
        """A connection to the broker; None when nothing listens."""
        incarnation = self.now
        if incarnation is None or not incarnation.alive or incarnation.daemon is None:
            return None
        with incarnation.at_work():
            client = Client(incarnation.daemon.server, peer)
        incarnation.clients[client] = None
        return client

    def on_disk(self, order_id: str) -> bool:
        """Whether somebody else who looks into the store's file finds the order there."""
        if self._reader is None:
            self._reader = sqlite3.connect(self._state_dir / "broker.db", isolation_level=None)
        found = self._reader.execute("SELECT 1 FROM orders WHERE id = ?", (order_id,)).fetchone()
        return found is not None

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @contextmanager
    def inside(self) -> Generator[None, None, None]:
        """Bytes that arrive are worked on by the broker, not by whoever sends them."""
        if self.now is None:
            yield
            return
        with self.now.at_work():
            yield

    def stands(self) -> list[str]:
        """Where the broker's tasks wait, as file and line; nowhere when none runs."""
        if self.now is None or not self.now.alive:
            return []
        return sorted({place for task in self.now.tasks if not task.done() for place in _where(task)})

    def kill(self) -> list[str]:
        """SIGKILL. Returns where its tasks stood, as file and line."""
        incarnation = self.now
        if incarnation is None or not incarnation.alive:
            return []
        stood = self.stands()
        incarnation.alive = False
        self.close()
        assert incarnation.daemon is not None
        incarnation.daemon.context.store.die()
        for client in list(incarnation.clients):
            client.vanish()
        for task in list(incarnation.tasks):
            task.cancel()
        return stood

    async def terminate(self) -> None:
        """SIGTERM, until the process has ended."""
        incarnation = self.now
        if incarnation is None or not incarnation.alive or incarnation.main is None:
            return
        incarnation.stop.set()
        await asyncio.wait([incarnation.main])

    async def _live(self, incarnation: Incarnation) -> None:
        assert incarnation.daemon is not None
        error: BaseException | None = None
        try:
            await incarnation.daemon.run(incarnation.stop)
        except asyncio.CancelledError:
            pass
        except (BrokerError, BaseExceptionGroup) as trouble:
            error = trouble
        finally:
            if incarnation.alive:
                incarnation.alive = False
                for client in list(incarnation.clients):
                    client.vanish()
                self.ended(incarnation, error)

    def reload(self, content: Settings | SettingsError) -> None:
        """The file is changed, and the broker that runs gets SIGHUP. A mistake is gone by the next start."""
        if isinstance(content, Settings):
            self.settings = content
        if self.now is None or not self.now.alive or self.now.daemon is None:
            return
        self.now.mistake = content if isinstance(content, SettingsError) else None
        with self.now.at_work():
            self.now.daemon.reload()

    def _load(self, incarnation: Incarnation) -> Settings:
        if incarnation.mistake is not None:
            raise incarnation.mistake
        if incarnation.alive:
            self.in_force(self.settings)
        return self.settings

    def _providers(self, incarnation: Incarnation, wanted: Settings) -> Mapping[str, Sequence[Provider]]:
        if incarnation.provider is None:
            incarnation.provider = self._provider(incarnation)
        return dict.fromkeys(wanted.pool, (incarnation.provider,))

    def _provider(self, incarnation: Incarnation) -> Provider:
        def factory(manners: Manners) -> Any:
            return _Gated(self._factory(manners), incarnation, self._asked, self.answered)

        return Ec2Provider(
            self.settings.broker.id,
            self.settings.pool,
            region="us-east-1",
            profile=None,
            clock_wall=self._clock.wall,
            client_factory=factory,
        )


class _Gated:
    """A client's context manager with the gate in it."""

    def __init__(self, inner: Any, incarnation: Incarnation, asked: Asked, answered: Answered) -> None:
        self._inner, self._incarnation = inner, incarnation
        self._asked, self._answered = asked, answered

    async def __aenter__(self) -> Any:
        return _Gate(await self._inner.__aenter__(), self._incarnation, self._asked, self._answered)

    async def __aexit__(self, *details: Any) -> Any:
        return await self._inner.__aexit__(*details)


def _owned_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    task = asyncio.Task(coroutine, loop=loop, **options)
    owner = OWNER.get()
    if owner is not None:
        owner.tasks[task] = None
        task.add_done_callback(owner.ended)
        if not owner.alive:
            task.cancel()
    return task


def _where(task: asyncio.Task[Any]) -> Iterator[str]:
    """The lines of the broker's at which the task waits, one for each call that it is in."""
    coroutine = cast(Any, task.get_coro())
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None and "/broker/" in frame.f_code.co_filename:
            path = frame.f_code.co_filename.rpartition("/broker/")[2]
            if not path.startswith(("simulation/", "testing", "providers/sim")):
                yield f"{path}:{frame.f_lineno}"
        coroutine = getattr(coroutine, "cr_await", None)
