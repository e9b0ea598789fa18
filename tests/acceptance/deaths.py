"""One broker that is killed again and again while clients use it: a history, drawn from a seed.

The broker is the real command on a cloud of its own. Each of its lives ends by SIGKILL at a moment that is
drawn in relation to something it does: to a command that was sent, to a call of its that arrives at the
cloud, that is carried out, that is answered. A call that is under way when its broker dies is carried out
all the same, at once or when the next broker has been running for a while. Between the deaths the cloud
misses machines in listings, as EC2 does.

After each start, and at the end, what the broker says is held against what moto knows to be true and against
what clients were told. The draws of a history are those of its seed; how they fall in with what the broker
does is left to the machine, so every check holds for every interleaving. A failure tells the whole story.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker.core import tags
from tests.acceptance.lab import POOL
from tests.acceptance.promises import Hold, Promises
from tests.support.broker_process import BrokerProcess, BrokerProcesses, Conversation, eventually
from tests.support.cloud import CloudInstance, MotoServer
from tests.support.fault_proxy import CallRecord, Fault, FaultProxy, Seconds, loopback_address
from tests.support.faults import UNDER_WAY
from tests.support.worker_stand_in import WorkerFleet

LAUNCH, HAND_OUT, REAP, RELEASE, START_UP = PHASES = ("launch", "hand-out", "reap", "release", "start-up")

HELD_SECONDS = 8.0  # idle timeout of the pools whose clients keep their workers: many lives long
BRIEF_SECONDS = 1.0  # of the pool whose workers are reaped: a fraction of a life
KNOWN_SECONDS_MAX = 20.0  # a running machine is in the books by then: listings miss it for seconds
ANSWER_SECONDS_MAX = 45.0  # a launch, a lease of a client that does not come back, and a busy machine
GONE_SECONDS_MAX = HELD_SECONDS + 30.0  # of the last machine, once nobody speaks any more
HIDDEN_SECONDS_MAX = 4.0  # how long listings may miss a new machine
LOOK_SECONDS = 0.002
START_SECONDS = 1.0  # about what a start takes: a kill at some time of it falls into that
TELLING_CALLS = ("RunInstances", "TerminateInstances")

POOLS: Final[dict[str, dict[str, object]]] = {
    "default": {"max_workers": 1, "idle_timeout": f"{HELD_SECONDS:g}s"},
    "alone": {"max_workers": 3, "idle_timeout": f"{HELD_SECONDS:g}s", "sharing": "exclusive"},
    "narrow": {"max_workers": 1, "idle_timeout": f"{HELD_SECONDS:g}s", "sharing": "exclusive"},
    "brief": {"max_workers": 1, "idle_timeout": f"{BRIEF_SECONDS:g}s"},
}
# Every restart may cost an attempt: here it is the kills that are many, not the launches of an hour.
UNLIMITED: Final[dict[str, object]] = {"launches_per_hour": 100_000, "boot_failures_max": 100_000}

# How often each phase is aimed at; start-ups come on top, before every other life.
DECK: Final = (LAUNCH, LAUNCH, LAUNCH, HAND_OUT, HAND_OUT, REAP, RELEASE, RELEASE)
START_UP_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Asking:
    """A GET_WORKER under way."""

    client: str
    pool: str
    conversation: Conversation
    asked_at: float


class History:
    """See the module. `run` is all of it; `kills` and `judged` tell afterwards what it was worth."""

    def __init__(self, seed: int, moto: MotoServer, region: str, directory: Path) -> None:
        self.seed = seed
        self.kills: Counter[tuple[str, str]] = Counter()  # (phase, moment) → how often
        self.judged = 0  # leases that were certain, and were asked for, after a restart
        self.machines = 0
        self._rng = random.Random(seed)
        self._moto, self._region, self._directory = moto, region, directory
        self._broker_id = f"kills-{seed}"
        self._promises = Promises(frozenset(n for n, pool in POOLS.items() if "sharing" in pool))
        self._shown_at: dict[str, float] = {}  # instance id → when the cloud first called it running
        self._address: dict[str, str] = {}  # address → instance id
        self._diary: list[tuple[float, str]] = []
        self._deck: list[str] = []
        self._clients = 0
        self._unanswered: list[tuple[str, str]] = []  # (client, pool): asked, and the broker died
        self._unreleased: list[tuple[str, str]] = []  # (client, address): released, and the broker died
        self._strays: dict[str, set[str]] = {name: set() for name in POOLS}  # may hold something, do not come
        self._late: list[Fault] = []  # calls of dead brokers that are still on their way
        self._mark = 0  # calls before this one are of no interest any more
        self._killed_at = self._down_since = self._spawned_at = 0.0

    def run(self, kills: int, going_on: Callable[[], bool]) -> None:
        """Live and die until so many kills, or until `going_on` says no. Raises AssertionError."""
        try:
            with self._world():
                self._start()
                while self._killed < kills and going_on():
                    self._live_and_die(kills)
                if going_on():
                    self._wind_up()
        except Exception as error:
            raise AssertionError(f"{error}\n\n{self.story()}") from error

    def story(self) -> str:
        """Everything that happened, oldest first, with the calls that launch and terminate."""
        calls = [
            (call.at, f"    {call.action} {_subject(call)}: {call.outcome}")
            for call in self._proxy.calls
            if call.action in TELLING_CALLS
        ]
        lines = sorted([*self._diary, *calls])
        began_at = lines[0][0] if lines else 0.0
        told = "\n".join(f"{at - began_at:9.3f}  {text}" for at, text in lines)
        return f"seed {self.seed}, {self._killed} kills; logs below {self._directory}\n{told}"

    @contextmanager
    def _world(self) -> Iterator[None]:
        with (
            FaultProxy(self._moto) as self._proxy,
            WorkerFleet(self._proxy, automatic=True) as fleet,
            BrokerProcesses(self._directory) as brokers,
        ):
            self._proxy.on_shown_running(self._shown_running)
            self._proxy.on_terminated(self._terminated)
            pool = {**POOL, **UNLIMITED, "region": self._region, "worker_port": fleet.port}
            broker: dict[str, object] = {"id": self._broker_id, "reconcile_interval": "400ms"}
            pools = {f"pool.{name}": {**pool, **more} for name, more in POOLS.items()}
            environ = {
                "AWS_ENDPOINT_URL": self._proxy.endpoint_url,
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            self._broker: BrokerProcess = brokers.make({"broker": broker, **pools}, environ)
            yield

    # --- lives and deaths ------------------------------------------------------------------------------

    def _live_and_die(self, kills: int) -> None:
        self._vary_the_cloud()
        if not self._deck:
            self._deck = self._rng.sample(DECK, len(DECK))
        die = {LAUNCH: self._launch, HAND_OUT: self._hand_out, REAP: self._reap, RELEASE: self._release}
        die[self._deck.pop()]()
        while self._killed < kills and self._rng.random() < START_UP_SHARE:
            self._start_up()
        self._start()

    def _launch(self) -> None:
        """A client asks for what has to be launched."""
        pool = self._rng.choices(("alone", "narrow", "brief", "default"), (3, 3, 2, 2))[0]
        self._make_room(pool)
        aim = self._rng.choice(("soon", "at the call", "carried out", "answered", "booting"))
        if self._rng.random() < 0.5:  # a start long: the next broker has only its own notes to go by
            self._proxy.after_launch(hidden=Seconds(self._rng.uniform(0, HIDDEN_SECONDS_MAX)))
        stall = None
        if aim in ("at the call", "carried out"):
            stall = self._proxy.stall("RunInstances", after_carrying_out=aim == "carried out")
        asking = self._ask(pool)
        if stall is not None:
            self._wait_for_hit(stall, asking.conversation)
        elif aim != "soon":
            self._until(lambda: asking.conversation.answered() or self._decided("RunInstances"))
        self._pause({"soon": 0.015, "booting": 0.8}.get(aim, 0.01))
        self._kill()
        moment = "carried out, not answered" if aim == "carried out" else self._progress("RunInstances")
        if not self._collect(asking):
            self._count(LAUNCH, moment)
        else:
            self._count(HAND_OUT, "a new machine's, answered")
        self._let_go(stall)

    def _hand_out(self) -> None:
        """A client asks for what is there, or is given what another gives back, or what has just booted."""
        ways = {"warm": 3, "by a ping": 2, "from hand to hand": 2, "new": 2}
        way = self._rng.choices(list(ways), list(ways.values()))[0]
        if way == "by a ping":
            self._hand_out_by_ping()
            return
        if way == "new":
            pool = self._rng.choice(("alone", "brief"))
            self._make_room(pool)
            shown = len(self._shown_at)
            asking = self._ask(pool)
            self._until(lambda: asking.conversation.answered() or len(self._shown_at) > shown)
        elif way == "warm":
            self._hold("default")
            asking = self._ask("default")
        else:
            giver = self._hold("narrow")
            asking = self._ask("narrow")
            self._broker.status()  # the broker has had a turn: the client stands in the queue, as a rule
            self._say_release(giver)
            self._unreleased.append((giver.client, giver.address))
        self._pause_or_hear(asking.conversation, 0.02 if way == "new" else 0.006)
        self._kill()
        self._count(HAND_OUT, f"{way}, {'answered' if self._collect(asking) else 'not answered'}")

    def _hand_out_by_ping(self) -> None:
        """Whoever uses a shared worker holds it: the lease comes with the first PING."""
        held = self._hold("default")
        pinging = Asking(self._new_client(), "default", self._broker.connect(), time.monotonic())
        pinging.conversation.say(f"PING {held.address} client={pinging.client}")
        self._pause_or_hear(pinging.conversation, 0.003)
        self._kill()
        answers = pinging.conversation.rest()
        self._note(f"{pinging.client} heard {answers} to its PING")
        assert answers in ([], ["OK"]), answers
        if answers:
            self._told(pinging, held.address)
        else:
            self._strays["default"].add(pinging.client)
        self._count(HAND_OUT, f"by a ping, {'answered' if answers else 'not answered'}")

    def _reap(self) -> None:
        """A worker's idle time runs out."""
        hold = self._hold("brief", afresh=True)
        aim = self._rng.choice(("in time", "at the call", "carried out", "answered"))
        stall = None
        if aim in ("at the call", "carried out"):
            stall = self._proxy.stall(
                "TerminateInstances",
                after_carrying_out=aim == "carried out",
                match=lambda call: hold.instance_id in call.params.values(),
            )
        if aim == "in time":
            time.sleep(max(0.0, hold.until - time.monotonic()))
            self._pause(0.6)  # the broker looks at a deadline half a second late at most
        elif stall is not None:
            stall.wait_hit()
        else:
            self._until(lambda: self._decided("TerminateInstances", hold.instance_id))
        self._pause(0.01)
        self._kill()
        moment = self._progress("TerminateInstances", hold.instance_id)
        self._count(REAP, "carried out, not answered" if aim == "carried out" else moment)
        self._let_go(stall)

    def _release(self) -> None:
        """A client gives its worker back: the last one, or one of several."""
        pool = self._rng.choice(("alone", "default", "narrow"))
        hold = self._hold(pool)
        last = sum(one.address == hold.address for one in self._promises.certain(time.monotonic())) == 1
        aim = self._rng.choice(("soon", "soon", "at the call", "carried out", "answered"))
        stall = None
        if last and aim in ("at the call", "carried out"):
            stall = self._proxy.stall(
                "TerminateInstances",
                after_carrying_out=aim == "carried out",
                match=lambda call: hold.instance_id in call.params.values(),
            )
        released = self._say_release(hold)
        if stall is not None:
            self._wait_for_hit(stall)
        elif last and aim == "answered":
            self._until(lambda: self._decided("TerminateInstances", hold.instance_id))
        self._pause(0.012)
        self._kill()
        answers = released.rest()
        self._note(f"{hold.client} heard {answers} to its RELEASE")
        assert answers in ([], ["OK"]), answers
        if answers:  # said, but perhaps not written: the next broker may give the lease back to it
            self._strays[pool].add(hold.client)
        else:
            self._unreleased.append((hold.client, hold.address))
        moment = self._progress("TerminateInstances", hold.instance_id) if last else "of one of several"
        self._count(RELEASE, "carried out, not answered" if stall and aim == "carried out" else moment)
        self._let_go(stall)

    def _start_up(self) -> None:
        """The broker starts, and does not get far."""
        aim = self._rng.choice(("some time", "opening", "listing", "listed", "listed"))
        self._spawn()
        action = {"opening": "DescribeInstanceTypes", "listing": "DescribeInstances"}.get(aim)
        stall = self._proxy.stall(action) if action else None
        if aim == "some time":
            self._pause(START_SECONDS)
        elif stall is not None:
            stall.wait_hit(timeout_seconds=ANSWER_SECONDS_MAX)
            self._pause(0.01)
        else:
            self._until(lambda: self._decided("DescribeInstances"))
            self._pause(0.02)
        self._kill()
        self._count(START_UP, self._start_up_progress())
        if stall is not None:
            stall.cancel()
        self._taken_over(self._spawned_at)

    def _kill(self) -> None:
        self._broker.kill()
        self._killed_at = time.monotonic()

    def _count(self, phase: str, moment: str) -> None:
        self.kills[phase, moment] += 1
        self._note(f"KILLED, {phase}: {moment}", self._killed_at)

    @property
    def _killed(self) -> int:
        return sum(self.kills.values())

    def _let_go(self, stall: Fault | None) -> None:
        """The dead broker's call is carried out now, or when the next one has been running for a while."""
        if stall is not None and self._rng.random() < 0.5:
            self._late.append(stall)
        elif stall is not None:
            stall.cancel()

    # --- starting again --------------------------------------------------------------------------------

    def _spawn(self) -> None:
        self._mark, self._down_since = len(self._proxy.calls), self._killed_at
        self._broker.hang_up()
        running = sorted(one.instance_id for one in self._ours() if one.state == "running")
        if running and self._rng.random() < 0.4:
            missed = self._rng.choice(running)
            self._proxy.omit(missed, times=self._rng.choice((1, 1, 2)))
            self._note(f"the next listing misses {missed}")
        self._spawned_at = time.monotonic()
        self._broker.spawn()

    def _start(self) -> None:
        """A broker that runs, on what the last one left; then everybody comes back, and all is checked."""
        self._spawn()
        if self._rng.random() < 0.3:
            self._proxy.stall("DescribeInstances", seconds=self._rng.uniform(0, 0.3))
        eventually(lambda: bool(self._broker.events("listening")), ANSWER_SECONDS_MAX, "the broker listens")
        self._note("the broker listens")
        self._taken_over(self._spawned_at)
        self._ping_everyone()
        self._come_back()
        for call in self._late:
            call.cancel()
        self._late.clear()
        self._ping_everyone()
        self._check()
        self._mark = len(self._proxy.calls)

    def _taken_over(self, since: float) -> None:
        """Leases that were alive at the last kill begin anew, not before the new broker's first listing."""
        listings = [call.at for call in self._proxy.calls_of("DescribeInstances") if call.at >= since]
        self._promises.restored(self._down_since, min(listings, default=since))

    def _come_back(self) -> None:
        """Whoever got no answer asks again; some never do."""
        for client, address in self._unreleased:
            assert self._reply(f"RELEASE {address} client={client}") == "OK"
        self._unreleased.clear()
        for client, pool in self._unanswered:
            if self._rng.random() < 0.85:
                self._answered(self._ask(pool, client))
            else:
                self._strays[pool].add(client)
        self._unanswered.clear()

    def _ping_everyone(self) -> None:
        for hold in self._promises.certain(time.monotonic()):
            asked_at = time.monotonic()
            reply = self._reply(f"PING {hold.address} client={hold.client}")
            if hold.certain(time.monotonic()):
                self.judged += 1
                assert reply == "OK", f"{hold.client} has lost {hold.address} ({hold.instance_id}): {reply}"
            if reply == "OK":
                hold.used(asked_at)

    # --- clients ---------------------------------------------------------------------------------------

    def _ask(self, pool: str, client: str = "") -> Asking:
        client = client or self._new_client()
        self._note(f"{client} asks for a worker of {pool}")
        asked_at = time.monotonic()
        command = f"GET_WORKER pool={pool} client={client} wait={ANSWER_SECONDS_MAX - 5:g}"
        return Asking(client, pool, self._broker.asking(command), asked_at)

    def _new_client(self) -> str:
        self._clients += 1
        return f"c{self._clients}"

    def _answered(self, asking: Asking) -> Hold:
        return self._told(asking, asking.conversation.line(ANSWER_SECONDS_MAX))

    def _collect(self, asking: Asking) -> bool:
        """Whether the dead broker had answered; if it had, the client takes it at its word."""
        answers = asking.conversation.rest()
        for answer in answers:
            self._told(asking, answer)
        if not answers:
            self._unanswered.append((asking.client, asking.pool))
        return bool(answers)

    def _told(self, asking: Asking, answer: str) -> Hold:
        now = time.monotonic()
        self._note(f"{asking.client} was told {answer}", now)
        instance_id = self._address.get(answer)
        assert instance_id is not None, f"{answer} is no address of a machine that has been running"
        idle_seconds = BRIEF_SECONDS if asking.pool == "brief" else HELD_SECONDS
        since = max(asking.asked_at, self._shown_at[instance_id])  # nobody can hold it before it runs
        hold = Hold(asking.client, asking.pool, answer, instance_id, idle_seconds, since + idle_seconds)
        self._promises.told(hold, now)
        return hold

    def _hold(self, pool: str, *, afresh: bool = False) -> Hold:
        """Somebody who holds a worker of the pool for certain."""
        if pool == "narrow" and not self._promises.certain(time.monotonic(), pool):
            self._make_room(pool)
        holds = [] if afresh else self._promises.certain(time.monotonic(), pool)
        if holds and (pool == "narrow" or self._rng.random() < 0.6):
            return self._rng.choice(holds)
        if pool == "alone":
            self._make_room(pool)
        return self._answered(self._ask(pool))

    def _say_release(self, hold: Hold) -> Conversation:
        hold.give_back(time.monotonic())
        self._note(f"{hold.client} releases {hold.address} ({hold.instance_id})")
        return self._broker.asking(f"RELEASE {hold.address} client={hold.client}")

    def _make_room(self, pool: str) -> None:
        """A new client of the pool has to be given a machine of its own, and can be: one that is on order
        since an earlier death is for whoever asks next."""
        eventually(lambda: self._has_room(pool), ANSWER_SECONDS_MAX, f"there is room in pool {pool}")

    def _has_room(self, pool: str) -> bool:
        workers = [worker for worker in self._workers(pool) if worker["state"] != "ordered"]
        full = len(workers) >= (int(str(POOLS[pool]["max_workers"])) if "sharing" in POOLS[pool] else 1)
        free = any(worker["state"] == "ready" and not worker["leases"] for worker in workers)
        if not full and not free:
            return True
        for hold in self._promises.certain(time.monotonic(), pool)[: 1 if "sharing" in POOLS[pool] else None]:
            assert self._say_release(hold).line() == "OK"
        held = {hold.address for hold in self._promises.certain(time.monotonic(), pool)}
        for address in {worker["ip"] for worker in workers if worker["ip"]} - held:
            for client in sorted(self._strays[pool]) or ["nobody"]:
                assert self._reply(f"RELEASE {address} client={client}") == "OK"
        return False

    def _workers(self, pool: str) -> list[dict[str, Any]]:
        return [worker for worker in self._broker.status() if worker["pool"] == pool]

    def _reply(self, command: str) -> str:
        reply = self._broker.ask(command, ANSWER_SECONDS_MAX)
        self._note(f"{command}: {reply}")
        return reply

    # --- the cloud -------------------------------------------------------------------------------------

    def _vary_the_cloud(self) -> None:
        """New machines are hidden, pending, without an address for a moment, or not."""
        draw = self._rng.uniform
        if self._rng.random() < 0.5:
            self._proxy.after_launch()
        else:
            hidden, pending, unaddressed = (Seconds(draw(0, 0.4)) for _ in range(3))
            self._proxy.after_launch(hidden=hidden, pending=pending, unaddressed=unaddressed)
        self._proxy.after_terminate(shutting_down=Seconds(self._rng.choice((0.0, draw(0, 0.6)))))

    def _shown_running(self, instance_id: str) -> None:
        self._address[loopback_address(instance_id)] = instance_id
        self._shown_at[instance_id] = time.monotonic()
        self._note(f"    {instance_id} is running, at {loopback_address(instance_id)}")

    def _terminated(self, instance_id: str) -> None:
        self._promises.ended_at.setdefault(instance_id, time.monotonic())
        self._note(f"    {instance_id} is terminated")

    def _ours(self) -> list[CloudInstance]:
        """Every machine that this broker ever launched, as moto has it."""
        machines = self._moto.instances(self._region)
        nobodys = [one.instance_id for one in machines if tags.BROKER not in one.tags]
        assert not nobodys, f"launched without a broker's tag: {nobodys}"
        return [one for one in machines if one.tags[tags.BROKER] == self._broker_id]

    # --- the checks ------------------------------------------------------------------------------------

    def _check(self) -> None:
        """What must be true of a broker that runs, whatever it was doing when its predecessors died."""
        eventually(self._all_known, KNOWN_SECONDS_MAX, "every running machine is in the books")
        machines = self._ours()
        orders = Counter(one.tags[tags.ORDER] for one in machines)
        doubled = [order for order, count in orders.items() if count > 1]
        assert not doubled, f"more than one machine for one order: {doubled}"
        running = Counter(one.tags[tags.POOL] for one in machines if one.state == "running")
        for pool, count in running.items():
            assert count <= int(str(POOLS[pool]["max_workers"])), f"{count} machines run in pool {pool}"
        broken = list(self._promises.broken())
        assert not broken, broken

    def _all_known(self) -> bool:
        running = {one.instance_id for one in self._ours() if one.state == "running"}
        known = {worker["instance_id"] for worker in self._broker.status()}
        return running - known <= self._promises.ended_at.keys()

    def _wind_up(self) -> None:
        """Everybody gives back what they hold, or falls silent; in the end nothing runs."""
        self._proxy.heal()
        for hold in self._promises.certain(time.monotonic()):
            assert self._say_release(hold).line() == "OK"
        eventually(
            lambda: not [one for one in self._ours() if one.state == "running"],
            GONE_SECONDS_MAX,
            "no machine runs once everything has been released or is unused",
        )
        # What stays on order is an attempt that the dead broker had noted and not made: it is no machine.
        eventually(
            lambda: {worker["state"] for worker in self._broker.status()} <= {"ordered"},
            KNOWN_SECONDS_MAX,
            "the books are empty",
        )
        self._check()
        self.machines = len(self._ours())

    # --- inside ----------------------------------------------------------------------------------------

    def _note(self, text: str, at: float | None = None) -> None:
        self._diary.append((time.monotonic() if at is None else at, text))

    def _pause(self, seconds_max: float) -> None:
        """The randomness of the moment."""
        time.sleep(self._rng.uniform(0, seconds_max))

    def _pause_or_hear(self, conversation: Conversation, seconds_max: float) -> None:
        """Until the very moment in which the client is told, or some time."""
        if self._rng.random() < 0.5:
            conversation.answered(ANSWER_SECONDS_MAX)
        else:
            self._pause(seconds_max)

    def _until(self, condition: Callable[[], bool]) -> None:
        """As `eventually`, but looks so often that what follows is close to what happened."""
        deadline_at = time.monotonic() + ANSWER_SECONDS_MAX
        while not condition():
            assert time.monotonic() < deadline_at, f"not within {ANSWER_SECONDS_MAX:g} s"
            time.sleep(LOOK_SECONDS)

    def _wait_for_hit(self, stall: Fault, conversation: Conversation | None = None) -> None:
        """Returns in the moment of the hit, or when the client has been answered without the call."""
        deadline_at = time.monotonic() + ANSWER_SECONDS_MAX
        while conversation is None or not conversation.answered():
            try:
                stall.wait_hit(timeout_seconds=0.2)
            except TimeoutError:
                assert time.monotonic() < deadline_at, "the call was not made"
            else:
                return

    def _since_start(self, action: str, instance_id: str = "") -> Sequence[CallRecord]:
        calls = [call for call in self._proxy.calls[self._mark :] if call.action == action]
        return [call for call in calls if not instance_id or instance_id in call.params.values()]

    def _decided(self, action: str, instance_id: str = "") -> bool:
        return any(call.outcome != UNDER_WAY for call in self._since_start(action, instance_id))

    def _progress(self, action: str, instance_id: str = "") -> str:
        calls = self._since_start(action, instance_id)
        if not calls:
            return "before the call"
        return "during the call" if calls[-1].outcome == UNDER_WAY else "after the call"

    def _start_up_progress(self) -> str:
        if self._broker.events("ready"):
            return "just ready"
        if listings := self._since_start("DescribeInstances"):
            return "first listing" if listings[-1].outcome == UNDER_WAY else "taking over"
        return "reaching the cloud" if self._since_start("DescribeInstanceTypes") else "before the cloud"


def _subject(call: CallRecord) -> str:
    ids = [value for key, value in call.params.items() if key.startswith("InstanceId")]
    return " ".join(ids) or call.params.get("ClientToken", "")
