"""Windows of readings: which rows they are of, where none crosses, and what is no row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.training.data import BadRow
from models.training.features import drawn_of, kernels_of, series_features
from models.training.samples import IGNORED
from models.training.series import Window, windows
from wire.errors import CorruptData, UsageError
from wire.samples import Series

LABELS = ("walk", "rest")


def series(**more: object) -> Series:
    wanted = {"columns": ("ax", "ay"), "label": "activity", "window": 9, "stride": 4}
    return Series(**{**wanted, **more})  # type: ignore[arg-type]


def write(path: Path, rows: list[str], header: str = "t,who,ax,ay,activity") -> Path:
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return path


def rows_of(count: int, label: str = "walk", start: int = 0, who: str = "p1") -> list[str]:
    return [f"{place},{who},{place},{-place},{label}" for place in range(start, start + count)]


def found_in(path: Path, wanted: Series, keep_all: bool = False) -> tuple[list[Window], list[BadRow]]:
    found = list(windows(path, wanted, LABELS, keep_all))
    return [one for one in found if isinstance(one, Window)], [one for one in found if isinstance(one, BadRow)]


def starts(path: Path, wanted: Series) -> list[tuple[int, int]]:
    """First reading and label of each window, of which each has as many rows as it should, one behind the other."""
    for window in found_in(path, wanted)[0]:
        assert window.values.shape == (wanted.window, 2) and window.values.dtype == np.float32
        np.testing.assert_array_equal(window.values[:, 0], window.values[0, 0] + np.arange(wanted.window))
        np.testing.assert_array_equal(window.values[:, 1], -window.values[:, 0])
    return [(int(window.values[0, 0]), window.label) for window in found_in(path, wanted)[0]]


@pytest.mark.parametrize("count", [8, 9, 12, 13, 40])
@pytest.mark.parametrize("stride", [1, 4, 9, 14, None])
def test_windows_begin_every_so_many_rows(tmp_path: Path, count: int, stride: int | None) -> None:
    path = write(tmp_path / "a.csv", rows_of(count))
    expected = [(start, 0) for start in range(0, count - 9 + 1, stride or 9)]
    assert starts(path, series(stride=stride)) == expected


def test_no_window_crosses_a_label_a_recording_a_file_or_a_bad_row(tmp_path: Path) -> None:
    folder = tmp_path / "watch"
    folder.mkdir()
    write(folder / "a.csv", [*rows_of(10), *rows_of(10, "rest", 10), *rows_of(10, "rest", 20, "p2")])
    write(folder / "b.csv", [*rows_of(9, start=100), "109,p1,,5,walk", *rows_of(9, start=110)])
    assert starts(folder, series(id="who")) == [(0, 0), (10, 1), (20, 1), (100, 0), (110, 0)]
    assert starts(folder, series()) == [(0, 0), (10, 1), (14, 1), (18, 1), (100, 0), (110, 0)]
    stretches = [window.stretch for window in found_in(folder, series(id="who"))[0]]
    assert len(set(stretches)) == 5


def test_no_window_crosses_a_gap_in_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [*rows_of(10), *rows_of(10, start=13), *rows_of(9, start=5)])
    assert starts(path, series(time="t", most_gap=2)) == [(0, 0), (13, 0), (5, 0)]
    back = write(tmp_path / "back.csv", [*rows_of(9, start=20), *rows_of(9)])
    assert starts(back, series(time="t")) == [(20, 0), (0, 0)], "time that goes back is a break, too"
    bad = write(tmp_path / "b.csv", [*rows_of(9), "soon,p1,1,2,walk"])
    assert [str(one) for one in found_in(bad, series(time="t"))[1]] == ["b.csv:11: 't' is no number"]


def test_bad_rows_are_said_and_left_out(tmp_path: Path) -> None:
    odd = [
        "1,p,x,1,walk",
        "2,p,1,,walk",
        "3,p,nan,1,walk",
        "4,p,1e400,1,walk",
        "5,p,1,walk",
        "6,p,1,1,swim",
        "7,p,1,1,",
    ]
    path = write(tmp_path / "a.csv", [*rows_of(9), *odd, *rows_of(9, start=50)])
    found, bad = found_in(path, series())
    assert [int(window.values[0, 0]) for window in found] == [0, 50]
    assert [one.where for one in bad] == [f"a.csv:{line}" for line in range(11, 18)]
    assert [one.because for one in bad] == [
        "'ax' is no number", "'ay' is no number", "'ax' is no number", "'ax' is no number",
        "4 columns, the first line has 5", "its label is none of the job's", "its label is none of the job's",
    ]  # fmt: skip


def test_where_nothing_may_be_told_of_labels_windows_of_others_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [*rows_of(9), *rows_of(9, "swim")])
    found, bad = found_in(path, series(), keep_all=True)
    assert [window.label for window in found] == [0, IGNORED] and not bad


def test_readings_are_centred_and_scaled_as_declared(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", rows_of(9))
    [window], _ = found_in(path, series(centre=(1.0, 0.0), scale=(2.0, 10.0)))
    np.testing.assert_allclose(window.values[:, 0], (np.arange(9) - 1) / 2)
    np.testing.assert_allclose(window.values[:, 1], -np.arange(9) / 10)


def test_all_columns_that_are_missing_are_named_and_none_that_are_there(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", rows_of(9))
    write(tmp_path / "b.csv", ["1,2"], "secret,ay")
    with pytest.raises(CorruptData) as caught:
        found_in(tmp_path, series(id="who"))
    assert "b.csv has no column 'ax', 'activity', 'who' among its 2" in caught.value.message
    assert "secret" not in caught.value.message and "a.csv" not in caught.value.message
    with pytest.raises(UsageError, match="kind"):
        found_in(write(tmp_path / "notes.txt", []), series())


def test_a_line_that_is_no_line_ends_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.training.series.MAX_ROW_BYTES", 100)
    path = write(tmp_path / "a.csv", [*rows_of(9), "1," * 200, *rows_of(9)])
    found, bad = found_in(path, series())
    assert len(found) == 1 and "longer than" in bad[0].because and "the rest of the file is left out" in bad[0].because


def test_parquet_has_the_same_windows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    count = 30
    table = {"ax": [float(place) for place in range(count)], "ay": [-place for place in range(count)],
             "activity": ["walk"] * 15 + ["rest"] * 15}  # fmt: skip
    table["ax"][3] = None  # type: ignore[call-overload]
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    assert starts(tmp_path / "a.parquet", series()) == [(4, 0), (15, 1), (19, 1)]
    parquet.write_table(pyarrow.table({"ax": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(CorruptData, match="no column 'ay', 'activity' among its 1"):
        found_in(tmp_path / "a.parquet", series())


def test_features_are_of_each_window_and_of_so_many_as_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [*rows_of(60), "x", *rows_of(60, "rest", 200)])
    wanted = series(kernels=16)
    made = series_features(path, wanted, LABELS, seed=4)
    found, _ = found_in(path, wanted)
    kernels = kernels_of(wanted, 4)
    np.testing.assert_array_equal(made.values, kernels.features(np.stack([window.values for window in found])))
    assert [row.label for row in made.rows] == [window.label for window in found]
    assert [row.ids.tolist() for row in made.rows] == [[place] for place in range(len(found))]
    assert made.bad_rows == 1 and len(made.said) == 1
    fewer = series_features(path, series(kernels=16, most_windows=5), LABELS, seed=4)
    kept = sorted(drawn_of(len(found), 5, 4))
    np.testing.assert_array_equal(fewer.values, made.values[kept])
    assert [row.label for row in fewer.rows] == [made.rows[place].label for place in kept]
    with pytest.raises(CorruptData, match="no 200 rows of one label behind each other"):
        series_features(path, series(window=200), LABELS, seed=4)


def test_what_is_held_out_shares_no_reading_with_what_is_trained_on(tmp_path: Path) -> None:
    lines = []
    for place in range(12):
        lines += rows_of(30, LABELS[place % 2], 1000 * place)
    made = series_features(write(tmp_path / "a.csv", lines), series(stride=1, kernels=8), LABELS, seed=1)
    for share in (0.02, 0.1, 0.3):
        parts = made.split(share, seed=3)
        stretch = [{made.stretches[int(row.ids[0])] for row in part} for part in parts]
        assert stretch[0] and stretch[1] and not stretch[0] & stretch[1]
        assert len(parts.held_out) + len(parts.trained) == len(made.rows)
        assert len(stretch[1]) == max(1, int(12 * share)), share
    assert not made.split(0.0, 3).held_out
    single = series_features(write(tmp_path / "b.csv", rows_of(60)), series(kernels=8), LABELS, seed=1)
    parts = single.split(0.2, 3)
    assert [int(row.ids[0]) for row in (*parts.trained, *parts.held_out)] == list(range(13))
    assert len(parts.held_out) == 3
