"""The corpus itself: that it is well written, that it leaves nothing out, and that the document quotes it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from broker import acquiring, admission, operations, server, service
from broker.core import errors, keys, policy, protocol
from broker.core.errors import BrokerError, ClientFault, Code, Refusal
from broker.core.protocol import Malformed, name_of, parse_line
from tests.transcripts.transcript import (
    CORPUS,
    Faulty,
    Hears,
    Memory,
    Says,
    Transcript,
    corpus,
    read,
    unescaped,
)

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "protocol.md"
RESERVED = {Code.AUTH, Code.BUDGET}  # clients know them already; no broker of this version says them
SPOKEN_LINE = re.compile(r"[CS][2-9]?[:+]( |$)")
ON_THE_CLIENTS_SIDE = re.compile(
    r" is one word, not | cannot carry these values"
)  # said before a byte is sent


def said() -> list[str]:
    """Every line of the corpus that clients say."""
    return [line.text for t in corpus() for line in t.lines if isinstance(line, Says)]


def heard() -> list[str]:
    """Every line of the corpus that the broker says."""
    return [line.text for t in corpus() for line in t.lines if isinstance(line, Hears)]


# --- nothing is left out -----------------------------------------------------------------------------------


def test_every_command_is_in_the_corpus_refused_and_carried_out() -> None:
    parsed = [parse_line(unescaped(text).encode("latin-1")) for text in said()]
    carried_out = {name_of(command) for command in parsed if not isinstance(command, Malformed)}
    refused = {name_of(command) for command in parsed if isinstance(command, Malformed)}
    assert carried_out == set(protocol.NAMES.values())
    assert refused == {*protocol.NAMES.values(), "unknown"}


def test_every_key_of_get_worker_is_in_the_corpus() -> None:
    used = {
        word.partition("=")[0] for text in said() if text.startswith("GET_WORKER ") for word in text.split()
    }
    assert set(protocol.GET_WORKER_KEYS) <= used


def test_every_key_of_acquire_is_in_the_corpus_and_in_the_document() -> None:
    used = {word.partition("=")[0] for text in said() if text.startswith("ACQUIRE ") for word in text.split()}
    assert set(protocol.ACQUIRE_KEYS) <= used
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [key for key in protocol.ACQUIRE_KEYS if f"`{key}=" not in text] == []


def codes_of(kind: type[BrokerError]) -> Iterator[Code | None]:
    yield kind.code
    for more in kind.__subclasses__():
        if more.__module__ == errors.__name__:
            yield from codes_of(more)


def test_every_code_that_an_error_carries_is_in_the_corpus() -> None:
    found = {match[1] for text in heard() if (match := re.search(r"^ERROR: .* \[([A-Z_]+)\]$", text))}
    assert found == {str(code) for code in codes_of(BrokerError) if code is not None} - RESERVED


def sentences(module: ModuleType) -> Iterator[str]:
    """Patterns of the sentences with which a module refuses what a client asks."""
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        kind, text = getattr(errors, node.func.id, None), node.args[0]
        if not isinstance(kind, type) or not issubclass(kind, ClientFault | Refusal):
            continue
        if isinstance(text, ast.Constant):
            yield re.escape(str(text.value))
        elif isinstance(text, ast.JoinedStr):
            parts = text.values
            yield "".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".+" for p in parts)


@pytest.mark.parametrize(
    "module",
    [protocol, keys, service, acquiring, admission, operations, server, policy],
    ids=lambda m: m.__name__,
)
def test_every_sentence_that_refuses_a_client_is_in_the_corpus(module: ModuleType) -> None:
    wanted = [
        pattern for pattern in sentences(module) if not ON_THE_CLIENTS_SIDE.search(pattern.replace("\\", ""))
    ]
    assert wanted
    assert [pattern for pattern in wanted if not any(re.search(pattern, text) for text in heard())] == []


def test_every_fixed_sentence_is_in_the_corpus() -> None:
    assert {kind(message).wire() for (message, _), kind in protocol.SENTENCES.items()} <= set(heard())


# --- the corpus is well written ----------------------------------------------------------------------------


@pytest.mark.parametrize("transcript", corpus(), ids=str)
def test_a_file_is_titled_with_a_sentence_and_ends_where_the_broker_has_spoken(
    transcript: Transcript,
) -> None:
    assert re.fullmatch(r"[A-Z].*[a-z0-9]\.", transcript.title)
    assert isinstance(transcript.lines[-1], Says) is False
    assert transcript.title.count(". ") == 0, "one sentence"


def test_no_two_files_say_the_same_title() -> None:
    titles = [transcript.title for transcript in corpus()]
    assert len(set(titles)) == len(titles) > 50


def test_the_client_libraries_play_a_good_part_of_the_corpus() -> None:
    assert len([transcript for transcript in corpus() if transcript.one_by_one]) >= 25


@pytest.mark.parametrize(
    "line", ["D: GET_WORKER", "C GET_WORKER", "S+ half", "* seconds", "* boot 3", "* dance", "C1: x"]
)
def test_a_line_that_is_none_of_the_formats_is_named_and_not_skipped(line: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text(f"A title.\n\nC: STATUS\nS: []\n{line}\n")
    with pytest.raises(Faulty, match=r"wrong\.txt, line 5"):
        read(path)


def test_a_header_after_the_dialogue_has_begun_is_named_and_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "late.txt"
    path.write_text("A title.\n\nC: STATUS\npool default: sharing=shared\n")
    with pytest.raises(Faulty, match=r"late\.txt, line 4"):
        read(path)


def test_a_placeholder_stands_for_the_same_thing_all_along_and_no_other_stands_for_it() -> None:
    memory = Memory()
    assert memory.agrees("{ip}", "10.0.0.1")
    assert memory.agrees("{ip}", "10.0.0.1")
    assert not memory.agrees("{ip}", "10.0.0.2")
    assert not memory.agrees("{ip2}", "10.0.0.1"), "{ip2} is another worker"
    assert memory.agrees('{"ip": "{ip2}"}', '{"ip": "10.0.0.2"}')
    assert memory.to_send(Says("PING {ip2}")) == "PING 10.0.0.2\n"


def test_two_placeholders_of_one_line_do_not_stand_for_the_same() -> None:
    assert not Memory().agrees("{ip} {ip2}", "10.0.0.1 10.0.0.1")
    assert Memory().agrees("{ip} {ip2} {ip}", "10.0.0.1 10.0.0.2 10.0.0.1")


@pytest.mark.parametrize("reply", ["10.0.0", "10.0.0.1 ", "ERROR", "localhost", "i-1", "10.0.0.1.2"])
def test_nothing_but_an_address_is_an_address(reply: str) -> None:
    assert not Memory().agrees("{ip}", reply)


def test_what_cannot_be_typed_is_escaped() -> None:
    assert unescaped(r"a\r\t\x00\xff\\{b*3}{ *2}") == "a\r\t\x00\xff\\bbb  "


def test_a_transcript_must_fill_a_placeholder_before_it_says_it() -> None:
    with pytest.raises(KeyError):
        Memory().to_send(Says("PING {ip}"))


# --- the document quotes it --------------------------------------------------------------------------------


def dialogues() -> list[tuple[int, list[str]]]:
    """The fenced blocks of the protocol document that hold a dialogue: line number, lines."""
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    found = [(text.count("\n", 0, block.start()) + 2, block[1].splitlines()) for block in blocks]
    return [(number, lines) for number, lines in found if any(SPOKEN_LINE.match(line) for line in lines)]


def files() -> dict[str, list[str]]:
    return {path.stem: path.read_text(encoding="ascii").splitlines() for path in CORPUS.glob("*.txt")}


def quoted_from(lines: list[str]) -> list[str]:
    """The names of the files that hold these lines, one after the other."""
    length = len(lines)
    return [
        name
        for name, whole in files().items()
        if any(whole[at : at + length] == lines for at in range(len(whole) - length + 1))
    ]


def test_the_protocol_document_has_a_dialogue_for_every_command() -> None:
    quoted = [line for _, lines in dialogues() for line in lines]
    for command in protocol.NAMES.values():
        assert any(re.match(rf"C[2-9]?[:+] {command}\b", line) for line in quoted), command


@pytest.mark.parametrize(
    ("number", "lines"), dialogues(), ids=lambda value: str(value) if isinstance(value, int) else ""
)
def test_every_dialogue_of_the_protocol_document_is_quoted_from_the_corpus(
    number: int, lines: list[str]
) -> None:
    assert quoted_from(lines), f"docs/protocol.md, line {number}: no transcript holds this dialogue"


def test_the_protocol_document_has_every_code_and_every_key() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [code for code in Code if f"`{code}`" not in text] == []
    assert [key for key in protocol.GET_WORKER_KEYS if f"`{key}=" not in text] == []
