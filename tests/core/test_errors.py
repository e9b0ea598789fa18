"""The tree of errors: each says its sentence and reaches a client as one line that a program can act on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from inspect import cleandoc, getdoc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core import errors
from broker.core.errors import (
    BrokerError,
    CloudError,
    Code,
    InstanceNotFound,
    NoCapacity,
    OfferingRefused,
    QuotaReached,
    Refusal,
    SettingsError,
    StoreError,
    UnknownCommand,
    WorkerNotFound,
)
from tests.core.generated import MANY

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BrokerError)]
RAISED = [kind for kind in TREE if kind is not BrokerError]  # the root is what a client makes of nonsense
CODELESS = {UnknownCommand: "ERROR: Unknown command", WorkerNotFound: "ERROR: Worker not found"}
REPLY = re.compile(r"ERROR: (?P<sentence>[ -~]*) \[(?P<code>[A-Z_]+)\]")
REPLY_CHARS_MAX = 450


def raised(kind: type[BrokerError], message: str) -> BrokerError:
    return kind([message]) if kind is SettingsError else kind(message)


def names(kinds: Sequence[type[BrokerError]]) -> list[str]:
    return [kind.__name__ for kind in kinds]


@pytest.mark.parametrize("kind", TREE, ids=names(TREE))
def test_an_error_without_a_message_says_the_sentence_of_its_kind(kind: type[BrokerError]) -> None:
    sentence = kind.__dict__.get("__doc__") or ""
    assert re.fullmatch(r"[ -~]{10,120}", sentence), "a sentence of its own, on one line"
    assert not sentence.endswith(".")
    error = kind([]) if kind is SettingsError else kind()
    assert error.message == str(error) == sentence


def test_no_two_kinds_of_error_say_the_same() -> None:
    sentences = [getdoc(kind) for kind in TREE]
    assert len(sentences) == len(set(sentences))


def test_the_tree_in_the_module_is_the_tree_of_the_classes() -> None:
    drawn: list[tuple[int, str]] = []
    for text in cleandoc(errors.__doc__ or "").splitlines():
        match = re.match(r"(?P<branches>[ │├└─]*)(?P<name>[A-Z]\w+)( .*)?$", text)
        if match and match["name"] in names(TREE):
            drawn.append((len(match["branches"]), match["name"]))
    parents, path = {}, dict[int, str]()
    for indent, name in drawn:
        path = {depth: other for depth, other in path.items() if depth < indent}
        parents[name] = path[max(path)] if path else None
        path[indent] = name
    bases = {kind.__name__: kind.__bases__[0].__name__ for kind in RAISED}
    assert parents == {"BrokerError": None, **bases}


def test_the_codes_are_the_published_closed_list() -> None:
    assert {str(code) for code in Code} == {
        "NO_CAPACITY", "BUDGET", "LIMIT", "TIMEOUT", "AUTH", "DENIED", "DRAINING", "CLOUD", "BAD_REQUEST",
    }  # fmt: skip


@given(kind=st.sampled_from(RAISED), message=st.text(max_size=1000))
@MANY
def test_a_client_reads_one_line_of_printable_ascii_with_a_code(
    kind: type[BrokerError], message: str
) -> None:
    reply = raised(kind, message).wire()
    assert re.fullmatch("ERROR: [ -~]*", reply)
    assert len(reply) <= REPLY_CHARS_MAX
    if kind not in CODELESS:
        match = REPLY.fullmatch(reply)
        assert match is not None
        assert match["code"] in set(Code)


@pytest.mark.parametrize(("kind", "published"), CODELESS.items(), ids=names(list(CODELESS)))
def test_the_two_published_lines_have_no_code(kind: type[BrokerError], published: str) -> None:
    assert kind().wire() == published


def test_only_the_two_published_lines_have_no_code() -> None:
    assert {kind for kind in RAISED if kind.code is None} == set(CODELESS)


def test_what_the_cloud_says_over_several_lines_arrives_on_one() -> None:
    error = CloudError("no room\r\n  in\tus-east-1a:\n\n ask again ")
    assert error.wire() == "ERROR: no room in us-east-1a: ask again [CLOUD]"


def test_what_no_terminal_should_be_sent_does_not_reach_a_client() -> None:
    assert CloudError("\x1b[2Jcleared\x00\x7f, naïve ~").wire() == "ERROR: ?[2Jcleared??, na?ve ~ [CLOUD]"


def test_an_essay_is_cut_and_keeps_its_code() -> None:
    reply = NoCapacity("x" * 5000).wire()
    assert reply == f"ERROR: {'x' * (errors.WIRE_MESSAGE_CHARS_MAX - 3)}... [NO_CAPACITY]"
    whole = "y" * errors.WIRE_MESSAGE_CHARS_MAX
    assert NoCapacity(whole).wire() == f"ERROR: {whole} [NO_CAPACITY]"


def test_every_problem_of_the_settings_is_in_the_error() -> None:
    error = SettingsError(problem for problem in ("broker.id: too long", "pool.gpu: no image"))
    assert error.problems == ("broker.id: too long", "pool.gpu: no image")
    assert error.message == "broker.id: too long; pool.gpu: no image"


def test_only_where_a_machine_may_exist_the_call_counts_as_sent() -> None:
    """A lost answer, or a token that the cloud has seen with other parameters: both may have launched."""
    sent = [kind for kind in TREE if issubclass(kind, CloudError) and kind.sent]
    assert names(sent) == ["CloudUnreachable", "OrderMismatch"]


@pytest.mark.parametrize(
    ("kind", "parent"),
    [(QuotaReached, OfferingRefused), (NoCapacity, Refusal), (InstanceNotFound, CloudError)],
)
def test_whoever_handles_a_family_handles_its_members(
    kind: type[BrokerError], parent: type[BrokerError]
) -> None:
    with pytest.raises(parent, match="gone"):
        raise kind("gone")


def test_a_disk_that_is_full_is_a_limit_of_the_house_and_not_the_clouds_fault() -> None:
    assert StoreError("disk full").wire() == "ERROR: disk full [LIMIT]"
    assert not issubclass(StoreError, CloudError)
