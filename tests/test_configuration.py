"""Where the settings come from: which file, what its author reads when it is wrong, and how it is shown."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.configuration import EMBEDDED, VARIABLE, load, to_toml
from broker.core.errors import SettingsError
from broker.core.settings import parse
from tests.core.generated import FEW

NOWHERE = Path("/nonexistent/broker.toml")
NOBODY = 65_534


def written(path: Path, broker_id: str) -> Path:
    path.write_text(f'[broker]\nid = "{broker_id}"\n', encoding="utf-8")
    return path


def problem(path: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        load(path, {})
    (said,) = caught.value.problems
    return said


# --- which file -----------------------------------------------------------------------------------------


def test_without_any_file_it_is_the_embedded_default() -> None:
    found = load(None, {}, NOWHERE)
    assert found.settings == parse({}, {})
    assert found.source == EMBEDDED


def test_the_file_that_is_named_comes_first_then_the_variable_then_the_systems(tmp_path: Path) -> None:
    named = written(tmp_path / "named.toml", "named")
    variable = {VARIABLE: str(written(tmp_path / "variable.toml", "variable"))}
    system = written(tmp_path / "system.toml", "system")
    found = [load(named, variable, system), load(None, variable, system), load(None, {}, system)]
    assert [it.settings.broker.id for it in found] == ["named", "variable", "system"]
    assert [it.source for it in found] == [str(named), variable[VARIABLE], str(system)]


def test_a_variable_that_is_empty_names_no_file() -> None:
    assert load(None, {VARIABLE: ""}, NOWHERE).source == EMBEDDED


def test_variables_go_over_every_file_and_over_none(tmp_path: Path) -> None:
    environ = {"COMPUTE_BROKER__POOL__DEFAULT__MAX_WORKERS": "3"}
    for path in (None, written(tmp_path / "broker.toml", "lab")):
        assert load(path, environ, NOWHERE).settings.pool["default"].max_workers == 3


# --- what is wrong with it ------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "missing.toml"
    assert problem(path) == f"{path}: there is no such file"
    with pytest.raises(SettingsError, match="there is no such file"):
        load(None, {VARIABLE: str(path)}, NOWHERE)


def test_a_file_that_is_not_toml_says_where(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text('[broker]\nid = "lab\n')
    assert problem(path).startswith(f"{path}: is not TOML: ")
    assert "line 2" in problem(path)


@pytest.mark.parametrize("content", [b'[broker]\nid = "caf\xe9"\n', None], ids=["latin-1", "a directory"])
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broker.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert problem(path).startswith(f"{path}: cannot be read: ")


def test_a_value_that_is_wrong_is_said_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text('[pool.gpu]\nmax_workers = "many"\n[broker]\nlog_level = "loud"\n')
    with pytest.raises(SettingsError) as caught:
        load(path, {}, NOWHERE)
    assert [said.partition(":")[0] for said in caught.value.problems] == [
        "broker.log_level", "pool.gpu.max_workers",
    ]  # fmt: skip


def test_a_system_file_behind_a_closed_door_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    """The directory belongs to the broker's own group: anybody else's `compute-broker get` meets this."""
    system = tmp_path / ("x" * 300) / "broker.toml"  # no file system has such a name: looking is an error
    with pytest.raises(SettingsError, match="cannot be read: "):
        load(None, {}, system)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not look")
def test_a_user_who_may_not_look_into_the_systems_directory_is_told_so(tmp_path: Path) -> None:
    closed = tmp_path / "etc"
    closed.mkdir()
    written(closed / "broker.toml", "lab")
    closed.chmod(0o700)
    script = (
        "import os, pathlib, sys; from broker.configuration import load; from broker.core.errors import *\n"
        f"os.setuid({NOBODY})\n"
        "try: load(None, {}, pathlib.Path(sys.argv[1]))\n"
        "except SettingsError as error: print(error.message)"
    )
    command = [sys.executable, "-c", script, str(closed / "broker.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[1])
    assert "Permission denied" in done.stdout, done.stderr


# --- how it is shown ------------------------------------------------------------------------------------


def again(document: dict[str, Any]) -> None:
    settings = parse(document, {})
    assert parse(tomllib.loads(to_toml(settings)), {}) == settings


def test_the_settings_in_effect_are_shown_as_a_file_that_can_be_read_again() -> None:
    again({})
    shown = to_toml(parse({"pool": {"gpu": {"sharing": "exclusive", "command": ["a b", "c"]}}}, {}))
    assert shown.startswith('[broker]\nid = "local"\n')
    assert "\n[pool.default]\n" in shown
    assert '[pool.gpu]\nprovider = "local"' in shown
    assert 'command = ["a b", "c"]' in shown
    assert "region = " not in shown, "what is not set is not shown"


LETTERS = st.characters(exclude_categories=["Cs"])  # halves of surrogate pairs are no letters
TAG_KEYS = st.text(LETTERS, max_size=10).map("t".__add__)


@given(
    name=st.text(LETTERS, min_size=1, max_size=40),
    tags=st.dictionaries(TAG_KEYS, st.text(LETTERS, max_size=10), max_size=3),
    wait=st.floats(0, 1e8),
)
@example(name="\U0001f980 \x7f \x00 \\ \" ' \n \r \u2028", tags={"t\U0001f980": "\x1f"}, wait=5e-05)
@FEW
def test_whatever_letters_are_in_it_the_shown_file_says_the_same(
    name: str, tags: dict[str, str], wait: float
) -> None:
    again({"pool": {"default": {"name_tag": name, "tags": tags, "wait": wait, "user_data": name}}})


def test_a_warm_schedule_is_shown_as_it_can_be_read_again() -> None:
    again({"pool": {"default": {"warm": 1, "warm_schedule": {"Mon-Fri 08:00-19:00 Europe/Berlin": 2}}}})
