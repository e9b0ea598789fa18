"""The files in deploy/systemd, held against systemd's own tools and against what they promise."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from broker import daemon
from broker.core.settings import parse
from broker.loops import reconcile
from broker.providers import local
from tests.deploy.sandbox import allowed_calls, expand, system_call_groups
from tests.deploy.unit_file import (
    REPOSITORY,
    SERVICE,
    SOCKET,
    SYSTEMD,
    SYSUSERS,
    environment,
    keys,
    need,
    one,
    run,
    seconds,
)

EXPOSURE_TENTHS_MAX = 15  # `systemd-analyze security --threshold=` counts in tenths
PEOPLES_UID_MIN = 1000  # below are system users (Debian policy manual, 9.2.2)


def with_a_program_that_exists(unit: Path, folder: Path) -> Path:
    """A copy whose ExecStart= names a program of this machine, because `verify` looks for it."""
    text, replaced = re.subn(r"(?m)^ExecStart=\S+", f"ExecStart={shutil.which('true')}", unit.read_text())
    assert replaced == unit.name.endswith(".service")
    copy = folder / unit.name
    copy.write_text(text)
    return copy


def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    need("systemd-analyze", "systemd")
    copies = [with_a_program_that_exists(unit, tmp_path) for unit in (SERVICE, SOCKET)]
    verified = run("systemd-analyze", "verify", "--man=no", *copies)
    # An unknown key is only a warning to `verify`, with exit code 0: silence is the test.
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_the_check_of_the_units_would_notice_a_misspelt_key(tmp_path: Path) -> None:
    need("systemd-analyze", "systemd")
    copy = with_a_program_that_exists(SERVICE, tmp_path)
    copy.write_text(copy.read_text().replace("WatchdogSec=", "WatchDogSecs="))
    assert "WatchDogSecs" in run("systemd-analyze", "verify", "--man=no", copy).stderr


def test_the_service_is_hardly_exposed() -> None:
    need("systemd-analyze", "systemd")
    verdict = run(
        "systemd-analyze",
        "security",
        "--no-pager",
        "--offline=true",
        f"--threshold={EXPOSURE_TENTHS_MAX}",
        SERVICE,
    )
    assert verdict.returncode == 0, verdict.stdout


def test_workers_outlive_a_restart() -> None:
    unit = keys(SERVICE)
    assert unit["Service.KillMode"] == ["process"]
    # Each of these would take /tmp or shared memory from the workers of the start before, or them from sight.
    assert unit.get("Service.PrivateTmp", ["no"]) == ["no"]
    assert unit.get("Service.RemoveIPC", ["no"]) == ["no"]
    assert unit.get("Service.PrivateUsers", ["no"]) == ["no"]
    assert unit["Service.ProcSubset"] == ["all"]
    assert [path.split(":")[0] for path in one(SERVICE, "Service.TemporaryFileSystem").split()] == [
        "/tmp",
        "/var/tmp",
    ]


def test_a_start_that_fails_slowly_is_tried_for_ever() -> None:
    # The limit counts starts within an interval: a start that takes longer than that never reaches it.
    assert seconds(one(SERVICE, "Service.TimeoutStartSec")) > seconds(
        one(SERVICE, "Unit.StartLimitIntervalSec")
    )
    assert one(SERVICE, "Service.Restart") == "on-failure"


def test_a_start_that_fails_at_once_reaches_the_limit_and_shows_as_failed() -> None:
    quickest = seconds(one(SERVICE, "Service.RestartSec")) * int(one(SERVICE, "Unit.StartLimitBurst"))
    assert quickest < seconds(one(SERVICE, "Unit.StartLimitIntervalSec"))


def test_readiness_and_liveness_come_from_the_main_process() -> None:
    assert one(SERVICE, "Service.Type") == "notify"
    assert one(SERVICE, "Service.NotifyAccess") == "main"


def test_a_reload_is_the_signal_that_the_broker_takes_for_one() -> None:
    # What the signal does is shown by tests/acceptance/test_reload.py, on a real process.
    assert one(SERVICE, "Service.ExecReload").split() == ["/bin/kill", "-HUP", "$MAINPID"]


def test_a_slow_cloud_is_not_taken_for_a_hang() -> None:
    slowest = reconcile.SCAN_SECONDS_MAX + reconcile.BEAT_SECONDS_MAX
    assert slowest < seconds(one(SERVICE, "Service.WatchdogSec"))


def test_a_stop_leaves_time_for_the_answers_of_launches_under_way() -> None:
    slowest = daemon.ANSWER_SECONDS_MAX + daemon.SETTLE_SECONDS_MAX + local.TERMINATE_GRACE_SECONDS
    assert slowest + local.KILL_SECONDS_MAX < seconds(one(SERVICE, "Service.TimeoutStopSec"))


def test_the_broker_may_open_a_descriptor_for_every_connection_it_accepts() -> None:
    assert int(one(SERVICE, "Service.LimitNOFILE")) > parse({}, {}).broker.connections_max


def test_the_system_calls_of_administrators_are_forbidden_and_those_of_a_daemon_are_not() -> None:
    need("systemd-analyze", "systemd")
    allowed = allowed_calls(SERVICE)
    assert {"socket", "accept4", "epoll_wait", "execve", "clone3", "fsync", "kill", "getrandom"} <= allowed
    forbidden = expand(
        ["@privileged", "@resources", "@mount", "@module", "@reboot", "@debug"], system_call_groups()
    )
    assert not allowed & forbidden


def test_the_socket_is_the_one_the_broker_looks_for() -> None:
    assert one(SOCKET, "Socket.ListenStream") == "127.0.0.1:9000"
    assert one(SOCKET, "Socket.FileDescriptorName") == "broker"
    assert int(one(SOCKET, "Socket.Backlog")) >= 1024
    assert SOCKET.stem == SERVICE.stem  # so that systemd passes it to this service


def test_the_user_of_the_unit_is_the_one_that_is_made() -> None:
    kind, name, number, comment, home = re.findall(r'"[^"]*"|\S+', SYSUSERS.read_text().splitlines()[-1])
    assert (kind, number, comment) == ("u", "-", '"compute-broker daemon"')
    assert name == one(SERVICE, "Service.User") == one(SERVICE, "Service.Group")
    assert home == f"/var/lib/{one(SERVICE, 'Service.StateDirectory')}"


def test_systemd_makes_that_user(tmp_path: Path) -> None:
    need("systemd-sysusers", "systemd")
    (tmp_path / "etc").mkdir()
    made = run("systemd-sysusers", f"--root={tmp_path}", SYSUSERS)
    assert made.returncode == 0, made.stderr
    user = next(
        line
        for line in (tmp_path / "etc/passwd").read_text().splitlines()
        if line.startswith("compute-broker:")
    )
    _name, password, uid, gid, _comment, home, shell = user.split(":")
    assert password == "x"
    shadow = tmp_path / "etc/shadow"
    shadow.chmod(0o600)  # it is made unreadable even for its owner
    assert shadow.read_text().startswith("compute-broker:!")
    assert 0 < int(uid) < PEOPLES_UID_MIN
    assert 0 < int(gid) < PEOPLES_UID_MIN
    assert home == "/var/lib/compute-broker"
    assert shell.endswith("/nologin")


def test_credentials_are_where_the_service_reads_and_cannot_write() -> None:
    files = environment(SERVICE)
    for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        assert files[variable].startswith(f"/etc/{one(SERVICE, 'Service.ConfigurationDirectory')}/")
    assert one(SERVICE, "Service.ProtectSystem") == "strict"
    assert one(SERVICE, "Service.EnvironmentFile") == "-/etc/compute-broker/environment"
    assert one(SERVICE, "Service.LimitCORE") == "0"


def test_the_unit_starts_what_the_package_installs() -> None:
    program, *arguments = one(SERVICE, "Service.ExecStart").split()
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert Path(program).name in scripts
    assert arguments == ["serve", "--config", "/etc/compute-broker/broker.toml"]


@pytest.mark.parametrize("path", sorted(SYSTEMD.iterdir()), ids=lambda path: path.name)
def test_every_file_is_mentioned_in_the_instructions(path: Path) -> None:
    assert path.name == "README.md" or f"`{path.name}`" in (SYSTEMD / "README.md").read_text()
