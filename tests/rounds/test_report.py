"""What became of a job in tables, plots and CSV: on rounds that are made up."""

from __future__ import annotations

import csv
import io
from typing import Any

import msgspec
import pytest

from coordinator.rounds.adapters import privacy_of, uncovered
from coordinator.rounds.job import Job, Rounds
from coordinator.rounds.report import JobReport, csv_of, part_of, plots_of
from coordinator.rounds.running import private_text
from coordinator.rounds.store import DeviceRound, RoundRecord
from hwprofiles.report.page import page
from hwprofiles.report.plots import NoPlot, Plot
from hwprofiles.report.render import markdown_of, plain_of
from wire.privacy import Privacy


def round_of(number: int, loss: float | None, held_out: float | None, **devices: DeviceRound) -> RoundRecord:
    return RoundRecord(
        round=number, devices=devices, loss=loss, held_out_loss=held_out, wall_s=10.0 + number, expected_s=10.0,
        down_bytes=1_000_000, up_bytes=500_000, ended_unix=1.7e9 + number,
    )  # fmt: skip


def told(samples: int, **changes: Any) -> DeviceRound:
    return DeviceRound(samples=samples, compute_s=2.5, sent_bytes=250_000, **changes)


EACH = (
    round_of(0, 3.5, 4.0, pi4=told(10), nuc=told(30, bad_rows=2)),
    round_of(1, 3.0, 3.5, pi4=told(10, refused="=the change is NaN\n"), nuc=told(30, bad_rows=2)),
    msgspec.structs.replace(round_of(2, None, 3.25, pi4=told(10), nuc=told(30)), trained=False),
)
PLAIN = JobReport(job=Job(name="notes", model="m<1>", data="d", rounds=Rounds(count=2)), state="done", each=EACH)


def private() -> JobReport:
    each = tuple(
        msgspec.structs.replace(
            done,
            devices={
                name: msgspec.structs.replace(one, epsilon=0.5 * (done.round + 1) + (name == "nuc") * 0.1)
                for name, one in done.devices.items()
            },
        )
        for done in EACH
    )
    job = msgspec.structs.replace(PLAIN.job, privacy=Privacy(epsilon=2.0))
    return msgspec.structs.replace(PLAIN, job=job, each=each)


def points(plot: Plot | NoPlot, series: int = 0) -> list[tuple[float, float]]:
    assert isinstance(plot, Plot)
    return [(point.x, point.y) for point in plot.series[series].points]


def test_losses_stand_beside_what_was_spent_before_they_were_measured() -> None:
    by_round, by_time, by_bytes, times = plots_of(PLAIN)
    assert points(by_round) == [(0, 4.0), (1, 3.5), (2, 3.25)] and points(by_round, 1) == [(0, 3.5), (1, 3.0)]
    assert points(by_time) == [(0, 4.0), (10, 3.5), (21, 3.25)]
    assert points(by_bytes) == [(0, 4.0), (1.5, 3.5), (3.0, 3.25)]
    assert points(times) == [(0, 10.0), (1, 11.0)] and points(times, 1) == [(0, 10.0), (1, 10.0)]


def test_a_private_job_has_its_loss_against_epsilon_and_tells_no_counts() -> None:
    report = private()
    assert points(plots_of(report)[3]) == [(0.0, 4.0), (0.6, 3.5), (1.1, 3.25)]
    job, _, boards = part_of(report).tables
    assert dict(job.rows)["epsilon"] == "1.6 of 2, delta 1e-05"
    assert [row[3] for row in boards.rows] == ["not told", "not told"] and [row[-1] for row in boards.rows] == [
        "1.6", "1.5",
    ]  # fmt: skip


def test_of_a_private_job_that_was_split_it_says_what_no_noise_was_on() -> None:
    said = "only gradients are covered; activations are not"
    report = private()
    assert said not in str(part_of(report))
    split = msgspec.structs.replace(report, job=msgspec.structs.replace(report.job, mode="split"))
    part = part_of(split)
    assert any(note.startswith(f"Warning: {said}") for note in part.notes)
    assert dict(part.tables[0].rows)["noise"] == said
    assert privacy_of(split.job, EACH)["covers"] == said and privacy_of(report.job, EACH)["covers"] == "updates"
    assert said in private_text(split.job, split.job.privacy) and said not in private_text(
        report.job, Privacy(epsilon=1)
    )
    assert (
        uncovered(PLAIN.job)
        == uncovered(report.job)
        == ""
        == uncovered(msgspec.structs.replace(PLAIN.job, mode="split"))
    )


def test_who_took_part_and_who_was_left_out() -> None:
    _, rounds, boards = part_of(PLAIN).tables
    assert [row[3] for row in rounds.rows] == ["2 of 2", "1 of 2", "2 of 2"] and rounds.rows[-1][0] == "end"
    assert rounds.rows[1][-1] == "pi4: =the change is NaN?"
    nuc, pi4 = boards.rows
    assert nuc[:5] == ("nuc", "2 of 2", "0", "30", "2") and pi4[:3] == ("pi4", "1 of 2", "1")


def test_each_board_has_what_became_of_its_own_held_out_samples() -> None:
    judged = {"held_out_count": 4, "held_out_right": 3}
    each = (
        round_of(0, 3.5, 4.0, pi4=told(10, held_out_loss=2.0, held_out_count=4, held_out_right=1), nuc=told(5)),
        round_of(1, 3.0, 3.5, pi4=told(10, refused="late"), nuc=told(5, held_out_loss=1.5)),
        msgspec.structs.replace(round_of(2, None, 3.2, pi4=told(10, held_out_loss=1.0, **judged)), trained=False),
    )
    boards = part_of(msgspec.structs.replace(PLAIN, each=each)).tables[2]
    [place] = [number for number, column in enumerate(boards.columns) if column.title == "held out"]
    assert [row[place] for row in boards.rows] == ["1.5000 -> 1.5000", "2.0000 -> 1.0000, 75.0% right"]


@pytest.mark.parametrize("state", ["running", "stopped", "failed"])
def test_a_job_that_is_not_over_says_so(state: str) -> None:
    report = msgspec.structs.replace(PLAIN, state=state, each=EACH[:1])
    assert f"the job is {state}" in part_of(report).notes[0] and f"WARNING: the job is {state}" in plain_of(
        part_of(report)
    )


def test_of_nothing_comes_a_report_that_says_so() -> None:
    report = msgspec.structs.replace(PLAIN, state="running", each=())
    assert all(isinstance(plot, NoPlot) for plot in plots_of(report))
    shown = page([part_of(report)], [plots_of(report)])
    assert "no round is over" in shown and plain_of(part_of(report)) and markdown_of(part_of(report))
    assert len(csv_of(report).splitlines()) == 1


def test_the_csv_has_a_line_for_each_board_of_each_round() -> None:
    lines = list(csv.DictReader(io.StringIO(csv_of(PLAIN))))
    assert [(line["round"], line["device"]) for line in lines] == [
        ("0", "nuc"), ("0", "pi4"), ("1", "nuc"), ("1", "pi4"), ("2", "nuc"), ("2", "pi4"),
    ]  # fmt: skip
    assert lines[3]["device_refused"] == "'=the change is NaN?", "no formula"
    assert (lines[0]["held_out_loss"], lines[0]["device_sent_bytes"], lines[4]["loss"]) == ("4.0", "250000", "")


def test_the_page_fetches_nothing_and_shows_what_boards_say_as_text() -> None:
    evil = msgspec.structs.replace(
        PLAIN, each=(round_of(0, 3.5, 4.0, pi4=told(1, refused="<script src=//x></script>")),)
    )
    shown = page([part_of(evil)], [plots_of(evil)])
    assert "<script" not in shown and "m&lt;1&gt;" in shown and "http:" not in shown.replace("http-equiv", "")
    assert shown.count("<svg") == 4


def test_it_says_that_updates_were_masked() -> None:
    secure = msgspec.structs.replace(PLAIN, job=msgspec.structs.replace(PLAIN.job, secure=True))
    assert "updates were masked" in plain_of(part_of(secure), 200).lower()
    assert "masked" not in plain_of(part_of(PLAIN), 200)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_the_terminal(width: int) -> None:
    assert max(map(len, plain_of(part_of(private()), width).splitlines())) <= width


def test_the_document_comes_back_as_it_was() -> None:
    for report in (PLAIN, private()):
        assert msgspec.json.decode(msgspec.json.encode(report), type=JobReport) == report
