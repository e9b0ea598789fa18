"""The composition root: wires everything, starts it, stops it. Nothing else knows everything.

Start: settings, the store and its lock, the providers, the sockets, the loops. Clients may connect at once;
what they ask for waits for the first complete scan of the cloud, and READY=1 goes out after it.
Stop: no new connections, answers for whom there is one, the answers of launches under way; workers live on.
"""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from aiohttp import web

from broker import installation, systemd
from broker.clock import Clock, moment
from broker.clouds import Cloud, Clouds
from broker.context import Context
from broker.core.errors import BrokerError, CloudUnreachable, SettingsError, StoreError
from broker.core.life import COUNTED
from broker.core.model import (
    Event,
    InstanceState,
    LeaseGranted,
    ProtectionChanged,
    WorkerChanged,
    WorkerSeen,
    WorkerState,
)
from broker.core.money import USD_MICROS
from broker.core.policy import HOUR_SECONDS
from broker.core.registry import Registry
from broker.core.settings import BrokerSettings, Settings, require_private, split_address
from broker.ledger import Ledger
from broker.limits import UseLimit
from broker.logs import EventLog, Log
from broker.loops.beat import BeatLoop
from broker.loops.launch import LaunchLoop
from broker.loops.pending import PendingLoop
from broker.loops.prices import PricesLoop
from broker.loops.probe import Connect, ProbeLoop, connects
from broker.loops.reap import ReapLoop
from broker.loops.reconcile import ReconcileLoop
from broker.loops.reload import Reloaded, ReloadLoop
from broker.loops.runner import LoopRunner
from broker.loops.stock import StockLoop
from broker.loops.tagging import TaggingLoop
from broker.memory import Memory
from broker.metering import Meter
from broker.opening import open_provider
from broker.orders import Orders
from broker.overview import Overview
from broker.places import PLACES, MakeProviders, make_providers, read_places, with_places
from broker.prospects import Prospects
from broker.providers.base import Provider
from broker.server import Server
from broker.service import Service
from broker.store import Store
from broker.web.app import Health, make_app
from broker.web.metrics import CommandStats, Metrics

OPEN_SECONDS_MAX = 5.0  # at the start, for each cloud: one that is silent must not keep the ports closed
ANSWER_SECONDS_MAX = 5.0  # at shutdown, for commands that have their answer already
SETTLE_SECONDS_MAX = (
    20.0  # at shutdown, for launch calls under way: an answer that is read is an order resolved
)
FILES_SPARE = 256  # file descriptors that are not client connections: the store, the cloud, probes, logs


class Daemon:
    """One broker. `run` is its whole life."""

    def __init__(
        self,
        settings: Settings,
        *,
        state_dir: Path,
        clock: Clock,
        log: Log,
        environ: Mapping[str, str],
        providers: MakeProviders = make_providers,
        connect: Connect = connects,
        store_threaded: bool = True,
        ports: bool = True,
        new_id: Callable[[], str] = lambda: secrets.token_hex(12),
        owner_of: Callable[[Path], str | None] = installation.owner_of,
        load: Callable[[], Settings] | None = None,
        log_at: Callable[[str], None] = lambda level: None,
    ) -> None:
        """`load` reads the settings again; without it a reload finds the same. `log_at` changes the level."""
        self.clock = clock
        self._load, self._log_at, self._make_providers = load or (lambda: settings), log_at, providers
        self._log = log
        self._notifier = systemd.Notifier(environ, lambda problem: log.warning(problem))
        self._environ = environ
        self._state_dir = state_dir
        self._owner_of = owner_of
        self._ports = ports  # False: no sockets at all; connections are made by `server.connect`
        self._sockets = _activated(environ, settings.broker)
        self._observers: list[Callable[[Event], None]] = []
        registry = Registry(
            self._publish,
            seats=lambda pool: self.context.pool(pool).leases_per_worker_max,
            uses_max=lambda pool: self.context.pool(pool).uses_max,
        )
        store = Store(state_dir, threaded=store_threaded, report=lambda text: log.error("store", error=text))
        clouds = Clouds(providers(settings, state_dir, clock, self._cloud_called, ()))
        self.context = Context(settings, registry, clouds, store, clock)
        self.orders = Orders(self.context)
        self.ledger = Ledger(self.context, settings.broker.id)
        self.memory = Memory(self.context)
        self.context.loaded_unix = clock.wall()
        self._wire(connect, new_id)

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self.context.settings

    def reload(self) -> None:
        """Read the settings again, soon: what SIGHUP asks for."""
        self._reloading.ask()

    @property
    def reloading(self) -> bool:
        """Whether a reload is asked for or under way."""
        return self._reloading.busy

    def _wire(self, connect: Connect, new_id: Callable[[], str]) -> None:
        context, report = self.context, self._report
        wake_launch, wake_reap = (lambda: self._wake("launch")), (lambda: self._wake("reap"))
        self.stock = StockLoop(context, report, wake=lambda: self._wake("stock"), changed=self._look_closely)
        self.launch = LaunchLoop(
            context,
            self.orders,
            self.ledger,
            new_order_id=lambda: f"cb-{new_id()}",
            wake=wake_launch,
            startable=self.stock.startable,
        )
        self.probe = ProbeLoop(context, lambda: self._wake("probe"), connect)
        self.reap = ReapLoop(context, report, terminated=self._look_closely)
        self.reconcile = ReconcileLoop(
            context,
            self.orders,
            self.ledger,
            broker_id=self.settings.broker.id,
            report=report,
            changed=self._scanned,
            beat=self._beat,
            charged=self._charged,
        )
        prospects = Prospects(context)
        self.service = Service(
            context,
            prove=self.probe.prove,
            scan=self.reconcile.scan,
            demand=self._demanded,
            reap=wake_reap,
            pending=lambda: self.pending.came(),
            prospects=prospects,
            new_id=lambda: f"lease-{new_id()}",
            pools=Overview(context, self.ledger).pools,
        )
        self.pending = PendingLoop(
            context, prospects, serve=self.service.serve_groups, wake=lambda: self._wake("pending")
        )
        commands = CommandStats()
        self.server = Server(
            self.service,
            self.settings.broker,
            self.clock,
            commands.record,
            self._command_failed,
            wake=lambda: self._wake("sweep"),
        )
        self._claims = BeatLoop(context, report)
        self._reloading = ReloadLoop(
            context,
            self.ledger,
            load=self._load,
            providers=self._providers,
            applied=self._reloaded,
            refused=self._reload_refused,
            prove=self.probe.prove,
            idle=self.reconcile.between_scans,
            report=report,
            wake=lambda: self._wake("reload"),
            wake_reap=wake_reap,
        )
        loops = (
            self._reloading,
            self.reconcile,
            self.probe,
            self.reap,
            self.stock,
            self.launch,
            TaggingLoop(context, report),
            PricesLoop(context, report, heard=lambda: self._wake("launch")),
            self._claims,
            self.server,
            self.pending,
        )
        self.runners = {loop.name: LoopRunner(loop, self.clock, self._loop_failed) for loop in loops}
        self.health = Health(context, list(self.runners.values()))
        self.meter = Meter()
        self.metrics = Metrics(
            context, self.meter, self.ledger, commands, lambda: len(self.server.connections)
        )
        self._observers += [
            EventLog(self._log).heard,
            self.meter.heard,
            self.metrics.heard,
            self.memory.heard,
            self.launch.top_up.heard,
            self.stock.heard,
            prospects.boots.heard,
            self.orders.heard,
            self.probe.heard,
            self._reloading.heard,
            self._wake_heard,
            self.service.heard,  # it may change the books, and the others shall hear that afterwards
            UseLimit(context, wake_reap).heard,  # so may this
        ]

    def observe(self, observer: Callable[[Event], None]) -> None:
        """Have somebody more hear every event, before the service acts on it."""
        self._observers.insert(0, observer)

    # --- life ----------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event, *, listening: Callable[[], None] = lambda: None) -> None:
        """Live until `stop` is set. `listening` is called once the ports are open.

        Raises SettingsError (a pool cannot work as configured), StoreError, OSError (a port is taken).
        """
        self.context.store.open()
        id_locks = self._take_ids() if self._ports else []
        try:
            self.context.owner = await self._find_owner()
            self._look_at_left_places()
            self._remember()
            await self._reloading.remember_places()
            await self._open_providers()
            self._say_what_is_assumed()
            async with asyncio.TaskGroup() as tasks:
                web_runner = await self._listen() if self._ports else None
                listening()
                background = [tasks.create_task(runner.run()) for runner in self.runners.values()]
                background.append(tasks.create_task(self._announce()))
                await stop.wait()
                await self._shut_down(web_runner)
                for task in background:
                    task.cancel()
        finally:
            for cloud in self.context.clouds.all:
                await cloud.provider.close()
            await self.context.store.settle()
            self.context.store.close()
            for lock in id_locks:
                lock.close()

    def _take_ids(self) -> list[socket.socket]:
        """The broker id, held at each place while this process lives: two brokers with one id end each
        other's workers.

        Two at one cloud on one machine, that is; between two machines the claims decide (core/claim.py).
        """
        pools = [one for pool in self.settings.pool.values() for one in pool.by_region]
        places = {(one.region or "", one.profile or "") for one in pools if one.provider == "ec2"}
        locks: list[socket.socket] = []
        for place in sorted(places) if sys.platform.startswith("linux") else ():
            where = (self.settings.broker.id, self._environ.get("AWS_ENDPOINT_URL", ""), place)
            locks.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                locks[-1].bind(f"\0compute-broker:{sha256(repr(where).encode()).hexdigest()}")
            except OSError:
                for lock in locks:
                    lock.close()
                self.context.store.close()
                raise StoreError(
                    f"another broker with id '{self.settings.broker.id}' runs on this machine: "
                    "stop it first, or give this one its own id"
                ) from None
        return locks

    async def _find_owner(self) -> str:
        """The same at every start of this installation. Raises StoreError."""
        owner = self._owner_of(self._state_dir) or self.context.store.kept("owner")
        if owner is None:
            owner = secrets.token_hex(installation.OWNER_CHARS // 2)
            await self.context.store.keep("owner", owner)
        return owner

    def _remember(self) -> None:
        """Open orders, leases and launch attempts of an earlier run."""
        now = moment(self.clock)
        for pool, ago_seconds in self.context.store.attempts(now, HOUR_SECONDS):
            self.context.guard(pool).attempted(now.at - ago_seconds)
        for order in self.context.store.open_orders():
            self.orders.reopen(order)
            self.context.reopened.add(order.id)
        self.context.known_orders |= self.context.store.order_counts()
        self.context.ended |= self.context.store.ended()
        self.context.epoch = int(self.context.store.kept("epoch") or 0)
        for launched in self.context.store.launched_orders(now):
            self.context.expected[launched.instance_id] = launched
        for stored in self.context.store.leases():
            self.context.stored_leases.setdefault(stored.instance_id, []).append(stored)
        self.ledger.recall()
        self.memory.recall()

    def _look_at_left_places(self) -> None:
        """No pool of the file buys there any more, and an earlier run may have left machines."""
        places = read_places(self.context.store.kept(PLACES))
        by_pool = self._providers(with_places(self.settings, places)) if places else {}
        for name, providers in by_pool.items():
            if name not in self.settings.pool:
                self.context.clouds.join(providers[0])
        self._reloading.left_before()

    async def _open_providers(self) -> None:
        """Find out now what a person has to mend; what only the cloud can mend is tried again later."""
        for cloud in self.context.clouds.all:
            try:
                async with asyncio.timeout(OPEN_SECONDS_MAX):
                    await self._open(cloud)
            except SettingsError:
                raise
            except (TimeoutError, BrokerError) as error:
                silence = CloudUnreachable(f"no answer within {OPEN_SECONDS_MAX:g} s")
                cloud.scan_failed(error if isinstance(error, BrokerError) else silence)
                self._report(
                    "cloud not reached yet", {"cloud": cloud.provider.name, "error": str(cloud.error)}
                )

    async def _open(self, cloud: Cloud) -> None:
        try:
            await open_provider(self.context, cloud)
        except SettingsError as error:
            if cloud in self.context.clouds.idle():  # nothing is bought there: it must not keep others down
                cloud.scan_failed(error)
                self._report("cloud not reached", {"cloud": cloud.provider.name, "error": error.message})
                return
            await self._accept_mistake(cloud, error)
        else:
            cloud.opened = True

    async def _accept_mistake(self, cloud: Cloud, mistake: SettingsError) -> None:
        """Settings that cannot work end the start, unless machines are running: somebody has to end those."""
        try:
            listing = await cloud.provider.listing()
        except BrokerError:
            raise mistake from None
        if all(
            instance.state in (InstanceState.TERMINATED, InstanceState.SHUTTING_DOWN) for instance in listing
        ):
            raise mistake
        cloud.opened, cloud.mistake = True, mistake
        self._log.error(
            "the settings do not work: nothing is launched, running machines are looked after",
            cloud=cloud.provider.name,
            problems=mistake.problems,
            machines=len(listing),
        )

    def _say_what_is_assumed(self, pools: Collection[str] | None = None) -> None:
        """Once a pool, and when it has changed: costs and budgets go by prices that nobody has set."""
        for name in self.settings.pool if pools is None else pools:
            prices = {
                o.instance_type: o.price_usd_micros_per_hour / USD_MICROS
                for o in self.context.offerings(name)
                if o.price_assumed
            }
            if prices:
                self._log.warning(
                    "no price_usd_per_hour is set: on-demand list prices are assumed",
                    pool=name,
                    prices=prices,
                )

    async def _listen(self) -> web.AppRunner:
        settings = self.settings.broker
        if settings.insecure_listen:
            self._log.warning(
                "INSECURE: whoever reaches these ports can spend your money; a firewall must decide who does",
                listen=settings.listen,
                http=settings.http,
            )
        self.server.connections_max = _allow_connections(settings.connections_max, self._log)
        await self.server.listen(self._sockets)
        web_runner = web.AppRunner(make_app(self.metrics, self.health), access_log=None)
        await web_runner.setup()
        host, port = split_address(settings.http)
        try:
            await web.TCPSite(web_runner, host, port).start()
        except OSError:
            self.server.stop_listening()
            raise
        self._log.info("listening", clients=", ".join(self.server.addresses), http=settings.http)
        return web_runner

    async def _announce(self) -> None:
        """READY=1, once workers can be handed out."""
        while not self.context.clouds.serving():
            await self.context.scanned.wait()
        standing = self._standing()
        self._notifier.ready("; ".join(standing) or f"serving clients on {', '.join(self.server.addresses)}")
        workers = len(self.context.registry)
        self._log.info("ready", workers=workers, open_orders=len(self.orders.unresolved()))

    async def _shut_down(self, web_runner: web.AppRunner | None) -> None:
        self._notifier.stopping()
        self.server.stop_listening()
        self.service.close()
        await self.server.close(ANSWER_SECONDS_MAX)
        await asyncio.gather(self.launch.settle(SETTLE_SECONDS_MAX), self.stock.settle(SETTLE_SECONDS_MAX))
        self.ledger.save()
        if web_runner is not None:
            await web_runner.cleanup()
        registry = self.context.registry
        left = [w.instance_id for w in registry.in_state(*COUNTED) if w.state is not WorkerState.ORDERED]
        self._log.info(
            "stopped",
            workers_left_running=left,
            workers_left_stopped=[w.instance_id for w in registry.in_state(WorkerState.STOPPED)],
            open_orders=[entry.order.id for entry in self.orders.unresolved()],
        )

    # --- what happens meanwhile ------------------------------------------------------------------------

    def _publish(self, event: Event) -> None:
        for observer in self._observers:
            observer(event)

    def _wake(self, loop: str) -> None:
        self.runners[loop].wake()

    def _demanded(self, patience_seconds: float) -> None:
        """A client waits, at most so long."""
        self.launch.demanded(patience_seconds)
        self._wake("prices")

    def _look_closely(self) -> None:
        self.reconcile.watch_closely()
        self._wake("reconcile")

    def _charged(self, cloud: Cloud) -> None:
        """We have come into charge of a cloud's machines, or another broker has."""
        error, name = cloud.read_only(), cloud.provider.name
        if error is None:
            self._log.warning("in charge again", cloud=name, claim=str(self.context.claim(cloud)))
            self._notifier.status(f"in charge of {name} again")
        else:
            self._log.error("READ-ONLY", cloud=name, error=error.message, rival=str(cloud.rival))
            self._notifier.status(f"read-only: {error.message}")

    def _scanned(self) -> None:
        if self._claims.due():
            self._wake("beat")
        self._wake("prices")  # machines may have been found, or the cloud has come back
        if len(self.context.waiting) or any(pool.keeps_warm for pool in self.context.settings.pool.values()):
            self._wake("launch")

    def _beat(self) -> None:
        self._notifier.watchdog()

    def _wake_heard(self, event: Event) -> None:
        """A loop that has something to do shall not wait for its next look."""
        if isinstance(event, WorkerSeen):
            self._wake("probe")
        elif isinstance(event, ProtectionChanged):
            self._wake("reap")
        elif isinstance(event, LeaseGranted):
            if event.first:
                self._replace_spare(event.worker.pool)
            if event.lease.ttl_seconds < self.context.pool_of(event.worker).idle_timeout:
                self._wake("reap")  # it may end before the worker would be looked at
        elif isinstance(event, WorkerChanged):
            match event.worker.state:
                case WorkerState.ORDERED:
                    pass
                case WorkerState.GONE:
                    self._wake("launch")  # there may be room under the cap again
                case state:
                    self._replace_spare(event.worker.pool)
                    self._wake("reap")  # every state has a deadline of its own
                    self._wake("probe")
                    if state is WorkerState.READY:
                        self._wake("tagging")
                    if state in (WorkerState.BOOTING, WorkerState.STOPPING):
                        self._wake("stock")
                        self._look_closely()

    def _replace_spare(self, pool: str) -> None:
        if self.context.pool(pool).keeps_warm:
            self._wake("launch")

    def _report(self, event: str, details: Mapping[str, object]) -> None:
        error = details.get("error")
        if error is None:
            self._log.info(event, **details)
        else:
            self._log.warning(event, **details)
        if "cloud" in details:  # what an operator wants to see in `systemctl status`
            self._notifier.status("; ".join([f"{event}: {error}" if error else event, *self._standing()]))

    def _standing(self) -> list[str]:
        """What an operator shall see whatever else there is to say."""
        return [*(refusal.message for refusal in self.context.clouds.read_only()), *self.context.outdated]

    # --- new settings ----------------------------------------------------------------------------------

    def _providers(self, settings: Settings) -> Mapping[str, Sequence[Provider]]:
        current = [cloud.provider for cloud in self.context.clouds.all]
        return self._make_providers(settings, self._state_dir, self.clock, self._cloud_called, current)

    def _reloaded(self, reloaded: Reloaded) -> None:
        """In the same step in which the settings have changed: whoever goes by them hears of it."""
        broker = self.settings.broker
        self.server.settings = broker
        self._log_at(broker.log_level)
        self.service.reloaded()
        self.launch.reloaded(self.settings.pool)
        self.ledger.reloaded()
        self.reconcile.scan_soon()
        for name in ("reap", "launch", "probe", "reconcile", "sweep"):
            self._wake(name)
        self._log.info(
            "settings reloaded",
            added=reloaded.added,
            changed=reloaded.changed,
            removed=reloaded.removed,
            needs_restart=reloaded.needs_restart,
        )
        self._say_what_is_assumed([*reloaded.added, *reloaded.changed])
        self._notifier.status("; ".join(["settings reloaded", *self._standing()]))

    def _reload_refused(self, error: SettingsError) -> None:
        self._log.error("settings not reloaded: the old ones stay in force", problems=error.problems)
        self._notifier.status("; ".join(self._standing()))

    def _loop_failed(self, name: str, error: Exception, pause_seconds: float) -> None:
        self.metrics.loop_failed(name)
        self._log.error("loop failed", loop=name, again_in=pause_seconds, exc_info=error)

    def _cloud_called(self, api: str, outcome: str) -> None:
        self.metrics.cloud_call(api, outcome)

    def _command_failed(self, command: str, error: Exception) -> None:
        self._log.error("command failed", command=command, exc_info=error)


def _activated(environ: Mapping[str, str], settings: BrokerSettings) -> list[socket.socket]:
    """The sockets systemd listens on for us, if it does. They too are not to be exposed by accident."""
    try:
        named = systemd.listen_sockets(environ)
    except ValueError as error:
        raise SettingsError([str(error)]) from None
    sockets = [sock for group in named.values() for sock in group]
    for sock in sockets:
        host = sock.getsockname()[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else "localhost"
        require_private(f"ListenStream= of the socket unit ({host})", host, settings.insecure_listen)
    return sockets


def _allow_connections(connections: int, log: Log) -> int:
    """Raise the soft limit of open files as far as it goes. Returns how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + FILES_SPARE
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if max(soft, allowed) >= wanted:
        return connections
    log.warning("fewer connections than connections_max are possible", limit_nofile=allowed, wanted=wanted)
    return max(1, allowed - FILES_SPARE)


def state_directory(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Where the state lives: what the settings say, `~` resolved."""
    text = settings.broker.state_dir
    if text.startswith("~") and "HOME" not in environ:
        raise SettingsError([f"broker.state_dir: {text} cannot be resolved without HOME; name a directory"])
    return Path(os.path.expanduser(text)).absolute()
