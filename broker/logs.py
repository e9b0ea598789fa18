"""Logging: one event a line, JSON unless somebody is looking; ids and reasons on every action.

`EventLog` is an observer: the code that does things does not speak of logging. PING and warm hand-outs are
counted, not logged: there may be thousands of them a second.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog

from broker.core.model import (
    Event,
    LeaseEnded,
    LeaseGranted,
    ProtectionChanged,
    Worker,
    WorkerChanged,
    WorkerSeen,
    WorkerState,
)

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
Log = structlog.typing.FilteringBoundLogger


class Threshold:
    """The first processor: what is below the level ends here. The level can change while loggers are in use,
    which keep for good what structlog makes of the level that it is configured with."""

    level = logging.INFO

    def __call__(self, logger: Any, method: str, event: Any) -> Any:
        if LEVELS.get(method, logging.ERROR) < self.level:
            raise structlog.DropEvent
        return event


THRESHOLD = Threshold()


class LenientStderr:
    """Where lines go. What cannot be written (a full disk, a closed pipe) is lost, and the broker goes on."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


def configure(level: str, log_format: str) -> None:
    """Send everything, libraries included, to stderr. `log_format`: auto, json or console."""
    terminal = sys.stderr.isatty()
    console = log_format == "console" or (log_format == "auto" and terminal)
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[structlog.typing.Processor] = (
        [  # structlog's own tracebacks show local variables, and those may be credentials
            structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)
        ]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(  # ours go straight to stderr: through `logging` a line costs three times as much
        processors=[THRESHOLD, *shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, LenientStderr())),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)


def set_level(level: str) -> None:
    """From now on: debug, info, warning or error."""
    THRESHOLD.level = LEVELS[level]
    logging.getLogger().setLevel(LEVELS[level])
    for chatty in ("aiohttp.access", "botocore", "aiobotocore", "urllib3", "asyncio"):
        logging.getLogger(chatty).setLevel(max(LEVELS[level], logging.WARNING))


class EventLog:
    """Writes what happens to workers and leases."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def heard(self, event: Event) -> None:
        match event:
            case WorkerChanged(worker=worker, before=before):
                known = {"before": str(before)} if before else {}
                self._level(worker)(f"worker {worker.state}", **_who(worker), **known)
            case WorkerSeen(worker=worker):
                self._log.debug("worker seen", **_who(worker), running=worker.running)
            case ProtectionChanged(worker=worker):
                change = "protected" if worker.protected else "not protected any more"
                self._log.info(f"worker {change}", **_who(worker))
            case LeaseGranted(lease=lease, worker=worker):
                self._log.info("lease granted", lease=lease.id, client=lease.client, **_who(worker))
            case LeaseEnded(lease=lease, worker=worker, reason=reason):
                self._log.info("lease ended", lease=lease.id, client=lease.client, why=reason, **_who(worker))

    def _level(self, worker: Worker) -> Any:
        return self._log.warning if worker.state is WorkerState.SUSPECT else self._log.info


def _who(worker: Worker) -> dict[str, str]:
    values = {
        "worker": worker.id,
        "pool": worker.pool,
        "instance": worker.instance_id,
        "ip": worker.address,
        "type": worker.offering.instance_type,
        "reason": worker.reason,
        "protected": "yes" if worker.protected else "",
    }
    return {key: value for key, value in values.items() if value}


def get_logger(**bound: str) -> Log:
    """A logger that adds `bound` to every line."""
    log: Log = structlog.get_logger().bind(**bound)
    return log
