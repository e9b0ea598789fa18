"""Records of local machines: whole or missing, never half."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from broker.providers.local_records import LOG_BYTES_KEPT, LOG_BYTES_MAX, Record, Records

RECORD = Record("local-1", "order-1", '{"command": []}', "127.1.2.3", 2560, 1_800_000_000.0, tags={"a": "ä"})


@pytest.fixture
def records(tmp_path: Path) -> Records:
    records = Records(tmp_path / "local")
    records.open()
    return records


def test_a_record_is_read_as_it_was_written(records: Records) -> None:
    records.write(RECORD)
    ended = replace(RECORD, pid=7, started_seconds=12.34, ended_unix=1.5, reason="ended")
    assert records.read("local-1") == RECORD
    records.write(ended)
    assert records.read("local-1") == ended
    assert records.ids() == ["local-1"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id": "local-1"}', b"\xff"])
def test_a_file_that_holds_no_record_counts_as_missing(records: Records, content: bytes) -> None:
    records.leash_file("local-1").write_bytes(content)
    assert records.read("local-1") is None


def test_a_copied_record_is_not_a_second_machine(records: Records) -> None:
    records.write(RECORD)
    records.leash_file("local-2").write_bytes(records.leash_file("local-1").read_bytes())
    assert records.read("local-2") is None


def test_a_record_from_a_later_version_is_read(records: Records) -> None:
    records.write(RECORD)
    path = records.leash_file("local-1")
    path.write_text(path.read_text().replace("{", '{"colour": "blue", ', 1))
    assert records.read("local-1") == RECORD


def test_a_write_that_fails_leaves_the_old_record_and_nothing_else(records: Records) -> None:
    records.leash_file("local-1").mkdir()
    with pytest.raises(OSError, match="directory"):
        records.write(RECORD)
    assert list(records.directory.iterdir()) == [records.leash_file("local-1")]


def test_what_a_killed_broker_was_writing_is_cleared_away(records: Records) -> None:
    (records.directory / "local-1.tmp").write_text("{")
    records.open()
    assert list(records.directory.iterdir()) == []


def test_only_living_machines_keep_their_address(records: Records) -> None:
    records.write(RECORD)
    records.write(replace(RECORD, id="local-2", address="127.1.2.4"))
    records.write(replace(RECORD, id="local-3", address="127.1.2.5", ended_unix=1.0))
    assert records.addresses_taken(besides="local-1") == {"127.1.2.4"}


def test_a_directory_that_is_not_there_holds_nothing_and_one_that_cannot_be_read_is_an_error(
    records: Records,
) -> None:
    records.directory.rmdir()
    assert records.ids() == []
    records.touch("local-1")
    records.remove("local-1")
    records.directory.write_text("")
    with pytest.raises(NotADirectoryError):
        records.ids()


def test_the_last_words_are_the_last_line_that_says_something(records: Records) -> None:
    assert records.last_words("local-1") == ""
    log_file = records.log_file("local-1")
    log_file.write_bytes(b"first\n\xffit \x1b[31mbroke\t here \n\n \n")
    assert records.last_words("local-1") == "\ufffdit [31mbroke here"
    log_file.write_text("x" * 5000)
    assert records.last_words("local-1") == "x" * 200


def test_a_log_that_grew_too_long_keeps_its_end_and_its_writer(records: Records) -> None:
    log_file = records.log_file("local-1")
    records.trim_log("local-1")
    with log_file.open("ab") as writer:
        writer.write(b"a" * LOG_BYTES_MAX)
        writer.flush()
        records.trim_log("local-1")
        assert log_file.stat().st_size == LOG_BYTES_MAX
        writer.write(b"b" * LOG_BYTES_KEPT)
        writer.flush()
        records.trim_log("local-1")
        writer.write(b"c")
    assert log_file.read_bytes() == b"b" * LOG_BYTES_KEPT + b"c"
