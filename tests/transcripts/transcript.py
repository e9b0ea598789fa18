"""A dialogue with the broker as text: reading a corpus file, filling in and matching its placeholders.

Pure: whoever plays a transcript brings the connections. README.md beside this file defines the format.
A mistake in a file is an error that names the file and the line, never a line that is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
SPOKEN = re.compile(r"(?P<who>[CS])(?P<number>[2-9]?)(?P<mark>[:+])(?: (?P<text>.*))?")
HEADER = re.compile(r"(?P<about>broker|cloud|pool [a-z][a-z0-9-]*): (?P<pairs>\S+=\S+( \S+=\S+)*)")
DIRECTION = re.compile(r"\* (?P<verb>[a-z]+)(?: (?P<amount>\d+))?")
DIRECTIONS = {
    "waiting": True,
    "booting": True,
    "seconds": True,
    "boot": False,
    "protect": False,
    "silent": False,
    "stop": False,
}  # verb → whether it has a number
PLACEHOLDER = re.compile(r"\{(?P<kind>[a-z]+)(?P<number>\d*)\}")
KINDS = {  # placeholder → what it may stand for
    "ip": r"\d{1,3}(?:\.\d{1,3}){3}",
    "id": r"[a-z]+-[A-Za-z0-9.-]+",
    "n": r"-?\d+(?:\.\d+)?",
    "time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
    "more": r".*",
}
REMEMBERED = frozenset({"ip", "id"})  # the others may stand for something else at every place
REPEATED = re.compile(r"\{(?P<letter>[\w ])\*(?P<times>\d{1,5})\}")
ESCAPE = re.compile(r"\\(?:x(?P<hex>[0-9a-f]{2})|(?P<letter>[rt\\]))")
ESCAPES = {"r": "\r", "t": "\t", "\\": "\\"}
SAYS_NO_MORE, VANISHES, CLOSES = "<says no more>", "<vanishes>", "<closes>"


@dataclass(frozen=True, slots=True)
class Says:
    """A client sends `text`; a whole line, unless `partial`."""

    text: str
    partial: bool = False
    client: int = 1


@dataclass(frozen=True, slots=True)
class Hears:
    """The broker sends one line to that client."""

    text: str
    client: int = 1


@dataclass(frozen=True, slots=True)
class Ends:
    """A client's connection comes to an end, in one of three ways."""

    how: str
    client: int = 1


@dataclass(frozen=True, slots=True)
class Direction:
    """What happens beside the dialogue."""

    verb: str
    amount: int = 0


Line = Says | Hears | Ends | Direction


@dataclass(frozen=True, slots=True)
class Transcript:
    """One file of the corpus."""

    name: str
    title: str
    headers: dict[str, dict[str, str]]
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def takes_time(self) -> bool:
        """Whether it says that time passes: then only a virtual clock plays it."""
        return any(isinstance(line, Direction) and line.verb == "seconds" for line in self.lines)

    @property
    def one_by_one(self) -> bool:
        """Whether it is nothing but commands and their replies, so that a client library can play it."""
        pairs = list(zip(self.lines[::2], self.lines[1::2], strict=False))
        return len(self.lines) % 2 == 0 and all(
            isinstance(says, Says)
            and isinstance(hears, Hears)
            and says.client == hears.client
            and not says.partial
            and unescaped(says.text).isascii()
            and unescaped(says.text).isprintable()
            for says, hears in pairs
        )


class Faulty(Exception):
    """A corpus file is not written as the format wants it."""


def corpus() -> list[Transcript]:
    """Every file, in alphabetical order."""
    return [read(path) for path in sorted(CORPUS.glob("*.txt"))]


def read(path: Path) -> Transcript:
    """One file. Raises Faulty."""
    title, *rest = path.read_text(encoding="ascii").splitlines()
    headers: dict[str, dict[str, str]] = {}
    lines: list[Line] = []
    for number, text in enumerate(rest, start=2):
        if not text.strip() or text.startswith("#"):
            continue
        header = HEADER.fullmatch(text)
        if header and not lines:
            pairs = (pair.partition("=") for pair in header["pairs"].split(" "))
            headers[header["about"]] = {key: value for key, _, value in pairs}
            continue
        line = _spoken(text) or _direction(text)
        if line is None:
            raise Faulty(f"{path.name}, line {number}: {text!r} is none of the format's lines")
        lines.append(line)
    return Transcript(path.stem, title, headers, tuple(lines))


def _spoken(text: str) -> Line | None:
    match = SPOKEN.fullmatch(text)
    if match is None:
        return None
    spoken, client = match["text"] or "", int(match["number"] or 1)
    if match["who"] == "C":
        if spoken in (SAYS_NO_MORE, VANISHES):
            return Ends(spoken, client)
        return Says(spoken, match["mark"] == "+", client)
    if match["mark"] == "+":
        return None  # a broker that stops in the middle of a line is no part of the protocol
    return Ends(CLOSES, client) if spoken == CLOSES else Hears(spoken, client)


def _direction(text: str) -> Direction | None:
    match = DIRECTION.fullmatch(text)
    if match is None or DIRECTIONS.get(match["verb"]) is not bool(match["amount"]):
        return None
    return Direction(match["verb"], int(match["amount"] or 0))


def unescaped(text: str) -> str:
    """`\\xff`, `\\r`, `\\t`, `\\\\` and `{a*1000}` as the characters they stand for."""

    def character(match: re.Match[str]) -> str:
        return chr(int(match["hex"], 16)) if match["hex"] else ESCAPES[match["letter"]]

    repeated = REPEATED.sub(lambda match: match["letter"] * int(match["times"]), text)
    return ESCAPE.sub(character, repeated)


@dataclass(slots=True)
class Memory:
    """What the placeholders of one performance stand for."""

    known: dict[str, str] = field(default_factory=dict)

    def to_send(self, says: Says) -> str:
        """The characters to send. Raises KeyError for a placeholder that no reply has filled."""
        filled = PLACEHOLDER.sub(lambda match: self.known[match[0]], says.text)
        return unescaped(filled) + ("" if says.partial else "\n")

    def agrees(self, expected: str, reply: str) -> bool:
        """Whether a reply is what the transcript has. Placeholders that are met first here are filled.

        Two placeholders never stand for the same: {ip2} is another worker than {ip}.
        """
        names: list[str] = []
        match = re.fullmatch("".join(self._pattern(expected, names)), reply)
        if match is None:
            return False
        found = dict(zip(names, match.groups(), strict=True))
        if set(found.values()) & set(self.known.values()) or len(set(found.values())) < len(found):
            return False
        self.known.update(found)
        return True

    def _pattern(self, expected: str, names: list[str]) -> Iterator[str]:
        end = 0
        for match in PLACEHOLDER.finditer(expected):
            yield re.escape(expected[end : match.start()])
            end = match.end()
            yield self._part(match, names)
        yield re.escape(expected[end:])

    def _part(self, match: re.Match[str], names: list[str]) -> str:
        name, kind = match[0], match["kind"]
        if kind not in REMEMBERED:
            return KINDS[kind]
        if name in self.known:
            return re.escape(self.known[name])
        if name in names:
            return f"(?:\\{names.index(name) + 1})"
        names.append(name)
        return f"({KINDS[kind]})"
