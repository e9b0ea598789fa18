"""Every place at which the broker can be interrupted, read off its own source.

A task can be killed only where it waits, so the places where it waits are the places at which a kill has to
be tried. `points` lists them; the host tells where tasks stood when it killed them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BROKER = Path(__file__).parent.parent
# What runs in the daemon and is run here: not the web server, which has real sockets only; no other cloud.
COMMANDS = ("service.py", "acquiring.py", "admission.py", "granting.py", "operations.py")
MODULES = (
    "daemon.py",
    "orders.py",
    "server.py",
    *COMMANDS,
    "store.py",
    "database.py",
    "loops/*.py",
    "providers/ec2*.py",
)
REAL_ONLY = {"_listen", "listen"}  # opens sockets: there are none in a simulation


@dataclass(frozen=True, slots=True)
class Point:
    """One `await`, `async with` or `async for`."""

    path: str  # from the package's folder
    first: int
    last: int
    function: str

    def __str__(self) -> str:
        return f"{self.path}:{self.first} in {self.function}"


@cache
def points() -> tuple[Point, ...]:
    """In the order of files and lines."""
    paths = sorted(path for pattern in MODULES for path in BROKER.glob(pattern))
    return tuple(point for path in paths for point in _points_in(path))


def struck(stood_at: Mapping[str, int]) -> dict[Point, int]:
    """How often a task stood at each point when it was killed; `stood_at` counts "path:line"."""
    found = dict.fromkeys(points(), 0)
    for place, times in stood_at.items():
        for point in points_at(place):
            found[point] += times
    return found


def points_at(place: str) -> list[Point]:
    """The narrowest that spans a "path:line": an `await` within an `async with` is not the `async with`."""
    path, _, text = place.rpartition(":")
    line = int(text)
    spanning = [point for point in points() if point.path == path and point.first <= line <= point.last]
    return sorted(spanning, key=lambda point: point.last - point.first)[:1]


def _points_in(path: Path) -> Iterable[Point]:
    name = path.relative_to(BROKER).as_posix()
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.AsyncFunctionDef) and function.name not in REAL_ONLY:
            for node in _waits_of(function):
                header = node.items[-1].context_expr if isinstance(node, ast.AsyncWith) else node
                yield Point(name, node.lineno, header.end_lineno or node.lineno, function.name)


def _waits_of(node: ast.AST) -> Iterable[ast.Await | ast.AsyncWith | ast.AsyncFor]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.AsyncFunctionDef | ast.FunctionDef | ast.Lambda):
            continue  # waits of its own
        if isinstance(child, ast.Await | ast.AsyncWith | ast.AsyncFor) and not _never_waits(child):
            yield child
        yield from _waits_of(child)


def _never_waits(node: ast.Await | ast.AsyncWith | ast.AsyncFor) -> bool:
    """`async with asyncio.timeout(...)` sets a timer and goes on."""
    if not isinstance(node, ast.AsyncWith):
        return False
    return all(ast.unparse(item.context_expr).startswith("asyncio.timeout(") for item in node.items)
