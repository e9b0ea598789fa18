"""The commands about leases: what scripts read, what a held command sees, and every exit code."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner

from broker import cli
from broker.cli_leases import SAY_SECONDS, Seldom, waiting_line
from broker.core.replies import Pending
from tests.support.fake_broker import FakeBroker, Scene, reset
from tests.test_client_leases import BOOTING, ENDED, Held, each, lease_line, lines

DONE, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3
SECONDS_MAX = 20.0
Open = Callable[..., FakeBroker]


@pytest.fixture
def opened() -> Iterator[Open]:
    fakes: list[FakeBroker] = []

    def open_one(*scenes: Scene, **replies: str) -> FakeBroker:
        fakes.append(FakeBroker((*scenes, *[each] * 20), replies))
        return fakes[-1]

    yield open_one
    for fake in fakes:
        fake.close()


def run(fake: FakeBroker, command: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    words = [command, "--broker", f"127.0.0.1:{fake.port}", *arguments]
    result = CliRunner().invoke(cli.app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def held_command(fake: FakeBroker, *command: str, options: tuple[str, ...] = ()) -> list[str]:
    place = f"127.0.0.1:{fake.port}"
    return [sys.executable, "-m", "broker", "acquire", "--broker", place, *options, "--", *command]


def hold(fake: FakeBroker, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        held_command(fake, *command, options=options), capture_output=True, text=True, timeout=SECONDS_MAX
    )


# --- single commands ----------------------------------------------------------------------------------------


def test_acquire_prints_a_line_for_each_lease(opened: Open) -> None:
    fake = opened(lines(lease_line("lease-1", 2), lease_line("lease-2", 2).replace("cores=64", "cores=-")))
    code, out, err = run(fake, "acquire", "--count", "2", "--min", "1", "--cores", "8", "--ttl", "60")
    assert (code, err) == (DONE, "")
    assert out == (
        "lease-1 127.0.0.1:2560 big 64 cores spot $1.2/h until 2026-01-31T08:00:00Z\n"
        "lease-2 127.0.0.1:2560 big spot $1.2/h until 2026-01-31T08:00:00Z\n"
    )
    assert fake.heard == ["ACQUIRE cores=8 count=2 min=1 ttl=60"]


def test_acquire_as_json_has_every_field(opened: Open) -> None:
    _, out, _ = run(opened(lines(lease_line("lease-1"))), "acquire", "--json", "--client", "anna")
    assert json.loads(out) == [
        {
            "id": "lease-1", "address": "127.0.0.1", "port": 2560, "pool": "default", "type": "big",
            "cores": 64, "market": "spot", "price_usd_per_hour": 1.2, "expires": "2026-01-31T08:00:00Z",
        }
    ]  # fmt: skip


def test_waiting_is_a_line_on_stderr_and_nothing_on_stdout(opened: Open) -> None:
    fake = opened(lines(BOOTING, BOOTING, BOOTING, "ERROR: nothing to be had [NO_CAPACITY]"))
    assert run(fake, "acquire") == (
        REFUSED,
        "",
        "waiting for a worker, number 3 in the queue, about 42 s: a machine has been booting for 31 s "
        "[BOOTING]\ncompute-broker: nothing to be had [NO_CAPACITY]\n",
    )


def test_lines_about_waiting_are_ten_seconds_apart() -> None:
    now, said = [0.0], list[str]()
    seldom = Seldom(lambda: now[0], said.append)
    for now[0] in (0.0, 1.0, SAY_SECONDS - 0.1, SAY_SECONDS, SAY_SECONDS + 1, 2 * SAY_SECONDS):
        seldom(Pending(None, int(now[0]) + 1, "QUEUED", ""))
    assert said == [f"waiting for a worker, number {n} in the queue [QUEUED]" for n in (1, 11, 21)]


def test_what_is_waited_for_reads_as_a_person_would_say_it() -> None:
    assert waiting_line(Pending(42, 1, "BUDGET", "the day's budget is spent")) == (
        "waiting for a worker, number 1 in the queue, about 42 s: the day's budget is spent [BUDGET]"
    )


@pytest.mark.parametrize("command", ["renew", "done"])
def test_renew_and_done_take_the_lease_that_acquire_printed(opened: Open, command: str) -> None:
    fake = opened()
    assert run(fake, command, "lease-1") == (DONE, "OK\n", "")
    assert fake.heard == [f"{command.upper()} lease-1"]
    ended = opened(**{command.upper(): ENDED})
    assert run(ended, command, "lease-1") == (
        REFUSED,
        "",
        "compute-broker: that lease has ended [DENIED]\n",
    )


def test_watch_prints_a_line_for_each_notice_until_the_broker_refuses(opened: Open) -> None:
    told = [
        "OK",
        "NOTICE interrupt ip=127.0.0.1 lease=lease-1 in=118 replacement=127.0.0.2",
        "NOTICE drain ip=127.0.0.1 lease=lease-1 in=0 replacement=- reason=it is too old",
    ]
    code, out, err = run(opened(lines(*told), lines("ERROR: not today [CLOUD]")), "watch")
    assert out == (
        "interrupt 127.0.0.1 (lease-1) in 118 s; 127.0.0.2 replaces it\n"
        "drain 127.0.0.1 (lease-1): it is too old\n"
    )
    assert (code, err) == (REFUSED, "compute-broker: not today [CLOUD]\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["acquire", "--count", "0"],
        ["acquire", "--count", "1001"],
        ["acquire", "--ttl", "0"],
        ["acquire", "--wait", "-1"],
        ["acquire", "--colour"],
        ["renew"],
        ["done"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert result.stderr


@pytest.mark.parametrize("command", ["acquire", "renew", "done", "watch"])
def test_help_teaches_with_an_example(command: str) -> None:
    assert f"compute-broker {command} " in CliRunner().invoke(cli.app, [command, "--help"]).stdout


# --- a command that runs while leases are held --------------------------------------------------------------


def test_a_command_finds_its_workers_in_its_environment_and_its_exit_code_comes_back(opened: Open) -> None:
    fake = opened(Held(lease_line("lease-1", 2), lease_line("lease-2", 2).replace("port=2560", "port=99")))
    script = 'echo "$COMPUTE_BROKER_WORKER / $COMPUTE_BROKER_WORKERS / $1"; exit 41'
    ran = hold(fake, "sh", "-c", script, "sh", "--json", options=("--count", "2"))
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        41,
        "127.0.0.1:2560 / 127.0.0.1:2560 127.0.0.1:99 / --json\n",
        "",
    )
    assert fake.heard[0] == "ACQUIRE count=2 hold=connection"
    assert [line for line in fake.heard if line.startswith("DONE")] == ["DONE lease-1", "DONE lease-2"]


def test_a_command_that_does_not_exist_gives_the_lease_back(opened: Open) -> None:
    fake = opened(Held(lease_line("lease-1")))
    ran = hold(fake, "/no/such/command")
    assert (ran.returncode, ran.stdout) == (127, "")
    assert ran.stderr == "compute-broker: cannot run /no/such/command: No such file or directory\n"
    assert fake.heard_within(1, "DONE lease-1")


def test_a_refusal_runs_no_command(opened: Open) -> None:
    fake = opened(lines("ERROR: nothing to be had [NO_CAPACITY]"))
    ran = hold(fake, "echo", "ran")
    assert (ran.returncode, ran.stdout) == (REFUSED, "")
    assert ran.stderr == "compute-broker: nothing to be had [NO_CAPACITY]\n"


def test_a_command_keeps_its_exit_code_when_the_lease_cannot_be_given_back(opened: Open) -> None:
    ran = hold(opened(Held(lease_line("lease-1")), DONE="ERROR: not now [CLOUD]"), "sh", "-c", "exit 5")
    assert ran.returncode == 5
    assert ran.stderr.startswith("compute-broker: the leases end by themselves, the broker was not told:")


def test_signals_go_to_the_command_and_its_end_is_told_as_a_shell_tells_it(opened: Open) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        fake = opened(Held(lease_line("lease-1")))
        with subprocess.Popen(
            held_command(fake, "sh", "-c", "echo up; exec sleep 60"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            process.send_signal(number)
            process.wait(SECONDS_MAX)
        assert process.returncode == 128 + number
        assert fake.heard_within(1, "DONE lease-1")


def test_a_command_whose_holder_is_killed_frees_its_worker_at_once(opened: Open) -> None:
    held = Held(lease_line("lease-1"))
    with subprocess.Popen(
        held_command(opened(held), "sh", "-c", "echo up; read line"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert held.watched.wait(SECONDS_MAX)
        process.kill()
        assert held.closed.wait(SECONDS_MAX), "the command, which lives on, must not hold the connection"
    assert process.returncode == -signal.SIGKILL


def test_a_worker_that_is_lost_is_told_while_the_command_runs(opened: Open) -> None:
    held = Held(lease_line("lease-1"))
    fake = opened(held, RENEW=ENDED)
    saying = threading.Thread(
        target=lambda: held.say("NOTICE lost ip=127.0.0.1 lease=lease-1 in=0 replacement=-")
    )
    saying.start()
    with subprocess.Popen(
        held_command(fake, "sh", "-c", "read line"), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "compute-broker: lost 127.0.0.1 (lease-1)\n"
        assert process.stderr.readline() == (
            "compute-broker: lease-1 has ended: 127.0.0.1 is not yours any more\n"
        )
        assert process.stdin is not None
        process.stdin.close()
        process.wait(SECONDS_MAX)
    saying.join(SECONDS_MAX)
    assert process.returncode == 1, "what `read` says at the end of its input"


def test_on_a_terminal_the_line_about_waiting_stands_in_place(opened: Open) -> None:
    go_on = threading.Event()

    def slow(fake: FakeBroker, connection: object) -> None:
        lines(BOOTING)(fake, connection)  # type: ignore[arg-type]
        go_on.wait(SECONDS_MAX)
        lines_behind = f"{lease_line('lease-1')}\n".encode()
        connection.sendall(lines_behind)  # type: ignore[attr-defined]

    fake = opened(slow)
    inner, outer = pty.openpty()
    words = [sys.executable, "-m", "broker", "acquire", "--broker", f"127.0.0.1:{fake.port}"]
    environ = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=outer, env=environ, text=True) as process:
        os.close(outer)
        seen, ends_at = b"", time.monotonic() + SECONDS_MAX
        while b"number 3 in the queue, about 42 s" not in seen and time.monotonic() < ends_at:
            if select.select([inner], [], [], 0.1)[0]:
                seen += os.read(inner, 65_536)
        go_on.set()
        assert process.stdout is not None
        assert process.stdout.read().startswith("lease-1 127.0.0.1:2560 ")
    os.close(inner)
    assert b"number 3 in the queue, about 42 s" in seen
    assert b"\x1b" in seen
    assert process.returncode == DONE


def test_a_broker_that_hangs_up_is_not_asked_for_a_second_lease(opened: Open) -> None:
    fake = opened(reset)
    code, out, err = run(fake, "acquire")
    assert (code, out) == (UNREACHABLE, "")
    assert "it may have been carried out all the same" in err
    assert fake.heard == ["ACQUIRE"]
