"""Counts what really happened, scene by scene, so that nobody believes in a test that never took place.

Looks and listens; nothing here changes the course of a history. Where a scene is about what the broker knew
at a moment (was that worker held? was that listing its first?) it looks into the broker that runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from broker.core.model import Event, LeaseEnded, Worker, WorkerChanged, WorkerState
from broker.core.policy import Reason
from broker.daemon import Daemon
from broker.providers.sim_calls import LAUNCHES
from broker.providers.sim_machine import Machine
from broker.providers.sim_weather import Fault
from broker.providers.simulated import SimEC2
from broker.simulation.referee import Referee

LONG_OUTAGE_SECONDS = 8 * 3600.0
ELSEWHERE_SECONDS = 600.0  # an order of another offering so soon after a failed one is a second try
CONNECTION_CLOSED = "connection closed"  # why the service ends a lease that was bound to it
REAPING_SECONDS = 1.0  # "the instant in which the reaper decides"

# Faults that are a scene by themselves, whatever the broker was doing.
PLAIN = {
    Fault.REBALANCE: "rebalance recommended",
    Fault.NOTICE_DUPLICATED: "notice duplicated",
    Fault.RECLAIMED_UNANNOUNCED: "reclaimed without notice",
    Fault.ADDRESS_LATE: "running without an address",
    Fault.ADDRESS_NEVER: "running without an address",
    Fault.STUCK_PENDING: "stuck pending",
    Fault.STUCK_SHUTTING_DOWN: "stuck shutting-down",
    Fault.STUCK_STOPPING: "stuck stopping",
    Fault.TERMINATE_IGNORED: "terminate ignored",
    Fault.STRANGER: "stranger",
    Fault.CREDENTIALS_EXPIRED: "credentials expired",
    Fault.CLOCK_SKEWED: "clock skewed",
    Fault.PAGE_FAILED: "later page failed",
    Fault.FLEET_PARTIAL: "fleet partial",
    Fault.FLEET_SURPLUS: "fleet surplus",
    Fault.BOUGHT_ON_DEMAND: "sold on the wrong market",
}
QUOTAS = {"MaxSpotInstanceCountExceeded", "VcpuLimitExceeded"}
OUTDATED = {Fault.STALE, Fault.LISTING_SHORT, Fault.HIDDEN, Fault.FLICKER}
BROKEN_CALLS = {Fault.REQUEST_LOST, Fault.ANSWER_LOST, Fault.SERVER_ERROR, Fault.THROTTLED}
THROTTLES = {Fault.THROTTLED, Fault.BUCKET_EMPTY, Fault.LAUNCH_OUTAGE}
THROTTLED = {
    "RunInstances": "launch throttled",
    "CreateFleet": "launch throttled",
    "throttled": "launch throttled",  # by a launch outage
    "TerminateInstances": "terminate throttled",
}
TOLD = {f"fault: {fault}": fault for fault in Fault}


class Witness:
    """See the module. `daemon` is the broker that runs now, None while none does."""

    def __init__(self, sky: SimEC2, referee: Referee, daemon: Callable[[], Daemon | None]) -> None:
        self.seen: Counter[str] = Counter()
        self.asking = 0  # clients that wait for a worker at the moment
        self._sky, self._referee, self._daemon = sky, referee, daemon
        self._failed: tuple[float, str] = (
            float("-inf"),
            "",
        )  # when an order came to nothing, and of what kind
        self._batch = 0  # how many machines the last Terminate named
        self._opened = 0

    def saw(self, scene: str) -> None:
        self.seen[scene] += 1

    # --- the cloud -------------------------------------------------------------------------------------

    def cloud_reported(self, at: float, what: str, details: str) -> None:
        fault = TOLD.get(what)
        if fault is not None:
            self._fault(at, fault, details)
        elif what == "begins: outage" and float(details.split()[1]) >= LONG_OUTAGE_SECONDS:
            self.saw("outage of 8 hours")
        elif what == "TerminateInstances" and self._batch > 1 and "InvalidInstanceID.NotFound" in details:
            self.saw("terminate batch with an unknown id")

    def _fault(self, at: float, fault: Fault, details: str) -> None:
        if fault in PLAIN:
            self.saw(PLAIN[fault])
        if fault in OUTDATED:
            self._outdated(at, fault, details)
        if details == "DescribeInstances" and fault in BROKEN_CALLS:
            self.saw("listing failed")
        elif details in LAUNCHES and fault is Fault.ANSWER_LOST:
            self.saw("launch answer lost")
        if fault in THROTTLES and details in THROTTLED:
            self.saw(THROTTLED[details])
        if fault is Fault.REFUSED and details == "InsufficientInstanceCapacity":
            self.saw("no capacity")
        if fault is Fault.REFUSED and details in QUOTAS:
            self.saw("quota refused")

    def _outdated(self, at: float, fault: Fault, details: str) -> None:
        daemon = self._daemon()
        if daemon is not None and not daemon.context.clouds.recovered():
            self.saw("outdated listing at the start")
        if fault is Fault.LISTING_SHORT and self._referee.held(self._sky.machine(details), at):
            self.saw("busy worker not listed")
        if fault in (Fault.HIDDEN, Fault.FLICKER):
            self.saw("new machine not listed")

    # --- the broker ------------------------------------------------------------------------------------

    def broker_called(self, at: float, method: str, parameters: Any) -> None:
        """A call leaves the broker."""
        if method == "terminate_instances":
            self._batch = len(parameters["InstanceIds"])
        elif method in ("run_instances", "create_fleet"):
            failed_at, kind = self._failed
            others = set(_types_in(parameters)) - {kind}
            if at - failed_at <= ELSEWHERE_SECONDS and kind and others:
                self.saw("launched elsewhere after a failure")
                self._failed = (float("-inf"), "")

    def broker_told(self, event: Event) -> None:
        if isinstance(event, LeaseEnded) and event.reason == CONNECTION_CLOSED:
            self.saw("lease ended with its connection")
        if not isinstance(event, WorkerChanged):
            return
        worker, before = event.worker, event.before
        if before is WorkerState.ORDERED and worker.state is WorkerState.GONE:
            self._failed = (event.at, worker.offering.instance_type)
        if worker.state is WorkerState.DRAINING and worker.reason == Reason.REPLACED:
            self.saw("went back to spot")
        self._stock_changed(before, worker)
        if before is WorkerState.READY and worker.state is WorkerState.SUSPECT and self.asking:
            self.saw("port silent as somebody asks")
        daemon = self._daemon()
        if daemon is not None:
            opened = daemon.context.guard(worker.pool).opened
            if opened > self._opened:
                self.saw("breaker opened")
            self._opened = opened

    def _stock_changed(self, before: WorkerState | None, worker: Worker) -> None:
        match before, worker.state:
            case WorkerState.STOPPING, WorkerState.STOPPED:
                self.saw("kept stopped")
            case WorkerState.STOPPING, WorkerState.DRAINING if worker.reason == Reason.NOT_STOPPED:
                self.saw("stop failed")
            case None, WorkerState.STOPPED:
                self.saw("found stopped")
            case WorkerState.BOOTING, WorkerState.STOPPED:
                self.saw("start came to nothing")
            case WorkerState.BOOTING, WorkerState.READY if worker.started_at is not None:
                self.saw("started again")
            case _:
                pass

    def killed(self, daemon: Daemon, alive: list[Machine]) -> None:
        """SIGKILL is about to hit this broker."""
        self.saw("killed")
        unresolved = {entry.order.id for entry in daemon.orders.unresolved()}
        if unresolved:
            self.saw("killed in mid-launch")
        if any(machine.token in unresolved for machine in alive):
            self.saw("killed right after a launch")
        if daemon.context.registry.lease_count("default"):
            self.saw("killed with leases")

    def stopping(self, daemon: Daemon) -> None:
        """SIGTERM is about to reach this broker."""
        self.saw("stopped")
        if daemon.launch.in_flight:
            self.saw("stopped in mid-launch")

    # --- the clients -----------------------------------------------------------------------------------

    def asked(self, at: float) -> None:
        """A client asks for a worker: is one just being reaped?"""
        daemon = self._daemon()
        if daemon is None:
            return
        registry = daemon.context.registry
        for worker in registry.in_state(WorkerState.READY, WorkerState.DRAINING):
            idle_at = registry.used_at(worker.id) + daemon.context.pool(worker.pool).idle_timeout
            moment_at = idle_at if worker.state is WorkerState.READY else worker.since_at
            if abs(at - moment_at) <= REAPING_SECONDS and not registry.busy(worker.id):
                self.saw("asked as the reaper decides")
                return


def _types_in(parameters: Any) -> list[str]:
    """The machine types that a launch call names."""
    if "InstanceType" in parameters:
        return [str(parameters["InstanceType"])]
    return [
        str(override["InstanceType"])
        for config in parameters["LaunchTemplateConfigs"]
        for override in config["Overrides"]
    ]
