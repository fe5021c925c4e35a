"""Files of text become samples; what is none is counted and named, and nothing stops for it."""

from __future__ import annotations

import sys
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


def test_columns_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = ["one", None, "two", " ", "x" * (MAX_ROW_BYTES + 1)] + ["more"] * 600
    count = len(texts)
    columns = {"id": list(range(count)), "text": texts, "label": list(range(count))}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=100)
    found = read(path)
    assert found.samples[:3] == (Sample("one", label="0"), Sample("two", label="2"), Sample("more", label="5"))
    assert (len(found.samples), found.bad_rows) == (602, 3)
    assert [row.where for row in found.said] == ["a.parquet:2", "a.parquet:4", "a.parquet:5"]
    parquet.write_table(pyarrow.table({"text": ["two"], "prompt": ["one"]}), path)
    assert read(path).samples == (Sample("two", "one"),)
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(CorruptData, match=r"no sample in it; a\.parquet:1: its text or prompt is none"):
        read(path)
    parquet.write_table(pyarrow.table({"words": ["two"]}), path)
    with pytest.raises(CorruptData, match="no column 'text' among its 1"):
        read(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-8] + bytes(8), bytes(reversed(whole))):
        path.write_bytes(damaged)
        with pytest.raises(CorruptData, match="can't be read: "):
            read(path)


def test_without_pyarrow_it_says_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="there is no pyarrow here") as caught:
        read(tmp_path)
    assert "edgelam[parquet]" in caught.value.try_
