"""What all who play in one history share: the clock, the cloud, the host, who watches, and the transcript."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from broker.core.model import Event, WorkerChanged, WorkerState
from broker.daemon import Daemon
from broker.providers.sim_machine import Machine
from broker.providers.simulated import BROKER, SimEC2
from broker.simulation.history import HOUR_SECONDS, History
from broker.simulation.host import Host, Incarnation
from broker.simulation.referee import Referee, Violation
from broker.simulation.witness import Witness
from broker.testing import EPOCH_UNIX, LoopClock


class World:
    """See the module."""

    def __init__(self, history: History, directory: Path, tracing: bool) -> None:
        self.history = history
        self.directory = directory
        self.pool = history.settings.pool["default"]
        self.loop = asyncio.get_running_loop()
        self.clock = LoopClock(self.loop)
        self.closing_at = history.hours * HOUR_SECONDS  # then all is healed, and everybody goes home
        self.trace: list[str] = []
        self.tracing = tracing
        self.referee = Referee(self.pool, self._accused)
        self.sky = SimEC2(
            random.Random(history.seed),  # noqa: S311
            self.loop.time,
            lambda: EPOCH_UNIX + self.loop.time(),
            history.weather,
        )
        self.witness = Witness(self.sky, self.referee, self.daemon)
        self.host = Host(
            history.settings,
            directory,
            self.clock,
            self.sky.client_factory,
            self.sky.connect,
            heard=self._heard,
            asked=self._asked,
        )
        self.sky.listen(self._cloud_reports)

    @property
    def now(self) -> float:
        return self.loop.time()

    def say(self, text: str, at: float | None = None) -> None:
        """A line of the transcript: the same at every replay, so without the scratch directory's name."""
        if self.tracing:
            text = text.replace(str(self.directory), "(state)")
            self.trace.append(f"{self.now if at is None else at:12.3f}  {text}")

    async def until(self, at: float) -> None:
        await asyncio.sleep(max(0.0, at - self.now))

    # --- the broker that runs ------------------------------------------------------------------------

    @property
    def running(self) -> Incarnation | None:
        incarnation = self.host.now
        return incarnation if incarnation is not None and incarnation.alive else None

    def daemon(self) -> Daemon | None:
        incarnation = self.running
        return incarnation.daemon if incarnation is not None else None

    # --- the truth -----------------------------------------------------------------------------------

    def ours(self) -> list[Machine]:
        """The machines of this broker that have not begun to end."""
        return self.sky.alive()

    def whose(self, address: str) -> Machine | None:
        """Whose an address is, or was until a moment ago: the proof of readiness may be that old."""
        recent = [t for t in self.sky.tenures(address) if self.now - t.until_at <= self.referee.proof_seconds]
        return recent[-1].machine if recent else None

    def check_books(self) -> None:
        """Is every machine of ours explained? Asked whenever that may have changed."""
        daemon = self.daemon()
        if daemon is None or not daemon.context.clouds.recovered():
            return
        registry, orders = daemon.context.registry, daemon.orders

        def explains(machine: Machine) -> bool:
            return registry.by_instance(machine.id) is not None or orders.get(machine.token) is not None

        self.referee.known(self.now, self.ours(), explains)

    # --- who listens -----------------------------------------------------------------------------------

    def _cloud_reports(self, at: float, what: str, details: str) -> None:
        if self.tracing:
            self.say(f"cloud: {what} {details}".rstrip(), at)
        self.witness.cloud_reported(at, what, details)
        if what == "shutting down":
            machine = self.sky.machine(details.partition(" ")[0])
            if machine.ended_by == BROKER:
                self.referee.terminated(at, machine)
        elif what == "launched":
            self.referee.counted(at, self.ours())
            self.check_books()

    def _asked(self, method: str, parameters: Any) -> None:
        """A call leaves the broker."""
        self.witness.broker_called(self.now, method, parameters)
        if method == "run_instances":
            token = parameters["ClientToken"]
            self.referee.launched(self.now, token, self.host.on_disk(token))

    def _heard(self, event: Event) -> None:
        """The broker's books have changed."""
        self.witness.broker_told(event)
        if not isinstance(event, WorkerChanged):
            return
        if event.worker.state is WorkerState.ORDERED:
            self.referee.placed(self.now, event.worker.id)
        if self.tracing:
            worker = event.worker
            reason = f" ({worker.reason})" if worker.reason else ""
            self.say(f"broker: {worker.id} {worker.instance_id or ''} {worker.state}{reason}")
        if event.worker.state is WorkerState.GONE:
            # Not at once: books may be in the middle of a change of which this event is a part.
            self.loop.call_soon(self.check_books)

    def _accused(self, violation: Violation) -> None:
        self.say(f"VIOLATION: {violation}", violation.at)
