"""The ways to other boards in a report: every figure, in every form, and none where none was measured."""

from __future__ import annotations

import csv
import io

import msgspec

from hwprofiles.profile import Goodput, PairMeasurement, Profile, compact
from hwprofiles.report import views
from hwprofiles.report.document import make
from hwprofiles.report.page import report_page
from hwprofiles.report.plots import NoPlot, Plot
from hwprofiles.report.render import markdown
from hwprofiles.report.ways import COLUMNS, way_line, way_plot
from tests.hwprofiles import examples

NOW = 1_795_000_000.0


def way(peer: str = "pi4", middle_s: float = 0.004, **changes: object) -> PairMeasurement:
    fields: dict[str, object] = {
        "peer": peer, "way": "direct", "measured_at_unix": NOW, "round_trip_payload_bytes": 1200,
        "round_trip": examples.samples(middle_s, 40), "sent": 43, "lost": 2, "late": 1,
        "there": Goodput(payload_bytes=524288, chunk_bytes=65536, samples=examples.samples(0.0458752, 3, 0.0)),
        "back": Goodput(payload_bytes=524288, chunk_bytes=65536, samples=examples.samples(0.0917504, 3, 0.0)),
    }  # fmt: skip
    return PairMeasurement(**{**fields, **changes})  # type: ignore[arg-type]


def with_ways(*ways: PairMeasurement) -> Profile:
    return msgspec.structs.replace(examples.profile(), pairs=ways)


def test_a_line_has_percentiles_jitter_losses_and_the_rate_each_way() -> None:
    line = dict(zip(COLUMNS, way_line(way()), strict=True))
    assert line["to"] == "pi4" and line["through"] == "the boards' own brokers"
    assert line["there"] == "80 Mbit/s" and line["back"] == "40 Mbit/s"
    assert line["lost"] == "2 of 43" and line["late"] == "1 of 43" and line["verdict"] == "VALID"
    assert "ms" in line["round trip p50"] and "ms" in line["p90"] and line["jitter"].endswith("s")


def test_too_few_samples_are_invalid_and_no_figure() -> None:
    poor = way(round_trip=examples.samples(0.004, 2))
    line = dict(zip(COLUMNS, way_line(poor), strict=True))
    assert line["verdict"].startswith("INVALID") and line["p90"] == "-"


def test_the_ways_are_in_every_form_of_a_report() -> None:
    profile = with_ways(way(), way("jetson", 0.012))
    report = make([profile], NOW, {})
    for text in (markdown(profile), report_page(report), views.samples_csv(report)):
        assert "pi4" in text and "jetson" in text
    lines = list(csv.reader(io.StringIO(views.samples_csv(report))))
    assert sum("way to pi4 (direct)" in line for line in lines) == 40 + 3 + 3
    drawn = way_plot(profile.pairs)
    assert isinstance(drawn, Plot) and len(drawn.series) == 2


def test_a_board_that_measured_no_way_has_neither_table_nor_plot() -> None:
    assert "Ways to other boards" not in report_page(make([examples.profile()], NOW, {}))
    assert isinstance(way_plot(()), NoPlot)


def test_samples_of_ways_are_thinned_as_all_others() -> None:
    kept = compact(with_ways(way(round_trip=examples.samples(0.004, 100))))
    [pair] = kept.pairs
    assert len(pair.round_trip.samples_s) == 40 and pair.round_trip.taken == 100


def test_names_of_boards_can_not_break_a_page() -> None:
    page = report_page(make([with_ways(way("<script>alert(1)</script>"))], NOW, {}))
    assert "<script>alert" not in page
