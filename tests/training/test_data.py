"""Files of text become samples; what is none is counted and named, and nothing stops for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.training.data import MAX_ROW_BYTES, Sample, read
from wire.errors import CorruptData, UsageError


def test_objects_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        b'{"text": "one", "label": 3}', b"", b'{"text": 5}', b'{"txt": "x"}', b"not json", b'{"text": "  "}',
        b'{"prompt": "p", "text": "two"}', b'{"text": "\xff"}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(rows))
    found = read(path)
    assert found.samples == (Sample("one", label="3"), Sample("two", "p"))
    assert found.bad_rows == 5
    assert [str(row).split(":")[:2] for row in found.said] == [["a.jsonl", str(line)] for line in (3, 4, 5, 6, 8)]


def test_a_row_that_is_too_long_is_left_out_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (2 * MAX_ROW_BYTES) + b'"}\n{"text": "after"}\n')
    found = read(path)
    assert found.samples == (Sample("after"),) and found.bad_rows == 1


def test_tables_with_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text,prompt\n1,"one, two",\n2\n3,three,p\n', encoding="utf-8")
    found = read(path)
    assert found.samples == (Sample("one, two"), Sample("three", "p")) and found.bad_rows == 1
    path.write_text("label,text\nnet,one\n3,two\n", encoding="utf-8")
    assert read(path).samples == (Sample("one", label="net"), Sample("two", label="3"))
    path.write_text("id,words\n1,x\n", encoding="utf-8")
    with pytest.raises(CorruptData, match=r"no column 'text' among the 2 of the first line$"):  # which may be a row
        read(path)


def test_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\none\nline two\n\n  \nthree", encoding="utf-8")
    assert read(path).samples == (Sample("one\nline two"), Sample("three"))


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert read(tmp_path).samples == (Sample("first"), Sample("second"))


def test_what_can_not_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "gone.jsonl")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"kind '\.bin'"):
        read(tmp_path / "a.bin")
    with pytest.raises(UsageError, match=r"no \.jsonl"):
        read(tmp_path)
    (tmp_path / "e.jsonl").write_text('{"no": 1}')
    with pytest.raises(CorruptData, match=r"no sample in it; e\.jsonl:1"):
        read(tmp_path / "e.jsonl")
