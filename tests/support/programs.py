"""Programs that tests run and that this repository does not bring."""

from __future__ import annotations

import shutil


def tclsh() -> str:
    """The Tcl interpreter's path."""
    path = shutil.which("tclsh")
    assert path is not None, "these tests need Tcl 8.6: install the system package `tcl`"
    return path
