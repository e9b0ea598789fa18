"""Reads a systemd unit file, for tests that hold on to what it says.

Only as much of systemd.syntax(7) as our units use: sections, comments, and keys that may come more than once.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SYSTEMD = REPOSITORY / "deploy" / "systemd"
SERVICE = SYSTEMD / "compute-broker.service"
SOCKET = SYSTEMD / "compute-broker.socket"
SYSUSERS = SYSTEMD / "compute-broker.sysusers.conf"

_SPAN_SECONDS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}


def keys(unit: Path) -> dict[str, list[str]]:
    """`"Section.Key"` → its values, in order."""
    section, found = "", dict[str, list[str]]()
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and line[0] not in "#;":
            key, _, value = line.partition("=")
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


def one(unit: Path, key: str) -> str:
    """The value of a key that comes exactly once."""
    (value,) = keys(unit)[key]
    return value


def seconds(span: str) -> float:
    """`"15min"` → 900.0, for the single-unit spans our files use."""
    match = re.fullmatch(r"(\d+)(\w*)", span)
    assert match is not None, span
    return int(match[1]) * _SPAN_SECONDS[match[2]]


def environment(unit: Path) -> dict[str, str]:
    """What its `Environment=` lines set."""
    return dict(value.split("=", 1) for value in keys(unit).get("Service.Environment", []))


def need(tool: str, package: str) -> str:
    """The tool's path; without it the test is skipped and says how to get it."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed, so the units are NOT checked: apt-get install {package}")
    return path


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs to the end within a minute, output captured."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
