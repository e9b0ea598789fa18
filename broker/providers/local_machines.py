"""The cloud of the local provider: machines that are processes, on addresses of their own.

The process table is the truth about what runs, and a worker's environment says what it is, as tags do on a
cloud's machines; so whatever a crash interrupts, and even a lost record, is put right by the next look. All
of it blocks, for a few milliseconds; every public method holds the lock while it works.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from threading import Lock
from types import MappingProxyType

import psutil
from pydantic import ValidationError

from broker.core import tags
from broker.core.errors import (
    CloudError,
    InstanceNotFound,
    OfferingRefused,
    OrderMismatch,
    OrderSpent,
    PermanentRefusal,
)
from broker.core.model import Instance, InstanceState, Market, Order
from broker.providers import local_processes as processes
from broker.providers.local_addresses import free_address
from broker.providers.local_records import RECIPE, Recipe, Record, Records

REGION = INSTANCE_TYPE = "local"
VISIBLE_SECONDS = 60.0  # how long an ended machine is still listed, so that two scans see it
STOCK_WORKER = Path(__file__).with_name("local_worker.tcl")
STOCK_INTERPRETERS = ("tclsh", "tclsh8.6")
# Failures that pass by themselves or by somebody's tidying up: worth trying again in a while.
PASSING_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}
)


@dataclass(frozen=True, slots=True)
class Found:
    """A process whose environment says which machine it is."""

    pid: int
    environ: Mapping[str, str]


class LocalMachines:
    """Every machine of one broker on this host. `environ` is the broker's own environment."""

    def __init__(
        self, broker_id: str, directory: Path, clock_wall: Callable[[], float], environ: Mapping[str, str]
    ) -> None:
        self._broker_id = broker_id
        # Canonical, because a worker's environment names its leash file and is compared with it.
        self._records = Records(directory.expanduser().resolve())
        self._clock_wall = clock_wall
        self._environ = processes.plain_environ(environ)
        self._children: set[int] = set()  # started by this process, not reaped yet
        self._lock = Lock()

    def open(self) -> None:
        """Raises OSError when the directory cannot be used."""
        with self._lock:
            self._records.open()

    def launch(self, order: Order) -> Instance:
        """The machine of this order, started now unless it was before."""
        with self._lock:
            record = self._known(instance_id_of(order.id))
            if record is not None and record.parameters != order.parameters:
                raise OrderMismatch(f"{record.id} was ordered with other parameters")
            if record is None or (record.pid is None and record.ended_unix is None):
                return self._view(self._start(order))
            record = self._judged(record)
            if record.ended_unix is not None:
                raise OrderSpent(f"the local worker of this order has ended: {record.reason}")
            if record.terminate_asked:
                raise OrderSpent("the local worker of this order was told to end")
            return self._view(record)

    def listing(self) -> list[Instance]:
        """Every machine. Tells the running ones that their broker lives, and forgets those long ended."""
        with self._lock:
            found, views = self._scan(), []
            for instance_id in sorted({*self._records.ids(), *found}):
                record = self._known(instance_id, found)
                if record is None:
                    self._records.remove(instance_id)  # unreadable, and no process belongs to it
                elif self._is_ours(record) and self._is_kept(record := self._judged(record)):
                    self._look_after(record)
                    views.append(self._view(record))
            return views

    def describe(self, instance_ids: Iterable[str]) -> list[Instance]:
        with self._lock:
            known = [self._known(instance_id) for instance_id in instance_ids]
            return [self._view(self._judged(record)) for record in known if record and self._is_ours(record)]

    def terminate(self, instance_ids: Iterable[str]) -> list[str]:
        """Ask these machines to end. Returns those that have not ended yet: see `finish`."""
        with self._lock:
            return [instance_id for instance_id in instance_ids if self._ask_to_end(instance_id)]

    def finish(self, instance_id: str, *, kill: bool) -> bool:
        """Whether a machine that was asked to end has ended; with `kill` it is made to."""
        with self._lock:
            record = self._known(instance_id)
            if record is None or self._judged(record).ended_unix is not None:
                return True
            if kill and record.pid is not None:
                processes.signal_group(record.pid, signal.SIGKILL)
            return False

    def tag(self, instance_id: str, new_tags: Mapping[str, str]) -> None:
        with self._lock:
            record = self._known(instance_id)
            if record is None or not self._is_ours(record):
                raise InstanceNotFound(f"there is no local worker {instance_id}")
            self._records.write(replace(record, tags={**record.tags, **new_tags}))

    # --- starting ----------------------------------------------------------------------------------

    def _start(self, order: Order) -> Record:
        """Record, then process. In between, a crash leaves a record that the next listing puts right."""
        recipe = _recipe(order.parameters)
        argv = self._program(order.pool, recipe.command)
        record = self._recorded(order, recipe)
        log_file = self._records.log_file(record.id)
        try:
            pid = processes.spawn(
                self._filled_in(argv, record), self._worker_environ(record, recipe), log_file
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in a word
            with suppress(OSError):
                self._records.remove(record.id)
            raise _refusal(error, f"pool.{order.pool}.command: {argv[0]} cannot be started") from error
        self._children.add(pid)
        return self._started(record, pid)

    def _program(self, pool: str, command: tuple[str, ...]) -> list[str]:
        """The command's words, its program found. Raises PermanentRefusal that names the remedy."""
        path = self._environ["PATH"]
        if command:
            program = shutil.which(command[0], path=path)
            if program is None:
                raise PermanentRefusal(f"pool.{pool}.command: there is no program {command[0]} to start")
            return [program, *command[1:]]
        for name in STOCK_INTERPRETERS:
            if program := shutil.which(name, path=path):
                return [program, str(STOCK_WORKER)]
        raise PermanentRefusal(f"tclsh is not installed: apt install tcl, or set pool.{pool}.command")

    def _recorded(self, order: Order, recipe: Recipe) -> Record:
        instance_id = instance_id_of(order.id)
        try:
            taken = self._records.addresses_taken(besides=instance_id)
            address = free_address(order.id, recipe.port, taken)
            record = Record(
                instance_id,
                order.id,
                order.parameters,
                address,
                recipe.port,
                launched_unix=self._clock_wall(),
                tags=recipe.tags,
            )
            self._records.write(record)
        except OSError as error:
            raise _refusal(error, f"no local worker can be recorded in {self._records.directory}") from error
        return record

    def _filled_in(self, argv: Iterable[str], record: Record) -> list[str]:
        """The words with their placeholders filled in. Other braces stay: a word may be a Tcl script."""
        leash_file = str(self._records.leash_file(record.id))
        return [
            word.replace("{address}", record.address)
            .replace("{port}", str(record.port))
            .replace("{leash_file}", leash_file)
            for word in argv
        ]

    def _worker_environ(self, record: Record, recipe: Recipe) -> dict[str, str]:
        return {
            **self._environ,
            processes.INSTANCE: record.id,
            processes.PARAMETERS: record.parameters,
            processes.ADDRESS: record.address,
            processes.PORT: str(record.port),
            processes.LEASH_FILE: str(self._records.leash_file(record.id)),
            processes.LEASH_SECONDS: str(recipe.leash_seconds),
        }

    # --- looking -----------------------------------------------------------------------------------

    def _known(self, instance_id: str, found: Mapping[str, Found] | None = None) -> Record | None:
        """A machine's record, completed or replaced by what its process says of itself where it must be."""
        record = self._records.read(instance_id)
        if record is not None and (record.pid is not None or record.ended_unix is not None):
            return record
        process = (self._scan() if found is None else found).get(instance_id)
        if process is None:
            return record
        return self._started(record or _record_from(process), process.pid)

    def _scan(self) -> dict[str, Found]:
        """The processes of this user that run as machines of this directory."""
        found: dict[str, Found] = {}
        for pid in processes.session_leaders():
            process = Found(pid, processes.environ_of(pid))
            with suppress(KeyError, ValueError):  # no machine, or none of ours
                instance_id = _record_from(process).id
                if processes.belongs(process.environ, instance_id, self._records.leash_file(instance_id)):
                    found[instance_id] = process
        return found

    def _judged(self, record: Record) -> Record:
        """The record with its end noted, if its process has come to it."""
        if record.ended_unix is not None or self._is_running(record):
            return record
        pid = record.pid
        reason = "the broker stopped before it was started" if pid is None else self._buried(record, pid)
        if record.terminate_asked:
            reason = "terminated by the broker"
        return self._noted(replace(record, ended_unix=self._clock_wall(), reason=reason))

    def _buried(self, record: Record, pid: int) -> str:
        """End what the ended process left behind, and return how it ended and what it said last."""
        processes.kill_remains(pid, record.id, self._records.leash_file(record.id))
        how = processes.reap(pid) if pid in self._children else ""
        self._children.discard(pid)
        return ": ".join(part for part in (how or "ended", self._records.last_words(record.id)) if part)

    def _is_running(self, record: Record) -> bool:
        if record.pid is None or not processes.running(record.pid):
            return False
        return processes.started_at(record.pid, record.started_seconds) or processes.belongs(
            processes.environ_of(record.pid), record.id, self._records.leash_file(record.id)
        )

    def _is_ours(self, record: Record) -> bool:
        return tags.read(record.tags).broker == self._broker_id

    def _is_kept(self, record: Record) -> bool:
        """Forgets a machine that ended long ago. A clock that was set back must not keep it for ever."""
        if record.ended_unix is None or abs(self._clock_wall() - record.ended_unix) < VISIBLE_SECONDS:
            return True
        self._records.remove(record.id)
        return False

    def _look_after(self, record: Record) -> None:
        if record.ended_unix is None and not record.terminate_asked:
            self._records.touch(record.id)
            with suppress(OSError):  # a log nobody can trim is no reason not to see the machine
                self._records.trim_log(record.id)

    def _view(self, record: Record) -> Instance:
        state = _state(record)
        return Instance(
            record.id,
            state,
            None if state is InstanceState.TERMINATED else record.address,
            INSTANCE_TYPE,
            REGION,
            market=Market.ON_DEMAND,
            cores=os.cpu_count(),
            launched_unix=record.launched_unix,
            tags=MappingProxyType(dict(record.tags)),
            reason=record.reason,
        )

    # --- noting ------------------------------------------------------------------------------------

    def _started(self, record: Record, pid: int) -> Record:
        return self._noted(replace(record, pid=pid, started_seconds=processes.started_seconds(pid) or 0.0))

    def _noted(self, record: Record) -> Record:
        """Write down what the process table shows. It shows it again, so a full disk does no harm here."""
        with suppress(OSError):
            self._records.write(record)
        return record

    def _ask_to_end(self, instance_id: str) -> bool:
        """Whether there is something to wait for."""
        record = self._known(instance_id)
        if record is None or not self._is_ours(record):
            return False
        record = self._judged(record)
        if record.ended_unix is not None or record.pid is None:
            return False
        self._noted(replace(record, terminate_asked=True))
        processes.signal_group(record.pid, signal.SIGTERM)
        return True


def instance_id_of(order_id: str) -> str:
    """The one machine that an order can have."""
    return "local-" + sha256(order_id.encode()).hexdigest()[:17]


def _recipe(parameters: str) -> Recipe:
    try:
        return RECIPE.validate_json(parameters)
    except ValidationError as error:
        raise PermanentRefusal("this order was not written by the local provider") from error


def _record_from(process: Found) -> Record:
    """A lost record, from what its process says of itself. Raises KeyError, ValueError for a stranger."""
    environ = process.environ
    recipe = RECIPE.validate_json(environ[processes.PARAMETERS])
    order_id = tags.read(recipe.tags).order
    launched_unix = (processes.started_seconds(process.pid) or 0.0) + psutil.boot_time()
    return Record(
        instance_id_of(order_id),
        order_id,
        environ[processes.PARAMETERS],
        environ[processes.ADDRESS],
        recipe.port,
        launched_unix,
        tags=recipe.tags,
    )


def _state(record: Record) -> InstanceState:
    if record.ended_unix is not None:
        return InstanceState.TERMINATED
    return InstanceState.SHUTTING_DOWN if record.terminate_asked else InstanceState.RUNNING


def _refusal(error: OSError | ValueError, what: str) -> CloudError:
    number = error.errno if isinstance(error, OSError) else None
    cause = os.strerror(number) if number else str(error)
    return (OfferingRefused if number in PASSING_ERRNOS else PermanentRefusal)(f"{what}: {cause}")
