"""Where performances keep their state."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A state directory in memory where there is one: what the disk promises is tested elsewhere, and waiting
    for it here would be most of the time that all performances take."""
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="compute-broker-", dir=place) as directory:
        yield Path(directory)
