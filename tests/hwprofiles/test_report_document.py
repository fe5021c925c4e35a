"""The report document: complete, read again as it was written, refused when it was changed, and shown in every form."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hwprofiles.profile import Profile, save
from hwprofiles.reading import Absent, Reading
from hwprofiles.report import document, views
from hwprofiles.report.document import Report, encode, load, make
from hwprofiles.report.page import report_page
from tests.hwprofiles import examples
from tests.hwprofiles.test_report import emulated
from tests.hwprofiles.test_verdict import good
from wire.errors import CorruptData, Refused, UsageError

NOW = 1_795_000_000.0


def steps() -> tuple[Any, ...]:
    return tuple(
        examples.timing(seconds * stack * (1.2 if context > 16 else 1), phase, tokens, context, stack)
        for stack in (1, 6)
        for context in (16, 256)
        for phase, tokens, seconds in (("decode", 1, 0.003), ("prefill", 32, 0.025), ("prefill", 128, 0.09))
    )


def measured() -> Profile:
    """As a board measures: several numbers of tokens, contexts and depths, and one run that drifts."""
    base = examples.profile()
    block = msgspec.structs.replace(base.modules[0], timings=(*steps(), base.modules[0].timings[-1]))
    return msgspec.structs.replace(base, modules=(block, *base.modules[1:]))


def report() -> Report:
    return make([measured(), emulated(), good()], NOW, {"jetson": "has measured nothing"})


def written(folder: Path, data: bytes) -> Path:
    path = folder / "report.json"
    path.write_bytes(data)
    return path


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert load(written(tmp_path, encode(report()))) == report()


def test_a_profile_becomes_a_report_of_one_board(tmp_path: Path) -> None:
    save(measured(), tmp_path / "profile.json")
    found = load(tmp_path / "profile.json")
    assert [board.device for board in found.boards] == ["pi5"]
    assert found.boards[0].sections == make([measured()], NOW).boards[0].sections


def test_all_raw_samples_are_in_the_document() -> None:
    assert report().boards[0].profile.modules[0].timings[0].samples.samples_s == tuple(
        round(value, 7) for value in measured().modules[0].timings[0].samples.samples_s
    )


def test_one_invalid_board_makes_the_report_invalid() -> None:
    assert make([good()], NOW).verdict == "VALID"
    assert make([good(), emulated()], NOW).verdict == "INVALID"
    assert make([], NOW).verdict == "INVALID"


def changed(data: bytes, **changes: Any) -> bytes:
    return msgspec.json.encode({**msgspec.json.decode(data), **changes})


def flattered(data: bytes) -> bytes:
    """The verdict mended by hand."""
    whole = msgspec.json.decode(data)
    whole["boards"][0]["verdict"], whole["boards"][0]["because"] = "VALID", []
    return msgspec.json.encode(whole)


def faster(data: bytes) -> bytes:
    """Samples made ten times as good, and the figures left as they were."""
    whole = msgspec.json.decode(data)
    samples = whole["boards"][0]["profile"]["modules"][0]["timings"][0]["samples"]
    samples["samples_s"] = [value / 10 for value in samples["samples_s"]]
    return msgspec.json.encode(whole)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flattered, "does not follow from its samples"),
        (faster, "does not follow from its samples"),
        (lambda data: changed(data, verdict="VALID"), "does not follow from its samples"),
        (lambda data: changed(data, schema="edgelam.report/2"), "of a later version"),
        (lambda data: changed(data, schema="edgelam.profile/9"), "of a later version"),
        (lambda data: changed(data, schema="other.report/2"), "neither a report nor a profile"),
        (lambda data: changed(data, boards=7), "neither a report nor a profile"),
        (lambda data: data[:-40], "neither a report nor a profile"),
        (lambda data: b"", "neither a report nor a profile"),
        (lambda data: b"[]", "neither a report nor a profile"),
        (lambda data: b"[" * 100_000, "neither a report nor a profile"),
        (lambda data: b"\xff\xfe", "neither a report nor a profile"),
        (lambda data: b" " * (document.MAX_REPORT_BYTES + 1), "larger than any report"),
    ],
)
def test_damaged_future_and_mended_reports_are_refused(damage: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match=said):
        load(written(tmp_path, damage(encode(report()))))


def test_another_versions_figures_are_derived_anew(tmp_path: Path) -> None:
    old = changed(flattered(encode(report())), made_by="0.0.1")
    assert load(written(tmp_path, old)) == report()


def test_no_file_is_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="can't read"):
            load(path)


def test_more_boards_than_a_report_takes_are_refused() -> None:
    with pytest.raises(Refused, match="65 boards"):
        make([good()] * 65, NOW)


def text_of(page: str) -> str:
    """What a reader of the page sees, in one line."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []
            self.quiet = False

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.quiet = tag == "style"

        def handle_data(self, data: str) -> None:
            if not self.quiet:
                self.words += data.split()

    reader = Reader()
    reader.feed(page)
    return " ".join(reader.words)


@pytest.mark.parametrize("form", ["markdown", "plain", "html"])
def test_every_form_says_verdicts_reasons_and_what_is_absent(form: str) -> None:
    text = {
        "markdown": lambda: views.markdown(report()).replace("\\", ""),
        "plain": lambda: views.plain(report(), 200),
        "html": lambda: text_of(report_page(report())),
    }[form]()
    words = " ".join(text.split())
    for said in (
        "Hardware benchmark report: ",
        "INVALID",
        "has measured nothing",
        "drift: the last third took 1.27 times",
        "speed 0.25",
        "throttled before measuring",
        "ceilings",
        "unknown, not zero",
        "measured live",
        "EMULATED",
    ):
        assert said in words, said


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    page = report_page(report())
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe|object|embed|base|form|a)\b|\b(src|href)\s*=|@import|url\(", page)
    assert "http" not in page.replace('http-equiv="Content', "")


def test_the_page_has_no_colour_but_grey() -> None:
    page = report_page(report())
    assert set(re.findall(r"(?:stroke|fill|color|background)[-a-z]*:\s*([^;]+);", page)) <= {
        "none", "currentColor", "Canvas", "light dark", "light", ".5", "1", "1.6", "2.5",
    }  # fmt: skip
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", page)) <= {"#8888"}


def test_series_of_one_plot_differ_without_colour_and_invalid_points_are_crossed_out() -> None:
    page = report_page(make([measured()], NOW))
    latency = page[page.index("<svg") : page.index("</svg>")]
    legend = re.findall(r'stroke-dasharray="([^"]+)" d="M84', latency)
    assert len(legend) == len(set(legend)) == 4
    assert latency.count('class="cross"') == 1 and "crossed out: INVALID" in latency
    assert re.search(r'role="img" .*aria-labelledby="(\S+) (\S+)"', latency)
    assert "Median time of a step with its 95 % interval, for 1 to 128 tokens" in latency


def test_ids_are_unique_on_the_page() -> None:
    ids = re.findall(r'\bid="([^"]+)"', report_page(report()))
    assert len(ids) == len(set(ids)) > 4


def test_plots_without_data_say_why_they_are_absent() -> None:
    cold = examples.conditions(temperature_c_after=Absent("no thermal zones"))
    words = text_of(report_page(make([good(conditions=cold, link=Absent("no broker"))], NOW)))
    for said in (
        "Temperature over time: \N{EN DASH} ABSENT no thermal zones",
        "Link: round trip: \N{EN DASH} ABSENT no broker",
        "Roofline: \N{EN DASH} ABSENT not measured",
        "Energy: \N{EN DASH} ABSENT unknown, not zero",
    ):
        assert said in words, said


@pytest.mark.parametrize("value", [1e308, -1e308, 0.0, 5e-324])
def test_absurd_figures_of_a_board_break_no_plot(value: float) -> None:
    held = examples.conditions(
        temperature_c_before=Reading(value, "x"), clock_hz_after=Reading(value, "x"), duration_s=abs(value)
    )
    timings = tuple(
        msgspec.structs.replace(timing, samples=examples.samples(min(abs(value), 1e6), spread=0)) for timing in steps()
    )
    link = msgspec.structs.replace(examples.link(), round_trip=examples.samples(min(abs(value), 1e6), spread=0))
    page = report_page(make([good(conditions=held, modules=(examples.module("block", *timings),), link=link)], NOW))
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.search(r"\b(nan|inf)\b", drawn)


EVIL = '\x1b[2J</td><script src="http://evil.test/x.js">x</script>&amp;"\'|`\u202e\n=cmd()'


def hostile() -> Profile:
    base = good()
    return good(
        identity=msgspec.structs.replace(base.identity, device=EVIL, board=Reading(EVIL, EVIL), cpu=Absent(EVIL)),
        modules=(msgspec.structs.replace(base.modules[0], key=EVIL, engine=EVIL, timings=steps()),),
        link=msgspec.structs.replace(examples.link(), broker=EVIL),
        failed={EVIL: EVIL},
        source="emulated",
        emulation=EVIL,
    )


def test_text_from_a_board_is_text_on_the_page() -> None:
    page = report_page(make([hostile()], NOW, {EVIL: EVIL}))
    assert not re.search(r"<script|\bsrc=\"http|\x1b", page)
    assert "&lt;script" in page


def test_csv_has_one_line_per_run_and_per_sample() -> None:
    made = report()
    figures = list(csv.DictReader(io.StringIO(views.figures_csv(made))))
    runs = [run for board in made.boards for part in board.sections for run in part.figures]
    assert [row["what"] for row in figures] == [run.what for run in runs]
    assert [float(row["median_s"]) for row in figures] == [run.median_s for run in runs]
    assert {row["verdict"] for row in figures} == {"VALID", "INVALID"}
    assert all(row["p99_s"] == "" for row in figures)
    samples = list(csv.DictReader(io.StringIO(views.samples_csv(made))))
    assert len(samples) == sum(run.count for run in runs)
    first = [float(row["seconds"]) for row in samples if row["what"] == runs[0].what][: runs[0].count]
    assert tuple(first) == made.boards[0].profile.modules[0].timings[0].samples.samples_s


def test_one_module_on_two_engines_keeps_its_samples_apart() -> None:
    one = examples.module("head", examples.timing(0.01))
    other = msgspec.structs.replace(examples.module("head", examples.timing(0.02)), engine="torch")
    made = make([good(modules=(one, other), link=Absent("x"))], NOW)
    samples = list(csv.DictReader(io.StringIO(views.samples_csv(made))))
    fast = [float(row["seconds"]) for row in samples if row["engine"] != "torch"]
    slow = [float(row["seconds"]) for row in samples if row["engine"] == "torch"]
    assert max(fast) < min(slow) and len(fast) == len(slow) == 30


def test_no_cell_of_the_csv_is_a_formula() -> None:
    formula = msgspec.structs.replace(good().identity, device="=HYPERLINK(1)")
    text = views.figures_csv(make([good(identity=formula)], NOW)) + views.samples_csv(make([hostile()], NOW))
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@")) or "\x1b" in cell]
    assert "'=HYPERLINK(1)" in cells
