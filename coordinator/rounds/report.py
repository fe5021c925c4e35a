"""What became of a job, for people and papers: its document, tables, plots, CSV. Pure.

Held-out losses are of the factors that a round begins with: beside what was spent until then, not in that round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from msgspec import Struct

from coordinator.rounds.adapters import spent_by, uncovered
from coordinator.rounds.job import Adapter, Job
from coordinator.rounds.store import DeviceRound, RoundRecord
from hwprofiles.plain import clean
from hwprofiles.report.plots import NoPlot, Plot, Point, Series
from hwprofiles.report.render import Part
from hwprofiles.report.rows import ITEMS, Column, Table
from hwprofiles.report.views import csv_text
from wire.modalities import Told
from wire.units import bytes_text, seconds_text

ROUND_COLUMNS: Final = (
    "round", "trained", "loss", "held_out_loss", "held_out_accuracy", "wall_s", "expected_s", "lost", "down_bytes",
    "up_bytes", "ended_unix",
)  # fmt: skip
DEVICE_COLUMNS: Final = tuple(name for name in DeviceRound.__struct_fields__ if name != "by_modality")
MODALITY_COLUMNS: Final = Told.__struct_fields__


class JobReport(Struct, frozen=True, kw_only=True):
    """GET /v1/jobs/{name}/rounds."""

    schema: Literal["edgelam.job-report/1"] = "edgelam.job-report/1"
    job: Job
    state: str
    because: str = ""
    base: str = ""
    """Digest of the checkpoint that the adapter is of."""
    mode_because: str = ""
    """Where the job left its mode open."""
    trunk: str = ""
    """Of a split model: where its blocks are, and why."""
    each: tuple[RoundRecord, ...] = ()
    """Rounds that are over, the first one first; last what judged the adapter, if it came to that."""


def part_of(report: JobReport) -> Part:
    """What is known in tables."""
    notes = [] if report.state == "done" else [f"Warning: the job is {report.state}, this is what there is so far"]
    if report.job.privacy is None:
        sent = "states and gradients" if report.job.is_split else "updates"
        notes.append(f"Privacy: none, {sent} were sent without noise")
    elif uncovered(report.job):
        notes.append(f"Warning: {uncovered(report.job)}: who has the states that were sent can find out the texts")
    if report.job.secure:
        notes.append("Updates were masked: of each round the coordinator learnt their sum alone")
    return Part(
        title=f"Fine-tuning {report.job.name}: {clean(report.job.trains)}, {report.state}",
        notes=tuple(notes),
        tables=(
            _job(report),
            _rounds(report),
            *([_modalities(report)] if report.job.modalities else []),
            _devices(report),
        ),
    )


def _job(report: JobReport) -> Table:
    job, trained = report.job, _trained(report.each)
    losses = [done.held_out_loss for done in report.each if done.held_out_loss is not None]
    right = [done.held_out_accuracy for done in report.each if done.held_out_accuracy is not None]
    spent = spent_by(report.each)
    mode = [said for said in (report.mode_because, report.trunk) if said]
    if job.is_split and not report.mode_because:
        mode.insert(0, job.mode)
    items = [
        ("state", report.state + (f": {clean(report.because)}" if report.because else "")),
        (
            "model",
            f"{clean(job.trains)} at {'f32' if job.labels else job.precision}, checkpoint {report.base[:19] or '-'}",
        ),
        *([("mode", clean("; ".join(mode)))] if mode else []),
        ("adapter", _adapter(job.adapter)) if not job.modalities else ("space", f"{job.space.width} wide"),
        ("rounds", f"{len(trained)} of {job.rounds.count}; {job.rounds.who} take part, {job.rounds.aggregation}"),
        ("held-out loss", " -> ".join(map(_loss, (losses[0], losses[-1]))) if losses else "-"),
        *([("held-out labels", f"{_right(right[0])} -> {_right(right[-1])}")] if right else []),
        ("time in rounds", seconds_text(sum(done.wall_s for done in report.each))),
        ("sent", _bytes(report.each)),
    ]
    if job.privacy is not None:
        worst = max(spent.values(), default=0.0)
        items.append(("epsilon", f"{worst:.3g} of {job.privacy.epsilon:g}, delta {job.privacy.delta:g}"))
        if uncovered(job):
            items.append(("noise", uncovered(job)))
    return Table(title="Job", columns=ITEMS, rows=tuple(items), headed=False)


def _adapter(adapter: Adapter) -> str:
    where = " of the last block" if adapter.blocks == "last" else ""
    return f"rank {adapter.rank} on {', '.join(adapter.matrices)}{where}, scale {adapter.scale_alpha:g}"


def _rounds(report: JobReport) -> Table:
    columns = (
        Column("round"), Column("loss", 1), Column("held out"), *([Column("right")] if report.job.labels else []),
        Column("boards"), Column("took"),
        Column("planned", 2), Column("sent", 1), Column("left out"),
    )  # fmt: skip
    lines = []
    for done in report.each:
        counted = [device for device, told in done.devices.items() if not told.refused]
        refused = [f"{device}: {clean(told.refused)}" for device, told in done.devices.items() if told.refused]
        lines.append(
            (
                str(done.round) if done.trained else "end",
                _loss(done.loss),
                _loss(done.held_out_loss),
                *([_right(done.held_out_accuracy)] if report.job.labels else []),
                f"{len(counted)} of {len(done.devices)}",
                seconds_text(done.wall_s),
                "-" if done.expected_s is None else seconds_text(done.expected_s),
                bytes_text(done.down_bytes + done.up_bytes),
                "; ".join(refused) or "-",
            )
        )
    return Table(title="Rounds", columns=columns, rows=tuple(lines))


def _modalities(report: JobReport) -> Table:
    """Of each how many boards have it, and how well its labels are told, of all together and of each."""
    columns = (Column("modality"), Column("boards"), Column("samples"), Column("right"), Column("by board"))
    lines = []
    for name in sorted(report.job.modalities):
        last = {
            device: found.by_modality[name]
            for done in report.each
            for device, found in done.devices.items()
            if name in found.by_modality
        }
        right = [done.accuracy_by[name] for done in report.each if name in done.accuracy_by]
        by_board = [
            f"{device} {_right(told.held_out_right / told.held_out_count)}"
            for device, told in sorted(last.items())
            if told.held_out_count
        ]
        lines.append(
            (
                clean(name),
                str(len(last)),
                str(sum(told.samples for told in last.values())),
                f"{_right(right[0])} -> {_right(right[-1])}" if right else "-",
                ", ".join(by_board) or "-",
            )
        )
    return Table(title="Modalities", columns=columns, rows=tuple(lines))


def _devices(report: JobReport) -> Table:
    columns = (
        Column("board"), Column("rounds"), Column("not counted", 1), Column("samples", 1), Column("bad rows", 2),
        Column("held out"), Column("computed"), Column("sent", 1), Column("epsilon"),
    )  # fmt: skip
    spent, trained = spent_by(report.each), _trained(report.each)
    lines = []
    for device in sorted({device for done in report.each for device in done.devices}):
        told = [done.devices[device] for done in trained if device in done.devices]
        counted = [one for one in told if not one.refused]
        lines.append(
            (
                device,
                f"{len(counted)} of {len(trained)}",
                str(len(told) - len(counted)),
                str(max((one.samples for one in told), default=0)) if report.job.privacy is None else "not told",
                str(max((one.bad_rows for one in told), default=0)) if report.job.privacy is None else "not told",
                _judged([done.devices[device] for done in report.each if device in done.devices]),
                seconds_text(sum(one.compute_s for one in counted)) if any(one.compute_s for one in counted) else "-",
                bytes_text(sum(one.sent_bytes for one in told)),
                f"{spent[device]:.3g}" if device in spent else "-",
            )
        )
    return Table(title="Boards", columns=columns, rows=tuple(lines))


def plots_of(report: JobReport) -> tuple[Plot | NoPlot, ...]:
    """Loss against rounds, time, bytes and, of a private job, epsilon; labels told right against rounds; and what
    rounds took."""
    seconds, sent, spent = _until(report.each)
    rounds = [float(done.round) for done in report.each]
    against = [
        _loss_plot(report, "seconds of rounds", seconds),
        _loss_plot(report, "MB sent, down and up", [one / 1e6 for one in sent]),
    ]
    if report.job.privacy is not None:
        against.append(_loss_plot(report, "epsilon of the board that told most", spent))
    right = [_right_plot(report, rounds)] if report.job.labels else []
    return (_by_round(report, rounds), *right, *against, _times(report))


def _right_plot(report: JobReport, rounds: Sequence[float]) -> Plot | NoPlot:
    title = "Labels told right by round"
    points = _points(rounds, [done.held_out_accuracy for done in report.each])
    if not points:
        return NoPlot(title=title, because="no board told how many")
    said = f"from {points[0].y:.1%} to {points[-1].y:.1%}"
    series = (Series(name="held out, before the round", points=points),)
    return Plot(title=title, alt=said, x_label="round", y_label="share that is right", series=series)


def _by_round(report: JobReport, rounds: Sequence[float]) -> Plot | NoPlot:
    title = "Loss by round"
    series = [
        Series(name=name, points=points)
        for name, values in (
            ("held out, before the round", [done.held_out_loss for done in report.each]),
            ("while training", [done.loss if done.trained else None for done in report.each]),
        )
        if (points := _points(rounds, values))
    ]
    if not series:
        return NoPlot(title=title, because="no round that told a loss is over")
    said = ", ".join(f"{one.name}: {one.points[0].y:.4g} to {one.points[-1].y:.4g}" for one in series)
    return Plot(title=title, alt=said, x_label="round", y_label="loss, nats", series=tuple(series))


def _loss_plot(report: JobReport, label: str, values: Sequence[float]) -> Plot | NoPlot:
    title = f"Held-out loss against {label.split(',')[0]}"
    points = _points(values, [done.held_out_loss for done in report.each])
    if not points:
        return NoPlot(title=title, because="no board told a held-out loss")
    said = f"from {points[0].y:.4g} at {points[0].x:.4g} to {points[-1].y:.4g} at {points[-1].x:.4g}"
    series = (Series(name="held out", points=points),)
    return Plot(title=title, alt=said, x_label=label, y_label="loss, nats", series=series)


def _times(report: JobReport) -> Plot | NoPlot:
    title, trained = "What rounds took", _trained(report.each)
    if not trained:
        return NoPlot(title=title, because="no round is over")
    rounds = [float(done.round) for done in trained]
    series = [Series(name="measured", points=_points(rounds, [done.wall_s for done in trained]))]
    planned = _points(rounds, [done.expected_s for done in trained])
    if planned:
        series.append(Series(name="planned", points=planned))
    said = f"{min(done.wall_s for done in trained):.3g} to {max(done.wall_s for done in trained):.3g} s"
    return Plot(title=title, alt=said, x_label="round", y_label="time", series=tuple(series), seconds_y=True)


def _points(xs: Sequence[float], ys: Iterable[float | None]) -> tuple[Point, ...]:
    return tuple(Point(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and math.isfinite(y))


def _until(each: Sequence[RoundRecord]) -> tuple[list[float], list[float], list[float]]:
    """Seconds, bytes and the largest epsilon that were spent before each round."""
    seconds, sent, spent = [0.0], [0.0], [0.0]
    for number, done in enumerate(each):
        seconds.append(seconds[-1] + done.wall_s)
        sent.append(sent[-1] + done.down_bytes + done.up_bytes)
        spent.append(max(spent_by(each[: number + 1]).values(), default=0.0))
    return seconds[:-1], sent[:-1], spent[:-1]


def _trained(each: Sequence[RoundRecord]) -> list[RoundRecord]:
    return [done for done in each if done.trained]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _judged(told: Sequence[DeviceRound]) -> str:
    """What became of a board's loss on what it holds out itself, and which share of labels it tells right at last."""
    known = [one for one in told if one.held_out_loss is not None]
    if not known:
        return "-"
    first, last = known[0], known[-1]
    right = "" if last.held_out_right is None else f", {_right(last.held_out_right / max(1, last.held_out_count))}"
    return f"{_loss(first.held_out_loss)} -> {_loss(last.held_out_loss)}{right}"


def _right(value: float | None) -> str:
    """A share of labels: '81.3 % right'."""
    return "-" if value is None else f"{value:.1%} right"


def _bytes(each: Sequence[RoundRecord]) -> str:
    down, up = sum(done.down_bytes for done in each), sum(done.up_bytes for done in each)
    return f"{bytes_text(down)} to boards, {bytes_text(up)} from them"


def csv_of(report: JobReport) -> str:
    """A line for each board of each round; of a job of several modalities for each of these that it has."""
    of_modality = ("modality", *(f"modality_{name}" for name in MODALITY_COLUMNS)) if report.job.modalities else ()
    columns = (*ROUND_COLUMNS, "device", *(f"device_{name}" for name in DEVICE_COLUMNS), *of_modality)
    lines = []
    for done in report.each:
        of_round = [getattr(done, name) for name in ROUND_COLUMNS]
        for device, told in sorted(done.devices.items()):
            line = (*of_round, device, *(getattr(told, name) for name in DEVICE_COLUMNS))
            each = [(name, *(getattr(one, key) for key in MODALITY_COLUMNS)) for name, one in told.by_modality.items()]
            lines += [(*line, *one) for one in sorted(each)] or [(*line, *(None for _ in of_modality))]
    return csv_text(columns, lines)
