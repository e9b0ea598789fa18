"""What each machine has cost, from what was seen of it: a bracket, because EC2 does not tell the truth.

A machine is billed while it is `running`. EC2 shows in which state a machine is, names the second of its
launch, and mostly the second in which somebody ended it; when `running` began it never says. So the billed
time is known by four moments of the cloud's clock, and the truth lies between the shortest and the longest
time that they allow:

    launched, or last seen pending        first seen running          last seen running     first seen ended
    not_running_until ---- it begins ---- running_from ------------- running_until ---- it ends ---- ended_by

Each moment is put where it is certain. A look at a machine shows what was true at some moment between
STALE_SECONDS_MAX before it was asked for, because listings are stale now and then, and the moment its answer
came in. Seeing a machine twice proves all the time in between, however the broker fared meanwhile: a crash,
an outage or a wrong wall clock makes the bracket no wider for a machine that is seen again, and for one that
ended unseen no wider than the time in which nobody looked.

How wide is it? At its beginning the boot (pending looks may be a minute old, so that mostly the launch is
the best floor) and the few seconds between two looks at a booting machine; at its end a second when somebody
ended it through the API, a scan and STALE_SECONDS_MAX when it was reclaimed or shut itself down.

A machine that is stopped and started again has a run each time, and a minute's bill at least for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf

from broker.core import tags
from broker.core.cloudtime import Span
from broker.core.errors import BudgetReached
from broker.core.model import Instance, InstanceState, Market
from broker.core.money import BILLED_SECONDS_MIN, SECONDS_PER_HOUR, Price, dollars

STALE_SECONDS_MAX = 60.0  # how old what a listing shows may be; EC2 promises nothing, seconds are usual
NAMED_SECONDS = 1.0  # EC2 names whole seconds, cut off
DAY_SECONDS = 86_400.0
RECLAIMED = "Server.SpotInstanceTermination"  # (AWS: EC2 API reference, StateReason)

# EC2 does not charge for a Linux spot machine that it takes back within its first hour; later, or when the
# customer ends it, every second is charged (AWS: EC2 user guide, "Billing for interrupted Spot Instances").
FREE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Bracket:
    """A sum that lies between two ends, both included."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low


NOTHING = Bracket(0.0, 0.0)


FORMER = "#"  # in the key of a run that is not its machine's last one: "i-0abc#1767225600"


@dataclass(frozen=True, slots=True)
class Run:
    """One machine that exists or did, its price, and what is known of its time. See the module.

    `instance_id` is the key: what stands before FORMER is the machine's id.
    """

    instance_id: str
    pool: str
    market: Market
    price_usd_micros_per_hour: int
    price_assumed: bool
    not_running_until_unix: float
    running_from_unix: float | None = None
    running_until_unix: float | None = None
    ended_by_unix: float | None = None
    reclaimed: bool | None = None  # whether EC2 itself took it back; None: not known (yet)

    # --- seconds -----------------------------------------------------------------------------------

    def running_seconds(self, at_unix: float) -> Bracket:
        """How long it has run up to `at_unix` (the cloud's clock, no earlier than the last look)."""
        ended = self.ended_by_unix if self.ended_by_unix is not None else at_unix
        high = max(0.0, ended - self.not_running_until_unix)
        if self.running_from_unix is None or self.running_until_unix is None:
            return Bracket(0.0, high)
        low = max(0.0, self.running_until_unix - self.running_from_unix)
        return Bracket(min(low, high), high)

    def billed_seconds(self, at_unix: float) -> Bracket:
        """The same as it stands on a bill: a minute at least for a machine that has run at all."""
        ran = self.running_seconds(at_unix)
        low = 0.0 if self.running_from_unix is None else max(BILLED_SECONDS_MIN, ran.low)
        return Bracket(low, max(BILLED_SECONDS_MIN, ran.high))

    def charged_seconds(self, at_unix: float) -> Bracket:
        """Billed, unless EC2 took the machine back within its first hour: see FREE_SECONDS."""
        ran, billed = self.running_seconds(at_unix), self.billed_seconds(at_unix)
        if self.market is not Market.SPOT or self.reclaimed is False or ran.low >= FREE_SECONDS:
            return billed
        if self.reclaimed and ran.high < FREE_SECONDS:
            return NOTHING
        return Bracket(0.0, billed.high)

    # --- money -------------------------------------------------------------------------------------

    def cost_usd_micros_max(self, at_unix: float) -> int:
        """The most that it can have cost."""
        return self._cost(self.charged_seconds(at_unix).high)

    def cost_usd_micros_max_between(self, since_unix: float, until_unix: float) -> int:
        """The most of it that can fall into a span of time that goes up to now, or into one that is over.

        Its first minute counts where it begins, so that the parts are never less than the whole.
        """
        began = self.not_running_until_unix
        ended = min(until_unix, inf if self.ended_by_unix is None else self.ended_by_unix)
        seconds = max(0.0, ended - max(since_unix, began))
        if since_unix <= began <= until_unix:
            seconds = max(BILLED_SECONDS_MIN, seconds)
        return 0 if self.charged_seconds(until_unix) == NOTHING else self._cost(seconds)

    def _cost(self, seconds: float) -> int:
        return round(self.price_usd_micros_per_hour * seconds / SECONDS_PER_HOUR)


def first_seen(instance: Instance, pool: str, price: Price, look: Span, after_unix: float = 0.0) -> Run:
    """A machine that nobody knew, or that has not run since. It did not run before its launch (EC2's
    LaunchTime, whole seconds)."""
    began_unix = instance.launched_unix or max(after_unix, look.earliest_unix - STALE_SECONDS_MAX)
    run = Run(instance.id, pool, instance.market, price.usd_micros_per_hour, price.assumed, float(began_unix))
    return seen(run, instance, look)


def seen(run: Run, instance: Instance, look: Span, *, may_stop: bool = False) -> Run:
    """The run after one more look: asked for at `look.earliest_unix`, answered at `look.latest_unix`.

    `may_stop`: the moment that EC2 names may be the end of a machine that had been stopped before.
    """
    was_so_unix = look.earliest_unix - STALE_SECONDS_MAX
    if run.running_from_unix is None and instance.launched_unix > run.not_running_until_unix:
        run = replace(run, not_running_until_unix=instance.launched_unix)
    match instance.state:
        case InstanceState.PENDING:
            return _seen_pending(run, was_so_unix)
        case InstanceState.RUNNING:
            return _seen_running(run, was_so_unix, look.latest_unix)
        case _:
            return _seen_ended(run, instance, look.latest_unix, may_stop)


def runs_anew(run: Run, instance: Instance, look: Span) -> bool:
    """Whether a look shows that a machine whose run had ended has been started since."""
    ran_unix = [at for at in (run.ended_by_unix, run.running_from_unix) if at is not None]
    if instance.launched_unix:  # EC2's LaunchTime is that of the last start
        return any(instance.launched_unix > at for at in ran_unix)
    runs = instance.state in (InstanceState.PENDING, InstanceState.RUNNING)
    ended_unix = run.ended_by_unix
    return runs and ended_unix is not None and look.earliest_unix - STALE_SECONDS_MAX > ended_unix


def machine_of(run: Run) -> str:
    """The id of the machine that ran."""
    return run.instance_id.partition(FORMER)[0]


def missed(run: Run, by_unix: float) -> Run:
    """It had ended by then, seen or not: the cloud does not know the machine any more, or it was started
    again."""
    return replace(run, ended_by_unix=min(by_unix, inf if run.ended_by_unix is None else run.ended_by_unix))


def _seen_pending(run: Run, was_so_unix: float) -> Run:
    if run.running_from_unix is not None or run.ended_by_unix is not None:
        return run  # a stale listing
    return replace(run, not_running_until_unix=max(run.not_running_until_unix, was_so_unix))


def _seen_running(run: Run, was_so_unix: float, seen_unix: float) -> Run:
    if run.ended_by_unix is not None and was_so_unix > run.ended_by_unix:  # it had not ended, or runs again
        return replace(
            run,
            running_from_unix=seen_unix,
            running_until_unix=was_so_unix,
            ended_by_unix=None,
            reclaimed=None,
        )
    latest = (seen_unix, run.running_from_unix, run.ended_by_unix)
    return replace(
        run,
        running_from_unix=min(unix for unix in latest if unix is not None),
        running_until_unix=max(was_so_unix, run.running_until_unix or run.not_running_until_unix),
    )


def _seen_ended(run: Run, instance: Instance, seen_unix: float, may_stop: bool) -> Run:
    ended_by = min(seen_unix, inf if run.ended_by_unix is None else run.ended_by_unix)
    until, named = run.running_until_unix, instance.ended_unix
    known = ended_by if named is None else named + NAMED_SECONDS
    if run.ended_by_unix == known and run.reclaimed is not None:
        return run  # a dead machine is listed for an hour
    if named is not None:
        # It ran until then, unless it had stopped before: it was seen so, or it is a machine that may stop.
        stopped = run.ended_by_unix is not None or may_stop
        if until is not None and named <= ended_by and tags.read(instance.tags).order and not stopped:
            until = max(until, named)
        ended_by = min(ended_by, named + NAMED_SECONDS)
    reclaimed = instance.reason.startswith(RECLAIMED) if instance.reason else run.reclaimed
    return replace(run, running_until_unix=until, ended_by_unix=ended_by, reclaimed=reclaimed)


# --- budgets -------------------------------------------------------------------------------------------


def day_began_unix(at_unix: float) -> float:
    """The last midnight, UTC."""
    return at_unix - at_unix % DAY_SECONDS


def spent_usd_micros(runs: Iterable[Run], at_unix: float) -> int:
    """The most that these machines can have cost on the day of `at_unix`."""
    since_unix = day_began_unix(at_unix)
    return sum(run.cost_usd_micros_max_between(since_unix, at_unix) for run in runs)


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent on a day, and what has gone of it already: the high end of every bracket.

    `committed` is an hour of every machine that is on order or has not been seen running: it will cost, and
    whoever does not count it launches ten machines with the money for one.
    """

    whose: str  # "the pool's", "the broker's"
    limit_usd_micros: int
    spent_usd_micros: int
    committed_usd_micros: int

    def launches(self, price_usd_micros_per_hour: int, wanted: int) -> int:
        """How many machines may be ordered: one more as long as what has gone is below the limit."""
        left = self.limit_usd_micros - self.spent_usd_micros - self.committed_usd_micros
        if left <= 0:
            return 0
        return min(wanted, -(-left // price_usd_micros_per_hour)) if price_usd_micros_per_hour else wanted

    def refusal(self) -> BudgetReached:
        return BudgetReached(
            f"{self.whose} budget_usd_per_day = {dollars(self.limit_usd_micros)} is reached: "
            f"{dollars(self.spent_usd_micros)} spent since midnight UTC, "
            f"{dollars(self.committed_usd_micros)} for an hour of the machines that are starting"
        )
