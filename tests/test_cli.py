"""The command line: what goes to stdout for scripts and to stderr for people, and every exit code."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from broker import cli, cli_base
from broker.client import Client
from broker.core.settings import parse
from broker.errand import Retry
from broker.pool_table import pool_table
from tests.support.brokers import settings
from tests.support.loop_thread import LoopThread
from tests.transcripts.stage import PEER, Stage, stage

DONE, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3
INTERRUPTED = 130
COMMANDS = (
    "serve", "get", "ping", "release", "workers", "pools", "acquire", "renew", "done", "watch",
    "config check", "config show", "config schema",
)  # fmt: skip
ESCAPE = "\x1b"
SECONDS_MAX = 20.0


class Run:
    """What one call of the command has come to."""

    def __init__(self, *arguments: str, environ: dict[str, str] | None = None) -> None:
        result = CliRunner(env=environ).invoke(cli.app, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def said(self) -> tuple[int, str, str]:
        return self.code, self.out, self.err


class Lab:
    """A live broker in a thread, and the command line pointed at it."""

    def __init__(self, on: Stage, thread: LoopThread) -> None:
        self.on, self._thread = on, thread

    @property
    def place(self) -> str:
        return f"{PEER}:{self.on.port}"

    def run(self, *arguments: str) -> Run:
        return Run(*arguments, "--broker", self.place)

    def leases(self) -> list[str]:
        """Who holds what, by name."""

        async def look() -> list[str]:
            registry = self.on.daemon.context.registry
            return [lease.client for worker in registry for lease in registry.leases(worker.id)]

        return self._thread.call(look())

    def boot(self) -> None:
        self._thread.call(self.on.boot())

    def protect(self) -> None:
        self._thread.call(self.on.protect())


@contextmanager
def lab(state_dir: Path, *, boots: str = "yes", **default_pool: Any) -> Iterator[Lab]:
    chosen = settings(**default_pool)
    listening = {"listen": f"{PEER}:0", "http": f"{PEER}:0"}
    chosen = chosen.model_copy(update={"broker": chosen.broker.model_copy(update=listening)})
    thread = LoopThread("broker")
    thread.start()
    try:
        standing = stage(chosen, state_dir, ports=True, sky={"boots": boots})
        on = thread.call(standing.__aenter__())
        try:
            yield Lab(on, thread)
        finally:
            thread.call(standing.__aexit__(None, None, None))
    finally:
        thread.stop()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path / "state") as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that tries once: nobody is there, and nobody comes."""
    monkeypatch.setattr(cli_base, "Client", partial(Client, retry=Retry(attempts_max=1)))


# --- help -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself_and_its_exit_codes(command: str) -> None:
    run = Run(*command.split(), "--help")
    text = " ".join(run.out.split())
    assert run.code == DONE
    for code in (
        "0 done",
        "1 the broker refused",
        "2 wrong usage or configuration",
        "3 broker not reachable",
    ):
        assert code in text
    assert ESCAPE not in run.out


@pytest.mark.parametrize(
    "command", ["serve", "get", "ping", "release", "workers", "config check", "config show"]
)
def test_every_command_that_needs_settings_takes_a_file(command: str) -> None:
    assert "--config" in Run(*command.split(), "--help").out


def test_the_version_is_that_of_the_package() -> None:
    version = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert Run("--version").said == (DONE, f"{version}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["get", "--colour", "red"],
        ["get", "--cores", "0"],
        ["get", "--cores", "many"],
        ["get", "--wait", "-1"],
        ["ping"],
        ["release"],
        ["get", "--broker", "host:99999"],
        ["get", "--broker", f"{PEER}:1", "--client", "a b"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_and_said_on_stderr(arguments: list[str]) -> None:
    run = Run(*arguments)
    assert (run.code, run.out) == (USAGE, "")
    assert run.err
    assert ESCAPE not in run.err


# --- get ------------------------------------------------------------------------------------------------


def test_get_prints_the_address_and_nothing_else(live: Lab) -> None:
    code, out, err = live.run("get").said
    assert (code, err) == (DONE, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+\n", out)


def test_get_as_json_says_under_which_name_the_worker_is_held(live: Lab) -> None:
    run = live.run("get", "--json", "--client", "anna")
    answer = json.loads(run.out)
    assert answer == {"ip": live.run("get", "--client", "anna").out.strip(), "client": "anna"}
    assert live.leases() == ["anna"]


def test_every_wish_reaches_the_broker(live: Lab) -> None:
    wishes = ["--cores", "64", "--type", "big", "--region", "moon", "--wait", "60", "--pool", "default"]
    assert live.run("get", *wishes, "--exclusive", "--client", "anna").code == DONE
    assert live.run("get", "--cores", "65").said == (
        REFUSED,
        "",
        "compute-broker: pool 'default' has nothing with cores=65; it has big in moon (64 cores) "
        "[BAD_REQUEST]\n",
    )
    for wish in (["--type", "small"], ["--region", "mars"], ["--pool", "none"]):
        assert live.run("get", *wish).code == REFUSED


def test_a_wait_that_ends_is_a_refusal_with_its_reason(tmp_path: Path) -> None:
    with lab(tmp_path, boots="no") as booting:
        code, out, err = booting.run("get", "--wait", "0.2").said
    assert (code, out) == (REFUSED, "")
    assert err.startswith("compute-broker: no worker became ready within 0 s: one has been booting")
    assert err.endswith("[TIMEOUT]\n")


def test_what_takes_a_moment_says_so_on_stderr_and_only_the_address_goes_to_stdout(tmp_path: Path) -> None:
    with lab(tmp_path, boots="no") as booting:
        command = [sys.executable, "-m", "broker", "get", "--broker", booting.place]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "waiting for a worker ...\n"
            booting.boot()
            out, err = process.communicate(timeout=SECONDS_MAX)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, err) == (DONE, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+\n", out)


# --- ping, release --------------------------------------------------------------------------------------


def test_what_get_has_taken_ping_keeps_and_release_gives_back(live: Lab) -> None:
    address = live.run("get").out.strip()
    (name,) = live.leases()
    assert name.endswith("/cli")
    assert live.run("ping", address).said == (DONE, "OK\n", "")
    assert live.leases() == [name], "all of a person's commands are one client"
    assert live.run("release", address).said == (DONE, "OK\n", "")
    assert live.leases() == []
    assert live.run("ping", address).said == (REFUSED, "", "compute-broker: Worker not found\n")
    assert live.run("release", address).said == (DONE, "OK\n", "")


def test_release_keeps_a_worker_that_others_use_unless_it_is_forced(live: Lab) -> None:
    address = live.run("get", "--client", "anna").out.strip()
    live.run("get", "--client", "ben")
    assert live.run("release", address, "--client", "anna").code == DONE
    assert live.leases() == ["ben"]
    assert live.run("release", address, "--client", "anna", "--force").code == DONE
    assert live.leases() == []


# --- workers --------------------------------------------------------------------------------------------


def test_workers_is_a_table_for_people_and_json_for_scripts(live: Lab) -> None:
    assert "no workers" in live.run("workers").out
    assert json.loads(live.run("workers", "--json").out) == []
    address = live.run("get").out.strip()
    (row,) = json.loads(live.run("workers", "--json").out)
    assert row["ip"] == address
    code, out, err = live.run("workers").said
    assert (code, err) == (DONE, "")
    header, line = out.splitlines()[:2]
    assert " ".join(header.split()) == "STATE ADDRESS INSTANCE POOL TYPE CORES LEASES IDLE ENDS IN AGE"
    assert line.split()[:7] == ["ready", address, row["instance_id"], "default", "big", "64", "1"]
    assert ESCAPE not in out


def test_pools_is_a_table_for_people_and_json_for_scripts(live: Lab) -> None:
    assert live.run("get").code == DONE
    (row,) = json.loads(live.run("pools", "--json").out)
    assert (row["name"], row["workers"], row["breaker"]["state"]) == ("default", {"ready": 1}, "closed")
    code, out, err = live.run("pools").said
    assert (code, err) == (DONE, "")
    header, line = out.splitlines()[:2]
    assert header.split() == [
        "POOL", "PROVIDER", "WORKERS", "LEASES", "WAITING", "LAUNCHES/H", "SPENT", "TODAY", "BREAKER", "WHY",
        "CLIENTS", "WAIT",
    ]  # fmt: skip
    assert line.split() == [
        "default", "local", "1", "ready", "of", "4", "1", "0", "1/20", "$0.00", "closed", "-",
    ]  # fmt: skip


def test_a_pool_in_trouble_shows_its_breaker_its_budget_and_why_clients_wait() -> None:
    row = {
        "name": "gpu", "provider": None, "workers": {"booting": 1, "ready": 2}, "protected": 1, "leases": 2,
        "waiting": 3, "max_workers": 3, "launches_last_hour": 4, "launches_per_hour": 20,
        "breaker": {"state": "open", "seconds_left": 90, "failures": 0, "openings": 1},
        "obstacle": "full", "budget": {"spent_usd": 1.5, "limit_usd": 20.0},
    }  # fmt: skip
    closing = {**row, "breaker": {**row["breaker"], "state": "closed", "failures": 2}}  # type: ignore[dict-item]
    resting = {**row, "workers": {"stopped": 2}, "protected": 0}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(pool_table([row, closing, resting]))
    first, second, third = console.export_text().splitlines()[1:4]
    assert "none of 3; 2 stopped" in third, "they count against no cap"
    assert "1 booting, 2 ready of 3 (1 protected)" in first
    assert "$1.50 of $20.00" in first
    assert "open, 90 s left" in first
    assert first.rstrip().endswith("full")
    assert "closed, 2 failed in a row" in second


def test_a_protected_worker_is_marked_and_terminate_all_says_that_it_was_spared(live: Lab) -> None:
    assert live.run("get").code == DONE
    live.protect()
    assert "ready (protected)" in live.run("workers").out
    code, out, err = live.run("terminate-all", "--yes").said
    assert (code, out) == (DONE, "nothing else was running\n")
    assert "protected by a tag and left running: i-" in err


def test_a_machine_that_boots_has_gaps_in_its_line_and_no_none(tmp_path: Path) -> None:
    with lab(tmp_path, boots="no") as booting:
        booting.run("get", "--wait", "0.1")
        out = booting.run("workers").out
    assert out.splitlines()[1].split()[:2] == ["booting", "-"]
    assert "None" not in out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0s"),
        (59, "59s"),
        (60, "1m00s"),
        (899, "14m59s"),
        (3600, "1h00m"),
        (90_061, "25h01m"),
    ],
)
def test_durations_read_as_a_person_would_say_them(seconds: int | None, text: str) -> None:
    assert cli._duration(seconds) == text


def test_an_address_of_letters_is_shown_as_it_is() -> None:
    row = {
        "state": "ready", "ip": "2001:db8:a:b::100:1", "instance_id": "[i]", "pool": "default",
        "instance_type": ":x:", "cores": 1, "leases": 0, "idle_seconds": 0, "will_terminate_in": 1,
        "age_seconds": 1,
    }  # fmt: skip
    script = (
        "import json, sys; from broker import cli\n"
        "cli.Client.status = lambda self: [json.loads(sys.argv[1])]\n"
        "cli.app(['workers', '--broker', 'x:1'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(row)],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=True,
    )
    for text in ("2001:db8:a:b::100:1", "[i]", ":x:"):
        assert text in run.stdout


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "broker", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"},
        )
        os.close(slave)
        self.shown = ""

    def until(self, condition: Callable[[str], object]) -> None:
        """Read on until something is shown. Fails when it never is."""
        ends_at = time.monotonic() + SECONDS_MAX
        while not condition(self.shown):
            assert time.monotonic() < ends_at, self.shown
            if select.select([self._master], [], [], 0.2)[0]:
                self.shown += os.read(self._master, 65536).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    shown = Terminal(*arguments)
    try:
        yield shown
    finally:
        shown.close()


def test_watching_refreshes_until_it_is_interrupted(live: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal("workers", "--watch", "--broker", live.place) as shown:
        shown.until(lambda text: "no workers" in text)
        address = live.run("get").out.strip()
        shown.until(lambda text: address in text)
        shown.process.send_signal(signal.SIGINT)
        assert shown.process.wait(SECONDS_MAX) == INTERRUPTED
        assert "Traceback" not in shown.shown


def test_on_a_terminal_a_boot_shows_how_long_it_has_taken(tmp_path: Path) -> None:
    with lab(tmp_path, boots="no") as booting, terminal("get", "--broker", booting.place) as shown:
        shown.until(
            lambda text: re.search(r"waiting for a worker, \d+ s \(1 booting, the oldest for \d+ s\)", text)
        )
        booting.boot()
        shown.until(lambda text: re.search(r"\d+\.\d+\.\d+\.\d+", text))
        assert shown.process.wait(SECONDS_MAX) == DONE


# --- where the broker is --------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("command", [["get"], ["ping", "10.0.0.1"], ["release", "10.0.0.1"], ["workers"]])
def test_a_broker_that_is_not_there_is_exit_code_3_with_what_to_do(command: list[str]) -> None:
    code, out, err = Run(*command, "--broker", f"{PEER}:1").said
    assert (code, out) == (UNREACHABLE, "")
    assert err.startswith(f"compute-broker: no broker can be reached at {PEER}:1: Connection refused.")
    assert "compute-broker serve" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("impatient")
def test_the_broker_is_the_one_named_else_the_environments_else_that_of_the_settings(
    tmp_path: Path, live: Lab
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(f'[broker]\nlisten = "{PEER}:2"\n')
    elsewhere = {"COMPUTE_BROKER_HOST": f"{PEER}:3"}
    assert f"{PEER}:2" in Run("workers", "--config", str(file)).err
    assert f"{PEER}:2" in Run("workers", "--config", str(file), environ=elsewhere).err, "what was said wins"
    assert f"{PEER}:3" in Run("workers", environ=elsewhere).err
    assert Run("workers", "--broker", live.place, environ=elsewhere).code == DONE
    file.write_text(f'[broker]\nlisten = "{live.place}"\n')
    assert Run("workers", "--config", str(file)).code == DONE
    file.write_text(f'[broker]\nlisten = "0.0.0.0:{live.on.port}"\ninsecure_listen = true\n')
    assert Run("workers", "--config", str(file)).code == DONE, "where it listens, seen from here"


# --- the configuration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["config", "check"], ["config", "show"], ["serve"], ["get"], ["workers"]]
)
def test_bad_settings_are_exit_code_2_and_every_problem_is_a_line(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('[broker]\nid = "a b"\nlog_level = "loud"\n[pool.default]\nmax_worker = 3\n')
    code, out, err = Run(*command, "--config", str(file)).said
    assert (code, out) == (USAGE, "")
    problems = err.splitlines()
    assert len(problems) == 3
    for key in ("broker.id: ", "broker.log_level: ", "pool.default.max_worker: "):
        assert sum(line.startswith(f"compute-broker: {key}") for line in problems) == 1
    assert "did you mean max_workers?" in err


@pytest.mark.parametrize("command", [["config", "check"], ["serve"], ["get"]])
def test_a_file_that_is_not_there_is_exit_code_2(command: list[str], tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert Run(*command, "--config", str(missing)).said == (
        USAGE,
        "",
        f"compute-broker: {missing}: there is no such file\n",
    )


def test_check_says_which_settings_are_sound(tmp_path: Path) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text("")
    other.write_text("")
    assert Run("config", "check", "--config", str(one)).said == (DONE, f"{one}: ok (default -> local)\n", "")
    by_variable = {"COMPUTE_BROKER_CONFIG": str(other)}
    assert Run("config", "check", environ=by_variable).said == (DONE, f"{other}: ok (default -> local)\n", "")
    assert (
        Run("config", "check", "--config", str(one), environ=by_variable).out
        == f"{one}: ok (default -> local)\n"
    )


@pytest.mark.skipif(Path("/etc/compute-broker/broker.toml").exists(), reason="this machine has a broker")
def test_without_any_file_it_is_the_embedded_default() -> None:
    assert (
        Run("config", "check").out == "the embedded default (local workers, no file): ok (default -> local)\n"
    )


def test_what_show_prints_is_a_file_that_means_the_same(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(
        '[broker]\nid = "lab"\n[pool.default]\nidle_timeout = "20m"\n[pool.big]\nprovider = "ec2"\n'
        'image = "ami-1"\ninstance_types = ["c7i.16xlarge", "c6i.16xlarge"]\n'
        'user_data = """#!/bin/sh\necho "\\u00e4"\n"""\ntags = { "cost center" = "lab \\"1\\"" }\n'
    )
    environ = {"COMPUTE_BROKER__POOL__DEFAULT__MAX_WORKERS": "7"}
    shown = Run("config", "show", "--config", str(file), environ=environ)
    assert shown.code == DONE
    again = tmp_path / "again.toml"
    again.write_text(shown.out, encoding="utf-8")
    expected = parse(tomllib.loads(file.read_text()), environ)
    assert parse(tomllib.loads(again.read_text(encoding="utf-8")), {}) == expected
    assert expected.pool["default"].max_workers == 7
    assert Run("config", "check", "--config", str(again)).code == DONE
    as_json = Run("config", "show", "--json", "--config", str(file), environ=environ)
    assert parse(json.loads(as_json.out), {}) == expected


def test_the_schema_names_every_setting() -> None:
    schema = json.loads(Run("config", "schema").out)
    assert {"broker", "pool"} <= schema["properties"].keys()
    assert "idle_timeout" in schema["$defs"]["PoolSettings"]["properties"]
    assert "listen" in schema["$defs"]["BrokerSettings"]["properties"]


def test_a_reader_that_has_enough_ends_the_output_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "broker", "config", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(SECONDS_MAX)


def test_asking_does_not_load_what_only_the_daemon_needs() -> None:
    script = (
        "import sys, broker.cli\n"
        "print([m for m in ('aiohttp', 'aiobotocore', 'botocore', 'uvloop', 'prometheus_client', 'sqlite3') "
        "if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=SECONDS_MAX, check=True
    )
    assert run.stdout == "[]\n"


def test_terminate_all_asks_first_and_ends_everything(live: Lab) -> None:
    assert live.run("get").code == DONE
    refused = live.run("terminate-all")
    assert (refused.code, refused.out.strip()) == (REFUSED, "")
    assert "workers at" in refused.err
    ended = live.run("terminate-all", "--yes", "--json")
    assert ended.code == DONE
    assert len(json.loads(ended.out)) >= 1
    assert live.run("terminate-all", "--yes").out == "nothing was running\n"


@pytest.mark.parametrize(("order", "word"), [("listed", "then"), ("latency", "or")])
def test_check_says_in_which_regions_a_pool_buys(tmp_path: Path, order: str, word: str) -> None:
    file = tmp_path / "wide.toml"
    file.write_text(
        '[pool.default]\nprovider = "ec2"\nregions = ["us-east-1", "eu-central-1"]\n'
        f'region_order = "{order}"\nimage = "/lab/image"\ninstance_types = ["m7i.large"]\n'
    )
    where = f"default -> ec2 us-east-1 {word} eu-central-1"
    assert Run("config", "check", "--config", str(file)).out == f"{file}: ok ({where})\n"
    assert 'regions = ["us-east-1", "eu-central-1"]' in Run("config", "show", "--config", str(file)).out


def test_a_pool_in_several_regions_shows_each_and_why_one_is_passed_over() -> None:
    row = {
        "name": "wide", "provider": "ec2", "workers": {"ready": 2}, "protected": 0, "leases": 2, "waiting": 0,
        "max_workers": 4, "launches_last_hour": 2, "launches_per_hour": 20, "obstacle": "",
        "breaker": {"state": "closed", "seconds_left": 0, "failures": 0, "openings": 0},
        "budget": {"spent_usd": 1.5, "limit_usd": None},
        "regions": [
            {"cloud": "ec2 us-east-1", "workers": 0, "round_trip_ms": 9, "obstacle": "no answer"},
            {"cloud": "ec2 eu-central-1", "workers": 2, "round_trip_ms": 90, "obstacle": ""},
        ],
    }  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(pool_table([row]))
    _, first, second, third = console.export_text().splitlines()[:4]
    assert first.rstrip().endswith("no answer")
    assert "ec2 us-east-1: 0" in second
    assert "ec2 eu-central-1: 2" in third


def test_settings_of_ec2_in_a_pool_that_does_not_buy_there_are_remarked_upon(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('[pool.default]\nimage = "ami-1"\ninstance_types = ["c7i.large"]\n')
    code, out, err = Run("config", "check", "--config", str(file)).said
    assert (code, "ok (default -> local" in out) == (DONE, True)
    assert 'pool.default: image, instance_types: only of use with provider = "ec2"' in err


def test_a_stock_whose_worker_is_perhaps_started_by_user_data_is_remarked_upon(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    stock = 'provider = "ec2"\nimage = "ami-1"\ninstance_types = ["c7i.large"]\nmarket = "on-demand"\n'
    file.write_text(f'[pool.default]\n{stock}warm_stopped = 1\nuser_data = "#!/bin/sh"\n')
    code, _, err = Run("config", "check", "--config", str(file)).said
    assert code == DONE
    assert "does the image start the worker at every boot?" in err


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "broker", "config", "schema"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "compute-broker: cannot write the output: No space left on device\n"
