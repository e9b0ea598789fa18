"""The HTTP side: /metrics for Prometheus, /healthz and /readyz for whoever watches the daemon."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from broker.context import Context
from broker.loops.runner import LoopRunner
from broker.web.metrics import Metrics

SCAN_AGE_FACTOR_MAX = 5.0  # a scan may fail a few times in a row before somebody should be woken
SCAN_AGE_SECONDS_MIN = 120.0

INDEX = """compute-broker

/metrics   for Prometheus
/healthz   200 while every loop is alive and the cloud was scanned of late, else 503 with the reasons; it also
           says which settings of the file are not in force
/readyz    200 once workers can be handed out, else 503 with the reason, such as: another broker is in charge
"""


class Health:
    """What is wrong with the daemon at the moment, in sentences."""

    def __init__(self, context: Context, runners: Sequence[LoopRunner]) -> None:
        self._context = context
        self._runners = runners
        self._started_at = context.now()

    def problems(self) -> list[str]:
        """Why /healthz is red: stuck or failing loops, and scans that are too old."""
        found = [f"the {runner.name} loop is stuck" for runner in self._runners if runner.stuck()]
        found += [
            f"the {r.name} loop failed {r.failures} times in a row" for r in self._runners if r.failures >= 3
        ]
        interval = self._context.settings.broker.reconcile_interval
        age_max = max(SCAN_AGE_SECONDS_MIN, SCAN_AGE_FACTOR_MAX * interval)
        for cloud in self._context.clouds.all:
            age_seconds = self._context.now() - (cloud.scanned_at or max(self._started_at, cloud.added_at))
            if age_seconds > age_max:
                reason = f": {cloud.error.message}" if cloud.error else ""
                found.append(f"{cloud.provider.name} was last scanned {age_seconds:.0f} s ago{reason}")
        return found

    def notes(self) -> list[str]:
        """What an operator should know although the broker is well: settings that are not in force. It is no
        reason for /healthz to be red: a restart with a broken file would only make it worse."""
        return list(self._context.outdated)

    def not_ready(self) -> list[str]:
        """Why /readyz is red. Not /healthz: a broker that stands by is well, and nobody shall restart it."""
        unscanned = [
            f"{cloud.provider.name} has not been scanned yet"
            + (f": {cloud.error.message}" if cloud.error else "")
            for cloud in ([] if self._context.clouds.serving() else self._context.clouds.awaited())
        ]
        return unscanned + [error.message for error in self._context.clouds.read_only()]


def make_app(metrics: Metrics, health: Health) -> web.Application:
    """The application, ready for a runner."""

    async def index(request: web.Request) -> web.Response:
        return web.Response(text=INDEX)

    async def show_metrics(request: web.Request) -> web.Response:
        body = generate_latest(metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(request: web.Request) -> web.Response:
        return _verdict(health.problems(), health.notes())

    async def readyz(request: web.Request) -> web.Response:
        return _verdict(health.not_ready())

    app = web.Application()
    app.add_routes(
        [
            web.get("/", index),
            web.get("/metrics", show_metrics),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
        ]
    )
    return app


def _verdict(problems: list[str], notes: Sequence[str] = ()) -> web.Response:
    if problems:
        return web.Response(status=503, text="\n".join([*problems, *notes]) + "\n")
    return web.Response(text="\n".join(["ok", *notes]) + "\n")
