"""A command that runs while something is held for it: its signals, its end and its exit code.

Signals that ask this program to end go to the command instead, which decides. What a terminal sends on Ctrl-C
or Ctrl-\\ it sends to the command as well: that is not sent on, or the command would hear it twice.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 126, 127  # POSIX: Shell & Utilities, "Exit Status for Commands"
EXIT_SIGNALLED = 128  # and the number of the signal that ended the command
SENT_ON = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


class Child:
    """One command, run once, from the main thread."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str]) -> None:
        self._words = list(words)
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def run(self) -> int:
        """Run it to its end. Returns its exit code, as a shell would tell it. Raises OSError when there is
        no such command, or none that can be run."""
        before = {number: signal.signal(number, self._send_on) for number in SENT_ON}
        try:
            self._process = subprocess.Popen(self._words, env=self._environ)  # noqa: S603  # what its user typed
            for number in self._early:
                self._process.send_signal(number)
            code = self._process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return code if code >= 0 else EXIT_SIGNALLED - code

    def _send_on(self, number: int, _: FrameType | None) -> None:
        if number in FROM_TERMINAL and _in_foreground():
            return
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)


def exit_code_of(error: OSError) -> int:
    """What a shell exits with when a command cannot be run."""
    return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE


def _in_foreground() -> bool:
    """Whether a terminal sends its signals to this program and to what it runs alike."""
    for stream in (sys.__stdin__, sys.__stderr__):
        with suppress(OSError, ValueError, AttributeError):
            return os.tcgetpgrp(stream.fileno()) == os.getpgrp()  # type: ignore[union-attr]
    return False
