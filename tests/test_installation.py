"""Which installation a broker is: the same for one state directory on one host, whatever else is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker.installation import owner_of

ONE, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2


def host(folder: Path, text: str) -> Path:
    path = folder / "machine-id"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_owner_outlives_the_state_directory(tmp_path: Path) -> None:
    state = tmp_path / "state"
    before = owner_of(state, host(tmp_path, f"{ONE}\n"))
    state.mkdir()
    assert before == owner_of(state, host(tmp_path, ONE))
    assert before is not None
    assert re.fullmatch(r"[0-9a-f]{12}", before)
    assert before not in ONE


def test_another_directory_or_another_host_is_another_owner(tmp_path: Path) -> None:
    owners = {
        owner_of(tmp_path / state, host(tmp_path, machine))
        for state in ("a", "b")
        for machine in (ONE, OTHER)
    }
    assert len(owners) == 4
    assert None not in owners


@pytest.mark.parametrize("text", ["", "uninitialized\n", ONE[:-1], "ü"])
def test_a_host_without_an_id_has_no_owner_of_its_own(tmp_path: Path, text: str) -> None:
    assert owner_of(tmp_path, host(tmp_path, text)) is None
    assert owner_of(tmp_path, tmp_path / "nothing") is None
