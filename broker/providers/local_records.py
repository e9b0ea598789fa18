"""What is remembered of each local machine: one small file, which is also the worker's leash.

A record is written before its process is started, so that a resent order finds its machine; whatever a
process shows by itself (that it runs, that it has ended) is only noted here. The worker watches its record's
file: when the file is gone, or nobody has touched it for too long, no broker is left that would end the
worker, and it ends itself. Records are replaced whole and never flushed to the disk: a crash of the machine
ends the workers as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

LOG_BYTES_MAX = 1024 * 1024  # looked at with every listing: talking without end must not fill the disk
LOG_BYTES_KEPT = 64 * 1024  # of a log that grew too long
REASON_CHARS_MAX = 200


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an order asks for. An empty command is the worker that comes with the broker."""

    command: tuple[str, ...]
    port: int
    leash_seconds: int
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Record:
    """One machine. Without `pid` its process has not been started, as far as the writer lived to know."""

    id: str
    order_id: str
    parameters: str  # the order's, to the byte: a resend must not differ
    address: str
    port: int
    launched_unix: float
    pid: int | None = None
    started_seconds: float = 0.0  # from the machine's boot to the start of the process
    tags: Mapping[str, str] = field(default_factory=dict)
    terminate_asked: bool = False
    ended_unix: float | None = None
    reason: str = ""


RECIPE = TypeAdapter(Recipe)
RECORD = TypeAdapter(Record)


class Records:
    """The files in one directory. Raises OSError; a file that holds no record counts as missing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self) -> None:
        """Make the directory, for this user alone, and clear away what a killed broker was writing."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.directory} cannot be written")
        for unfinished in self.directory.glob("*.tmp"):
            unfinished.unlink(missing_ok=True)

    def leash_file(self, instance_id: str) -> Path:
        return self.directory / f"{instance_id}.json"

    def log_file(self, instance_id: str) -> Path:
        return self.directory / f"{instance_id}.log"

    def ids(self) -> list[str]:
        """Raises OSError for a directory that cannot be read: that is not an empty one."""
        try:
            return [path.stem for path in self.directory.iterdir() if path.suffix == ".json"]
        except FileNotFoundError:
            return []

    def read(self, instance_id: str) -> Record | None:
        try:
            record = RECORD.validate_json(self.leash_file(instance_id).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return record if record.id == instance_id else None

    def addresses_taken(self, *, besides: str) -> set[str]:
        """Where the other machines live, those included that do not listen yet."""
        records = (self.read(instance_id) for instance_id in self.ids() if instance_id != besides)
        return {record.address for record in records if record is not None and record.ended_unix is None}

    def write(self, record: Record) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may have been cleared away
        temporary = self.directory / f"{record.id}.tmp"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(RECORD.dump_json(record))
            temporary.rename(self.leash_file(record.id))
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def remove(self, instance_id: str) -> None:
        """Forget a machine; the record goes last, so that whatever interrupts this is taken up again."""
        self.log_file(instance_id).unlink(missing_ok=True)
        self.leash_file(instance_id).unlink(missing_ok=True)

    def touch(self, instance_id: str) -> None:
        """Tell the worker that its broker lives."""
        with suppress(FileNotFoundError):
            os.utime(self.leash_file(instance_id))

    def trim_log(self, instance_id: str) -> None:
        """Cut a log that grew too long to its end. Its writer appends, so it goes on behind what was kept."""
        path = self.log_file(instance_id)
        if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
            kept = _tail(path, LOG_BYTES_KEPT)
            with path.open("r+b") as file:
                file.truncate(0)
            with path.open("ab") as file:
                file.write(kept)

    def last_words(self, instance_id: str) -> str:
        """The last line of the log that says something, or nothing."""
        try:
            text = _tail(self.log_file(instance_id), 4096).decode("utf-8", "replace")
        except OSError:
            return ""
        return next(_printable_lines(reversed(text.splitlines())), "")


def _tail(path: Path, bytes_max: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - bytes_max))
        return file.read(bytes_max)


def _printable_lines(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        words = "".join(char if char.isprintable() else " " for char in line).split()
        if words:
            yield " ".join(words)[:REASON_CHARS_MAX]
