"""`compute-broker simulate`: what it prints, and its exit code. The command line itself is in cli.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from broker.core.errors import SettingsError
from broker.core.settings import Settings
from broker.simulation import campaign, report
from broker.simulation.awaits import BROKER
from broker.simulation.campaign import Plan, Plant, Totals
from broker.simulation.drawing import on_stage, without_warm
from broker.simulation.stage import Outcome

PLANTS_MODULE = "tests.simulation.plants"
TENTHS = 10  # without a terminal, progress is told so many times


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    seeds: int
    hours: float
    first_seed: int = 0
    settings: Settings | None = None
    settings_source: str = ""
    pool: str = "default"
    plant: str | None = None
    report: Path | None = None
    cores: int | None = None
    only: tuple[int, ...] | None = None

    def command(self, seed: int, kept: tuple[int, ...]) -> str:
        """What plays one history of these again, exactly."""
        words = [f"compute-broker simulate --seeds 1 --seed {seed} --hours {self.hours:g}"]
        words += (
            [f"--settings {self.settings_source} --pool {self.pool}"] if self.settings is not None else []
        )
        words += [f"--plant {self.plant}"] if self.plant else []
        words += [f"--only {','.join(str(number) for number in kept)}"]
        return " ".join(words)


def simulate(wanted: Wanted, errors: Console) -> int:
    """Play, report, and say it all in one last line. Returns how many promises were broken.

    Raises SettingsError for a pool or a bug that does not exist, OSError when the report cannot be written.
    """
    settings = None if wanted.settings is None else on_stage(wanted.settings, wanted.pool)
    plant = plant_of(wanted.plant) if wanted.plant else nullcontext
    plan = Plan(wanted.hours, settings, plant, wanted.only)
    if wanted.report is not None:
        wanted.report.touch()  # find out now, not after an hour
    totals = _play(wanted, plan, errors)
    transcripts = _transcripts(wanted, plan, totals, errors)
    cold = None
    if settings is not None and settings.pool["default"].keeps_warm:
        errors.print("the same histories without warm workers ...")
        cold_plan = replace(plan, settings=without_warm(settings))
        cold = _play(wanted, cold_plan, errors)
        transcripts = transcripts or _transcripts(wanted, cold_plan, cold, errors)
        totals.broken += cold.broken
    found = report.facts(totals, _title(wanted), ordinary=wanted.settings is not None, cold=cold)
    if wanted.report is not None:
        report.write(wanted.report, found, transcripts)
    for text in transcripts:
        print(report.shortened(text))
    if wanted.settings is not None:
        print(report.operators_view(found))
        if cold is not None:
            print(f"\n{report.comparison_view(found)}\n")
    for outcome in totals.broken[len(transcripts) :]:
        print(f"seed {outcome.seed}: {outcome.violations[0]}")
    print(totals.summary())
    return totals.violations


def _play(wanted: Wanted, plan: Plan, errors: Console) -> Totals:
    seeds = range(wanted.first_seed, wanted.first_seed + wanted.seeds)
    with _progress(errors, wanted.seeds) as advanced:
        return campaign.timed(campaign.run(seeds, plan, wanted.cores), advanced)


def plant_of(name: str) -> Plant:
    """A deliberate bug of the tests, which an installed broker does not have. Raises SettingsError."""
    if not (BROKER.parent / "tests" / "simulation" / "plants.py").is_file():
        raise SettingsError(
            ["--plant works in a clone of the repository only: the bugs are kept in its tests"]
        )
    sys.path.insert(0, str(BROKER.parent))
    plants: dict[str, Plant] = importlib.import_module(PLANTS_MODULE).PLANTS
    if name not in plants:
        raise SettingsError([f"--plant: there is no bug '{name}'; there are {', '.join(sorted(plants))}"])
    return plants[name]


def _title(wanted: Wanted) -> str:
    if wanted.settings is not None:
        return f"Ordinary days under {wanted.settings_source}, pool {wanted.pool}"
    return f"Simulated histories{f' with the bug {wanted.plant}' if wanted.plant else ''}"


def _transcripts(wanted: Wanted, plan: Plan, totals: Totals, errors: Console) -> list[str]:
    """The first broken history, made short. The others are told by their seeds."""
    if not totals.broken:
        return []
    errors.print(f"making seed {totals.broken[0].seed} short ...")
    finding = campaign.examine(plan, totals.broken[0])
    return [report.transcript(finding, wanted.command(finding.outcome.seed, finding.kept))]


@contextmanager
def _progress(errors: Console, seeds: int) -> Iterator[Callable[[Totals, Outcome], None]]:
    if not errors.is_terminal:
        yield lambda totals, outcome: _tell_tenths(errors, totals, seeds)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("", total=seeds)

        def advanced(totals: Totals, outcome: Outcome) -> None:
            speed = totals.hours / totals.seconds if totals.seconds else 0.0
            words = f"{speed:.0f} simulated hours a second, {totals.violations} promises broken"
            bar.update(task, advance=1, description=words)

        yield advanced


def _tell_tenths(errors: Console, totals: Totals, seeds: int) -> None:
    if totals.seeds * TENTHS // seeds > (totals.seeds - 1) * TENTHS // seeds:
        errors.print(
            f"{totals.seeds} of {seeds} histories, {totals.seconds:.0f} s, {totals.violations} broken"
        )
