"""`compute-broker simulate` as its users meet it: a process, its last line, its exit code, its report."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from broker.simulation.scenarios import SCENARIOS

LAST_LINE = re.compile(r"seeds=\d+ hours=\S+ launches=\d+ faults=\d+ crashes=\d+ violations=\d+")
BUG = "waits-never-end"
SECONDS_MAX = 240


def simulate(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "broker", "simulate", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)


def test_the_last_line_is_for_scripts_and_the_report_counts_every_scenario(tmp_path: Path) -> None:
    done = simulate("--seeds", "3", "--hours", "4", "--report", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"] == done.stdout.splitlines()[-1]
    assert report["scenarios"].keys() == {str(one.number) for one in SCENARIOS}
    assert report["violations"] == []


def test_a_broken_promise_is_an_exit_code_a_transcript_and_a_command_that_shows_it_again() -> None:
    done = simulate("--seeds", "6", "--hours", "6", "--plant", BUG)
    assert done.returncode == 1
    assert "VIOLATION: every client is answered in time" in done.stdout
    again = next(line for line in done.stdout.splitlines() if line.startswith("again: "))
    words = shlex.split(again.removeprefix("again: compute-broker simulate "))
    repeated = simulate(*words)
    assert repeated.returncode == 1
    assert "VIOLATION: every client is answered in time" in repeated.stdout


def test_a_bug_that_is_none_is_said_with_those_that_are() -> None:
    done = simulate("--seeds", "1", "--plant", "no-such-bug")
    assert done.returncode == 2
    assert "there is no bug 'no-such-bug'" in done.stderr
    assert BUG in done.stderr


def test_an_operator_sees_what_their_own_settings_would_do(tmp_path: Path) -> None:
    settings = tmp_path / "broker.toml"
    settings.write_text('[pool.default]\nidle_timeout = "5m"\nprice_usd_per_hour = 2.0\n')
    report = tmp_path / "days.md"
    done = simulate("--seeds", "3", "--settings", str(settings), "--report", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("launches a day", "cost a day", "while nobody used the machine", "they waited"):
        assert line in done.stdout
    written = report.read_text()
    assert written.startswith(f"# Ordinary days under {settings}")
    assert "| cost a day | $" in written
    assert "## Scenarios" not in written, "nothing was made to go wrong"


def test_a_pool_that_is_not_there_is_said_with_those_that_are(tmp_path: Path) -> None:
    settings = tmp_path / "broker.toml"
    settings.write_text("[pool.small]\n[pool.default]\n")
    done = simulate("--settings", str(settings), "--pool", "large")
    assert done.returncode == 2
    assert "there is no pool 'large'; there is default, small" in done.stderr


def test_warm_workers_are_compared_with_none(tmp_path: Path) -> None:
    settings = tmp_path / "broker.toml"
    settings.write_text(
        '[pool.default]\nidle_timeout = "5m"\nprice_usd_per_hour = 2.0\nsharing = "exclusive"\n'
        '[pool.default.warm_schedule]\n"Fri 08:00-20:00" = 1\n'
    )
    report = tmp_path / "days.json"
    done = simulate("--seeds", "2", "--hours", "12", "--settings", str(settings), "--report", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without warm workers" in done.stdout
    assert "Each history begins on Friday 2027-01-15 08:00 UTC and lasts 12 hours" in done.stdout
    warm = json.loads(report.read_text())["warm"]
    kept, cold = warm["as_set"], warm["without"]
    assert kept["idle_usd"] > cold["idle_usd"] + 20.0, "two days of twelve hours at two dollars, not all idle"
    assert kept["waits"]["p50_seconds"] < cold["waits"]["p50_seconds"]
    assert kept["waits"]["served"] + kept["waits"]["not_served"] >= 2


def test_settings_without_warm_workers_are_not_compared_with_themselves(tmp_path: Path) -> None:
    settings, report = tmp_path / "broker.toml", tmp_path / "days.md"
    settings.write_text("[pool.default]\n")
    done = simulate("--seeds", "1", "--hours", "2", "--settings", str(settings), "--report", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without warm workers" not in done.stdout + report.read_text()
