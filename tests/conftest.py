"""What every test may use: an environment without the developer's settings, one moto, the real command."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.broker_process import BrokerProcesses
from tests.support.cloud import MotoServer

# Whatever these say on somebody's machine must not decide how a test ends.
FOREIGN = ("COMPUTE_BROKER_", "AWS_", "BOTO_", "LISTEN_", "WATCHDOG_", "NOTIFY_SOCKET")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> Iterator[None]:
    """Tests, and the processes that they start, see no setting of AWS's, systemd's or ours."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in tuple(os.environ):
            if variable.startswith(FOREIGN) or variable.upper() in PROXIES:
                patch.delenv(variable)
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """What a shell starts in its background ignores SIGINT, and so does every process that it starts.

    The tests that press Ctrl-C in a process of their own would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def moto_server() -> Iterator[MotoServer]:
    """One moto for the whole session; whoever uses it resets it first."""
    with MotoServer(images=False) as running:
        yield running


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[BrokerProcesses]:
    """Starts real brokers; they and their local workers end with the test."""
    with BrokerProcesses(tmp_path) as running:
        yield running
