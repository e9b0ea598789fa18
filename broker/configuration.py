"""Finds and reads the configuration file; core.settings understands it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from broker.core.errors import SettingsError
from broker.core.settings import Settings, parse

VARIABLE = "COMPUTE_BROKER_CONFIG"
SYSTEM_FILE = Path("/etc/compute-broker/broker.toml")
EMBEDDED = "the embedded default (local workers, no file)"


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings, and where they came from in words."""

    settings: Settings
    source: str


def load(path: Path | None, environ: Mapping[str, str], system_file: Path = SYSTEM_FILE) -> Configuration:
    """`path`, else $COMPUTE_BROKER_CONFIG, else the system's file, else the embedded default.

    Raises SettingsError with every problem.
    """
    if path is None and environ.get(VARIABLE):
        path = Path(environ[VARIABLE])
    if path is None and _is_there(system_file):
        path = system_file
    if path is None:
        return Configuration(parse({}, environ), EMBEDDED)
    return Configuration(parse(_read(path), environ), str(path))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # its directory is closed to us: reading it says so, the embedded default would be a lie
        return True


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError([f"{path}: there is no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: cannot be read: {error}"]) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([f"{path}: is not TOML: {error}"]) from None


def to_toml(settings: Settings) -> str:
    """The settings in effect, as a file to read again: TOML shares JSON's strings, numbers, lists."""
    values = settings.model_dump(mode="json", exclude_none=True)
    tables = [
        ("broker", values["broker"]),
        *((f"pool.{name}", pool) for name, pool in values["pool"].items()),
    ]
    return "\n".join(f"[{name}]\n{_table(table)}" for name, table in tables)


def _table(values: dict[str, object]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in values.items())


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value(key)} = {_value(item)}" for key, item in value.items()) + "}"
    # TOML knows no surrogate pairs, which JSON would write for an emoji, and no bare DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
