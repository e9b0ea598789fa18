"""The laboratory as a fixture; modules whose tests share one broker make theirs with `laboratory`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.lab import Lab, laboratory
from tests.support.cloud import MotoServer


@pytest.fixture
def lab(moto_server: MotoServer, tmp_path: Path) -> Iterator[Lab]:
    with laboratory(moto_server, tmp_path) as fresh:
        yield fresh
