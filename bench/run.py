"""`python -m bench.run`: measures the broker beside its peers and says honestly which targets it reached.

Numbers of one run belong together: peers take turns on the same cores in the same minutes, and the result is
a ratio. Targets that were missed do not fail the command; a measurement that could not be made says so
instead of a number.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import fulfilment, idle, load, registry_ops, throughput
from bench.machine import Cores, Machine, raise_file_limit
from bench.peers import STARTERS, Peer, PeerMissing
from bench.report import Report

RESULTS = Path(__file__).with_name("RESULTS.md")
SECTIONS = ("throughput", "idle", "registry", "fulfilment")
FILES_NEEDED = idle.CONNECTIONS + 200
IDLE_SERVERS = ("broker", "echo")  # the bare echo shows what uvloop itself needs for a connection


@dataclass(frozen=True)
class Plan:
    rounds: int
    seconds: float
    warmup_seconds: float
    idle_rounds: int
    idle_seconds: float


# Many short turns rather than a few long ones: a machine changes its pace from one second to the next.
FULL = Plan(rounds=15, seconds=0.3, warmup_seconds=0.1, idle_rounds=5, idle_seconds=1.5)
QUICK = Plan(rounds=5, seconds=0.3, warmup_seconds=0.1, idle_rounds=1, idle_seconds=1.5)


def say(line: str) -> None:
    """Progress goes to standard error: standard output is the result."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


def main() -> int:
    options = _options()
    plan = dataclasses.replace(
        QUICK if options.quick else FULL,
        **{key: value for key in ("rounds", "seconds") if (value := getattr(options, key)) is not None},
    )
    load.build()
    cores, files_max = Cores.choose(), raise_file_limit()
    report = Report(Machine.now(), _describe(plan, cores))
    sections: dict[str, Callable[[], None]] = {
        "throughput": lambda: _throughput(report, plan, cores),
        "idle": lambda: _idle(report, plan, cores, files_max),
        "registry": lambda: _registry(report),
        "fulfilment": lambda: _fulfilment(report),
    }
    for name in options.only or SECTIONS:
        sections[name]()
    print(json.dumps(dataclasses.asdict(report), indent=1) if options.json else report.markdown())
    if options.write:
        _append(report.markdown())
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="half a minute on a quiet machine: for a first look"
    )
    parser.add_argument("--rounds", type=int, choices=range(1, 51), metavar="N", help="turns for each peer")
    parser.add_argument("--seconds", type=float, help="measured seconds of each turn")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="one section; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the raw result as JSON")
    parser.add_argument("--write", action="store_true", help=f"append the result to {RESULTS.name}")
    return parser.parse_args()


def _describe(plan: Plan, cores: Cores) -> str:
    return (
        f"{plan.rounds} rounds of {plan.seconds:g} s for each server and shape, after "
        f"{plan.warmup_seconds:g} s of warm-up, taken in turns. {cores.describe()}"
    )


def _throughput(report: Report, plan: Plan, cores: Cores) -> None:
    missing: dict[str, str] = {}
    running: list[Peer] = []
    with contextlib.ExitStack() as stack:
        for name, start in STARTERS.items():
            try:
                running.append(stack.enter_context(start(cores.server)))
            except PeerMissing as problem:
                missing[name] = str(problem)
                say(f"NOT MEASURED: {name}: {problem}")
        report.throughput = throughput.measure(
            running, cores, plan.rounds, plan.seconds, plan.warmup_seconds, say
        )
    report.throughput.missing = missing


def _idle(report: Report, plan: Plan, cores: Cores, files_max: int) -> None:
    if files_max < FILES_NEEDED:
        report.idle_why_not = f"the limit on open files is {files_max:,}, {FILES_NEEDED:,} are needed"
        say(f"NOT MEASURED: idle connections: {report.idle_why_not}")
        return
    results = []
    for name in IDLE_SERVERS:
        try:
            with STARTERS[name](cores.server) as server:
                results.append(idle.measure(server, cores, plan.idle_rounds, plan.idle_seconds, say))
        except (PeerMissing, load.IdleFailed) as problem:
            say(f"NOT MEASURED: idle connections on {name}: {problem}")
            if name == "broker":
                report.idle_why_not = "no broker" if isinstance(problem, PeerMissing) else str(problem)
    report.idle = results


def _registry(report: Report) -> None:
    report.registry = registry_ops.measure(say)


def _fulfilment(report: Report) -> None:
    report.fulfilment = fulfilment.measure(say)


def _append(markdown: str) -> None:
    if not RESULTS.exists():
        RESULTS.write_text(
            "# Results\n\nEach run of `make bench` appends itself. How to read them: README.md.\n"
        )
    with RESULTS.open("a") as results:
        results.write("\n" + markdown)
    say(f"appended to {RESULTS.name}")


if __name__ == "__main__":
    sys.exit(main())
