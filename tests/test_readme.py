"""What the README shows works as it stands: its examples run, and its AWS commands exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest
from botocore import xform_name

from broker.core.settings import parse
from tests.support.broker_process import BrokerProcess

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS_MAX = 60.0


def blocks(kind: str) -> list[str]:
    """The README's code blocks marked `test=<kind>`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [match["text"] for match in BLOCK.finditer(text) if match["info"].split() == [f"test={kind}"]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    with BrokerProcess(tmp_path_factory.mktemp("readme"), {}) as process:
        yield process


def run(running: BrokerProcess, words: list[str], text: str) -> str:
    """Run an example as its reader would, at the port where this test's broker listens."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(running.directory),
        "COMPUTE_BROKER_HOST": "127.0.0.1",
        "COMPUTE_BROKER_PORT": str(running.port),
    }
    text = text.replace("127.0.0.1:9000", f"127.0.0.1:{running.port}")
    text = text.replace("socket 127.0.0.1 9000", f"socket 127.0.0.1 {running.port}")
    text = text.replace('("127.0.0.1", 9000)', f'("127.0.0.1", {running.port})')
    text = text.replace(".venv/bin/compute-broker", str(Path(sys.executable).parent / "compute-broker"))
    done = subprocess.run(
        words, input=text, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=SECONDS_MAX
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_python_examples_get_a_worker_and_use_it(running: BrokerProcess) -> None:
    with_package, bare = blocks("python")
    assert re.fullmatch(
        r"127\.\d+\.\d+\.\d+ 42\n", run(running, [sys.executable, "-W", "error", "-"], with_package)
    )
    assert re.fullmatch(r"Worker IP: 127\.[\d.]+\n", run(running, [sys.executable, "-W", "error", "-"], bare))


def test_the_tcl_examples_get_a_worker_and_use_it(running: BrokerProcess) -> None:
    tclsh = shutil.which("tclsh")
    assert tclsh, "tclsh is missing: install the package 'tcl' (make setup does, as root on Debian)"
    bare, with_package = blocks("tcl")
    assert re.fullmatch(r"Got worker at: 127\.[\d.]+\n", run(running, [tclsh], bare))
    assert run(running, [tclsh], with_package) == "42\n"


def test_the_command_line_examples_work(running: BrokerProcess) -> None:
    first, overridden = blocks("cli")
    output = run(running, ["bash", "-eu"], first)
    assert re.match(r"127\.[\d.]+\n", output)
    assert output.endswith("OK\n")
    assert "max_workers = 3\n" in run(running, ["bash", "-eu"], overridden)


def test_the_lease_examples_hold_a_lease_and_give_it_back(running: BrokerProcess) -> None:
    here = running.asking("ACQUIRE hold=connection client=readme")
    while here.line().startswith("PENDING"):  # the worker is warm after that: the examples need not wait
        pass
    before = [row["leases"] for row in running.status()]
    for kind, words, told in (
        ("leases-python", [sys.executable, "-W", "error", "-"], r"lease-\w+ 127\.[\d.]+ \d+\n"),
        ("leases-cli", ["bash", "-eu"], r"working on 127\.[\d.]+:2560\n"),
    ):
        (example,) = blocks(kind)
        assert re.fullmatch(told, run(running, words, example))
        assert [row["leases"] for row in running.status()] == before
    here.close()


def test_the_sample_settings_are_sound() -> None:
    blocks_of_settings = blocks("settings")
    pools = [parse(tomllib.loads(one), {}).pool["default"] for one in blocks_of_settings]
    sample, regional, warm, stopped = pools
    assert sample.max_workers == 2
    assert [one.key_name for one in regional.by_region] == [None, "dserv-workers-eu"]
    assert list(warm.warm_schedule.values()) == [2, 1]
    assert (stopped.warm_stopped, stopped.market) == (2, "on-demand")


def test_every_aws_command_exists_with_every_option() -> None:
    session = botocore.session.get_session()
    commands = [
        shlex.split(command.replace("\\\n", " "))
        for block in blocks("aws")
        for command in re.split(r"(?<!\\)\n", block)
        if command.strip()
    ]
    assert len(commands) >= 8
    for words in commands:
        if words[0] == "chmod":
            continue
        program, service, operation, *arguments = words
        assert program == "aws"
        if operation == "wait":
            known = session.get_waiter_model(service).waiter_names
            assert arguments[0] in {xform_name(name, "-") for name in known}
            continue
        model = session.get_service_model(service)
        operations = {xform_name(name, "-"): name for name in model.operation_names}
        shape = model.operation_model(operations[operation]).input_shape
        members = {xform_name(name, "-") for name in shape.members} if shape else set()
        # four options of the command line tool itself, and four of its short forms for nested parameters
        members |= {"query", "output", "protocol", "port", "cidr"}
        options = {word[2:] for word in arguments if word.startswith("--")}
        assert options <= members, (operation, options - members)


def test_every_link_within_the_repository_leads_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_metric_the_readme_names_is_served(running: BrokerProcess) -> None:
    run(running, [sys.executable, "-"], blocks("python")[0])
    named = set(
        re.findall(r"`(compute_broker_\w+)(?:\{[^}]*\})?`", (ROOT / "README.md").read_text(encoding="utf-8"))
    )
    assert len(named) >= 12
    _, served = running.http("/metrics")
    assert {name for name in named if name not in served} == set()


def test_the_iam_policy_is_json_without_wildcard_actions() -> None:
    policy = json.loads((ROOT / "deploy" / "iam-policy.json").read_text(encoding="utf-8"))
    for statement in policy["Statement"]:
        actions = statement["Action"]
        assert not [
            action for action in ([actions] if isinstance(actions, str) else actions) if "*" in action
        ]
